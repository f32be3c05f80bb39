"""The keys and values of the sequences in flight, and the layout of a forward pass that continues them.

Shapes: L layers, G key/value heads, H query heads, D head size, T tokens of a stretch, S tokens that are seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from repertory.model.attention import Scoring, causal_attention, scaled_dot_product

LEAST_CAPACITY = 256  # tokens of the shortest rows


class Holder(Protocol):
    """Whose keys and values lie in a row: a sequence."""

    cached_tokens: int  # that the row holds


class KVCache:
    """Keys and values of the sequences in flight.

    Rows of like capacity lie together in a pool: a step reads its rows as one view, without a copy, and a long sequence
    makes only its own row long.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.pools: dict[int, Pool] = {}  # by capacity
        self._found: tuple[list[Holder], Tensor] = [], torch.empty(0)  # the last addresses, until a row moves

    def enter(self, holder: Holder, tokens: int) -> None:
        """Give it a row with room for `tokens` tokens."""
        self._found = [], torch.empty(0)
        capacity = _doubled(LEAST_CAPACITY, tokens)
        pool = self.pools.get(capacity) or Pool(capacity, self.layers)
        pool.enter(holder)
        self.pools[capacity] = pool

    def leave(self, holder: Holder) -> None:
        """Its row is free; memory is given back with the last row of a pool."""
        self._found = [], torch.empty(0)
        pool = self._pool(holder)
        pool.leave(holder)
        if not pool.holders:
            del self.pools[pool.capacity]

    def __contains__(self, holder: Holder) -> bool:
        return any(holder in pool.holders for pool in self.pools.values())

    def place(self, holder: Holder) -> tuple[int, int]:
        """The pool's capacity and the row. CachedRows wants those that decode in this order."""
        pool = self._pool(holder)
        return pool.capacity, pool.holders.index(holder)

    def addresses(self, holders: Sequence[Holder]) -> Tensor:
        """Of each layer and holder where its keys and its values lie in memory, and its row's capacity: (L, N, 3)."""
        if holders and list(map(id, self._found[0])) == list(map(id, holders)):
            return self._found[1]
        found = torch.empty(self.layers, len(holders), 3, dtype=torch.int64)
        places = [self.place(holder) for holder in holders]
        for capacity, pool in self.pools.items():
            here = [at for at, place in enumerate(places) if place[0] == capacity]
            rows = torch.tensor([places[at][1] for at in here], dtype=torch.int64)
            for layer, held in enumerate(pool.layers if here else ()):
                assert held is not None, "a sequence decodes after its prompt"
                to_values, to_row = (stride * held.itemsize for stride in held.stride()[:2])
                keys = held.data_ptr() + rows * to_row
                found[layer, here] = torch.stack((keys, keys + to_values, torch.full_like(rows, capacity)), dim=1)
        self._found = list(holders), found
        return found

    def read(self, holder: Holder, begin: int, end: int) -> Tensor:
        """A copy of its tokens from `begin` to `end`: (L, 2, G, T, D)."""
        capacity, row = self.place(holder)
        layers = self.pools[capacity].layers
        return torch.stack([held[:, row, :, begin:end] for held in layers if held is not None])

    def write(self, holder: Holder, begin: int, tokens: Tensor) -> None:
        """Put what was read back, (L, 2, G, T, D), as its tokens from `begin` on."""
        capacity, row = self.place(holder)
        for layer, stretch in enumerate(tokens):
            self.pools[capacity].layer(layer, stretch)[:, row, :, begin : begin + tokens.shape[3]] = stretch

    def bytes_if(self, tokens: Iterable[int], bytes_per_token: int) -> int:
        """Memory that it would take if sequences of these many tokens, and no others, were in flight."""
        counts = Counter(_doubled(LEAST_CAPACITY, count) for count in tokens)
        rows = {capacity: _doubled(self._rows(capacity), count) for capacity, count in counts.items()}
        return sum(rows[capacity] * capacity for capacity in rows) * bytes_per_token

    def _rows(self, capacity: int) -> int:
        return self.pools[capacity].rows if capacity in self.pools else 1

    def _pool(self, holder: Holder) -> Pool:
        return next(pool for pool in self.pools.values() if holder in pool.holders)


class Pool:
    """Rows of one capacity, dense: when one leaves, the last takes its place. Their number grows by doubling."""

    def __init__(self, capacity: int, layers: int) -> None:
        self.capacity = capacity
        self.rows = 1
        self.holders: list[Holder] = []  # row by row
        self.layers: list[Tensor | None] = [None] * layers  # each (2, rows, G, capacity, D): keys and values

    @torch.inference_mode()
    def enter(self, holder: Holder) -> None:
        rows = _doubled(self.rows, len(self.holders) + 1)
        for layer, held in enumerate(self.layers):
            # Some layers may be larger already: memory ran out before all of them had grown.
            if held is not None and held.shape[1] < rows:
                grown = held.new_zeros(2, rows, *held.shape[2:])
                grown[:, : held.shape[1]] = held
                self.layers[layer] = grown
        self.rows = rows
        self.holders.append(holder)

    @torch.inference_mode()
    def leave(self, holder: Holder) -> None:
        row, last = self.holders.index(holder), self.holders.pop()
        if last is holder:
            return
        for held in self.layers:
            if held is not None:
                held[:, row, :, : last.cached_tokens] = held[:, len(self.holders), :, : last.cached_tokens]
        self.holders[row] = last

    def layer(self, index: int, like: Tensor) -> Tensor:
        """(2, rows, G, capacity, D), with heads as those of `like`, (..., G, T, D)."""
        held = self.layers[index]
        if held is None:
            held = like.new_zeros(2, self.rows, like.shape[-3], self.capacity, like.shape[-1])
            self.layers[index] = held
        return held


