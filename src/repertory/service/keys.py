"""API keys: who may call, for which organisation, and for what.

    rep_k3J9xQ2a_0fT…32 characters…Zq_1bX9aD          prefix _ key id _ secret _ checksum

The checksum lets a key that was mistyped be refused without a look at the database, and secret scanners know a key
when they see one. The database has an HMAC of the secret under a secret of the service (`ServiceSecret`), so a stolen
database opens nothing. A key is shown once, when it is made.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import string
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

import structlog
from sqlalchemy import Connection, Row, Select, insert, select, update
from sqlalchemy.exc import OperationalError

from repertory.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from repertory.manifest import sync_folder
from repertory.service.store import Store, api_keys, now, organisations
from repertory.settings import Settings

log = structlog.get_logger()

PREFIX = "rep"
ALPHABET = string.digits + string.ascii_letters
ID_CHARACTERS = 8
SECRET_CHARACTERS = 32  # of 62: 190 bits
CHECKSUM_CHARACTERS = 6  # 62^6 is more than the 2^32 of a CRC
SHAPE = re.compile(
    rf"({PREFIX}_([0-9A-Za-z]{{{ID_CHARACTERS}}})_([0-9A-Za-z]{{{SECRET_CHARACTERS}}}))"
    rf"_([0-9A-Za-z]{{{CHECKSUM_CHARACTERS}}})"
)
GRACE = timedelta(hours=24)  # in which a rotated key still works
A_KEY = "any API key"  # whether there is one, as a question to the store
LAST_USED_SECONDS = 60.0  # how exactly the time of the last use is known: more often is not written


class Scope(StrEnum):
    INFER = "infer"  #: replies
    READ = "read"  #: jobs, datasets, models
    TRAIN = "train"  #: start and cancel jobs, send and delete datasets; includes read
    ORG_ADMIN = "org-admin"  #: the organisation's keys, and its deletion; includes the three above
    ADMIN = "admin"  #: all organisations and their limits; includes everything


_INCLUDED = {
    Scope.INFER: {Scope.INFER},
    Scope.READ: {Scope.READ},
    Scope.TRAIN: {Scope.TRAIN, Scope.READ},
    Scope.ORG_ADMIN: set(Scope) - {Scope.ADMIN},
    Scope.ADMIN: set(Scope),
}


def included(scopes: Collection[Scope]) -> frozenset[Scope]:
    """These scopes and those that come with them."""
    return frozenset[Scope]().union(*(_INCLUDED[scope] for scope in scopes))


@dataclass(frozen=True, kw_only=True)
class Key:
    id: str
    name: str
    org_id: str | None  # None: every organisation
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    @property
    def state(self) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now() else "active"

    @staticmethod
    def from_row(row: Row[Any]) -> Key:
        return Key(
            id=row.id,
            name=row.name,
            org_id=row.org_id,
            scopes=tuple(Scope(scope) for scope in row.scopes),
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
            last_used_at=row.last_used_at,
        )


class ServiceSecret:
    """What the HMACs are made with: API_KEY_SECRET, else a file that is made with the first key."""

    def __init__(self, settings: Settings) -> None:
        self._given = settings.api_key_secret
        self._path = settings.api_key_secret_file

    def read(self) -> bytes | None:
        """None where there is none."""
        if self._given is not None:
            return self._given.get_secret_value().encode()
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def make(self) -> bytes:
        """Of two processes that make it at once, one does, and the other gets that one's."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, self._path)
        except FileExistsError:
            pass
        finally:
            beside.unlink()
        sync_folder(self._path.parent)
        return self._path.read_bytes()


