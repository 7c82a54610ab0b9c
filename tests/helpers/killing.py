"""Rollouts on a server that is killed while they play, for the stand-in and the real vLLM alike."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from counting_world import CountingWorld, Worlds, tasks, until

from managed_vllm import ManagedVLLM
from managed_vllm.agent import Limits, StepResult, StreamingTaskScheduler, Trajectory
from managed_vllm.agent.actions import ParsedResponse, Wait
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.prompting import Chat, History
from managed_vllm.agent.types import Message


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


AT_ONCE = 8
"""Rollouts."""


class _Killer:
    """Has the server killed so many times, each time that a share of the turns was played.

    However late a kill comes, it comes in the midst of the rollouts: they don't go on to the next one without it. Then
    more turns are left than are at once, so that each life of the server has answered some.
    """

    def __init__(self, llm: ManagedVLLM, kill: Any, *, share: int, kills: int) -> None:
        self._llm = llm
        self._kill = kill
        self._share = share
        self._kills = kills
        self._stopped: list[int] = []
        self._in_flight = 0
        self._over = threading.Event()
        self.worlds = Worlds()
        self.failed: list[BaseException] = []
        self.agent = AgentFormat(self._asking, self._answered)

    def world(self) -> Counting:
        return Counting(self._hold, self.worlds)

    def _hold(self, world: CountingWorld, call: str) -> Any:
        due = min(self._kills, (self.worlds.calls["step"] + 2 * AT_ONCE) // self._share - 1)
        if call == "step" and len(self._stopped) < due:
            return until(lambda: len(self._stopped) >= due or self.failed)
        return None

    def _asking(self, history: History) -> list[Message]:
        self._in_flight += 1
        return Chat(show_screenshot=False)(history)

    def _answered(self, answer: Any, size: Any) -> ParsedResponse:
        self._in_flight -= 1
        return answered(answer, size)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        try:
            for number in range(1, self._kills + 1):
                self._wait(functools.partial(self._played, number))
                status = self._llm.wait_ready(timeout=300)
                assert status.epoch not in self._stopped
                assert status.server_pid is not None
                os.kill(status.server_pid, signal.SIGSTOP)  # what is asked for now is in flight when it dies
                self._stopped.append(status.epoch)
                self._wait(lambda: self._in_flight > 0)
                with contextlib.suppress(ProcessLookupError):  # after ten seconds the supervisor kills what is stopped
                    self._kill(status)
        except BaseException as error:
            self.failed.append(error)

    def _played(self, number: int) -> bool:
        return self.worlds.calls["step"] >= number * self._share

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self._over.wait(0.01), "the run is over"


def play_while_killing(llm: ManagedVLLM, kill: Any, *, count: int, turns: int, kills: int) -> list[Trajectory]:
    """Plays, and has the server killed so many times, each time that a share of the turns was played."""
    killer = _Killer(llm, kill, share=count * 2 * turns // (kills + 1), kills=kills)
    scheduler = StreamingTaskScheduler(
        llm,
        killer.world,
        n=2,
        max_concurrency=AT_ONCE,
        sampling_params={"max_tokens": 24, "temperature": 0},
        limits=Limits(max_steps=turns + 1),
        agent=killer.agent,
    )
    with killer.at_work():
        found = list(scheduler.run_all(tasks(count, turns)))
    assert not killer.failed, killer.failed
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
