"""The real `openai` client of a running service, and what several tests send with it."""

from __future__ import annotations

from typing import Any

import openai

from running_service import RunningService

HI: Any = [{"role": "user", "content": "Hi"}]
LONG: Any = [{"role": "user", "content": "a long one"}]


def client_of(service: RunningService, **options: Any) -> openai.OpenAI:
    """No retries where none are asked for, and no proxy of whoever runs the tests."""
    http = openai.DefaultHttpxClient(trust_env=False, event_hooks=options.pop("event_hooks", {}))
    defaults: dict[str, Any] = {"api_key": "none is needed", "max_retries": 0, "http_client": http}
    return openai.OpenAI(base_url=f"{service.url}/v1", **defaults | options)


def running(service: RunningService) -> int:
    return int(sum(host["running"] for host in service.client.get("/health").json()["hosts"]))
