"""Actions as AndroidWorld writes them: a JSON object, after the reason for it.

    Reason: The dialog is open.
    Action: {"action_type": "click", "x": 540, "y": 960}

Names and fields are those of google-research/android_world (env/json_action.py, and env/actuation.py for what they do);
the words are ours. Points are pixels of the screenshot. What it does differently from one's first guess: `scroll` says
where the view moves to, `swipe` where the finger goes, from edge to edge; `input_text` taps on its point first, and
presses Enter after the text. `answer` is the end of the task here; there, a `status` follows.

AndroidWorld's own agents say an `index` into a list of the screen's elements in the place of a point. A screenshot has
no such list: an index is an `ActionParseError` that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Unpack

from managed_vllm.agent.actions.coordinates import Coordinates, Frame, FrameOptions
from managed_vllm.agent.actions.json_actions import Reader, begin_of, each_of, values_in
from managed_vllm.agent.actions.rows import GOALS, ActionRow, Field, Values, pressed, read_row, told
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    CallUser,
    Click,
    Custom,
    Finished,
    Home,
    Hotkey,
    LongPress,
    Noop,
    OpenApp,
    ParsedResponse,
    Scroll,
    Swipe,
    Type,
    Wait,
)


def _typed(values: Values) -> Sequence[Action]:
    tapped = [Click(*values["at"])] if "at" in values else []
    cleared = [Hotkey(("ctrl", "a")), Hotkey(("delete",))] if values.get("clear_text") else []
    return (*tapped, *cleared, Type(values["text"], enter=True))


def _ended(values: Values) -> Sequence[Action]:
    complete = values["goal_status"] == GOALS[0]
    return (Finished() if complete else CallUser("the model says that the task can't be done"),)


_AT = {"at": Field("point")}
ANDROID_WORLD_ACTIONS: Mapping[str, ActionRow] = MappingProxyType(
    {
        "click": ActionRow("Tap on a point.", _AT, lambda v: pressed(v["at"])),
        "double_tap": ActionRow("Tap on a point twice.", _AT, lambda v: pressed(v["at"], clicks=2)),
        "long_press": ActionRow("Hold a finger on a point.", _AT, lambda v: (LongPress(*v["at"]),)),
        "input_text": ActionRow(
            "Tap on a text field, type the text, and press Enter. With clear_text, what is in it is deleted first.",
            {"text": Field("text"), "at": Field("point", False), "clear_text": Field("truth", False)},
            _typed,
        ),
        "keyboard_enter": ActionRow("Press Enter.", {}, lambda _: (Hotkey(("enter",)),)),
        "navigate_home": ActionRow("Go to the home screen.", {}, lambda _: (Home(),)),
        "navigate_back": ActionRow("Go one step back.", {}, lambda _: (Back(),)),
        "scroll": ActionRow(
            "Scroll the view up, down, left or right: down shows what is further down.",
            {"direction": Field("direction")},
            lambda v: (Scroll(v["direction"]),),
        ),
        "swipe": ActionRow(
            "Draw a finger over the whole screen, up, down, left or right.",
            {"direction": Field("across")},
            lambda v: (Swipe(*v["direction"]),),
        ),
        "open_app": ActionRow(
            "Open an app by its name.", {"app_name": Field("text")}, lambda v: (OpenApp(v["app_name"]),)
        ),
        "wait": ActionRow("Wait for the screen to change.", {}, lambda _: (Wait(),)),
        "answer": ActionRow(
            "Answer the user's question, which ends the task.",
            {"text": Field("text")},
            lambda v: (Finished(v["text"]),),
        ),
        "status": ActionRow("End the task: it is complete, or infeasible.", {"goal_status": Field("goal")}, _ended),
        "press_keyboard": ActionRow(
            "", {"keycode": Field("text")}, lambda v: (Custom("key_event", {"key": v["keycode"]}),)
        ),
        "unknown": ActionRow("", {}, lambda _: (Noop("the model knows no action"),)),
    }
)
"""The actions, by their `action_type`; `at` stands for x and y."""
_PAIRS = (("x", "y", "at"),)
_EXAMPLES: Mapping[str, Any] = {"text": "…", "direction": "down", "across": "up", "goal": "complete", "truth": True}


def android_world_actions_in_words() -> str:
    """A line for each action, for a prompt: an example, and what it does."""
    lines = []
    for name, row in told(ANDROID_WORLD_ACTIONS).items():
        example: dict[str, Any] = {"action_type": name}
        for key, field in row.fields.items():
            example |= {"x": 540, "y": 960} if field.kind == "point" else {key: _EXAMPLES[field.kind]}
        lines.append(f"- {json.dumps(example, ensure_ascii=False)} {row.what}")
    return "\n".join(lines)


# -- parsing -----------------------------------------------------------------------------------------------------------

_BEGIN = begin_of(("action_type", *(key for row in ANDROID_WORLD_ACTIONS.values() for key in row.fields), "x", "index"))
_EXAMPLE = '{"action_type": "click", "x": 1, "y": 2}'
_LABEL = "Reason:"


def parse_android_world(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "absolute",
    **options: Unpack[FrameOptions],
) -> ParsedResponse:
    """The reason and the actions of an answer in AndroidWorld's JSON. The arguments are `parse_ui_tars`'s.

    Raises `ActionParseError` if the answer is no action, `ConfigError` if another argument is wrong.
    """
    reader, actions = Reader(Frame.of(image_size, coordinates, **options), text), []
    before, found = values_in(text, _BEGIN, _EXAMPLE)
    for value, start, end in found:
        reader.span = start, end
        for one in each_of(value):
            actions += _read(reader, one)
    return ParsedResponse(before.removeprefix(_LABEL).strip(), tuple(actions))


def _read(reader: Reader, value: Any) -> list[Action]:
    if not isinstance(value, Mapping):
        reader.fail(f"an action must be an object, not {type(value).__name__}")
    given = {key: each for key, each in value.items() if key != "action_type"}
    if given.get("index") is not None:
        reader.fail("index names an element of a list that is not here: say x and y, in pixels of the screenshot")
    number = given.get("text")
    if isinstance(number, int | float) and not isinstance(number, bool):  # AndroidWorld makes a text of it as well
        given["text"] = str(number)
    return read_row(reader, ANDROID_WORLD_ACTIONS, value.get("action_type"), given, pairs=_PAIRS)
