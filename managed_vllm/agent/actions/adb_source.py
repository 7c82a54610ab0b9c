"""Actions as commands of a phone's shell: what `adb shell` runs on an Android device.

    subprocess.run(["adb", "-s", serial, "shell", to_adb(actions, (1080, 2400))], check=True)

The commands are Android's own (`input`, `am`, `monkey`), one a line. What the model said is in them as quoted words
only, numbers are written by us: no answer can become a command. `input text` reads `%s` as a blank and has keys for
ASCII only (frameworks/base, InputShellCommand): texts are written so that what is typed is what was meant. Keys pressed
together take Android 12 (`input keycombination`); nothing here can hold a key or a finger beyond its command.
"""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal, get_args

from managed_vllm.agent.actions.keys import key_of
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
    Click,
    Custom,
    Direction,
    Drag,
    Finished,
    Home,
    Hotkey,
    LongPress,
    Noop,
    OpenApp,
    OpenURL,
    Scroll,
    Swipe,
    Type,
    Wait,
)

ADBTyping = Literal["keys", "adb_keyboard"]

APPS: Mapping[str, str] = MappingProxyType(
    {
        "calendar": "com.google.android.calendar",
        "chrome": "com.android.chrome",
        "clock": "com.google.android.deskclock",
        "contacts": "com.google.android.contacts",
        "files": "com.google.android.documentsui",
        "gmail": "com.google.android.gm",
        "maps": "com.google.android.apps.maps",
        "messages": "com.google.android.apps.messaging",
        "phone": "com.google.android.dialer",
        "photos": "com.google.android.apps.photos",
        "play store": "com.android.vending",
        "settings": "com.android.settings",
        "youtube": "com.google.android.youtube",
    }
)
"""Packages of Google's apps, by their names in lower case."""

