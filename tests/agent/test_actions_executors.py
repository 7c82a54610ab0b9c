"""Actions as pyautogui's source, in words, and as records."""

from __future__ import annotations

import ast
import io
import json
import math
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import HANG_S, is_live

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
    action_from_dict,
    action_to_dict,
    describe,
    parse_ui_tars,
    table,
    to_pyautogui,
)
from managed_vllm.agent.actions.pyautogui_source import CLIPBOARD

NUMBERS = st.floats(0, 5000)
HARD = st.sampled_from(
    ["'''", '"""', "\\", "'); import os; os.system('x", "\n", "\r", "<", "\x00", "{x}", "é", "# a", "%s"]
)
TEXTS = st.lists(st.one_of(HARD, st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), max_size=6).map(
    "".join
)
KEYS = st.sampled_from(["ctrl", "c", "arrowleft", "space", "'", '"', "\\", "page_down", "f24", "cmd", "<"])
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.builds(Click, NUMBERS, NUMBERS, st.sampled_from(Button), st.integers(1, 3)),
    st.builds(Drag, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Type, TEXTS, st.booleans()),
    st.builds(Hotkey, st.lists(KEYS, min_size=1, max_size=3).map(tuple)),
    st.builds(Scroll, st.sampled_from(Direction), NUMBERS, NUMBERS, st.none() | st.integers(1, 20)),
    st.builds(Scroll, st.sampled_from(Direction)),
    st.builds(Move, NUMBERS, NUMBERS),
    st.builds(KeyDown, KEYS),
    st.builds(KeyUp, KEYS),
    st.builds(MouseDown, st.sampled_from(Button)),
    st.builds(MouseUp, st.sampled_from(Button), NUMBERS, NUMBERS),
    st.builds(LongPress, NUMBERS, NUMBERS, st.none() | st.floats(0, 60)),
    st.builds(Noop, TEXTS),
    st.builds(Wait, st.none() | st.floats(0, 60)),
    st.builds(Finished, TEXTS),
    st.builds(CallUser, TEXTS),
)
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}

NODES = (
    *(ast.Module, ast.Import, ast.alias, ast.Expr, ast.Call, ast.Attribute, ast.Name, ast.Load, ast.Constant),
    *(ast.keyword, ast.UnaryOp, ast.USub),
)
MOUSE_AND_KEYS = ("click", "moveTo", "dragTo", "scroll", "hscroll", "write", "press", "hotkey", "keyDown", "keyUp")
FUNCTIONS = {f"pyautogui.{name}" for name in (*MOUSE_AND_KEYS, "mouseDown", "mouseUp")}
FUNCTIONS |= {"time.sleep", "to_clipboard"}
KEYWORDS = {"clicks", "button", "duration", "interval", "x", "y"}


def check_source(source: str) -> list[str]:
    """That nothing but the expected calls of constants is in it. Returns its string literals."""
    assert source.isascii()
    source = source.replace(CLIPBOARD, "", 1)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        assert isinstance(node, NODES), ast.dump(node)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) in FUNCTIONS
            assert all(isinstance(argument, ast.Constant | ast.UnaryOp) for argument in node.args)
            assert {keyword.arg for keyword in node.keywords} <= KEYWORDS
        if isinstance(node, ast.alias):
            assert (node.name, node.asname) in {("pyautogui", None), ("time", None)}
        if isinstance(node, ast.Name):
            assert node.id in {"pyautogui", "time", "to_clipboard"}
    comments = {t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    assert comments <= {"# finished: nothing to do", "# call_user: nothing to do", "# nothing to do"}
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@settings(max_examples=examples(200), **QUIET)
@given(st.lists(ACTIONS, max_size=4), st.sampled_from(["auto", "paste"]))
def test_source_parses_and_has_the_models_text_in_literals_only(actions: list[Action], typing: Any) -> None:
    check_source(to_pyautogui(actions, typing=typing))


@pytest.mark.parametrize(
    "text",
    [
        "'''); import os; os.system('touch x'); ('''",
        "\\",
        "\\'",
        "a\\\nb",
        "\r\nimport os",
        "\u2028import os",
        "\x00",
        "{__import__('os')}",
    ],
)
def test_text_that_looks_like_code_stays_text(text: str) -> None:
    for quoted in (text, f'"{text}"', f"'{text}'"):
        assert quoted in check_source(to_pyautogui(Type(quoted), typing="paste"))
        assert "".join(check_source(to_pyautogui(Hotkey(("a",))))) == "a"


def test_a_thought_is_not_in_the_source() -> None:
    response = parse_ui_tars("Thought: '''\nimport os\n'''\nAction: finished(content='''\nimport os''')", (1920, 1080))
    assert check_source(to_pyautogui(response.actions)) == []


RECORDER = """
import atexit, json, sys
calls = []
def __getattr__(name):
    return lambda *args, **kwargs: calls.append([name, list(args), kwargs])
atexit.register(lambda: print(json.dumps(calls)))
"""


def calls_of(source: str, folder: Path) -> list[list[Any]]:
    """What the source does, run by a Python of its own where pyautogui, pyperclip and time write down their calls."""
    (folder / "recorder.py").write_text(RECORDER)
    for name in ("pyautogui", "pyperclip"):
        (folder / f"{name}.py").write_text(
            f"import recorder\ndef __getattr__(name):\n    return getattr(recorder, '{name}.' + name)\n"
        )
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); import time; time.sleep = lambda seconds: None\n"
    done = subprocess.run([sys.executable, "-c", start + source], capture_output=True, text=True, check=True)
    calls: list[list[Any]] = json.loads(done.stdout)
    return calls


