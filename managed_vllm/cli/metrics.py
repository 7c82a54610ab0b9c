"""`managed-vllm metrics`: what all servers and their supervisors tell, for Prometheus; as text, or served over HTTP.

The names of vLLM's own metrics and their labels stay as they are; each gets the label `server`, the instance's id, as
ours have it (`managed_vllm_…`). With several replicas it gets the label `replica` as well.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import itertools
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from managed_vllm.cli.keys import given_key
from managed_vllm.cli.looks import Look, Looker
from managed_vllm.cli.serve import terminable
from managed_vllm.exposition import CONTENT_TYPE, exposed, merged
from managed_vllm.health import BOUNDS_S, HealthChecks
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.event_history import restarts_by_cause
from managed_vllm.status import ServerState

_ABSENT = ("dead", "unresponsive")
"""What a server can be beside a `ServerState`: its supervisor is gone, or does not answer."""


def metrics(given: argparse.Namespace) -> int:
    """`managed-vllm metrics`."""
    home = directory.state_home()
    if not given.serve:
        print(exposition(home).decode(), end="")
        return 0
    key = given_key(given)
    with MetricsServer(home, key or secrets.token_urlsafe(24), given.port) as server, terminable():
        print(f"serving at {server.url}", flush=True)
        if key is None:
            print(f"  its key:  {server.key}", flush=True)
        server.serve_forever()
    return 0


def exposition(home: Path) -> bytes:
    """All servers of a state directory in Prometheus' text format."""
    looks = Looker(home).look()
    return exposed([*_own(home, looks), *merged((server, look.metrics_text) for server, look in _each(looks))])


def _own(home: Path, looks: Sequence[Look]) -> list[Metric]:
    info = InfoMetricFamily("managed_vllm_server", "What is served, and how it was launched.", labels=["server"])
    state = GaugeMetricFamily("managed_vllm_state", "1 for the state that it is in.", labels=["server", "state"])
    epoch = GaugeMetricFamily("managed_vllm_epoch", "Starts of the server so far.", labels=["server"])
    leases = GaugeMetricFamily("managed_vllm_leases", "Users that hold a lease.", labels=["server"])
    pinned = GaugeMetricFamily("managed_vllm_pinned", "1 if it stays without users.", labels=["server"])
    uptime = GaugeMetricFamily("managed_vllm_uptime_seconds", "Since it became ready.", labels=["server"])
    memory = GaugeMetricFamily(
        "managed_vllm_memory_bytes", "Of all its processes: PSS, and on GPUs.", labels=["server", "kind"]
    )
    restarts = CounterMetricFamily(
        "managed_vllm_restarts", "Ends after which it was started again.", labels=["server", "cause"]
    )
    weights = InfoMetricFamily(
        "managed_vllm_weights", "Which weights are served: their version, and the checkpoint.", labels=["server"]
    )
    for look in looks:
        row, server = look.row, str(look.row["id"])
        info.add_metric([server], {"model": str(row["model"] or ""), "launch": str(row["launch"] or "")})
        for one in (*ServerState, *_ABSENT):
            state.add_metric([server, str(one)], float(row["state"] == one))
        epoch.add_metric([server], row["epoch"])
        leases.add_metric([server], len(row["users"]))
        pinned.add_metric([server], float(row["pinned"]))
        if row["ready_at"]:
            uptime.add_metric([server], max(0.0, time.time() - row["ready_at"]))
        memory.add_metric([server, "pss"], look.memory_bytes)
        if look.gpu_memory_bytes is not None:
            memory.add_metric([server, "gpu"], look.gpu_memory_bytes)
        for cause, count in restarts_by_cause(Instance(home, server)).items():
            restarts.add_metric([server, cause], count)
        engine = row["engine"]
        weights.add_metric([server], {"version": engine["weight_version"], "checkpoint": engine["weights"] or ""})
    return [info, state, epoch, leases, pinned, uptime, memory, restarts, weights, *_replicas(looks), *_health(looks)]


