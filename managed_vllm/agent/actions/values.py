"""Actions of a GUI agent, as frozen values. Coordinates are pixels of the screenshot, as floats, from its top left."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Button(enum.StrEnum):
    """Of the mouse."""

    LEFT = "left"
    RIGHT = "right"
    MIDDLE = "middle"


class Direction(enum.StrEnum):
    """Of scrolling: where the view moves to."""

    UP = "up"
    DOWN = "down"
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Click:
    """`clicks` presses of a mouse button at a point: 2 are a double click."""

    x: float
    y: float
    button: Button = Button.LEFT
    clicks: int = 1


@dataclass(frozen=True, slots=True)
class Move:
    """The pointer moved to a point, without a click."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Drag:
    """The left button pressed at the first point, and let go at the second."""

    x: float
    y: float
    to_x: float
    to_y: float


@dataclass(frozen=True, slots=True)
class MouseDown:
    """A mouse button pressed and held, until its `MouseUp`: at a point; None: wherever the pointer is."""

    button: Button = Button.LEFT
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, slots=True)
class MouseUp:
    """A mouse button let go that is held: at a point; None: wherever the pointer is."""

    button: Button = Button.LEFT
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, slots=True)
class LongPress:
    """A finger held on a point. `seconds` None: as long as the executor's default."""

    x: float
    y: float
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Swipe:
    """A finger drawn over the screen, from the first point to the second."""

    x: float
    y: float
    to_x: float
    to_y: float


@dataclass(frozen=True, slots=True)
class Type:
    """Text typed where the focus is. `enter`: the Enter key is pressed after it."""

    text: str
    enter: bool = False


@dataclass(frozen=True, slots=True)
class Hotkey:
    """Keys pressed together, in this order; names as the model says them, in lower case: `("ctrl", "c")`."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyDown:
    """A key pressed and held, until its `KeyUp`; its name as the model says it, in lower case."""

    key: str


@dataclass(frozen=True, slots=True)
class KeyUp:
    """A key let go that is held."""

    key: str


@dataclass(frozen=True, slots=True)
class Scroll:
    """The wheel turned at a point; None: wherever the pointer is. `amount` in the executor's own steps, None: its own
    choice."""

    direction: Direction
    x: float | None = None
    y: float | None = None
    amount: int | None = None


@dataclass(frozen=True, slots=True)
class OpenApp:
    """An application opened by its name, as the model says it."""

    name: str


@dataclass(frozen=True, slots=True)
class OpenURL:
    """An address opened in the browser, as the model says it: it is not looked at here."""

    url: str


@dataclass(frozen=True, slots=True)
class Back:
    """One step back: the back key of a phone, or of a browser."""


@dataclass(frozen=True, slots=True)
class Home:
    """To the home screen of a phone."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing for a while. `seconds` None: as long as the executor's default."""

    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The model says that the task is done. `content` is its answer, if it has one."""

    content: str = ""


@dataclass(frozen=True, slots=True)
class CallUser:
    """The model asks for a person."""

    content: str = ""


@dataclass(frozen=True, slots=True)
class Noop:
    """Nothing, though the model meant something. `reason` says what became of it."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Custom:
    """An action of a format of the caller's own; the environment must know its `name`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


Action = (
    Click
    | Move
    | Drag
    | MouseDown
    | MouseUp
    | LongPress
    | Swipe
    | Type
    | Hotkey
    | KeyDown
    | KeyUp
    | Scroll
    | OpenApp
    | OpenURL
    | Back
    | Home
    | Wait
    | Finished
    | CallUser
    | Noop
    | Custom
)


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """What an answer means: the words before the action (may be empty), and one or more actions in their order."""

    thought: str
    actions: tuple[Action, ...]
