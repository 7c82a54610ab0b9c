"""The devices that a server may take with `devices="auto"`, and how it is told which ones it has.

GPUs, as far as the first starter sees them (`CUDA_VISIBLE_DEVICES`, which Slurm sets; a cgroup or a container that
hides some hides them from NVML, too), or cores where vLLM runs on a CPU: those that the supervisor may run on
(`sched_getaffinity`, which follows a cgroup's cpuset) and has the quota for. A GPU goes by its UUID, which is the same
in every container, whatever its index is there.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from managed_vllm.config import ServerSpec
from managed_vllm.server import gpu_memory

BOUND_CORES = "VLLM_CPU_OMP_THREADS_BIND"

_FREE_SHARE, _FREE_BYTES = 0.05, 1 << 30
"""A GPU counts as free while no more of its memory is used than this share, or so many bytes: a desktop, a context."""


@dataclass(frozen=True)
class Device:
    """One device: the name of its place, what people call it, and its word in the server's variable."""

    place: str
    label: str
    word: str


@dataclass(frozen=True)
class TakenDevices:
    """What a server has: its devices as people call them, the variables that tell it, the descriptors of the places."""

    labels: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pool:
    """What a server may take: `devices`, in the order in which they are taken, and how many it needs.

    `groups` is the number of Workers, among whom the devices are divided.
    """

    kind: str
    devices: Sequence[Device]
    wanted: int
    groups: int

    def labelled(self, places: Sequence[str]) -> tuple[str, ...]:
        """What people call the devices with these places."""
        labels = {device.place: device.label for device in self.devices}
        return tuple(labels[place] for place in places)

    def number(self, count: int) -> str:
        """As in "2 GPUs"."""
        return f"{count} {self.kind}{'' if count == 1 else 's'}"

    def variables(self, places: Sequence[str]) -> dict[str, str]:
        """The variables of a server that has taken these places."""
        words = [device.word for device in self.devices if device.place in places]
        if self.kind == "GPU":
            # NVML's indices, and vLLM's, are in the order of the bus; CUDA's are so only if it is told.
            return {"CUDA_VISIBLE_DEVICES": ",".join(words), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        size = len(words) // self.groups
        groups = [",".join(words[at : at + size]) for at in range(0, size * self.groups, size)]
        return {BOUND_CORES: "|".join(groups)}


def pool(spec: ServerSpec) -> Pool:
    """What a server of this spec may take. Its devices are empty where there is none of the kind that it needs."""
    workers = _workers(spec.engine_args)
    gpus = None if "cpu" in spec.vllm else visible_gpus(spec.cuda_devices)
    if gpus or (spec.command is None and "cpu" not in spec.vllm):
        divided = workers > 1 and any(gpu.word.startswith("MIG-") for gpu in gpus or ())
        # CUDA gives a process one part of a divided GPU, and no more.
        return Pool("GPU", (gpus or [])[: 1 if divided else None], workers, workers)
    cores = usable_cores()
    each = spec.cores or max(1, len(cores) // (workers * spec.replicas))
    named = [Device(f"core-{core}", f"core {core}", str(core)) for core in cores]
    return Pool("core", named, each * workers, workers)


def binds_cores(spec: ServerSpec) -> bool:
    """Whether the user says itself on which cores vLLM's threads run."""
    return spec.variables().get(BOUND_CORES, "auto") != "auto"


def _workers(arguments: Mapping[str, Any]) -> int:
    """Workers of a vLLM that has this machine to itself."""
    parallel = [_number(arguments, name) for name in _SIZES]
    local = _number(arguments, "data_parallel_size_local", _number(arguments, "data_parallel_size"))
    return math.prod(parallel) * local


_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")


def _number(arguments: Mapping[str, Any], name: str, default: int = 1) -> int:
    """What is no number vLLM itself refuses."""
    with contextlib.suppress(TypeError, ValueError):
        return max(1, int(arguments[name])) if name in arguments else default
    return default


# -- cores -------------------------------------------------------------------------------------------------------------


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The cores that this process may run on, no more than its cgroup has the quota for."""
    cores = sorted(os.sched_getaffinity(0))
    quota = _quota(cgroups)
    return cores if quota is None else cores[: max(1, math.floor(quota))]


def _quota(cgroups: Path) -> float | None:
    """Cores' worth of time that the cgroup of this container may use (Kubernetes' `limits.cpu`); None: any."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (cgroups / "cpu.max").read_text().split()
        return int(limit) / int(period)  # ValueError: "max"
    with contextlib.suppress(OSError, ValueError):
        limit, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None
    return None


# -- GPUs --------------------------------------------------------------------------------------------------------------


def visible_gpus(visible: str | None) -> list[Device] | None:
    """The GPUs, or parts of them (MIG), that a process with this `CUDA_VISIBLE_DEVICES` has; None without NVML."""
    with gpu_memory.nvml_library() as nvml:
        if nvml is None:
            return None
        found = list(_listed(nvml))
    if visible is None:
        return found
    chosen: list[Device] = []
    for word in visible.split(","):
        # CUDA takes the beginning of a UUID, too, and ends at the first word that it does not know.
        fitting = [one for one in found if word and (word == one.word or one.place.startswith(word))]
        if len(fitting) != 1:
            break
        if fitting[0] not in chosen:
            # A UUID stays one: who named it may run a vLLM, or a container, for which indices mean something else.
            chosen.append(fitting[0] if word.isdecimal() else Device(fitting[0].place, fitting[0].label, word))
    return chosen


def is_free(place: str) -> bool:
    """Whether next to nothing of a GPU's memory is in use, by whomever. True where NVML does not tell."""
    with gpu_memory.nvml_library() as nvml, contextlib.suppress(Exception):  # NVML's own errors; MIG tells nothing
        memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(place))
        return int(memory.used) <= max(_FREE_BYTES, _FREE_SHARE * int(memory.total))
    return True


def _listed(nvml: Any) -> Iterator[Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(Exception):  # one that a cgroup hides, or that fell off the bus
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            parts = list(_mig_parts(nvml, handle))
            if parts:
                yield from (Device(part, f"GPU {index} ({part[:12]}…)", part) for part in parts)
            elif re.fullmatch(r"[\w-]+", uuid):
                yield Device(uuid, f"GPU {index}", str(index))


def _mig_parts(nvml: Any, handle: Any) -> Iterator[str]:
    """The UUIDs of a GPU's MIG devices; none where it is not divided."""
    with contextlib.suppress(Exception):  # not supported
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with contextlib.suppress(Exception):  # there are fewer
                yield _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
