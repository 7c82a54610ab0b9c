"""What an environment looks like whose calls block, and what becomes of it when it can't go on.

`SyncEnvironment` is `managed_vllm.agent.environment.Environment` without `async`. `ProcessEnvironment` and
`ThreadEnvironment` make the one into the other.
"""

from __future__ import annotations

import functools
import traceback
from typing import Any, Protocol, runtime_checkable

from managed_vllm.agent.actions import Action
from managed_vllm.agent.types import Observation, StepResult, Task
from managed_vllm.errors import EnvironmentDiedError, EnvironmentFailedError, EnvironmentRaisedError

_SHOWN_LINES = 20
"""Of a process's output in a message; all that is kept of it is in the error's `output`."""


@runtime_checkable
class SyncEnvironment(Protocol):
    """A world in which an agent acts. The methods mean what those of `Environment` do; all may raise and block."""

    def reset(self, task: Task) -> Observation:
        """Begins an episode of the task, from a fresh state, and says what is seen."""
        ...

    def step(self, action: Action) -> StepResult:
        """Carries one action out."""
        ...

    def evaluate(self) -> float | None:
        """The reward of the episode as a whole; None: the sum of the steps' rewards is."""
        ...

    def close(self) -> None:
        """Gives everything back."""
        ...


def check_call(name: str, method: str, *, closed: bool, unusable: str | None, calling: str | None, begun: bool) -> None:
    """Raises `EnvironmentFailedError` if the environment `name` can't take this call now."""
    if closed:
        raise EnvironmentFailedError(f"{name} is closed")
    if unusable is not None:
        raise EnvironmentFailedError(f"{name} can't be used any more, {unusable}; make another one")
    if calling is not None:
        raise EnvironmentFailedError(f"{name}: {method} was called during {calling}; one call at a time")
    if not begun and method != "reset":
        raise EnvironmentFailedError(f"{name}: {method} before reset")


def raised(
    name: str, call: str, error_type: str, error_message: str, error_traceback: str, advice: str = ""
) -> EnvironmentRaisedError:
    """The error for a method that raised; its traceback is a note."""
    error = EnvironmentRaisedError(
        f"{name}: {call} raised {error_type}: {error_message}{advice}",
        call=call,
        error_type=error_type,
        error_message=error_message,
        error_traceback=error_traceback,
    )
    error.add_note(error_traceback.rstrip())
    return error


def died(name: str, call: str, ending: str, exit_code: int | None, output: str) -> EnvironmentDiedError:
    """The error for a process that ended by itself, `ending` in words."""
    message = f"{name}: its process ended ({ending}) during {call}{last_lines(output)}"
    return EnvironmentDiedError(message, call=call, exit_code=exit_code, output=output)


def last_lines(output: str) -> str:
    """The end of a process's output, to be put behind a message."""
    lines = output.rstrip().splitlines()
    if not lines:
        return "; it wrote nothing"
    return "; the last it wrote:\n" + "\n".join(line[:500] for line in lines[-_SHOWN_LINES:])


def type_name(error: BaseException) -> str:
    """The class of an exception, as tracebacks show it."""
    kind = type(error)
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def name_of(make: object) -> str:
    """What an environment is called in messages, by what makes it."""
    while isinstance(make, functools.partial):
        make = make.func
    return str(getattr(make, "__qualname__", type(make).__name__))


def whole_traceback(error: BaseException) -> str:
    """The text that Python would print for an exception."""
    return "".join(traceback.format_exception(error))


def checked(call: str, value: Any) -> Any:
    """The value if it is what the method has to return. Raises `TypeError` else, so that the mistake is found where
    it was made."""
    expected: tuple[type, ...] = {"reset": (Observation,), "step": (StepResult,)}.get(call, ())
    if expected and not isinstance(value, expected):
        raise TypeError(f"{call} must return {expected[0].__name__}, not {type(value).__name__}")
    if call == "evaluate" and value is not None:
        if not hasattr(value, "__float__"):
            raise TypeError(f"evaluate must return a number or None, not {type(value).__name__}")
        value = float(value)
        if value != value:
            raise ValueError("evaluate returned NaN, which is no reward")
    return value
