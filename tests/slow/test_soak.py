"""Everything at once and at random: ten minutes of it with `make soak`, one among the slow tests, on both databases.

Clients submit, cancel and talk while services and hosts are killed, stopped and frozen, the disk fills up and the
database is cut off. Afterwards every job has ended, every 2xx is accounted for, every invariant holds, and no process,
open file or temporary file is left.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
from sqlalchemy import select

from disks import file_system, filled
from postgresql import Postgresql
from repertory import manifest
from repertory.service.datasets import Datasets
from repertory.service.jobs import ACTIVE, COMES_FROM, TERMINAL, Jobs, Status
from repertory.service.store import Store, metrics
from running_service import CONVERSATION, RunningService, eventually, lives
from unlimited import unlimited

SECONDS = float(os.environ.get("SOAK_SECONDS", "60")) / 2  # on each database
SEED = int(os.environ.get("SOAK_SEED", "0"))
STEPS = 20
NOT_OURS = ("storage_failed", "storage_full", "host_crashed", "internal_error")  # how a job may fail here
NOT_NOW = (503, 507)
END_SECONDS = 180.0
SPARE_FILES = 12  # connections to the database that are kept for the next use


class Soak:
    """What is done to the services, and what they have answered. Clients call while the machine does its worst."""

    CALLS: ClassVar = {"submit": 3, "cancel": 1, "talk": 2}  # with their weights
    FAULTS: ClassVar = {
        "kill_host": 3,
        "kill_service": 2,
        "stop_service": 1,
        "freeze_service": 1,
        "fill_disk": 2,
        "cut_database": 2,
    }

    def __init__(self, services: list[RunningService], cut: Callable[[float], None], disk: Path) -> None:
        self.services = services
        self.cut = cut
        self.disk = disk
        self.random = random.Random(SEED)  # of the faults
        self.clients = random.Random(SEED)  # of the calls
        self.enough = threading.Event()
        self.numbers = itertools.count()
        self.unanswered: dict[str, str] = {}  # idempotency key -> organisation, of submits without an answer so far
        self.accepted: dict[str, tuple[str, str]] = {}  # idempotency key -> organisation, training id
        self.cancelled: set[str] = set()  # answered with 200
        self.to_be_cancelled: set[str] = set()  # asked for, whatever was answered
        self.processes: set[psutil.Process] = set()
        self.open_files: dict[int, int] = {}  # how many the services had at their last start
        self.done: dict[str, int] = {}
        self.ends: dict[str, int] = {}  # how many jobs came to each

    def run(self, seconds: float) -> None:
        with ThreadPoolExecutor(1) as clients:
            talking = clients.submit(self.be_clients)
            ends = time.monotonic() + seconds
            while time.monotonic() < ends and not talking.done():
                self.note_processes()
                self.act(self.random, self.FAULTS)
                time.sleep(self.random.random() * 2)
            self.enough.set()
            talking.result()

    def be_clients(self) -> None:
        while not self.enough.wait(self.clients.random() * 0.4):
            self.act(self.clients, self.CALLS)

    def act(self, chance: random.Random, kinds: dict[str, int]) -> None:
        (name,) = chance.choices(list(kinds), list(kinds.values()))
        self.done[name] = self.done.get(name, 0) + 1
        getattr(self, name)()

    # What clients do

    def submit(self) -> None:
        key = f"soak-{SEED}-{next(self.numbers)}"
        self.unanswered[key] = f"org-{self.clients.randrange(5)}"
        self.ask_for(key)

    def ask_for(self, key: str) -> None:
        org_id = self.unanswered[key]
        body = {"org_id": org_id, "conversations": [CONVERSATION]}
        answer = self.call("POST", "/training/start", json=body, headers={"idempotency-key": key})
        if answer is not None and answer.is_success:
            self.accepted[key] = (org_id, answer.json()["training_id"])
            del self.unanswered[key]

    def cancel(self) -> None:
        if not self.accepted:
            return
        _, training_id = self.clients.choice(list(self.accepted.values()))
        self.to_be_cancelled.add(training_id)
        answer = self.call("DELETE", f"/training/jobs/{training_id}")
        if answer is not None and answer.is_success:
            self.cancelled.add(training_id)

    def talk(self) -> None:
        org_id = f"org-{self.clients.randrange(5)}"
        answer = self.call("POST", f"/generate?org_id={org_id}", json={"message": "Hi"})
        if answer is not None and answer.is_success:
            assert answer.json()["response"].removeprefix("Hello from ") == answer.json()["model_info"]["model_id"]

    def call(self, method: str, path: str, **about: Any) -> httpx.Response | None:
        """None where the connection was lost. Nothing else is ever said but yes, no, and not now."""
        service = self.clients.choice(self.services)
        try:
            answer = httpx.request(method, f"{service.url}/api/v1{path}", timeout=20, trust_env=False, **about)
        except httpx.TransportError:
            return None
        assert answer.status_code < 500 or answer.status_code in NOT_NOW, (path, answer.text)
        assert answer.is_success or answer.status_code in (404, 409, *NOT_NOW), (path, answer.text)
        return answer

    # What the machine does

    def kill_host(self) -> None:
        hosts = [host for service in self.services for host in service.hosts()]
        if hosts:
            with suppress(psutil.NoSuchProcess):
                self.random.choice(hosts).kill()

    def kill_service(self) -> None:
        service = self.random.choice(self.services)
        service.kill()
        service.start()

    def stop_service(self) -> None:
        service = self.random.choice(self.services)
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < 30
        service.start()

    def freeze_service(self) -> None:
        """Past its lease now and then."""
        service = self.random.choice(self.services)
        frozen = [psutil.Process(service.process.pid), *service.hosts()]
        for process in frozen:
            process.suspend()
        time.sleep(self.random.choice([0.5, 1.0, 14.0]) if len(self.services) > 1 else 0.5)
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def fill_disk(self) -> None:
        with filled(self.disk):
            time.sleep(self.random.random() * 2)

    def cut_database(self) -> None:
        self.cut(self.random.random() * 3)

    def note_processes(self) -> None:
        for service in self.services:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(service.process.pid)
                self.processes |= {process, *process.children(recursive=True)}

    # Afterwards

    def settle(self) -> None:
        """Until every submit is answered and every job has ended."""
        for service in self.services:
            service.until_ready()
        ends = time.monotonic() + END_SECONDS + 2 * len(self.accepted)  # they are taken faster than they are run
        while self.unanswered:
            assert time.monotonic() < ends, f"never answered: {self.unanswered}"
            for key in list(self.unanswered):
                self.ask_for(key)
        for _, training_id in self.accepted.values():
            while self.services[0].status(training_id)["status"] not in TERMINAL:
                assert time.monotonic() < ends, self.services[0].status(training_id)
                time.sleep(0.1)
        for service in self.services:  # what a crash left behind is swept at a start
            assert service.stop() == 0
            service.start()
            service.until_ready()
            self.open_files[service.process.pid] = psutil.Process(service.process.pid).num_fds()

    def check_answers(self) -> None:
        client = self.services[-1].client
        for key, (org_id, training_id) in self.accepted.items():
            body = {"org_id": org_id, "conversations": [CONVERSATION]}
            again = client.post("/training/start", json=body, headers={"idempotency-key": key})
            assert (again.json()["training_id"], again.headers["idempotent-replayed"]) == (training_id, "true")
            job = self.services[-1].status(training_id)
            self.ends[job["status"]] = self.ends.get(job["status"], 0) + 1
            if training_id in self.cancelled:
                assert job["status"] == "cancelled"
            if job["status"] == "cancelled":
                assert training_id in self.to_be_cancelled
            if job["status"] == "failed":
                assert job["error"]["code"] in NOT_OURS, job["error"]
            if job["status"] == "completed":
                reply = client.post(f"/generate?org_id={org_id}", json={"message": "Hi", "model_id": training_id})
                assert reply.json()["response"] == f"Hello from {training_id}"
        for org_id in {org_id for org_id, _ in self.accepted.values()}:
            listed = [job["training_id"] for job in client.get(f"/training/jobs/{org_id}").json()["jobs"]]
            assert sorted(listed) == sorted(one for owner, one in self.accepted.values() if owner == org_id)

    def check_invariants(self, database_url: str) -> None:
        store = Store(database_url)
        jobs = Jobs(store, Datasets(self.disk / "datasets"), unlimited(store))
        with store.read() as connection:
            steps: dict[str, list[int]] = {}
            for job_id, step in connection.execute(select(metrics.c.job_id, metrics.c.step).order_by(metrics.c.step)):
                steps.setdefault(job_id, []).append(step)
        for org_id, training_id in self.accepted.values():
            job = jobs.get(training_id)
            events = jobs.events(training_id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            story = [Status(event.kind) for event in events if event.kind != "warning"]
            assert story[0] == Status.QUEUED
            assert all(before in COMES_FROM[after] for before, after in itertools.pairwise(story))
            assert job.status == story[-1]
            assert not set(story[:-1]) & set(TERMINAL)
            assert story.count(Status.PREPARING) == job.lease_epoch
            folder = self.disk / "finetuned" / org_id / training_id
            if job.status == Status.COMPLETED:
                assert manifest.verify(folder) is None
                assert steps[training_id] == list(range(1, STEPS + 1))
            assert len(set(steps.get(training_id, []))) == len(steps.get(training_id, []))
        assert not set(jobs.counts()) - {Status.QUEUED, *ACTIVE}
        assert sum(jobs.counts().values()) == 0
        store.close()

    def check_nothing_is_left(self, temporary: Path) -> None:
        for service in self.services:
            process = psutil.Process(service.process.pid)
            files = [file.path for file in process.open_files()]
            ours = ("datasets", "checkpoints", "finetuned")
            assert not [path for path in files if any(f"/{folder}/" in path for folder in ours)]
            before = self.open_files[service.process.pid]
            eventually(lambda process=process, before=before: process.num_fds() <= before + SPARE_FILES)
        for service in self.services:
            self.note_processes()
            assert service.stop() == 0
        eventually(lambda: not [one for one in self.processes if lives(one)])
        assert list(temporary.iterdir()) == []
        assert [path for path in self.disk.rglob("*") if path.name.endswith((".tmp", ".pending"))] == []
        assert list(self.disk.glob("checkpoints/*/*")) == []


@contextmanager
def services_on(database_url: str, disk: Path, folder: Path, count: int) -> Iterator[list[RunningService]]:
    temporary = folder / "tmp"
    temporary.mkdir()
    started = []
    try:
        for number in range(count):
            (folder / f"service-{number}").mkdir()
            environment = {
                "DATABASE_URL": database_url,
                "FINETUNED_MODEL_DIR": str(disk / "finetuned"),
                "CHECKPOINT_DIR": str(disk / "checkpoints"),
                "DATASET_DIR": str(disk / "datasets"),
                "API_KEY_SECRET_FILE": str(folder / "api_key_secret"),
                "TMPDIR": str(temporary),
                "MAX_CONCURRENT_TRAININGS": "8",
                "FAKE_HOST_STEPS": str(STEPS),
                "FAKE_HOST_STEP_SECONDS": "0.05",
            }
            started.append(RunningService(folder / f"service-{number}", **environment))
        yield started
    finally:
        for service in started:
            with suppress(ProcessLookupError):
                service.process.send_signal(signal.SIGCONT)
            service.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_whatever_happens_nothing_is_lost_and_nothing_is_left(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def lock(seconds: float) -> None:
        other = sqlite3.connect(tmp_path / "repertory.db", isolation_level=None)
        with closing(other), suppress(sqlite3.OperationalError):  # busy; so it is cut off already
            other.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)
            other.execute("ROLLBACK")

    def restart(seconds: float) -> None:
        with server.down():
            time.sleep(seconds)

    with file_system(tmp_path / "disk", "size=64m") as disk:
        if kind == "sqlite":
            database_url, cut, count = f"sqlite:///{tmp_path}/repertory.db", lock, 1
        else:
            server: Postgresql = request.getfixturevalue("postgresql_server")
            database_url, cut, count = request.getfixturevalue("migrated_postgresql"), restart, 2
        with services_on(database_url, disk, tmp_path, count) as services:
            for service in services:
                service.until_ready()
            soak = Soak(services, cut, disk)
            soak.run(SECONDS)
            soak.settle()
            soak.check_answers()
            soak.check_nothing_is_left(tmp_path / "tmp")
            soak.check_invariants(database_url)
    print(f"\n{kind}, seed {SEED}, {SECONDS:.0f} s: {soak.done}; jobs: {soak.ends}")
    assert soak.ends.get("completed")
