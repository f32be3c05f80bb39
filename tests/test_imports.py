"""Imports go one way: the service runs without torch, a host without a database or a web framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_no_library_fetches_native_code_and_none_advises_to(tmp_path: Path) -> None:
    """bitsandbytes would, with the package `kernels`, as soon as it is imported."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [sys.executable, "-c", "import repertory.model.lora, bitsandbytes"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert "kernels" not in found.stdout + found.stderr
