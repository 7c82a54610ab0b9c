"""What `managed-vllm top` and `managed-vllm metrics` see of the servers: state, metrics, memory. None takes a lease."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from managed_vllm.cli import running
from managed_vllm.doctor.gpus import memory_held_by
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
from managed_vllm.request import server_metrics
from managed_vllm.request.server_metrics import Rates, ServerMetrics
from managed_vllm.status import Connection, ServerStatus

_METRICS_S = 3.0
"""Seconds within which a server must tell its metrics; one that does not has none in this look."""
_AT_ONCE = 8


@dataclass(frozen=True)
class Look:
    """One server at one moment.

    Attributes:
        row: what `managed-vllm status --json` has of it.
        metrics_text: its `/metrics` as they came; empty while it tells none.
        metrics: the same, read; `rates`: since the look before.
        memory_bytes: of all its processes, shared pages divided among those that share them (PSS).
        gpu_memory_bytes: of the same processes on all GPUs; None without NVML.
        replicas: of a server that has several, each; what is said above is then of all of them, and of the supervisor.
    """

    row: Mapping[str, Any]
    metrics_text: str = ""
    metrics: ServerMetrics | None = None
    rates: Rates | None = None
    memory_bytes: int = 0
    gpu_memory_bytes: int | None = None
    replicas: Sequence[Look] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the text of the metrics."""
        return {
            **self.row,
            "metrics": asdict(self.metrics) if self.metrics else None,
            "rates": asdict(self.rates) if self.rates else None,
            "memory_bytes": self.memory_bytes,
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "replicas": [replica.to_dict() for replica in self.replicas],
        }


class Looker:
    """Looks at the servers of a state directory, again and again: rates are those since its last look."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._before: dict[str, ServerMetrics] = {}

    def look(self) -> list[Look]:
        """All servers, side by side: one that does not answer keeps none of the others waiting."""
        names = running.names_by_id(self._home)
        instances = directory.instances(self._home)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda one: self._at(one, names.get(one.id, [])), instances))
        self._before = {one.row["id"]: one.metrics for one in found if one.metrics is not None}
        return found

    def _at(self, instance: Instance, names: list[str]) -> Look:
        seen = running.peek(instance)
        row = running.to_json(instance, names, seen, show_key=False)
        if seen is None:
            return Look(row)
        before = self._before.get(instance.id)
        memory = {process: _memory(process) for process in _processes_below(seen.supervisor_pid)}
        if not seen.replicas:
            return _look(row, seen, _text_of(seen), before, memory)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            texts = list(pool.map(_text_of, seen.replicas))
        each = [
            _look(row["replicas"][number], one, text, _of_epoch(before, one.epoch), _part(memory, one.server_pid))
            for number, (one, text) in enumerate(zip(seen.replicas, texts, strict=True))
        ]
        told = {look.row["epoch"]: look.metrics_text for look in each if look.metrics_text}
        metrics = server_metrics.together(told) if told else None
        return replace(
            _look(row, seen, "", None, memory), metrics=metrics, rates=_rates(metrics, before), replicas=each
        )


Memory = Mapping[psutil.Process, int]
"""Processes, and the bytes of each."""


def _look(row: Mapping[str, Any], seen: ServerStatus, text: str, before: ServerMetrics | None, memory: Memory) -> Look:
    metrics = _read(text, seen.epoch)
    gpu_memory = memory_held_by([process.pid for process in memory])
    return Look(row, text if metrics else "", metrics, _rates(metrics, before), sum(memory.values()), gpu_memory)


def _rates(metrics: ServerMetrics | None, before: ServerMetrics | None) -> Rates | None:
    return None if metrics is None or before is None else metrics.since(before)


def _of_epoch(before: ServerMetrics | None, epoch: int) -> ServerMetrics | None:
    return next((one for one in (before.replicas if before else ()) if one.epoch == epoch), None)


def _text_of(seen: ServerStatus) -> str:
    return "" if seen.connection is None else metrics_text(seen.connection)


def metrics_text(connection: Connection) -> str:
    """The text of a server's `/metrics`; empty where it tells none."""
    transport = httpx.HTTPTransport(uds=connection.uds) if connection.uds else None
    headers = {"Authorization": f"Bearer {connection.api_key.reveal()}"}
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.Client(transport=transport, headers=headers, trust_env=False, timeout=_METRICS_S) as client,
    ):
        response = client.get(f"{connection.base_url.removesuffix('/v1')}/metrics")
        return response.text if response.status_code == 200 else ""
    return ""


def _read(text: str, epoch: int) -> ServerMetrics | None:
    with contextlib.suppress(ValueError):
        return server_metrics.parse(text, epoch=epoch) if text else None
    return None


def _processes_below(pid: int | None) -> list[psutil.Process]:
    """That process and all below it: below the supervisor is all of a server, the image included."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def _part(memory: Memory, pid: int | None) -> Memory:
    """That of one replica, whose API server has this pid."""
    own = set() if pid is None else set(_processes_below(pid))
    return {process: size for process, size in memory.items() if process in own}


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0
