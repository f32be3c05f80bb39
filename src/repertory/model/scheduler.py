"""Who decodes next: sequences, and the scheduler that lets them join and leave the batch at every step. No torch here.

A sequence waits, is prefilled in chunks, decodes, and finishes. Rows of the batch are dense: the decoding sequences are
rows 0..n-1, the one being prefilled is row n. Which organisation is let in next is for `fair_queue` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from repertory.contracts import GenerateRequest, SampledToken, TokenChunk, Usage
from repertory.model.fair_queue import FairQueue
from repertory.model.textstream import TextStream


@dataclass(eq=False)
class Sequence:
    """One reply in the making."""

    request: GenerateRequest
    prompt_ids: list[int]
    adapter: Any  # the Adapter of its version, or None for the bare base; held until it finishes
    text: TextStream
    stop_ids: set[int]
    emit: Callable[[TokenChunk], None]
    dropped_messages: int = 0
    sampler: Any = None  # its own random state, whoever else is in the batch
    output_ids: list[int] = field(default_factory=list)
    scores: list[SampledToken] = field(default_factory=list)  # of the output, where the request asks for logprobs
    told_scores: int = 0
    cached_tokens: int = 0  # of prompt and output, in the KV cache
    is_finished: bool = False
    came_at: float = field(default_factory=monotonic)
    queue_seconds: float = 0.0

    @property
    def org_id(self) -> str:
        return self.request.org_id

    @property
    def is_prefilled(self) -> bool:
        return self.cached_tokens >= len(self.prompt_ids)

    @property
    def most_tokens(self) -> int:
        """Tokens in the cache if the reply gets as long as it may."""
        return len(self.prompt_ids) + self.request.max_tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.output_ids),
            dropped_messages=self.dropped_messages,
            queue_seconds=self.queue_seconds,
        )

    def append(self, token: int, score: SampledToken | None = None) -> None:
        """Take the next token of the reply and tell the reader what can be told."""
        self.output_ids.append(token)
        is_turn_end = token in self.stop_ids
        text = "" if is_turn_end else self.text.push(token)
        if score is not None and not is_turn_end:
            self.scores.append(score)
        if is_turn_end or self.text.is_stopped:
            self._finish(text + self.text.rest(), "stop")
        elif len(self.output_ids) >= self.request.max_tokens:
            self._finish(text + self.text.rest(), "length")
        elif text:
            self.emit(TokenChunk(text=text, logprobs=self._new_scores(), usage=self.usage))

    def _finish(self, text: str, reason: Any) -> None:
        self.is_finished = True
        scores = self._new_scores() if self.text.is_stopped else self.scores[self.told_scores :]
        self.emit(TokenChunk(text=text, logprobs=scores, finish_reason=reason, usage=self.usage))

    def _new_scores(self) -> list[SampledToken]:
        """Of the tokens whose text has been told since the last time: a stop string's are never told."""
        told = self.scores[self.told_scores : self.text.tokens_told]
        self.told_scores += len(told)
        return told


@dataclass(frozen=True)
class Step:
    """One forward pass: a token for each decoding sequence, and a chunk of one prompt."""

    decoding: list[Sequence]
    prefilling: Sequence | None
    chunk_tokens: int  # of the prompt of `prefilling`

    @property
    def completes_prompt(self) -> bool:
        one = self.prefilling
        return one is not None and one.cached_tokens + self.chunk_tokens >= len(one.prompt_ids)

    @property
    def writing(self) -> list[Sequence]:
        """Those that get a token in it."""
        return [*self.decoding, *([self.prefilling] if self.prefilling and self.completes_prompt else [])]


class Scheduler:
    """Admits waiting sequences as rows become free and plans each step."""

    def __init__(self, max_rows: int, chunk_tokens: int, fits: Callable[[int, int], bool]) -> None:
        """`fits(rows, tokens)`: whether the cache may grow to that many rows of that many tokens."""
        self.max_rows = max_rows
        self.chunk_tokens = chunk_tokens
        self.fits = fits
        self.decoding: list[Sequence] = []
        self.prefilling: Sequence | None = None
        self._queue = FairQueue()

    @property
    def running(self) -> list[Sequence]:
        return [*self.decoding, *([self.prefilling] if self.prefilling else [])]

    @property
    def waiting_count(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._queue)

    def add(self, sequence: Sequence) -> None:
        self._queue.add(sequence)
        self._queue.forget({one.org_id for one in self.running})

    def next_step(self) -> Step:
        if self.prefilling is None:
            self.prefilling = self._admit()
        chunk = 0
        if self.prefilling is not None:
            left = len(self.prefilling.prompt_ids) - self.prefilling.cached_tokens
            chunk = min(left, self.chunk_tokens)
        step = Step(list(self.decoding), self.prefilling, chunk)
        for sequence in step.writing:
            self._queue.charge(sequence.org_id, output_tokens=1)
        return step

    def _admit(self) -> Sequence | None:
        """The sequence whose turn it is, if it fits beside those that run. Nobody overtakes one that does not."""
        sequence = self._queue.first
        if sequence is None:
            return None
        running = [*self.decoding, sequence]
        if len(running) > self.max_rows or not self.fits(len(running), max(s.most_tokens for s in running)):
            return None
        # Charged as soon as it is let in, or its organisation would be let in again before its prompt is read.
        self._queue.charge(sequence.org_id, prompt_tokens=len(sequence.prompt_ids) - sequence.cached_tokens)
        self._queue.remove(sequence)
        sequence.queue_seconds = monotonic() - sequence.came_at
        return sequence

    def take_waiting(self) -> list[Sequence]:
        """Everyone who waits, who no longer does."""
        return self._queue.clear()

    def drop(self, sequence: Sequence) -> None:
        """Take a waiting sequence out; a running one leaves through `is_finished`."""
        self._queue.remove(sequence)
