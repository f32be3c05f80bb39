"""Generation: many organisations' sequences in one batch over the one base model."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import psutil
import torch

from repertory.contracts import GenerateRequest, SampledToken, TokenChunk, TokenLogprob
from repertory.data.conversations import Message
from repertory.errors import DeadlineExceeded, ErrorInfo, InvalidInput
from repertory.model.adapter import Adapter
from repertory.model.base import Base
from repertory.model.kvcache import CachedRows, KVCache
from repertory.model.lora import AdapterStacks, Serving
from repertory.model.prefixes import BLOCK_TOKENS, PrefixCache, Version
from repertory.model.sampling import logprobs, new_sampler, sample
from repertory.model.scheduler import Chunk, Scheduler, Sequence
from repertory.model.slots import Slots
from repertory.model.textstream import TextStream

MAX_ROWS = 32
# Of the memory that is free when the engine is made:
CACHE_SHARE = 0.25  # for the sequences in flight
PREFIX_SHARE = 0.05  # for what is kept of prompts


class Engine:
    """Holds the sequences in flight. Everything here runs on the thread that drives the device."""

    def __init__(self, base: Base, slots: Slots | None = None) -> None:
        """Without `slots`: as many as rows, for adapters that are where the base is."""
        self.base = base
        self.cache = base.kv_cache()
        self.stacks = AdapterStacks()
        self.steps = 0  # forward passes since the start
        free = _free_bytes(base.device)
        self.cache_bytes = int(free * CACHE_SHARE)
        self.prefixes: PrefixCache[torch.Tensor] = PrefixCache(int(free * PREFIX_SHARE))  # blocks (L, 2, G, T, D)
        # A step should take about as long as a reader waits between two words.
        step_tokens = 2048 if base.device.type == "cuda" else 256
        self.scheduler = Scheduler(MAX_ROWS, step_tokens, self._fits, slots)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def cache_usage(self) -> float:
        """Share of the cache's bytes that hold keys and values, 0 to 1. May be asked from any thread."""
        tokens = sum(sequence.cached_tokens for sequence in self.scheduler.running)
        return min(1.0, tokens * self.base.cache_bytes_per_token / self.cache_bytes)

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
        if adapter is None or request.adapter is not None:  # else it is no version yet, but one that is being tried
            sequence.block_keys = sequence.version.block_keys(prompt_ids)
        if self._bytes_of([sequence], self.base.kv_cache()) > self.cache_bytes:
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

        The one that came last of those whose prompts are being read; else the one that may become the longest. First of
        all what is kept of prompts is given up.
        """
        if self.prefixes.held_bytes:
            self.prefixes.clear()
            return
        running = self.scheduler.running
        if not running:
            self.fail_all(error)
            return
        prefilling = self.scheduler.prefilling
        given_up = prefilling[-1] if prefilling else max(running, key=lambda sequence: sequence.most_tokens)
        given_up.is_finished = True
        given_up.emit(TokenChunk(error=error))
        self._release_finished()

    def let_go(self, adapter: Adapter) -> None:
        """It has left the memory: no copy of it stays here, once its last sequence is done."""
        self.scheduler.slots.forget(adapter)
        self.stacks.forget(adapter)

    def _end_overdue(self) -> None:
        for sequence in self.scheduler.overdue(monotonic()):
            error = DeadlineExceeded(
                f"The time of this request was over after {len(sequence.output_ids)} tokens of its reply."
            )
            sequence.emit(TokenChunk(error=error.info))
            self.cancel(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Its row is free at the next step."""
        sequence.is_finished = True
        self.scheduler.drop(sequence)
        self._release_finished()

    def forget(self, org_id: str, training_id: str | None) -> None:
        """A version was unloaded: nothing is kept of its prompts, nor of those in flight."""
        version = Version(org_id, training_id)
        self.prefixes.forget(version)
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.version == version:
                sequence.block_keys = []

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every decoding sequence, and chunks of prompts.

        Where it breaks off, no sequence has changed: what it left in the cache is written again by the next step.
        """
        self._end_overdue()
        if not self.has_work:
            return
        self.steps += 1
        self.scheduler.admit()
        for sequence in self.scheduler.prefilling:
            self._provide(sequence)
        step = self.scheduler.next_step()
        decoding = sorted(step.decoding, key=self._order)
        completed = [chunk.sequence for chunk in step.chunks if chunk.completes_prompt]
        ready = decoding + completed
        logits_NV = self._forward(decoding, step.chunks)
        tokens = sample(logits_NV, ready)
        scores = [self._score(*one) for one in zip(ready, tokens, logits_NV, strict=True)]
        for chunk in step.chunks:
            self._keep_blocks(chunk)
        for sequence in decoding:
            sequence.cached_tokens += 1
        for chunk in step.chunks:
            chunk.sequence.cached_tokens += chunk.tokens
        for sequence in completed:
            self.scheduler.prefilled(sequence)
        for sequence, token, score in zip(ready, tokens, scores, strict=True):
            sequence.append(token, score)
        self._release_finished()

    def _order(self, sequence: Sequence) -> tuple[int, ...]:
        """Of those that decode: as the general pass reads the cache, or for the decoder one voice's rows together."""
        return self.cache.place(sequence) if self.base.decoder is None else (id(sequence.adapter),)

    def _provide(self, sequence: Sequence) -> None:
        """A row in the cache, and in it what is known already of the prompt, also from a step ago of another's."""
        if sequence not in self.cache:
            self.cache.enter(sequence, sequence.most_tokens)
        first = sequence.cached_tokens // BLOCK_TOKENS
        known = self.prefixes.known(sequence.block_keys)
        if known > first:
            blocks = self.prefixes.get(sequence.block_keys[:known])[first:]
            self.cache.write(sequence, first * BLOCK_TOKENS, torch.cat(blocks, dim=3))
            spared = known * BLOCK_TOKENS - sequence.cached_tokens
            self.scheduler.spare(sequence, spared)
            sequence.reused_tokens += spared
            sequence.cached_tokens += spared

    def _keep_blocks(self, chunk: Chunk) -> None:
        """Those that a chunk has completed, for prompts of the same version that begin alike."""
        sequence = chunk.sequence
        first = sequence.cached_tokens // BLOCK_TOKENS
        keys = sequence.block_keys[: chunk.end // BLOCK_TOKENS]
        if len(keys) > first:
            held = self.cache.read(sequence, first * BLOCK_TOKENS, len(keys) * BLOCK_TOKENS)
            blocks = [block.clone() for block in torch.split(held, BLOCK_TOKENS, dim=3)]  # each to be dropped by itself
            self.prefixes.put(sequence.version, keys, blocks)

    def _forward(self, decoding: list[Sequence], chunks: list[Chunk]) -> torch.Tensor:
        """Logits (n, vocabulary) of those that decode, and then of those whose prompts are complete."""
        base = self.base
        if base.decoder is not None and decoding:
            ids = [sequence.output_ids[-1] for sequence in decoding]
            decoded = base.decoder.logits(ids, decoding, [sequence.adapter for sequence in decoding], self.cache)
            return torch.cat((decoded, self._forward([], chunks))) if chunks else decoded
        ids = [sequence.output_ids[-1] for sequence in decoding]
        last = list(range(len(ids)))
        for chunk in chunks:
            ids += chunk.sequence.prompt_ids[chunk.sequence.cached_tokens : chunk.end]
            if chunk.completes_prompt:
                last.append(len(ids) - 1)
        spans = [(chunk.sequence, chunk.tokens) for chunk in chunks]
        layout = CachedRows(cache=self.cache, decoding=decoding, chunks=spans, device=base.device)
        voices = [(sequence.adapter, tokens) for sequence, tokens in spans]
        routing = Serving([sequence.adapter for sequence in decoding], voices, self.stacks)
        with base.passing(layout, routing):
            hidden = base.hidden(torch.tensor(ids, device=base.device), layout.positions)
        return base.logits(hidden[last])

    def _score(self, sequence: Sequence, token: int, logits_V: torch.Tensor) -> SampledToken | None:
        if sequence.request.top_logprobs is None:
            return None
        text = self.base.renderer.token_text
        chosen, *top = logprobs(logits_V, token, sequence.request.top_logprobs)
        likeliest = [TokenLogprob(token=text(one), logprob=logprob) for one, logprob in top]
        return SampledToken(token=text(token), logprob=chosen[1], top=likeliest)

    def _release_finished(self) -> None:
        for sequence in [one for one in self.scheduler.running if one.is_finished]:
            self.scheduler.leave(sequence)
            if sequence in self.cache:
                self.cache.leave(sequence)
        if not self.scheduler.running:
            self.stacks.clear()

    def _fits(self, sequences: list[Sequence]) -> bool:
        return self._bytes_of(sequences, self.cache) <= self.cache_bytes

    def _bytes_of(self, sequences: list[Sequence], cache: KVCache) -> int:
        return cache.bytes_if([one.most_tokens for one in sequences], self.base.cache_bytes_per_token)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
