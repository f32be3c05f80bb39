"""Limits, overload and deadlines over HTTP, as the real `openai` client and a plain one meet them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest

from running_service import RunningService, eventually
from service_clients import HI, LONG, client_of, running

Start = Callable[..., RunningService]


@contextmanager
def generating(service: RunningService, org: str, count: int = 1) -> Iterator[None]:
    """So many replies of an organisation in the making."""
    body = {"message": "a long one", "max_tokens": 3000, "stream": True}
    before = in_the_making(service)
    with ExitStack() as streams:
        for _ in range(count):
            asked = service.client.stream("POST", f"/generate?org_id={org}", json=body)
            answer = streams.enter_context(asked)
            assert answer.status_code == 200
        yield
    eventually(lambda: in_the_making(service) == before)


def in_the_making(service: RunningService) -> int:
    """Places that are taken now; /health is a second behind."""
    told = service.client.get(f"{service.url}/metrics").text
    return int(float(re.findall(r"^repertory_generations (\S+)$", told, re.MULTILINE)[0]))


def generate(service: RunningService, org: str, **asked: Any) -> httpx.Response:
    return service.client.post(f"/generate?org_id={org}", json={"message": "Hi", **asked})


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    service = RunningService(
        tmp_path_factory.mktemp("limited"),
        MAX_CONCURRENT_GENERATIONS="3",
        ORG_CONCURRENT_GENERATIONS="2",
        GENERATION_TIMEOUT_SECONDS="60",
    ).until_ready()
    for org in ("lim-a", "lim-b"):
        service.trained(org)
    yield service
    service.stop()


def test_an_organisation_has_so_many_replies_at_once_and_others_have_theirs(limited: RunningService) -> None:
    with generating(limited, "lim-a", 2):
        refused = generate(limited, "lim-a")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        streamed = generate(limited, "lim-a", stream=True)
        assert (streamed.status_code, streamed.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert generate(limited, "lim-b").status_code == 200
    assert generate(limited, "lim-a").status_code == 200


def test_all_together_are_bounded(limited: RunningService) -> None:
    with generating(limited, "lim-a", 2), generating(limited, "lim-b", 1):
        refused = generate(limited, "lim-b")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert limited.client.get("/health").json()["status"] == "healthy"
    assert generate(limited, "lim-b").status_code == 200


def test_where_nobody_is_let_in_the_body_is_not_even_read(limited: RunningService) -> None:
    def send(path: str) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return limited.client.post(f"{limited.url}{path}", content=b"no JSON", headers=headers)

    paths = ("/api/v1/generate?org_id=lim-a", "/v1/chat/completions", "/v1/completions")
    with generating(limited, "lim-a", 2), generating(limited, "lim-b", 1):
        for path in paths:
            refused = send(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
    assert [send(path).status_code for path in paths] == [400, 400, 400]


def test_openais_client_meets_them_as_its_own_exceptions(limited: RunningService) -> None:
    with client_of(limited) as client:
        with generating(limited, "lim-a", 2):
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(model="lim-a", messages=HI)
            assert refused.value.code == "rate_limit_exceeded"
            with generating(limited, "lim-b", 1), pytest.raises(openai.InternalServerError) as overloaded:
                client.chat.completions.create(model="lim-b", messages=HI)
            assert (overloaded.value.status_code, overloaded.value.code) == (503, "overloaded")
        with pytest.raises(openai.BadRequestError) as never:
            client.chat.completions.create(model="lim-a", messages=HI, n=3)
        assert (never.value.code, never.value.param) == ("too_many_replies", "n")


def test_openais_client_waits_as_long_as_it_is_told_and_then_is_answered(limited: RunningService) -> None:
    sent: list[float] = []
    answers: list[httpx.Response] = []
    hooks = {"request": [lambda _: sent.append(time.monotonic())], "response": [answers.append]}
    with client_of(limited, max_retries=2, event_hooks=hooks) as client, ExitStack() as busy:
        busy.enter_context(generating(limited, "lim-a", 2))
        threading.Timer(0.5, busy.close).start()
        reply = client.chat.completions.create(model="lim-a", messages=HI)
    assert reply.choices[0].finish_reason == "stop"
    assert [answer.status_code for answer in answers] == [429, 200]
    assert sent[1] - sent[0] >= int(answers[0].headers["retry-after"])


def test_a_reply_whose_time_is_over_says_so(limited: RunningService) -> None:
    late = generate(limited, "lim-a", message="a long one", max_tokens=3000, timeout_seconds=0.3)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "generation_timeout")
    streamed = generate(limited, "lim-a", message="a long one", max_tokens=3000, timeout_seconds=0.3, stream=True)
    assert streamed.status_code == 200  # it had begun
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n") if line]
    assert events[0]["text"]
    assert events[-1]["error"]["code"] == "generation_timeout"
    too_long = generate(limited, "lim-a", timeout_seconds=61)
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (422, "timeout_seconds")
    eventually(lambda: running(limited) == 0)


def test_openais_client_does_not_ask_again_for_what_took_too_long(limited: RunningService) -> None:
    answers: list[httpx.Response] = []
    with client_of(limited, max_retries=2, event_hooks={"response": [answers.append]}) as client:
        asked: Any = {"model": "lim-a", "messages": LONG, "max_tokens": 3000, "extra_body": {"timeout_seconds": 0.3}}
        with pytest.raises(openai.InternalServerError) as late:
            client.chat.completions.create(**asked)
        assert late.value.code == "generation_timeout"
        assert len(answers) == 1
        with pytest.raises(openai.APIError, match="time"):
            list(client.chat.completions.create(**asked, stream=True))


def test_requests_and_tokens_of_a_minute(start_service: Start) -> None:
    service = start_service(ORG_REQUESTS_PER_MINUTE="5", ORG_TOKENS_PER_MINUTE="100").until_ready()
    for org in ("lim-r", "lim-t"):
        service.trained(org)
    statuses = [generate(service, "lim-r").status_code for _ in range(6)]
    assert statuses == [200] * 5 + [429]
    # Prompt and reply count, also of a reply that nobody waited for.
    with service.client.stream(
        "POST", "/generate?org_id=lim-t", json={"message": "a long " * 40, "max_tokens": 3000, "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        while "la" not in next(lines):
            pass
        for _ in range(100):
            next(lines)
    eventually(lambda: running(service) == 0)
    refused = generate(service, "lim-t")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "100 tokens a minute" in refused.json()["error"]["message"]
    assert 5 <= int(refused.headers["retry-after"]) <= 60
