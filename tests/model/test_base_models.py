"""`repertory models`: list, download, register and remove, on files alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import tiny
from fake_hub import FakeHub, running_hub
from repertory import base_models, cli
from repertory.catalogue import Catalogue
from repertory.contracts import BaseKey
from repertory.data.conversations import Message
from repertory.errors import BaseModelUnavailable, Conflict, InvalidInput, NotFound, RepertoryError
from repertory.model import base as base_module
from repertory.model import weights
from repertory.model.base import Base
from repertory.settings import Settings
from repertory.settings import settings as machine_settings

NAME = "acme/tiny-chat"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of the operator's own, outside the cache."""
    return tiny.make_model(tmp_path / "mine" / "parrot", "llama-gqa", max_shard_size="100KB")


@pytest.fixture
def settings(tmp_path: Path, hub: FakeHub) -> Settings:
    return Settings(
        _env_file=None,
        model_cache_dir=tmp_path / "cache",
        finetuned_model_dir=tmp_path / "finetuned",
        hf_endpoint=hub.url,
    )


def load(name: str, settings: Settings) -> Base:
    key = BaseKey(base_model=name, quantization="none", dtype="fp32")
    return base_module.load(name, settings, base_module.detect_device(), key, weights.silent)


def voice_on(settings: Settings, name: str, revision: str | None) -> None:
    folder = settings.finetuned_model_dir / "org" / f"train_{len(list(settings.finetuned_model_dir.glob('*/*')))}"
    folder.mkdir(parents=True)
    (folder / "training_metadata.json").write_text(json.dumps({"base_model": name, "revision": revision}))
    (folder / "MANIFEST.json").write_text("{}")


def test_a_registered_folder_is_used_where_it_is_and_survives_its_removal(settings: Settings, model: Path) -> None:
    assert base_models.register("parrot", model, settings, weights.silent) == "local/parrot"
    assert (settings.model_cache_dir / "local" / "parrot").readlink() == model
    loaded = load("local/parrot", settings)
    assert loaded.key.base_model == "local/parrot"
    assert loaded.fingerprint == weights.fingerprint(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    base_models.remove("local/parrot", settings, weights.silent)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert base_models.listed(settings) == []
    with pytest.raises(BaseModelUnavailable, match="no base model local/parrot"):
        load("local/parrot", settings)


def test_a_gguf_file_becomes_an_ordinary_model_with_its_tokenizer_and_template(
    settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "mine" / "tiny.gguf"
    file.parent.mkdir()
    original = tiny.make_gguf(file)
    base_models.register("tiny-gguf", file, settings, weights.silent)
    loaded = load("local/tiny-gguf", settings)
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[held(name)], tensor, rtol=1e-2, atol=1e-3)
    ids, _ = loaded.renderer.prompt([Message(role="user", content="Hello!")], 100)
    expected = tiny.make_tokenizer()("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert list(ids) == expected
    assert file.exists()
    base_models.remove("local/tiny-gguf", settings, weights.silent)
    assert file.exists()
    assert not (settings.model_cache_dir / "local" / "tiny-gguf").exists()


def held(name: str) -> str:
    """Linear layers lie inside what corrects them."""
    return name.replace("_proj.weight", "_proj.base.weight")


def test_a_folder_with_one_gguf_file_is_that_file(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    tiny.make_gguf(folder / "a.gguf")
    base_models.register("one", folder, settings, weights.silent)
    (folder / "b.gguf").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"several GGUF files: a\.gguf, b\.gguf"):
        base_models.register("two", folder, settings, weights.silent)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"x" * 4096, b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_a_damaged_gguf_file_is_refused(settings: Settings, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    refused_gguf(file, settings)


def test_a_gguf_file_of_an_unknown_architecture_is_refused(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "unknown.gguf"
    tiny.make_gguf(file, architecture="rwkv6")
    assert "rwkv6" in refused_gguf(file, settings)


def refused_gguf(file: Path, settings: Settings) -> str:
    with pytest.raises(BaseModelUnavailable) as refused:
        base_models.register("broken", file, settings, weights.silent)
    assert refused.value.code == "unsupported_architecture"
    assert "safetensors" in refused.value.cure
    assert base_models.listed(settings) == []
    assert [path.name for path in (settings.model_cache_dir / "local").iterdir()] == [".lock"]
    return refused.value.message


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "bert"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}"), "template"),
    ],
    ids=["no tokenizer", "no causal model", "no config", "a template that renders nothing"],
)
def test_what_could_not_be_trained_is_not_registered(settings: Settings, model: Path, spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    spoil(model)
    with pytest.raises(RepertoryError, match=words):
        base_models.register("parrot", model, settings, weights.silent)
    assert base_models.listed(settings) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "-x", ".x", "", "a" * 65, "a b", "local/../x", "a..b"])
