from __future__ import annotations

from repertory.contracts import TokenChunk
from repertory.model.scheduler import Scheduler, Sequence, Step
from sequences import sequence


def step_of(scheduler: Scheduler) -> Step:
    """What a step of the engine does to the sequences."""
    scheduler.admit()
    step = scheduler.next_step()
    for decoding in step.decoding:
        decoding.append(0)
    for chunk in step.chunks:
        is_complete = chunk.completes_prompt
        chunk.sequence.cached_tokens += chunk.tokens
        if is_complete:
            scheduler.prefilled(chunk.sequence)
    return step


def run(scheduler: Scheduler, finish_after: int, steps: int) -> list[str]:
    """Step like the engine, finishing each sequence after some tokens; returns the orgs in order of admission."""
    admitted = []
    for _ in range(steps):
        admitted += [chunk.sequence.org_id for chunk in step_of(scheduler).chunks if chunk.completes_prompt]
        for one in list(scheduler.decoding):
            if len(one.output_ids) >= finish_after:
                scheduler.leave(one)
    return admitted


def chunks_of(step: Step) -> list[tuple[str, int]]:
    return [(chunk.sequence.org_id, chunk.tokens) for chunk in step.chunks]


def anyone(sequences: list[Sequence]) -> bool:
    return True


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    """A step has 16 tokens: one for the sequence that decodes, the others for the prompt."""
    scheduler = Scheduler(4, 16, anyone)
    scheduler.decoding.append(sequence())
    scheduler.add(sequence("b", prompt=40))
    assert [chunks_of(step_of(scheduler)) for _ in range(4)] == [[("b", 15)], [("b", 15)], [("b", 10)], []]
    assert [one.org_id for one in scheduler.decoding] == ["a", "b"]


def test_short_prompts_are_prefilled_together_and_beside_a_long_one() -> None:
    scheduler = Scheduler(8, 64, anyone)
    scheduler.add(sequence("long", prompt=500))
    step_of(scheduler)
    for org in ("b", "c"):
        scheduler.add(sequence(org, prompt=20))
    assert sorted(chunks_of(step_of(scheduler))) == [("b", 20), ("c", 20), ("long", 24)]


def test_the_oldest_prompt_has_its_share_however_many_short_ones_come() -> None:
    scheduler = Scheduler(4, 64, anyone)
    scheduler.add(sequence("long", prompt=300))
    for _ in range(40):
        scheduler.add(sequence("short", prompt=60, max_tokens=1))
    assert "long" in run(scheduler, 1, 25)


def test_a_block_that_is_being_computed_is_waited_for() -> None:
    """Three prompts of one version, one of which begins otherwise: each block is computed once in a step."""
    ids, other = list(range(100)), [7, *range(99)]
    scheduler = Scheduler(8, 64, anyone)
    for prompt in (ids, ids, other):
        one = sequence()
        one.prompt_ids, one.block_keys = prompt, one.version.block_keys(prompt)
        scheduler.add(one)
    scheduler.admit()
    first, second, _ = scheduler.prefilling
    taken = {chunk.sequence: chunk.tokens for chunk in scheduler.next_step().chunks}
    assert sum(taken.values()) == 64
    assert second not in taken
    assert first in taken


def test_nobody_waits_for_all_of_anothers_requests() -> None:
    scheduler = Scheduler(2, 16, anyone)
    for _ in range(6):
        scheduler.add(sequence("greedy"))
    scheduler.add(sequence("modest"))
    scheduler.add(sequence("modest"))
    assert sorted(run(scheduler, 2, 40)[:4]) == ["greedy", "greedy", "modest", "modest"]


def test_nobody_is_admitted_beyond_the_rows_or_the_memory() -> None:
    asked = []

    def fits(sequences: list[Sequence]) -> bool:
        asked.append([one.most_tokens for one in sequences])
        return len(sequences) <= 2

    scheduler = Scheduler(8, 16, fits)
    for _ in range(5):
        scheduler.add(sequence(prompt=4, max_tokens=6))
    run(scheduler, 100, 5)
    assert len(scheduler.running) == 2
    assert scheduler.waiting_count == 3
    assert asked[:3] == [[10], [10, 10], [10, 10, 10]]
    rows = Scheduler(2, 16, anyone)
    for _ in range(5):
        rows.add(sequence())
    run(rows, 100, 5)
    assert len(rows.running) == 2


def test_a_dropped_sequence_never_runs() -> None:
    scheduler = Scheduler(1, 16, anyone)
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
