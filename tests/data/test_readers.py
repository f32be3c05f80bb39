"""Every reader: what is written comes back word for word, what is cut gives what is whole, what it is is seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exports
from repertory.data.history import Entry
from repertory.data.readers import open_history, whatsapp
from repertory.data.readers.reading import ReadOptions
from repertory.errors import InvalidInput

# writer, format, seconds that the format rounds times to
HISTORIES: list[tuple[exports.Write, str, int]] = [
    (exports.discord, "discord", 1),
    (exports.discord_csv, "discord-csv", 1),
    (exports.discord_package, "discord-package", 1),
    (exports.slack, "slack", 1),
    (exports.telegram, "telegram", 1),
    (exports.whatsapp, "whatsapp", 60),
    (exports.messenger, "messenger", 1),
    (exports.instagram_sealed, "messenger", 1),
    (exports.twitch, "twitch", 1),
    (exports.irc, "irc", 1),
    (exports.generic_csv, "csv", 1),
]
DIALOGUES: list[tuple[exports.Write, str]] = [
    (exports.chatgpt, "chatgpt"),
    (exports.claude, "claude"),
    (exports.sharegpt, "sharegpt"),
    (exports.alpaca, "alpaca"),
    (exports.openai_jsonl, "messages"),
    (exports.parquet, "messages"),
    (exports.native, "native"),
]
FAITHFUL = "👩‍👩‍👧 e\u0301 한글 \u1112\u1161\u11ab שלום \u202bעברית\u202c a\u2028b \u200d ﷽ ‏مرحبا \U0001f1e9\U0001f1ea"

# NUL can be neither stored nor tokenized, half surrogates are not Unicode, a lone CR no text format can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=60)
LINE = st.text(
    st.characters(exclude_categories=["Cs", "Zl", "Zp"], exclude_characters="\0\r\n\x0b\x0c\x85"), min_size=1
)


def _id(case: tuple[object, ...]) -> str:
    return getattr(case[0], "__name__", str(case[0]))


@st.composite
def histories(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[Entry]:
    people = {"u1": "Ana", "u2": "Боб Ω", "u3": "三郎"}
    time = draw(st.integers(1_500_000_000, 1_700_000_000))
    entries = []
    for number, said in enumerate(draw(st.lists(text, min_size=1, max_size=5)), 1):
        author = draw(st.sampled_from(sorted(people)))
        time += draw(st.integers(0, 4000))
        entries.append(
            Entry(channel="7", id=str(number), author_id=author, author=people[author], text=said, time=float(time))
        )
    return entries


@st.composite
def dialogues(draw: st.DrawFn) -> list[Entry]:
    entries = []
    for channel in ("1", "2"):
        turns = draw(st.lists(TEXT.filter(lambda text: "\ue200" not in text), min_size=2, max_size=4))
        for number, text in enumerate(turns[: len(turns) // 2 * 2]):
            role = ("user", "assistant")[number % 2]
            entries.append(Entry(channel=channel, id=f"{number}", author_id=role, author=role, text=text, time=1.6e9))
    return entries


def _is_sayable(name: str, text: str) -> bool:
    """Whether the format can carry the text as words at all, and does not itself give it another meaning."""
    if name == "slack":
        return not re.search(r":[a-z0-9_+'-]+:", text)  # that is how an emoji is written there
    if name == "whatsapp":
        if text.strip(" .") in whatsapp._DELETED or whatsapp._WAITING.match(text):
            return False  # the fuzzer reads the source and finds them
        return text[0] not in "\u200e<" and not text.endswith(">") and "(" not in text and "\u2068" not in text
    return True


@pytest.mark.parametrize("case", HISTORIES, ids=_id)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_was_written_is_read_back(
    case: tuple[exports.Write, str, int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write, name, rounding = case
    text = LINE if name == "irc" else TEXT
    said = data.draw(histories(text.filter(lambda text: _is_sayable(name, text))))
    got = _read(write(said, tmp_path_factory.mktemp("export")), name)
    assert [entry.text for entry in got] == [entry.text for entry in said]
    assert [entry.time // rounding for entry in got] == [entry.time // rounding for entry in said]  # type: ignore[operator]
    if name != "discord-package":  # one person's messages only
        assert [entry.author.casefold() for entry in got] == [entry.author.casefold() for entry in said]


@pytest.mark.parametrize("case", DIALOGUES, ids=_id)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=dialogues())
def test_what_was_written_is_read_back_turn_by_turn(
    case: tuple[exports.Write, str], said: list[Entry], tmp_path_factory: pytest.TempPathFactory
) -> None:
    write, name = case
    with open_history(write(said, tmp_path_factory.mktemp("export")), name) as history:
        got = list(history)
    assert [(entry.author_id, entry.text) for entry in got] == [(entry.author_id, entry.text) for entry in said]
    assert len({entry.channel for entry in got}) == 2


@pytest.mark.parametrize("write", [case[0] for case in [*HISTORIES, *DIALOGUES]], ids=lambda write: write.__name__)
def test_the_format_is_recognised_and_hard_text_is_kept(write: exports.Write, tmp_path: Path) -> None:
    formats = {case[0]: case[1] for case in [*HISTORIES, *DIALOGUES]}
    text = FAITHFUL if write is exports.irc else f"{FAITHFUL}\nsecond line"
    with open_history(write(_few(write, text), tmp_path)) as history:
        got = [entry.text for entry in history if entry.kind == "said"]
    assert history.report.format == formats[write]
    assert sorted(got) == sorted(entry.text for entry in _few(write, text))
    assert not [f for f in history.report.findings.kept if f.severity != "note" and f.code != "provider_voice"] or (
        write is exports.discord_package
    )


@pytest.mark.parametrize("write", [case[0] for case in [*HISTORIES, *DIALOGUES]], ids=lambda write: write.__name__)
def test_a_file_cut_at_any_byte_gives_what_is_whole(write: exports.Write, tmp_path: Path) -> None:
    formats = {case[0]: case[1] for case in [*HISTORIES, *DIALOGUES]}
    said = _few(write, "é 👋")
    path = write(said, tmp_path)
    biggest = max((p for p in [path, *path.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size)
    content = biggest.read_bytes()
    cut = tmp_path / "cut" / biggest.relative_to(path.parent)
    cut.parent.mkdir(parents=True)
    root = tmp_path / "cut" / path.name
    whole = len(said)
    for length in range(len(content), -1, -1):
        cut.write_bytes(content[:length])
        got = _read_or_refuse(root, formats[write])
        for entry in got:
            assert any(original.text.startswith(entry.text.rstrip("\ufffd")) for original in said)
        assert len(got) <= whole, "more is read of less"
        whole = len(got)
    assert whole == 0


def test_where_a_file_breaks_off_is_said(tmp_path: Path) -> None:
    path = exports.telegram(_few(exports.telegram, "hello"), tmp_path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[: len(lines) * 2 // 3]))
    with open_history(path, "telegram") as history:
        assert len(list(history)) == 2
    (broken,) = [f for f in history.report.findings.kept if f.code == "file_broken"]
    assert broken.line == len(lines) * 2 // 3
    assert "too early" in broken.what


@pytest.mark.parametrize("name", ["discord", "telegram", "slack", "messenger", "twitch", "chatgpt", "claude", "native"])
@pytest.mark.parametrize(
    "record",
    ["null", "7", '"text"', "[]", "{}", '{"id": {}}', '{"author": 1, "type": "Default"}', '{"ts": [], "date": 5}'],
)
def test_a_record_that_is_not_one_is_left_out_and_reported(name: str, record: str, tmp_path: Path) -> None:
    around = {
        "discord": '{"channel": {"id": "1"}, "messages": [{"author": {"isBot": 1}, "content": ""}, %s]}',
        "telegram": '{"messages": [{"type": "message"}, %s]}',
        "slack": "[%s]",
        "messenger": '{"messages": [{"sender_name": 1, "timestamp_ms": 1}, %s]}',
        "twitch": '{"comments": [{"message": {"body": 1}, "content_offset_seconds": 1}, %s]}',
        "chatgpt": '[{"mapping": 1, "current_node": 1}, %s]',
        "claude": '[{"chat_messages": 1}, %s]',
        "native": '{"conversations": [{"messages": [{"role": 1}]}, %s]}',
    }
    file = tmp_path / "general" / "2024-01-01.json"
    file.parent.mkdir()
    file.write_text(around[name] % record)
    with open_history(tmp_path, name) as history:
        entries = list(history)
    assert entries == [] or (name == "slack" and record == "{}")
    if not (name in ("chatgpt", "claude") and record == "null"):
        assert history.report.findings.counts["message_malformed"] >= 1


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"messages": ' + b"[" * 200_000,
        b'{"messages": [{"a": ' + b"9" * 5000 + b"}]}",
        b'"' + b"x" * 99,
    ],
    ids=["deep", "deep-inside", "long-number", "open-string"],
)
def test_hostile_json_ends_with_a_finding(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with open_history(tmp_path / "x.json", "telegram") as history:
        assert list(history) == []
    with pytest.raises(InvalidInput) as refused, open_history(tmp_path / "x.json"):
        pass
    assert refused.value.code == "format_not_recognised"


def test_invalid_bytes_and_half_surrogates_are_mended_and_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"author,text\nana,caf\xe9 x\n")
    with open_history(tmp_path / "a.csv") as history:
        assert [entry.text for entry in history] == ["caf\ufffd x"]
    assert history.report.findings.kept[-1].line == 1
    (tmp_path / "b.json").write_text(
        '{"messages": [{"id":1,"type":"message","from_id":"user1","date_unixtime":"5","text":"a\\ud83d\\u0000b"}]}'
    )
    with open_history(tmp_path / "b.json") as history:
        assert [entry.text for entry in history] == ["a\ufffd\ufffdb"]
    assert history.report.findings.counts == {"text_repaired": 1}


def test_utf_16_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("author,text\nana,שלום\n".encode("utf-16"))
    with open_history(tmp_path / "a.csv") as history:
        assert [entry.text for entry in history] == ["שלום"]


def test_half_surrogates_in_ids_and_names_of_columns_are_mended(tmp_path: Path) -> None:
    message = {"id": "1\ud800", "type": "Reply", "timestamp": "2024-05-01T12:00:00Z", "content": "hi"}
    message["author"] = {"id": "7", "name": "ana", "isBot": False}  # type: ignore[assignment]
    message["reference"] = {"messageId": "0\udfff"}  # type: ignore[assignment]
    message["mentions"] = [{"id": "8\udfff", "name": "bob"}]  # type: ignore[assignment]
    path = exports.write_json(tmp_path / "c.json", {"channel": {"id": "9"}, "messages": [message]})
    with open_history(path) as history:
        (entry,) = history
    assert (entry.id, entry.reply_to, entry.mentions) == ("1\ufffd", "0\ufffd", ("8\ufffd",))
    (tmp_path / "a.csv").write_bytes(b"caf\xe9,text\nana,hi\n")
    with pytest.raises(InvalidInput) as refused, open_history(tmp_path / "a.csv", "csv") as history:
        list(history)
    refused.value.info.model_dump_json()


def test_half_a_surrogate_pair_in_utf_16_costs_itself_alone(tmp_path: Path) -> None:
    rows = "author,text\nana,a\ud83db\nana,end\n".encode("utf-16", "surrogatepass")
    (tmp_path / "a.csv").write_bytes(rows)
    with open_history(tmp_path / "a.csv") as history:
        assert [entry.text for entry in history] == ["a\ufffdb", "end"]
    assert history.report.findings.counts == {"text_repaired": 1}
    message = '{"id": 1, "type": "message", "from_id": "user1", "date_unixtime": "5", "text": "a\ud83db"}'
    document = f'{{"messages": [{message}, {message}]}}'
    (tmp_path / "b.json").write_bytes(document.encode("utf-16", "surrogatepass"))
    with open_history(tmp_path / "b.json") as history:
        assert [entry.text for entry in history] == ["a\ufffdb"] * 2


def test_times_without_a_zone_are_read_in_the_zone_that_is_named(tmp_path: Path) -> None:
    from zoneinfo import ZoneInfo

    (tmp_path / "a.csv").write_text("author,text,time\nana,hi,2024-07-01 12:00:00\n")
    with open_history(tmp_path / "a.csv") as history:
        assert [entry.time for entry in history] == [1719835200.0]
    assert history.report.timezone_assumed == "UTC"
    assert history.report.findings.counts["timezone_assumed"] == 1
    with open_history(tmp_path / "a.csv", options=ReadOptions(timezone=ZoneInfo("Europe/Berlin"))) as history:
        assert [entry.time for entry in history] == [1719835200.0 - 7200]
    assert history.report.findings.counts["timezone_assumed"] == 0


def test_an_unknown_format_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "chat.html").write_text("<html>")
    with pytest.raises(InvalidInput) as refused, open_history(tmp_path / "chat.html"):
        pass
    assert refused.value.code == "format_not_recognised"
    assert "JSON" in refused.value.cure
    text = f"{'=' * 62}\nGuild: G\nChannel: c\n{'=' * 62}\n\n[01/05/2024 12:00] ana\nhi\n"
    (tmp_path / "chat.txt").write_text(text)
    with pytest.raises(InvalidInput) as refused, open_history(tmp_path / "chat.txt"):
        pass
    assert "again as JSON" in refused.value.cure
    with pytest.raises(InvalidInput, match="not a format"), open_history(tmp_path / "chat.html", "word"):
        pass
    with pytest.raises(InvalidInput, match="not there"), open_history(tmp_path / "nothing"):
        pass


def _few(write: Callable[..., Path], text: str) -> list[Entry]:
    if write in [case[0] for case in DIALOGUES]:
        turns = [("user", "hi"), ("assistant", text)]
        return [
            Entry(channel=channel, id=f"{n}", author_id=role, author=role, text=said, time=1.6e9)
            for channel in ("1", "2")
            for n, (role, said) in enumerate(turns)
        ]
    people = [("u1", "Ana"), ("u2", "Bob"), ("u1", "Ana")]
    return [
        Entry(
            channel="7", id=f"{n}", author_id=author, author=name, text=f"{n}{text}", time=1_600_000_000.0 + 86_400 * n
        )
        for n, (author, name) in enumerate(people, 1)
    ]


def _read_or_refuse(path: Path, name: str) -> list[Entry]:
    """What people said, nothing where the import is refused with a reason."""
    refused: InvalidInput | None = None
    try:
        return _read(path, name)
    except InvalidInput as error:
        refused = error
    assert refused.code in {"archive_refused", "columns_missing", "date_order_unknown"}
    return []


def _read(path: Path, name: str) -> list[Entry]:
    """What people said, in order of time."""
    with open_history(path, name) as history:
        said = [entry for entry in history if entry.kind == "said"]
    return sorted(said, key=lambda entry: entry.time or 0)
