"""The fast decoder computes what the general forward pass computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from repertory.model import decoder as decoder_module
from repertory.model import decoding_kernel, kernel
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base
from repertory.model.decoder import Decoder
from repertory.model.engine import Engine
from repertory.model.scheduler import Sequence
from repertory_fixtures import LoadBase, greedy

QUESTIONS = ["Hello!", "Tell me a joke about the weather and about music " * 4, "ok", "coffee or tea?" * 9, "home"]


def voice(base: Base, seed: int, rank: int, *names: str) -> Adapter:
    """Of `rank`, correcting the layers with these names, or all."""
    chosen = [name for name in base.layers if not names or name.rpartition(".")[2] in names]
    config = LoraConfig(base_model="x", rank=rank, alpha=8, dropout=0, target_modules=sorted(names))
    adapter = Adapter.fresh(config, base.layers, chosen, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for B in adapter.B.values():
            B.copy_(torch.randn(B.shape, generator=generator) * 0.2)
    return adapter.to(base.device, base.dtype)


def voices(base: Base) -> list[Adapter | None]:
    return [None, voice(base, 1, 4), voice(base, 2, 16), voice(base, 3, 6, "q_proj", "down_proj"), voice(base, 4, 48)]


def ask(engine: Engine, question: str, adapter: Adapter | None, max_tokens: int = 40) -> Sequence:
    sequence = engine.sequence(greedy(question, max_tokens), adapter, None, lambda chunk: None)
    sequence.stop_ids = set()
    engine.submit(sequence)
    return sequence


def replies(base: Base, chosen: list[Adapter | None]) -> list[list[int]]:
    """Of many at once, with prompts that arrive in chunks while others decode."""
    engine = Engine(base)
    engine.scheduler.step_tokens = 24
    asked = [ask(engine, QUESTIONS[at % 5], chosen[at % len(chosen)], 20 + 5 * at) for at in range(9)]
    asked.append(ask(engine, QUESTIONS[1], chosen[1], 300))  # in the cache it needs a longer row than the others
    while not all(sequence.is_finished for sequence in asked[:-1]):
        engine.step()
    return [sequence.output_ids for sequence in asked]


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "mistral", "qwen2", "qwen3"])
def test_replies_are_those_of_the_general_pass(load_base: LoadBase, family: str) -> None:
    base = load_base(family)
    assert base.decoder is not None
    chosen = voices(base)
    fast = replies(base, chosen)
    base.decoder = None
    assert fast == replies(base, chosen)


def logits_after(base: Base, prompts: list[tuple[str, Adapter | None]], way: Decoder | None) -> torch.Tensor:
    """Of the second token of each prompt's reply, all of them in one batch."""
    kept, base.decoder = base.decoder, way
    engine = Engine(base)
    engine.scheduler.step_tokens = 10_000
    try:
        asked = [ask(engine, question, adapter, 4) for question, adapter in prompts]
        engine.step()
        for sequence in asked:
            sequence.output_ids[-1] = 7  # whatever the first one was
        with torch.inference_mode():
            return engine._forward(sorted(asked, key=engine.cache.place), []).clone()
    finally:
        base.decoder = kept


def test_in_bf16_it_is_as_near_to_fp32_as_the_general_pass(load_base: LoadBase) -> None:
    exact, rounded = load_base("llama-gqa", "fp32"), load_base("llama-gqa", "bf16")
    assert rounded.decoder is not None
    found: dict[str, torch.Tensor] = {}
    for name, base, way in (
        ("exact", exact, exact.decoder),
        ("fast", rounded, rounded.decoder),
        ("general", rounded, None),
    ):
        chosen = voices(base)
        found[name] = logits_after(base, [(QUESTIONS[at % 5], chosen[at % 5]) for at in range(6)], way)
    errors = {way: ((found[way] - found["exact"]).norm() / found["exact"].norm()).item() for way in ("fast", "general")}
    assert errors["fast"] < 1.2 * errors["general"] < 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rows_logits_are_the_same_bits_whoever_else_is_in_the_batch(load_base: LoadBase, dtype: str) -> None:
    base = load_base("llama-gqa", dtype)
    chosen = voices(base)[::-1]
    alone = step_of(base, PROMPTS[:1], chosen[:1])
    for count in range(2, 6):
        among = step_of(base, PROMPTS[:count], chosen[:count])
        assert torch.equal(among[0], alone[0])


PROMPTS = np.random.default_rng(0).integers(3, 500, (5, 30)).tolist()


class Row:
    cached_tokens = 0


