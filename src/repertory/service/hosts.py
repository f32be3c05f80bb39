"""The hosts of this machine: one process for each base model in use, kept alive and found by its key.

Each host has a keeper, a thread that starts it, watches it and starts it again. A host that cannot be (the base model
is unknown, say) is given up, and its error remembered for a while. One that lacks memory gets the place of the host
that has been idle for longest, or waits until one is.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Literal, TextIO

import structlog

from repertory.catalogue import COMMIT, Catalogue
from repertory.contracts import BaseKey, Device, Download, HostHealth, Hyperparameters
from repertory.errors import ErrorInfo, InsufficientMemory, RepertoryError, Unavailable
from repertory.service.host_client import SILENCE_SECONDS, HostClient
from repertory.service.host_process import HostProcess
from repertory.settings import Settings

log = structlog.get_logger()

POLL_LOADING_SECONDS = 0.1
POLL_READY_SECONDS = 1.0
FIRST_BACKOFF_SECONDS = 0.5  # doubles with every crash in a row
LONGEST_BACKOFF_SECONDS = 30.0
CRASHES_FORGOTTEN_SECONDS = 60.0  # of good health
CRASHES_TO_GIVE_UP = 4  # in a row, without being ready once
FAILURE_REMEMBERED_SECONDS = 30.0
INTEREST_SECONDS = 30.0  # a host waits for memory only while somebody asks for it this often
RETRY_SECONDS = 2.0
DOWNLOAD_INTEREST_SECONDS = 8.0  # a download goes on only while somebody asks for it this often
LOCK = "lock"  # held by the process whose folder it is
MAX_SOCKET_FOLDER_BYTES = 80  # a Unix socket's path has at most 107


@dataclass(eq=False, kw_only=True)
class Host:
    """One base model on the device. Fields change under the lock of `Hosts`, by the keeper alone if not said."""

    name: str
    base_model: str  # as it was asked for
    is_default: bool
    socket: Path
    asked: BaseKey | None  # None: the first host
    key: BaseKey | None  # with the commit, once it is known; None: the first host, until it has told its device
    health: HostHealth = field(default_factory=lambda: HostHealth(state="loading"))
    phase: str = "waiting for its turn to load"  # while not ready: what is going on, for people
    is_ready: bool = False
    process: HostProcess | None = None
    crashes: int = 0  # in a row
    users: int = 0  # requests and runs on it; by whoever acquires and releases
    idle_since: float = field(default_factory=monotonic)
    wanted_at: float = field(default_factory=monotonic)  # by whoever asks
    stopping: threading.Event = field(default_factory=threading.Event)  # by whoever stops it
    keeper: threading.Thread | None = None

    @property
    def client(self) -> HostClient:
        return HostClient(self.socket)


@dataclass(frozen=True)
class Failure:
    error: ErrorInfo
    at: float

    @property
    def is_fresh(self) -> bool:
        return monotonic() - self.at < FAILURE_REMEMBERED_SECONDS


class Hosts:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder, self._folder_lock = _private_folder()
        self._changed = threading.Condition()  # guards all that follows, and tells when a host becomes idle or ends
        self._hosts: list[Host] = []
        self._failures: dict[BaseKey | None, Failure] = {}
        self._device: Device | None = None
        self._started = 0
        self._is_stopping = False
        self._catalogue = Catalogue(settings.model_cache_dir)

    def start(self) -> None:
        with self._changed:
            self._start(self._settings.default_base_model, key=None, is_default=True)

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            hosts = list(self._hosts)
            for host in hosts:
                _tell_to_stop(host)
            self._changed.notify_all()
        for host in hosts:
            _wait_for_end(host)
        shutil.rmtree(self._folder)
        self._folder_lock.close()

    # What callers want to know and have

    @property
    def device(self) -> Device | None:
        return self._device

    def key(self, base_model: str, hyperparameters: Hyperparameters) -> BaseKey:
        """Which host such a job belongs on. Raises Unavailable until the first host has said what the device is."""
        with self._changed:
            if self._device is None:
                self._raise_if_failed(None)
                if not any(host.is_default for host in self._hosts):
                    self._start(self._settings.default_base_model, key=None, is_default=True)
                raise _loading("The first host is starting and looks at the device.")
            return self._catalogue.pinned(BaseKey.resolve(base_model, hyperparameters, self._device))

    def acquire(self, key: BaseKey) -> Host:
        """A ready host with this key, which stays at least until it is released.

        Raises Unavailable while it is being started (which this sets off), and its error if it cannot be.
        """
        with self._changed:
            key = self._catalogue.pinned(key)
            host = self._find(key)
            if host is None:
                self._raise_if_failed(key)
                host = self._start(key.name, key, is_default=key == self._default_key())
            host.wanted_at = monotonic()
            if not host.is_ready:
                self._raise_if_failed(key)  # it crashes again and again
                raise _loading(f"{key.base_model} is not in memory yet: {host.phase}.")
            host.users += 1
            return host

    def acquire_any(self, key: BaseKey) -> Host:
        """A ready host, with this key if there is one, which stays at least until it is released.

        Starts none. Raises Unavailable while no host is ready.
        """
        with self._changed:
            ready = [host for host in self._hosts if host.is_ready]
            if not ready:
                self._raise_if_failed(self._default_key())
                raise _loading("No base model is in memory yet.")
            host = next((host for host in ready if host.key == key), ready[0])
            host.users += 1
            return host

    def release(self, host: Host) -> None:
        with self._changed:
            host.users -= 1
            if host.users == 0:
                host.idle_since = monotonic()
                self._changed.notify_all()

    def doubt(self, host: Host) -> None:
        """It has broken a connection: nobody gets it until it answers again, or its keeper has started it again."""
        with self._changed:
            host.is_ready = False

    def kill(self, host: Host) -> None:
        """For a host that hangs; its keeper starts it again."""
        with self._changed:
            process = host.process
        if process is not None:
            log.warning("host killed because it hangs", host=host.name, base_model=host.base_model)
            process.kill()

    def refresh(self) -> None:
        """Ask every ready host how it is, now."""
        for host in self.ready():
            health = host.client.health()
            if health is not None:
                with self._changed:
                    host.health = health

    def ready(self) -> list[Host]:
        with self._changed:
            return [host for host in self._hosts if host.is_ready]

    def all(self) -> list[Host]:
        with self._changed:
            return list(self._hosts)

    def downloads(self) -> dict[str, Download]:
        """Those in progress, by the name that was asked for."""
        with self._changed:
            found = {host.base_model: host.health.download for host in self._hosts}
        return {name: download for name, download in found.items() if download is not None}

    def is_downloading(self, key: BaseKey) -> bool:
        """Whether the host with this key is fetching its base model now."""
        with self._changed:
            host = self._find(self._catalogue.pinned(key))
            return host is not None and host.health.download is not None

    def loaded_adapters(self) -> set[str]:
        """Training ids of the adapters in any host's memory."""
        return {training_id for host in self.ready() for training_id in host.health.adapters}

    def status(self) -> Literal["starting", "healthy", "degraded"]:
        with self._changed:
            if any(host.crashes and not host.is_ready for host in self._hosts):
                return "degraded"
            if any(host.is_ready for host in self._hosts):
                return "healthy"
            return "starting" if self._hosts else "degraded"

    def last_failure(self) -> ErrorInfo | None:
        """The newest reason why some host could not be, while it is remembered."""
        with self._changed:
            fresh = [failure for failure in self._failures.values() if failure.is_fresh]
        return max(fresh, key=lambda failure: failure.at).error if fresh else None

    # With the lock held

    def _find(self, key: BaseKey) -> Host | None:
        exact = next((host for host in self._hosts if host.key == key), None)
        return exact or next((host for host in self._hosts if _may_become(host, key)), None)

    def _default_key(self) -> BaseKey | None:
        if self._device is None:
            return None
        default = BaseKey.resolve(self._settings.default_base_model, self._settings.hyperparameters, self._device)
        return self._catalogue.pinned(default)

    def _start(self, base_model: str, key: BaseKey | None, *, is_default: bool) -> Host:
        if self._is_stopping:
            raise Unavailable("The service is stopping.", code="shutting_down")
        self._started += 1
        name = f"host-{self._started}"
        socket = self._folder / f"{name}.sock"
        host = Host(name=name, base_model=base_model, asked=key, key=key, is_default=is_default, socket=socket)
        host.keeper = threading.Thread(target=self._keep, args=(host,), name=name, daemon=True)
        self._hosts.append(host)
        host.keeper.start()
        return host

    def _raise_if_failed(self, key: BaseKey | None) -> None:
        failure = self._failures.get(key)
        if failure is not None and failure.is_fresh:
            raise RepertoryError.from_info(failure.error)

    # A keeper's work, in the host's own thread

    def _keep(self, host: Host) -> None:
        """The life of a host. It starts in this thread each time, since it dies with the thread that forked it."""
        try:
            while not host.stopping.is_set():
                error = self._live_once(host)
                if error is not None and not self._made_room(host, error):
                    if not host.stopping.is_set():
                        self._remember(host, error)
                    return
        finally:
            with self._changed:
                self._hosts.remove(host)
                if not self._hosts and not host.is_default and not self._is_stopping:
                    # The default host had made room for this one.
                    self._start(self._settings.default_base_model, self._default_key(), is_default=True)
                self._changed.notify_all()

    def _live_once(self, host: Host) -> ErrorInfo | None:
        """From start to end of one process. Returns the error of one that cannot be."""
        with self._changed:
            if host.stopping.is_set():
                return None
            process = HostProcess(self._settings.host_module, host.base_model, host.key, host.socket)
            log.info("host started", host=host.name, base_model=host.base_model, pid=process.pid)
            host.process = process
            host.phase = "starting"
        error = self._watch(host, process, until_ready=True)
        ready_at = monotonic() if host.is_ready else None
        if ready_at is not None:
            error = self._watch(host, process, until_ready=False)
        with self._changed:
            host.is_ready, host.process = False, None
            ended = {"adapters": [], "runs": [], "running": 0, "waiting": 0, "download": None}
            host.health = host.health.model_copy(update=ended)
        process.end()
        if error is not None or host.stopping.is_set():
            return error
        return self._crashed(host, process, seconds_ready=None if ready_at is None else monotonic() - ready_at)

    def _watch(self, host: Host, process: HostProcess, *, until_ready: bool) -> ErrorInfo | None:
        """Until the process is ready, or ends, or should. Returns the error of one that says that it cannot be."""
        heard_at = monotonic()
        while not host.stopping.is_set():
            if process.has_ended(within_seconds=POLL_LOADING_SECONDS if until_ready else POLL_READY_SECONDS):
                return None
            health = process.client.health()
            if health is not None:
                heard_at = monotonic()
                error = self._hear(host, health)
                if health.download is not None and not host.is_default:
                    self._stop_unwanted_download(host)
                if error is not None or (until_ready and host.is_ready):
                    return error
            elif monotonic() - heard_at > SILENCE_SECONDS:
                self.kill(host)
        return None

    def _hear(self, host: Host, health: HostHealth) -> ErrorInfo | None:
        with self._changed:
            if self._device is None and health.device is not None:
                self._device = health.device
                log.info("device", **health.device.model_dump())
            host.key = health.key or host.key or self._default_key()
            host.health = health
            host.phase = health.phase or "loading"
            if health.state == "failed":
                return health.error or ErrorInfo(
                    code="host_failed", message=f"The host of {host.base_model} failed.", cure="See the service log."
                )
            if health.state == "ready" and not host.is_ready and not host.stopping.is_set():
                host.is_ready = True
                host.idle_since = monotonic()
                self._failures.pop(host.key, None)
                log.info("host ready", host=host.name, **host.key.model_dump() if host.key is not None else {})
                self._changed.notify_all()
        return None

    def _stop_unwanted_download(self, host: Host) -> None:
        """Nobody waits for it any more: the job was cancelled, say. What has come so far is kept."""
        with self._changed:
            if monotonic() - host.wanted_at > DOWNLOAD_INTEREST_SECONDS:
                log.info("download stopped, nobody waits for it", base_model=host.base_model)
                host.stopping.set()

    def _crashed(self, host: Host, process: HostProcess, *, seconds_ready: float | None) -> ErrorInfo | None:
        """Wait before the next start, longer each time. Returns an error if there is no hope."""
        message = f"The host of {host.base_model} ended unexpectedly ({process.exit})"
        with self._changed:
            is_first = seconds_ready is not None and seconds_ready > CRASHES_FORGOTTEN_SECONDS
            host.crashes = 1 if is_first else host.crashes + 1
            host.phase = "its host ended unexpectedly and is started again"
        log.error("host ended unexpectedly", host=host.name, exit=process.exit, crashes=host.crashes)
        if seconds_ready is None and host.crashes >= CRASHES_TO_GIVE_UP:
            error = ErrorInfo(
                code="host_crashed",
                message=f"{message} {host.crashes} times in a row while starting.",
                cure="The service log shows its last words. Most often memory is short: set USE_4BIT=true or choose a"
                " smaller base model.",
            )
            if not host.is_default:
                return error
            self._remember(host, error)  # but the default host is tried for ever
        host.stopping.wait(min(FIRST_BACKOFF_SECONDS * 2 ** (host.crashes - 1), LONGEST_BACKOFF_SECONDS))
        return None

    def _made_room(self, host: Host, error: ErrorInfo) -> bool:
        """If memory is what it lacks: the longest-idle other host ends. Waits while all others are in use."""
        if error.code != InsufficientMemory.code:
            return False
        with self._changed:
            victim = self._await_victim(host)
            if victim is None:
                return False
            victim.is_ready = False  # nobody gets it any more
            victim.phase = f"it makes room for {host.base_model}"
            _tell_to_stop(victim)
        log.info("host makes room", host=victim.name, base_model=victim.base_model, for_base_model=host.base_model)
        _wait_for_end(victim)
        return True

    def _await_victim(self, host: Host) -> Host | None:
        """An idle host. None if there is no other host, or once nobody wants this one any more."""
        while not host.stopping.is_set():
            others = [other for other in self._hosts if other.process is not None]
            idle = [other for other in others if other.is_ready and other.users == 0]
            if idle:
                return min(idle, key=lambda other: (other.is_default, other.idle_since))
            if not others:
                return None
            if monotonic() - host.wanted_at > INTEREST_SECONDS:
                host.stopping.set()
                return None
            names = ", ".join(sorted({other.base_model for other in others}))
            host.phase = f"waiting for memory until {names} is idle"
            self._changed.wait(timeout=1.0)
        return None

    def _remember(self, host: Host, error: ErrorInfo) -> None:
        failure = Failure(error, monotonic())
        with self._changed:
            # By every name it is asked for: the commit may have become known before it failed.
            for key in (host.asked, host.key, self._default_key() if host.is_default else host.key):
                self._failures[key] = failure
        log.error("host failed", host=host.name, base_model=host.base_model, code=error.code, message=error.message)


