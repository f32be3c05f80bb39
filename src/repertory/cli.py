"""The commands of `repertory`. Each says what went wrong and how to cure it; none shows a traceback for that.

Exit codes: 0 done, 2 wrong usage, 3 not found, 4 not allowed, 5 invalid input, 6 job failed, 7 cancelled, 8 service
unreachable, 1 anything else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from repertory.contracts import Download
from repertory.errors import Conflict, InvalidInput, NotFound, RepertoryError, StorageFailed, Unavailable
from repertory.settings import Settings, settings
from repertory.terminal import printable

if TYPE_CHECKING:  # loaded by the commands that need it: the others start faster
    from repertory.service.accounts import Accounts
    from repertory.service.organisations import Organisation

EXIT_CODES: dict[type[RepertoryError], int] = {NotFound: 3, InvalidInput: 5, Conflict: 5, Unavailable: 8}
DOWNLOAD_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def repertory() -> None:
    """Fine-tune and serve voices: one base model, many organisations."""


@app.command()
def serve() -> None:
    """Start the service on HOST:PORT (127.0.0.1:8300 if not set)."""
    from repertory.service.server import serve as run  # other commands start faster without it

    raise typer.Exit(run())


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer conversations, one epoch: under 3 minutes.")] = False,
    port: Annotated[
        int | None, typer.Option(help="Where the service is or shall be.  [default: PORT, else 8300]")
    ] = None,
) -> None:
    """Learn a real person's voice, show that it was learned, and talk to it."""
    from repertory import demo as demonstration

    lesson = demonstration.QUICK if quick else demonstration.FULL
    try:
        demonstration.run(lesson, port or machine_settings().port, Console())
    except demonstration.Detached as left:
        typer.echo(f"{left.message}\n{left.cure}", err=True)
        raise typer.Exit(demonstration.exit_code(left)) from None
    except RepertoryError as error:
        complain(error)
        raise typer.Exit(demonstration.exit_code(error)) from None


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of coloured lines.")] = False,
) -> None:
    """Look at everything the service needs of this machine; each line green, yellow or red with its cure.

    The exit code is 1 when a line is red.
    """
    from repertory import doctor as medicine

    findings = []
    console = Console(highlight=False)
    for finding in medicine.examine():
        findings.append(finding)
        if not as_json:
            mark = f"[{finding.state}]{finding.state:<6}[/]"
            console.print(f"{mark}  {finding.about:<13}  {escape(printable(finding.message))}", soft_wrap=True)
            if finding.cure is not None:
                console.print(f"{'':23}Cure: {escape(printable(finding.cure))}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    raise typer.Exit(any(finding.state == "red" for finding in findings))


@app.command("import")
def import_history(
    path: Annotated[Path, typer.Argument(help="The export: a file, a folder or a zip archive.")],
    persona: Annotated[
        list[str] | None, typer.Option(help="Whose voice: a name or an id; again for each of their accounts.")
    ] = None,
    format: Annotated[str, typer.Option(help="auto, or a format of docs/imports.md.")] = "auto",
    gap: Annotated[str | None, typer.Option(help="The pause that ends a session: 30m, 2h.  [default: found]")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Somebody whose words must not be used.")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="Somebody whose name must not be used.")] = None,
    mask_others: Annotated[bool, typer.Option("--mask-others", help="Nobody's name but the persona's.")] = False,
    timezone: Annotated[str | None, typer.Option(help="Of times without one: Europe/Berlin.  [default: UTC]")] = None,
    day_first: Annotated[
        bool | None, typer.Option("--day-first/--month-first", help="What 3/4 is, where the file does not tell.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Of a CSV: author=HEADER, text=HEADER, time=…")] = None,
    live_since: Annotated[str | None, typer.Option(help="When a clone of the persona went live: 2024-05-01.")] = None,
    org: Annotated[str, typer.Option(help="The organisation, for the request that is written.")] = "default",
    output: Annotated[Path | None, typer.Option(help="Where the request goes.  [default: PERSONA.json]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    preview: Annotated[int, typer.Option(min=0, help="Show so many conversations as the model will see them.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on standard output.")] = False,
) -> None:
    """Turn a chat export into the conversations that teach one voice; without --persona, show who speaks in it."""
    from repertory import importer
    from repertory.data.imports import ImportOptions
    from repertory.data.preparation.report import full_report

    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 200)
    with complaining(importer.with_flags):
        asked = ImportOptions(
            format=format,
            persona=persona or [],
            gap=gap,
            exclude=exclude or [],
            mask=mask or [],
            mask_others=mask_others,
            live_since=live_since,
            timezone=timezone,
            day_first=day_first,
            column=column or [],
        )
        reading = asked.reading()
        if not persona and not importer.is_dialogue(path, format):
            importer.authors(path, format, reading, console)
            return
        with importer.prepared(path, format, reading, asked.preparing(), console) as (prepared, read):
            importer.show(prepared.report, read, console)
            machine = machine_settings()
            renderer = importer.base_renderer(machine)
            tokens = importer.measured(prepared, renderer, machine) if renderer else None
            if tokens:
                importer.show_tokens(tokens, machine.default_base_model, console)
            if preview:
                importer.preview(prepared, renderer, machine, preview, console)
            if as_json:
                typer.echo(json.dumps(full_report(prepared, read, tokens), indent=2, ensure_ascii=False))
            if not dry_run:
                written = importer.write(prepared, org, output)
                console.print(
                    f"Written to {written}. Train it: {importer.start_command(written, machine)}", soft_wrap=True
                )


@app.command()
def forget(
    author: Annotated[str, typer.Argument(help="The author's id, as the table of authors has it.")],
    org: Annotated[str, typer.Option(help="The organisation whose datasets have the words.")] = "default",
    url: Annotated[str | None, typer.Option(help="Where the service is.  [default: this machine]")] = None,
    key: Annotated[str, typer.Option(envvar="REPERTORY_API_KEY", help="An API key, where one is needed.")] = "",
) -> None:
    """Have the service delete somebody's words from an organisation's datasets, and mark the voices that know them."""
    from repertory import importer

    with complaining():
        done = importer.forget(url or f"http://localhost:{machine_settings().port}", org, author, key)
    typer.echo("\n".join(done) or f"There are no words of {author} in the datasets of {org}.")


models = typer.Typer(no_args_is_help=True, help="Base models: list, download, register, remove.")
app.add_typer(models, name="models")


@models.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array instead of a table.")] = False,
) -> None:
    """The base models on this machine."""
    from repertory import base_models

    with complaining():
        found = base_models.listed(machine_settings())
    if as_json:
        typer.echo(json.dumps([asdict(model) for model in found], indent=2))
        return
    table = Table("name", "revision", "size", "architecture", "precision", "from", "voices", "state", box=None)
    for model in found:
        size = f"{model.size_bytes / 1e9:.2f} GB" if model.size_bytes >= 1e9 else f"{model.size_bytes / 1e6:.1f} MB"
        cells = (model.name, (model.revision or "")[:12], size, model.architecture, model.precision, model.source)
        table.add_row(*(escape(printable(cell)) for cell in (*cells, str(model.voices), model.state)))
    _print_table(table if found else "There is none yet; a start unpacks the bundled one.")


@models.command("download")
def download_model(
    name: Annotated[str, typer.Argument(help="owner/name or owner/name@revision, as on the hub.")],
) -> None:
    """Bring a base model here, or its newest commit; a download that was cut goes on."""
    from repertory import base_models

    with complaining(), Progress(*DOWNLOAD_COLUMNS, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=None)

        def tell(download: Download) -> None:
            progress.update(bar, total=download.bytes_total, completed=download.bytes_done)

        folder = base_models.download(name, machine_settings(), progress.console.print, tell)
    typer.echo(f"{name} is in {folder}")


@models.command("register")
def register_model(
    name: Annotated[str, typer.Argument(help="What jobs will call local/NAME.")],
    path: Annotated[Path, typer.Argument(help="A model's folder, which stays where it is, or a .gguf file.")],
) -> None:
    """Name a model that is on this machine's disk already."""
    from repertory import base_models

    with complaining():
        registered = base_models.register(name, path, machine_settings(), partial(typer.echo, err=True))
    typer.echo(f'{registered} can be trained: "base_model": "{registered}"')


@models.command("remove")
def remove_model(
    name: Annotated[str, typer.Argument(help="As `repertory models list` shows it, or with @ and a revision.")],
    force: Annotated[bool, typer.Option("--force", help="Also if voices need it.")] = False,
) -> None:
    """Free the space of a base model; a registered folder itself is left alone."""
    from repertory import base_models

    with complaining():
        removed = base_models.remove(name, machine_settings(), partial(typer.echo, err=True), force=force)
    for model in removed:
        typer.echo(f"{model.name}{f'@{model.revision}' if model.revision else ''} is removed")


keys = typer.Typer(no_args_is_help=True, help="API keys: create, list, rotate, revoke.")
app.add_typer(keys, name="keys")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    org: Annotated[str | None, typer.Option(help="Its organisation.")] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="infer, read, train, org-admin or admin; again for more of them.")
    ] = None,
    every_org: Annotated[bool, typer.Option("--every-org", help="For all organisations, in place of one.")] = False,
    expires: Annotated[str | None, typer.Option(help="After how long: 90d, 12h, 30m.  [default: never]")] = None,
) -> None:
    """Make a key and show it, this once. With the first key the service begins to want one for every call."""
    from repertory.service.keys import Scope

    with complaining(), accounts() as service:
        if (org is None) != every_org:
            raise InvalidInput("A key is of one organisation or of all.", cure="Give either --org or --every-org.")
        known = [one for one in scope or [Scope.INFER] if one in set(Scope)]
        if scope and known != scope:
            raise InvalidInput("There is no such scope.", cure=f"Choose from {', '.join(Scope)}.")
        lifetime = None if expires is None else _duration(expires)
        key, text = service.keys.create(
            name=name, org_id=org, scopes=[Scope(one) for one in known], expires_in=lifetime
        )
    _show_key(key.id, text)


