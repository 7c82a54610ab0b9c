"""GPUs for machines without any: a module `pynvml` of the same calls, fed from a file that all processes read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

MIB = 1 << 20
TOTAL = 80_000 * MIB

_NVML = """
import json, os
from types import SimpleNamespace
def _state(): return json.load(open(os.environ["FAKE_NVML"]))
def _gpu(handle):
    if isinstance(handle, int): return _state()[handle]
    return next(gpu for gpu in _state() if handle == gpu["uuid"])
def nvmlInit():
    if _state() is None: raise RuntimeError("driver not loaded")
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(_state())
def nvmlDeviceGetHandleByIndex(index):
    if _state()[index].get("hidden"): raise RuntimeError("no permission")
    return index
def nvmlDeviceGetHandleByUUID(uuid): return uuid
def nvmlDeviceGetUUID(handle): return handle if isinstance(handle, str) else _gpu(handle)["uuid"]
def nvmlDeviceGetMemoryInfo(handle): return SimpleNamespace(used=_gpu(handle)["used"], total=80_000 << 20)
def nvmlDeviceGetComputeRunningProcesses(handle): return []
def nvmlDeviceGetMigMode(handle): return [bool(_gpu(handle)["parts"])] * 2
def nvmlDeviceGetMaxMigDeviceCount(handle): return 7
def nvmlDeviceGetMigDeviceHandleByIndex(handle, number): return _gpu(handle)["parts"][number]
"""


class FakeGpus:
    """What the module tells: of each GPU its UUID, the bytes in use, and the parts into which it is divided."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.gpus: list[dict[str, object]] = []

    def are(self, count: int) -> None:
        """So many GPUs, all idle."""
        self.gpus = [{"uuid": f"GPU-{number:08d}-aaaa", "used": 0, "parts": []} for number in range(count)]
        self._write()

    def set(self, index: int, *, used: int = 0, parts: Sequence[str] = (), hidden: bool = False) -> None:
        """Changes one GPU."""
        self.gpus[index] |= {"used": used, "parts": list(parts), "hidden": hidden}
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.gpus))
        os.replace(temporary, self._path)


def installed(folder: Path, patch: pytest.MonkeyPatch) -> FakeGpus:
    """Puts the module before the real one, here and in the processes that are started from now on."""
    (folder / "pynvml.py").write_text(_NVML)
    patch.setenv("FAKE_NVML", str(folder / "gpus"))
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    forget_with(patch)
    return FakeGpus(folder / "gpus")


def forget_with(patch: pytest.MonkeyPatch) -> None:
    """Forgets the module `pynvml`, and the one that is imported from now on when the patch is undone."""
    patch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    patch.delitem(sys.modules, "pynvml")
