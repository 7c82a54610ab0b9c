"""The tools `computer_use` and `mobile_use`, by which Qwen-VL and its descendants act.

    I click OK.
    <tool_call>
    {"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [512, 340]}}
    </tool_call>

One tool, whose argument `action` says what is done, with the fields of that action beside it. The names of actions and
fields are those of Qwen's cookbooks (computer_use.ipynb and mobile_agent.ipynb of QwenLM/Qwen3-VL; Qwen2.5-VL's before
them), of OSWorld's qwen3vl_agent, and what was added to them: EvoCUA's `key_down` and `key_up`, Fara's actions of a
browser, MAI-UI's and GUI-Owl's of a phone, and Anthropic's tool `computer`, from which the names come
(computer_20250124). The words are ours. `TOOLS` is what a model is told; `ACTIONS_READ` what is understood.

An answer may have several calls, in `<tool_call>` tags or not, as JSON or in the XML of Qwen3-Coder and Qwen3.5:

    <tool_call><function=computer_use><parameter=action>left_click</parameter>…</function></tool_call>

What stands before the first one is the thought. What can't be told without a doubt is an `ActionParseError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader, each_of, values_in
from managed_vllm.agent.actions.rows import ActionRow, Field, Point, Values, call_in, holding, pressed, read_row
from managed_vllm.agent.actions.values import (
    Action,
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
    ParsedResponse,
    Scroll,
    Swipe,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError

Tool = Literal["computer_use", "mobile_use"]
# -- what the actions are ----------------------------------------------------------------------------------------------


def _click(button: Button, clicks: int = 1) -> Callable[[Values], Sequence[Action]]:
    def make(values: Values) -> Sequence[Action]:
        return holding(values.get("text") or (), pressed(values.get("coordinate"), button, clicks))

    return make


def _drag(values: Values) -> Sequence[Action]:
    to: Point = values["coordinate"]
    start: Point | None = values.get("start_coordinate")
    if start is None:  # from where the pointer is
        return MouseDown(), Move(*to), MouseUp()
    return (Drag(*start, *to),)


def _typed(values: Values) -> Sequence[Action]:
    point: Point | None = values.get("coordinate")
    before: list[Action] = [] if point is None else [Click(*point)]
    if values.get("delete_existing_text"):
        before += [Hotkey(("ctrl", "a")), Hotkey(("delete",))]
    return (*before, Type(values["text"], enter=bool(values.get("press_enter"))))


def _pressed(values: Values) -> Sequence[Action]:
    keys = values.get("keys") or values.get("text") or ()
    return (Hotkey(keys),)


def _held(values: Values) -> Sequence[Action]:
    return holding(values["text"], [Wait(values["duration"])])


def _scrolled(forward: Direction, backward: Direction) -> Callable[[Values], Sequence[Action]]:
    def make(values: Values) -> Sequence[Action]:
        point: Point | None = values.get("coordinate")
        x, y = (None, None) if point is None else point
        if "scroll_direction" in values:
            return (Scroll(values["scroll_direction"], x, y, values.get("scroll_amount")),)
        steps = round(values["pixels"])
        if steps == 0:
            return (Noop("scrolled by nothing"),)
        return (Scroll(forward if steps > 0 else backward, x, y, abs(steps)),)

    return make


def _ended(values: Values) -> Sequence[Action]:
    if values["status"] == "failure":
        return (CallUser(values.get("text") or "the model has given up"),)
    return (Finished(values.get("text") or values.get("answer") or ""),)


def _long_pressed(values: Values) -> Sequence[Action]:
    x, y = values["coordinate"]
    return (LongPress(x, y, values.get("time")),)


def _button(values: Values) -> Sequence[Action]:
    name = values["button"].lower()
    of_phones: Mapping[str, Action] = {"back": Back(), "home": Home(), "enter": Hotkey(("enter",))}
    return (of_phones.get(name) or Custom("system_button", {"button": name}),)


_AT = {"coordinate": Field("point")}
_MAYBE_AT = {"coordinate": Field("point", False)}
_CLICKED = {**_MAYBE_AT, "text": Field("keys", False)}  # keys that are held: Anthropic's
_WAITED = {"time": Field("seconds", False), "duration": Field("seconds", False)}
_STATUS = {"status": Field("status"), "text": Field("text", False), "answer": Field("text", False)}


def _waited(values: Values) -> Sequence[Action]:
    return (Wait(values.get("time", values.get("duration"))),)


_COMMON: Mapping[str, ActionRow] = {
    "wait": ActionRow("Wait for the screen to change, `time` seconds.", _WAITED, _waited),
    "terminate": ActionRow("End the task; `status` says whether it is done.", _STATUS, _ended),
    "answer": ActionRow("Answer a question, by `text`.", {"text": Field("text")}, lambda v: (Finished(v["text"]),)),
}
_COMPUTER: Mapping[str, ActionRow] = {
    "key": ActionRow(
        "Press `keys` in this order, and let them go in reverse.",
        {"keys": Field("keys", False), "text": Field("keys", False)},
        _pressed,
    ),
    "type": ActionRow(
        "Type `text`.",
        {
            "text": Field("text"),
            **_MAYBE_AT,
            "press_enter": Field("truth", False),
            "delete_existing_text": Field("truth", False),
        },
        _typed,
    ),
    "mouse_move": ActionRow("Move the pointer to `coordinate`.", _AT, lambda v: (Move(*v["coordinate"]),)),
    "left_click": ActionRow("Click the left button at `coordinate`.", _CLICKED, _click(Button.LEFT)),
    "left_click_drag": ActionRow(
        "Press the left button where the pointer is, and let it go at `coordinate`.",
        {**_AT, "start_coordinate": Field("point", False)},
        _drag,
    ),
    "right_click": ActionRow("Click the right button at `coordinate`.", _CLICKED, _click(Button.RIGHT)),
    "middle_click": ActionRow("Click the middle button at `coordinate`.", _CLICKED, _click(Button.MIDDLE)),
    "double_click": ActionRow("Click the left button twice at `coordinate`.", _CLICKED, _click(Button.LEFT, 2)),
    "triple_click": ActionRow("Click the left button three times at `coordinate`.", _CLICKED, _click(Button.LEFT, 3)),
    "scroll": ActionRow(
        "Turn the wheel by `pixels`: up if they are positive, down if negative.",
        {
            **_MAYBE_AT,
            "pixels": Field("number", False),
            "scroll_direction": Field("direction", False),
            "scroll_amount": Field("amount", False),
        },
        _scrolled(Direction.UP, Direction.DOWN),
    ),
    "hscroll": ActionRow(
        "Scroll sideways by `pixels`: to the right if they are positive, to the left if negative.",
        {**_MAYBE_AT, "pixels": Field("number")},
        _scrolled(Direction.RIGHT, Direction.LEFT),
    ),
    **_COMMON,
    # EvoCUA
    "key_down": ActionRow("", {"keys": Field("keys")}, lambda v: tuple(map(KeyDown, v["keys"]))),
    "key_up": ActionRow("", {"keys": Field("keys")}, lambda v: tuple(map(KeyUp, reversed(v["keys"])))),
    # Anthropic's
    "left_mouse_down": ActionRow("", _MAYBE_AT, lambda v: (MouseDown(Button.LEFT, *(v.get("coordinate") or ())),)),
    "left_mouse_up": ActionRow("", _MAYBE_AT, lambda v: (MouseUp(Button.LEFT, *(v.get("coordinate") or ())),)),
    "hold_key": ActionRow("", {"text": Field("keys"), "duration": Field("seconds")}, _held),
    "screenshot": ActionRow("", {}, lambda _: (Noop("a screenshot comes with each turn"),)),
    # Fara
    "visit_url": ActionRow("", {"url": Field("text")}, lambda v: (OpenURL(v["url"]),)),
    "web_search": ActionRow("", {"query": Field("text")}, lambda v: (Custom("web_search", {"query": v["query"]}),)),
    "history_back": ActionRow("", {}, lambda _: (Back(),)),
    "pause_and_memorize_fact": ActionRow("", {"fact": Field("text")}, lambda v: (Noop(f"noted: {v['fact']}"),)),
    # later agents of Qwen's
    "open_app": ActionRow("", {"app": Field("text")}, lambda v: (OpenApp(v["app"]),)),
    "interact": ActionRow("", {"text": Field("text", False)}, lambda v: (CallUser(v.get("text") or ""),)),
}
_MOBILE: Mapping[str, ActionRow] = {
    "click": ActionRow("Tap on `coordinate`.", _AT, lambda v: (Click(*v["coordinate"]),)),
    "long_press": ActionRow(
        "Hold a finger on `coordinate`, for `time` seconds.",
        {**_AT, "time": Field("seconds", False)},
        _long_pressed,
    ),
    "swipe": ActionRow(
        "Draw a finger from `coordinate` to `coordinate2`.",
        {**_AT, "coordinate2": Field("point")},
        lambda v: (Swipe(*v["coordinate"], *v["coordinate2"]),),
    ),
    "type": ActionRow("Type `text` where the focus is.", {"text": Field("text")}, lambda v: (Type(v["text"]),)),
    "system_button": ActionRow(
        "Press a `button` of the system: Back, Home, Menu or Enter.", {"button": Field("text")}, _button
    ),
    "open": ActionRow("Open the app that is called `text`.", {"text": Field("text")}, lambda v: (OpenApp(v["text"]),)),
    **_COMMON,
    # GUI-Owl, MAI-UI
    "key": ActionRow("", {"text": Field("text")}, lambda v: (Custom("key_event", {"key": v["text"]}),)),
    "double_click": ActionRow("", _AT, _click(Button.LEFT, 2)),
    "drag": ActionRow(
        "",
        {"start_coordinate": Field("point"), "end_coordinate": Field("point")},
        lambda v: (Drag(*v["start_coordinate"], *v["end_coordinate"]),),
    ),
    "ask_user": ActionRow("", {"text": Field("text")}, lambda v: (CallUser(v["text"]),)),
}
ACTIONS_READ: Mapping[Tool, Mapping[str, ActionRow]] = MappingProxyType(
    {"computer_use": MappingProxyType(_COMPUTER), "mobile_use": MappingProxyType(_MOBILE)}
)
"""The actions of each tool that are understood, by their names."""
_NAMES: Mapping[str, Tool] = {"computer_use": "computer_use", "computer": "computer_use", "mobile_use": "mobile_use"}
"""What calls say, and which tool is meant."""
_EITHER = {"key": ("keys", "text"), "scroll": ("pixels", "scroll_direction")}
"""Fields of which one must be there."""


# -- what a model is told ----------------------------------------------------------------------------------------------

_POINT: Mapping[str, Any] = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_FIELDS_IN_WORDS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "coordinate": (_POINT, "A point, [x, y]: {}"),
    "coordinate2": (_POINT, "Where a swipe ends."),
    "keys": ({"type": "array", "items": {"type": "string"}}, 'Names of keys, such as ["ctrl", "c"].'),
    "text": ({"type": "string"}, "What is typed, answered, or opened."),
    "pixels": ({"type": "number"}, "How far to scroll."),
    "time": ({"type": "number"}, "Seconds."),
    "button": ({"type": "string", "enum": ["Back", "Home", "Menu", "Enter"]}, "A button of the system."),
    "status": ({"type": "string", "enum": ["success", "failure"]}, "Whether the task is done."),
}


def tool_of(tool: Tool, frame: str) -> dict[str, Any]:
    """For `tools=` of a chat request. `frame`: what the numbers of a point are, in words."""
    told = {name: row for name, row in ACTIONS_READ[tool].items() if row.what}
    fields = {field for row in told.values() for field in row.fields}
    properties: dict[str, Any] = {
        "action": {
            "type": "string",
            "enum": list(told),
            "description": "\n".join(f"* `{name}`: {row.what}" for name, row in told.items()),
        }
    }
    for name, (schema, words) in _FIELDS_IN_WORDS.items():
        if name in fields:
            who = [f"`{action}`" for action, row in told.items() if f"`{name}`" in row.what]
            needed = f" For {', '.join(who)}." if who else ""
            properties[name] = {**schema, "description": words.replace("{}", frame) + needed}
    what = "the mouse and the keyboard of a computer" if tool == "computer_use" else "a phone with a touch screen"
    description = f"Control {what}. You see the screen before each action; what you open may take a while to appear."
    return {
        "type": "function",
        "function": {
            "name": tool,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": ["action"]},
        },
    }


# -- parsing -----------------------------------------------------------------------------------------------------------

_XML = re.compile(r"<tool_call>\s*+<function=(\w{1,40})>(.*?)</function>\s*+(?:</tool_call>|\Z)", re.DOTALL)
_XML_BEGIN = re.compile(r"<tool_call>\s*+<function")
_PARAMETER = re.compile(r"<parameter=(\w{1,40})>(.*?)</parameter>", re.DOTALL)
_THINKING = re.compile(r"\A\s*+<(think|thinking|thought)>(.*?)</\1>", re.DOTALL)
_THOUGHT = re.compile(r"\A\s*+(?:Thought|Action)[:：]\s*+", re.IGNORECASE)


def parse_computer_use(
    text: str,
    image_size: tuple[int, int],
    *,
    tool: Tool = "computer_use",
    tool_calls: Sequence[Mapping[str, Any]] = (),
    coordinates: Coordinates = "relative1000",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the actions of an answer.

    Args:
        text: the answer.
        image_size: width and height of the screenshot.
        tool: whose actions these are.
        tool_calls: the answer's calls, where the server took them out of the text (`CompletionOutput.tool_calls`); the
            text is the thought then.
        coordinates, options: as for `parse_ui_tars`. Qwen3-VL: thousandths,
            the default; Qwen2.5-VL: `"resized"`.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(image_size, coordinates, **options)
    if tool_calls:
        return _of_calls(tool_calls, text, _Calls(tool, Reader(frame, text)))
    calls = _Calls(tool, Reader(frame, text))
    begin = text[: match.end()] if (match := _THINKING.match(text)) else ""
    rest = text[len(begin) :]
    if _XML.search(rest) or _XML_BEGIN.search(rest):
        before, actions = _of_xml(rest, len(begin), calls)
    else:
        before, found = values_in(rest)
        actions = []
        for value, start, end in found:
            calls.reader.span = len(begin) + start, len(begin) + end
            for call in each_of(value):
                actions += calls.of(call)
    thoughts = ((match[2] if match else "").strip(), _THOUGHT.sub("", before).strip())
    return ParsedResponse("\n".join(filter(None, thoughts)), tuple(actions))


def _of_calls(tool_calls: Sequence[Mapping[str, Any]], thought: str, calls: _Calls) -> ParsedResponse:
    actions: list[Action] = []
    call: Any
    for call in tool_calls:
        said = json.dumps(call, default=str, ensure_ascii=False)
        calls.reader.text, calls.reader.span = said, (0, len(said))
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            calls.reader.fail("a tool call must have a function")
        actions += calls.called(*call_in(calls.reader, call))
    return ParsedResponse(thought.strip(), tuple(actions))


def _of_xml(text: str, offset: int, calls: _Calls) -> tuple[str, list[Action]]:
    actions: list[Action] = []
    end = first = None
    for match in _XML.finditer(text):
        if end is not None and text[end : match.start()].strip():
            calls.reader.span = offset + end, offset + match.start()
            calls.reader.fail("text stands between two actions, so it can't be told whether both are meant")
        first, end = match.start() if first is None else first, match.end()
        calls.reader.span = offset + match.start(), offset + match.end()
        given: dict[str, Any] = {}
        for parameter in _PARAMETER.finditer(match[2]):
            if parameter[1] in given:
                calls.reader.fail(f"the parameter {parameter[1]} is there twice")
            given[parameter[1]] = _plain(parameter[1], parameter[2].strip("\n"))
        actions += calls.called(match[1], given)
    if "<tool_call>" in text[end:]:
        raise ActionParseError(
            "the answer was cut off within its tool call",
            text=calls.reader.text,
            span=(offset + (end or 0), len(calls.reader.text)),
        )
    return text[:first], actions


_TEXTS = frozenset({"text", "url", "query", "fact", "app", "answer"})


def _plain(name: str, value: str) -> Any:
    """A parameter of the XML: what is no text is JSON."""
    if name in _TEXTS or name in ("action", "status", "button", "scroll_direction"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value.strip()


class _Calls:
    """Reads the calls of one answer."""

    def __init__(self, tool: Tool, reader: Reader) -> None:
        self._tool = tool
        self._rows = ACTIONS_READ[tool]
        self.reader = reader

    def of(self, value: Any) -> list[Action]:
        """The actions of a JSON value: a call, or its arguments alone."""
        if not isinstance(value, Mapping):
            self.reader.fail(f"a call must be an object, not {type(value).__name__}")
        name, arguments = call_in(self.reader, value)
        return self._acted(value) if arguments is None else self.called(name, arguments)

    def called(self, name: Any, arguments: Any) -> list[Action]:
        if _NAMES.get(name) != self._tool:
            self.reader.fail(f"there is no tool {name!r:.80}; the tool is {self._tool}")
        if not isinstance(arguments, Mapping):
            self.reader.fail("the arguments of a tool call must be an object")
        return self._acted(arguments)

    def _acted(self, given: Mapping[str, Any]) -> list[Action]:
        name, rest = given.get("action"), {key: value for key, value in given.items() if key != "action"}
        return read_row(self.reader, self._rows, name, rest, _EITHER)
