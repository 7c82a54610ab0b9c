"""An update of the weights in the midst of a run: steps say which weights answered, and its time counts for nobody."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standin
from acting_server import acting
from counting_world import BUTTON, Worlds, right, tasks, until
from demo_checkpoints import copy_of_demo
from moved_clock import Clock
from processes import HANG_S, INSTANT

from managed_vllm import ManagedVLLM
from managed_vllm.agent import Limits, Step, StreamingTaskScheduler, Task, Trajectory, ui_tars
from managed_vllm.agent.actions import Click, ParsedResponse
from managed_vllm.agent.gate import Gate
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import CheckpointError, ConfigError

ANY_ANSWER = replace(ui_tars(), parse=lambda answer, size: ParsedResponse("", (Click(*BUTTON),)))
"""The stand-in says nothing that means anything."""


def server(**order: Any) -> ManagedVLLM:
    environment = standin.orders(**order)
    return ManagedVLLM("stand-in", command=standin.command(), env=environment, keep_alive=INSTANT)


async def collect(running: StreamingTaskScheduler, given: Any) -> list[Trajectory]:
    return [one async for one in running.run(given)]


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_update", ["finish", "continue"])
def test_one_call_updates_a_run_in_flight(home: Path, tmp_path: Path, on_update: str) -> None:
    async def main(llm: ManagedVLLM) -> list[Trajectory]:
        first, updated = asyncio.Event(), asyncio.Event()

        async def told(task: Task, rollout: int, step: Step) -> None:
            first.set()

        async def given() -> AsyncIterator[Task]:
            for task in tasks(1000, 9):
                yield task
                if updated.is_set():
                    break
            yield Task("last", "", data={"presses": 9})

        running = StreamingTaskScheduler(
            llm,
            Worlds(),
            n=2,
            max_concurrency=4,
            sampling_params={"max_tokens": 60},
            limits=Limits(max_steps=4),
            agent=ANY_ANSWER,
            on_step=told,
        )
        playing = asyncio.create_task(collect(running, given()))
        await first.wait()
        with pytest.raises(CheckpointError):
            await running.update_weights(tmp_path / "missing", version="bad")
        await running.update_weights(copy_of_demo(tmp_path / "step-1"), version="v1", on_update=on_update)
        assert running.weight_version == "v1"
        updated.set()
        return await playing

    with server(token_s=0.003) as llm:
        found = asyncio.run(main(llm))
    assert all(one.ok and one.attempt == 0 for one in found), "none was lost and played again"
    for one in found:
        versions = [step.weight_version for step in one.steps]
        assert versions == sorted(versions, key=["default", "v1"].index)  # type: ignore[arg-type]
        for step in one.steps:
            if step.weight_versions:
                assert [part[0] for part in step.weight_versions] == ["default", "v1"]
                assert step.weight_versions[-1][2] == len(step.response_token_ids)
    counted = Counter(step.weight_version for one in found for step in one.steps)
    assert counted.keys() == {"default", "v1"}
    if on_update == "finish":
        assert not any(step.weight_versions for one in found for step in one.steps)


class Engine:
    """As `llm.engine`, of which the state is what a test says; `asked` counts how often it was looked at."""

    def __init__(self) -> None:
        self.state = EngineState()
        self.asked = 0

    def last_state(self) -> EngineState:
        self.asked += 1
        return self.state

    async def become(self, state: EngineState) -> None:
        self.state, before = state, self.asked
        await until(lambda: self.asked > before + 1)


class Handle:
    """A client, and an engine beside it."""

    def __init__(self, client: Any) -> None:
        self.async_client = client
        self.engine = Engine()


def test_a_pause_of_the_engine_does_not_count_for_what_is_in_flight(clock: Clock) -> None:
    async def main() -> tuple[list[Trajectory], int]:
        held, asked = threading.Event(), list[int]()

        async def slowly(messages: list[dict[str, Any]]) -> str:
            asked.append(len(messages))
            await asyncio.to_thread(held.wait, HANG_S)  # by another clock than the one that is moved on
            return right(messages)

        with acting(lambda messages: slowly(messages)) as slow:
            llm, worlds = Handle(slow.client()), Worlds()
            running = StreamingTaskScheduler(
                llm,
                worlds,
                agent=ui_tars("absolute", show_text=True),
                limits=Limits(generate_timeout_s=900, episode_timeout_s=1000),
                max_concurrency=2,
            )
            playing = asyncio.create_task(collect(running, tasks(2, 2)))
            await until(lambda: len(asked) == 2)
            await llm.engine.become(EngineState(paused="keep", weight_version="v7"))
            clock.forward(3600)
            held.set()
            await until(lambda: slow.in_flight == 0)
            beyond = len(asked) - 2
            assert running.weight_version == "v7"
            await llm.engine.become(EngineState())
            return await playing, beyond

    found, beyond = asyncio.run(main())
    assert [one.reward for one in found] == [1.0] * 2
    assert beyond == 0, "nothing begins while the engine is paused"


def test_a_client_can_not_change_weights() -> None:
    with acting(right) as made:
        running = StreamingTaskScheduler(made.client(), Worlds())
        with pytest.raises(ConfigError, match="needs a ManagedVLLM"):
            asyncio.run(running.update_weights("step-1"))


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_a_limit_stands_still_while_requests_are_frozen(clock: Clock) -> None:
    async def main() -> float:
        gate = Gate()
        async with gate.limited(100) as limit:
            gate.close("engine", freezes=True)
            clock.forward(1000)
            await asyncio.sleep(0)
            gate.open("engine")
            clock.forward(50)
            await asyncio.sleep(0)
        return limit.held_s

    assert 1000 <= asyncio.run(main()) < 1000 + HANG_S


@pytest.mark.parametrize("seconds_ago", [0.0, 200.0])
def test_while_requests_are_finished_only_those_stand_still_that_slipped_in(clock: Clock, seconds_ago: float) -> None:
    async def main() -> None:
        gate = Gate()
        async with gate.limited(1000):
            clock.forward(seconds_ago)
            gate.close("engine", noticed_s=100)
            clock.forward(5000)
            await asyncio.sleep(0.01)
            gate.open("engine")
            await asyncio.sleep(0.01)

    if seconds_ago:
        with pytest.raises(TimeoutError):
            asyncio.run(main())
    else:
        asyncio.run(main())


def test_a_gate_is_open_once_all_have_opened_it() -> None:
    async def main() -> list[str]:
        gate, passed = Gate(), list[str]()

        async def pass_it() -> None:
            async with gate.passed():
                passed.append("passed")

        gate.close("engine", freezes=True)
        gate.close()
        passing = asyncio.create_task(pass_it())
        gate.open("engine")
        await asyncio.sleep(0.01)
        passed.append("opened")
        gate.resume()
        await passing
        return passed

    assert asyncio.run(main()) == ["opened", "passed"]
