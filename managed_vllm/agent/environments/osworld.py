"""OSWorld's `DesktopEnv`, or anything of its shape, in a process of its own.

    def make():                                    # in a module; runs in the environment's own process
        from desktop_env.desktop_env import DesktopEnv
        return DesktopEnv(provider_name="docker", action_space="pyautogui", headless=True, os_type="Ubuntu")

    env = OSWorldEnvironment(make)
    await env.reset(Task(id=task["id"], instruction=task["instruction"], data=task))     # task: OSWorld's JSON file

No dependency: `desktop-env` (1.0.2, whose source the facts here are of) pins old versions of many packages. Install it
in an environment of its own, managed-vllm beside it, and give that interpreter as `python=`. What is used of it:

- `reset(task_config=…)` returns a dict: `screenshot` (bytes, or None after three tries), `accessibility_tree`,
  `instruction`;
- `step(action, pause)`, with the source of a pyautogui script or `"WAIT"`, `"DONE"`, `"FAIL"`, returns (observation,
  reward, done, info), the reward being always 0 and meaning nothing;
- `evaluate()` returns the reward; `close()` gives the virtual machine back.

Actions become: `Finished` → `DONE`, `CallUser` → `FAIL`, `Wait` → `WAIT`, all others pyautogui source.

`DesktopEnv` keeps several failures to itself. Here they fail the attempt, which then has no reward:

- no screenshot, or no accessibility tree where one is asked for;
- a set-up of the task that failed five times: it goes on without (told by `is_environment_used`);
- a command that could not be handed to the machine (`controller.execute_python_command` returned None).

A script that was handed over and raised there is the action's fault: `info["execute_error"]` has its last lines.
Never is another machine taken silently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from managed_vllm.agent.actions import Action, CallUser, Finished, Wait
from managed_vllm.agent.environments.gymnasium import plain_items
from managed_vllm.agent.environments.process_environment import ProcessEnvironment
from managed_vllm.agent.types import Limits, Observation, StepResult, Task

_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""How PNG and JPEG files begin; the machine's server sends PNG."""


class OSWorldEnvironment(ProcessEnvironment):
    """An `Environment` around a `DesktopEnv`: see the module, and `ProcessEnvironment`."""

    def __init__(
        self,
        make_desktop_env: Callable[..., Any] | str,
        *,
        arguments: Mapping[str, Any] | None = None,
        pause_s: float = 2.0,
        accessibility_tree: bool = False,
        evaluate: bool = True,
        limits: Limits | None = None,
        release_s: float = 20.0,
        environ: Mapping[str, str] | None = None,
        python: str | os.PathLike[str] | None = None,
        name: str = "OSWorld",
    ) -> None:
        """Nothing is started before the first `reset`.

        Args:
            make_desktop_env: returns a `DesktopEnv` with `action_space="pyautogui"`; called with `arguments`. It must
                be one that can be pickled, or `"package.module:name"`.
            pause_s: OSWorld's pause between an action and the next screenshot. `Wait()` takes twice that, `Wait(s)` s
                seconds.
            accessibility_tree: it becomes `Observation.text`, as the machine gives it: XML, often of some 100 kB.
            evaluate: False: the environment says no reward.
            limits: seconds for each call. OSWorld's own are long: three tries of 90 s for a command.
            release_s: if a call is ended (it was not over in time or cancelled, the rollout was killed), `close` of the
                `DesktopEnv` has so many seconds to give the machine back before its process is killed.
            environ: environment variables for the process.
            python: the interpreter that `desktop-env` is installed in, if it is another one (`ProcessEnvironment`).
            name: for messages.
        """
        if not pause_s >= 0:
            raise ValueError(f"pause_s must be 0 or more, not {pause_s}")
        super().__init__(
            SyncOSWorld,
            arguments={
                "make": make_desktop_env,
                "arguments": dict(arguments or {}),
                "pause_s": pause_s,
                "accessibility_tree": accessibility_tree,
                "evaluate": evaluate,
            },
            limits=limits,
            environ=environ,
            grace_s=release_s,
            python=python,
            name=name,
        )


