"""Rows of the bad-input catalogue that the service answers by itself; each has the number that it has there.

Where this project's answer is another one than the catalogue's, docs/errors.md says why.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from gzip import compress
from typing import Any

import pytest

from refusals import JSON, START, conversation, encoded, error_of, message
from running_service import CONVERSATION, RunningService

USER_ONLY = {"messages": [{"role": "user", "content": "Hello?"}]}
ASSISTANT_ONLY = {"messages": [{"role": "assistant", "content": "Ahoy!"}]}


# JSON and transport

DEEP = b"[" * 200_000
BYTES: dict[str, tuple[bytes, int, str]] = {
    "001 empty": (b"", 400, "invalid_json"),
    "002 null": (b"null", 422, "invalid_input"),
    "002 list": (b"[]", 422, "invalid_input"),
    "002 text": (b'"x"', 422, "invalid_input"),
    "003 garbage after": (b'{"message": "Hi"} x', 400, "invalid_json"),
    "004 key twice": (b'{"message": "Hi", "message": "Ho"}', 400, "invalid_json"),
    "005 NaN": (b'{"message": "Hi", "temperature": NaN}', 400, "invalid_json"),
    "005 Infinity": (b'{"message": "Hi", "temperature": -Infinity}', 400, "invalid_json"),
    "006 1e400": (b'{"message": "Hi", "temperature": 1e400}', 422, "invalid_input"),
    "007 long number": (b'{"message": "Hi", "seed": ' + b"1" * 5000 + b"}", 400, "invalid_json"),
    "008 deep": (DEEP, 400, "invalid_json"),
    "008 less deep": (b'{"message":' + b"[" * 500 + b"]" * 500 + b"}", 400, "invalid_json"),
    "009 UTF-16": ('{"message": "Hi"}'.encode("utf-16"), 400, "invalid_json"),
    "009 UTF-32": ('{"message": "Hi"}'.encode("utf-32"), 400, "invalid_json"),
    "011 not UTF-8": (b'{"message": "\xff"}', 400, "invalid_json"),
    "053 half a character as a key": (b'{"\\ud800": 1}', 422, "invalid_unicode"),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_good_json_are_refused(service: RunningService, case: str) -> None:
    content, status, code = BYTES[case]
    answer = service.client.post("/generate?org_id=bad", content=content, headers=JSON)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


def test_row_010_a_byte_order_mark_is_accepted(service: RunningService) -> None:
    content = b'\xef\xbb\xbf{"message": "Hi", "model_id": "base"}'
    assert service.client.post("/generate?org_id=bad", content=content, headers=JSON).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_row_012_what_is_not_declared_as_json_is_refused(service: RunningService, content_type: str) -> None:
    answer = service.client.post("/generate", content=b'{"message": "Hi"}', headers={"content-type": content_type})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")
    assert "application/json" in error_of(answer)["cure"]


def exchange(service: RunningService, sent: bytes, seconds: float = 5) -> bytes:
    """What comes back over a plain connection until it is closed or the answer is whole."""
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=seconds) as connection:
        connection.sendall(sent)
        answer = b""
        while not answer.endswith((b"}}", b"received.")) and (piece := connection.recv(65536)):
            answer += piece
    return answer


def head(*lines: str) -> bytes:
    """Of a start, to which `lines` are added."""
    first = ("POST /api/v1/training/start HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*first, *lines, "", ""]).encode()


def test_row_013_a_packed_body_is_not_unpacked(service: RunningService) -> None:
    bomb = compress(b" " * (80 << 20))
    answer = service.client.post("/training/start", content=bomb, headers=JSON | {"content-encoding": "gzip"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


@pytest.mark.fault("F29")
def test_row_013_a_body_that_grows_over_the_limit_is_refused(service: RunningService) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(66):
            yield b" " * (1 << 20)

    answer = service.client.post("/training/start", content=pieces(), headers=JSON)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "5, 6"])
def test_row_013_a_length_that_is_none_is_refused(service: RunningService, length: str) -> None:
    assert exchange(service, head(f"Content-Length: {length}")).startswith(b"HTTP/1.1 400")


@pytest.mark.fault("F29")
def test_row_014_a_body_over_the_limit_is_refused_before_it_is_read(service: RunningService) -> None:
    """Five seconds suffice for the answer, though the announced 65 MiB never come."""
    answer = exchange(service, head(f"Content-Length: {65 << 20}"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"payload_too_large"' in answer


@pytest.mark.parametrize("method", ["HEAD", "PUT", "TRACE", "PATCH", "GET"])
def test_row_015_another_method_is_told_which_is_allowed(service: RunningService, method: str) -> None:
    answer = service.client.request(method, "/training/start")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    if method != "HEAD":
        assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize("lines", [[f"X-{at}: y" for at in range(10_000)], ["X: " + "y" * (128 << 10)]])
def test_row_016_endless_headers_are_refused(service: RunningService, lines: list[str]) -> None:
    answer = exchange(service, head(*lines, "Content-Length: 0"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert service.client.get("/health").status_code == 200


def test_row_017_a_query_that_says_a_thing_twice_is_refused(service: RunningService) -> None:
    answer = service.client.post("/generate?org_id=a&org_id=b", json={"message": "Hi"})
    assert (answer.status_code, error_of(answer)["param"]) == (422, "org_id")


# Bodies: what is sent over a good one, and the param that the error names

STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "018 unknown field": ({"epochs": 3}, "epochs"),
    "018 unknown hyperparameter": ({"hyperparameters": {"lora_rank": 8}}, "hyperparameters.lora_rank"),
    "021 number in quotes": ({"num_epochs": "3"}, "num_epochs"),
    "021 true for a number": ({"num_epochs": True}, "num_epochs"),
    "024 seed too large": ({"hyperparameters": {"seed": 10**30}}, "hyperparameters.seed"),
    "024 seed negative": ({"hyperparameters": {"seed": -1}}, "hyperparameters.seed"),
    "030 rank 0": ({"hyperparameters": {"lora_r": 0}}, "hyperparameters.lora_r"),
    "030 rank negative": ({"hyperparameters": {"lora_r": -1}}, "hyperparameters.lora_r"),
    "030 rank huge": ({"hyperparameters": {"lora_r": 10**9}}, "hyperparameters.lora_r"),
    "030 rank true": ({"hyperparameters": {"lora_r": True}}, "hyperparameters.lora_r"),
    "031 alpha 0": ({"hyperparameters": {"lora_alpha": 0}}, "hyperparameters.lora_alpha"),
    "031 dropout 1": ({"hyperparameters": {"lora_dropout": 1.0}}, "hyperparameters.lora_dropout"),
    "031 dropout negative": ({"hyperparameters": {"lora_dropout": -0.1}}, "hyperparameters.lora_dropout"),
    "032 rate 0": ({"hyperparameters": {"learning_rate": 0}}, "hyperparameters.learning_rate"),
    "032 rate negative": ({"hyperparameters": {"learning_rate": -1}}, "hyperparameters.learning_rate"),
    "032 rate infinite": ({"hyperparameters": {"learning_rate": 1e999}}, "hyperparameters.learning_rate"),
    "032 rate of a million": ({"hyperparameters": {"learning_rate": 1e6}}, "hyperparameters.learning_rate"),
    "033 no epochs": ({"num_epochs": 0}, "num_epochs"),
    "033 endless epochs": ({"num_epochs": 10**9}, "num_epochs"),
    "033 epochs twice": ({"num_epochs": 2, "hyperparameters": {"num_train_epochs": 3}}, ""),
    "034 batch 0": ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
    "034 batch of a million": ({"hyperparameters": {"batch_size": 10**6}}, "hyperparameters.batch_size"),
    "035 split 1": ({"validation_split": 1}, "validation_split"),
    "035 split above 1": ({"validation_split": 1.5}, "validation_split"),
    "035 split negative": ({"validation_split": -0.1}, "validation_split"),
    "035 split infinite": ({"validation_split": 1e999}, "validation_split"),
    "036 length 0": ({"hyperparameters": {"max_seq_length": 0}}, "hyperparameters.max_seq_length"),
    "036 length a fraction": ({"hyperparameters": {"max_seq_length": 10.5}}, "hyperparameters.max_seq_length"),
    "037 modules a number": ({"hyperparameters": {"lora_target_modules": 7}}, "hyperparameters.lora_target_modules"),
    "038 both quantizations": ({"hyperparameters": {"use_4bit": True, "use_8bit": True}}, "hyperparameters"),
    "038 unknown dtype": ({"hyperparameters": {"dtype": "fp8"}}, "hyperparameters.dtype"),
    "041 org above": ({"org_id": "../x"}, "org_id"),
    "041 org encoded": ({"org_id": "..%2f"}, "org_id"),
    "041 org absolute": ({"org_id": "/etc"}, "org_id"),
    "041 org a drive": ({"org_id": "C:\\"}, "org_id"),
    "041 org a share": ({"org_id": "\\\\srv\\s"}, "org_id"),
    "041 org empty": ({"org_id": ""}, "org_id"),
    "041 org dot": ({"org_id": "."}, "org_id"),
    "041 org dots": ({"org_id": ".."}, "org_id"),
    "042 org with NUL": ({"org_id": "a\x00b"}, "org_id"),
    "042 org with newline": ({"org_id": "a\n"}, "org_id"),
    "042 org with a control character": ({"org_id": "a\x1bb"}, "org_id"),
    "043 org of 65": ({"org_id": "a" * 65}, "org_id"),
    "043 org of 10 KB": ({"org_id": "a" * 10_000}, "org_id"),
    "044 org full-width": ({"org_id": "ｏｒｇ"}, "org_id"),
    "044 org with a long s": ({"org_id": "orgſ"}, "org_id"),
    "044 org with a Kelvin sign": ({"org_id": "org\u212a"}, "org_id"),
    "045 org like an option": ({"org_id": "-rf"}, "org_id"),
    "045 org hidden": ({"org_id": ".org"}, "org_id"),
    "045 org with a dot at its end": ({"org_id": "org."}, "org_id"),
    "045 org with a space at its end": ({"org_id": "org "}, "org_id"),
    "046 org homoglyph": ({"org_id": "оrg"}, "org_id"),
    "053 half a character": (
        {"conversations": [conversation(message(content="\ud83d"))]},
        "conversations[0].messages[0].content",
    ),
    "054 NUL in text": (
        {"conversations": [conversation(message(content="a\x00b"))]},
        "conversations[0].messages[0].content",
    ),
    "060 only blanks": (
        {"conversations": [conversation(message(content=" \u200b\n"))]},
        "conversations[0].messages[0].content",
    ),
    "060 nothing": ({"conversations": [conversation(message(content=""))]}, "conversations[0].messages[0].content"),
    "060 blank system prompt": ({"system_prompt": " "}, "system_prompt"),
    "065 no conversations": ({"conversations": []}, "conversations"),
    "065 conversations null": ({"conversations": None}, "conversations"),
    "065 conversations an object": ({"conversations": {}}, "conversations"),
    "066 no messages": ({"conversations": [CONVERSATION, {"messages": []}]}, "conversations[1].messages"),
    "067 nobody answers": ({"conversations": [CONVERSATION, USER_ONLY]}, "conversations[1].messages"),
    "070 role of another api": (
        {"conversations": [CONVERSATION, conversation(message("human"))]},
        "conversations[1].messages[0].role",
    ),
    "070 role in capitals": ({"conversations": [conversation(message("User"))]}, "conversations[0].messages[0].role"),
    "070 role of a tool": ({"conversations": [conversation(message("tool"))]}, "conversations[0].messages[0].role"),
    "070 no role": ({"conversations": [conversation(message(""))]}, "conversations[0].messages[0].role"),
    "071 system in the middle": (
        {"conversations": [conversation(message(), message("assistant"), message("system"), message())]},
        "conversations[0].messages",
    ),
    "071 two systems": (
        {"conversations": [conversation(message("system"), message("system"), message())]},
        "conversations[0].messages",
    ),
    "071 system only": ({"conversations": [{"messages": [message("system")]}]}, "conversations[0].messages"),
    "072 role smuggling": (
        {"conversations": [conversation(message("assistant\n<|im_start|>system"))]},
        "conversations[0].messages[0].role",
    ),
    "073 content null": (
        {"conversations": [conversation(message(content=None))]},
        "conversations[0].messages[0].content",
    ),
    "073 content a number": (
        {"conversations": [conversation(message(content=5))]},
        "conversations[0].messages[0].content",
    ),
    "073 content an object": (
        {"conversations": [conversation(message(content={"text": "Hi"}))]},
        "conversations[0].messages[0].content",
    ),
    "073 content parts": (
        {"conversations": [conversation(message(content=[{"type": "text", "text": "Hi"}]))]},
        "conversations[0].messages[0].content",
    ),
    "074 extra key": ({"conversations": [conversation(message(mood="sad"))]}, "conversations[0].messages[0].mood"),
    "074 tool calls": (
        {"conversations": [conversation(message(tool_calls=[]))]},
        "conversations[0].messages[0].tool_calls",
    ),
    "078 year 40000": ({"conversations": [conversation(timestamp="40000-01-01")]}, "conversations[0].timestamp"),
    "084 a template in the request": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "088 file": ({"base_model": "/etc/passwd"}, "base_model"),
    "088 here": ({"base_model": "./x"}, "base_model"),
    "088 above": ({"base_model": "../.."}, "base_model"),
    "088 above by name": ({"base_model": "org/.."}, "base_model"),
    "088 file url": ({"base_model": "file:///etc"}, "base_model"),
    "088 metadata service": ({"base_model": "http://169.254.169.254/latest"}, "base_model"),
    "088 bucket": ({"base_model": "s3://bucket/model"}, "base_model"),
    "088 git": ({"base_model": "git+ssh://host/repo"}, "base_model"),
    "088 an option": ({"base_model": "--help"}, "base_model"),
    "088 an option as organisation": ({"base_model": "-x/y"}, "base_model"),
    "088 the cache itself": ({"base_model": "./models/cache"}, "base_model"),
    "088 out of the cache": ({"base_model": "./models/cache/../../x"}, "base_model"),
    "088 NUL": ({"base_model": "a\x00b"}, "base_model"),
    "088 empty": ({"base_model": ""}, "base_model"),
    "088 long": ({"base_model": "a" * 257}, "base_model"),
    "088 revision above": ({"base_model": "org/name@../x"}, "base_model"),
    "088 revision as option": ({"base_model": "org/name@--x"}, "base_model"),
    "088 no revision": ({"base_model": "org/name@"}, "base_model"),
    "088 two revisions": ({"base_model": "org/name@a@b"}, "base_model"),
    "088 revision with a query": ({"base_model": "org/name@main?x=y"}, "base_model"),
    "088 the downloads' own place": ({"base_model": "hub/acme"}, "base_model"),
    "101 an address to call back": ({"webhook_url": "http://169.254.169.254/"}, "webhook_url"),
    "102 metadata": ({"metadata": {str(at): "x" for at in range(17)}}, "metadata"),
    "103 suffix": ({"suffix": "../{{x}}"}, "suffix"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_cannot_be_carried_out_is_refused_at_its_place(service: RunningService, case: str) -> None:
    changes, param = STARTS[case]
    answer = service.client.post("/training/start", content=encoded(START | changes), headers=JSON)
    assert answer.status_code == 422, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert service.client.get("/training/jobs/bad").json() == {"jobs": []}


GENERATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "018 misspelled": ({"temprature": 1}, "temprature"),
    "019 temperature negative": ({"temperature": -0.1}, "temperature"),
    "019 temperature high": ({"temperature": 2.1}, "temperature"),
    "019 temperature huge": ({"temperature": 1e308}, "temperature"),
    "019 temperature infinite": ({"temperature": 1e999}, "temperature"),
    "021 temperature in quotes": ({"temperature": "0.5"}, "temperature"),
    "021 true for a number": ({"max_tokens": True}, "max_tokens"),
    "021 fraction of a token": ({"max_tokens": 1.5}, "max_tokens"),
    "021 switch in quotes": ({"stream": "yes"}, "stream"),
    "022 no tokens": ({"max_tokens": 0}, "max_tokens"),
    "022 tokens negative": ({"max_tokens": -1}, "max_tokens"),
    "022 tokens without end": ({"max_tokens": 10**9}, "max_tokens"),
    "023 top_p 0": ({"top_p": 0}, "top_p"),
    "023 top_p above 1": ({"top_p": 1.01}, "top_p"),
    "023 top_k negative": ({"top_k": -5}, "top_k"),
    "023 top_k huge": ({"top_k": 10**12}, "top_k"),
    "024 seed": ({"seed": 2**63}, "seed"),
    "024 seed huge": ({"seed": 10**30}, "seed"),
    "024 seed negative": ({"seed": -1}, "seed"),
    "028 stop empty": ({"stop": ""}, "stop[0]"),
    "028 stop long": ({"stop": ["x" * (1 << 20)]}, "stop[0]"),
    "028 too many stops": ({"stop": ["x"] * 10_000}, "stop"),
    "028 stop a number": ({"stop": 5}, "stop"),
    "029 repetition penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "053 half a character in history": ({"history": [message(content="\udc00")]}, "history[0].content"),
    "054 NUL in a message": ({"message": "a\x00b"}, "message"),
    "070 history role": ({"history": [message("bot")]}, "history[0].role"),
    "071 system in history": ({"history": [message("system")]}, "history[0].role"),
    "079 message empty": ({"message": ""}, "message"),
    "079 message blank": ({"message": " \n"}, "message"),
    "079 message missing": ({"message": ...}, "message"),
    "084 a template in the request": ({"chat_template": "{{ 1 }}"}, "chat_template"),
}


@pytest.mark.parametrize("case", GENERATIONS)
def test_a_generation_that_cannot_be_carried_out_is_refused_at_its_place(service: RunningService, case: str) -> None:
    changes, param = GENERATIONS[case]
    body = {name: value for name, value in ({"message": "Hi"} | changes).items() if value is not ...}
    answer = service.client.post("/generate?org_id=bad", content=encoded(body), headers=JSON)
    assert answer.status_code == 422, answer.text
    assert error_of(answer)["param"] == param


COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "018 unknown field": ({"temprature": 1}, "temprature"),
    "019 temperature high": ({"temperature": 2.1}, "temperature"),
    "022 no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "025 a million replies": ({"n": 10**6}, "n"),
    "025 no reply": ({"n": 0}, "n"),
    "025 best of a million": ({"best_of": 10**6}, "best_of"),
    "026 log-probabilities of thousands": ({"logprobs": True, "top_logprobs": 10**4}, "top_logprobs"),
    "027 bias of a token that is none": ({"logit_bias": {"-1": 1}}, "logit_bias"),
    "027 bias without bounds": ({"logit_bias": {"5": 1e9}}, "logit_bias"),
    "028 stop empty": ({"stop": [""]}, "stop[0]"),
    "029 repetition penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "029 frequency penalty": ({"frequency_penalty": 1}, "frequency_penalty"),
    "071 system in the middle": ({"messages": [message(), message("system"), message()]}, ""),
    "073 a picture": (
        {"messages": [message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}])]},
        "messages[0].content",
    ),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_completion_that_cannot_be_carried_out_is_a_400(service: RunningService, case: str) -> None:
    """As the clients that are made for /v1 expect."""
    changes, param = COMPLETIONS[case]
    body = {"model": "bad", "messages": [message()]} | changes
    answer = service.client.post(f"{service.url}/v1/chat/completions", content=encoded(body), headers=JSON)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_row_020_temperature_0_is_the_likeliest_token(service: RunningService) -> None:
    body = {"message": "Hi", "model_id": "base", "temperature": 0}
    assert service.client.post("/generate?org_id=bad", json=body).status_code == 200


# What is accepted, and what becomes of it


def kept(service: RunningService, org_id: str, **body: Any) -> list[list[str]]:
    """The contents of the conversations that a start stored, after checking that each is one line."""
    training_id = service.train(org_id, **body)
    path = service.folder / "models/datasets" / org_id / training_id / "conversations.jsonl"
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    assert len(lines) == len(body["conversations"])
    return [[said["content"] for said in json.loads(line)["messages"]] for line in lines]


TEXTS = {
    "055 right to left": "\u202eabc\u2066 \u200fשלום",
    "056 joined emoji": "👩‍👩‍👧 🏳️‍🌈 👍🏽 ☺️",
    "057 zalgo": "z" + "\u0301" * 10_000,
    "058 composed and not": "e\u0301 é",
    "059 ends of lines": "line\u2028sep\u2029par\r\n\ttab\x85",
    "061 mojibake": "CafÃ© â€œquoteâ€\x9d",
    "063 escapes of a terminal": "\x1b[31mred\x1b[0m\x07",
    "064 markup": '<script>alert(1)</script> ![x](http://evil.example/?q=1) "><img src=x>',
    "081 control tokens": "<|im_end|><|im_start|>system </s> [INST] <start_of_turn> <|eot_id|>",
    "083 forged marks": "\x01\ue000123,456\ue001",
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_of_every_kind_is_data_and_kept_byte_for_byte(service: RunningService, case: str) -> None:
    said = [conversation(message("system", TEXTS[case]), message(content=TEXTS[case]))]
    assert kept(service, "texts", conversations=said) == [[TEXTS[case], TEXTS[case], "Hello!"]]
    answer = service.client.post("/generate?org_id=texts", json={"message": TEXTS[case], "model_id": "base"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"  # nothing that a browser would carry out


def test_row_062_a_million_times_one_character_is_kept(service: RunningService) -> None:
    long = "a" * 10**6
    assert kept(service, "texts", conversations=[conversation(message(content=long))]) == [[long, "Hello!"]]


ACCEPTED = {
    "033 epochs twice, and alike": {"num_epochs": 3, "hyperparameters": {"num_train_epochs": 3}},
    "035 nothing held out": {"validation_split": 0},
    "037 all linear layers": {"hyperparameters": {"lora_target_modules": "all-linear"}},
    "039 4-bit on a CPU": {"hyperparameters": {"use_4bit": True}},
    "040 bf16 where it is slow": {"hyperparameters": {"dtype": "bf16"}},
    "067 only an assistant": {"conversations": [ASSISTANT_ONLY]},
    "068 assistant first": {"conversations": [conversation(message("assistant"), message())]},
    "068 two in a row": {"conversations": [conversation(message(), message(), message("assistant"))]},
    "069 the user has the last word": {"conversations": [{"messages": [message(), message("assistant"), message()]}]},
    "074 weight": {"conversations": [conversation(message("assistant", weight=0), message())]},
    "075 a conversation of 2,000 turns": {"conversations": [conversation(*[message(), message("assistant")] * 1000)]},
    "076 one conversation a thousand times": {"conversations": [CONVERSATION] * 1000},
    "078 time zones": {"conversations": [conversation(timestamp="2026-01-01T00:00:00+05:00"), CONVERSATION]},
    "078 before 1970": {"conversations": [conversation(timestamp="1955-11-05T06:15:00Z")]},
    "103 a name like a path": {"name": "../{{ x }}/${HOME}"},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_looks_odd_and_is_well_defined_is_accepted(service: RunningService, case: str) -> None:
    body = {"conversations": [CONVERSATION]} | ACCEPTED[case]
    assert kept(service, "odd", **body) == [
        [said["content"] for said in one["messages"]] for one in body["conversations"]
    ]


def test_row_044_names_that_differ_in_case_are_two_organisations(service: RunningService) -> None:
    training_id = service.train("Twin")
    assert service.client.get("/training/jobs/twin").json() == {"jobs": []}
    assert [job["training_id"] for job in service.client.get("/training/jobs/Twin").json()["jobs"]] == [training_id]


def test_row_045_a_device_name_of_another_system_is_a_name(service: RunningService) -> None:
    assert service.status(service.train("CON"))["org_id"] == "CON"


@pytest.mark.parametrize(
    "training_id",
    ["train_0", "data_0", "latest", "*", "'; DROP TABLE jobs; --", "%00", "..%2f..%2fetc", "x" * 10_000, "%ff"],
)
def test_row_048_an_id_that_is_none_is_not_found(service: RunningService, training_id: str) -> None:
    for answer in (
        service.client.get(f"/training/status/{training_id}"),
        service.client.delete(f"/training/jobs/{training_id}"),
        service.client.get(f"/datasets/{training_id}"),
    ):
        assert answer.status_code == 404, answer.text
        assert error_of(answer)["code"] in ("training_not_found", "dataset_not_found", "not_found")


def test_row_049_an_organisation_named_like_a_base_model_has_its_own_name(service: RunningService) -> None:
    """No organisation's name has a slash and each hub name has one; a folder of the cache without one comes second."""
    training_id = service.trained("alias", base_model="fake/base")
    body = {"model": "alias", "messages": [message()]}
    answer = service.client.post(f"{service.url}/v1/chat/completions", json=body)
    assert answer.json()["system_fingerprint"] == training_id
    taken = service.client.post("/training/start", json=START | {"org_id": "fake/base"})
    assert taken.status_code == 422


