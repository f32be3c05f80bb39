"""The whole OpenAPI document, called with what it allows and with what it forbids, by every check of schemathesis."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from running_service import RunningService

pytestmark = pytest.mark.slow

# Rules that a JSON schema cannot say: text that is not blank, a conversation in which the assistant speaks, one of two
# fields, an organisation that has a model, a scope that wants an organisation. A refusal of theirs is no refusal of
# valid data; everywhere else it is.
WITH_RULES_OF_THEIR_OWN = (
    "POST /api/v1/training/start",
    "POST /api/v1/training/estimate",
    "POST /api/v1/training/evaluate",
    "POST /api/v1/datasets/{dataset_id}/prepare",
    "GET /api/v1/datasets/{dataset_id}/preview",
    "POST /api/v1/generate",
    "POST /api/v1/models/load",
    "POST /api/v1/models/unload",
    "POST /api/v1/models/promote",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /api/v1/admin/keys",
)
OF_ONE_KEY = r"/admin/keys/\{key_id\}"  # a call that revokes the key it is made with would end the others

# What breaks the schema as a value may be good as a part of a form, where everything is text.
FORM = """
[[operations]]
include-name = "POST /api/v1/datasets"
checks.negative_data_rejection.enabled = false
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "422", "429", "503"]
"""
CONFIG = FORM + "".join(
    f'''
[[operations]]
include-name = "{name}"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "422", "429", "503"]
'''
    for name in WITH_RULES_OF_THEIR_OWN
)


@pytest.mark.parametrize("which", ["--exclude-path-regex", "--include-path-regex"])
def test_the_description_of_the_api_is_true(tmp_path: Path, which: str) -> None:
    service = RunningService(tmp_path).until_ready()
    try:
        service.trained("org")
        made = service.client.post("/admin/keys", json={"name": "operator", "scopes": ["admin"]})
        (tmp_path / "schemathesis.toml").write_text(CONFIG)
        done = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{service.url}/openapi.json"),
                *("--checks", "all", "--seed", "8300", "--max-examples", "10", which, OF_ONE_KEY),
                *("-H", f"Authorization: Bearer {made.json()['key']}", "--no-color"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        found = done.stdout[-20_000:] + done.stderr[-2_000:]
        assert done.returncode == 0, found
        tested = re.search(r"Tested: (\d+)", found)
        assert tested is not None
        assert int(tested[1]) == (2 if which == "--include-path-regex" else len(_operations(service)) - 2)
        assert service.client.get("/health").json()["status"] == "healthy"
        assert "request failed" not in service.log, "a mistake of ours, answered with 500"
    finally:
        service.stop()


def _operations(service: RunningService) -> list[str]:
    paths = service.client.get(f"{service.url}/openapi.json").json()["paths"]
    return [f"{method} {path}" for path, methods in paths.items() for method in methods]
