"""The prefix cache: what was computed of the beginnings of prompts, once for each version of a voice. No torch here.

A prompt is cut into blocks of tokens. A block's key stands for the organisation, the version and every token up to the
block's end. So what lies under it was computed by the same adapter, of the same tokens at the same places, and nobody
finds what another organisation has left, not over the bare base either.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, Protocol, TypeVar

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Version:
    """Who computes: an organisation's voice, or the bare base for it."""

    org_id: str
    training_id: str | None

    def block_keys(self, ids: Sequence[int]) -> list[bytes]:
        """Of the whole blocks of a prompt, without its last token: the reply begins there, so that one is computed."""
        key = sha256(json.dumps([self.org_id, self.training_id]).encode()).digest()
        keys = []
        for begin in range(0, len(ids) - BLOCK_TOKENS, BLOCK_TOKENS):
            key = sha256(key + array("q", ids[begin : begin + BLOCK_TOKENS]).tobytes()).digest()
            keys.append(key)
        return keys


class _Block(Protocol):
    @property
    def nbytes(self) -> int: ...


Block = TypeVar("Block", bound=_Block)


class PrefixCache(Generic[Block]):
    """Blocks by key, up to `most_bytes`; the least recently used go first."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._blocks: OrderedDict[bytes, tuple[Version, Block]] = OrderedDict()

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the first one on, are held."""
        return next((at for at, key in enumerate(keys) if key not in self._blocks), len(keys))

    def get(self, keys: Sequence[bytes]) -> list[Block]:
        """Of keys that are all held."""
        self._touch(keys)
        return [self._blocks[key][1] for key in keys]

    def put(self, version: Version, keys: Sequence[bytes], blocks: Sequence[Block]) -> None:
        """`keys` from the first one of the prompt on, and the blocks of the last of them."""
        for key, block in zip(keys[len(keys) - len(blocks) :], blocks, strict=True):
            if key not in self._blocks:
                self._blocks[key] = (version, block)
                self.held_bytes += block.nbytes
        self._touch(keys)
        while self.held_bytes > self.most_bytes:
            self._drop(next(iter(self._blocks)))

    def forget(self, version: Version) -> None:
        for key in [key for key, (whose, _) in self._blocks.items() if whose == version]:
            self._drop(key)

    def clear(self) -> None:
        self._blocks.clear()
        self.held_bytes = 0

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The first last: a block is never dropped before those that continue it, which would be found no more."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _drop(self, key: bytes) -> None:
        _, block = self._blocks.pop(key)
        self.held_bytes -= block.nbytes
