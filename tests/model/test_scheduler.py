from __future__ import annotations

from typing import Any

from repertory.contracts import TokenChunk
from repertory.model.scheduler import Scheduler
from sequences import sequence


def run(scheduler: Scheduler, finish_after: int, steps: int) -> list[Any]:
    """Step like the engine, finishing each sequence after some tokens; returns the orgs in order of admission."""
    admitted = []
    for _ in range(steps):
        step = scheduler.next_step()
        for decoding in step.decoding:
            decoding.append(0)
            decoding.is_finished = len(decoding.output_ids) >= finish_after
        if step.prefilling is not None:
            step.prefilling.cached_tokens += step.chunk_tokens
            if step.prefilling.is_prefilled:
                admitted.append(step.prefilling.org_id)
                scheduler.decoding.append(step.prefilling)
                scheduler.prefilling = None
        scheduler.decoding = [one for one in scheduler.decoding if not one.is_finished]
    return admitted


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    scheduler = Scheduler(4, 16, lambda rows, tokens: True)
    scheduler.decoding.append(sequence())
    scheduler.add(sequence(prompt=40))
    chunks = []
    for _ in range(3):
        step = scheduler.next_step()
        assert len(step.decoding) == 1
        assert step.prefilling is not None
        step.prefilling.cached_tokens += step.chunk_tokens
        chunks.append(step.chunk_tokens)
    assert chunks == [16, 16, 8]


def test_nobody_waits_for_all_of_anothers_requests() -> None:
    scheduler = Scheduler(2, 16, lambda rows, tokens: True)
    for _ in range(6):
        scheduler.add(sequence("greedy"))
    scheduler.add(sequence("modest"))
    scheduler.add(sequence("modest"))
    assert sorted(run(scheduler, 2, 40)[:4]) == ["greedy", "greedy", "modest", "modest"]


def test_nobody_is_admitted_beyond_the_rows_or_the_memory() -> None:
    rows_seen = []

    def fits(rows: int, tokens: int) -> bool:
        rows_seen.append((rows, tokens))
        return rows <= 2

    scheduler = Scheduler(8, 16, fits)
    for _ in range(5):
        scheduler.add(sequence(prompt=4, max_tokens=6))
    run(scheduler, 100, 5)
    assert len(scheduler.running) == 2
    assert scheduler.waiting_count == 3
    assert set(rows_seen) == {(1, 10), (2, 10), (3, 10)}


def test_a_dropped_sequence_never_runs() -> None:
    scheduler = Scheduler(1, 16, lambda rows, tokens: True)
    dropped = sequence("b")
    scheduler.add(sequence("a"))
    scheduler.add(dropped)
    scheduler.drop(dropped)
    assert run(scheduler, 1, 10) == ["a"]
    assert not scheduler.has_work


def test_a_reply_ends_at_its_turn_end_or_its_length_and_says_which() -> None:
    told: list[TokenChunk] = []
    one = sequence(max_tokens=3, told=told)
    for token in (0, 1, 25):
        one.append(token)
    assert [chunk.text for chunk in told] == ["a", "b", ""]
    assert told[-1].finish_reason == "stop"
    told.clear()
    other = sequence(max_tokens=3, told=told)
    for token in (0, 1, 2):
        other.append(token)
    assert told[-1].finish_reason == "length"
    assert told[-1].usage is not None
    assert told[-1].usage.completion_tokens == 3