def _doubled(have: int, need: int) -> int:
    while have < need:
        have *= 2
    return have


@dataclass(frozen=True)
class CachedRows:
    """Tokens [one of each decoding sequence | chunks of prompts]: each continues its row of the cache."""

    cache: KVCache
    decoding: Sequence[Holder]  # in the order of their places
    chunks: Sequence[tuple[Holder, int]]  # and how many tokens of it
    device: torch.device

    @cached_property
    def positions(self) -> Tensor:
        """(N,)"""
        spans = [torch.tensor([holder.cached_tokens for holder in self.decoding], dtype=torch.long)]
        spans += [torch.arange(holder.cached_tokens, holder.cached_tokens + now) for holder, now in self.chunks]
        return torch.cat(spans).to(self.device)

    @cached_property
    def _decoding_rows(self) -> list[_DecodingRows]:
        found, begin = [], 0
        places = [self.cache.place(holder) for holder in self.decoding]
        for capacity, of_pool in groupby(places, key=itemgetter(0)):
            rows = [row for _, row in of_pool]
            end = begin + len(rows)
            longest = 1 + max(holder.cached_tokens for holder in self.decoding[begin:end])
            found.append(_DecodingRows(self.cache.pools[capacity], rows, self.positions[begin:end], longest))
            begin = end
        return found

    @cached_property
    def _chunk_rows(self) -> list[tuple[Pool, int]]:
        places = [self.cache.place(holder) for holder, _ in self.chunks]
        return [(self.cache.pools[capacity], row) for capacity, row in places]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        group = query.shape[1] // key.shape[1]
        parts, begin = [], 0
        for rows in self._decoding_rows:
            span = slice(begin, begin + len(rows.positions))
            parts.append(rows.attend(layer, query[0, :, span], key[0, :, span], value[0, :, span], group, how))
            begin = span.stop
        for (holder, now), (pool, row) in zip(self.chunks, self._chunk_rows, strict=True):
            span, past, end = slice(begin, begin + now), holder.cached_tokens, holder.cached_tokens + now
            held = pool.layer(layer, key)[:, row : row + 1]
            held[0, :, :, past:end], held[1, :, :, past:end] = key[:, :, span], value[:, :, span]
            parts.append(causal_attention(query[:, :, span], held[0, :, :, :end], held[1, :, :, :end], group, how))
            begin = span.stop
        parts.append(query[:, :, begin:])  # padding
        return torch.cat(parts, dim=2)


@dataclass(frozen=True)
class _DecodingRows:
    """The rows of one pool that get a token each."""

    pool: Pool
    numbers: list[int]  # of the rows, ascending
    positions: Tensor  # (n,) of the tokens
    longest: int  # tokens of the longest of these rows, the new one included: S

    @cached_property
    def rows(self) -> Tensor:
        return torch.tensor(self.numbers, device=self.positions.device)

    @property
    def count(self) -> int:
        """Of the rows that are read: between those that decode there may be some whose prompts are not computed yet."""
        return self.numbers[-1] + 1

    @cached_property
    def _at(self) -> Tensor:
        """(count, 1) position of each row's token; 0 in those that have none."""
        return self.positions.new_zeros(self.count).index_copy_(0, self.rows, self.positions)[:, None]

    @cached_property
    def _seen(self) -> Tensor:
        """(count, 1, 1, S), True where the row holds a token."""
        return (torch.arange(self.longest, device=self.positions.device)[None] <= self._at)[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, group: int, how: Scoring) -> Tensor:
        """query (H, n, D), key and value (G, n, D) -> (1, H, n, D)."""
        H, n, D = query.shape
        keys, values = self.pool.layer(layer, key)
        keys[self.rows, :, self.positions] = key.transpose(0, 1)
        values[self.rows, :, self.positions] = value.transpose(0, 1)
        mask = self._seen
        if how.window is not None and self.longest > how.window:
            age = self._at - torch.arange(self.longest, device=self.positions.device)[None]
            mask = mask & (age < how.window)[:, None, None]
        # The query heads that share a key head stand where the tokens would, so nothing is repeated.
        grouped = query.transpose(0, 1).reshape(n, H // group, group, D)
        if n < self.count:
            grouped = grouped.new_zeros(self.count, *grouped.shape[1:]).index_copy_(0, self.rows, grouped)
        held = keys[: self.count, :, : self.longest], values[: self.count, :, : self.longest]
        seen = scaled_dot_product(grouped, *held, 1, mask, how)
        if n < self.count:
            seen = seen[self.rows]
        return seen.reshape(n, H, D).transpose(0, 1)[None]
