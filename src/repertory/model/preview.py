"""Conversations as rows, exactly as a run would see them: with what is learned marked, or only their lengths."""

from __future__ import annotations

from pathlib import Path

from repertory.contracts import BaseKey, Preview, PreviewRequest, PreviewRow, PreviewSpan, TokensRequest
from repertory.data.conversations import Conversation
from repertory.data.imports import TokenReport
from repertory.data.preparation.tokens import marked, token_report
from repertory.data.prepare import read_conversations, with_system
from repertory.data.render import Renderer
from repertory.errors import BaseModelUnavailable
from repertory.model import hyperparameters
from repertory.model.base import Outline


def preview(base: Outline, renderer: Renderer | None, request: PreviewRequest) -> Preview:
    """Raises BaseModelUnavailable where the base model's tokenizer is out of reach."""
    renderer = _present(renderer, request.key)
    longest = hyperparameters.max_seq_length(request.hyperparameters, base)
    rows = [_row(one, request.system_prompt, renderer, longest) for one in request.conversations]
    return Preview(base_model=request.key.name, max_seq_length=longest, rows=rows)


def tokens(base: Outline, renderer: Renderer | None, request: TokensRequest) -> TokenReport:
    """Raises BaseModelUnavailable as `preview` does."""
    renderer = _present(renderer, request.key)
    longest = hyperparameters.max_seq_length(request.hyperparameters, base)
    conversations = read_conversations(Path(request.conversations_path))
    return token_report(conversations, request.system_prompt, renderer, longest)


def _present(renderer: Renderer | None, key: BaseKey) -> Renderer:
    if renderer is None:
        raise BaseModelUnavailable(
            f"the tokenizer of {key.base_model} is not in the model cache",
            cure="Download it first: repertory models download NAME.",
        )
    return renderer


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
