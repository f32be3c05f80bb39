"""The process: its settings, its port, its end."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import sys
from types import FrameType

import structlog
import uvicorn
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from repertory import logs
from repertory.errors import RepertoryError, StorageFailed
from repertory.service.api.app import create_app
from repertory.service.client_connection import LOOK_SECONDS, ClientConnection, hang_up_on_slow_clients
from repertory.settings import Settings, settings

log = structlog.get_logger()

_ADDRESS_CURE = "Set HOST to an address of this machine (127.0.0.1, or 0.0.0.0 for all) and PORT to 1024 or above."
KEEP_ALIVE_SECONDS = 30  # longer than clients do (httpx: 5), so that none sends into a connection that is being closed
LOOK_TICKS = round(10 * LOOK_SECONDS)  # uvicorn ticks every tenth of a second
UNSENT_BYTES = 128 << 10  # that the kernel keeps for a client who does not read; else megabytes, for each
STOP_SECONDS = 5  # for the requests that are being answered when the service is told to stop


def serve() -> int:
    """Run the service until it is told to stop. Returns the exit status."""
    try:
        present = settings()
    except ValidationError as error:
        return _say_no(*(_wrong_setting(problem) for problem in error.errors(include_input=False)))
    except RepertoryError as error:
        return _say_no(f"{error.message}. {error.cure}")
    logs.configure(present.log_level)
    os.umask(0o077)  # conversations, voices and keys are no business of the machine's other users
    _allow_open_files()
    try:
        listener = _listen(present)
    except UnicodeError:  # a name that no resolver would take
        return _say_no(f"HOST: {present.host} is no host name. {_ADDRESS_CURE}")
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        cure = "Is Repertory running already? Stop that one, or choose another port: PORT=8301."
        return _say_no(
            f"Cannot listen on {present.host}:{present.port}: {error.strerror}. {cure if is_taken else _ADDRESS_CURE}"
        )
    with listener:
        try:
            app = create_app(present)
        except RepertoryError as error:
            return _say_no(f"{error.message} {error.cure}")
        except OSError as error:
            refused = StorageFailed.of(error)
            return _say_no(f"{refused.message}. {refused.cure}")
        _leave_to_stay()
        log.info("listening", url=f"http://{present.host}:{listener.getsockname()[1]}")
        server = _Server(
            uvicorn.Config(
                app,
                http=ClientConnection,
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                proxy_headers=False,  # whatever a proxy or a client says of addresses: nothing decides by it
                timeout_graceful_shutdown=STOP_SECONDS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            ),
            present.client_timeout_seconds,
        )
        # uvicorn handles both while it runs, and raises them again afterwards: by then all is done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, client_timeout_seconds: float) -> None:
        super().__init__(config)
        self._client_timeout_seconds = client_timeout_seconds

    async def on_tick(self, counter: int) -> bool:
        if counter % LOOK_TICKS == 0:
            hang_up_on_slow_clients(self.server_state.connections, self._client_timeout_seconds)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests end and runs write a checkpoint; the second ends all at once."""
        if self.should_exit:
            os._exit(128 + sig)  # hosts end with us
        log.info("told to stop", signal=signal.Signals(sig).name)
        super().handle_exit(sig, frame)


def _allow_open_files() -> None:
    """As many as the system lets this user have: connections are files, and the usual 1,024 are soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _leave_to_stay() -> None:
    """What there is now stays to the end, and looking through it for what is unused takes longer than most requests."""
    gc.collect()
    gc.freeze()


def _listen(present: Settings) -> socket.socket:
    """Bound before anything else happens, so that a second service on the port touches nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        present.host, present.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def _wrong_setting(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    variable = f"{problem['loc'][0]}".upper() if problem["loc"] else "The settings contradict each other"
    return f"{variable}: {message}. Correct it in the environment or in .env."


def _say_no(*reasons: str) -> int:
    for reason in reasons:
        print(f"repertory: {reason}", file=sys.stderr)
    return 1