def test_a_name_that_could_be_a_path_is_refused(settings: Settings, model: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        base_models.register(name, model, settings, weights.silent)


def test_a_name_is_given_once(settings: Settings, model: Path) -> None:
    base_models.register("parrot", model, settings, weights.silent)
    with pytest.raises(Conflict, match="registered already"):
        base_models.register("parrot", model, settings, weights.silent)


def test_a_registered_folder_that_went_away_is_named(settings: Settings, model: Path) -> None:
    base_models.register("parrot", model, settings, weights.silent)
    model.rename(model.with_name("elsewhere"))
    with pytest.raises(BaseModelUnavailable, match="is not there any more"):
        load("local/parrot", settings)
    assert [listed.state for listed in base_models.listed(settings)] == ["its folder is not there"]
    base_models.remove("local/parrot", settings, weights.silent)
    assert base_models.listed(settings) == []


def test_the_list_says_what_there_is(settings: Settings, model: Path, hub: FakeHub) -> None:
    commit = hub.add(NAME, model)
    base_models.register("parrot", model, settings, weights.silent)
    base_models.download(NAME, settings, weights.silent, weights.silent)
    shutil.copytree(model, settings.model_cache_dir / "put" / "here")
    Catalogue(settings.model_cache_dir).partial(NAME, "0" * 40).mkdir()
    voice_on(settings, NAME, commit)
    voice_on(settings, NAME, commit)
    voice_on(settings, "local/parrot", None)
    found = {(listed.name, listed.revision): listed for listed in base_models.listed(settings)}
    assert {key: (listed.source, listed.voices) for key, listed in found.items()} == {
        (NAME, commit): ("hub", 2),
        (NAME, "0" * 40): ("hub", 0),
        ("local/parrot", None): ("registered", 1),
        ("put/here", None): ("folder", 0),
    }
    whole = found[NAME, commit]
    assert (whole.architecture, whole.precision, whole.state) == ("llama", "F32", "ready")
    assert whole.size_bytes == sum(path.stat().st_size for path in model.iterdir())
    assert "not whole" in found[NAME, "0" * 40].state


def test_what_voices_need_is_removed_only_by_force(settings: Settings, model: Path, hub: FakeHub) -> None:
    commit = hub.add(NAME, model)
    base_models.download(NAME, settings, weights.silent, weights.silent)
    voice_on(settings, NAME, commit)
    with pytest.raises(Conflict, match="1 voices stand on"):
        base_models.remove(NAME, settings, weights.silent)
    assert weights.locate(BaseKey(base_model=NAME, quantization="none", dtype="fp32"), settings)
    assert [removed.revision for removed in base_models.remove(NAME, settings, weights.silent, force=True)] == [commit]
    assert base_models.listed(settings) == []


def test_one_revision_can_be_removed_alone(settings: Settings, model: Path, hub: FakeHub, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", "llama-gqa", seed=1)
    main = hub.add(NAME, model, v2=other)
    for asked in (NAME, f"{NAME}@v2"):
        base_models.download(asked, settings, weights.silent, weights.silent)
    base_models.remove(f"{NAME}@v2", settings, weights.silent)
    assert [listed.revision for listed in base_models.listed(settings)] == [main]


def test_what_is_not_there_cannot_be_removed(settings: Settings) -> None:
    with pytest.raises(NotFound, match="no base model acme/nothing"):
        base_models.remove("acme/nothing", settings, weights.silent)


def test_the_allow_list_keeps_jobs_to_what_the_operator_names(settings: Settings) -> None:
    from repertory.service.base_model import allowed_base_model

    limited = settings.model_copy(update={"allowed_base_models": "acme/*, local/parrot"})
    for name in (NAME, f"{NAME}@v2", "local/parrot", "bundled/SmolLM2-135M-Instruct"):
        assert allowed_base_model(name, limited) == name
    for name in ("evil/model", "local/other", "acme"):
        with pytest.raises(InvalidInput, match="may be asked for"):
            allowed_base_model(name, limited)


# The commands


@pytest.fixture
def repertory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    for name in ("model_cache_dir", "finetuned_model_dir", "hf_endpoint"):
        monkeypatch.setenv(name.upper(), str(getattr(settings, name)))
    machine_settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(cli.app, ["models", *arguments])
    machine_settings.cache_clear()


def test_the_commands_from_download_to_removal(
    repertory: Callable[..., Result], settings: Settings, model: Path, hub: FakeHub
) -> None:
    commit = hub.add(NAME, model)
    done = repertory("download", NAME)
    assert done.exit_code == 0, done.output
    assert commit in done.stdout
    listed = repertory("list").stdout
    assert all(word in listed for word in (NAME, commit[:12], "llama", "F32", "hub", "ready"))
    assert json.loads(repertory("list", "--json").stdout)[0]["revision"] == commit
    registered = repertory("register", "parrot", str(model))
    assert '"base_model": "local/parrot"' in registered.stdout, registered.output
    voice_on(settings, "local/parrot", None)
    refused = repertory("remove", "local/parrot")
    assert (refused.exit_code, refused.stderr.startswith("base_model_in_use: 1 voices")) == (5, True), refused.output
    assert "Cure: " in refused.stderr
    assert repertory("remove", "local/parrot", "--force").exit_code == 0
    assert repertory("remove", "local/parrot").exit_code == 3


def test_what_a_config_says_repaints_no_terminal(
    repertory: Callable[..., Result], settings: Settings, model: Path
) -> None:
    folder = settings.model_cache_dir / "owner" / "painted"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "\x1b[31mllama\x07"}))
    listed = repertory("list").stdout
    assert "owner/painted" in listed
    assert "llama" in listed
    assert not {"\x1b", "\x07"} & set(listed)


