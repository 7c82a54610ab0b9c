r"""Answers of UI-TARS-2 and of the Seed models with a GUI (1.6 to 2.1): functions in XML.

    <think>The dialog is open.</think>
    <seed:tool_call>
    <function=click>
    <parameter=point><point>512 340</point></parameter>
    </function>
    </seed:tool_call>

Names and fields are those of the functions that ByteDance publishes (omni-tars in bytedance/UI-TARS-desktop, and
OSWorld's mm_agents/seed_agent.py); the words are ours. Points are thousandths. As those do it, `press` holds a key and
`release` lets it go, and a line end at the end of what is typed is the Enter key. In this order:

- **Thought.** All before the first call, without the tags around it: `think`, `thinkt`, `gui_think`, `seed:think`.
- **Calls.** One or more functions, in one `<seed:tool_call>` or several. A name follows as in `<function=click>` or as
  `<function name="click">`; each tag may end with `_never_used_` and a number, as the models' own tokens do.
- **Values.** `<point>x y</point>`, `x y`, `(x, y)`, an object of x and y, or four numbers of a box, whose centre is
  meant. A text that begins on a line of its own ends before its last line end. `<text>` around it is no part of it.
- `<answer>…</answer>` in the place of a call is the end of the task.

Where the server takes the calls out of the text (`CompletionOutput.tool_calls`), their arguments are read the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader
from managed_vllm.agent.actions.rows import SCHEMAS, ActionRow, Field, Values, call_in, functions_of, pressed, read_row
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
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
    ParsedResponse,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError

# -- what the actions are ----------------------------------------------------------------------------------------------


def _typed(values: Values) -> Sequence[Action]:
    text: str = values["content"]
    for end in ("\n", "\\n"):
        if text.endswith(end):
            return (Type(text[: -len(end)], enter=True),)
    return (Type(text),)


def _scrolled(values: Values) -> Sequence[Action]:
    return (Scroll(values["direction"], *(values.get("point") or ())),)


_AT = {"point": Field("point", what="Where")}
_MAYBE_AT = {"point": Field("point", False, "Where; without it, where the pointer is")}
_HELD = {**_MAYBE_AT, "button": Field("button", False, "Of the mouse; without it, left")}
_KEY = {"key": Field("key", what="One key, in lower case")}
SEED_ACTIONS: Mapping[str, ActionRow] = MappingProxyType(
    {
        "click": ActionRow("Click the left button at a point.", _AT, lambda v: pressed(v["point"])),
        "left_double": ActionRow(
            "Click the left button twice at a point.", _AT, lambda v: pressed(v["point"], clicks=2)
        ),
        "right_single": ActionRow(
            "Click the right button at a point.", _AT, lambda v: pressed(v["point"], Button.RIGHT)
        ),
        "drag": ActionRow(
            "Press the left button at the first point, and let it go at the second.",
            {"start_point": Field("point", what="The first"), "end_point": Field("point", what="The second")},
            lambda v: (Drag(*v["start_point"], *v["end_point"]),),
        ),
        "scroll": ActionRow(
            "Turn the wheel.",
            {"direction": Field("direction", what="Where the view moves to"), **_MAYBE_AT},
            _scrolled,
        ),
        "move_to": ActionRow("Move the pointer to a point.", _AT, lambda v: (Move(*v["point"]),)),
        "mouse_down": ActionRow(
            "Press a button of the mouse, and hold it.",
            _HELD,
            lambda v: (MouseDown(v.get("button", Button.LEFT), *(v.get("point") or ())),),
        ),
        "mouse_up": ActionRow(
            "Let a button of the mouse go.",
            _HELD,
            lambda v: (MouseUp(v.get("button", Button.LEFT), *(v.get("point") or ())),),
        ),
        "type": ActionRow(
            "Type text where the focus is.",
            {"content": Field("text", what="The text; a line end at its end is the Enter key")},
            _typed,
        ),
        "hotkey": ActionRow(
            "Press keys together.",
            {"key": Field("keys", what="In lower case, with blanks between them: ctrl c")},
            lambda v: (Hotkey(v["key"]),),
        ),
        "press": ActionRow("Press a key, and hold it.", _KEY, lambda v: (KeyDown(v["key"]),)),
        "release": ActionRow("Let a key go that is held.", _KEY, lambda v: (KeyUp(v["key"]),)),
        "wait": ActionRow(
            "Wait for the screen to change.",
            {"time": Field("seconds", False, "Seconds")},
            lambda v: (Wait(v.get("time")),),
        ),
        "finished": ActionRow(
            "The task is done.",
            {"content": Field("text", False, "The answer, if one is asked for")},
            lambda v: (Finished(v.get("content") or ""),),
        ),
        "call_user": ActionRow(
            "Ask the user.",
            {"content": Field("text", False, "What")},
            lambda v: (CallUser(v.get("content") or ""),),
        ),
        "infeasible": ActionRow(
            "The task can't be done.", {"content": Field("text", what="Why")}, lambda v: (CallUser(v["content"]),)
        ),
        "left_single": ActionRow("", _AT, lambda v: pressed(v["point"])),
        "open_computer": ActionRow("", {}, lambda _: (Noop("the computer is open"),)),
        "take_screenshot": ActionRow("", {}, lambda _: (Noop("a screenshot comes with each turn"),)),
        # phones
        "long_press": ActionRow("", _AT, lambda v: (LongPress(*v["point"]),)),
        "open_app": ActionRow("", {"app_name": Field("text")}, lambda v: (OpenApp(v["app_name"]),)),
        "press_home": ActionRow("", {}, lambda _: (Home(),)),
        "press_back": ActionRow("", {}, lambda _: (Back(),)),
    }
)
"""The functions that are understood, by their names."""


# -- what a model is told ----------------------------------------------------------------------------------------------

_SCHEMAS: Mapping[str, Mapping[str, Any]] = {**SCHEMAS, "point": SCHEMAS["text"], "keys": SCHEMAS["text"]}


def seed_tools(frame: str) -> list[dict[str, Any]]:
    """For `tools=` of a chat request. `frame`: what the numbers of a point are, in words."""
    return functions_of(SEED_ACTIONS, f"written as <point>x y</point>, {frame}", _SCHEMAS)


def seed_functions_in_words(frame: str) -> str:
    """The same for a prompt: a line of JSON for each function, as the models know them."""
    functions = ({"type": "function", **tool["function"]} for tool in seed_tools(frame))
    return "\n".join(json.dumps(function) for function in functions)


# -- parsing -----------------------------------------------------------------------------------------------------------

_SUFFIX = r"(?:_never_used_\w{1,64}+)?+"
_TAG = re.compile(
    rf"<(/?)(seed:tool_call|function|parameter){_SUFFIX}"
    r"(?:(?:\s*+=\s*+|\s++name\s*+=\s*+)[\"']?+([\w.-]{1,40}+)[\"']?+)?+(?:\s[^<>]{0,80}+)?+>"
)
_THINKING = r"think\w{0,80}+|gui_think|seed:think"
_THINKING_BEGIN = re.compile(rf"\s*+<(?:{_THINKING})>")
_THINKING_END = re.compile(rf"</(?:{_THINKING})>")
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TEXT_TAG = re.compile(rf"</?text{_SUFFIX}>")
_OTHER_TAG = re.compile(r"<[^<>]{0,160}+>")
_DECIMAL = r"(-?+[0-9]{1,100}+(?:\.[0-9]{1,100}+)?+)"
_NUMBERS = re.compile(
    rf"[\s(\[]*+{_DECIMAL}[\s,)(\]\[]++{_DECIMAL}(?:[\s,)(\]\[]++{_DECIMAL}[\s,]++{_DECIMAL})?+[\s)\]]*+"
)
_SECONDS = re.compile(r"\s*+([0-9]{1,4}+(?:\.[0-9]{1,3}+)?+)\s*+")


def parse_seed(
    text: str,
    image_size: tuple[int, int],
    *,
    tool_calls: Sequence[Mapping[str, Any]] = (),
    coordinates: Coordinates = "relative1000",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the actions of an answer.

    Args:
        text: the answer.
        image_size: width and height of the screenshot.
        tool_calls: the answer's calls, where the server took them out of the text (`CompletionOutput.tool_calls`); the
            text is the thought then.
        coordinates, options: as for `parse_ui_tars`.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    reader = Reader(Frame.of(image_size, coordinates, **options), text)
    if tool_calls:
        return _of_calls(reader, tool_calls, text)
    begin = _after_thinking(reader)
    scan = _Scan(reader, begin)
    for tag in _TAG.finditer(text, begin):
        scan.take(tag)
    calls = scan.end()
    if not calls:
        return _answered(reader, begin)
    actions: list[Action] = []
    for call in calls:
        reader.span = call.start, call.end
        actions += _read(reader, call.name, call.given)
    return ParsedResponse(_thought(text[: scan.first]), tuple(actions))


def _of_calls(reader: Reader, tool_calls: Sequence[Mapping[str, Any]], thought: str) -> ParsedResponse:
    actions: list[Action] = []
    call: Any
    for call in tool_calls:
        reader.text = json.dumps(call, default=str, ensure_ascii=False)
        reader.span = 0, len(reader.text)
        if not isinstance(call, Mapping):
            reader.fail("a tool call must have a function")
        name, given = call_in(reader, call)
        if not isinstance(given, Mapping | None):
            reader.fail("the arguments of a tool call must be an object")
        actions += _read(reader, name, given or {})
    return ParsedResponse(_thought(thought), tuple(actions))


def _after_thinking(reader: Reader) -> int:
    """Where the answer begins: after what the model thought, whose first tag the prompt may hold."""
    text = reader.text
    opened, closed = _THINKING_BEGIN.match(text), _THINKING_END.search(text)
    if opened is not None and closed is None:
        reader.fail("the answer was cut off while the model was thinking: allow it more tokens")
    if closed is None:
        return 0
    call = _TAG.search(text)
    return closed.end() if opened is not None or call is None or closed.start() < call.start() else 0


def _thought(text: str) -> str:
    opened = _THINKING_BEGIN.match(text)
    text = text[opened.end() :] if opened is not None else text
    return "\n".join(filter(None, (part.strip() for part in _THINKING_END.split(text, maxsplit=1))))


def _answered(reader: Reader, begin: int) -> ParsedResponse:
    text = reader.text
    answer = _ANSWER.search(text, begin)
    if answer is not None:
        reader.span = answer.span()
        return ParsedResponse(_thought(text[: answer.start()]), (Finished(reader.string(answer[1].strip(), "answer")),))
    said = text[begin:].strip()
    reader.span = begin, len(text)
    missing = "the answer has no action; it needs a call such as <seed:tool_call><function=click>…"
    reader.fail(missing if said else "the answer is empty")


class _Call(NamedTuple):
    """A function with its arguments as they are written, and its place."""

    name: str
    given: dict[str, str]
    start: int
    end: int


class _Scan:
    """The tags of an answer, one after the other, to calls."""

    def __init__(self, reader: Reader, begin: int) -> None:
        self.first = begin
        self._text = reader.text
        self._calls: list[_Call] = []
        self._function: tuple[str, int] | None = None
        self._given: dict[str, str] = {}
        self._parameter: tuple[str, int] | None = None
        self._depth = 0
        self._opened: int | None = None

    def take(self, tag: re.Match[str]) -> None:
        """The next tag."""
        if self._parameter is not None:
            self._within_parameter(tag)
        elif self._function is not None:
            self._within_function(tag)
        else:
            self._outside(tag)

    def end(self) -> list[_Call]:
        """The calls, once there is no further tag. Raises `ActionParseError`: one is not closed."""
        if self._function is not None:
            self._fail("the answer was cut off within its tool call", self._function[1])
        if self._opened is not None:
            self._fail("a tool call is empty, or was cut off", self._opened)
        return self._calls

    def _fail(self, message: str, start: int, end: int | None = None) -> NoReturn:
        raise ActionParseError(message, text=self._text, span=(start, len(self._text) if end is None else end))

    def _outside(self, tag: re.Match[str]) -> None:
        if tag[2] == "seed:tool_call" and not tag[1]:
            self._opened = tag.start()
        elif tag[2] == "function" and not tag[1]:
            if tag[3] is None:
                self._fail("a function has no name", *tag.span())
            self._after_last(tag.start())
            self._function, self._given = (tag[3], tag.start()), {}
        elif tag[2] != "seed:tool_call":
            self._fail(f"{tag[0][:80]} stands in no function", *tag.span())

    def _after_last(self, start: int) -> None:
        """Nothing may stand between two calls but the tags around them."""
        if not self._calls:
            self.first = start if self._opened is None else self._opened
        elif _TAG.sub("", self._text[self._calls[-1].end : start]).strip():
            message = "text stands between two actions, so it can't be told whether both are meant"
            self._fail(message, self._calls[-1].end, start)
        self._opened = None

    def _within_function(self, tag: re.Match[str]) -> None:
        assert self._function is not None
        if tag[2] == "parameter" and not tag[1] and tag[3] is not None:
            if tag[3] in self._given:
                self._fail(f"the parameter {tag[3]} is there twice", *tag.span())
            self._parameter, self._depth = (tag[3], tag.end()), 1
        elif tag[2] == "function" and tag[1]:
            name, start = self._function
            self._calls.append(_Call(name, self._given, start, tag.end()))
            self._function = None
        else:
            self._fail(f"{tag[0][:80]} can't stand here: the function before it is not closed", *tag.span())

    def _within_parameter(self, tag: re.Match[str]) -> None:
        """Only its own end means anything: a text may have any tags in it."""
        assert self._parameter is not None
        if tag[2] != "parameter":
            return
        self._depth += -1 if tag[1] else 1
        if self._depth == 0:
            name, start = self._parameter
            self._given[name] = self._text[start : tag.start()]
            self._parameter = None


# -- values ------------------------------------------------------------------------------------------------------------


def _read(reader: Reader, name: Any, given: Mapping[str, Any]) -> list[Action]:
    row = SEED_ACTIONS.get(name) if isinstance(name, str) else None
    fields: Mapping[str, Field] = {} if row is None else row.fields
    kinds = {key: field.kind for key, field in fields.items()}
    values = {key: _plain(reader, kinds.get(key), value, f"{key} of {name}") for key, value in given.items()}
    return read_row(reader, SEED_ACTIONS, name, values)


def _plain(reader: Reader, kind: str | None, value: Any, where: str) -> Any:
    """A value as `read_row` takes it."""
    if kind == "point":
        return _point(reader, value, where)
    if not isinstance(value, str):
        return value
    if kind == "text":
        return _inner(value)
    value = _TEXT_TAG.sub("", value).strip()
    if kind == "seconds" and (match := _SECONDS.fullmatch(value)) is not None:
        return float(match[1])
    return value


def _inner(value: str) -> str:
    if value.startswith("\n"):  # on lines of its own
        value = value[1:].removesuffix("\n")
    begin, end = _TEXT_TAG.match(value), None
    if begin is not None:
        *_, end = _TEXT_TAG.finditer(value)
    return value if begin is None or end is None or end.end() < len(value) else value[begin.end() : end.start()]


def _point(reader: Reader, value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and value.keys() == {"x", "y"}:
        return [value["x"], value["y"]]
    if not isinstance(value, str):
        return value
    names = [tag[3] for tag in _TAG.finditer(value) if not tag[1]]
    match = _NUMBERS.fullmatch(_OTHER_TAG.sub(" ", value))
    if match is None or names not in ([], ["x", "y"]):
        reader.fail(f"{where} must be <point>x y</point>, not {value.strip()[:80]!r}")
    x, y, *corner = (float(part) if "." in part else int(part) for part in match.groups() if part is not None)
    return [(x + corner[0]) / 2, (y + corner[1]) / 2] if corner else [x, y]
