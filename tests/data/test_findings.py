"""Findings are documented."""

from __future__ import annotations

from pathlib import Path

from repertory.data.findings import CODES
from repertory.data.readers import FORMATS

PAGE = (Path(__file__).parents[2] / "docs/imports.md").read_text()


def test_every_code_is_documented_and_no_other() -> None:
    table = PAGE[PAGE.index("## Findings") :]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    documented = {code.strip(" `"): (severity.strip(), meaning.strip()) for code, severity, meaning in rows}
    assert documented == {name: (code.severity, code.meaning) for name, code in CODES.items()}


def test_every_format_is_documented() -> None:
    formats = PAGE[PAGE.index("## Formats") : PAGE.index("## Findings")]
    assert {line.split("`")[1] for line in formats.splitlines() if line.startswith("| `")} == set(FORMATS)
