"""The supervisor's end of engine control by itself: what it takes from a record; an engine that does not resume."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from counting_world import until
from lone_server import answered
from moved_clock import Clock
from processes import HANG_S
from scripted_server import Act, Script, hangs, says

from managed_vllm.engine_state import EngineState
from managed_vllm.instance.engine_calls import GpuMemoryChange
from managed_vllm.masking import Secret
from managed_vllm.server.engine import Engine
from managed_vllm.server.gpu_memory import GpuMemory
from managed_vllm.server.idle_sleep import IdleSleep
from managed_vllm.status import Cause, Connection

KEY = Secret("control")
LONG_S = 100.0
"""More than an engine is given to resume."""
LOADED = EngineState(loras={"a": "/lora"}, weights="/ck", weight_version="v2")


def make(record: dict[str, Any] | None = None, on_restart: Callable[[], None] = lambda: None) -> Engine:
    return Engine(record, sleeps=True, on_change=lambda: None, on_restart=on_restart)


def connection(server: Script) -> Connection:
    return Connection(f"{server.url}/v1", Secret("the-key"), "m")


def test_what_a_predecessor_had_is_put_back_step_by_step(script: Callable[..., Script]) -> None:
    server = script(*[says({})] * 6)
    taken_over = make({"state": "ready", "engine": LOADED.to_dict()})
    assert asyncio.run(taken_over.restore(connection(server), KEY)) is None
    assert [path.partition("?")[0] for path, _ in server.requests] == [
        *("/collective_rpc", "/collective_rpc"),  # what the Workers say of the weights of the start; the reload
        *("/reset_prefix_cache", "/collective_rpc"),
        "/update_weight_version",
        "/v1/load_lora_adapter",
    ]
    assert taken_over.state == LOADED
    assert taken_over.to_record() == {"engine": LOADED.to_dict()}


def test_a_state_that_can_not_be_read_is_no_reason_to_serve_something_else(script: Callable[..., Script]) -> None:
    broken = make({"state": "ready", "engine": {"paused": "for ever"}})
    reason = asyncio.run(broken.restore(connection(script()), KEY))
    assert reason is not None
    assert (reason.cause, reason.permanent) == (Cause.ENGINE_STATE, True)


@pytest.mark.parametrize("record", [None, {"state": "ready"}, {"state": "failed", "engine": LOADED.to_dict()}])
def test_what_was_said_to_have_failed_is_not_tried_for_ever(record: dict[str, Any] | None) -> None:
    assert make(record).state == EngineState()


def test_sleep_and_wake_tell_what_the_gpus_had_in_use(script: Callable[..., Script]) -> None:
    used = iter([{0: 70, 1: 50}, {0: 10, 1: 5}, {0: 10, 1: 5}, {0: 71, 1: 50}])

    async def measured() -> GpuMemory:
        return GpuMemory(next(used))

    async def scenario() -> list[GpuMemoryChange | None]:
        measuring = Engine(None, sleeps=True, on_change=lambda: None, on_restart=lambda: None, gpu_memory=measured)
        await measuring.restore(connection(script(says({}), says({}))), KEY)
        replies = [await measuring.answer("user", {"call": call, "budget_s": 30}) for call in ("sleep", "wake")]
        return [GpuMemoryChange.of(json.loads(json.dumps(reply["result"]))) for reply in replies]

    asleep, awake = asyncio.run(scenario())
    assert asleep == GpuMemoryChange({0: 70, 1: 50}, {0: 10, 1: 5})
    assert asleep is not None
    assert awake is not None
    assert (asleep.freed, awake.freed) == (105, -106)
    assert GpuMemoryChange.of({}) is GpuMemoryChange.of({"gpu_memory": [None, None]}) is None


def test_an_engine_falls_asleep_when_nothing_is_done_with_it_not_behind_a_call_that_lasts(
    script: Callable[..., Script],
) -> None:
    server = script(says({"in_flight": 0, "requests": 1}))

    def paths() -> list[str]:
        return [path.partition("?")[0] for path, _ in server.requests]

    async def scenario() -> None:
        idle = make()
        IdleSleep(idle, 0.05)
        await idle.restore(connection(server), KEY)
        async with idle.turn:  # as a call has it
            await until(lambda: len(paths()) > 20)
            assert set(paths()) == {"/managed_vllm/use"}
        await until(lambda: idle.state == EngineState(sleep_level=1))
        idle.leave()

    asyncio.run(scenario())


REFUSES = says({"error": {"message": "Failed to resume generation"}}, 500)


async def asked(server: Script, count: int) -> None:
    """Returns once the server has had so many requests."""

    async def were_so_many() -> bool:
        return len(server.requests) >= count

    await answered(were_so_many)


@pytest.mark.parametrize("answers", [hangs, REFUSES])
def test_an_engine_that_does_not_resume_is_started_again(
    script: Callable[..., Script], clock: Clock, answers: Act
) -> None:
    server = script(says({}), answers, answers, answers)

    async def scenario() -> None:
        started_again = asyncio.Event()
        held = make(None, started_again.set)
        await held.restore(connection(server), KEY)
        pause = {"call": "pause", "arguments": {"mode": "keep", "held": True}, "budget_s": HANG_S}
        reply = await held.answer("user", pause)
        assert reply["ok"], (reply, server.requests, server.headers)
        assert held.state == EngineState(paused="keep")
        assert held.to_record() == {"engine": EngineState().to_dict()}  # its user's connection ends with us
        held.user_gone("user")
        for count in (2, 3, 4):
            await asked(server, count)
            if answers is hangs:
                clock.forward(LONG_S)
        await started_again.wait()
        assert held.state == EngineState()

    asyncio.run(scenario())
    assert [path.partition("?")[0] for path, _ in server.requests] == ["/pause", "/resume", "/resume", "/resume"]
