"""How the service talks to a host: the contract of `repertory.contracts`, as HTTP over the host's Unix socket.

Every call opens its own connection: to a Unix socket that costs a tenth of a millisecond, and closing it is how the
contract stops a sequence or a run.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from http import HTTPStatus
from pathlib import Path

import httpx
from pydantic import BaseModel, ValidationError

from repertory.contracts import (
    AdapterRef,
    BaseKey,
    Estimate,
    EstimateRequest,
    EvaluateRequest,
    Evaluation,
    Forgetting,
    GenerateRequest,
    HostHealth,
    Preview,
    PreviewRequest,
    RunEvent,
    RunSpec,
    TokenChunk,
    TokensRequest,
)
from repertory.data.imports import TokenReport
from repertory.errors import ErrorInfo, RepertoryError, Unavailable
from repertory.service.host_answer import CONNECT_SECONDS, BrokenOff, posted

SILENCE_SECONDS = 60.0  # a run sends a heartbeat every 2 seconds; a host quiet for this long hangs
HEALTH_SECONDS = 5.0
STOP_SECONDS = 60.0  # two micro-steps of a large model on a slow device
HUB_SECONDS = 10.0  # more than a host gives the hub for an answer
TOKEN_SECONDS = 300.0  # between two pieces of a reply, of which the first waits for queue and prompt

BASE_URL = "http://host"  # a name that goes into the Host header, and nowhere
HEADERS = {"content-type": "application/json"}


class HostLost(Exception):
    """The connection broke, or nothing came for too long, before the host said how it ended."""

    def __init__(self, error: httpx.TransportError) -> None:
        super().__init__(f"the connection to the host was lost ({type(error).__name__})")
        self.is_hang = isinstance(error, httpx.ReadTimeout)


class HostClient:
    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)

    def health(self) -> HostHealth | None:
        """None if the host does not answer (yet, or any more)."""
        try:
            with self._client(HEALTH_SECONDS) as client:
                return HostHealth.model_validate_json(client.get("/health").raise_for_status().content)
        except (httpx.HTTPError, ValidationError):
            return None

    def run(self, spec: RunSpec) -> Iterator[RunEvent]:
        """The story of a run as it happens, to its end. Closing the iterator stops the run.

        Raises HostLost if the story breaks off, and what the host says if it refuses the run.
        """
        try:
            with (
                self._client(SILENCE_SECONDS) as client,
                client.stream("POST", "/runs", content=spec.model_dump_json()) as response,
            ):
                if response.is_error:
                    raise _refusal(response.status_code, response.read())
                for line in response.iter_lines():
                    yield RunEvent.model_validate_json(line)
        except httpx.TransportError as error:
            raise HostLost(error) from error

    def stop_run(self, training_id: str) -> None:
        """Returns once the run has stopped, or was not there. Raises HostLost."""
        try:
            with self._client(STOP_SECONDS) as client:
                client.delete(f"/runs/{training_id}")
        except httpx.TransportError as error:
            raise HostLost(error) from error

    def interrupt_run(self, training_id: str) -> None:
        """Let it end after the step that it is at, with a checkpoint. Returns at once. Raises HostLost."""
        try:
            with self._client(STOP_SECONDS) as client:
                client.post(f"/runs/{training_id}/interrupt")
        except httpx.TransportError as error:
            raise HostLost(error) from error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        """The reply, piece by piece; the last piece has a finish_reason. Closing the iterator stops the sequence."""
        body = request.model_dump_json().encode()
        try:
            async with posted(self._socket, "/generate", body, TOKEN_SECONDS) as answer:
                if answer.status != HTTPStatus.OK:
                    raise _refusal(answer.status, await answer.whole())
                while (line := await answer.line()) is not None:
                    chunk = TokenChunk.model_validate_json(line)
                    if chunk.error is not None:
                        raise RepertoryError.from_info(chunk.error)
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
        except BrokenOff as error:
            raise _gone() from error
        raise _gone()

    async def evaluate(self, request: EvaluateRequest) -> Evaluation:
        """Takes as long as it takes; a host that hangs is noticed by its keeper."""
        return Evaluation.model_validate_json(await self._post("/evaluate", request, timeout_seconds=None))

    async def estimate(self, request: EstimateRequest) -> Estimate:
        return Estimate.model_validate_json(await self._post("/estimate", request, timeout_seconds=None))

    async def check_on_hub(self, key: BaseKey) -> None:
        """Raises what the hub's answer means, and Unavailable or JobFailed where it gave none."""
        await self._post("/hub/check", key, timeout_seconds=HUB_SECONDS)

    async def preview(self, request: PreviewRequest) -> Preview:
        return Preview.model_validate_json(await self._post("/preview", request, timeout_seconds=None))

    async def tokens(self, request: TokensRequest) -> TokenReport:
        return TokenReport.model_validate_json(await self._post("/tokens", request, timeout_seconds=None))

    async def load(self, adapter: AdapterRef) -> None:
        await self._post("/adapters/load", adapter, timeout_seconds=TOKEN_SECONDS)

    async def unload(self, adapter: AdapterRef) -> None:
        await self._post("/adapters/unload", adapter, timeout_seconds=TOKEN_SECONDS)

    def forget(self, forgetting: Forgetting) -> None:
        """Raises Unavailable if the host is lost; then nothing of it is in memory either."""
        try:
            with self._client(TOKEN_SECONDS) as client:
                response = client.post("/forget", content=forgetting.model_dump_json())
        except httpx.TransportError as error:
            raise _gone() from error
        if response.is_error:
            raise _refusal(response.status_code, response.content)

    async def _post(self, path: str, body: BaseModel, timeout_seconds: float | None) -> bytes:
        try:
            async with self._async_client(timeout_seconds) as client:
                response = await client.post(path, content=body.model_dump_json())
        except httpx.TransportError as error:
            raise _gone() from error
        if response.is_error:
            raise _refusal(response.status_code, response.content)
        return response.content

    # verify=False spares loading the certificates of the internet for a socket that has no use for them.

    def _client(self, timeout_seconds: float) -> httpx.Client:
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=self._socket, verify=False),
            base_url=BASE_URL,
            headers=HEADERS,
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            trust_env=False,
        )

    def _async_client(self, timeout_seconds: float | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=self._socket, verify=False),
            base_url=BASE_URL,
            headers=HEADERS,
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            trust_env=False,
        )


class _Refusal(BaseModel):
    error: ErrorInfo


def _refusal(status: int, body: bytes) -> RepertoryError:
    """What the host says why not."""
    try:
        return RepertoryError.from_info(_Refusal.model_validate_json(body).error)
    except ValidationError:
        return RepertoryError(f"The host answered {status} without saying why.")


def _gone() -> Unavailable:
    return Unavailable(
        "The host was lost while it worked on this request; it is being restarted.", code="host_unavailable"
    )
