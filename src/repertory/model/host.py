"""The host process: one base model on one device, driven over HTTP on a Unix socket (the calls are in contracts.py).

    python -m repertory.model.host --socket PATH --base-model NAME[@REVISION] [--quantization Q --dtype D] < pipe

It answers /health at once and says what it is downloading or loading. Of the hosts whose sockets lie in one folder only
one loads at a time, since two would each miscount the memory that is left; downloads wait for nobody.

It ends with its service: when the control pipe closes, or with a signal from the kernel where the service had no time
to close it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import structlog
import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from repertory.connection import unless_disconnected
from repertory.contracts import (
    AdapterRef,
    BaseKey,
    Device,
    Download,
    EstimateRequest,
    EvaluateRequest,
    Forgetting,
    GenerateRequest,
    HostHealth,
    HostStats,
    PreviewRequest,
    RunEvent,
    RunSpec,
    TokenChunk,
    TokensRequest,
)
from repertory.errors import Conflict, ErrorInfo, InvalidInput, RepertoryError, StorageFailed, Unavailable
from repertory.lifeline import end_with_service
from repertory.logs import configure, without_text
from repertory.settings import Settings, settings

if TYPE_CHECKING:  # torch takes seconds to import; /health must answer before
    from repertory.data.render import Renderer
    from repertory.model.base import Outline
    from repertory.model.loop import DeviceLoop

HEARTBEAT_SECONDS = 2.0
ASKERS = 8  # that may wait for a hub at once
TERMINAL = ("completed", "failed", "cancelled", "interrupted")

log = structlog.get_logger()
Parsed = TypeVar("Parsed", bound=BaseModel)


class Host:
    """What the process is doing: loading, ready with a device loop, or failed."""

    def __init__(self, base_model: str, quantization: str | None, dtype: str | None, turn: Path) -> None:
        self.base_model = base_model
        self.turn = turn  # the lock of the host that loads
        self.key: BaseKey | None = None
        self.download: Download | None = None
        self.quantization = quantization
        self.dtype = dtype
        self.phase = "importing torch"
        self.device: Device | None = None
        self.error: ErrorInfo | None = None
        self._loop: DeviceLoop | None = None

    def run(self, settings: Settings) -> None:
        """Load the base model and drive the device until `stop`; the device's thread."""
        from repertory.model import base, weights
        from repertory.model.lock import alone
        from repertory.model.loop import DeviceLoop

        try:
            self.device = base.detect_device()
            key = BaseKey.resolve(self.base_model, settings.hyperparameters, self.device)
            if self.quantization and self.dtype:
                key = key.model_copy(update={"quantization": self.quantization, "dtype": self.dtype})
            self.key = key
            located = weights.locate(key, settings, self._say, self._tell)
            self.key, self.download = located.key, None
            with alone(self.turn, lambda: self._say("waiting for its turn to load")):
                loaded = base.load(self.key.base_model, settings, self.device, self.key, self._say)
            limit = settings.adapter_memory_bytes
            self._loop = DeviceLoop(loaded, settings.training_share, settings.adapter_slots, limit)
        except RepertoryError as error:
            log.warning("host failed", code=error.code, reason=error.message)
            self.error = error.info
            return
        except OSError as error:
            log.error("host failed", **without_text(error))
            self.error = StorageFailed.of(error).info
            return
        except Exception as error:  # whatever it was, the service must hear of it
            log.error("host failed", **without_text(error))
            message = f"loading {self.base_model} failed: {type(error).__name__}"  # its words may quote a token
            self.error = RepertoryError(message, code="base_model_unavailable").info
            return
        self._say("ready")
        try:
            self._loop.run_forever()
        except BaseException as error:  # nobody drives the device any more: better no host, so that it is started again
            log.error("the device's thread died", **without_text(error))
            os._exit(1)

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.stop()

    @property
    def loop(self) -> DeviceLoop:
        if self._loop is None:
            raise Unavailable(f"the base model is not ready: {self.phase}", code="model_loading")
        return self._loop

    def outline(self, key: BaseKey) -> tuple[Outline, Renderer | None]:
        """Of the base model in memory, or of another one from its description. Raises BaseModelUnavailable."""
        from repertory.model import base, weights

        ours = self.loop.base
        if key == ours.key:
            return ours, ours.renderer
        assert self.device is not None
        folder = weights.locate_outline(key, settings())
        return base.outline(folder, key, self.device), base.renderer_in(folder, key.base_model)

    @property
    def health(self) -> HostHealth:
        if self.error is not None:
            return HostHealth(state="failed", device=self.device, key=self.key, error=self.error)
        if self._loop is None:
            return HostHealth(
                state="loading", phase=self.phase, device=self.device, key=self.key, download=self.download
            )
        loop, scheduler = self._loop, self._loop.engine.scheduler
        return HostHealth(
            state="ready",
            device=self.device,
            key=loop.base.key,
            adapters=loop.voices.training_ids,
            running=len(scheduler.running),
            waiting=scheduler.waiting_count,
            runs=loop.run_ids,
            memory_bytes=loop.memory_bytes,
            parameters=loop.base.parameter_count,
            stats=HostStats(
                steps=loop.engine.steps,
                kv_cache_usage=loop.engine.cache_usage,
                prefix_cache_bytes=loop.engine.prefixes.held_bytes,
                prefix_cache_most_bytes=loop.engine.prefixes.most_bytes,
                adapters={"ram": loop.voices.stats, "slots": scheduler.slots.stats},
            ),
        )

    def _say(self, phase: str) -> None:
        self.phase = phase
        log.info("host", phase=phase)

    def _tell(self, download: Download) -> None:
        before, self.download = self.download, download
        assert self.key is not None
        self.key = self.key.model_copy(update={"revision": download.revision})
        self.phase = f"downloading {self.key.base_model}: {download}"
        if before is None or before.percent // 10 != download.percent // 10:
            log.info("download", base_model=self.key.base_model, **download.model_dump())


