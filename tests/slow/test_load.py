"""More callers than places, and rude ones among them: the others are answered, and nothing grows."""

from __future__ import annotations

import asyncio

import pytest
from benchmarks.load import Seen, measure, service

pytestmark = pytest.mark.slow


def checked(seen: Seen) -> dict[str, dict[str, float]]:
    assert seen.is_clean, seen.summary()
    assert seen.statuses[200] > 100
    assert seen.statuses[429] + seen.statuses[503] > 0  # there were too many
    told = seen.summary()
    print(told)
    assert told["health_ms"]["p99"] < told["reply_ms"]["p50"]  # half a second, where nothing is in the way
    return told


def test_too_many_clients_are_answered_or_told_when_to_come_again_and_so_are_they_beside_rude_ones() -> None:
    with service() as (url, process):
        alone = checked(asyncio.run(measure(url, process, clients=200, seconds=20)))
        among = checked(asyncio.run(measure(url, process, clients=200, seconds=20, rude=50)))
        assert among["reply_ms"]["p95"] < 2 * alone["reply_ms"]["p95"]
        assert among["memory_mb"]["end"] < alone["memory_mb"]["end"] * 1.15
        left = process.num_fds()
        after = checked(asyncio.run(measure(url, process, clients=200, seconds=10)))
        assert after["memory_mb"]["end"] < among["memory_mb"]["end"] * 1.05
        assert process.num_fds() < left + 20
