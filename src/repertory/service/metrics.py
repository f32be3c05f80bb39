"""What /metrics tells, in Prometheus' text format.

Names that begin with `vllm:` mean what they mean in vLLM (0.32), so that its dashboards and alerts serve here too; what
vLLM does not have begins with `repertory_`. Times of replies are taken in this process, which is nearest to the reader.
Labels are names of base models, engines (hosts), tiers, reasons and routes, and of at most MOST_ORGANISATIONS
organisations: no words of users, and no more series than that, whoever calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from repertory.contracts import DURATION_BOUNDS, HostStats, TokenChunk, Usage
from repertory.errors import RepertoryError

if TYPE_CHECKING:
    from repertory.service.service import Service

MOST_ORGANISATIONS = 20  # with a label of their own
OTHERS = "_other"  # all the rest; no organisation can be called so
REMEMBERED_ORGANISATIONS = 1000  # of those without a label, to see who has grown

# vLLM's, of its source (v1/metrics/loggers.py)
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class Metrics:
    def __init__(self, service: Service) -> None:
        registry = self.registry = CollectorRegistry()
        registry.register(_State(service))
        model = ["model_name"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, model, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels or model, registry=registry)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "To the first piece.", FIRST_TOKEN_SECONDS)
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "Between two pieces of a reply.", BETWEEN_TOKENS_SECONDS
        )
        self.whole = histogram("vllm:e2e_request_latency_seconds", "To the end of a reply.", REQUEST_SECONDS)
        self.queue = histogram(
            "vllm:request_queue_time_seconds", "In a host's queue, before there was a place.", REQUEST_SECONDS
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of replies.")
        self.cache_queries = counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked for.")
        self.cache_hits = counter("vllm:prefix_cache_hits", "Of them, those that were in the cache.")
        self.ended = counter(
            "vllm:request_success", "Replies by how they ended.", "model_name", "finished_reason"
        )  # stop, length, abort (the reader left) or error
        self.organisations = _Organisations(registry)
        self.http = Histogram(
            "http_request_duration_seconds",
            "From the request to the last byte of its answer.",
            ["method", "handler", "status"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )

    @contextmanager
    def reply(self, org_id: str, model_name: str) -> Iterator[Reply]:
        """Measures one; the reply is told each of its pieces."""
        reply = Reply(self, org_id, model_name)
        try:
            yield reply
        except RepertoryError:
            reply.end("error")
            raise
        finally:
            reply.end("abort")  # unless it has ended otherwise


class Reply:
    """One in the making."""

    def __init__(self, metrics: Metrics, org_id: str, model_name: str) -> None:
        self._metrics = metrics
        self._org_id = org_id
        self._model = model_name
        self._begin = monotonic()
        self._last: float | None = None  # when the piece before came
        self._told = 0  # tokens of the reply that are counted already
        self._has_ended = False
        self._between = metrics.between_tokens.labels(model_name)  # looking labels up costs more than the rest
        self._generated = metrics.generation_tokens.labels(model_name)

    def hear(self, chunk: TokenChunk) -> None:
        now = monotonic()
        if self._last is None:
            self._metrics.first_token.labels(self._model).observe(now - self._begin)
            if chunk.usage is not None:
                self._count_prompt(chunk.usage)
        elif chunk.text:
            self._between.observe(now - self._last)
        self._last = now
        if chunk.usage is not None:
            tokens, self._told = chunk.usage.completion_tokens - self._told, chunk.usage.completion_tokens
            self._generated.inc(tokens)
            self._metrics.organisations.took(self._org_id, tokens)
        if chunk.finish_reason is not None:
            self.end(chunk.finish_reason)

    def end(self, reason: str) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._metrics.ended.labels(self._model, reason).inc()
        self._metrics.whole.labels(self._model).observe(monotonic() - self._begin)

    def _count_prompt(self, usage: Usage) -> None:
        """It is read when the first piece of the reply comes."""
        metrics = self._metrics
        metrics.queue.labels(self._model).observe(usage.queue_seconds)
        metrics.prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        metrics.cache_queries.labels(self._model).inc(usage.prompt_tokens)
        metrics.cache_hits.labels(self._model).inc(usage.cached_tokens)
        metrics.organisations.queued(self._org_id, usage.queue_seconds)
        metrics.organisations.took(self._org_id, usage.prompt_tokens)


class _Organisations:
    """Series of the organisations that took the most tokens, and of all others together.

    Who grows to twice the smallest of them takes its place, so places change ever more rarely; the counts of whoever
    loses it begin at 0 should it come back, as after a restart.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        label = ["organisation"]
        self._tokens = Counter("repertory_organisation_tokens", "Of prompts and replies.", label, registry=registry)
        self._queue = Summary("repertory_organisation_queue_seconds", "In a host's queue.", label, registry=registry)
        self._taken: dict[str, int] = {}  # tokens
        self._named: set[str] = set()

    def took(self, org_id: str, tokens: int) -> None:
        self._taken[org_id] = self._taken.get(org_id, 0) + tokens
        self._tokens.labels(self._label(org_id)).inc(tokens)

    def queued(self, org_id: str, seconds: float) -> None:
        self._taken.setdefault(org_id, 0)
        self._queue.labels(self._label(org_id)).observe(seconds)

    def _label(self, org_id: str) -> str:
        if org_id in self._named:
            return org_id
        if len(self._named) < MOST_ORGANISATIONS:
            self._named.add(org_id)
            return org_id
        smallest = min(self._named, key=self._taken.__getitem__)
        if self._taken[org_id] > 2 * self._taken[smallest]:
            self._named.remove(smallest)
            self._named.add(org_id)
            for series in (self._tokens, self._queue):
                series.remove(smallest)
            return org_id
        if len(self._taken) > MOST_ORGANISATIONS + REMEMBERED_ORGANISATIONS:
            self._taken = {one: self._taken[one] for one in self._named}
        return OTHERS


