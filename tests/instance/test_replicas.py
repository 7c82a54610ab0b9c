"""A handle with `replicas=`: requests by our client and the SDK while replicas die, and what is asked of all."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import standin
from processes import HANG_S, INSTANT, eventually, sigkill

from managed_vllm import ManagedVLLM, RestartPolicy, RetryPolicy, ServerState, ServerStatus
from managed_vllm.errors import DeadlyRequestError, StartupError

PATIENT = RetryPolicy(max_deaths=9)
LASTING = RestartPolicy(max_restarts=99, backoff_initial_s=0.01)


def handle(count: int = 2, *, orders: dict[str, Any] | None = None, **arguments: Any) -> ManagedVLLM:
    env = standin.orders(**(orders or {}))
    return ManagedVLLM("stand-in", command=standin.command(), env=env, replicas=count, progress=False, **arguments)


@pytest.fixture
def llm(home: Path) -> Iterator[ManagedVLLM]:
    with handle(keep_alive=INSTANT, name="pair") as entered:
        yield entered


def pids_of(llm: ManagedVLLM) -> list[int]:
    return [one.server_pid or 0 for one in llm.status().replicas]


def all_ready(llm: ManagedVLLM, *, after: int = 0) -> ServerStatus | None:
    """The status once every replica serves, in a life later than `after`; None before."""
    status = llm.status()
    return status if all(one.state is ServerState.READY and one.epoch > after for one in status.replicas) else None


def answered_by(llm: ManagedVLLM, **fields: Any) -> int:
    return int(llm.generate("hi", **fields)[0].outputs[0].text.rpartition(" from ")[2])


def answered_by_sdk(llm: ManagedVLLM, **options: Any) -> int:
    text: str = llm.openai.completions.create(model=llm.model, prompt="hi", **options).choices[0].text
    return int(text.rpartition(" from ")[2])


def is_right(prompt: str, ids: Sequence[int]) -> bool:
    return list(ids) == standin.continuation(standin.prompt_ids(prompt), len(ids))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_no_request_is_lost_while_replicas_are_killed(home: Path) -> None:
    """500 requests by eight threads, half of them the OpenAI SDK's; three kills, of each replica at least one."""
    answered = threading.Semaphore(0)

    def is_answered(llm: ManagedVLLM, number: int) -> bool:
        prompt = f"prompt {number}"
        if number % 2:
            more = {"return_token_ids": True}
            made: Any = llm.openai.completions.create(model=llm.model, prompt=prompt, max_tokens=24, extra_body=more)
            ids = made.choices[0].token_ids
        else:
            ids = llm.generate(prompt, {"max_tokens": 24}, session_id=prompt[-2:])[0].outputs[0].token_ids
        answered.release()
        return len(ids) == 24 and is_right(prompt, ids)

    def kill(llm: ManagedVLLM) -> None:
        for victim in (0, 1, 0):
            for _ in range(100):
                answered.acquire(timeout=HANG_S)
            status = eventually(lambda: all_ready(llm), "both serve")
            sigkill(status.replicas[victim].server_pid)

    with handle(keep_alive=INSTANT, retry=PATIENT, restart=LASTING) as llm, ThreadPoolExecutor(8) as threads:
        killer = threading.Thread(target=kill, args=(llm,))
        killer.start()
        assert all(threads.map(functools.partial(is_answered, llm), range(500)))
        killer.join(HANG_S)
        after = eventually(lambda: llm.status().epoch == 5 and all_ready(llm), "both are back")
        expected = {one.server_pid for one in after.replicas}
        seen: set[int] = set()

        def both_serve() -> bool:
            seen.add(answered_by(llm))
            return seen >= expected

        eventually(both_serve, "both are in use")


def test_a_request_that_kills_is_stopped_before_it_has_killed_all(home: Path) -> None:
    with handle(3, orders={"poison": "poison"}, keep_alive=INSTANT) as llm:
        with pytest.raises(DeadlyRequestError) as raised:
            llm.generate("poison", {"max_tokens": 8})
        assert len(set(raised.value.epochs)) == 2
        assert set(raised.value.epochs) < {1, 2, 3}
        with pytest.raises(DeadlyRequestError):  # it is known by now, and not sent
            llm.generate("poison", {"max_tokens": 8})
        after = eventually(lambda: (now := all_ready(llm)) and now.restarts > 1 and now, "all are back")
        assert sorted(one.restarts for one in after.replicas) == [0, 1, 1]
        assert is_right("harmless", llm.generate("harmless", {"max_tokens": 8})[0].outputs[0].token_ids)


