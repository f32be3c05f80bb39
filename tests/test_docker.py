"""Dockerfile, entrypoint and compose.yaml, read and linted; tests/slow/test_docker.py carries them out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dockerfile
import pytest
import yaml

from container_image import context
from repertory.model.bundled import PACKAGE
from repertory.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()
FOREIGN = {"PATH", "HOME", "NVIDIA_REQUIRE_CUDA", "UV_PYTHON_INSTALL_DIR"}  # no settings of ours


def problems(text: str) -> set[str]:
    """What a reviewer would not let pass, by the number of hadolint's rule where it has one."""
    steps = dockerfile.parse_string(text)
    found = set()
    images = [step.value for step in steps if step.cmd == "FROM"]
    defaults = dict(step.value[0].split("=", 1) for step in steps if step.cmd == "ARG" and "=" in step.value[0])
    stages = {value[2] for value in images if len(value) == 3}
    for image, *_ in images:
        named = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image)
        if not re.fullmatch(r"[^:@]+:[\w.-]*\d[\w.-]*", named):
            found.add("DL3006/3007: an image without a version")
    last = max(at for at, step in enumerate(steps) if step.cmd == "FROM")
    for at, step in enumerate(steps):
        value = " ".join(step.value)
        if step.cmd in ("ENTRYPOINT", "CMD") and not step.json:
            found.add("DL3025: not in JSON form, so a shell would take the signals")
        if step.cmd == "ADD":
            found.add("DL3020: ADD where COPY would do")
        if step.cmd == "WORKDIR" and not value.startswith("/"):
            found.add("DL3000: a relative WORKDIR")
        if step.cmd == "MAINTAINER":
            found.add("DL4000: MAINTAINER")
        if step.cmd in ("ENV", "ARG") and re.search(r"TOKEN|PASSWORD|SECRET|API_KEY", value):
            found.add("a secret in a layer")
        if step.cmd == "COPY" and any(name in (".", "./") for name in step.value[:-1]):
            found.add("COPY of everything")
        if step.cmd == "RUN":
            if re.search(r"\bsudo\b", value):
                found.add("DL3004: sudo")
            if re.search(r"(^|&&|;)\s*cd\s", value):
                found.add("DL3003: cd where WORKDIR would do")
            if "apt-get install" in value and ("rm -rf /var/lib/apt/lists" not in value or "-recommends" not in value):
                found.add("DL3009/3015: lists kept, or recommended packages installed")
            if re.search(r"pip install", value) and at > last:
                found.add("DL3042: pip in the last stage leaves its cache there")
            if re.search(r"curl[^|]*\|\s*(ba)?sh", value):
                found.add("a script from the network, run unseen")
        origin = [flag.partition("=")[2] for flag in step.flags if flag.startswith("--from=")]
        if step.cmd == "COPY" and origin and origin[0] not in stages:
            found.add("DL3022: COPY --from a stage that is not there")
    kinds = [step.cmd for step in steps[last:]]
    found |= {f"no {kind} in the last stage" for kind in ("HEALTHCHECK", "ENTRYPOINT", "CMD") if kind not in kinds}
    return found


