"""The real service as a process over real HTTP, with the fake host behind it; and its parts alone, for unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repertory.contracts import Hyperparameters
from repertory.data.conversations import Conversation, Message
from repertory.service.datasets import Datasets
from repertory.service.jobs import JobConfig, Jobs, Submission, request_hash
from repertory.service.organisations import Limits, Organisations
from repertory.service.quotas import Quotas
from repertory.service.store import Store
from repertory.settings import Settings
from running_service import RunningService


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One for all tests that leave it running; each has organisations of its own."""
    folder = tmp_path_factory.mktemp("service")
    running = RunningService(folder, MAX_CONCURRENT_TRAININGS="4", DEFAULT_ORG_ID="default_org").until_ready()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def slow_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Its runs take most of a minute, one at a time."""
    folder = tmp_path_factory.mktemp("slow-service")
    running = RunningService(folder, FAKE_HOST_STEPS="1000", FAKE_HOST_STEP_SECONDS="0.05").until_ready()
    yield running
    running.kill()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path / "datasets")


@pytest.fixture
def organisations(store: Store) -> Organisations:
    return Organisations(store, Limits())


@pytest.fixture
def quotas(store: Store, organisations: Organisations, tmp_path: Path) -> Quotas:
    return Quotas(store, organisations, tmp_path / "datasets", tmp_path / "finetuned")


@pytest.fixture
def jobs(store: Store, datasets: Datasets, quotas: Quotas) -> Jobs:
    return Jobs(store, datasets, quotas)


@pytest.fixture
def clean_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Untouched by the environment of whoever runs the tests."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return Settings(host_module="repertory.service.fake_host")


def submission(
    org_id: str = "org", request: str = "request", key: str | None = None, base_model: str = "fake/base"
) -> Submission:
    message = Message(role="assistant", content="Hey!")
    return Submission(
        org_id=org_id,
        base_model=base_model,
        config=JobConfig(hyperparameters=Hyperparameters(), validation_split=0.1),
        conversations=[Conversation(messages=[message])],
        metadata={"warnings": []},
        request_hash=request_hash(request),
        idempotency_key=key,
    )


@pytest.fixture
def submit(jobs: Jobs) -> Callable[..., str]:
    """Puts a job into the queue and returns its id."""
    return lambda *about, **more: jobs.submit(submission(*about, **more)).job.id
