"""What `repertory import` does: read an export, prepare it, and show on a terminal what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from repertory.contracts import BaseKey
from repertory.data.findings import MAX_FINDINGS, Findings
from repertory.data.history import History, ImportReport
from repertory.data.imports import TokenReport
from repertory.data.preparation.pipeline import PreparationReport, Prepared, PrepareOptions, prepare
from repertory.data.preparation.scratch import Scratch, line_of
from repertory.data.preparation.tokens import spans, token_report
from repertory.data.readers import DIALOGUES, detect, open_history
from repertory.data.readers.reading import ReadOptions
from repertory.data.render import Renderer
from repertory.errors import ErrorInfo, RepertoryError, Unavailable
from repertory.settings import Settings
from repertory.terminal import printable

MAX_BODY_BYTES = 64 << 20  # as the service has it
SHOWN_AUTHORS = 20
LOUDEST_AUTHORS = 5  # those in the report of a dataset that is prepared
SHOWN_FINDINGS = 20
DEFAULT_MAX_SEQ_LENGTH = 2048


def is_dialogue(path: Path, format: str) -> bool:
    """Whether the export is of conversations with an assistant, who is the persona unless somebody else is named."""
    return (detect(path) if format == "auto" else format) in DIALOGUES


def authors(path: Path, format: str, options: ReadOptions, console: Console) -> None:
    """Who speaks in the export, to choose the persona from."""
    with _history(path, format, options, console) as history:
        for _ in history:
            pass
        report = history.report
    _word(report.findings)
    table = Table("author", "id", "messages", "characters", "first", "last", "", box=None)
    ranked = sorted(report.authors.values(), key=lambda author: -author.messages)
    for author in ranked[:SHOWN_AUTHORS]:
        length = f"{author.characters / author.messages:.0f} each"
        cells = (author.name, author.id, f"{author.messages:,}", length, _day(author.first), _day(author.last))
        table.add_row(*(_shown(cell) for cell in cells), "bot" if author.is_bot else "")
    console.print(f"{report.format}: {report.messages:,} messages, {len(report.channels):,} channels", highlight=False)
    console.print(table)
    if len(ranked) > SHOWN_AUTHORS:
        console.print(f"and {len(ranked) - SHOWN_AUTHORS:,} more")
    _show_findings(report.findings, console)
    console.print("Choose whose voice to learn: --persona NAME, once for each of their accounts.", soft_wrap=True)


@contextmanager
def prepared(
    path: Path, format: str, options: ReadOptions, preparation: PrepareOptions, console: Console
) -> Iterator[tuple[Prepared, ImportReport]]:
    """The export, read and prepared; as long as the context lasts."""
    with Scratch() as scratch:
        with _history(path, format, options, console) as history:
            made = prepare(history, preparation, scratch)
        _word(history.report.findings)
        yield made, history.report


def write(prepared: Prepared, org_id: str, output: Path | None) -> Path:
    """The body of a training request, renamed into place when it is whole. Returns where it is."""
    name = re.sub(r"[^\w.-]+", "_", prepared.report.persona).strip("._") or "persona"
    output = output or Path(f"{name}.json")
    head = {"org_id": org_id, **({"system_prompt": prepared.system_prompt} if prepared.system_prompt else {})}
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head, ensure_ascii=False).removesuffix("}") + ', "conversations": [')
        told = zip(prepared.conversations, prepared.conversations.authors(), strict=True)
        for number, (conversation, authors) in enumerate(told):
            line = line_of(conversation.model_copy(update={"authors": authors}))
            file.write(f"{',' if number else ''}\n{line}")
        file.write("\n]}\n")
    partial.rename(output)
    return output


def start_command(body: Path, settings: Settings) -> str:
    """How to send it, or why it cannot be sent."""
    if body.stat().st_size > MAX_BODY_BYTES:
        return f"it is larger than the {MAX_BODY_BYTES >> 20} MiB that a request may have; import less of the history."
    url = f"http://localhost:{settings.port}/api/v1/training/start"
    return f"curl -X POST {url} -H 'Content-Type: application/json' -d @{quote(str(body))}"


def base_renderer(settings: Settings) -> Renderer | None:
    """Of the default base model's tokenizer. Raises BaseModelUnavailable."""
    from repertory.model.base import renderer_in  # torch takes seconds to import, and only this needs it
    from repertory.model.weights import locate_outline

    name = settings.default_base_model
    return renderer_in(locate_outline(BaseKey(base_model=name, quantization="none", dtype="fp32"), settings), name)


