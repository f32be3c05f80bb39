"""The documents keep their word: settings, links and the source tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import faults
from repertory.settings import Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ENV_EXAMPLE = ROOT / ".env.example"
SETTINGS = sorted(name.upper() for name in Settings.model_fields)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def absences(name: str, example: str, readme: str) -> list[str]:
    """Where the setting is missing."""
    found = []
    if not re.search(rf"^(# )?{name}=", example, re.MULTILINE):
        found.append(".env.example")
    if not re.search(rf"^\| `{name}` \|", readme, re.MULTILINE):
        found.append("the settings table of the README")
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_in_the_example_and_in_the_readme(name: str) -> None:
    example, readme = ENV_EXAMPLE.read_text(), README.read_text()
    assert absences(name, example, readme) == []
    without = re.sub(rf"^(# )?{name}=.*\n", "", example, flags=re.MULTILINE)
    assert absences(name, without, readme) == [".env.example"]
    without = re.sub(rf"^\| `{name}` \|.*\n", "", readme, flags=re.MULTILINE)
    assert absences(name, example, without) == ["the settings table of the README"]


def test_the_example_and_the_readme_name_nothing_but_settings() -> None:
    in_example = re.findall(r"^(?:# )?([A-Z0-9_]+)=", ENV_EXAMPLE.read_text(), re.MULTILINE)
    in_readme = re.findall(r"^\| `([A-Z0-9_]+)` \|", README.read_text(), re.MULTILINE)
    assert sorted(in_example) == SETTINGS
    assert sorted(in_readme) == SETTINGS


def test_copying_the_example_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    without = Settings()
    (tmp_path / ".env").write_text(ENV_EXAMPLE.read_text())
    assert Settings() == without


def test_every_line_of_the_example_can_be_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    switched_on = re.sub(r"^# ([A-Z0-9_]+=)", r"\1", ENV_EXAMPLE.read_text(), flags=re.MULTILINE)
    (tmp_path / ".env").write_text(switched_on)
    assert Settings().lora_target_modules == "q_proj,v_proj"


def test_what_waits_for_a_graphics_card_is_listed() -> None:
    waiting = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "gpu" / "test_cuda.py").read_text(), re.MULTILINE)
    listed = re.findall(r"^\| `(test_\w+)` \|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert listed == waiting


def test_the_table_of_faults_names_the_tests_that_play_them_and_no_other() -> None:
    table, marks = faults.listed(), faults.marked()
    assert [f"F{number}" for number in range(1, 39)] == list(table)
    assert {number: tests for number, tests in table.items() if tests} == marks


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_tree_of_the_readme_names_every_file_and_no_other() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so the files of the repository are unknown")
    files = {line for line in listed.stdout.splitlines() if (ROOT / line).exists()}
    named = _tree(README.read_text())
    assert sorted(files - set(named)) == [], "these files are missing from the tree at the end of the README"
    assert sorted(set(named) - files) == [], "the tree at the end of the README names files that are not there"
    assert len(named) == len(set(named)), "the tree at the end of the README names a file twice"


def _tree(readme: str) -> list[str]:
    """The files of the fenced tree: two spaces per level, folders end with a slash, a description follows the name."""
    block = re.search(r"^```tree\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "the README has no tree"
    paths: list[str] = []
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition(" ")
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
            continue
        assert description.strip(), f"{name} has no description in the tree of the README"
        paths.append("".join(folders) + name)
    return paths
