"""`make bench-serve` on its smallest rows, `make bench-adapters` on few: the numbers of a busy machine say nothing, but
they must come.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_serving_benchmark_measures_what_it_is_asked_for_and_keeps_the_rest(tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    output.write_text(json.dumps({"rows": {"start": {"ready_seconds": 1.0, "first_seconds": 2.0}}}))
    command = [sys.executable, "-m", "benchmarks.serve", "--rows", "one", "mixed-8", "persona", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--peers", "transformers", "peft", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(output.read_text())
    rows = results["rows"]
    assert rows["start"] == {"ready_seconds": 1.0, "first_seconds": 2.0}
    assert rows["one"].keys() >= {"repertory", "transformers"}
    assert rows["mixed-8"].keys() >= {"repertory", "peft"}
    assert all(rows[row]["repertory"]["tokens_per_second"] > 0 for row in ("one", "mixed-8"))
    assert rows["persona"]["second_ms"] > 0
    assert 0 < results["memory"]["repertory_share"] < 1
    assert {"device", "cores", "torch"} <= results["machine"].keys()


@pytest.mark.slow
def test_more_voices_than_slots_are_asked_without_an_error() -> None:
    command = [sys.executable, "-m", "benchmarks.adapters", "--adapters", "40", "--slots", "4", "--readers", "8"]
    done = subprocess.run(
        [*command, "--seconds", "5", "--filling", "2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == 0
    assert found["replies"] >= found["voices_asked"] > 4
    assert found["loads"] > 0
    assert found["between_tokens_ms"]["p99"] >= found["between_tokens_ms"]["p50"] > 0
