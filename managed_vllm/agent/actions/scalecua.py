"""Answers of ScaleCUA: calls between tags, after what is done by them.

    <think>The dialog is open.</think>
    <operation>Click OK.</operation>
    <action>
    click(x=989, y=371)
    </action>

The calls are those of OpenGVLab/ScaleCUA (playground/config/prompt_template, for Ubuntu, the web and Android):
pyautogui's without their module, and others for phones and for the end of a task; the words are ours. Points are pixels
of the picture as the model sees it (`smart_resize` with sides of 28, as its own agents reckon back); where it is taught
otherwise, shares of the screen or others can be asked for. All `<action>` blocks count, in their order. They are parsed
by `ast` as in `python_code`, and nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NoReturn, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader
from managed_vllm.agent.actions.python_code import MADE, PARAMETERS, Code, Given, Making
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    CallUser,
    Direction,
    Finished,
    Home,
    LongPress,
    OpenApp,
    ParsedResponse,
    Swipe,
    Wait,
)
from managed_vllm.errors import ActionParseError

Platform = Literal["computer", "phone"]

_WAIT_S = 3.0
_PRESS_S = 1.0
_SHARE = 0.5
"""Of the screen, that a swipe goes; the three are the defaults that the calls are published with."""
_WAYS = {Direction.UP: (0, -1), Direction.DOWN: (0, 1), Direction.LEFT: (-1, 0), Direction.RIGHT: (1, 0)}


# -- what the calls do -------------------------------------------------------------------------------------------------


def _swiped(code: Code, given: Given) -> list[Action]:
    start, end = (
        code.point(given[key], f"{key} of swipe") if key in given else None for key in ("from_coord", "to_coord")
    )
    if end is None:
        return [Swipe(*_drawn(code, given, start))]
    if start is None:
        code.reader.fail("swipe needs from_coord, where it has to_coord")
    return [Swipe(*start, *end)]


def _drawn(code: Code, given: Given, start: tuple[float, float] | None) -> tuple[float, float, float, float]:
    """From a point, or about the middle, so much of the screen in a direction; to its edge at most."""
    way_x, way_y = _WAYS[code.reader.direction(given.get("direction", "up"), "direction of swipe")]
    share = float(code.reader.number(given.get("amount", _SHARE), "amount of swipe"))
    if not 0 < share <= 1:
        code.reader.fail("amount of swipe must be more than 0, and 1 at most")
    last_x, last_y = code.reader.frame.width - 1, code.reader.frame.height - 1
    length_x, length_y = way_x * share * last_x, way_y * share * last_y
    x, y = start or ((last_x - length_x) / 2, (last_y - length_y) / 2)
    return x, y, min(max(x + length_x, 0.0), last_x), min(max(y + length_y, 0.0), last_y)


def _long_pressed(code: Code, given: Given) -> list[Action]:
    return [LongPress(*code.there(given), code.reader.seconds(given.get("duration", _PRESS_S), "duration"))]


def _waited(code: Code, given: Given) -> list[Action]:
    return [Wait(code.reader.seconds(given.get("seconds", _WAIT_S), "seconds"))]


def _answered(code: Code, given: Given) -> list[Action]:
    return [Finished(code.reader.string(given.get("answer"), "answer"))]


def _opened(code: Code, given: Given) -> list[Action]:
    return [OpenApp(code.reader.string(given.get("app_name"), "app_name"))]


_FURTHER: Mapping[str, tuple[tuple[str, ...], Making]] = {
    "swipe": (("from_coord", "to_coord", "direction", "amount"), _swiped),
    "long_press": (("x", "y", "duration"), _long_pressed),
    "open_app": (("app_name",), _opened),
    "navigate_home": ((), lambda code, given: [Home()]),
    "navigate_back": ((), lambda code, given: [Back()]),
    "call_user": ((), lambda code, given: [CallUser()]),
    "wait": (("seconds",), _waited),
    "response": (("answer",), _answered),
    "terminate": (("status", "info"), Code.ended),
}
_MODULE = "pyautogui."
SCALECUA_CALLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **{name.removeprefix(_MODULE): given for name, given in PARAMETERS.items() if name.startswith(_MODULE)},
        **{name: given for name, (given, _) in _FURTHER.items()},
    }
)
"""The calls that are understood, each with its parameters in their order (`hotkey` takes keys only)."""
_MAKINGS: Mapping[str, Making] = {
    **{name.removeprefix(_MODULE): making for name, making in MADE.items()},
    **{name: making for name, (_, making) in _FURTHER.items()},
}


# -- what a model is told ----------------------------------------------------------------------------------------------

_COMMON = """\
- write(message='…') # Type text where the focus is.
- call_user() # Ask the user.
- wait(seconds=3) # Wait for the screen to change.
- response(answer='…') # Answer the user's question, which ends the task.
- terminate(status='success', info='…') # End the task, with 'success' or 'failure'."""
_IN_WORDS: Mapping[Platform, str] = {
    "computer": f"""\
- click(x=…, y=…, clicks=1, button='left') # Click at a point, or where the pointer is.
- doubleClick(x=…, y=…) # Click twice.
- rightClick(x=…, y=…) # Click the right button.
- moveTo(x=…, y=…) # Move the pointer.
- dragTo(x=…, y=…, button='left') # Press the button where the pointer is, and let it go at a point.
- scroll(clicks=-5, x=…, y=…) # Turn the wheel: up if positive, down if negative.
- press(keys='enter', presses=1) # Press a key, or a list of keys one after the other.
- hotkey('ctrl', 'c') # Press keys together.
- keyDown(key='shift') # Press a key, and hold it.
- keyUp(key='shift') # Let it go.
{_COMMON}""",
    "phone": f"""\
- click(x=…, y=…) # Tap on a point.
- long_press(x=…, y=…, duration=1) # Hold a finger on a point, for so many seconds.
- swipe(from_coord=[…, …], to_coord=[…, …]) # Draw a finger from a point to another.
- swipe(direction='up', amount=0.5) # Draw a finger over so much of the screen.
- open_app(app_name='…') # Open an app by its name.
- navigate_home() # Go to the home screen.
- navigate_back() # Go one step back.
{_COMMON}""",
}