class SyncOSWorld:
    """The synchronous half, where the `DesktopEnv` lives."""

    def __init__(
        self,
        make: Callable[..., Any] | str,
        arguments: Mapping[str, Any] | None = None,
        pause_s: float = 2.0,
        accessibility_tree: bool = False,
        evaluate: bool = True,
    ) -> None:
        """Arguments as those of `OSWorldEnvironment`."""
        if isinstance(make, str):
            from managed_vllm.agent.environments.process_worker import named

            make = named(make)
        self._env = make(**(arguments or {}))
        self._pause_s = pause_s
        self._tree = accessibility_tree
        self._evaluates = evaluate
        space = getattr(self._env, "action_space", "pyautogui")
        if space != "pyautogui":
            with contextlib.suppress(Exception):
                self._env.close()
            raise ValueError(f"the DesktopEnv has action_space={space!r}; make it with action_space='pyautogui'")

    def reset(self, task: Task) -> Observation:
        config = {"id": task.id, "instruction": task.instruction, **task.data}
        if self._evaluates and "evaluator" not in config:
            raise ValueError(f"task {task.id} has no 'evaluator' in its data: Task.data is OSWorld's JSON of the task")
        seen = self._env.reset(task_config=config)
        if config.get("config") and getattr(self._env, "is_environment_used", None) is False:
            raise RuntimeError(f"OSWorld could not set task {task.id} up; its log above says which step failed")
        return self._observation(seen, "reset")

    def step(self, action: Action) -> StepResult:
        words, pause_s = self._translated(action)
        with _executions(self._env) as executed:
            answer = self._env.step(words, pause_s)
        if not (isinstance(answer, tuple) and len(answer) == 4):
            raise TypeError(f"DesktopEnv.step must return (observation, reward, done, info), not {answer!r:.100}")
        seen, _, done, info = answer
        said = plain_items(info or {})
        for result in executed:
            if result is None:
                raise RuntimeError(f"the machine did not execute {type(action).__name__}: its server gave no answer")
            error = result.get("error") if isinstance(result, Mapping) else None
            if isinstance(result, Mapping) and (result.get("returncode") or result.get("status") == "error"):
                said["execute_error"] = str(error or result.get("output") or result)[-2000:]
        return StepResult(self._observation(seen, "step"), None, bool(done), False, said)

    def evaluate(self) -> float | None:
        if not self._evaluates or not hasattr(self._env, "evaluate"):
            return None
        reward = self._env.evaluate()
        return None if reward is None else float(reward)

    def close(self) -> None:
        self._env.close()

    def _translated(self, action: Action) -> tuple[str, float]:
        match action:
            case Finished():
                return "DONE", self._pause_s
            case CallUser():
                return "FAIL", self._pause_s
            case Wait(seconds=None):
                return "WAIT", self._pause_s
            case Wait(seconds=float() | int() as seconds):
                return "WAIT", seconds / 2  # DesktopEnv.step sleeps once for the action, and once as after any other
        from managed_vllm.agent.actions import to_pyautogui

        return to_pyautogui((action,)), self._pause_s

    def _observation(self, seen: Any, where: str) -> Observation:
        screenshot = seen.get("screenshot")
        if not isinstance(screenshot, bytes | bytearray) or not screenshot.startswith(_IMAGES):
            what = "nothing" if not screenshot else f"no image ({bytes(screenshot[:12])!r})"
            raise RuntimeError(
                f"no screenshot after {where}: the machine's server answered {what}, OSWorld's retries over"
            )
        text = None
        if self._tree:
            text = seen.get("accessibility_tree")
            if text is None:
                raise RuntimeError(
                    f"no accessibility tree after {where}; make the DesktopEnv with require_a11y_tree=True, or the "
                    "machine's server did not answer"
                )
        return Observation(bytes(screenshot), text, seen.get("instruction") or None)


@contextlib.contextmanager
def _executions(env: Any) -> Iterator[list[Any]]:
    """What the machine answers to commands meanwhile, which `DesktopEnv.step` does not look at."""
    answers: list[Any] = []
    controller = getattr(env, "controller", None)
    execute = getattr(controller, "execute_python_command", None)
    if controller is None or not callable(execute):
        yield answers
        return

    def executing(*arguments: Any, **options: Any) -> Any:
        answers.append(execute(*arguments, **options))
        return answers[-1]

    controller.execute_python_command = executing
    try:
        yield answers
    finally:
        controller.execute_python_command = execute
