"""A client's connection, and how long the client is waited for.

uvicorn waits for ever: who sends a byte of a request now and then, or does not read the answer, would hold a connection
with all that belongs to it.
"""

from __future__ import annotations

import fcntl
import sys
import termios
from collections.abc import Iterable

import h11
import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from repertory.service.api.envelope import new_request_id
from repertory.service.api.errors import ApiError, error_response

log = structlog.get_logger()

LOOK_SECONDS = 1.0  # between two looks at a connection
BYTES_PER_SECOND = 1000  # whoever moves as much is not slow; poor mobile networks do several times that


class ClientConnection(H11Protocol):
    """Time counts while it is the client's turn: to send what is missing of a request, or to read what was written.
    As many bytes as `BYTES_PER_SECOND` make good for a second.

    It is counted in looks, not by the clock: while the whole process stood still, no client was slow.
    """

    _late_seconds = 0.0
    _received_bytes = 0  # since the last look
    _unread_bytes = 0  # at the last look

    def data_received(self, data: bytes) -> None:
        self._received_bytes += len(data)
        super().data_received(data)

    def resume_writing(self) -> None:
        self._late_seconds = 0.0  # most of what waited for the client is read
        super().resume_writing()

    def on_response_complete(self) -> None:
        self._late_seconds = 0.0  # the next request has its own time
        super().on_response_complete()

    def hangs_up(self, patience_seconds: float) -> bool:
        """The look, `LOOK_SECONDS` after the one before: hang up on a client that is later than that. Returns whether
        it was.
        """
        unread = self._count_unread() if self._has_to_read else 0
        read, self._unread_bytes = self._unread_bytes - unread, unread
        sent, self._received_bytes = self._received_bytes, 0
        if self._has_to_read:
            moved = max(0, read)
        elif self._has_to_send:
            moved = sent
        else:
            self._late_seconds = 0.0
            return False
        self._late_seconds = max(0.0, self._late_seconds + LOOK_SECONDS - moved / BYTES_PER_SECOND)
        if self._late_seconds <= patience_seconds:
            return False
        if self._may_be_told and not self._has_to_read:
            self._tell(patience_seconds)
        else:
            self.transport.abort()  # closing would wait until all is read
        return True

    def _count_unread(self) -> int:
        """With what the kernel has taken and the client has not. It takes more only when much of that is gone, so a
        slow reader would look as if it stood still.
        """
        queue = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queue, sys.byteorder)

    @property
    def _has_to_read(self) -> bool:
        return self.flow.write_paused or self.transport.is_closing()

    @property
    def _has_to_send(self) -> bool:
        if self.cycle is None:
            return True
        if self.cycle.response_complete:  # between two requests uvicorn's own time runs, until some of the next is here
            return self.timeout_keep_alive_task is None
        return self.cycle.more_body and not self.flow.read_paused

    @property
    def _may_be_told(self) -> bool:
        """Whether a request has begun, and no answer to it. Who has sent nothing at all may be a proxy that connects
        ahead of time, and would take what it is told for the answer to its next request.
        """
        if self.conn.our_state is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return self.conn.our_state is h11.SEND_RESPONSE

    def _tell(self, patience_seconds: float) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True  # whoever works on the request: there is nobody to answer any more
            self.cycle.message_event.set()
        error = ApiError(
            408,
            "request_timeout",
            f"For {patience_seconds:g} seconds next to nothing of the request came.",
            "Send it again, or have CLIENT_TIMEOUT_SECONDS raised where the network is that slow.",
        )
        request_id = new_request_id()
        answer = error_response(error.info, request_id)
        headers = [*answer.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        lines = [b"HTTP/1.1 408 Request Timeout", *(name + b": " + value for name, value in headers), b""]
        self.transport.write(b"\r\n".join([*lines, bytes(answer.body)]))
        self.transport.close()


def hang_up_on_slow_clients(connections: Iterable[object], patience_seconds: float) -> None:
    """Look at all of them."""
    looked_at = [each for each in connections if isinstance(each, ClientConnection)]
    slow = sum(each.hangs_up(patience_seconds) for each in looked_at)
    if slow:
        log.warning("hung up on slow clients", connections=slow)
