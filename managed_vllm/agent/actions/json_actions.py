"""Actions as JSON, for models that are not UI-TARS: in the text of an answer, or as OpenAI's tool calls.

    The dialog is open.
    {"thought": "I click OK.", "action": "click", "x": 197, "y": 525}

The actions are those of `table`. `ACTION_TOOLS` describes them for `tools=`, `ACTION_JSON_SCHEMA` for structured
outputs (`{"structured_outputs": {"json": ACTION_JSON_SCHEMA}}`); `parse_tool_calls` and `parse_json_actions` read the
answers. In a text there may be


- one object, a list of them, or several one after the other (lines of JSON): the actions, in their order;
- `{"thought": …, "actions": [ … ]}`;
- `{"name": "click", "arguments": {…}}`, a tool call that no parser took out of the text, in `<tool_call>` tags or not;
- before it, text, which is thought; around it, Markdown fences; after it, text without a further action.

What can't be told without a doubt is an `ActionParseError`: an unknown action or field, a field twice or of the wrong
type, text between two actions, JSON that is cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn

from managed_vllm.agent.actions.coordinates import (
    FACTOR,
    MAX_PIXELS,
    MIN_PIXELS,
    Coordinates,
    Frame,
    OffScreen,
    OffScreenError,
)
from managed_vllm.agent.actions.keys import key_of, keys_of
from managed_vllm.agent.actions.table import ACTIONS, KINDS, Field
from managed_vllm.agent.actions.values import Action, Button, Direction, ParsedResponse
from managed_vllm.errors import ActionParseError


def parse_json_actions(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "absolute",
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = FACTOR,
    off_screen: OffScreen = "error",
    picture: tuple[int, int] | None = None,
) -> ParsedResponse:
    """The thought and the actions of an answer that has JSON in it. The other arguments are `parse_ui_tars`'s.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(
        image_size,
        coordinates,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        factor=factor,
        off_screen=off_screen,
        picture=picture,
    )
    reader = Reader(frame, text)
    before, values = values_in(text)
    thoughts = [before]
    actions: list[Action] = []
    for value, start, end in values:
        reader.span = start, end
        thought, found = reader.value(value)
        thoughts.append(thought)
        actions += found
    return ParsedResponse("\n".join(thought for thought in thoughts if thought), tuple(actions))


def parse_tool_calls(
    tool_calls: Sequence[Mapping[str, Any]],
    image_size: tuple[int, int],
    *,
    thought: str = "",
    coordinates: Coordinates = "absolute",
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = FACTOR,
    off_screen: OffScreen = "error",
    picture: tuple[int, int] | None = None,
) -> ParsedResponse:
    """The actions of tool calls, as `CompletionOutput.tool_calls` has them.

    Args:
        tool_calls: dicts of OpenAI's shape: `{"type": "function", "function": {"name": …, "arguments": "{…}"}}`.
        thought: the text beside them (`CompletionOutput.text`, or its `reasoning`).

    Raises `ActionParseError`: no call, an unknown function, arguments that are no JSON or don't fit. Its `text` is the
    call as JSON.
    """
    frame = Frame.of(
        image_size,
        coordinates,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        factor=factor,
        off_screen=off_screen,
        picture=picture,
    )
    if not tool_calls:
        raise ActionParseError("the answer calls no tool", text=thought, span=(0, len(thought)))
    thoughts = [thought.strip()]
    actions: list[Action] = []
    call: Any
    for call in tool_calls:
        reader = Reader(frame, json.dumps(call, default=str, ensure_ascii=False))
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            reader.fail("a tool call must have a function")
        said, action = reader.called(function.get("name"), function.get("arguments"))
        thoughts.append(said)
        actions.append(action)
    return ParsedResponse("\n".join(each for each in thoughts if each), tuple(actions))


# -- schemas -----------------------------------------------------------------------------------------------------------


def action_tools(coordinates: Coordinates = "absolute") -> list[dict[str, Any]]:
    """For `tools=` of a chat request: one function for each action.

    `coordinates`: the frame that the points are described in, as for `parse_tool_calls`.
    """
    x, y = _POINT_IN_WORDS[coordinates]

    def parameters(fields: Mapping[str, Field]) -> dict[str, Any]:
        words = {key: {"x": f"{x} {field.what}", "y": f"{y} {field.what}"} for key, field in fields.items()}
        return {
            "type": "object",
            "properties": {
                key: {**KINDS[field.kind].schema, "description": words[key].get(field.kind, field.what)}
                for key, field in fields.items()
            },
            "required": [key for key, field in fields.items() if field.required],
            "additionalProperties": False,
        }

    return [
        {
            "type": "function",
            "function": {"name": name, "description": kind.what, "parameters": parameters(kind.fields)},
        }
        for name, kind in ACTIONS.items()
    ]


