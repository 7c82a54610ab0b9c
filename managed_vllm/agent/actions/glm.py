"""Answers of GLM-4.5V, GLM-4.6V (computers) and AutoGLM-Phone (phones): a call in the text.

    The dialog is open.
    Action: left_click(start_box='[512,340]', element_info='OK')

    <think>…</think><answer>do(action="Tap", element=[512,340])</answer>

The actions and their fields are those of the models' published prompts (the PC agent in zai-org/GLM-V's README, and
zai-org/Open-AutoGLM's phone_agent); the words here are ours. GLM puts the call between `<|begin_of_box|>` and
`<|end_of_box|>`, or after `Action:`; AutoGLM into `<answer>`, or at the end. The call is parsed by `ast`, its arguments
are constants, and nothing is executed. Numbers of a point are thousandths (0 to 999).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader
from managed_vllm.agent.actions.quiet_ast import parsed_expression
from managed_vllm.agent.actions.rows import ActionRow, Field, Values, pressed, read_row
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
    Custom,
    Drag,
    Finished,
    Home,
    Hotkey,
    LongPress,
    Move,
    Noop,
    OpenApp,
    ParsedResponse,
    Scroll,
    Swipe,
    Type,
    Wait,
)

_WAIT_S = 5.0
"""Of GLM's `WAIT()`, as its prompt says."""


# -- computers ---------------------------------------------------------------------------------------------------------


def _click(button: Button, clicks: int = 1) -> Callable[[Values], Sequence[Action]]:
    return lambda values: pressed(values["start_box"], button, clicks)


def _scrolled(values: Values) -> Sequence[Action]:
    x, y = values.get("start_box") or (None, None)
    return (Scroll(values["direction"], x, y, values.get("step")),)


_INFO = {"element_info": Field("ignored", False)}
_AT = {"start_box": Field("point"), **_INFO}
_MAYBE_AT = {"start_box": Field("point", False), **_INFO}
GLM_ACTIONS: Mapping[str, ActionRow] = MappingProxyType(
    {
        "left_click": ActionRow("Click the left button at a point.", _AT, _click(Button.LEFT)),
        "right_click": ActionRow("Click the right button at a point.", _AT, _click(Button.RIGHT)),
        "middle_click": ActionRow("Click the middle button at a point.", _AT, _click(Button.MIDDLE)),
        "left_double_click": ActionRow("Click the left button twice at a point.", _AT, _click(Button.LEFT, 2)),
        "hover": ActionRow("Move the pointer to a point.", _AT, lambda v: (Move(*v["start_box"]),)),
        "left_drag": ActionRow(
            "Press the left button at the first point, and let it go at the second.",
            {"start_box": Field("point"), "end_box": Field("point"), **_INFO},
            lambda v: (Drag(*v["start_box"], *v["end_box"]),),
        ),
        "key": ActionRow(
            "Press a key, or keys together, as in keys='ctrl+c'.",
            {"keys": Field("keys")},
            lambda v: (Hotkey(v["keys"]),),
        ),
        "type": ActionRow(
            "Type text where the focus is.", {"content": Field("text"), **_INFO}, lambda v: (Type(v["content"]),)
        ),
        "scroll": ActionRow(
            "Turn the wheel at a point, so many steps, up or down.",
            {
                "start_box": Field("point", False),
                "direction": Field("direction"),
                "step": Field("amount", False),
                **_INFO,
            },
            _scrolled,
        ),
        "WAIT": ActionRow("Wait for 5 seconds.", {}, lambda _: (Wait(_WAIT_S),)),
        "DONE": ActionRow("The task is done.", {}, lambda _: (Finished(),)),
        "FAIL": ActionRow("The task can't be done.", {}, lambda _: (CallUser("the model has given up"),)),
    }
)
"""The actions of GLM-V on a computer, by their names."""

# -- phones ------------------------------------------------------------------------------------------------------------

