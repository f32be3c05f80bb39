"""Somebody's words taken out of an export, which is written anew in the form of a history without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from repertory.data.history import Entry, History
from repertory.data.preparation.identity import masking
from repertory.data.preparation.noise import without_quotes
from repertory.data.readers import DIALOGUES, open_history, rewritten
from repertory.data.readers.reading import ReadOptions
from repertory.manifest import sync_folder

EXPORT = "export"
REWRITTEN = "history.jsonl"  # in place of the export
FORGET = "forget.json"  # the ids of authors whose words are to be deleted; gone when they are
SOMEBODY = "Somebody"


def source(folder: Path) -> tuple[Path, bool]:
    """What a dataset is read from, and whether that is a history written anew."""
    if (folder / REWRITTEN).is_file():
        return folder / REWRITTEN, True
    (export,) = (folder / EXPORT).iterdir()
    return export, False


def forget(folder: Path, format: str, options: ReadOptions) -> None:
    """Do what FORGET says, if it is there. Interrupted at any moment, it is done again from its beginning."""
    try:
        authors = frozenset(json.loads((folder / FORGET).read_bytes()))
    except FileNotFoundError:
        return
    path, is_rewritten = source(folder)
    with open_history(path, rewritten.NAME if is_rewritten else format, options) as history:
        between = folder / f".{REWRITTEN}.first"
        is_dialogue = history.report.format in DIALOGUES
        rewritten.write(between, "", _of_others(history, authors, quotes=is_dialogue))
        original = history.report.format
        known = history.report.authors
        names = {name: SOMEBODY for one in authors & known.keys() for name in known[one].names}
    with open_history(between, rewritten.NAME) as others:
        rewritten.write(folder / REWRITTEN, original, _unnamed(others, names))
    between.unlink()
    sync_folder(folder)
    shutil.rmtree(folder / EXPORT, ignore_errors=True)
    (folder / FORGET).unlink()
    sync_folder(folder)


def _of_others(history: History, authors: Collection[str], *, quotes: bool) -> Iterator[Entry]:
    """Forwarded words and quoted lines may be theirs, and teach no voice anyway."""
    for entry in history:
        if entry.author_id in authors or entry.is_forwarded:
            continue
        entry.text = entry.text if quotes else without_quotes(entry.text)
        entry.mentions = tuple(one for one in entry.mentions if one not in authors)
        yield entry


def _unnamed(history: History, names: dict[str, str]) -> Iterator[Entry]:
    mask = masking(names)
    for entry in history:
        entry.text = mask(entry.text)
        yield entry