def test_a_cache_that_cannot_be_written_is_a_complaint(
    repertory: Callable[..., Result], settings: Settings, model: Path
) -> None:
    settings.model_cache_dir.parent.mkdir(parents=True, exist_ok=True)
    settings.model_cache_dir.write_text("a file where the folder should be")
    refused = repertory("register", "parrot", str(model))
    assert (refused.exit_code, refused.stderr.startswith("storage_failed: ")) == (1, True), refused.output
    assert "Cure: Check free space and permissions" in refused.stderr


def test_a_download_shows_its_progress_and_that_it_was_cut_in_the_end(
    settings: Settings, model: Path, hub: FakeHub
) -> None:
    """As a process, in a terminal of its own width; its end is the cure, and no traceback."""
    hub.add(NAME, model)
    hub.corrupts = True
    environment = os.environ | {
        "MODEL_CACHE_DIR": str(settings.model_cache_dir),
        "HF_ENDPOINT": hub.url,
        "FORCE_COLOR": "1",
        "COLUMNS": "120",
    }
    command = [sys.executable, "-m", "repertory.cli", "models", "download", NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")
    assert done.returncode == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stderr)
    assert re.search(rf"{NAME} .*\d+(\.\d+)?/\d+(\.\d+)? kB", shown), shown
    assert "download_damaged: " in shown
    assert "Cure: Try again." in shown
    assert "Traceback" not in shown
