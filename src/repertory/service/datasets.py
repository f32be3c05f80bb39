"""The conversations of a job, on disk: DATASET_DIR/{org_id}/{training_id}/conversations.jsonl.

A submit writes the folder under a pending name before the job's row, and gives it its name after. So a crash leaves
either nothing, or a pending folder that no row speaks of (swept at the next start), or one that only lacks its name.
Only pending folders are ever swept: a folder with its name may belong to a job of another database.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from repertory.data.conversations import Conversation
from repertory.manifest import sync_folder, write_durably

CONVERSATIONS = "conversations.jsonl"
PENDING = ".pending"


class Datasets:
    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def write_pending(self, org_id: str, training_id: str, conversations: Iterable[Conversation]) -> None:
        lines = (conversation.model_dump_json(exclude_defaults=True) for conversation in conversations)
        content = "".join(f"{line}\n" for line in lines).encode()
        pending = self._pending(org_id, training_id)
        write_durably(pending / CONVERSATIONS, content)
        for folder in (pending.parent, self._root):
            sync_folder(folder)

    def discard_pending(self, org_id: str, training_id: str) -> None:
        shutil.rmtree(self._pending(org_id, training_id))

    def conversations_path(self, org_id: str, training_id: str) -> Path:
        """Where the conversations of an accepted job lie, whether or not its submit came to its end."""
        folder = self._root / org_id / training_id
        pending = self._pending(org_id, training_id)
        if pending.is_dir() and not folder.exists():
            pending.rename(folder)
            sync_folder(folder.parent)
        return folder / CONVERSATIONS

    def sweep(self, is_accepted: Callable[[str], bool]) -> int:
        """Remove what submits that never came to an answer have left. Returns how many folders that were."""
        swept = 0
        for pending in self._root.glob(f"*/*{PENDING}"):
            if not is_accepted(pending.name.removesuffix(PENDING)):
                shutil.rmtree(pending)
                swept += 1
        return swept

    def _pending(self, org_id: str, training_id: str) -> Path:
        return self._root / org_id / f"{training_id}{PENDING}"
