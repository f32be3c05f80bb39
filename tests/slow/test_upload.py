"""A large export over HTTP: what it takes of memory while it is sent, read and prepared.

UPLOAD_MB=2047 pytest -m slow -s tests/slow/test_upload.py -k read
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from running_service import RunningService

pytestmark = pytest.mark.slow

MEGABYTES = int(os.environ.get("UPLOAD_MB", "100"))
MESSAGE_BYTES = 2000
SERVICE_GROWS_BYTES = 32 << 20
WORKER_BYTES = 300e6


@pytest.mark.parametrize(("persona", "status"), [([], "needs_persona"), (["ana"], "ready")], ids=["read", "prepared"])
def test_a_large_upload_takes_little_memory(persona: list[str], status: str, tmp_path: Path) -> None:
    export = tmp_path / "large.csv"
    with export.open("w") as file:
        file.write("author,timestamp,text\n")
        for number in range(MEGABYTES * 1_000_000 // MESSAGE_BYTES):
            author = "ana" if number % 20 == 0 else f"friend{number % 7}"
            words = f"message {number} "
            file.write(f"{author},{1_500_000_000 + 90 * number},{words}{'x' * (MESSAGE_BYTES - 60 - len(words))}\n")
    service = RunningService(tmp_path).until_ready()
    try:
        before = _peak_bytes(service.process.pid)
        begun = time.monotonic()
        with export.open("rb") as file:
            sent = service.client.post(
                "/datasets", data={"org_id": "a", "persona": persona}, files={"file": (export.name, file)}, timeout=600
            )
        assert sent.status_code == 202, sent.text
        accepted = time.monotonic()
        at = f"/datasets/{sent.json()['dataset_id']}"
        worker = 0
        while (dataset := service.client.get(at).json())["status"] in ("queued", "preparing"):
            worker = max([worker, *(_peak_bytes(preparer.pid) for preparer in service.preparers())])
            time.sleep(0.2)
        assert dataset["status"] == status, dataset
        grown = _peak_bytes(service.process.pid) - before
        print(
            f"\n{export.stat().st_size / 1e6:,.0f} MB, {dataset['summary']['messages']:,} messages:"
            f" sent in {accepted - begun:.0f} s, {status} after {time.monotonic() - accepted:.0f} s;"
            f" the service grew by {grown / 1e6:.0f} MB, the worker had {worker / 1e6:.0f} MB"
        )
        assert grown < SERVICE_GROWS_BYTES
        assert 0 < worker < WORKER_BYTES
    finally:
        service.kill()


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
