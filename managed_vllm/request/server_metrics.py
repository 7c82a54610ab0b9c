"""What a server's `/metrics` say, as one typed snapshot, and the rates between two of them.

The names are those of vLLM 0.32 (`v1/metrics/loggers.py`). What a server does not tell is None, so that an older or
newer one, or one that is not vLLM, gives a snapshot with fewer values and no error. All counters count from the start
of the epoch. Of several replicas there is one snapshot each, and one of all of them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prometheus_client.parser import text_string_to_metric_families

from managed_vllm.status import ServerStatus

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Distribution:
    """Seconds of the requests so far.

    Attributes:
        count: how many there were.
        mean: their mean.
        quantiles: the values below which 50, 90 and 99 % of them are. Within a bucket of vLLM's histogram they are
            interpolated; beyond the last bound they are that bound.
    """

    count: int
    mean: float
    quantiles: Mapping[float, float]


@dataclass(frozen=True)
class SupervisorMetrics:
    """What a server's supervisor tells of it.

    Attributes:
        epoch: the server's starts so far.
        restarts: the ends after which it was started again, by their cause (`managed_vllm.status.Cause`); "requested"
            where a user asked for it.
        uptime_s: seconds since it became ready; None while it is not.
        leases: its users.
        health_latency_s: seconds until the last check of `/health` was answered, of replicas the longest; None before
            the first one.
        health_checks, health_unanswered: how many were answered since the supervisor was started, and how many not.
        weight_version: what `llm.engine.update_weights(version=)` has called the weights; empty: nobody has named them.
    """

    epoch: int
    restarts: Mapping[str, int]
    uptime_s: float | None
    leases: int
    health_latency_s: float | None
    health_checks: int
    health_unanswered: int
    weight_version: str

    @classmethod
    def of(cls, status: ServerStatus, restarts: Mapping[str, int]) -> SupervisorMetrics:
        """From what the supervisor says now, and from the server's past."""
        checks = [one.health for one in status.replicas or (status,)]
        return cls(
            epoch=status.epoch,
            restarts=restarts,
            uptime_s=None if status.ready_at is None else max(0.0, time.time() - status.ready_at),
            leases=status.users,
            health_latency_s=max((one.last_s for one in checks if one.last_s is not None), default=None),
            health_checks=sum(one.answered for one in checks),
            health_unanswered=sum(one.unanswered for one in checks),
            weight_version=status.engine.weight_version,
        )


@dataclass(frozen=True)
class ServerMetrics:
    """What the server does, and has done in this epoch; of all its users.

    Attributes:
        at: when it was asked, in seconds of `time.time()`.
        epoch: the server's epoch, in which the counters began; 0 for a server by URL.
        running: requests that are in the batch.
        waiting: requests that wait for a place in it.
        kv_cache_usage: share of the KV cache that is taken, 0 to 1.
        prompt_tokens, generation_tokens: prefilled, and generated.
        prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked up in the prefix cache, and found.
        preemptions: requests that had to leave the batch for want of KV cache.
        requests: ended requests by their finish reason.
        time_to_first_token, inter_token_latency, request_latency, queue_time: seconds.
        supervisor: what its supervisor tells of it; None for a server by URL, and where it does not answer.
        replicas: of a server with `replicas=`, those that are up, each with its own epoch. The other fields are then of
            all of them: added up, `kv_cache_usage` their mean, `epoch` the newest.
    """

    at: float
    epoch: int
    running: int | None = None
    waiting: int | None = None
    kv_cache_usage: float | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    prefix_cache_queries: int | None = None
    prefix_cache_hits: int | None = None
    preemptions: int | None = None
    requests: Mapping[str, int] = field(default_factory=dict)
    time_to_first_token: Distribution | None = None
    inter_token_latency: Distribution | None = None
    request_latency: Distribution | None = None
    queue_time: Distribution | None = None
    supervisor: SupervisorMetrics | None = None
    replicas: Sequence[ServerMetrics] = ()

    @property
    def prefix_cache_hit_rate(self) -> float | None:
        """Share of the prompt tokens of this epoch that were in the prefix cache, 0 to 1; None without a prompt."""
        return _share(self.prefix_cache_hits, self.prefix_cache_queries)

    def since(self, earlier: ServerMetrics) -> Rates:
        """What happened between an earlier snapshot and this one.

        If the server, or a replica, was restarted between them, what it did before that is missing: its counters are
        gone.
        """
        seconds = self.at - earlier.at
        queries = _grown(self, earlier, lambda one: one.prefix_cache_queries)
        hits = _grown(self, earlier, lambda one: one.prefix_cache_hits)
        return Rates(
            seconds=seconds,
            prompt_tokens_per_s=_share(_grown(self, earlier, lambda one: one.prompt_tokens), seconds),
            generation_tokens_per_s=_share(_grown(self, earlier, lambda one: one.generation_tokens), seconds),
            requests_per_s=_share(_grown(self, earlier, lambda one: sum(one.requests.values())), seconds),
            prefix_cache_hit_rate=_share(hits, queries),
        )


