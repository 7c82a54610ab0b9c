"""Answers of H's Holo models: a note, a thought and an action as JSON, or tool calls.

    {"note": "", "thought": "I click OK.", "action": {"action": "click_element", "element": "OK", "x": 657, "y": 318}}

    {"note": null, "thought": "I click OK.", "tool_call": {"tool_name": "click", "element": "OK", "x": 932, "y": 880}}

- Holo1 and Holo1.5 control a browser by the first (names and fields of hcompai/hai-cookbook, utils/navigation.py), in
  pixels of the picture as they see it. Where they are asked for a place only, they say `click(932, 880)` (Holo1) or
  `{"action": "click_absolute", "x": 932, "y": 880}` (Holo1.5); both are read.
- Holo3 answers by the second, in thousandths; Holo3.1 by the same, or by tool calls (hub.hcompany.ai/agent-loop). H
  publishes the tools `click`, `write` and `answer`, and says that an agent brings more of that shape: the further ones
  here are ours.

The words are ours. The thought is note and thought, in this order.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader, begin_of, values_in
from managed_vllm.agent.actions.quiet_ast import parsed_expression
from managed_vllm.agent.actions.rows import (
    ActionRow,
    Field,
    Values,
    call_in,
    functions_of,
    pressed,
    read_row,
    schema_of,
    told,
)
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    Click,
    Custom,
    Drag,
    Finished,
    Hotkey,
    Move,
    OpenURL,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
)

Holo = Literal["holo1.5", "holo3"]
"""Whose answers: those of Holo1 and Holo1.5, or those of Holo3 and Holo3.1."""

_WAIT_S = 2.0
"""Of Holo1's `wait`, as its fields say."""


# -- what the actions are ----------------------------------------------------------------------------------------------


def _written(values: Values) -> Sequence[Action]:
    tapped = [Click(*values["at"])] if "at" in values else []
    return (*tapped, Type(values["content"], enter=values.get("press_enter", False)))


def _scrolled(values: Values) -> Sequence[Action]:
    x, y = values.get("at") or (None, None)
    return (Scroll(values["direction"], x, y, values.get("amount")),)


_ELEMENT = {"element": Field("ignored", what="What is there, in words")}
_MAYBE_ELEMENT = {"element": Field("ignored", False, "What is there, in words")}
_AT = {**_ELEMENT, "at": Field("point")}
_MAYBE_AT = {**_MAYBE_ELEMENT, "at": Field("point", False)}
_PLACE = {**_MAYBE_ELEMENT, "at": Field("point")}
_GOTO = ActionRow(
    "Open an address in the browser.",
    {"url": Field("text", what="Beginning with http:// or https://")},
    lambda v: (OpenURL(v["url"]),),
)
_GO_BACK = ActionRow("Go back to the page before.", {}, lambda _: (Back(),))
_ANSWER = ActionRow(
    "End the task, with the answer.", {"content": Field("text", what="The answer")}, lambda v: (Finished(v["content"]),)
)
_HOLO1_5: Mapping[str, ActionRow] = {
    "click_element": ActionRow("Click at a point.", _AT, lambda v: pressed(v["at"])),
    "write_element_abs": ActionRow(
        "Click at a point, write there, and press Enter.",
        {"content": Field("text", what="What to write"), **_AT},
        lambda v: (*pressed(v["at"]), Type(v["content"], enter=True)),
    ),
    "scroll": ActionRow(
        "Scroll the page.",
        {"direction": Field("direction", what="Where the view moves to")},
        lambda v: (Scroll(v["direction"]),),
    ),
    "go_back": _GO_BACK,
    "refresh": ActionRow("Load the page again.", {}, lambda _: (Hotkey(("f5",)),)),
    "goto": _GOTO,
    "wait": ActionRow(
        "Wait for the page to change.",
        {"seconds": Field("seconds", False, f"Seconds; {_WAIT_S:g} if they are missing")},
        lambda v: (Wait(v.get("seconds", _WAIT_S)),),
    ),
    "restart": ActionRow("Begin the task again.", {}, lambda _: (Custom("restart"),)),
    "answer": _ANSWER,
    # where a place is asked for
    "click_absolute": ActionRow("", _PLACE, lambda v: pressed(v["at"])),
    "click": ActionRow("", _PLACE, lambda v: pressed(v["at"])),
}
_HOLO3: Mapping[str, ActionRow] = {
    "click": ActionRow("Click the left button at a point.", _AT, lambda v: pressed(v["at"])),
    "double_click": ActionRow("Click the left button twice at a point.", _AT, lambda v: pressed(v["at"], clicks=2)),
    "right_click": ActionRow("Click the right button at a point.", _AT, lambda v: pressed(v["at"], Button.RIGHT)),
    "move": ActionRow("Move the pointer to a point.", _AT, lambda v: (Move(*v["at"]),)),
    "drag": ActionRow(
        "Press the left button at the first point, and let it go at the second.",
        {**_ELEMENT, "at": Field("point", what="The first"), "to": Field("point", what="The second")},
        lambda v: (Drag(*v["at"], *v["to"]),),
    ),
    "write": ActionRow(
        "Write text where the focus is; with a point, click there first.",
        {
            "content": Field("text", what="What to write"),
            **_MAYBE_AT,
            "press_enter": Field("truth", False, "Press Enter after it"),
        },
        _written,
    ),
    "hotkey": ActionRow(
        "Press keys together.",
        {"keys": Field("keys", what='In lower case: ["ctrl", "c"]')},
        lambda v: (Hotkey(v["keys"]),),
    ),
    "scroll": ActionRow(
        "Turn the wheel; with a point, there.",
        {
            "direction": Field("direction", what="Where the view moves to"),
            **_MAYBE_AT,
            "amount": Field("amount", False, "Steps of the wheel"),
        },
        _scrolled,
    ),
    "goto": _GOTO,
    "go_back": _GO_BACK,
    "wait": ActionRow(
        "Wait for the screen to change.",
        {"seconds": Field("seconds", False, "Seconds")},
        lambda v: (Wait(v.get("seconds")),),
    ),
    "answer": _ANSWER,
}
HOLO_ACTIONS: Mapping[Holo, Mapping[str, ActionRow]] = MappingProxyType(
    {"holo1.5": MappingProxyType(_HOLO1_5), "holo3": MappingProxyType(_HOLO3)}
)
"""The actions of each, by their names; `at` stands for x and y, `to` for to_x and to_y."""
_PAIRS = (("x", "y", "at"), ("to_x", "to_y", "to"))


