"""Action spaces of models as tables: a row for each action, with its fields, and what it means.

A parser finds names and values in an answer, in whatever notation; `read_row` makes actions of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from managed_vllm.agent.actions.coordinates import OffScreenError
from managed_vllm.agent.actions.json_actions import Reader
from managed_vllm.agent.actions.values import Action, Button, Click, MouseDown, MouseUp

Point = tuple[float, float]
Values = Mapping[str, Any]

_MOST_POINTS = 100


class Field(NamedTuple):
    """A field of an action: its kind, one of `KINDS`, and whether it must be there."""

    kind: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class ActionRow:
    """One action of a model.

    Attributes:
        what: in words, for the model; empty: it is not told of, only understood.
        fields: by their names.
        make: the actions, from the values of the fields.
    """

    what: str
    fields: Mapping[str, Field]
    make: Callable[[Values], Sequence[Action]]


def read_row(
    reader: Reader,
    rows: Mapping[str, ActionRow],
    name: Any,
    given: Mapping[str, Any],
    either: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Action]:
    """The actions that a name and values mean. None counts as missing.

    `either`: of which fields an action needs one. Raises `ActionParseError`.
    """
    row = rows.get(name) if isinstance(name, str) else None
    if row is None:
        reader.fail(f"there is no action {name!r:.80}; the actions are {', '.join(rows)}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        if key not in row.fields:
            reader.fail(f"{name} has no field {key!r:.80}; its fields are {', '.join(row.fields) or 'none'}")
        values[key] = KINDS[row.fields[key].kind](reader, value, f"{key} of {name}")
    for key, field in row.fields.items():
        if field.required and key not in values:
            reader.fail(f"{name} needs {key}")
    one_of = (either or {}).get(str(name), ())
    if one_of and set(one_of) <= row.fields.keys() and not set(one_of) & values.keys():
        reader.fail(f"{name} needs {' or '.join(one_of)}")
    return list(row.make(values))


def call_in(reader: Reader, value: Mapping[str, Any]) -> tuple[Any, Any]:
    """Name and arguments of a tool call in one of the shapes that models write: OpenAI's, or `name` with `arguments` or
    `args`. Arguments that are a text are read as JSON; None where there are none. Raises `ActionParseError`.
    """
    if isinstance(value.get("function"), Mapping):
        value = value["function"]
    given = value.get("arguments", value.get("args"))
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            reader.fail(f"the arguments of the tool call are no JSON: {error}")
    return value.get("name"), given


def pressed(point: Point | None, button: Button = Button.LEFT, clicks: int = 1) -> Sequence[Action]:
    """Clicks at a point; None: where the pointer is."""
    return (MouseDown(button), MouseUp(button)) * clicks if point is None else (Click(*point, button, clicks),)


# -- kinds of values ---------------------------------------------------------------------------------------------------


def _point(reader: Reader, value: Any, where: str) -> Point:
    if isinstance(value, str):  # some write the list as a text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            reader.fail(f"{where} must be [x, y]")
    if not isinstance(value, list | tuple) or len(value) != 2:
        reader.fail(f"{where} must be [x, y]")
    x, y = (reader.decimal(each, where) for each in value)
    try:
        return reader.frame.point(x, y)
    except OffScreenError as error:
        reader.fail(f"the point is off the screen: {error}")


def _path(reader: Reader, value: Any, where: str) -> list[Point]:
    if not isinstance(value, list) or not 2 <= len(value) <= _MOST_POINTS:
        reader.fail(f"{where} must be a list of 2 to {_MOST_POINTS} points")
    pairs = ([one.get("x"), one.get("y")] if isinstance(one, Mapping) else one for one in value)
    return [_point(reader, pair, where) for pair in pairs]


def _number(reader: Reader, value: Any, where: str) -> float:
    number = reader.number(value, where)
    if abs(number) > 1_000_000:
        reader.fail(f"{where} must be from -1000000 to 1000000")
    return float(number)


def _status(reader: Reader, value: Any, where: str) -> str:
    if value not in ("success", "failure"):
        reader.fail(f"{where} must be success or failure, not {value!r:.80}")
    return str(value)


def _button(reader: Reader, value: Any, where: str) -> Button:
    if value == "wheel":  # OpenAI's
        return Button.MIDDLE
    return reader.button(value, where)


def _anything(reader: Reader, value: Any, where: str) -> Any:
    """Of no meaning here."""
    return value


KINDS: Mapping[str, Callable[[Reader, Any, str], Any]] = {
    "point": _point,
    "path": _path,
    "text": Reader.string,
    "keys": Reader.keys,
    "number": _number,
    "seconds": Reader.seconds,
    "truth": Reader.truth,
    "direction": Reader.direction,
    "amount": Reader.whole,
    "button": _button,
    "status": _status,
    "ignored": _anything,
}