def measured(prepared: Prepared, renderer: Renderer, settings: Settings) -> TokenReport:
    limit = settings.max_seq_length or DEFAULT_MAX_SEQ_LENGTH
    return token_report(prepared.conversations, prepared.system_prompt, renderer, limit)


def show(report: PreparationReport, read: ImportReport, console: Console) -> None:
    """The report as tables."""
    console.print(f"{_shown(report.persona)}'s voice from {report.format}", highlight=False)
    stages = Table("stage", "of", "before", "after", "left out", box=None)
    for stage in report.stages:
        why = ", ".join(f"{reason} {count:,}" for reason, count in stage.dropped.items() if count)
        stages.add_row(stage.name, stage.unit, f"{stage.before:,}", f"{stage.after:,}", why)
    console.print(stages)

    style = report.style
    card = Table(box=None, show_header=False)
    pause = "none" if report.gap_seconds is None else f"{report.gap_seconds // 60} min"
    rows = {
        "conversations": f"{report.conversations:,} with {report.trained_turns:,} turns to learn",
        "session pause": f"{pause} ({report.gap_found_by})",
        "persona's share": f"{report.persona_share:.0%} of the messages",
        "authors": _loudest(read),
        "personal data": ", ".join(f"{kind} {count:,}" for kind, count in report.surrogates.items()) or "none found",
        "held out and trained": f"{report.leakage.same_exchange} of {report.leakage.held_out_turns:,} turns",
        "length": f"{style.median_characters:g} characters (median), {style.messages_per_turn:g} messages a turn",
        "case": f"{style.lower_case:.0%} without capitals, {style.capital_first:.0%} begin with one",
        "ends with": ", ".join(f"{end} {share:.0%}" for end, share in style.ends_with.items()),
        "emoji": f"in {style.emoji:.0%} of the messages: {' '.join(one for one, _ in style.top_emoji)}",
        "languages": ", ".join(f"{name} {share:.0%}" for name, share in style.languages.items()),
        "words": ", ".join(word for word, _ in style.top_words),
        "phrases": ", ".join(phrase for phrase, _ in style.top_phrases),
    }
    for name, value in rows.items():
        card.add_row(name, _shown(value))
    console.print(card)
    _show_findings(report.findings, console)


def _loudest(read: ImportReport) -> str:
    ranked = sorted(read.authors.values(), key=lambda author: -author.messages)
    named = ", ".join(f"{author.name} {author.messages:,}" for author in ranked[:LOUDEST_AUTHORS])
    return f"{named} and {len(ranked) - LOUDEST_AUTHORS:,} more" if len(ranked) > LOUDEST_AUTHORS else named


def show_tokens(tokens: TokenReport, base_model: str, console: Console) -> None:
    console.print(
        f"Tokens of a row ({_shown(base_model)}): half up to {tokens.p50:,}, 90% {tokens.p90:,}, 99% {tokens.p99:,}, "
        f"longest {tokens.longest:,}; {tokens.trained_share:.0%} are learned; {tokens.shortened:,} of "
        f"{tokens.measured:,} lose their oldest messages to fit {tokens.max_tokens:,}, {tokens.left_out:,} do not fit.",
        highlight=False,
        soft_wrap=True,
    )


