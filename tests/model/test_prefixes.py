from __future__ import annotations

from dataclasses import dataclass

from repertory.model.prefixes import BLOCK_TOKENS, PrefixCache, Version

VERSION = Version("org", "train_1")
IDS = list(range(BLOCK_TOKENS * 4 + 1))


@dataclass
class Bytes:
    """A block of that many."""

    nbytes: int


def kept(cache: PrefixCache[Bytes], version: Version, ids: list[int]) -> list[bytes]:
    keys = version.block_keys(ids)
    cache.put(version, keys, [Bytes(100) for _ in keys])
    return keys


def test_prompts_share_the_blocks_of_their_common_beginning_and_no_more() -> None:
    changed = [*IDS[: BLOCK_TOKENS * 2 + 3], 999, *IDS[BLOCK_TOKENS * 2 + 4 :]]
    ours, others = VERSION.block_keys(IDS), VERSION.block_keys(changed)
    assert len(ours) == 4
    assert [one == other for one, other in zip(ours, others, strict=True)] == [True, True, False, False]


def test_the_last_token_of_a_prompt_is_in_no_block() -> None:
    """Its logits are wanted, so it is always computed."""
    assert len(VERSION.block_keys(IDS[:-1])) == 3
    assert VERSION.block_keys(IDS[:BLOCK_TOKENS]) == []
    assert VERSION.block_keys([]) == []


def test_neither_organisations_nor_versions_nor_the_bare_base_share_a_block() -> None:
    versions = [VERSION, Version("org", "train_2"), Version("other", "train_1"), Version("org", None)]
    versions += [Version("other", None), Version("org2", None), Version("", "org"), Version('org", "train_1', None)]
    keys = [key for version in versions for key in version.block_keys(IDS)]
    assert len(set(keys)) == 4 * len(versions)
    cache: PrefixCache[Bytes] = PrefixCache(10_000)
    kept(cache, VERSION, IDS)
    assert cache.known(VERSION.block_keys(IDS)) == 4
    assert [cache.known(version.block_keys(IDS)) for version in versions[1:]] == [0] * 7


def test_the_least_recently_used_go_first_and_the_bytes_stay_bounded() -> None:
    cache: PrefixCache[Bytes] = PrefixCache(1000)
    first, second = [1, *IDS], [2, *IDS]
    older, newer = kept(cache, VERSION, first), kept(cache, VERSION, second)
    assert cache.held_bytes == 800
    cache.get(older)  # now the newer is the one that was not used for longer
    kept(cache, VERSION, [3, *IDS])
    assert cache.held_bytes == 1000
    assert cache.known(older) == 4
    assert cache.known(newer) == 2  # what is left of it is its beginning, which can still be used


def test_a_block_that_is_put_twice_counts_once() -> None:
    cache: PrefixCache[Bytes] = PrefixCache(1000)
    kept(cache, VERSION, IDS)
    keys = kept(cache, VERSION, IDS)
    assert cache.held_bytes == 400
    longer = VERSION.block_keys([*IDS, *IDS])
    cache.put(VERSION, longer, [Bytes(100) for _ in longer[4:]])  # the blocks that continue what is there
    assert cache.known(longer) == len(longer)
    assert longer[:4] == keys


def test_a_cache_for_nothing_keeps_nothing() -> None:
    cache: PrefixCache[Bytes] = PrefixCache(0)
    assert cache.known(kept(cache, VERSION, IDS)) == 0
    assert cache.held_bytes == 0


def test_a_forgotten_version_leaves_nothing_and_the_others_all() -> None:
    cache: PrefixCache[Bytes] = PrefixCache(10_000)
    gone, stays = kept(cache, VERSION, IDS), kept(cache, Version("org", "train_2"), IDS)
    cache.forget(VERSION)
    assert cache.known(gone) == 0
    assert cache.known(stays) == 4
    assert cache.held_bytes == 400
    cache.clear()
    assert cache.known(stays) == cache.held_bytes == 0
