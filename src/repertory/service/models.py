"""Model versions: one for each completed job, with the one promoted for each organisation.

A version is visible while its folder's manifest verifies, so visible means loadable. Contents are hashed before a
version is first used, and again when one of its files has changed; of those that nobody has used yet a list looks at
names and sizes alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Select, select, update

from repertory import manifest
from repertory.contracts import AdapterRef, BaseKey, Hyperparameters
from repertory.errors import NotFound, Unavailable
from repertory.service.store import Store, jobs, model_versions, organisations

KEY_COLUMNS = [model_versions.c[name] for name in BaseKey.model_fields]
LATEST = "latest"  # the promoted version
BASE = "base"  # the bare base model
DELETED_AUTHORS = "deleted_authors"  # in metadata: hashes of those whose words were learned, and are deleted since
SAMPLES = "test_responses"  # in a report: replies to held-out words, which are quoted
QUOTING = ("report.json", "training_metadata.json")  # files of a version that may have them

# What a folder looked like when it was verified: name, time of change and size of each file.
Fingerprint = tuple[tuple[str, int, int], ...]
Look = tuple[Fingerprint, str | None]  # and what was found wrong with it


@dataclass(frozen=True, kw_only=True)
class Version:
    """One immutable voice of one organisation."""

    training_id: str
    org_id: str
    created_at: datetime
    key: BaseKey  # it is served on this base alone
    folder: Path
    metadata: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """What goes with every reply; the whole metadata, with the report and its sample replies, is for `info`."""
        report = self.metadata.get("report", {})
        scores = {name: report[name] for name in ("perplexity", "base_perplexity", "scored_on") if name in report}
        counts = {name: self.metadata[name] for name in ("training_conversations",) if name in self.metadata}
        marks = {name: self.metadata[name] for name in (DELETED_AUTHORS,) if name in self.metadata}
        return self.key.model_dump(exclude_none=True) | counts | scores | marks

    @property
    def shape(self) -> Hyperparameters:
        """What a job that goes on from this version has to keep."""
        resolved = self.metadata.get("hyperparameters", {})
        names = ("lora_r", "lora_alpha", "use_rslora", "lora_target_modules")
        kept = {name: resolved[name] for name in names if name in resolved}
        quantization = {"use_4bit": self.key.quantization == "4bit", "use_8bit": self.key.quantization == "8bit"}
        return Hyperparameters(**kept, **quantization, dtype=self.key.dtype)

    @property
    def adapter(self) -> AdapterRef:
        return AdapterRef(org_id=self.org_id, training_id=self.training_id, path=str(self.folder.resolve()))


class Models:
    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._root = root
        self._verified: dict[Path, Look] = {}
        self._sized: dict[Path, Look] = {}  # those that were never hashed

    def folder(self, org_id: str, training_id: str) -> Path:
        return self._root / org_id / training_id

    def list(self, org_id: str | None = None, *, with_metadata: bool = True) -> list[Version]:
        """Those of `versions` whose folder is not damaged."""
        found = self.versions(org_id, with_metadata=with_metadata)
        return [version for version in found if self._damage(version, with_contents=False) is None]

    def versions(self, org_id: str | None = None, *, with_metadata: bool = True) -> Sequence[Version]:
        """Of one organisation or of all, newest first, whatever their folders are like.

        Without metadata, of which a thousand versions have a lot, it is empty.
        """
        columns = [column for column in model_versions.c if with_metadata or column.name != "metadata"]
        wanted = select(*columns).order_by(model_versions.c.created_at.desc())
        if org_id is not None:
            wanted = wanted.where(model_versions.c.org_id == org_id)
        with self._store.read() as connection:
            return [self._version(row) for row in connection.execute(wanted)]

    def base(self, org_id: str | None, base_model: str) -> BaseKey | None:
        """As the newest version on that base model has it, of one organisation or of all."""
        wanted = select(*KEY_COLUMNS).where(model_versions.c.base_model == base_model)
        if org_id is not None:
            wanted = wanted.where(model_versions.c.org_id == org_id)
        with self._store.read() as connection:
            row = connection.execute(wanted.order_by(model_versions.c.created_at.desc()).limit(1)).one_or_none()
        return None if row is None else BaseKey.model_validate(dict(row._mapping))

    def find(self, org_id: str, model_id: str) -> Version:
        """The version, whole and ready to be loaded. Raises NotFound, or Unavailable if its folder is damaged."""
        version = self.look_up(org_id, model_id)
        damage = self._damage(version)
        if damage is not None:
            raise Unavailable(
                f"The files of this model are damaged: {damage}.",
                code="adapter_damaged",
                cure="Restore its folder from a backup, or train again; other versions can be named by their model_id.",
                param="model_id",
                retry_after_seconds=60.0,
            )
        return version

    def look_up(self, org_id: str, model_id: str) -> Version:
        """The version, whatever its folder is like. Raises NotFound."""
        row = self._store.remembered(
            ("version", org_id, model_id), lambda connection: connection.execute(_named(org_id, model_id)).one_or_none()
        )
        if row is None:
            raise _not_found(model_id)
        return self._version(row)

    def mark(self, training_ids: Collection[str], author_hash: str) -> None:
        """Show of jobs and versions that they learned from words which are deleted now, and quote none any more."""
        with self._store.write() as connection:
            for table, key in ((jobs, jobs.c.id), (model_versions, model_versions.c.training_id)):
                for row in connection.execute(select(key, table.c.metadata).where(key.in_(training_ids))).all():
                    known = {*row.metadata.get(DELETED_AUTHORS, []), author_hash}
                    marked = _without_samples(row.metadata) | {DELETED_AUTHORS: sorted(known)}
                    connection.execute(update(table).where(key == row[0]).values(metadata=marked))
            learned = select(model_versions).where(model_versions.c.training_id.in_(training_ids))
            versions = [self._version(row) for row in connection.execute(learned)]
        for version in versions:
            manifest.amend(version.folder, dict.fromkeys(QUOTING, _without_samples_in))

    def promote(self, org_id: str, training_id: str) -> Version:
        """Have this version answer as `latest`. Raises NotFound, or Unavailable if its folder is damaged."""
        version = self.find(org_id, training_id)
        wanted = _named(org_id, version.training_id)
        with self._store.write() as connection:
            if connection.execute(wanted).one_or_none() is None:  # its organisation is being deleted
                raise _not_found(training_id)
            owner = organisations.c.org_id == org_id
            connection.execute(update(organisations).where(owner).values(promoted=version.training_id))
        return version

    def promoted(self, org_id: str) -> Version | None:
        """The version to compare a new one with, if there is one that works."""
        try:
            return self.find(org_id, LATEST)
        except (NotFound, Unavailable):
            return None

    def promoted_ids(self) -> set[str]:
        """Of every organisation that speaks with a model: that model's training id."""
        with self._store.read() as connection:
            return {row for row in connection.execute(select(organisations.c.promoted)).scalars() if row is not None}

    def organisations(self) -> frozenset[str]:
        """Those that have a model."""
        return self._store.remembered("who speaks", _who_speaks)

    def forget(self, org_id: str) -> None:
        """Its folders are gone."""
        for folder in [folder for folder in self._verified if folder.parent.name == org_id]:
            self._verified.pop(folder, None)

    def _version(self, row: Row[Any]) -> Version:
        return Version(
            training_id=row.training_id,
            org_id=row.org_id,
            created_at=row.created_at,
            key=BaseKey.model_validate({column.name: getattr(row, column.name) for column in KEY_COLUMNS}),
            folder=self.folder(row.org_id, row.training_id),
            metadata=getattr(row, "metadata", {}),
        )

    def _damage(self, version: Version, *, with_contents: bool = True) -> str | None:
        """What is wrong with the folder, looked for again only after one of its files has changed."""
        folder = version.folder
        is_listed = not with_contents
        with_contents = with_contents or folder in self._verified
        known = self._verified if with_contents else self._sized
        try:
            fingerprint = _fingerprint(folder)
            earlier, damage = known.get(folder, ((), None))
            # A damaged one is hashed again each time it is asked for: it may be back from a backup, times and all.
            if fingerprint and fingerprint == earlier and (damage is None or is_listed):
                return damage
            damage = manifest.verify(folder, with_contents=with_contents)
        except OSError as error:
            return f"{folder.name} cannot be read: {error.strerror}"
        known[folder] = fingerprint, damage
        return damage


