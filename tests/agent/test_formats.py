"""Formats: what a model is told, as the server gets it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from acting_server import acting, text_of
from counting_world import Worlds

from managed_vllm.agent import AgentFormat, Limits, Task, Trajectory, json_actions, run_episode, tool_calls, ui_tars
from managed_vllm.agent.actions import Click, Coordinates, parse_json_actions
from managed_vllm.agent.actions.table import ACTIONS
from managed_vllm.agent.named_environments import FORMATS
from managed_vllm.request.outputs import CompletionOutput

INSTRUCTION = "Press {language} {instruction} {next} until none is left."


def sent(agent: AgentFormat, answer: str = "?", task: Task | None = None) -> tuple[list[Any], Trajectory]:
    """The messages of a first turn as they arrive at the server, and what became of the episode."""

    async def play() -> Trajectory:
        async with server.client() as client:
            given = task or Task("t", INSTRUCTION)
            return await run_episode(client, Worlds()(), given, agent=agent, limits=Limits(max_steps=1))

    with acting(lambda _: answer) as server:
        trajectory = asyncio.run(play())
    return next(body["messages"] for body in server.requests if any(map(text_of, body["messages"]))), trajectory


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_no_placeholder_of_a_prompt_reaches_the_model(make: Callable[[], AgentFormat]) -> None:
    messages, _ = sent(make())
    words = "\n".join(map(text_of, messages)).replace(INSTRUCTION, "")
    assert not re.findall(r"\{\w*\}", words)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"embedded"}))
def test_the_instruction_reaches_the_model_as_it_is(name: str) -> None:
    """The embedded model reads the screen, in which its task stands."""
    messages, _ = sent(FORMATS[name]())
    assert sum(INSTRUCTION in text_of(message) for message in messages) == 1


def test_the_language_of_the_thoughts_is_told() -> None:
    assert "Write the `Thought` part in English." in text_of(sent(ui_tars())[0][1])
    assert "Write the `Thought` part in German." in text_of(sent(ui_tars(language="German"))[0][1])
    assert "Only French: " + INSTRUCTION in text_of(
        sent(ui_tars(prompt="Only {language}: {instruction}", language="French"))[0][1]
    )


# -- prompt, schema, parser: one table ---------------------------------------------------------------------------------


VALUES: dict[str, Any] = {"x": 1, "y": 2, "button": "left", "clicks": 2, "text": "a", "truth": True, "key": "shift"}
VALUES |= {"keys": ["ctrl", "c"], "direction": "up", "amount": 3, "seconds": 1}


def test_every_action_that_the_json_prompt_names_is_read_with_the_fields_it_names() -> None:
    words = text_of(sent(json_actions())[0][0])
    lines = re.findall(r"^- (\w+): (.*)$", words, re.MULTILINE)
    assert [name for name, _ in lines] == list(ACTIONS)
    for name, line in lines:
        said = re.findall(r"(\w+)(\??)(?: \([^)]*\))?[,.]", line.split(". ")[0] + ".")
        fields = {key: optional == "?" for key, optional in said if key != "fields"}
        expected = {key: not field.required for key, field in ACTIONS[name].fields.items()}
        assert fields == expected
        for keys in (expected, [key for key, optional in expected.items() if not optional]):
            values = {key: VALUES[ACTIONS[name].fields[key].kind] for key in keys}
            assert parse_json_actions(json.dumps({"action": name, **values}), (100, 100)).actions


@pytest.mark.parametrize(
    ("coordinates", "words"),
    [
        ("absolute", "Coordinates are pixels of the screenshot, which is 320 wide and 200 high."),
        ("relative1000", "Coordinates are thousandths of the screen: x from 0 (left) to 1000 (right), y from 0 (top)"),
        ("resized", "Coordinates are pixels of the picture as you see it."),
    ],
)
@pytest.mark.parametrize("make", [json_actions, tool_calls])
def test_a_model_is_told_what_its_numbers_are(make: Any, coordinates: Any, words: str) -> None:
    """And it is true: the same point of the screenshot, said in that frame, is clicked there."""
    assert words in text_of(sent(make(coordinates))[0][0])
    size, seen = (320, 200), {"absolute": (160, 100), "relative1000": (500, 500), "resized": (182, 112)}
    x, y = seen[coordinates]
    answer = CompletionOutput(
        0,
        text=f'{{"action": "click", "x": {x}, "y": {y}}}',
        token_ids=[],
        tool_calls=[{"function": {"name": "click", "arguments": {"x": x, "y": y}}}],
    )
    assert make(coordinates).parse(answer, size).actions == (Click(160, 100),)


@pytest.mark.parametrize(
    ("coordinates", "words"), [("absolute", "pixels of the screenshot"), ("relative1000", "0 at the left edge")]
)
def test_tools_say_what_the_numbers_are(coordinates: Coordinates, words: str) -> None:
    tools = [tool["function"] for tool in tool_calls(coordinates).request["tools"]]
    click = next(tool for tool in tools if tool["name"] == "click")
    assert click["parameters"]["properties"]["x"]["description"].startswith(words)
