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
from managed_vllm.errors import EnvironmentFailure

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


class EnvironmentRaised(EnvironmentFailure):
    """A method of a synchronous environment raised, in its process or thread.

    Attributes:
        call: `make`, `reset`, `step`, `evaluate` or `close`.
        error_type: the class of what was raised, with its module where it is not a builtin.
        error_message: its text.
        error_traceback: the whole traceback, as text.
    """

    def __init__(
        self, name: str, call: str, error_type: str, error_message: str, error_traceback: str, advice: str = ""
    ) -> None:
        super().__init__(f"{name}: {call} raised {error_type}: {error_message}{advice}")
        self.call = call
        self.error_type = error_type
        self.error_message = error_message
        self.error_traceback = error_traceback
        self.add_note(error_traceback.rstrip())


class EnvironmentDied(EnvironmentFailure):
    """The process of an environment ended by itself, or was killed from outside.

    Attributes:
        call: what was being done, or `between two calls`.
        exit_code: as `subprocess.Popen.returncode`: negative for a signal. None if it is not known.
        output: the last of what it wrote to standard output and error, as text.
    """

    def __init__(self, name: str, call: str, ending: str, exit_code: int | None, output: str) -> None:
        super().__init__(f"{name}: its process ended ({ending}) during {call}{last_lines(output)}")
        self.call = call
        self.exit_code = exit_code
        self.output = output


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
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"evaluate must return a number or None, not {type(value).__name__}")
        value = float(value)
        if value != value:
            raise ValueError("evaluate returned NaN, which is no reward")
    return value
