"""A server that runs, but does nothing: found and restarted; one that is only slow: never.

Limits that a busy machine could reach are tried with a clock that the test moves on, in `test_hang_watch`.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import HANG_S, INSTANT, eventually, is_live, tree

from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy, ServerStatus
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
from managed_vllm.status import Cause, Diagnosis, Stage

PROMPT = "what next?"
EXPECTED = standin.continuation(standin.prompt_ids(PROMPT), 8)

AT_ONCE = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)


def server(hang: HangPolicy, *, wait: bool = True, **order: Any) -> ManagedVLLM:
    return ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(tree=True, **order),
        keep_alive=INSTANT,
        hang=hang,
        restart=AT_ONCE,
        wait=wait,
    )


def ask(llm: ManagedVLLM, **fields: Any) -> Any:
    output = llm.generate(PROMPT, {"max_tokens": 8}, timeout=60, **fields)[0]
    assert list(output.outputs[0].token_ids) == EXPECTED
    return output


def after_the_hang(llm: ManagedVLLM) -> Diagnosis:
    """Waits for the next life of the server; returns why the first one was ended."""
    assert llm.wait_ready(60, after_epoch=1).epoch == 2
    events = Instance(directory.state_home(), str(llm.id)).events_path.read_text().splitlines()
    return next(Diagnosis.from_dict(event["diagnosis"]) for event in map(json.loads, events) if "diagnosis" in event)


@pytest.mark.parametrize("victim", ["APIServer", "EngineCore", "Worker"])
def test_a_process_that_stays_stopped_is_found(home: Path, victim: str) -> None:
    with server(HangPolicy(stopped_s=0.5)) as llm:
        processes = tree(llm)
        processes[victim].suspend()
        reason = after_the_hang(llm)
        assert reason.cause is Cause.PROCESS_STOPPED
        assert str(processes[victim].pid) in reason.summary
        assert ask(llm).epoch == 2
        assert not any(is_live(process) for process in processes.values())


def test_a_dead_worker_is_known_by_its_own_end_though_the_engine_above_it_is_frozen(home: Path) -> None:
    with server(HangPolicy.never()) as llm:
        processes = tree(llm)
        processes["EngineCore"].suspend()
        processes["Worker"].kill()  # nobody reaps it: it stays a zombie
        assert after_the_hang(llm).cause is Cause.WORKER_DIED
        assert ask(llm).epoch == 2


@pytest.mark.parametrize(
    ("fault", "cause", "stuck_in"),
    [
        ("hang-engine", Cause.ENGINE_HUNG, "_sleep_for_ever"),
        ("hang-worker", Cause.ENGINE_HUNG, "_sleep_for_ever"),
        ("hang-api", Cause.API_SERVER_HUNG, "_gate"),
    ],
)
def test_a_hang_under_a_request_is_found_and_the_request_is_answered(
    home: Path, tmp_path: Path, fault: str, cause: Cause, stuck_in: str
) -> None:
    # Where the machine holds the server up for seconds, that is a hang as well, of another life.
    with server(HangPolicy(stall_s=1.0, answer_s=3.0), faults=str(tmp_path)) as llm:
        (tmp_path / f"1-{fault}").touch()
        output = ask(llm)
        assert output.epoch > 1
        assert output.attempts > 1
        events = [line for line in next(home.glob("*/events.jsonl")).read_text().splitlines() if '"diagnosis"' in line]
        assert any(f'"{cause}"' in event for event in events), events
        # Where it was stuck is kept.
        assert any(stuck_in in path.read_text() for path in (home / "failed").glob("*.stacks"))


def test_stacks_come_from_within_where_py_spy_is_missing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from managed_vllm.server import stacks

    with server(HangPolicy.never(), faults=str(tmp_path)) as llm:
        # It is looked for beside the interpreter and on the path.
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        monkeypatch.setenv("PATH", "/nowhere")
        (tmp_path / "1-hang-worker").touch()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asking = pool.submit(ask, llm)
            worker = tree(llm)["Worker"]

            def are_kept() -> bool:
                """The fault is met some time after it was ordered."""
                assert f"pid {worker.pid}" in stacks.dump([worker], reason="a test")
                return "_sleep_for_ever" in llm.logs(500)

            eventually(are_kept, "the worker's stacks are in the log")
            os.kill(worker.pid, signal.SIGKILL)
            assert asking.result().epoch == 2


def test_a_slow_step_is_no_hang_while_the_token_asked_for_may_still_come(home: Path) -> None:
    with server(HangPolicy(stall_s=0.3, answer_s=30), token_s=1.5) as llm:
        output = llm.generate(PROMPT, {"max_tokens": 3}, timeout=60)[0]
        assert (output.epoch, output.attempts) == (1, 1)
        assert llm.status().epoch == 1


def test_an_idle_server_is_left_alone(home: Path) -> None:
    with server(HangPolicy(stall_s=0.2, answer_s=30)) as llm:
        before = _generated(llm)
        eventually(lambda: _generated(llm) >= before + 3, "it was asked for a token, and again, and again")
        assert llm.status().epoch == 1


def test_a_server_that_listens_no_more_is_restarted(home: Path, tmp_path: Path) -> None:
    with server(HangPolicy(stopped_s=0.5), lose_port=str(tmp_path / "loses")) as llm:
        (tmp_path / "loses").touch()
        reason = after_the_hang(llm)
        assert reason.cause is Cause.API_SERVER_HUNG
        assert "nothing listens" in reason.summary


def test_a_stopped_process_during_the_start_is_found(home: Path) -> None:
    llm = server(HangPolicy(stopped_s=0.5), start_s=60, wait=False)
    with llm:
        pid = eventually(lambda: llm.status().server_pid, "launched")
        psutil.Process(pid).suspend()
        _stopped_and_started_again(llm)


def test_a_process_stopped_under_the_first_request_is_found(home: Path) -> None:
    llm = server(HangPolicy(stopped_s=0.5), token_s=3600, wait=False)
    with llm:
        eventually(lambda: llm.status().stage == Stage.WARMING_UP, "it is asked for its first token")
        psutil.Process(llm.status().server_pid).suspend()
        _stopped_and_started_again(llm)


def _stopped_and_started_again(llm: ManagedVLLM) -> None:
    def again() -> ServerStatus | None:
        status = llm.status()
        return status if status.epoch == 2 else None

    diagnosis = eventually(again, "started again").diagnosis
    assert diagnosis is not None
    assert diagnosis.cause is Cause.PROCESS_STOPPED


def _generated(llm: ManagedVLLM) -> float:
    import requests

    answer = requests.get(
        llm.base_url.removesuffix("/v1") + "/metrics",
        headers={"Authorization": f"Bearer {llm.api_key}"},
        timeout=HANG_S,
    )
    return next(float(line.split()[-1]) for line in answer.text.splitlines() if "generation_tokens_total{" in line)