def scalecua_calls_in_words(platform: Platform) -> str:
    """A line for each call, for a prompt."""
    return _IN_WORDS[platform]


# -- parsing -----------------------------------------------------------------------------------------------------------

_ACTION = re.compile(r"<action>(.*?)(?:</action>|\Z)", re.DOTALL)
_OPERATION = re.compile(r"<operation>(.*?)(?:</operation>|\Z)", re.DOTALL)
_TAGS = re.compile(r"</?(?:think|operation)>")
_FENCE = re.compile(r"`{3,}[ \t]*\w*")
_MOST_SAID = 500


def parse_scalecua(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "resized",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The thought (with the operation) and the actions of an answer. The arguments are `parse_ui_tars`'s.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(image_size, coordinates, **options)
    blocks = list(_ACTION.finditer(text))
    if not blocks:
        _no_action(Reader(frame, text))
    actions: list[Action] = []
    for block in blocks:
        if actions and isinstance(actions[-1], Finished | CallUser):
            message = "something is done after the task was ended"
            raise ActionParseError(message, text=text, span=block.span())
        code = _FENCE.sub(lambda fence: " " * len(fence[0]), block[1])
        actions += Code(frame, text, code, block.start(1), SCALECUA_CALLS, _MAKINGS).actions()
    said = (part.strip() for part in _TAGS.split(text[: blocks[0].start()]))
    return ParsedResponse("\n".join(filter(None, said)), tuple(actions))


def _no_action(reader: Reader) -> NoReturn:
    text = reader.text.strip()
    if text.startswith("<think>") and "</think>" not in text:
        reader.fail("the answer was cut off while the model was thinking: allow it more tokens")
    missing = "the answer has no action; it needs calls such as <action>click(x=1, y=2)</action>"
    reader.fail(missing if text else "the answer is empty")


def operation_of(answer: str) -> str:
    """What an answer says that it does, in one line, for the list of steps in a prompt."""
    match = _OPERATION.search(answer)
    said = answer if match is None else match[1]
    return " ".join(said.split())[:_MOST_SAID]
