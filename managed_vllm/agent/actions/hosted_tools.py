"""Tool calls in the shapes of three hosted computer-use models, for models that were trained on them.

- Gemini 2.5 Computer Use: a function for each action, `click_at(x, y)`, `type_text_at(x, y, text, …)`, in thousandths.
  Names and fields from ai.google.dev/gemini-api/docs/computer-use.
- OpenAI's `computer` tool: one action, `{"type": "click", "x": 1, "y": 2, "button": "left"}`, in pixels. Names and
  fields from its API reference (`computer_call`).
- Anthropic's `computer` tool (computer_20250124): `{"action": "left_click", "coordinate": [1, 2]}`, in pixels. What its
  actions mean is in `computer_use`, whose names come from it.

The words are ours. What is read: an answer's tool calls (`CompletionOutput.tool_calls`), or the same as JSON in its
text. These models end a task by an answer without a call; `ends` says whether that is taken so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Unpack

from managed_vllm.agent.actions.computer_use import ACTIONS_READ
from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader, each_of, values_in
from managed_vllm.agent.actions.rows import (
    ActionRow,
    Field,
    Values,
    call_in,
    functions_of,
    holding,
    pressed,
    read_row,
    schema_of,
    told,
)
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    Custom,
    Direction,
    Drag,
    Finished,
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

Shape = Literal["gemini", "openai", "anthropic"]

# -- Gemini ------------------------------------------------------------------------------------------------------------


def _typed(values: Values) -> Sequence[Action]:
    cleared = [Hotkey(("ctrl", "a")), Hotkey(("delete",))] if values.get("clear_before_typing", True) else []
    return (*pressed(values["at"]), *cleared, Type(values["text"], enter=values.get("press_enter", True)))


def _scrolled(values: Values) -> Sequence[Action]:
    x, y = values.get("at") or (None, None)
    return (Scroll(values["direction"], x, y, None),)


_AT = {"at": Field("point")}
_GEMINI: Mapping[str, ActionRow] = {
    "click_at": ActionRow("Click at a point.", _AT, lambda v: pressed(v["at"])),
    "hover_at": ActionRow("Move the pointer to a point.", _AT, lambda v: (Move(*v["at"]),)),
    "type_text_at": ActionRow(
        "Click at a point and type there. What is there is deleted first, and Enter pressed last, unless told else.",
        {
            **_AT,
            "text": Field("text"),
            "press_enter": Field("truth", False),
            "clear_before_typing": Field("truth", False),
        },
        _typed,
    ),
    "key_combination": ActionRow("Press keys together.", {"keys": Field("keys")}, lambda v: (Hotkey(v["keys"]),)),
    "scroll_document": ActionRow("Scroll the page.", {"direction": Field("direction")}, _scrolled),
    "scroll_at": ActionRow(
        "Scroll what is at a point.",
        {**_AT, "direction": Field("direction"), "magnitude": Field("number", False)},
        _scrolled,
    ),
    "drag_and_drop": ActionRow(
        "Drag what is at the first point to the second.",
        {**_AT, "to": Field("point")},
        lambda v: (Drag(*v["at"], *v["to"]),),
    ),
    "navigate": ActionRow("Open an address.", {"url": Field("text")}, lambda v: (OpenURL(v["url"]),)),
    "search": ActionRow("Open the search engine's page.", {}, lambda _: (Custom("search"),)),
    "go_back": ActionRow("Go back to the page before.", {}, lambda _: (Back(),)),
    "go_forward": ActionRow("Go forward to the page after.", {}, lambda _: (Custom("go_forward"),)),
    "open_web_browser": ActionRow("Open the browser.", {}, lambda _: (Custom("open_web_browser"),)),
    "wait_5_seconds": ActionRow("Wait for 5 seconds.", {}, lambda _: (Wait(5.0),)),
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


def _with_keys(what: str, fields: Mapping[str, Field], make: Callable[[Values], Sequence[Action]]) -> ActionRow:
    """An action of the mouse, during which keys may be held."""
    held = {"keys": Field("held", False, "Keys held meanwhile")}
    return ActionRow(what, {**fields, **held}, lambda values: holding(values.get("keys", ()), make(values)))


_WHEEL = {"scroll_x": Field("number", False, "To the right"), "scroll_y": Field("number", False, "Down")}
_OPENAI: Mapping[str, ActionRow] = {
    "click": _with_keys(
        "Click at a point.",
        {**_AT, "button": Field("button", False)},
        lambda v: pressed(v["at"], v.get("button", Button.LEFT)),
    ),
    "double_click": _with_keys("Click the left button twice at a point.", _AT, lambda v: pressed(v["at"], clicks=2)),
    "move": _with_keys("Move the pointer to a point.", _AT, lambda v: (Move(*v["at"]),)),
    "drag": _with_keys(
        "Press the left button at the first point, and let it go at the last.", {"path": Field("path")}, _dragged
    ),
    "scroll": _with_keys("Turn the wheel at a point.", {"at": Field("point", False), **_WHEEL}, _turned),
    "keypress": ActionRow("Press keys together.", {"keys": Field("keys")}, lambda v: (Hotkey(v["keys"]),)),
    "type": ActionRow("Type text where the focus is.", {"text": Field("text")}, lambda v: (Type(v["text"]),)),
    "wait": ActionRow("Wait for the screen to change.", {}, lambda _: (Wait(),)),
    "screenshot": ActionRow("", {}, lambda _: (Noop("a screenshot comes with each turn"),)),
}

# -- Anthropic ---------------------------------------------------------------------------------------------------------


def _taken(what: str, name: str, *fields: str) -> ActionRow:
    """One of Qwen's rows, with those fields that Anthropic's tool has."""
    row = ACTIONS_READ["computer_use"][name]
    return ActionRow(what, {field: row.fields[field] for field in fields}, row.make)


_CLICKED = ("coordinate", "text")
_ANTHROPIC: Mapping[str, ActionRow] = {
    "key": _taken("Press the keys in `text` together: ctrl+c.", "key", "text"),
    "hold_key": _taken("Hold the keys in `text`, for `duration` seconds.", "hold_key", "text", "duration"),
    "type": _taken("Type `text`.", "type", "text"),
    "mouse_move": _taken("Move the pointer to `coordinate`.", "mouse_move", "coordinate"),
    "left_click": _taken("Click the left button at `coordinate`.", "left_click", *_CLICKED),
    "right_click": _taken("Click the right button at `coordinate`.", "right_click", *_CLICKED),
    "middle_click": _taken("Click the middle button at `coordinate`.", "middle_click", *_CLICKED),
    "double_click": _taken("Click the left button twice at `coordinate`.", "double_click", *_CLICKED),
    "triple_click": _taken("Click the left button three times at `coordinate`.", "triple_click", *_CLICKED),
    "left_click_drag": _taken(
        "Drag from `start_coordinate` to `coordinate`.", "left_click_drag", "start_coordinate", "coordinate"
    ),
    "left_mouse_down": _taken("Press the left button, and hold it.", "left_mouse_down", "coordinate"),
    "left_mouse_up": _taken("Let the left button go.", "left_mouse_up", "coordinate"),
    "scroll": _taken(
        "Turn the wheel at `coordinate`, by `scroll_amount` steps.",
        "scroll",
        "coordinate",
        "scroll_direction",
        "scroll_amount",
    ),
    "wait": _taken("Wait for `duration` seconds.", "wait", "duration"),
    "screenshot": _taken("Take a screenshot.", "screenshot"),
}
HOSTED_ACTIONS: Mapping[Shape, Mapping[str, ActionRow]] = MappingProxyType(
    {"gemini": _GEMINI, "openai": _OPENAI, "anthropic": _ANTHROPIC}
)
"""The actions of each, by their names; `at` stands for x and y, `to` for destination_x and destination_y."""
_PAIRS = (("x", "y", "at"), ("destination_x", "destination_y", "to"))
_GRID: Mapping[Shape, Coordinates] = {"gemini": "relative1000", "openai": "absolute", "anthropic": "absolute"}
_EITHER: Mapping[Shape, Mapping[str, tuple[str, ...]]] = {
    "anthropic": {"key": ("text",), "scroll": ("scroll_direction",)},
}
"""Fields that are not marked as such, and have to be there."""


# -- what a model is told ----------------------------------------------------------------------------------------------


def hosted_tools(shape: Shape, frame: str) -> list[dict[str, Any]]:
    """For `tools=` of a chat request. `frame`: what the numbers of a point are, in words."""
    rows = told(HOSTED_ACTIONS[shape])
    if shape == "gemini":
        return functions_of(rows, frame, pairs=_PAIRS)
    what = "Control the mouse and the keyboard of a computer, by one action."
    schemas = {name: schema_of(row, frame, pairs=_PAIRS) for name, row in rows.items()}
    if shape == "openai":
        forms = [_form(name, rows[name].what, schema) for name, schema in schemas.items()]
        fields: dict[str, Any] = {"action": {"anyOf": forms}}
    else:
        words = "\n".join(f"* `{name}`: {row.what}" for name, row in rows.items())
        fields = {"action": {"type": "string", "enum": list(rows), "description": words}}
        for schema in schemas.values():
            fields |= schema.get("properties", {})
    parameters = {"type": "object", "properties": fields, "required": ["action"]}
    return [{"type": "function", "function": {"name": "computer", "description": what, "parameters": parameters}}]


def _form(name: str, what: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """One action of OpenAI's tool."""
    fields = {"type": {"type": "string", "enum": [name]}, **schema.get("properties", {})}
    return {
        "type": "object",
        "description": what,
        "properties": fields,
        "required": ["type", *schema.get("required", [])],
    }


