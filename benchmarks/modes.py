"""`python -m benchmarks.modes`: what a host with the bundled model takes in each precision, measured.

One real host process a mode: resident memory when it is ready, after a reply, and at the most in a training run with
default settings, without and with gradient checkpointing. The table of the README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from repertory.contracts import BUNDLED_MODEL, GenerateRequest, Hyperparameters, RunSpec
from repertory.data.conversations import Message
from repertory.model.general_chats import general_chats
from repertory.service.host_process import LARGE_PAGES
from repertory.settings import settings

MODES = [("none", "fp32"), ("none", "bf16"), ("8bit", "bf16"), ("4bit", "bf16")]
CONVERSATIONS = 32  # two optimizer steps, each of a full micro-batch and more
PATIENCE_SECONDS = 600.0
CLEAR_HIGH_WATER_MARK = "5"  # https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html


@dataclass(frozen=True)
class Taken:
    quantization: str
    dtype: str
    ready_mb: float
    replying_mb: float
    training_mb: float  # at the most
    training_again_mb: float  # with gradient checkpointing


class Host:
    def __init__(self, folder: Path, quantization: str, dtype: str, **limits: str) -> None:
        """`limits`: settings of this host."""
        self.folder = folder
        self.socket = socket = folder / "host.sock"
        command = [sys.executable, "-m", "repertory.model.host", "--socket", str(socket), "--base-model", BUNDLED_MODEL]
        command += ["--quantization", quantization, "--dtype", dtype]
        environment = LARGE_PAGES | os.environ | {"MODEL_CACHE_DIR": str(settings().model_cache_dir.resolve())} | limits
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=folder)
        transport = httpx.HTTPTransport(uds=str(socket), retries=10)
        self.client = httpx.Client(transport=transport, base_url="http://host", timeout=PATIENCE_SECONDS)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not socket.exists() or (health := self.client.get("/health").json())["state"] == "loading":
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit("the host did not start")
            time.sleep(0.02)
        if health["state"] != "ready":
            raise SystemExit(health["error"]["message"])

    @property
    def resident_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def reply(self, max_tokens: int = 100) -> None:
        request = GenerateRequest(
            request_id="memory",
            org_id="memory",
            adapter=None,
            messages=[Message(role="user", content="Tell me about your day.")],
            temperature=0,
            top_p=1,
            top_k=0,
            max_tokens=max_tokens,
        )
        with self.client.stream("POST", "/generate", content=request.model_dump_json()) as answer:
            last = list(answer.iter_lines())[-1]
        if "finish_reason" not in last:
            raise SystemExit(f"no reply: {last}")

    def most_mb_of_training(self, name: str, hyperparameters: Hyperparameters) -> float:
        """The high-water mark of a whole run: probe, steps, evaluation, replies."""
        conversations = self.folder / "conversations.jsonl"
        chats = general_chats()
        chosen = [chats[at % len(chats)] for at in range(CONVERSATIONS)]
        conversations.write_text("".join(chat.model_dump_json() + "\n" for chat in chosen))
        spec = RunSpec(
            org_id="memory",
            training_id=name,
            base_model=BUNDLED_MODEL,
            conversations_path=str(conversations),
            output_dir=str(self.folder / name),
            checkpoint_dir=str(self.folder / f"{name}-checkpoints"),
            hyperparameters=hyperparameters,
            validation_split=0.1,
        )
        process = Path("/proc") / str(self.process.pid)
        (process / "clear_refs").write_text(CLEAR_HIGH_WATER_MARK)
        with self.client.stream("POST", "/runs", content=spec.model_dump_json()) as answer:
            events = [json.loads(line) for line in answer.iter_lines()]
        if events[-1]["kind"] != "completed":
            raise SystemExit(f"the run did not complete: {events[-1].get('error')}")
        lines = (process / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6

    def end(self) -> None:
        self.client.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def hosting(quantization: str, dtype: str, **limits: str) -> Iterator[Host]:
    with TemporaryDirectory() as folder:
        host = Host(Path(folder), quantization, dtype, **limits)
        try:
            yield host
        finally:
            host.end()


def measured(quantization: str, dtype: str) -> Taken:
    plain = Hyperparameters(num_train_epochs=1, batch_size=4, gradient_accumulation_steps=4)
    with hosting(quantization, dtype) as host:
        ready = host.resident_mb
        host.reply()
        replying = host.resident_mb
        training = host.most_mb_of_training("plain", plain)
    # In a process of its own: what glibc has kept of a run before would count.
    with hosting(quantization, dtype) as host:
        again = host.most_mb_of_training("again", plain.model_copy(update={"gradient_checkpointing": True}))
    return Taken(quantization, dtype, ready, replying, training, again)


def main() -> None:
    table = Table("precision", "ready", "after a reply", "training, at the most", "the same, GRADIENT_CHECKPOINTING")
    found = []
    for quantization, dtype in MODES:
        taken = measured(quantization, dtype)
        found.append(taken)
        mode = dtype if quantization == "none" else f"{quantization}, {dtype}"
        numbers = (taken.ready_mb, taken.replying_mb, taken.training_mb, taken.training_again_mb)
        table.add_row(mode, *(f"{number:.0f} MB" for number in numbers))
    Console(width=120).print(table)
    print(json.dumps([asdict(taken) for taken in found]))


if __name__ == "__main__":
    main()
