"""The OpenAI-compatible API: /v1/chat/completions, /v1/completions and /v1/models.

`model` is an organisation (its promoted version), `organisation@training_id` (that version), or a base model's name.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from repertory.connection import unless_disconnected
from repertory.contracts import BaseKey, GenerateRequest, SampledToken, TokenChunk, TokenLogprob, Usage
from repertory.errors import InvalidInput, JobFailed, NotFound, RepertoryError, Unavailable
from repertory.service.api.body import body_of
from repertory.service.api.deps import Caller, MayInfer, ServiceDep
from repertory.service.api.errors import error_body
from repertory.service.api.openai_schemas import ChatCompletion, Completing, TextCompletion
from repertory.service.api.replies import (
    END,
    OR_EVENTS,
    ROOM,
    EventStream,
    Piece,
    Voice,
    allowed_seconds,
    chain,
    event,
    replies,
    unavailable,
)
from repertory.service.models import LATEST, Version
from repertory.service.service import Service

NOBODY = "base"  # whose turn it is where the bare base is asked by name


class OpenAIRoute(APIRoute):
    """What is wrong with a request is 400 here, and the host's names of fields are this API's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except InvalidInput as error:
                error.status = 400
                error.param = "messages" if error.param == "message" else error.param
                raise

        return handle


router = APIRouter(tags=["openai"], route_class=OpenAIRoute)


@router.post("/chat/completions", responses=OR_EVENTS, dependencies=ROOM)
async def chat_completions(
    request: Request,
    service: ServiceDep,
    caller: MayInfer,
    body: Annotated[ChatCompletion, Depends(body_of(ChatCompletion))],
) -> Response:
    """A reply in a voice, or several, whole or (with `stream`) as server-sent events."""
    conversation: dict[str, Any] = {"messages": body.conversation}
    if body.logprobs:
        conversation["top_logprobs"] = body.top_logprobs or 0
    return await _answer(request, service, caller, body, [conversation], body.reply_limit, is_chat=True)


@router.post("/completions", responses=OR_EVENTS, dependencies=ROOM)
async def completions(
    request: Request,
    service: ServiceDep,
    caller: MayInfer,
    body: Annotated[TextCompletion, Depends(body_of(TextCompletion))],
) -> Response:
    """A text continued as it is: no chat template, no system prompt."""
    prompts = [{"prompt": text} for text in body.prompt]
    return await _answer(request, service, caller, body, prompts, body.max_tokens, is_chat=False)


@router.get("/models")
def list_models(service: ServiceDep, caller: MayInfer) -> dict[str, Any]:
    """Of each organisation its name and its versions, newest first; and the base models they stand on."""
    return {"object": "list", "data": _models(service, caller)}


@router.get("/models/{model:path}")
def model(service: ServiceDep, caller: MayInfer, model: str) -> dict[str, Any]:
    """One of them."""
    org_id, at, training_id = model.partition("@")
    try:
        return _listed(service.models.find(caller.organisation(org_id), training_id if at else LATEST), model)
    except NotFound as error:
        if model != service.settings.default_base_model and service.models.base(caller.org_id, model) is None:
            raise _no_such_model() from error
        return _listed_base(model)
    except Unavailable as error:
        error.param = "model"
        raise


