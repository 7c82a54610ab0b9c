"""Actions as plain JSON values, for records: a dict with the fields, and `type`, the name of the action.

`action_from_dict(action_to_dict(action)) == action`, also by way of `json`. What is no action, or would not come back
as it was, is a `ValueError`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from managed_vllm.agent.actions.table import ACTION_CLASSES
from managed_vllm.agent.actions.values import Action, Button, Direction

_NAMES = {its: name for name, its in ACTION_CLASSES.items()}
_MOST_NESTED = 100


def action_to_dict(action: Action) -> dict[str, Any]:
    """The action as a dict of plain JSON values: `{"type": "click", "x": 197.0, "y": 525.0, "button": "left", …}`.

    Tuples become lists, in the arguments of a `Custom` too. Raises `ValueError`: no action, or a value that JSON can't
    hold (nan, bytes, a key that is no text).
    """
    name = _NAMES.get(type(action))
    if name is None:
        raise ValueError(f"{type(action).__name__} is no action; the actions are {', '.join(ACTION_CLASSES)}")
    values: dict[str, Any] = {"type": name}
    for field in dataclasses.fields(action):
        values[field.name] = _plain(getattr(action, field.name), f"{name}.{field.name}")
    return values


def action_from_dict(values: Mapping[str, Any]) -> Action:
    """The action that `action_to_dict` made these values of. Fields that have a default may be missing.

    Raises `ValueError`: an unknown `type`, a field that is unknown, missing, or of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"an action is a dict with a type, not {type(values).__name__}")
    name = values.get("type")
    its = ACTION_CLASSES.get(name) if isinstance(name, str) else None
    if its is None:
        raise ValueError(f"{str(name)[:80]!r} is no type of action; the types are {', '.join(ACTION_CLASSES)}")
    fields = {field.name: field for field in dataclasses.fields(its)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key == "type":
            continue
        if key not in fields:
            raise ValueError(f"{name} has no field {str(key)[:80]!r}; its fields are {', '.join(fields)}")
        given[key] = _READERS[str(fields[key].type)](value, f"{name}.{key}")
    for key, field in fields.items():
        if key not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}.{key} is missing")
    action: Action = its(**given)
    return action


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _MOST_NESTED:
        raise ValueError(f"{where} is nested deeper than {_MOST_NESTED} times")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # of an enum: its value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON can't hold")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(each, where, depth + 1) for each in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} has a key that is no text, which JSON can't hold")
        return {str(key): _plain(each, f"{where}.{key}"[:200], depth + 1) for key, each in value.items()}
    raise ValueError(f"{where} is of {type(value).__name__}, which JSON can't hold")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, not {str(value)[:80]!r}")
    return value


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} must be an integer, not {str(value)[:80]!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, not {type(value).__name__}")
    return value


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {str(value)[:80]!r}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list of texts, not {type(value).__name__}")
    return tuple(_text(each, where) for each in value)


def _button(value: Any, where: str) -> Button:
    try:
        return Button(value)
    except ValueError:
        raise ValueError(f"{where} must be one of {', '.join(Button)}, not {str(value)[:80]!r}") from None


def _direction(value: Any, where: str) -> Direction:
    try:
        return Direction(value)
    except ValueError:
        raise ValueError(f"{where} must be one of {', '.join(Direction)}, not {str(value)[:80]!r}") from None


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a dict, not {type(value).__name__}")
    plain: dict[str, Any] = _plain(value, where)
    return plain


def _or_none(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, where: None if value is None else read(value, where)


# By the annotation in `values`, which is text there.
_READERS: dict[str, Callable[[Any, str], Any]] = {
    "float": _number,
    "float | None": _or_none(_number),
    "int": _whole,
    "int | None": _or_none(_whole),
    "str": _text,
    "bool": _truth,
    "tuple[str, ...]": _texts,
    "Button": _button,
    "Direction": _direction,
    "Mapping[str, Any]": _arguments,
}
