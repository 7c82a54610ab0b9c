"""`llm.engine` against the stand-in: what it does, what it remembers, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import standin
from processes import HANG_S, INSTANT, eventually, sigkill
from standin_log import whole_log

from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy, ServerState
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import (
    BadRequestError,
    BrokenModelError,
    ConfigError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
    EngineUnsupportedError,
    ModelNotFoundError,
)
from managed_vllm.instance import directory
from managed_vllm.status import Cause

AT_ONCE = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)


def server(**arguments: Any) -> ManagedVLLM:
    order = arguments.pop("order", {})
    options = {"keep_alive": INSTANT, "restart": AT_ONCE, **arguments}
    return ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(**order), **options)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def generates(llm: ManagedVLLM, **asked: Any) -> bool:
    return bool(llm.generate("Hi", max_tokens=2, **asked)[0].outputs[0].token_ids)


def restarted(llm: ManagedVLLM, kill: Callable[[], None]) -> None:
    epoch = llm.status().epoch
    kill()
    eventually(lambda: llm.wait_ready(HANG_S).epoch > epoch, "started again")


def kill_server(llm: ManagedVLLM) -> None:
    restarted(llm, lambda: sigkill(llm.status().server_pid))


def kill_supervisor(llm: ManagedVLLM) -> None:
    restarted(llm, lambda: sigkill(llm.status().supervisor_pid))


# -- pause and sleep ---------------------------------------------------------------------------------------------------


def test_requests_wait_while_it_is_paused_and_are_answered_after(home: Path) -> None:
    with server() as llm, ThreadPoolExecutor() as pool:
        llm.engine.pause()
        assert llm.engine.is_paused()
        assert llm.status().engine == llm.engine.state() == EngineState(paused="keep")
        assert llm.status().state is ServerState.READY
        waiting = pool.submit(generates, llm)
        eventually(lambda: llm.logs(500).count("CONTROL /pause"), "paused")
        assert not waiting.done()
        llm.engine.resume()
        assert waiting.result(HANG_S)
        assert llm.status().engine.serves


def test_a_paused_server_is_not_taken_for_hung_and_is_not_even_asked(home: Path) -> None:
    never = 1e6
    hang = HangPolicy(stall_s=0.2, answer_s=HANG_S, stopped_s=never)  # one token is asked for soon, and waited for long

    def is_looked_at(llm: ManagedVLLM, times: int) -> None:
        before = llm.status().health.answered
        eventually(lambda: llm.status().health.answered >= before + times, "it was looked at")

    with server(hang=hang) as llm, llm.engine.paused():
        is_looked_at(llm, 5)  # what was asked for before the pause is given up by now
        before = llm.metrics().generation_tokens
        is_looked_at(llm, 30)  # every 50 ms: after 200 ms without a token one would be asked for
        assert llm.metrics().generation_tokens == before
        assert llm.status().epoch == 1
        assert "CONTROL /is_paused" not in whole_log(llm)


def test_it_sleeps_and_wakes_and_a_pause_outlasts_the_sleep(home: Path) -> None:
    with server() as llm:
        with llm.engine.asleep(1):
            assert llm.engine.is_sleeping()
            llm.engine.pause()
            assert llm.status().engine == EngineState(sleep_level=1, paused="keep")
        assert llm.status().engine == EngineState(paused="keep")
        assert llm.engine.is_paused()
        llm.engine.resume()
        assert generates(llm)


def test_what_one_user_holds_another_one_does_not_end(home: Path) -> None:
    with server() as one, server() as other:
        with one.engine.paused():
            with other.engine.paused():
                pass
            other.engine.resume()
            assert one.engine.is_paused()
        assert not other.engine.is_paused()


def test_a_user_that_is_killed_while_it_holds_a_pause_ends_it(home: Path) -> None:
    script = """
import sys
import standin
from managed_vllm import ManagedVLLM
llm = ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), keep_alive=0.2)
with llm, llm.engine.paused(), llm.engine.asleep(1):
    print("paused", flush=True)
    sys.stdin.read()