def test_source_does_what_the_actions_say(tmp_path: Path) -> None:
    actions: list[Action] = [
        Click(197.4, 525.6),
        Click(1, 2, Button.RIGHT),
        Click(1, 2, Button.LEFT, 2),
        Drag(1, 2, 3, 4),
        Type("if a < b:\n\tit's", True),
        Type("日本語\n"),
        Hotkey(("ctrl", "arrowleft")),
        Hotkey(("space",)),
        Scroll(Direction.UP),
        Scroll(Direction.DOWN, 5, 6),
        Scroll(Direction.LEFT, 5, 6, 2),
        Scroll(Direction.RIGHT),
        Move(7, 8),
        KeyDown("shift"),
        KeyUp("arrowup"),
        MouseDown(),
        MouseUp(Button.RIGHT, 9, 10),
        LongPress(1, 2),
        Wait(),
        Finished("x"),
        CallUser("y"),
    ]
    assert calls_of(to_pyautogui(actions), tmp_path) == [
        ["pyautogui.click", [197, 526], {"button": "left"}],
        ["pyautogui.click", [1, 2], {"button": "right"}],
        ["pyautogui.click", [1, 2], {"clicks": 2, "button": "left"}],
        ["pyautogui.moveTo", [1, 2], {}],
        ["pyautogui.dragTo", [3, 4], {"duration": 1.0, "button": "left"}],
        ["pyautogui.write", ["if a "], {"interval": 0.02}],
        ["pyautogui.hotkey", ["shift", ","], {}],
        ["pyautogui.write", [" b:\n\tit's"], {"interval": 0.02}],
        ["pyautogui.press", ["enter"], {}],
        ["pyperclip.copy", ["日本語\n"], {}],
        ["pyautogui.hotkey", ["ctrl", "v"], {}],
        ["pyautogui.hotkey", ["ctrl", "left"], {}],
        ["pyautogui.press", [" "], {}],
        ["pyautogui.scroll", [5], {}],
        ["pyautogui.scroll", [-5], {"x": 5, "y": 6}],
        ["pyautogui.hscroll", [-2], {"x": 5, "y": 6}],
        ["pyautogui.hscroll", [5], {}],
        ["pyautogui.moveTo", [7, 8], {}],
        ["pyautogui.keyDown", ["shift"], {}],
        ["pyautogui.keyUp", ["up"], {}],
        ["pyautogui.mouseDown", [], {"button": "left"}],
        ["pyautogui.mouseUp", [9, 10], {"button": "right"}],
        ["pyautogui.mouseDown", [1, 2], {}],
        ["pyautogui.mouseUp", [], {}],
    ]


