"""What a server has outside of its processes and its instance's folder: scratch, shared memory, GPU memory, devices.

All of it is noted in the record as soon as it exists, so that whoever comes after a supervisor that was killed removes
it. Before an epoch begins nothing of the last one is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from managed_vllm.config import SupervisorOrder
from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.server import gpu_memory
from managed_vllm.server.device_claim import DeviceClaim
from managed_vllm.server.process import ServerProcess

log = logging.getLogger("managed_vllm.supervisor")


class Footprint:
    """The footprint of one instance's servers, from the first epoch to the last."""

    def __init__(self, order: SupervisorOrder, instance: Instance, predecessor: Mapping[str, Any] | None) -> None:
        """`predecessor` is the record of a supervisor of this instance that was killed."""
        self._order = order
        self.devices = DeviceClaim(order, instance, predecessor)
        self._gpu_at_first: gpu_memory.GpuMemory | None = None
        self._shared_memory: set[str] = set()
        self.scratch: Path | None = None
        """The servers' temporary folder, once `prepare` has made it."""
        self._held: int | None = None

    def to_record(self) -> dict[str, Any]:
        """What a successor needs to remove it: `cleanup.remove_recorded`."""
        return {
            "scratch": str(self.scratch) if self.scratch else None,
            "shared_memory": sorted(self._shared_memory),
            **self.devices.to_record(),
        }

    async def gpu_memory(self) -> gpu_memory.GpuMemory | None:
        """What is in use on the server's GPUs, by whomever; None without NVML or GPU."""
        return await asyncio.to_thread(gpu_memory.used_memory, self._cuda_devices)

    @property
    def _cuda_devices(self) -> str | None:
        """The GPUs that the servers see, as in `CUDA_VISIBLE_DEVICES`; None: all."""
        return self.devices.taken.variables.get("CUDA_VISIBLE_DEVICES", self._order.spec.cuda_devices)

    async def prepare(self) -> Path:
        """Before a launch: notes how much GPU memory was used before us, and returns the scratch folder."""
        if self._gpu_at_first is None:
            self._gpu_at_first = await self.gpu_memory()
        if self.scratch is None:
            self.scratch = cleanup.make_scratch()
            self._hold(self.scratch)
        return self.scratch

    def _hold(self, scratch: Path) -> None:
        held, self._held = self._held, cleanup.hold_scratch(scratch)
        if held is not None:
            os.close(held)

    def renew(self) -> None:
        """Makes the scratch folder again if somebody has removed it."""
        if self.scratch is not None:
            self.scratch.mkdir(mode=0o700, exist_ok=True)
            self._hold(self.scratch)

    async def look(self, process: ServerProcess) -> bool:
        """Notes which shared memory the server has by now; True if some of it is new."""
        known = await process.record_shared_memory()
        is_new = bool(known - self._shared_memory)
        self._shared_memory |= known
        return is_new

    async def clear(self, pids: set[int]) -> None:
        """After the end of the server whose processes had these pids."""
        if self.scratch is not None:
            await asyncio.to_thread(cleanup.empty_scratch, self.scratch)
        await self._wait_for_gpu_memory(pids)

    async def clear_after_predecessor(self, instance: Instance, record: Mapping[str, Any] | None) -> None:
        """Ends what a supervisor that was killed may have left, and removes what its record names."""
        strays = await asyncio.to_thread(cleanup.marked_processes, instance)
        if strays:
            log.warning("ending processes left by a predecessor: %s", [stray.pid for stray in strays])
            await asyncio.to_thread(cleanup.end_processes, strays)
        await asyncio.to_thread(lambda: cleanup.remove_shared_memory(cleanup.named_shared_memory(instance)))
        if record is not None:
            await asyncio.to_thread(cleanup.remove_recorded, record)
            pid = record.get("server_pid")
            await self._wait_for_gpu_memory({pid} if isinstance(pid, int) else set())

    async def remove(self) -> None:
        """At the very end."""
        await asyncio.to_thread(self.devices.give_back)
        with contextlib.suppress(OSError):
            if self.scratch is not None:
                await asyncio.to_thread(cleanup.remove_scratch, self.scratch)

    async def _wait_for_gpu_memory(self, pids: set[int]) -> None:
        limit_s = self._order.policy.gpu_release_timeout_s
        holders = await asyncio.to_thread(
            gpu_memory.wait_until_released, self._gpu_at_first, pids, self._cuda_devices, limit_s
        )
        if holders:
            log.warning("the GPU memory was not all released: %s", holders)
