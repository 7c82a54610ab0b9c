"""Action spaces of models as tables: a row for each action, with its fields, and what it means.

A parser finds names and values in an answer, in whatever notation; `read_row` makes actions of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from managed_vllm.agent.actions.coordinates import OffScreenError
from managed_vllm.agent.actions.json_actions import Reader
from managed_vllm.agent.actions.values import Action, Button, Click, Direction, KeyDown, KeyUp, MouseDown, MouseUp

Point = tuple[float, float]
Values = Mapping[str, Any]

_MOST_POINTS = 100
GOALS = ("complete", "infeasible")


class Field(NamedTuple):
    """A field of an action: its kind, one of `KINDS`, whether it must be there, and what it is, for the model."""

    kind: str
    required: bool = True
    what: str = ""


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


Pairs = Iterable[tuple[str, str, str]]
"""For notations that write a point as two numbers: the names of the two, and of the field."""


def read_row(
    reader: Reader,
    rows: Mapping[str, ActionRow],
    name: Any,
    given: Mapping[str, Any],
    either: Mapping[str, tuple[str, ...]] | None = None,
    pairs: Pairs = (),
) -> list[Action]:
    """The actions that a name and values mean. None counts as missing.

    `either`: of which fields an action needs one. Raises `ActionParseError`.
    """
    row = rows.get(name) if isinstance(name, str) else None
    if row is None:
        reader.fail(f"there is no action {name!r:.80}; the actions are {', '.join(rows)}")
    written = {field: f"{x} and {y}" for x, y, field in pairs}
    values: dict[str, Any] = {}
    for key, value in _paired(given, pairs).items():
        if value is None:
            continue
        if key not in row.fields:
            fields = ", ".join(written.get(field, field) for field in row.fields)
            reader.fail(f"{name} has no field {key!r:.80}; its fields are {fields or 'none'}")
        values[key] = KINDS[row.fields[key].kind](reader, value, f"{written.get(key, key)} of {name}")
    for key, field in row.fields.items():
        if field.required and key not in values:
            reader.fail(f"{name} needs {written.get(key, key)}")
    one_of = (either or {}).get(str(name), ())
    if one_of and set(one_of) <= row.fields.keys() and not set(one_of) & values.keys():
        reader.fail(f"{name} needs {' or '.join(one_of)}")
    return list(row.make(values))


def _paired(given: Mapping[str, Any], pairs: Pairs) -> dict[str, Any]:
    """With a point in the place of its two numbers; half a pair stays, and is refused as unknown."""
    found = dict(given)
    for x, y, name in pairs:
        if x in found and y in found and name not in found:
            found[name] = [found.pop(x), found.pop(y)]
    return found


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


def holding(keys: Sequence[str], actions: Sequence[Action]) -> Sequence[Action]:
    """Actions while keys are held."""
    return (*map(KeyDown, keys), *actions, *map(KeyUp, reversed(keys)))


def pressed(point: Point | None, button: Button = Button.LEFT, clicks: int = 1) -> Sequence[Action]:
    """Clicks at a point; None: where the pointer is."""
    return (MouseDown(button), MouseUp(button)) * clicks if point is None else (Click(*point, button, clicks),)


# -- what a model is told ----------------------------------------------------------------------------------------------

_NUMBER: Mapping[str, Any] = {"type": "number"}
SCHEMAS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "text": {"type": "string"},
        "key": {"type": "string"},
        "keys": {"type": "array", "items": {"type": "string"}},
        "held": {"type": "array", "items": {"type": "string"}},
        "path": {"type": "array", "items": {"type": "object", "properties": {"x": _NUMBER, "y": _NUMBER}}},
        "number": {"type": "number"},
        "seconds": {"type": "number"},
        "truth": {"type": "boolean"},
        "direction": {"type": "string", "enum": [str(each) for each in Direction]},
        "amount": {"type": "integer"},
        "button": {"type": "string", "enum": [str(each) for each in Button]},
        "status": {"type": "string", "enum": ["success", "failure"]},
        "goal": {"type": "string", "enum": list(GOALS)},
        "across": {"type": "string", "enum": [str(each) for each in Direction]},
        "ignored": {"type": "string"},
    }
)
"""What the values of a kind are, as JSON schema."""


def told(rows: Mapping[str, ActionRow]) -> dict[str, ActionRow]:
    """The actions that a model is told of."""
    return {name: row for name, row in rows.items() if row.what}


def schema_of(
    row: ActionRow, frame: str, schemas: Mapping[str, Mapping[str, Any]] = SCHEMAS, pairs: Pairs = ()
) -> dict[str, Any]:
    """The fields of an action as a JSON schema of an object.

    Args:
        row: the action.
        frame: what the numbers of a point are, in words.
        schemas: of each kind of field.
        pairs: which points are written as two numbers.
    """
    numbers = {name: (x, y) for x, y, name in pairs}
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, field in row.fields.items():
        two = field.kind == "point" and name in numbers
        for key in numbers[name] if two else (name,):
            words = [*filter(None, [field.what]), *([frame] if field.kind == "point" else [])]
            schema = _NUMBER if two else schemas[field.kind]
            properties[key] = {**schema, **({"description": ": ".join(words)} if words else {})}
            required += [key] if field.required else []
    found: dict[str, Any] = {"type": "object"}
    return {**found, "properties": properties, "required": required} if properties else found


def functions_of(
    rows: Mapping[str, ActionRow], frame: str, schemas: Mapping[str, Mapping[str, Any]] = SCHEMAS, pairs: Pairs = ()
) -> list[dict[str, Any]]:
    """A function for each action that a model is told of, for `tools=` of a chat request; see `schema_of`."""
    return [
        {
            "type": "function",
            "function": {"name": name, "description": row.what, "parameters": schema_of(row, frame, schemas, pairs)},
        }
        for name, row in told(rows).items()
    ]


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


def _held(reader: Reader, value: Any, where: str) -> tuple[str, ...]:
    """Keys held meanwhile: none, often."""
    return () if value in ("", []) else reader.keys(value, where)


def _goal(reader: Reader, value: Any, where: str) -> str:
    if value not in GOALS:
        reader.fail(f"{where} must be {' or '.join(GOALS)}, not {value!r:.80}")
    return str(value)


def _across(reader: Reader, value: Any, where: str) -> tuple[float, float, float, float]:
    """From edge to edge of the screen, the way a finger goes."""
    last_x, last_y = reader.frame.width - 1.0, reader.frame.height - 1.0
    middle_x, middle_y = reader.frame.width / 2, reader.frame.height / 2
    ways = {
        Direction.UP: (middle_x, last_y, middle_x, 0.0),
        Direction.DOWN: (middle_x, 0.0, middle_x, last_y),
        Direction.LEFT: (last_x, middle_y, 0.0, middle_y),
        Direction.RIGHT: (0.0, middle_y, last_x, middle_y),
    }
    return ways[reader.direction(value, where)]


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
    "key": Reader.key,
    "keys": Reader.keys,
    "held": _held,
    "number": _number,
    "seconds": Reader.seconds,
    "truth": Reader.truth,
    "direction": Reader.direction,
    "amount": Reader.whole,
    "button": _button,
    "status": _status,
    "goal": _goal,
    "across": _across,
    "ignored": _anything,
}