@keys.command("list")
def list_keys(
    org: Annotated[str | None, typer.Option(help="Of one organisation alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array instead of a table.")] = False,
) -> None:
    """The keys, newest first, also those that can no longer be used."""
    with complaining(), accounts() as service:
        found = service.keys.list(org)
    if as_json:
        rows = [asdict(key) | {"state": key.state} for key in found]
        typer.echo(json.dumps(rows, indent=2, default=str))
        return
    table = Table("id", "name", "organisation", "scopes", "state", "made", "expires", "last used", box=None)
    for key in found:
        cells = (key.id, key.name, key.org_id or "(every)", " ".join(key.scopes), key.state)
        times = (key.created_at, key.expires_at, key.last_used_at)
        table.add_row(*(escape(printable(cell)) for cell in cells), *(_minute(time) for time in times))
    _print_table(table if found else "There is none: the service is open to whoever reaches it.")


@keys.command("rotate")
def rotate_key(
    key_id: Annotated[str, typer.Argument(help="The id of the key, as `repertory keys list` shows it.")],
    grace: Annotated[str, typer.Option(help="How long the old one still works: 24h, 0m.")] = "24h",
) -> None:
    """Make a key of the same rights in the place of an old one, which still works for a while."""
    with complaining(), accounts() as service:
        key, text = service.keys.rotate(key_id, _duration(grace))
    _show_key(key.id, text)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The id of the key, as `repertory keys list` shows it.")],
) -> None:
    """Have a key refused from the next request on."""
    with complaining(), accounts() as service:
        key = service.keys.revoke(key_id)
    typer.echo(f"{key.id} is revoked")


