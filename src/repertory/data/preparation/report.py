"""The report about an import as plain data, for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from repertory.data.findings import findings_of
from repertory.data.history import ImportReport
from repertory.data.imports import TokenReport
from repertory.data.preparation.pipeline import Prepared

MAX_AUTHORS = 1000  # those who speak most; all are counted


def full_report(prepared: Prepared, read: ImportReport, tokens: TokenReport | None) -> dict[str, Any]:
    """Everything that is known of a prepared history."""
    about = asdict(prepared.report)
    about["findings"] = findings_of(prepared.report.findings)
    about["timezone_assumed"] = read.timezone_assumed
    about["tokens"] = tokens.model_dump() if tokens else None
    about["authors"] = authors_of(read)
    return about


def authors_of(read: ImportReport) -> list[dict[str, Any]]:
    """Who speaks in the history, most first. Times are seconds since 1970 in UTC."""
    ranked = sorted(read.authors.values(), key=lambda author: -author.messages)
    return [
        {
            "id": author.id,
            "name": author.name,
            "names": [name for name, _ in author.names.most_common()],
            "messages": author.messages,
            "characters": author.characters,
            "is_bot": author.is_bot,
            "first": author.first,
            "last": author.last,
        }
        for author in ranked[:MAX_AUTHORS]
    ]