def step_of(base: Base, prompts: list[list[int]], chosen: list[Adapter | None]) -> torch.Tensor:
    """Prompts of one length, token by token through the decoder from the first one on; logits after the last."""
    assert base.decoder is not None
    cache = base.kv_cache()
    rows = [Row() for _ in prompts]
    for row in rows:
        cache.enter(row, 200)
    pool = next(iter(cache.pools.values()))
    head_size = base.decoder.head_size
    for layer in range(base.layer_count):
        pool.layer(layer, torch.zeros(base.decoder.groups, 1, head_size, dtype=base.dtype))
    logits = torch.empty(0)
    for ids in zip(*prompts, strict=True):
        logits = base.decoder.logits(ids, rows, chosen, cache)  # type: ignore[arg-type]
        for row in rows:
            row.cached_tokens += 1
    return logits.clone()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(
    load_base: LoadBase, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base("llama-gqa", "bf16")
    expected = step_of(base, PROMPTS, voices(base))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    other = load_base("llama-gqa", "bf16")
    assert other.decoder is not None
    assert other.decoder.threads == threads
    assert torch.equal(step_of(other, PROMPTS, voices(other)), expected)


def test_more_voices_than_it_keeps_tables_of_come_and_go(load_base: LoadBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("llama-gqa", "bf16")
    assert base.decoder is not None
    chosen = voices(base)
    expected = step_of(base, PROMPTS, chosen)
    monkeypatch.setattr(decoder_module, "MOST_TABLES", 2)
    assert torch.equal(step_of(base, PROMPTS, chosen), expected)
    assert len(base.decoder._tables) == 2
    del chosen
    assert not base.decoder._tables  # nor of those that are gone


@pytest.mark.parametrize(("family", "quantization"), [("gemma2", "none"), ("phi", "none"), ("llama", "8bit")])
def test_what_it_is_not_made_for_goes_through_the_general_pass(
    load_base: LoadBase, family: str, quantization: str
) -> None:
    assert load_base(family, "bf16", quantization).decoder is None


def test_one_that_differs_is_not_used(
    load_base: LoadBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = decoder_module._fp32
    monkeypatch.setattr(decoder_module, "_fp32", lambda tensors: whole(tensors) * 1.5)
    assert load_base().decoder is None


def as_bf16(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def as_fp32(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (numbers.astype(np.uint32) << 16).view(np.float32) if numbers.dtype == np.uint16 else numbers


@njit  # type: ignore[untyped-decorator]
def some_dots(rows: int, w: Any, x: Any, out: Any, bs: Any, ranks: Any, low: Any, output: int) -> None:
    count = w.shape[1]
    decoding_kernel.dots(
        rows,
        kernel.pointer(kernel.address(w, 0), w),
        kernel.pointer(kernel.address(x, 0), x),
        count,
        count,
        kernel.pointer(kernel.address(bs, 0), bs),
        kernel.pointer(kernel.address(ranks, 0), ranks),
        1,
        output,
        kernel.pointer(kernel.address(low, 0), low),
        low.shape[1],
        kernel.pointer(kernel.address(out, 0), out),
        out.shape[1],
    )


HALVES = [(False, False), (True, False)] + [(True, True)] * kernel.HAS_BF16_PRODUCTS


@pytest.mark.parametrize(("half_weights", "half_inputs"), HALVES)
def test_products_and_corrections_of_every_shape(half_weights: bool, half_inputs: bool) -> None:
    random = np.random.default_rng(0)
    for count in (4, 12, 16, 20, 32, 48, 64, 576):
        for rows in range(1, decoding_kernel.MOST_ROWS + 1):
            for rank in (0, 16, 48):
                w, x, B, low = (
                    random.normal(size=shape).astype(np.float32)
                    for shape in ((4, count), (rows, count), (rows, 8, max(rank, 1)), (rows, max(rank, 16)))
                )
                if half_weights:
                    w, B = as_bf16(w), as_bf16(B)
                if half_inputs:
                    x = as_bf16(x)
                bs = np.array([one.ctypes.data for one in B])
                out = np.full((rows + 1, 8), 7, np.float32)
                some_dots(rows, w, x, out, bs, np.full(rows, rank), low, 4)
                expected = as_fp32(x) @ as_fp32(w).T
                for j in range(rows if rank else 0):
                    expected[j] += as_fp32(B[j])[4:] @ low[j, :rank]
                np.testing.assert_allclose(out[:rows, :4], expected, rtol=0, atol=1e-4)
                assert (out[:, 4:] == 7).all()
                assert (out[rows] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features"), [("znver4", "+fma,+avx2,+avx512f,+avx512bw,+avx512vl"), ("haswell", "+fma,+avx2")]
)
def test_it_computes_the_same_on_lesser_processors(name: str, features: str, tmp_path: Path) -> None:
    """The machine code is made for one that lacks bf16 products, and for one with half as wide vectors."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    files = [str(Path(__file__)), str(Path(__file__).with_name("test_kernel.py"))]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *files, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
