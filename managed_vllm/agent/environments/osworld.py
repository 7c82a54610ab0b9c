"""OSWorld's `DesktopEnv`, or anything of its shape, in a process of its own.

    def make():                                    # in a module; runs in the environment's own process
        from desktop_env.desktop_env import DesktopEnv
        return DesktopEnv(provider_name="docker", action_space="pyautogui", headless=True, os_type="Ubuntu")

    env = OSWorldEnvironment(make)                 # , **OFFICIAL: for scores to be compared with OSWorld's own
    await env.reset(Task(id=task["id"], instruction=task["instruction"], data=task))     # task: OSWorld's JSON file

No dependency: `desktop-env` (1.0.2, whose source the facts here are of) pins old versions of many packages. Install it
in an environment of its own, managed-vllm beside it, and give that interpreter as `python=`. What is used of it:

- `reset(task_config=…)` returns a dict: `screenshot` (bytes, or None after three tries), `accessibility_tree`,
  `instruction`;
- `step(action, pause)`, with the source of a pyautogui script or `"WAIT"`, `"DONE"`, `"FAIL"`, returns (observation,
  reward, done, info), the reward being always 0 and meaning nothing;
- `evaluate()` returns the reward; `close()` gives the virtual machine back.

Actions become: `Finished` → `DONE`, `CallUser` → `FAIL`, `Wait` → `WAIT`, all others pyautogui source. A text that is
typed by keys goes in pieces, since the machine gives up a command after 90 s; the step may last as long as it takes.

`DesktopEnv` keeps several failures to itself. Here they fail the attempt, which then has no reward:

- no screenshot, or no accessibility tree where one is asked for;
- a set-up of the task that failed five times: it goes on without (told by `is_environment_used`);
- a command that could not be handed to the machine (`controller.execute_python_command` returned None);
- a script that raised there. What the model said is in it as literals only, so the machine is to blame: it has no
  display, no pyautogui, no clipboard.

Never is another machine taken silently.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from managed_vllm.agent.actions import Action, CallUser, Finished, Type, Wait, to_pyautogui
from managed_vllm.agent.actions.pyautogui_source import Keys, Typing, by_keys
from managed_vllm.agent.environments.gymnasium import plain_items
from managed_vllm.agent.environments.process_environment import ProcessEnvironment
from managed_vllm.agent.types import Limits, Observation, StepResult, Task

OFFICIAL: Mapping[str, Any] = MappingProxyType(
    {
        "pause_s": 3.0,
        "settle_s": 60.0,
        "evaluate_settle_s": 20.0,
        "typing": "paste",
        "keys": "as_said",
        "scroll_amount": 5,
        "decimals": 3,
    }
)
"""The options of `OSWorldEnvironment` with which it does what OSWorld's own runner does (`lib_run_single.py` and
`mm_agents/uitars15_v1.py`); the other half is `ui_tars("osworld")`."""

_PIECE = 400
"""Characters that one command types: some 12 s on an idle machine."""
_KEY_S = 0.1
"""For one key that is typed, on a machine that is busy."""
_COMMAND_S = 10.0
"""For one command beside its keys: handing it over, the pause, the screenshot."""

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
        settle_s: float = 60.0,
        evaluate_settle_s: float = 20.0,
        typing: Typing = "auto",
        keys: Keys = None,
        scroll_amount: int = 5,
        decimals: int = 0,
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
            settle_s: from the end of `DesktopEnv.reset` to the first screenshot, for what the task has started to
                appear; as OSWorld's own runner.
            evaluate_settle_s: from the last action to `evaluate`, for what it has started to be done; as there.
            typing, keys, scroll_amount, decimals: of `to_pyautogui`.
            accessibility_tree: it becomes `Observation.text`, as the machine gives it: XML, often of some 100 kB.
            evaluate: False: the environment says no reward.
            limits: seconds for each call; a reset has `settle_s` on top, an evaluation `evaluate_settle_s`, and a step
                what its text takes to be typed. OSWorld's own are long: three tries of 90 s for a command.
            release_s: if a call is ended (it was not over in time or cancelled, the rollout was killed), `close` of the
                `DesktopEnv` has so many seconds to give the machine back before its process is killed.
            environ: environment variables for the process.
            python: the interpreter that `desktop-env` is installed in, if it is another one (`ProcessEnvironment`).
            name: for messages.
        """
        for option, seconds in (("pause_s", pause_s), ("settle_s", settle_s), ("evaluate_settle_s", evaluate_settle_s)):
            if not seconds >= 0:
                raise ValueError(f"{option} must be 0 or more, not {seconds}")
        to_pyautogui((), typing=typing, keys=keys, scroll_amount=scroll_amount, decimals=decimals)  # are they right?
        self._pause_s = pause_s
        self._settle_s = settle_s
        self._evaluate_settle_s = evaluate_settle_s
        self._typing: Typing = typing
        super().__init__(
            SyncOSWorld,
            arguments={
                "make": make_desktop_env,
                "arguments": dict(arguments or {}),
                "pause_s": pause_s,
                "settle_s": settle_s,
                "evaluate_settle_s": evaluate_settle_s,
                "source": {"typing": typing, "keys": keys, "scroll_amount": scroll_amount, "decimals": decimals},
                "accessibility_tree": accessibility_tree,
                "evaluate": evaluate,
            },
            limits=limits,
            environ=environ,
            grace_s=release_s,
            python=python,
            name=name,
        )

    def extra_s(self, call: str, action: Action | None = None) -> float:
        """See `Environment`."""
        match action:
            case Type(text) if by_keys(text, self._typing):
                pieces = -(-len(text) // _PIECE)
                return len(text) * _KEY_S + pieces * (_COMMAND_S + self._pause_s)
            case Wait(seconds=float() | int() as seconds):
                return float(seconds)
        return {"reset": self._settle_s, "evaluate": self._evaluate_settle_s}.get(call, 0.0)


class SyncOSWorld:
    """The synchronous half, where the `DesktopEnv` lives."""

    def __init__(
        self,
        make: Callable[..., Any] | str,
        arguments: Mapping[str, Any] | None = None,
        pause_s: float = 2.0,
        settle_s: float = 0.0,
        evaluate_settle_s: float = 0.0,
        source: Mapping[str, Any] | None = None,
        accessibility_tree: bool = False,
        evaluate: bool = True,
    ) -> None:
        """Arguments as those of `OSWorldEnvironment`; `source`: options of `to_pyautogui`."""
        if isinstance(make, str):
            from managed_vllm.agent.environments.process_worker import named

            make = named(make)
        self._env = make(**(arguments or {}))
        self._pause_s = pause_s
        self._settle_s = settle_s
        self._evaluate_settle_s = evaluate_settle_s
        self._source = dict(source or {})
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
        if self._settle_s:
            time.sleep(self._settle_s)
            look = getattr(self._env, "_get_obs", None)  # what OSWorld's own runner calls; there is no other way
            seen = seen if look is None else look()
        return self._observation(seen, "reset")

    def step(self, action: Action) -> StepResult:
        scripts, pause_s = self._translated(action)
        for script in scripts[:-1]:
            self._run(script, 0.0, action)
        seen, done, info = self._run(scripts[-1], pause_s, action)
        return StepResult(self._observation(seen, "step"), None, done, False, info)

    def _run(self, script: str, pause_s: float, action: Action) -> tuple[Any, bool, dict[str, Any]]:
        """Observation, whether that is the end, and info. Raises `RuntimeError`: the machine did not do it."""
        with _executions(self._env) as executed:
            answer = self._env.step(script, pause_s)
        if not (isinstance(answer, tuple) and len(answer) == 4):
            raise TypeError(f"DesktopEnv.step must return (observation, reward, done, info), not {answer!r:.100}")
        seen, _, done, info = answer
        for result in executed:
            if result is None:
                raise RuntimeError(f"the machine did not execute {type(action).__name__}: its server gave no answer")
            if isinstance(result, Mapping) and (result.get("returncode") or result.get("status") == "error"):
                said = str(result.get("error") or result.get("message") or result.get("output") or result)
                raise RuntimeError(f"the machine could not execute {type(action).__name__}: {said[-2000:]}")
        return seen, bool(done), plain_items(info or {})

    def evaluate(self) -> float | None:
        if not self._evaluates or not hasattr(self._env, "evaluate"):
            return None
        time.sleep(self._evaluate_settle_s)
        reward = self._env.evaluate()
        return None if reward is None else float(reward)

    def close(self) -> None:
        self._env.close()

    def _translated(self, action: Action) -> tuple[list[str], float]:
        """Words or scripts, one after the other, and the pause after the last."""
        match action:
            case Finished():
                return ["DONE"], self._pause_s
            case CallUser():
                return ["FAIL"], self._pause_s
            case Wait(seconds=None):
                return ["WAIT"], self._pause_s
            case Wait(seconds=float() | int() as seconds):
                return ["WAIT"], seconds / 2  # DesktopEnv.step sleeps once for the action, and once as after any other
            case Type(text, enter) if by_keys(text, self._source.get("typing", "auto")) and len(text) > _PIECE:
                pieces = [Type(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE)]
                pieces[-1] = Type(pieces[-1].text, enter)
                return [to_pyautogui(piece, **self._source) for piece in pieces], self._pause_s
        return [to_pyautogui(action, **self._source)], self._pause_s

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
