"""Actions in a few words, for people: viewers, logs, error messages."""

from __future__ import annotations

import json

from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
    Click,
    Custom,
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
    Scroll,
    Swipe,
    Type,
    Wait,
)

_TIMES = {1: "", 2: "double ", 3: "triple "}


def describe(action: Action, *, most: int = 80) -> str:
    """One line: `click (197, 525)`, `type "hello" + Enter`, `press ctrl+c`. Texts are cut after `most` characters."""
    match action:
        case Click(x, y, button, clicks):
            times = _TIMES.get(clicks, f"{clicks} times ")
            return f"{times}{'' if button is Button.LEFT else f'{button} '}click {_point(x, y)}"
        case Move(x, y):
            return f"move to {_point(x, y)}"
        case Drag(x, y, to_x, to_y):
            return f"drag {_point(x, y)} → {_point(to_x, to_y)}"
        case MouseDown(button, x, y) | MouseUp(button, x, y):
            what = "hold" if isinstance(action, MouseDown) else "let go of"
            where = "" if x is None or y is None else f" at {_point(x, y)}"
            return f"{what} the {button} button{where}"
        case LongPress(x, y, seconds):
            return f"long press {_point(x, y)}{'' if seconds is None else f' for {seconds:g} s'}"
        case Swipe(x, y, to_x, to_y):
            return f"swipe {_point(x, y)} → {_point(to_x, to_y)}"
        case OpenApp(name):
            return f"open the app {_quoted(name, most)}"
        case OpenURL(url):
            return f"open {_cut(url, most)}"
        case Back():
            return "go back"
        case Home():
            return "go to the home screen"
        case Type(text, enter):
            if enter and not text:
                return "press Enter"
            return f"type {_quoted(text, most)}{' + Enter' if enter else ''}"
        case Hotkey(keys):
            return f"press {_cut('+'.join(keys), most)}"
        case KeyDown(key):
            return f"hold {_cut(key, most)}"
        case KeyUp(key):
            return f"let go of {_cut(key, most)}"
        case Scroll(direction, x, y, amount):
            where = "" if x is None or y is None else f" at {_point(x, y)}"
            return f"scroll {direction}{'' if amount is None else f' by {amount}'}{where}"
        case Wait(seconds):
            return "wait" if seconds is None else f"wait {seconds:g} s"
        case Finished(content):
            return f"finished: {_quoted(content, most)}" if content else "finished"
        case CallUser(content):
            return f"call user: {_quoted(content, most)}" if content else "call user"
        case Noop(reason):
            return _cut(f"nothing: {reason}" if reason else "nothing", most)
        case Custom(name, arguments):
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            return _cut(f"{name}({given})", most)


def _point(x: float, y: float) -> str:
    return f"({round(x, 1):.6g}, {round(y, 1):.6g})"


def _quoted(text: str, most: int) -> str:
    return json.dumps(_cut(text, most, kept="\n\t"), ensure_ascii=False)


def _cut(text: str, most: int, kept: str = "") -> str:
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(sign if sign.isprintable() or sign in kept else "\ufffd" for sign in text)
