"""The real vLLM, frozen or saturated: the one is found within the set limit and restarted, the other is left alone."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import HANG_S, eventually, is_live, own_state, tree

from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy, ServerState, ServerStatus, demo
from managed_vllm.status import Cause

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

STALL_S, ANSWER_S = 5.0, 10.0


@pytest.fixture(scope="module")
def heard() -> list[tuple[float, ServerStatus]]:
    """Each change of the server's state, with its moment."""
    return []


@pytest.fixture(scope="module")
def llm(heard: list[tuple[float, ServerStatus]]) -> Iterator[ManagedVLLM]:
    """A server with tight limits. Stopped processes are not looked for: only their silence gives them away."""
    with own_state():
        with ManagedVLLM(
            "demo",
            keep_alive=0,
            hang=HangPolicy(stall_s=STALL_S, answer_s=ANSWER_S, stopped_s=math.inf),
            restart=RestartPolicy(max_restarts=20, backoff_initial_s=0.1),
            on_status=lambda status: heard.append((time.monotonic(), status)),
        ) as handle:
            yield handle


@pytest.mark.parametrize("seconds", [1.5 * (STALL_S + ANSWER_S), pytest.param(60.0, marks=pytest.mark.soak)])
def test_a_server_saturated_with_long_prompts_is_not_restarted(llm: ManagedVLLM, seconds: float) -> None:
    rng, epoch = random.Random(5), llm.status().epoch
    length = 3000  # of the 4,096 that the model takes
    until = time.monotonic() + seconds
    answered: list[int] = []

    def saturate(number: int) -> None:
        while time.monotonic() < until:
            # Random ids: no two prompts share a prefix that could be cached.
            prompts = [[rng.randrange(10, 400) for _ in range(length - 40)] for _ in range(32)]
            answered.extend(output.attempts for output in llm.generate(prompts, {"max_tokens": 16, "ignore_eos": True}))

    users = [threading.Thread(target=saturate, args=[number], daemon=True) for number in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join(seconds + 300)
    assert not any(user.is_alive() for user in users)
    print(f"saturated | {len(answered)} requests of {length - 40} + 16 tokens")
    assert set(answered) == {1}
    assert llm.status().epoch == epoch


def test_a_server_that_stands_still_for_seconds_drops_no_request_on_an_idle_connection(llm: ManagedVLLM) -> None:
    params = {"max_tokens": 2}
    epoch, server = llm.status().epoch, tree(llm)["APIServer"]
    supervisor = psutil.Process(llm.status().supervisor_pid)
    llm.generate("a", params)  # its connection stays, and the server's limit for idle ones runs
    outputs: list[int] = []
    asking = threading.Thread(target=lambda: outputs.extend(o.attempts for o in llm.generate(["b", "c"], params)))
    supervisor.suspend()  # it would find the server hung after 15 s
    server.suspend()
    try:
        asking.start()
        time.sleep(6)  # longer than uvicorn's own limit of 5 s
    finally:
        server.resume()
        asking.join(HANG_S)
        supervisor.resume()
    assert outputs == [1, 1]
    assert llm.status().epoch == epoch


@pytest.mark.parametrize("victim", ["EngineCore", pytest.param("Worker", marks=pytest.mark.soak), "APIServer"])
def test_a_frozen_process_is_found_within_the_limit_and_no_request_is_lost(
    llm: ManagedVLLM, heard: list[tuple[float, ServerStatus]], victim: str
) -> None:
    prompts = [demo.random_screen(random.Random(number)).prompt() for number in range(8)]
    params = {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    epoch, processes = llm.status().epoch, tree(llm)
    answers: list[list[list[int]]] = []
    asking = threading.Thread(
        target=lambda: answers.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)]),
        daemon=True,
    )
    asking.start()
    processes[victim].suspend()
    stopped_at = time.monotonic()

    def found() -> list[tuple[float, ServerStatus]]:
        return [(at, s) for at, s in heard if s.state is ServerState.RESTARTING and at > stopped_at]

    at, status = eventually(found, "the hang was found", 120)[0]
    print(f"frozen | {victim} | found after {at - stopped_at:.1f} s (limit {STALL_S + ANSWER_S:g} s)")
    assert at - stopped_at < STALL_S + ANSWER_S + HANG_S  # what is beyond the limit, a busy machine adds
    assert status.diagnosis is not None
    assert status.diagnosis.cause is (Cause.API_SERVER_HUNG if victim == "APIServer" else Cause.ENGINE_HUNG)
    # They are taken once nobody enters any more: the first status comes before them.
    told = eventually(lambda: [s for _, s in found() if s.diagnosis and "stacks" in s.diagnosis.facts], "stacks", 120)
    stacks = Path(str(told[0].diagnosis.facts["stacks"])).read_text()
    assert all(f"pid {process.pid} " in stacks for process in processes.values())
    asking.join(300)
    assert answers == [expected]
    print(f"frozen | {victim} | all answered after {time.monotonic() - stopped_at:.1f} s")
    # Its stacks are had by letting it go on for a moment, in which it may answer: before it is killed, that is.
    eventually(lambda: llm.status().epoch > epoch, "it was restarted", 120)
    assert not any(is_live(process) for process in processes.values())