_POINT_IN_WORDS: dict[str, tuple[str, str]] = {
    "absolute": (
        "pixels of the screenshot from its left edge,",
        "pixels of the screenshot from its top edge,",
    ),
    "resized": ("pixels of the picture from its left edge,", "pixels of the picture from its top edge,"),
    "relative1": (
        "0 at the left edge of the screen to 1 at its right edge,",
        "0 at the top of the screen to 1 at its bottom,",
    ),
    "relative1000": (
        "0 at the left edge of the screen to 1000 at its right edge,",
        "0 at the top of the screen to 1000 at its bottom,",
    ),
}

ACTION_TOOLS: list[dict[str, Any]] = action_tools()
"""`action_tools()`: coordinates in pixels of the screenshot."""


def action_json_schema(
    size: tuple[int, int] = (10_000, 10_000), *, actions: Iterable[str] = tuple(ACTIONS), max_text: int = 200
) -> dict[str, Any]:
    """A JSON schema of one action with a thought, all of it bounded, for structured outputs.

    Args:
        size: x goes from 0 to `size[0] - 1`, y to `size[1] - 1`, whole numbers, in the model's frame.
        actions: the names that are allowed.
        max_text: characters of a text, and of the thought.

    A model with random weights fills JSON with blanks until it is cut off, unless the server is told not to:
    `--structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'`.
    """
    names = list(dict.fromkeys(actions))
    if not names or not set(names) <= ACTIONS.keys():
        raise ValueError(f"actions must be some of {', '.join(ACTIONS)}, not {names!r:.200}")
    text = {"type": "string", "maxLength": max_text}
    key = {"type": "string", "enum": list(_COMMON_KEYS)}
    schemas: dict[str, Mapping[str, Any]] = {
        **{kind: its.schema for kind, its in KINDS.items()},
        "x": {"type": "integer", "minimum": 0, "maximum": size[0] - 1},
        "y": {"type": "integer", "minimum": 0, "maximum": size[1] - 1},
        "text": text,
        "seconds": {"type": "integer", "minimum": 0, "maximum": 60},
        "key": key,
        "keys": {**KINDS["keys"].schema, "items": key},
    }
    forms = []
    for name in names:
        fields = ACTIONS[name].fields
        properties = {"thought": text, "action": {"type": "string", "enum": [name]}}
        properties |= {key: dict(schemas[field.kind]) for key, field in fields.items()}
        required = ["thought", "action", *(key for key, field in fields.items() if field.required)]
        forms.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
        if name == "scroll":
            # x without y means nothing, and a schema can't say "both or none" to every backend.
            forms[-1]["required"] = [*required, "x", "y"]
    return {"anyOf": forms}


_COMMON_KEYS = (
    *("ctrl", "alt", "shift", "win", "enter", "tab", "esc", "space", "backspace", "delete", "up", "down", "left"),
    *("right", "pageup", "pagedown", "home", "end", "f5", *"abcdefghijklmnopqrstuvwxyz0123456789"),
)

ACTION_JSON_SCHEMA: dict[str, Any] = action_json_schema()
"""`action_json_schema()`: coordinates from 0 to 9999, texts of 200 characters."""


# -- JSON in a text ----------------------------------------------------------------------------------------------------

_WORDS = {"thought", "action", "actions", "type", "name", "function", "arguments"}
_WORDS |= {key for kind in ACTIONS.values() for key in kind.fields}