async def _answer(
    request: Request,
    service: Service,
    caller: Caller,
    body: Completing,
    prompts: Sequence[dict[str, Any]],
    max_tokens: int | None,
    *,
    is_chat: bool,
) -> Response:
    voice = await run_in_threadpool(_voice, service, caller, body.model)
    request_id = request.state.request_id
    settings = service.settings
    timeout_seconds = allowed_seconds(settings, body.timeout_seconds)
    asked = [
        GenerateRequest(
            request_id=f"{request_id}-{at}",
            org_id=voice.org_id,
            adapter=voice.adapter,
            **prompts[at // body.choices_per_prompt],
            temperature=settings.temperature if body.temperature is None else body.temperature,
            top_p=settings.top_p if body.top_p is None else body.top_p,
            top_k=settings.top_k if body.top_k is None else body.top_k,
            max_tokens=max_tokens or settings.max_new_tokens,
            stop=body.stop,
            seed=None if body.seed is None else _seed_of_choice(body.seed, at),
            timeout_seconds=timeout_seconds,
        )
        for at in range(len(prompts) * body.choices_per_prompt)
    ]
    answer = _Answer(
        is_chat=is_chat,
        request_id=request_id,
        model=body.model,
        answered_by=voice.answered_by,
        created=int(time.time()),
        has_logprobs=asked[0].top_logprobs is not None,
        choices=len(asked),
        choices_per_prompt=body.choices_per_prompt,
    )
    pieces = replies(service, voice, asked)
    if body.stream:
        # With the first piece in hand, everything that can be refused has been, with a status of its own.
        first = await unless_disconnected(request, anext(pieces))
        events = answer.events(chain(first, pieces), with_usage=body.includes_usage)
        return EventStream(events, pieces, timeout_seconds)
    return JSONResponse(await unless_disconnected(request, answer.whole(pieces)))


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What is the same in all of a request's replies, and the shapes they are told in."""

    is_chat: bool
    request_id: str
    model: str  # as it was asked for
    answered_by: str
    created: int  # seconds since 1970
    has_logprobs: bool
    choices: int
    choices_per_prompt: int

    async def whole(self, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
        texts = [""] * self.choices
        tokens: list[list[SampledToken]] = [[] for _ in texts]
        last: dict[int, TokenChunk] = {}
        async with aclosing(pieces):
            async for at, piece in pieces:
                texts[at] += piece.text
                tokens[at] += piece.logprobs
                if piece.finish_reason is not None:
                    last[at] = piece.model_copy(update={"logprobs": tokens[at]})
        messages = [{"role": "assistant", "content": text, "refusal": None} for text in texts]
        choices = [self._choice(at, "message", said, last[at]) for at, said in enumerate(messages)]
        return self._body("chat.completion", choices) | {"usage": self._usage(last)}

    async def events(self, pieces: AsyncIterator[Piece], *, with_usage: bool) -> AsyncGenerator[str]:
        no_usage_yet = {"usage": None} if with_usage else {}

        def told(at: int, delta: dict[str, str], piece: TokenChunk) -> str:
            return event(self._body("chat.completion.chunk", [self._choice(at, "delta", delta, piece)]) | no_usage_yet)

        last: dict[int, TokenChunk] = {}
        try:
            if self.is_chat:
                for at in range(self.choices):
                    yield told(at, {"role": "assistant", "content": ""}, TokenChunk())
            async for at, piece in pieces:
                if piece.text or piece.finish_reason is not None:
                    yield told(at, {"content": piece.text} if piece.text else {}, piece)
                if piece.finish_reason is not None:
                    last[at] = piece
            if with_usage:
                yield event(self._body("chat.completion.chunk", []) | {"usage": self._usage(last)})
            yield END
        except RepertoryError as error:
            yield event(error_body(error.info, self.request_id))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.request_id}",
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.answered_by,
            "choices": choices,
        }

    def _choice(
        self, at: int, part: Literal["message", "delta"], said: Mapping[str, str | None], piece: TokenChunk
    ) -> dict[str, Any]:
        words: dict[str, Any] = {part: said} if self.is_chat else {"text": said.get("content", "")}
        return {"index": at, **words, "logprobs": self._logprobs(piece), "finish_reason": piece.finish_reason}

    def _logprobs(self, piece: TokenChunk) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        told = [_logprob(token) | {"top_logprobs": [_logprob(one) for one in token.top]} for token in piece.logprobs]
        return {"content": told, "refusal": None}

    def _usage(self, last: dict[int, TokenChunk]) -> dict[str, Any]:
        """A prompt counts once, however many replies it has."""
        used = {at: piece.usage or Usage(prompt_tokens=0, completion_tokens=0) for at, piece in last.items()}
        read = [usage for at, usage in used.items() if at % self.choices_per_prompt == 0]
        prompt_tokens = sum(usage.prompt_tokens for usage in read)
        completion_tokens = sum(usage.completion_tokens for usage in used.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in read)},
            "dropped_messages": sum(usage.dropped_messages for usage in read),
        }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    """A token that is a part of a character has bytes that its text does not tell."""
    is_whole = "\ufffd" not in token.token
    return {
        "token": token.token,
        "logprob": token.logprob,
        "bytes": list(token.token.encode()) if is_whole else None,
    }


def _seed_of_choice(seed: int, at: int) -> int:
    """Choices of one request differ, and each is the same the next time."""
    return (seed + at + 2**63) % 2**64 - 2**63


def _voice(service: Service, caller: Caller, model: str) -> Voice:
    """Raises NotFound, or Unavailable where it cannot answer now."""
    org_id, at, training_id = model.partition("@")
    version: Version | None
    try:
        version = service.models.find(caller.organisation(org_id), training_id if at else LATEST)
        key = version.key
    except NotFound:
        org_id, version, key = caller.org_id or NOBODY, None, _base(service, caller, model)
    except Unavailable as error:
        error.param = "model"
        raise
    return Voice(org_id=org_id, limits=service.organisations.limits(org_id), key=key, version=version)


def _base(service: Service, caller: Caller, model: str) -> BaseKey:
    if model == service.settings.default_base_model:
        try:
            return service.hosts.key(model, service.settings.hyperparameters)
        except JobFailed as error:
            raise unavailable(error) from error
    key = service.models.base(caller.org_id, model)
    if key is None:
        raise _no_such_model()
    return key


def _models(service: Service, caller: Caller) -> list[dict[str, Any]]:
    versions = service.models.list(caller.org_id, with_metadata=False)
    promoted = service.models.promoted_ids()
    bases = dict.fromkeys([service.settings.default_base_model, *(version.key.base_model for version in versions)])
    return [
        *(_listed(version, version.org_id) for version in versions if version.training_id in promoted),
        *(_listed(version, f"{version.org_id}@{version.training_id}") for version in versions),
        *(_listed_base(name) for name in bases),
    ]


def _listed(version: Version, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(version.created_at.timestamp()),
        "owned_by": version.org_id,
        "root": f"{version.org_id}@{version.training_id}",
        "parent": version.key.base_model,
    }


def _listed_base(name: str) -> dict[str, Any]:
    """When a base model was made is not known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "repertory", "parent": None}


def _no_such_model() -> NotFound:
    return NotFound(
        "There is no such model.",
        code="model_not_found",
        cure="Name an organisation that has a trained model, one of its versions as organisation@training_id, or a"
        " base model; GET /v1/models lists them.",
        param="model",
    )