@pytest.mark.parametrize("action", [Swipe(1, 2, 3, 4), OpenApp("x"), OpenURL("https://x"), Back(), Home()])
def test_what_a_desktop_does_not_have_is_refused(action: Action) -> None:
    assert action_from_dict(json.loads(json.dumps(action_to_dict(action)))) == action
    with pytest.raises(ValueError, match=f"pyautogui can't carry out {type(action).__name__}"):
        to_pyautogui(action)


HOLDER = """
import subprocess, sys
def copy(text):
    if text == "\u00e9":
        raise RuntimeError("no clipboard")
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(__file__ + ".pid", "w") as file:
        file.write(str(holder.pid))
"""
"""A pyperclip whose clipboard is a program that stays, as xclip does."""


def test_a_program_that_holds_the_clipboard_does_not_hold_the_output_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "pyperclip.py").write_text(HOLDER)
    (tmp_path / "pyautogui.py").write_text("def hotkey(*keys):\n    print(keys)\n")

    def run(text: str) -> subprocess.CompletedProcess[str]:
        start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        command = [sys.executable, "-c", start + to_pyautogui(Type(text), typing="paste")]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)

    try:
        assert run("x").stdout == "('ctrl', 'v')\n"
    finally:
        holder = psutil.Process(int((tmp_path / "pyperclip.py.pid").read_text()))
        held = is_live(holder)
        holder.kill()
    assert held
    failed = run("é")
    assert failed.returncode == 1
    assert "no clipboard" in failed.stderr


def test_waiting_and_keys_are_the_callers_choice() -> None:
    assert "time.sleep(5.0)" in to_pyautogui(Wait())
    assert "time.sleep(0.25)" in to_pyautogui(Wait(), wait_s=0.25)
    assert "time.sleep(2.0)" in to_pyautogui(Wait(2), wait_s=0.25)
    assert "hotkey('win', 'e')" in to_pyautogui(Hotkey(("cmd", "e")))
    assert "hotkey('command', 'e')" in to_pyautogui(Hotkey(("cmd", "e")), keys={"cmd": "command"})
    assert "hotkey('command', 'v')" in to_pyautogui(Type("é"), paste_keys=("command", "v"))
    assert to_pyautogui([]) == to_pyautogui(Type("")) == "import pyautogui\nimport time\n"


@pytest.mark.parametrize(
    ("action", "typing"),
    [
        (Custom("fly"), "auto"),
        (Hotkey(("foo",)), "auto"),
        (Hotkey(("é",)), "auto"),
        (Hotkey(()), "auto"),
        (Click(math.nan, 1), "auto"),
        (Click(1, 1, clicks=0), "auto"),
        (Wait(-1), "auto"),
        (Wait(math.inf), "auto"),
        (Type("é"), "write"),
        (Type("\ud800"), "auto"),
        (Wait(), "by hand"),
    ],
)
def test_what_pyautogui_can_not_do_is_an_error(action: Action, typing: Any) -> None:
    with pytest.raises(ValueError):
        to_pyautogui([action], typing=typing)


def test_every_action_of_the_table_is_one_that_pyautogui_carries_out_and_people_can_read() -> None:
    values = {"x": 1.0, "y": 2.0, "button": "left", "clicks": 1, "text": "a", "truth": True, "key": "a", "keys": ["a"]}
    values |= {"direction": "up", "amount": 1, "seconds": 1.0}
    for name, kind in table.ACTIONS.items():
        action = action_from_dict({"type": name, **{key: values[field.kind] for key, field in kind.fields.items()}})
        assert isinstance(action, kind.make)
        assert to_pyautogui(action)
        assert describe(action)
    assert set(table.ACTION_CLASSES.values()) == set(get_args(Action))
    assert to_pyautogui(Noop("x")).count("#") == 1