class Keys:
    def __init__(self, store: Store, secret: ServiceSecret) -> None:
        self._store = store
        self._secret = secret

    def are_required(self) -> bool:
        """Whether a key was ever made. Revoking the last one does not open the service again."""
        return self._store.remembered(A_KEY, _is_any)

    def are_known_not_to_be_required(self) -> bool:
        """Without a look into the database."""
        return self._store.remembers(A_KEY) and not self.are_required()

    def check_secret(self) -> None:
        """Raises Conflict if there are keys and the secret they were made with is gone."""
        if self._secret.read() is None and self.are_required():
            raise Conflict(
                "There are API keys, but the secret that they were made with is gone.",
                code="api_key_secret_missing",
                cure="Restore the file that API_KEY_SECRET_FILE names from a backup, or set API_KEY_SECRET to what it"
                " held. Without it no key can be used.",
            )

    def create(
        self,
        *,
        name: str,
        org_id: str | None,
        scopes: Collection[Scope],
        expires_in: timedelta | None = None,
    ) -> tuple[Key, str]:
        """A new key, and its text, which nobody can be told again. Raises NotFound for an unknown organisation."""
        _check_scopes(org_id, scopes)
        self.check_secret()
        secret = self._secret.read() or self._secret.make()
        key_id, random = _random(ID_CHARACTERS), _random(SECRET_CHARACTERS)
        with self._store.write() as connection:
            if org_id is not None:
                is_there = select(organisations.c.org_id).where(organisations.c.org_id == org_id)
                if connection.execute(is_there).one_or_none() is None:
                    raise organisation_not_found()
            row = connection.execute(
                insert(api_keys)
                .values(
                    id=key_id,
                    org_id=org_id,
                    name=name,
                    scopes=sorted(set(scopes)),
                    digest=_digest(secret, key_id, random),
                    created_at=now(),
                    expires_at=None if expires_in is None else now() + expires_in,
                )
                .returning(api_keys)
            ).one()
        body = f"{PREFIX}_{key_id}_{random}"
        return Key.from_row(row), f"{body}_{_checksum(body)}"

    def list(self, org_id: str | None = None) -> list[Key]:
        """Of one organisation or all of them, newest first; also those that can no longer be used."""
        wanted = select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
        if org_id is not None:
            wanted = wanted.where(api_keys.c.org_id == org_id)
        with self._store.read() as connection:
            return [Key.from_row(row) for row in connection.execute(wanted)]

    def get(self, key_id: str, org_id: str | None = None) -> Key:
        """The key, if it is this organisation's (None: anybody's). Raises NotFound."""
        wanted = _of(key_id)
        if org_id is not None:
            wanted = wanted.where(api_keys.c.org_id == org_id)
        with self._store.read() as connection:
            row = connection.execute(wanted).one_or_none()
        if row is None:
            raise NotFound(
                "There is no such API key.",
                code="api_key_not_found",
                cure="List them with GET /api/v1/admin/keys or `repertory keys list`.",
                param="key_id",
            )
        return Key.from_row(row)

    def revoke(self, key_id: str, org_id: str | None = None) -> Key:
        """From the next request on it is refused. Revoking it again changes nothing."""
        key = self.get(key_id, org_id)
        with self._store.write() as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key.id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=now())
            )
        return self.get(key.id)

    def rotate(self, key_id: str, grace: timedelta, org_id: str | None = None) -> tuple[Key, str]:
        """A new key of the same rights; the old one still works for `grace`. Raises Conflict if it works no more."""
        old = self.get(key_id, org_id)
        if old.state != "active":
            raise Conflict(
                f"This key is {old.state} already.",
                code="api_key_not_active",
                cure="Make a new one in its place.",
                param="key_id",
            )
        lifetime = None if old.expires_at is None else old.expires_at - old.created_at
        made = self.create(name=old.name, org_id=old.org_id, scopes=old.scopes, expires_in=lifetime)
        ends_at = now() + grace
        if old.expires_at is not None:
            ends_at = min(ends_at, old.expires_at)
        with self._store.write() as connection:
            connection.execute(update(api_keys).where(api_keys.c.id == old.id).values(expires_at=ends_at))
        return made

    def verify(self, text: str) -> Key:
        """The key that `text` is. Raises Unauthenticated, which says more only to who has the whole secret."""
        shape = SHAPE.fullmatch(text)
        if shape is None or not hmac.compare_digest(_checksum(shape[1]), shape[4]):
            raise _invalid("This is no API key of this service: it is cut off or mistyped.")
        key_id, random = shape[2], shape[3]
        row = self._store.remembered(("key", key_id), lambda connection: connection.execute(_of(key_id)).one_or_none())
        secret = self._secret.read()
        if row is None or secret is None or not hmac.compare_digest(row.digest, _digest(secret, key_id, random)):
            raise _invalid("The API key is not known here.")
        key = Key.from_row(row)
        if key.state != "active":
            raise _invalid(f"The API key is {key.state}.")
        self._note_use(key)
        return key

    def _note_use(self, key: Key) -> None:
        if key.last_used_at is not None and (now() - key.last_used_at).total_seconds() < LAST_USED_SECONDS:
            return
        try:
            with self._store.write() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key.id).values(last_used_at=now()))
        except OperationalError as error:  # a full disk must not keep voices from answering
            log.warning("the last use of a key was not noted", key_id=key.id, reason=str(error.orig))


def _is_any(connection: Connection) -> bool:
    return connection.execute(select(api_keys.c.id).limit(1)).one_or_none() is not None


def _of(key_id: str) -> Select[Any]:
    return select(api_keys).where(api_keys.c.id == key_id)


def organisation_not_found() -> NotFound:
    """Also the answer to whoever names an organisation that is not theirs."""
    return NotFound(
        "There is no such organisation.",
        code="organisation_not_found",
        cure="Use the organisation that the API key belongs to.",
        param="org_id",
    )


def _check_scopes(org_id: str | None, scopes: Collection[Scope]) -> None:
    if not scopes:
        raise InvalidInput("A key needs a scope.", cure=f"Choose from {', '.join(Scope)}.", param="scopes")
    if org_id is not None and Scope.ADMIN in scopes:
        raise InvalidInput(
            "A key with the scope admin is of no organisation.",
            cure="Leave org_id out, or use org-admin.",
            param="scopes",
        )
    if org_id is None and Scope.ORG_ADMIN in scopes:
        raise InvalidInput(
            "A key with the scope org-admin needs an organisation.", cure="Add org_id, or use admin.", param="scopes"
        )


def _random(characters: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(characters))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_CHARACTERS):
        number, digit = divmod(number, len(ALPHABET))
        digits += ALPHABET[digit]
    return digits


def _digest(secret: bytes, key_id: str, random: str) -> str:
    """A fast hash is right for a secret of 190 bits: nobody can guess it."""
    return hmac.digest(secret, f"{key_id}:{random}".encode(), "sha256").hex()


def _invalid(message: str) -> Unauthenticated:
    return Unauthenticated(
        message,
        code="invalid_api_key",
        cure='Send one that works as "Authorization: Bearer rep_…"; `repertory keys create` makes one.',
    )