def make_app(host: Host) -> Starlette:
    # Who waits for a hub does not take the threads that replies and runs are prepared in.
    askers = ThreadPoolExecutor(ASKERS, thread_name_prefix="hub")

    async def health(_: Request) -> Response:
        return _json(host.health)

    async def generate(request: Request) -> Response:
        came_at = monotonic()
        asked = await _body(request, GenerateRequest)
        loop = host.loop
        chunks, tell = _stream_of(TokenChunk)
        async with AsyncExitStack() as stack:
            adapter, system_prompt = None, None
            if asked.adapter is not None:
                loading = stack.enter_async_context(loop.voices.held(asked.adapter))
                voice = await unless_disconnected(request, loading)
                adapter, system_prompt = voice.adapter, voice.system_prompt
            sequence = await asyncio.to_thread(loop.engine.sequence, asked, adapter, system_prompt, tell)
            if asked.timeout_seconds is not None:
                sequence.deadline = came_at + asked.timeout_seconds  # the time to load its voice included
            loop.submit(sequence)
            stack.callback(loop.cancel, sequence)  # also when the reader goes away
            at_end = stack.pop_all()

        async def lines() -> AsyncIterator[bytes]:
            while True:
                chunk = await chunks.get()
                yield _line(chunk)
                if chunk.finish_reason or chunk.error:
                    return

        return _Lines(lines(), at_end)

    async def start_run(request: Request) -> Response:
        spec = await _body(request, RunSpec)
        loop = host.loop
        if spec.training_id in loop.run_ids:
            raise Conflict(f"{spec.training_id} is running already", code="already_running")
        events, tell = _stream_of(RunEvent)
        loop.start_run(spec, tell)

        async def lines() -> AsyncIterator[bytes]:
            progress = 0.0
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    event = RunEvent(kind="heartbeat", progress=progress)
                progress = event.progress
                yield _line(event)
                if event.kind in TERMINAL:
                    return

        def stop() -> None:  # nobody listens to the run any more, so its result could not be kept
            loop.stop_run(spec.training_id).add_done_callback(lambda done: done.exception())

        at_end = AsyncExitStack()
        at_end.callback(stop)
        return _Lines(lines(), at_end)

    async def stop_run(request: Request) -> Response:
        await asyncio.wrap_future(host.loop.stop_run(request.path_params["training_id"]))
        return JSONResponse({})

    async def interrupt_run(request: Request) -> Response:
        await asyncio.wrap_future(host.loop.interrupt_run(request.path_params["training_id"]))
        return JSONResponse({})

    async def evaluate(request: Request) -> Response:
        asked = await _body(request, EvaluateRequest)
        loop = host.loop
        async with loop.voices.held(asked.adapter) as voice:
            evaluation = await unless_disconnected(request, asyncio.wrap_future(loop.evaluate(voice, asked)))
        return _json(evaluation)

    async def estimate(request: Request) -> Response:
        asked = await _body(request, EstimateRequest)
        loop = host.loop
        outline, renderer = await asyncio.get_running_loop().run_in_executor(askers, host.outline, asked.key)
        estimated = loop.estimate(outline, renderer, asked)
        answer = await unless_disconnected(request, asyncio.wrap_future(estimated))
        return _json(answer)

    async def check_on_hub(request: Request) -> Response:
        from repertory.model import weights

        asked = await _body(request, BaseKey)
        await asyncio.get_running_loop().run_in_executor(askers, weights.check_on_hub, asked, settings())
        return JSONResponse({})

    async def preview(request: Request) -> Response:
        from repertory.model.preview import preview

        asked = await _body(request, PreviewRequest)
        outline, renderer = await asyncio.get_running_loop().run_in_executor(askers, host.outline, asked.key)
        return _json(await asyncio.to_thread(preview, outline, renderer, asked))

    async def tokens(request: Request) -> Response:
        from repertory.model.preview import tokens

        asked = await _body(request, TokensRequest)
        outline, renderer = await asyncio.get_running_loop().run_in_executor(askers, host.outline, asked.key)
        return _json(await asyncio.to_thread(tokens, outline, renderer, asked))

    async def load_adapter(request: Request) -> Response:
        ref = await _body(request, AdapterRef)
        async with host.loop.voices.held(ref):
            return JSONResponse({})

    async def unload_adapter(request: Request) -> Response:
        ref = await _body(request, AdapterRef)
        host.loop.unload(ref.org_id, ref.training_id)
        return JSONResponse({})

    async def forget(request: Request) -> Response:
        forgetting = await _body(request, Forgetting)
        for training_id in (*forgetting.training_ids, None):  # None: what is kept of its prompts to the bare base
            host.loop.unload(forgetting.org_id, training_id)
        return JSONResponse({})

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RepertoryError)
        return JSONResponse({"error": error.info.model_dump()}, status_code=error.status)

    async def nobody_listens(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/generate", generate, methods=["POST"]),
            Route("/runs", start_run, methods=["POST"]),
            Route("/runs/{training_id}", stop_run, methods=["DELETE"]),
            Route("/runs/{training_id}/interrupt", interrupt_run, methods=["POST"]),
            Route("/evaluate", evaluate, methods=["POST"]),
            Route("/estimate", estimate, methods=["POST"]),
            Route("/hub/check", check_on_hub, methods=["POST"]),
            Route("/preview", preview, methods=["POST"]),
            Route("/tokens", tokens, methods=["POST"]),
            Route("/adapters/load", load_adapter, methods=["POST"]),
            Route("/adapters/unload", unload_adapter, methods=["POST"]),
            Route("/forget", forget, methods=["POST"]),
        ],
        exception_handlers={RepertoryError: refused, ClientDisconnect: nobody_listens},
    )


