"""What conversations with assistants are known to get importers wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from exports import read, write_json
from repertory.data.readers import open_history, rewritten


def test_chatgpt_walks_the_branch_that_was_seen(tmp_path: Path) -> None:
    def node(ident: str, parent: str | None, role: str, text: object, **message: Any) -> dict[str, Any]:
        content = {"content_type": "text", "parts": [text]}
        return {
            "id": ident,
            "parent": parent,
            "children": [],
            "message": {"id": ident, "author": {"role": role}, "content": content, "create_time": 5, **message},
        }

    nodes = [
        {"id": "root", "parent": None, "children": ["s"], "message": None},
        node("s", "root", "system", "hidden", metadata={"is_visually_hidden_from_conversation": True}),
        node("q", "s", "user", "question"),
        node("bad", "q", "assistant", "regenerated away"),
        node("tool", "q", "assistant", "search(…)", recipient="web"),
        node("t", "tool", "assistant", "x", content={"content_type": "thoughts", "thoughts": []}),
        node("img", "t", "user", "x", content={"content_type": "multimodal_text", "parts": [{"asset": 1}, "see"]}),
        node("good", "img", "assistant", "answer\ue200cite\ue202turn0\ue201."),
    ]
    tree = {"id": "c", "mapping": {n["id"]: n for n in nodes}, "current_node": "good", "create_time": 1.0}
    loop = {
        "id": "l",
        "mapping": {"a": node("a", "b", "user", "x"), "b": node("b", "a", "user", "y")},
        "current_node": "a",
    }
    without = {"id": "w", "mapping": {n["id"]: n for n in nodes[:4]}, "create_time": 2.0}
    entries, report = read(write_json(tmp_path / "conversations.json", [tree, loop, without]))
    assert [(e.author, e.text) for e in entries if e.line == 1] == [
        ("user", "question"),
        ("user", "see"),
        ("assistant", "answer."),
    ]
    assert [e.text for e in entries if e.line == 2] == ["y", "x"]
    assert [e.text for e in entries if e.line == 3] == ["question", "regenerated away"]
    assert report.findings.counts == {"provider_voice": 1}


def test_chatgpt_citations_that_never_end_take_no_time(tmp_path: Path) -> None:
    message = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["\ue200" * 300_000]}}
    tree = {"id": "c", "mapping": {"a": {"id": "a", "parent": None, "message": message}}, "current_node": "a"}
    begun = time.process_time()
    (entry,), _ = read(write_json(tmp_path / "conversations.json", [tree]))
    assert len(entry.text) == 300_000
    assert time.process_time() - begun < 5


def test_claude_prefers_text_parts_and_follows_parents(tmp_path: Path) -> None:
    def message(ident: str, parent: str, sender: str, text: str, *content: dict[str, str]) -> dict[str, Any]:
        times = {"created_at": "2024-05-01T12:00:00.123456Z"}
        return {
            "uuid": ident,
            "parent_message_uuid": parent,
            "sender": sender,
            "text": text,
            "content": content,
            **times,
        }

    thought = {"type": "thinking", "thinking": "hm"}
    messages = [
        message("1", "0", "human", "question"),
        message("2", "1", "assistant", "edited away"),
        message("3", "1", "assistant", "flat", thought, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}),
    ]
    entries, _ = read(write_json(tmp_path / "conversations.json", [{"uuid": "c", "chat_messages": messages}]))
    assert [(entry.author, entry.text) for entry in entries] == [("user", "question"), ("assistant", "a\nb")]


def test_sharegpt_roles_and_odd_conversations_are_kept(tmp_path: Path) -> None:
    turns = [
        {"from": f, "value": v}
        for f, v in (("system", "be"), ("human", "a"), ("human", "b"), ("gpt", "c"), ("tool", "{}"))
    ]
    rows = [{"conversations": turns, "system": "first"}, {"conversations": [{"from": "martian", "value": "x"}]}]
    entries, report = read(write_json(tmp_path / "s.json", rows))
    kinds = [("prompt", "first"), ("prompt", "be"), ("said", "a"), ("said", "b"), ("said", "c"), ("service", "{}")]
    assert [(entry.kind, entry.text) for entry in entries] == kinds
    assert report.findings.kept[0].line == 2
    assert "martian" in report.findings.kept[0].what


def test_alpaca_input_and_history(tmp_path: Path) -> None:
    row = {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]]}
    entries, _ = read(write_json(tmp_path / "a.json", [row]))
    assert [(entry.author_id, entry.text) for entry in entries] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]


def test_openai_lines_weights_tools_parts_and_broken_lines(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "developer", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]},
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "no", "weight": 0},
                {"role": "assistant", "content": "yes", "weight": 1},
            ]
        },
        {"prompt": "p", "completion": "c"},
    ]
    lines = [json.dumps(rows[0]), "", "{not json", json.dumps(rows[1]), '{"messages": 7}', '{"messages": [{"role": "us']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    entries, report = read(tmp_path / "t.jsonl")
    assert [(e.author_id, e.text, e.is_trained) for e in entries if e.kind != "service"] == [
        ("system", "be", True),
        ("user", "see", True),
        ("assistant", "no", False),
        ("assistant", "yes", True),
        ("user", "p", True),
        ("assistant", "c", True),
    ]
    assert [(f.code, f.line) for f in report.findings.kept] == [
        ("turns_not_trained", 1),
        ("message_malformed", 3),
        ("message_malformed", 5),
        ("file_broken", None),
    ]


def test_conversations_of_one_number_or_id_in_two_files_are_two(tmp_path: Path) -> None:
    row = {"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    for name in ("train", "valid"):
        write_json(tmp_path / f"export/{name}.json", [row, row])
    entries, report = read(tmp_path / "export")
    assert (len(entries), len(report.channels), report.format) == (8, 4, "sharegpt")


def test_a_line_of_json_may_be_as_long_as_a_conversation(tmp_path: Path) -> None:
    long = "word " * 400_000
    said = [{"role": "user", "content": "tell"}, {"role": "assistant", "content": long}]
    (tmp_path / "t.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 2)
    entries, report = read(tmp_path / "t.jsonl")
    assert [len(entry.text) for entry in entries] == [4, len(long)] * 2
    assert not report.findings.kept
    with open_history(tmp_path / "t.jsonl") as history:
        rewritten.write(tmp_path / "h.jsonl", "messages", history)
    assert [len(entry.text) for entry in read(tmp_path / "h.jsonl")[0]] == [4, len(long)] * 2


def test_hugging_face_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b 👩‍👩‍👧"}]}] * 600
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    entries, report = read(tmp_path / "t.parquet")
    assert (len(entries), entries[-1].text, report.format) == (1200, "b 👩‍👩‍👧", "messages")
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(content[: len(content) // 2])
    entries, report = read(tmp_path / "t.parquet")
    assert (entries, report.findings.counts) == ([], {"file_broken": 1})


def test_native_request_with_its_time(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    conversation = {"messages": messages, "platform": "discord", "timestamp": "2024-05-01T12:00:00Z"}
    entries, report = read(
        write_json(tmp_path / "r.json", {"org_id": "o", "base_model": "m", "conversations": [conversation]})
    )
    assert [(entry.kind, entry.time) for entry in entries] == [
        ("prompt", 1714564800),
        ("said", 1714564800),
        ("said", 1714564800),
    ]
    assert report.format == "native"
