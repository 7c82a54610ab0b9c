"""Each format: answers as its card gives them, what is none, and that the model is told of what is read."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from typing import Any

import pytest
from model_answers import (
    CORPORA,
    FIELD,
    OTHER_FORMATS,
    POINT,
    WRITTEN,
    Answer,
    Size,
    anthropic,
    by_call,
    call,
    computer,
    holo3,
    only,
    operation,
    reasoned,
    step,
    xml,
)
from processes import HANG_S

from managed_vllm.agent import AgentFormat, History, ImageRef, Task
from managed_vllm.agent.actions import (
    ActionParseError,
    Click,
    Swipe,
    action_from_dict,
    action_to_dict,
    holo_json_schema,
)
from managed_vllm.agent.actions.android_world import ANDROID_WORLD_ACTIONS, android_world_actions_in_words
from managed_vllm.agent.actions.holo import HOLO_ACTIONS, Holo, holo_tools
from managed_vllm.agent.actions.hosted_tools import HOSTED_ACTIONS, Shape, hosted_tools
from managed_vllm.agent.actions.rows import told
from managed_vllm.agent.actions.scalecua import SCALECUA_CALLS, Platform, operation_of, scalecua_calls_in_words
from managed_vllm.agent.actions.seed import SEED_ACTIONS, seed_functions_in_words, seed_tools
from managed_vllm.agent.named_environments import FORMATS
from managed_vllm.agent.prompting import Turn
from managed_vllm.request.outputs import CompletionOutput

HOSTED = {"gemini", "openai", "claude"}
"""Their models end a task by an answer without a call."""
SIZES: list[Size] = [(1920, 1080), (1000, 1000), (390, 844)]


def parsed(agent: AgentFormat, answer: Answer | str, size: Size = (1000, 1000)) -> Any:
    text, calls = (answer, ()) if isinstance(answer, str) else (answer.text, answer.calls)
    return agent.parse(CompletionOutput(0, text=text, token_ids=[], tool_calls=[dict(each) for each in calls]), size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CORPORA)
def test_answers_mean_their_actions(name: str, size: Size) -> None:
    agent, corpus = FORMATS[name](), CORPORA[name]
    assert len(corpus.answers) >= 10
    at = corpus.at(size)
    for answer in corpus.answers:
        response = parsed(agent, answer, size)
        assert (response.actions, response.thought) == (answer.means(at), answer.thought), answer
        for action in response.actions:
            assert action_from_dict(json.loads(json.dumps(action_to_dict(action)))) == action


# -- what is none ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        *((name, "", "empty") for name in CORPORA),
        *((name, "I click on OK.", "no action") for name in sorted(CORPORA.keys() - HOSTED)),
        *((name, "<think>well", "cut off while the model was thinking") for name in CORPORA),
        ("seed", xml("fly"), "there is no action 'fly'; the actions are click"),
        ("seed", xml("click"), "click needs point"),
        ("seed", xml("click", point="here"), "must be <point>x y</point>, not 'here'"),
        ("seed", xml("click", point="<point>1 2 3</point>"), "must be <point>x y</point>"),
        ("seed", xml("click", point="<point>1001 2</point>"), "off the screen"),
        ("seed", xml("click", where=POINT), "click has no field 'where'"),
        ("seed", xml("wait", time="long"), "must be a number"),
        ("seed", xml("scroll", direction="away"), "must be one of up"),
        ("seed", xml("press", key="foo"), "must be the name of a key"),
        ("seed", f"{xml('wait')}\nand then\n{xml('wait')}", "text stands between two actions"),
        ("seed", "<seed:tool_call>\n</seed:tool_call>", "empty, or was cut off"),
        ("seed", xml("click", point=POINT)[:70], "cut off within its tool call"),
        ("seed", f"{xml('wait')}<seed:tool_call><func", "empty, or was cut off"),
        ("seed", "<parameter=point>1 2</parameter>", "stands in no function"),
        ("seed", "<function><parameter=point>1 2</parameter></function>", "a function has no name"),
        ("seed", "<function=wait><function=wait></function>", "the function before it is not closed"),
        (
            "seed",
            f"<function=click><parameter=point>{POINT}</parameter><parameter=point>{POINT}</parameter></function>",
            "there twice",
        ),
        ("seed", Answer("", only(), "", (call("fly"),)), "there is no action 'fly'"),
        ("seed", Answer("", only(), "", ({"function": {"name": "wait", "arguments": "["}},)), "no JSON"),
        ("seed", Answer("", only(), "", ({"function": {"name": "wait", "arguments": [1]}},)), "an object"),
        ("scalecua", operation("fly()"), "there is no call 'fly'; the calls are click"),
        ("scalecua", operation("click(x=312, y=240"), "no Python, or was cut off"),
        ("scalecua", operation("click(x=312)"), "x and y are needed"),
        ("scalecua", operation("click(x=31200, y=1)"), "off the screen"),
        ("scalecua", operation("click(x=get(), y=1)"), "must be constants"),
        ("scalecua", operation("__import__('os').system('x')"), "there is no call"),
        ("scalecua", operation("swipe(to_coord=[1, 2])"), "needs from_coord"),
        ("scalecua", operation("swipe(direction='up', amount=2)"), "1 at most"),
        ("scalecua", operation("swipe(from_coord=[1], to_coord=[1, 2])"), "must be a pair of numbers"),
        ("scalecua", operation("terminate(status='perhaps')"), "must be success or failure"),
        ("scalecua", operation("terminate()\nwait()"), "something is done after the task was ended"),
        ("scalecua", operation("terminate()") + operation("wait()"), "something is done after the task was ended"),
        ("scalecua", operation(""), "does nothing"),
        ("holo1.5", step("", action="fly"), "there is no action 'fly'"),
        ("holo1.5", step("", action="click_element", element="OK", x=1), "its fields are element, x and y"),
        ("holo1.5", step("", action="click_element", element="OK", x=99999, y=1), "off the screen"),
        ("holo1.5", '{"note": "", "thought": "So."}', "the answer has no action, such as"),
        ("holo1.5", '{"note": "", "thought": 5, "action": {"action": "go_back"}}', "thought must be text"),
        ("holo1.5", "[1]", "must be an object"),
        ("holo1.5", "click(1, 2, 3)", "a place is click"),
        ("holo1.5", "click(1, x)", "a place is click"),
        ("holo3", holo3(None, tool_name="fly"), "there is no action 'fly'; the actions are click"),
        ("holo3", holo3(None, tool_name="click", element="OK", x=1001, y=5), "off the screen"),
        (
            "holo3",
            '{"note": null, "thought": "So.", "tool_call": {"tool_name": "go_back"}, "more": 1}',
            "no field 'more'",
        ),
        ("holo3", holo3(None, tool_name="go_back")[:-9], "cut off"),
        ("holo3.1", Answer("So.", only(), "", (call("click", element="OK"),)), "click needs x and y"),
        ("gemini", "{}", "there is no action None"),
        ("gemini", by_call(only(), "click_at", x=1), "its fields are x and y"),
        ("gemini", by_call(only(), "click_at", x=1001, y=1), "off the screen"),
        ("openai", computer(only(), type="click"), "click needs x and y"),
        ("openai", computer(only(), type="fly"), "there is no action 'fly'; the actions are click"),
        ("openai", by_call(only(), "computer", action=[1]), "must be an object"),
        ("claude", anthropic(only(), action="fly"), "there is no action 'fly'; the actions are key"),
        ("claude", anthropic(only(), action="scroll", coordinate=[1, 2]), "scroll needs scroll_direction"),
        ("claude", anthropic(only(), action="key"), "key needs text"),
        ("android-world", reasoned(action_type="fly"), "there is no action 'fly'; the actions are click"),
        ("android-world", reasoned(action_type="click", index=3), "index names an element of a list that is not here"),
        ("android-world", reasoned(action_type="scroll", direction="down", index="3"), "index names an element"),
        ("android-world", reasoned(action_type="click", x=1), "has no field 'x'"),
        ("android-world", reasoned(action_type="click", x=1001, y=1), "off the screen"),
        ("android-world", reasoned(action_type="status", goal_status="done"), "must be complete or infeasible"),
        ("android-world", reasoned(action_type="scroll", direction="away"), "must be one of up"),
        ("android-world", '{"action_type": "wait"} and {"action_type": "wait"}', "text stands between two actions"),
    ],
)
def test_what_is_no_action(name: str, answer: Answer | str, message: str) -> None:
    with pytest.raises(ActionParseError, match=re.escape(message)) as caught:
        parsed(FORMATS[name](), answer)
    start, end = caught.value.span
    assert 0 <= start <= end <= len(caught.value.text)


NOISE = (
    *("<think>", "</think>", "<seed:tool_call>", "</seed:tool_call>", "<function=click>", "</function>"),
    *("<parameter=point>", "</parameter>", POINT, "<action>", "</action>", "<operation>", "<answer>", "</answer>"),
    *('{"action_type": "click", ', '"x": 1, "y": 2}', '{"tool_call": {', '"tool_name": "click"', "{", "}", "[", "]"),
    *("click(", ")", "x=1, y=2", "swipe(", "direction='up'", "lambda: 0", "f'{x}'", "**{}", "1e999", "NaN", "-1"),
    *('"', "'", "\\", "\n", "```", ",", ":", "null", "true", "\x00", "é", "\ud800", "9" * 50, "None", "Reason:"),
)


def torn(chance: random.Random, name: str) -> str:
    """An answer of the format with parts cut out, doubled and put in."""
    answers = WRITTEN[name]
    text = chance.choice(answers) if chance.random() < 0.8 else ""
    for _ in range(chance.randint(1, 6)):
        at = chance.randint(0, len(text))
        match chance.randint(0, 3):
            case 0:
                text = text[:at] + text[at + chance.randint(1, 20) :]
            case 1:
                text = text[:at] + chance.choice(NOISE) + text[at:]
            case 2:
                other = chance.choice(answers)
                text = text[:at] + other[chance.randint(0, len(other)) :]
            case _:
                text = text[:at] + chr(chance.choice((0, 10, 39, 60, 92, 0x2028, 0xD800, 0x1F600))) + text[at:]
    return text


@pytest.mark.no_cover
@pytest.mark.parametrize("count", [500, pytest.param(50_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_but_the_typed_error(name: str, count: int) -> None:
    agent, chance = FORMATS[name](), random.Random(name)
    read = 0
    for _ in range(count):
        text = torn(chance, name)
        start = end = 0
        try:
            response = parsed(agent, text)
        except ActionParseError as caught:
            start, end = caught.span
        else:
            read += 1
            assert response.actions
            assert all(action_from_dict(action_to_dict(action)) == action for action in response.actions)
        assert 0 <= start <= end <= len(text)
    assert 0 < read < count


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_nested_however_deep_is_an_action_or_the_typed_error(name: str) -> None:
    agent = FORMATS[name]()
    for depth in (2, 300, 600, 900, 990, 20_000):
        for core in ('{"action_type": "click", "x": 1, "y": 2}', '{"name": "click_at", "args": {"x": 1, "y": 2}}', "1"):
            for opened, closed in (("[", "]"), ("(", ")"), ('{"action": ', "}"), ('[{"action": ', "}]")):
                with contextlib.suppress(ActionParseError):
                    assert parsed(agent, opened * depth + core + closed * depth).actions


@pytest.mark.no_cover
@pytest.mark.parametrize("name", CORPORA)
def test_a_long_answer_of_anything_is_read_in_linear_time(name: str) -> None:
    agent = FORMATS[name]()
    for before in ("", "<action>", "<seed:tool_call><function=click><parameter=point>", '{"note": "'):
        for piece in (*NOISE[:20], "[ ", "(1,", " ", "1", "<text>", "<bbox>"):
            text = before + piece * (40_000 // len(piece))
            began = time.process_time()
            length = 0
            try:
                parsed(agent, text)
            except ActionParseError as caught:
                length = len(caught.message)
            assert length < 1000
            assert time.process_time() - began < HANG_S


# -- prompt, schema, parser --------------------------------------------------------------------------------------------

SAID: dict[str, Any] = {"point": "<point>1 2</point>", "text": "a", "key": "shift", "keys": "ctrl c", "seconds": 1}
SAID |= {"direction": "up", "button": "left", "amount": 3, "truth": True, "ignored": "OK", "goal": "complete"}


def test_each_function_of_seeds_prompt_is_read() -> None:
    lines = [json.loads(line) for line in seed_functions_in_words("0 to 1000").splitlines()]
    assert [line["name"] for line in lines] == list(told(SEED_ACTIONS))
    assert [tool["function"]["name"] for tool in seed_tools("0 to 1000")] == list(told(SEED_ACTIONS))
    agent = FORMATS["seed"]()
    for line in lines:
        fields, required = line["parameters"].get("properties", {}), line["parameters"].get("required", [])
        assert fields.keys() == SEED_ACTIONS[line["name"]].fields.keys()
        for keys in (fields, required):
            given = {key: str(SAID[SEED_ACTIONS[line["name"]].fields[key].kind]) for key in keys}
            in_text = parsed(agent, xml(line["name"], **given))
            by_call = parsed(agent, Answer("", only(), "", (call(line["name"], **given),)))
            assert in_text.actions == by_call.actions


@pytest.mark.parametrize("platform", ["computer", "phone"])
def test_each_call_of_scalecuas_prompt_is_read(platform: Platform) -> None:
    agent, names = FORMATS["scalecua"](), set()
    for line in scalecua_calls_in_words(platform).splitlines():
        written = line[2:].partition(" #")[0]
        name = written.partition("(")[0]
        names.add(name)
        assert set(re.findall(r"(\w+)=", written)) <= set(SCALECUA_CALLS[name])
        filled = written.replace("'…'", "'a'").replace("…", "1")
        assert parsed(agent, f"<action>{filled}</action>").actions, line
    assert len(names) >= 11
    assert names <= SCALECUA_CALLS.keys()


def instance(schema: dict[str, Any], every: bool) -> Any:
    """A value of a schema of ours, with all of its fields or those that must be there."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object":
            fields = schema.get("properties", {})
            return {key: instance(fields[key], every) for key in (fields if every else schema.get("required", ()))}
        case "array" if schema["items"]["type"] == "string":
            return ["ctrl", "c"]
        case "array" if schema["items"]["type"] == "number":
            return [1, 2]
        case "array":
            return [instance(schema["items"], True)] * 2
        case "number" | "integer":
            return 1
        case "boolean":
            return True
    return "a"


