from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from benchmarks.voices import random_voice, write_version

from repertory.contracts import AdapterRef
from repertory.manifest import MANIFEST, write_manifest
from repertory.model import voices as voices_module
from repertory.model.adapter import WEIGHTS, Adapter, AdapterUnusable
from repertory.model.base import Base
from repertory.model.voices import LOADS, METADATA, Voice, Voices, read_voice, version_of

MakeVersion = Callable[..., AdapterRef]
PLENTY = 1 << 30


@pytest.fixture
def version(base: Base, tmp_path: Path) -> MakeVersion:
    def make(training_id: str, org_id: str = "org", rank: int = 4) -> AdapterRef:
        folder, adapter = tmp_path / org_id / training_id, random_voice(base, 0, rank)
        return write_version(folder, adapter, base, base.renderer, base.fingerprint, org_id)

    return make


def size_of(ref: AdapterRef) -> int:
    return (Path(ref.path) / WEIGHTS).stat().st_size


def ignore(adapter: Adapter) -> None:
    pass


def in_event_loop(story: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(story(), 30)

    asyncio.run(limited())


async def use(voices: Voices, *refs: AdapterRef) -> None:
    for ref in refs:
        async with voices.held(ref):
            pass


def test_a_voice_is_read_once_however_many_want_it_first(
    base: Base, version: MakeVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = version("train_a")
    read: list[str] = []
    monkeypatch.setattr(voices_module, "read_voice", recorded(read))

    async def story() -> None:
        voices = Voices(base, PLENTY, ignore)
        await asyncio.gather(*(use(voices, ref) for _ in range(20)))
        await use(voices, ref)
        stats = voices.stats
        assert (stats.hits, stats.misses, stats.resident, stats.in_use) == (1, 20, 1, 0)
        assert stats.bytes == sum(weight.nbytes for weight in read_voice(ref, base).adapter.parameters)

    in_event_loop(story)
    assert read == ["train_a"]


def test_the_memory_holds_what_fits_and_the_least_recently_used_leaves(base: Base, version: MakeVersion) -> None:
    a, b, c = (version(f"train_{name}") for name in "abc")
    gone: list[Adapter] = []

    async def story() -> None:
        voices = Voices(base, int(2.5 * size_of(a)), gone.append)
        await use(voices, a, b)
        async with voices.held(b) as voice:
            of_b = voice.adapter
        await use(voices, a, c)
        assert gone == [of_b]
        assert sorted(voices.training_ids) == ["train_a", "train_c"]
        assert voices.stats.evictions == 1
        assert voices.stats.bytes <= 2.5 * size_of(a)

    in_event_loop(story)


def test_a_load_waits_while_all_the_room_is_in_use_and_nobody_overtakes_it(base: Base, version: MakeVersion) -> None:
    a, b, c = (version(f"train_{name}", org_id=name) for name in "abc")

    async def story() -> None:
        voices = Voices(base, int(1.5 * size_of(a)), ignore)
        order: list[str] = []

        async def ask(ref: AdapterRef) -> None:
            async with voices.held(ref):
                order.append(ref.org_id)

        async with voices.held(a):
            waiting = [asyncio.create_task(ask(ref)) for ref in (b, c)]
            async with asyncio.timeout(0.2):
                await asyncio.wait(waiting, timeout=0.1)
            assert order == []
            await use(voices, a)  # who is in memory is not held up
        await asyncio.gather(*waiting)
        assert order == ["b", "c"]

    in_event_loop(story)


def test_a_voice_larger_than_the_room_says_what_to_do(base: Base, version: MakeVersion) -> None:
    small, large = version("train_small", rank=2), version("train_large", rank=16)

    async def story() -> None:
        voices = Voices(base, size_of(large) - 1, ignore)
        with pytest.raises(AdapterUnusable, match="train_large") as refused:
            await use(voices, large)
        assert refused.value.code == "adapter_too_large"
        assert "ADAPTER_MEMORY_GB" in refused.value.cure
        await use(voices, small)

    in_event_loop(story)


def test_few_loads_at_a_time_and_organisations_take_turns(
    base: Base, version: MakeVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One organisation wants eight versions, then another wants one: it does not come last."""
    greedy = [version(f"train_{at}", org_id="greedy") for at in range(8)]
    modest = version("train_modest", org_id="modest")
    read: list[str] = []
    at_once: list[int] = []
    monkeypatch.setattr(voices_module, "read_voice", recorded(read, at_once))

    async def story() -> None:
        voices = Voices(base, PLENTY, ignore)
        await asyncio.gather(*(use(voices, ref) for ref in (*greedy, modest)))

    in_event_loop(story)
    assert read.index("train_modest") <= LOADS
    assert sorted(read) == sorted([*(ref.training_id for ref in greedy), "train_modest"])
    assert max(at_once) <= LOADS


def test_a_disk_that_hangs_holds_up_nobody_whose_voice_is_in_memory(
    base: Base, version: MakeVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, *cold = (version(f"train_{at}", org_id=f"org{at}") for at in range(LOADS + 2))
    disk_answers = threading.Event()

    def reading(ref: AdapterRef, base: Base) -> Voice:
        disk_answers.wait(20)
        return read_voice(ref, base)

    async def story() -> None:
        voices = Voices(base, PLENTY, ignore)
        await use(voices, here)
        monkeypatch.setattr(voices_module, "read_voice", reading)
        waiting = [asyncio.create_task(use(voices, ref)) for ref in cold]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(use(voices, here), 5)
        assert not any(one.done() for one in waiting)
        disk_answers.set()
        await asyncio.gather(*waiting)

    in_event_loop(story)


def test_requests_that_are_given_up_leave_nothing_in_use(base: Base, version: MakeVersion) -> None:
    ref = version("train_a")

    async def story() -> None:
        voices = Voices(base, PLENTY, ignore)
        asking = asyncio.create_task(use(voices, ref))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        await use(voices, ref)  # what was begun is finished, and of use to the next
        assert voices.stats.in_use == 0

    in_event_loop(story)


def test_unloading_frees_the_memory_once_the_last_reply_is_done(base: Base, version: MakeVersion) -> None:
    ref = version("train_a")
    gone: list[str] = []

    async def story() -> None:
        voices = Voices(base, PLENTY, lambda adapter: gone.append("adapter"))
        async with voices.held(ref) as voice:
            weights = weakref.ref(voice.adapter)
            voices.unload(version_of(ref))
            assert voices.training_ids == []
            assert (gone, voices.stats.bytes > 0) == ([], True)
            async with voices.held(ref) as again:
                assert again.adapter is not voice.adapter  # read anew: its files may be gone
        del voice
        while weights() is not None:  # the thread that has read it may not have let go of it yet
            gc.collect()
            await asyncio.sleep(0.01)
        assert gone == ["adapter"]
        voices.unload(version_of(ref))
        assert voices.stats.bytes == 0

    in_event_loop(story)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / METADATA).unlink()


def seal_without_metadata(folder: Path) -> None:
    (folder / METADATA).unlink()
    write_manifest(folder, [WEIGHTS])


def seal_nonsense(folder: Path) -> None:
    (folder / METADATA).write_text("[]")
    write_manifest(folder, [WEIGHTS, METADATA])


def swap_with_another_organisation(folder: Path) -> None:
    theirs, aside = folder.parent.parent / "them" / "train_theirs", folder.with_name("aside")
    folder.rename(aside)
    theirs.rename(folder)
    aside.rename(theirs)


def link_to_another_organisation(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent.parent / "them" / "train_theirs")


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        flip_a_bit,
        lose_a_file,
        seal_without_metadata,
        seal_nonsense,
        shutil.rmtree,
        lambda folder: (folder / MANIFEST).unlink(),
        swap_with_another_organisation,
        link_to_another_organisation,
    ],
)
def test_a_folder_that_is_not_whole_is_an_error_for_its_voice_alone(
    base: Base, version: MakeVersion, harm: Callable[[Path], None]
) -> None:
    ref, other = version("train_a"), version("train_other")
    version("train_theirs", org_id="them")
    kept = shutil.copytree(ref.path, f"{ref.path}.kept")
    harm(Path(ref.path))

    async def story() -> None:
        voices = Voices(base, PLENTY, ignore)
        results = await asyncio.gather(use(voices, ref), use(voices, other), use(voices, ref), return_exceptions=True)
        assert [type(result) for result in results] == [AdapterUnusable, type(None), AdapterUnusable]
        assert "train_theirs" not in str(results[0])
        assert (voices.training_ids, voices.stats.failures) == (["train_other"], 1)
        assert voices.stats.bytes == read_voice(other, base).adapter.size_bytes
        folder = Path(ref.path)
        if folder.is_symlink():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        await use(voices, ref)  # restored from a backup: the failure is not remembered

    in_event_loop(story)


def recorded(read: list[str], at_once: list[int] | None = None) -> Callable[[AdapterRef, Base], Voice]:
    """`read_voice`, which also tells what it reads, and how many readings were going on at its beginnings."""
    going_on: list[str] = []

    def reading(ref: AdapterRef, base: Base) -> Voice:
        read.append(ref.training_id)
        going_on.append(ref.training_id)
        if at_once is not None:
            at_once.append(len(going_on))
        try:
            return read_voice(ref, base)
        finally:
            going_on.remove(ref.training_id)

    return reading