def test_the_dockerfile_is_clean() -> None:
    assert problems(DOCKERFILE) == set()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("uv:0.13.8", "uv:latest", "DL3006"),
        ("12.6.3-runtime-ubuntu22.04", "runtime", "DL3006"),
        ('CMD ["python", "-m", "src.main"]', "CMD python -m src.main", "DL3025"),
        ("COPY src src", "ADD src src", "DL3020"),
        ("WORKDIR /app", "WORKDIR app", "DL3000"),
        ("HOST=0.0.0.0", "HUGGINGFACE_TOKEN=hf_x", "secret"),
        ("COPY src src", "COPY . .", "COPY of everything"),
        ("RUN useradd", "RUN sudo useradd", "DL3004"),
        ("RUN useradd", "RUN cd /tmp && useradd", "DL3003"),
        ("RUN useradd", "RUN apt-get update && apt-get install -y curl && useradd", "DL3009"),
        ("RUN useradd", "RUN pip install repertory && useradd", "DL3042"),
        ("RUN useradd", "RUN curl https://x.example/install | sh && useradd", "from the network"),
        ("--from=build /opt/venv", "--from=builder /opt/venv", "DL3022"),
        ("HEALTHCHECK --interval", "LABEL x=1\n# --interval", "no HEALTHCHECK"),
    ],
)
def test_the_lint_finds(old: str, new: str, problem: str) -> None:
    assert old in DOCKERFILE
    assert any(problem in found for found in problems(DOCKERFILE.replace(old, new)))


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "shellcheck comes with the dev dependencies"
    done = subprocess.run(
        [shellcheck, "docker/entrypoint.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert (ROOT / "docker/entrypoint.sh").stat().st_mode & 0o111


def test_the_build_sees_what_it_copies_and_nothing_to_keep(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "models", ".*_cache"))
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    (copy / ".gitignore").unlink()  # Docker does not read it
    for name in (".env", "models/finetuned/org/voice", "src/repertory/__pycache__/x.pyc", "docker/.env"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("not for the image")
    seen = set(context(copy))
    for step in dockerfile.parse_string(DOCKERFILE):
        if step.cmd == "COPY" and not step.flags:
            for name in step.value[:-1]:
                assert any(path == name or path.startswith(f"{name}/") for path in seen), name
    assert {path.partition("/")[0] for path in seen} == {
        "docker", "LICENSE", "README.md", "pyproject.toml", "requirements.lock", "src"
    }  # fmt: skip
    assert not [path for path in seen if (copy / path).read_bytes() == b"not for the image"]


def test_the_image_is_the_one_that_the_rest_of_the_project_speaks_of() -> None:
    steps = dockerfile.parse_string(DOCKERFILE)
    arguments = dict(step.value[0].split("=") for step in steps if step.cmd == "ARG")
    assert re.fullmatch(r"nvidia/cuda:12\.\d+\.\d+-runtime-ubuntu22\.04", arguments["BASE_IMAGE"])
    release, build = arguments["TORCH"].split("+")
    assert build.startswith("cu12"), "a CUDA 13 build would refuse the drivers of CUDA 12"
    assert f"CPU_TORCH := torch=={release}\n" in MAKEFILE
    assert PACKAGE in DOCKERFILE
    assert "--python 3.11" in DOCKERFILE
    environment: dict[str, str] = {}
    for step in steps:
        if step.cmd == "ENV":
            environment |= dict(zip(step.value[::2], step.value[1::2], strict=True))
    assert {name.lower() for name in environment if name not in FOREIGN} <= set(Settings.model_fields)
    assert environment["NVIDIA_REQUIRE_CUDA"] == "cuda>=12.1"
    [port] = [step.value for step in steps if step.cmd == "EXPOSE"]
    assert port == (str(Settings.model_fields["port"].default),)


def test_everything_to_keep_lies_in_the_volume() -> None:
    [volume] = [step.value[0] for step in dockerfile.parse_string(DOCKERFILE) if step.cmd == "VOLUME"]
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    folders = [Path("/app") / default for name, default in defaults.items() if name.endswith("_dir")]
    folders.append(Path("/app") / defaults["database_url"].removeprefix("sqlite:///"))
    assert len(folders) == 5
    assert all(folder.is_relative_to(volume) for folder in folders)


@pytest.mark.parametrize(
    "command",
    [
        "docker build -t wavestack-ml-training .",
        "docker run --gpus all -p 8300:8300 -v $(pwd)/models:/app/models wavestack-ml-training",
    ],
)
def test_the_readme_has_the_commands(command: str) -> None:
    assert f"\n{command}\n" in README


def test_compose_follows_the_schema(tmp_path: Path) -> None:
    def validated(text: str) -> int:
        (tmp_path / "compose.yaml").write_text(text)
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
        return subprocess.run([*command, tmp_path / "compose.yaml"], capture_output=True, check=False).returncode

    text = (ROOT / "compose.yaml").read_text()
    assert validated(text) == 0
    assert validated(text.replace("stop_grace_period", "stop_graceperiod")) != 0


def test_compose_has_a_gpu_a_cpu_and_a_postgresql_profile() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    by_profile = {profile: name for name, service in services.items() for profile in service["profiles"]}
    assert set(by_profile) == {"gpu", "cpu", "postgres"}
    gpu, cpu = services[by_profile["gpu"]], services[by_profile["cpu"]]
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert "deploy" not in cpu
    assert cpu["networks"]["default"]["aliases"] == [by_profile["gpu"]]
    assert cpu["build"]["args"]["TORCH"].endswith("+cpu")
    assert services[by_profile["postgres"]]["image"].startswith("postgres:")
    assert "ports" not in services[by_profile["postgres"]]


def test_compose_agrees_with_image_and_settings() -> None:
    port = str(Settings.model_fields["port"].default)
    arguments = {step.value[0].partition("=")[0] for step in dockerfile.parse_string(DOCKERFILE) if step.cmd == "ARG"}
    for service in COMPOSE["services"].values():
        if "build" not in service:
            continue
        assert set(service["build"].get("args", {})) <= arguments
        assert {name.lower() for name in service["environment"]} <= set(Settings.model_fields)
        assert service["environment"] == {"HOST": "0.0.0.0", "PORT": port}
        assert service["ports"] == [f"{port}:{port}"]
        assert service["volumes"] == ["./models:/app/models"]
        assert service["env_file"] == [{"path": ".env", "required": False}]
        assert not service.get("init"), "the service reaps its hosts, and nothing else is left behind"
