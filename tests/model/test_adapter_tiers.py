"""More voices than memory and slots hold, in a real host."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from benchmarks.voices import random_voice, write_version

from repertory.contracts import AdapterRef
from repertory.model.adapter import WEIGHTS
from repertory.model.base import Base
from running_host import RunningHost, eventually

VOICES = 40
SLOTS = 4
ROOM = 12  # adapters in memory


@pytest.fixture(scope="module")
def refs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Voices far enough apart that each says something of its own; every third is of twice the rank."""
    root = tmp_path_factory.mktemp("voices")
    refs = []
    for at in range(VOICES):
        adapter = random_voice(base, at, rank=8 if at % 3 == 0 else 4)
        for B in adapter.B.values():
            B.mul_(200)
        refs.append(write_version(root / f"train_{at}", adapter, base, base.renderer, base.fingerprint, f"org{at % 7}"))
    return refs


@pytest.fixture(scope="module")
def start(cache: Path) -> Iterator[Callable[..., RunningHost]]:
    hosts = []
    with tempfile.TemporaryDirectory() as folder:

        def start(**settings: str) -> RunningHost:
            flags = ("--quantization", "none", "--dtype", "fp32")
            socket = Path(folder) / f"{len(hosts)}.sock"
            hosts.append(RunningHost(cache, socket, "tiny/llama-gqa", *flags, **settings))
            assert hosts[-1].until("ready", "failed")["state"] == "ready"
            return hosts[-1]

        yield start
        for host in hosts:
            host.close()


def text_of(lines: list[dict[str, Any]]) -> str:
    assert lines[-1].get("finish_reason") == "length", lines[-1]
    return "".join(line.get("text", "") for line in lines)


def ask(host: RunningHost, ref: AdapterRef | None) -> str:
    return text_of(host.generate(ref, org_id=ref.org_id if ref else "org", max_tokens=24, top_logprobs=0))


@pytest.mark.fault("F26")
def test_forty_voices_through_few_places_in_memory_and_fewer_slots(
    start: Callable[..., RunningHost], refs: list[AdapterRef]
) -> None:
    """Everyone at once, twice: each voice says what it says alone, and nothing stays that has no room."""
    room = ROOM * (Path(refs[0].path) / WEIGHTS).stat().st_size
    host = start(ADAPTER_SLOTS=str(SLOTS), ADAPTER_MEMORY_GB=str(room / 2**30))
    alone = [ask(host, ref) for ref in refs]
    assert len(set(alone)) == VOICES
    assert ask(host, None) not in alone
    slots_in_use = set()
    with ThreadPoolExecutor(2 * VOICES) as readers:
        asked = [readers.submit(ask, host, ref) for ref in refs + refs]
        while not all(one.done() for one in asked):
            slots_in_use.add(host.health()["stats"]["adapters"]["slots"]["in_use"])
    assert [one.result() for one in asked] == alone + alone
    assert max(slots_in_use) == SLOTS
    tiers = host.health()["stats"]["adapters"]
    ram, slots = tiers["ram"], tiers["slots"]
    assert 0 < ram["bytes"] <= room
    assert ram["failures"] == ram["in_use"] == slots["in_use"] == 0
    assert ram["evictions"] > VOICES  # twice round at least, and more than once through the memory
    assert sum(ram["loads"]["counts"]) == ram["evictions"] + ram["resident"]
    assert slots["misses"] >= VOICES


def test_what_happens_to_a_voices_files_harms_nobody_else(
    start: Callable[..., RunningHost], refs: list[AdapterRef]
) -> None:
    """A file cut short under a voice in memory, and under one that is not, while other voices are answered."""
    host = start()
    loaded, cold, other = refs[:3]
    before = ask(host, loaded), ask(host, other)
    for ref in (loaded, cold):
        weights = Path(ref.path) / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:5000])
    with ThreadPoolExecutor(4) as readers:
        others = readers.map(lambda _: ask(host, other), range(8))
        refused = host.client.post("/adapters/load", json=cold.model_dump())
        assert (ask(host, loaded), *set(others)) == before
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unusable")
    assert host.client.post("/adapters/unload", json=loaded.model_dump()).status_code == 200
    eventually(lambda: host.client.post("/adapters/load", json=loaded.model_dump()).status_code == 503)
    assert host.health()["adapters"] == [other.training_id]
