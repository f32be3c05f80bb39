"""What WhatsApp's text is known to get importers wrong."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from exports import read
from repertory.data.history import Entry, ImportReport
from repertory.data.readers.reading import ReadOptions
from repertory.errors import InvalidInput


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["12/31/23, 9:05 PM - Ana: hi"], "2023-12-31 21:05:00"),
        (["12/31/23, 9:05\u202fPM - Ana: hi"], "2023-12-31 21:05:00"),
        (["31/12/2023, 9:05 a. m. - Ana: hi"], "2023-12-31 09:05:00"),
        (["31/12/23 12:05 am - Ana: hi"], "2023-12-31 00:05:00"),
        (["[31.12.23, 21:05:33] Ana: hi"], "2023-12-31 21:05:33"),
        (["\u200e[31/12/23, 9:05:33 PM] Ana: hi"], "2023-12-31 21:05:33"),
        (["31.12.23, 21:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["2023-12-31, 21:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["2023/12/31 21:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["31-12-2023 21.05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["٣١/١٢/٢٠٢٣، ٩:٠٥ م - Ana: hi"], "2023-12-31 21:05:00"),
        (["۲۰۲۳/۱۲/۳۱, ۲۱:۰۵ - Ana: hi"], "2023-12-31 21:05:00"),
        (["2023/12/31 下午9:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["[2023. 12. 31. 오후 9:05:00] Ana: hi"], "2023-12-31 21:05:00"),
    ],
)
def test_whatsapp_headers_of_many_locales(lines: list[str], expected: str, tmp_path: Path) -> None:
    (entry,), report = _whatsapp(tmp_path, *lines)
    assert (entry.author, entry.text) == ("Ana", "hi")
    assert datetime.fromtimestamp(entry.time or 0, UTC) == datetime.fromisoformat(expected + "+00:00")
    assert report.format == "whatsapp"


def test_whatsapp_day_and_month_are_decided_by_the_whole_file(tmp_path: Path) -> None:
    entries, _ = _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a", "3/25/23, 10:00 - Ana: b")
    assert _days(entries) == ["2023-03-04", "2023-03-25"]
    entries, _ = _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a", "25/4/23, 10:00 - Ana: b")
    assert _days(entries) == ["2023-04-03", "2023-04-25"]


def test_whatsapp_day_and_month_are_decided_by_time_that_runs_forward(tmp_path: Path) -> None:
    entries, _ = _whatsapp(tmp_path, "11/1/23, 10:00 - Ana: a", "2/2/23, 10:00 - Ana: b", "1/3/23, 10:00 - Ana: c")
    assert _days(entries) == ["2023-01-11", "2023-02-02", "2023-03-01"]


def test_whatsapp_asks_where_both_orders_would_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a")
    assert refused.value.code == "date_order_unknown"
    for day_first, day in ((True, "2023-04-03"), (False, "2023-03-04")):
        entries, _ = _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a", options=ReadOptions(day_first=day_first))
        assert _days(entries) == [day]


def test_whatsapp_messages_of_several_lines_keep_them(tmp_path: Path) -> None:
    entries, _ = _whatsapp(tmp_path, "31.12.23, 21:05 - Ana: one", "", "  - three", "", "31.12.23, 21:06 - Bob: x")
    assert [entry.text for entry in entries] == ["one\n\n  - three\n", "x"]


@pytest.mark.parametrize(
    ("body", "kind", "text", "attachments"),
    [
        ("<Media omitted>", "said", "", ("media",)),
        ("<Medien ausgeschlossen>", "said", "", ("media",)),
        ("\u200eimage omitted", "said", "", ("image",)),
        ("\u200eBild weggelassen", "said", "", ("Bild",)),
        ("\u200e<attached: 0001-PHOTO.jpg>", "said", "", ("0001-PHOTO.jpg",)),
        ("look \u200e<attached: 0001-PHOTO.jpg>", "said", "look", ("0001-PHOTO.jpg",)),
        ("IMG-20231231-WA0001.jpg (file attached)\nlook", "said", "look", ("IMG-20231231-WA0001.jpg",)),
        ("This message was deleted", "deleted", "", ()),
        ("\u200eYou deleted this message.", "deleted", "", ()),
        ("Diese Nachricht wurde gelöscht.", "deleted", "", ()),
        ("hello <This message was edited>", "said", "hello", ()),
        ("hello \u200e<Diese Nachricht wurde bearbeitet>", "said", "hello", ()),
        ("Waiting for this message. This may take a while.", "service", None, ()),
        ("\u200eAna changed the group description", "service", None, ()),
        ("POLL:\nPizza?\nOPTION: yes (2 votes)\nOPTION: no: never (0 votes)", "service", None, ()),
        ("UMFRAGE:\nPizza?\nOPTION: ja (1 Stimme)\nOPTION: nein (0 Stimmen)", "service", None, ()),
        ("list:\nbread\nmilk: two (2 l)", "said", "list:\nbread\nmilk: two (2 l)", ()),
        ("<lol>", "said", "<lol>", ()),
        ("a (b) c.", "said", "a (b) c.", ()),
        ("note: this: that", "said", "note: this: that", ()),
        ("", "said", "", ()),
        ("مرحبا \u200fשלום 👩‍👩‍👧", "said", "مرحبا \u200fשלום 👩‍👩‍👧", ()),
    ],
)
def test_whatsapp_bodies(body: str, kind: str, text: str | None, attachments: tuple[str, ...], tmp_path: Path) -> None:
    (entry, _), _ = _whatsapp(tmp_path, f"[31.12.23, 21:05:33] Ana: {body}", "[31.12.23, 21:06:33] Bob: ok")
    assert (entry.kind, entry.attachments) == (kind, attachments)
    assert text is None or entry.text == text


def test_whatsapp_notices_have_no_author(tmp_path: Path) -> None:
    entries, report = _whatsapp(
        tmp_path,
        "31.12.23, 21:05 - Messages and calls are end-to-end encrypted. Tap to learn more.",
        "31.12.23, 21:05 - Ana created group “Trip: Rome”",
        '31.12.23, 21:05 - Ana changed the subject from "x: y" to "z"',
        "31.12.23, 21:05 - Ana: hi",
    )
    assert [entry.kind for entry in entries] == ["service", "service", "service", "said"]
    assert list(report.authors) == ["Ana"]


def test_whatsapp_names_with_a_colon_and_push_names(tmp_path: Path) -> None:
    lines = [f"31.12.23, 21:0{n} - Work: Carla: message {n}" for n in range(4)]
    lines += ["31.12.23, 21:06 - Ana: re: that", "31.12.23, 21:07 - Ana: plain", "31.12.23, 21:08 - Ana: plain"]
    lines += [
        "31.12.23, 21:08 - ~\u202fPush Name: hi",
        "31.12.23, 21:09 - \u202a+49 170 1234567\u202c: @491701234567 yes",
    ]
    entries, _ = _whatsapp(tmp_path, *lines)
    assert [entry.author for entry in entries] == ["Work: Carla"] * 4 + ["Ana"] * 3 + ["Push Name", "+49 170 1234567"]
    assert [entry.text for entry in entries][3:5] == ["message 3", "re: that"]
    assert entries[-1].mentions == ("491701234567",)


def test_whatsapp_media_in_a_language_nobody_listed(tmp_path: Path) -> None:
    lines = [f"31.12.23, 21:0{n} - Ana: <Meedia jäeti välja>" for n in range(3)] + ["31.12.23, 21:05 - Ana: <rare>"]
    entries, _ = _whatsapp(tmp_path, *lines)
    assert [(entry.text, entry.attachments) for entry in entries] == [("", ("media",))] * 3 + [("<rare>", ())]


@pytest.mark.parametrize(
    "tail",
    [
        "1/1/1" + " " * 200_000 + "x",
        "12/31/23, " + " " * 200_000 + "9",
        "12/31/23, 9:05 PM - Ana: \u200e" + "a " * 300_000,
        "12/31/23, 9:05 PM - Ana: " + "<a: " * 300_000,
        "12/31/23, 9:05 PM - Ana: POLL:\nq\n" + "OPTION: (1 a) (1 a)\n" * 30_000 + "x",
        "12/31/23, 9:05 PM - Ana: " + " \u200e<a" * 200_000,
    ],
    ids=["cut date", "date", "notice", "file", "poll", "edited"],
)
def test_whatsapp_lines_take_no_pattern_for_ever(tail: str, tmp_path: Path) -> None:
    begun = time.process_time()
    entries, _ = _whatsapp(tmp_path, "12/31/23, 9:05 PM - Ana: hi", tail)
    assert entries
    assert time.process_time() - begun < 5


def _whatsapp(folder: Path, *lines: str, options: ReadOptions | None = None) -> tuple[list[Entry], ImportReport]:
    path = folder / "chat.txt"
    path.write_text("\n".join(lines) + "\n", newline="")
    return read(path, options)


def _days(entries: Iterable[Entry]) -> list[str]:
    return [str(datetime.fromtimestamp(entry.time or 0, UTC).date()) for entry in entries]
