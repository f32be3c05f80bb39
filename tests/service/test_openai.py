"""The OpenAI-compatible API as the real `openai` client uses it: the service as a process, the fake host behind it.

The fake host says "Hello from", the training id of the version that answers, and where it is asked for something
"long", "la" up to the limit.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from running_service import RunningService, eventually
from service_clients import HI, LONG, client_of, running

Start = Callable[..., RunningService]
DEFAULT_BASE = "bundled/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    with client_of(service) as made:
        yield made


@pytest.fixture(scope="module")
def versions(service: RunningService) -> list[str]:
    """Two of one organisation, older first."""
    return [service.trained("oa-org"), service.trained("oa-org")]


# Models


def test_the_model_names_an_organisation_one_of_its_versions_or_a_base(
    service: RunningService, client: openai.OpenAI, versions: list[str]
) -> None:
    other = service.trained("oa-other")
    speakers = {
        "oa-org": versions[1],
        f"oa-org@{versions[0]}": versions[0],
        f"oa-org@{versions[1]}": versions[1],
        "oa-other": other,
    }
    for model, training_id in speakers.items():
        reply = client.chat.completions.create(model=model, messages=HI)
        assert reply.choices[0].message.content == f"Hello from {training_id}"
        assert reply.system_fingerprint == training_id
        assert reply.model == model
    base = client.chat.completions.create(model=DEFAULT_BASE, messages=HI)
    assert base.choices[0].message.content == "Hello from base"
    assert base.system_fingerprint == DEFAULT_BASE


def test_a_base_model_answers_by_name_because_a_voice_stands_on_it(
    service: RunningService, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="fake/of-a-voice", messages=HI)
    service.trained("oa-elsewhere", base_model="fake/of-a-voice")
    reply = client.chat.completions.create(model="fake/of-a-voice", messages=HI)
    assert reply.choices[0].message.content == "Hello from base"
    assert "fake/of-a-voice" in [model.id for model in client.models.list()]


def test_models_are_listed_and_found(client: openai.OpenAI, versions: list[str]) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) >= {"oa-org", *(f"oa-org@{training_id}" for training_id in versions), DEFAULT_BASE}
    assert listed["oa-org"].owned_by == "oa-org"
    assert listed["oa-org"].created > 1_700_000_000
    assert listed["oa-org"].model_dump()["root"] == f"oa-org@{versions[1]}"
    assert listed["oa-org"].model_dump()["parent"] == DEFAULT_BASE
    for name in ("oa-org", f"oa-org@{versions[0]}", DEFAULT_BASE):  # the last has a slash
        assert client.models.retrieve(name) == listed[name]
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nobody")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["nobody", "oa-other@{}", "oa-org@", "oa-org@train_0", "../oa-org", "nobody/nothing"])
def test_an_unknown_model_is_not_found_and_nobody_elses_answers(
    service: RunningService, client: openai.OpenAI, versions: list[str], model: str
) -> None:
    service.trained("oa-other")
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model=model.format(versions[0]), messages=HI)
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"


# Replies


def test_a_reply_has_all_that_the_client_reads(client: openai.OpenAI, versions: list[str]) -> None:
    answer = client.chat.completions.with_raw_response.create(model="oa-org", messages=HI)
    reply = answer.parse()
    assert reply.id == f"chatcmpl-{answer.headers['x-request-id']}"
    assert reply.object == "chat.completion"
    assert reply.created > 1_700_000_000
    (choice,) = reply.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (1, 3, 4)


def test_what_of_a_prompt_was_cached_is_told_where_the_client_looks_for_it(
    client: openai.OpenAI, versions: list[str]
) -> None:
    for words, cached in (("Hello there my friend", 0), ("Hello there again friend", 3)):
        asked = [{"role": "user", "content": words}]
        reply = client.chat.completions.create(model="oa-org", messages=asked, n=2)  # type: ignore[call-overload]
        assert reply.usage.prompt_tokens == 4
        assert reply.usage.prompt_tokens_details.cached_tokens == cached


def test_the_async_client_has_the_same(service: RunningService, versions: list[str]) -> None:
    async def ask() -> tuple[str | None, str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        url = f"{service.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, http_client=http) as client:
            whole, streamed = await asyncio.gather(
                client.chat.completions.create(model="oa-org", messages=HI),
                client.chat.completions.create(model="oa-org", messages=HI, stream=True),
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in streamed]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(ask()) == (f"Hello from {versions[1]}", f"Hello from {versions[1]}")


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_stream_has_role_pieces_reason_and_where_asked_usage(
    client: openai.OpenAI, versions: list[str], with_usage: bool
) -> None:
    stream = client.chat.completions.create(
        model="oa-org", messages=HI, stream=True, stream_options={"include_usage": with_usage}
    )
    first, *chunks = stream
    assert first.choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in [first, *chunks]}) == 1
    if with_usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (1, 3)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(texts) == f"Hello from {versions[1]}"
    assert len(texts) == 3  # as they come, not at the end
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.system_fingerprint for chunk in chunks} == {versions[1]}


def test_the_bytes_of_a_stream_end_as_openais_do(service: RunningService, versions: list[str]) -> None:
    body = {"model": "oa-org", "messages": HI, "stream": True}
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body, trust_env=False)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = answer.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)
    assert "usage" not in events[0]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_reply_is_as_long_as_the_limit_says(client: openai.OpenAI, versions: list[str], limit: str) -> None:
    limits: Any = {limit: 5}
    reply = client.chat.completions.create(model="oa-org", messages=LONG, **limits)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_n_replies_come_side_by_side(client: openai.OpenAI, versions: list[str], stream: bool) -> None:
    texts = {0: "", 1: "", 2: ""}
    if stream:
        chunks = client.chat.completions.create(
            model="oa-org", messages=HI, n=3, stream=True, stream_options={"include_usage": True}
        )
        order = []
        for chunk in chunks:
            for choice in chunk.choices:
                order.append(choice.index)
                texts[choice.index] += choice.delta.content or ""
            usage = chunk.usage
        assert order != sorted(order)  # none waits for another
    else:
        reply = client.chat.completions.create(model="oa-org", messages=HI, n=3)
        texts = {choice.index: choice.message.content or "" for choice in reply.choices}
        usage = reply.usage
    assert texts == dict.fromkeys((0, 1, 2), f"Hello from {versions[1]}")
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (1, 9)  # the prompt counts once


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("top", [None, 2])
def test_logprobs_tell_of_every_token(
    client: openai.OpenAI, versions: list[str], stream: bool, top: int | None
) -> None:
    asked: Any = {"model": "oa-org", "messages": HI, "logprobs": True, "top_logprobs": top, "n": 2}
    if stream:
        chunks = client.chat.completions.create(**asked, stream=True)
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == 1]
    else:
        parts = [client.chat.completions.create(**asked).choices[1]]
    tokens = [token for part in parts if part.logprobs is not None for token in part.logprobs.content]
    assert "".join(token.token for token in tokens) == f"Hello from {versions[1]}"
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == f"Hello from {versions[1]}"
    assert {token.logprob for token in tokens} == {-0.5}
    assert {len(token.top_logprobs) for token in tokens} == {top or 0}
    plain = client.chat.completions.create(model="oa-org", messages=HI)
    assert plain.choices[0].logprobs is None


def test_messages_that_the_client_returns_can_be_sent_back(client: openai.OpenAI, versions: list[str]) -> None:
    said = client.chat.completions.create(model="oa-org", messages=HI).choices[0].message
    history: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
        *HI,
        said,
        said.model_dump(),
        *HI,
    ]
    reply = client.chat.completions.create(model="oa-org", messages=history)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 4 + 1 + 3 + 3 + 1  # words, in the fake host


def test_what_changes_nothing_is_accepted(client: openai.OpenAI, versions: list[str]) -> None:
    nothing: Any = {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "store": False,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "stop": None,
        "n": None,
        "seed": None,
        "temperature": None,
    }
    assert client.chat.completions.create(model="oa-org", messages=HI, **nothing).choices[0].message.content
    reply = client.chat.completions.create(
        model="oa-org", messages=HI, temperature=0.5, top_p=0.5, seed=-1, stop="x", extra_body={"top_k": 3}
    )
    assert reply.choices[0].finish_reason == "stop"


# Refusals


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {"user_location": None}}, "web_search_options"),
    ],
)
def test_what_would_change_the_reply_and_is_not_supported_is_refused(
    client: openai.OpenAI, versions: list[str], asked: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="oa-org", messages=HI, **asked)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")
    assert refused.value.type == "invalid_request_error"
    assert param in refused.value.message


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"seed": 2**63}, "seed"),
        ({"extra_body": {"maxtokens": 3}}, "maxtokens"),
        ({"extra_body": {"temperature": "0.5"}}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "ana"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, None),
        ({"messages": [*HI, {"role": "system", "content": "x"}, *HI]}, None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"top_logprobs": 3}, None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_what_is_wrong_is_a_bad_request_that_names_the_place(
    client: openai.OpenAI, versions: list[str], asked: Any, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "oa-org", "messages": HI} | asked)
    assert refused.value.status_code == 400
    assert refused.value.body["param"] == (param or "")  # type: ignore[index]
    assert refused.value.request_id == refused.value.body["request_id"]  # type: ignore[index]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize(
    "field",
    [
        '"model": "\\u0000"',
        '"model": 5',
        '"stop": 5',
        '"stop": [[]]',
        '"logit_bias": [[]]',
        '"stream_options": []',
        '"n": 1e400',
        '"messages": [{"role": "user", "content": [[]]}], "prompt": [[]]',
        '"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}], "prompt": 5',
        '"messages": [{"role": [], "content": {}}], "prompt": {}',
        '"messages": [{"role": "user", "content": "\\u0000"}], "prompt": "\\u0000"',
        '"messages": null, "prompt": null',
        '"user": 1, "user": 2',
        '"user": NaN',
    ],
)
def test_nonsense_is_a_bad_request(service: RunningService, path: str, field: str) -> None:
    content = f'{{"model": "oa-org", {field}}}' if '"model"' not in field else f"{{{field}}}"
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{service.url}/v1{path}", content=content, headers=headers, trust_env=False)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_a_host_that_dies_is_a_server_error_or_is_asked_again(service: RunningService) -> None:
    service.trained("oa-dying", base_model="fake/oa-mortal")
    die: Any = [{"role": "user", "content": "die"}]
    answers: list[tuple[int, str]] = []

    def note(answer: Any) -> None:
        answers.append((answer.status_code, answer.headers.get("retry-after", "")))

    with client_of(service, event_hooks={"response": [note]}) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="oa-dying", messages=die)
        assert (failed.value.status_code, failed.value.code) == (503, "host_unavailable")
        assert answers == [(503, "2")]
        # The host is being started again, so the first answer is a 503, and the client waits as long as it says.
        began = time.monotonic()
        reply = client.with_options(max_retries=10).chat.completions.create(model="oa-dying", messages=HI)
        waited = time.monotonic() - began
    assert reply.choices[0].finish_reason == "stop"
    refusals = answers[1:-1]
    assert refusals
    assert waited >= sum(int(retry_after) for _, retry_after in refusals)


def test_a_host_that_dies_within_a_stream_is_an_error_there(service: RunningService, client: openai.OpenAI) -> None:
    service.trained("oa-frail", base_model="fake/oa-frail")
    stream = client.chat.completions.create(model="oa-frail", messages=LONG, max_tokens=3000, stream=True)
    next(stream)
    host = service.host_of("fake/oa-frail")
    assert host is not None
    host.kill()
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "host_unavailable"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_leaving_a_stream_frees_the_rows_of_all_its_replies(
    service: RunningService, client: openai.OpenAI, versions: list[str], endpoint: str
) -> None:
    eventually(lambda: running(service) == 0)
    asked: Any = {"model": "oa-org", "n": 3, "max_tokens": 3000, "stream": True}
    if endpoint == "chat":
        stream: Any = client.chat.completions.create(messages=LONG, **asked)
    else:
        stream = client.completions.create(prompt="a long one", **asked)
    next(stream)
    eventually(lambda: running(service) == 3)
    stream.close()
    eventually(lambda: running(service) == 0)  # left alone, they would go on for a minute


def test_giving_up_on_a_whole_reply_frees_its_rows(service: RunningService, versions: list[str]) -> None:
    with client_of(service, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="oa-org", messages=LONG, n=2, max_tokens=3000)
    eventually(lambda: running(service) == 0)


@pytest.mark.parametrize("header", ["host", "origin"])
def test_web_pages_of_others_get_nothing(service: RunningService, header: str) -> None:
    with (
        client_of(service, default_headers={header: "https://evil.example"}) as client,
        pytest.raises(openai.PermissionDeniedError) as refused,
    ):
        client.models.list()
    assert refused.value.code == f"{header}_not_allowed"


# Texts continued as they are


def test_a_text_is_continued(client: openai.OpenAI, versions: list[str]) -> None:
    done = client.completions.create(model="oa-org", prompt="Once upon", max_tokens=2)
    assert done.object == "text_completion"
    assert done.id.startswith("cmpl-")
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("Hello from", "length")
    assert done.system_fingerprint == versions[1]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 2)


def test_several_texts_are_continued_in_order(client: openai.OpenAI, versions: list[str]) -> None:
    done = client.completions.create(model="oa-org", prompt=["one", "two three long"], n=2, max_tokens=4)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.text.count("la") for choice in done.choices] == [0, 0, 1, 1]
    assert done.usage is not None
    assert done.usage.prompt_tokens == 1 + 3


def test_a_continuation_streams(client: openai.OpenAI, versions: list[str]) -> None:
    chunks = list(client.completions.create(model="oa-org", prompt="Once", stream=True))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"Hello from {versions[1]}"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": [1, 2, 3]}, "prompt[0]"),
        ({"prompt": ""}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 1}, "logprobs"),
        ({"prompt": ["a"] * 6, "n": 3}, ""),
    ],
)
def test_continuations_that_are_not_supported_are_refused(
    client: openai.OpenAI, versions: list[str], asked: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "oa-org", "prompt": "Once"} | asked)
    assert refused.value.body["param"] == param  # type: ignore[index]