class _State(Collector):
    """What is so at the moment of asking: hosts, adapters, jobs."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield from self._hosts()
        yield from self._admission()
        yield from self._jobs()

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks no host."""
        return []

    def _hosts(self) -> Iterator[Metric]:
        self._service.hosts.refresh()
        labels = ["model_name", "engine"]
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", labels=labels)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences in the queue.", labels=labels)
        cache = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", labels=labels)
        memory = GaugeMetricFamily("repertory_host_memory_bytes", "Of its process, or of the GPU.", labels=labels)
        prefixes = GaugeMetricFamily("repertory_prefix_cache_bytes", "Of beginnings of prompts.", labels=labels)
        most = GaugeMetricFamily("repertory_prefix_cache_limit_bytes", "Beyond which some leave.", labels=labels)
        steps = CounterMetricFamily("repertory_host_steps", "Forward passes of serving.", labels=labels)
        adapters = _Adapters()
        for host in self._service.hosts.ready():
            health, of = host.health, [host.base_model, host.name]
            running.add_metric(of, health.running)
            waiting.add_metric(of, health.waiting)
            cache.add_metric(of, health.stats.kv_cache_usage)
            memory.add_metric(of, health.memory_bytes)
            prefixes.add_metric(of, health.stats.prefix_cache_bytes)
            most.add_metric(of, health.stats.prefix_cache_most_bytes)
            steps.add_metric(of, health.stats.steps)
            adapters.add(of, health.stats)
        yield from (running, waiting, cache, memory, prefixes, most, steps, *adapters.families)

    def _admission(self) -> Iterator[Metric]:
        admission = self._service.admission
        yield GaugeMetricFamily("repertory_generations", "Requests' replies let in and not ended.", admission.taken)
        refused = CounterMetricFamily(
            "repertory_requests_refused",
            "By a limit of their organisation (429), or overload (503).",
            labels=["reason"],
        )
        for reason, count in admission.refusals.items():
            refused.add_metric([reason], count)
        yield refused

    def _jobs(self) -> Iterator[Metric]:
        answers = GaugeMetricFamily("repertory_database_up", "1 while the database answers.")
        jobs = GaugeMetricFamily("repertory_jobs", "Training jobs by status.", labels=["status"])
        speed = GaugeMetricFamily("repertory_training_tokens_per_second", "Of all runs, as of their last steps.")
        try:
            for status, count in self._service.jobs.counts_of_all().items():
                jobs.add_metric([status], count)
            speed.add_metric([], self._service.jobs.tokens_per_second())
        except SQLAlchemyError:
            answers.add_metric([], 0)
            yield answers
            return
        answers.add_metric([], 1)
        yield from (answers, jobs, speed)


class _Adapters:
    """The tiers of adapters in hosts' memory."""

    def __init__(self) -> None:
        labels = ["model_name", "engine", "tier"]
        name = "repertory_adapter"
        self._resident = GaugeMetricFamily(f"{name}s_resident", "Adapters in a tier.", labels=labels)
        self._bytes = GaugeMetricFamily(f"{name}_bytes", "Which they take.", labels=labels)
        self._hits = CounterMetricFamily(f"{name}_hits", "Sequences whose version was there.", labels=labels)
        self._misses = CounterMetricFamily(f"{name}_misses", "And those whose was not.", labels=labels)
        self._evictions = CounterMetricFamily(f"{name}_evictions", "To make room.", labels=labels)
        self._loads = HistogramMetricFamily(f"{name}_load_seconds", "Into a tier from that below.", labels=labels)

    def add(self, host: list[str], stats: HostStats) -> None:
        for tier, has in stats.adapters.items():
            of = [*host, tier]
            self._resident.add_metric(of, has.resident)
            self._bytes.add_metric(of, has.bytes)
            self._hits.add_metric(of, has.hits)
            self._misses.add_metric(of, has.misses)
            self._evictions.add_metric(of, has.evictions)
            bounds = [*map(str, DURATION_BOUNDS), "+Inf"]
            buckets = list(zip(bounds, accumulate(has.loads.counts), strict=True))
            self._loads.add_metric(of, buckets=buckets, sum_value=has.loads.total_seconds)

    @property
    def families(self) -> tuple[Metric, ...]:
        return (self._resident, self._bytes, self._hits, self._misses, self._evictions, self._loads)
