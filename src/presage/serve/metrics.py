"""Prometheus metrics: vLLM's names under our prefix, and under theirs too if asked for. One registry per server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

PREFIX, VLLM = "presage:", "vllm:"
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_SIZES = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

# name -> (key in EngineClient.stats(), help)
_GAUGES = {
    "num_requests_running": ("running", "Requests in the running batch."),
    "num_requests_waiting": ("waiting", "Requests that wait to run."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of KV blocks in use (1 = all)."),
    "kv_blocks_free": ("free_blocks", "Free KV blocks."),
}
_COUNTERS = {
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("preemptions", "Requests evicted to make room."),
    "engine_steps": ("steps", "Steps run."),
    "step_predicted_seconds": ("predicted_step_seconds", "Time the latency model predicted for the steps run."),
    "step_measured_seconds": ("step_seconds", "Time the steps took."),
    "spec_decode_num_drafts": ("spec_num_drafts", "Drafts verified."),
    "spec_decode_num_draft_tokens": ("spec_num_draft_tokens", "Draft tokens verified."),
    "spec_decode_num_accepted_tokens": ("spec_num_accepted_tokens", "Draft tokens accepted."),
    "computed_tokens": ("computed_tokens", "Rows computed, prompt tokens included."),
    "step_faults": ("faults", "Steps that failed."),
    "policy_errors": ("policy_errors", "Plans of a policy that were refused."),
    "decision_log_dropped": ("log_dropped", "Records that the decision log could not write."),
}


class _Stats(Protocol):
    def stats(self) -> dict[str, Any]: ...


class Metrics:
    """What the front measures itself, and what it reads from the engine when scraped."""

    def __init__(self, client: _Stats, model: str, vllm: bool = False) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._model = model
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Time between tokens of a stream.", _TOKEN)
        self.per_token = self._histogram("request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _WHOLE)
        self.queue = self._histogram("request_queue_time_seconds", "Arrival to first scheduled.", _WHOLE)
        self.prefill = self._histogram("request_prefill_time_seconds", "First scheduled to first token.", _WHOLE)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last.", _WHOLE)
        self.prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _SIZES)
        self.output_size = self._histogram("request_generation_tokens", "Generated tokens of a request.", _SIZES)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.").labels(model)
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.").labels(model)
        self.success = self._counter("request_success", "Finished requests.", "finished_reason")
        self.failure = self._counter("request_failure", "Failed or refused requests.", "code")
        self.slo = self._counter("request_slo", "Finished requests that named an SLO, by whether it was met.", "met")
        self.registry.register(_EngineCollector(client, model))
        self._page = CollectorRegistry(auto_describe=False)
        self._page.register(_Renamed(self.registry, (PREFIX, VLLM) if vllm else (PREFIX,)))

    def finished(self, reason: str) -> None:
        """Count a branch that ended."""
        self.success.labels(self._model, reason).inc()

    def failed(self, code: str) -> None:
        """Count a request that got an error."""
        self.failure.labels(self._model, code).inc()

    def met_slo(self, met: bool) -> None:
        """Count a request with an SLO."""
        self.slo.labels(self._model, str(met).lower()).inc()

    def page(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self._page)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        found: Histogram = Histogram(PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(self._model)
        return found

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, client: _Stats, model: str) -> None:
        self._client, self._model = client, model

    def collect(self) -> Iterator[Metric]:
        # Read when scraped: keeping gauges up to date on every step would cost time that nobody looks at.
        stats = self._client.stats()
        for name, (key, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model], float(stats.get(key, 0)))
            yield gauge
        for name, (key, text) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model], float(stats.get(key, 0)))
            yield counter
        places = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by place.", labels=["model_name", "position"]
        )
        for place, count in enumerate(stats.get("spec_num_accepted_tokens_per_pos", ())):
            places.add_metric([self._model, str(place)], float(count))
        yield places
        for what, text in (("draft", "Draft tokens verified, by drafter."), ("accepted", "Accepted draft tokens, by drafter.")):
            family = CounterMetricFamily(PREFIX + f"spec_decode_num_{what}_tokens_by_method", text, labels=["model_name", "method"])
            for method, count in stats.get(f"spec_num_{what}_tokens_by_method", {}).items():
                family.add_metric([self._model, method], float(count))
            yield family


class _Renamed(Collector):
    """Every family once per prefix; the numbers are kept only once."""

    def __init__(self, source: CollectorRegistry, prefixes: Iterable[str]) -> None:
        self._source, self._prefixes = source, tuple(prefixes)

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            for prefix in self._prefixes:
                copy = Metric(_swap(family.name, prefix), family.documentation, family.type)
                copy.samples = [Sample(_swap(s.name, prefix), *s[1:]) for s in family.samples]
                yield copy


def _swap(name: str, prefix: str) -> str:
    return prefix + name.removeprefix(PREFIX)
