r"""Answers of UI-TARS 1.5 as OSWorld's own agent reads them (`mm_agents/uitars15_v1.py`, as of 2025).

For scores that are to be compared with those of that agent: this parser takes what it takes, refuses what it refuses,
and makes of an odd answer what it makes of it, flaws included. `parse_ui_tars` has none of them, and is the default. As
there:

- Only what stands behind the last `Action:` counts, in blocks with a blank line between them. Each is one call in
  Python's notation; arguments are texts, and those without a name don't count.
- A block with `type(content` in it is typed as a whole, `type(content='…')` replaced by what is between the quotes.
- `finished`, `wait`, `call_user` and `error_env` are the whole of the answer: actions before them are dropped.
- Points are not checked against the screen. Keys are passed on as they were said.
- A call that its code does not know, and a text that is no Python literal once more, come to nothing: a `Noop`.
- Where its code raises and the run with it ends (`press`, a click without a point), here the answer is refused.

Model text is read as Python *syntax* (`ast`), and only literals are evaluated. Nothing is executed.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from typing import NoReturn

from managed_vllm.agent.actions.coordinates import MAX_PIXELS, MIN_PIXELS, smart_resize
from managed_vllm.agent.actions.quiet_ast import no_warnings, parsed_expression
from managed_vllm.agent.actions.values import (
    Action,
    Button,
    CallUser,
    Click,
    Direction,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    KeyUp,
    Move,
    Noop,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError

_LONGEST = 100_000
"""Characters of a block; Python's own parser takes no bounds."""

_SPECIAL = re.compile(r"<\|\w{1,40}\|>")
_TYPED = re.compile(r"type\(content='(.*?)'\)")
_BARE_QUOTE = re.compile(r"(?<!\\)'")
_BOX = re.compile(r"(start_box|end_box)='\((\d+),(\d+)\)'")
_THOUGHT = re.compile(r"\A(?:Thought|Reflection|Action_Summary): ")


def parse_like_osworld(
    text: str,
    image_size: tuple[int, int],
    *,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    picture: tuple[int, int] | None = None,
) -> ParsedResponse:
    """The thought and the actions of an answer, as OSWorld's agent reads them; its special tokens don't count.

    Args:
        text: the model's answer, whole.
        image_size: width and height of the screenshot, in pixels. Coordinates are pixels of the resized image.
        min_pixels, max_pixels: of the model's image processor.
        picture: width and height of the resized image, where they are known; then the limits don't count.

    Raises `ActionParseError`: that agent would sample again, or break.
    """
    resized = picture or smart_resize(image_size, min_pixels=min_pixels, max_pixels=max_pixels)
    return _Reading(text, image_size, resized).parsed()


def with_box_tokens(text: str) -> str:
    """An answer as OSWorld's agent puts it into the history: with box tokens around points that have none."""
    return _BOX.sub(r"\1='<|box_start|>(\2,\3)<|box_end|>'", text.strip())


