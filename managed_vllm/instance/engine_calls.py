"""One call of the engine's control, as a user makes it: on the control channel, and bounded in time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from managed_vllm.errors import (
    ENGINE_ERRORS,
    CheckpointError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
    error_for,
)
from managed_vllm.instance.channel import Channel
from managed_vllm.status import ServerState

CALL_S = 60.0
"""Default time limit of a call, in seconds."""
UPDATE_S = 600.0
"""The same of `update_weights`."""
_ANSWER_S = 5.0
"""Seconds beyond a call's limit in which the supervisor must have said that it is over."""


@dataclass(frozen=True)
class Weights:
    """Which weights a server has.

    Args:
        path: the checkpoint folder they were loaded from; None: those that the server was started with.
        version: what they are called; empty: nobody has named them.
        checksum: one over all of them; None: the server does not tell.
    """

    path: str | None
    version: str
    checksum: str | None


@dataclass(frozen=True)
class GpuMemoryChange:
    """What a server's GPUs had in use before and after, in bytes, by NVML's index; by whomever, others included."""

    before: Mapping[int, int]
    after: Mapping[int, int]

    @property
    def freed(self) -> int:
        """Bytes that were given back on all of them; below 0: taken."""
        return sum(self.before.values()) - sum(self.after.values())

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> GpuMemoryChange | None:
        """Of a supervisor's reply; None where it could not measure: no NVML, no GPU."""
        before, after = reply.get("gpu_memory") or (None, None)
        if before is None or after is None:
            return None
        return cls(*({int(index): int(used) for index, used in one.items()} for one in (before, after)))


def call_engine(channel: Channel, name: str, deadline: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One call, on the very connection to which what it holds is tied. `deadline` is of the monotonic clock."""
    left = max(0.0, deadline - time.monotonic())
    try:
        reply = channel.request(
            "engine", timeout_s=left + _ANSWER_S, call=name, arguments=dict(arguments), budget_s=left
        )
    except ConnectionError as error:
        status = channel.status
        if status is not None and status.state is ServerState.FAILED and status.diagnosis is not None:
            raise error_for(status.diagnosis, instance=None, log_path=status.log_path) from error
        raise EngineLostError(f"{name}: the supervisor ended, or this handle was closed", call=name) from error
    except TimeoutError as error:
        raise EngineTimeoutError(f"{name}: the supervisor does not answer", call=name) from error
    if reply.get("ok"):
        found: dict[str, Any] = reply["result"]
        return found
    if "checkpoint" in reply:
        raise CheckpointError.from_dict(reply["checkpoint"])
    kind = ENGINE_ERRORS.get(str(reply.get("kind")), EngineControlError)
    raise kind(str(reply.get("error")), call=str(reply.get("call", name)), status=reply.get("http_status"))
