"""What refusals have in common, and the pieces of bad requests."""

from __future__ import annotations

import json
from typing import Any

import httpx

from running_service import CONVERSATION

JSON = {"content-type": "application/json"}
START = {"org_id": "bad", "conversations": [CONVERSATION]}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, after checking the body that all errors share."""
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) - {"details", "findings"} == {"code", "message", "type", "param", "cure", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"]
    assert error["cure"]
    return dict(error)


def message(role: str = "user", content: Any = "Hello!", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversation(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`messages`, and an answer to them."""
    return {"messages": [*messages, message("assistant")], **more}


def encoded(body: Any) -> bytes:
    """With 1e999 for infinity, and halves of surrogate pairs as the escapes they are in JSON."""
    return json.dumps(body).replace("Infinity", "1e999").encode()
