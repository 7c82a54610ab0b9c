"""The actions in one table: how each is called, which class it is, and which fields it has.

Prompts, JSON schemas, tools, the parsers of JSON and the records of a run are made from it, so they can't disagree. An
executor has to know every row of it; a test holds each of ours to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from managed_vllm.agent.actions.values import (
    Back,
    Button,
    CallUser,
    Click,
    Custom,
    Direction,
    Drag,
    Finished,
    Home,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    MouseDown,
    MouseUp,
    Move,
    Noop,
    OpenApp,
    OpenURL,
    Scroll,
    Swipe,
    Type,
    Wait,
)


class Field(NamedTuple):
    """A field of an action.

    Attributes:
        kind: one of `KINDS`.
        what: in words, for the model.
        required: whether it must be there.
    """

    kind: str
    what: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class ActionKind:
    """One row: the class, what it does in words for the model, and its fields by name."""

    make: type[Any]
    what: str
    fields: Mapping[str, Field]


_AT = {"x": Field("x", "of the point"), "y": Field("y", "of the point")}

ACTIONS: Mapping[str, ActionKind] = MappingProxyType(
    {
        "click": ActionKind(
            Click,
            "Click at a point.",
            {
                **_AT,
                "button": Field("button", "of the mouse; left if it is missing", False),
                "clicks": Field("clicks", "2 for a double click; 1 if it is missing", False),
            },
        ),
        "move": ActionKind(Move, "Move the pointer to a point, without a click.", _AT),
        "drag": ActionKind(
            Drag,
            "Press the left button at a point, and let it go at another one.",
            {**_AT, "to_x": Field("x", "of the other point"), "to_y": Field("y", "of the other point")},
        ),
        "type": ActionKind(
            Type,
            "Type text where the focus is.",
            {"text": Field("text", "what to type"), "enter": Field("truth", "press Enter after it", False)},
        ),
        "hotkey": ActionKind(
            Hotkey,
            "Press keys together, and let them go.",
            {"keys": Field("keys", 'in lower case, such as ["ctrl", "c"], or ["enter"]')},
        ),
        "key_down": ActionKind(KeyDown, "Press a key, and hold it.", {"key": Field("key", "in lower case")}),
        "key_up": ActionKind(KeyUp, "Let a key go that is held.", {"key": Field("key", "in lower case")}),
        "scroll": ActionKind(
            Scroll,
            "Turn the wheel.",
            {
                "direction": Field("direction", "where the view moves to"),
                "x": Field("x", "where the pointer is; may be missing, as y", False),
                "y": Field("y", "where the pointer is", False),
                "amount": Field("amount", "steps of the wheel", False),
            },
        ),
        "wait": ActionKind(Wait, "Wait for the screen to change.", {"seconds": Field("seconds", "how long", False)}),
        "finished": ActionKind(
            Finished,
            "Say that the task is done.",
            {"content": Field("text", "the answer, if one is asked for", False)},
        ),
        "call_user": ActionKind(CallUser, "Ask the user for help.", {"content": Field("text", "why", False)}),
    }
)
"""What models are told of, by name."""

ACTION_CLASSES: Mapping[str, type[Any]] = MappingProxyType(
    {
        **{name: kind.make for name, kind in ACTIONS.items()},
        "mouse_down": MouseDown,
        "mouse_up": MouseUp,
        "long_press": LongPress,
        "swipe": Swipe,
        "open_app": OpenApp,
        "open_url": OpenURL,
        "back": Back,
        "home": Home,
        "noop": Noop,
        "custom": Custom,
    }
)
"""All classes of actions, by the name in records. Those that are not in `ACTIONS` are other models' own."""

MOST_TEXT = 1000
MOST_CLICKS = 3


class Kind(NamedTuple):
    """What the values of a kind of field are: as JSON schema, and in words (empty: the name of the field says it)."""

    schema: Mapping[str, Any]
    words: str = ""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "x": Kind({"type": "number"}),
        "y": Kind({"type": "number"}),
        "button": Kind({"type": "string", "enum": [str(button) for button in Button]}, "left, right or middle"),
        "clicks": Kind({"type": "integer", "minimum": 1, "maximum": MOST_CLICKS}, f"1 to {MOST_CLICKS}"),
        "text": Kind({"type": "string", "maxLength": MOST_TEXT}),
        "truth": Kind({"type": "boolean"}, "true or false"),
        "key": Kind({"type": "string", "maxLength": 20}, 'such as "shift"'),
        "keys": Kind(
            {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 4},
            'a list, such as ["ctrl", "c"]',
        ),
        "direction": Kind({"type": "string", "enum": [str(each) for each in Direction]}, "up, down, left or right"),
        "amount": Kind({"type": "integer", "minimum": 1, "maximum": 100}, "1 to 100"),
        "seconds": Kind({"type": "number"}),
    }
)


def actions_in_words() -> str:
    """A line for each action, for a prompt: its name, its fields (with ? those that may be missing), what it does."""
    return "\n".join(_line(name, kind) for name, kind in ACTIONS.items())


def _line(name: str, kind: ActionKind) -> str:
    fields = ", ".join(_field(key, field) for key, field in kind.fields.items())
    return f"- {name}: {fields or 'no fields'}. {kind.what}"


def _field(key: str, field: Field) -> str:
    words = KINDS[field.kind].words
    return f"{key}{'' if field.required else '?'}{f' ({words})' if words else ''}"
