from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from repertory.errors import InvalidInput
from repertory.model.adapter import Adapter, AdapterUnusable, LoraConfig
from repertory.model.attention import PackedRows
from repertory.model.base import Base
from repertory.model.layers import LoraLinear, choose_layers
from repertory.model.lora import AdapterStacks, Serving, Training, drop_, dropout_mask

IDS = torch.tensor([5, 77, 200, 31, 8, 450, 99])


def trained(base: Base, targets: str = "all-linear", rank: int = 4, seed: int = 1, rslora: bool = False) -> Adapter:
    names = choose_layers(base.layers, targets)
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    config = LoraConfig(base_model="tiny/llama-gqa", rank=rank, alpha=8, dropout=0, target_modules=short, rslora=rslora)
    adapter = Adapter.fresh(config, base.layers, names, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for B in adapter.B.values():
            B.copy_(torch.randn_like(B) * 0.3)
    return adapter


def logits(base: Base, adapter: Adapter | None) -> torch.Tensor:
    layout = PackedRows(prefix=0, lengths=(len(IDS),), device=base.device)
    with torch.inference_mode(), base.passing(layout, Training(adapter) if adapter else None):
        return base.logits(base.hidden(IDS, layout.positions))


@pytest.mark.parametrize(("targets", "rslora"), [("all-linear", False), ("q_proj,v_proj", False), ("q_proj", True)])
def test_our_adapters_compute_the_same_in_peft(
    base: Base, cache: Path, tmp_path: Path, targets: str, rslora: bool
) -> None:
    adapter = trained(base, targets, rslora=rslora)
    adapter.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(cache / "tiny/llama-gqa")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.inference_mode():
        expected = theirs(IDS[None]).logits[0]
    assert torch.allclose(logits(base, adapter), expected, atol=1e-4)
    assert not torch.allclose(logits(base, None), expected, atol=1e-1)


def test_adapters_made_by_peft_load_here(base: Base, cache: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(cache / "tiny/llama-gqa")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["k_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = theirs(IDS[None]).logits[0]
    ours = Adapter.load(tmp_path, base.layers)
    assert torch.allclose(logits(base, ours), expected, atol=1e-4)


def test_an_adapter_comes_back_from_disk_bit_by_bit(base: Base, tmp_path: Path) -> None:
    adapter = trained(base)
    adapter.save(tmp_path)
    again = Adapter.load(tmp_path, base.layers)
    assert again.config == adapter.config
    assert all(torch.equal(adapter.A[name], again.A[name]) for name in adapter.A)
    assert all(torch.equal(adapter.B[name], again.B[name]) for name in adapter.B)


def test_a_fresh_adapter_changes_nothing(base: Base) -> None:
    config = LoraConfig(base_model="x", rank=4, alpha=8, dropout=0, target_modules=["q_proj"])
    fresh = Adapter.fresh(config, base.layers, list(base.layers), 0)
    assert torch.equal(logits(base, fresh), logits(base, None))


def test_unknown_target_modules_are_refused_with_the_choices(base: Base) -> None:
    with pytest.raises(InvalidInput) as refused:
        choose_layers(base.layers, ["q_proj", "query"])
    assert "query" in refused.value.message
    assert "q_proj" in refused.value.cure
    with pytest.raises(InvalidInput):
        choose_layers(base.layers, " , ")


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"r": 5},
        {"r": "many"},
        {"target_modules": None},
    ],
)
def test_adapters_that_would_compute_something_else_are_refused(
    base: Base, tmp_path: Path, change: dict[str, object]
) -> None:
    trained(base).save(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | change))
    with pytest.raises(AdapterUnusable):
        Adapter.load(tmp_path, base.layers)


def test_damaged_weights_are_refused(base: Base, tmp_path: Path) -> None:
    trained(base).save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AdapterUnusable, match="cannot be read"):
        Adapter.load(tmp_path, base.layers)


def test_each_token_gets_its_own_voice_in_a_mixed_batch(base: Base) -> None:
    """Three voices of different rank and layers, one of them twice, two rows of the bare base; prompts, and padding."""
    one, two = trained(base, rank=4, seed=1), trained(base, rank=6, seed=2)
    few = trained(base, "q_proj", rank=2, seed=3)
    rows = [two, None, one, few, two, None]
    serving = Serving(rows, chunks=[(one, 2), (None, 3), (few, 1)], stacks=AdapterStacks())
    owners = [*rows, one, one, None, None, None, few, None]
    for layer in base.layers.values():
        x = torch.randn(1, len(owners), layer.shape[0])
        with torch.inference_mode(), base.router.through(serving):
            corrected = layer(x)
            for at, owner in enumerate(owners):
                alone = layer.base(x[:, at]) + (owner_correction(owner, layer, x[:, at]) if owner else 0)
                assert torch.allclose(corrected[:, at], alone, atol=1e-4)


