"""`Hosts` with real host processes; the fake host's base model names say how each behaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from repertory.contracts import BaseKey, Hyperparameters
from repertory.errors import BaseModelUnavailable, RepertoryError, Unavailable
from repertory.service import hosts as hosts_module
from repertory.service.hosts import Host, Hosts
from repertory.settings import Settings
from running_service import eventually

# httpcore drops a Unix socket that could not connect without closing it; reference counting closes it at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*<socket.socket.*family=1:pytest.PytestUnraisableExceptionWarning")


def key(base_model: str) -> BaseKey:
    return BaseKey(base_model=base_model, quantization="none", dtype="fp32")


@pytest.fixture
def hosts(clean_settings: Settings) -> Iterator[Hosts]:
    started = Hosts(clean_settings.model_copy(update={"default_base_model": "fake/base"}))
    started.start()
    eventually(started.ready)
    yield started
    started.stop()


def acquired(hosts: Hosts, base_model: str) -> Host:
    """Once it is ready."""

    def attempt() -> Host | None:
        try:
            return hosts.acquire(key(base_model))
        except Unavailable:
            return None

    host: Host = eventually(attempt)
    return host


def names(hosts: Hosts) -> list[str]:
    return [host.base_model for host in hosts.all()]


def refusal(hosts: Hosts, base_model: str) -> RepertoryError:
    """Once it is known that this host cannot be."""

    def attempt() -> RepertoryError | None:
        try:
            hosts.release(hosts.acquire(key(base_model)))
        except Unavailable:
            return None
        except RepertoryError as error:
            return error
        return None

    error: RepertoryError = eventually(attempt)
    return error


def test_the_default_host_tells_the_device_and_is_found_by_its_key(hosts: Hosts) -> None:
    assert hosts.key("fake/base", Hyperparameters()) == key("fake/base")
    assert hosts.acquire(key("fake/base")).is_default
    assert hosts.status() == "healthy"


def test_before_the_device_is_known_callers_are_told_to_come_again(clean_settings: Settings) -> None:
    hosts = Hosts(clean_settings)
    with pytest.raises(Unavailable) as later:
        hosts.key("fake/base", Hyperparameters())  # this starts the first host, should it not be there
    assert later.value.code == "model_loading"
    assert later.value.retry_after_seconds is not None
    assert hosts.status() == "starting"
    hosts.stop()


def test_another_base_model_gets_a_host_of_its_own(hosts: Hosts) -> None:
    with pytest.raises(Unavailable) as later:
        hosts.acquire(key("fake/other"))
    assert later.value.code == "model_loading"
    acquired(hosts, "fake/other")
    assert names(hosts) == ["fake/base", "fake/other"]


def test_a_base_model_that_cannot_be_loaded_is_refused_with_its_reason(hosts: Hosts) -> None:
    error = refusal(hosts, "fake/unavailable")
    assert isinstance(error, BaseModelUnavailable)
    assert "fake/unavailable" in error.message
    assert names(hosts) == ["fake/base"]


def test_a_failure_is_forgotten_after_a_while(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(hosts, "fake/unavailable")
    monkeypatch.setattr(hosts_module, "FAILURE_REMEMBERED_SECONDS", 0.0)
    with pytest.raises(Unavailable):  # it is tried once more
        hosts.acquire(key("fake/unavailable"))


def test_a_host_that_dies_while_loading_is_given_up(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "FIRST_BACKOFF_SECONDS", 0.01)
    assert refusal(hosts, "fake/dies").code == "host_crashed"


def test_a_dead_host_is_started_again(hosts: Hosts) -> None:
    host = acquired(hosts, "fake/base")
    assert host.process is not None
    dead = host.process.pid
    os.kill(dead, signal.SIGKILL)
    eventually(lambda: host.process is not None and host.process.pid != dead and host.is_ready)
    assert hosts.acquire(key("fake/base")) is host


@pytest.mark.fault("F18")
def test_a_hanging_host_is_killed_and_started_again(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(hosts_module, "POLL_READY_SECONDS", 0.05)
    monkeypatch.setattr("repertory.service.host_client.HEALTH_SECONDS", 0.2)
    host = acquired(hosts, "fake/base")
    assert host.process is not None
    hanging = host.process.pid
    os.kill(hanging, signal.SIGSTOP)
    eventually(lambda: host.process is not None and host.process.pid != hanging)
    monkeypatch.setattr(hosts_module, "SILENCE_SECONDS", 20.0)
    eventually(lambda: host.is_ready)


def test_for_lack_of_memory_the_idle_host_makes_room(hosts: Hosts) -> None:
    acquired(hosts, "fake/large")
    assert names(hosts) == ["fake/large"]
    assert hosts.status() == "healthy"


def test_the_default_host_comes_back_when_making_room_did_not_help(hosts: Hosts) -> None:
    assert refusal(hosts, "fake/too-large").code == "insufficient_memory"
    assert acquired(hosts, "fake/base").is_default


def test_a_host_in_use_is_waited_for(hosts: Hosts) -> None:
    used = acquired(hosts, "fake/base")

    def waits() -> bool:
        with pytest.raises(Unavailable) as reason:
            hosts.acquire(key("fake/large"))
        return "waiting for memory until fake/base is idle" in reason.value.message

    eventually(waits)
    assert used.is_ready
    hosts.release(used)
    acquired(hosts, "fake/large")


def test_the_one_idle_for_longest_goes_and_the_default_last(hosts: Hosts) -> None:
    for base_model in ("fake/b", "fake/a"):
        hosts.release(acquired(hosts, base_model))
    with hosts._changed:  # as if a large one had asked for room
        candidate = next(host for host in hosts.all() if host.base_model == "fake/b")
        asking = Host(name="asking", base_model="x", is_default=False, socket=candidate.socket, asked=None, key=None)
        assert hosts._await_victim(asking) is candidate


def test_a_wait_for_memory_ends_when_nobody_asks_any_more(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    acquired(hosts, "fake/base")
    monkeypatch.setattr(hosts_module, "INTEREST_SECONDS", 0.0)
    with pytest.raises(Unavailable):
        hosts.acquire(key("fake/large"))
    eventually(lambda: names(hosts) == ["fake/base"])
    assert hosts.last_failure() is None


def test_stopping_ends_all_processes_and_removes_the_sockets(clean_settings: Settings) -> None:
    hosts = Hosts(clean_settings.model_copy(update={"default_base_model": "fake/base"}))
    hosts.start()
    eventually(hosts.ready)
    acquired(hosts, "fake/other")
    pids = [host.process.pid for host in hosts.all() if host.process is not None]
    assert len(pids) == 2
    hosts.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not hosts._folder.exists()


def test_sockets_lie_in_a_private_folder_with_a_short_path(hosts: Hosts) -> None:
    assert hosts._folder.stat().st_mode & 0o777 == 0o700
    assert len(str(hosts.all()[0].socket)) < 107
