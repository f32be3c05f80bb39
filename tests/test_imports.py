"""Imports go one way: the service runs without torch, a host without a database or a web framework."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("repertory.service.api.app, repertory.service.server", {"torch", "transformers", "repertory.model"}),
        ("repertory.model.host, repertory.model.loop", {"sqlalchemy", "fastapi", "alembic", "repertory.service"}),
        ("repertory.cli, repertory.doctor", {"torch", "transformers", "repertory.model.host"}),
        (
            "repertory.model.weights, repertory.model.hub, repertory.base_models",
            {"torch", "transformers", "sqlalchemy"},
        ),
        ("repertory.contracts, repertory.settings, repertory.data.conversations", {"torch", "sqlalchemy", "fastapi"}),
        (
            "repertory.data.readers, repertory.data.preparation.pipeline, repertory.importer",
            {"torch", "transformers", "pyarrow", "sqlalchemy", "fastapi", "repertory.model", "repertory.service"},
        ),
    ],
)
def test_a_room_does_not_pull_in_another(modules: str, absent: set[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not absent & set(found.stdout.split())
