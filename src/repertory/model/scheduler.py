"""Who decodes next: sequences, and the scheduler that lets them join and leave the batch at every step. No torch here.

A sequence waits, is prefilled in chunks beside others, decodes, and finishes. Which organisation is let in next is for
`fair_queue` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from time import monotonic
from typing import Any

from repertory.contracts import GenerateRequest, SampledToken, TokenChunk, Usage
from repertory.model.fair_queue import FairQueue
from repertory.model.prefixes import BLOCK_TOKENS, Version
from repertory.model.slots import Slots
from repertory.model.textstream import TextStream


@dataclass(eq=False)
class Sequence:
    """One reply in the making."""

    request: GenerateRequest
    prompt_ids: list[int]
    adapter: Any  # the Adapter of its version, or None for the bare base; in a slot, that slot's copy of it
    text: TextStream
    stop_ids: set[int]
    emit: Callable[[TokenChunk], None]
    dropped_messages: int = 0
    sampler: Any = None  # its own random state, whoever else is in the batch
    output_ids: list[int] = field(default_factory=list)
    scores: list[SampledToken] = field(default_factory=list)  # of the output, where the request asks for logprobs
    told_scores: int = 0
    cached_tokens: int = 0  # of prompt and output, in the KV cache
    block_keys: list[bytes] = field(default_factory=list)  # of its prompt, to be kept for others; none: it is not
    reused_tokens: int = 0  # of the prompt: they were not computed again
    is_finished: bool = False
    came_at: float = field(default_factory=monotonic)
    deadline: float = inf  # on the same clock
    queue_seconds: float = 0.0
    slot: Any = None  # its place in the slots, while it has one

    @property
    def org_id(self) -> str:
        return self.request.org_id

    @property
    def version(self) -> Version:
        """The one that was asked for."""
        return Version(self.org_id, self.request.adapter.training_id if self.request.adapter else None)

    @property
    def most_tokens(self) -> int:
        """Tokens in the cache if the reply gets as long as it may."""
        return len(self.prompt_ids) + self.request.max_tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.output_ids),
            cached_tokens=self.reused_tokens,
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
class Chunk:
    """The next tokens of a prompt."""

    sequence: Sequence
    tokens: int  # how many

    @property
    def end(self) -> int:
        return self.sequence.cached_tokens + self.tokens

    @property
    def completes_prompt(self) -> bool:
        return self.end >= len(self.sequence.prompt_ids)


@dataclass(frozen=True)
class Step:
    """One forward pass: a token for each decoding sequence, and chunks of prompts."""

    decoding: list[Sequence]
    chunks: list[Chunk]

    @property
    def writing(self) -> list[Sequence]:
        """Those that get a token in it."""
        return [*self.decoding, *(chunk.sequence for chunk in self.chunks if chunk.completes_prompt)]


class Scheduler:
    """Admits waiting sequences as rows become free and plans each step."""

    def __init__(
        self,
        max_rows: int,
        step_tokens: int,
        fits: Callable[[list[Sequence]], bool],
        slots: Slots | None = None,
    ) -> None:
        """`step_tokens`: of one forward pass, as far as prompts decide it; `fits`: whether the cache has room for all
        of these, as long as they may become; without `slots` there are as many as rows.
        """
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.fits = fits
        self.slots = Slots(max_rows) if slots is None else slots
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []  # the oldest first
        self._queue = FairQueue()

    @property
    def running(self) -> list[Sequence]:
        return [*self.decoding, *self.prefilling]

    @property
    def waiting(self) -> list[Sequence]:
        return list(self._queue)

    @property
    def waiting_count(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._queue)

    def add(self, sequence: Sequence) -> None:
        self._queue.add(sequence)
        self._queue.forget({one.org_id for one in self.running})

    def admit(self) -> None:
        """Let in whom there is room for."""
        while (admitted := self._admit()) is not None:
            self.prefilling.append(admitted)

    def next_step(self) -> Step:
        """A token for everyone who decodes; the prompts share what is left of the step's tokens."""
        step = Step(list(self.decoding), self._chunks(max(1, self.step_tokens - len(self.decoding))))
        for sequence in step.writing:
            self._queue.charge(sequence.org_id, output_tokens=1)
        return step

    def _chunks(self, budget: int) -> list[Chunk]:
        """The shortest prompts go first, so that many are soon answered; the oldest has its share before, so that it
        never starves. Who would compute a block that another computes in this very step waits for it instead.
        """
        if not self.prefilling:
            return []
        share = max(1, budget // len(self.prefilling))
        shortest = sorted(self.prefilling, key=lambda one: len(one.prompt_ids) - one.cached_tokens)
        taken: dict[Sequence, int] = {}
        computed: set[bytes] = set()
        for sequence, most in [(self.prefilling[0], share), *((one, budget) for one in shortest)]:
            blocks = sequence.block_keys[sequence.cached_tokens // BLOCK_TOKENS :]
            if sequence not in taken and computed.intersection(blocks[:1]):
                continue
            before = taken.get(sequence, 0)
            left = len(sequence.prompt_ids) - sequence.cached_tokens - before
            tokens = min(left, most, budget)
            if tokens:
                budget -= tokens
                taken[sequence] = before + tokens
                end = sequence.cached_tokens + taken[sequence]
                computed.update(sequence.block_keys[sequence.cached_tokens // BLOCK_TOKENS : end // BLOCK_TOKENS])
        return [Chunk(sequence, tokens) for sequence, tokens in taken.items()]

    def prefilled(self, sequence: Sequence) -> None:
        """Its prompt is computed: from now on it decodes."""
        self.prefilling.remove(sequence)
        self.decoding.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """One that runs does so no more."""
        (self.prefilling if sequence in self.prefilling else self.decoding).remove(sequence)
        self.slots.leave(sequence)

    def _admit(self) -> Sequence | None:
        """The sequence whose turn it is and whose voice has a slot, if it fits beside those that run.

        Nobody overtakes one that does not fit; those whose voice has a slot overtake one whose voice waits for one.
        """
        if len(self.running) == self.max_rows:
            return None
        sequence = self.slots.first(self._queue.heads)
        if sequence is None:
            return None
        running = [*self.running, sequence]
        if not self.fits(running):
            return None
        self.slots.enter(sequence)
        # Charged as soon as it is let in, or its organisation would be let in again before its prompt is read.
        self._queue.charge(sequence.org_id, prompt_tokens=len(sequence.prompt_ids))
        self._queue.remove(sequence)
        sequence.queue_seconds = monotonic() - sequence.came_at
        return sequence

    def spare(self, sequence: Sequence, tokens: int) -> None:
        """So many of its prompt need not be computed, and its organisation need not pay for them."""
        self._queue.charge(sequence.org_id, prompt_tokens=-tokens)

    def overdue(self, now: float) -> list[Sequence]:
        """Those whose time is over, running or waiting."""
        return [sequence for sequence in (*self.running, *self._queue) if sequence.deadline <= now]

    def take_waiting(self) -> list[Sequence]:
        """Everyone who waits, who no longer does."""
        return self._queue.clear()

    def drop(self, sequence: Sequence) -> None:
        """Take a waiting sequence out; a running one leaves through `is_finished`."""
        self._queue.remove(sequence)
