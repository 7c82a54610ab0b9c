"""Answers in pyautogui's calls: as OpenCUA, Kimi and Aguvis give them, and what is none. Nothing is ever executed."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples

from managed_vllm.agent.actions import (
    Action,
    ActionParseError,
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
    Scroll,
    Type,
    Wait,
    action_from_dict,
    action_to_dict,
    parse_python_code,
)
from managed_vllm.agent.actions.python_code import PARAMETERS, calls_in_words
from managed_vllm.agent.model_formats import opencua, python_code
from managed_vllm.request.outputs import CompletionOutput

SIZES = [(1920, 1080), (1000, 1000), (390, 844)]


def fenced(code: str, language: str = "python") -> str:
    return f"## Thought:\nSo.\n## Action:\nI do it.\n## Code:\n```{language}\n{code}\n```"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("code", "button", "clicks"),
    [
        ("pyautogui.click(x=0.5, y=0.25)", Button.LEFT, 1),
        ("pyautogui.click(0.5, 0.25)", Button.LEFT, 1),
        ("pyautogui.click((0.5, 0.25))", Button.LEFT, 1),
        ("pyautogui.click(x=0.5, y=0.25, button='right')", Button.RIGHT, 1),
        ("pyautogui.click(0.5, 0.25, 2, 0.1, 'middle')", Button.MIDDLE, 2),
        ("pyautogui.rightClick(0.5, 0.25)", Button.RIGHT, 1),
        ("pyautogui.middleClick(0.5, 0.25)", Button.MIDDLE, 1),
        ("pyautogui.doubleClick(x=0.5, y=0.25)", Button.LEFT, 2),
        ("pyautogui.tripleClick(x=0.5, y=0.25)", Button.LEFT, 3),
        ("computer.triple_click(x=0.5, y=0.25)", Button.LEFT, 3),
    ],
)
def test_clicks(size: tuple[int, int], code: str, button: Button, clicks: int) -> None:
    parsed = parse_python_code(fenced(code), size)
    assert parsed.actions == (Click(size[0] / 2, size[1] / 4, button, clicks),)
    assert parsed.thought == "So.\n## Action:\nI do it."


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pyautogui.click()", [MouseDown(), MouseUp()]),
        ("pyautogui.moveTo(0.1, 0.2)", [Move(100, 200)]),
        ("pyautogui.moveTo(0.1, 0.2)\npyautogui.dragTo(0.3, 0.4, duration=0.5)", [Drag(100, 200, 300, 400)]),
        ("pyautogui.dragTo(0.3, 0.4, button='left')", [MouseDown(), Move(300, 400), MouseUp()]),
        (
            "pyautogui.moveTo(0.1, 0.2)\npyautogui.dragTo(0.3, 0.4, button='right')",
            [Move(100, 200), MouseDown(Button.RIGHT), Move(300, 400), MouseUp(Button.RIGHT)],
        ),
        ("pyautogui.mouseDown(0.1, 0.2)\npyautogui.mouseUp()", [MouseDown(Button.LEFT, 100, 200), MouseUp()]),
        ("pyautogui.write('it\\'s\\n')", [Type("it's\n")]),
        ("pyautogui.typewrite(message='x', interval=0.1)", [Type("x")]),
        ("pyautogui.write(['a', 'enter'])", [Hotkey(("a",)), Hotkey(("enter",))]),
        ("pyautogui.press('down', presses=3)", [Hotkey(("down",))] * 3),
        ("pyautogui.press(['a', 'b'])", [Hotkey(("a",)), Hotkey(("b",))]),
        ("pyautogui.hotkey('ctrl', 'C')", [Hotkey(("ctrl", "c"))]),
        ("pyautogui.hotkey(['ctrl', 'c'])", [Hotkey(("ctrl", "c"))]),
        ("pyautogui.hotkey(keys=['ctrl', 'c'], interval=0.1)", [Hotkey(("ctrl", "c"))]),
        ("pyautogui.keyDown('shift')\npyautogui.keyUp('shift')", [KeyDown("shift"), KeyUp("shift")]),
        ("pyautogui.scroll(-5)", [Scroll(Direction.DOWN, None, None, 5)]),
        ("pyautogui.scroll(3, x=0.1, y=0.2)", [Scroll(Direction.UP, 100, 200, 3)]),
        ("pyautogui.hscroll(-2)", [Scroll(Direction.LEFT, None, None, 2)]),
        ("pyautogui.scroll(0)", [Noop("scrolled by nothing")]),
        ("import pyautogui\nimport time\ntime.sleep(1.5)", [Wait(1.5)]),
        ("computer.wait()", [Wait()]),
        ("computer.terminate(status='success')", [Finished()]),
        ("computer.terminate('success', answer='42')", [Finished("42")]),
        ("computer.terminate(status='failure')", [CallUser("the model has given up")]),
        ("  pyautogui.press('a')\n  pyautogui.press('b')", [Hotkey(("a",)), Hotkey(("b",))]),
        ("# press it\npyautogui.press('a')  # so", [Hotkey(("a",))]),
    ],
)
def test_calls(code: str, expected: list[Action]) -> None:
    parsed = parse_python_code(fenced(code), (1000, 1000))
    assert parsed.actions == tuple(expected)


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        (fenced("pyautogui.press('a')", "code"), "So.\n## Action:\nI do it."),
        (fenced("pyautogui.press('a')", ""), "So.\n## Action:\nI do it."),
        ("# Step: 3\n## Thought:\nSo.\n## Code:\n```python\npyautogui.press('a')\n```", "So."),
        ("```python\npyautogui.press('a')", ""),
        ("assistantos\nAction: press a\npyautogui.press('a')", "assistantos\nAction: press a"),
        ("pyautogui.press('a')", ""),
        ("Like this:\n```python\npyautogui.press('z')\n```\nNo:\n```python\npyautogui.press('a')\n```", None),
    ],
)
def test_where_the_code_stands(text: str, thought: str | None) -> None:
    parsed = parse_python_code(text, (1000, 1000))
    assert parsed.actions == (Hotkey(("a",)),)
    assert thought is None or parsed.thought == thought


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("I click OK.", "no code"),
        (fenced("agent.click('OK button', 1, 'left')"), "there is no call 'agent.click'"),
        (fenced("pyautogui.screenshot('/tmp/no')"), "there is no call 'pyautogui.screenshot'"),
        (fenced("__import__('os').system('x')"), "there is no call"),
        (fenced("pyautogui.__dict__.clear()"), "there is no call"),
        (fenced("import os\npyautogui.press('a')"), "only calls of pyautogui"),
        (fenced("import pyautogui as p\np.press('a')"), "there is no call 'p.press'"),
        (fenced("x = 1"), "only calls of pyautogui"),
        (fenced("for _ in range(3): pyautogui.press('a')"), "only calls of pyautogui"),
        (fenced("pyautogui.click(x=get(), y=1)"), "must be constants, not 'get"),
        (fenced("pyautogui.click(**{'x': 1})"), "has no parameter None"),
        (fenced("pyautogui.click(0.1, 0.2, x=0.3)"), "or has it twice"),
        (fenced("pyautogui.click(0.1, 0.2, where=3)"), "has no parameter 'where'"),
        (fenced("pyautogui.click(x=0.5)"), "x and y are needed"),
        (fenced("pyautogui.click(5, 0.5)"), "off the screen"),
        (fenced("pyautogui.click(0.5, 0.5, button='thumb')"), "must be one of left"),
        (fenced("pyautogui.press('foo')"), "'foo'"),
        (fenced("pyautogui.press('a', presses=10**9)"), "must be constants"),
        (fenced("pyautogui.press('a', presses=1000)"), "from 1 to 100"),
        (fenced("pyautogui.write(5)"), "must be text"),
        (fenced("computer.terminate('maybe')"), "success or failure"),
        (fenced("computer.terminate('success')\npyautogui.press('a')"), "after the task was ended"),
        (fenced("# nothing"), "does nothing"),
        ("```python\npyautogui.click(0.1", "cut off"),
        (fenced("a" * 30_000), "longer than"),
        (fenced("(" * 500 + ")" * 500), "no Python"),
    ],
)
def test_what_is_no_action(text: str, message: str) -> None:
    with pytest.raises(ActionParseError, match=message) as caught:
        parse_python_code(text, (1000, 1000))
    start, end = caught.value.span
    assert 0 <= start <= end <= len(text)


PIECES = st.sampled_from(
    [
        *("pyautogui.", "computer.", "time.", "click", "write", "press", "hotkey", "(", ")", "x=", "y=", "0.5", ", "),
        *("'a'", '"""', "'", "\\", "\n", "```", "```python\n", "## Code:\n", "[", "]", "{", "}", "**", "lambda: ", "-"),
        *("1e999", "1j", "10**10", "\x00", "é", "\ud800", "#", "\t", "\x0c", "\r", "import pyautogui\n", "f'{x}'"),
    ]
)