def _may_become(host: Host, key: BaseKey) -> bool:
    """Whether a host that has yet to learn its commit, or a key that has yet to get one, may be of the same weights."""
    if host.key is None or host.is_ready:
        return False
    known = [one.revision is not None and COMMIT.fullmatch(one.revision) for one in (host.key, key)]
    return not all(known) and host.key.model_copy(update={"revision": key.revision}) == key


def _tell_to_stop(host: Host) -> None:
    host.stopping.set()
    if host.process is not None:
        host.process.ask_to_end()


def _wait_for_end(host: Host) -> None:
    assert host.keeper is not None
    host.keeper.join()


def _loading(message: str) -> Unavailable:
    return Unavailable(message, code="model_loading", retry_after_seconds=RETRY_SECONDS)


def _private_folder() -> tuple[Path, TextIO]:
    """Of this process alone, so that nothing of an earlier one is in the way, and the lock that says that it lives.

    What killed processes have left is removed. Theirs are the folders whose lock is free: it goes with its process.
    """
    root = tempfile.gettempdir()
    short_enough = len(root.encode()) <= MAX_SOCKET_FOLDER_BYTES - len("/repertory-12345678")
    root = root if short_enough else "/tmp"
    for folder in Path(root).glob("repertory-*"):
        _remove_if_abandoned(folder)
    made = Path(tempfile.mkdtemp(prefix=".repertory-", dir=root))
    lock = (made / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return made.rename(made.with_name(made.name.removeprefix("."))), lock  # only a locked one is ever seen


def _remove_if_abandoned(folder: Path) -> None:
    try:
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:  # it lives, it is somebody else's, or it is no folder of ours
        return
