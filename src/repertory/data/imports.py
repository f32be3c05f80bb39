"""An import as it is asked for, by the command line and over HTTP alike, and what came of it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict

from repertory.data.conversations import CleanText
from repertory.errors import ErrorInfo, InvalidInput

if TYPE_CHECKING:
    from repertory.data.preparation.pipeline import PrepareOptions
    from repertory.data.readers.reading import ReadOptions

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class ImportOptions(BaseModel):
    """How an export is read and prepared. Authors are named by id or by any name they had.

    What reads and prepares is imported only where it is needed: it takes half a second.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = "auto"
    persona: list[CleanText] = []  # whose voice; several accounts of one person are one persona
    gap: str | None = None  # the pause that ends a session: 30m; None: found from the history
    exclude: list[CleanText] = []  # people whose words must not be used
    mask: list[CleanText] = []  # people whose names must not be
    mask_others: bool = False
    live_since: str | None = None  # a date: when a clone of the persona went live
    timezone: str | None = None  # of times that name none
    day_first: bool | None = None  # what 3/4 is; None: found from the file
    column: list[str] = []  # of a CSV: author=HEADER

    def check(self) -> None:
        """Raises InvalidInput for what no export could make right."""
        from repertory.data.readers import FORMATS

        if self.format != "auto" and self.format not in FORMATS:
            raise InvalidInput(
                f"{self.format!r} is not a format",
                code="format_unknown",
                cure=f"Choose auto or one of {', '.join(FORMATS)}.",
                param="format",
            )
        self.reading()
        self.preparing()

    def reading(self) -> ReadOptions:
        """Raises InvalidInput for a zone that is none and a column without a header."""
        from repertory.data.readers import table
        from repertory.data.readers.reading import ReadOptions

        named = [column.partition("=") for column in self.column]
        wrong = [name for name, _, header in named if name not in table.KNOWN or not header]
        if wrong:
            raise InvalidInput(
                f"column {wrong[0]!r} does not say which column is what",
                code="invalid_column",
                cure=f"Write it as NAME=HEADER, with NAME one of {', '.join(table.KNOWN)}.",
                param="column",
            )
        try:
            zone = ZoneInfo(self.timezone) if self.timezone else None
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise InvalidInput(
                f"{self.timezone!r} is not a time zone",
                code="invalid_timezone",
                cure="Name one as Europe/Berlin or UTC.",
                param="timezone",
            ) from error
        columns = {name: header for name, _, header in named}
        return ReadOptions(timezone=zone, day_first=self.day_first, columns=columns)

    def preparing(self) -> PrepareOptions:
        """Raises InvalidInput for a pause or a date that is none."""
        from repertory.data.preparation.pipeline import PrepareOptions

        return PrepareOptions(
            persona=self.persona,
            gap_seconds=seconds(self.gap) if self.gap else None,
            exclude=self.exclude,
            mask=self.mask,
            mask_others=self.mask_others,
            live_since=_moment(self.live_since) if self.live_since else None,
        )


class ImportOrder(BaseModel):
    """What the process that reads and prepares is told."""

    org_id: str
    options: ImportOptions


class ImportSummary(BaseModel):
    """What a dataset is, in a few words. Those of the persona are None until there is one."""

    format: str
    messages: int  # with words
    authors: int
    persona: str | None = None
    conversations: int | None = None
    trained_turns: int | None = None
    recorded_authors: int | None = None  # whose words are in the conversations
    system_prompt: str | None = None


class TokenReport(BaseModel):
    """Lengths in tokens of whole rows, before any is shortened."""

    measured: int  # conversations; of very many a part, evenly spread
    p50: int
    p90: int
    p99: int
    longest: int
    trained_share: float  # of all tokens
    max_tokens: int  # of one row
    shortened: int  # rows that lose their oldest messages to fit
    left_out: int  # rows that cannot be made to fit


class ImportEvent(BaseModel):
    """A line of what the process tells: how far it is, and at last how it ended."""

    progress: float = 0.0  # of the export, as read
    status: Literal["preparing", "needs_persona", "ready", "failed"] = "preparing"
    summary: ImportSummary | None = None
    error: ErrorInfo | None = None  # of a failed one

    @property
    def is_end(self) -> bool:
        return self.status != "preparing"


def seconds(gap: str) -> int:
    """Of a time such as 90s, 30m, 2h or 1d. Raises InvalidInput."""
    found = re.fullmatch(r"(\d{1,6})\s*([smhd])", gap.strip())
    if found is None or int(found[1]) == 0:
        raise InvalidInput(
            f"{gap!r} is not a time", code="invalid_gap", cure="Write it as 90s, 30m, 2h or 1d.", param="gap"
        )
    return int(found[1]) * UNITS[found[2]]


def _moment(text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(
            f"{text!r} is not a date", code="invalid_date", cure="Write it as 2024-05-01.", param="live_since"
        ) from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