@pytest.mark.no_cover
@settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES | st.text(max_size=3), max_size=16).map("".join))
def test_nothing_but_the_typed_error(text: str) -> None:
    for said in (text, f"```python\n{text}\n```", f"pyautogui.press({text})"):
        try:
            parsed = parse_python_code(said, (1000, 1000))
        except ActionParseError:
            continue
        for action in parsed.actions:
            assert action_from_dict(action_to_dict(action)) == action


def test_the_parameters_are_pyautoguis() -> None:
    """From its source: without a display it can't be imported."""
    found = importlib.util.find_spec("pyautogui")
    if found is None or found.origin is None:
        pytest.skip("pyautogui is not installed")
    source = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    theirs = {node.name: node.args for node in source.body if isinstance(node, ast.FunctionDef)}
    for name, parameters in PARAMETERS.items():
        module, _, function = name.partition(".")
        if module == "pyautogui" and parameters and function in theirs:
            assert tuple(one.arg for one in theirs[function].args) == parameters, name
    assert len(theirs.keys() & {name.partition(".")[2] for name in PARAMETERS}) > 15


def test_each_call_that_the_prompt_names_is_read() -> None:
    names = [line[2:].partition("(")[0] for line in calls_in_words().splitlines()]
    assert set(names) <= PARAMETERS.keys()
    given = {"x": "0.5", "y": "0.5", "message": "'a'", "keys": "'a'", "key": "'a'", "clicks": "2", "seconds": "1"}
    given |= {"button": "'left'", "presses": "2", "status": "'success'", "answer": "'x'", "*keys": "'ctrl', 'c'"}
    for line in calls_in_words().splitlines():
        name, _, rest = line[2:-1].partition("(")
        arguments = ", ".join(given[key] if key == "*keys" else f"{key}={given[key]}" for key in rest.split(", "))
        assert parse_python_code(fenced(f"{name}({arguments})"), (10, 10)).actions, name


def test_formats() -> None:
    answer = CompletionOutput(0, text=fenced("pyautogui.click(0.5, 0.5)"), token_ids=[])
    assert python_code().parse(answer, (320, 200)).actions == (Click(160, 100),)
    seen = CompletionOutput(0, text=fenced("pyautogui.click(182, 112)"), token_ids=[])
    assert opencua().parse(seen, (320, 200)).actions == (Click(160, 100),)