def test_voices_that_come_and_go_leave_the_others_in_their_seats(base: Base) -> None:
    """Each step's rows are corrected as each alone would be, whoever sat there before; ranks and layers differ."""
    voices = [trained(base, rank=rank, seed=rank) for rank in (2, 4, 3)]
    voices.append(trained(base, "v_proj,up_proj", rank=6, seed=9))
    stacks = AdapterStacks()
    steps: list[list[int | None]] = [[0], [0, 1], [1, 0, 2], [2, None], [2, 3, 3], [3], [None], [1, 3, 0, 2], [2, 0, 1]]
    layers = [layer for name, layer in base.layers.items() if ".0." in name]
    for step in steps:
        owners = [None if at is None else voices[at] for at in step]
        serving = Serving(owners, [], stacks)
        assert {id(one) for one in owners if one} <= {id(one) for one in stacks.voices}
        assert len(stacks.voices) < 2 * max(1, len({id(one) for one in owners if one}))
        for layer in layers:
            x = torch.randn(1, len(step), layer.shape[0])
            with torch.inference_mode(), base.router.through(serving):
                corrected = layer(x)
            for at, owner in enumerate(owners):
                alone = layer.base(x[:, at]) + (owner_correction(owner, layer, x[:, at]) if owner else 0)
                assert torch.allclose(corrected[:, at], alone, atol=1e-4)
    before = list(stacks.voices)
    Serving([voices[1], voices[0], voices[2]], [], stacks)  # one of four has left
    assert stacks.voices == before  # nobody has moved, so nothing is written again
    stacks.forget(voices[2])
    assert not stacks.voices


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_not_served(base: Base, value: float) -> None:
    voice = trained(base)
    next(iter(voice.B.values())).data[0, 0] = value
    with pytest.raises(AdapterUnusable, match="not finite"):
        voice.to(base.device, torch.float16)


def owner_correction(voice: Adapter, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor | float:
    """As the formula has it."""
    if layer.name not in voice.A:
        return 0.0
    return voice.config.scaling * (x @ voice.A[layer.name].T @ voice.B[layer.name].T)


def test_layers_that_read_the_same_tensor_share_one_matrix(base: Base) -> None:
    """Queries, keys and values; gate and up. What each one holds is its rows of the common matrix: no second copy."""
    joined = {tuple(one.name.rsplit(".", 1)[-1] for one in layer.siblings.layers) for layer in base.layers.values()}
    assert joined == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    for layer in base.layers.values():
        weights = [one.base.weight for one in layer.siblings.layers]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1  # type: ignore[union-attr, operator]
        assert torch.equal(torch.cat(weights), layer.siblings.weight(base.dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "k_proj,up_proj", "down_proj"])
def test_siblings_have_the_outputs_and_gradients_that_each_has_alone(base: Base, targets: str) -> None:
    voice = trained(base, targets).trainable()

    def results(through: Callable[[LoraLinear, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(11)
        found = []
        for siblings in {id(layer.siblings): layer.siblings for layer in base.layers.values()}.values():
            x = torch.randn(1, 5, siblings.layers[0].shape[0], requires_grad=True)
            outputs = [through(layer, x) for layer in siblings.layers]
            loss = torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum()
            wanted = [
                x,
                *(half[one.name] for one in siblings.layers for half in (voice.A, voice.B) if one.name in half),
            ]
            found += [*outputs, *torch.autograd.grad(loss, wanted)]
        return found

    with base.router.through(Training(voice)):
        ours = results(lambda layer, x: layer(x))
    plain = results(lambda layer, x: layer.base(x) + owner_correction(voice, layer, x))
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_siblings_that_are_asked_in_another_order_or_about_another_tensor_still_answer_it(base: Base) -> None:
    voice = trained(base)
    q, k, v = (next(layer for name, layer in base.layers.items() if name.endswith(f"{one}_proj")) for one in "qkv")
    x, other = torch.randn(2, 1, 3, q.shape[0])
    with torch.inference_mode(), base.router.through(Training(voice)):
        for layer, read in ((q, x), (v, other), (v, x), (k, x), (k, x), (q, other), (k, other)):
            expected = layer.base(read) + owner_correction(voice, layer, read)
            assert torch.allclose(layer(read), expected, atol=1e-4)


def test_the_fused_product_has_the_gradients_of_the_plain_one(base: Base) -> None:
    """In float64; with dropout both draw the same mask from the same seed."""
    layer = copy.deepcopy(next(one for one in base.layers.values() if len(one.siblings.layers) == 1)).double()
    assert isinstance(layer.base, torch.nn.Linear)
    for dropout in (0.0, 0.3):
        A = torch.randn(3, layer.shape[0], dtype=torch.float64, requires_grad=True)
        B = torch.randn(layer.shape[1], 3, dtype=torch.float64, requires_grad=True)
        x = torch.randn(1, 6, layer.shape[0], dtype=torch.float64, requires_grad=True)
        config = LoraConfig(base_model="x", rank=3, alpha=7, dropout=0, target_modules=[])
        torch.manual_seed(5)
        fused = Training(Adapter(config, {layer.name: A}, {layer.name: B}), dropout).through(layer.siblings, x)
        torch.manual_seed(5)
        kept = x * -dropout_mask(x.shape, dropout, x.device) / (1 - dropout) if dropout else x
        plain = layer.base(x) + config.scaling * (kept @ A.T @ B.T)
        assert torch.allclose(fused, plain, rtol=1e-12)
        weights = torch.randn_like(plain)
        ours = torch.autograd.grad((fused * weights).sum(), (x, A, B))
        theirs = torch.autograd.grad((plain * weights).sum(), (x, A, B))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropping_leaves_what_is_kept_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.randn(30, 40).to(dtype)
    mask = dropout_mask(x.shape, 0.4, x.device)
    assert torch.equal(drop_(x.clone(), mask), torch.where(mask == -1, x, torch.zeros_like(x)))


def test_dropout_masks_drop_their_share_independently_and_repeat_with_the_seed() -> None:
    """40,000 places: the share of False is within five standard errors of 5%, in each of the four places of a draw."""
    torch.manual_seed(3)
    mask = dropout_mask(torch.Size((200, 200)), 0.05, torch.device("cpu"))
    for place in range(4):
        dropped = 1 + mask.flatten()[place::4].float().mean().item()
        assert abs(dropped - 0.05) < 5 * (0.05 * 0.95 / 10_000) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(mask, dropout_mask(torch.Size((200, 200)), 0.05, torch.device("cpu")))
    assert not torch.equal(mask, dropout_mask(torch.Size((200, 200)), 0.05, torch.device("cpu")))
