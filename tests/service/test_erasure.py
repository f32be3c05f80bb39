"""Deleting an organisation: nothing of it is left, on disk, in the database, in memory, and whatever cuts it off."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from repertory import manifest
from repertory.errors import Conflict
from repertory.service.datasets import Datasets
from repertory.service.erasure import ask, is_there
from repertory.service.keys import Scope
from repertory.service.service import Service
from repertory.service.store import Store, tables
from repertory.settings import Settings
from running_service import RunningService, eventually

from .conftest import submission

Start = Callable[..., RunningService]


def holding(folder: Path, words: list[str]) -> list[str]:
    """The files that hold one of the words, in their bytes or in their name."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{path}: {word}" for word in words if word.encode() in content or word in str(path)]
    return found


def test_nothing_of_a_deleted_organisation_is_left(start_service: Start) -> None:
    """While one of its jobs runs, one waits, an export lies there and a voice is in memory."""
    service = start_service(FAKE_HOST_STEPS="60", FAKE_HOST_STEP_SECONDS="0.05").until_ready()
    org, other = f"org-{secrets.token_hex(4)}", f"other-{secrets.token_hex(4)}"
    canaries = [f"canary{secrets.token_hex(8)}" for _ in range(6)]
    said, prompt, name, author, file_name, key_name = canaries
    conversation = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]}
    about = {"conversations": [conversation], "system_prompt": prompt, "name": name}
    trained = service.trained(org, **about)
    kept = service.trained(other)
    assert service.client.post(f"/generate?org_id={org}", json={"message": said}).status_code == 200
    running, waiting = service.train(org, **about), service.train(org, **about)
    service.until(running, "running")
    history = [{"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": author}]}]
    lines = "".join(json.dumps(one) + "\n" for one in history)
    sent = service.client.post(
        "/datasets", data={"org_id": org}, files={"file": (f"{file_name}.jsonl", lines, "application/json")}
    )
    assert sent.status_code == 202, sent.text
    operator = {"name": "operator", "scopes": ["admin"]}
    service.client.headers["authorization"] = (
        f"Bearer {service.client.post('/admin/keys', json=operator).json()['key']}"
    )
    made = service.client.post("/admin/keys", json={"name": key_name, "scopes": ["infer"], "org_id": org}).json()
    models = service.folder / "models"
    assert len({found.rpartition(": ")[2] for found in holding(models, canaries)}) == len(canaries), "planted"

    answer = service.client.delete(f"/admin/orgs/{org}")

    assert answer.status_code == 200, answer.text
    words = [*canaries, org, trained, running, waiting, made["key"].split("_")[2]]
    assert holding(models, words) == []
    assert [found for found in holding(service.folder, canaries) if "service.log" in found] == []
    assert service.client.delete(f"/admin/orgs/{org}").status_code == 404
    assert service.client.get(f"/training/status/{trained}").status_code == 404
    as_bot = {"authorization": f"Bearer {made['key']}"}
    assert service.client.post("/generate", json={"message": "Hi"}, headers=as_bot).status_code == 401
    eventually(lambda: service.client.get("/health").json()["loaded_models"] == 0)
    assert service.client.get("/health").json()["jobs"]["running"] == 0
    assert service.client.post(f"/generate?org_id={other}", json={"message": "Hi"}).status_code == 200
    assert service.status(kept)["status"] == "completed"
    service.trained(org)  # the name is free again
    assert "a deletion was cut off" not in service.log


def test_a_deletion_that_was_cut_off_goes_on_at_the_next_start(start_service: Start) -> None:
    service = start_service().until_ready()
    service.trained("org")
    service.kill()
    store = Store(f"sqlite:///{service.folder}/models/repertory.db")
    ask(store, "org")
    store.close()
    service.start()
    store = Store(f"sqlite:///{service.folder}/models/repertory.db", alone=False)
    eventually(lambda: not is_there(store, "org"))
    store.close()
    assert list((service.folder / "models").glob("*/org")) == []


