"""Slow clients over real sockets: who is hung up on, and who is not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from rude_clients import connected, drip, everything, get, post, still_open
from running_service import RunningService, eventually

PATIENCE_SECONDS = 1.0
LONG_ENOUGH = 3 * PATIENCE_SECONDS  # a look more than it takes to be hung up on


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("slow-clients")
    running = RunningService(folder, CLIENT_TIMEOUT_SECONDS=str(PATIENCE_SECONDS)).until_ready()
    running.trained("org")
    yield running
    running.kill()


GENERATE = "/api/v1/generate?org_id=org"
MANY_PAGES = get("/openapi.json") * 10  # a megabyte, more than the kernel takes for a reader


UPLOAD = (
    b"POST /api/v1/datasets HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n"
    b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)


@pytest.mark.parametrize(
    "begun",
    [get("/api/v1/health")[:20], post(GENERATE, message="Hi")[:-5], UPLOAD],
    ids=["head", "body", "upload"],
)
def test_who_stops_within_a_request_is_told_what_is_wrong_and_how_to_cure_it(
    service: RunningService, begun: bytes
) -> None:
    with connected(service.url) as client:
        client.sendall(begun)
        head, _, body = everything(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    error = json.loads(body)["error"]
    assert error["code"] == "request_timeout"
    assert "CLIENT_TIMEOUT_SECONDS" in error["cure"]
    assert error["request_id"].encode() in head


def test_who_goes_on_with_a_body_that_was_refused_is_hung_up_on(service: RunningService) -> None:
    request = post("/api/v1/nowhere", message="Hi" * 1000)
    with connected(service.url) as client:
        assert drip(client, request, piece_bytes=30) < len(request)
        assert everything(client).count(b"HTTP/1.1 ") <= 1  # lost, where bytes were on their way meanwhile


@pytest.mark.fault("F28")
def test_a_byte_now_and_then_buys_no_time(service: RunningService) -> None:
    for request in (get("/api/v1/health"), post(GENERATE, message="Hi" * 1000)):
        with connected(service.url) as client:
            assert drip(client, request, pause_seconds=0.5) < len(request)


def test_the_second_request_of_a_connection_has_the_same_time(service: RunningService) -> None:
    with connected(service.url) as client:
        client.sendall(get("/api/v1/health"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(get("/api/v1/health")[:20])
        assert b"HTTP/1.1 408 " in everything(client)


def test_who_says_nothing_at_all_hears_nothing(service: RunningService) -> None:
    with connected(service.url) as client:
        assert everything(client) == b""


def test_a_slow_but_steady_sender_is_heard_out(service: RunningService) -> None:
    request = post(GENERATE, message="Hi " * 3000)
    with connected(service.url) as client:
        begin = time.monotonic()
        assert drip(client, request, piece_bytes=200) == len(request)  # 2 KB a second
        assert time.monotonic() - begin > LONG_ENOUGH
        assert client.recv(12) == b"HTTP/1.1 200"


def test_a_connection_may_be_idle_between_requests_and_wait_for_its_answer(service: RunningService) -> None:
    with httpx.Client(base_url=service.url, trust_env=False, timeout=60) as client:
        ports = set()
        for words in (3, int(LONG_ENOUGH * 50)):  # of which the fake host says 50 a second
            with client.stream("POST", GENERATE, json={"message": "a long one", "max_tokens": words}) as answer:
                assert answer.status_code == 200
                answer.read()
                ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(LONG_ENOUGH if words == 3 else 0)
    assert len(ports) == 1


@pytest.mark.fault("F28")
def test_a_reader_who_does_not_read_is_hung_up_on(service: RunningService) -> None:
    process = psutil.Process(service.process.pid)
    with connected(service.url, reads_little=True) as client:
        client.sendall(MANY_PAGES)
        eventually(lambda: still_open(process, [client]) == 1)
        eventually(lambda: still_open(process, [client]) == 0)
    assert "hung up on slow clients" in service.log


def test_a_slow_but_steady_reader_is_let_be(service: RunningService) -> None:
    process = psutil.Process(service.process.pid)
    with connected(service.url, reads_little=True) as client:
        client.sendall(MANY_PAGES)
        ends = time.monotonic() + 2 * LONG_ENOUGH
        while time.monotonic() < ends:
            assert client.recv(1000)
            time.sleep(0.05)
        assert still_open(process, [client]) == 1
