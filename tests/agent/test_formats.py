"""Formats: what a model is told, as the server gets it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from acting_server import acting, text_of
from counting_world import Worlds

from managed_vllm.agent import AgentFormat, Limits, Task, Trajectory, run_episode, ui_tars
from managed_vllm.agent.named_environments import FORMATS

INSTRUCTION = "Press {language} {instruction} {next} until none is left."


def sent(agent: AgentFormat, answer: str = "?", task: Task | None = None) -> tuple[list[Any], Trajectory]:
    """The messages of a first turn as they arrive at the server, and what became of the episode."""
    with acting(lambda _: answer) as server:
        played = run_episode(
            server.client(), Worlds()(), task or Task("t", INSTRUCTION), agent=agent, limits=Limits(max_steps=1)
        )
        trajectory = asyncio.run(played)
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
