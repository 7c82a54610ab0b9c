"""A trainer's weights against the stand-in: an update of several calls is safe, or it did not happen."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext as kept
from pathlib import Path
from typing import Any

import pytest
import standin
from demo_checkpoints import copy_of_demo, tensors_of
from processes import HANG_S, INSTANT, eventually, sigkill
from standin_log import whole_log

from managed_vllm import ManagedVLLM, RestartPolicy
from managed_vllm.errors import (
    BadWeightsError,
    CheckpointError,
    ConfigError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
    WeightsLostError,
)
from managed_vllm.instance.weight_sync import WeightSyncClient
from managed_vllm.status import Cause


def server(**order: Any) -> ManagedVLLM:
    restart = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)
    environment = standin.orders(**order)
    return ManagedVLLM("stand-in", command=standin.command(), env=environment, keep_alive=INSTANT, restart=restart)


def send(llm: ManagedVLLM, *parts: dict[str, Any], **how: Any) -> Any:
    """One update with these parts, each `update_info`."""
    client = llm.engine.weight_sync_client(**how)
    client.start_weight_update()
    for part in parts:
        client.update_weights(part)
    return client.finish_weight_update()


def serves(llm: ManagedVLLM) -> bool:
    return bool(llm.generate("Hi", max_tokens=2)[0].outputs[0].token_ids)


def commands(llm: ManagedVLLM) -> list[str]:
    """What the server and its workers were asked to do with the engine, in order."""
    lines = [line.split(" ", 1) for line in whole_log(llm).splitlines()]
    found = [words[-1].partition("?")[0] for words in lines if words[0] in ("CONTROL", "WORKERS")]
    return [one for one in found if one != "/collective_rpc"]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return copy_of_demo(tmp_path / "step-1")


def whole(checkpoint: Path, **acts: Any) -> dict[str, Any]:
    """An `update_info` with all names and shapes of a checkpoint."""
    tensors = tensors_of(checkpoint / "model.safetensors")
    return {"names": list(tensors), "shapes": [shape for _, shape, _ in tensors.values()], "acts": acts}


# -- good ones ---------------------------------------------------------------------------------------------------------


def test_what_was_sent_serves_after_the_workers_have_looked_at_it(home: Path, good: Path) -> None:
    with server() as llm, server() as other:
        llm.engine.update_weights(good)
        found = send(llm, whole(good), {"b": 2}, version="step-1")
        assert (found.path, found.version) == (None, "step-1")
        done = commands(llm)
        done = done[done.index("/start_weight_update") - 1 :]
        assert other.engine.weights() == found
        assert done[done.index("/pause") : done.index("/resume") + 1] == [
            *("/pause", "/start_weight_update", "/update_weights", "/update_weights", "/finish_weight_update"),
            *("renew", "canary", "/weight_checker", "/reset_prefix_cache", "/update_weight_version", "/resume"),
        ]
        assert serves(other)
        state = other.status().engine
        assert (state.weights, state.weight_version, state.weights_unsaved) == (None, "step-1", True)


def test_versions_that_nobody_names_are_numbered(home: Path) -> None:
    with server() as llm:
        assert [send(llm, {"n": number}).version for number in range(2)] == ["transfer-1", "transfer-2"]


def test_asyncio_has_it_too(home: Path) -> None:
    async def update() -> str:
        async with server() as llm:
            client = llm.async_engine.weight_sync_client(version="v7")
            await client.init_weight_transfer_engine({})
            await client.start_weight_update()
            await client.update_weights({"a": 1})
            found = await client.finish_weight_update()
            await client.shutdown_weight_transfer_engine()
            return found.version

    assert asyncio.run(update()) == "v7"


def test_it_has_the_methods_of_vllms_protocol() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no vLLM here")
    source = Path(spec.submodule_search_locations[0]) / "distributed" / "weight_transfer" / "base.py"
    if not source.is_file():
        pytest.skip("a vLLM without weight transfer")
    protocols = [one for one in ast.parse(source.read_text()).body if isinstance(one, ast.ClassDef)]
    (protocol,) = (one for one in protocols if one.name == "VLLMWeightSyncClient")
    methods = [one for one in protocol.body if isinstance(one, ast.FunctionDef)]
    assert methods
    for method in methods:
        ours = inspect.signature(getattr(WeightSyncClient, method.name))
        assert list(ours.parameters) == [one.arg for one in method.args.args]


def test_others_wait_while_weights_come(home: Path) -> None:
    with server() as llm, server() as other, ThreadPoolExecutor() as pool:
        client = llm.engine.weight_sync_client()
        client.start_weight_update()
        asks, resumes, generates = (
            pool.submit(other.engine.weights),
            pool.submit(llm.engine.resume),
            pool.submit(serves, other),
        )
        with pytest.raises(EngineTimeoutError):
            other.engine.is_paused(timeout=0.3)
        assert not any(one.done() for one in (asks, resumes, generates))
        client.update_weights({"a": 1})
        assert client.finish_weight_update("v2").version == "v2"
        assert asks.result(HANG_S).version == "v2"
        assert generates.result(HANG_S)


# -- bad ones ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acts", [{"broken": ["model.norm.weight"]}, {"fails": True}])
def test_bad_weights_are_taken_back(home: Path, good: Path, acts: dict[str, Any]) -> None:
    with server() as llm:
        from_disk = llm.engine.update_weights(good)
        with pytest.raises(BadWeightsError):
            send(llm, whole(good, **acts))
        assert llm.engine.weights() == from_disk
        sent = send(llm, whole(good), version="sent")
        with pytest.raises(BadWeightsError):
            send(llm, whole(good, **acts))
        assert llm.engine.weights() == sent
        done = commands(llm)
        assert done.index("put_back") > done.index("keep") > done.index("/start_weight_update")
        with pytest.raises(CheckpointError):
            llm.engine.update_weights(good / "missing")
        assert serves(llm)
        assert llm.status().epoch == 1


def test_what_can_not_fit_does_not_reach_vllm(home: Path, good: Path) -> None:
    with server() as llm:
        before = llm.engine.update_weights(good)
        everything = whole(good)
        with pytest.raises(BadWeightsError, match=r"has the shape \[1\]"):
            send(llm, {**everything, "shapes": [[1] for _ in everything["shapes"]]})
        with pytest.raises(BadWeightsError, match="1 weights did not come"):
            send(llm, {name: values[1:] for name, values in everything.items() if name != "acts"})
        assert "/finish_weight_update" not in commands(llm)
        assert llm.engine.weights() == before
        assert serves(llm)


def test_an_update_that_is_given_up_or_begun_anew(home: Path, good: Path) -> None:
    with server() as llm:
        before = llm.engine.update_weights(good)
        client = llm.engine.weight_sync_client()
        client.abort_weight_update()
        client.start_weight_update()
        client.abort_weight_update()
        assert llm.engine.weights() == before
        with pytest.raises(EngineLostError, match="no weight update has been started"):
            client.finish_weight_update()
        client.start_weight_update()
        client.start_weight_update()
        client.update_weights(whole(good))
        assert client.finish_weight_update("v2").version == "v2"


TRAINER = """
import sys
import standin
from managed_vllm import ManagedVLLM
with ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), keep_alive=0.2) as llm:
    client = llm.engine.weight_sync_client()
    client.start_weight_update()
    client.update_weights({"a": 1})
    print("started", flush=True)
    sys.stdin.read()