@pytest.mark.parametrize(("name", "version"), [("holo1.5", "holo1.5"), ("holo3", "holo3")])
def test_each_form_of_holos_schema_is_read(name: str, version: Holo) -> None:
    schema = holo_json_schema(version)
    where = "action" if version == "holo1.5" else "tool_call"
    forms = schema["properties"][where]["anyOf"]
    tag = "action" if version == "holo1.5" else "tool_name"
    assert [form["properties"][tag]["enum"][0] for form in forms] == list(told(HOLO_ACTIONS[version]))
    for form in forms:
        for every in (True, False):
            answer = {"note": "n", "thought": "t", where: instance(form, every)}
            response = parsed(FORMATS[name](), json.dumps(answer))
            assert response.thought == "n\nt"
            assert response.actions


def test_each_tool_of_holo_is_read() -> None:
    assert [tool["function"]["name"] for tool in holo_tools("0 to 1000")] == list(told(HOLO_ACTIONS["holo3"]))
    for tool in FORMATS["holo3.1"]().request["tools"]:
        function = tool["function"]
        for every in (True, False):
            calls = (call(function["name"], **instance(function["parameters"], every)),)
            assert parsed(FORMATS["holo3.1"](), Answer("", only(), "", calls)).actions


@pytest.mark.parametrize("name", sorted(HOSTED))
def test_each_tool_in_the_shape_of_a_hosted_model_is_read(name: str) -> None:
    shape: Shape = "anthropic" if name == "claude" else "gemini" if name == "gemini" else "openai"
    names = list(told(HOSTED_ACTIONS[shape]))
    tools = [tool["function"] for tool in FORMATS[name]().request["tools"]]
    parameters = [tool["parameters"] for tool in tools]
    if shape == "gemini":
        calls = [call(tool["name"], **instance(tool["parameters"], every)) for tool in tools for every in (True, False)]
        assert [tool["name"] for tool in tools] == names
    elif shape == "openai":
        forms = parameters[0]["properties"]["action"]["anyOf"]
        calls = [call("computer", action=instance(form, every)) for form in forms for every in (True, False)]
        assert [form["properties"]["type"]["enum"][0] for form in forms] == names
    else:
        fields = parameters[0]["properties"]
        given = {key: instance(field, True) for key, field in fields.items()} | {"text": "ctrl", "scroll_amount": 1}
        rows = HOSTED_ACTIONS[shape]
        calls = [call("computer", action=each, **{key: given[key] for key in rows[each].fields}) for each in names]
        assert fields["action"]["enum"] == names
    for each in calls:
        assert parsed(FORMATS[name](), Answer("", only(), "", (each,))).actions, each