_ON = {"element": Field("point"), "message": Field("ignored", False)}
_SECONDS = re.compile(r"\s*([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*(?:s|secs?|seconds?|秒)?\s*", re.IGNORECASE)


def _waited(values: Values) -> Sequence[Action]:
    match = _SECONDS.fullmatch(values.get("duration") or "")
    return (Wait(None if match is None else float(match[1])),)


AUTOGLM_ACTIONS: Mapping[str, ActionRow] = MappingProxyType(
    {
        "Tap": ActionRow("Tap on a point.", _ON, lambda v: pressed(v["element"])),
        "Double Tap": ActionRow("Tap on a point twice.", _ON, lambda v: pressed(v["element"], clicks=2)),
        "Long Press": ActionRow("Hold a finger on a point.", _ON, lambda v: (LongPress(*v["element"]),)),
        "Swipe": ActionRow(
            "Draw a finger from the first point to the second.",
            {"start": Field("point"), "end": Field("point")},
            lambda v: (Swipe(*v["start"], *v["end"]),),
        ),
        "Type": ActionRow("Type text where the focus is.", {"text": Field("text")}, lambda v: (Type(v["text"]),)),
        "Launch": ActionRow("Open an app by its name.", {"app": Field("text")}, lambda v: (OpenApp(v["app"]),)),
        "Back": ActionRow("Go one step back.", {}, lambda _: (Back(),)),
        "Home": ActionRow("Go to the home screen.", {}, lambda _: (Home(),)),
        "Wait": ActionRow(
            'Wait for the screen to change, as in duration="2 seconds".', {"duration": Field("text", False)}, _waited
        ),
        "Take_over": ActionRow(
            "Ask the user to take over, to log in, say.",
            {"message": Field("text", False)},
            lambda v: (CallUser(v.get("message") or ""),),
        ),
        "Type_Name": ActionRow("", {"text": Field("text")}, lambda v: (Type(v["text"]),)),
        "Interact": ActionRow("", {"message": Field("text", False)}, lambda v: (CallUser(v.get("message") or ""),)),
        "Note": ActionRow("", {"message": Field("text", False)}, lambda _: (Noop("noted"),)),
        "Call_API": ActionRow(
            "", {"instruction": Field("text")}, lambda v: (Custom("call_api", {"instruction": v["instruction"]}),)
        ),
    }
)
"""The actions of AutoGLM-Phone, by the `action` of `do(…)`."""
_FINISH: Mapping[str, ActionRow] = {
    "finish": ActionRow("", {"message": Field("text", False)}, lambda v: (Finished(v.get("message") or ""),))
}


# -- what a model is told ----------------------------------------------------------------------------------------------


def glm_calls_in_words() -> str:
    """A line for each action on a computer, for a prompt."""
    lines = []
    for name, row in GLM_ACTIONS.items():
        fields = {key: field for key, field in row.fields.items() if key != "element_info"}
        arguments = ", ".join(f"{key}={_example(field)}" for key, field in fields.items())
        lines.append(f"- {name}({arguments}) # {row.what}")
    return "\n".join(lines)


def autoglm_calls_in_words() -> str:
    """A line for each action on a phone, for a prompt."""
    lines = []
    for name, row in AUTOGLM_ACTIONS.items():
        told = [_given(key, field) for key, field in row.fields.items() if field.kind != "ignored"]
        if row.what:
            arguments = ", ".join([f'action="{name}"', *told])
            lines.append(f"- do({arguments}) # {row.what}")
    return "\n".join([*lines, '- finish(message="…") # The task is done, or can\'t be done.'])


def _given(key: str, field: Field) -> str:
    return f"{key}=[x,y]" if field.kind == "point" else f'{key}="…"'


def _example(field: Field) -> str:
    return {"point": "'[x,y]'", "amount": "5"}.get(field.kind, "'…'")


# -- parsing -----------------------------------------------------------------------------------------------------------