"""
    path = os.pathsep.join([str(Path(standin.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    with (
        server() as llm,
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        ) as user,
    ):
        assert user.stdout is not None
        assert user.stdout.readline() == b"paused\n"
        assert llm.status().engine == EngineState(sleep_level=1, paused="keep")
        user.kill()
        eventually(lambda: llm.status().engine.serves, "released")
        assert generates(llm)


def test_a_server_without_the_routes_is_refused_with_what_it_would_take(home: Path) -> None:
    with server(order={"control": {"without": True}}) as llm:
        with pytest.raises(EngineUnsupportedError, match="VLLM_SERVER_DEV_MODE"):
            llm.engine.pause()
        with pytest.raises(EngineUnsupportedError, match="enable_lora"):
            llm.engine.load_lora("a", "/nowhere")
        assert llm.engine.weights().checksum is None


def test_wrong_arguments_are_refused_before_anything_is_started(home: Path) -> None:
    engine = server().engine
    with pytest.raises(ConfigError, match="keep, wait, abort"):
        engine.pause("later")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="level"):
        engine.sleep(7)
    with pytest.raises(ConfigError, match="name"):
        engine.load_lora("", "/x")
    with pytest.raises(ConfigError, match="timeout"):
        engine.resume(timeout=-1)
    assert directory.instances(home) == []


# -- a server that hangs or dies ---------------------------------------------------------------------------------------


def test_a_call_that_hangs_ends_by_its_time_and_holds_nobody_else_up(home: Path) -> None:
    with server(order={"control": {"hangs": "/pause"}}) as llm:

        def hangs() -> bool:
            """Whether the server was told: on a busy machine the time may be up before."""
            with pytest.raises(EngineTimeoutError):
                llm.engine.pause(timeout=0.5)
            return "HANGS /pause" in llm.logs(500)

        eventually(hangs, "the server is told to pause")
        assert generates(llm)
        assert llm.status().engine.serves
        eventually(lambda: "CONTROL /resume" in llm.logs(500), "undone, in case it was done")


def test_a_server_that_dies_in_the_middle_is_said_and_its_state_is_the_one_before(home: Path, adapter: Path) -> None:
    with server(order={"control": {"hangs": "/pause"}}) as llm, ThreadPoolExecutor() as pool:
        llm.engine.load_lora("a", adapter)
        pausing = pool.submit(llm.engine.pause)
        eventually(lambda: "HANGS /pause" in llm.logs(500), "it is about to pause")
        kill_server(llm)
        with pytest.raises((EngineLostError, EngineTimeoutError)):
            pausing.result(HANG_S)
        assert llm.status().engine == EngineState(loras={"a": str(adapter)})


def test_a_pause_that_did_not_hold_says_so_at_its_end(home: Path) -> None:
    with server() as llm:
        with pytest.raises(EngineLostError), llm.engine.paused():
            kill_supervisor(llm)
        assert generates(llm)


# -- what is remembered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [kill_server, kill_supervisor])
def test_adapters_and_a_pause_survive(home: Path, adapter: Path, kill: Callable[[ManagedVLLM], None]) -> None:
    with server() as llm:
        llm.engine.load_lora("a", adapter)
        llm.engine.load_lora("a", adapter)  # another user may ask for it, too
        llm.engine.load_lora("b", adapter)
        llm.engine.unload_lora("b")
        llm.engine.pause("abort")
        kill(llm)
        assert llm.status().engine == EngineState(paused="abort", loras={"a": str(adapter)})
        assert llm.engine.loras() == {"a": str(adapter)}
        llm.engine.resume()
        assert generates(llm, model="a")
        with pytest.raises(ModelNotFoundError):
            generates(llm, model="b")


def test_what_can_not_be_put_back_fails_with_the_reason_and_never_serves_without_it(home: Path, adapter: Path) -> None:
    with server() as llm:
        llm.engine.load_lora("a", adapter)
        (adapter / "adapter_config.json").unlink()
        adapter.rmdir()
        sigkill(llm.status().server_pid)
        with pytest.raises(BrokenModelError, match="No adapter found") as failed:
            llm.wait_ready(HANG_S, after_epoch=1)
        assert failed.value.diagnosis.cause is Cause.ENGINE_STATE


def test_an_adapter_that_is_not_there_is_the_servers_own_error(home: Path, tmp_path: Path) -> None:
    with server() as llm:
        with pytest.raises(EngineControlError, match="No adapter found"):
            llm.engine.load_lora("a", tmp_path / "none")
        assert llm.status().engine == EngineState()


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_the_same_for_asyncio_and_a_cancelled_block_leaves_no_pause(home: Path, adapter: Path) -> None:
    async def main(llm: ManagedVLLM) -> None:
        engine = llm.async_engine
        await engine.load_lora("a", adapter)
        assert await engine.loras() == {"a": str(adapter)}
        async with engine.paused(), engine.asleep(0):
            assert await engine.is_paused()
        inside = asyncio.Event()

        async def hold() -> None:
            async with engine.paused():
                inside.set()
                await asyncio.sleep(HANG_S)

        for wait in (inside.wait(), asyncio.sleep(0)):
            assert not await engine.is_paused()  # a block that was left has ended its pause by then
            holding = asyncio.create_task(hold())
            await wait
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    with server() as llm:
        asyncio.run(main(llm))
        # One that is cancelled while it is entered goes on to its end: the last of four pauses.
        eventually(lambda: llm.logs(500).count("CONTROL /pause") == 4, "it was entered all the same")
        eventually(lambda: llm.status().engine.serves, "released")


# -- lora_request= -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRARequest:
    """The attributes of vLLM's that count."""

    lora_name: str
    lora_path: str
    lora_int_id: int = 1


def test_an_adapter_is_loaded_on_its_first_use_as_vllm_llm_does(home: Path, adapter: Path, tmp_path: Path) -> None:
    with server() as llm:
        mine = LoRARequest("a", str(adapter))
        assert generates(llm, lora_request=mine)
        assert llm.chat([{"role": "user", "content": "Hi"}], {"max_tokens": 2}, lora_request=mine)
        assert [part for part in llm.stream("Hi", {"max_tokens": 2}, lora_request=mine)][-1].finished
        other = LoRARequest("b", str(adapter))
        assert len(llm.generate(["x", "y", "z"], {"max_tokens": 2}, lora_request=[mine, None, other])) == 3
        assert whole_log(llm).count("CONTROL /v1/load_lora_adapter") == 2
        assert llm.status().engine.loras == {"a": str(adapter), "b": str(adapter)}
        with pytest.raises(EngineControlError, match="No adapter found"):
            generates(llm, lora_request=LoRARequest("c", str(tmp_path / "none")))
        for wrong in ("a", object(), [mine, mine]):
            with pytest.raises(BadRequestError, match="lora_request"):
                generates(llm, lora_request=wrong)
        with pytest.raises(BadRequestError, match="give one"):
            generates(llm, lora_request=mine, model="a")