def test_the_schemas_are_valid() -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed").Draft202012Validator
    for version in ("holo1.5", "holo3"):
        validator.check_schema(holo_json_schema(version))
    hosted = (tool for shape in HOSTED_ACTIONS for tool in hosted_tools(shape, "x"))
    for tool in (*seed_tools("x"), *holo_tools("x"), *hosted):
        validator.check_schema(tool["function"]["parameters"])
    for answer in CORPORA["holo3"].answers[:13]:
        validator(holo_json_schema()).validate(json.loads(answer.text))


def test_each_action_of_android_worlds_prompt_is_read() -> None:
    lines = android_world_actions_in_words().splitlines()
    assert len(lines) == len(told(ANDROID_WORLD_ACTIONS))
    for line in lines:
        value, end = json.JSONDecoder().raw_decode(line[2:])
        assert line[2:][end:].strip().endswith(".")
        assert parsed(FORMATS["android-world"](), json.dumps(value)).actions


# -- what is the format's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "across"),
    [
        ("up", Swipe(195, 843, 195, 0)),
        ("down", Swipe(195, 0, 195, 843)),
        ("left", Swipe(389, 422, 0, 422)),
        ("right", Swipe(0, 422, 389, 422)),
    ],
)
def test_a_swipe_of_android_world_goes_from_edge_to_edge(direction: str, across: Swipe) -> None:
    answer = reasoned(action_type="swipe", direction=direction)
    assert parsed(FORMATS["android-world"](), answer, (390, 844)).actions == (across,)


