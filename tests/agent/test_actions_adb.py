"""Actions as commands of a phone's shell: run by a real shell, where Android's programs write down their words."""

from __future__ import annotations

import base64
import math
import random
import subprocess
from typing import Any, get_args

import pytest
from processes import HANG_S

from managed_vllm.agent.actions import (
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
    to_adb,
)

SCREEN = (1080, 2400)
END = "end of a call"
PROGRAMS = "".join(
    f"{name}() {{ printf '%s\\0' {name} \"$@\" '{END}'; }}\n" for name in ("input", "am", "monkey", "sleep")
)
"""Android's programs, as functions of the shell that write down their words."""


def on_phone(source: str) -> list[list[str]]:
    """Runs source as `adb shell` does on the device: the words of each program that it calls."""
    done = subprocess.run(
        ["/bin/sh", "-c", PROGRAMS + source],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
        env={"PATH": ""},
    )
    assert done.stderr == ""
    calls = done.stdout.split(f"{END}\0")
    assert calls.pop() == ""
    return [call.split("\0")[:-1] for call in calls]


def typed_by(words: str) -> str:
    """What `input text` types (InputShellCommand.sendText of Android)."""
    signs, escaped, at = list(words), False, 0
    while at < len(signs):
        if escaped:
            escaped = False
            if signs[at] == "s":
                signs[at] = " "
                at -= 1
                del signs[at]
        escaped = signs[at] == "%"
        at += 1
    return "".join(signs)


def test_source_does_what_the_actions_say() -> None:
    actions: list[Action] = [
        Click(197.4, 525.6),
        Click(1, 2, clicks=2),
        LongPress(1, 2),
        LongPress(1, 2, 2.5),
        Swipe(1, 2, 3, 4),
        Drag(1, 2, 3, 4),
        Type("it's\t5% done", enter=True),
        Hotkey(("ctrl", "a")),
        Hotkey(("Page_Down",)),
        Back(),
        Home(),
        OpenURL("https://example.org/?a='$(id)'&b=c d"),
        OpenURL("example.org"),
        OpenApp("Chrome"),
        OpenApp("org.videolan.vlc"),
        Wait(),
        Custom("key_event", {"key": "volume_up"}),
        Custom("system_button", {"button": "menu"}),
        Finished("x"),
        CallUser("y"),
        Noop("z\nreboot"),
    ]
    view = ["am", "start", "-a", "android.intent.action.VIEW", "-d"]
    launch = ["-c", "android.intent.category.LAUNCHER", "1"]
    called = [words for words in on_phone(to_adb(actions, SCREEN)) if words != ["sleep", "0.5"]]
    assert called == [
        ["input", "tap", "197", "526"],
        ["input", "tap", "1", "2"],
        ["input", "tap", "1", "2"],
        ["input", "swipe", "1", "2", "1", "2", "1000"],
        ["input", "swipe", "1", "2", "1", "2", "2500"],
        ["input", "swipe", "1", "2", "3", "4", "300"],
        ["input", "draganddrop", "1", "2", "3", "4", "1000"],
        ["input", "text", "it's"],
        ["input", "keyevent", "KEYCODE_TAB"],
        ["input", "text", "5%%sdone"],
        ["input", "keyevent", "KEYCODE_ENTER"],
        ["input", "keycombination", "KEYCODE_CTRL_LEFT", "KEYCODE_A"],
        ["input", "keyevent", "KEYCODE_PAGE_DOWN"],
        ["input", "keyevent", "KEYCODE_BACK"],
        ["input", "keyevent", "KEYCODE_HOME"],
        [*view, "https://example.org/?a='$(id)'&b=c d"],
        [*view, "https://example.org"],
        ["monkey", "-p", "com.android.chrome", *launch],
        ["monkey", "-p", "org.videolan.vlc", *launch],
        ["sleep", "5"],
        ["input", "keyevent", "KEYCODE_VOLUME_UP"],
        ["input", "keyevent", "KEYCODE_MENU"],
    ]
    assert to_adb([], SCREEN) == to_adb(Type(""), SCREEN) == ""


PIECES = (
    "%",
    "s",
    "%s",
    "%%",
    " ",
    "'",
    '"',
    "\\",
    "$(id)",
    "`id`",
    "; reboot",
    "\n",
    "\t",
    "#",
    "~",
    "-n",
    "{x}",
)


def test_what_is_typed_is_what_was_meant() -> None:
    chance = random.Random("typed")
    texts = ["100%sure", "% s", "%%s s", *PIECES]
    texts += ["".join(chance.choices(PIECES, k=chance.randint(1, 12))) for _ in range(300)]
    keys = {"KEYCODE_ENTER": "\n", "KEYCODE_TAB": "\t"}
    sources = [to_adb(Type(text), SCREEN) for text in texts]
    typed: list[list[str]] = [[]]
    for words in on_phone("sleep next\n".join(sources)):
        if words[0] == "sleep":
            typed.append([])
        else:
            typed[-1].append(keys[words[2]] if words[1] == "keyevent" else typed_by(words[2]))
    assert ["".join(each) for each in typed] == texts


