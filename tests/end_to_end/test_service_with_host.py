"""The real service with real hosts over real HTTP, on tiny base models."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

import exports
from fake_hub import running_hub
from repertory.data.history import Entry
from repertory_fixtures import conversation
from running_service import RunningService, eventually

GATED = "meta-llama/Llama-2-7b-chat-hf"


@pytest.fixture(scope="module")
def service(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_hub() as hub:
        hub.add(GATED, cache / "tiny/llama-gqa", is_gated=True)
        running = RunningService(
            tmp_path_factory.mktemp("service"),
            HOST_MODULE="repertory.model.host",
            MODEL_CACHE_DIR=str(cache),
            DEFAULT_BASE_MODEL="tiny/llama-gqa",
            HF_ENDPOINT=hub.url,
            OMP_NUM_THREADS="1",
        )
        yield running.until_ready()
        assert running.stop() == 0


def chats(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [conversation(1 + at % 3, first + at).model_dump(mode="json", exclude_none=True) for at in range(count)]


QUICK = {"learning_rate": 5e-3, "batch_size": 2, "gradient_accumulation_steps": 2}
LONG = {"num_epochs": 60, "hyperparameters": QUICK | {"save_steps": 5}}


def say(service: RunningService, org_id: str, message: str = "Hello!", **asked: Any) -> dict[str, Any]:
    body = {"message": message, "temperature": 0, "max_tokens": 16} | asked
    answer = service.client.post(f"/generate?org_id={org_id}", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_from_conversations_to_a_voice(service: RunningService) -> None:
    training_id = service.trained("pirate", conversations=chats(24), num_epochs=3, hyperparameters=QUICK)
    job = service.status(training_id)
    assert job["progress"] == 1.0
    assert job["started_at"] <= job["completed_at"]
    metadata = job["metadata"]
    assert metadata["step"] == metadata["total_steps"] > 0
    assert metadata["report"]["perplexity"] < metadata["report"]["base_perplexity"]
    reply = say(service, "pirate")
    assert reply["model_info"]["loaded"]
    assert reply["model_info"]["model_path"].endswith(f"pirate/{training_id}")
    assert "Hello!" not in reply["response"]
    assert reply["response"] != say(service, "pirate", model_id="base")["response"]
    listed = service.client.get("/models/pirate/list").json()
    assert [model["model_id"] for model in listed["models"]] == [training_id]
    metrics = service.client.post("/training/evaluate", json={"org_id": "pirate", "model_id": "latest"}).json()[
        "metrics"
    ]
    assert metrics["perplexity"] == pytest.approx(metadata["report"]["perplexity"], rel=1e-4)


def test_a_job_goes_on_from_the_organisations_earlier_version(service: RunningService) -> None:
    shape = {"lora_r": 4, "lora_target_modules": "v_proj,q_proj"}
    first = service.trained("sequel", conversations=chats(24), num_epochs=3, hyperparameters=QUICK | shape)
    body = {"org_id": "sequel", "conversations": chats(24, 50), "num_epochs": 1, "hyperparameters": QUICK}
    second = service.status(service.trained(**body, continue_from="latest"))["metadata"]
    assert second["continued_from"] == first
    assert second["hyperparameters"]["lora_r"] == 4
    assert second["hyperparameters"]["lora_target_modules"] == ["q_proj", "v_proj"]

    def refused(**asked: Any) -> dict[str, Any]:
        answer = service.client.post("/training/start", json=body | {"continue_from": first} | asked)
        assert answer.status_code in (404, 422), answer.text
        return dict(answer.json()["error"])

    assert refused(hyperparameters={"lora_r": 8})["param"] == "hyperparameters.lora_r"
    assert refused(hyperparameters={"use_4bit": True})["code"] == "differs_from_continued"
    assert refused(base_model="tiny/mistral")["param"] == "base_model"
    assert refused(org_id="stranger")["code"] == "model_not_found"
    assert refused(continue_from="base")["code"] == "model_not_found"


def test_an_estimate_says_what_the_job_then_is(service: RunningService) -> None:
    body = {"org_id": "planned", "conversations": chats(24), "num_epochs": 3, "hyperparameters": QUICK}
    told = service.client.post("/training/estimate", json=body).json()
    metadata = service.status(service.trained(**body))["metadata"]
    assert told["tokens"] == metadata["training_tokens"]
    assert told["trained_tokens"] == metadata["trained_tokens"]
    assert told["steps"] == metadata["total_steps"]
    assert told["hyperparameters"] == metadata["hyperparameters"]
    assert told["fits"]
    assert 0 < told["peak_memory_bytes"] < told["available_memory_bytes"]
    assert service.client.post("/training/estimate", json=body).json()["seconds"] > 0  # measured by now


def test_a_base_model_that_is_not_in_memory_is_estimated_without_loading_it(service: RunningService) -> None:
    hosts = len(service.client.get("/health").json()["hosts"])
    body = {"org_id": "planned", "conversations": chats(4), "base_model": "tiny/mistral"}
    told = service.client.post("/training/estimate", json=body).json()
    assert told["tokens"] > told["trained_tokens"] > 0
    assert told["seconds"] is None
    assert told["peak_memory_bytes"] > 0
    assert len(service.client.get("/health").json()["hosts"]) == hosts
    gated = service.client.post("/training/estimate", json=body | {"base_model": GATED})
    assert gated.status_code == 503
    assert gated.json()["error"]["code"] == "base_model_gated"
    assert "HUGGINGFACE_TOKEN" in gated.json()["error"]["cure"]
    missing = service.client.post("/training/estimate", json=body | {"base_model": "acme/nowhere"})
    assert missing.status_code == 422
    assert missing.json()["error"]["code"] == "base_model_not_found"
    endless = [{"role": "user", "content": "sing"}, {"role": "assistant", "content": "arr " * 900}]
    too_long = service.client.post("/training/estimate", json=body | {"conversations": [{"messages": endless}]})
    assert too_long.status_code == 422
    assert too_long.json()["error"]["code"] == "data_unusable"


def test_from_a_chat_export_to_a_voice(service: RunningService, tmp_path: Path) -> None:
    said: list[Entry] = []
    for number, chat in enumerate(chats(24)):
        for at, message in enumerate(chat["messages"]):
            author, time = ("ana" if message["role"] == "assistant" else "bob"), 1.7e9 + 7200 * number + 60 * at
            entry = Entry(channel="7", id=f"{len(said) + 1}", author_id=author, author=author, text=message["content"])
            said.append(replace(entry, time=time, channel=f"{number % 2}"))
    archive = shutil.make_archive(str(tmp_path / "export"), "zip", exports.discord(said, tmp_path))
    form = {"org_id": "exporter", "persona": "ana"}
    with Path(archive).open("rb") as file:
        sent = service.client.post("/datasets", data=form, files={"file": ("export.zip", file)})
    at = f"/datasets/{sent.json()['dataset_id']}"
    dataset = eventually(lambda: (now := service.client.get(at).json())["status"] in ("ready", "failed") and now)
    assert dataset["status"] == "ready", dataset
    assert dataset["summary"]["format"] == "discord"
    rows = service.client.get(f"{at}/preview?count=100").json()["rows"]
    assert len(rows) == dataset["summary"]["conversations"]
    for row in rows:
        learned = [span["text"] for span in row["spans"] if span["trained"]]
        assistant = [m["content"] for m in row["messages"] if m["role"] == "assistant" and m["weight"] == 1]
        assert learned == [f"{content}<|im_end|>" for content in assistant]
        assert row["trained_tokens"] < row["tokens"]
    tokens = service.client.get(at).json()["report"]["tokens"]
    lengths = sorted(row["tokens"] for row in rows)
    assert (tokens["measured"], tokens["p50"], tokens["longest"]) == (
        len(rows),
        lengths[round((len(rows) - 1) / 2)],
        lengths[-1],
    )
    assert tokens["trained_share"] == pytest.approx(sum(r["trained_tokens"] for r in rows) / sum(lengths), abs=0.001)
    body = {"org_id": "exporter", "dataset_id": dataset["dataset_id"], "num_epochs": 3, "hyperparameters": QUICK}
    told = service.client.post("/training/estimate", json=body).json()
    job = service.until(service.client.post("/training/start", json=body).json()["training_id"], "completed", "failed")
    assert job["status"] == "completed", job
    assert job["metadata"]["trained_tokens"] == told["trained_tokens"]
    assert sum(row["trained_tokens"] for row in rows) > told["trained_tokens"]  # some of them are held out
    assert job["metadata"]["report"]["perplexity"] < job["metadata"]["report"]["base_perplexity"]
    assert say(service, "exporter")["model_info"]["model_path"].endswith(job["training_id"])
    # Bob's words are in all of them: nothing is left to measure the voice on, and it goes on speaking.
    gone = service.client.delete("/datasets/consent", params={"org_id": "exporter", "author": "bob"})
    assert gone.json()["trainings"] == {job["training_id"]: len(rows)}
    unmeasured = service.client.post("/training/evaluate", json={"org_id": "exporter"})
    assert (unmeasured.status_code, unmeasured.json()["error"]["code"]) == (422, "data_unusable")
    marked = say(service, "exporter")["model_info"]["metadata"]["deleted_authors"]
    assert len(marked) == 1
    report = (service.folder / "models/finetuned/exporter" / job["training_id"] / "report.json").read_text()
    assert "test_responses" not in report
    eventually(lambda: service.client.get(at).json()["status"] == "failed")  # nothing to learn is left
    longest = max((entry.text for entry in said if entry.author == "bob"), key=len).encode()
    files = [path for path in (service.folder / "models").glob("*/exporter/**/*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert not [path for path in files if longest in path.read_bytes()]


def test_several_voices_answer_at_once_each_its_own(service: RunningService) -> None:
    for at, org_id in enumerate(("a", "b", "c")):
        service.trained(org_id, conversations=chats(12, 100 * at), num_epochs=2, hyperparameters=QUICK)
    alone = {org_id: say(service, org_id)["response"] for org_id in ("a", "b", "c")}
    together: dict[str, set[str]] = {org_id: set() for org_id in alone}

    def ask(org_id: str) -> None:
        for _ in range(4):
            together[org_id].add(say(service, org_id)["response"])

    threads = [threading.Thread(target=ask, args=(org_id,)) for org_id in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {org_id: {text} for org_id, text in alone.items()}


def openai_client(service: RunningService) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0, http_client=http)


def test_openais_client_hears_each_voice_each_version_and_the_base_as_they_are(service: RunningService) -> None:
    older = service.trained("oa-a", conversations=chats(12), num_epochs=2, hyperparameters=QUICK)
    newer = service.trained("oa-a", conversations=chats(12, 100), num_epochs=2, hyperparameters=QUICK)
    other = service.trained("oa-b", conversations=chats(12, 200), num_epochs=2, hyperparameters=QUICK)
    warm: Any = {"temperature": 1, "seed": 1}
    expected = {
        f"oa-a@{older}": (older, say(service, "oa-a", model_id=older, **warm)["response"]),
        "oa-a": (newer, say(service, "oa-a", **warm)["response"]),
        "oa-b": (other, say(service, "oa-b", **warm)["response"]),
        "tiny/llama-gqa": ("tiny/llama-gqa", say(service, "oa-b", model_id="base", **warm)["response"]),
    }
    assert len({text for _, text in expected.values()}) == 4
    heard = {}
    with openai_client(service) as client:
        for model in expected:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello!"}], max_completion_tokens=16, **warm
            )
            heard[model] = (reply.system_fingerprint, reply.choices[0].message.content)
        assert heard == expected
        with pytest.raises(openai.NotFoundError):  # another organisation's version
            client.chat.completions.create(model=f"oa-b@{older}", messages=[{"role": "user", "content": "Hello!"}])


def test_openais_client_gets_what_its_parameters_say(service: RunningService) -> None:
    exact = QUICK | {
        "dtype": "fp32"
    }  # in bf16 a reply's rounding, and so its text, depends on who else is in the batch
    service.trained("oa-seeds", conversations=chats(12), num_epochs=1, hyperparameters=exact)
    asked: Any = {"model": "oa-seeds", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 1.5}
    with openai_client(service) as client:

        def texts(**more: Any) -> list[str]:
            choices = client.chat.completions.create(**asked | {"max_tokens": 24} | more).choices
            return [choice.message.content or "" for choice in choices]

        three = texts(n=3, seed=7)
        assert three == texts(n=3, seed=7)
        assert len(set(three)) == 3
        assert texts(seed=8) == three[1:2]
        longest = max(three, key=len)
        stop = longest[len(longest) // 2 :][:1]
        told = texts(seed=7 + three.index(longest), stop=[stop, "never said"])
        assert told == [longest[: longest.index(stop)].rstrip()]
        with pytest.raises(openai.BadRequestError) as refused:
            texts(messages=[{"role": "user", "content": "word " * 2000}])
        assert (refused.value.code, refused.value.param) == ("prompt_too_long", "messages")
        raw = client.completions.create(model="oa-seeds", prompt="Hello! Hey, how", max_tokens=8, temperature=0)
        again = client.completions.create(
            model="oa-seeds", prompt=["ok", "Hello! Hey, how"], max_tokens=8, temperature=0
        )
        assert again.choices[1].text == raw.choices[0].text
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="oa-seeds", prompt="word " * 2000)
        assert (refused.value.code, refused.value.param) == ("prompt_too_long", "prompt")


def test_emoji_and_cjk_stream_in_whole_characters(service: RunningService) -> None:
    said = "👩‍👩‍👧 日本語です 🏴‍☠️"
    spoken = [
        {"messages": [{"role": "user", "content": hi}, {"role": "assistant", "content": said}]} for hi in ("Hi", "ok")
    ]
    service.trained("oa-signs", conversations=spoken * 4, num_epochs=40, hyperparameters=QUICK)
    with openai_client(service) as client:
        chunks = client.chat.completions.create(
            model="oa-signs",
            messages=[{"role": "user", "content": "Hi"}],
            temperature=0,
            max_tokens=100,
            stream=True,
            logprobs=True,
        )
        choices = [chunk.choices[0] for chunk in chunks]
    pieces = [choice.delta.content for choice in choices if choice.delta.content]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content or []]
    assert "".join(pieces) == said
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(tokens) > len(pieces)  # characters of several tokens
    assert all(token.bytes is None for token in tokens if "\ufffd" in token.token)


def test_a_second_base_model_gets_a_host_of_its_own(service: RunningService) -> None:
    training_id = service.trained("qwen", conversations=chats(12), base_model="tiny/qwen2", hyperparameters=QUICK)
    assert service.status(training_id)["metadata"]["base_model"] == "tiny/qwen2"
    assert say(service, "qwen")["response"] is not None
    hosts = service.client.get("/health").json()["hosts"]
    assert {host["base_model"] for host in hosts} == {"tiny/llama-gqa", "tiny/qwen2"}


def test_a_quantized_job_runs_and_answers_on_its_own_precision(service: RunningService) -> None:
    quantized = QUICK | {"use_4bit": True, "lora_target_modules": "q_proj,v_proj"}
    training_id = service.trained("small", conversations=chats(8), num_epochs=1, hyperparameters=quantized)
    metadata = service.status(training_id)["metadata"]
    assert metadata["quantization"] == "4bit"
    assert metadata["hyperparameters"]["lora_target_modules"] == ["q_proj", "v_proj"]
    assert say(service, "small")["model_info"]["metadata"]["quantization"] == "4bit"


def test_requests_are_answered_while_training_and_cancelling_really_stops_it(service: RunningService) -> None:
    training_id = service.train("busy", conversations=chats(60), **LONG)
    service.until(training_id, "running")
    eventually(lambda: service.status(training_id)["metadata"].get("step", 0) >= 2)
    service.trained("other", conversations=chats(3), num_epochs=1, hyperparameters=QUICK | {"use_8bit": True})
    assert say(service, "nobody", model_id="base")["response"] is not None
    assert service.status(training_id)["status"] == "running"
    assert service.client.delete(f"/training/jobs/{training_id}").status_code == 200
    assert service.status(training_id)["status"] == "cancelled"
    eventually(lambda: all(host["runs"] == 0 for host in service.client.get("/health").json()["hosts"]))
    assert service.client.delete(f"/training/jobs/{training_id}").status_code == 200
    missing = service.client.post("/generate?org_id=busy", json={"message": "Hello!"})
    assert missing.json()["error"]["code"] == "model_not_found"


def test_a_killed_host_comes_back_and_its_run_goes_on_from_the_checkpoint(service: RunningService) -> None:
    training_id = service.train(
        "phoenix", conversations=chats(40), num_epochs=8, hyperparameters=QUICK | {"save_steps": 5}
    )
    eventually(lambda: service.status(training_id)["metadata"].get("checkpoint_step", 0) >= 5)
    host = service.host_of("tiny/llama-gqa")
    assert host is not None
    host.send_signal(signal.SIGKILL)
    job = service.until(training_id, "completed", "failed")
    assert job["status"] == "completed", job["error"]
    assert job["metadata"]["resumed_from_step"] >= 5
    assert say(service, "phoenix")["response"] is not None


def test_a_killed_service_loses_nothing_and_leaves_no_host(service: RunningService) -> None:
    before = say(service, "pirate")["response"]
    training_id = service.train(
        "lazarus", conversations=chats(40), num_epochs=8, hyperparameters=QUICK | {"save_steps": 5}
    )
    eventually(lambda: service.status(training_id)["metadata"].get("checkpoint_step", 0) >= 5)
    hosts = service.hosts()
    assert hosts
    service.kill()
    eventually(lambda: not any(host.is_running() and host.status() != "zombie" for host in hosts))
    service.start()
    service.until_ready()
    job = service.until(training_id, "completed", "failed")
    assert job["status"] == "completed", job["error"]
    assert job["metadata"]["resumed_from_step"] >= 5
    assert say(service, "pirate")["response"] == before


def test_a_base_model_that_cannot_be_had_fails_the_job_with_its_name_reason_and_cure(service: RunningService) -> None:
    training_id = service.train("org_123", base_model=GATED)
    job = service.until(training_id, "failed", "completed")
    assert job["status"] == "failed"
    assert job["error"]["code"] == "base_model_gated"
    assert GATED in job["error"]["message"]
    assert "HUGGINGFACE_TOKEN" in job["error"]["cure"]


def test_the_personality_client_is_understood_byte_for_byte(service: RunningService) -> None:
    """As it is sent: no org_id, so the organisation must be the only one with a model, or DEFAULT_ORG_ID."""
    body = (
        b'{"system_prompt":"You are a pirate.","history":[{"role":"user","content":"hi"},'
        b'{"role":"assistant","content":"arr"}],"message":"Hello!","temperature":0.8,"max_tokens":500}'
    )
    answer = service.client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422  # several organisations have a voice here, so it must be told which
    assert answer.json()["error"]["param"] == "org_id"
    assert "DEFAULT_ORG_ID" in answer.json()["error"]["cure"]


def test_the_personality_client_needs_no_org_id_where_a_default_is_set(service: RunningService) -> None:
    service.stop()
    service.environment["DEFAULT_ORG_ID"] = "pirate"
    service.start()
    service.until_ready()
    body = b'{"system_prompt":"You are a pirate.","history":[],"message":"Hello!","temperature":0.8,"max_tokens":500}'
    answer = service.client.post("/generate", content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["response"], str)


def test_nothing_is_left_behind_in_the_temporary_folder(service: RunningService) -> None:
    folders = {Path(host.cmdline()[host.cmdline().index("--socket") + 1]).parent for host in service.hosts()}
    assert len(folders) == 1
    service.stop()
    assert not any(folder.exists() for folder in folders)
    service.start()
    service.until_ready()