def _named(org_id: str, model_id: str) -> Select[Any]:
    theirs = select(model_versions).where(model_versions.c.org_id == org_id)
    if model_id == LATEST:
        return theirs.join(organisations, organisations.c.promoted == model_versions.c.training_id)
    return theirs.where(model_versions.c.training_id == model_id)


def _who_speaks(connection: Connection) -> frozenset[str]:
    return frozenset(connection.execute(select(model_versions.c.org_id).distinct()).scalars())


def _without_samples_in(content: bytes) -> bytes:
    return json.dumps(_without_samples(json.loads(content)), ensure_ascii=False, indent=1).encode()


def _without_samples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_samples(item) for name, item in value.items() if name != SAMPLES}
    return [_without_samples(item) for item in value] if isinstance(value, list) else value


def _fingerprint(folder: Path) -> Fingerprint:
    """Empty where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))


def _not_found(model_id: str) -> NotFound:
    if model_id == LATEST:
        return NotFound(
            "This organisation has no trained model yet.",
            code="model_not_found",
            cure='Train one with POST /api/v1/training/start, or ask for the bare base model with "model_id": "base".',
            param="org_id",
        )
    return NotFound(
        "This organisation has no such model.",
        code="model_not_found",
        cure="Choose one from GET /api/v1/models/{org_id}/list, or leave model_id out for the newest.",
        param="model_id",
    )
