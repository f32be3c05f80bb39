from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import ref

import pytest
import torch

from repertory.model.kvcache import KVCache


@pytest.fixture(autouse=True)
def in_inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass(eq=False)
class Holder:
    cached_tokens: int = 10


def held_by(cache: KVCache, holder: Holder, layer: int = 0) -> torch.Tensor:
    """(2, G, capacity, D)"""
    capacity, row = cache.place(holder)
    return cache.pools[capacity].layer(layer, torch.zeros(1, 2, 1, 4))[:, row]


def test_rows_keep_what_they_hold_when_the_cache_grows_and_when_they_change_places() -> None:
    cache = KVCache(1)
    holders = [Holder() for _ in range(5)]
    for number, holder in enumerate(holders):
        cache.enter(holder, 100)
        held_by(cache, holder)[0, :, :10] = number + 1
        held_by(cache, holder)[1, :, :10] = -number - 1
    cache.leave(holders[1])
    assert cache.place(holders[4]) == (256, 1)
    for number in (0, 2, 3, 4):
        keys, values = held_by(cache, holders[number])
        assert keys[:, :10].eq(number + 1).all()
        assert values[:, :10].eq(-number - 1).all()
    assert holders[1] not in cache


def test_a_long_sequence_makes_no_other_row_longer_and_memory_is_given_back() -> None:
    cache = KVCache(1)
    short = [Holder() for _ in range(3)]
    long = Holder()
    for holder in short:
        cache.enter(holder, 100)
    cache.enter(long, 5000)
    for holder in (*short, long):
        held_by(cache, holder)
    assert [tuple(pool.layers[0].shape) for pool in cache.pools.values() if pool.layers[0] is not None] == [
        (2, 4, 2, 256, 4),
        (2, 1, 2, 8192, 4),
    ]
    assert cache.bytes_if([100, 100, 100, 5000], 3) == (4 * 256 + 8192) * 3
    assert cache.bytes_if([100] * 5 + [5000], 3) == (8 * 256 + 8192) * 3
    cache.leave(long)
    assert list(cache.pools) == [256]


def test_what_is_read_of_one_row_can_be_written_to_another() -> None:
    cache = KVCache(2)
    one, other = Holder(), Holder()
    cache.enter(one, 100)
    for layer in range(2):
        held_by(cache, one, layer).copy_(torch.randn(2, 2, 256, 4))
    stretch = cache.read(one, 4, 10)
    assert stretch.shape == (2, 2, 2, 6, 4)
    cache.enter(other, 300)  # of another pool, in which nothing was computed yet
    cache.write(other, 20, stretch)
    for layer in range(2):
        assert torch.equal(held_by(cache, other, layer)[:, :, 20:26], held_by(cache, one, layer)[:, :, 4:10])
        assert held_by(cache, other, layer)[:, :, :20].eq(0).all()


def test_a_cache_that_could_not_grow_in_all_layers_grows_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(2)
    first, second = Holder(), Holder()
    cache.enter(first, 100)
    for layer in range(2):
        held_by(cache, first, layer)[0, :, :10] = layer + 1
    new_zeros, calls = torch.Tensor.new_zeros, []

    def short(tensor: torch.Tensor, *size: object) -> torch.Tensor:
        calls.append(size)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return new_zeros(tensor, *size)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as broken:
        broken.setattr(torch.Tensor, "new_zeros", short)
        with pytest.raises(RuntimeError):
            cache.enter(second, 100)
    assert second not in cache
    for holder in (second, Holder()):
        cache.enter(holder, 100)
    for layer in range(2):
        assert cache.pools[256].layer(layer, torch.zeros(1, 2, 1, 4)).shape == (2, 4, 2, 256, 4)
        assert held_by(cache, first, layer)[0, :, :10].eq(layer + 1).all()


def test_addresses_are_those_of_the_rows_whoever_comes_and_goes() -> None:
    cache, inside = KVCache(2), [Holder() for _ in range(3)]

    def check() -> None:
        found = cache.addresses(inside)
        assert cache.addresses(inside) is found
        for layer in range(2):
            for number, holder in enumerate(inside):
                keys, values = held_by(cache, holder, layer)
                capacity = cache.place(holder)[0]
                assert found[layer, number].tolist() == [keys.data_ptr(), values.data_ptr(), capacity]

    for holder, tokens in zip(inside, (100, 5000, 100), strict=True):
        cache.enter(holder, tokens)
        for layer in range(2):
            held_by(cache, holder, layer)
    check()
    inside.reverse()
    check()
    inside.append(Holder())
    cache.enter(inside[-1], 200)  # the rows of its capacity move, to make room for it
    check()
    cache.leave(inside.pop(0))  # and the last one takes the place of who leaves
    check()


def test_a_cache_holds_nobody_who_has_left() -> None:
    cache, holder = KVCache(1), Holder()
    cache.enter(holder, 10)
    held_by(cache, holder)
    cache.addresses([holder])
    cache.leave(holder)
    gone = ref(holder)
    del holder
    assert gone() is None
