"""The demo against a service that plays a script: what it shows, and what it says when something goes wrong."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from repertory import demo
from repertory.errors import InvalidInput, JobFailed, RepertoryError

LESSON = demo.Lesson(conversations=12, epochs=1)


class Script:
    """What the scripted service answers, and what it was asked."""

    def __init__(self) -> None:
        self.health: dict[str, Any] = {"status": "healthy"}
        self.start_status = 200
        self.jobs: list[dict[str, Any]] = [
            _job("queued", 0.0),
            _job("running", 0.4, phase="training", step=2, total_steps=5, loss=3.25, tokens_per_second=150.0),
            _job("completed", 1.0, report={"perplexity": 30.0, "base_perplexity": 60.0, "scored_conversations": 2}),
        ]
        self.asked: list[tuple[str, str, Any]] = []

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        self.asked.append((method, path, body))
        if path == "/api/v1/health":
            return 200, self.health
        if path == "/api/v1/training/start":
            if self.start_status != 200:
                error = {"code": "no", "message": "it is refused", "cure": "do it otherwise"}
                return self.start_status, {"error": error}
            return 200, {"training_id": "train_1", "org_id": demo.ORG_ID, "status": "queued", "progress": 0.0}
        if path == "/api/v1/training/status/train_1":
            return 200, self.jobs.pop(0) if len(self.jobs) > 1 else self.jobs[0]
        if path == f"/api/v1/generate?org_id={demo.ORG_ID}":
            return 200, {"response": f"[{body['model_id']}] says hi", "model_info": {}}
        return 404, {"detail": "Not Found"}


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def port(script: Script, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(demo, "POLL_SECONDS", 0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            self._answer("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, method: str, body: Any) -> None:
            status, content = script.answer(method, self.path, body)
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_it_learns_compares_and_says_how_to_go_on(script: Script, port: int, console: Console) -> None:
    demo.run(LESSON, port, console)
    shown = _shown(console)
    assert "40%  step 2/5 · loss 3.250 · 150 tokens/s" in shown
    assert "-50%" in shown  # 60 to 30
    for question in demo.QUESTIONS:
        assert question in shown
    assert shown.count("[base] says hi") == shown.count("[train_1] says hi") == len(demo.QUESTIONS)
    assert f'curl -X POST "http://127.0.0.1:{port}/api/v1/generate?org_id=demo"' in shown
    assert "was running before" in shown


def test_it_submits_real_conversations(script: Script, port: int, console: Console) -> None:
    demo.run(LESSON, port, console)
    submitted = next(body for _, path, body in script.asked if path == "/api/v1/training/start")
    assert (submitted["org_id"], submitted["num_epochs"]) == (demo.ORG_ID, 1)
    assert len(submitted["conversations"]) == LESSON.conversations
    assert all(piece["messages"][-1]["role"] == "assistant" for piece in submitted["conversations"])


def test_a_failed_job_is_told_with_its_cure(script: Script, port: int, console: Console) -> None:
    script.jobs = [
        _job("failed", 0.2) | {"error": {"code": "insufficient_memory", "message": "too big", "cure": "less"}}
    ]
    with pytest.raises(JobFailed, match="too big") as failed:
        demo.run(LESSON, port, console)
    assert (failed.value.code, failed.value.cure, demo.exit_code(failed.value)) == ("insufficient_memory", "less", 6)


def test_a_cancelled_job_ends_as_cancelled(script: Script, port: int, console: Console) -> None:
    script.jobs = [_job("cancelled", 0.2)]
    with pytest.raises(RepertoryError, match="was cancelled") as cancelled:
        demo.run(LESSON, port, console)
    assert demo.exit_code(cancelled.value) == 7


@pytest.mark.parametrize(("status", "code"), [(422, 5), (401, 4), (404, 3), (500, 6)])
def test_a_refusal_is_told_as_the_service_told_it(
    script: Script, port: int, console: Console, status: int, code: int
) -> None:
    script.start_status = status
    with pytest.raises(RepertoryError, match="it is refused") as refused:
        demo.run(LESSON, port, console)
    assert (refused.value.cure, demo.exit_code(refused.value)) == ("do it otherwise", code)
    assert isinstance(refused.value, InvalidInput) == (status == 422)


def test_somebody_else_on_the_port_is_told_apart(script: Script, port: int, console: Console) -> None:
    script.health = {"status": "ok"}
    with pytest.raises(demo.ServiceUnreachable, match="not Repertory") as taken:
        demo.run(LESSON, port, console)
    assert "PORT=" in taken.value.cure
    assert demo.exit_code(taken.value) == 8


def test_a_base_model_that_cannot_be_is_told_at_once(script: Script, port: int, console: Console) -> None:
    script.health = {"status": "degraded", "error": {"code": "gone", "message": "no such model", "cure": "another"}}
    with pytest.raises(RepertoryError, match="no such model") as failed:
        demo.run(LESSON, port, console)
    assert (failed.value.code, failed.value.cure) == ("gone", "another")


def test_ctrl_c_leaves_the_job_running_and_says_how_to_cancel_it(
    port: int, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_look", pressed)
    with pytest.raises(demo.Detached, match="goes on") as detached:
        demo.run(LESSON, port, console)
    assert f"curl -X DELETE http://127.0.0.1:{port}/api/v1/training/jobs/train_1" in detached.value.cure
    assert demo.exit_code(detached.value) == 7


def test_a_service_that_dies_at_start_is_told_with_its_last_words(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USE_4BIT", "true")
    monkeypatch.setenv("USE_8BIT", "true")  # no service starts with both
    with pytest.raises(demo.ServiceUnreachable, match="use_4bit and use_8bit") as dead:
        demo.run(LESSON, _free_port(), console)
    assert demo.exit_code(dead.value) == 8


def test_where_nothing_can_be_written_no_service_is_started(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LOG", Path("/proc/nowhere/service.log"))
    with pytest.raises(RepertoryError, match="cannot write"):
        demo.run(LESSON, _free_port(), console)


def _job(status: str, progress: float, **metadata: Any) -> dict[str, Any]:
    return {"training_id": "train_1", "status": status, "progress": progress, "error": None, "metadata": metadata}


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
