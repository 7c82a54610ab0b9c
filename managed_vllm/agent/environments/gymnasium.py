"""Any environment of gymnasium's, in a process (or thread) of its own, with typed actions and observations.

    def to_action(action):
        match action:
            case Click(x=x):
                return 0 if x < 300 else 1
        raise ValueError(f"CartPole knows clicks only, not {action}")

    env = GymnasiumEnvironment(
        functools.partial(gymnasium.make, "CartPole-v1", render_mode="rgb_array"), to_action=to_action
    )

What gymnasium's `Env` does becomes, in this order:

- `reset(seed=task.seed, options=task.data.get("options"))`: an `Observation`, made by `to_observation`.
- `step(to_action(action))`: a `StepResult` with its reward, terminated and truncated. `Finished` and `CallUser` are not
  the environment's: they change nothing, and their reward is None (unless `finishing=True` hands them to `to_action`).
- `evaluate()`: None, so that the sum of the rewards counts, unless `evaluate=` says otherwise.

Needs `pip install gymnasium`, and Pillow for screenshots.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, Literal

from managed_vllm.agent.actions import Action, CallUser, Finished
from managed_vllm.agent.environments.process_environment import ProcessEnvironment
from managed_vllm.agent.environments.synchronous import name_of
from managed_vllm.agent.environments.thread_environment import ThreadEnvironment
from managed_vllm.agent.types import Limits, Observation, StepResult, Task

_MOST_NUMBERS = 1000
"""Elements of an array in `info` that is handed on as a list."""


class GymnasiumEnvironment:
    """An `Environment` around a gymnasium `Env`: see the module."""

    def __init__(
        self,
        make: Callable[[], Any] | str,
        *,
        to_action: Callable[[Action], Any],
        to_observation: Callable[[Any, bytes | None, Mapping[str, Any]], Observation] | None = None,
        evaluate: Callable[[Any], float | None] | None = None,
        finishing: bool = False,
        isolation: Literal["process", "thread"] = "process",
        limits: Limits | None = None,
        environ: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        """The environment is made with the first `reset`.

        Args:
            make: returns the `Env`. For a process it must be one that can be pickled, as must the functions below, or
                `"package.module:name"`.
            to_action: the environment's action for a typed one, whose coordinates are pixels of the screenshot. What
                it raises fails the attempt: map what a model may say and the environment does not know to an action
                that does nothing.
            to_observation: called with the environment's observation, its screenshot as PNG (None without
                `render_mode="rgb_array"`) and its info. Default: the screenshot, and the environment's observation in
                `extras["observation"]`.
            evaluate: called with the `Env` at the end; returns the reward of the episode.
            finishing: `Finished` and `CallUser` go through `to_action` and `step`, too.
            isolation: `"process"`: it can be killed, and is when a call is not over in time. `"thread"`: cheaper, for
                environments that never hang; one that does is abandoned, and goes on running (`ThreadEnvironment`).
            limits: seconds for each call.
            environ: environment variables for the process.
            name: for messages.
        """
        if isolation not in ("process", "thread"):
            raise ValueError(f"isolation must be 'process' or 'thread', not {isolation!r}")
        if not callable(to_action):
            raise TypeError(f"to_action must be callable, not {type(to_action).__name__}")
        arguments = {
            "make": make,
            "to_action": to_action,
            "to_observation": to_observation,
            "evaluate": evaluate,
            "finishing": finishing,
        }
        name = name or (make if isinstance(make, str) else name_of(make))
        self._environment: ProcessEnvironment | ThreadEnvironment
        if isolation == "process":
            self._environment = ProcessEnvironment(
                SyncGymnasium, arguments=arguments, limits=limits, environ=environ, name=name
            )
        elif environ:
            raise ValueError("environ is for isolation='process': a thread shares the variables of its process")
        else:
            self._environment = ThreadEnvironment(SyncGymnasium, arguments=arguments, limits=limits, name=name)

    @property
    def patience_s(self) -> float:
        """See `Environment`."""
        return self._environment.patience_s

    async def reset(self, task: Task) -> Observation:
        """See `Environment.reset`."""
        return await self._environment.reset(task)

    async def step(self, action: Action) -> StepResult:
        """See `Environment.step`."""
        return await self._environment.step(action)

    async def evaluate(self) -> float | None:
        """See `Environment.evaluate`."""
        return await self._environment.evaluate()

    async def close(self) -> None:
        """See `Environment.close`."""
        await self._environment.close()


class SyncGymnasium:
    """The synchronous half, where the `Env` lives."""

    def __init__(
        self,
        make: Callable[[], Any] | str,
        to_action: Callable[[Action], Any],
        to_observation: Callable[[Any, bytes | None, Mapping[str, Any]], Observation] | None = None,
        evaluate: Callable[[Any], float | None] | None = None,
        finishing: bool = False,
    ) -> None:
        """Arguments as those of `GymnasiumEnvironment`."""
        if isinstance(make, str):
            from managed_vllm.agent.environments.process_worker import named

            make = named(make)
        self._env = make()
        self._to_action = to_action
        self._to_observation = to_observation or _observation
        self._evaluate = evaluate
        self._finishing = finishing
        self._shows = getattr(self._env, "render_mode", None) == "rgb_array"
        self._last = Observation()

    def reset(self, task: Task) -> Observation:
        answer = self._env.reset(seed=task.seed, options=task.data.get("options"))
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise TypeError(f"reset must return (observation, info), as gymnasium's do, not {_shape(answer)}")
        observation, info = answer
        return self._seen(observation, info)

    def step(self, action: Action) -> StepResult:
        if isinstance(action, Finished | CallUser) and not self._finishing:
            return StepResult(self._last)
        answer = self._env.step(self._to_action(action))
        if not (isinstance(answer, tuple) and len(answer) == 5):
            raise TypeError(
                "step must return (observation, reward, terminated, truncated, info), as gymnasium's do, not "
                f"{_shape(answer)}; wrap environments of the old gym"
            )
        observation, reward, terminated, truncated, info = answer
        return StepResult(
            self._seen(observation, info),
            None if reward is None else float(reward),
            bool(terminated),
            bool(truncated),
            plain_items(info),
        )

    def evaluate(self) -> float | None:
        return None if self._evaluate is None else self._evaluate(self._env)

    def close(self) -> None:
        self._env.close()

    def _seen(self, observation: Any, info: Mapping[str, Any]) -> Observation:
        screenshot = as_png(self._env.render()) if self._shows else None
        self._last = self._to_observation(observation, screenshot, info)
        if not isinstance(self._last, Observation):
            raise TypeError(f"to_observation must return an Observation, not {type(self._last).__name__}")
        return self._last


def _observation(observation: Any, screenshot: bytes | None, info: Mapping[str, Any]) -> Observation:
    return Observation(screenshot, extras={"observation": observation})


def _shape(answer: object) -> str:
    return f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type(answer).__name__


def as_png(frame: Any) -> bytes:
    """A frame of `render_mode="rgb_array"` (height x width x 3, or x 4, of uint8) as a PNG file."""
    import numpy
    from PIL import Image

    pixels = numpy.asarray(frame)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or pixels.dtype != numpy.uint8 or 0 in pixels.shape:
        raise TypeError(
            f"render must return height x width x 3 of uint8 in the mode 'rgb_array', not {pixels.shape} of "
            f"{pixels.dtype}"
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def plain_items(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of an `info` is plain: JSON values, numpy's numbers, small arrays as lists. The rest, which could neither be
    recorded nor always be sent between processes, is named under `"not_plain"`."""
    plain = {}
    others = []
    for key, value in info.items():
        try:
            plain[str(key)] = _plain(value)
        except TypeError:
            others.append(str(key))
    if others:
        plain["not_plain"] = others
    return plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value if type(value) in (type(None), bool, int, float, str) else _builtin(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist") and value.dtype.kind in "biufU":
        if value.size > _MOST_NUMBERS:
            raise TypeError("too long")
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain")


def _builtin(value: Any) -> Any:
    """Of subclasses, numpy's float64 and enums among them: the value without the class."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value.value if hasattr(value, "value") else value)
    raise TypeError(f"{type(value).__name__} is not plain")