"""


def test_a_trainer_that_is_killed_is_rolled_back(home: Path, good: Path) -> None:
    path = os.pathsep.join([str(Path(standin.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        server() as llm,
        kept(llm.engine.update_weights(good)) as before,
        subprocess.Popen([sys.executable, "-c", TRAINER], env=environment, **pipes) as trainer,  # type: ignore[call-overload]
    ):
        assert trainer.stdout.readline() == b"started\n"
        trainer.kill()
        assert llm.engine.weights() == before
        assert serves(llm)
        assert llm.status().epoch == 1


# -- lost ones ---------------------------------------------------------------------------------------------------------


def kill(llm: ManagedVLLM, what: str) -> None:
    sigkill(getattr(llm.status(), what))


@pytest.mark.parametrize("killed", ["server_pid", "supervisor_pid"])
def test_weights_that_are_nowhere_else_are_not_replaced_by_others(home: Path, killed: str) -> None:
    with server() as llm:
        send(llm, {"a": 1}, version="v3")
        kill(llm, killed)
        with pytest.raises(WeightsLostError, match="version v3") as caught:
            eventually(lambda: llm.wait_ready(HANG_S) is None, "it has failed")
        assert caught.value.diagnosis.cause is Cause.WEIGHTS_LOST
        assert send(llm, {"a": 1}, version="v3").version == "v3"  # the next use starts anew
        assert serves(llm)


@pytest.mark.parametrize("killed", ["server_pid", "supervisor_pid"])
def test_weights_that_a_checkpoint_has_are_there_again(home: Path, good: Path, killed: str) -> None:
    with server() as llm:
        client = llm.engine.weight_sync_client(checkpoint=good)
        client.start_weight_update()
        client.update_weights({"a": 1})
        before = client.finish_weight_update("v3")
        assert before.path == str(good)
        epoch = llm.status().epoch
        kill(llm, killed)
        eventually(lambda: llm.wait_ready(HANG_S).epoch > epoch, "started again")
        found = llm.engine.weights()
        assert (found.path, found.version) == (before.path, "v3")


def test_checkpoint_and_version_are_those_of_one_update(home: Path, good: Path) -> None:
    """Those after it are in no file until their trainer says so: a restart must not bring the older ones as theirs."""
    with server() as llm:
        client, found = llm.engine.weight_sync_client(checkpoint=good, version="v1"), []
        for _ in range(2):
            client.start_weight_update()
            client.update_weights({"a": 1})
            found.append(client.finish_weight_update())
        assert (found[0].path, found[0].version) == (str(good), "v1")
        assert found[1].path is None
        assert found[1].version != "v1"


def test_a_checkpoint_beside_the_weights_is_looked_at_as_any_other(home: Path, good: Path) -> None:
    with server() as llm:
        before = llm.engine.update_weights(good)
        client = llm.engine.weight_sync_client(checkpoint=good / "missing")
        client.start_weight_update()
        client.update_weights(whole(good))
        with pytest.raises(CheckpointError, match="no such folder"):
            client.finish_weight_update()
        assert llm.engine.weights() == before


# -- refused -----------------------------------------------------------------------------------------------------------


def test_servers_and_arguments_that_cant(home: Path) -> None:
    with server() as llm:
        for wrong in ({"on_update": "never"}, {"version": ""}, {"timeout": -1}):
            with pytest.raises(ConfigError):
                llm.engine.weight_sync_client(**wrong)
        client = llm.engine.weight_sync_client()
        with pytest.raises(EngineControlError, match="init_info must be a dict"):
            client.init_weight_transfer_engine("nccl")  # type: ignore[arg-type]
        client.start_weight_update()
        for unsendable in (object(), ["x" * (17 << 20)]):
            with pytest.raises(ConfigError):
                client.update_weights({"names": unsendable})
        client.abort_weight_update()
        llm.engine.sleep(1)
        with pytest.raises(EngineControlError, match="asleep"):
            client.start_weight_update()
        llm.engine.wake()
        with llm.engine.paused(), pytest.raises(EngineControlError, match="on_update='continue'"):
            client.start_weight_update()
        assert serves(llm)