@pytest.mark.parametrize("is_running", [True, False])
def test_the_command_deletes_with_and_without_a_service(start_service: Start, is_running: bool) -> None:
    service = start_service(FAKE_HOST_STEPS="1000").until_ready()
    service.until(service.train("org"), "running")
    if not is_running:
        service.kill()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "repertory.cli", "orgs", "delete", "org", "--yes"]
    said = subprocess.run(command, cwd=service.folder, env=environment, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "Nothing of org is left\n"), said.stderr
    assert list((service.folder / "models").glob("*/org")) == []
    again = subprocess.run(command, cwd=service.folder, env=environment, capture_output=True, text=True)
    assert again.returncode == 3


@pytest.fixture
def idle(clean_settings: Settings) -> Iterator[Service]:
    """Not started."""
    service = Service(clean_settings)
    yield service
    service.hosts.stop()
    service.store.close()


def test_while_it_is_deleted_nothing_new_is_accepted(idle: Service) -> None:
    idle.jobs.submit(submission())
    _, key = idle.keys.create(name="bot", org_id="org", scopes=[Scope.TRAIN])
    ask(idle.store, "org")
    with pytest.raises(Conflict) as refused:
        idle.jobs.submit(submission())
    assert refused.value.code == "organisation_deleted"
    with pytest.raises(Exception, match="revoked"):
        idle.keys.verify(key)
    idle.erasure.erase("org")
    idle.jobs.submit(submission())


def test_a_submit_that_a_whole_deletion_overtakes_is_refused(idle: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are gone by the time its row would be written."""
    idle.jobs.submit(submission())
    write = Datasets.write_pending

    def overtaken(self: Datasets, org_id: str, *about: object) -> None:
        write(self, org_id, *about)  # type: ignore[arg-type]
        ask(idle.store, org_id)
        idle.erasure.erase(org_id)

    monkeypatch.setattr(Datasets, "write_pending", overtaken)
    with pytest.raises(Conflict) as refused:
        idle.jobs.submit(submission())
    assert refused.value.code == "organisation_deleted"
    assert idle.jobs.of_organisation("org") == []


def test_it_is_answered_when_the_traces_in_the_database_are_gone_too(
    idle: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle.organisations.create("org")
    scrubbing, go_on = threading.Event(), threading.Event()

    def scrub() -> None:
        scrubbing.set()
        assert go_on.wait(60)

    monkeypatch.setattr(idle.store, "scrub", scrub)
    idle.erasure.start()
    with ThreadPoolExecutor(1) as caller:
        deleted = caller.submit(idle.erasure.delete, "org")
        assert scrubbing.wait(60)
        assert not is_there(idle.store, "org")
        with pytest.raises(TimeoutError):
            deleted.result(timeout=0.5)
        go_on.set()
        deleted.result(timeout=60)
    idle.erasure.stop()
    idle.erasure.join()


def test_deleting_the_only_keys_opens_nothing(idle: Service) -> None:
    idle.organisations.create("org")
    idle.keys.create(name="a name", org_id="org", scopes=[Scope.ORG_ADMIN])
    ask(idle.store, "org")
    idle.erasure.erase("org")
    assert idle.keys.are_required()
    (husk,) = idle.keys.list()
    assert (husk.org_id, husk.name, husk.scopes, husk.state) == (None, "", (), "revoked")


def test_every_table_is_of_organisations_or_of_jobs() -> None:
    """Or a deletion would pass it by."""
    for table in tables.sorted_tables:
        assert "org_id" in table.c or "job_id" in table.c, table.name


def test_a_disk_that_refuses_leaves_the_deletion_asked_for(idle: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job = idle.jobs.submit(submission()).job
    folder = idle.models.folder("org", job.id)
    manifest.write_durably(folder / "adapter_config.json", b"{}")
    ask(idle.store, "org")

    def refuse(_folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError("no")

    with monkeypatch.context() as refusing:
        refusing.setattr("shutil.rmtree", refuse)
        with pytest.raises(PermissionError):
            idle.erasure.erase("org")
    assert is_there(idle.store, "org")
    idle.erasure.erase("org")
    assert not folder.exists()
    assert not is_there(idle.store, "org")
