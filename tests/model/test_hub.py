"""Downloads, each against a hub that behaves or misbehaves: the whole snapshot, or an error with its cure."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from downloads import NAME, fetch, key, refusal, same_files, settings_for
from fake_hub import TOKEN, FakeHub, unreachable_url
from repertory import architectures
from repertory.catalogue import Catalogue
from repertory.contracts import Download
from repertory.errors import BaseModelUnavailable
from repertory.model import hub as hub_module
from repertory.model import transfer, weights
from repertory.model.hub import INDEX, SINGLE, Hub
from repertory.model.lock import alone
from repertory.settings import Settings

FETCH = """
import sys
from pathlib import Path
from repertory.contracts import BaseKey
from repertory.model import weights
from repertory.settings import Settings
name, endpoint, cache = sys.argv[1:]
key = BaseKey(base_model=name, quantization="none", dtype="fp32")
print(weights.locate(key, Settings(_env_file=None, hf_endpoint=endpoint, model_cache_dir=Path(cache))).folder)
"""
CANARY = "hf_canaryThatMustNotBeSeenAnywhere"


pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# What arrives


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_model_arrives_whole_with_its_commit(
    hub: FakeHub, cache: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    original: Path = request.getfixturevalue(kind)
    commit = hub.add(NAME, original)
    told: list[Download] = []
    located = weights.locate(key(), settings_for(hub, cache), tell=told.append)
    assert located.key.revision == commit
    assert located.folder == Catalogue(cache).snapshot(NAME, commit)
    assert same_files(located.folder, original)
    assert len(list(located.folder.glob("*.safetensors"))) == (1 if kind == "single" else 4)
    assert told[-1].bytes_done == told[-1].bytes_total == sum(path.stat().st_size for path in located.folder.iterdir())
    assert [download.bytes_done for download in told] == sorted(download.bytes_done for download in told)
    assert told[-1].percent == 100


def test_only_what_is_needed_is_downloaded(hub: FakeHub, cache: Path, single: Path, tmp_path: Path) -> None:
    original = shutil.copytree(single, tmp_path / "repository")
    for unwanted in ("pytorch_model.bin", "modeling_evil.py", "consolidated.safetensors", "README.md", "LICENSE.txt"):
        (original / unwanted).write_bytes(b"x" * 5000)
    (original / "adapter_config.json").write_text("{}")
    hub.add(NAME, original)
    names = {path.name for path in fetch(settings_for(hub, cache)).folder.iterdir()}
    assert names == {path.name for path in single.iterdir()}


def test_what_is_here_needs_no_hub(hub: FakeHub, cache: Path, single: Path) -> None:
    commit = hub.add(NAME, single)
    folder = fetch(settings_for(hub, cache)).folder
    before = len(hub.requests)
    unreachable = settings_for(hub, cache, hf_endpoint=unreachable_url())
    for revision in (None, "main", commit):
        assert weights.locate(key(revision), unreachable).folder == folder
    assert len(hub.requests) == before


def test_a_name_means_what_it_meant_when_it_was_first_downloaded(
    hub: FakeHub, cache: Path, single: Path, sharded: Path
) -> None:
    old = hub.add(NAME, single)
    settings = settings_for(hub, cache)
    fetch(settings)
    new = hub.add(NAME, sharded)  # main moves on
    assert fetch(settings).key.revision == old
    Hub(settings).fetch(
        NAME, None, weights.silent, weights.silent, weights.silent
    )  # as `repertory models download` does
    assert fetch(settings).key.revision == new
    assert fetch(settings, old).key.revision == old  # and what older voices stand on is still here


def test_a_branch_or_tag_is_downloaded_and_pinned(hub: FakeHub, cache: Path, single: Path, sharded: Path) -> None:
    hub.add(NAME, single, v2=sharded)
    located = fetch(settings_for(hub, cache), "v2")
    assert located.key.revision == hub.repositories[NAME].commit_of(sharded)
    assert same_files(located.folder, sharded)


# Gated, private, missing


def test_a_gated_model_without_a_token_says_where_to_accept_and_what_to_set(
    hub: FakeHub, cache: Path, single: Path
) -> None:
    hub.add(NAME, single, is_gated=True)
    error = refusal(settings_for(hub, cache))
    assert error.code == "base_model_gated"
    assert "no token is set" in error.message
    assert f"{hub.url}/{NAME}" in error.cure
    assert "HUGGINGFACE_TOKEN" in error.cure


def test_a_gated_model_with_a_token_without_access_says_so(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single, is_gated=True)
    error = refusal(settings_for(hub, cache, huggingface_token=CANARY))
    assert error.code == "base_model_gated"
    assert "has no access" in error.message
    assert "account of the token" in error.cure
    assert CANARY not in repr(error.info)


def test_a_gated_model_arrives_with_a_token_that_may_read_it(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single, is_gated=True)
    assert same_files(fetch(settings_for(hub, cache, huggingface_token=TOKEN)).folder, single)


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single, is_gated=True)
    fetch(settings_for(hub, cache, huggingface_token=TOKEN))
    stored = [seen for seen in hub.requests if seen.is_storage]
    assert stored, "the large file was redirected"
    assert all(seen.authorization is None for seen in stored)
    assert all(seen.authorization == f"Bearer {TOKEN}" for seen in hub.requests if not seen.is_storage)


@pytest.mark.parametrize("token", [None, TOKEN])
def test_an_unknown_model_says_check_the_spelling(hub: FakeHub, cache: Path, token: str | None) -> None:
    error = refusal(settings_for(hub, cache, huggingface_token=token))
    assert error.code == "base_model_not_found"
    assert NAME in error.message
    assert "spelling" in error.cure
    assert "private" in error.cure


def test_an_unknown_revision_says_which(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    error = refusal(settings_for(hub, cache), "v9")
    assert error.code == "revision_not_found"
    assert "v9" in error.message


def test_a_token_that_the_hub_does_not_know_is_named_as_the_reason(hub: FakeHub, cache: Path) -> None:
    hub.status = 401
    error = refusal(settings_for(hub, cache, huggingface_token=CANARY))
    assert "refuses the token" in error.message
    assert CANARY not in repr(error.info)


# A hub that is unreachable, slow, out of order, or cuts


@pytest.mark.fault("F35")
def test_an_unreachable_hub_says_how_to_go_without(hub: FakeHub, cache: Path) -> None:
    error = refusal(settings_for(hub, cache, hf_endpoint=unreachable_url()))
    assert error.code == "base_model_unavailable"
    assert "cannot be reached" in error.message
    assert "repertory models register" in error.cure
    assert f"MODEL_CACHE_DIR/{NAME}" in error.cure


def test_offline_asks_nobody(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    error = refusal(settings_for(hub, cache, hf_hub_offline=True))
    assert "HF_HUB_OFFLINE" in error.message
    assert hub.requests == []


@pytest.mark.fault("F35")
def test_a_cut_download_goes_on_where_it_was_cut(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    hub.cut_after, hub.cuts = 100_000, 1
    assert same_files(fetch(settings_for(hub, cache)).folder, single)
    stored = [seen.range for seen in hub.downloads(SINGLE) if seen.is_storage]
    assert stored == [None, "bytes=100000-"]


def test_a_hub_that_ignores_ranges_is_understood(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    hub.cut_after, hub.cuts, hub.ignores_range = 100_000, 1, True
    assert same_files(fetch(settings_for(hub, cache)).folder, single)


def test_a_hub_that_cuts_for_ever_ends_in_an_error_and_what_came_is_kept(
    hub: FakeHub, cache: Path, single: Path
) -> None:
    commit = hub.add(NAME, single)
    hub.cut_after = 10
    error = refusal(settings_for(hub, cache))
    assert "was cut 5 times in a row" in error.message
    assert "is kept" in error.cure
    part = Catalogue(cache).partial(NAME, commit) / f"{SINGLE}.part"
    assert part.stat().st_size == 50
    assert not Catalogue(cache).snapshot(NAME, commit).exists()
    hub.cut_after = None
    assert same_files(fetch(settings_for(hub, cache)).folder, single)
    assert "bytes=50-" in [seen.range for seen in hub.downloads(SINGLE)]


@pytest.mark.fault("F35")
@pytest.mark.parametrize("how", [{"stall_after": 100}, {"drip_seconds": 0.02}], ids=["silence", "a byte now and then"])
def test_a_stalled_download_times_out(hub: FakeHub, cache: Path, single: Path, how: dict[str, float]) -> None:
    hub.add(NAME, single)
    for switch, value in how.items():
        setattr(hub, switch, value)
    began = time.monotonic()
    error = refusal(settings_for(hub, cache, hf_hub_download_timeout=0.2))
    assert "nothing to speak of for 0.2 seconds, 5 times in a row" in error.message
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in error.cure
    assert time.monotonic() - began < 20


def test_a_hub_out_of_order_for_a_while_is_asked_again(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    hub.broken_answers = 4
    assert same_files(fetch(settings_for(hub, cache)).folder, single)


@pytest.mark.parametrize(("status", "reason"), [(503, "out of order (503)"), (429, "limits how often")])
def test_a_hub_out_of_order_for_good_ends_in_an_error(hub: FakeHub, cache: Path, status: int, reason: str) -> None:
    hub.status = status
    error = refusal(settings_for(hub, cache))
    assert reason in error.message
    assert "again later" in error.cure
    assert len(hub.requests) == transfer.ATTEMPTS


def test_a_hub_that_asks_to_wait_for_hours_is_not_waited_for(hub: FakeHub, cache: Path) -> None:
    hub.status, hub.retry_after = 429, "7200"
    error = refusal(settings_for(hub, cache))
    assert "7200 seconds" in error.message
    assert len(hub.requests) == 1


def test_an_endpoint_that_is_no_hub_says_so(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    hub.status = 200  # a captive portal, say
    assert "is no hub's answer" in refusal(settings_for(hub, cache)).message


@pytest.mark.parametrize(
    "answer",
    [
        f'{{"sha": "{"0" * 40}", "siblings": [{{"rfilename": "{SINGLE}", "size": -1}}]}}',
        f'{{"sha": "{"0" * 40}", "siblings": [{{"rfilename": "{SINGLE}", "size": Infinity}}]}}',
        "[" * 200_000,
    ],
    ids=["less than nothing", "endless", "deep"],
)
def test_a_list_of_files_that_cannot_be_is_no_hubs_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=answer))
    monkeypatch.setattr(Hub, "_client", lambda self, name: httpx.Client(transport=transport))
    settings = Settings(_env_file=None, model_cache_dir=cache, hf_endpoint="https://huggingface.co")
    assert "no hub's answer" in refusal(settings).message


def test_an_answer_that_cannot_be_decoded_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {"content-encoding": "gzip"}
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, headers=packed, stream=httpx.ByteStream(b"no gzip"))
    )
    monkeypatch.setattr(Hub, "_client", lambda self, name: httpx.Client(transport=transport))
    settings = Settings(_env_file=None, model_cache_dir=cache, hf_endpoint="https://huggingface.co")
    assert "HF_ENDPOINT" in refusal(settings).cure


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080", "socksio"),
        ("SSL_CERT_FILE", "/nowhere.pem", "No such file"),
        ("HTTPS_PROXY", "http://[::1", "Invalid"),
    ],
)
def test_an_environment_that_no_request_can_be_made_in_says_what_is_wrong(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    error = refusal(settings_for(hub, cache))
    assert (words in error.message, name in error.cure) == (True, True), error.message


# Damage


@pytest.mark.fault("F35")
def test_a_file_with_another_hash_is_thrown_away(hub: FakeHub, cache: Path, single: Path) -> None:
    commit = hub.add(NAME, single)
    hub.corrupts = True
    error = refusal(settings_for(hub, cache))
    assert error.code == "download_damaged"
    assert SINGLE in error.message
    assert not list(Catalogue(cache).partial(NAME, commit).glob(f"{SINGLE}*"))
    hub.corrupts = False
    assert same_files(fetch(settings_for(hub, cache)).folder, single)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"\0" * 5_000_000], ids=["zeros", "more than the file has"])
def test_a_part_that_a_power_cut_has_spoilt_is_downloaded_anew(
    hub: FakeHub, cache: Path, single: Path, content: bytes
) -> None:
    partial = Catalogue(cache).partial(NAME, hub.add(NAME, single))
    partial.mkdir(parents=True)
    (partial / f"{SINGLE}.part").write_bytes(content)
    told: list[Download] = []
    located = weights.locate(key(), settings_for(hub, cache), tell=told.append)
    assert same_files(located.folder, single)
    assert told[-1].bytes_done == told[-1].bytes_total


def test_a_small_file_with_another_hash_is_thrown_away(
    hub: FakeHub, cache: Path, single: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(single, tmp_path / "repository")
    hub.add(NAME, folder)
    settings = settings_for(hub, cache)
    described = Hub._resolved

    def then_changed(*args: object) -> object:
        snapshot = described(*args)  # type: ignore[arg-type]
        config = (folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(config.replace(b"llama", b"LLAMA"))
        return snapshot

    monkeypatch.setattr(Hub, "_resolved", then_changed)
    error = refusal(settings)
    assert error.code == "download_damaged"
    assert "config.json" in error.message


@pytest.mark.fault("F7")
def test_a_download_that_does_not_fit_the_disk_is_refused_with_numbers_before_it_begins(
    hub: FakeHub, cache: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, single)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000_000))
    monkeypatch.setattr(hub_module, "SPARE_BYTES", 299_999_000)
    error = refusal(settings_for(hub, cache))
    assert error.code == "storage_full"
    assert "0.3 GB free" in error.message
    assert hub.downloads(SINGLE) == []


@pytest.mark.fault("F7")
def test_a_disk_that_fills_up_on_the_way_ends_in_the_same_error(hub: FakeHub, single: Path) -> None:
    """/dev/full takes no byte."""
    hub.add(NAME, single)
    cache = Path("/dev/shm") / f"repertory-full-{os.getpid()}"
    settings = settings_for(hub, cache)
    commit = hub.repositories[NAME].commit_of(single)
    partial = Catalogue(cache).partial(NAME, commit)
    partial.mkdir(parents=True)
    (partial / f"{SINGLE}.part").symlink_to("/dev/full")
    try:
        with pytest.raises(BaseModelUnavailable) as refused:
            Hub(settings).fetch(NAME, None, weights.silent, weights.silent, weights.silent)
    finally:
        shutil.rmtree(cache)
    assert refused.value.code == "storage_full"


# Not whole


def test_an_interrupted_download_is_never_taken_for_a_whole_one(
    hub: FakeHub, cache: Path, sharded: Path, tmp_path: Path
) -> None:
    """kill -9 while the second of four shards comes; offline it is not there, online it goes on."""
    commit = hub.add(NAME, sharded)
    hub.bytes_per_second = 400_000
    process = subprocess.Popen([sys.executable, "-c", FETCH, NAME, hub.url, str(cache)])
    partial = Catalogue(cache).partial(NAME, commit)
    try:
        deadline = time.monotonic() + 30
        while not (len(list(partial.glob("*.safetensors"))) >= 1 and list(partial.glob("*.safetensors.part"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    have = {path.name for path in partial.glob("*.safetensors")}
    assert len(have) < 4
    offline = refusal(settings_for(hub, cache, hf_hub_offline=True))
    assert offline.code == "base_model_unavailable"  # and not that it has no safetensors
    hub.bytes_per_second = None
    hub.requests.clear()
    assert same_files(fetch(settings_for(hub, cache)).folder, sharded)
    assert not any(hub.downloads(name) for name in have), "whole files are not downloaded again"


def test_an_estimate_leaves_nothing_that_could_be_taken_for_a_model(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    described = weights.locate_outline(key(), settings_for(hub, cache))
    assert (described / "tokenizer.json").is_file()
    assert hub.downloads(SINGLE) == []
    unreachable = refusal(settings_for(hub, cache, hf_endpoint=unreachable_url()))
    assert unreachable.code == "base_model_unavailable"
    assert same_files(fetch(settings_for(hub, cache)).folder, single)


def test_an_estimate_waits_for_no_download_of_the_weights(hub: FakeHub, cache: Path, single: Path) -> None:
    commit = hub.add(NAME, single)
    described = weights.locate_outline(key(), settings_for(hub, cache))
    with alone(Catalogue(cache).snapshot(NAME, commit).parent / ".lock"):  # as a download holds it
        assert weights.locate_outline(key(), settings_for(hub, cache)) == described


def test_an_estimate_gives_a_silent_hub_up_after_two_attempts(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.is_silent = True
    monkeypatch.setattr(weights, "OUTLINE_SECONDS", 0.1)
    with pytest.raises(BaseModelUnavailable, match=r"nothing to speak of for 0\.1 seconds, 2 times in a row"):
        weights.locate_outline(key(), settings_for(hub, cache))
    assert len(hub.requests) == 2


def test_two_processes_that_want_the_same_download_it_once(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    command = [sys.executable, "-c", FETCH, NAME, hub.url, str(cache)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0] for process in both}
    assert len(folders) == 1
    assert len([seen for seen in hub.downloads(SINGLE) if seen.is_storage]) == 1


# Weights of other kinds, and lists that lie


@pytest.mark.parametrize(
    ("files", "cure"),
    [(["pytorch_model.bin", "config.json"], "safetensors"), (["model.Q4.gguf", "config.json"], "repertory models reg")],
)
def test_a_repository_without_safetensors_is_refused_before_anything_comes(
    hub: FakeHub, cache: Path, tmp_path: Path, files: list[str], cure: str
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b"{}")
    hub.add(NAME, folder)
    error = refusal(settings_for(hub, cache))
    assert error.code == "unsafe_weights"
    assert cure in error.cure
    assert len(hub.requests) == 1


def test_an_unsupported_architecture_is_refused_before_its_weights_come(
    hub: FakeHub, cache: Path, single: Path, tmp_path: Path
) -> None:
    repository = shutil.copytree(single, tmp_path / "repository")
    (repository / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    hub.add(NAME, repository)
    error = refusal(settings_for(hub, cache))
    assert error.code == "unsupported_architecture"
    assert all(name in error.cure for name in architectures.SUPPORTED.values())
    assert not hub.downloads(SINGLE)
    assert weights.locate(key(), settings_for(hub, cache, default_base_model=NAME)).folder.is_dir()  # may be tried


@pytest.mark.parametrize(
    "shard", ["../../../etc/passwd", "/etc/passwd", "a/b.safetensors", "model.bin", ".safetensors"]
)
def test_an_index_that_names_other_files_is_refused(
    hub: FakeHub, cache: Path, sharded: Path, tmp_path: Path, shard: str
) -> None:
    folder = shutil.copytree(sharded, tmp_path / "repository")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["evil"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    hub.add(NAME, folder)
    assert refusal(settings_for(hub, cache)).code == "unsafe_weights"


def test_an_index_that_names_a_shard_the_hub_has_not_is_refused(
    hub: FakeHub, cache: Path, sharded: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded, tmp_path / "repository")
    next(folder.glob("*.safetensors")).unlink()
    hub.add(NAME, folder)
    assert "is not whole on the hub" in refusal(settings_for(hub, cache)).message


def test_files_in_the_list_with_a_path_are_left_out(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    digest = hashlib.sha1(b"blob 1\0x").hexdigest()
    hub.repositories[NAME].extra = [
        {"rfilename": name, "size": 1, "blobId": digest}
        for name in ("../../evil.json", "/tmp/evil.json", "original/x.json")
    ]
    folder = fetch(settings_for(hub, cache)).folder
    assert {path.name for path in folder.iterdir()} == {path.name for path in single.iterdir()}


# What is asked when a job is sent


def test_a_model_that_only_the_hub_knows_is_checked_by_its_config_alone(
    hub: FakeHub, cache: Path, sharded: Path
) -> None:
    hub.add(NAME, sharded)
    weights.check_on_hub(key(), settings_for(hub, cache))
    assert [seen.path.rpartition("/")[2] for seen in hub.requests] == ["main", "config.json"]
    assert not cache.exists()


UNUSABLE = {
    "unsupported_architecture": {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
    "unsupported_quantization": {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
    "remote_code_required": {"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}},
    "unsafe_weights": {"model_type": "llama", "hidden_size": 10**9},
}


@pytest.mark.parametrize("code", UNUSABLE)
def test_a_model_that_can_never_be_trained_on_is_told_by_its_config(
    hub: FakeHub, cache: Path, single: Path, tmp_path: Path, code: str
) -> None:
    repository = shutil.copytree(single, tmp_path / "repository")
    (repository / "config.json").write_text(json.dumps(UNUSABLE[code]))
    hub.add(NAME, repository)
    with pytest.raises(BaseModelUnavailable) as refused:
        weights.check_on_hub(key(), settings_for(hub, cache))
    assert refused.value.code == code


class Drip(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        while True:
            time.sleep(0.02)
            yield b" "


@pytest.mark.parametrize("kind", ["silence", "a byte now and then"])
def test_a_hub_that_gives_no_answer_is_waited_for_no_longer_than_said(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "silence":
        hub.is_silent = True
    else:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Drip()))
        monkeypatch.setattr(Hub, "_client", lambda self, name: httpx.Client(transport=transport))
    monkeypatch.setattr(weights, "QUESTION_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(BaseModelUnavailable) as refused:
        weights.check_on_hub(key(), settings_for(hub, cache))
    assert refused.value.code == "base_model_unavailable"
    assert time.monotonic() - began < 5
