"""One short real job: the quick start on the bundled base model, as a newcomer sends it."""

from __future__ import annotations

import pytest

from running_service import RunningService

START = (
    b'{"org_id": "org_123", "conversations": [{"messages": [{"role": "user", "content": "Hello!"}, '
    b'{"role": "assistant", "content": "Hey! How are you?"}], "platform": "discord"}]}'
)
JSON = {"Content-Type": "application/json"}


pytestmark = pytest.mark.slow


def test_the_quick_start_ends_in_the_voice_that_was_sent(service: RunningService) -> None:
    started = service.client.post("/training/start", content=START, headers=JSON)
    assert started.status_code == 200
    body = started.json()
    assert body == {"training_id": body["training_id"], "org_id": "org_123", "status": "queued", "progress": 0.0}
    job = service.until(body["training_id"], "completed", "failed")
    assert job["status"] == "completed", job["error"]
    assert job["progress"] == 1.0
    assert any("Only 1 of the 100" in warning for warning in job["metadata"]["warnings"])
    asked = b'{"message": "Tell me a joke", "temperature": 0.8, "max_tokens": 100}'
    joke = service.client.post("/generate?org_id=org_123", content=asked, headers=JSON)
    assert joke.status_code == 200
    assert joke.json()["model_info"]["org_id"] == "org_123"
    # 10 epochs over the one exchange: the voice has learned it by heart, the base would have said something else.
    greeting = b'{"message": "Hello!", "temperature": 0}'
    assert service.client.post("/generate", content=greeting, headers=JSON).json()["response"] == "Hey! How are you?"
    from_base = b'{"message": "Hello!", "temperature": 0, "model_id": "base"}'
    answer = service.client.post("/generate?org_id=org_123", content=from_base, headers=JSON)
    assert answer.json()["response"] != "Hey! How are you?"


def test_the_voice_leaves_memory_and_comes_back(service: RunningService) -> None:
    assert service.client.post("/models/unload?org_id=org_123").json()["org_id"] == "org_123"
    assert not service.client.get("/models/org_123/info").json()["loaded"]
    assert service.client.post("/models/load?org_id=org_123").json()["model_info"]["loaded"]
    assert service.client.get("/models/org_123/info").json()["loaded"]
    assert service.client.get("/health").json()["loaded_models"] == 1
