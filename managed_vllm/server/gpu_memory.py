"""GPU memory of a server that has ended: the driver releases it some time after the process is gone.

A server that starts before that does not find enough (vllm PR#37230). NVML shows per process and per device what is
still held. Without NVML there is nothing to wait for.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

log = logging.getLogger(__name__)

_TOLERANCE = 256 << 20
"""Bytes by which a GPU's used memory may exceed what it was before: other processes' contexts come and go."""
SETTLED_S = 5.0
"""Seconds without a fall, and with none of our processes listed, after which another process must be holding it."""


@dataclass(frozen=True)
class GpuMemory:
    """Used bytes of each device at one moment, by NVML's index."""

    used: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """One GPU; memory in bytes."""

    index: int
    name: str
    driver: str
    total: int
    used: int


def devices() -> list[Device] | None:
    """All GPUs of the machine; None without NVML or GPU."""
    with nvml_library() as nvml:
        if nvml is None:
            return None
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        found = []
        for index in _indices(nvml, None):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append(Device(index, _text(nvml.nvmlDeviceGetName(handle)), driver, total, _used(nvml, index)))
        return found


def holders_text(indices: Iterable[int]) -> str:
    """Which processes hold memory of these GPUs, and how much."""
    with nvml_library() as nvml:
        return "" if nvml is None else _holders_text(nvml, indices)


def held_by(pids: Collection[int]) -> int | None:
    """Bytes that these processes hold on all GPUs; None without NVML, or where it lists none of them."""
    with nvml_library() as nvml:
        if nvml is None:
            return None
        held = [size for index in _indices(nvml, None) for pid, size in _holders(nvml, index) if pid in pids]
        return sum(size or 0 for size in held) if held else None


def used_memory(devices: str | None) -> GpuMemory | None:
    """The memory in use on the devices that `CUDA_VISIBLE_DEVICES` names (None: all); None without NVML or GPU."""
    with nvml_library() as nvml:
        if nvml is None:
            return None
        return GpuMemory({index: _used(nvml, index) for index in _indices(nvml, devices)})


def wait_until_released(before: GpuMemory | None, pids: Collection[int], devices: str | None, limit_s: float) -> str:
    """Waits until the driver has released what these ended processes held; at most `limit_s` seconds.

    Released means: NVML lists none of them, and each device's used memory is about what it was `before` the server
    started, or has stopped falling (in a container NVML lists other pids, or none). Returns "" then, else a text that
    says which processes still hold how much.
    """
    with nvml_library() as nvml:
        if nvml is None:
            return ""
        indices = _indices(nvml, devices)
        deadline = time.monotonic() + limit_s
        lowest, fell_at = None, time.monotonic()
        while True:
            used = {index: _used(nvml, index) for index in indices}
            listed = [holder for index in indices for holder in _holders(nvml, index) if holder[0] in pids]
            aims = {} if before is None else {index: before.used.get(index, 0) + _TOLERANCE for index in indices}
            # Both: a process that is not listed may hold memory still, and another one may free some meanwhile.
            if aims and not listed and all(used[index] <= aim for index, aim in aims.items()):
                return ""
            now, total = time.monotonic(), sum(used.values())
            if lowest is None or total < lowest:
                lowest, fell_at = total, now
            settled = not listed and now - fell_at > (SETTLED_S if before is not None else 0.5)
            if settled or now > deadline:
                return "" if settled and before is None else _holders_text(nvml, indices)
            time.sleep(0.1)


def _holders_text(nvml: Any, indices: Iterable[int]) -> str:
    held = []
    for index in indices:
        for pid, size in _holders(nvml, index):
            name = "?"
            with contextlib.suppress(psutil.Error):
                name = " ".join(psutil.Process(pid).cmdline())[:80]
            held.append(f"GPU {index}: pid {pid} ({name}) {(size or 0) >> 20} MiB")
    return "; ".join(held) or "; ".join(f"GPU {index}: {_used(nvml, index) >> 20} MiB in use" for index in indices)


@contextlib.contextmanager
def nvml_library() -> Any:
    """NVML, initialised, or None where it can't be had."""
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]  # comes with vllm on NVIDIA GPUs

        pynvml.nvmlInit()
    except Exception as error:  # the module, the library or the driver may be missing, each with its own exception
        log.debug("no NVML: %r", error)
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    """Older versions of the module give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _indices(nvml: Any, devices: str | None) -> list[int]:
    everything = list(range(nvml.nvmlDeviceGetCount()))
    if devices is None or not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", devices):
        return everything  # UUIDs and MIG names: all of them are watched
    named = [int(word) for word in devices.split(",")]
    return [index for index in named if index in everything]


def _used(nvml: Any, index: int) -> int:
    """0 where the device gives no answer (MIG, vGPU, one that fell off the bus): no reason to fail a start."""
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used)
    except Exception as error:  # NVML's own class of errors, by its own name in each version
        log.debug("GPU %d: %r", index, error)
        return 0


def _holders(nvml: Any, index: int) -> list[tuple[int, int | None]]:
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
    except Exception:  # not supported on this device (MIG, vGPU)
        return []
    return [(int(process.pid), process.usedGpuMemory) for process in running]
