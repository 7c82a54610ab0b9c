"""Environments by name, for the command line: how one is made, which tasks it has, and how a model is spoken to in it.

desktop                        the embedded desktop, drawn with Pillow
miniwob:click-test-2           a task of MiniWoB++ in headless Chromium
openenv:http://HOST:PORT       an OpenEnv server
package.module:function        anything, also of the current folder: the function (or class) makes an Environment
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from managed_vllm.agent.environments.osworld_tasks import is_osworld_list, osworld_tasks
from managed_vllm.agent.format import AgentFormat, embedded, json_actions, tool_calls, ui_tars
from managed_vllm.agent.imports import imported
from managed_vllm.agent.model_formats import (
    android_world,
    autoglm,
    claude,
    gemini,
    glm_v,
    holo,
    holo1_5,
    holo3_1,
    openai_computer,
    opencua,
    python_code,
    qwen2_5_vl,
    qwen_vl,
    qwen_vl_mobile,
    scalecua,
    scalecua_mobile,
    seed,
)
from managed_vllm.agent.run import MakeEnvironment
from managed_vllm.agent.tasks import as_task
from managed_vllm.agent.types import Limits, Task
from managed_vllm.errors import ConfigError

FORMATS: dict[str, Callable[..., AgentFormat]] = {
    "ui-tars": ui_tars,
    "json": json_actions,
    "tools": tool_calls,
    "embedded": embedded,
    "qwen3-vl": qwen_vl,
    "qwen3-vl-mobile": qwen_vl_mobile,
    "qwen2.5-vl": qwen2_5_vl,
    "opencua": opencua,
    "python": python_code,
    "glm-v": glm_v,
    "autoglm": autoglm,
    "seed": seed,
    "ui-tars-2": seed,
    "scalecua": scalecua,
    "scalecua-mobile": scalecua_mobile,
    "holo1.5": holo1_5,
    "holo3": holo,
    "holo3.1": holo3_1,
    "android-world": android_world,
    "gemini": gemini,
    "openai": openai_computer,
    "claude": claude,
}
"""How models are spoken to, by name."""


_PLAY = "Act so that the sum of your rewards becomes as high as it can."
"""The instruction where tasks are but seeds."""


@dataclass(frozen=True, slots=True)
class NamedEnvironment:
    """A kind of environment.

    Attributes:
        make: makes one.
        tasks: `tasks(count, seed)`; None where tasks must come from a file.
        format: the name of the format that fits, one of `FORMATS`; None: it depends on the model.
        agent: the format that fits, where only the environment knows it.
        name: as it is recorded, without credentials; None: as it was given.
    """

    make: MakeEnvironment
    tasks: Callable[[int, int], Sequence[Task]] | None
    format: str | None = None
    agent: AgentFormat | None = None
    name: str | None = None


def named_environment(name: str, limits: Limits) -> NamedEnvironment:
    """The world of that name. Raises `ConfigError`: there is none, or something is missing that it needs."""
    kind, colon, rest = name.partition(":")
    if name == "desktop":
        from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks

        return NamedEnvironment(DesktopEnvironment, lambda count, seed: desktop_tasks(count, seed=seed))
    if kind == "miniwob" and rest:
        from managed_vllm.agent.environments import miniwob

        missing = miniwob.missing()
        if missing:
            raise ConfigError(missing, field="env")

        def tasks(count: int, seed: int) -> list[Task]:
            return [Task(f"{rest}-{number}", seed=number) for number in range(seed, seed + count)]

        return NamedEnvironment(lambda: miniwob.MiniWoBEnvironment(rest, scale=3, limits=limits), tasks, "ui-tars")
    if kind == "openenv" and rest:
        return _openenv(rest, limits)
    if colon and rest:
        return NamedEnvironment(imported(name, field="env"), None)
    raise ConfigError(
        f"no environment {name!r}; there are desktop, miniwob:TASK, openenv:URL and package.module:function",
        field="env",
    )


def _openenv(url: str, limits: Limits) -> NamedEnvironment:
    from managed_vllm.agent.environments.openenv import OpenEnvEnvironment, server_url
    from managed_vllm.agent.openenv_format import action_schema, openenv_actions

    def tasks(count: int, seed: int) -> list[Task]:
        return [Task(f"seed-{number}", _PLAY, seed=number) for number in range(seed, seed + count)]

    return NamedEnvironment(
        lambda: OpenEnvEnvironment(url, on_invalid="tell", limits=limits),
        tasks,
        agent=openenv_actions(action_schema(url)),
        name=f"openenv:{server_url(url).with_user(None)}",
    )


def read_tasks(path: Path) -> list[Task]:
    """Tasks from a file: JSON lines, or one JSON list, of instructions or of objects with an `id` (see `as_task`); or a
    list of OSWorld's, `test_all.json` say (see `osworld_tasks`).

    Raises `ConfigError` that names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tasks in {path} can't be read: {error}", field="tasks") from error
    if path.suffix == ".json" and is_osworld_list(_json_or_none(text)):
        return osworld_tasks(path)
    if text.lstrip().startswith("["):
        try:
            return [as_task(given) for given in json.loads(text)]
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", field="tasks") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(as_task(json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: {error}", field="tasks") from error
    return found


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # JSON lines
        return None
