"""The voices in memory: adapters as they are served, by version. A version never changes, so there is no reloading.

From disk a voice comes into memory when a request needs it, and stays there until others need its room. What happens
from there to the batch is the business of the slots.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

import torch

from repertory.contracts import AdapterRef, AdapterTier, BaseKey, Durations
from repertory.manifest import verify
from repertory.model.adapter import WEIGHTS, Adapter, AdapterUnusable
from repertory.model.base import Base
from repertory.model.prefixes import Version
from repertory.model.tier import Place, Tier

METADATA = "training_metadata.json"
LOADS = 2  # at a time: one may wait for the disk while the other is converted


@dataclass(frozen=True)
class Voice:
    adapter: Adapter  # in memory, in the base's precision
    metadata: dict[str, Any]  # training_metadata.json

    @property
    def system_prompt(self) -> str | None:
        """The one that was trained with, for requests that bring none."""
        prompt: str | None = self.metadata["system_prompt"]
        return prompt


Held = Place[Version, "asyncio.Future[Voice]"]


class Voices:
    """Belongs to the host's event loop, where all of it is called; files are read in threads of its own.

    Loads wait their turn: of an organisation one at a time, of all `LOADS`, and where the room is all in use the next
    one waits until a reply is done. So an organisation with a thousand versions delays another's load by one.
    """

    def __init__(self, base: Base, limit_bytes: int, on_gone: Callable[[Adapter], None]) -> None:
        """`on_gone` hears of every voice that is no longer here nor held by anybody, whatever the reason."""
        self.base = base
        self._tier: Tier[Version, asyncio.Future[Voice]] = Tier(limit_bytes, self._gone)
        self._on_gone = on_gone
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by organisation
        self._loading = asyncio.Semaphore(LOADS)
        self._door = asyncio.Lock()  # one load at a time waits for room, so that none is overtaken for ever
        self._released = asyncio.Event()
        self._threads = ThreadPoolExecutor(LOADS, thread_name_prefix="voices")
        self._tasks: set[asyncio.Task[None]] = set()
        self._hits = self._misses = self._failures = 0
        self._loads = Durations()

    @property
    def training_ids(self) -> list[str]:
        return [held.key.training_id for held in self._tier.places if held.key.training_id and _is_loaded(held)]

    @property
    def stats(self) -> AdapterTier:
        loaded = [held for held in self._tier.places if _is_loaded(held)]
        return AdapterTier(
            resident=len(loaded),
            in_use=sum(held.users > 0 for held in loaded),
            bytes=self._tier.used,
            hits=self._hits,
            misses=self._misses,
            failures=self._failures,
            evictions=self._tier.evictions,
            loads=self._loads,
        )

    @asynccontextmanager
    async def held(self, ref: AdapterRef) -> AsyncIterator[Voice]:
        """The voice, which stays in memory meanwhile; loaded if need be. Raises AdapterUnusable."""
        held = self._tier.take(version_of(ref)) or self._begin_loading(ref)
        if held.value.done():
            self._hits += 1
        else:
            self._misses += 1
        try:
            yield await asyncio.shield(held.value)  # others may wait for it too
        finally:
            self._release(held)

    def unload(self, version: Version) -> None:
        """Those who hold it keep it until they are done; its next request loads it again."""
        self._tier.forget(version)

    def _begin_loading(self, ref: AdapterRef) -> Held:
        held = self._tier.put(version_of(ref), asyncio.get_running_loop().create_future())
        task = asyncio.create_task(self._load(ref, held))
        self._tasks.add(task)  # the event loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)
        return held

    async def _load(self, ref: AdapterRef, held: Held) -> None:
        held.users += 1
        turn = self._turns.setdefault(ref.org_id, asyncio.Lock())
        try:
            async with turn, self._loading:
                await self._make_room(ref, held)
                begin = monotonic()
                voice = await asyncio.get_running_loop().run_in_executor(self._threads, read_voice, ref, self.base)
                self._loads = self._loads.and_one(monotonic() - begin)
            self._tier.resize(held, voice.adapter.size_bytes)
            held.value.set_result(voice)
        except Exception as error:  # whatever it was, it is the answer to all who wait for this voice
            self._failures += 1
            if not held.has_left:  # unloaded meanwhile, and perhaps begun anew
                self._tier.forget(held.key)
            held.value.set_exception(error)
            held.value.exception()  # the last of them may have gone away
        finally:
            self._release(held)

    async def _make_room(self, ref: AdapterRef, held: Held) -> None:
        """Count the voice before it is there: as its file's size, which is the most that it will take."""
        try:
            size = (Path(ref.path) / WEIGHTS).stat().st_size
        except OSError as error:
            raise AdapterUnusable(f"model {ref.training_id} is damaged: {WEIGHTS} is missing") from error
        if size > self._tier.capacity:
            raise AdapterUnusable(
                f"model {ref.training_id} takes {size} bytes, more than the {self._tier.capacity} for all adapters",
                code="adapter_too_large",
                cure="Raise ADAPTER_MEMORY_GB.",
            )
        async with self._door:
            while not self._tier.make_room(size):
                self._released.clear()
                await self._released.wait()
            self._tier.resize(held, size)

    def _release(self, held: Held) -> None:
        self._tier.release(held)
        self._released.set()

    def _gone(self, held: Held) -> None:
        if _is_loaded(held):
            self._on_gone(held.value.result().adapter)