# -- in words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Click(197, 525), "click (197, 525)"),
        (Click(197.44, 525.5), "click (197.4, 525.5)"),
        (Click(1, 2, Button.RIGHT), "right click (1, 2)"),
        (Click(1, 2, Button.LEFT, 2), "double click (1, 2)"),
        (Click(1, 2, Button.LEFT, 5), "5 times click (1, 2)"),
        (Drag(1, 2, 3, 4), "drag (1, 2) → (3, 4)"),
        (Type("hello", True), 'type "hello" + Enter'),
        (Type("a\nb"), 'type "a\\nb"'),
        (Type("", True), "press Enter"),
        (Hotkey(("ctrl", "c")), "press ctrl+c"),
        (Move(1, 2), "move to (1, 2)"),
        (KeyDown("shift"), "hold shift"),
        (KeyUp("shift"), "let go of shift"),
        (MouseDown(), "hold the left button"),
        (MouseUp(Button.RIGHT, 1, 2), "let go of the right button at (1, 2)"),
        (LongPress(1, 2), "long press (1, 2)"),
        (LongPress(1, 2, 1.5), "long press (1, 2) for 1.5 s"),
        (Swipe(1, 2, 3, 4), "swipe (1, 2) → (3, 4)"),
        (OpenApp("Clock"), 'open the app "Clock"'),
        (OpenURL("https://x"), "open https://x"),
        (Back(), "go back"),
        (Home(), "go to the home screen"),
        (Scroll(Direction.DOWN), "scroll down"),
        (Scroll(Direction.DOWN, 1, 2, 3), "scroll down by 3 at (1, 2)"),
        (Wait(), "wait"),
        (Wait(2.5), "wait 2.5 s"),
        (Noop(), "nothing"),
        (Noop("a drag without points"), "nothing: a drag without points"),
        (Finished(), "finished"),
        (Finished("42"), 'finished: "42"'),
        (CallUser("why"), 'call user: "why"'),
        (Custom("fly", {"to": "x"}), "fly(to='x')"),
    ],
)
def test_an_action_in_words(action: Action, words: str) -> None:
    assert describe(action) == words


def test_words_are_one_short_line() -> None:
    assert describe(Type("x" * 1000), most=10) == f'type "{"x" * 9}…"'
    assert describe(Custom("a\nb\x1b[31m", {}), most=40).isprintable()


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.no_cover
@settings(max_examples=examples(200), **QUIET)
@given(ACTIONS)
def test_a_record_is_the_same_action_again(action: Action) -> None:
    values = action_to_dict(action)
    again = action_from_dict(json.loads(json.dumps(values)))
    assert again == action
    assert type(again) is type(action)
    assert action_to_dict(again) == values


def test_a_custom_action_keeps_its_arguments() -> None:
    action = Custom("fly", {"to": [1, 2.5, None, {"a": True}], "é": "x"})
    assert action_from_dict(json.loads(json.dumps(action_to_dict(action)))) == action
    assert action_to_dict(Custom("fly", {"to": (1, 2)}))["arguments"] == {"to": [1, 2]}


def test_fields_with_a_default_may_be_missing() -> None:
    assert action_from_dict({"type": "click", "x": 1, "y": 2}) == Click(1, 2)
    assert action_from_dict({"type": "scroll", "direction": "up"}) == Scroll(Direction.UP)


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"type": "fly"},
        {"type": ["click"]},
        {"type": "click", "x": 1},
        {"type": "click", "x": 1, "y": 2, "z": 3},
        {"type": "click", "x": "1", "y": 2},
        {"type": "click", "x": True, "y": 2},
        {"type": "click", "x": math.nan, "y": 2},
        {"type": "click", "x": 1, "y": 2, "button": "leftmost"},
        {"type": "click", "x": 1, "y": 2, "clicks": 1.5},
        {"type": "type", "text": 1},
        {"type": "type", "text": "a", "enter": 1},
        {"type": "hotkey", "keys": "ctrl c"},
        {"type": "hotkey", "keys": [1]},
        {"type": "scroll", "direction": "in"},
        {"type": "custom", "name": "a", "arguments": [1]},
    ],
)
def test_what_is_no_record_is_a_value_error(values: Any) -> None:
    with pytest.raises(ValueError):
        action_from_dict(values)


@pytest.mark.parametrize(
    "action",
    [
        Click(math.inf, 1),
        Custom("a", {"b": b"c"}),
        Custom("a", {1: "b"}),  # type: ignore[dict-item]
        "click",
    ],
)
def test_what_json_can_not_hold_is_a_value_error(action: Any) -> None:
    with pytest.raises(ValueError):
        action_to_dict(action)


def test_arguments_that_hold_themselves_are_a_value_error() -> None:
    arguments: dict[str, Any] = {}
    arguments["a"] = arguments
    with pytest.raises(ValueError, match="nested"):
        action_to_dict(Custom("a", arguments))