def begin_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds an object, or a list of such, whose first field is one of these: braces in a thought are none."""
    return re.compile(rf'(?:\[\s*+)?\{{\s*+"(?:{"|".join(sorted(words))})"')


_BEGIN = begin_of(_WORDS)
_EXAMPLE = '{"action": "click", "x": 1, "y": 2}'
_BETWEEN = re.compile(r"(?:[\s,;]++|`{3,}+(?:\w{1,20}+(?=\s))?|</?tool_calls?>|<\|\w{1,40}\|>|</s>|\[EOS\])*+")
_FENCE_AT_END = re.compile(r"(?:`{3,}\w{0,20}|<tool_calls?>)\s*\Z")
_THOUGHT_LABEL = re.compile(r"\A\s*+(?:Thought|Reasoning)[:：]\s*+", re.IGNORECASE)
_ACTION_LABEL = re.compile(r"(?:\A|\n)[ \t*#]{0,8}Actions?[*]{0,2}[:：]?[*]{0,2}\s*\Z", re.IGNORECASE)


def each_of(value: Any) -> list[Any]:
    """The calls in one JSON value: a list of them, or one. Lists in lists are none: models write them without end."""
    return value if isinstance(value, list) and value else [value]


def values_in(
    text: str, begins: re.Pattern[str] = _BEGIN, example: str = _EXAMPLE
) -> tuple[str, list[tuple[Any, int, int]]]:
    """The thought before the JSON, and each JSON value with its span.

    Args:
        text: the answer.
        begins: what JSON begins with, where it does not begin the text (`begin_of`).
        example: of such JSON, for the error.
    """
    begin = 0
    if text.lstrip().startswith("<think>"):
        begin = text.find("</think>")
        if begin < 0:
            _fail("the answer was cut off while the model was thinking: allow it more tokens", text, 0, len(text))
    value, start, end = _first(text, begin, begins, example)
    values = [(value, start, end)]
    while True:
        gap = _BETWEEN.match(text, end)
        assert gap is not None
        at = gap.end()
        if at == len(text):
            break
        if text[at] not in "[{":
            if begins.search(text, at):
                _fail("text stands between two actions, so it can't be told whether both are meant", text, at)
            break
        value, end = _decoded(text, at)
        values.append((value, at, end))
    return _before(text[:start]), values


def _first(text: str, begin: int, begins: re.Pattern[str], example: str) -> tuple[Any, int, int]:
    at = len(text) - len(text[begin:].lstrip())
    if text[at : at + 1] not in ("{", "["):
        match = begins.search(text, begin)
        if match is None:
            if not text.strip():
                _fail("the answer is empty", text, 0, len(text))
            _fail(f"the answer has no action; it needs JSON such as {example}", text, begin, len(text))
        at = match.start()
    value, end = _decoded(text, at)
    return value, at, end


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        # "Unterminated string" is told of its beginning.
        cut = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        why = "the answer was cut off within its JSON" if cut else f"this is no JSON: {error.msg}"
        _fail(why, text, at if cut else error.pos, len(text) if cut else error.pos + 1)
    except RecursionError:
        _fail("this JSON is nested too deeply", text, at)
    except ValueError as error:
        _fail(f"this JSON can't be taken: {error}", text, at)
    return value, end


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a field is there twice")
    return values


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int:
    if len(digits) > 400:  # int() has a limit of its own, whose message speaks to programmers
        raise ValueError("a number has too many digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer)


def _before(text: str) -> str:
    """The text before the JSON without labels, fences and tags."""
    text = re.sub(r"</?think>", "", text, count=2) if text.lstrip().startswith("<think>") else text
    for last in (_FENCE_AT_END, _ACTION_LABEL):
        text = text.rstrip()
        head, tail = text[:-_TAIL], text[-_TAIL:]
        text = head + last.sub("", tail)
    return _THOUGHT_LABEL.sub("", text).strip()


_TAIL = 60
"""What stands at the end of a text is looked for in so many characters: that is linear."""


def _fail(message: str, text: str, start: int, end: int | None = None) -> NoReturn:
    if end is None:
        line = text.find("\n", start)
        end = len(text) if line < 0 else line
    raise ActionParseError(message, text=text, span=(start, max(start, end)))


# -- from values to actions --------------------------------------------------------------------------------------------


class Reader:
    """Values of JSON to actions; what is wrong is reported with `span` of `text`."""

    def __init__(self, frame: Frame, text: str) -> None:
        self.frame = frame
        self.text = text
        self.span = 0, len(text)

    def fail(self, message: str) -> NoReturn:
        raise ActionParseError(message, text=self.text, span=self.span)

    def value(self, value: Any) -> tuple[str, list[Action]]:
        if isinstance(value, list):
            items = value
            thoughts = []
        elif isinstance(value, dict) and "actions" in value:
            more = value.keys() - {"thought", "actions"}
            if more or not isinstance(value["actions"], list):
                self.fail('expected {"thought": …, "actions": [ … ]} and nothing else')
            items = value["actions"]
            thoughts = [self._thought(value)]
        else:
            items = [value]
            thoughts = []
        if not items:
            self.fail("the list of actions is empty")
        actions = []
        for item in items:
            thought, action = self._one(item)
            thoughts.append(thought)
            actions.append(action)
        return "\n".join(thought for thought in thoughts if thought), actions

    def called(self, name: Any, arguments: Any) -> tuple[str, Action]:
        """A tool call. Its arguments are JSON in a text, or a dict."""
        if isinstance(arguments, str):
            try:
                arguments = _DECODER.decode(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                self.fail(f"the arguments of the tool call are no JSON: {error}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            self.fail("the arguments of a tool call must be an object")
        return self._action(name, arguments)

    def _one(self, item: Any) -> tuple[str, Action]:
        if not isinstance(item, dict):
            self.fail(f"an action must be an object, not {type(item).__name__}")
        if isinstance(item.get("function"), dict):  # OpenAI's shape, written out
            item = item["function"]
        if "arguments" in item:
            said = self._thought(item)
            more = item.keys() - {"thought", "name", "arguments"}
            if more:
                self.fail(f"a call has no field {min(more)!r:.80}")
            thought, action = self.called(item.get("name"), item["arguments"])
            return said or thought, action
        tags = [tag for tag in ("action", "type", "name") if tag in item]
        if not tags:
            self.fail('the action has no name: "action" is missing')
        rest = {key: value for key, value in item.items() if key != tags[0]}
        return self._action(item[tags[0]], rest)

    def _thought(self, values: Mapping[str, Any]) -> str:
        thought = values.get("thought")
        if thought is not None and not isinstance(thought, str):
            self.fail("thought must be text")
        return (thought or "").strip()

    def _action(self, name: Any, given: Mapping[str, Any]) -> tuple[str, Action]:
        if not isinstance(name, str) or name not in ACTIONS:
            self.fail(f"there is no action {name!r:.80}; the actions are {', '.join(ACTIONS)}")
        fields = ACTIONS[name].fields
        thought = self._thought(given)
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key == "thought":
                continue
            if key not in fields:
                self.fail(f"{name} has no field {key!r:.80}; its fields are {', '.join(fields) or 'none'}")
            field = fields[key]
            if value is None and not field.required:
                continue
            values[key] = _READ[field.kind](self, value, f"{key} of {name}")
        for key, field in fields.items():
            if field.required and key not in values:
                self.fail(f"{name} needs {key}")
        for x, y in (("x", "y"), ("to_x", "to_y")):
            if (x in values) != (y in values):
                self.fail(f"{name} needs both {x} and {y}, or none of them")
            if x in values:
                try:
                    values[x], values[y] = self.frame.point(values[x], values[y])
                except OffScreenError as error:
                    self.fail(f"the point is off the screen: {error}")
        return thought, ACTIONS[name].make(**values)

    # -- kinds of values

    def number(self, value: Any, where: str) -> Fraction:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{where} must be a number")
        try:
            return Fraction(value)
        except (OverflowError, ValueError):
            self.fail(f"{where} must be a finite number")

    def decimal(self, value: Any, where: str) -> Fraction:
        """The number as it was written: 0.34 is 34/100."""
        self.number(value, where)
        return Fraction(repr(value))

    def whole(self, value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
            self.fail(f"{where} must be an integer from 1 to 1000")
        return value

    def seconds(self, value: Any, where: str) -> float:
        seconds = self.number(value, where)
        if not 0 <= seconds <= 3600:
            self.fail(f"{where} must be from 0 to 3600")
        return float(seconds)

    def truth(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            self.fail(f"{where} must be true or false")
        return value

    def string(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self.fail(f"{where} must be text")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(f"{where} has half of a surrogate pair, which is no character")
        return value

    def button(self, value: Any, where: str) -> Button:
        try:
            return Button(value)
        except ValueError:
            self.fail(f"{where} must be one of {', '.join(Button)}")

    def direction(self, value: Any, where: str) -> Direction:
        try:
            return Direction(value)
        except ValueError:
            self.fail(f"{where} must be one of {', '.join(Direction)}")

    def key(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or key_of(value) is None:
            self.fail(f"{where} must be the name of a key, not {str(value)[:40]!r}")
        return value.lower()

    def keys(self, value: Any, where: str) -> tuple[str, ...]:
        try:
            if isinstance(value, str):
                return keys_of(value)
            if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
                for name in value:
                    if key_of(name) is None:
                        raise ValueError(f"{name[:40]!r} is no key")
                return tuple(name.lower() for name in value)
        except ValueError as error:
            self.fail(f"{where}: {error}")
        self.fail(f'{where} must be a list of names, such as ["ctrl", "c"]')


_READ: dict[str, Callable[[Reader, Any, str], Any]] = {
    "x": Reader.number,
    "y": Reader.number,
    "clicks": Reader.whole,
    "amount": Reader.whole,
    "seconds": Reader.seconds,
    "truth": Reader.truth,
    "text": Reader.string,
    "button": Reader.button,
    "direction": Reader.direction,
    "key": Reader.key,
    "keys": Reader.keys,
}
