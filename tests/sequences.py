"""Sequences for the scheduler's tests, which need no model."""

from __future__ import annotations

from repertory.contracts import GenerateRequest, TokenChunk
from repertory.data.conversations import Message
from repertory.model.scheduler import Sequence
from repertory.model.textstream import TextStream


def sequence(org: str = "a", prompt: int = 4, max_tokens: int = 8, told: list[TokenChunk] | None = None) -> Sequence:
    request = GenerateRequest(
        request_id="r",
        org_id=org,
        adapter=None,
        messages=[Message(role="user", content="x")],
        temperature=0,
        top_p=1,
        top_k=0,
        max_tokens=max_tokens,
    )
    return Sequence(
        request=request,
        prompt_ids=list(range(prompt)),
        adapter=None,
        text=TextStream(lambda ids: "".join(chr(97 + i) for i in ids), []),
        stop_ids={25},
        emit=(told if told is not None else []).append,
    )
