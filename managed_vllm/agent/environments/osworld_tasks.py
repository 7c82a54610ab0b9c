"""OSWorld's tasks, from its own files.

    tasks = osworld_tasks("~/OSWorld/evaluation_examples/test_all.json", domains=["os", "vlc"])

A list such as `test_all.json`, `test_small.json` or `test_nogdrive.json` has ids by domain; each task is in
`examples/DOMAIN/ID.json` beside it. The whole file becomes `Task.data`, which `OSWorldEnvironment` hands on, and the
domain is in it as `domain`, which the export for OSWorld's own scripts goes by.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from managed_vllm.agent.types import Task
from managed_vllm.errors import ConfigError


def osworld_tasks(
    listed: str | os.PathLike[str],
    *,
    domains: Collection[str] | None = None,
    examples: str | os.PathLike[str] | None = None,
) -> list[Task]:
    """The tasks of a list, in its order.

    Args:
        listed: the list's file, `evaluation_examples/test_all.json` of a checkout.
        domains: only these; None: all.
        examples: the folder of the tasks' files, if it is not `examples` beside the list.

    Raises:
        ConfigError: a file is missing or is not what it should be, a domain is unknown, an id is there twice.
    """
    file = Path(listed).expanduser()
    ids = _read(file)
    if not is_osworld_list(ids):
        raise ConfigError(f"{file} is no list of OSWorld's: it must have ids by domain", field="tasks")
    unknown = sorted(set(domains or ()) - set(ids))
    if unknown:
        raise ConfigError(
            f"{file} has no domain {', '.join(unknown)}; there are {', '.join(sorted(ids))}", field="domains"
        )
    folder = file.parent / "examples" if examples is None else Path(examples).expanduser()
    chosen = [(domain, one) for domain in ids if domains is None or domain in domains for one in ids[domain]]
    tasks = [_task(folder, domain, one) for domain, one in chosen]
    _check_once(file, tasks)
    return tasks


def is_osworld_list(value: Any) -> bool:
    """Whether a JSON value has ids by domain."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(ids, list) and all(isinstance(one, str) and one for one in ids) for ids in value.values())
    )


def _task(folder: Path, domain: str, one: str) -> Task:
    file = folder / domain / f"{one}.json"
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{domain}/{one} is not in {folder}", field="tasks")
    data = _read(file)
    if not isinstance(data, dict) or not isinstance(data.get("instruction"), str):
        raise ConfigError(f"{file} is no task of OSWorld's: it has no instruction", field="tasks")
    return Task(str(data.get("id") or one), data["instruction"], data={**data, "domain": domain})


def _check_once(file: Path, tasks: list[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise ConfigError(f"{file} has the task {task.id} twice; a run names its tasks by their ids", field="tasks")
        seen.add(task.id)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {error}", field="tasks") from error
