"""The Dockerfile carried out in its order, and its container used as the README says, without a Docker engine.

What stands in for base image, uv image and downloaded Python is told in `container_image`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from container_image import Container, Image
from running_service import CONVERSATION, eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
USER = 1000
SOMEBODY = 4242
UNPACK_SECONDS = 300.0  # of the bundled base model, on a busy machine
STOP_SECONDS = 10.0  # `docker stop` kills after that


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if os.geteuid() or subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("carrying out a Dockerfile takes root and namespaces")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the image has Python 3.11, and this Python is to stand in for it")
    return Image(ROOT, tmp_path_factory.mktemp("image"), TORCH="2.13.0+cpu")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A mounted folder as Docker finds it: somebody else's, with a file and a treacherous link of theirs."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "theirs").write_text("kept")
    (folder / "link").symlink_to("/etc/passwd")
    for path in (folder, folder / "theirs", folder / "link"):
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "container.log"


def test_every_path_that_the_image_names_is_there(image: Image) -> None:
    root = image.stage.root
    for path in (*image.stage.entrypoint, "/opt/venv/bin/python", "/opt/venv/bin/repertory", "/app/src/main.py"):
        assert os.path.lexists(root / path.lstrip("/")), path
    assert os.access(root / image.stage.entrypoint[0].lstrip("/"), os.X_OK)
    assert image.stage.environment["PATH"].split(":")[0] == "/opt/venv/bin"
    python = str((root / "opt/venv/bin/python").readlink())
    assert python.startswith("/opt/python/")
    assert os.path.lexists(root / python.lstrip("/"))
    assert (root / image.stage.volumes[0].lstrip("/")).stat().st_uid == USER
    assert not list((root / "app").rglob(".env*"))


def test_the_versions_are_those_that_were_asked_for(image: Image, volume: Path, log: Path) -> None:
    ask = "import sys, torch; print(sys.version_info[:2], torch.__version__, sys.prefix)"
    assert image.start(volume, log, "python", "-c", ask).process.wait() == 0
    assert log.read_text().splitlines()[-1] == "(3, 11) 2.13.0+cpu /opt/venv"


def test_the_container_serves_stops_and_serves_again(image: Image, volume: Path, log: Path) -> None:
    """On a read-only root with only /tmp beside the volume, so whatever it keeps is in the volume."""
    with started(image, volume, log) as service:
        container = service.container
        assert container.healthcheck() == 0
        assert container.init.uids() == (USER, USER, USER)
        assert container.init.cmdline() == ["python", "-m", "src.main"]
        assert all(host.uids().effective == USER for host in container.init.children(recursive=True))
        assert capabilities(container.init.pid) == 0
        service.until_healthy()
        answer = service.client.post("/training/start", json={"org_id": "org", "conversations": [CONVERSATION]})
        training_id = answer.json()["training_id"]
        eventually(lambda: service.client.get(f"/training/status/{training_id}").json()["status"] == "completed")
        service.stop()
        assert container.healthcheck() != 0
    assert {path.lstat().st_uid for path in (volume, *volume.rglob("*"))} == {USER}
    assert (image.stage.root / "etc/passwd").stat().st_uid == 0
    assert (volume / "theirs").read_text() == "kept"

    with started(image, volume, log) as service:
        container = service.container
        service.until_healthy()
        [host] = container.init.children()
        host.kill()
        eventually(lambda: not host.is_running())  # reaped by process 1; a zombie counts as running
        service.until_healthy()
        answer = service.client.post("/generate?org_id=org", json={"message": "Hello!", "max_tokens": 8})
        assert training_id in answer.json()["model_info"]["model_path"]
        service.stop()


@pytest.mark.parametrize("user", [0, SOMEBODY])
def test_the_image_is_in_order_by_its_own_doctor(image: Image, volume: Path, log: Path, user: int) -> None:
    """As root, from where the entrypoint steps down, and as a user of one's own that the volume belongs to already."""
    examined = image.start(volume, log, "repertory", "doctor", user=user, PORT="0", HF_HUB_OFFLINE="1")
    assert examined.process.wait() == 0, log.read_text()
    assert "2.13.0+cpu" in log.read_text()
    assert (volume / "theirs").stat().st_uid == (user or USER)


@pytest.mark.parametrize(("user", "writable"), [(4321, True), (0, False)])
def test_a_volume_that_cannot_be_written_is_refused_with_the_cure(
    image: Image, volume: Path, log: Path, user: int, writable: bool
) -> None:
    assert image.start(volume, log, user=user, writable=writable).process.wait() == 1
    last = log.read_text().splitlines()[-1]
    assert f"user {user or USER} may not write to /app/models" in last
    assert f"chown -R {user or USER}" in last


def capabilities(pid: int) -> int:
    """The effective ones, as a bit mask."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)


class started:  # noqa: N801
    """A container of the image, until the end of the block."""

    def __init__(self, image: Image, volume: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.container: Container = image.start(volume, log, PORT=str(port), HF_HUB_OFFLINE="1")
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=60, trust_env=False)

    def __enter__(self) -> started:
        try:
            eventually(lambda: self.container.process.poll() is not None or self.container.healthcheck() == 0)
            assert self.container.process.poll() is None, self.container.log.read_text()
        except BaseException:
            self.container.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.container.kill()

    def until_healthy(self) -> None:
        ends = time.monotonic() + UNPACK_SECONDS
        while (status := self.client.get("/health").json()["status"]) != "healthy":
            assert time.monotonic() < ends, f"/health still says {status}: {self.container.log.read_text()[-3000:]}"
            time.sleep(0.5)

    def stop(self) -> None:
        """As `docker stop` does: SIGTERM to process 1, which must be gone before Docker would kill it."""
        begun = time.monotonic()
        self.container.init.send_signal(signal.SIGTERM)
        assert self.container.process.wait(60) == 0
        assert time.monotonic() - begun < STOP_SECONDS
