"""`update_weights` against the stand-in: an update is safe, or it did not happen."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import standin
from demo_checkpoints import copy_of_demo, edit_json
from processes import HANG_S, INSTANT, eventually, sigkill
from standin_log import whole_log

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState
from managed_vllm.errors import (
    BrokenModelError,
    CheckpointError,
    ConfigError,
    EngineControlError,
    EngineTimeoutError,
    EngineUnsupportedError,
)


def server(**order: Any) -> ManagedVLLM:
    restart = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)
    environment = standin.orders(**order)
    return ManagedVLLM("stand-in", command=standin.command(), env=environment, keep_alive=INSTANT, restart=restart)


def checkpoint(folder: Path, **acts: Any) -> Path:
    """A checkpoint that is good to look at; `acts` is how the stand-in behaves when it loads it."""
    copy_of_demo(folder)
    (folder / "standin.json").write_text(json.dumps({"name": folder.name, **acts}))
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "step-1")


def serves(llm: ManagedVLLM) -> bool:
    return bool(llm.generate("Hi", max_tokens=2)[0].outputs[0].token_ids)


def commands(llm: ManagedVLLM) -> list[str]:
    """What the server was asked to do with its engine, in order."""
    lines = [line.split(" ", 1) for line in whole_log(llm).splitlines()]
    return [words[-1].partition("?")[0] for words in lines if words[0] in ("CONTROL", "RELOAD")]


# -- good ones ---------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_checkpoint_and_everybody_sees_it(home: Path, good: Path) -> None:
    with server() as llm, server() as other:
        found = llm.engine.update_weights(good)
        assert (found.path, found.version) == (str(good), "step-1")
        assert found.checksum
        assert other.engine.weights() == found
        assert other.status().engine.weight_version == "step-1"
        assert serves(other)


def test_nothing_is_generated_between_the_load_and_the_look_at_it(home: Path, good: Path) -> None:
    with server() as llm:
        llm.engine.update_weights(good, version="v2", on_update="continue")
        done = commands(llm)
        between = done[done.index("/pause") : done.index("/resume") + 1]
        assert between == [
            *("/pause", "/collective_rpc", str(good), "/collective_rpc", "/weight_checker"),
            *("/reset_prefix_cache", "/update_weight_version", "/resume"),
        ]


def test_asyncio_has_it_too(home: Path, good: Path) -> None:
    async def update() -> str:
        async with server() as llm:
            return (await llm.async_engine.update_weights(str(good), version="v7")).version

    assert asyncio.run(update()) == "v7"


def test_a_pause_of_the_users_outlasts_an_update(home: Path, good: Path) -> None:
    with server() as llm:
        with llm.engine.paused():
            with pytest.raises(EngineControlError, match="on_update='continue'"):
                llm.engine.update_weights(good)
            llm.engine.update_weights(good, on_update="continue")
            assert llm.engine.is_paused()
        assert serves(llm)


def test_the_checksum_that_is_expected(home: Path, good: Path, tmp_path: Path) -> None:
    with server() as llm:
        checksum = llm.engine.update_weights(good).checksum
        llm.engine.update_weights(checkpoint(tmp_path / "step-2"))
        assert llm.engine.update_weights(good, expect=checksum).checksum == checksum
        with pytest.raises(CheckpointError, match="expected is no-such"):
            llm.engine.update_weights(tmp_path / "step-2", expect="no-such")
        assert llm.engine.weights().checksum == checksum


# -- remembered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", ["server_pid", "supervisor_pid"])
def test_they_are_there_again_after_a_crash(home: Path, good: Path, killed: str) -> None:
    with server() as llm:
        before = llm.engine.update_weights(good)
        epoch = llm.status().epoch
        os.kill(getattr(llm.status(), killed), signal.SIGKILL)
        eventually(lambda: llm.wait_ready(HANG_S).epoch > epoch, "started again")
        assert llm.engine.weights() == before


def test_files_that_were_changed_since_are_noticed_before_it_serves(home: Path, good: Path) -> None:
    with server() as llm:
        llm.engine.update_weights(good)
        edit_json(good / "standin.json", broken=["model.norm.weight"])
        sigkill(llm.status().server_pid)
        with pytest.raises(BrokenModelError, match=r"weights that can't be served: model\.norm\.weight is not finite"):
            eventually(lambda: llm.wait_ready(HANG_S) is None, "it has failed")


# -- bad ones ----------------------------------------------------------------------------------------------------------


def test_a_bad_checkpoint_is_not_even_tried(home: Path, good: Path, tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "bad")
    (bad / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:500_000])
    edit_json(bad / "config.json", vocab_size=1)
    with server() as llm:
        before = llm.engine.update_weights(good)
        with pytest.raises(CheckpointError) as caught:
            llm.engine.update_weights(bad)
        assert "500,000 bytes" in caught.value.faults[0].text
        assert caught.value.path == str(bad)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert str(bad) not in commands(llm)
        assert llm.engine.weights() == before
        assert serves(llm)


def test_nobody_waits_for_a_checkpoint_to_be_looked_at(home: Path, good: Path) -> None:
    with server() as llm, server() as other:
        client = other.engine.weight_sync_client()
        client.start_weight_update()
        with pytest.raises(CheckpointError):  # though it is not our turn
            llm.engine.update_weights(good / "missing")
        client.abort_weight_update()


@pytest.mark.parametrize(
    ("acts", "said"),
    [
        ({"broken": ["model.norm.weight"]}, "model.norm.weight is not finite"),
        ({"ignored": True}, "weights from before all the same"),
    ],
)
def test_what_is_seen_after_the_load_is_taken_back(
    home: Path, good: Path, tmp_path: Path, acts: dict[str, Any], said: str
) -> None:
    bad = checkpoint(tmp_path / "bad", **acts)
    rest = bytearray((bad / "model.safetensors").read_bytes())
    rest[-2:] = b"\x01\x3c"
    (bad / "model.safetensors").write_bytes(rest)
    with server() as llm:
        before = llm.engine.update_weights(good)
        with pytest.raises(CheckpointError, match=said):
            llm.engine.update_weights(bad)
        done = commands(llm)
        assert done[done.index(str(bad)) :].count(str(good)) == 1
        assert done[-1] == "/resume"
        assert llm.engine.weights() == before
        assert serves(llm)
        assert llm.status().epoch == 1


def test_a_poisoned_server_is_started_again_with_the_weights_from_before(
    home: Path, good: Path, tmp_path: Path
) -> None:
    with server() as llm:
        before = llm.engine.update_weights(good)
        with pytest.raises(CheckpointError, match=r"vLLM can't load it: .*must match the size"):
            llm.engine.update_weights(checkpoint(tmp_path / "bad", poisons=True))
        assert serves(llm)
        assert llm.engine.weights() == before
        assert llm.status().epoch == 2
        assert llm.status().state is ServerState.READY


def test_where_the_first_weights_cant_be_loaded_again_it_is_started_again(home: Path, tmp_path: Path) -> None:
    with server() as llm:  # its model is no folder
        with pytest.raises(CheckpointError, match="is not finite"):
            llm.engine.update_weights(checkpoint(tmp_path / "bad", broken=["x"]))
        assert serves(llm)
        assert llm.status().epoch == 2
        assert llm.engine.weights().path is None


def test_a_load_that_hangs_ends_in_time_and_with_another_server(home: Path, good: Path, tmp_path: Path) -> None:
    with server() as llm:
        before = llm.engine.update_weights(good)
        with pytest.raises(EngineTimeoutError):
            llm.engine.update_weights(checkpoint(tmp_path / "slow", hangs=True), timeout=2)
        assert serves(llm)
        assert llm.engine.weights() == before


def test_a_server_that_is_killed_while_it_loads_comes_back_as_it_was(home: Path, good: Path, tmp_path: Path) -> None:
    slow = checkpoint(tmp_path / "slow", hangs=True)

    async def kill(llm: ManagedVLLM) -> None:
        updating = asyncio.create_task(llm.async_engine.update_weights(slow))
        await asyncio.to_thread(eventually, lambda: str(slow) in commands(llm), "it loads")
        sigkill(llm.status().server_pid)
        with pytest.raises(EngineControlError):
            await updating

    with server() as llm:
        before = llm.engine.update_weights(good)
        asyncio.run(kill(llm))
        assert llm.engine.weights() == before
        assert serves(llm)


def test_a_pause_that_never_comes_leaves_the_server_as_it_was(home: Path, good: Path) -> None:
    with server(control={"hangs": "/pause"}) as llm:
        with pytest.raises(EngineTimeoutError):
            llm.engine.update_weights(good, timeout=1)
        assert str(good) not in commands(llm)
        assert serves(llm)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_servers_that_cant(home: Path, good: Path) -> None:
    with server(control={"canary": False}) as llm:
        with pytest.raises(EngineUnsupportedError, match=r"managed_vllm_canary\.Canary"):
            llm.engine.update_weights(good)
        llm.engine.sleep(1)
        with pytest.raises(EngineControlError, match="asleep"):
            llm.engine.update_weights(good)
        llm.engine.wake()


def test_wrong_arguments(home: Path, good: Path) -> None:
    with server() as llm:
        for wrong in ({"on_update": "later"}, {"version": ""}, {"expect": 5}):
            with pytest.raises(ConfigError) as caught:
                llm.engine.update_weights(good, **wrong)
            assert caught.value.field in wrong
