"""The voices in memory: adapters as they are served, by version. A version never changes, so there is no reloading."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from repertory.contracts import AdapterRef, BaseKey
from repertory.manifest import verify
from repertory.model.base import Base
from repertory.model.lora import Adapter, AdapterUnusable

METADATA = "training_metadata.json"


@dataclass(frozen=True)
class Voice:
    adapter: Adapter  # on the device, in the base's precision
    metadata: dict[str, Any]  # training_metadata.json

    @property
    def system_prompt(self) -> str | None:
        """The one that was trained with, for requests that bring none."""
        prompt: str | None = self.metadata["system_prompt"]
        return prompt


class Voices:
    """Loads on first use. Unloading forgets a voice; sequences in flight keep theirs until they finish."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._voices: dict[tuple[str, str], Voice] = {}
        self._locks: dict[tuple[str, str], Lock] = {}
        self._lock = Lock()

    @property
    def training_ids(self) -> list[str]:
        with self._lock:
            return [training_id for _, training_id in self._voices]

    def get(self, ref: AdapterRef) -> Voice:
        """The voice, loaded if need be; call it off the device's thread. Raises AdapterUnusable."""
        version = (ref.org_id, ref.training_id)
        with self._lock:
            loading = self._locks.setdefault(version, Lock())
        with loading:  # of several first requests one loads, the others wait for it
            with self._lock:
                voice = self._voices.get(version)
            if voice is None:
                voice = self._load(ref)
                with self._lock:
                    self._voices[version] = voice
        return voice

    def unload(self, org_id: str, training_id: str) -> None:
        with self._lock:
            self._voices.pop((org_id, training_id), None)
            self._locks.pop((org_id, training_id), None)

    def _load(self, ref: AdapterRef) -> Voice:
        adapter, metadata = read_version(ref, self.base)
        return Voice(adapter.to(self.base.device, self.base.dtype), metadata)


def read_version(ref: AdapterRef, base: Base) -> tuple[Adapter, dict[str, Any]]:
    """The adapter as its files have it, and its metadata. Raises AdapterUnusable if it is damaged, or not of `base`."""
    folder = Path(ref.path)
    damage = verify(folder)
    if damage is not None:
        raise AdapterUnusable(f"model {ref.training_id} is damaged: {damage}")
    metadata = json.loads((folder / METADATA).read_text())
    if key_of(metadata) != base.key:
        raise AdapterUnusable(f"model {ref.training_id} was trained on another base model or precision")
    if metadata["base_fingerprint"] != base.fingerprint:
        raise AdapterUnusable(f"the base model's files have changed since model {ref.training_id} was trained")
    if metadata["template_sha256"] != base.renderer.template_sha256:
        raise AdapterUnusable(f"model {ref.training_id} was trained with another chat template")
    return Adapter.load(folder, base.layers), metadata


def key_of(metadata: dict[str, object]) -> BaseKey:
    """The base model that a version was trained on, from its metadata."""
    return BaseKey.model_validate({name: metadata.get(name) for name in BaseKey.model_fields})
