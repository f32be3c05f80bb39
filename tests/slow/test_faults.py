"""What the machine may do to a running service, with real processes; `docs/reliability.md` says what is promised."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import make_url

from disks import file_system, filled
from latency import p99_seconds
from postgresql import Postgresql
from repertory.contracts import Hyperparameters
from repertory.data.conversations import Conversation
from repertory.service.datasets import Datasets
from repertory.service.jobs import JobConfig, Jobs, Submission
from repertory.service.store import Store
from repertory_fixtures import conversation
from running_service import CONVERSATION, RunningService, eventually
from unlimited import unlimited

pytestmark = pytest.mark.slow

Start = Callable[..., RunningService]
SHORT = {"FAKE_HOST_STEPS": "40", "FAKE_HOST_STEP_SECONDS": "0.05"}  # two seconds for a run
LONG = {"FAKE_HOST_STEPS": "2000", "FAKE_HOST_STEP_SECONDS": "0.05"}  # runs that no test waits for


@contextmanager
def job_table(folder: Path, database_url: str) -> Iterator[Jobs]:
    """Of a service that is not running now."""
    store = Store(database_url)
    store.migrate()
    yield Jobs(store, Datasets(folder / "models/datasets"), unlimited(store))
    store.close()


def kinds(service: RunningService, training_id: str) -> list[str]:
    events = service.client.get(f"/training/{training_id}/events").json()["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    return [event["kind"] for event in events if event["kind"] != "warning"]


def left_over(service: RunningService) -> list[str]:
    """Files and folders under ./models that have a temporary name."""
    return [path.name for path in service.folder.rglob("*") if path.name.endswith((".tmp", ".pending", ".new"))]


# Processes that die


@pytest.mark.fault("F4")
def test_a_job_whose_service_died_between_claim_and_start_is_run_without_blame(
    start_service: Start, database_url: str
) -> None:
    service = start_service(DATABASE_URL=database_url, **LONG).until_ready()
    training_id = service.train("org")
    service.until(training_id, "running")
    service.stop()
    with job_table(service.folder, database_url) as jobs:
        assert jobs.claim(training_id, "a process that died then") is not None
    service.environment |= SHORT
    service.start()
    assert service.until(training_id, "completed", "failed")["status"] == "completed"
    assert kinds(service, training_id) == [
        *("queued", "preparing", "running"),  # until the stop
        *("queued", "preparing"),  # the claim of the process that died then
        *("queued", "preparing", "running", "evaluating", "completed"),
    ]
    service.stop()
    with job_table(service.folder, database_url) as jobs:
        assert jobs.get(training_id).attempts == 0


@pytest.mark.fault("F5")
def test_after_the_end_of_all_processes_every_answered_submit_is_there_and_runs(
    start_service: Start, database_url: str, request: pytest.FixtureRequest
) -> None:
    service = start_service(DATABASE_URL=database_url, **SHORT).until_ready()
    running, *waiting = [service.train(f"org-{number}") for number in range(4)]
    eventually(lambda: service.status(running)["metadata"].get("checkpoint_step"))
    hosts = service.hosts()
    service.process.kill()
    for host in hosts:
        host.kill()
    if database_url.startswith("postgresql"):
        server: Postgresql = request.getfixturevalue("postgresql_server")
        with server.down():
            pass
    service.kill()
    service.start()
    for training_id in (running, *waiting):
        assert service.until(training_id, "completed", "failed")["status"] == "completed"
    assert kinds(service, running).count("queued") == 2
    assert all(kinds(service, training_id).count("queued") == 1 for training_id in waiting)
    assert service.status(running)["metadata"]["resumed_from_step"] >= 5


@pytest.mark.fault("F3")
def test_a_watcher_misses_nothing_when_the_service_is_killed(start_service: Start) -> None:
    service = start_service(**SHORT).until_ready()
    training_id = service.train("org")
    heard: list[tuple[int, str]] = []

    def listen() -> None:
        headers = {"accept": "text/event-stream", "last-event-id": str(heard[-1][0] if heard else 0)}
        with service.client.stream("GET", f"/training/{training_id}/events", headers=headers) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    heard.append((event["seq"], event["kind"]))
                    if event["kind"] == "running" and len(heard) < 5:
                        service.process.kill()

    with pytest.raises(httpx.TransportError):
        listen()
    service.kill()
    service.start()
    listen()
    assert [seq for seq, _ in heard] == list(range(1, len(heard) + 1))
    assert [kind for _, kind in heard if kind != "warning"] == kinds(service, training_id)
    assert heard[-1][1] == "completed"


@pytest.mark.fault("F21")
@pytest.mark.parametrize("delay_seconds", [0.0, 0.1, 0.5])
def test_a_cancel_whose_service_dies_on_the_way_is_carried_out_or_forgotten_whole(
    start_service: Start, delay_seconds: float
) -> None:
    service = start_service(**LONG).until_ready()
    training_id = service.train("org")
    time.sleep(delay_seconds)

    def cancel() -> None:
        with suppress(httpx.TransportError):
            httpx.delete(f"{service.url}/api/v1/training/jobs/{training_id}", timeout=30, trust_env=False)

    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    time.sleep(0.01)
    service.process.kill()
    cancelling.join()
    service.kill()
    service.environment |= SHORT
    service.start()
    job = service.until(training_id, "completed", "cancelled", "failed")
    assert job["status"] in ("completed", "cancelled")
    assert kinds(service, training_id).count(job["status"]) == 1
    eventually(lambda: not list(service.folder.glob("models/checkpoints/*/*")))


@pytest.mark.fault("F11")
def test_of_many_processes_exactly_one_claims_each_job(migrated_postgresql: str, tmp_path: Path) -> None:
    claimer = """
