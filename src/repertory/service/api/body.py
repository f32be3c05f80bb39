"""JSON bodies, strictly: what JSON parsers let through silently is refused, with the place.

Duplicate keys, NaN and Infinity, bytes that are no UTF-8, halves of surrogate pairs, numbers in quotes, unknown fields.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from repertory.errors import ErrorInfo
from repertory.service.api.errors import ApiError, InvalidRequest, field_names, json_path, problem

MAX_BODY_BYTES = 64 << 20  # 64 MiB, some 100,000 conversations
SMALL_BODY_BYTES = 16 << 10  # 16 KiB, parsed in less time than it takes to give it to a thread

Body = TypeVar("Body", bound=BaseModel)


def body_of(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency: the request's body as `model`."""
    known_fields = field_names(model)

    async def parse(request: Request) -> Body:
        raw = await _raw_body(request)
        if not raw:
            raise ApiError(400, "invalid_json", "The body is empty.", "Send a JSON object.")
        return await _parsed(model, raw, known_fields)

    return parse


def optional_body_of(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """The same, where no body at all means an empty one."""
    known_fields = field_names(model)

    async def parse(request: Request) -> Body:
        return await _parsed(model, await _raw_body(request) or b"{}", known_fields)

    return parse


async def _raw_body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    if body:
        _require_json(request.headers.get("content-type", ""))
    return bytes(body)


def _require_json(content_type: str) -> None:
    """A web page of another origin can send text/plain without asking the browser for leave, but not JSON."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            "The body is not declared as JSON.",
            'Add -H "Content-Type: application/json".',
        )


async def _parsed(model: type[Body], raw: bytes, known_fields: list[str]) -> Body:
    """In a thread where it takes long: the largest body takes a second, in which others are answered."""
    if len(raw) <= SMALL_BODY_BYTES:
        return _validated(model, raw, known_fields)
    return await run_in_threadpool(_validated, model, raw, known_fields)


def _validated(model: type[Body], raw: bytes, known_fields: list[str]) -> Body:
    text = _decoded(raw)
    _refuse_what_parsers_let_through(text)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        if any(details["type"] == "json_invalid" for details in error.errors(include_input=False)):
            raise _invalid_json("is nested too deeply") from None  # pydantic's limit is lower than json's
        problems = [problem(details, known_fields) for details in error.errors(include_input=False, include_url=False)]
        raise InvalidRequest(problems) from None


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _invalid_json("is not UTF-8 text") from None


def _refuse_what_parsers_let_through(text: str) -> None:
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _invalid_json(f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise _invalid_json("is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise _invalid_json("holds a number that is too long") from None
    if "\\ud" in text or "\\uD" in text:
        _refuse_half_characters(parsed)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _invalid_json("has a key twice in one object")
    return members


def _no_constant(_name: str) -> None:
    raise _invalid_json("holds NaN or Infinity, which JSON does not have")


def _refuse_half_characters(parsed: Any) -> None:
    """An escape for half of a surrogate pair is good JSON, but no text: nothing can store or render it."""
    waiting: list[tuple[tuple[int | str, ...], Any]] = [((), parsed)]
    while waiting:
        location, value = waiting.pop()
        if isinstance(value, dict):
            for name, item in value.items():
                if _is_half(name):
                    raise _half_character(location)
                waiting.append(((*location, name), item))
        elif isinstance(value, list):
            waiting += [((*location, index), item) for index, item in enumerate(value)]
        elif isinstance(value, str) and _is_half(value):
            raise _half_character(location)


def _is_half(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _half_character(location: tuple[int | str, ...]) -> InvalidRequest:
    path = json_path(location)
    return InvalidRequest(
        [
            ErrorInfo(
                code="invalid_unicode",
                message=f"{path or 'The body'} holds half of a surrogate pair, which is not valid Unicode.",
                cure="Send whole characters: an emoji outside of the basic plane is two escapes, or itself in UTF-8.",
                param=path,
                status=422,
            )
        ]
    )


def _invalid_json(what: str) -> ApiError:
    return ApiError(400, "invalid_json", f"The body {what}.", "Send one JSON object, as UTF-8.")


def _too_large() -> ApiError:
    return ApiError(
        413,
        "payload_too_large",
        f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.",
        "Send fewer conversations, or leave out the oldest ones.",
    )
