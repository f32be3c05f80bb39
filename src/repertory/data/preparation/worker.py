"""The process that reads and prepares one export, so that the service neither waits nor grows with it:

    python -m repertory.data.preparation.worker FOLDER < pipe

    FOLDER/export/NAME      the export as it was sent
    FOLDER/forget.json      whose words are to be deleted first (`forgetting`)
    FOLDER/history.jsonl    in place of the export, once somebody's were
    FOLDER/authors.json     who speaks in it, once it is read
    FOLDER/prepared/        conversations.jsonl, consent.jsonl (for each conversation the hashes of those whose words
                            are in it), report.json; MANIFEST.json last

The first line of the pipe is an ImportOrder. What the process tells is one ImportEvent a line; the last one has its
end. The process ends with the service.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

from repertory import manifest
from repertory.data.findings import findings_of
from repertory.data.history import ImportReport
from repertory.data.imports import ImportEvent, ImportOrder, ImportSummary
from repertory.data.preparation.forgetting import forget, source
from repertory.data.preparation.identity import record
from repertory.data.preparation.pipeline import Prepared, check_read, prepare
from repertory.data.preparation.report import authors_of, full_report
from repertory.data.preparation.scratch import Scratch
from repertory.data.readers import DIALOGUES, open_history, rewritten
from repertory.errors import RepertoryError, StorageFailed
from repertory.lifeline import end_with_service
from repertory.logs import configure, without_text

AUTHORS = "authors.json"
PREPARED = "prepared"
CONVERSATIONS = "conversations.jsonl"
CONSENT = "consent.jsonl"
REPORT = "report.json"
log = structlog.get_logger()

POLITENESS = 10  # of nice: replies go before imports


def run(folder: Path, order: ImportOrder, tell: Callable[[ImportEvent], None]) -> ImportEvent:
    """Read the export in `folder`, and prepare it where the persona is known. Returns how it ended."""
    shutil.rmtree(folder / PREPARED, ignore_errors=True)
    options = order.options
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        share = min(done / total, 1.0) if total else 1.0
        if share >= told + 0.01:
            told = share
            tell(ImportEvent(progress=share))

    try:
        forget(folder, options.format, options.reading())
        path, is_rewritten = source(folder)
        format = rewritten.NAME if is_rewritten else options.format
        with open_history(path, format, options.reading(), progress) as history:
            read = history.report
            if not options.persona and read.format not in DIALOGUES:
                for _ in history:
                    pass
                _write_authors(folder, read)
                check_read(read)
                return ImportEvent(progress=1.0, status="needs_persona", summary=_summary(read))
            with Scratch() as scratch:
                try:
                    prepared = prepare(history, options.preparing(), scratch)
                finally:  # also where the persona is not among them: the table is what to choose from
                    _write_authors(folder, read)
                return _written(folder / PREPARED, prepared, read, order.org_id)
    except RepertoryError as error:
        return ImportEvent(status="failed", error=error.info)


def _written(folder: Path, prepared: Prepared, read: ImportReport, org_id: str) -> ImportEvent:
    _write_lines(folder / CONVERSATIONS, prepared.conversations.lines())
    _write_lines(folder / CONSENT, (record(authors, org_id) for authors in prepared.conversations.authors()))
    manifest.write_durably(folder / REPORT, _json(full_report(prepared, read, None)))
    manifest.write_manifest(folder, [CONVERSATIONS, CONSENT, REPORT])
    manifest.sync_folder(folder.parent)
    report = prepared.report
    summary = _summary(read).model_copy(
        update={
            "persona": report.persona,
            "conversations": report.conversations,
            "trained_turns": report.trained_turns,
            "recorded_authors": len({author for authors in prepared.conversations.authors() for author in authors}),
            "system_prompt": prepared.system_prompt,
        }
    )
    return ImportEvent(progress=1.0, status="ready", summary=summary)


def _write_authors(folder: Path, read: ImportReport) -> None:
    about = {"authors": authors_of(read), "count": len(read.authors), "findings": findings_of(read.findings)}
    manifest.write_durably(folder / AUTHORS, _json(about))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _summary(read: ImportReport) -> ImportSummary:
    return ImportSummary(format=read.format, messages=read.messages, authors=len(read.authors))


def _json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, ensure_ascii=False).encode("utf-8", "replace")


def _tell(event: ImportEvent) -> None:
    print(event.model_dump_json(), flush=True)


def main() -> int:
    order = ImportOrder.model_validate_json(sys.stdin.buffer.readline())
    folder = Path(sys.argv[1])
    os.environ["SQLITE_TMPDIR"] = str(folder)  # /tmp may be memory
    end_with_service()
    os.nice(POLITENESS)
    configure("INFO")
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # another service on this database may be at it too
        _tell(run(folder, order, _tell))
    except OSError as error:
        log.error("the disk refused an import", **without_text(error))
        _tell(ImportEvent(status="failed", error=StorageFailed.of(error).info))
    except Exception as error:  # not with its message, which may quote what somebody wrote
        log.error("an import failed", **without_text(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
