"""Rows of the catalogue about base models, their files and voices: what is told of them is checked, never believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from fake_hub import FakeHub, running_hub
from refusals import START, error_of
from repertory.contracts import BaseKey, Hyperparameters
from repertory.errors import BaseModelUnavailable, InvalidInput
from repertory.model import base as base_module
from repertory.model import hyperparameters, weights
from repertory.model.base import Outline
from repertory.settings import Settings
from running_service import RunningService

KEY = BaseKey(base_model="acme/odd", quantization="none", dtype="fp32")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny", "llama-gqa")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "cache" / KEY.base_model)


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def outline(original: Path) -> Outline:
    return base_module.outline(original, KEY, base_module.detect_device())


def located(folder: Path) -> weights.Located:
    return weights.locate(KEY, Settings(_env_file=None, model_cache_dir=folder.parents[1], hf_hub_offline=True))


def with_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "030 rank above the hidden size": ({"lora_r": 1024}, "hyperparameters.lora_r"),
    "036 length above the positions": ({"max_seq_length": 1 << 20}, "hyperparameters.max_seq_length"),
    "037 unknown layer": ({"lora_target_modules": "q_proj,w_proj"}, "hyperparameters.lora_target_modules"),
    "037 no layer": ({"lora_target_modules": []}, "hyperparameters.lora_target_modules"),
    "037 a pattern that takes for ever": (
        {"lora_target_modules": "(a+)+$" + "a" * 10_000},
        "hyperparameters.lora_target_modules",
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_this_base_model_cannot_be_trained_with_is_refused_with_what_it_can(outline: Outline, case: str) -> None:
    asked, param = TOO_MUCH[case]
    with pytest.raises(InvalidInput) as refused:
        hyperparameters.resolve(Hyperparameters.model_validate(asked), outline, rows=10, prefix=0)
    assert refused.value.param == param
    if "037" in case:
        assert "q_proj" in refused.value.cure + refused.value.message


def with_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_a_link(folder: Path) -> None:
    (folder / "vocab.json").symlink_to("/etc/passwd")


def as_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "os"}})
    )


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "052 a link that leads out": (with_a_link, "unsafe_path"),
    "089 pickles alone": (with_pickles, "unsafe_weights"),
    "090 code of its own": (
        with_config(model_type="evil", auto_map={"AutoModel": "evil.Evil"}),
        "remote_code_required",
    ),
    "093 an encoder": (with_config(model_type="bert", architectures=["BertModel"]), "unsupported_architecture"),
    "093 a classifier": (with_config(architectures=["LlamaForSequenceClassification"]), "unsupported_architecture"),
    "093 quantized already": (with_config(quantization_config={"quant_method": "gptq"}), "unsupported_quantization"),
    "096 a width of a billion": (with_config(hidden_size=10**9), "unsafe_weights"),
    "096 layers without end": (with_config(num_hidden_layers=10**12), "unsafe_weights"),
    "096 fewer than none": (with_config(vocab_size=-1), "unsafe_weights"),
    "096 weights that are not whole": (cut_short, "unsafe_weights"),
    "097 an adapter": (as_an_adapter, "unsupported_architecture"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_could_do_harm_or_is_no_language_model_is_refused(folder: Path, case: str) -> None:
    assert located(folder).folder == folder
    spoil, code = FOLDERS[case]
    spoil(folder)
    with pytest.raises(BaseModelUnavailable) as refused:
        located(folder)
    assert refused.value.code == code
    assert refused.value.cure


def test_row_092_a_gated_model_without_a_token_says_where_to_accept(
    hub: FakeHub, original: Path, tmp_path: Path
) -> None:
    hub.add(KEY.base_model, original, is_gated=True)
    with pytest.raises(BaseModelUnavailable) as refused:
        weights.check_on_hub(KEY, Settings(_env_file=None, model_cache_dir=tmp_path, hf_endpoint=hub.url))
    assert refused.value.code == "base_model_gated"
    assert f"{hub.url}/{KEY.base_model}" in refused.value.cure


def test_row_095_a_model_that_does_not_fit_is_told_by_the_estimate_and_fails_with_the_numbers(
    service: RunningService,
) -> None:
    estimated = service.client.post("/training/estimate", json=START | {"base_model": "acme/too-large"}).json()
    assert not estimated["fits"]
    assert estimated["peak_memory_bytes"] > estimated["available_memory_bytes"]
    job = service.until(service.train("large", base_model="acme/too-large"), "failed", "completed")
    assert job["error"]["code"] == "insufficient_memory"
    service.until_ready()  # the default host had made room for it


def test_row_097_a_voice_that_no_job_has_made_is_nobodys(service: RunningService) -> None:
    """Adapters are not imported: a folder that lies among the voices is none without its row."""
    planted = service.folder / "models/finetuned/planted/train_0123456789abcdef"
    planted.mkdir(parents=True)
    (planted / "adapter_config.json").write_text("{}")
    (planted / "MANIFEST.json").write_text("{}")
    assert service.client.get("/models/planted/list").json()["models"] == []
    answer = service.client.post("/generate?org_id=planted", json={"message": "Hi", "model_id": planted.name})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