def test_a_swipe_of_scalecua_goes_so_much_of_the_screen() -> None:
    def swipe(arguments: str) -> Any:
        (action,) = parsed(FORMATS["scalecua-mobile"]("absolute"), operation(f"swipe({arguments})"), (401, 801)).actions
        return action

    assert swipe("direction='up'") == Swipe(200, 600, 200, 200)
    assert swipe("direction='right', amount=0.25") == Swipe(150, 400, 250, 400)
    assert swipe("from_coord=[10, 700], direction='down', amount=0.5") == Swipe(10, 700, 10, 800)


def test_scalecua_in_shares_of_the_screen() -> None:
    answer = operation("click(x=0.51, y=0.34)")
    assert parsed(FORMATS["scalecua"]("relative1"), answer, (1920, 1080)).actions == (Click(979.2, 367.2),)


def test_what_stands_for_a_step_of_scalecua() -> None:
    assert operation_of(operation("wait()")) == "Click OK."
    assert operation_of("  I\nclick. ") == "I click."


def test_the_middle_of_a_box_is_meant() -> None:
    for written in ("<bbox>100 200 300 400</bbox>", "(100,200),(300,400)", "[100, 200, 300, 400]"):
        assert parsed(FORMATS["seed"](), xml("click", point=written)).actions == (Click(200, 300),)