import sys
from pathlib import Path
from repertory.service.datasets import Datasets
from repertory.service.jobs import Jobs
from repertory.service.organisations import Limits, Organisations
from repertory.service.quotas import Quotas
from repertory.service.store import Store
store = Store(sys.argv[1])
quotas = Quotas(store, Organisations(store, Limits()), Path("none"), Path("none"))
jobs = Jobs(store, Datasets(Path(sys.argv[2])), quotas)
sys.stdin.readline()
print(*[job.id for job in jobs.queue() if jobs.claim(job.id, sys.argv[3]) is not None])
"""
    with job_table(tmp_path, migrated_postgresql) as jobs:
        config = JobConfig(hyperparameters=Hyperparameters(), validation_split=0.1)
        wanted = [
            Submission(
                org_id=f"org-{number % 7}",
                base_model="fake/base",
                config=config,
                conversations=[Conversation.model_validate(CONVERSATION)],
                metadata={},
                request_hash="",
            )
            for number in range(300)
        ]
        ids = [jobs.submit(submission).job.id for submission in wanted]
    command = [sys.executable, "-c", claimer, migrated_postgresql, str(tmp_path / "models/datasets")]
    claimers = [
        subprocess.Popen([*command, f"process-{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(6)
    ]
    for process in claimers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    won = [process.communicate(timeout=120)[0].split() for process in claimers]
    assert sorted(training_id for each in won for training_id in each) == sorted(ids)
    assert sum(bool(each) for each in won) > 1, "one was so quick that nothing was raced for"


@pytest.mark.fault("F6")
def test_a_real_run_is_interrupted_with_a_checkpoint_and_goes_on_from_there(
    start_service: Start, cache: Path, database_url: str
) -> None:
    """The only checkpoint within a thousand steps is the interruption's own."""
    real = {"HOST_MODULE": "repertory.model.host", "MODEL_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    service = start_service(DATABASE_URL=database_url, DEFAULT_BASE_MODEL="tiny/llama-gqa", **real).until_ready()
    chats = [conversation(1, at).model_dump(mode="json", exclude_none=True) for at in range(20)]
    body = {"conversations": chats, "num_epochs": 100, "hyperparameters": {"save_steps": 1000, "eval_steps": 1000}}
    training_id = service.train("org", **body)
    eventually(lambda: service.status(training_id)["metadata"].get("step", 0) >= 3)
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < 20
    with job_table(service.folder, database_url) as jobs:
        left = jobs.get(training_id)
    assert (left.status, left.attempts) == ("queued", 0)
    assert left.metadata["checkpoint_step"] == left.metadata["step"] >= 3
    service.start()
    service.until_ready()
    resumed = eventually(lambda: service.status(training_id)["metadata"].get("resumed_from_step"))
    assert resumed == left.metadata["checkpoint_step"]
    service.client.delete(f"/training/jobs/{training_id}")


# The database goes away


@pytest.mark.fault("F13")
def test_a_locked_sqlite_is_a_503_and_costs_no_training(start_service: Start) -> None:
    service = start_service(**SHORT).until_ready()
    training_id = service.train("org")
    service.until(training_id, "running")
    with closing(sqlite3.connect(service.folder / "models/repertory.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        refused = service.client.post("/training/start", json={"org_id": "org", "conversations": [CONVERSATION]})
        waited = time.monotonic() - began
        assert service.client.get(f"/training/status/{training_id}").status_code == 200  # reading goes on
        other.execute("ROLLBACK")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "storage_unavailable"
    assert int(refused.headers["retry-after"]) >= 1
    assert 5 < waited < 20
    assert service.until(training_id, "completed", "failed")["status"] == "completed"
    assert "resumed_from_step" not in service.status(training_id)["metadata"]
    assert service.train("org")


@pytest.mark.fault("F3", "F13")
def test_a_service_killed_while_its_database_is_locked_records_every_step_in_the_end(start_service: Start) -> None:
    """The checkpoint that is gone on from lies behind steps that it could not record."""
    service = start_service(**SHORT).until_ready()
    training_id = service.train("org")
    eventually(lambda: service.status(training_id)["metadata"].get("step"))
    database = service.folder / "models/repertory.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        recorded = service.status(training_id)["metadata"]["step"]
        checkpoints = service.folder / "models/checkpoints/org" / training_id
        eventually(lambda: (checkpoints / f"checkpoint-{recorded // 5 * 5 + 10}/MANIFEST.json").exists())
        service.kill()
        other.execute("ROLLBACK")
    service.start()
    assert service.until(training_id, "completed", "failed")["status"] == "completed"
    assert service.status(training_id)["metadata"]["resumed_from_step"] > recorded
    service.stop()
    with closing(sqlite3.connect(database)) as rows:
        steps = rows.execute("SELECT step FROM metrics WHERE job_id = ? ORDER BY step", [training_id]).fetchall()
    assert [step for (step,) in steps] == list(range(1, 41))


@pytest.mark.fault("F14")
def test_a_postgresql_that_fails_for_a_while_costs_no_training(
    start_service: Start, postgresql_server: Postgresql, migrated_postgresql: str
) -> None:
    service = start_service(DATABASE_URL=migrated_postgresql, **SHORT).until_ready()
    training_id = service.train("org")
    service.until(training_id, "running")
    with postgresql_server.down():
        refused = service.client.post("/training/start", json={"org_id": "org", "conversations": [CONVERSATION]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert service.client.get("/health").json()["status"] == "degraded"
        time.sleep(3)  # longer than what is left of the run
    assert service.until(training_id, "completed", "failed")["status"] == "completed"
    assert "resumed_from_step" not in service.status(training_id)["metadata"]
    assert kinds(service, training_id) == ["queued", "preparing", "running", "evaluating", "completed"]
    assert service.train("org")


class Wire:
    """A TCP proxy before the server's socket. `cut` makes it lose the answer to the COMMIT of the next submit, and the
    connection with it.
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self.cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._server))
            submits = threading.Event()  # a job was inserted on this connection
            for source, target, cuts in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass_on, args=(source, target, submits, cuts), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, submits: threading.Event, cuts: bool) -> None:
        with source, target:
            while data := self._read(source):
                if b"INSERT INTO jobs " in data:
                    submits.set()
                if cuts and self.cut.is_set() and submits.is_set() and b"COMMIT\0" in data:
                    self.cut.clear()  # the server has committed; the client will never hear of it
                    break
                try:
                    target.sendall(data)
                except OSError:
                    break
            for end in (source, target):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _read(source: socket.socket) -> bytes:
        try:
            return source.recv(65536)
        except OSError:
            return b""


@pytest.mark.fault("F14", "F22")
def test_a_submit_whose_commit_went_unheard_is_safe_to_repeat(
    start_service: Start, postgresql_server: Postgresql, migrated_postgresql: str
) -> None:
    wire = Wire(postgresql_server.folder / ".s.PGSQL.5432")
    name = make_url(migrated_postgresql).database
    url = f"postgresql://repertory@127.0.0.1:{wire.port}/{name}?sslmode=disable"
    service = start_service(DATABASE_URL=url, **LONG).until_ready()
    about = {"json": {"org_id": "org", "conversations": [CONVERSATION]}, "headers": {"idempotency-key": "once"}}
    wire.cut.set()
    unheard = service.client.post("/training/start", **about)  # type: ignore[arg-type]
    assert (unheard.status_code, wire.cut.is_set()) == (503, False), unheard.text
    again = service.client.post("/training/start", **about)  # type: ignore[arg-type]
    assert (again.status_code, again.headers.get("idempotent-replayed")) == (200, "true"), again.text
    listed = [job["training_id"] for job in service.client.get("/training/jobs/org").json()["jobs"]]
    assert listed == [again.json()["training_id"]]
    service.until(listed[0], "running")  # with its conversations, which still had their pending name
    service.kill()
    wire.close()


# The disk


@pytest.mark.fault("F7")
@pytest.mark.parametrize("what", ["conversations", "upload", "database"])
def test_a_full_disk_is_a_503_and_leaves_no_half_file(start_service: Start, tmp_path: Path, what: str) -> None:
    with file_system(tmp_path / "disk", "size=8m") as disk:
        setting = {"DATABASE_URL": f"sqlite:///{disk}/db"} if what == "database" else {"DATASET_DIR": str(disk)}
        service = start_service(**setting, **SHORT).until_ready()
        kept = service.trained("org")
        body = {"org_id": "org", "conversations": [CONVERSATION] * 100}

        def send() -> httpx.Response:
            if what == "upload":
                file = {"file": ("export.json", json.dumps([{"role": "user"}] * 40000).encode())}
                return service.client.post("/datasets", data={"org_id": "org"}, files=file)
            return service.client.post("/training/start", json=body)

        with filled(disk):
            before = {path for path in disk.rglob("*") if path.is_file()}
            answer = send()
            expected = (503, "storage_unavailable") if what == "database" else (507, "storage_full")
            assert (answer.status_code, answer.json()["error"]["code"]) == expected, answer.text
            assert answer.json()["error"]["cure"]
            assert {path for path in disk.rglob("*") if path.is_file()} <= before
            assert service.client.get("/health").status_code == 200
            assert service.status(kept)["status"] == "completed"
        assert eventually(lambda: send().is_success)
        service.kill()


@pytest.mark.fault("F7")
@pytest.mark.parametrize("folder", ["CHECKPOINT_DIR", "FINETUNED_MODEL_DIR"])
def test_a_disk_that_fills_up_in_a_run_fails_the_job_and_nothing_else(
    start_service: Start, cache: Path, tmp_path: Path, folder: str
) -> None:
    with file_system(tmp_path / "disk", "size=64k") as disk:
        real = {"HOST_MODULE": "repertory.model.host", "MODEL_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
        service = start_service(DEFAULT_BASE_MODEL="tiny/llama-gqa", **real, **{folder: str(disk)}).until_ready()
        chats = [conversation(1, at).model_dump(mode="json", exclude_none=True) for at in range(20)]
        job = service.until(service.train("org", conversations=chats, num_epochs=1), "completed", "failed")
        assert job["status"] == "failed"
        assert job["error"]["code"].startswith("storage_")
        assert "No space left" in job["error"]["message"]
        answer = service.client.post("/generate?org_id=org", json={"message": "Hi", "model_id": "base"})
        assert answer.status_code == 200
        assert service.client.get("/models/org/list").json()["count"] == 0
        service.kill()


@pytest.mark.fault("F10")
def test_a_voice_damaged_on_disk_is_its_own_503(start_service: Start) -> None:
    service = start_service().until_ready()
    damaged, whole = service.trained("damaged"), service.trained("whole")
    adapter = service.folder / "models/finetuned/damaged" / damaged / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    answer = service.client.post("/generate?org_id=damaged", json={"message": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_damaged")
    other = service.client.post("/generate?org_id=whole", json={"message": "Hi"})
    assert other.json()["response"] == f"Hello from {whole}"
    assert service.client.get("/models/damaged/list").json()["count"] == 0


# What is printed


@contextmanager
def logging_to(disk: Path, **environment: str) -> Iterator[RunningService]:
    """A service whose output, and that of its hosts, goes to this disk."""
    folder = disk.with_name("service")
    folder.mkdir()
    (folder / "service.log").symlink_to(disk / "service.log")
    service = RunningService(folder, **environment)
    try:
        yield service
    finally:
        service.kill()


@contextmanager
def rotated(log: Path, above_bytes: int) -> Iterator[list[int]]:
    """Emptied again and again, as logrotate's copytruncate does. Yields the sizes that it had."""
    ended, sizes = threading.Event(), []

    def rotate() -> None:
        while not ended.wait(0.02):
            if (size := log.stat().st_size) > above_bytes:
                sizes.append(size)
                os.truncate(log, 0)

    rotating = threading.Thread(target=rotate)
    rotating.start()
    try:
        yield sizes
    finally:
        ended.set()
        rotating.join()


@pytest.mark.fault("F36")
def test_a_host_that_prints_without_end_costs_the_service_nothing(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=256m") as disk, logging_to(disk) as service:
        service.until_ready().trained("org")
        quiet = p99_seconds(service, "org", 5)
        assert service.stop() == 0
        tests = Path(__file__).parents[1]
        service.environment |= {
            "HOST_MODULE": "noisy_host",
            "PYTHONPATH": f"{tests.parent}:{tests.parent / 'src'}:{tests}",
        }
        service.start()
        with rotated(disk / "service.log", above_bytes=32 << 20) as printed:
            service.until_ready()
            p99_seconds(service, "org", 3)  # warms up
            process = psutil.Process(service.process.pid)
            memory = process.memory_info().rss
            assert p99_seconds(service, "org", 5) < 3 * quiet
            assert service.trained("org")
            assert process.memory_info().rss < 1.05 * memory
            assert service.client.get("/health").json()["status"] == "healthy"
        assert sum(printed) > 100e6
        assert b"\xff\xfe\x00\x1b[2J" in (disk / "service.log").read_bytes()


@pytest.mark.fault("F7")
def test_a_full_disk_of_the_log_costs_its_lines_and_nothing_else(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=1m") as disk, logging_to(disk) as service:
        service.until_ready()
        log = disk / "service.log"

        def is_silent() -> bool:
            before = log.stat().st_size
            service.trained("org")
            return log.stat().st_size == before

        with filled(disk):
            eventually(is_silent)
            (host,) = service.hosts()
            host.kill()
            eventually(lambda: service.client.get("/health").json()["status"] == "degraded")
            service.until_ready()
            service.trained("org")
        assert service.trained("org") in service.log
        assert service.stop() == 0


# Nothing leaks


@pytest.mark.fault("F37")
def test_hundreds_of_jobs_started_and_cancelled_leave_nothing_open(start_service: Start) -> None:
    service = start_service(**LONG).until_ready()
    process = psutil.Process(service.process.pid)

    def cycle(count: int) -> tuple[int, int]:
        for number in range(count):
            training_id = service.train(f"org-{number % 3}")
            if number % 10 == 0:
                service.until(training_id, "running")
            assert service.client.delete(f"/training/jobs/{training_id}").status_code == 200
        return process.num_fds(), process.num_threads()

    warm_fds, warm_threads = cycle(60)
    fds, threads = cycle(240)
    assert fds <= warm_fds + 3
    assert threads <= warm_threads + 2
    assert left_over(service) == []
    eventually(lambda: not list(service.folder.glob("models/checkpoints/*/*")))


def test_a_watcher_that_goes_away_leaves_nothing_open(start_service: Start) -> None:
    service = start_service(**LONG).until_ready()
    training_id = service.train("org")
    process = psutil.Process(service.process.pid)

    def watch(count: int) -> None:
        for _ in range(count):
            headers = {"accept": "text/event-stream"}
            with service.client.stream("GET", f"/training/{training_id}/events", headers=headers) as response:
                next(response.iter_lines())

    watch(10)
    warm: Any = process.num_fds()
    watch(40)
    eventually(lambda: process.num_fds() <= warm + 2)