# -- parsing -----------------------------------------------------------------------------------------------------------


def parse_hosted(
    text: str,
    image_size: tuple[int, int],
    *,
    shape: Shape,
    tool_calls: Sequence[Mapping[str, Any]] = (),
    ends: bool = False,
    coordinates: Coordinates | None = None,
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the actions of tool calls in one of these shapes.

    Args:
        text: the answer: the thought, or JSON with what stands before it.
        image_size: width and height of the screenshot.
        shape: whose calls these are.
        tool_calls: the answer's calls; without any they are looked for in the text.
        ends: whether an answer without a call is the end of the task, and its text the answer to it.
        coordinates: None: thousandths with Gemini's, else pixels of the screenshot.
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
    if ends and text.strip() and "{" not in text:
        return _ended(reader)
    before, found = values_in(text)
    for value, start, end in found:
        reader.span = start, end
        for call in each_of(value):
            actions += _read(reader, shape, call)
    return ParsedResponse(before, tuple(actions))


def _ended(reader: Reader) -> ParsedResponse:
    thinking, tag, said = reader.text.rpartition("</think>")
    if not tag and reader.text.lstrip().startswith("<think>"):
        reader.fail("the answer was cut off while the model was thinking: allow it more tokens")
    answer = reader.string(said.strip(), "the answer")
    return ParsedResponse(thinking.strip().removeprefix("<think>").strip(), (Finished(answer),))


def _read(reader: Reader, shape: Shape, call: Any) -> list[Action]:
    if not isinstance(call, Mapping):
        reader.fail(f"a call must be an object, not {type(call).__name__}")
    name, given = call_in(reader, call)
    if shape != "gemini":
        given = call if given is None else given
        if shape == "openai" and isinstance(given, Mapping):
            given = given.get("action", given)
    if not isinstance(given, Mapping | None):
        reader.fail("the arguments of a tool call must be an object")
    given = dict(given or {})
    if shape != "gemini":
        name = given.pop("type" if shape == "openai" else "action", None)
    return read_row(reader, HOSTED_ACTIONS[shape], name, given, _EITHER.get(shape), _PAIRS)
