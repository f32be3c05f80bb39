"""Exports over HTTP: sent as a stream, read and prepared by a process of its own, whatever becomes of it."""

from __future__ import annotations

import json
import re
import signal
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import exports
from repertory import cli
from repertory.data.history import Entry
from repertory.service.api.upload import file_name
from running_service import CONVERSATION, RunningService, eventually, lives

Start = Callable[..., RunningService]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service"), MAX_UPLOAD_GB="0.0625").until_ready()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ana answers Bob 40 times, two hours between."""
    entries = []
    for number in range(40):
        for at, (author, text) in enumerate((("bob", f"question {number}?"), ("ana", f"answer {number} to bob@x.yz"))):
            time = 1_700_000_000.0 + 7200 * number + 60 * at
            entries.append(
                Entry(channel="7", id=f"{2 * number + at + 1}", author_id=author, author=author, text=text, time=time)
            )
    return exports.telegram(entries, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def unnamed(service: RunningService, export: Path) -> str:
    """The id of the owner's dataset without a persona."""
    return str(imported(service, export, "owner")["dataset_id"])


@pytest.fixture(scope="module")
def ready(service: RunningService, export: Path) -> str:
    """The id of the owner's dataset with Ana named at once."""
    dataset = imported(service, export, "owner", persona=["ana"], exclude=["nobody"], format="telegram")
    assert dataset["status"] == "ready", dataset
    assert dataset["summary"]["persona"] == "ana"
    return str(dataset["dataset_id"])


def send(service: RunningService, path: Path, org_id: str = "a", status: int = 202, **fields: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = service.client.post("/datasets", data={"org_id": org_id} | fields, files={"file": (path.name, file)})
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def prepared(service: RunningService, dataset_id: str) -> dict[str, Any]:
    """The dataset once nothing more is going to happen."""

    def ended() -> Any:
        dataset = service.client.get(f"/datasets/{dataset_id}").json()
        return dataset["status"] not in ("queued", "preparing") and dataset

    return dict(eventually(ended))


def imported(service: RunningService, path: Path, org_id: str = "a", **fields: Any) -> dict[str, Any]:
    return prepared(service, send(service, path, org_id, **fields)["dataset_id"])


def worker(service: RunningService) -> psutil.Process | None:
    """The process that prepares, stopped where it is."""
    for preparer in service.preparers():
        preparer.send_signal(signal.SIGSTOP)
        return preparer
    return None


def stored(service: RunningService, org_id: str) -> list[Path]:
    """All that lies there for an organisation, or for none."""
    root = service.folder / "models" / "datasets"
    return [path for owner in (org_id, "_uploads") for path in (root / owner).glob("*")]


def test_an_export_becomes_a_dataset(service: RunningService, export: Path) -> None:
    accepted = send(service, export, "journey")
    assert accepted["status"] in ("queued", "preparing")  # it may have begun
    at = f"/datasets/{accepted['dataset_id']}"
    dataset = prepared(service, accepted["dataset_id"])
    assert dataset["status"] == "needs_persona"
    assert dataset["report"] is None
    assert dataset["file_bytes"] == export.stat().st_size
    table = service.client.get(f"{at}/authors").json()
    assert [(author["name"], author["messages"]) for author in table["authors"]] == [("bob", 40), ("ana", 40)]
    asked = service.client.post(f"{at}/prepare", json={"persona": ["ana"], "gap": "30m", "mask": ["bob"]})
    assert asked.status_code == 202, asked.text
    dataset = prepared(service, accepted["dataset_id"])
    assert dataset["status"] == "ready"
    assert dataset["options"] == {"persona": ["ana"], "gap": "30m", "mask": ["bob"]}
    assert dataset["summary"]["conversations"] == dataset["report"]["conversations"] == 40
    assert dataset["summary"]["recorded_authors"] == 2
    assert dataset["report"]["stages"][0]["before"] == 80
    assert dataset["report"]["surrogates"] == {"EMAIL": 40}
    tokens = dataset["report"]["tokens"]
    assert (tokens["measured"], tokens["max_tokens"], tokens["shortened"], tokens["left_out"]) == (40, 2048, 0, 0)
    assert 0 < tokens["p50"] <= tokens["p90"] <= tokens["p99"] <= tokens["longest"]
    assert service.client.get(at).json()["report"]["tokens"] == tokens
    listed = service.client.get("/datasets?org_id=journey").json()["datasets"]
    assert [one["dataset_id"] for one in listed] == [accepted["dataset_id"]]
    consent = service.folder / "models/datasets/journey" / accepted["dataset_id"] / "prepared/consent.jsonl"
    assert {len(json.loads(line)) for line in consent.read_text().splitlines()} == {2}
    assert "ana" not in consent.read_text()
    consent.write_text("[]\n")  # a disk that forgets
    answer = service.client.post("/training/start", json={"org_id": "journey", "dataset_id": accepted["dataset_id"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "dataset_damaged")
    assert service.client.delete(at).status_code == 200
    assert service.client.get(at).status_code == 404
    assert stored(service, "journey") == []


def test_an_assistant_s_conversations_need_no_persona(service: RunningService, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello")]
    said = [Entry(channel="1", id=f"{n}", author_id=r, author=r, text=t) for n, (r, t) in enumerate(turns)]
    dataset = imported(service, exports.sharegpt(said, tmp_path))
    assert dataset["status"] == "ready"
    assert dataset["summary"] | {"format": "", "authors": 0} == {
        "format": "",
        "messages": 2,
        "authors": 0,
        "persona": "assistant",
        "conversations": 1,
        "trained_turns": 1,
        "recorded_authors": 2,
        "system_prompt": None,
    }


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"org_id": "../x"}, "invalid_input", "org_id"),
        ({"org_id": ["a", "b"]}, "invalid_input", "org_id"),
        ({"format": "word"}, "format_unknown", "format"),
        ({"gap": "soon"}, "invalid_gap", "gap"),
        ({"timezone": "../../etc/passwd"}, "invalid_timezone", "timezone"),
        ({"live_since": "yesterday"}, "invalid_date", "live_since"),
        ({"column": "author"}, "invalid_column", "column"),
        ({"mask_others": "perhaps"}, "invalid_input", "mask_others"),
        ({"personna": "ana"}, "unknown_field", "personna"),
        ({"persona": "a\x00b"}, "invalid_input", "persona"),
    ],
)
def test_fields_that_are_refused(
    fields: dict[str, Any], code: str, param: str, service: RunningService, export: Path
) -> None:
    error = send(service, export, status=422, **({"org_id": "refused"} | fields))["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["cure"]
    assert stored(service, "refused") == []


def test_bodies_that_are_no_form(service: RunningService, export: Path) -> None:
    def code(**how: Any) -> tuple[int, str]:
        answer = service.client.post("/datasets", **how)
        return answer.status_code, answer.json()["error"]["code"]

    form = {"content-type": "multipart/form-data; boundary=b"}
    whole = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhello\r\n--b--\r\n'
    assert code(json={"org_id": "a"}) == (415, "unsupported_media_type")
    assert code(content=b"", headers=form) == (400, "invalid_multipart")
    assert code(content=whole[:-9], headers=form) == (400, "invalid_multipart")
    assert code(content=b"nonsense", headers=form) == (400, "invalid_multipart")
    assert code(content=whole, headers=form) == (422, "missing_field")  # org_id
    assert code(data={"org_id": "a"}, files={"picture": b"x"}) == (422, "invalid_input")
    assert code(data={"org_id": "a"}, files=[("file", b"x"), ("file", b"y")]) == (422, "several_files")
    evil = {"origin": "http://127.0.0.1:1"}  # a page of another port of this machine
    assert code(data={"org_id": "a"}, files={"file": b"x"}, headers=evil) == (403, "origin_not_allowed")
    assert stored(service, "-") == []


def test_files_from_which_nothing_can_be_made(service: RunningService, export: Path, tmp_path: Path) -> None:
    bad, bomb = tmp_path / "bad.json", tmp_path / "bomb.zip"
    bad.write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../result.json", b"0" * (8 << 20))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (bad, {}, "format_not_recognised"),
        (bomb, {}, "archive_refused"),
        (export, {"persona": "ana", "format": "irc"}, "nothing_read"),
        (export, {"persona": "anna"}, "persona_unknown"),
    ]
    ids = [(send(service, path, "broken", **fields)["dataset_id"], code) for path, fields, code in cases]
    for dataset_id, code in ids:
        dataset = prepared(service, dataset_id)
        assert (dataset["status"], dataset["error"]["code"]) == ("failed", code)
        assert dataset["error"]["cure"]
        assert str(service.folder) not in dataset["error"]["message"]
    misnamed = ids[3][0]  # what went wrong is cured without sending it again
    assert len(service.client.get(f"/datasets/{misnamed}/authors").json()["authors"]) == 2
    assert service.client.get(f"/datasets/{ids[0][0]}/authors").json()["error"]["code"] == "dataset_not_ready"
    service.client.post(f"/datasets/{misnamed}/prepare", json={"persona": ["ana"]})
    assert prepared(service, misnamed)["status"] == "ready"


def test_a_truncated_file_gives_what_is_whole(service: RunningService, export: Path, tmp_path: Path) -> None:
    cut = tmp_path / "result.json"
    cut.write_bytes(export.read_bytes()[: export.stat().st_size // 2])
    dataset = imported(service, cut, persona="ana")
    assert dataset["status"] == "ready"
    assert 10 < dataset["summary"]["conversations"] < 30
    assert dataset["report"]["findings"]["counts"]["file_broken"] == 1


def test_a_job_trains_on_a_dataset_and_outlives_it(service: RunningService, export: Path) -> None:
    dataset_id = imported(service, export, "trainer", persona="ana")["dataset_id"]
    body = {"org_id": "trainer", "dataset_id": dataset_id}
    told = service.client.post("/training/estimate", json=body).json()
    assert (told["conversations"], told["trained_tokens"]) == (40, 160)
    replayed = {"idempotency-key": "k"}
    started = service.client.post("/training/start", json=body, headers=replayed).json()["training_id"]
    assert service.client.get(f"/datasets/{dataset_id}").json()["trained"] == [started]

    def words_of(author: str, org_id: str = "trainer") -> Any:
        return service.client.get("/datasets/consent", params={"org_id": org_id, "author": author}).json()

    nothing = {"datasets": {}, "trainings": {}, "unrecorded": []}
    assert words_of("bob") == nothing | {"datasets": {dataset_id: 40}, "trainings": {started: 40}}
    assert words_of("carol") == words_of("bob", "stranger") == nothing
    assert service.client.delete(f"/datasets/{dataset_id}").status_code == 200
    metadata = service.until(started, "completed")["metadata"]
    assert (metadata["dataset_id"], metadata["conversations"], metadata["recorded_authors"]) == (dataset_id, 40, 2)
    assert metadata["train_conversations"] == 40  # that many lines the run has read
    again = service.client.post("/training/start", json=body, headers=replayed)
    assert again.json()["training_id"] == started
    assert words_of("bob") == nothing | {"trainings": {started: 40}}  # the voice has learned from them


def test_what_a_job_cannot_be_trained_on(service: RunningService, unnamed: str) -> None:
    def refused(**body: Any) -> tuple[int, str, str]:
        start, estimate = (
            service.client.post(f"/training/{call}", json={"org_id": "owner"} | body) for call in ("start", "estimate")
        )
        assert start.json()["error"] | {"request_id": ""} == estimate.json()["error"] | {"request_id": ""}
        error = start.json()["error"]
        return start.status_code, error["code"], error["param"]

    assert refused(dataset_id=unnamed) == (409, "dataset_not_ready", "dataset_id")
    assert refused(dataset_id=unnamed, conversations=[CONVERSATION]) == (422, "invalid_input", "dataset_id")
    assert refused() == (422, "missing_field", "conversations")
    assert refused(dataset_id=unnamed, org_id="stranger") == (404, "dataset_not_found", "dataset_id")


def test_a_preview_shows_rows_with_what_is_learned_marked(service: RunningService, ready: str, unnamed: str) -> None:
    shown = service.client.get(f"/datasets/{ready}/preview?count=4").json()
    assert len(shown["rows"]) == 4
    assert [message["content"] for message in shown["rows"][1]["messages"]] == [
        "You are ana, chatting.",
        "question 10?",
        "answer 10 to <EMAIL_1>",
    ]
    assert [span["trained"] for span in shown["rows"][1]["spans"]] == [False, False, True]
    assert service.client.get(f"/datasets/{ready}/preview?count=100").json()["rows"][39]["tokens"] > 0
    missing = service.client.get(f"/datasets/{ready}/preview?base_model=../x")
    assert missing.status_code == 422
    assert service.client.get(f"/datasets/{unnamed}/preview").json()["error"]["code"] == "dataset_not_ready"
    assert service.client.get(f"/datasets/{ready}/preview?org_id=stranger").status_code == 404


def test_nobody_sees_another_s_dataset(service: RunningService, ready: str) -> None:
    def refusals(dataset_id: str) -> list[Any]:
        at, other = f"/datasets/{dataset_id}", {"org_id": "stranger"}
        answers = [
            service.client.get(at, params=other),
            service.client.get(f"{at}/authors", params=other),
            service.client.get(f"{at}/preview", params=other),
            service.client.post(f"{at}/prepare", params=other, json={"persona": ["bob"]}),
            service.client.delete(at, params=other),
        ]
        return [(one.status_code, {**one.json()["error"], "request_id": ""}) for one in answers]

    assert refusals(ready) == refusals("data_0123456789abcdef")
    assert {status for status, _ in refusals(ready)} == {404}
    assert service.client.get("/datasets?org_id=stranger").json() == {"datasets": []}
    assert service.client.get(f"/datasets/{ready}?org_id=owner").json()["status"] == "ready"


def test_a_large_upload_does_not_grow_the_service(service: RunningService, tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    with path.open("w") as file:
        file.write("author,text\n")
        for number in range(500):
            file.write(f"{('ana', 'bob')[number % 2]},{number}{'x' * 100_000}\n")
    assert path.stat().st_size > 50e6
    before = peak_bytes(service)
    dataset_id = send(service, path, "large", persona="ana")["dataset_id"]
    assert peak_bytes(service) - before < 16 << 20
    service.client.delete(f"/datasets/{dataset_id}")
    assert stored(service, "large") == []


def peak_bytes(service: RunningService) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10


def test_a_file_above_the_limit_is_refused(service: RunningService, tmp_path: Path) -> None:
    # Declared: refused before it is sent.
    head = (
        "POST /api/v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: {3 << 30}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(65):
            yield bytes(1 << 20)

    answer = service.client.post(
        "/datasets", content=endless(), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 413
    assert "0.0625 GiB that MAX_UPLOAD_GB allows" in answer.json()["error"]["message"]
    assert stored(service, "-") == []


def test_an_upload_that_breaks_off_leaves_nothing(service: RunningService) -> None:
    head = (
        "POST /api/v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        'Content-Length: 10000\r\n\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhello'
    )
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode())
        eventually(lambda: stored(service, "-"))
    eventually(lambda: stored(service, "-") == [])


def test_the_worker_killed_is_an_error_with_a_cure(start_service: Start, export: Path) -> None:
    service = start_service()
    dataset_id = send(service, export, persona="ana")["dataset_id"]
    eventually(lambda: worker(service)).kill()
    error = prepared(service, dataset_id)["error"]
    assert error["code"] == "preparation_died"
    assert "killed by signal 9" in error["message"]
    assert "memory" in error["cure"]
    service.client.post(f"/datasets/{dataset_id}/prepare", json={"persona": ["ana"]})
    assert prepared(service, dataset_id)["status"] == "ready"


def test_an_accepted_export_survives_kill_9_and_its_worker_does_not(start_service: Start, export: Path) -> None:
    service = start_service()
    first, second = (send(service, export, persona="ana")["dataset_id"] for _ in range(2))
    busy = eventually(lambda: worker(service))
    assert service.client.get(f"/datasets/{first}").json()["status"] == "preparing"
    service.kill()
    eventually(lambda: not lives(busy))
    # As if it had died between the row and the names of the folders.
    folder = service.folder / "models/datasets/a"
    (folder / second).rename(folder / f"{second}.pending")
    (folder / "data_unanswered.pending").mkdir()
    service.start()
    assert [prepared(service, one)["status"] for one in (first, second)] == ["ready", "ready"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([first, second])


def test_deleting_stops_the_worker(start_service: Start, export: Path) -> None:
    service = start_service()
    dataset_id = send(service, export, persona="ana")["dataset_id"]
    busy = eventually(lambda: worker(service))
    again = service.client.post(f"/datasets/{dataset_id}/prepare", json={"persona": ["bob"]})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "dataset_not_ready")
    assert service.client.delete(f"/datasets/{dataset_id}").status_code == 200
    assert not busy.is_running()
    assert stored(service, "a") == []
    assert imported(service, export, persona="ana")["status"] == "ready"  # the next one has its turn


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("result.json", "result.json"),
        ("../../etc/passwd", "passwd"),
        (r"C:\exports\Chat mit Jörg.txt", "Chat mit Jörg.txt"),
        ("..", "export"),
        (".hidden\n.json", "hidden_.json"),
        ("x" * 300 + ".json", "x" * 95 + ".json"),
        ("", "export"),
    ],
)
def test_names_under_which_files_are_stored(sent: str, kept: str) -> None:
    assert file_name(sent) == kept


def test_conversations_of_a_request_are_looked_through_and_changed_only_if_asked(service: RunningService) -> None:
    said = {
        "messages": [{"role": "user", "content": "your mail?"}, {"role": "assistant", "content": "ana@x.yz"}],
        "platform": "discord",
    }
    body = {"org_id": "inline", "conversations": [CONVERSATION, said, said]}
    expected = {"little_data": 1, "personal_data": 2, "exact_duplicate": 1}
    told = service.client.post("/training/estimate", json=body).json()
    assert (told["conversations"], told["findings"]["counts"]) == (3, expected)

    def started(**more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        training_id = service.client.post("/training/start", json=body | more).json()["training_id"]
        found = service.client.get(f"/training/findings/{training_id}").json()["findings"]
        assert (found["counts"], found["kept"][1]["path"]) == (expected, "conversations[1].messages[1].content")
        lines = (service.folder / "models/datasets/inline" / training_id / "conversations.jsonl").read_text()
        return service.status(training_id)["metadata"], [json.loads(line) for line in lines.splitlines()]

    metadata, stored = started()
    assert stored == body["conversations"]
    assert (metadata["findings"], "prepared" in metadata) == (expected, False)
    metadata, stored = started(prepare=True)
    clean = {**said, "messages": [said["messages"][0], {"role": "assistant", "content": "<EMAIL_1>"}]}
    assert stored == [CONVERSATION, clean]
    assert metadata["prepared"] == {"surrogates": {"EMAIL": 2}, "duplicates": {"exact_duplicate": 1}}
    assert metadata["conversations"] == 2


def test_a_refusal_has_all_findings_of_the_conversations(service: RunningService) -> None:
    wrong = {"messages": [{"role": "bot", "content": "hi"}, {"role": "assistant", "content": "", "mood": "sad"}]}
    answer = service.client.post("/training/start", json={"org_id": "inline", "conversations": [wrong] * 400})
    error = answer.json()["error"]
    assert answer.status_code == 422
    assert len(error["details"]) == 20
    findings = error["findings"]
    assert findings["counts"] == {"invalid_input": 800, "unknown_field": 400}
    assert len(findings["kept"]) == 1000
    assert [(one["path"], one["code"], one["severity"]) for one in findings["kept"][:3]] == [
        ("conversations[0].messages[0].role", "invalid_input", "error"),
        ("conversations[0].messages[1].content", "invalid_input", "error"),
        ("conversations[0].messages[1].mood", "unknown_field", "error"),
    ]
    assert all(one["what"] and one["cure"] for one in findings["kept"])


def test_an_author_s_words_are_deleted_everywhere_and_the_voice_is_marked(
    start_service: Start, export: Path, tmp_path: Path
) -> None:
    service, org = start_service().until_ready(), "org"
    said = [("bob", "the zebra question, Carla"), ("ana", "asked Carla"), ("carla", "my walrus"), ("ana", "yes carla")]
    said += [("bob", "another day"), ("ana", "another answer")]
    entries = [
        Entry(channel="7", id=f"{n}", author_id=who, author=who.capitalize(), text=text, time=1.7e9 + 60 * n)
        for n, (who, text) in enumerate(said[:4], 1)
    ] + [
        Entry(channel="7", id=f"{n}", author_id=who, author=who.capitalize(), text=text, time=1.71e9 + 60 * n)
        for n, (who, text) in enumerate(said[4:], 5)
    ]
    path = exports.telegram(entries, tmp_path)
    dataset_id = imported(service, path, "org", persona="ana", gap="30m")["dataset_id"]
    other = imported(service, export, "org", persona="ana")["dataset_id"]
    bystander = service.trained("org")
    voice = service.trained("org", conversations=None, dataset_id=dataset_id)
    sent = [
        {"messages": [{"role": "user", "content": "a walrus"}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "no"}]},
    ]
    told_of = [one | {"authors": ["ana", who]} for one, who in zip(sent, ("carla", "bob"), strict=True)]
    inline = service.trained("org", conversations=told_of)
    assert service.status(inline)["metadata"]["recorded_authors"] == 3

    def remains(word: str) -> list[str]:
        files = [path for path in (service.folder / "models").rglob("*") if path.is_file() and ".db" not in path.name]
        told = [service.client.get(at).text for at in (f"/training/jobs/{org}", f"/models/{org}/info")]
        found = [str(path) for path in files if word.encode() in path.read_bytes().lower()]
        return sorted(found) + [text for text in told if word in text.lower()]

    def listed() -> dict[str, Any]:
        models = service.client.get("/models/org/list").json()["models"]
        return {model["model_id"]: model["metadata"].get("deleted_authors") for model in models}

    assert len(remains("walrus")) >= 5  # the export, the dataset, the job, its version, the other job
    assert listed() == {voice: None, inline: None, bystander: None}
    (tmp_path / "noise.bin").write_bytes(b"\x89PNG")
    unread = imported(service, tmp_path / "noise.bin", "org")["dataset_id"]
    told = CliRunner().invoke(cli.app, ["forget", "carla", "--org", "org", "--url", service.url])
    assert told.exit_code == 0, told.output
    assert told.stdout == (
        f"{dataset_id} is written anew (1 conversations with them)\n"
        + "".join(
            f"{name} is marked: it learned from these words (1 conversations with them)\n"
            for name in sorted([voice, inline])
        )
        + f"{unread} could never be read: delete it if the words may be in it\n"
        f"{bystander} was sent conversations that do not say whose words are in them: look into those yourself\n"
    )
    dataset = prepared(service, dataset_id)
    assert (dataset["status"], dataset["summary"]["format"], dataset["summary"]["messages"]) == ("ready", "telegram", 5)
    assert remains("walrus") == remains("carla") == []
    marked = listed()
    assert (len(marked[voice]), marked[inline], marked[bystander]) == (1, marked[voice], None)
    assert "carla" not in marked[voice]
    metadata = service.status(voice)["metadata"]
    assert (metadata["deleted_authors"], "test_responses" in metadata["report"]) == (marked[voice], False)
    assert service.client.post("/generate?org_id=org", json={"message": "hi", "model_id": voice}).status_code == 200
    lines = (service.folder / "models/datasets/org" / voice / "conversations.jsonl").read_text().splitlines()
    assert [line and json.loads(line)["messages"][0]["content"] for line in lines] == ["", "another day"]
    assert service.client.get(f"/datasets/{other}").json()["status"] == "ready"
    again = service.client.delete("/datasets/consent", params={"org_id": "org", "author": "carla"})
    assert (again.status_code, again.json()["datasets"], again.json()["trainings"]) == (202, {}, {})
    assert CliRunner().invoke(cli.app, ["forget", "carla", "--url", "http://localhost:1"]).exit_code == 8
    # What is left can be prepared again, with other options.
    service.client.post(f"/datasets/{dataset_id}/prepare", json={"persona": ["ana"], "gap": "2h"})
    assert prepared(service, dataset_id)["status"] == "ready"
    assert remains("walrus") == []


def test_deleting_words_survives_kill_9(start_service: Start, export: Path) -> None:
    service = start_service()
    dataset_id = imported(service, export, persona="ana")["dataset_id"]
    assert service.client.delete("/datasets/consent?org_id=a&author=bob").status_code == 202
    busy = eventually(lambda: worker(service))
    refused = service.client.delete("/datasets/consent?org_id=a&author=ana")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "dataset_not_ready")
    service.kill()
    eventually(lambda: not lives(busy))
    folder = service.folder / "models/datasets/a" / dataset_id
    assert (folder / "forget.json").exists()
    service.start()
    dataset = prepared(service, dataset_id)
    assert dataset["error"]["code"] == "nothing_to_learn"  # Ana answered nobody else
    assert sorted(path.name for path in folder.iterdir()) == ["authors.json", "history.jsonl"]
    assert b"question" not in (folder / "history.jsonl").read_bytes()


def test_words_that_are_being_learned_cannot_be_deleted(slow_service: RunningService, export: Path) -> None:
    dataset_id = imported(slow_service, export, "learning", persona="ana")["dataset_id"]
    training_id = slow_service.train("learning", conversations=None, dataset_id=dataset_id)
    at = "/datasets/consent?org_id=learning&author=bob"
    refused = slow_service.client.delete(at)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "words_in_use")
    assert slow_service.client.get(f"/datasets/{dataset_id}").json()["status"] == "ready"
    assert slow_service.client.delete(f"/training/jobs/{training_id}").status_code == 200
    assert slow_service.client.delete(at).json()["trainings"] == {training_id: 40}


def test_two_are_prepared_at_once_and_no_organisation_waits_for_another_s_hundred(
    start_service: Start, export: Path
) -> None:
    service = start_service()
    many = [send(service, export, "many", persona="ana")["dataset_id"] for _ in range(3)]
    stopped = [eventually(lambda: worker(service))]
    few = send(service, export, "few", persona="ana")["dataset_id"]
    assert prepared(service, few)["status"] == "ready"  # while the first of the many stands still
    statuses = [service.client.get(f"/datasets/{one}").json()["status"] for one in many]
    assert statuses == ["preparing", "queued", "queued"]  # of one organisation one at a time
    late = send(service, export, "late", persona="ana")["dataset_id"]
    stopped[0].send_signal(signal.SIGCONT)
    assert {prepared(service, one)["status"] for one in [*many, late]} == {"ready"}
    starts = [json.loads(line)["dataset_id"] for line in service.log.splitlines() if '"import starts"' in line]
    assert starts.index(late) < starts.index(many[2])
