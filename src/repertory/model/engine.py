"""Generation: many organisations' sequences in one batch over the one base model."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from repertory.contracts import GenerateRequest, SampledToken, TokenChunk, TokenLogprob
from repertory.data.conversations import Message
from repertory.errors import ErrorInfo, InvalidInput
from repertory.model.attention import CachedRows
from repertory.model.base import Base
from repertory.model.lora import Adapter, AdapterStacks, Serving
from repertory.model.sampling import logprobs, new_sampler, sample
from repertory.model.scheduler import Scheduler, Sequence, Step
from repertory.model.textstream import TextStream

MAX_ROWS = 32
CACHE_SHARE = 0.25  # of the memory that is free when the engine is made


class Engine:
    """Holds the sequences in flight. Everything here runs on the thread that drives the device."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.cache = base.kv_cache()
        self.stacks = AdapterStacks()
        self.cache_bytes = int(_free_bytes(base.device) * CACHE_SHARE)
        # A chunk of a prompt should take about as long as a reader waits between two words.
        chunk = 2048 if base.device.type == "cuda" else 128
        self.scheduler = Scheduler(MAX_ROWS, chunk, self._fits)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def sequence(
        self,
        request: GenerateRequest,
        adapter: Adapter | None,
        system_prompt: str | None,
        emit: Callable[[TokenChunk], None],
    ) -> Sequence:
        """Render a request; `system_prompt` is the recorded one, used where the request brings none.

        Touches no state of the engine, so any thread may call it. Raises InvalidInput if the prompt cannot fit.
        """
        room = self.base.max_positions - request.max_tokens
        if room < 1:
            raise InvalidInput(
                f"max_tokens {request.max_tokens} leaves no room for a prompt in {self.base.max_positions} positions",
                code="max_tokens_too_large",
                cure="Ask for fewer max_tokens.",
                param="max_tokens",
            )
        prompt_ids, dropped = self._prompt(request, system_prompt, room)
        sequence = Sequence(
            request=request,
            prompt_ids=prompt_ids,
            adapter=adapter,
            text=TextStream(
                self.base.renderer.decode, request.stop, prompt_ids[-8:] if request.prompt is not None else ()
            ),
            stop_ids=self.base.renderer.stop_ids,
            emit=emit,
            dropped_messages=dropped,
            sampler=new_sampler(request.seed),
        )
        alone = self.base.kv_cache().bytes_if(1, sequence.most_tokens, self.base.cache_bytes_per_token)
        if alone > self.cache_bytes:
            raise InvalidInput(
                f"a sequence of {sequence.most_tokens} tokens does not fit the memory left for the KV cache",
                code="prompt_too_long",
                cure="Shorten the message or its history, or ask for fewer max_tokens.",
                param="message" if request.prompt is None else "prompt",
            )
        return sequence

    def _prompt(self, request: GenerateRequest, system_prompt: str | None, room: int) -> tuple[list[int], int]:
        """Its tokens, and how many of the oldest messages were dropped."""
        if request.prompt is not None:
            return self.base.renderer.raw_prompt(request.prompt, room), 0
        messages = list(request.messages)
        if system_prompt and messages[0].role != "system":
            messages.insert(0, Message(role="system", content=system_prompt))
        return self.base.renderer.prompt(messages, room)

    def submit(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def fail_all(self, error: ErrorInfo) -> None:
        """A step has died: no sequence in flight can go on. If there is none, those that wait are the reason."""
        for sequence in self.scheduler.running or self.scheduler.take_waiting():
            sequence.is_finished = True
            sequence.emit(TokenChunk(error=error))
        self._release_finished()

    def shed(self, error: ErrorInfo) -> None:
        """Memory ran out in a step, which has changed nothing: one sequence is given up, and the others go on.

        The one that came last, whose prompt is being read; else the one that may become the longest.
        """
        running = self.scheduler.running
        if not running:
            self.fail_all(error)
            return
        given_up = self.scheduler.prefilling or max(running, key=lambda sequence: sequence.most_tokens)
        given_up.is_finished = True
        given_up.emit(TokenChunk(error=error))
        self._release_finished()

    def cancel(self, sequence: Sequence) -> None:
        """Its row is free at the next step."""
        sequence.is_finished = True
        self.scheduler.drop(sequence)
        self._release_finished()

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every decoding sequence, and one chunk of a prompt.

        Where it breaks off, no sequence has changed: what it left in the cache is written again by the next step.
        """
        step = self.scheduler.next_step()
        self._reserve(step)
        ready = step.writing
        logits_NV = self._forward(step)
        tokens = sample(logits_NV, ready)
        scores = [self._score(*one) for one in zip(ready, tokens, logits_NV, strict=True)]
        for sequence in step.decoding:
            sequence.cached_tokens += 1
        if step.prefilling is not None:
            step.prefilling.cached_tokens += step.chunk_tokens
        for sequence, token, score in zip(ready, tokens, scores, strict=True):
            sequence.append(token, score)
        if step.prefilling is not None and step.prefilling.is_prefilled:
            self.scheduler.decoding.append(step.prefilling)  # its row n is the next decoding row already
            self.scheduler.prefilling = None
        self._release_finished()

    def _forward(self, step: Step) -> torch.Tensor:
        """Logits (n, vocabulary) of the decoding rows, and (n + 1, ...) if a prompt was completed."""
        base = self.base
        ids = [sequence.output_ids[-1] for sequence in step.decoding]
        pasts = tuple(sequence.cached_tokens for sequence in step.decoding)
        chunk = None
        chunks: list[tuple[Adapter | None, int]] = []
        if step.prefilling is not None:
            begin = step.prefilling.cached_tokens
            ids += step.prefilling.prompt_ids[begin : begin + step.chunk_tokens]
            chunk = (begin, step.chunk_tokens)
            chunks.append((step.prefilling.adapter, step.chunk_tokens))
        layout = CachedRows(cache=self.cache, pasts=pasts, chunk=chunk, device=base.device)
        routing = Serving([sequence.adapter for sequence in step.decoding], chunks, self.stacks)
        with base.passing(layout, routing):
            hidden = base.hidden(torch.tensor(ids, device=base.device), layout.positions)
        last = list(range(len(step.decoding)))
        if step.completes_prompt:
            last.append(len(ids) - 1)
        return base.logits(hidden[last])

    def _score(self, sequence: Sequence, token: int, logits_V: torch.Tensor) -> SampledToken | None:
        if sequence.request.top_logprobs is None:
            return None
        text = self.base.renderer.token_text
        chosen, *top = logprobs(logits_V, token, sequence.request.top_logprobs)
        likeliest = [TokenLogprob(token=text(one), logprob=logprob) for one, logprob in top]
        return SampledToken(token=text(token), logprob=chosen[1], top=likeliest)

    def _reserve(self, step: Step) -> None:
        running = self.scheduler.running
        self.cache.reserve(len(running), max(sequence.most_tokens for sequence in running))

    def _release_finished(self) -> None:
        """Keep the decoding rows dense: the last one moves into the place of one that is done."""
        scheduler = self.scheduler
        prefilling = scheduler.prefilling
        if prefilling is not None and prefilling.is_finished:
            scheduler.prefilling = prefilling = None
        for row in reversed(range(len(scheduler.decoding))):
            if not scheduler.decoding[row].is_finished:
                continue
            last = len(scheduler.decoding) - 1
            mover = scheduler.decoding[last]
            self.cache.swap(row, last, mover.cached_tokens)
            scheduler.decoding[row] = mover
            scheduler.decoding.pop()
            if prefilling is not None:  # it stands one row further down now
                self.cache.swap(last, last + 1, prefilling.cached_tokens)
        if not scheduler.running:
            self.cache.clear()
            self.stacks.forget()

    def _fits(self, rows: int, tokens: int) -> bool:
        return self.cache.bytes_if(rows, tokens, self.base.cache_bytes_per_token) <= self.cache_bytes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