def _replicas(looks: Iterable[Look]) -> list[Metric]:
    """What concerns each replica, and the router in front of them; nothing of a single server."""
    labels = ["server", "replica"]
    state = GaugeMetricFamily(
        "managed_vllm_replica_state", "1 for the state that the replica is in.", labels=[*labels, "state"]
    )
    epoch = GaugeMetricFamily(
        "managed_vllm_replica_epoch", "Number of its start, of all replicas' starts.", labels=labels
    )
    uptime = GaugeMetricFamily("managed_vllm_replica_uptime_seconds", "Since it became ready.", labels=labels)
    restarts = CounterMetricFamily("managed_vllm_replica_restarts", "How often it was started again.", labels=labels)
    memory = GaugeMetricFamily(
        "managed_vllm_replica_memory_bytes", "Of its processes: PSS, and on GPUs.", labels=[*labels, "kind"]
    )
    router = GaugeMetricFamily("managed_vllm_router_up", "1 if the router answers.", labels=["server"])
    again = CounterMetricFamily("managed_vllm_router_restarts", "How often it was started again.", labels=["server"])
    for look in looks:
        server = str(look.row["id"])
        for replica in look.replicas:
            row, which = replica.row, [server, str(replica.row["replica"])]
            for one in ServerState:
                state.add_metric([*which, str(one)], float(row["state"] == one))
            epoch.add_metric(which, row["epoch"])
            restarts.add_metric(which, row["restarts"])
            if row["ready_at"]:
                uptime.add_metric(which, max(0.0, time.time() - row["ready_at"]))
            memory.add_metric([*which, "pss"], replica.memory_bytes)
            if replica.gpu_memory_bytes is not None:
                memory.add_metric([*which, "gpu"], replica.gpu_memory_bytes)
        if look.row.get("router"):
            router.add_metric([server], float(look.row["router"]["ready"]))
            again.add_metric([server], look.row["router"]["restarts"])
    return [one for one in (state, epoch, uptime, restarts, memory, router, again) if one.samples]


def _each(looks: Iterable[Look]) -> Iterator[tuple[dict[str, str], Look]]:
    """Each server, or its replicas, with the labels that say which it is."""
    for look in looks:
        server = {"server": str(look.row["id"])}
        if look.replicas:
            yield from (({**server, "replica": str(one.row["replica"])}, one) for one in look.replicas)
        else:
            yield server, look


def _health(looks: Iterable[Look]) -> list[Metric]:
    last = GaugeMetricFamily(
        "managed_vllm_health_last_seconds", "Until the last check of /health was answered.", labels=["server"]
    )
    answered = HistogramMetricFamily(
        "managed_vllm_health_seconds", "Until the supervisor's checks of /health were answered.", labels=["server"]
    )
    unanswered = CounterMetricFamily(
        "managed_vllm_health_unanswered", "Checks of /health that got no answer in time.", labels=["server"]
    )
    for labels, look in _each(looks):
        checks = HealthChecks.from_dict(look.row["health"])
        if checks.last_s is not None:
            last.add_sample(last.name, labels, checks.last_s)
        up_to = list(itertools.accumulate(checks.buckets))
        for bound, count in zip((*BOUNDS_S, "+Inf"), up_to, strict=True):
            answered.add_sample(f"{answered.name}_bucket", {**labels, "le": str(bound)}, count)
        answered.add_sample(f"{answered.name}_count", labels, up_to[-1])
        answered.add_sample(f"{answered.name}_sum", labels, checks.total_s)
        unanswered.add_sample(f"{unanswered.name}_total", labels, checks.unanswered)
    return [last, answered, unanswered]


class MetricsServer(ThreadingHTTPServer):
    """`GET /metrics` on loopback for whoever has the key, as a bearer's or as the password of Basic authentication."""

    daemon_threads = True

    def __init__(self, home: Path, key: str, port: int) -> None:
        self.home, self.key = home, key
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.server_address[1]}/metrics"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = 30.0

    def do_GET(self) -> None:
        if not self._has_key():
            self._send(401, b"this wants its key\n", **{"WWW-Authenticate": 'Basic realm="managed-vllm"'})
        elif self.path.partition("?")[0] != "/metrics":
            self._send(404, b"see /metrics\n")
        else:
            self._send(200, exposition(self.server.home))

    def _has_key(self) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(given.strip().encode(), self.server.key.encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": CONTENT_TYPE, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no news."""
