"""Conversations as rows, exactly as a run would see them, with what is learned marked."""

from __future__ import annotations

from repertory.contracts import Preview, PreviewRequest, PreviewRow, PreviewSpan
from repertory.data.conversations import Conversation
from repertory.data.preparation.tokens import marked
from repertory.data.prepare import with_system
from repertory.data.render import Renderer
from repertory.errors import BaseModelUnavailable
from repertory.model import hyperparameters
from repertory.model.base import Outline


def preview(base: Outline, renderer: Renderer | None, request: PreviewRequest) -> Preview:
    """Raises BaseModelUnavailable where the base model's tokenizer is out of reach."""
    if renderer is None:
        raise BaseModelUnavailable(
            f"the tokenizer of {request.key.base_model} is not in the model cache",
            cure="Download it first: repertory models download NAME.",
        )
    longest = hyperparameters.max_seq_length(request.hyperparameters, base)
    rows = [_row(one, request.system_prompt, renderer, longest) for one in request.conversations]
    return Preview(base_model=request.key.name, max_seq_length=longest, rows=rows)


def _row(conversation: Conversation, system_prompt: str | None, renderer: Renderer, longest: int) -> PreviewRow:
    messages = with_system(conversation, system_prompt)
    row = renderer.row(messages, longest)
    if row is None:
        return PreviewRow(messages=messages, spans=[], tokens=0, trained_tokens=0, dropped_messages=0)
    return PreviewRow(
        messages=messages,
        spans=[PreviewSpan(text=text, trained=is_learned) for text, is_learned in marked(row, renderer)],
        tokens=len(row.input_ids),
        trained_tokens=row.trained_tokens,
        dropped_messages=row.dropped_messages,
    )
