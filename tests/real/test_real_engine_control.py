"""Engine control on the real vLLM: what users made of it survives every kind of death."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from demo_checkpoints import copy_of_demo, make_adapter, with_rows_swapped
from processes import HANG_S, eventually, own_state, tree

from managed_vllm import ManagedVLLM, RestartPolicy, demo
from managed_vllm.errors import EngineControlError, EngineUnsupportedError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

POLICY = RestartPolicy(max_restarts=20, backoff_initial_s=0.1, backoff_factor=1.0)
PROMPT = demo.random_screen(random.Random(1)).prompt()


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    with own_state(), ManagedVLLM("demo", enable_lora=True, max_lora_rank=8, keep_alive=0, restart=POLICY) as llm:
        yield llm


def answer(llm: ManagedVLLM, model: str) -> list[int]:
    output = llm.generate(PROMPT, {"temperature": 0, "max_tokens": 12, "ignore_eos": True}, model=model)[0]
    return list(output.outputs[0].token_ids)


def kill(llm: ManagedVLLM, victim: str) -> None:
    status = llm.status()
    pid = status.supervisor_pid if victim == "supervisor" else tree(llm)[victim].pid
    os.kill(pid or 0, signal.SIGKILL)
    eventually(lambda: llm.wait_ready(HANG_S).epoch > status.epoch, "started again")


def test_adapters_weights_and_a_pause_survive_the_death_of_any_process(llm: ManagedVLLM, tmp_path: Path) -> None:
    adapters = {name: str(make_adapter(tmp_path / name, seed)) for seed, name in enumerate(("mine", "other"))}
    checkpoint = copy_of_demo(tmp_path / "checkpoint")
    with_rows_swapped(checkpoint, 299, 700)  # the first token of every answer of the base model, and one that is unused
    base = answer(llm, llm.model)
    for name, path in adapters.items():
        llm.engine.load_lora(name, path)
    served = llm.engine.update_weights(checkpoint, version="v9")
    before = {model: answer(llm, model) for model in (llm.model, *adapters)}
    assert len({tuple(ids) for ids in (base, *before.values())}) == 4
    llm.engine.pause()
    for victim in ("EngineCore", "APIServer", "supervisor"):
        kill(llm, victim)
        found = llm.status().engine
        assert (found.paused, found.loras) == ("keep", adapters)
        assert llm.engine.loras() == adapters
        assert llm.engine.weights() == served
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(answer, llm, "mine")
            assert llm.engine.is_paused()
            assert not waiting.done()
            llm.engine.resume()
            assert waiting.result(HANG_S) == before["mine"]
        assert {model: answer(llm, model) for model in before} == before
        llm.engine.pause()
    llm.engine.resume()
    for name in adapters:
        llm.engine.unload_lora(name)
    llm.engine.update_weights(demo.weights_path())
    assert answer(llm, llm.model) == base


def test_what_is_refused_leaves_the_engine_as_it_was(llm: ManagedVLLM, tmp_path: Path) -> None:
    before, state = llm.engine.weights(), llm.status().engine
    assert before.checksum is not None
    with pytest.raises(EngineUnsupportedError, match="enable_sleep_mode=True, which vLLM has on GPUs only"):
        llm.engine.sleep()
    with pytest.raises(EngineControlError, match="No adapter found"):
        llm.engine.load_lora("mine", tmp_path / "none")
    with llm.engine.paused(), llm.engine.asleep(0):
        assert llm.engine.is_paused()
    assert answer(llm, llm.model)
    assert llm.status().engine == state
    assert llm.engine.weights() == before
    assert llm.engine.reset_prefix_cache()
