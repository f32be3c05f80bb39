"""What happened to a job, as a list and as server-sent events."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from running_service import RunningService

STORY = ["queued", "preparing", "running", "evaluating", "completed"]
STREAM = {"accept": "text/event-stream"}


def told(response: httpx.Response) -> list[tuple[int, str, Any]]:
    """The id, kind and data of each event."""
    events = []
    for block in "".join(response.iter_text()).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


@pytest.fixture(scope="module")
def trained(service: RunningService) -> str:
    return service.trained("eventful")


def test_each_transition_is_one_event_with_a_growing_number(service: RunningService, trained: str) -> None:
    answer = service.client.get(f"/training/{trained}/events").json()
    assert answer["training_id"] == trained
    assert [event["seq"] for event in answer["events"]] == list(range(1, len(answer["events"]) + 1))
    assert [event["kind"] for event in answer["events"] if event["kind"] != "warning"] == STORY
    (warning,) = [event for event in answer["events"] if event["kind"] == "warning"]
    assert warning["data"] == {"message": "a fake host trains nothing"}
    times = [event["at"] for event in answer["events"]]
    assert times == sorted(times)
    assert all(time.endswith("Z") for time in times)


def test_only_those_after_a_number_are_shown(service: RunningService, trained: str) -> None:
    events = service.client.get(f"/training/{trained}/events").json()["events"]
    later = service.client.get(f"/training/{trained}/events?after=3").json()["events"]
    assert later == events[3:]
    assert service.client.get(f"/training/{trained}/events?after=99").json()["events"] == []


def test_a_failure_says_why(service: RunningService) -> None:
    training_id = service.train("eventful", base_model="fake/fail")
    service.until(training_id, "failed")
    last = service.client.get(f"/training/{training_id}/events").json()["events"][-1]
    assert (last["kind"], last["data"]["code"]) == ("failed", "diverged")


def test_a_stream_tells_the_story_as_it_happens_and_ends_with_it(service: RunningService) -> None:
    training_id = service.train("eventful")
    with service.client.stream("GET", f"/training/{training_id}/events", headers=STREAM) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = told(response)
    assert [kind for _, kind, _ in events if kind != "warning"] == STORY
    listed = service.client.get(f"/training/{training_id}/events").json()["events"]
    assert [data for _, _, data in events] == listed
    assert [number for number, _, _ in events] == [event["seq"] for event in listed]


def test_a_stream_goes_on_after_the_last_event_that_arrived(service: RunningService, trained: str) -> None:
    url = f"/training/{trained}/events"
    whole = told(service.client.get(url, headers=STREAM))
    for last in (0, 1, 3, len(whole) - 1):
        again = service.client.get(url, headers={**STREAM, "last-event-id": str(last)})
        assert told(again) == whole[last:]


def test_an_event_source_that_has_heard_all_is_told_not_to_come_again(service: RunningService, trained: str) -> None:
    headers = {**STREAM, "last-event-id": "99"}
    assert service.client.get(f"/training/{trained}/events", headers=headers).status_code == 204


@pytest.mark.parametrize("last", ["-1", "a", "1.5", "99999999999", "\N{SUPERSCRIPT TWO}".encode().decode("latin-1")])
def test_a_number_that_is_none_is_refused(service: RunningService, trained: str, last: str) -> None:
    headers = {**STREAM, "last-event-id": last.encode("latin-1")}
    answer = service.client.get(f"/training/{trained}/events", headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "Last-Event-ID")


def test_events_of_a_job_that_is_not_there_are_not_found(service: RunningService) -> None:
    for headers in ({}, STREAM):
        answer = service.client.get("/training/train_0000000000000000/events", headers=headers)
        assert answer.json()["error"]["code"] == "training_not_found"


def test_many_watch_and_others_are_answered(slow_service: RunningService) -> None:
    """More streams than there are threads: they only look now and then."""
    training_id = slow_service.train("watched")
    slow_service.until(training_id, "running", "queued")
    arrived = threading.Semaphore(0)
    enough = threading.Event()

    def watch() -> None:
        with (
            httpx.Client(base_url=slow_service.client.base_url, timeout=30, trust_env=False) as client,
            client.stream("GET", f"/training/{training_id}/events", headers=STREAM) as response,
        ):
            next(response.iter_lines())
            arrived.release()
            enough.wait(30)

    watchers = [threading.Thread(target=watch) for _ in range(60)]
    for watcher in watchers:
        watcher.start()
    try:
        assert all(arrived.acquire(timeout=30) for _ in watchers)
        assert slow_service.client.get("/health").elapsed.total_seconds() < 5
    finally:
        enough.set()
        for watcher in watchers:
            watcher.join()
        slow_service.client.delete(f"/training/jobs/{training_id}")
