"""Prepared conversations as the model will see them: how long they are, and which tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from repertory.data.conversations import Conversation
from repertory.data.imports import TokenReport
from repertory.data.prepare import with_system
from repertory.data.render import NO_LABEL, Renderer, Row

MAX_MEASURED = 2000  # conversations; of more, as many are measured, evenly spread


def token_report(
    conversations: Sequence[Conversation], system_prompt: str | None, renderer: Renderer, max_tokens: int
) -> TokenReport:
    """There is at least one conversation."""
    step = max(1, -(-len(conversations) // MAX_MEASURED))
    measured = conversations[::step]
    rows = [_row(one, system_prompt, renderer, None) for one in measured]
    whole = [row for row in rows if row is not None]
    lengths = sorted(len(row.input_ids) for row in whole)
    long = [one for one, row in zip(measured, rows, strict=True) if row and len(row.input_ids) > max_tokens]
    left_out = sum(_row(one, system_prompt, renderer, max_tokens) is None for one in long)
    return TokenReport(
        measured=len(whole),
        p50=_quantile(lengths, 0.5),
        p90=_quantile(lengths, 0.9),
        p99=_quantile(lengths, 0.99),
        longest=lengths[-1],
        trained_share=round(sum(row.trained_tokens for row in whole) / sum(lengths), 3),
        max_tokens=max_tokens,
        shortened=len(long) - left_out,
        left_out=left_out,
    )


def spans(
    conversation: Conversation, system_prompt: str | None, renderer: Renderer, max_tokens: int
) -> list[tuple[str, bool]]:
    """(text, whether it is learned) of the row as it is trained on, special tokens included; [] if it is left out."""
    row = _row(conversation, system_prompt, renderer, max_tokens)
    return [] if row is None else marked(row, renderer)


def marked(row: Row, renderer: Renderer) -> list[tuple[str, bool]]:
    """(text, whether it is learned) of a row, special tokens included; together they are the row to the letter."""
    spans, begin = [], 0
    for is_learned, run in groupby(row.labels, key=lambda label: label != NO_LABEL):
        end = begin + len(list(run))
        spans.append((renderer.written(row.input_ids[begin:end], row.input_ids[:begin][-1:]), is_learned))
        begin = end
    return spans


def _row(
    conversation: Conversation, system_prompt: str | None, renderer: Renderer, max_tokens: int | None
) -> Row | None:
    return renderer.row(with_system(conversation, system_prompt), max_tokens)


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[round((len(ordered) - 1) * share)]