_THINKING = re.compile(r"\A\s*+<think>(.*?)</think>", re.DOTALL)
_BOX = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_ACTION = re.compile(r"^[ \t*#]*Action[*]*[:：][*]*", re.MULTILINE | re.IGNORECASE)
_DO = re.compile(r"\b(?:do|finish)\(")
_GLM_CALL = re.compile(rf"\b(?:{'|'.join(GLM_ACTIONS)})\(")
_LABELS = re.compile(r"^[ \t*#]*(?:Memory[:：].*|Reason[:：]|Thought[:：])", re.MULTILINE)
_MOST = 10_000


def parse_glm(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "relative1000",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the action of an answer of GLM-V. The arguments are `parse_ui_tars`'s.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(image_size, coordinates, **options)
    answer = _Answer(text, frame)
    boxes = list(_BOX.finditer(text, answer.start))
    labels = list(_ACTION.finditer(text, answer.start))
    if boxes:
        call, start, before = boxes[-1][1], boxes[-1].start(1), text[answer.start : boxes[-1].start()]
    elif labels:
        call, start, before = text[labels[-1].end() :], labels[-1].end(), text[answer.start : labels[-1].start()]
    else:
        call, start, before = answer.last(_GLM_CALL)
    name, given = answer.call(call, start)
    thought = _LABELS.sub("", _ACTION.sub("", before)).strip()
    return ParsedResponse(answer.thought(thought), tuple(read_row(answer.reader, GLM_ACTIONS, name, given)))


def parse_autoglm(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "relative1000",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the action of an answer of AutoGLM-Phone. As `parse_glm` otherwise."""
    frame = Frame.of(image_size, coordinates, **options)
    answer = _Answer(text, frame)
    found = list(_ANSWER.finditer(text, answer.start))
    if found:
        call, start, before = found[-1][1], found[-1].start(1), text[answer.start : found[-1].start()]
    else:
        call, start, before = answer.last(_DO)
    name, given = answer.call(call, start)
    if name == "do":
        action = given.pop("action", None)
        actions = read_row(answer.reader, AUTOGLM_ACTIONS, action, given)
    else:
        actions = read_row(answer.reader, _FINISH, name, given)
    return ParsedResponse(answer.thought(before.strip()), tuple(actions))


class _Answer:
    """An answer, after what the model thought."""

    def __init__(self, text: str, frame: Frame) -> None:
        self.reader = Reader(frame, text)
        self._text = text
        match = _THINKING.match(text)
        self._thinking = "" if match is None else match[1].strip()
        self.start = 0 if match is None else match.end()
        if match is None and text.lstrip().startswith("<think>"):
            self.reader.fail("the answer was cut off while the model was thinking: allow it more tokens")

    def thought(self, said: str) -> str:
        return "\n".join(filter(None, (self._thinking, said)))

    def last(self, begin: re.Pattern[str]) -> tuple[str, int, str]:
        """The last call in the text, where it begins, and what stands before it."""
        matches = list(begin.finditer(self._text, self.start))
        if not matches:
            said = self._text[self.start :].strip()
            self.reader.fail("the answer has no action" if said else "the answer is empty")
        at = matches[-1].start()
        return self._text[at:], at, self._text[self.start : at]

    def call(self, code: str, start: int) -> tuple[str, dict[str, Any]]:
        """Name and arguments of a call. Raises `ActionParseError`."""
        self.reader.span = start, start + len(code)
        stripped = code.strip().strip("`").strip()
        if len(stripped) > _MOST:
            self.reader.fail(f"the call is longer than {_MOST} characters")
        try:
            node = parsed_expression(stripped)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.reader.fail(f"this is no call, or was cut off: {getattr(error, 'msg', error)}")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            self.reader.fail("an action is a call with named arguments, such as left_click(start_box='[1,2]')")
        given: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in given:
                self.reader.fail("an argument has no name, or is there twice")
            try:
                given[keyword.arg] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                self.reader.fail(f"{keyword.arg} must be a constant")
        return node.func.id, given
