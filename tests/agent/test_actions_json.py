"""Actions as JSON and as tool calls: what they mean, what is wrong with them, and their schemas."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import HANG_S

from managed_vllm.agent.actions import (
    ACTION_JSON_SCHEMA,
    ACTION_TOOLS,
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
    Move,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
    action_json_schema,
    parse_json_actions,
    parse_tool_calls,
    to_pyautogui,
)
from managed_vllm.agent.actions.table import ACTIONS
from managed_vllm.errors import ConfigError

HD = (1920, 1080)
CLICK = '{"action": "click", "x": 197, "y": 525}'


@pytest.mark.parametrize(
    ("text", "thought", "actions"),
    [
        (CLICK, "", [Click(197, 525)]),
        ('{"thought": "OK.", "action": "click", "x": 197, "y": 525}', "OK.", [Click(197, 525)]),
        (f"I see a button.\n{CLICK}", "I see a button.", [Click(197, 525)]),
        (f"Thought: I see {{a}} [button].\nAction: {CLICK}", "I see {a} [button].", [Click(197, 525)]),
        (f"I click.\n```json\n{CLICK}\n```\nThat is all.", "I click.", [Click(197, 525)]),
        (f"```\n{CLICK}\n```", "", [Click(197, 525)]),
        (f"{CLICK}<|im_end|>", "", [Click(197, 525)]),
        (f'<think>maybe {{"action": "wait"}}</think>{CLICK}', 'maybe {"action": "wait"}', [Click(197, 525)]),
        ('{"x": 1.5, "y": 2, "clicks": 2, "button": "right", "action": "click"}', "", [Click(1.5, 2, Button.RIGHT, 2)]),
        ('{"action": "move", "x": 1, "y": 2}', "", [Move(1, 2)]),
        ('{"action": "key_down", "key": "Shift"}', "", [KeyDown("shift")]),
        ('{"action": "key_up", "key": "shift"}', "", [KeyUp("shift")]),
        ('{"action": "drag", "x": 1, "y": 2, "to_x": 3, "to_y": 4}', "", [Drag(1, 2, 3, 4)]),
        ('{"action": "type", "text": "it\'s \\"x\\"\\n", "enter": true}', "", [Type('it\'s "x"\n', True)]),
        ('{"type": "type", "text": "a"}', "", [Type("a")]),
        ('{"action": "hotkey", "keys": ["Ctrl", "c"]}', "", [Hotkey(("ctrl", "c"))]),
        ('{"action": "hotkey", "keys": "ctrl+c"}', "", [Hotkey(("ctrl", "c"))]),
        ('{"action": "scroll", "direction": "up"}', "", [Scroll(Direction.UP)]),
        ('{"action": "scroll", "direction": "up", "x": 1, "y": 2, "amount": 3}', "", [Scroll(Direction.UP, 1, 2, 3)]),
        ('{"action": "wait", "seconds": null}', "", [Wait()]),
        ('{"action": "wait", "seconds": 2}', "", [Wait(2)]),
        ('{"action": "finished", "content": "42"}', "", [Finished("42")]),
        ('{"action": "call_user"}', "", [CallUser()]),
        (f'[{CLICK}, {{"action": "wait"}}]', "", [Click(197, 525), Wait()]),
        (f'{CLICK}\n{{"action": "wait"}}', "", [Click(197, 525), Wait()]),
        (f'{{"thought": "t", "actions": [{CLICK}]}}', "t", [Click(197, 525)]),
        ('{"name": "click", "arguments": {"x": 1, "y": 2}}', "", [Click(1, 2)]),
        ('<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>', "", [Wait()]),
        ('{"type": "function", "function": {"name": "wait", "arguments": "{}"}}', "", [Wait()]),
    ],
)
def test_a_text_means(text: str, thought: str, actions: list[Any]) -> None:
    assert parse_json_actions(text, HD) == ParsedResponse(thought, tuple(actions))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("I click OK.", "has no action"),
        ("see {this}", "has no action"),
        ("[]", "list of actions is empty"),
        ("[1]", "must be an object"),
        ("{}", '"action" is missing'),
        ('{"action": "fly"}', "there is no action 'fly'"),
        ('{"action": ["click"]}', "there is no action"),
        ('{"action": "click", "x": 1}', "click needs y"),
        ('{"action": "click", "x": 1, "y": 2, "z": 3}', "click has no field 'z'"),
        ('{"action": "click", "x": 1, "x": 2, "y": 3}', "there twice"),
        ('{"action": "click", "x": "1", "y": 2}', "x of click must be a number"),
        ('{"action": "click", "x": true, "y": 2}', "x of click must be a number"),
        ('{"action": "click", "x": NaN, "y": 2}', "NaN is no number"),
        ('{"action": "click", "x": 1e999, "y": 2}', "finite"),
        (f'{{"action": "click", "x": {"1" * 5000}, "y": 2}}', "too many digits"),
        ('{"action": "click", "x": 1921, "y": 2}', "off the screen"),
        ('{"action": "click", "x": -1, "y": 2}', "off the screen"),
        ('{"action": "click", "x": 1, "y": 2, "clicks": 0}', "an integer from 1"),
        ('{"action": "click", "x": 1, "y": 2, "button": "leftmost"}', "must be one of left, right, middle"),
        ('{"action": "scroll", "direction": "in"}', "must be one of up, down"),
        ('{"action": "scroll", "direction": "up", "x": 1}', "both x and y"),
        ('{"action": "type", "text": 5}', "must be text"),
        ('{"action": "type", "text": "\\ud800"}', "surrogate"),
        ('{"action": "type", "text": "a", "enter": "yes"}', "true or false"),
        ('{"action": "hotkey", "keys": []}', "list of names"),
        ('{"action": "hotkey", "keys": ["foo"]}', "'foo' is no key"),
        ('{"action": "key_down", "key": "foo"}', "must be the name of a key, not 'foo'"),
        ('{"action": "wait", "seconds": -1}', "from 0 to 3600"),
        ('{"action": "wait", "thought": 5}', "thought must be text"),
        ('{"action": "click", "x": 1', "cut off"),
        ('{"action": "type", "text": "hel', "cut off"),
        ("<think>hm", "cut off while the model was thinking"),
        ('{"action": "wait",}', "is no JSON"),
        ('{"action": "wait"} and then {"action": "wait"}', "between two actions"),
        ('{"actions": [], "x": 1}', "and nothing else"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_text_is_refused(text: str, why: str) -> None:
    with pytest.raises(ActionParseError) as caught:
        parse_json_actions(text, HD)
    assert why in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.text == text


def test_coordinates_are_scaled_as_they_are_for_ui_tars() -> None:
    text = '{"action": "click", "x": 500, "y": 500}'
    assert parse_json_actions(text, HD, coordinates="relative1000").actions == (Click(960, 540),)
    resized = parse_json_actions('{"action": "click", "x": 966, "y": 546}', HD, coordinates="resized")
    assert resized.actions == (Click(960, 540),)
    beyond = parse_json_actions('{"action": "click", "x": 5000, "y": 1}', HD, off_screen="clamp")
    assert beyond.actions == (Click(1919, 1),)
    with pytest.raises(ConfigError):
        parse_json_actions(text, HD, coordinates="percent")  # type: ignore[arg-type]


def call(name: Any, arguments: Any) -> dict[str, Any]:
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_calls_mean_their_actions_in_order() -> None:
    calls = [call("click", '{"x": 1, "y": 2, "thought": "I click."}'), call("wait", ""), call("wait", {"seconds": 1})]
    response = parse_tool_calls(calls, HD, thought="Well. ")
    assert response == ParsedResponse("Well.\nI click.", (Click(1, 2), Wait(), Wait(1)))


@pytest.mark.parametrize(
    ("calls", "why"),
    [
        ([], "calls no tool"),
        (["click"], "must have a function"),
        ([{"type": "function"}], "must have a function"),
        ([call(None, "{}")], "there is no action None"),
        ([call("fly", "{}")], "there is no action 'fly'"),
        ([call("click", '{"x": 1')], "are no JSON"),
        ([call("click", "[" * 100_000)], "are no JSON"),
        ([call("click", "[1, 2]")], "must be an object"),
        ([call("click", '{"x": 1}')], "click needs y"),
        ([call("wait", "{}"), call("click", '{"x": 1e400, "y": 1}')], "finite"),
    ],
)
def test_tool_calls_are_refused(calls: list[Any], why: str) -> None:
    with pytest.raises(ActionParseError) as caught:
        parse_tool_calls(calls, HD, thought="said")
    assert why in caught.value.message
    start, end = caught.value.span
    assert 0 <= start <= end <= len(caught.value.text)


# -- schemas -----------------------------------------------------------------------------------------------------------


def test_every_tool_is_an_action_with_the_fields_it_says() -> None:
    values = {"x": 1, "y": 2, "to_x": 3, "to_y": 4, "text": "a", "key": "shift", "keys": ["enter"], "direction": "up"}
    for tool in ACTION_TOOLS:
        function = tool["function"]
        given = {key: values[key] for key in function["parameters"]["required"]}
        assert len(parse_tool_calls([call(function["name"], json.dumps(given))], HD).actions) == 1
    assert [tool["function"]["name"] for tool in ACTION_TOOLS] == list(ACTIONS)


def instances(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of the kinds of schema that ours are made of."""
    if "anyOf" in schema:
        return st.one_of([instances(each) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object":
            every = {key: instances(value) for key, value in schema["properties"].items()}
            required = {key: value for key, value in every.items() if key in schema["required"]}
            return st.fixed_dictionaries(
                required, optional={key: value for key, value in every.items() if key not in required}
            )
        case "array":
            return st.lists(instances(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"])
        case "integer":
            return st.integers(schema["minimum"], schema["maximum"])
        case "string":
            return st.text(st.characters(codec="utf-8"), max_size=min(20, schema["maxLength"]))
        case "boolean":
            return st.booleans()
    raise AssertionError(schema)


@pytest.mark.no_cover
@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(action_json_schema(HD)))
def test_every_value_of_the_schema_is_one_action(value: Any) -> None:
    response = parse_json_actions(json.dumps(value), HD)
    assert len(response.actions) == 1
    assert response.thought == value["thought"].strip()


def test_the_schema_is_bounded_and_valid() -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed").Draft202012Validator
    validator.check_schema(ACTION_JSON_SCHEMA)
    for tool in ACTION_TOOLS:
        validator.check_schema(tool["function"]["parameters"])
    for form in ACTION_JSON_SCHEMA["anyOf"]:
        for field in form["properties"].values():
            assert {"enum", "maxLength", "maximum", "maxItems"} & field.keys() or field["type"] == "boolean"
    with pytest.raises(ValueError, match="must be some of"):
        action_json_schema(HD, actions=["fly"])


def test_the_schemas_are_ones_for_the_structured_outputs_of_vllm() -> None:
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed", exc_type=ImportError)
    xgrammar.Grammar.from_json_schema(json.dumps(ACTION_JSON_SCHEMA))
    for tool in ACTION_TOOLS:
        xgrammar.Grammar.from_json_schema(json.dumps(tool["function"]["parameters"]))


# -- fuzz --------------------------------------------------------------------------------------------------------------

PIECES = (
    *(
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ":",
        " ",
        "\n",
        "```json\n",
        "```",
        "\\",
        "1",
        "-1",
        "1e999",
        "NaN",
        "null",
        "true",
    ),
    *('"action"', '"click"', '"type"', '"text"', '"x"', '"y"', '"keys"', '"ctrl"', '"thought"', '"actions"', '"name"'),
    *('"arguments"', '{"action": "wait"}', CLICK, '{"action": "type", "text": "', "I click.", "é", "\ud800", "<think>"),
)


@pytest.mark.no_cover
@settings(max_examples=examples(500), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_any_text_is_actions_or_a_parse_error(text: str) -> None:
    try:
        response = parse_json_actions(text, HD)
    except ActionParseError as caught:
        start, end = caught.span
    else:
        start = end = 0
        assert response.actions
        compile(to_pyautogui(response.actions), "answer", "exec")
    assert 0 <= start <= end <= len(text)


@pytest.mark.no_cover
@pytest.mark.parametrize("piece", [*PIECES, "[ ", "x{ ", '{"action":', '{"action": 1} x ', '[{"action": "wait"},'])
def test_a_long_answer_of_anything_is_read_in_linear_time(piece: str) -> None:
    for before in ("", "x", '{"action": "type", "text": "', "[", "<think>"):
        text = before + piece * (250_000 // len(piece))
        began = time.process_time()
        try:
            parse_json_actions(text, HD)
        except ActionParseError as caught:
            length = len(caught.message)
        else:
            length = 0
        assert length < 500
        assert time.process_time() - began < HANG_S
