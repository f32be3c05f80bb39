"""Organisations as rows, and what each may use at most."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from sqlalchemy import Connection, Row, insert, select, update

from repertory.errors import Conflict
from repertory.service.keys import organisation_not_found
from repertory.service.store import Store, ensure_organisation, now, organisations
from repertory.settings import Settings


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


WholeNumber = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(_whole)]  # 60.0 is one too, as JSON has it
Tokens = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1, lt=2**31), BeforeValidator(_whole)]


class Limits(BaseModel):
    """None: no limit. Of an organisation's own limits, one that is not set is everybody's (`ORG_…` of the settings)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Positive | None = None  # replies that are asked for
    tokens_per_minute: Positive | None = None  # of prompts and replies
    concurrent_generations: Positive | None = None
    queued_jobs: WholeNumber | None = None
    running_jobs: WholeNumber | None = None
    training_tokens_per_day: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)] | None = (
        None  # of all epochs, over any 24 hours
    )
    dataset_gb: float | None = Field(None, ge=0, lt=2**31)  # GiB of exports and conversations
    model_gb: float | None = Field(None, ge=0, lt=2**31)  # GiB of voices

    def over(self, defaults: Limits) -> Limits:
        """These, and where they are not set the others."""
        return Limits.model_validate(defaults.model_dump() | self.model_dump(exclude_unset=True))

    @staticmethod
    def of_everybody(settings: Settings) -> Limits:
        return Limits.model_validate({name: getattr(settings, f"org_{name}") for name in Limits.model_fields})


@dataclass(frozen=True, kw_only=True)
class Organisation:
    org_id: str
    created_at: datetime
    promoted: str | None
    limits: Limits  # its own, as far as they are set
    deletion_asked_at: datetime | None

    @staticmethod
    def from_row(row: Row[Any]) -> Organisation:
        return Organisation(
            org_id=row.org_id,
            created_at=row.created_at,
            promoted=row.promoted,
            limits=Limits.model_validate(row.limits),
            deletion_asked_at=row.deletion_asked_at,
        )


class Organisations:
    def __init__(self, store: Store, everybody: Limits) -> None:
        """`everybody`: the limits of those that have none of their own."""
        self._store = store
        self._everybody = everybody

    def create(self, org_id: str) -> Organisation:
        """Raises Conflict if it is there already, or is being deleted."""
        with self._store.write() as connection:
            if connection.execute(_of(org_id)).one_or_none() is not None:
                raise Conflict(
                    "There is an organisation of this name already.",
                    code="organisation_exists",
                    cure="Choose another name, or use the one that is there.",
                    param="org_id",
                )
            connection.execute(insert(organisations).values(org_id=org_id, created_at=now()))
        return self.get(org_id)

    def get(self, org_id: str) -> Organisation:
        """Raises NotFound."""
        with self._store.read() as connection:
            row = connection.execute(_of(org_id)).one_or_none()
        if row is None:
            raise organisation_not_found()
        return Organisation.from_row(row)

    def list(self) -> list[Organisation]:
        """By name."""
        with self._store.read() as connection:
            rows = connection.execute(select(organisations).order_by(organisations.c.org_id)).all()
        return [Organisation.from_row(row) for row in rows]

    def limits(self, org_id: str) -> Limits:
        """What holds for an organisation, also for one that is not there yet."""
        return self._store.remembered(("limits", org_id), lambda connection: self.limits_of(connection, org_id))

    def limits_of(self, connection: Connection, org_id: str) -> Limits:
        row = connection.execute(_of(org_id)).one_or_none()
        return self._everybody if row is None else self._holding(row)

    def hold(self, connection: Connection, org_id: str) -> Limits:
        """For a transaction that adds something of the organisation: it is there until the end, made if need be, and
        nothing else is added meanwhile. Returns the limits that hold. Raises Conflict if it is being deleted.
        """
        ensure_organisation(connection, org_id)
        row = connection.execute(_of(org_id).with_for_update()).one()
        if row.deletion_asked_at is not None:
            raise Conflict(
                "This organisation is being deleted.",
                code="organisation_deleted",
                cure="Wait until that is done; then the name is free again.",
                param="org_id",
            )
        return self._holding(row)

    def _holding(self, row: Row[Any]) -> Limits:
        return Limits.model_validate(row.limits).over(self._everybody)

    def set_limits(self, org_id: str, limits: Limits) -> Organisation:
        """Its own limits from now on, in place of those before. Raises NotFound."""
        with self._store.write() as connection:
            changed = connection.execute(
                update(organisations)
                .where(organisations.c.org_id == org_id)
                .values(limits=limits.model_dump(mode="json", exclude_unset=True))
            )
        if not changed.rowcount:
            raise organisation_not_found()
        return self.get(org_id)


def _of(org_id: str) -> Any:
    return select(organisations).where(organisations.c.org_id == org_id)