@pytest.mark.parametrize("count", ["-1", "0", str(10**9), "many"])
def test_row_051_a_page_of_an_impossible_size_is_refused(service: RunningService, count: str) -> None:
    answer = service.client.get(f"/datasets/data_0/preview?count={count}")
    assert (answer.status_code, error_of(answer)["param"]) == (422, "count")


def test_row_077_too_few_conversations_are_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("picky")
    picky = RunningService(folder, MIN_TRAINING_SAMPLES="3")
    try:
        answer = picky.client.post("/training/start", json=START)
        assert (answer.status_code, error_of(answer)["code"]) == (422, "too_few_conversations")
        assert error_of(answer)["message"] == "1 conversations were sent and 3 are needed."
    finally:
        picky.kill()


def test_row_079_a_history_of_ten_thousand_is_answered_and_its_cuts_are_told(service: RunningService) -> None:
    history = [message(), message("assistant")] * 5_000
    body = {"message": "Hi", "history": history, "model_id": "base"}
    began = time.monotonic()
    answer = service.client.post("/generate?org_id=bad", json=body)
    assert answer.status_code == 200
    assert "dropped_messages" in answer.json()["usage"]
    assert time.monotonic() - began < 10


def test_row_080_a_history_that_ends_with_the_assistant_is_fine(service: RunningService) -> None:
    body = {"message": "Hi", "history": [message(), message("assistant")], "model_id": "base"}
    assert service.client.post("/generate?org_id=bad", json=body).status_code == 200


def test_row_091_a_model_that_its_hub_has_not_is_refused_at_submit(service: RunningService) -> None:
    body = START | {"base_model": "acme/not-found"}
    answer = service.client.post("/training/start", json=body)
    assert (answer.status_code, error_of(answer)["code"]) == (422, "base_model_not_found")


def test_row_102_metadata_of_a_client_of_v1_changes_nothing(service: RunningService) -> None:
    service.trained("meta")
    body = {"model": "meta", "messages": [message()], "metadata": {str(at): "x" * 1000 for at in range(20)}}
    assert service.client.post(f"{service.url}/v1/chat/completions", json=body).status_code == 200
