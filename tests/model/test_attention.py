from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import tiny
from repertory.data.render import NO_LABEL, Row
from repertory.model import attention
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.attention import PackedRows, causal_mask
from repertory.model.base import Base
from repertory.model.lora import Training
from repertory.model.microbatch import MicroBatch, common_prefix, grouped
from repertory_fixtures import rows_of


def fresh_adapter(base: Base, seed: int = 1) -> Adapter:
    """An adapter that changes a lot: B is drawn too."""
    config = LoraConfig(base_model="x", rank=4, alpha=8, dropout=0, target_modules=["q_proj"])
    adapter = Adapter.fresh(config, base.layers, list(base.layers), seed)
    torch.manual_seed(seed)
    for name in adapter.B:
        adapter.A[name] = torch.nn.Parameter(adapter.A[name].detach().to(base.dtype))
        adapter.B[name] = torch.nn.Parameter(torch.randn_like(adapter.B[name], dtype=base.dtype) * 0.3)
    return adapter


def plain_nll(base: Base, row: Row, adapter: Adapter, attention: str) -> torch.Tensor:
    """One row by itself through plain attention over the model's own mask, and the whole table of logits."""
    base.model.set_attn_implementation(attention)
    try:
        with base.router.through(Training(adapter)):
            logits = base.model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
    finally:
        base.model.set_attn_implementation("repertory")
    return F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum", ignore_index=NO_LABEL)


# Their norms or routers round to fp32 whatever they are given.
ROUND_TO_FP32 = ("gemma", "gemma2", "gemma3", "cohere", "olmo2", "mixtral", "qwen2-moe", "qwen3-moe")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("prefix", [0, 1, 30])  # 30 exceeds the windows of 16
@pytest.mark.parametrize("most_written_out", [attention.MOST_WRITTEN_OUT, 0])  # 0: as on a card, and for long rows
def test_packed_rows_with_a_shared_prefix_equal_the_plain_computation(
    in_float64: Callable[[str], Base],
    plain_attention: str,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    prefix: int,
    most_written_out: int,
) -> None:
    """Loss and gradients in float64, so that only a real difference shows. 1e-9 is a thousand roundings."""
    monkeypatch.setattr(attention, "MOST_WRITTEN_OUT", most_written_out)
    allowed = 1e-6 if family in ROUND_TO_FP32 else 1e-9
    base = in_float64(family)
    adapter = fresh_adapter(base)
    rows = rows_of(base, [9, 24, 5, 9], prefix)
    batch = MicroBatch.of(rows, base.device)
    assert batch.layout.prefix == prefix
    with base.passing(batch.layout, Training(adapter)):
        loss = batch.nll(base, None).sum()
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in adapter.parameters if parameter.grad is not None]
    for parameter in adapter.parameters:
        parameter.grad = None
    expected = sum(plain_nll(base, row, adapter, plain_attention) for row in rows)
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=allowed)
    assert len(gradients) == len(adapter.parameters)
    for ours, parameter in zip(gradients, adapter.parameters, strict=True):
        assert parameter.grad is not None
        assert (ours - parameter.grad).norm() <= allowed * parameter.grad.norm()


def test_rows_do_not_see_each_other(base: Base) -> None:
    first, second = rows_of(base, [8, 12], 6)
    other = Row([*second.input_ids[:6], *reversed(second.input_ids[6:])], second.labels)
    with torch.inference_mode():
        for companion in (second, other):
            batch = MicroBatch.of([first, companion], base.device)
            with base.passing(batch.layout, None):
                hidden = base.hidden(batch.ids, batch.layout.positions)[: len(first.input_ids)]
            if companion is second:
                alone = hidden
    assert torch.allclose(alone, hidden, atol=1e-5)


def test_the_prefix_stops_short_of_what_predicts_a_label() -> None:
    ids = [5, 6, 7, 8, 9]
    labelled = Row(ids, [NO_LABEL, NO_LABEL, NO_LABEL, 8, 9])
    assert common_prefix([labelled, labelled]) == 2
    assert common_prefix([labelled, Row([5, 6, 1, 1], [NO_LABEL] * 3 + [1])]) == 2
    assert common_prefix([labelled, Row([4, 6, 1, 1], [NO_LABEL] * 3 + [1])]) == 0


def test_groups_hold_every_row_once_and_keep_to_the_budget(base: Base) -> None:
    rows = rows_of(base, [3, 40, 7, 7, 12, 90, 5], 4)
    groups = grouped(rows, range(len(rows)), 50, 4)
    assert sorted(at for group in groups for at in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or sum(len(rows[at].input_ids) - 4 for at in group) <= 50


def test_a_window_hides_what_is_older() -> None:
    mask = causal_mask(3, 5, window=2, device=torch.device("cpu"))
    assert mask.tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]


def test_positions_continue_the_prefix_in_every_row() -> None:
    layout = PackedRows(prefix=2, lengths=(3, 1), device=torch.device("cpu"))
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 2]
