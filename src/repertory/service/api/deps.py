"""What endpoints are given.

What waits for nothing is a coroutine: FastAPI sends all else through a thread, which costs more than most of it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Query, Request, Security
from fastapi.security import HTTPBearer, SecurityScopes
from starlette.concurrency import run_in_threadpool

from repertory.contracts import OrgId
from repertory.errors import Forbidden, InvalidInput, Unauthenticated
from repertory.service.keys import Scope, included, organisation_not_found
from repertory.service.service import Service


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
OrgIdPath = Annotated[OrgId, Path()]
OrgIdQuery = Annotated[OrgId | None, Query()]
ModelIdQuery = Annotated[str | None, Query()]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks, and for whom."""

    org_id: str | None  # None: any organisation; the service is open, or the key is its operator's
    scopes: frozenset[Scope]  # with those that they include

    def organisation(self, named: str) -> str:
        """The organisation that the request names, if the caller may act for it.

        Raises NotFound, the same for one that is another's as for one that never was: neither is looked up.
        """
        if self.org_id is not None and named != self.org_id:
            raise organisation_not_found()
        return named

    def narrowed(self, named: str | None) -> str | None:
        """The organisation among whose things to look; None: all. Raises NotFound as `organisation` does."""
        return self.org_id if named is None else self.organisation(named)


ANYBODY = Caller(org_id=None, scopes=included([Scope.ADMIN]))

_bearer = HTTPBearer(
    auto_error=False, description="An API key. None is needed while the service has none; then it is open."
)


async def authenticated(request: Request, _documented: Annotated[object, Depends(_bearer)]) -> None:
    """Of every route but /health, and before its body is read. Raises Unauthenticated."""
    service = await service_of(request)
    service.store.pin()
    is_open = service.keys.are_known_not_to_be_required()
    request.state.caller = ANYBODY if is_open else await run_in_threadpool(caller_of, request, service)


def caller_of(request: Request, service: Service) -> Caller:
    """Who asks. Raises Unauthenticated where a key is needed and none is there that works."""
    if not service.keys.are_required():
        return ANYBODY
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise Unauthenticated("This service wants an API key, and the request has none.")
    key = service.keys.verify(text.strip())
    return Caller(org_id=key.org_id, scopes=included(key.scopes))


async def _scoped(request: Request, needed: SecurityScopes) -> Caller:
    caller: Caller = request.state.caller
    for scope in needed.scopes:
        if scope not in caller.scopes:
            raise Forbidden(f"The API key has not the scope {scope}.")
    return caller


MayInfer = Annotated[Caller, Security(_scoped, scopes=[Scope.INFER])]
MayRead = Annotated[Caller, Security(_scoped, scopes=[Scope.READ])]
MayTrain = Annotated[Caller, Security(_scoped, scopes=[Scope.TRAIN])]
MayAdministerOrganisation = Annotated[Caller, Security(_scoped, scopes=[Scope.ORG_ADMIN])]
MayAdminister = Annotated[Caller, Security(_scoped, scopes=[Scope.ADMIN])]


async def strict_query(request: Request) -> None:
    """A parameter that is misspelled, or sent twice, would otherwise be dropped without a word."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidInput(
                "The query has a parameter that is not known here.",
                code="unknown_field",
                cure=f"Known are: {', '.join(sorted(known))}." if known else "Send none.",
            )
        if len(request.query_params.getlist(name)) > 1:
            raise InvalidInput(f"The query has {name} twice.", cure="Send it once.", param=name)


def organisation(service: Service, caller: Caller, org_id: str | None) -> str:
    """Whose voice is meant, where the caller need not say: the existing AI-personality client does not."""
    meant = caller.narrowed(org_id)
    if meant is not None:
        return meant
    if service.settings.default_org_id is not None:
        return service.settings.default_org_id
    with_models = service.models.organisations()
    if len(with_models) == 1:
        return next(iter(with_models))
    raise InvalidInput(
        "org_id is missing, and it is not clear which organisation is meant:"
        f" {'none has' if not with_models else 'several have'} a model.",
        code="org_id_required",
        cure="Add ?org_id=… to the address, or set DEFAULT_ORG_ID.",
        param="org_id",
    )
