"""How fast each reader reads, and in how much memory: `make bench-import`.

An export of each format is written from a made-up history, grown to the asked number of messages by repeating its
records, and read in a process of its own, so that its peak of memory is the reader's.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tests import exports

from repertory.data.history import Entry
from repertory.data.readers import open_history

SEED_MESSAGES = 10_000
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "yeah",
    "lol",
    "ok",
    "what",
    "naïve",
    "👍",
    "👩\u200d👩\u200d👧",
    "שלום",
]

# Where in the document its records begin and end; formats of lines have one line before them, or none.
ARRAYS = {
    "discord": ('"messages": [', '],\n  "messageCount"'),
    "telegram": ('"messages": [', "]\n   }\n  ]"),
    "twitch": ('"comments": [', "]}"),
    "instagram_sealed": ('"messages": [', "]}"),
    "chatgpt": ("[", "]"),
    "claude": ("[", "]"),
    "sharegpt": ("[", "]"),
    "alpaca": ("[", "]"),
    "native": ('"conversations": [', "]}"),
}
LINES = {"discord_csv": 1, "generic_csv": 1, "whatsapp": 1, "irc": 0, "openai_jsonl": 0}
FOLDERS = ("slack", "messenger", "discord_package")  # of many files by their nature
DIALOGUES = ("chatgpt", "claude", "sharegpt", "alpaca", "native", "openai_jsonl")


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.imports")
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--format", action="append", choices=[*ARRAYS, *LINES, *FOLDERS])
    parser.add_argument("--read", type=Path, help="read this export and print what it took")
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(_read(asked.read)))
        return
    results = {}
    for name in asked.format or [*ARRAYS, *LINES, *FOLDERS]:
        scratch = Path(tempfile.mkdtemp(prefix="bench-import-"))
        try:
            path = _grown(name, asked.messages // SEED_MESSAGES, scratch)
            command = [sys.executable, "-m", "benchmarks.imports", "--read", str(path)]
            results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        finally:
            shutil.rmtree(scratch)
    print(json.dumps(results, indent=2))
    table = Table("export", "messages", "MB", "messages/s of CPU time", "peak MB", box=None)
    for name, result in results.items():
        rate = result["messages"] / result["cpu_seconds"]
        sizes = (f"{result['bytes'] / 1e6:,.0f}", f"{rate:,.0f}", f"{result['peak_bytes'] / 1e6:,.0f}")
        table.add_row(name, f"{result['messages']:,}", *sizes)
    Console(stderr=True).print(table)


def _read(path: Path) -> dict[str, float]:
    begun = time.process_time()
    with open_history(path) as history:
        messages = sum(entry.kind == "said" for entry in history)
    return {
        "messages": messages,
        "cpu_seconds": time.process_time() - begun,
        "peak_bytes": _peak_bytes(),
        "bytes": sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()),
    }


def _peak_bytes() -> int:
    """Of this process alone; ru_maxrss counts what the process was before it became this program."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux says so"
    return int(found[1]) * 1024


def _grown(name: str, times: int, folder: Path) -> Path:
    write: Callable[[list[Entry], Path], Path] = getattr(exports, name)
    if name in FOLDERS:
        channels = [str(number + 1) for number in range(times)]
        return write([entry for channel in channels for entry in _history(channel, dialogue=False)], folder)
    path = write(list(_history("1", dialogue=name in DIALOGUES)), folder)
    file = max((p for p in [path, *path.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size)
    text = file.read_text()
    if name in LINES:
        lines = text.split("\n", LINES[name])
        head, records, joint, tail = "".join(f"{line}\n" for line in lines[:-1]), lines[-1], "", ""
    else:
        opening, closing = ARRAYS[name]
        begin, end = text.index(opening) + len(opening), text.rindex(closing)
        head, records, joint, tail = text[:begin], text[begin:end], ",", text[end:]
    with file.open("w") as grown:
        grown.write(head)
        for number in range(times):
            grown.write((joint if number else "") + records)
        grown.write(tail)
    return path


def _history(channel: str, *, dialogue: bool) -> Iterable[Entry]:
    drawn = random.Random(channel)
    clock = 1_500_000_000.0
    for number in range(SEED_MESSAGES):
        clock += drawn.randint(1, 300)
        author = ("user", "assistant")[number % 2] if dialogue else f"u{drawn.randint(1, 5)}"
        yield Entry(
            channel=f"{number // 10}" if dialogue else channel,
            id=str(number + 1),
            author_id=author,
            author=author,
            text=" ".join(drawn.choices(WORDS, k=drawn.randint(1, 18))),
            time=clock,
        )


if __name__ == "__main__":
    main()