_PACKAGE = re.compile(r"[A-Za-z]\w*(?:\.\w+)+", re.ASCII)
_KEYCODE = re.compile(r"(?:KEYCODE_)?([A-Z0-9_]{1,40})", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:", re.ASCII)
_KEYCODES = {
    **{letter: letter.upper() for letter in "abcdefghijklmnopqrstuvwxyz0123456789"},
    **{f"f{number}": f"F{number}" for number in range(1, 13)},
    **{name: name.upper() for name in ("enter", "tab", "insert", "sleep")},
    **{"return": "ENTER", "esc": "ESCAPE", "escape": "ESCAPE", " ": "SPACE", "backspace": "DEL"},
    **{"delete": "FORWARD_DEL", "del": "FORWARD_DEL", "home": "MOVE_HOME", "end": "MOVE_END"},
    **{"pageup": "PAGE_UP", "pgup": "PAGE_UP", "pagedown": "PAGE_DOWN", "pgdn": "PAGE_DOWN", "capslock": "CAPS_LOCK"},
    **{name: f"DPAD_{name.upper()}" for name in ("up", "down", "left", "right")},
    **{"ctrl": "CTRL_LEFT", "ctrlleft": "CTRL_LEFT", "ctrlright": "CTRL_RIGHT", "alt": "ALT_LEFT"},
    **{"altleft": "ALT_LEFT", "altright": "ALT_RIGHT", "shift": "SHIFT_LEFT", "shiftleft": "SHIFT_LEFT"},
    **{"shiftright": "SHIFT_RIGHT", "win": "META_LEFT", "winleft": "META_LEFT", "winright": "META_RIGHT"},
    **{"volumeup": "VOLUME_UP", "volumedown": "VOLUME_DOWN", "volumemute": "VOLUME_MUTE", "apps": "MENU"},
    **{"printscreen": "SYSRQ", "-": "MINUS", "=": "EQUALS", ",": "COMMA", ".": "PERIOD", ";": "SEMICOLON"},
    **{"'": "APOSTROPHE", "/": "SLASH", "\\": "BACKSLASH", "[": "LEFT_BRACKET", "]": "RIGHT_BRACKET", "`": "GRAVE"},
    **{"+": "PLUS", "@": "AT", "*": "STAR", "#": "POUND"},
}
"""Android's names of keys, by pyautogui's."""

_STEPS = 10
"""A step of scrolling is so much of the screen's side; a finger goes over `_LONGEST` of them at once."""
_LONGEST = 8
_MOST_SWIPES = 20


def to_adb(
    actions: Action | Iterable[Action],
    screen: tuple[int, int],
    *,
    typing: ADBTyping = "keys",
    apps: Mapping[str, str] = APPS,
    scroll_amount: int = 5,
    swipe_s: float = 0.3,
    drag_s: float = 1.0,
    long_press_s: float = 1.0,
    wait_s: float = 5.0,
    pause_s: float = 0.5,
) -> str:
    """Commands that carry the actions out, one after the other, for the shell of the device.

    Args:
        actions: one, or several; their points are pixels of the screen.
        screen: its width and height, for scrolling.
        typing: `keys` types what ASCII has. `adb_keyboard` types anything, by the keyboard ADBKeyBoard
            (github.com/senzhk/ADBKeyBoard), which must be installed and chosen on the device.
        apps: packages by the names of their apps, in lower case; a name that is a package is taken as it is.
        scroll_amount: steps where an action has no `amount`; a step is a tenth of the screen.
        swipe_s, drag_s: seconds that the finger takes.
        long_press_s: seconds of a `LongPress` that has none.
        wait_s: seconds of a `Wait` that has none.
        pause_s: seconds between two actions.

    Raises `ValueError`: what a phone can't do (a right click, `Move`, `MouseDown`, `KeyDown` and their like, a `Custom`
    other than `key_event` and `system_button`), an app whose package is not known, a key that Android does not have, a
    number that is none, text that can't be typed in the way that was asked for.
    """
    if typing not in get_args(ADBTyping):
        raise ValueError(f"typing must be one of {', '.join(get_args(ADBTyping))}, not {typing!r:.80}")

    def swiped(name: str, *ends: float, seconds: float) -> str:
        return f"input {name} {' '.join(map(_pixel, ends))} {_milliseconds(seconds)}"

    def commands(action: Action) -> list[str]:
        match action:
            case Click(x, y, Button.LEFT, clicks) if clicks >= 1:
                return [f"input tap {_pixel(x)} {_pixel(y)}"] * clicks
            case LongPress(x, y, seconds):
                return [swiped("swipe", x, y, x, y, seconds=long_press_s if seconds is None else seconds)]
            case Swipe(x, y, to_x, to_y):
                return [swiped("swipe", x, y, to_x, to_y, seconds=swipe_s)]
            case Drag(x, y, to_x, to_y):
                return [swiped("draganddrop", x, y, to_x, to_y, seconds=drag_s)]
            case Scroll():
                ways = _scrolled(action, screen, scroll_amount)
                return [swiped("swipe", *way, seconds=swipe_s) for way in ways]
            case Type(text, enter):
                return [*_typed(text, typing), *([_press("ENTER")] if enter else [])]
            case Hotkey(keys):
                return [_pressed([_keycode(key) for key in keys])]
            case Back():
                return [_press("BACK")]
            case Home():
                return [_press("HOME")]
            case OpenURL(url):
                return [f"am start -a android.intent.action.VIEW -d {_quoted(_address(url))}"]
            case OpenApp(name):
                return [f"monkey -p {_package(name, apps)} -c android.intent.category.LAUNCHER 1"]
            case Wait(seconds):
                return [f"sleep {_seconds(wait_s if seconds is None else seconds)}"]
            case Finished() | CallUser() | Noop():
                return [f"# {type(action).__name__}: nothing to do"]
            case Custom("key_event" | "system_button"):
                return [_press(_named(action))]
        raise ValueError(f"a phone can't carry out {action!r:.200}")

    steps = [actions] if isinstance(actions, Action) else list(actions)
    blocks = [block for step in steps if (block := "\n".join(commands(step)))]
    source = f"\nsleep {_seconds(pause_s)}\n".join(blocks)
    return f"{source}\n" if source else ""


# -- text --------------------------------------------------------------------------------------------------------------

_KEYS_OF_TEXT = {"\n": "ENTER", "\t": "TAB"}
_PIECE = re.compile(r"[\n\t]|[^\n\t]+")


def _typed(text: str, typing: ADBTyping) -> list[str]:
    if typing == "adb_keyboard":
        said = base64.b64encode(text.encode()).decode()  # UnicodeEncodeError is a ValueError
        return [f"am broadcast -a ADB_INPUT_B64 --es msg {said}"] if said else []
    other = next((sign for sign in text if not (" " <= sign <= "~" or sign in _KEYS_OF_TEXT)), None)
    if other is not None:
        raise ValueError(f"`input text` has keys for ASCII only, not for {other!a}: use typing='adb_keyboard'")
    return [line for piece in _PIECE.findall(text) for line in _entered(piece)]


def _entered(piece: str) -> Iterator[str]:
    """`input text` makes a blank of each %s: one that is meant as it is goes in two commands."""
    if piece in _KEYS_OF_TEXT:
        yield _press(_KEYS_OF_TEXT[piece])
        return
    parts = piece.split("%s")
    for index, part in enumerate(parts):
        words = ("s" if index else "") + part + ("%" if index < len(parts) - 1 else "")
        yield f"input text {_quoted(words.replace(' ', '%s'))}"


def _quoted(text: str) -> str:
    if "\x00" in text:
        raise ValueError("a shell's word can't have a zero byte")
    text.encode()  # half of a surrogate pair: UnicodeEncodeError, a ValueError
    return shlex.quote(text)


# -- keys and names ----------------------------------------------------------------------------------------------------


def _press(keycode: str) -> str:
    return f"input keyevent KEYCODE_{keycode}"


def _pressed(keycodes: list[str]) -> str:
    if not keycodes:
        raise ValueError("a Hotkey needs a key")
    if len(keycodes) == 1:
        return _press(keycodes[0])
    return f"input keycombination {' '.join(f'KEYCODE_{keycode}' for keycode in keycodes)}"


def _keycode(name: str) -> str:
    keycode = _KEYCODES.get(key_of(name) or "")
    if keycode is None:
        raise ValueError(f"Android has no key {name!r:.80}")
    return keycode


def _named(action: Custom) -> str:
    """The key of a `key_event`, or of a `system_button` (Back, Home, Menu, Enter), by Android's own name."""
    said = action.arguments.get("key", action.arguments.get("button"))
    match = _KEYCODE.fullmatch(said.upper()) if isinstance(said, str) else None
    if match is None:
        raise ValueError(f"{said!r:.80} is no key of Android's")
    return match[1]


def _package(name: str, apps: Mapping[str, str]) -> str:
    package = apps.get(name.strip().lower(), name.strip())
    if _PACKAGE.fullmatch(package) is None:
        raise ValueError(f"no package is known for the app {name!r:.80}: give it by apps=")
    return package


def _address(url: str) -> str:
    """As a browser takes it: an address without a scheme is one of the web."""
    return url if _SCHEME.match(url) is not None else f"https://{url}"


# -- fingers and numbers -----------------------------------------------------------------------------------------------


def _scrolled(action: Scroll, screen: tuple[int, int], default: int) -> Iterator[tuple[float, float, float, float]]:
    """The ways of a finger that scroll so far: against the direction that the view moves to, within the screen."""
    steps = default if action.amount is None else action.amount
    if not 0 < steps <= _MOST_SWIPES * _LONGEST:
        raise ValueError(f"a phone scrolls by 1 to {_MOST_SWIPES * _LONGEST} steps, not by {steps}")
    upright = action.direction in (Direction.UP, Direction.DOWN)
    side, across = (screen[1], screen[0]) if upright else screen
    at, beside = (action.y, action.x) if upright else (action.x, action.y)
    sign = -1 if action.direction in (Direction.DOWN, Direction.RIGHT) else 1
    beside = across / 2 if beside is None else beside
    while steps > 0:
        length = min(steps, _LONGEST) * side / _STEPS
        middle = min(max(side / 2 if at is None else at, length / 2), side - 1 - length / 2)
        begin, end = middle - sign * length / 2, middle + sign * length / 2
        yield (beside, begin, beside, end) if upright else (begin, beside, end, beside)
        steps -= _LONGEST


def _pixel(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no coordinate")
    return str(round(value))


def _seconds(value: float) -> str:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value} is no number of seconds")
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _milliseconds(value: float) -> str:
    return str(round(float(_seconds(value)) * 1000))