def preview(prepared: Prepared, renderer: Renderer | None, settings: Settings, count: int, console: Console) -> None:
    """Some conversations, evenly spread, exactly as the model will see them; what is learned is green."""
    step = max(1, len(prepared.conversations) // count)
    for number, conversation in enumerate(prepared.conversations[: step * count : step]):
        console.rule(f"conversation {1 + step * number}")
        if renderer is None:
            said = [(f"{m.role}: {m.content}\n", m.is_trained) for m in conversation.messages]
        else:
            limit = settings.max_seq_length or DEFAULT_MAX_SEQ_LENGTH
            said = spans(conversation, prepared.system_prompt, renderer, limit)
        text = Text()
        for part, is_learned in said:
            # Without colours, as in a pipe, marks say the same.
            marked = f"⟦{part}⟧" if is_learned and console.color_system is None else part
            text.append(printable(marked), style="bold green" if is_learned else "dim")
        console.print(text, soft_wrap=True)


def _shown(text: str) -> str:
    """As rich takes it, without markup of whoever chose the text."""
    return escape(printable(text))


@contextmanager
def _history(path: Path, format: str, options: ReadOptions, console: Console) -> Iterator[History]:
    """The history, with a bar of the bytes that have been read."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("reading", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=min(done, total), total=total)

        with open_history(path, format, options, tell) as history:
            yield history


def forget(url: str, org_id: str, author: str, key: str) -> list[str]:
    """Ask the service to delete an author's words. Returns what is done about them, a line each.

    Raises what the service refuses it with, and Unavailable where none answers.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    asked = {"org_id": org_id, "author": author}
    try:
        answer = httpx.delete(f"{url}/api/v1/datasets/consent", params=asked, headers=headers, trust_env=False)
        said = dict(answer.json())
    except (httpx.HTTPError, ValueError) as error:
        cure = "Start it with `repertory serve`, or say where it is: --url http://HOST:PORT."
        raise Unavailable(f"no service answers at {url}", code="service_unreachable", cure=cure) from error
    if not answer.is_success:
        raise RepertoryError.from_info(ErrorInfo(status=answer.status_code, **said["error"]))
    return [
        *(f"{name} is written anew ({count:,} conversations with them)" for name, count in said["datasets"].items()),
        *(
            f"{name} is marked: it learned from these words ({count:,} conversations with them)"
            for name, count in said["trainings"].items()
        ),
        *(f"{name} could never be read: delete it if the words may be in it" for name in said["unread"]),
        *(
            f"{name} was sent conversations that do not say whose words are in them: look into those yourself"
            for name in said["unrecorded"]
        ),
    ]


def with_flags(cure: str) -> str:
    """Options as the command line has them, where a cure names them as a request does."""
    cure = cure.replace("day_first=true", "--day-first").replace("day_first=false", "--month-first")
    return re.sub(r"\b(persona|timezone|column)=", r"--\1 ", cure)


def _word(findings: Findings) -> None:
    findings.kept[:] = [replace(finding, cure=with_flags(finding.cure)) for finding in findings.kept]


def _show_findings(findings: Findings, console: Console) -> None:
    for finding in findings.kept[:SHOWN_FINDINGS]:
        where = f"{finding.path}:{finding.line}" if finding.line else finding.path
        console.print(
            f"{finding.severity} {finding.code} {_shown(where)} {_shown(finding.what)} Cure: {_shown(finding.cure)}",
            highlight=False,
            soft_wrap=True,
        )
    total = findings.counts.total()
    if total > SHOWN_FINDINGS:
        counts = ", ".join(f"{code} {count:,}" for code, count in findings.counts.most_common())
        kept = f"; --json has the first {min(total, MAX_FINDINGS):,}"
        console.print(f"{total:,} findings in all: {counts}{kept}", highlight=False, soft_wrap=True)


def _day(time: float | None) -> str:
    return "" if time is None else str(datetime.fromtimestamp(time, UTC).date())
