"""`llm.engine` over two replicas, with their supervisor: what every user sees, and what a killed supervisor leaves."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import standin
from demo_checkpoints import copy_of_demo
from processes import HANG_S, INSTANT, eventually, sigkill

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import ConfigError, EngineControlError


def checkpoint(folder: Path, **acts: object) -> Path:
    copy_of_demo(folder)
    (folder / "standin.json").write_text(json.dumps({"name": folder.name, **acts}))
    return folder


def replicas(model: Path) -> ManagedVLLM:
    quick = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)
    return ManagedVLLM(str(model), command=standin.command(), replicas=2, keep_alive=INSTANT, restart=quick)


def engines(llm: ManagedVLLM) -> list[EngineState]:
    return [one.engine for one in llm.status().replicas]


def test_users_see_one_replica_after_the_other_and_then_one_version(home: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    slow = checkpoint(tmp_path / "step-1", waits_for=str(go))
    with replicas(copy_of_demo(tmp_path / "model")) as llm, ThreadPoolExecutor(1) as thread:
        updating = thread.submit(llm.engine.update_weights, slow, rolling=True)
        eventually(lambda: engines(llm)[0].updating, "the first one is updated")
        assert (engines(llm)[1].updating, llm.status().engine.updating) == (None, None)
        go.touch()
        assert updating.result(HANG_S).version == "step-1"
        assert [one.weight_version for one in (*engines(llm), llm.status().engine)] == ["step-1"] * 3
        with pytest.raises(ConfigError, match="rolling is True or False"):
            llm.engine.update_weights(slow, rolling="yes")  # type: ignore[arg-type]


def test_a_supervisor_that_is_killed_in_an_update_leaves_one_version(home: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "step-1")
    slow = checkpoint(tmp_path / "step-2", waits_for=str(tmp_path / "never"))
    with replicas(copy_of_demo(tmp_path / "model")) as llm, ThreadPoolExecutor(1) as thread:
        before = llm.engine.update_weights(good)
        killed = llm.status()
        updating = thread.submit(llm.engine.update_weights, slow)
        eventually(lambda: engines(llm)[0].updating, "it is updated")
        sigkill(killed.supervisor_pid)
        with pytest.raises(EngineControlError):
            updating.result(HANG_S)
        eventually(lambda: llm.wait_ready(HANG_S).epoch > killed.epoch, "another supervisor")
        eventually(lambda: all(one.state is ServerState.READY for one in llm.status().replicas), "both serve")
        assert [one.weight_version for one in engines(llm)] == ["step-1", "step-1"]
        assert llm.engine.weights() == before
