"""No row is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = set(range(1, 104))


def test_every_row_of_the_catalogue_has_a_test(request: pytest.FixtureRequest) -> None:
    collected = [item for item in request.session.items if item.path.parent == HERE]
    if {item.path for item in collected} != set(HERE.glob("test_*.py")):
        pytest.skip("only a part of the catalogue was asked for")
    names = "\n".join(item.name for item in collected)
    numbers = re.findall(r"^test_row_(\d{3})_|\[(\d{3}) ", names, re.MULTILINE)
    assert {int(of_name or of_case) for of_name, of_case in numbers} == ROWS


def test_where_an_answer_differs_from_the_catalogue_the_documentation_says_why() -> None:
    rows = [int(row) for row in re.findall(r"^\| (\d+) \|", (HERE.parents[1] / "docs" / "errors.md").read_text(), re.M)]
    assert rows == sorted(rows)
    assert set(rows) <= ROWS
    assert len(rows) > 5
