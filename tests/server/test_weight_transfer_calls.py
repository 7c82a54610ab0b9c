"""The supervisor's end of a weight transfer by itself: workers that wait for a trainer that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from processes import eventually
from scripted_server import Script, hangs, says

from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.engine_state import EngineState
from managed_vllm.masking import Secret
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.server.engine import Engine
from managed_vllm.server.good_weights import GoodWeights
from managed_vllm.server.weight_transfers import WeightTransfers
from managed_vllm.status import Cause, Connection

CANARY = says({"results": [{"broken": [], "logits": "finite"}]})


def asked(call: str, **arguments: Any) -> dict[str, Any]:
    return {"call": call, "arguments": arguments, "budget_s": 60}


async def with_transfers(server: Script, on_restart: Callable[[], None]) -> Engine:
    engine = Engine(None, sleeps=False, on_change=lambda: None, on_restart=on_restart)
    spec = ServerSpec.of("stand-in", engine_args={}, env=None, python=None, command=["x", "{port}"])
    order = SupervisorOrder.first(spec, Address(), SupervisionPolicy())
    WeightTransfers(engine, GoodWeights(engine, order), drain_s=0.1)
    await engine.restore(Connection(f"{server.url}/v1", Secret("the-key"), "m"), Secret("control"))
    return engine


@pytest.mark.parametrize("waits_in", ["init_weight_transfer_engine", "receive_weights"])
def test_workers_that_wait_for_a_trainer_that_is_gone_are_started_again(
    script: Callable[..., Script], waits_in: str
) -> None:
    server = script(*([] if waits_in.startswith("init") else [CANARY, says({}), says({})]), hangs, hangs)

    async def scenario() -> None:
        started_again = asyncio.Event()
        engine = await with_transfers(server, started_again.set)
        if waits_in == "receive_weights":
            assert (await engine.answer("trainer", asked("start_weight_update")))["ok"]
        waiting = asyncio.create_task(engine.answer("trainer", asked(waits_in, init_info={}, update_info={})))
        before = len(server.requests)
        await asyncio.to_thread(eventually, lambda: len(server.requests) > before, "the workers wait")
        engine.user_gone("trainer")
        await asyncio.wait_for(started_again.wait(), 60)
        waiting.cancel()
        assert engine.state == EngineState()

    asyncio.run(scenario())


def test_an_update_that_takes_longer_than_it_may_is_taken_back(script: Callable[..., Script]) -> None:
    server = script(CANARY, says({}), says({}))

    async def scenario() -> None:
        started_again = asyncio.Event()
        engine = await with_transfers(server, started_again.set)
        assert (await engine.answer("trainer", asked("start_weight_update", limit_s=0.1)))["ok"]
        await asyncio.wait_for(started_again.wait(), 60)  # its model is no folder that could be loaded again

    asyncio.run(scenario())


def test_weights_of_a_trainer_are_no_state_that_another_server_could_have() -> None:
    sent = EngineState(weight_version="v3", weights_unsaved=True)
    record = {"state": "ready", "engine": sent.to_dict()}
    engine = Engine(record, sleeps=False, on_change=lambda: None, on_restart=lambda: None)
    assert engine.loss is not None
    assert (engine.loss.cause, engine.loss.permanent) == (Cause.WEIGHTS_LOST, True)
    assert Engine(None, sleeps=False, on_change=lambda: None, on_restart=lambda: None).loss is None
