"""A Dockerfile carried out without a Docker engine, and its container run: for tests, on Linux, as root.

Every instruction is taken from the Dockerfile, in its order, with the paths that stand there: each stage has a root
folder of its own, and RUN happens in it, in a mount namespace, after chroot. The container is started the same way
with a process namespace besides, so that its command really is process 1.

Three things stand in for what only a registry has:
- the base image: the programs and libraries of this machine (/usr, without /usr/local, and a copy of /etc),
- the image of uv: the uv that is installed here,
- the Python that uv would download: the one that runs the tests.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import dockerfile
import psutil
import uv

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MACHINE = ("etc", "proc", "dev", "tmp", "root", "home", "opt", "usr/local/bin")
PASSED_ON = re.compile(r"PIP_.*|.*_CERT(_.*)?|.*_CA_.*|.*_proxy", re.IGNORECASE)  # how this machine reaches packages


def context(root: Path) -> dict[str, Path]:
    """What .dockerignore lets the build see: name in the context -> file."""
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others"], cwd=root, capture_output=True, text=True, check=True
    )
    return {name: root / name for name in listed.stdout.splitlines() if not _ignored(PurePosixPath(name), rules)}


def _ignored(name: PurePosixPath, rules: list[str]) -> bool:
    """The last rule that matches the name or a folder above it decides."""
    ignored = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        ways = [name, *name.parents][:-1]
        if pattern.startswith("**/"):
            hit = any(fnmatchcase(way.name, pattern.removeprefix("**/")) for way in ways)
        else:
            hit = any(way.match(f"/{pattern}") or PurePosixPath(f"/{way}").match(f"/{pattern}") for way in ways)
        if hit:
            ignored = not rule.startswith("!")
    return ignored


@dataclass
class Stage:
    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        known = self.arguments | self.environment
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known[match[1]], text)

    def inside(self, path: str) -> Path:
        return self.root / str(PurePosixPath(self.workdir) / self.expand(path)).lstrip("/")


class Image:
    """What `docker build` would make of the folder `source`, in `place`."""

    def __init__(self, source: Path, place: Path, **build_arguments: str) -> None:
        self._context = context(source)
        self._place = place
        self._stages: dict[str, Stage] = {}
        shared: dict[str, str] = {}  # ARGs before the first FROM
        for step in dockerfile.parse_file(str(source / "Dockerfile")):
            if step.cmd == "ARG":
                name, _, default = step.value[0].partition("=")
                (self.stage.arguments if self._stages else shared)[name] = build_arguments.get(name, default)
            elif step.cmd == "FROM":
                self._begin(Stage(place, arguments=shared).expand(step.value[0]), step.value[1:])
            else:
                getattr(self, f"_{step.cmd.lower()}")(step)

    @property
    def stage(self) -> Stage:
        return list(self._stages.values())[-1]

    def _begin(self, image: str, names: tuple[str, ...]) -> None:
        stage = Stage(self._place / f"stage-{len(self._stages)}")
        self._stages[names[1] if names else "last"] = stage
        if image.startswith("ghcr.io/astral-sh/uv:"):
            stage.root.mkdir()
            found = subprocess.run([uv.find_uv_bin(), "--version"], capture_output=True, text=True, check=True)
            assert found.stdout.split()[1] == image.rpartition(":")[2], "another uv than the Dockerfile's is installed"
            shutil.copy2(uv.find_uv_bin(), stage.root / "uv")
            return
        assert image.startswith(("nvidia/cuda:", "ubuntu:")), f"nothing stands in for {image}"
        for name in MACHINE:
            (stage.root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (stage.root / name).symlink_to(f"usr/{name}")
        (stage.root / "tmp").chmod(0o1777)
        shutil.copytree("/etc", stage.root / "etc", symlinks=True, dirs_exist_ok=True)
        _forget_people(stage.root / "etc")
        for path in _machine_paths():
            (stage.root / path.relative_to("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, step: dockerfile.Command) -> None:
        *sources, target = step.value
        to = self.stage.inside(target)
        origin = next((flag.partition("=")[2] for flag in step.flags if flag.startswith("--from=")), None)
        for source in sources:
            if origin is not None:
                source_path = self._stages[origin].inside(source)
                _copy(source_path, to / source_path.name if target.endswith("/") else to)
                continue
            files = [name for name in self._context if name == source or name.startswith(f"{source}/")]
            assert files, f"COPY {source}: not in the build context"
            for name in files:
                below = name.removeprefix(source).lstrip("/")
                _copy(self._context[name], to / below if below else to / name if target.endswith("/") else to)

    def _run(self, step: dockerfile.Command) -> None:
        stage = self.stage
        if "UV_PYTHON_INSTALL_DIR" in stage.environment:
            self._place_python(stage)
        environment = stage.environment | stage.arguments | {"HOME": "/root"}
        environment |= {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        done = subprocess.run(
            ["unshare", "--mount", "--", "sh", "-euc", self._enter(["/bin/sh", "-c", step.value[0]], environment)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"RUN {step.value[0]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def _place_python(self, stage: Stage) -> None:
        release = ".".join(str(part) for part in sys.version_info[:3])
        found = stage.inside(stage.environment["UV_PYTHON_INSTALL_DIR"]) / f"cpython-{release}-linux-x86_64-gnu" / "bin"
        found.mkdir(parents=True, exist_ok=True)
        link = found / "python3.11"
        if not link.is_symlink():
            link.symlink_to(Path(sys.base_prefix) / "bin" / "python3.11")

    def _env(self, step: dockerfile.Command) -> None:
        for name, value in zip(step.value[::2], step.value[1::2], strict=True):
            self.stage.environment[name] = self.stage.expand(value)

    def _workdir(self, step: dockerfile.Command) -> None:
        self.stage.inside(step.value[0]).mkdir(parents=True, exist_ok=True)
        self.stage.workdir = step.value[0]

    def _volume(self, step: dockerfile.Command) -> None:
        self.stage.volumes += step.value

    def _expose(self, step: dockerfile.Command) -> None:
        pass  # says something to people only

    def _healthcheck(self, step: dockerfile.Command) -> None:
        assert step.value[0] == "CMD"
        self.stage.healthcheck = list(step.value[1:])

    def _entrypoint(self, step: dockerfile.Command) -> None:
        self.stage.entrypoint = list(step.value)

    def _cmd(self, step: dockerfile.Command) -> None:
        self.stage.command = list(step.value)

    def start(
        self, mounted: Path, log: Path, *command: str, user: int = 0, writable: bool = True, **environment: str
    ) -> Container:
        """As `docker run --read-only --tmpfs /tmp --cap-drop … -v mounted:/app/models image command`."""
        stage = self.stage
        argv = [*stage.entrypoint, *(command or stage.command)]
        volume = stage.inside(stage.volumes[0])
        kept = "chown,dac_override,fowner,setgid,setuid"  # as in compose.yaml
        bounded = ["setpriv", f"--bounding-set=-all,+{kept.replace(',', ',+')}", "--no-new-privs"]
        if user:
            bounded += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        setup = f"""
            mount --bind {stage.root} {stage.root}
            {_binds(stage.root)}
            mount -o remount,ro,bind {stage.root}
            mount -t tmpfs -o mode=1777 tmpfs {stage.root}/tmp
            mount --bind {mounted} {volume}
            {"" if writable else f"mount -o remount,ro,bind {volume}"}
            mount -t proc proc {stage.root}/proc
        """
        entered = self._chroot([*bounded, *argv], stage.environment | environment)
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-euc", f"{setup}\n{entered}"],
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )
        return Container(self, process, log, environment)

    def _enter(self, argv: list[str], environment: dict[str, str]) -> str:
        root = self.stage.root
        cache = subprocess.run(
            [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        binds = [_binds(root)]
        if Path(cache).is_dir():
            (root / "root/.cache/pip").mkdir(parents=True, exist_ok=True)
            binds.append(f"mount --bind {cache} {root}/root/.cache/pip")
        return "\n".join([*binds, self._chroot(argv, environment)])

    def _chroot(self, argv: list[str], environment: dict[str, str]) -> str:
        variables = [f"{name}={value}" for name, value in environment.items()]
        inside = ["env", "--ignore-environment", f"--chdir={self.stage.workdir}", *variables, *argv]
        return f"exec chroot {self.stage.root} {shlex.join(inside)}"


@dataclass
class Container:
    image: Image
    process: subprocess.Popen[bytes]  # unshare; its one child is the container's process 1
    log: Path
    environment: dict[str, str]

    @property
    def init(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def healthcheck(self) -> int:
        """Exit status of the image's own command, with the environment that Docker would give it."""
        stage = self.image.stage
        setup = _binds(stage.root)
        chroot = self.image._chroot(stage.healthcheck, stage.environment | self.environment)
        command = ["unshare", "--mount", "--", "sh", "-euc", f"{setup}\n{chroot}"]
        return subprocess.run(command, capture_output=True, check=False).returncode

    def kill(self) -> None:
        self.process.kill()  # --kill-child takes process 1 with it, and that the rest
        self.process.wait()


