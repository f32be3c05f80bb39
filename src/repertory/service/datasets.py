"""The conversations of jobs, and imported datasets, on disk.

    DATASET_DIR/{org_id}/{training_id}/…                      of a job that brought its own conversations
    DATASET_DIR/{org_id}/{training_id}/…                      of a job on a dataset: the files of its `prepared`
    DATASET_DIR/{org_id}/{dataset_id}/                        an import (`repertory.data.preparation.worker`)

A submit writes the folder under a pending name before the job's row, and gives it its name after. So a crash leaves
either nothing, or a pending folder that no row speaks of (swept at the next start), or one that only lacks its name.
Only pending folders are ever swept: a folder with its name may belong to another database.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repertory.data.conversations import Conversation
from repertory.data.preparation.identity import record
from repertory.errors import Conflict
from repertory.manifest import sync_folder, verify, write_durably, write_manifest

CONVERSATIONS = "conversations.jsonl"
CONSENT = "consent.jsonl"  # for each conversation the hashes of those whose words are in it; null where nobody told
UNTOLD = "null"
FINDINGS = "findings.json"  # about the conversations that a job brought
FORGET = "forget.json"  # whose words the worker takes from a dataset first
PREPARED = "prepared"
PENDING = ".pending"
FORGOTTEN = ".forgotten"
ABANDONED_SECONDS = 24 * 3600.0  # a pending folder of that age is of no submit that is still going on
UPLOADS = "_uploads"  # no organisation's name begins like that


class Datasets:
    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def write_pending(
        self, org_id: str, training_id: str, conversations: Sequence[Conversation], findings: Mapping[str, Any]
    ) -> None:
        lines = (one.model_dump_json(exclude_defaults=True, exclude={"authors"}) for one in conversations)
        content = "".join(f"{line}\n" for line in lines).encode()
        consent = (UNTOLD if one.authors is None else record(one.authors, org_id) for one in conversations)
        pending = self._pending(org_id, training_id)
        try:
            write_durably(pending / CONVERSATIONS, content)
            write_durably(pending / CONSENT, "".join(f"{line}\n" for line in consent).encode())
            write_durably(pending / FINDINGS, json.dumps(findings).encode())
            for folder in (pending.parent, self._root):
                sync_folder(folder)
        except OSError:  # no half file stays on a disk that is full
            shutil.rmtree(pending, ignore_errors=True)
            raise

    def findings(self, org_id: str, training_id: str) -> dict[str, Any] | None:
        """About the conversations that a job brought; None where it brought none."""
        try:
            return dict(json.loads((self.settle(org_id, training_id) / FINDINGS).read_bytes()))
        except FileNotFoundError:
            return None

    def link_pending(self, org_id: str, training_id: str, dataset_id: str) -> None:
        """Give a job the files of a dataset. What becomes of the dataset later does not touch the job.

        Raises Conflict if the dataset is not whole: it is being prepared again, or was deleted, in this moment.
        """
        source, pending = self.folder(org_id, dataset_id) / PREPARED, self._pending(org_id, training_id)
        pending.mkdir(parents=True)
        try:
            for file in source.iterdir():
                _link(file, pending / file.name)
            damage = verify(pending)
        except FileNotFoundError:
            damage = "it is being prepared again, or was deleted, in this moment"
        if damage is not None:
            shutil.rmtree(pending)
            raise Conflict(
                f"The files of the dataset are not whole: {damage}.",
                code="dataset_damaged",
                cure="Prepare it again with POST /api/v1/datasets/{dataset_id}/prepare.",
                param="dataset_id",
            )
        for folder in (pending, pending.parent, self._root):
            sync_folder(folder)

    def with_words_of(self, org_id: str, author_hash: str) -> dict[str, int]:
        """The dataset ids and training ids with words of an author, and in how many conversations there are some."""
        found: dict[str, int] = {}
        root = self._root / org_id
        for pattern in (f"*/{CONSENT}", f"*/{PREPARED}/{CONSENT}"):
            for path in sorted(root.glob(pattern)):
                name = path.relative_to(root).parts[0].removesuffix(PENDING).removesuffix(FORGOTTEN)
                with path.open(encoding="utf-8") as lines:
                    if count := sum(author_hash in line for line in lines):
                        found[name] = count
        return found

    def unrecorded(self, org_id: str) -> list[str]:
        """The training ids of jobs with conversations of which nobody told whose words are in them."""
        found = []
        for folder in sorted(path.parent for path in (self._root / org_id).glob(f"*/{CONVERSATIONS}")):
            try:
                with (folder / CONSENT).open(encoding="utf-8") as lines:
                    is_recorded = not any(line.startswith(UNTOLD) for line in lines)
            except FileNotFoundError:
                is_recorded = False
            if not is_recorded:
                found.append(folder.name.removesuffix(PENDING).removesuffix(FORGOTTEN))
        return found

    def forget(self, org_id: str, training_id: str, author_hash: str) -> None:
        """Take every conversation with words of an author from what a job was trained on.

        The folder is written anew beside itself and takes its own place, as after a submit that was cut off: once the
        old one has lost its name, `settle` gives it to the new one.
        """
        folder, pending = self.settle(org_id, training_id), self._pending(org_id, training_id)
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir()
        with (folder / CONSENT).open() as consent, (folder / CONVERSATIONS).open(encoding="utf-8") as said:
            # An empty line in their place: the version knows by their numbers which were held out.
            kept = [
                ("[]\n", "\n") if author_hash in authors else (authors, words)
                for authors, words in zip(consent, said, strict=True)
            ]
        write_durably(pending / CONSENT, "".join(authors for authors, _ in kept).encode())
        write_durably(pending / CONVERSATIONS, "".join(words for _, words in kept).encode())
        if (folder / FINDINGS).exists():  # they name places, and quote nobody
            write_durably(pending / FINDINGS, (folder / FINDINGS).read_bytes())
        write_manifest(pending, [CONSENT, CONVERSATIONS])  # without the report, which has everybody's names
        old = folder.with_name(f"{training_id}{FORGOTTEN}{PENDING}")  # of nobody: swept at the next start, if not now
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        pending.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old)

    def new_upload(self, dataset_id: str) -> Path:
        """The folder of an upload whose organisation is not known yet."""
        folder = self._upload(dataset_id)
        folder.mkdir(parents=True)
        return folder

    def discard_upload(self, dataset_id: str) -> None:
        shutil.rmtree(self._upload(dataset_id), ignore_errors=True)

    def claim_upload(self, org_id: str, dataset_id: str) -> None:
        """The upload is whole and becomes the organisation's, under its pending name."""
        pending = self._pending(org_id, dataset_id)
        pending.parent.mkdir(parents=True, exist_ok=True)
        self._upload(dataset_id).rename(pending)
        for folder in (pending, pending.parent, self._root):
            sync_folder(folder)

    def withdraw(self, org_id: str, dataset_id: str) -> None:
        """Back to its pending name: without its row it is swept."""
        folder = self.folder(org_id, dataset_id)
        if folder.is_dir():
            folder.rename(self._pending(org_id, dataset_id))
            sync_folder(folder.parent)

    def folder(self, org_id: str, name: str) -> Path:
        return self._root / org_id / name

    def settle(self, org_id: str, name: str) -> Path:
        """The folder of something accepted, whether or not its submit came to its end."""
        folder = self.folder(org_id, name)
        pending = self._pending(org_id, name)
        if pending.is_dir() and not folder.exists():
            pending.rename(folder)
            sync_folder(folder.parent)
        return folder

    def is_pending(self, org_id: str, name: str) -> bool:
        return self._pending(org_id, name).is_dir()

    def discard_pending(self, org_id: str, training_id: str) -> None:
        shutil.rmtree(
            self._pending(org_id, training_id), ignore_errors=True
        )  # its organisation's deletion may be faster

    def conversations_path(self, org_id: str, training_id: str) -> Path:
        """Where the conversations of an accepted job lie, whether or not its submit came to its end."""
        return self.settle(org_id, training_id) / CONVERSATIONS

    def sweep(self, kind: str, is_accepted: Callable[[str], bool], *, is_alone: bool) -> int:
        """Remove what submits that never came to an answer have left, of the names that begin with `kind`.

        Where other services may be writing here, what is younger than a day may be a submit in progress, and stays.
        Returns how many folders that were.
        """
        swept = 0
        for pending in self._root.glob(f"*/{kind}*{PENDING}"):
            is_old = is_alone or time.time() - pending.stat().st_mtime > ABANDONED_SECONDS
            if is_old and not is_accepted(pending.name.removesuffix(PENDING)):
                shutil.rmtree(pending)
                swept += 1
        return swept

    def _upload(self, dataset_id: str) -> Path:
        return self._root / UPLOADS / f"{dataset_id}{PENDING}"

    def _pending(self, org_id: str, training_id: str) -> Path:
        return self._root / org_id / f"{training_id}{PENDING}"


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes, which are never changed in place; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
