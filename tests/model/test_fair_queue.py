"""Fairness between organisations, on the scheduler alone: what each is given is counted here, not read from it."""

from __future__ import annotations

from collections import Counter
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repertory.model.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT
from repertory.model.scheduler import Scheduler
from sequences import sequence

LONGEST_PROMPT = 40
LONGEST_REPLY = 30

Shape = tuple[int, int]  # tokens of a request's prompt and of its reply
shapes = st.lists(st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_REPLY)), min_size=1, max_size=4)


class Simulation:
    """Steps a scheduler as the engine does, without a model; every reply gets as long as it may."""

    def __init__(self, rows: int, shapes: dict[str, list[Shape]], known: frozenset[str] = frozenset()) -> None:
        """`known`: organisations of whose prompts all but the last token is in the prefix cache."""
        self.known = known
        self.scheduler = Scheduler(rows, 16, lambda sequences: True)
        self.shapes = {org: cycle(pattern) for org, pattern in shapes.items()}
        self.waiting: Counter[str] = Counter()
        self.given: Counter[str] = Counter()  # weighted tokens
        self.admitted: list[str] = []

    def send(self, org: str, times: int = 1) -> None:
        for _ in range(times):
            prompt, reply = next(self.shapes[org])
            self.scheduler.add(sequence(org, prompt=prompt, max_tokens=reply))
            self.waiting[org] += 1

    def step(self) -> None:
        before = set(self.scheduler.prefilling)
        self.scheduler.admit()
        for one in self.scheduler.prefilling:
            if one not in before:
                self.admitted.append(one.org_id)
                self.waiting[one.org_id] -= 1
                if one.org_id in self.known:
                    one.cached_tokens = len(one.prompt_ids) - 1
                    self.scheduler.spare(one, one.cached_tokens)
                self.given[one.org_id] += PROMPT_WEIGHT * (len(one.prompt_ids) - one.cached_tokens)
        step = self.scheduler.next_step()
        for one in step.writing:
            self.given[one.org_id] += OUTPUT_WEIGHT
        for chunk in step.chunks:
            is_whole = chunk.completes_prompt
            chunk.sequence.cached_tokens += chunk.tokens
            if is_whole:
                self.scheduler.prefilled(chunk.sequence)
        for one in list(self.scheduler.decoding):
            if one in step.writing:
                one.append(0)
            if one.is_finished:
                self.scheduler.leave(one)


@pytest.mark.fault("F32")
@settings(deadline=None)
@given(
    rows=st.integers(1, 6),
    patterns=st.lists(shapes, min_size=2, max_size=4),
    visits=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 3), st.integers(1, 5)), max_size=12),
    begins=st.integers(0, 100),
)
def test_of_two_that_both_wait_neither_is_given_more_beyond_the_bound(
    rows: int, patterns: list[list[Shape]], visits: list[tuple[int, int, int]], begins: int
) -> None:
    """Two have more to send from some step on than there are rows; before, and all others, come and go as they like."""
    simulation = Simulation(rows, {f"org{at}": pattern for at, pattern in enumerate(patterns)})
    bound = 2 * (PROMPT_WEIGHT * LONGEST_PROMPT + OUTPUT_WEIGHT * rows * LONGEST_REPLY)
    leads = []
    for now in range(400):
        for at, org, times in visits:
            if at == now and org < len(patterns):
                simulation.send(f"org{org}", times)
        if now >= begins:
            for org in ("org0", "org1"):
                simulation.send(org, max(0, rows + 1 - simulation.waiting[org]))
            leads.append(simulation.given["org0"] - simulation.given["org1"])
        simulation.step()
    assert max(leads) - min(leads) <= bound


@settings(deadline=None)
@given(rows=st.integers(1, 4), patterns=st.lists(shapes, min_size=2, max_size=3), sent=st.integers(1, 8))
def test_everybody_is_answered_and_no_row_stands_empty_while_somebody_waits(
    rows: int, patterns: list[list[Shape]], sent: int
) -> None:
    simulation = Simulation(rows, {f"org{at}": pattern for at, pattern in enumerate(patterns)})
    for org in simulation.shapes:
        simulation.send(org, sent)
    while simulation.scheduler.has_work:
        waiting = simulation.scheduler.waiting_count
        running = len(simulation.scheduler.running)
        admitted = len(simulation.admitted)
        simulation.step()
        assert len(simulation.admitted) == admitted + min(waiting, rows - running)
    assert simulation.admitted.count("org0") == sent == simulation.admitted.count("org1")


def test_long_requests_do_not_win_more_than_short_ones_do() -> None:
    """Turn by turn, as it was, the one with long requests would be given thirty times as much."""
    simulation = Simulation(2, {"long": [(40, 30)], "short": [(2, 1)]})
    for _ in range(3000):
        for org in ("long", "short"):
            simulation.send(org, max(0, 3 - simulation.waiting[org]))
        simulation.step()
    assert 0.9 < simulation.given["long"] / simulation.given["short"] < 1.1


def test_what_need_not_be_computed_is_not_paid_for() -> None:
    simulation = Simulation(2, {"known": [(40, 4)], "new": [(40, 4)]}, known=frozenset(["known"]))
    for _ in range(1000):
        for org in ("known", "new"):
            simulation.send(org, max(0, 3 - simulation.waiting[org]))
        simulation.step()
    assert 0.9 < simulation.given["known"] / simulation.given["new"] < 1.1
    assert 4 < simulation.admitted.count("known") / simulation.admitted.count("new") < 6


def test_nobody_saves_up_turns_by_staying_away() -> None:
    simulation = Simulation(1, {"steady": [(4, 4)], "guest": [(4, 4)]})
    simulation.send("steady", 200)
    for _ in range(500):
        simulation.step()
    admitted = len(simulation.admitted)
    simulation.send("guest", 20)
    for _ in range(60):
        simulation.step()
    since = simulation.admitted[admitted:]
    assert abs(since.count("guest") - since.count("steady")) <= 2


def test_nor_does_one_lose_what_it_was_given_by_leaving_for_a_moment() -> None:
    """Whoever is ahead stays ahead when their queue runs empty, or many short queues would beat one long one."""
    simulation = Simulation(2, {"hog": [(40, 30)], "other": [(4, 4)]})
    simulation.send("hog")
    simulation.send("other", 50)
    for _ in range(12):  # the hog's prompt is read and its reply goes on
        simulation.step()
    simulation.send("hog", 5)
    admitted = len(simulation.admitted)
    for _ in range(12):
        simulation.step()
    assert "hog" not in simulation.admitted[admitted:]


def test_counters_of_who_is_gone_are_forgotten() -> None:
    orgs = {f"org{at}": [(4, 2)] for at in range(500)}
    simulation = Simulation(4, orgs)
    for org in orgs:
        simulation.send(org)
        simulation.send("org0", max(0, 2 - simulation.waiting["org0"]))  # the queue is never empty
        for _ in range(3):
            simulation.step()
    assert len(simulation.admitted) > 500
    assert len(simulation.scheduler._queue._served) < 20