def _machine_paths() -> list[Path]:
    """What the base image cannot have: this machine's Python, and where its pip finds packages on disk."""
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    named = {Path(path) for path in re.findall(r"(/(?!/)[^\s']+)", config.replace("://", ":"))}
    folders = {path for path in named if path.is_dir()} | {Path(sys.base_prefix)}
    return sorted(path for path in folders if not path.is_relative_to("/usr") and not path.is_relative_to("/etc"))


def _forget_people(etc: Path) -> None:
    """A base image has system users only."""
    people = {entry.pw_name for entry in pwd.getpwall() if 1000 <= entry.pw_uid < 60000}
    people |= {entry.gr_name for entry in grp.getgrall() if 1000 <= entry.gr_gid < 60000}
    for name in ("passwd", "shadow", "group", "gshadow"):
        lines = (etc / name).read_text().splitlines(keepends=True)
        (etc / name).write_text("".join(line for line in lines if line.partition(":")[0] not in people))


def _binds(root: Path) -> str:
    lines = [f"mount --rbind /dev {root}/dev"]
    for path in sorted(Path("/usr").iterdir()):
        if path.is_dir() and path.name != "local":
            (root / "usr" / path.name).mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --bind {path} {root}/usr/{path.name}")
    lines += [f"mount --bind {path} {root}{path}" for path in _machine_paths()]
    return "\n".join(lines)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, copy_function=os.link)
    else:
        shutil.copy2(source, target)