@dataclass(frozen=True)
class Rates:
    """What happened between two snapshots, `seconds` apart. None: the server does not tell, or there was nothing."""

    seconds: float
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    requests_per_s: float | None
    prefix_cache_hit_rate: float | None


def parse(text: str, *, epoch: int = 0) -> ServerMetrics:
    """The snapshot in the text of `/metrics`, taken now. Engines of one server (data parallel) are added up.

    Raises `ValueError` for what is no text of that kind.
    """
    return _snapshot(_Samples(text), epoch)


def together(texts: Mapping[int, str]) -> ServerMetrics:
    """The snapshot of the replicas that are up, from the text of each by its epoch. Raises as `parse`."""
    each = [parse(text, epoch=epoch) for epoch, text in texts.items()]
    return replace(_snapshot(_Samples(*texts.values()), max(texts)), replicas=tuple(each))


def _snapshot(found: _Samples, epoch: int) -> ServerMetrics:
    return ServerMetrics(
        at=time.time(),
        epoch=epoch,
        running=found.count("num_requests_running"),
        waiting=found.count("num_requests_waiting"),
        kv_cache_usage=found.mean("kv_cache_usage_perc"),
        prompt_tokens=found.count("prompt_tokens_total"),
        generation_tokens=found.count("generation_tokens_total"),
        prefix_cache_queries=found.count("prefix_cache_queries_total"),
        prefix_cache_hits=found.count("prefix_cache_hits_total"),
        preemptions=found.count("num_preemptions_total"),
        requests=found.counts("request_success_total", by="finished_reason"),
        time_to_first_token=found.distribution("time_to_first_token_seconds"),
        inter_token_latency=found.distribution("inter_token_latency_seconds"),
        request_latency=found.distribution("e2e_request_latency_seconds"),
        queue_time=found.distribution("request_queue_time_seconds"),
    )


class _Samples:
    """vLLM's samples by name, without its prefix: labels and value of each."""

    def __init__(self, *texts: str) -> None:
        self._of: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in itertools.chain.from_iterable(map(text_string_to_metric_families, texts)):
            for sample in family.samples:
                name = sample.name.removeprefix("vllm:")
                self._of.setdefault(name, []).append((sample.labels, sample.value))

    def count(self, name: str) -> int | None:
        values = [value for _, value in self._of.get(name, ())]
        return int(sum(values)) if values else None

    def mean(self, name: str) -> float | None:
        values = [value for _, value in self._of.get(name, ())]
        return sum(values) / len(values) if values else None

    def counts(self, name: str, *, by: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for labels, value in self._of.get(name, ()):
            found[labels.get(by, "")] = found.get(labels.get(by, ""), 0) + int(value)
        return found

    def distribution(self, name: str) -> Distribution | None:
        """None where the server has no such histogram, or nothing in it yet."""
        count = self.count(f"{name}_count")
        if not count:
            return None
        total = sum(value for _, value in self._of.get(f"{name}_sum", ()))
        buckets: dict[float, float] = {}
        for labels, value in self._of.get(f"{name}_bucket", ()):
            bound = float(labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
        bounds = sorted(buckets.items())
        return Distribution(count, total / count, {share: _quantile(share, bounds) for share in QUANTILES})


def _quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """Of a histogram's (upper bound, how many up to it), as Prometheus' histogram_quantile has it; NaN without any."""
    rank = share * buckets[-1][1] if buckets else 0.0
    below, lower = 0.0, 0.0
    for bound, up_to in buckets:
        if up_to >= rank and up_to > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (up_to - below)
        below, lower = up_to, bound
    return math.nan


def _grown(now: ServerMetrics, before: ServerMetrics, count: Callable[[ServerMetrics], int | None]) -> int | None:
    """By how much a counter has grown, in the epochs that there are now; None where nobody tells."""
    if now.replicas:
        known = {one.epoch: one for one in before.replicas}
        each = [_grown(one, known.get(one.epoch, _NOTHING), count) for one in now.replicas]
        return _sum(each)
    total = count(now)
    return None if total is None else total - ((count(before) or 0) if before.epoch == now.epoch else 0)


def _sum(counts: Iterable[int | None]) -> int | None:
    told = [one for one in counts if one is not None]
    return sum(told) if told else None


_NOTHING = ServerMetrics(0.0, -1)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