# -- outputs of the field ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "name", "answer", "means"), FIELD, ids=[each.source for each in FIELD])
def test_outputs_from_issues_and_cards(source: str, name: str, answer: Answer | str, means: Any) -> None:
    """Each is what it means in the format of its model, or refused for the reason that is the right one."""
    agent = OTHER_FORMATS[name] if name in OTHER_FORMATS else FORMATS[name]()
    if isinstance(means, str):
        with pytest.raises(ActionParseError, match=re.escape(means)):
            parsed(agent, answer, SIZES[0])
    else:
        assert parsed(agent, answer, SIZES[0]).actions == means


def test_there_are_outputs_of_each_source() -> None:
    assert len(FIELD) == 53


# -- what a model is sent ----------------------------------------------------------------------------------------------


def shot(number: int) -> ImageRef:
    return ImageRef(f"{number:064x}", "image/png", 320, 200)


def messages(name: str, turns: list[Turn], max_images: int = 5) -> list[Any]:
    return list(FORMATS[name]().build_messages(History(Task("t"), "Do {steps} it.", turns, max_images)))


def shape(message: Any) -> str:
    """Its role, and its parts: a for an image, and the texts."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part.get("text", part.get("image")) for part in content]
    return f"{message['role']}: " + "|".join("image" if isinstance(part, ImageRef) else part.strip() for part in parts)


def test_scalecua_is_asked_one_question_a_turn() -> None:
    turns = [Turn(shot(1), response=operation("wait()")), Turn(shot(2), response="well"), Turn(shot(3))]
    _, question = messages("scalecua", turns)
    assert question["content"][0] == {"type": "image", "image": shot(3)}
    asked = question["content"][1]["text"]
    assert "Task:\nDo {steps} it.\n\nPrevious operations:\nStep 1: Click OK.\nStep 2: well" in asked
    assert messages("scalecua", turns[-1:])[1]["content"][1]["text"].endswith("Previous operations:\nNone")


def test_a_correction_stands_beside_the_screenshot_that_it_is_about() -> None:
    turns = [Turn(shot(1), response="?"), Turn(text="That was no action.")]
    for name in ("scalecua", "android-world"):
        content = messages(name, turns)[-1]["content"]
        assert content[:2] == [{"type": "image", "image": shot(1)}, {"type": "text", "text": "That was no action."}]


def test_a_correction_is_sent_where_texts_beside_screenshots_are_not() -> None:
    turns = [Turn(shot(1), text="left out", response="?"), Turn(text="That was no action.")]
    for name in FORMATS.keys() - {"embedded"}:
        sent = [shape(message) for message in messages(name, turns)]
        assert "That was no action." in sent[-1], name
        assert ("left out" in str(sent)) == (name in ("json", "tools")), name


def test_holo_sees_the_newest_three_screenshots() -> None:
    turns = [Turn(shot(number), response=holo3(None, tool_name="wait")) for number in range(4)] + [Turn(shot(4))]
    sent = [shape(message) for message in messages("holo3", turns)]
    assert sent[1] == "user: <task>\nDo {steps} it.\n</task>"
    seen = [line for line in sent if "<observation>" in line]
    assert seen[:2] == ["user: <observation>|[an earlier screenshot]|</observation>"] * 2
    assert seen[2:] == ["user: <observation>|image|</observation>"] * 3
    assert sum("image" in line for line in map(shape, messages("holo3", turns, max_images=1))) == 1


def test_seed_keeps_what_it_thought() -> None:
    thought = f"<think>So.</think>{xml('wait')}"
    sent = [shape(message) for message in messages("seed", [Turn(shot(1), response=thought), Turn(shot(2))])]
    assert sent[1:] == ["user: Do {steps} it.", "user: image", f"assistant: {thought}", "user: image"]


@pytest.mark.parametrize("name", ["seed", "scalecua", "holo3", "holo1.5", "holo3.1"])
def test_an_official_prompt_is_the_system_message(name: str) -> None:
    agent = FORMATS[name](prompt="You are {it}.")
    first, *rest = agent.build_messages(History(Task("t"), "Do it.", [Turn(shot(1))], 5))
    assert first == {"role": "system", "content": "You are {it}."}
    assert sum("Do it." in shape(message) for message in rest) == 1


def test_seed_by_tools_has_them_in_the_request_and_not_in_the_prompt() -> None:
    agent = FORMATS["seed"](native=True)
    assert [tool["function"]["name"] for tool in agent.request["tools"]] == list(told(SEED_ACTIONS))
    assert "seed:tool_call" not in str(agent.build_messages(History(Task("t"), "Do it.", [Turn(shot(1))], 5)))
    assert FORMATS["seed"]().request == {}
