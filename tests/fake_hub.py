"""A small Hugging Face hub on loopback: the two requests that a download takes, and all that can go wrong with them.

It answers as huggingface.co does: the list of files with sizes and hashes, X-Error-Code, redirects of large files to a
host that stores them (here another port), Range.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_goodTokenThatMayReadGatedModels"
LARGE_BYTES = 1 << 16  # files of this size are "large": told with sha256 and stored elsewhere


@dataclass
class Repository:
    revisions: dict[str, Path]  # branch or tag -> folder of files
    is_gated: bool = False
    extra: list[dict[str, object]] = field(default_factory=list)  # more entries of the list of files

    @staticmethod
    def commit_of(folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()


@dataclass
class Seen:
    method: str
    path: str
    authorization: str | None
    range: str | None
    is_storage: bool


class FakeHub:
    """Switches are attributes; set them before asking."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Seen] = []
        self.status: int | None = None  # answer everything with this
        self.retry_after: str | None = None
        self.is_silent = False  # take every request and answer none, until this is off again
        self.broken_answers = 0  # that many answers have status 503 first
        self.cut_after: int | None = None  # bytes of a large file per connection
        self.cuts = 10**9  # how often
        self.stall_after: int | None = None  # bytes, then silence
        self.drip_seconds: float | None = None  # between two single bytes
        self.bytes_per_second: int | None = None
        self.corrupts = False  # flip a byte of large files
        self.redirects = True  # large files are stored at another origin
        self.redirects_to: str | None = None  # some other address
        self.ignores_range = False
        self.stopped = threading.Event()
        self._servers = [_Server(self, is_storage=False), _Server(self, is_storage=True)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def add(self, name: str, folder: Path, *, is_gated: bool = False, **revisions: Path) -> str:
        """Returns the commit of main."""
        self.repositories[name] = Repository({"main": folder} | revisions, is_gated=is_gated)
        return Repository.commit_of(folder)

    def downloads(self, file: str) -> list[Seen]:
        return [seen for seen in self.requests if seen.path.endswith(f"/{file}") and "/resolve/" in seen.path]

    def close(self) -> None:
        self.stopped.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: FakeHub, *, is_storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.is_storage = is_storage

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(200, b"")

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("authorization")
        is_storage = self.server.is_storage
        hub.requests.append(Seen("GET", path, authorization, self.headers.get("range"), is_storage))
        while hub.is_silent and not hub.stopped.wait(0.05):
            pass
        if hub.status is not None or hub.broken_answers:
            hub.broken_answers = max(hub.broken_answers - 1, 0)
            more = {"Retry-After": hub.retry_after} if hub.retry_after else {}
            return self._answer(hub.status or 503, b"out of order", **more)
        if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._list(*listed.groups())
        if resolved := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path):
            return self._resolve(*resolved.groups())
        return self._answer(404, b"not found")

    def _repository(self, name: str) -> Repository | None:
        found = self.server.hub.repositories.get(name)
        if found is None:
            status = 404 if self.headers.get("authorization") else 401
            self._answer(status, b"Repository not found", **{"X-Error-Code": "RepoNotFound"})
        return found

    def _folder(self, repository: Repository, revision: str) -> Path | None:
        by_commit = {Repository.commit_of(folder): folder for folder in repository.revisions.values()}
        folder = repository.revisions.get(revision) or by_commit.get(revision)
        if folder is None:
            self._answer(404, b"Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        return folder

    def _list(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        folder = None if repository is None else self._folder(repository, revision)
        if repository is None or folder is None:
            return
        files = []
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            content = path.read_bytes()
            file: dict[str, object] = {"rfilename": path.name, "size": len(content)}
            if len(content) >= LARGE_BYTES:
                file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            else:
                file["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            files.append(file)
        answer = {"id": name, "sha": Repository.commit_of(folder), "siblings": [*files, *repository.extra]}
        self._answer(200, json.dumps(answer).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        hub = self.server.hub
        repository = self._repository(name)
        folder = None if repository is None else self._folder(repository, revision)
        if repository is None or folder is None:
            return None
        content = (folder / file).read_bytes() if (folder / file).is_file() else None
        is_storage = self.server.is_storage
        if repository.is_gated and not is_storage and self.headers.get("authorization") != f"Bearer {TOKEN}":
            status = 403 if self.headers.get("authorization") else 401
            return self._answer(status, b"gated", **{"X-Error-Code": "GatedRepo"})
        if content is None:
            return self._answer(404, b"no file", **{"X-Error-Code": "EntryNotFound"})
        if len(content) < LARGE_BYTES:
            return self._answer(200, content)
        if not is_storage and hub.redirects:
            target = hub.redirects_to or f"{hub.storage_url}{self.path}"
            return self._answer(302, b"", Location=target)
        return self._send(content)

    def _send(self, content: bytes) -> None:
        hub = self.server.hub
        if hub.corrupts:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        start = int(asked.group(1)) if asked and not hub.ignores_range else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if hub.cut_after is not None and hub.cuts > 0 and len(rest) > hub.cut_after:
            hub.cuts -= 1
            self.wfile.write(rest[: hub.cut_after])
            self.close_connection = True
        elif hub.stall_after is not None:
            self.wfile.write(rest[: hub.stall_after])
            hub.stopped.wait(60)
            self.close_connection = True
        elif hub.drip_seconds is not None:
            for at in range(len(rest)):
                self.wfile.write(rest[at : at + 1])
                if hub.stopped.wait(hub.drip_seconds):
                    break
        elif hub.bytes_per_second is not None:
            step = max(hub.bytes_per_second // 20, 1)
            for at in range(0, len(rest), step):
                self.wfile.write(rest[at : at + step])
                if hub.stopped.wait(0.05):
                    break
        else:
            self.wfile.write(rest)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    try:
        yield hub
    finally:
        hub.close()


def unreachable_url() -> str:
    """Of a port that was free a moment ago."""
    with running_hub() as hub:
        return hub.url