def version_of(ref: AdapterRef) -> Version:
    return Version(ref.org_id, ref.training_id)


def _is_loaded(held: Held) -> bool:
    return held.value.done() and held.value.exception() is None


def read_voice(ref: AdapterRef, base: Base) -> Voice:
    """As it is served. Raises AdapterUnusable."""
    adapter, metadata = read_version(ref, base)
    return Voice(adapter.to(torch.device("cpu"), base.dtype), metadata)


def read_version(ref: AdapterRef, base: Base) -> tuple[Adapter, dict[str, Any]]:
    """The adapter as its files have it, and its metadata. Raises AdapterUnusable if it is damaged, or not of `base`."""
    folder = Path(ref.path)
    try:
        damage = verify(folder)
        if damage is not None:
            raise AdapterUnusable(f"model {ref.training_id} is damaged: {damage}")
        metadata = json.loads((folder / METADATA).read_text())
        _check_provenance(metadata, ref, base)
        return Adapter.load(folder, base.layers), metadata
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # Files that vanish meanwhile, or JSON of another shape.
        raise AdapterUnusable(f"model {ref.training_id} cannot be read: {error!r}") from error


def provenance(
    training_id: str, key: BaseKey, fingerprint: str, template_sha256: str, system_prompt: str | None
) -> dict[str, Any]:
    """What a version's metadata must say, so that it is served as itself, on its base, after its system prompt."""
    return {
        "training_id": training_id,
        **key.model_dump(),
        "base_fingerprint": fingerprint,
        "template_sha256": template_sha256,
        "system_prompt": system_prompt,
    }


def _check_provenance(metadata: dict[str, Any], ref: AdapterRef, base: Base) -> None:
    name = f"model {ref.training_id}"
    if metadata["training_id"] != ref.training_id:  # folders that were mixed up: each verifies in itself
        raise AdapterUnusable(f"the folder of {name} holds another model")
    if key_of(metadata) != base.key:
        raise AdapterUnusable(f"{name} was trained on another base model or precision")
    if metadata["base_fingerprint"] != base.fingerprint:
        raise AdapterUnusable(f"the base model's files have changed since {name} was trained")
    if metadata["template_sha256"] != base.renderer.template_sha256:
        raise AdapterUnusable(f"{name} was trained with another chat template")


def key_of(metadata: dict[str, object]) -> BaseKey:
    """The base model that a version was trained on, from its metadata."""
    return BaseKey.model_validate({name: metadata.get(name) for name in BaseKey.model_fields})
