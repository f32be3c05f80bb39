"""Clients that send a byte at a time, and clients that ask and never read, over plain sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

SMALL_BUFFER_BYTES = 4096  # of the kernel's, so that it soon has to leave the rest with the service


def connected(url: str, *, reads_little: bool = False) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    if reads_little:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    client.settimeout(60)
    client.connect((host, int(port)))
    return client


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


def post(path: str, **fields: object) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def drip(client: socket.socket, content: bytes, piece_bytes: int = 1, pause_seconds: float = 0.1) -> int:
    """Send it in pieces, until the service hangs up. Returns how many bytes were sent."""
    sent = 0
    with suppress(OSError):
        while sent < len(content):
            sent += client.send(content[sent : sent + piece_bytes])
            time.sleep(pause_seconds)
    return sent


def everything(client: socket.socket) -> bytes:
    """What the service says until it hangs up."""
    heard = b""
    with suppress(ConnectionError):
        while piece := client.recv(65536):
            heard += piece
    return heard


def still_open(process: psutil.Process, clients: Iterable[socket.socket]) -> int:
    """How many of these connections the service's process has not closed, whatever the clients did."""
    peers = {connection.raddr.port for connection in process.net_connections("tcp") if connection.raddr}
    return len(peers & {client.getsockname()[1] for client in clients})
