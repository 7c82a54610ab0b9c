r"""How a model is told UI-TARS 1.5's format, how it is held to it, and how an action is written in it.

`UI_TARS_PROMPT` is the prompt, `ui_tars_regex` a constraint for structured outputs under which any model, an untrained
one too, answers with one action that `parse_ui_tars` takes. `to_ui_tars` is the inverse of the parser, for policies
that know what to do and have to say it as a model would.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from managed_vllm.agent.actions.coordinates import FACTOR, MAX_PIXELS, MIN_PIXELS, Coordinates, Frame
from managed_vllm.agent.actions.ui_tars import parse_in
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
    Click,
    Drag,
    Finished,
    Home,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    Move,
    OpenApp,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError, ConfigError

UI_TARS_PROMPT = r"""You are a GUI agent. You get a task, your earlier actions, and screenshots. Say what to do next.

## Output Format
```
Thought: ...
Action: ...
```

## Action Space

click(start_box='<|box_start|>(x1,y1)<|box_end|>')
left_double(start_box='<|box_start|>(x1,y1)<|box_end|>')
right_single(start_box='<|box_start|>(x1,y1)<|box_end|>')
drag(start_box='<|box_start|>(x1,y1)<|box_end|>', end_box='<|box_start|>(x3,y3)<|box_end|>')
hotkey(key='ctrl c') # Lower case, with blanks between the keys, three keys at most.
type(content='xxx') # Write \', \" and \n for quotes and line ends. A \n at the end presses Enter.
scroll(start_box='<|box_start|>(x1,y1)<|box_end|>', direction='down or up or right or left')
wait() # Five seconds, then a new screenshot.
finished(content='xxx') # The task is done. Write \', \" and \n for quotes and line ends.
call_user() # The task can't be done, or needs the user.

## Note
- Write the `Thought` part in {language}.
- Plan in a few words there, and end it with one sentence on the next action and what it is aimed at.

