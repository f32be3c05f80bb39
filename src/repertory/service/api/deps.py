"""What endpoints are given."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query, Request

from repertory.contracts import OrgId
from repertory.errors import InvalidInput
from repertory.service.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
OrgIdPath = Annotated[OrgId, Path()]
OrgIdQuery = Annotated[OrgId | None, Query()]
ModelIdQuery = Annotated[str | None, Query()]


def strict_query(request: Request) -> None:
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


def organisation(service: Service, org_id: str | None) -> str:
    """Whose voice is meant, where the caller need not say: the existing AI-personality client does not."""
    if org_id is not None:
        return org_id
    if service.settings.default_org_id is not None:
        return service.settings.default_org_id
    with_models = service.models.organisations()
    if len(with_models) == 1:
        return with_models.pop()
    raise InvalidInput(
        "org_id is missing, and it is not clear which organisation is meant:"
        f" {'none has' if not with_models else 'several have'} a model.",
        code="org_id_required",
        cure="Add ?org_id=… to the address, or set DEFAULT_ORG_ID.",
        param="org_id",
    )
