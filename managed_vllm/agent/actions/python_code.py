"""Actions written as Python: calls of pyautogui, as OpenCUA, Kimi K2.5, Aguvis, Jedi and Agent S answer.

    ## Thought:
    The dialog is open.
    ## Action:
    Click OK.
    ## Code:
    ```python
    pyautogui.click(x=0.51, y=0.34)
    ```

Nothing is executed, and no expression is evaluated: the code is parsed by `ast`, and only calls of a fixed list, with
constants as arguments, mean anything. These are pyautogui's functions for mouse and keyboard (0.9.54, with its names
and order of parameters), `time.sleep`, and what the prompts of OpenCUA and Kimi add: `computer.wait`,
`computer.triple_click`, `computer.terminate`. All else is an `ActionParseError` that names it.

The code is the last fenced block, or the lines at the end that begin with such a call; what stands before is the
thought.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions, OffScreenError
from managed_vllm.agent.actions.json_actions import Reader
from managed_vllm.agent.actions.quiet_ast import parsed_statements
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
    MouseDown,
    MouseUp,
    Move,
    Noop,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError

Given = Mapping[str, Any]
"""The arguments of a call, by the names of its parameters."""

_MOST_TIMES = 100
_MOST_CODE = 20_000

_MOUSE = ("x", "y", "clicks", "interval", "button", "duration", "tween", "logScreenshot", "_pause")
_ONE_BUTTON = ("x", "y", "interval", "button", "duration", "tween", "logScreenshot", "_pause")
_FIXED_BUTTON = ("x", "y", "interval", "duration", "tween", "logScreenshot", "_pause")
_HELD = ("x", "y", "button", "duration", "tween", "logScreenshot", "_pause")
_MOVED = ("x", "y", "duration", "tween", "logScreenshot", "_pause")
_DRAGGED = ("x", "y", "duration", "tween", "button", "logScreenshot", "_pause", "mouseDownUp")
_WHEEL = ("clicks", "x", "y", "logScreenshot", "_pause")
PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pyautogui.click": _MOUSE,
        "pyautogui.leftClick": _FIXED_BUTTON,
        "pyautogui.rightClick": _FIXED_BUTTON,
        "pyautogui.middleClick": _FIXED_BUTTON,
        "pyautogui.doubleClick": _ONE_BUTTON,
        "pyautogui.tripleClick": _ONE_BUTTON,
        "pyautogui.moveTo": _MOVED,
        "pyautogui.dragTo": _DRAGGED,
        "pyautogui.mouseDown": _HELD,
        "pyautogui.mouseUp": _HELD,
        "pyautogui.scroll": _WHEEL,
        "pyautogui.vscroll": _WHEEL,
        "pyautogui.hscroll": _WHEEL,
        "pyautogui.write": ("message", "interval", "logScreenshot", "_pause"),
        "pyautogui.typewrite": ("message", "interval", "logScreenshot", "_pause"),
        "pyautogui.press": ("keys", "presses", "interval", "logScreenshot", "_pause"),
        "pyautogui.hotkey": (),
        "pyautogui.keyDown": ("key", "logScreenshot", "_pause"),
        "pyautogui.keyUp": ("key", "logScreenshot", "_pause"),
        "pyautogui.sleep": ("seconds",),
        "time.sleep": ("seconds",),
        "computer.wait": ("seconds",),
        "computer.triple_click": ("x", "y"),
        "computer.tripleClick": ("x", "y"),
        "computer.terminate": ("status", "answer", "data"),
    }
)
"""The calls that are understood, each with its parameters in their order (`hotkey` takes keys only)."""

_FENCE = re.compile(r"^[ \t]*`{3,}[ \t]*(\w*)[ \t]*\n(.*?)(?:^[ \t]*`{3,}[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_CALL_LINE = re.compile(r"^[ \t]*(?:pyautogui|computer|time)\.\w+[ \t]*\(", re.MULTILINE)
_LABEL_AT_END = re.compile(r"(?:\A|\n)[ \t*#]{0,8}(?:Code|Action|Operation)[*]{0,2}[:：]?[*]{0,2}\s*\Z", re.IGNORECASE)
_LABEL = re.compile(r"\A\s*+(?:#+ *Step[^\n]*\n\s*+)?[#* ]*(?:Thought|Observation)[*]*[:：]?[*]*\s*+", re.IGNORECASE)
_TAIL = 60


def parse_python_code(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "relative1",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought and the actions of an answer with pyautogui's calls in it.

    `coordinates`: shares of the screen by default (Kimi K2.5, Aguvis); of OpenCUA on Qwen2.5-VL `"resized"`, in pixels
    of the picture. The other arguments are `parse_ui_tars`'s.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(image_size, coordinates, **options)
    thought, code, start = _found(text)
    actions = Code(frame, text, code, start).actions()
    return ParsedResponse(thought, actions)


def _found(text: str) -> tuple[str, str, int]:
    """The thought, the code, and where it begins."""
    blocks = [match for match in _FENCE.finditer(text) if match[1].lower() in ("", "python", "py", "code")]
    if blocks:
        last = blocks[-1]
        return _thought(text[: last.start()]), last[2], last.start(2)
    line = _CALL_LINE.search(text)
    if line is None:
        missing = "the answer has no code, such as pyautogui.click(x=0.5, y=0.5)"
        message = missing if text.strip() else "the answer is empty"
        raise ActionParseError(message, text=text, span=(0, len(text)))
    return _thought(text[: line.start()]), text[line.start() :], line.start()


def _thought(text: str) -> str:
    text = text.rstrip()
    text = text[:-_TAIL] + _LABEL_AT_END.sub("", text[-_TAIL:])
    return _LABEL.sub("", text).strip()


class Code:
    """The statements of one piece of code to actions.

    Args:
        frame: the frame of its points.
        text: the answer.
        code: the part of it that is code.
        start: where that begins.
        parameters: the calls that are understood, as `PARAMETERS`.
        made: what they do, by the same names.

    Attributes:
        reader: reads values, and reports what is wrong.
    """

    def __init__(
        self,
        frame: Frame,
        text: str,
        code: str,
        start: int,
        parameters: Mapping[str, tuple[str, ...]] = PARAMETERS,
        made: Mapping[str, Making] | None = None,
    ) -> None:
        self._parameters = parameters
        self._made = MADE if made is None else made
        self._frame = frame
        self._text = text
        self._code = code
        self._start = start
        self.reader = Reader(frame, text)
        self._lines = [0]
        for line in code.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def actions(self) -> tuple[Action, ...]:
        if len(self._code) > _MOST_CODE:
            self._fail(f"the code is longer than {_MOST_CODE} characters")
        try:
            statements = parsed_statements(_dedented(self._code))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self._fail(f"the code is no Python, or was cut off: {getattr(error, 'msg', error)}")
        found: list[Action] = []
        for statement in statements:
            self._at(statement)
            if isinstance(statement, ast.Import) and {one.name for one in statement.names} <= {"pyautogui", "time"}:
                continue
            if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
                self._fail(f"only calls of pyautogui mean anything, not {ast.unparse(statement)[:80]!r}")
            before = len(found)
            self._add(found, statement.value)
            if 0 < before < len(found) and isinstance(found[before - 1], Finished | CallUser):
                self._fail("something is done after the task was ended")
        if not found:
            self._fail("the code does nothing")
        return tuple(found)

    def _at(self, node: ast.stmt) -> None:
        begin = self._start + self._lines[min(node.lineno - 1, len(self._lines) - 1)]
        end = self._start + self._lines[min(node.end_lineno or node.lineno, len(self._lines) - 1)]
        self.reader.span = begin, max(begin, min(end, len(self._text)))

    def _fail(self, message: str) -> NoReturn:
        self.reader.fail(message)

    def _add(self, found: list[Action], call: ast.Call) -> None:
        name = ast.unparse(call.func)
        if name not in self._parameters:
            self._unknown(name)
        last = name.rpartition(".")[2]
        if last == "hotkey":
            found.append(Hotkey(self._hotkey(call)))
            return
        given = self._arguments(name, call)
        made = self._made[name](self, given)
        before = found[-1] if found else None
        if last == "terminate" and isinstance(before, Finished) and isinstance(made[0], Finished):
            return  # the answer came first
        if last == "dragTo" and isinstance(before, Move) and self._button(given) is Button.LEFT:
            made = [Drag(before.x, before.y, *self.there(given))]
            found.pop()
        found += made

    def _unknown(self, name: str) -> NoReturn:
        if name.startswith("agent."):
            self._fail(
                f"there is no call {name[:80]!r}: it says in words where to act, which a second model has to find"
            )
        self._fail(f"there is no call {name[:80]!r}; the calls are {', '.join(self._parameters)}")

    def _arguments(self, name: str, call: ast.Call) -> dict[str, Any]:
        names = self._parameters[name]
        if len(call.args) > len(names):
            self._fail(f"{name} takes {len(names)} arguments at most")
        given = {key: self._constant(value) for key, value in zip(names, call.args, strict=False)}
        for keyword in call.keywords:
            if keyword.arg not in names or keyword.arg in given:
                self._fail(f"{name} has no parameter {keyword.arg!r}, or has it twice")
            given[keyword.arg] = self._constant(keyword.value)
        if isinstance(given.get("x"), list | tuple) and "y" not in given and len(given["x"]) == 2:
            given["x"], given["y"] = given["x"]  # pyautogui takes a pair for x
        return {key: value for key, value in given.items() if value is not None}

    def _constant(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            self._fail(f"arguments must be constants, not {ast.unparse(node)[:80]!r}")

    def _hotkey(self, call: ast.Call) -> tuple[str, ...]:
        keys: list[Any] = []
        for value in map(self._constant, call.args):
            keys += value if isinstance(value, list | tuple) else [value]
        for keyword in call.keywords:
            value = self._constant(keyword.value)
            if keyword.arg == "keys" and isinstance(value, list | tuple) and not keys:
                keys += value
            elif keyword.arg not in ("interval", "logScreenshot"):
                self._fail(f"hotkey has no parameter {keyword.arg!r}")
        return self.reader.keys(keys, "keys of hotkey")

    # -- what the calls do

    def _place(self, given: Given) -> tuple[float, float] | None:
        if "x" not in given and "y" not in given:
            return None
        if "x" not in given or "y" not in given:
            self._fail("x and y are needed, or none of them")
        return self.point([given["x"], given["y"]], "x, y")

    def point(self, value: Any, where: str) -> tuple[float, float]:
        """The pixel of a pair of numbers. Raises `ActionParseError`."""
        if not isinstance(value, list | tuple) or len(value) != 2:
            self._fail(f"{where} must be a pair of numbers")
        x, y = (self.reader.decimal(each, where) for each in value)
        try:
            return self._frame.point(x, y)
        except OffScreenError as error:
            self._fail(f"the point is off the screen: {error}")

    def there(self, given: Given) -> tuple[float, float]:
        """The pixel of x and y, which must be there. Raises `ActionParseError`."""
        place = self._place(given)
        if place is None:
            self._fail("x and y are needed")
        return place

    def _times(self, given: Given, key: str) -> int:
        value = given.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TIMES:
            self._fail(f"{key} must be from 1 to {_MOST_TIMES}")
        return value

    def _button(self, given: Given) -> Button:
        return self.reader.button(given.get("button", "left"), "button")

    def clicked(self, given: Given, clicks: int | None = None, button: Button | None = None) -> list[Action]:
        button, clicks = button or self._button(given), clicks or self._times(given, "clicks")
        place = self._place(given)
        if place is None:
            return [MouseDown(button), MouseUp(button)] * clicks
        return [Click(*place, button, clicks)]

    def moved(self, given: Given) -> list[Action]:
        return [Move(*self.there(given))]

    def dragged(self, given: Given) -> list[Action]:
        """From where the pointer is."""
        button = self._button(given)
        return [MouseDown(button), Move(*self.there(given)), MouseUp(button)]

    def held(self, given: Given) -> list[Action]:
        return [MouseDown(self._button(given), *(self._place(given) or ()))]

    def released(self, given: Given) -> list[Action]:
        return [MouseUp(self._button(given), *(self._place(given) or ()))]

    def scrolled(self, given: Given, forward: Direction, backward: Direction) -> list[Action]:
        steps = round(self.reader.number(given.get("clicks"), "clicks"))
        if abs(steps) > 1_000_000:
            self._fail("clicks must be from -1000000 to 1000000")
        if steps == 0:
            return [Noop("scrolled by nothing")]
        x, y = self._place(given) or (None, None)
        return [Scroll(forward if steps > 0 else backward, x, y, abs(steps))]

    def typed(self, given: Given) -> list[Action]:
        message = given.get("message")
        if isinstance(message, list | tuple):  # pyautogui presses them one after the other
            return self._each(message)
        return [Type(self.reader.string(message, "message"))]

    def pressed(self, given: Given) -> list[Action]:
        keys = given.get("keys")
        return self._each(keys if isinstance(keys, list | tuple) else [keys]) * self._times(given, "presses")

    def _each(self, keys: Sequence[Any]) -> list[Action]:
        if not keys:
            self._fail("no key is named")
        return [Hotkey((self.reader.key(key, "keys"),)) for key in keys]

    def key_held(self, given: Given) -> list[Action]:
        return [KeyDown(self.reader.key(given.get("key"), "key"))]

    def key_released(self, given: Given) -> list[Action]:
        return [KeyUp(self.reader.key(given.get("key"), "key"))]

    def waited(self, given: Given) -> list[Action]:
        seconds = given.get("seconds")
        return [Wait(None if seconds is None else self.reader.seconds(seconds, "seconds"))]

    def ended(self, given: Given) -> list[Action]:
        status, said = given.get("status", "success"), given.get("answer", given.get("data", given.get("info", "")))
        if status not in ("success", "failure", "fail"):
            self._fail(f"status must be success or failure, not {status!r:.80}")
        said = self.reader.string(said, "answer")
        return [Finished(said)] if status == "success" else [CallUser(said or "the model has given up")]


Making = Callable[[Code, Given], list[Action]]
"""What a call does, from its arguments."""

MADE: Mapping[str, Making] = {
    "pyautogui.click": Code.clicked,
    "pyautogui.leftClick": lambda code, given: code.clicked(given, 1, Button.LEFT),
    "pyautogui.rightClick": lambda code, given: code.clicked(given, 1, Button.RIGHT),
    "pyautogui.middleClick": lambda code, given: code.clicked(given, 1, Button.MIDDLE),
    "pyautogui.doubleClick": lambda code, given: code.clicked(given, 2),
    "pyautogui.tripleClick": lambda code, given: code.clicked(given, 3),
    "pyautogui.moveTo": Code.moved,
    "pyautogui.dragTo": Code.dragged,
    "pyautogui.mouseDown": Code.held,
    "pyautogui.mouseUp": Code.released,
    "pyautogui.scroll": lambda code, given: code.scrolled(given, Direction.UP, Direction.DOWN),
    "pyautogui.vscroll": lambda code, given: code.scrolled(given, Direction.UP, Direction.DOWN),
    "pyautogui.hscroll": lambda code, given: code.scrolled(given, Direction.RIGHT, Direction.LEFT),
    "pyautogui.write": Code.typed,
    "pyautogui.typewrite": Code.typed,
    "pyautogui.press": Code.pressed,
    "pyautogui.keyDown": Code.key_held,
    "pyautogui.keyUp": Code.key_released,
    "pyautogui.sleep": Code.waited,
    "time.sleep": Code.waited,
    "computer.wait": Code.waited,
    "computer.triple_click": lambda code, given: code.clicked(given, 3, Button.LEFT),
    "computer.tripleClick": lambda code, given: code.clicked(given, 3, Button.LEFT),
    "computer.terminate": Code.ended,
}


def _dedented(code: str) -> str:
    """Without the blanks that all lines begin with. Line ends are as they were, so that lines keep their numbers."""
    lines = code.split("\n")
    common = min((len(line) - len(line.lstrip(" ")) for line in lines if line.strip()), default=0)
    return "\n".join(line[common:] for line in lines)


_UNTOLD = frozenset({"tween", "logScreenshot", "_pause", "mouseDownUp", "interval", "duration", "data"})
_SAME = frozenset(
    {
        *("pyautogui.leftClick", "pyautogui.vscroll", "pyautogui.typewrite", "pyautogui.sleep", "time.sleep"),
        "computer.tripleClick",
    }
)
"""Calls for which there is another name, of which the model is told."""


def calls_in_words() -> str:
    """A line for each call, for a prompt: its name and its parameters."""
    lines = []
    for name, parameters in PARAMETERS.items():
        if name not in _SAME:
            told = ", ".join(key for key in parameters if key not in _UNTOLD)
            lines.append(f"- {name}({told or '*keys'})")
    return "\n".join(lines)
