"""Words planted in all that a host is told, and looked for in its log and in what others may read.

tests/service/test_canaries.py has more places, and the secrets, with the fake host.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from running_service import RunningService, eventually


@pytest.fixture
def service(cache: Path, tmp_path: Path) -> Iterator[RunningService]:
    running = RunningService(
        tmp_path,
        HOST_MODULE="repertory.model.host",
        MODEL_CACHE_DIR=str(cache),
        DEFAULT_BASE_MODEL="tiny/llama-gqa",
        OMP_NUM_THREADS="1",
        LOG_LEVEL="DEBUG",
    )
    yield running.until_ready()
    running.kill()


def test_a_real_host_tells_nobodys_words(service: RunningService) -> None:
    client = service.client
    learned, asked, prompt, history, stop, name = planted = [f"canary{secrets.token_hex(6)}" for _ in range(6)]
    told: list[str] = []  # what others than the caller may read

    def ask(path: str, expected: int, **body: Any) -> httpx.Response:
        answer = client.post(path, json=body)
        assert answer.status_code == expected, answer.text
        if answer.is_error:
            told.append(answer.text)
        return answer

    chat = [{"role": "user", "content": f"{history} hello"}, {"role": "assistant", "content": f"{learned} hey"}]
    about: dict[str, Any] = {"conversations": [{"messages": chat}] * 6, "system_prompt": prompt, "name": name}
    whole = service.trained("org", **about, num_epochs=1)
    short = service.train("org", **about, hyperparameters={"max_seq_length": 16})  # no room for a reply
    nowhere = service.train("org", **about, hyperparameters={"lora_target_modules": "nothing"})
    for training_id in (short, nowhere):
        service.until(training_id, "failed")
    told += [client.get(f"/training/{training_id}/events").text for training_id in (whole, short, nowhere)]

    question = {"message": asked, "history": chat, "system_prompt": prompt, "stop": [stop], "max_tokens": 8}
    ask("/generate?org_id=org", 200, **question)
    ask("/generate?org_id=org", 422, **question | {"message": f"{asked} " * 2000})
    ask("/training/evaluate", 200, org_id="org", model_id="latest", test_prompts=[{"instruction": asked}])
    with client.stream("POST", "/generate?org_id=org", json=question | {"stream": True, "max_tokens": 500}) as reply:
        lines = reply.iter_lines()
        next(lines)
        (host,) = service.hosts()
        host.kill()
        list(lines)  # what comes is its caller's own
    eventually(lambda: client.get("/health").json()["status"] == "healthy")
    told += [client.get("/health").text, client.get(f"{service.url}/metrics").text]
    assert service.stop() == 0

    for place, text in {"the log": service.log, "an answer": "\n".join(told)}.items():
        assert len(text) > 1000
        assert not [canary for canary in planted if canary in text], place
