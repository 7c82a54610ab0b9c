"""Actions as Python source with pyautogui, which is what OSWorld's `DesktopEnv.step` runs on its machine.

What the model said is in the source as ASCII string literals only, numbers are written by us: no answer can become
code. The source always parses, and needs nothing but pyautogui, the standard library, and, where text is pasted,
pyperclip.

OSWorld's own agents end an episode by the words `DONE` and `FAIL` in the place of source; that is for the environment's
adapter: here `Finished` and `CallUser` do nothing, and are a comment. OSWorld sets `pyautogui.FAILSAFE = False` before
the source; without it pyautogui raises when the pointer is in a corner of the screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

from managed_vllm.agent.actions.keys import key_of
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
    LongPress,
    MouseDown,
    MouseUp,
    Move,
    Noop,
    Scroll,
    Type,
    Wait,
)

CLIPBOARD = """\
import os
import pyperclip
def to_clipboard(text):
    outputs = [(fd, os.dup(fd)) for fd in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd, _ in outputs:
            os.dup2(nowhere, fd)
        pyperclip.copy(text)
    finally:
        for fd, output in outputs:
            os.dup2(output, fd)
"""
"""Ahead of source that pastes. On X11 a program stays and holds the clipboard (xclip). If it had the script's outputs,
a machine's server that reads these to their end would wait until something else is copied."""

Typing = Literal["auto", "write", "paste"]
Keys = Mapping[str, str] | Literal["as_said"] | None


def to_pyautogui(
    actions: Action | Iterable[Action],
    *,
    typing: Typing = "auto",
    keys: Keys = None,
    paste_keys: tuple[str, ...] = ("ctrl", "v"),
    scroll_amount: int = 5,
    wait_s: float = 5.0,
    drag_s: float = 1.0,
    long_press_s: float = 1.0,
    key_interval_s: float = 0.02,
    pause_s: float = 0.5,
    decimals: int = 0,
) -> str:
    r"""Source that carries the actions out, one after the other.

    Args:
        actions: one, or several.
        typing: `write` presses the keys, which works wherever a person can type, terminals included, but has ASCII
            only; `paste` goes through the clipboard (pyperclip, `paste_keys`), which works for all characters, where
            pasting does. `auto`: keys for text that is ASCII (with line ends and tabs), else the clipboard.
        keys: names of keys, in lower case, to pyautogui's, before our own: `{"cmd": "command"}` on a Mac. `"as_said"`:
            names go to pyautogui as the model said them; it ignores those that it does not know.
        paste_keys: what pastes, in pyautogui's names.
        scroll_amount: steps of the wheel where an action has no `amount`; OSWorld's agents turn it by 5.
        wait_s: seconds of a `Wait` that has none.
        drag_s: seconds that the pointer takes.
        long_press_s: seconds of a `LongPress` that has none.
        key_interval_s: seconds between two keys that are typed.
        pause_s: seconds between two actions.
        decimals: of coordinates; 0: whole pixels. pyautogui itself cuts decimals off.

    Raises `ValueError`: what it can't do (`Swipe`, `OpenApp`, `OpenURL`, `Back`, `Home`, `Custom`), a key that it does
    not have, a number that is none, text that can't be typed in the way that was asked for.
    """
    if typing not in get_args(Typing):
        raise ValueError(f"typing must be one of {', '.join(get_args(Typing))}, not {typing!r:.80}")

    def at(x: float, y: float) -> str:
        return f"{_pixel(x, decimals)}, {_pixel(y, decimals)}"

    steps = [actions] if isinstance(actions, Action) else list(actions)
    blocks: list[list[str]] = []
    for action in steps:
        match action:
            case Click():
                blocks.append([_click(action, at)])
            case Move(x, y):
                blocks.append([f"pyautogui.moveTo({at(x, y)})"])
            case Drag(x, y, to_x, to_y):
                blocks.append(
                    [
                        f"pyautogui.moveTo({at(x, y)})",
                        f"pyautogui.dragTo({at(to_x, to_y)}, duration={_seconds(drag_s)}, button='left')",
                    ]
                )
            case MouseDown(button, x, y) | MouseUp(button, x, y):
                function = "mouseDown" if isinstance(action, MouseDown) else "mouseUp"
                where = "" if x is None or y is None else f"{at(x, y)}, "
                blocks.append([f"pyautogui.{function}({where}button={str(Button(button))!r})"])
            case LongPress(x, y, seconds):
                held_s = f"time.sleep({_seconds(long_press_s if seconds is None else seconds)})"
                blocks.append([f"pyautogui.mouseDown({at(x, y)})", held_s, "pyautogui.mouseUp()"])
            case Type(text, enter):
                lines = _typed(text, typing, paste_keys, key_interval_s)
                blocks.append([*lines, "pyautogui.press('enter')"] if enter else lines)
            case Hotkey(names):
                if not names:
                    raise ValueError("a Hotkey needs a key")
                blocks.append([_pressed([_key(name, keys) for name in names])])
            case KeyDown(name):
                blocks.append([f"pyautogui.keyDown({_key(name, keys)!a})"])
            case KeyUp(name):
                blocks.append([f"pyautogui.keyUp({_key(name, keys)!a})"])
            case Scroll():
                blocks.append([_scrolled(action, scroll_amount, at)])
            case Wait(seconds):
                blocks.append([f"time.sleep({_seconds(wait_s if seconds is None else seconds)})"])
            case Finished():
                blocks.append(["# finished: nothing to do"])
            case CallUser():
                blocks.append(["# call_user: nothing to do"])
            case Noop():
                blocks.append(["# nothing to do"])
            case _:
                raise ValueError(f"pyautogui can't carry out {action!r:.200}")
    pause = f"time.sleep({_seconds(pause_s)})"
    body = f"\n{pause}\n".join("\n".join(block) for block in blocks if block)
    imports = "import pyautogui\nimport time\n"
    if "to_clipboard(" in body:
        imports += CLIPBOARD
    return f"{imports}{body}\n" if body else imports


def _click(action: Click, at: Callable[[float, float], str]) -> str:
    if action.clicks < 1:
        raise ValueError(f"clicks must be 1 or more, not {action.clicks}")
    more = f", clicks={int(action.clicks)}" if action.clicks > 1 else ""
    return f"pyautogui.click({at(action.x, action.y)}{more}, button={str(Button(action.button))!r})"


def by_keys(text: str, typing: Typing) -> bool:
    """Whether the text is typed key by key, which takes time for each."""
    return typing == "write" or (typing == "auto" and _has_keys(text))


def _has_keys(text: str) -> bool:
    return all(" " <= sign <= "~" or sign in "\n\t" for sign in text)


def _typed(text: str, typing: Typing, paste_keys: tuple[str, ...], interval_s: float) -> list[str]:
    if not text:
        return []
    if not by_keys(text, typing):
        text.encode()  # UnicodeEncodeError, a ValueError, here rather than there
        return [f"to_clipboard({text!a})", _pressed(list(paste_keys)), "time.sleep(0.5)"]
    if not _has_keys(text):
        raise ValueError(f"pyautogui has keys for ASCII only, not for {text!r:.80}: use typing='auto'")
    # pyautogui 0.9.54 on X11: "less" is found on the 102nd key, too, and that with shift is ">". This is a US layout's
    # way to it, as OSWorld's machines have it.
    lines: list[str] = []
    for index, part in enumerate(text.split("<")):
        if index:
            lines.append("pyautogui.hotkey('shift', ',')")
        if part:
            lines.append(f"pyautogui.write({part!a}, interval={_seconds(interval_s)})")
    return lines


def _pressed(keys: list[str]) -> str:
    if len(keys) == 1:
        return f"pyautogui.press({keys[0]!a})"
    return f"pyautogui.hotkey({', '.join(ascii(key) for key in keys)})"


def _key(name: str, keys: Keys) -> str:
    if keys == "as_said":
        return name
    key = (keys or {}).get(name) or key_of(name)
    if key is None:
        raise ValueError(f"pyautogui has no key {name!r:.80}")
    return key


def _scrolled(action: Scroll, default: int, at: Callable[[float, float], str]) -> str:
    amount = int(default if action.amount is None else action.amount)
    forward = action.direction in (Direction.UP, Direction.RIGHT)
    function = "scroll" if action.direction in (Direction.UP, Direction.DOWN) else "hscroll"
    where = ""
    if action.x is not None and action.y is not None:
        x, y = at(action.x, action.y).split(", ")
        where = f", x={x}, y={y}"
    return f"pyautogui.{function}({amount if forward else -amount}{where})"


def _pixel(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no coordinate")
    return str(round(value) if decimals == 0 else round(float(value), decimals))


def _seconds(value: float) -> str:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value} is no number of seconds")
    return repr(float(value))
