"""The examples for verl and TRL with the real vLLM: their episodes are ours, and TRL's weights are in the server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
from example_modules import EXAMPLES, example
from processes import own_state
from verl_loops import Told, agent_loop

from managed_vllm import ManagedVLLM
from managed_vllm.agent.environments.desktop import desktop_tasks
from managed_vllm.demo import read_screen

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    """The server that the example for TRL asks for."""
    settings: dict[str, Any] = {"dtype": "float32", "for_training": True}
    with own_state(), ManagedVLLM("demo", keep_alive=0, **settings) as server:
        yield server


class Servers:
    """verl's server manager, with a server of ours behind it."""

    def __init__(self, llm: ManagedVLLM) -> None:
        self._client = llm.async_client

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Told:
        params = {**sampling_params, "logprobs": 0}
        (output,) = await self._client.generate({"prompt_token_ids": prompt_ids}, params, session_id=request_id)
        answer = output.outputs[0]
        assert answer.logprobs is not None
        logprobs = [place[token].logprob for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]
        return Told(list(answer.token_ids), logprobs)


def test_verls_agent_loop_plays_the_desktop(llm: ManagedVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    module, loop = agent_loop(monkeypatch, Servers(llm))

    async def play() -> list[Any]:
        return await asyncio.gather(*(loop.run({"temperature": 0.0}, **row) for row in module.rows(9)))

    outputs = asyncio.run(play())
    assert sum(one.reward_score for one in outputs) >= 7
    for one in outputs:
        assert len(one.response_ids) == len(one.response_mask) == len(one.response_logprobs)
        assert sum(one.response_mask) > 0
        assert all(score <= 0 for score in one.response_logprobs)


def test_trls_trainer_trains_on_our_rollouts_and_the_server_has_its_weights(llm: ManagedVLLM) -> None:
    pytest.importorskip("trl")
    command = [sys.executable, str(EXAMPLES / "trainers" / "trl_rollouts.py"), "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "the server has step-2" in ran.stdout
    assert llm.engine.weights().version == "step-2", "it was this server"


def test_the_desktop_as_tools_of_trl() -> None:
    pytest.importorskip("trl")
    with unittest.mock.patch.dict(os.environ):  # TRL sets variables for vLLM, of which other tests must not hear
        desktop = example("trainers/trl_rollouts").DesktopTools()
    for number, task in enumerate(desktop_tasks(9)):
        shown = desktop.reset(task=number, prompt="whatever else is in the row")
        assert task.instruction in shown
        while not (screen := read_screen(shown)).done:
            name, _, words = screen.expected_action().partition("(")
            if name == "click":
                shown = desktop.click(screen.target.x, screen.target.y)
            elif name == "type":
                shown = desktop.type(words.split("'")[1])
            else:
                shown = desktop.scroll(str(screen.more))
        assert desktop.get_reward() == 0.0, "it has not said so yet"
        desktop.finished()
        assert desktop.get_reward() == 1.0
