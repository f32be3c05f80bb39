"""Which tests show what becomes of which fault: the marks of the tests, and the table of docs/reliability.md.

A test that shows a fault carries its number: `@pytest.mark.fault("F12")`.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reliability.md"


def marked() -> dict[str, set[str]]:
    """The tests that carry each number, as `folder/file.py::name`."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(TESTS.rglob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for number in _numbers(function):
                    found[number].add(f"{path.relative_to(TESTS)}::{function.name}")
    return dict(found)


def listed() -> dict[str, set[str]]:
    """The same, as the table has it; a fault without a test has an empty set."""
    rows = re.findall(r"^\| (F\d+) \|.*\| ([^|]*) \|$", TABLE.read_text(), re.MULTILINE)
    return {number: set(re.findall(r"`([^`]+::[^`]+)`", tests)) for number, tests in rows}


def descriptions() -> dict[str, str]:
    """What each fault is, in the words of the table."""
    return dict(re.findall(r"^\| (F\d+) \| ([^|]+) \|", TABLE.read_text(), re.MULTILINE))


def _numbers(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
            yield from (str(ast.literal_eval(argument)) for argument in decorator.args)
