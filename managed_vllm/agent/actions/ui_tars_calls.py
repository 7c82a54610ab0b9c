"""The calls of UI-TARS' notation: their parameters, and the actions that they mean.

`ui_tars` finds a call in an answer and the places of its arguments; what they mean is here. An argument that means
nothing is reported to the scanner, which knows the text around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, Protocol

from managed_vllm.agent.actions.keys import key_of, keys_of
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
    Click,
    Direction,
    Drag,
    Finished,
    Home,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    Move,
    OpenApp,
    Scroll,
    Type,
    Wait,
)


class Value(NamedTuple):
    """An argument, where its text is: without quotes."""

    start: int
    end: int
    word: str = ""
    point: tuple[float, float] = (0.0, 0.0)


class Function(NamedTuple):
    """The parameters of an action, by the kind of their value; the first of them may come without its name."""

    parameters: Mapping[str, str]
    required: tuple[str, ...] = ()


_AT_POINT = Function({"start_box": "box"}, ("start_box",))
_FROM_TO = Function({"start_box": "box", "end_box": "box"}, ("start_box", "end_box"))

_ONE_KEY = Function({"key": "word"}, ("key",))

FUNCTIONS: dict[str, Function] = {
    "click": _AT_POINT,
    "left_single": _AT_POINT,
    "left_double": _AT_POINT,
    "right_single": _AT_POINT,
    "drag": _FROM_TO,
    "select": _FROM_TO,
    "hotkey": Function({"key": "word"}, ("key",)),
    "type": Function({"content": "text"}, ("content",)),
    "scroll": Function({"start_box": "box", "direction": "word"}, ("direction",)),
    "hover": _AT_POINT,
    "press": _ONE_KEY,
    "keydown": _ONE_KEY,
    "release": _ONE_KEY,
    "keyup": _ONE_KEY,
    "wait": Function({"time": "word"}),
    "long_press": Function({"start_box": "box", "time": "word"}, ("start_box",)),
    "open_app": Function({"app_name": "text"}, ("app_name",)),
    "press_home": Function({}),
    "press_back": Function({}),
    "finished": Function({"content": "text"}),
    "call_user": Function({"content": "text"}),
}
SAME_PARAMETER = {"point": "start_box", "start_point": "start_box", "end_point": "end_box", "hotkey": "key"}
SAME_PARAMETER |= {"press": "key", "seconds": "time"}

_CLICKS = {
    "click": (Button.LEFT, 1),
    "left_single": (Button.LEFT, 1),
    "left_double": (Button.LEFT, 2),
    "right_single": (Button.RIGHT, 1),
}

_SECONDS = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,3})?")
_MOST_SECONDS = 3600


class Scanner(Protocol):
    """What reads the answer that a call stands in."""

    def fail(self, message: str, start: int, end: int | None = None) -> NoReturn:
        """Raises `ActionParseError` for these characters."""
        ...

    def typed(self, value: Value) -> Type:
        """A content as text that is typed."""
        ...

    def text_of(self, value: Value) -> str:
        """A content as text."""
        ...


# -- what the functions mean -------------------------------------------------------------------------------------------


def _click(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    button, clicks = _CLICKS[name]
    return Click(*values["start_box"].point, button, clicks)


def _drag(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return Drag(*values["start_box"].point, *values["end_box"].point)


def _hotkey(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    value = values["key"]
    try:
        return Hotkey(keys_of(value.word))
    except ValueError as error:
        scanner.fail(f"hotkey: {error}; write keys as in key='ctrl c'", value.start, value.end)


def _type(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return scanner.typed(values["content"])


def _scroll(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    value = values["direction"]
    try:
        direction = Direction(value.word.strip().lower())
    except ValueError:
        scanner.fail(f"direction of scroll must be one of {', '.join(Direction)}", value.start, value.end)
    place = values.get("start_box")
    return Scroll(direction) if place is None else Scroll(direction, *place.point)


def _hover(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return Move(*values["start_box"].point)


def _held(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    """As bytedance's own parser (ui-tars 0.4.2): `press` is `keydown`, `release` is `keyup`."""
    value = values["key"]
    key = value.word.strip().lower()
    if key_of(key) is None:
        scanner.fail(f"{name}: {key[:40]!r} is no key; write one, as in key='shift'", value.start, value.end)
    return KeyDown(key) if name in ("press", "keydown") else KeyUp(key)


def _wait(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return Wait(_seconds(scanner, name, values))


def _long_press(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return LongPress(*values["start_box"].point, _seconds(scanner, name, values))


def _seconds(scanner: Scanner, name: str, values: Mapping[str, Value]) -> float | None:
    if "time" not in values:
        return None
    value = values["time"]
    if _SECONDS.fullmatch(value.word) is None or float(value.word) > _MOST_SECONDS:
        scanner.fail(f"{name} takes seconds, {_MOST_SECONDS} at most", value.start, value.end)
    return float(value.word)


def _open_app(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return OpenApp(scanner.text_of(values["app_name"]))


def _of_phones(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return Home() if name == "press_home" else Back()


def _finished(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return Finished(scanner.text_of(values["content"]) if "content" in values else "")


def _call_user(scanner: Scanner, name: str, values: Mapping[str, Value]) -> Action:
    return CallUser(scanner.text_of(values["content"]) if "content" in values else "")


BUILD: dict[str, Callable[[Scanner, str, Mapping[str, Value]], Action]] = {
    **dict.fromkeys(_CLICKS, _click),
    "drag": _drag,
    "select": _drag,
    "hotkey": _hotkey,
    "type": _type,
    "hover": _hover,
    **dict.fromkeys(("press", "keydown", "release", "keyup"), _held),
    "scroll": _scroll,
    "wait": _wait,
    "long_press": _long_press,
    "open_app": _open_app,
    "press_home": _of_phones,
    "press_back": _of_phones,
    "finished": _finished,
    "call_user": _call_user,
}
