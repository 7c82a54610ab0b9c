"""Rollouts on a server that is killed while they play, for the stand-in and the real vLLM alike."""

from __future__ import annotations

import threading
from typing import Any

from counting_world import CountingWorld, Worlds, tasks

from managed_vllm import ManagedVLLM
from managed_vllm.agent import Limits, StepResult, StreamingTaskScheduler, Trajectory
from managed_vllm.agent.actions import ParsedResponse, Wait
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.prompting import Chat


def answered(answer: Any, size: Any) -> ParsedResponse:
    return ParsedResponse("", (Wait(),))


class Counting(CountingWorld):
    """Ends by itself after so many turns, whatever the model says."""

    async def step(self, action: Any) -> StepResult:
        await self._may("step")
        self.left -= 1
        return StepResult(self.seen(), reward=1.0, terminated=self.left == 0)

    async def evaluate(self) -> None:
        return None


def play_while_killing(llm: ManagedVLLM, kill: Any, *, count: int, turns: int, kills: int) -> list[Trajectory]:
    """Plays, and has the server killed so many times, each time that a share of the turns was played."""
    worlds = Worlds()
    scheduler = StreamingTaskScheduler(
        llm,
        lambda: Counting(None, worlds),
        n=2,
        max_concurrency=8,
        sampling_params={"max_tokens": 24, "temperature": 0},
        limits=Limits(max_steps=turns + 1),
        agent=AgentFormat(Chat(show_screenshot=False), answered),
    )
    over = threading.Event()
    failed: list[BaseException] = []

    def killer() -> None:
        try:
            epochs = set()
            for number in range(1, kills + 1):
                while worlds.calls["step"] < number * count * 2 * turns // (kills + 1):
                    if over.wait(0.01):
                        return
                status = llm.wait_ready(timeout=300)
                assert status.epoch not in epochs
                epochs.add(status.epoch)
                kill(status)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        found = list(scheduler.run_all(tasks(count, turns)))
    finally:
        over.set()
        thread.join()
    assert not failed, failed
    return found


def check_after_kills(found: list[Trajectory], *, count: int, turns: int, kills: int) -> None:
    """No trajectory is lost or scored because of it, and every record is exact."""
    assert len(found) == count * 2
    assert {one.reward for one in found} == {float(turns)}
    assert {one.attempt for one in found} == {0}
    assert all(len(one.steps) == turns for one in found)
    epochs = {step.epoch for one in found for step in one.steps}
    assert len(epochs) == kills + 1
    assert max(step.attempts for one in found for step in one.steps) > 1