## User Instruction
{instruction}
"""
"""For computers, with `{language}` and `{instruction}` to be put in. The actions and the form of the answer are those
that UI-TARS 1.5 was trained on; the words around them are ours."""


def system_prompt(instruction: str = "", *, language: str = "English") -> str:
    """`UI_TARS_PROMPT` with the task put in. UI-TARS expects it as the first user message, before the screenshots."""
    head, tail = UI_TARS_PROMPT.split("{instruction}")
    return head.replace("{language}", language) + instruction + tail


# -- writing -----------------------------------------------------------------------------------------------------------


def to_ui_tars(
    action: Action,
    image_size: tuple[int, int],
    coordinates: Coordinates = "resized",
    *,
    decimals: int | None = None,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = FACTOR,
) -> str:
    """The action as UI-TARS would write it after `Action: `.

    Parsed with the same arguments it is the same action again, exactly. With `decimals` (0: whole numbers, as UI-TARS
    says them) its coordinates are the nearest that can be written so.

    Raises `ValueError`: the format has no words for it (a middle or triple click, an amount of scrolling,
    a `Type` whose text ends with a line end and has no `enter`, a point outside of the image, a `Custom`).
    """
    frame = Frame.of(image_size, coordinates, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    text = _written(action, frame, decimals)
    try:
        (again,) = parse_in(frame, text).actions
    except (ActionParseError, ValueError) as error:
        raise ValueError(f"UI-TARS's format can't say {action!r:.200}: {error}") from error
    if decimals is None and again != action:
        raise ValueError(f"UI-TARS's format can't say {action!r:.200}; the nearest is {again!r:.200}")
    return text


_CLICK_NAMES = {(Button.LEFT, 1): "click", (Button.LEFT, 2): "left_double", (Button.RIGHT, 1): "right_single"}


def _written(action: Action, frame: Frame, decimals: int | None) -> str:
    def box(x: float, y: float) -> str:
        return "'({},{})'".format(*frame.written(x, y, decimals))

    match action:
        case Click(x, y, button, clicks) if (button, clicks) in _CLICK_NAMES:
            return f"{_CLICK_NAMES[button, clicks]}(start_box={box(x, y)})"
        case Drag(x, y, to_x, to_y):
            return f"drag(start_box={box(x, y)}, end_box={box(to_x, to_y)})"
        case Type(text, enter):
            return f"type(content='{_escaped(text)}{_ENTER if enter else ''}')"
        case Hotkey(keys):
            return f"hotkey(key='{_escaped(_combined(keys))}')"
        case Scroll(direction, x, y, None):
            if x is None or y is None:
                return f"scroll(direction='{direction}')"
            return f"scroll(start_box={box(x, y)}, direction='{direction}')"
        case Move(x, y):
            return f"hover(start_box={box(x, y)})"
        case KeyDown(key):
            return f"keydown(key='{_escaped(key)}')"
        case KeyUp(key):
            return f"keyup(key='{_escaped(key)}')"
        case LongPress(x, y, seconds):
            return f"long_press(start_box={box(x, y)}{_held(seconds)})"
        case OpenApp(name):
            return f"open_app(app_name='{_escaped(name)}')"
        case Home():
            return "press_home()"
        case Back():
            return "press_back()"
        case Wait(None):
            return "wait()"
        case Wait(float() | int() as seconds):
            return f"wait({seconds:g})"
        case Finished(content):
            return f"finished(content='{_escaped(content)}')" if content else "finished()"
        case CallUser(content):
            return f"call_user(content='{_escaped(content)}')" if content else "call_user()"
    raise ValueError(f"UI-TARS's format can't say {action!r:.200}")


def _held(seconds: float | None) -> str:
    return "" if seconds is None else f", time='{seconds:g}'"


def _combined(keys: tuple[str, ...]) -> str:
    text = ""
    for index, key in enumerate(keys):
        # A sign between other keys would separate them: it is written as in `ctrl++ c`.
        if key in ("+", "-") and 0 < index < len(keys) - 1:
            text += key * 2
        else:
            text += f" {key}" if index else key
    return text


_ENTER = "\\n"
# Behind "C:" an escaped line end would look like a path: a real one stands there.
_TO_ESCAPE = re.compile(r"['\"\\]|(?<![A-Za-z]:)\n")


def _escaped(text: str) -> str:
    return _TO_ESCAPE.sub(lambda match: _ENTER if match[0] == "\n" else "\\" + match[0], text)


# -- structured outputs ------------------------------------------------------------------------------------------------


_ALL = ("click", "left_double", "right_single", "drag", "hotkey", "type", "scroll", "wait", "finished", "call_user")
_TEXT = "[A-Za-z0-9 .,:;!?/@_+=-]"
_KEYS = "(enter|tab|esc|space|backspace|delete|up|down|left|right|pageup|pagedown|home|end|f5)"
_COMBINATION = "(ctrl|alt|shift|ctrl shift) ([a-z0-9]|tab|left|right|home|end)"


def ui_tars_regex(
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "resized",
    actions: Iterable[str] = _ALL,
    max_thought: int = 100,
    max_text: int = 40,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = FACTOR,
) -> str:
    """A regex of which every match is one well-formed answer, for
    `{"structured_outputs": {"regex": ui_tars_regex((1920, 1080))}}`.

    Args:
        image_size, coordinates, min_pixels, max_pixels, factor: as for `parse_ui_tars`; points are whole numbers within
            the image.
        actions: the names that are allowed, of UI-TARS's.
        max_thought: characters of the thought; 0: no `Thought:` at all.
        max_text: characters of a content.

    All repeats are bounded, there is no look-around, and white space only where it must be: a model that would fill
    the answer with blanks can't. Characters of thoughts and contents are ASCII letters, digits, blanks and some signs.
    Raises `ConfigError` for arguments that don't fit.
    """
    names = list(dict.fromkeys(actions))
    if not names or not set(names) <= set(_ALL):
        raise ConfigError(f"actions must be some of {', '.join(_ALL)}, not {names!r:.200}", field="actions")
    if max_thought < 0 or max_text < 1:
        raise ConfigError("max_thought must be 0 or more, max_text 1 or more", field="max_text")
    frame = Frame.of(image_size, coordinates, min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    point = rf"'\({_up_to(frame.units_x - 1)},{_up_to(frame.units_y - 1)}\)'"
    content = f"{_TEXT}{{1,{max_text}}}"
    forms = {
        **{name: rf"{name}\(start_box={point}\)" for name in _CLICK_NAMES.values()},
        "drag": rf"drag\(start_box={point}, end_box={point}\)",
        "hotkey": rf"hotkey\(key='({_KEYS}|{_COMBINATION})'\)",
        "type": rf"type\(content='{content}(\\n)?'\)",
        "scroll": rf"scroll\(start_box={point}, direction='(up|down|left|right)'\)",
        "wait": r"wait\(\)",
        "finished": rf"finished\((content='{content}')?\)",
        "call_user": r"call_user\(\)",
    }
    thought = rf"Thought: {_TEXT}{{1,{max_thought}}}\n" if max_thought else ""
    return f"{thought}Action: ({'|'.join(forms[name] for name in names)})"


def _up_to(most: int) -> str:
    """A regex of the whole numbers from 0 to `most`, without leading zeros."""
    digits = str(most)
    forms = ["0"] if most else []
    forms += [f"[1-9]{_digits(count)}" for count in range(len(digits) - 1)]
    for index, digit in enumerate(digits):
        least = 1 if index == 0 else 0
        if int(digit) > least:
            below = f"[{least}-{int(digit) - 1}]" if int(digit) - 1 > least else str(least)
            forms.append(f"{digits[:index]}{below}{_digits(len(digits) - index - 1)}")
    return f"({'|'.join([*forms, digits])})"


def _digits(count: int) -> str:
    return "" if count == 0 else "[0-9]" if count == 1 else f"[0-9]{{{count}}}"
