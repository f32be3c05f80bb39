"""Where a hub may lead: to the public internet over https, or to where it stands itself."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from downloads import NAME, fetch, refusal, same_files, settings_for
from fake_hub import FakeHub
from repertory.model.addresses import is_public
from repertory.model.hub import SINGLE, Hub
from repertory.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "http://cdn.example/x", "file:///etc/passwd"])
def test_a_redirect_leads_to_no_unprotected_or_internal_address(
    cache: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(302, headers={"location": target})

    monkeypatch.setattr(Hub, "_client", lambda self, name: httpx.Client(transport=httpx.MockTransport(answer)))
    settings = Settings(_env_file=None, model_cache_dir=cache, hf_endpoint="https://huggingface.co")
    assert refusal(settings).code == "base_model_unavailable"
    assert {url.host for url in asked} == {"huggingface.co"}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.31.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),  # shared by the customers of a carrier
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::a9fe:a9fe", False),  # 169.254.169.254 behind NAT64
        ("64:ff9b::5db8:d70e", True),
        ("2002:7f00:1::", False),  # 127.0.0.1 behind 6to4
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


class Names:
    """The names of a network, in place of its resolver: what a look-up says, and where a connection then leads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.public = {"hub.example", "cdn.example"}
        resolve = socket.getaddrinfo

        def resolved(host: Any, port: Any, *about: Any, **more: Any) -> Any:
            looks_public = host in self.public and port is None
            return resolve("93.184.215.14" if looks_public else "127.0.0.1", port, *about, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolved)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def redirected_from_public(hub: FakeHub, single: Path, to: str) -> None:
    hub.add(NAME, single)
    hub.redirects_to = hub.storage_url.replace("127.0.0.1", to) + f"/{NAME}/resolve/main/{SINGLE}"


@pytest.mark.parametrize("inside", ["intern.example", "127.0.0.1", "2130706433", "0x7f.1"])
def test_a_public_hub_leads_to_nothing_inside(
    hub: FakeHub, cache: Path, single: Path, names: Names, inside: str
) -> None:
    """Also where an address is written as a number: it is looked up like a name."""
    redirected_from_public(hub, single, inside)
    settings = settings_for(hub, cache, hf_endpoint=hub.url.replace("127.0.0.1", "hub.example"))
    error = refusal(settings)
    assert error.code == "private_address"
    assert "HF_ALLOW_PRIVATE_ADDRESSES" in error.cure
    assert not [seen for seen in hub.requests if seen.is_storage], "nobody was asked"


def test_a_name_that_resolves_otherwise_the_second_time_is_found_out(
    hub: FakeHub, cache: Path, single: Path, names: Names
) -> None:
    redirected_from_public(hub, single, "cdn.example")
    settings = settings_for(hub, cache, hf_endpoint=hub.url.replace("127.0.0.1", "hub.example"))
    assert refusal(settings).code == "private_address"
    assert not list(cache.rglob(f"{SINGLE}*")), "nothing of its answer was kept"


def test_a_private_address_can_be_allowed(hub: FakeHub, cache: Path, single: Path, names: Names) -> None:
    hub.add(NAME, single)  # large files lie at another origin
    endpoint = hub.url.replace("127.0.0.1", "hub.example")
    settings = settings_for(hub, cache, hf_endpoint=endpoint, hf_allow_private_addresses=True)
    assert same_files(fetch(settings).folder, single)


def test_redirects_in_a_circle_end(hub: FakeHub, cache: Path, single: Path) -> None:
    hub.add(NAME, single)
    hub.redirects_to = f"{hub.url}/{NAME}/resolve/main/{SINGLE}"
    assert "no hub's answer" in refusal(settings_for(hub, cache)).message
