"""The promise that matters most: the voice of a real person is learned, and it is that person's."""

from __future__ import annotations

import time

import httpx
import pytest

from repertory.data import chitchat
from repertory.data.conversations import Conversation
from running_service import RunningService

pytestmark = pytest.mark.slow

PEOPLE = 3
TRAINED = 200  # pieces of conversation
HELD_OUT = 40
MINUTES_PER_VOICE = 12


def as_json(conversations: list[Conversation]) -> list[dict[str, object]]:
    return [conversation.model_dump(mode="json", exclude_none=True) for conversation in conversations]


def test_each_voice_predicts_its_own_person_best(service: RunningService) -> None:
    """3 people with 100+ two-person conversations: on later words of each, their own adapter is at least 35% below the
    base's perplexity and below that of both others."""
    people = chitchat.people(min_conversations=100)[:PEOPLE]
    pieces = [chitchat.voice(person, TRAINED + HELD_OUT) for person in people]
    assert len(people) == PEOPLE
    with httpx.Client(base_url=f"{service.url}/api/v1", timeout=600) as client:
        for at, piece in enumerate(pieces):
            train(client, f"person_{at}", piece[:TRAINED])
        table = [
            [perplexities(client, f"person_{adapter}", pieces[person][TRAINED:]) for adapter in range(PEOPLE)]
            for person in range(PEOPLE)
        ]
    for person, row in enumerate(table):
        base = row[person][1]
        print(f"person {person}: base {base:.1f}, adapters", *(f"{voice:.1f}" for voice, _ in row))
    for person, row in enumerate(table):
        own, base = row[person]
        assert own <= 0.65 * base
        assert all(own < voice for adapter, (voice, _) in enumerate(row) if adapter != person)


def train(client: httpx.Client, org_id: str, conversations: list[Conversation]) -> None:
    body = {"org_id": org_id, "conversations": as_json(conversations), "num_epochs": 2}
    started = client.post("/training/start", json=body)
    assert started.status_code == 200, started.text
    deadline = time.monotonic() + 60 * MINUTES_PER_VOICE
    while True:
        job = client.get(f"/training/status/{started.json()['training_id']}").json()
        if job["status"] == "completed":
            return
        assert job["status"] not in ("failed", "cancelled"), job["error"]
        assert time.monotonic() < deadline, job
        time.sleep(1)


def perplexities(client: httpx.Client, org_id: str, conversations: list[Conversation]) -> tuple[float, float]:
    """(voice, base) on the given conversations."""
    body = {"org_id": org_id, "model_id": "latest", "conversations": as_json(conversations)}
    answer = client.post("/training/evaluate", json=body)
    assert answer.status_code == 200, answer.text
    metrics = answer.json()["metrics"]
    assert metrics["scored_on"] == "given"
    return metrics["perplexity"], metrics["base_perplexity"]
