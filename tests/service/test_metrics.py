"""/metrics: whether it parses, whether its numbers are those of what was sent, and what must never be in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from repertory.contracts import AdapterTier, Durations, HostHealth, HostStats, TokenChunk, Usage
from repertory.service.hosts import Host
from repertory.service.metrics import MOST_ORGANISATIONS, OTHERS, Metrics
from repertory.service.service import Service
from repertory.settings import Settings
from running_service import RunningService, eventually
from service_clients import running

BASE = "bundled/SmolLM2-135M-Instruct"
SECRET = "xylophone-7f3a"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Of the exposition: its values by name and labels. No name with its labels comes twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    """Of all series with these labels together."""
    return sum(number for (one, has), number in found.items() if one == name and set(labels.items()) <= set(has))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that nobody else talks to."""
    service = RunningService(tmp_path_factory.mktemp("quiet"), ORG_REQUESTS_PER_MINUTE="30").until_ready()
    service.trained("met-a")
    service.trained("met-b")
    yield service
    service.stop()


def scrape(service: RunningService) -> tuple[Samples, str]:
    answer = service.client.get(f"{service.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text), answer.text


def test_the_numbers_are_those_of_what_was_sent(quiet: RunningService) -> None:
    before, _ = scrape(quiet)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    asked = {"message": f"Hi there {SECRET}", "max_tokens": 50}
    for _ in range(3):
        assert quiet.client.post("/generate?org_id=met-a", json=asked).status_code == 200
    assert quiet.client.post("/generate?org_id=met-b", json=asked | {"max_tokens": 2}).status_code == 200
    long = asked | {"message": f"a long {SECRET}", "max_tokens": 3000, "stream": True}
    with quiet.client.stream("POST", "/generate?org_id=met-b", json=long) as answer:
        lines = (line for line in answer.iter_lines() if line)
        for _ in range(5):
            next(lines)
        during, _ = scrape(quiet)
        assert value(during, "vllm:num_requests_running", model_name=BASE) == 1
        assert value(during, "repertory_generations") == 1
    eventually(lambda: running(quiet) == 0)
    assert quiet.client.post("/generate?org_id=met-a", json={"message": ""}).status_code == 422
    statuses = [quiet.client.post("/generate?org_id=met-a", json=asked).status_code for _ in range(30)]
    refused = statuses.count(429)
    answered = 30 - refused
    assert refused >= 2
    after, text = scrape(quiet)

    assert grown("vllm:request_success_total", finished_reason="stop") == 3 + answered
    assert grown("vllm:request_success_total", finished_reason="length") == 1
    assert grown("vllm:request_success_total", finished_reason="abort") == 1
    assert grown("vllm:time_to_first_token_seconds_count", model_name=BASE) == 5 + answered
    assert grown("vllm:e2e_request_latency_seconds_count") == 5 + answered
    assert grown("vllm:request_queue_time_seconds_count") == 5 + answered
    assert grown("vllm:prompt_tokens_total") == 3 * (5 + answered)  # words, to the fake host
    of_a, of_b = 3 * (3 + answered), grown("vllm:generation_tokens_total") - 3 * (3 + answered)
    assert of_b >= 2 + 5
    assert grown("repertory_organisation_tokens_total", organisation="met-a") == 3 * (3 + answered) + of_a
    assert grown("repertory_organisation_tokens_total", organisation="met-b") == 2 * 3 + of_b
    assert grown("repertory_organisation_queue_seconds_count", organisation="met-a") == 3 + answered
    assert grown("repertory_requests_refused_total", reason="requests_per_minute") == refused
    generate = {"method": "POST", "handler": "/api/v1/generate"}
    assert grown("http_request_duration_seconds_count", **generate, status="429") == refused
    assert grown("http_request_duration_seconds_count", **generate, status="422") == 1
    assert grown("http_request_duration_seconds_count", **generate, status="200") == 5 + answered
    assert value(after, "vllm:num_requests_running", model_name=BASE) == 0
    assert value(after, "repertory_jobs", status="completed") == 2
    assert value(after, "repertory_database_up") == 1
    assert SECRET not in text
    assert "from train_" not in text


def test_an_address_that_is_unknown_makes_no_series(quiet: RunningService) -> None:
    quiet.client.get(f"/{SECRET}/1")
    quiet.client.get(f"/training/status/{SECRET}")
    quiet.client.request("GET", "/health", headers={"x-request-id": SECRET})
    quiet.client.request(SECRET.upper(), "/health")
    found, text = scrape(quiet)
    assert SECRET not in text.lower()
    assert value(found, "http_request_duration_seconds_count", handler="none", status="404") >= 1
    assert value(found, "http_request_duration_seconds_count", method="other") >= 1
    assert value(found, "http_request_duration_seconds_count", handler="/api/v1/training/status/{training_id}") >= 1


@pytest.fixture
def service(clean_settings: Settings) -> Iterator[Service]:
    """Not started."""
    made = Service(clean_settings)
    yield made
    made.hosts.stop()
    made.store.close()


def exposed(service: Service) -> Samples:
    return samples(generate_latest(service.metrics.registry).decode())


def answer(metrics: Metrics, org_id: str, tokens: int) -> None:
    with metrics.reply(org_id, "base") as reply:
        usage = Usage(prompt_tokens=1, completion_tokens=tokens - 1, cached_tokens=1, queue_seconds=0.5)
        reply.hear(TokenChunk(text="x", usage=usage))
        reply.hear(TokenChunk(finish_reason="stop", usage=usage))


def test_labels_are_bounded_with_a_thousand_organisations_and_nothing_is_lost(service: Service) -> None:
    for number in range(1000):
        answer(service.metrics, f"org{number}", 10)
    for number in range(500, 503):  # these grow
        for _ in range(5):
            answer(service.metrics, f"org{number}", 100)
    found = exposed(service)
    labels = {
        dict(has)["organisation"] for (name, has), _ in found.items() if name == "repertory_organisation_tokens_total"
    }
    assert len(labels) == MOST_ORGANISATIONS + 1
    assert {"org500", "org501", "org502", OTHERS} <= labels
    assert value(found, "vllm:generation_tokens_total") + value(found, "vllm:prompt_tokens_total") == 10_000 + 1_500
    assert value(found, "vllm:prefix_cache_queries_total") == value(found, "vllm:prefix_cache_hits_total") == 1_015
    assert len([key for key in found if key[0] == "repertory_organisation_queue_seconds_sum"]) <= MOST_ORGANISATIONS + 1
    assert len(service.metrics.organisations._taken) <= 1100


def test_a_series_never_falls_while_it_is_shown(service: Service) -> None:
    before: Samples = {}
    for number in range(400):
        answer(service.metrics, f"org{number * number % 97}", 1 + number % 13 * 10)
        found = exposed(service)
        for key in before.keys() & found.keys():
            if key[0].endswith("_total"):
                assert found[key] >= before[key]
        before = found


def test_hosts_tell_of_their_adapter_tiers(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Durations().and_one(0.003).and_one(0.2).and_one(99.0)
    tiers: Any = {"ram": AdapterTier(resident=7, bytes=70, hits=5, misses=3, evictions=1, loads=loads)}
    cached = {"prefix_cache_bytes": 40, "prefix_cache_most_bytes": 50}
    stats = HostStats(steps=12, kv_cache_usage=0.25, adapters=tiers, **cached)
    health = HostHealth(state="ready", running=3, waiting=4, memory_bytes=99, stats=stats)
    host = Host(
        name="host-1", base_model="m", is_default=True, socket=Path("nowhere"), asked=None, key=None, health=health,
        is_ready=True,
    )  # fmt: skip
    monkeypatch.setattr(service.hosts, "_hosts", [host])
    monkeypatch.setattr(service.hosts, "refresh", lambda: None)  # nobody answers at its socket
    found = exposed(service)
    of: dict[str, str] = {"model_name": "m", "engine": "host-1"}
    assert value(found, "vllm:num_requests_running", **of) == 3
    assert value(found, "vllm:num_requests_waiting", **of) == 4
    assert value(found, "vllm:kv_cache_usage_perc", **of) == 0.25
    assert value(found, "repertory_prefix_cache_bytes", **of) == 40
    assert value(found, "repertory_prefix_cache_limit_bytes", **of) == 50
    ram = of | {"tier": "ram"}
    assert value(found, "repertory_adapters_resident", **ram) == 7
    assert value(found, "repertory_adapter_hits_total", **ram) == 5
    assert value(found, "repertory_adapter_misses_total", **ram) == 3
    assert value(found, "repertory_adapter_evictions_total", **ram) == 1
    assert value(found, "repertory_adapter_load_seconds_bucket", **ram, le="0.005") == 1
    assert value(found, "repertory_adapter_load_seconds_bucket", **ram, le="0.25") == 2
    assert value(found, "repertory_adapter_load_seconds_bucket", **ram, le="+Inf") == 3
    assert value(found, "repertory_adapter_load_seconds_sum", **ram) == pytest.approx(99.203)
    monkeypatch.setattr(service.hosts, "_hosts", [])
