"""What a run is made of, as plain values that can be recorded and compared when the run is resumed.

Two halves of a run must not be made by different models, prompts, sampling parameters or tasks without a word: their
rollouts would be mixed in one group. Time limits, retries and the number of rollouts may change.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from managed_vllm.agent.rewards import name_of
from managed_vllm.agent.types import Task

if TYPE_CHECKING:
    from managed_vllm.agent.rules import Rules

_LIMITS = ("max_steps", "max_images", "max_response_tokens", "max_episode_tokens")
_MOST_NESTED = 20


def made_of(rules: Rules) -> dict[str, Any]:
    """Model, format, limits and sampling parameters of a run."""
    scored = {} if rules.reward is None else {"reward": name_of(rules.reward)}
    return {
        **scored,
        "model": rules.model,
        "agent": described(rules.agent),
        "limits": {name: getattr(rules.limits, name) for name in _LIMITS},
        "exact": rules.exact,
        "sampling": {
            field.name: described(value)
            for field in dataclasses.fields(rules.params)
            if (value := getattr(rules.params, field.name)) is not None
        },
    }


def described(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: dataclasses by their class and fields, functions by their name."""
    if isinstance(value, enum.Enum):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == _MOST_NESTED:
        return type(value).__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"is": type(value).__name__, **{name: described(each, depth + 1) for name, each in fields.items()}}
    if isinstance(value, Mapping):
        return {str(key): described(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each, depth + 1) for each in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def task_digest(task: Task) -> str:
    """Tells a task from another one with the same id: by instruction, seed and data."""
    text = json.dumps([task.instruction, task.seed, described(task.data)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
