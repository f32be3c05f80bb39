"""Organisations without limits, for tests that have no settings."""

from __future__ import annotations

from pathlib import Path

from repertory.service.organisations import Limits, Organisations
from repertory.service.quotas import Quotas
from repertory.service.store import Store


def unlimited(store: Store) -> Quotas:
    nowhere = Path("nowhere")  # without limits nobody measures folders
    return Quotas(store, Organisations(store, Limits()), nowhere, nowhere)
