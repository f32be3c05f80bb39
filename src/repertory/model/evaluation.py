"""What a voice is worth: how well it predicts its person's words, and what it says, beside the bare base.

Everything here works in small portions: a generator that yields between two forward passes, so that live requests
never wait longer than for one of them, and that returns its result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from repertory.contracts import (
    EvaluateRequest,
    Evaluation,
    GenerateRequest,
    TestPrompt,
    TestResponse,
    TokenChunk,
)
from repertory.data.conversations import Conversation, Message
from repertory.data.prepare import read_numbered, with_system
from repertory.data.render import Row
from repertory.errors import DataUnusable, ErrorInfo, RepertoryError
from repertory.model.adapter import WEIGHTS, Adapter
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.lora import Training
from repertory.model.microbatch import MicroBatch, common_prefix, grouped
from repertory.model.scheduler import Sequence as EngineSequence
from repertory.model.voices import Voice

REPLY_TOKENS = 64
SHOWN_PROMPTS = 3
SCORING_TOKENS = 640  # after the shared prefix, per forward pass without gradient

Portions = Generator[None, None, "Score"]


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of trained tokens, in nats, row by row."""

    row_nll: list[float]
    row_tokens: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.row_tokens)

    @property
    def mean_nll(self) -> float:
        return sum(self.row_nll) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean_nll, 700.0))  # e^709 is the largest double

    def gains_over(self, other: Score) -> list[float]:
        """Row by row, by how many nats a token this predicts better than `other` did."""
        return [(o - v) / n for v, o, n in zip(self.row_nll, other.row_nll, self.row_tokens, strict=True)]


@dataclass(frozen=True)
class Answer:
    """What voice and base said to one prompt, and whether each ended by itself."""

    response: TestResponse
    voice_stopped: bool
    base_stopped: bool


def score(base: Base, rows: Sequence[Row], adapter: Adapter | None) -> Portions:
    """Score `rows` with `adapter` or with the bare base."""
    row_nll = [0.0] * len(rows)
    prefix = common_prefix(rows)
    routing = None if adapter is None else Training(adapter)
    for group in grouped(rows, range(len(rows)), max(SCORING_TOKENS, prefix), prefix):
        batch = MicroBatch.of([rows[at] for at in group], base.device)
        with torch.inference_mode(), base.passing(batch.layout, routing):
            nll = batch.nll(base, routing)
        for at, token_nll in zip(batch.row_of_target.tolist(), nll.tolist(), strict=True):
            row_nll[group[at]] += token_nll
        yield
    return Score(row_nll, [row.trained_tokens for row in rows])


def replies(
    engine: Engine,
    org_id: str,
    prompts: Sequence[TestPrompt],
    voice: Adapter,
    system_prompt: str | None,
) -> Generator[None, None, list[Answer]]:
    """The replies of the voice and of the base to each prompt, greedy, all in one batch of the engine."""
    collected: list[_Reply] = []
    for prompt in prompts:
        for adapter in (voice, None):
            reply = _Reply()
            request = GenerateRequest(
                request_id="evaluation",
                org_id=org_id,
                adapter=None,
                messages=[Message(role="user", content=prompt.instruction)],
                temperature=0,
                top_p=1,
                top_k=0,
                max_tokens=min(REPLY_TOKENS, engine.base.max_positions // 4),
            )
            reply.sequence = engine.sequence(request, adapter, system_prompt, reply.take)
            collected.append(reply)
    try:
        for reply in collected:
            engine.submit(reply.sequence)
        while not all(reply.is_whole for reply in collected):
            yield
            for reply in collected:
                if reply.error is not None:
                    raise RepertoryError.from_info(reply.error)
    finally:  # also where the evaluation is given up
        for reply in collected:
            if not reply.is_whole:
                engine.cancel(reply.sequence)
    return [
        Answer(
            TestResponse(
                instruction=prompt.instruction,
                generated_response=of_voice.text,
                base_response=of_base.text,
                expected_response=prompt.expected_response,
            ),
            voice_stopped=of_voice.has_stopped,
            base_stopped=of_base.has_stopped,
        )
        for prompt, of_voice, of_base in zip(prompts, collected[::2], collected[1::2], strict=True)
    ]


def prompts_from(conversations: Sequence[Conversation], count: int = SHOWN_PROMPTS) -> list[TestPrompt]:
    """Questions to ask: what begins the first `count` conversations, and what the person really answered."""
    prompts: list[TestPrompt] = []
    for conversation in conversations:
        for asked, answered in pairwise(conversation.messages):
            if asked.role == "user" and answered.is_trained:
                prompts.append(TestPrompt(instruction=asked.content[:2000], expected_response=answered.content))
                break
        if len(prompts) == count:
            break
    return prompts


class _Reply:
    """Collects what the engine tells of one sequence."""

    sequence: EngineSequence

    def __init__(self) -> None:
        self.text = ""
        self.is_whole = False
        self.has_stopped = False  # by itself, not at the limit
        self.error: ErrorInfo | None = None

    def take(self, chunk: TokenChunk) -> None:
        self.error = chunk.error  # raised where the replies are awaited, not in the engine that tells it
        self.text += chunk.text
        self.is_whole = chunk.finish_reason is not None or chunk.error is not None
        self.has_stopped = chunk.finish_reason == "stop"


def evaluate(base: Base, engine: Engine, voice: Voice, request: EvaluateRequest) -> Generator[None, None, Evaluation]:
    """Score a version on its job's held-out conversations or on given ones, and let voice and base answer prompts.

    Raises DataUnusable if no conversation fits the model, or none is left.
    """
    if request.conversations is not None:
        conversations, scored_on = request.conversations, "given"
    else:
        stored = read_numbered(Path(request.conversations_path or ""))
        if not stored:
            raise DataUnusable("the conversations of this job were deleted", cure="Send conversations to score it on.")
        held_out = [at for at in voice.metadata["held_out"] if at in stored]
        conversations = [stored[at] for at in held_out or stored]
        scored_on = "held-out" if held_out else "training"
    longest = voice.metadata["hyperparameters"]["max_seq_length"]
    rendered = (base.renderer.row(with_system(c, voice.system_prompt), longest) for c in conversations)
    rows = [row for row in rendered if row is not None]
    if not rows:
        raise DataUnusable(f"none of the {len(conversations)} conversations fits into {longest} tokens")
    base_score = yield from score(base, rows, None)
    voice_score = yield from score(base, rows, voice.adapter.to(base.device, base.dtype))
    prompts = request.test_prompts or prompts_from(conversations)
    answered = yield from replies(engine, request.org_id, prompts, voice.adapter, voice.system_prompt)
    return Evaluation(
        perplexity=voice_score.perplexity,
        base_perplexity=base_score.perplexity,
        val_nll=voice_score.mean_nll,
        base_val_nll=base_score.mean_nll,
        scored_tokens=voice_score.tokens,
        scored_conversations=len(rows),
        scored_on=scored_on,
        test_responses=[answer.response for answer in answered],
        total_parameters=voice.metadata["total_parameters"],
        trainable_parameters=voice.metadata["trainable_parameters"],
        model_size_mb=round((Path(request.adapter.path) / WEIGHTS).stat().st_size / 1e6, 3),
    )
