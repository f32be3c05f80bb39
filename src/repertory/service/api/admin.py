"""/api/v1/admin: organisations, their limits and their keys. `repertory keys` and `repertory orgs` do the same."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal

import anyio
import structlog
from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from repertory.contracts import OrgId
from repertory.data.conversations import CleanText
from repertory.errors import Forbidden
from repertory.service.api.body import body_of, optional_body_of
from repertory.service.api.deps import MayAdminister, MayAdministerOrganisation, OrgIdPath, OrgIdQuery, ServiceDep
from repertory.service.keys import GRACE, Key, Scope
from repertory.service.organisations import Limits, Organisation, Positive, WholeNumber
from repertory.service.service import Service

log = structlog.get_logger()

router = APIRouter(prefix="/admin", tags=["admin"])


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewKey(Request):
    name: CleanText = Field(min_length=1, max_length=200)  # for people
    org_id: OrgId | None = None  # None: the caller's, or of an operator's key every one
    scopes: list[Scope] = Field(min_length=1, max_length=len(Scope))
    expires_in_seconds: Positive | None = None


class RotateKey(Request):
    grace_seconds: WholeNumber = int(GRACE.total_seconds())  # in which the old key still works


class NewOrganisation(Request):
    org_id: OrgId
    limits: Limits = Limits()


class KeyInfo(BaseModel):
    key_id: str
    name: str
    org_id: str | None
    scopes: list[Scope]
    state: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None  # to the minute


class NewKeyInfo(KeyInfo):
    key: str  # shown this once


class KeyList(BaseModel):
    keys: list[KeyInfo]


class OrganisationInfo(BaseModel):
    org_id: str
    created_at: datetime
    own_limits: dict[str, int | float | None]  # those that are set for it
    limits: Limits  # what holds
    is_being_deleted: bool


class OrganisationList(BaseModel):
    organisations: list[OrganisationInfo]


class OrganisationDeleted(BaseModel):
    message: str
    org_id: str


@router.post("/keys", status_code=201)
def create_key(
    service: ServiceDep, caller: MayAdministerOrganisation, body: Annotated[NewKey, Depends(body_of(NewKey))]
) -> NewKeyInfo:
    """Make a key. Its text is in this answer and nowhere else."""
    org_id = caller.narrowed(body.org_id)
    if not set(body.scopes) <= caller.scopes:
        raise Forbidden(
            "A key may not have scopes that the one it is made with has not.",
            cure="Leave them out, or ask the operator.",
            param="scopes",
        )
    expires_in = None if body.expires_in_seconds is None else timedelta(seconds=body.expires_in_seconds)
    key, text = service.keys.create(name=body.name, org_id=org_id, scopes=body.scopes, expires_in=expires_in)
    log.info("API key made", key_id=key.id, org_id=key.org_id, scopes=[str(scope) for scope in key.scopes])
    return _shown(key, text)


@router.get("/keys")
def list_keys(service: ServiceDep, caller: MayAdministerOrganisation, org_id: OrgIdQuery = None) -> KeyList:
    """Newest first, without their texts; also those that can no longer be used."""
    return KeyList(keys=[_key(key) for key in service.keys.list(caller.narrowed(org_id))])


@router.post("/keys/{key_id}/rotate", status_code=201)
def rotate_key(
    service: ServiceDep,
    caller: MayAdministerOrganisation,
    key_id: str,
    body: Annotated[RotateKey, Depends(optional_body_of(RotateKey))],
) -> NewKeyInfo:
    """Make a key of the same rights; the old one still works for a while."""
    key, text = service.keys.rotate(key_id, timedelta(seconds=body.grace_seconds), caller.org_id)
    log.info("API key rotated", key_id=key_id, new_key_id=key.id)
    return _shown(key, text)


@router.delete("/keys/{key_id}")
def revoke_key(service: ServiceDep, caller: MayAdministerOrganisation, key_id: str) -> KeyInfo:
    """From the next request on it is refused."""
    key = service.keys.revoke(key_id, caller.org_id)
    log.info("API key revoked", key_id=key.id)
    return _key(key)


@router.post("/orgs", status_code=201)
def create_organisation(
    service: ServiceDep, _caller: MayAdminister, body: Annotated[NewOrganisation, Depends(body_of(NewOrganisation))]
) -> OrganisationInfo:
    """Make an organisation, so that it can be given keys and limits."""
    service.organisations.create(body.org_id)
    log.info("organisation made", org_id=body.org_id)
    return _organisation(service, service.organisations.set_limits(body.org_id, body.limits))


@router.get("/orgs")
def list_organisations(service: ServiceDep, _caller: MayAdminister) -> OrganisationList:
    """By name."""
    return OrganisationList(organisations=[_organisation(service, one) for one in service.organisations.list()])


@router.get("/orgs/{org_id}")
def show_organisation(service: ServiceDep, caller: MayAdministerOrganisation, org_id: OrgIdPath) -> OrganisationInfo:
    """One of them."""
    return _organisation(service, service.organisations.get(caller.organisation(org_id)))


@router.put("/orgs/{org_id}/limits")
def set_limits(
    service: ServiceDep,
    _caller: MayAdminister,
    org_id: OrgIdPath,
    body: Annotated[Limits, Depends(body_of(Limits))],
) -> OrganisationInfo:
    """Its own limits, in place of those before: null for none; what is left out is as the settings have it."""
    limited = service.organisations.set_limits(org_id, body)
    log.info("limits set", org_id=org_id, **body.model_dump(exclude_unset=True))
    return _organisation(service, limited)


@router.delete("/orgs/{org_id}")
async def delete_organisation(
    service: ServiceDep, caller: MayAdministerOrganisation, org_id: OrgIdPath
) -> OrganisationDeleted:
    """Delete it with all its keys, jobs, datasets and voices, in memory too. Answers when nothing is left."""
    org_id = caller.organisation(org_id)
    log.info("deletion of an organisation asked for", org_id=org_id)
    # With a limiter of its own: however many wait here, the threads that answer other requests stay free.
    await anyio.to_thread.run_sync(service.erasure.delete, org_id, limiter=anyio.CapacityLimiter(1))
    return OrganisationDeleted(message="Nothing of the organisation is left.", org_id=org_id)


def _key(key: Key) -> KeyInfo:
    return KeyInfo(
        key_id=key.id,
        name=key.name,
        org_id=key.org_id,
        scopes=list(key.scopes),
        state=key.state,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
    )


def _shown(key: Key, text: str) -> NewKeyInfo:
    return NewKeyInfo(**_key(key).model_dump(), key=text)


def _organisation(service: Service, organisation: Organisation) -> OrganisationInfo:
    return OrganisationInfo(
        org_id=organisation.org_id,
        created_at=organisation.created_at,
        own_limits=organisation.limits.model_dump(exclude_unset=True),
        limits=service.organisations.limits(organisation.org_id),
        is_being_deleted=organisation.deletion_asked_at is not None,
    )