orgs = typer.Typer(no_args_is_help=True, help="Organisations: create, list, show, limits, delete.")
app.add_typer(orgs, name="orgs")


@orgs.command("create")
def create_organisation(org: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Make an organisation, so that it can be given keys."""
    from repertory.contracts import OrgId

    with complaining(), accounts() as service:
        try:
            TypeAdapter(OrgId).validate_python(org)
        except ValidationError:
            raise InvalidInput(
                "This is no name for an organisation.",
                cure="Use 1 to 64 letters, digits, hyphens and underscores, beginning with a letter or a digit.",
            ) from None
        service.organisations.create(org)
    typer.echo(f"{org} is there. A key for it: repertory keys create NAME --org {org}")


@orgs.command("list")
def list_organisations(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array instead of a table.")] = False,
) -> None:
    """The organisations, by name."""
    with complaining(), accounts() as service:
        found = service.organisations.list()
    if as_json:
        typer.echo(json.dumps([_organisation(one) for one in found], indent=2, default=str))
        return
    table = Table("organisation", "made", "speaks with", "limits of its own", "state", box=None)
    for one in found:
        own = ", ".join(f"{name}={value}" for name, value in one.limits.model_dump(exclude_unset=True).items())
        state = "" if one.deletion_asked_at is None else "is being deleted"
        table.add_row(one.org_id, _minute(one.created_at), one.promoted or "", own, state)
    _print_table(table if found else "There is none.")


@orgs.command("show")
def show_organisation(org: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """One organisation as JSON, with the limits that hold for it."""
    with complaining(), accounts() as service:
        shown = _organisation(service.organisations.get(org))
        shown |= {"limits": service.organisations.limits(org).model_dump()}
    typer.echo(json.dumps(shown, indent=2, default=str))


@orgs.command("limits")
def limit_organisation(
    org: Annotated[str, typer.Argument(help="Its name.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="NAME=NUMBER, NAME=none or NAME=default, such as queued_jobs=10; none: show them."),
    ] = None,
) -> None:
    """Set limits of one organisation, or show those that hold for it."""
    from repertory.service.organisations import Limits

    with complaining(), accounts() as service:
        own = service.organisations.get(org).limits.model_dump(exclude_unset=True)
        for change in changes or []:
            name, _, value = change.partition("=")
            if value == "default":
                own.pop(name, None)
            else:
                own[name] = None if value == "none" else value
        try:
            limits = Limits.model_validate(own)
        except ValidationError as error:
            problem = error.errors()[0]
            raise InvalidInput(
                f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}.",
                cure=f"Known are {', '.join(Limits.model_fields)}; a value is a number, none or default.",
            ) from None
        if changes:
            service.organisations.set_limits(org, limits)
        holding = service.organisations.limits(org).model_dump()
    for name, value in holding.items():
        typer.echo(f"{name:<24} {'none' if value is None else value}{'' if name in own else '  (of everybody)'}")


@orgs.command("delete")
def delete_organisation(
    org: Annotated[str, typer.Argument(help="Its name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an organisation with all its keys, jobs, datasets and voices."""
    from repertory.service.accounts import delete

    with complaining(), accounts() as service:
        service.organisations.get(org)
        if not yes:
            typer.confirm(f"Delete {org} with all its keys, jobs, datasets and voices, for ever?", abort=True)
    with complaining():
        delete(machine_settings(), org)
    typer.echo(f"Nothing of {org} is left")


@contextmanager
def accounts() -> Iterator[Accounts]:
    """Organisations and keys, straight from the database, whether or not a service is running on it."""
    from repertory.service.accounts import Accounts

    opened = Accounts(machine_settings())
    try:
        yield opened
    finally:
        opened.close()


def _show_key(key_id: str, text: str) -> None:
    """The key alone on standard output, for scripts."""
    typer.echo(f"The key {key_id}. It is not shown again; send it as: Authorization: Bearer …", err=True)
    typer.echo(text)


def _organisation(one: Organisation) -> dict[str, Any]:
    return asdict(one) | {"limits": one.limits.model_dump(), "own_limits": one.limits.model_dump(exclude_unset=True)}


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if match is None:
        raise InvalidInput(f"{text} is no length of time.", cure="Write a number and m, h or d: 30m, 12h, 90d.")
    return timedelta(minutes=int(match[1]) * {"m": 1, "h": 60, "d": 1440}[match[2]])


def _minute(time: datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d %H:%M}"


def _print_table(what: Table | str) -> None:
    wide = None if sys.stdout.isatty() else 200  # into a pipe or a file nothing is folded
    Console(highlight=False, width=wide).print(what)


@contextmanager
def complaining(worded: Callable[[str], str] = str) -> Iterator[None]:
    """Ends the command with a complaint and its exit code where something goes wrong; `worded` says its cure."""
    try:
        yield
    except RepertoryError as error:
        error.cure = worded(error.cure)
        complain(error)
        raise typer.Exit(EXIT_CODES.get(type(error), 1)) from None
    except OSError as error:
        complain(StorageFailed.of(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. What has been downloaded is kept; the same command goes on with it.", err=True)
        raise typer.Exit(7) from None


def machine_settings() -> Settings:
    """The settings, or a complaint about the variable that is wrong."""
    try:
        return settings()
    except RepertoryError as unreadable:
        complain(unreadable)
        raise typer.Exit(5) from None
    except ValidationError as refused:
        for problem in refused.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper() or "The settings"
            complain(
                RepertoryError(
                    f"{name}: {problem['msg']}",
                    code="invalid_settings",
                    cure="Correct it in the environment or in .env; .env.example lists every setting.",
                )
            )
        raise typer.Exit(5) from None


def complain(error: RepertoryError) -> None:
    """What, why, cure, on stderr."""
    console = Console(stderr=True, highlight=False)
    console.print(f"{error.code}: {printable(error.message)}", markup=False, soft_wrap=True)
    console.print(f"Cure: {printable(error.cure)}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