def test_any_text_can_be_typed_by_adb_keyboard() -> None:
    texts = ["日本語\n", "'$(id)'", "\x00"]
    called = [on_phone(to_adb(Type(text), SCREEN, typing="adb_keyboard"))[0] for text in texts]
    assert [words[:-1] for words in called] == [["am", "broadcast", "-a", "ADB_INPUT_B64", "--es", "msg"]] * 3
    assert [base64.b64decode(words[-1]).decode() for words in called] == texts


@pytest.mark.parametrize(
    ("action", "ways"),
    [
        (Scroll(Direction.DOWN), [(540, 1800, 540, 600)]),
        (Scroll(Direction.UP), [(540, 600, 540, 1800)]),
        (Scroll(Direction.RIGHT), [(810, 1200, 270, 1200)]),
        (Scroll(Direction.LEFT), [(270, 1200, 810, 1200)]),
        (Scroll(Direction.DOWN, 100, 1000, 2), [(100, 1240, 100, 760)]),
        (Scroll(Direction.DOWN, 100, 10, 2), [(100, 480, 100, 0)]),
        (Scroll(Direction.UP, 100, 2399, 2), [(100, 1919, 100, 2399)]),
        (Scroll(Direction.DOWN, amount=10), [(540, 2160, 540, 240), (540, 1440, 540, 960)]),
    ],
)
def test_the_finger_goes_against_the_view(action: Scroll, ways: list[tuple[int, ...]]) -> None:
    lines = [line for line in to_adb(action, SCREEN).splitlines() if line.startswith("input")]
    assert [tuple(map(int, line.split()[2:6])) for line in lines] == ways


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Click(1, 2, Button.RIGHT), "a phone can't carry out Click"),
        (Click(1, 2, clicks=0), "a phone can't carry out Click"),
        (Click(math.nan, 2), "is no coordinate"),
        (Move(1, 2), "a phone can't carry out Move"),
        (MouseDown(), "a phone can't carry out MouseDown"),
        (MouseUp(), "a phone can't carry out MouseUp"),
        (KeyDown("shift"), "a phone can't carry out KeyDown"),
        (KeyUp("shift"), "a phone can't carry out KeyUp"),
        (Custom("fly"), "a phone can't carry out Custom"),
        (Custom("key_event", {"key": "a; reboot"}), "is no key of Android's"),
        (Custom("key_event"), "is no key of Android's"),
        (Hotkey(()), "a Hotkey needs a key"),
        (Hotkey(("playpause",)), "Android has no key 'playpause'"),
        (Hotkey(("foo",)), "Android has no key 'foo'"),
        (OpenApp("Nothing"), "no package is known for the app 'Nothing'"),
        (OpenApp("a.b; reboot"), "no package is known"),
        (OpenURL("https://\x00"), "zero byte"),
        (OpenURL("https://\ud800"), "surrogates not allowed"),
        (Type("é"), r"has keys for ASCII only, not for '\\xe9'"),
        (Type("\r"), "has keys for ASCII only"),
        (Scroll(Direction.UP, amount=0), "scrolls by 1 to 160 steps"),
        (Scroll(Direction.UP, amount=1000), "scrolls by 1 to 160 steps"),
        (Wait(-1), "is no number of seconds"),
        (LongPress(1, 2, math.inf), "is no number of seconds"),
    ],
)
def test_what_a_phone_can_not_do_is_refused(action: Action, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_adb(action, SCREEN)


def test_what_is_the_callers_choice() -> None:
    assert to_adb(OpenApp("Notes"), SCREEN, apps={"notes": "org.notes"}).startswith("monkey -p org.notes ")
    assert to_adb([Back(), Home()], SCREEN, pause_s=0.25).splitlines()[1] == "sleep 0.25"
    assert to_adb(Wait(), SCREEN, wait_s=1.5) == "sleep 1.5\n"
    assert to_adb(Scroll(Direction.DOWN), SCREEN, scroll_amount=1).startswith("input swipe 540 1320 540 1080 ")
    with pytest.raises(ValueError, match="typing must be one of"):
        to_adb(Back(), SCREEN, typing="hand")  # type: ignore[arg-type]


def test_every_action_is_carried_out_or_refused() -> None:
    values: dict[str, Any] = {"x": 1.0, "y": 2.0, "to_x": 3.0, "to_y": 4.0, "text": "a", "keys": ("a",), "key": "a"}
    values |= {"direction": Direction.UP, "name": "chrome", "url": "https://x"}
    refused = set()
    for kind in get_args(Action):
        given = {key: values[key] for key, field in kind.__dataclass_fields__.items() if key in values}
        try:
            assert to_adb(kind(**given), SCREEN)
        except ValueError:
            refused.add(kind)
    assert refused == {Move, MouseDown, MouseUp, KeyDown, KeyUp, Custom}