# -- what a model is told ----------------------------------------------------------------------------------------------

_TAGS: Mapping[Holo, tuple[str, str]] = {"holo1.5": ("action", "action"), "holo3": ("tool_call", "tool_name")}
"""The field of an answer that the action is in, and the field of that which names it."""


def holo_tools(frame: str) -> list[dict[str, Any]]:
    """Holo3.1's actions, for `tools=` of a chat request. `frame`: what the numbers of a point are, in words."""
    return functions_of(_HOLO3, frame, pairs=_PAIRS)


def holo_json_schema(version: Holo = "holo3", frame: str = "0 to 1000") -> dict[str, Any]:
    """The JSON schema of an answer: for the prompt, and for structured outputs, which H recommends for Holo3:
    `{"structured_outputs": {"json": holo_json_schema()}}`.

    Args:
        version: whose answers.
        frame: what the numbers of a point are, in words.
    """
    where, tag = _TAGS[version]
    forms = []
    for name, row in told(HOLO_ACTIONS[version]).items():
        fields = schema_of(row, frame, pairs=_PAIRS)
        forms.append(
            {
                "type": "object",
                "description": row.what,
                "properties": {tag: {"type": "string", "enum": [name]}, **fields.get("properties", {})},
                "required": [tag, *fields.get("required", [])],
                "additionalProperties": False,
            }
        )
    note = "What is on the screen that later steps need; null if there is nothing new"
    return {
        "type": "object",
        "properties": {
            "note": {"type": ["string", "null"], "description": note},
            "thought": {"type": "string", "description": "What to do next, and why, in a line"},
            where: {"anyOf": forms},
        },
        "required": ["note", "thought", where],
        "additionalProperties": False,
    }


# -- parsing -----------------------------------------------------------------------------------------------------------

_BEGIN = begin_of(("note", "thought", "action", "tool_call", "tool_name", "name", "function"))
_EXAMPLES: Mapping[Holo, str] = {
    "holo1.5": '{"note": "", "thought": "…", "action": {"action": "click_element", "element": "…", "x": 1, "y": 2}}',
    "holo3": '{"note": null, "thought": "…", "tool_call": {"tool_name": "click", "element": "…", "x": 1, "y": 2}}',
}
_PLACED = re.compile(r"\b[Cc]lick(?:_absolute)?\(([^()]{0,100}+)\)")