def test_requests_of_either_client_take_turns_and_sessions_stay(llm: ManagedVLLM) -> None:
    pids = pids_of(llm)
    assert Counter(answered_by(llm) for _ in range(8)) == dict.fromkeys(pids, 4)
    assert Counter(answered_by_sdk(llm) for _ in range(8)) == dict.fromkeys(pids, 4)
    for session in "abcd":
        assert len({answered_by(llm, session_id=session) for _ in range(5)}) == 1
        assert len({answered_by_sdk(llm, extra_headers={"X-Session-ID": session}) for _ in range(3)}) == 1


def test_every_way_to_the_handle_leads_to_all_of_them(llm: ManagedVLLM) -> None:
    """By name, by pickle, by the environment of a child process, and in a forked child."""
    pids = set(pids_of(llm))
    with ManagedVLLM(name="pair", keep_alive=INSTANT) as by_name:
        assert {answered_by(by_name) for _ in range(4)} == pids
    with pickle.loads(pickle.dumps(llm)) as pickled:
        assert {answered_by(pickled) for _ in range(4)} == pids
    script = "import managed_vllm; llm = managed_vllm.ManagedVLLM(); print(llm.generate(['hi'] * 4))"
    environment = {**os.environ, **llm.environ(), "MANAGED_VLLM_KEEP_ALIVE": "0"}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert all(str(pid) in child.stdout for pid in pids)
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    forked = context.Process(target=lambda: writer.send({answered_by(llm) for _ in range(4)}))
    forked.start()
    assert reader.poll(HANG_S)
    assert reader.recv() == pids
    forked.join(HANG_S)


def test_after_a_killed_supervisor_requests_go_on_with_the_next_ones_replicas(home: Path) -> None:
    with handle(keep_alive=INSTANT, retry=PATIENT) as llm:
        before = set(pids_of(llm))
        assert answered_by(llm) in before
        sigkill(llm.status().supervisor_pid)
        output = llm.generate("on it goes", {"max_tokens": 24})[0]
        assert is_right("on it goes", output.outputs[0].token_ids)
        after = {one.server_pid for one in eventually(lambda: all_ready(llm), "both are back").replicas}
        assert {answered_by(llm) for _ in range(4)} == after
        assert not after & before


# -- all of them -------------------------------------------------------------------------------------------------------


def test_a_restart_returns_when_each_is_another(llm: ManagedVLLM) -> None:
    before = llm.status()
    after = llm.restart()
    assert all_ready(llm, after=before.epoch)
    assert [one.state for one in after.replicas] == [ServerState.READY] * 2
    assert not {one.server_pid for one in after.replicas} & {one.server_pid for one in before.replicas}


def test_a_restart_says_what_kept_one_of_them_down(home: Path, tmp_path: Path) -> None:
    once = {"once": str(tmp_path / "once")}  # there after the first start: vLLM refuses its command line from then on
    with pytest.raises(StartupError), handle(orders=once, keep_alive=INSTANT) as llm:
        llm.restart()


def test_logs_caches_and_metrics_are_those_of_each(llm: ManagedVLLM) -> None:
    eventually(lambda: {line[:3] for line in llm.logs(1000).splitlines()} >= {"[0]", "[1]"}, "each has said something")
    lines = llm.logs(1000).splitlines()
    assert {line[:3] for line in lines} == {"[0]", "[1]"}
    assert llm.reset_prefix_cache() is True
    assert all("[0]" in line or "[1]" in line for line in lines)
    before = llm.metrics()
    for _ in range(4):
        llm.generate([[1, 2, 3]], max_tokens=20)
    after = llm.metrics()
    assert len(after.replicas) == 2
    assert (after.generation_tokens or 0) - (before.generation_tokens or 0) == 80
    assert after.supervisor is not None
    assert (after.supervisor.leases, after.supervisor.restarts) == (1, {})


def test_a_status_listener_hears_of_each(home: Path) -> None:
    heard: list[tuple[ServerState, ...]] = []
    listen = lambda status: heard.append(tuple(one.state for one in status.replicas))  # noqa: E731
    with handle(keep_alive=INSTANT, on_status=listen) as llm:
        sigkill(pids_of(llm)[1])
        one_down = (ServerState.READY, ServerState.RESTARTING)
        eventually(lambda: one_down in heard and heard[-1] == (ServerState.READY,) * 2, "down, and back")
        assert llm.metrics().supervisor.restarts == {"killed": 1}  # type: ignore[union-attr]
