"""A newcomer's first minutes: start the service, learn a real person's voice, hear it beside the base.

Everything goes over REST, as any client would do it. The service is left running.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from repertory.data import chitchat
from repertory.data.conversations import Conversation
from repertory.errors import Conflict, ErrorInfo, JobFailed, RepertoryError, Unavailable

ORG_ID = "demo"
PERSON = "549cc1d1-270e-4a53-b561-133a8d0086b4"  # 567 chats; lower case and short bursts, so the voice is easy to hear
QUESTIONS = ["Hey, what's up?", "What did you do this weekend?", "Do you like pizza?"]
REPLY_TOKENS = 60
LOG = Path("./models/service.log")

START_SECONDS = 600.0  # the first start may have to fetch and convert the base model
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
PLAIN_LINE_SECONDS = 10.0  # between progress lines where there is no terminal

JsonObject = dict[str, Any]  # a response body; the wire contract is docs/architecture.md


@dataclass(frozen=True, kw_only=True)
class Lesson:
    conversations: int
    epochs: int


FULL = Lesson(conversations=200, epochs=2)
QUICK = Lesson(conversations=100, epochs=1)


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """One look at a running job."""

    status: str
    phase: str  # what it does within its status
    progress: float  # 0 to 1
    step: int | None
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None

    @property
    def facts(self) -> str:
        facts = []
        if self.step is not None and self.total_steps is not None:
            facts.append(f"step {self.step}/{self.total_steps}")
        if self.loss is not None:
            facts.append(f"loss {self.loss:.3f}")
        if self.tokens_per_second is not None:
            facts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.eta_seconds is not None:
            facts.append(f"{_minutes(self.eta_seconds)} left")
        return " · ".join(facts)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Held-out perplexity: how surprised a model is by replies of the person that it has never seen."""

    base: float
    voice: float
    conversations: int | None


class ServiceUnreachable(Unavailable):
    """Nobody answers, or somebody else does."""

    code = "service_unreachable"


class Detached(RepertoryError):
    """The user pressed Ctrl-C."""

    code = "cancelled"