def parse_holo(
    text: str,
    image_size: tuple[int, int],
    *,
    version: Holo = "holo3",
    tool_calls: Sequence[Mapping[str, Any]] = (),
    coordinates: Coordinates | None = None,
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The note with the thought, and the actions of an answer.

    Args:
        text: the answer.
        image_size: width and height of the screenshot.
        version: whose answer it is.
        tool_calls: the answer's calls, of Holo3.1; the text is the thought then.
        coordinates: None: pixels of the picture with Holo1.5, thousandths with Holo3.
        options: as for `parse_ui_tars`.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    own: Coordinates = "resized" if version == "holo1.5" else "relative1000"
    answer = _Answer(Reader(Frame.of(image_size, coordinates or own, **options), text), version)
    if tool_calls:
        return answer.of_calls(tool_calls)
    if "{" not in text and (place := _PLACED.search(text)) is not None:
        return answer.of_place(place)
    return answer.of_json()


class _Answer:
    """An answer while it is read."""

    def __init__(self, reader: Reader, version: Holo) -> None:
        self._reader = reader
        self._version: Holo = version
        self._rows = HOLO_ACTIONS[version]
        self._thoughts: list[str] = []

    def of_calls(self, tool_calls: Sequence[Mapping[str, Any]]) -> ParsedResponse:
        reader, actions = self._reader, []
        self._thoughts.append(reader.text)
        call: Any
        for call in tool_calls:
            reader.text = json.dumps(call, default=str, ensure_ascii=False)
            reader.span = 0, len(reader.text)
            if not isinstance(call, Mapping):
                reader.fail("a tool call must have a function")
            actions += self._called(*call_in(reader, call))
        return self._parsed(actions)

    def of_place(self, place: re.Match[str]) -> ParsedResponse:
        """`click(932, 880)`, or with names."""
        self._thoughts.append(self._reader.text[: place.start()])
        self._reader.span = place.span()
        names = ("x", "y")
        try:
            call: Any = parsed_expression(place[0])
            given = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
            given |= dict(zip(names if call.args else (), map(ast.literal_eval, call.args), strict=True))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            given = {}
        if given.keys() != set(names):
            self._reader.fail(f"a place is click(x, y), not {place[0]!r:.80}")
        return self._parsed(self._acted("click", given))

    def of_json(self) -> ParsedResponse:
        reader, actions = self._reader, []
        before, found = values_in(reader.text, _BEGIN, _EXAMPLES[self._version])
        self._thoughts.append(before)
        for value, start, end in found:
            reader.span = start, end
            actions += self._value(value)
        return self._parsed(actions)

    def _parsed(self, actions: Sequence[Action]) -> ParsedResponse:
        said = (thought.strip() for thought in self._thoughts)
        return ParsedResponse("\n".join(filter(None, said)), tuple(actions))

    def _value(self, value: Any) -> list[Action]:
        """A whole answer, or the action alone."""
        where, tag = _TAGS[self._version]
        if not isinstance(value, Mapping):
            self._reader.fail(f"an answer must be an object, not {type(value).__name__}")
        if isinstance(value.get(where), Mapping):
            self._think(value, {"note", "thought", where})
            value = value[where]
        if tag in value:
            return self._acted(value[tag], {key: each for key, each in value.items() if key != tag})
        name, given = call_in(self._reader, value)
        if name is None:
            self._reader.fail(f"the answer has no {where}, such as {_EXAMPLES[self._version]}")
        return self._called(name, given)

    def _think(self, value: Mapping[str, Any], known: set[str]) -> None:
        for key in value.keys() - known:
            self._reader.fail(f"an answer has no field {key!r:.80}; its fields are {', '.join(sorted(known))}")
        for key in ("note", "thought"):
            if value.get(key) is not None:
                self._thoughts.append(self._reader.string(value[key], key))

    def _called(self, name: Any, given: Any) -> list[Action]:
        if not isinstance(given, Mapping | None):
            self._reader.fail("the arguments of a tool call must be an object")
        return self._acted(name, given or {})

    def _acted(self, name: Any, given: Mapping[str, Any]) -> list[Action]:
        row = self._rows.get(name) if isinstance(name, str) else None
        unnamed = {"element": ""} if row is not None and "element" in row.fields else {}
        return read_row(self._reader, self._rows, name, {**unnamed, **given}, pairs=_PAIRS)
