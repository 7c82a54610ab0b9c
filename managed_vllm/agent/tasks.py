"""Tasks as callers give them: from any iterable, and from texts and mappings."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from managed_vllm.agent.types import Task
from managed_vllm.errors import ConfigError

Tasks = Iterable[Task | str | Mapping[str, Any]] | AsyncIterable[Task | str | Mapping[str, Any]]
"""What a run is given; it may be endless."""


async def each_task(tasks: Tasks) -> AsyncIterator[Task]:
    """Tasks, from whatever the caller gave."""
    if isinstance(tasks, str | Mapping | Task):
        raise ConfigError("tasks must be an iterable of tasks", field="tasks")
    if isinstance(tasks, AsyncIterable):
        async for given in tasks:
            yield as_task(given)
    else:
        for given in tasks:
            yield as_task(given)


def begun_at(tasks: Sequence[Task], begin: float) -> list[Task]:
    """The same tasks, from another place on: `begin` is a share of them, below 1.

    Processes of one run that begin at different places hardly ever want the same rollout. Where all begin alike, each
    looks at what the others have claimed first, and with a hundred of them a file server does nothing else.
    """
    first = int(begin * len(tasks))
    return [*tasks[first:], *tasks[:first]]


def as_task(given: Task | str | Mapping[str, Any]) -> Task:
    """A task, from one, from its instruction (which is its id, too), or from a mapping.

    A mapping has `id` (or `task_id`) and may have `instruction` and `seed`; all of it becomes `data`, as an OSWorld
    task configuration does. Raises `ConfigError` for anything else.
    """
    if isinstance(given, Task):
        return given
    if isinstance(given, str) and given:
        return Task(given, given)
    if isinstance(given, Mapping):
        name = given.get("id", given.get("task_id"))
        if isinstance(name, str | int) and str(name):
            seed = given.get("seed")
            instruction = given.get("instruction")
            return Task(
                str(name),
                instruction if isinstance(instruction, str) else "",
                seed if isinstance(seed, int) else None,
                dict(given),
            )
    raise ConfigError(f"not a task: {given!r:.200}; give a Task, an instruction, or a dict with an id", field="tasks")
