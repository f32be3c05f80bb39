"""How fast each reader reads, and in how much memory: `make bench-import`.

An export of each format is written from a made-up history, grown to the asked number of messages by repeating its
records, and read in a process of its own, so that its peak of memory is the reader's. The row `prepared` is a CSV of
one channel in which nothing is repeated, read and prepared to the end.
"""

from __future__ import annotations

import csv
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
from repertory.data.preparation.pipeline import PrepareOptions, prepare
from repertory.data.preparation.scratch import Scratch
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
PARQUET = "parquet"
PREPARED = "prepared"
DIALOGUES = ("chatgpt", "claude", "sharegpt", "alpaca", "native", "openai_jsonl", PARQUET)
ROWS = [*ARRAYS, *LINES, *FOLDERS, PARQUET, PREPARED]


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.imports")
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--format", action="append", choices=ROWS)
    parser.add_argument("--read", type=Path, help="read this export and print what it took")
    parser.add_argument("--persona", help="and prepare it")
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(_measured(asked.read, asked.persona)))
        return
    results = {}
    for name in asked.format or ROWS:
        scratch = Path(tempfile.mkdtemp(prefix="bench-import-"))
        try:
            if name == PREPARED:
                path = _unrepeated(asked.messages, scratch)
            else:
                path = _grown(name, asked.messages // SEED_MESSAGES, scratch)
            command = [sys.executable, "-m", "benchmarks.imports", "--read", str(path)]
            command += ["--persona", "u1"] if name == PREPARED else []
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


def _measured(path: Path, persona: str | None) -> dict[str, float]:
    begun = time.process_time()
    with open_history(path) as history:
        if persona is None:
            messages = sum(entry.kind == "said" for entry in history)
        else:
            with Scratch() as scratch:
                prepared = prepare(history, PrepareOptions(persona=[persona]), scratch)
                learned = sum(len(line) for line in prepared.conversations.lines())
                assert learned, "as much as the worker writes"
            messages = history.report.messages
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
    if name == PARQUET:
        from pyarrow import parquet  # brings 30 MB, which are not to be counted with the other readers

        rows = parquet.read_table(path)
        with parquet.ParquetWriter(path, rows.schema) as grown_file:
            for _ in range(times):
                grown_file.write_table(rows)
        return path
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


def _unrepeated(messages: int, folder: Path) -> Path:
    path = folder / "chat.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "author", "timestamp", "text"])
        for entry in _history("1", messages, dialogue=False):
            rows.writerow([entry.id, entry.author_id, f"{entry.time:.0f}", f"{entry.text} {entry.id}"])
    return path


def _history(channel: str, messages: int = SEED_MESSAGES, *, dialogue: bool) -> Iterable[Entry]:
    drawn = random.Random(channel)
    clock = 1_500_000_000.0
    for number in range(messages):
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
