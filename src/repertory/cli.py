"""The commands of `repertory`. Each says what went wrong and how to cure it; none shows a traceback for that.

Exit codes: 0 done, 2 wrong usage, 3 not found, 4 not allowed, 5 invalid input, 6 job failed, 7 cancelled, 8 service
unreachable, 1 anything else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from repertory.errors import RepertoryError
from repertory.settings import Settings, settings

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
            console.print(f"{mark}  {finding.about:<13}  {escape(finding.message)}", soft_wrap=True)
            if finding.cure is not None:
                console.print(f"{'':23}Cure: {escape(finding.cure)}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    raise typer.Exit(any(finding.state == "red" for finding in findings))


def machine_settings() -> Settings:
    """The settings, or a complaint about the variable that is wrong."""
    try:
        return settings()
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
    console.print(f"{error.code}: {error.message}", markup=False, soft_wrap=True)
    console.print(f"Cure: {error.cure}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
