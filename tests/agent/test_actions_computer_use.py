"""Qwen-VL's tools: answers as its cookbooks and descendants give them, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples

from managed_vllm.agent import AgentFormat
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
    parse_computer_use,
)
from managed_vllm.agent.actions.computer_use import ACTIONS_READ, Tool, tool_of
from managed_vllm.agent.model_formats import qwen2_5_vl, qwen_vl, qwen_vl_mobile
from managed_vllm.request.outputs import CompletionOutput

SIZES = [(1920, 1080), (1000, 1000), (390, 844)]


def call(tool: str = "computer_use", **arguments: Any) -> str:
    said = json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False)
    return f"I do it.\n<tool_call>\n{said}\n</tool_call>"


def at(size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
    """The pixel of a point in thousandths."""
    return x * size[0] / 1000, y * size[1] / 1000


# -- computers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "button", "clicks"),
    [
        ("left_click", Button.LEFT, 1),
        ("right_click", Button.RIGHT, 1),
        ("middle_click", Button.MIDDLE, 1),
        ("double_click", Button.LEFT, 2),
        ("triple_click", Button.LEFT, 3),
    ],
)
def test_clicks(size: tuple[int, int], name: str, button: Button, clicks: int) -> None:
    x, y = at(size, 500, 250)
    parsed = parse_computer_use(call(action=name, coordinate=[500, 250]), size)
    assert parsed.thought == "I do it."
    assert parsed.actions == (Click(x, y, button, clicks),)
    there = parse_computer_use(call(action=name), size).actions
    assert there == (MouseDown(button), MouseUp(button)) * clicks


@pytest.mark.parametrize("size", SIZES)
def test_points_of_other_actions(size: tuple[int, int]) -> None:
    def actions(**arguments: Any) -> tuple[Action, ...]:
        return parse_computer_use(call(**arguments), size).actions

    there, end = at(size, 512, 340), at(size, 100, 900)
    assert actions(action="mouse_move", coordinate=[512, 340]) == (Move(*there),)
    assert actions(action="left_click_drag", coordinate=[512, 340]) == (MouseDown(), Move(*there), MouseUp())
    dragged = actions(action="left_click_drag", start_coordinate=[512, 340], coordinate=[100, 900])
    assert dragged == (Drag(*there, *end),)
    assert actions(action="scroll", pixels=-5, coordinate=[512, 340]) == (Scroll(Direction.DOWN, *there, 5),)
    assert actions(action="left_mouse_up", coordinate=[512, 340]) == (MouseUp(Button.LEFT, *there),)
    typed = actions(action="type", text="a", coordinate=[512, 340], press_enter=True, delete_existing_text=True)
    assert typed == (Click(*there), Hotkey(("ctrl", "a")), Hotkey(("delete",)), Type("a", enter=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"action": "type", "text": "hé\nllo"}, (Type("hé\nllo"),)),
        ({"action": "key", "keys": ["ctrl", "C"]}, (Hotkey(("ctrl", "c")),)),
        ({"action": "key", "text": "ctrl+shift+t"}, (Hotkey(("ctrl", "shift", "t")),)),
        ({"action": "key", "keys": ["Page_Down"]}, (Hotkey(("page_down",)),)),
        ({"action": "key_down", "keys": ["shift", "ctrl"]}, (KeyDown("shift"), KeyDown("ctrl"))),
        ({"action": "key_up", "keys": ["shift", "ctrl"]}, (KeyUp("ctrl"), KeyUp("shift"))),
        ({"action": "hold_key", "text": "w", "duration": 2}, (KeyDown("w"), Wait(2), KeyUp("w"))),
        ({"action": "scroll", "pixels": 500}, (Scroll(Direction.UP, None, None, 500),)),
        ({"action": "scroll", "pixels": 0}, (Noop("scrolled by nothing"),)),
        ({"action": "hscroll", "pixels": -3}, (Scroll(Direction.LEFT, None, None, 3),)),
        (
            {"action": "scroll", "scroll_direction": "right", "scroll_amount": 4},
            (Scroll(Direction.RIGHT, None, None, 4),),
        ),
        ({"action": "left_mouse_down"}, (MouseDown(),)),
        ({"action": "screenshot"}, (Noop("a screenshot comes with each turn"),)),
        ({"action": "wait", "time": 2}, (Wait(2),)),
        ({"action": "wait", "duration": 1.5}, (Wait(1.5),)),
        ({"action": "wait"}, (Wait(),)),
        ({"action": "terminate", "status": "success"}, (Finished(),)),
        ({"action": "terminate", "status": "failure"}, (CallUser("the model has given up"),)),
        ({"action": "answer", "text": "42"}, (Finished("42"),)),
        ({"action": "interact", "text": "log in, please"}, (CallUser("log in, please"),)),
        ({"action": "visit_url", "url": "https://x"}, (OpenURL("https://x"),)),
        ({"action": "web_search", "query": "x"}, (Custom("web_search", {"query": "x"}),)),
        ({"action": "history_back"}, (Back(),)),
        ({"action": "pause_and_memorize_fact", "fact": "x"}, (Noop("noted: x"),)),
        ({"action": "open_app", "app": "Clock"}, (OpenApp("Clock"),)),
        ({"action": "left_click", "text": "shift"}, (KeyDown("shift"), MouseDown(), MouseUp(), KeyUp("shift"))),
    ],
)
def test_what_needs_no_point(arguments: dict[str, Any], expected: tuple[Action, ...]) -> None:
    parsed = parse_computer_use(call(**arguments), SIZES[0])
    assert parsed.actions == expected
    assert [action_from_dict(action_to_dict(action)) for action in parsed.actions] == list(expected)


# -- phones ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_phones(size: tuple[int, int]) -> None:
    def actions(**arguments: Any) -> tuple[Action, ...]:
        return parse_computer_use(call("mobile_use", **arguments), size, tool="mobile_use").actions

    there, end = at(size, 512, 340), at(size, 100, 900)
    assert actions(action="click", coordinate=[512, 340]) == (Click(*there),)
    assert actions(action="double_click", coordinate=[512, 340]) == (Click(*there, clicks=2),)
    assert actions(action="long_press", coordinate=[512, 340], time=2) == (LongPress(*there, 2),)
    assert actions(action="swipe", coordinate=[512, 340], coordinate2=[100, 900]) == (Swipe(*there, *end),)
    assert actions(action="drag", start_coordinate=[512, 340], end_coordinate=[100, 900]) == (Drag(*there, *end),)
    assert actions(action="type", text="x") == (Type("x"),)
    assert actions(action="system_button", button="Back") == (Back(),)
    assert actions(action="system_button", button="Home") == (Home(),)
    assert actions(action="system_button", button="Enter") == (Hotkey(("enter",)),)
    assert actions(action="system_button", button="Menu") == (Custom("system_button", {"button": "menu"}),)
    assert actions(action="open", text="Clock") == (OpenApp("Clock"),)
    assert actions(action="key", text="volume_up") == (Custom("key_event", {"key": "volume_up"}),)
    assert actions(action="ask_user", text="which?") == (CallUser("which?"),)
    assert actions(action="answer", text="7") == (Finished("7"),)
    assert actions(action="terminate", status="success") == (Finished(),)


# -- how it is written -------------------------------------------------------------------------------------------------

CLICK = '{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [500, 500]}}'
XML = (
    "<tool_call>\n<function=computer_use>\n<parameter=action>\nleft_click\n</parameter>\n"
    "<parameter=coordinate>\n[500, 500]\n</parameter>\n</function>\n</tool_call>"
)
TYPED = "<tool_call><function=computer_use><parameter=action>type</parameter><parameter=text>7</parameter></function>"


@pytest.mark.parametrize(
    ("text", "thought", "count"),
    [
        (CLICK, "", 1),
        (f"<tool_call>{CLICK}</tool_call>", "", 1),
        (f"Action: I click.\n<tool_call>\n{CLICK}\n</tool_call>", "I click.", 1),
        (f"Thought: so.\n<tool_call>\n{CLICK}", "so.", 1),
        (f"<think>well</think>\nI click.\n<tool_call>\n{CLICK}\n</tool_call>", "well\nI click.", 1),
        (f"<thinking>well</thinking>\n<tool_call>\n{CLICK}\n</tool_call>", "well", 1),
        (f"<tool_call>\n{CLICK}\n</tool_call>\n<tool_call>\n{CLICK}\n</tool_call><|im_end|>", "", 2),
        (f"```json\n{CLICK}\n```", "", 1),
        ('{"action": "left_click", "coordinate": [500, 500]}', "", 1),
        ('{"action": "left_click", "coordinate": "[500, 500]"}', "", 1),
        ('{"action": "left_click", "coordinate": [500, 500], "text": null}', "", 1),
        (f"I click.\n{XML}", "I click.", 1),
        (f"<think>well</think>{XML}\n{XML}", "well", 2),
    ],
)
def test_ways_to_write_a_call(text: str, thought: str, count: int) -> None:
    parsed = parse_computer_use(text, SIZES[0])
    assert parsed.thought == thought
    assert parsed.actions == (Click(960, 540),) * count


def test_a_text_in_xml_is_text() -> None:
    assert parse_computer_use(f"{TYPED}</tool_call>", SIZES[0]).actions == (Type("7"),)


def test_calls_that_the_server_took_out() -> None:
    calls = [{"function": {"name": "computer", "arguments": '{"action": "left_click", "coordinate": [500, 500]}'}}]
    parsed = parse_computer_use(" I click. ", SIZES[0], tool_calls=calls)
    assert (parsed.thought, parsed.actions) == ("I click.", (Click(960, 540),))


def test_a_point_is_the_decimal_that_was_written() -> None:
    parsed = parse_computer_use(call(action="mouse_move", coordinate=[0.34, 1000]), (1000, 1000))
    assert parsed.actions == (Move(0.34, 999.0),)


# -- what is none ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("I click on OK.", "no action"),
        (call(action="fly"), "there is no action 'fly'; the actions are key, type"),
        (call(), "there is no action None"),
        (
            call("mobile_use", action="click", coordinate=[1, 2]),
            "there is no tool 'mobile_use'; the tool is computer_use",
        ),
        (call(action="left_click", coordinate=[1001, 5]), "off the screen"),
        (call(action="left_click", coordinate=[1, 2, 3, 4]), r"must be \[x, y\]"),
        (call(action="left_click", coordinate=["1", 2]), "must be a number"),
        (call(action="left_click", coordinate="here"), r"must be \[x, y\]"),
        (call(action="mouse_move"), "mouse_move needs coordinate"),
        (call(action="left_click", where=[1, 2]), "has no field 'where'; its fields are coordinate"),
        (call(action="key", keys=["foo"]), "'foo' is no key"),
        (call(action="key"), "key needs keys or text"),
        (call(action="scroll"), "scroll needs pixels or scroll_direction"),
        (call(action="scroll", pixels=1e300), "from -1000000"),
        (call(action="wait", time=-1), "from 0 to 3600"),
        (call(action="terminate", status="done"), "must be success or failure"),
        (call(action="type", text=5), "must be text"),
        (f"{call(action='wait')} and then {call(action='wait')}", "text stands between two actions"),
        (f"{XML} and then {XML}", "text stands between two actions"),
        (CLICK[:-20], "cut off"),
        (XML[:60], "cut off within its tool call"),
        (f"{XML}\n<tool_call>\n<function=comp", "cut off within its tool call"),
        ("<think>well, I", "cut off while the model was thinking"),
        ('{"name": "computer_use", "arguments": [1]}', "must be an object"),
        ('{"name": "computer_use", "arguments": "{"}', "no JSON"),
        (XML.replace("<parameter=action>", "<parameter=coordinate>"), "there twice"),
    ],
)
def test_what_is_no_action(text: str, message: str) -> None:
    with pytest.raises(ActionParseError, match=message) as caught:
        parse_computer_use(text, SIZES[0])
    start, end = caught.value.span
    assert 0 <= start <= end <= len(caught.value.text)


PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<function=computer_use>",
            "</function>",
            "<parameter=action>",
            "</parameter>",
        ),
        *('{"name": "computer_use", "arguments": ', '{"action": "', "left_click", '", "coordinate": ', "[1, 2]", "}}"),
        *("{", "}", "[", "]", '"', ",", ":", "\\", "\n", "<think>", "</think>", "1e999", "NaN", "é", "\ud800", "```"),
        *(CLICK, XML, "type", "scroll", '"pixels": ', "-5", "null", "true"),
    ]
)


@pytest.mark.no_cover
@settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join), st.sampled_from(["computer_use", "mobile_use"])
)
def test_nothing_but_the_typed_error(text: str, tool: Tool) -> None:
    try:
        parsed = parse_computer_use(text, SIZES[0], tool=tool)
    except ActionParseError:
        return
    assert parsed.actions
    for action in parsed.actions:
        assert action_from_dict(action_to_dict(action)) == action


# -- prompt, schema, parser --------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {"point": [1, 2], "text": "a", "keys": ["a"], "number": 3, "seconds": 1, "truth": True}
VALUES |= {"direction": "up", "amount": 3, "status": "success"}


@pytest.mark.parametrize("tool", ["computer_use", "mobile_use"])
def test_what_a_model_is_told_is_what_is_read(tool: Tool) -> None:
    parameters = tool_of(tool, "in thousandths")["function"]["parameters"]["properties"]
    told = parameters["action"]["enum"]
    assert [line.split("`")[1] for line in parameters["action"]["description"].splitlines()] == told
    for name in told:
        row = ACTIONS_READ[tool][name]
        for fields in (row.fields, {key: field for key, field in row.fields.items() if field.required}):
            arguments = {key: VALUES[field.kind] for key, field in fields.items()}
            if not fields and name in ("key", "scroll"):
                arguments = {"keys": ["a"]} if name == "key" else {"pixels": 1}
            if name == "system_button":
                arguments["button"] = "Back"
            assert parse_computer_use(call(tool, action=name, **arguments), (100, 100), tool=tool).actions
        required = {key for key, field in row.fields.items() if field.required}
        assert required <= parameters.keys()
    for name in parameters.keys() - {"action", "coordinate", "coordinate2", "text", "time"}:
        assert "For `" in parameters[name]["description"], name


@pytest.mark.parametrize(
    ("agent", "tool", "expected"),
    [
        (qwen_vl(), "computer_use", Click(160, 100)),
        (qwen2_5_vl(), "computer_use", Click(160, 100)),
        (qwen_vl_mobile(), "mobile_use", Click(160, 100)),
        (qwen_vl("absolute"), "computer_use", Click(160, 100)),
    ],
    ids=["qwen3-vl", "qwen2.5-vl", "qwen3-vl-mobile", "absolute"],
)
def test_formats(agent: AgentFormat, tool: Tool, expected: Click) -> None:
    """The same point of the screenshot, said in the frame that the tool's words name, is clicked there."""
    (offered,) = agent.request["tools"]
    assert offered["function"]["name"] == tool
    words = offered["function"]["parameters"]["properties"]["coordinate"]["description"]
    seen = {"pixels of the screenshot": [160, 100], "0 to 1000": [500, 500], "as you see it": [182, 112]}
    point = next(numbers for said, numbers in seen.items() if said in words)
    click = "left_click" if tool == "computer_use" else "click"
    answer = CompletionOutput(0, text=call(tool, action=click, coordinate=point), token_ids=[])
    assert agent.parse(answer, (320, 200)).actions == (expected,)
