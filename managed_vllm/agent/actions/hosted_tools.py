"""Tool calls in the shapes of two hosted computer-use models, for models that were trained on them.

- Gemini 2.5 Computer Use: a function for each action, `click_at(x, y)`, `type_text_at(x, y, text, …)`, in thousandths.
  Names and fields from ai.google.dev/gemini-api/docs/computer-use.
- OpenAI's `computer` tool: one action, `{"type": "click", "x": 1, "y": 2, "button": "left"}`, in pixels. Names and
  fields from its API reference (`computer_call`).

Anthropic's `computer` is in `computer_use`, whose names come from it. What is read: an answer's tool calls
(`CompletionOutput.tool_calls`), or the same as JSON in its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader, values_in
from managed_vllm.agent.actions.rows import ActionRow, Field, Values, call_in, pressed, read_row
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    Custom,
    Direction,
    Drag,
    Hotkey,
    MouseDown,
    MouseUp,
    Move,
    Noop,
    OpenURL,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
)

Shape = Literal["gemini", "openai"]

# -- Gemini ------------------------------------------------------------------------------------------------------------


def _typed(values: Values) -> Sequence[Action]:
    cleared = [Hotkey(("ctrl", "a")), Hotkey(("delete",))] if values.get("clear_before_typing", True) else []
    return (*pressed(values["at"]), *cleared, Type(values["text"], enter=values.get("press_enter", True)))


def _scrolled(values: Values) -> Sequence[Action]:
    x, y = values.get("at") or (None, None)
    return (Scroll(values["direction"], x, y, None),)


_AT = {"at": Field("point")}
_GEMINI: Mapping[str, ActionRow] = {
    "click_at": ActionRow("", _AT, lambda v: pressed(v["at"])),
    "hover_at": ActionRow("", _AT, lambda v: (Move(*v["at"]),)),
    "type_text_at": ActionRow(
        "",
        {
            **_AT,
            "text": Field("text"),
            "press_enter": Field("truth", False),
            "clear_before_typing": Field("truth", False),
        },
        _typed,
    ),
    "key_combination": ActionRow("", {"keys": Field("keys")}, lambda v: (Hotkey(v["keys"]),)),
    "scroll_document": ActionRow("", {"direction": Field("direction")}, _scrolled),
    "scroll_at": ActionRow(
        "", {**_AT, "direction": Field("direction"), "magnitude": Field("number", False)}, _scrolled
    ),
    "drag_and_drop": ActionRow("", {**_AT, "to": Field("point")}, lambda v: (Drag(*v["at"], *v["to"]),)),
    "navigate": ActionRow("", {"url": Field("text")}, lambda v: (OpenURL(v["url"]),)),
    "search": ActionRow("", {}, lambda _: (Custom("search"),)),
    "go_back": ActionRow("", {}, lambda _: (Back(),)),
    "go_forward": ActionRow("", {}, lambda _: (Custom("go_forward"),)),
    "open_web_browser": ActionRow("", {}, lambda _: (Custom("open_web_browser"),)),
    "wait_5_seconds": ActionRow("", {}, lambda _: (Wait(5.0),)),
}

# -- OpenAI ------------------------------------------------------------------------------------------------------------


def _turned(values: Values) -> Sequence[Action]:
    x, y = values.get("at") or (None, None)
    sideways, down = round(values.get("scroll_x", 0)), round(values.get("scroll_y", 0))
    actions: list[Action] = []
    if down:
        actions.append(Scroll(Direction.DOWN if down > 0 else Direction.UP, x, y))
    if sideways:
        actions.append(Scroll(Direction.RIGHT if sideways > 0 else Direction.LEFT, x, y))
    return actions or [Noop("scrolled by nothing")]


def _dragged(values: Values) -> Sequence[Action]:
    points = values["path"]
    if len(points) == 2:
        return (Drag(*points[0], *points[1]),)
    return (Move(*points[0]), MouseDown(), *(Move(*point) for point in points[1:]), MouseUp())


_HELD = {"keys": Field("ignored", False)}
_WHEEL = {"scroll_x": Field("number", False), "scroll_y": Field("number", False)}
_OPENAI: Mapping[str, ActionRow] = {
    "click": ActionRow(
        "", {**_AT, "button": Field("button", False), **_HELD}, lambda v: pressed(v["at"], v.get("button", Button.LEFT))
    ),
    "double_click": ActionRow("", {**_AT, **_HELD}, lambda v: pressed(v["at"], clicks=2)),
    "move": ActionRow("", {**_AT, **_HELD}, lambda v: (Move(*v["at"]),)),
    "drag": ActionRow("", {"path": Field("path"), **_HELD}, _dragged),
    "scroll": ActionRow("", {"at": Field("point", False), **_WHEEL, **_HELD}, _turned),
    "keypress": ActionRow("", {"keys": Field("keys")}, lambda v: (Hotkey(v["keys"]),)),
    "type": ActionRow("", {"text": Field("text")}, lambda v: (Type(v["text"]),)),
    "wait": ActionRow("", {}, lambda _: (Wait(),)),
    "screenshot": ActionRow("", {}, lambda _: (Noop("a screenshot comes with each turn"),)),
}
HOSTED_ACTIONS: Mapping[Shape, Mapping[str, ActionRow]] = MappingProxyType({"gemini": _GEMINI, "openai": _OPENAI})
"""The actions of each, by their names; `at` stands for x and y, `to` for destination_x and destination_y."""
_PAIRS = (("x", "y", "at"), ("destination_x", "destination_y", "to"))
_GRID: Mapping[Shape, Coordinates] = {"gemini": "relative1000", "openai": "absolute"}


def parse_hosted(
    text: str,
    image_size: tuple[int, int],
    *,
    shape: Shape,
    tool_calls: Sequence[Mapping[str, Any]] = (),
    coordinates: Coordinates | None = None,
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the actions of tool calls in one of these shapes.

    Args:
        text: the answer: the thought, or JSON with what stands before it.
        image_size: width and height of the screenshot.
        shape: whose calls these are.
        tool_calls: the answer's calls; without any they are looked for in the text.
        coordinates: None: thousandths with Gemini's, pixels of the screenshot with OpenAI's.
        options: as for `parse_ui_tars`.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(image_size, coordinates or _GRID[shape], **options)
    reader, actions = Reader(frame, text), []
    if tool_calls:
        for call in tool_calls:
            reader.text = json.dumps(call, default=str, ensure_ascii=False)
            reader.span = 0, len(reader.text)
            actions += _read(reader, shape, call)
        return ParsedResponse(text.strip(), tuple(actions))
    before, found = values_in(text)
    for value, start, end in found:
        reader.span = start, end
        actions += _read(reader, shape, value)
    return ParsedResponse(before, tuple(actions))


def _read(reader: Reader, shape: Shape, call: Any) -> list[Action]:
    if isinstance(call, list) and call:
        return [action for each in call for action in _read(reader, shape, each)]
    if not isinstance(call, Mapping):
        reader.fail(f"a call must be an object, not {type(call).__name__}")
    name, given = call_in(reader, call)
    if shape == "openai":
        action = call if given is None else given
        action = action.get("action", action) if isinstance(action, Mapping) else action
        if not isinstance(action, Mapping):
            reader.fail("the action must be an object")
        name, given = action.get("type"), {key: value for key, value in action.items() if key != "type"}
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        reader.fail("the arguments of a tool call must be an object")
    return read_row(reader, HOSTED_ACTIONS[shape], name, given, pairs=_PAIRS)