class _Reading:
    """One answer while it is read."""

    def __init__(self, text: str, size: tuple[int, int], resized: tuple[int, int]) -> None:
        self._text = text
        self._size = size
        self._resized = resized

    def parsed(self) -> ParsedResponse:
        plain = _SPECIAL.sub("", self._text).strip()
        before, label, behind = plain.rpartition("Action:")
        if not label:
            self.fail("there is no 'Action:' in the answer")
        calls = [self._call(block) for block in behind.split("\n\n")]
        boxed = [(name, arguments, self._boxes(arguments)) for name, arguments in calls]
        actions: list[Action] = []
        for name, arguments, boxes in boxed:
            last = _LAST.get(name)
            if last is not None:
                actions = [last(arguments.get("content", ""))]
                break
            actions.append(_BUILD.get(name, _unknown)(self, name, arguments, boxes))
        return ParsedResponse(_THOUGHT.sub("", before.strip()), tuple(actions))

    def fail(self, message: str) -> NoReturn:
        raise ActionParseError(message, text=self._text, span=(0, len(self._text)))

    # -- calls

    def _call(self, block: str) -> tuple[str, dict[str, str]]:
        """The name of a call, and its arguments without empty ones."""
        if "type(content" in block:
            content = _BARE_QUOTE.sub(r"\\'", _TYPED.sub(lambda match: match[1], block))
            block = f"type(content='{content}')"
        call = self._parsed_call(block.replace("\n", "\\n").lstrip())
        arguments: dict[str, str] = {}
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg is None or not isinstance(value, str):
                self.fail(f"an argument of the action is no text: {ast.unparse(keyword)[:80]}")
            if value:
                arguments[keyword.arg] = value.lstrip()
        return _name_of(call.func), arguments

    def _parsed_call(self, source: str) -> ast.Call:
        if len(source) > _LONGEST:
            self.fail("the action is too long")
        try:
            call = parsed_expression(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.fail(f"the action is not one call in Python's notation: {error}")
        if not isinstance(call, ast.Call):
            self.fail("the action is not one call in Python's notation")
        return call

    # -- points

    def _boxes(self, arguments: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
        """Coordinates by the name of their argument, as shares of the image's sides."""
        return {
            name: self._shares(value) for name, value in arguments.items() if "start_box" in name or "end_box" in name
        }

    def _shares(self, box: str) -> tuple[float, ...]:
        found = []
        for place, word in enumerate(box.replace("(", "").replace(")", "").split(",")):
            try:
                value = float(word)
            except ValueError:
                self.fail(f"{word[:40]!r} of a point is no number")
            if not math.isfinite(value):
                self.fail(f"{word[:40]!r} of a point is not finite")
            found.append(value / self._resized[place % 2])
        return (*found, *found) if len(found) == 2 else tuple(found)

    def point(self, name: str, box: tuple[float, ...] | None) -> tuple[float, float]:
        """The middle of a box, in pixels of the screenshot."""
        if box is None or len(box) != 4:
            self.fail(f"{name} needs a point, '(x,y)', or a box, '(x1,y1,x2,y2)'")
        width, height = self._size
        return round((box[0] + box[2]) / 2 * width, 3), round((box[1] + box[3]) / 2 * height, 3)


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


# -- what the calls mean -----------------------------------------------------------------------------------------------

_Boxes = Mapping[str, tuple[float, ...]]
_Build = Callable[[_Reading, str, Mapping[str, str], _Boxes], Action]

_LAST: dict[str, Callable[[str], Action]] = {
    "finished": Finished,
    "wait": lambda content: Wait(),
    "call_user": CallUser,
    "error_env": lambda content: CallUser("error_env"),
}
_CLICKS = {
    "click": (Button.LEFT, 1),
    "left_single": (Button.LEFT, 1),
    "left_double": (Button.LEFT, 2),
    "right_single": (Button.RIGHT, 1),
}
_ARROWS = {f"arrow{side}": side for side in ("left", "right", "up", "down")}


def _unknown(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    return Noop(f"OSWorld's agent knows no {name[:40]!r}")


def _click(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    button, clicks = _CLICKS[name]
    return Click(*reading.point(name, boxes.get("start_box")), button, clicks)


def _hover(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    return Move(*reading.point(name, boxes.get("start_box")))


def _drag(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    if "start_box" not in boxes or "end_box" not in boxes:
        return Noop(f"a {name} without both of its points")
    return Drag(*reading.point(name, boxes["start_box"]), *reading.point(name, boxes["end_box"]))


def _hotkey(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    said = arguments.get("key", "") if "key" in arguments else arguments.get("hotkey", "")
    keys = _ARROWS.get(said, said).split()
    if not keys:
        return Noop("a hotkey without a key")
    return Hotkey(tuple(" " if key == "space" else key for key in keys))


def _key_down(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    return KeyDown(arguments.get("key", ""))


def _key_up(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    return KeyUp(arguments.get("key", ""))


def _press(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    reading.fail("OSWorld's agent breaks at press()")


def _type(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    """That agent writes the text between quotes into its script, where Python reads its escapes once more."""
    content = _BARE_QUOTE.sub(r"\\'", arguments.get("content", ""))
    if not content:
        return Noop("nothing to type")
    enter = content.endswith(("\n", "\\n"))
    if enter:
        content = content.rstrip("\\n").rstrip("\n")
    try:
        with no_warnings():
            text = ast.literal_eval(f"'{content}'")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        text = None
    if not isinstance(text, str):
        return Noop("a text that makes OSWorld's script no Python")
    return Type(text, enter)


def _scroll(reading: _Reading, name: str, arguments: Mapping[str, str], boxes: _Boxes) -> Action:
    place = reading.point(name, boxes["start_box"]) if "start_box" in boxes else None
    said = arguments.get("direction", "").lower()
    direction = Direction.UP if "up" in said else Direction.DOWN if "down" in said else None
    if direction is None:
        return Noop(f"OSWorld's agent does not scroll {said[:40]!r}")
    return Scroll(direction) if place is None else Scroll(direction, *place)


_BUILD: dict[str, _Build] = {
    **dict.fromkeys(_CLICKS, _click),
    "hover": _hover,
    **dict.fromkeys(("drag", "select"), _drag),
    "hotkey": _hotkey,
    "press": _press,
    "keydown": _key_down,
    "keyup": _key_up,
    "type": _type,
    "scroll": _scroll,
}
