"""What `events.jsonl` says of a server's past, its older part included; for those who look, not for the supervisor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from managed_vllm.instance.directory import Instance
from managed_vllm.status import ServerState


def restarts_by_cause(instance: Instance) -> dict[str, int]:
    """How often the server was started again, by the cause of its end; `requested` where a user asked for it.

    Of several replicas each end counts: their events have the `replica`'s number, and epochs that are counted through
    all of them.
    """
    causes: dict[int, str] = {}
    events = list(_events(instance))
    of_replicas = [event for event in events if "replica" in event]
    begun: set[int] = set()
    for event in of_replicas or events:
        epoch = event.get("epoch")
        if not isinstance(epoch, int):
            continue
        if event.get("state") == ServerState.RESTARTING and epoch in begun:
            causes[epoch] = str((event.get("diagnosis") or {}).get("cause", "requested"))
        begun.add(epoch)  # the launch of an epoch is an event as well, with its own number
    found: dict[str, int] = {}
    for cause in causes.values():
        found[cause] = found.get(cause, 0) + 1
    return found


def _events(instance: Instance) -> Iterator[Mapping[str, Any]]:
    older = instance.events_path.with_name(f"{instance.events_path.name}.1")
    for path in (older, instance.events_path):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line may be half written
                    yield json.loads(line)
