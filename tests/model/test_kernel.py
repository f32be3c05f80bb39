"""The compiled loops against torch in double precision, and that what they compute does not depend on the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy, linear, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from repertory.contracts import BaseKey
from repertory.data.render import NO_LABEL, Row
from repertory.model import attention, crossentropy, gatedmlp, kernel, lora, packedattention, panels, rmsnorm
from repertory.model import base as base_module
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.attention import PackedRows, Scoring
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.layers import LoraLinear, Router, Siblings
from repertory.model.lora import AdapterStacks, Serving, Training
from repertory.model.microbatch import MicroBatch
from repertory.settings import Settings
from repertory_fixtures import LoadBase, greedy

DTYPES = [torch.float32, torch.bfloat16]
needs_bf16 = pytest.mark.skipif(not kernel.HAS_BF16_PRODUCTS, reason="this processor does not multiply bf16")
MULTIPLIED = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}

pytestmark = pytest.mark.skipif(not kernel.is_for(torch.zeros(1)), reason="no kernels on this processor")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def off(result: Tensor, expected: Tensor) -> float:
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).norm() / expected.norm())


def with_gradient(function: Callable[..., Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 24), (1, 40, 576), (2, 3, 4, 8)])
def test_root_mean_square_norm(shape: tuple[int, ...], dtype: torch.dtype, two_threads: None) -> None:
    torch.manual_seed(0)
    x, grad, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    norm = rmsnorm.RMSNorm(nn.Parameter(weight, requires_grad=False), 1e-5)
    exact = rmsnorm.RMSNorm(nn.Parameter(weight.double(), requires_grad=False), 1e-5)
    found = with_gradient(norm, x, grad)
    expected = with_gradient(exact, x.double(), grad.double())
    for result, wanted in zip(found, expected, strict=True):
        assert off(result, wanted) < TOLERANCE[dtype]
    # Views with gaps between their rows, as of heads in a joined product.
    gaps = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    assert torch.equal(norm(gaps), norm(gaps.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 64, 1536])
def test_gate(width: int, dtype: torch.dtype, two_threads: None) -> None:
    torch.manual_seed(0)
    gate_up, grad = 4 * torch.randn(1, 21, 2 * width).to(dtype), torch.randn(1, 21, width).to(dtype)
    gate_up[0, 0, :2] = torch.tensor([200.0, -200.0])

    def exact(x: Tensor) -> Tensor:
        return silu(x[..., :width]) * x[..., width:]

    found = with_gradient(gatedmlp._GatedBySilu.apply, gate_up, grad)
    expected = with_gradient(exact, gate_up.double(), grad.double())
    for result, wanted in zip(found, expected, strict=True):
        assert result.isfinite().all()
        assert off(result, wanted) < TOLERANCE[dtype]


class _Head:
    def __init__(self, weight: Tensor) -> None:
        self.plain_head = weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [1, 7, 300])
def test_cross_entropy(positions: int, dtype: torch.dtype, two_threads: None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(positions, 32).to(dtype), torch.randn(1000, 32).to(dtype)
    targets, grad = torch.randint(0, 1000, (positions,)), torch.rand(positions)
    base: Any = _Head(weight)
    nll, gradient = with_gradient(lambda x: crossentropy.ChunkedNLL.apply(x, targets, base), hidden, grad)

    def exact(x: Tensor) -> Tensor:
        return cross_entropy(linear(x, weight.double()), targets, reduction="none")

    expected, expected_gradient = with_gradient(exact, hidden.double(), grad.double())
    assert off(nll, expected) < TOLERANCE[dtype]
    assert off(gradient, expected_gradient) < 4 * TOLERANCE[dtype]
    with torch.inference_mode():
        assert torch.equal(crossentropy.ChunkedNLL.apply(hidden, targets, base), nll)


def test_a_loss_of_hopeless_and_of_certain_positions_is_finite() -> None:
    hidden, weight = torch.eye(2, 32) * 1e4, torch.zeros(64, 32)
    weight[3, 0] = weight[5, 1] = 1.0
    base: Any = _Head(weight)
    nll = crossentropy.ChunkedNLL.apply(hidden, torch.tensor([3, 3]), base)
    assert nll.tolist() == [pytest.approx(0, abs=1e-6), pytest.approx(1e4)]


PACKS = [
    (24, (45, 40, 33, 64), 9, 3, 64, None),
    (0, (45, 40, 1), 4, 2, 32, None),
    (0, (70,), 4, 4, 32, None),
    (0, (1,), 2, 2, 128, None),
    (1, (7,), 2, 1, 96, None),
    (16, (16, 1), 2, 1, 32, None),  # whole blocks
    (30, (5, 20, 50), 4, 2, 64, 16),  # rows that see some of the prefix, or none of it
    (200, (3, 1100), 2, 1, 64, None),  # more blocks than a chunk
    (200, (3, 1100), 2, 1, 64, 700),
]


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize(("prefix", "lengths", "heads", "groups", "size", "window"), PACKS)
def test_attention_over_packed_rows(
    prefix: int,
    lengths: tuple[int, ...],
    heads: int,
    groups: int,
    size: int,
    window: int | None,
    dtype: torch.dtype,
    two_threads: None,
) -> None:
    assert packedattention.fits(dtype.itemsize, size)
    torch.manual_seed(0)
    layout = PackedRows(prefix, lengths, torch.device("cpu"))
    tokens = layout.token_count + 3  # that follow the rows
    frequencies = 10000 ** -(torch.arange(0, size, 2) / size)
    angles = (F.pad(layout.positions, (0, 3))[:, None] * frequencies).repeat(1, 2)[None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv, grad = torch.randn(1, tokens, (heads + 2 * groups) * size).to(dtype), torch.randn(1, tokens, heads * size)
    grad[:, layout.token_count :] = 0
    segments = packedattention.Segments.of(prefix, lengths)
    how = segments, heads, groups, size**-0.5, window

    def compiled(x: Tensor) -> Tensor:
        return packedattention.PackedAttention.apply(x, cos, sin, *how)  # type: ignore[no-any-return]

    def exact(x: Tensor) -> Tensor:
        parts = x.split([heads * size, groups * size, groups * size], dim=-1)
        query, key, value = (part.view(1, tokens, -1, size).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, cos.double(), sin.double())
        seen = layout.attend(0, query, key, value, Scoring(scale=size**-0.5, window=window))
        return F.pad(seen.transpose(1, 2).flatten(2)[:, : layout.token_count], (0, 0, 0, 3))

    found = with_gradient(compiled, qkv, grad.to(dtype))
    expected = with_gradient(exact, qkv.double(), grad.to(dtype).double())
    gaps = torch.cat((qkv, qkv), dim=-1)[..., : qkv.shape[-1]]  # between its tokens
    assert torch.equal(compiled(gaps), found[0])
    for result, wanted in zip(found, expected, strict=True):
        assert not result[:, layout.token_count :].any()
        assert off(result, wanted) < 2 * TOLERANCE[dtype]
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(found, with_gradient(compiled, qkv, grad.to(dtype)), strict=True))


# LoRA


def joined(widths: list[int], inputs: int) -> Siblings:
    router = Router()
    layers = []
    for at, width in enumerate(widths):
        linear_layer = nn.Linear(inputs, width, bias=False).bfloat16().requires_grad_(False)
        layers.append(LoraLinear(linear_layer, f"layer{at}", router))
    if len(layers) > 1:
        Siblings.join(layers)
    return layers[0].siblings


def fresh(siblings: Siblings, names: list[str], rank: int, dtype: torch.dtype = torch.float32) -> Adapter:
    config = LoraConfig(
        base_model="x",
        revision=None,
        rank=rank,
        alpha=2 * rank,
        dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=False,
        rslora=False,
    )
    shapes = {layer.name: layer.shape for layer in siblings.layers}
    A = {name: (torch.randn(rank, shapes[name][0]) / 10).to(dtype) for name in names}
    B = {name: (torch.randn(shapes[name][1], rank) / 10).to(dtype) for name in names}
    return Adapter(config, A, B)


GROUPS = [
    ([64], 96, ["layer0"], 16),
    ([64], 96, ["layer0"], 5),
    ([64, 32, 32], 64, ["layer0", "layer2"], 8),
    ([96, 96], 32, ["layer0", "layer1"], 40),
    ([96, 96], 32, ["layer1"], 24),
]


@needs_bf16
@pytest.mark.parametrize(("widths", "inputs", "names", "rank"), GROUPS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [2, 44])
def test_lora(
    widths: list[int],
    inputs: int,
    names: list[str],
    rank: int,
    dropout: float,
    tokens: int,
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    siblings = joined(widths, inputs)
    adapter = fresh(siblings, names, rank)
    x, grad = torch.randn(1, tokens, inputs).bfloat16(), torch.randn(1, tokens, sum(widths)).bfloat16()

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        leaves = [each.detach().requires_grad_() for half in (adapter.A, adapter.B) for each in half.values()]
        halves = [dict(zip(names, half, strict=True)) for half in (leaves[: len(names)], leaves[len(names) :])]
        given = x.detach().requires_grad_()
        y = Training(Adapter(adapter.config, *halves), dropout).through(siblings, given)
        return [y, *torch.autograd.grad(y, [given, *leaves], grad)]

    assert panels.Panels.fit(siblings, [*adapter.A.values(), *adapter.B.values()], x.dtype)
    compiled = results()
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(results(), compiled, strict=True))
    monkeypatch.setattr(panels.Panels, "fit", staticmethod(lambda *_: False))
    for result, wanted in zip(compiled, results(), strict=True):
        assert off(result, wanted) < 1e-2


@needs_bf16
def test_a_training_that_is_renewed_uses_the_weights_as_they_are() -> None:
    torch.manual_seed(0)
    siblings = joined([64, 32], 64)
    adapter = fresh(siblings, ["layer0", "layer1"], 8)
    x = torch.randn(1, 8, 64).bfloat16()
    routing = Training(adapter)
    before = routing.through(siblings, x)
    with torch.no_grad():
        adapter.B["layer1"].mul_(2)
    routing.renew()
    after = routing.through(siblings, x)
    assert torch.equal(after, Training(adapter).through(siblings, x))
    assert torch.equal(after[..., :64], before[..., :64])
    assert not torch.equal(after[..., 64:], before[..., 64:])


@needs_bf16
@pytest.mark.parametrize(("widths", "inputs", "names", "rank"), GROUPS)
def test_prompts_of_several_voices(
    widths: list[int], inputs: int, names: list[str], rank: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    siblings = joined(widths, inputs)
    one, other = (fresh(siblings, names, rank, torch.bfloat16) for _ in range(2))
    chunks: list[tuple[Adapter | None, int]] = [(one, 3), (None, 2), (other, 17), (one, 9)]
    x = torch.randn(1, 31, inputs).bfloat16()
    with torch.inference_mode():
        compiled = Serving([], chunks, AdapterStacks()).through(siblings, x)
        assert torch.equal(compiled[:, 3:5], siblings.base(x)[:, 3:5])
        monkeypatch.setattr(panels.Panels, "fit", staticmethod(lambda *_: False))
        assert off(compiled, Serving([], chunks, AdapterStacks()).through(siblings, x)) < 1e-2


@needs_bf16
def test_inputs_with_gaps_between_their_tokens() -> None:
    torch.manual_seed(0)
    siblings = joined([64], 64)
    adapter, voice = fresh(siblings, ["layer0"], 8), fresh(siblings, ["layer0"], 8, torch.bfloat16)
    x = torch.randn(1, 6, 200).bfloat16()[..., 40:104]
    assert torch.equal(Training(adapter).through(siblings, x), Training(adapter).through(siblings, x.clone()))
    with torch.inference_mode():
        one, other = (Serving([], [(voice, 6)], AdapterStacks()).through(siblings, each) for each in (x, x.clone()))
    assert torch.equal(one, other)


@needs_bf16
def test_of_a_voice_that_is_gone_nothing_is_kept() -> None:
    siblings, stacks = joined([64], 64), AdapterStacks()
    voice: Adapter | None = fresh(siblings, ["layer0"], 8, torch.bfloat16)
    assert voice is not None
    assert isinstance(stacks.alone(voice, siblings, torch.bfloat16), panels.Panels)
    assert len(stacks._alone) == 1
    voice = None
    assert len(stacks._alone) == 0
    for _ in range(2 * lora.MOST_ALONE):
        stacks.alone(fresh(siblings, ["layer0"], 8, torch.bfloat16), siblings, torch.bfloat16)
        assert len(stacks._alone) <= lora.MOST_ALONE


# A whole model


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("prefix", [0, 1, 30])  # 30 exceeds mistral's window of 16
@pytest.mark.parametrize("most_written_out", [attention.MOST_WRITTEN_OUT, 0])
def test_loss_and_gradients_are_those_of_double_precision(
    load_base: LoadBase,
    in_float64: Callable[[str], Base],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    prefix: int,
    most_written_out: int,
) -> None:
    """Which torch computes alone, and `test_attention` holds to the plain computation."""
    monkeypatch.setattr(attention, "MOST_WRITTEN_OUT", most_written_out)

    def results(base: Base) -> tuple[float, Tensor]:
        config = LoraConfig(base_model="x", rank=4, alpha=8, dropout=0, target_modules=["q_proj"])
        adapter = Adapter.fresh(config, base.layers, list(base.layers), 1)
        torch.manual_seed(1)
        for name in adapter.B:
            adapter.A[name] = nn.Parameter(adapter.A[name].detach().to(base.dtype))
            adapter.B[name] = nn.Parameter(torch.randn(adapter.B[name].shape).to(base.dtype) * 0.3)
        rows = []
        for number, length in enumerate([9, 24, 5, 9]):
            ids = [5] * prefix + [10 + (7 * number + 3 * at) % 80 for at in range(length)]
            rows.append(Row(ids, [NO_LABEL] * (prefix + 1) + ids[prefix + 1 :]))
        batch = MicroBatch.of(rows, base.device)
        assert batch.layout.prefix == prefix
        with base.passing(batch.layout, Training(adapter)):
            loss = batch.nll(base, None).sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters)
        return loss.item(), torch.cat([each.grad.flatten() for each in adapter.parameters if each.grad is not None])

    loss, gradients = results(load_base(family))
    exact_loss, exact_gradients = results(in_float64(family))
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert off(gradients, exact_gradients) < 1e-4


def test_where_there_are_no_kernels_everything_goes_through_torch(
    cache: Path, load_base: LoadBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(base: Base) -> list[int]:
        engine = Engine(base)
        sequence = engine.sequence(greedy("Hello!", 20), None, None, lambda chunk: None)
        sequence.stop_ids = set()
        engine.submit(sequence)
        while engine.has_work:
            engine.step()
        return sequence.output_ids

    expected = reply(load_base())
    monkeypatch.setattr(kernel, "lacking", lambda: "there are none")
    monkeypatch.setattr(kernel.Kernel, "run", None)
    said: list[str] = []
    key = BaseKey(base_model="tiny/llama-gqa", quantization="none", dtype="fp32")
    settings = Settings(_env_file=None, model_cache_dir=cache)
    base = base_module.load("tiny/llama-gqa", settings, base_module.detect_device(), key, said.append)
    assert "computing without compiled loops: there are none" in said
    assert base.decoder is None
    assert reply(base) == expected


# What all kernels share


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_where_it_is(bad: float, dtype: torch.dtype, two_threads: None) -> None:
    """A run is stopped by it, and a voice that overflows must not reach others."""
    norm = rmsnorm.RMSNorm(nn.Parameter(torch.ones(576).to(dtype), requires_grad=False), 1e-5)
    x = torch.randn(1, 40, 576).to(dtype)
    x[0, 3, 7] = bad
    assert norm(x).isfinite().all(-1).tolist() == [[at != 3 for at in range(40)]]
    gate_up = torch.randn(1, 20, 128).to(dtype)
    gate_up[0, 3, 7] = gate_up[0, 4, 70] = bad
    finite = gatedmlp._GatedBySilu.apply(gate_up).isfinite()
    assert (~finite).nonzero().tolist() == [[0, 3, 7], [0, 4, 6]]
    hidden, weight = torch.randn(2, 32).to(dtype), torch.randn(1000, 32).to(dtype)
    hidden[1, 0] = bad
    base: Any = _Head(weight)
    nll, gradient = with_gradient(
        lambda given: crossentropy.ChunkedNLL.apply(given, torch.tensor([9, 9]), base), hidden, torch.ones(2)
    )
    assert nll.isfinite().tolist() == [True, False]
    assert gradient.isfinite().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_in_a_row_reaches_no_other_row(bad: float, dtype: torch.dtype, two_threads: None) -> None:
    qkv, turned = torch.randn(1, 20, 96).to(dtype), torch.ones(2, 1, 20, 32).to(dtype)
    qkv[0, 9, 70] = bad  # of a value that the rest of its row sees
    segments = packedattention.Segments.of(4, (8, 8))
    finite = packedattention.PackedAttention.apply(qkv, *turned, segments, 1, 1, 1.0, None).isfinite().all(-1)[0]
    assert not finite[9:12].any()
    assert finite[:4].all()
    assert finite[12:].all()


@needs_bf16
def test_a_voice_that_overflows_does_not_reach_the_prompts_beside_it() -> None:
    torch.manual_seed(0)
    siblings, stacks = joined([64], 64), AdapterStacks()
    one, other = (fresh(siblings, ["layer0"], 8, torch.bfloat16) for _ in range(2))
    x = torch.randn(1, 40, 64).bfloat16()
    with torch.inference_mode():
        other.A["layer0"][0, 0] = float("inf")
        found = Serving([], [(one, 9), (other, 20), (one, 11)], stacks).through(siblings, x)
        alone = Serving([], [(one, 9), (None, 20), (one, 11)], stacks).through(siblings, x)
    assert not found[:, 9:29].isfinite().all()
    assert torch.equal(found[:, :9], alone[:, :9])
    assert torch.equal(found[:, 29:], alone[:, 29:])


def test_machine_code_is_named_after_all_that_it_is_made_of(tmp_path: Path) -> None:
    """numba looks at the file of a function alone, and would go on with code that others have become part of."""
    names = {each._function.py_func.__qualname__ for each in (rmsnorm._forward, gatedmlp._gate)}
    versions = {name.rpartition("_")[2] for name in names}
    assert len(versions) == 2
    assert all(len(version) == 8 for version in versions)


def test_a_kernel_uses_what_threads_there_are() -> None:
    x, weight = torch.randn(1, 333, 64), torch.randn(64)
    norm = rmsnorm.RMSNorm(nn.Parameter(weight, requires_grad=False), 1e-6)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(norm(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