class _Lines(StreamingResponse):
    """NDJSON, and what is to be done when it ends, however it ends: a reader may be gone before the first line."""

    def __init__(self, lines: AsyncIterator[bytes], at_end: AsyncExitStack) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._at_end:
            await super().__call__(scope, receive, send)


async def _body(request: Request, kind: type[Parsed]) -> Parsed:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise InvalidInput(f"not a {kind.__name__}: {error.errors(include_input=False)[0]['msg']}") from error


def _stream_of(kind: type[Parsed]) -> tuple[asyncio.Queue[Parsed], Callable[[Parsed], None]]:
    """A queue to read from here, and the function with which another thread fills it."""
    items: asyncio.Queue[Parsed] = asyncio.Queue()
    here = asyncio.get_running_loop()
    return items, lambda item: here.call_soon_threadsafe(items.put_nowait, item)  # type: ignore[return-value]


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _line(item: BaseModel) -> bytes:
    return item.model_dump_json(exclude_defaults=True).encode() + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--quantization")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    end_with_service()
    configure(settings().log_level)
    # Threads that wait for each other at the end of a product spin. For as long as libgomp does by itself, they would
    # keep the core from the thread they wait for on a machine with anything else to do; not at all, and each product
    # waits for a thread to be woken up. Measured in `docs/log.md`. Read when torch is imported, which has not happened
    # yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    host = Host(args.base_model, args.quantization, args.dtype, turn=Path(args.socket).with_name("loading.lock"))
    device = threading.Thread(target=host.run, args=(settings(),), name="device", daemon=True)
    device.start()
    uvicorn.run(make_app(host), uds=args.socket, log_level="warning", timeout_graceful_shutdown=1)
    host.stop()
    device.join(timeout=5)


if __name__ == "__main__":
    main()
