"""What every refusal has: the one error body, the place, nothing stored. tests/bad_inputs has what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from refusals import START, conversation, error_of, message
from repertory import architectures
from running_service import RunningService

UNSUPPORTED = {
    "encoder-decoder": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    "not causal": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "state space": {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
    "no attention interface": {"model_type": "bloom", "architectures": ["BloomForCausalLM"]},
    "sees pictures": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
    "classifier": {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    "nonsense": {"model_type": ["llama"], "architectures": "LlamaForCausalLM"},
    "no type": {},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
@pytest.mark.parametrize("call", ["start", "estimate"])
def test_an_unsupported_architecture_is_refused_with_the_list_of_what_is_supported(
    service: RunningService, case: str, call: str
) -> None:
    folder = service.folder / "models" / "cache" / "unsupported" / case.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(UNSUPPORTED[case]))
    body = START | {"org_id": "unsupported", "base_model": f"unsupported/{folder.name}"}
    answer = service.client.post(f"/training/{call}", json=body)
    assert answer.status_code == 422
    error = error_of(answer)
    assert error["code"] == "unsupported_architecture"
    assert error["param"] == "base_model"
    assert all(name in error["cure"] for name in architectures.SUPPORTED.values())
    assert service.client.get("/training/jobs/unsupported").json() == {"jobs": []}


@pytest.mark.parametrize("call", ["start", "estimate"])
def test_an_unsupported_architecture_that_only_the_hub_knows_is_refused_with_the_list(
    service: RunningService, call: str
) -> None:
    body = START | {"org_id": "unsupported", "base_model": "acme/unsupported"}
    answer = service.client.post(f"/training/{call}", json=body)
    assert answer.status_code == 422
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("unsupported_architecture", "base_model")
    assert all(name in error["cure"] for name in architectures.SUPPORTED.values())
    assert service.client.get("/training/jobs/unsupported").json() == {"jobs": []}


def test_a_supported_architecture_is_accepted(service: RunningService) -> None:
    folder = service.folder / "models" / "cache" / "supported" / "llama"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    service.train("supported", base_model="supported/llama")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/health/", 404, "not_found"),
        ("PUT", "/training/start", 405, "method_not_allowed"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("GET", "/training/status/train_0", 404, "training_not_found"),
        ("GET", "/training/status/%00", 404, "training_not_found"),
        ("GET", "/training/status/..%2f..%2fetc", 404, "not_found"),
        ("DELETE", "/training/jobs/train_0", 404, "training_not_found"),
        ("GET", "/models/nobody/info", 404, "model_not_found"),
        ("GET", "/models/..%2f/info", 404, "not_found"),
        ("GET", "/models/-rf/list", 422, "invalid_input"),
        ("GET", "/training/jobs/%20", 422, "invalid_input"),
        ("POST", "/models/load?org_id=nobody", 404, "model_not_found"),
        ("POST", "/models/load?org_id=a&org_id=b", 422, "invalid_input"),
        ("POST", "/models/load?orgid=a", 422, "unknown_field"),
        ("POST", "/models/load?org_id=..", 422, "invalid_input"),
        ("POST", "/models/load?org_id=nobody&model_id=../x", 404, "model_not_found"),
    ],
)
def test_every_refusal_has_the_same_body(
    service: RunningService, method: str, path: str, status: int, code: str
) -> None:
    answer = service.client.request(method, path)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("hyperparameters", "param"),
    [
        ({"optimizer": "paged_adamw_8bit"}, "hyperparameters.optimizer"),  # on a CPU
        ({"optimizer": "sgd"}, "hyperparameters.optimizer"),
        ({"use_4bit": True, "dtype": "fp32", "bnb_4bit_compute_dtype": "bf16"}, "hyperparameters"),
    ],
)
def test_hyperparameters_that_this_device_or_no_device_has_are_refused(
    service: RunningService, hyperparameters: dict[str, Any], param: str
) -> None:
    answer = service.client.post("/training/start", json=START | {"hyperparameters": hyperparameters})
    assert (answer.status_code, error_of(answer)["param"]) == (422, param)


def test_several_problems_are_all_told(service: RunningService) -> None:
    body = {"message": "", "temperature": 9, "max_tokens": 0}
    details = error_of(service.client.post("/generate?org_id=bad", json=body))["details"]
    assert [each["param"] for each in details] == ["message", "temperature", "max_tokens"]


def test_a_refusal_never_repeats_what_was_sent(service: RunningService) -> None:
    body = START | {"conversations": [conversation(message("my-secret-role", "my-secret-text"))]}
    assert "my-secret" not in service.client.post("/training/start", json=body).text


def test_a_misspelled_field_is_recognised(service: RunningService) -> None:
    error = error_of(service.client.post("/generate?org_id=bad", json={"message": "Hi", "temprature": 1}))
    assert error["code"] == "unknown_field"
    assert error["cure"] == "Did you mean temperature?"


def test_a_role_of_another_api_is_explained(service: RunningService) -> None:
    body = START | {"conversations": [conversation(message("bot"))]}
    error = error_of(service.client.post("/training/start", json=body))
    assert error["message"] == "conversations[0].messages[0].role must be 'system', 'user' or 'assistant'."
    assert "assistant" in error["cure"]


def test_query_and_body_must_not_disagree(service: RunningService) -> None:
    answer = service.client.post("/models/unload?org_id=a", json={"org_id": "b"})
    assert (answer.status_code, error_of(answer)["param"]) == (422, "org_id")


def test_an_idempotency_key_must_be_sane(service: RunningService) -> None:
    for key in ("", "a b", "x" * 256):
        answer = service.client.post("/training/start", json=START, headers={"idempotency-key": key})
        assert (answer.status_code, error_of(answer)["param"]) == (422, "Idempotency-Key")


def test_the_caller_may_name_the_request(service: RunningService) -> None:
    sane = service.client.get("/health", headers={"x-request-id": "my-request-1"})
    assert sane.headers["x-request-id"] == "my-request-1"
    insane = service.client.get("/health", headers={"x-request-id": "<script>"})
    assert insane.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "localhost:8300", "[::1]:8300", "LOCALHOST"])
def test_bound_to_loopback_its_names_are_answered(service: RunningService, name: str) -> None:
    assert service.client.get("/health", headers={"host": name}).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8300", "localhost.evil.example", ""])
def test_bound_to_loopback_other_names_are_refused(service: RunningService, name: str) -> None:
    answer = service.client.get("/health", headers={"host": name})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://localhost.evil.example:8300", "null", "http://127.0.0.1:1", ""]
)
def test_pages_of_other_origins_are_refused(service: RunningService, origin: str) -> None:
    """A browser sends a POST without a body for any page, with Host: localhost; the Origin tells whose page it is."""
    answer = service.client.post("/models/unload?org_id=x", headers={"origin": origin})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "origin_not_allowed")
    assert service.client.post("/models/unload?org_id=x", headers={"origin": service.url}).status_code == 200


def test_a_path_into_the_cache_becomes_the_name_there(service: RunningService) -> None:
    training_id = service.train("paths", base_model="./models/cache/tiny/model")
    assert service.status(training_id)["metadata"]["base_model"] == "tiny/model"
