"""GLM-V, AutoGLM, and calls in the shapes of Gemini and OpenAI: answers as they give them, and what is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples

from managed_vllm.agent.actions import (
    Action,
    ActionParseError,
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
    MouseDown,
    MouseUp,
    Move,
    Noop,
    OpenApp,
    OpenURL,
    ParsedResponse,
    Scroll,
    Swipe,
    Type,
    Wait,
    action_from_dict,
    action_to_dict,
    parse_autoglm,
    parse_glm,
    parse_hosted,
)
from managed_vllm.agent.actions.glm import autoglm_calls_in_words, glm_calls_in_words
from managed_vllm.agent.model_formats import autoglm, glm_v
from managed_vllm.request.outputs import CompletionOutput

SIZES = [(1920, 1080), (1000, 1000), (390, 844)]


def at(size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
    """The pixel of a point in thousandths."""
    return x * size[0] / 1000, y * size[1] / 1000


# -- GLM-V -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_glm(size: tuple[int, int]) -> None:
    def actions(call: str) -> tuple[Action, ...]:
        return parse_glm(f"Reason: so\nAction: {call}", size).actions

    there, end = at(size, 512, 340), at(size, 100, 900)
    assert actions("left_click(start_box='[512,340]', element_info='OK')") == (Click(*there),)
    assert actions("right_click(start_box='[512,340]')") == (Click(*there, Button.RIGHT),)
    assert actions("middle_click(start_box='[512,340]')") == (Click(*there, Button.MIDDLE),)
    assert actions("left_double_click(start_box=[512,340])") == (Click(*there, clicks=2),)
    assert actions("hover(start_box='[512,340]')") == (Move(*there),)
    assert actions("left_drag(start_box='[512,340]', end_box='[100,900]')") == (Drag(*there, *end),)
    scrolled = actions("scroll(start_box='[512,340]', direction='down', step=5, element_info='')")
    assert scrolled == (Scroll(Direction.DOWN, *there, 5),)
    assert actions("key(keys='ctrl+c')") == (Hotkey(("ctrl", "c")),)
    assert actions("type(content='it\\'s\\n')") == (Type("it's\n"),)
    assert actions("WAIT()") == (Wait(5.0),)
    assert actions("DONE()") == (Finished(),)
    assert actions("FAIL()") == (CallUser("the model has given up"),)


BOXED = "<|begin_of_box|>left_click(start_box='[500,500]', element_info='OK button')<|end_of_box|>"


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        (f"<think>well</think>\nMemory: []\nReason: so\nAction: {BOXED}", "well\nso"),
        ("Action:\nleft_click(start_box='[500,500]', element_info='OK')", ""),
        ("so\nleft_click(start_box='[500,500]')", "so"),
        ("Action: ```left_click(start_box='[500,500]')```", ""),
        (f"{BOXED}", ""),
    ],
)
def test_where_glm_puts_its_call(text: str, thought: str) -> None:
    parsed = parse_glm(text, SIZES[1])
    assert (parsed.thought, parsed.actions) == (thought, (Click(500, 500),))


# -- AutoGLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_autoglm(size: tuple[int, int]) -> None:
    def actions(call: str) -> tuple[Action, ...]:
        return parse_autoglm(f"<think>so</think><answer>{call}</answer>", size).actions

    there, end = at(size, 512, 340), at(size, 100, 900)
    assert actions('do(action="Tap", element=[512,340])') == (Click(*there),)
    assert actions('do(action="Tap", element=[512,340], message="important")') == (Click(*there),)
    assert actions('do(action="Double Tap", element=[512,340])') == (Click(*there, clicks=2),)
    assert actions('do(action="Long Press", element=[512,340])') == (LongPress(*there),)
    assert actions('do(action="Swipe", start=[512,340], end=[100,900])') == (Swipe(*there, *end),)
    assert actions('do(action="Type", text="你好")') == (Type("你好"),)
    assert actions('do(action="Type_Name", text="x")') == (Type("x"),)
    assert actions('do(action="Launch", app="微信")') == (OpenApp("微信"),)
    assert actions('do(action="Back")') == (Back(),)
    assert actions('do(action="Home")') == (Home(),)
    assert actions('do(action="Wait", duration="2 seconds")') == (Wait(2.0),)
    assert actions('do(action="Wait", duration="a while")') == (Wait(),)
    assert actions('do(action="Take_over", message="log in")') == (CallUser("log in"),)
    assert actions('do(action="Note", message="True")') == (Noop("noted"),)
    assert actions('do(action="Call_API", instruction="sum up")') == (Custom("call_api", {"instruction": "sum up"}),)
    assert actions('finish(message="done")') == (Finished("done"),)


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ('<think>so</think>\n<answer>\ndo(action="Home")\n</answer>', "so"),
        ('<think>so</think>\n<answer>do(action="Home")', "so"),
        ('I do it.\ndo(action="Home")', "I do it."),
        ('do(action="Home")', ""),
    ],
)
def test_where_autoglm_puts_its_call(text: str, thought: str) -> None:
    parsed = parse_autoglm(text, SIZES[1])
    assert (parsed.thought, parsed.actions) == (thought, (Home(),))


# -- Gemini, OpenAI ----------------------------------------------------------------------------------------------------


def gemini(name: str, **args: Any) -> tuple[Action, ...]:
    by_text = parse_hosted(json.dumps({"name": name, "args": args}), SIZES[0], shape="gemini")
    call = {"function": {"name": name, "arguments": json.dumps(args)}}
    by_call = parse_hosted("so", SIZES[0], shape="gemini", tool_calls=[call])
    assert (by_call.thought, by_call.actions) == ("so", by_text.actions)
    return by_text.actions


def test_calls_in_geminis_shape() -> None:
    there, end = at(SIZES[0], 500, 250), at(SIZES[0], 100, 900)
    cleared = (Hotkey(("ctrl", "a")), Hotkey(("delete",)))
    assert gemini("click_at", x=500, y=250) == (Click(*there),)
    assert gemini("hover_at", x=500, y=250) == (Move(*there),)
    assert gemini("type_text_at", x=500, y=250, text="a") == (Click(*there), *cleared, Type("a", enter=True))
    kept = gemini("type_text_at", x=500, y=250, text="a", press_enter=False, clear_before_typing=False)
    assert kept == (Click(*there), Type("a"))
    assert gemini("key_combination", keys="Control+A") == (Hotkey(("control", "a")),)
    assert gemini("scroll_document", direction="down") == (Scroll(Direction.DOWN),)
    assert gemini("scroll_at", x=500, y=250, direction="up", magnitude=800) == (Scroll(Direction.UP, *there),)
    dropped = gemini("drag_and_drop", x=500, y=250, destination_x=100, destination_y=900)
    assert dropped == (Drag(*there, *end),)
    assert gemini("navigate", url="https://x") == (OpenURL("https://x"),)
    assert gemini("go_back") == (Back(),)
    assert gemini("search") == (Custom("search"),)
    assert gemini("wait_5_seconds") == (Wait(5.0),)


def openai(**action: Any) -> tuple[Action, ...]:
    by_text = parse_hosted(f"so {json.dumps(action)}", SIZES[0], shape="openai")
    call = {"function": {"name": "computer", "arguments": json.dumps({"action": action})}}
    assert parse_hosted("", SIZES[0], shape="openai", tool_calls=[call]).actions == by_text.actions
    assert by_text.thought == "so"
    return by_text.actions


def test_calls_in_openais_shape() -> None:
    assert openai(type="click", x=512, y=340, button="left") == (Click(512, 340),)
    assert openai(type="click", x=512, y=340, button="wheel") == (Click(512, 340, Button.MIDDLE),)
    assert openai(type="double_click", x=512, y=340) == (Click(512, 340, clicks=2),)
    assert openai(type="move", x=512, y=340) == (Move(512, 340),)
    assert openai(type="drag", path=[{"x": 1, "y": 2}, {"x": 3, "y": 4}]) == (Drag(1, 2, 3, 4),)
    bent = openai(type="drag", path=[[1, 2], [3, 4], [5, 6]])
    assert bent == (Move(1, 2), MouseDown(), Move(3, 4), Move(5, 6), MouseUp())
    assert openai(type="scroll", x=1, y=2, scroll_x=0, scroll_y=300) == (Scroll(Direction.DOWN, 1, 2),)
    assert openai(type="scroll", x=1, y=2, scroll_x=-3, scroll_y=0) == (Scroll(Direction.LEFT, 1, 2),)
    assert openai(type="keypress", keys=["CTRL", "C"]) == (Hotkey(("ctrl", "c")),)
    assert openai(type="type", text="a") == (Type("a"),)
    assert openai(type="wait") == (Wait(),)
    assert openai(type="screenshot") == (Noop("a screenshot comes with each turn"),)


# -- what is none ------------------------------------------------------------------------------------------------------


def in_gemini(text: str, size: tuple[int, int]) -> ParsedResponse:
    return parse_hosted(text, size, shape="gemini")


def in_openai(text: str, size: tuple[int, int]) -> ParsedResponse:
    return parse_hosted(text, size, shape="openai")


PARSERS: list[Callable[[str, tuple[int, int]], ParsedResponse]] = [parse_glm, parse_autoglm, in_gemini, in_openai]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        *((parse, "", "empty") for parse in PARSERS),
        *((parse, "I click on OK.", "no action") for parse in PARSERS),
        (parse_glm, "Action: fly()", "there is no action 'fly'; the actions are left_click"),
        (parse_glm, "Action: left_click('[1,2]')", "a call with named arguments"),
        (parse_glm, "Action: left_click(start_box='[1,2,3]')", r"must be \[x, y\]"),
        (parse_glm, "Action: left_click(start_box='[1001,2]')", "off the screen"),
        (parse_glm, "Action: left_click(start_box=get())", "must be a constant"),
        (parse_glm, "Action: left_click(**{'start_box': '[1,2]'})", "has no name"),
        (parse_glm, "Action: left_click()", "left_click needs start_box"),
        (parse_glm, "Action: left_click(start_box='[1,2]'", "cut off"),
        (parse_glm, "Action: left_click(start_box='[1,2]', start_box='[3,4]')", "is there twice"),
        (parse_glm, "Action: __import__('os').system('x')", "a call with named arguments"),
        (parse_glm, "Action: scroll(start_box='[1,2]', direction='away')", "must be one of up"),
        (parse_glm, "<think>well", "cut off while the model was thinking"),
        (parse_autoglm, '<answer>do(action="Fly")</answer>', "there is no action 'Fly'; the actions are Tap"),
        (parse_autoglm, "<answer>do()</answer>", "there is no action None"),
        (parse_autoglm, "<answer>jump()</answer>", "there is no action 'jump'; the actions are finish"),
        (parse_autoglm, '<answer>do(action="Tap")</answer>', "Tap needs element"),
        (in_gemini, '{"name": "click_at", "args": {"x": 1}}', "has no field 'x'"),
        (in_gemini, '{"name": "fly", "args": {}}', "there is no action 'fly'"),
        (in_openai, '{"type": "click", "x": 5000, "y": 2}', "off the screen"),
        (in_openai, '{"type": "drag", "path": [[1, 2]]}', "2 to 100 points"),
        (in_openai, '{"type": "fly"}', "there is no action 'fly'"),
    ],
)
def test_what_is_no_action(parse: Any, text: str, message: str) -> None:
    with pytest.raises(ActionParseError, match=message) as caught:
        parse(text, SIZES[0])
    start, end = caught.value.span
    assert 0 <= start <= end <= len(caught.value.text)


PIECES = st.sampled_from(
    [
        *("Action:", "<|begin_of_box|>", "<|end_of_box|>", "<answer>", "</answer>", "<think>", "</think>", "do(", ")"),
        *('action="Tap"', "element=[1,2]", "left_click(", "start_box='[1,2]'", ", ", "finish(", 'message="', "'", "\\"),
        *(
            '{"name": "',
            "click_at",
            '", "args": ',
            '{"x": 1, "y": 2}',
            "}",
            '{"type": "click", ',
            "[",
            "]",
            "\n",
            "```",
        ),
        *("\x00", "é", "\ud800", "1e999", "lambda: 0", "f'{x}'", "**", "{}", "None"),
    ]
)


@pytest.mark.no_cover
@settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join), st.sampled_from(PARSERS))
def test_nothing_but_the_typed_error(text: str, parse: Any) -> None:
    try:
        parsed = parse(text, SIZES[0])
    except ActionParseError:
        return
    for action in parsed.actions:
        assert action_from_dict(action_to_dict(action)) == action


# -- prompt and parser -------------------------------------------------------------------------------------------------


def test_each_call_that_the_prompts_name_is_read() -> None:
    for line in glm_calls_in_words().splitlines():
        call = line[2:].partition(" #")[0].replace("[x,y]", "[1,2]").replace("keys='…'", "keys='a'")
        call = call.replace("direction='…'", "direction='up'")
        assert parse_glm(f"Action: {call}", (9, 9)).actions, line
    for line in autoglm_calls_in_words().splitlines():
        call = line[2:].partition(" #")[0].replace("[x,y]", "[1,2]")
        assert parse_autoglm(f"<answer>{call}</answer>", (9, 9)).actions, line
    assert len(re.findall("^- ", glm_calls_in_words() + "\n" + autoglm_calls_in_words(), re.MULTILINE)) > 20


def test_formats() -> None:
    glm = CompletionOutput(0, text=BOXED, token_ids=[])
    assert glm_v().parse(glm, (320, 200)).actions == (Click(160, 100),)
    phone = CompletionOutput(0, text='do(action="Tap", element=[500,500])', token_ids=[])
    assert autoglm().parse(phone, (320, 200)).actions == (Click(160, 100),)