class ServiceProcess:
    """A service of our own, in its own session, so that it outlives the demo."""

    def __init__(self, port: int) -> None:
        with _opened_log() as log:
            self._first_byte = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "repertory.cli", "serve"],
                env=os.environ | {"PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises ServiceUnreachable if it has ended."""
        code = self._process.poll()
        if code is None:
            return
        said = LOG.read_bytes()[self._first_byte :].decode(errors="replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()][-5:]
        raise ServiceUnreachable(
            f"the service ended with exit code {code} while starting. Its last words: {' | '.join(lines) or 'none'}",
            cure=f"Read {LOG} and start again; `make run` shows the same on the terminal.",
        )

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Client:
    """The few calls the demo makes. Every refusal is raised as the error that the service sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        # No proxy from the environment: the service is on this machine.
        self._http = httpx.Client(base_url=url, timeout=300, trust_env=False)

    def health(self) -> JsonObject | None:
        """What the service says of itself; None if nobody listens."""
        try:
            response = self._http.get("/api/v1/health", timeout=10)
        except httpx.ConnectError:
            return None
        except httpx.HTTPError as failure:
            raise self._taken(str(failure) or type(failure).__name__) from failure
        try:
            health = response.json()
        except ValueError:
            health = None
        if not isinstance(health, dict) or health.get("status") not in ("starting", "healthy", "degraded"):
            raise self._taken(f"HTTP {response.status_code} from /api/v1/health")
        return health

    def start_training(self, conversations: list[Conversation], epochs: int) -> str:
        body = {
            "org_id": ORG_ID,
            "conversations": [piece.model_dump(mode="json", exclude_none=True) for piece in conversations],
            "num_epochs": epochs,
        }
        return str(self._call("POST", "/api/v1/training/start", json=body)["training_id"])

    def job(self, training_id: str) -> JsonObject:
        return self._call("GET", f"/api/v1/training/status/{training_id}")

    def evaluate(self, training_id: str) -> JsonObject:
        body = {"org_id": ORG_ID, "model_id": training_id}
        return dict(self._call("POST", "/api/v1/training/evaluate", json=body)["metrics"])

    def generate(self, question: str, model_id: str) -> str:
        body = {
            "message": question,
            "model_id": model_id,
            "temperature": 0.7,
            "max_tokens": REPLY_TOKENS,
            "seed": 1,  # the same replies at every demo of the same voice
        }
        return str(self._call("POST", "/api/v1/generate", params={"org_id": ORG_ID}, json=body)["response"])

    def _call(self, method: str, path: str, **request: Any) -> JsonObject:  # Any: whatever httpx takes
        """The body of a 2xx answer. A 503 is asked again for as long as a host may take to restart."""
        patience_ends = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                response = self._http.request(method, path, **request)
            except httpx.HTTPError as failure:
                raise ServiceUnreachable(
                    f"{self.url} does not answer: {failure or type(failure).__name__}",
                    cure=f"Is it running? Read {LOG}, or start it with `make run`.",
                ) from failure
            if response.is_success:
                return dict(response.json())
            if response.status_code != 503 or time.monotonic() > patience_ends:
                raise _refusal(response)
            time.sleep(min(10.0, float(response.headers.get("Retry-After", 2))))

    def _taken(self, answer: str) -> ServiceUnreachable:
        return ServiceUnreachable(
            f"something that is not Repertory listens on {self.url} ({answer})",
            cure="Stop it, or choose another port: make demo PORT=8301",
        )


def run(lesson: Lesson, port: int, console: Console) -> None:
    """The whole demo. Raises RepertoryError for everything that can go wrong on the way."""
    pieces = chitchat.voice(PERSON, lesson.conversations)
    client = Client(f"http://127.0.0.1:{port}")
    process = ServiceProcess(port) if client.health() is None else None
    training_id = None
    try:
        _wait_until_healthy(client, process, console)
        _introduce(pieces, lesson, console)
        training_id = client.start_training(pieces, lesson.epochs)
        job = _watch(client, training_id, console)
        _show_scores(_scores(client, training_id, job), console)
        _show_replies(client, training_id, console)
    except KeyboardInterrupt:
        raise _detached(client, process, training_id) from None
    _say_how_to_go_on(client, process, console)


def exit_code(error: RepertoryError) -> int:
    match error:
        case Detached():
            return 7
        case ServiceUnreachable():
            return 8
        case _ if error.status in (401, 403):
            return 4
        case _ if error.status == 404:
            return 3
        case _ if error.status in (400, 413, 422):
            return 5
        case Conflict() if error.code == "job_cancelled":
            return 7
        case JobFailed():
            return 6
        case _:
            return 1


def _wait_until_healthy(client: Client, process: ServiceProcess | None, console: Console) -> None:
    if process is None:
        console.print(f"Using the service that already runs at {client.url}.")
    else:
        console.print(f"Started the service at {client.url} (pid {process.pid}, log {LOG}).", soft_wrap=True)
    started = time.monotonic()
    told = ""
    try:
        with console.status("waiting for the host") as spinner:
            while True:
                if process is not None:
                    process.check()
                health = client.health() or {}
                if health.get("status") == "healthy":
                    break
                if health.get("status") == "degraded" and health.get("error"):
                    reason = ErrorInfo.model_validate(health["error"])
                    raise ServiceUnreachable(reason.message, code=reason.code, cure=reason.cure)
                seconds = time.monotonic() - started
                if seconds > START_SECONDS:
                    raise ServiceUnreachable(
                        f"after {seconds:.0f} s {client.url} still says: {health.get('status', 'nothing')}",
                        cure=f"Read {LOG}: it says what the host is waiting for.",
                    )
                doing = _doing(health)
                spinner.update(f"{doing} ({seconds:.0f} s)")
                if not console.is_terminal and doing != told:
                    console.print(f"{doing} …")
                    told = doing
                time.sleep(POLL_SECONDS)
    except (KeyboardInterrupt, ServiceUnreachable):
        if process is not None:
            process.stop()
        raise
    console.print(f"The base model is ready ({time.monotonic() - started:.0f} s).")


def _opened_log() -> IO[bytes]:
    try:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        return LOG.open("ab")
    except OSError as failure:
        raise RepertoryError(
            f"cannot write {LOG}: {failure.strerror}",
            code="not_writable",
            cure="Run the demo where ./models can be written, with space for a gigabyte.",
        ) from failure


def _doing(health: JsonObject) -> str:
    phases = [str(host.get("phase") or "") for host in health.get("hosts", [])]
    return next(filter(None, phases), "waiting for the host")


def _introduce(pieces: list[Conversation], lesson: Lesson, console: Console) -> None:
    replies = [message.content for piece in pieces for message in piece.messages if message.role == "assistant"]
    heard = [reply for reply in replies if 20 <= len(reply) <= 60 and "\n" not in reply][:3]
    console.print()
    console.print(
        f"Learning the voice of a real person from {len(pieces)} of their conversations, "
        f"{lesson.epochs} epoch{'s' if lesson.epochs > 1 else ''}. They write like this:",
        soft_wrap=True,
    )
    for reply in heard:
        console.print(f"  “{reply}”", markup=False, highlight=False)
    console.print()


def _watch(client: Client, training_id: str, console: Console) -> JsonObject:
    """Show the job until it is completed. Raises JobFailed with the service's reason if it fails."""
    started = time.monotonic()
    with _progress_shown(console) as show:
        while True:
            job = client.job(training_id)
            look = _look(job)
            show(look)
            if look.status in ("completed", "failed", "cancelled"):
                break
            time.sleep(POLL_SECONDS)
    if look.status == "failed":
        error = job.get("error") or {}
        raise JobFailed(
            f"{training_id} failed: {error.get('message', 'no reason was given')}",
            code=error.get("code"),
            cure=error.get("cure"),
        )
    if look.status == "cancelled":
        raise Conflict(f"{training_id} was cancelled", code="job_cancelled", cure="Start again with `make demo`.")
    console.print(f"Learned in {_minutes(time.monotonic() - started)}.")
    return job


def _look(job: JsonObject) -> Progressed:
    metadata = job.get("metadata") or {}
    return Progressed(
        status=str(job["status"]),
        phase=str(metadata.get("phase") or job["status"]),
        progress=float(job["progress"]),
        step=metadata.get("step"),
        total_steps=metadata.get("total_steps"),
        loss=metadata.get("loss"),
        tokens_per_second=metadata.get("tokens_per_second"),
        eta_seconds=metadata.get("eta_seconds") if metadata.get("phase") == "training" else None,
    )


class Show(Protocol):
    def __call__(self, look: Progressed, /) -> None: ...


@contextmanager
def _progress_shown(console: Console) -> Iterator[Show]:
    """A live bar on a terminal; elsewhere a line at each change of phase and every few seconds."""
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=1.0, facts="")

        def show(look: Progressed) -> None:
            bar.update(task, description=look.phase, completed=look.progress, facts=look.facts)

        yield show


def _plain_lines(console: Console) -> Show:
    phase = ""
    told = ""
    told_at = 0.0

    def show(look: Progressed) -> None:
        nonlocal phase, told, told_at
        now = time.monotonic()
        line = f"{look.phase:<12} {look.progress:4.0%}  {look.facts}".rstrip()
        if line == told or (look.phase == phase and now - told_at < PLAIN_LINE_SECONDS):
            return
        phase, told, told_at = look.phase, line, now
        console.print(line, highlight=False)

    return show


def _scores(client: Client, training_id: str, job: JsonObject) -> Scores:
    """From the job's own report, or measured now where it carries none."""
    metadata = job.get("metadata") or {}
    report = metadata.get("report") or metadata.get("evaluation") or {}
    if "base_perplexity" not in report:
        report = client.evaluate(training_id)
    return Scores(
        base=float(report["base_perplexity"]),
        voice=float(report["perplexity"]),
        conversations=report.get("scored_conversations"),
    )


def _show_scores(scores: Scores, console: Console) -> None:
    on = f" on {scores.conversations} conversations" if scores.conversations else ""
    table = Table()
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("change", justify="right")
    table.add_row("base", f"{scores.base:.1f}", "")
    table.add_row("new voice", f"{scores.voice:.1f}", f"{scores.voice / scores.base - 1:+.0%}")
    console.print(f"\nHeld-out perplexity{on} (lower is better)")
    console.print(table)


def _show_replies(client: Client, training_id: str, console: Console) -> None:
    console.print()
    with console.status("asking both"), ThreadPoolExecutor(max_workers=2 * len(QUESTIONS)) as asking:
        # All at once: the service answers them in one batch over one base model.
        base = [asking.submit(client.generate, question, "base") for question in QUESTIONS]
        voice = [asking.submit(client.generate, question, training_id) for question in QUESTIONS]
    table = Table(show_lines=True)
    for heading in ("question", "base", "new voice"):
        table.add_column(heading, ratio=1 if heading == "question" else 2, overflow="fold")
    for question, plain, learned in zip(QUESTIONS, base, voice, strict=True):
        table.add_row(Text(question), Text(plain.result()), Text(learned.result()))
    console.print("The same questions to both")
    console.print(table)


def _detached(client: Client, process: ServiceProcess | None, training_id: str | None) -> Detached:
    if training_id is None:
        return Detached("Stopped before anything was learned.", cure="Start again with `make demo`.")
    return Detached(
        f"No longer watching {training_id}; the service goes on with it.",
        cure=f"Look at it: curl {client.url}/api/v1/training/status/{training_id}\n"
        f"Cancel it: curl -X DELETE {client.url}/api/v1/training/jobs/{training_id}\n"
        f"{_how_to_stop(process)}",
    )


def _say_how_to_go_on(client: Client, process: ServiceProcess | None, console: Console) -> None:
    console.print()
    console.print("Go on:")
    console.print(
        f'curl -X POST "{client.url}/api/v1/generate?org_id={ORG_ID}" -H "Content-Type: application/json" '
        '-d \'{"message": "What is your favorite movie?"}\'',
        soft_wrap=True,  # one line, so that it can be copied
        markup=False,
        highlight=False,
    )
    console.print(
        f"\nThe service keeps running at {client.url}. {_how_to_stop(process)}", soft_wrap=True, highlight=False
    )


def _how_to_stop(process: ServiceProcess | None) -> str:
    if process is None:
        return "The service was running before; stop it where it was started."
    return f"Stop the service: kill {process.pid}"


def _refusal(response: httpx.Response) -> RepertoryError:
    try:
        sent = dict(response.json()["error"])
        info = ErrorInfo(
            code=str(sent["code"]), message=str(sent["message"]), cure=str(sent["cure"]), status=response.status_code
        )
    except (ValueError, KeyError, TypeError):
        return RepertoryError(f"{response.request.url} answered HTTP {response.status_code}", cure=f"Read {LOG}.")
    error = RepertoryError.from_info(info)
    error.status = info.status
    return error


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
