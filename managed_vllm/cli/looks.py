"""What `managed-vllm top` and `managed-vllm metrics` see of the servers: state, metrics, memory. None takes a lease."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
    """

    row: Mapping[str, Any]
    metrics_text: str = ""
    metrics: ServerMetrics | None = None
    rates: Rates | None = None
    memory_bytes: int = 0
    gpu_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the text of the metrics."""
        return {
            **self.row,
            "metrics": asdict(self.metrics) if self.metrics else None,
            "rates": asdict(self.rates) if self.rates else None,
            "memory_bytes": self.memory_bytes,
            "gpu_memory_bytes": self.gpu_memory_bytes,
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
        text = "" if seen.connection is None else metrics_text(seen.connection)
        metrics = _read(text, seen.epoch)
        before = self._before.get(instance.id)
        processes = _processes_of(seen)
        return Look(
            row,
            text if metrics else "",
            metrics,
            None if metrics is None or before is None else metrics.since(before),
            sum(map(_memory, processes)),
            memory_held_by([process.pid for process in processes]),
        )


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


def _processes_of(seen: ServerStatus) -> list[psutil.Process]:
    """The supervisor and all below it, the image included."""
    with contextlib.suppress(psutil.Error):
        supervisor = psutil.Process(seen.supervisor_pid)
        return [supervisor, *supervisor.children(recursive=True)]
    return []


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0
