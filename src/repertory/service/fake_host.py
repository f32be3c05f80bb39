"""A host without a model: it speaks the whole contract with canned words, so that the service can be tried alone.

    HOST_MODULE=repertory.service.fake_host repertory serve

What it plays depends on the base model's name:

    …unavailable    cannot be loaded                  …crash         dies at step 3 of every run
    …large          needs all memory for itself       …crash-once    dies at step 8 of a run that is not resumed
    …too-large      needs more than there is          …fail          every run fails at step 3
    …dies           dies while loading                …damaged       the adapter's files are not whole
    …slow           takes a second to load            …unsupported   is refused when its hub is asked
    …not-found      is not there when its hub is asked

and on FAKE_HOST_STEPS (of a run, default 10) and FAKE_HOST_STEP_SECONDS (default 0.02). A message with the word
"long" is answered with max_tokens words, at 50 a second; one with "die" kills the host; of one with "again"
all but a word is told to be cached.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Literal, TypeVar

from pydantic import BaseModel

from repertory import architectures, manifest
from repertory.contracts import (
    AdapterRef,
    BaseKey,
    Device,
    Estimate,
    EstimateRequest,
    EvaluateRequest,
    Evaluation,
    Forgetting,
    GenerateRequest,
    HostHealth,
    Preview,
    PreviewRequest,
    PreviewRow,
    PreviewSpan,
    RunEvent,
    RunSpec,
    SampledToken,
    TestResponse,
    TokenChunk,
    TokenLogprob,
    TokensRequest,
    Usage,
)
from repertory.data.imports import TokenReport
from repertory.data.prepare import read_conversations, with_system
from repertory.errors import (
    BaseModelUnavailable,
    DeadlineExceeded,
    ErrorInfo,
    InsufficientMemory,
    JobFailed,
    RepertoryError,
    StorageFailed,
)
from repertory.lifeline import end_with_service
from repertory.settings import settings

STEPS = int(os.environ.get("FAKE_HOST_STEPS", "10"))
STEP_SECONDS = float(os.environ.get("FAKE_HOST_STEP_SECONDS", "0.02"))
WORD_SECONDS = 0.02
STEPS_PER_CHECKPOINT = 5
TOKENS_PER_ROW = 100
DEVICE = Device(kind="cpu", name="fake", memory_bytes=1 << 30, has_bf16=False)

Asked = TypeVar("Asked", bound=BaseModel)


class FakeHost:
    """What a host remembers."""

    def __init__(self, base_model: str, key: BaseKey, socket_path: Path) -> None:
        self.base_model = base_model
        self.key = key
        self.socket_path = socket_path
        self.health = HostHealth(state="loading", phase="reading weights", device=DEVICE)
        self.adapters: dict[str, AdapterRef] = {}
        self.stops: dict[str, threading.Event] = {}  # of the runs in progress
        self.interrupted: set[str] = set()  # of them, those that are to end with a checkpoint
        self.running = 0
        self.changed = threading.Condition()

    def load(self) -> None:
        if self.base_model.endswith("dies"):
            os._exit(1)
        if self.base_model.endswith("slow"):
            time.sleep(1)
        error: RepertoryError | None = None
        if self.base_model.endswith("unavailable"):
            error = BaseModelUnavailable(f"{self.base_model} cannot be loaded: it is not in the cache, and no hub is.")
        elif self.base_model.endswith("too-large") or (self.base_model.endswith("large") and self._is_accompanied()):
            error = InsufficientMemory(f"{self.base_model} needs 7.0 GiB and 1.0 GiB is free.")
        if error is not None:
            self.health = self.health.model_copy(update={"state": "failed", "error": error.info})
        else:
            self.health = self.health.model_copy(update={"state": "ready", "phase": "", "key": self.key})

    def present_health(self) -> HostHealth:
        return self.health.model_copy(
            update={"adapters": list(self.adapters), "running": self.running, "runs": list(self.stops)}
        )

    def generate(self, request: GenerateRequest) -> Generator[TokenChunk]:
        begin = time.monotonic()
        message = request.messages[-1].content if request.prompt is None else request.prompt
        if "die" in message.split():
            os._exit(1)
        if request.adapter is not None:
            self.adapters[request.adapter.training_id] = request.adapter
        self._count(1)
        try:
            speaker = "base" if request.adapter is None else request.adapter.training_id
            words = ["Hello", " from", f" {speaker}"]
            if "long" in message.split():
                words += [" la"] * (request.max_tokens - len(words))
            prompt = [said.content for said in request.messages] if request.prompt is None else [request.prompt]
            prompt_words = sum(len(said.split()) for said in prompt)
            known_words = prompt_words - 1 if "again" in message.split() else 0
            used = Usage(prompt_tokens=prompt_words, completion_tokens=0, cached_tokens=known_words)
            for said, word in enumerate(words[: request.max_tokens], 1):
                time.sleep(WORD_SECONDS)
                if request.timeout_seconds is not None and time.monotonic() > begin + request.timeout_seconds:
                    yield TokenChunk(error=DeadlineExceeded("The time of this request was over.").info)
                    return
                used = used.model_copy(update={"completion_tokens": said})
                yield TokenChunk(text=word, logprobs=self._scores(word, request.top_logprobs), usage=used)
            yield TokenChunk(finish_reason="length" if len(words) >= request.max_tokens else "stop", usage=used)
        finally:
            self._count(-1)

    @staticmethod
    def _scores(word: str, top: int | None) -> list[SampledToken]:
        if top is None:
            return []
        return [SampledToken(token=word, logprob=-0.5, top=[TokenLogprob(token=word, logprob=-0.5)] * top)]

    def run(self, spec: RunSpec) -> Generator[RunEvent]:
        stop = self.stops[spec.training_id] = threading.Event()
        try:
            yield from self._story(spec, stop)
        finally:
            with self.changed:
                del self.stops[spec.training_id]
                self.interrupted.discard(spec.training_id)
                self.changed.notify_all()

    def stop_run(self, training_id: str) -> bool:
        with self.changed:
            stop = self.stops.get(training_id)
            if stop is None:
                return False
            stop.set()
            self.changed.wait_for(lambda: training_id not in self.stops)
        return True

    def interrupt_run(self, training_id: str) -> bool:
        with self.changed:
            stop = self.stops.get(training_id)
            if stop is not None:
                self.interrupted.add(training_id)
                stop.set()
        return stop is not None

    def evaluate(self, request: EvaluateRequest) -> Evaluation:
        given = request.conversations is not None
        return Evaluation(
            perplexity=10.0,
            base_perplexity=20.0,
            val_nll=2.3026,
            base_val_nll=2.9957,
            scored_tokens=100,
            scored_conversations=len(request.conversations or [0]),
            scored_on="given" if given else "held-out",
            test_responses=[
                TestResponse(
                    instruction=prompt.instruction,
                    generated_response=f"Hello from {request.adapter.training_id}",
                    base_response="Hello from base",
                    expected_response=prompt.expected_response,
                )
                for prompt in request.test_prompts
            ],
            total_parameters=1000,
            trainable_parameters=10,
            model_size_mb=0.1,
        )

    def estimate(self, request: EstimateRequest) -> Estimate:
        """A token for each word, and a gibibyte of memory; a model that is too large takes seven."""
        self.check_on_hub(request.key)
        conversations = request.conversations
        if conversations is None:
            conversations = read_conversations(Path(request.conversations_path or ""))
        spoken = [message for one in conversations for message in one.messages]
        peak = 7 << 30 if request.key.base_model.endswith("too-large") else DEVICE.memory_bytes // 2
        fits = peak <= DEVICE.memory_bytes
        return Estimate(
            tokens=sum(len(message.content.split()) for message in spoken),
            trained_tokens=sum(len(message.content.split()) for message in spoken if message.role == "assistant"),
            truncated_rows=0,
            skipped_rows=0,
            conversations=len(conversations),
            steps=STEPS,
            epochs=request.hyperparameters.num_train_epochs or 3,
            seconds=STEPS * STEP_SECONDS,
            peak_memory_bytes=peak,
            available_memory_bytes=DEVICE.memory_bytes,
            fits=fits,
            advice=[] if fits else ["Choose a smaller base model."],
            hyperparameters=request.hyperparameters.model_dump(exclude_none=True),
        )

    def check_on_hub(self, key: BaseKey) -> None:
        """Of a hub that knows every name and is out of reach for some."""
        if key.base_model.endswith("unavailable"):
            raise BaseModelUnavailable(f"{key.base_model} is not in the cache, and no hub is.")
        if key.base_model.endswith("not-found"):
            raise BaseModelUnavailable(f"the hub has no model {key.base_model}", code="base_model_not_found")
        if key.base_model.endswith("unsupported"):
            raise BaseModelUnavailable(
                f"the architecture of {key.base_model} is not supported",
                code=architectures.CODE,
                cure=architectures.CURE,
            )

    def preview(self, request: PreviewRequest) -> Preview:
        """A line for each message; the assistant's are learned."""
        rows = []
        for conversation in request.conversations:
            messages = with_system(conversation, request.system_prompt)
            spans = [PreviewSpan(text=f"{one.role}: {one.content}\n", trained=one.is_trained) for one in messages]
            words = sum(len(span.text.split()) for span in spans)
            learned = sum(len(span.text.split()) for span in spans if span.trained)
            row = PreviewRow(messages=messages, spans=spans, tokens=words, trained_tokens=learned, dropped_messages=0)
            rows.append(row)
        return Preview(base_model=request.key.name, max_seq_length=2048, rows=rows)

    def tokens(self, request: TokensRequest) -> TokenReport:
        conversations = read_conversations(Path(request.conversations_path))
        about = PreviewRequest(
            key=request.key,
            conversations=conversations,
            hyperparameters=request.hyperparameters,
            system_prompt=request.system_prompt,
        )
        shown = self.preview(about)
        lengths = sorted(row.tokens for row in shown.rows)
        return TokenReport(
            measured=len(lengths),
            p50=lengths[len(lengths) // 2],
            p90=lengths[-1],
            p99=lengths[-1],
            longest=lengths[-1],
            trained_share=sum(row.trained_tokens for row in shown.rows) / sum(lengths),
            max_tokens=shown.max_seq_length,
            shortened=0,
            left_out=0,
        )

    def _story(self, spec: RunSpec, stop: threading.Event) -> Generator[RunEvent]:
        yield RunEvent(kind="preparing", progress=0.0)
        rows = len(Path(spec.conversations_path).read_text().splitlines())
        checkpoints = Path(spec.checkpoint_dir)
        done = self._newest_checkpoint(checkpoints)
        resolved = spec.hyperparameters.over(settings().hyperparameters).model_dump(exclude_none=True)
        begin = {
            "hyperparameters": resolved,
            "train_conversations": rows,
            "training_tokens": 100 * rows,
            "warnings": ["a fake host trains nothing"],
        }
        if done:
            begin["resumed_from_step"] = done
        yield RunEvent(kind="running", progress=done / (STEPS + 1), data=begin)
        for step in range(spec.recorded_steps + 1, done + 1):
            yield self._step(step)
        for step in range(done + 1, STEPS + 1):
            time.sleep(STEP_SECONDS)
            if stop.is_set():
                kind: Literal["cancelled", "interrupted"] = "cancelled"
                if spec.training_id in self.interrupted:
                    kind = "interrupted"
                    if step > 1:
                        yield self._checkpoint(checkpoints, step - 1)
                yield RunEvent(kind=kind, progress=(step - 1) / (STEPS + 1))
                return
            self._misbehave(step, resumed=bool(done))
            yield self._step(step)
            if step % STEPS_PER_CHECKPOINT == 0:
                yield self._checkpoint(checkpoints, step)
        yield RunEvent(kind="evaluating", progress=STEPS / (STEPS + 1), data={"phase": "measuring the voice"})
        first = read_conversations(Path(spec.conversations_path))[0].messages
        asked = [message.content for message in first if message.role == "user"]
        samples = [{"instruction": text, "generated_response": "Hm.", "base_response": "Hm."} for text in asked]
        report = {"perplexity": 10.0, "base_perplexity": 20.0, "test_responses": samples}
        output = Path(spec.output_dir)
        files = {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": len(b"{}").to_bytes(8, "little") + b"{}",  # holds no tensor
            "training_metadata.json": json.dumps(begin).encode(),
            "report.json": json.dumps(report).encode(),
        }
        self._write(output, files)
        shutil.rmtree(checkpoints, ignore_errors=True)  # of no more use, and gone before the end is told
        if self.base_model.endswith("damaged"):
            (output / "adapter_model.safetensors").write_bytes(b"not what was there")
        yield RunEvent(kind="completed", progress=1.0, data={"base_model": spec.base_model, "report": report})

    @staticmethod
    def _step(step: int) -> RunEvent:
        return RunEvent(
            kind="step",
            progress=step / (STEPS + 1),
            data={
                "step": step,
                "total_steps": STEPS,
                "epoch": step / STEPS,
                "loss": 3.0 - step / STEPS,
                "learning_rate": 2e-4,
                "grad_norm": 1.0,
                "tokens_per_second": 100.0,
                "eta_seconds": (STEPS - step) * STEP_SECONDS,
            },
        )

    def _checkpoint(self, folder: Path, step: int) -> RunEvent:
        self._write(folder / f"checkpoint-{step}", {"state.json": b"{}"})
        return RunEvent(kind="checkpoint", progress=step / (STEPS + 1), data={"step": step})

    def _misbehave(self, step: int, *, resumed: bool) -> None:
        if self.base_model.endswith("crash") and step == 3:
            os._exit(1)
        if self.base_model.endswith("crash-once") and step == 8 and not resumed:
            os._exit(1)
        if self.base_model.endswith("fail") and step == 3:
            raise JobFailed("The loss is not a number any more.", code="diverged", cure="Lower LEARNING_RATE.")

    def _count(self, change: int) -> None:
        with self.changed:
            self.running += change

    def _is_accompanied(self) -> bool:
        """Whether another host of the same service is alive."""
        return any(_answers(path) for path in self.socket_path.parent.glob("*.sock") if path != self.socket_path)

    @staticmethod
    def _newest_checkpoint(folder: Path) -> int:
        whole = [path for path in folder.glob("checkpoint-*") if manifest.verify(path) is None]
        return max((int(path.name.removeprefix("checkpoint-")) for path in whole), default=0)

    @staticmethod
    def _write(folder: Path, files: dict[str, bytes]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            manifest.write_durably(folder / name, content)
        manifest.write_manifest(folder, list(files))


class Refusal(BaseModel):
    error: ErrorInfo


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        super().__init__(str(host.socket_path), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that hangs up is nothing to talk about; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(self.server.host.present_health())

    def do_POST(self) -> None:
        host = self.server.host
        body = self.rfile.read(int(self.headers["content-length"]))
        match self.path:
            case "/generate":
                self._stream(host.generate(GenerateRequest.model_validate_json(body)))
            case "/runs":
                self._stream(self._told(RunSpec.model_validate_json(body)))
            case "/evaluate":
                self._answer(host.evaluate(EvaluateRequest.model_validate_json(body)))
            case "/estimate":
                self._answer_or_refuse(host.estimate, EstimateRequest.model_validate_json(body))
            case "/hub/check":
                self._answer_or_refuse(host.check_on_hub, BaseKey.model_validate_json(body))
            case "/preview":
                self._answer(host.preview(PreviewRequest.model_validate_json(body)))
            case "/tokens":
                self._answer(host.tokens(TokensRequest.model_validate_json(body)))
            case path if path.endswith("/interrupt"):
                was_there = host.interrupt_run(path.split("/")[2])
                self._answer(None, status=200 if was_there else 404)
            case "/adapters/load":
                adapter = AdapterRef.model_validate_json(body)
                host.adapters[adapter.training_id] = adapter
                self._answer(None)
            case "/adapters/unload":
                host.adapters.pop(AdapterRef.model_validate_json(body).training_id, None)
                self._answer(None)
            case "/forget":
                for training_id in Forgetting.model_validate_json(body).training_ids:
                    host.adapters.pop(training_id, None)
                self._answer(None)

    def do_DELETE(self) -> None:
        was_there = self.server.host.stop_run(self.path.rpartition("/")[2])
        self._answer(None, status=200 if was_there else 404)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer_or_refuse(self, answer: Callable[[Asked], BaseModel | None], asked: Asked) -> None:
        try:
            self._answer(answer(asked))
        except RepertoryError as error:
            self._answer(Refusal(error=error.info), status=error.status)

    def _told(self, spec: RunSpec) -> Generator[RunEvent]:
        try:
            yield from self.server.host.run(spec)
        except RepertoryError as error:
            yield RunEvent(kind="failed", progress=0.0, error=error.info)
        except OSError as error:  # of the disk; a caller that hung up is noticed where the story is written to
            yield RunEvent(kind="failed", progress=0.0, error=StorageFailed.of(error).info)

    def _answer(self, body: BaseModel | None, status: int = 200) -> None:
        content = b"{}" if body is None else body.model_dump_json().encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, lines: Generator[BaseModel]) -> None:
        """To the end of the connection. Where the caller has closed it, writing raises and `lines` is closed."""
        self.send_response(200)
        self.end_headers()
        with closing(lines):
            for line in lines:
                self.wfile.write(f"{line.model_dump_json()}\n".encode())


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--quantization")
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    end_with_service()
    key = BaseKey.resolve(arguments.base_model, settings().hyperparameters, DEVICE)
    if arguments.quantization is not None:
        key = key.model_copy(update={"quantization": arguments.quantization, "dtype": arguments.dtype})
    host = FakeHost(arguments.base_model, key, arguments.socket)
    server = Server(host)
    threading.Thread(target=host.load, daemon=True).start()
    server.serve_forever(poll_interval=10.0)


if __name__ == "__main__":
    main()
