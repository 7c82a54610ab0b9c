"""Faults under load, on the real vLLM: whatever process is killed, no request is lost and every answer is right.

One server for all of them, each test finds it ready and leaves it ready. What is measured is printed (`pytest -rP`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from processes import HANG_S, engine_on_one_core, eventually, is_live, own_state, tree, tree_below

from managed_vllm import ManagedVLLM, RequestOutput, RestartPolicy, ServerState, demo
from managed_vllm.instance import cleanup, directory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

IN_FLIGHT = 64
PARAMS = {"temperature": 0, "max_tokens": 800, "ignore_eos": True}
POLICY = RestartPolicy(max_restarts=20, backoff_initial_s=0.1, backoff_factor=1.0)
PROMPTS = [demo.random_screen(random.Random(number)).prompt() for number in range(IN_FLIGHT)]

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """The server, and what it answers to `PROMPTS` when nobody disturbs it."""

    llm: ManagedVLLM
    home: Path
    answers: list[Answer]
    start_s: float
    """A start that nothing disturbs, from entering to ready."""
    undisturbed_s: float
    """The time that all the answers take."""


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """One server of the embedded model that may be restarted often; at the end nothing of it may be left."""
    with own_state() as home:
        started = time.monotonic()
        with ManagedVLLM("demo", keep_alive=0, restart=POLICY) as llm:
            start_s = time.monotonic() - started
            llm.generate(PROMPTS, {**PARAMS, "max_tokens": 50})  # the first requests of a life are slower
            started = time.monotonic()
            answers = token_ids(llm.generate(PROMPTS, PARAMS))
            undisturbed_s = time.monotonic() - started
            report(f"{IN_FLIGHT} requests undisturbed", start_s=start_s, all_answers_s=undisturbed_s)
            yield Load(llm, home, answers, start_s, undisturbed_s)


def token_ids(outputs: Sequence[RequestOutput]) -> list[Answer]:
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def report(what: str, **seconds: float) -> None:
    print(f"faults | {what} | " + " | ".join(f"{name} {value:.2f}" for name, value in seconds.items()))


class Generation(threading.Thread):
    """All the prompts in one call, beside the test; or others, as token ids, without their texts."""

    def __init__(self, load: Load, ids: Sequence[list[int]] = ()) -> None:
        super().__init__(daemon=True)
        self._llm = load.llm
        self._prompts: Sequence[str | list[int]] = ids or PROMPTS
        self._params = {**PARAMS, "detokenize": not ids}
        self._outputs: list[RequestOutput] = []
        self._error: BaseException | None = None
        self._begun_at = time.monotonic()
        self.start()

    def run(self) -> None:
        try:
            self._outputs = self._llm.generate(self._prompts, self._params)
        except BaseException as error:
            self._error = error

    def result(self) -> list[RequestOutput]:
        self.join(300)
        assert not self.is_alive(), "no answer within 300 s"
        if self._error is not None:
            raise self._error
        return self._outputs

    def first_answer_at(self) -> float:
        """The moment of the first answer: all the requests began together."""
        return self._begun_at + min(output.latency for output in self._outputs)


def in_flight(llm: ManagedVLLM) -> int:
    """Requests that the server works on or keeps waiting, by its own count."""
    import requests

    root, headers = llm.base_url.removesuffix("/v1"), {"Authorization": f"Bearer {llm.api_key}"}
    text = requests.get(f"{root}/metrics", headers=headers, timeout=HANG_S).text
    gauges = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = [line for line in text.splitlines() if line.startswith(gauges)]
    return int(sum(float(line.split()[-1]) for line in lines))


@pytest.mark.parametrize(
    "name", ["EngineCore", *(pytest.param(name, marks=pytest.mark.soak) for name in ("APIServer", "Worker"))]
)
def test_a_process_killed_under_64_requests_loses_none_of_them(load: Load, name: str) -> None:
    llm = load.llm
    old, epoch = tree(llm), llm.status().epoch
    everything = tree_below(old["APIServer"].pid)
    ids = llm.tokenize(PROMPTS[0])
    with engine_on_one_core(llm):  # else the first may be answered before the last are taken in
        generation, by_tokens = Generation(load), Generation(load, [ids])
        eventually(lambda: in_flight(llm) == IN_FLIGHT + 1, f"{IN_FLIGHT} requests in flight, and one by token ids")
    killed_at = time.monotonic()
    old[name].kill()
    eventually(lambda: not any(is_live(process) for process in everything), "the old server is gone")
    gone_s = time.monotonic() - killed_at
    llm.wait_ready(after_epoch=epoch)
    ready_s = time.monotonic() - killed_at
    outputs = generation.result()
    all_s = time.monotonic() - killed_at
    first_s = generation.first_answer_at() - killed_at
    report(
        f"SIGKILL {name}, {IN_FLIGHT} in flight",
        all_old_gone_s=gone_s,
        ready_s=ready_s,
        first_answer_s=first_s,
        all_answers_s=all_s,
        bare_start_s=load.start_s,
        ratio=first_s / load.start_s,
    )
    assert token_ids(outputs) == load.answers
    assert token_ids(by_tokens.result()) == load.answers[:1]
    assert by_tokens.result()[0].request_id.startswith("generate-tokens-")
    assert {output.epoch for output in outputs} == {epoch + 1}
    assert llm.status().epoch == epoch + 1
    assert set(tree(llm).values()).isdisjoint(everything)


CLIENTS = 4
CLIENT = """
import json, sys
from managed_vllm import ManagedVLLM
with ManagedVLLM("demo", keep_alive=0) as llm:
    print("ready", flush=True)
    prompts, params = json.loads(sys.stdin.readline())
    outputs = llm.generate(prompts, params)
    print(json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
    status = llm.status()
    print(json.dumps([status.supervisor_pid, status.server_pid, llm.started_it]), flush=True)
    sys.stdin.readline()
"""


def test_the_supervisor_killed_under_load_is_replaced_by_exactly_one(load: Load) -> None:
    llm = load.llm
    supervisor = psutil.Process(llm.status().supervisor_pid)
    everything = tree_below(llm.status().server_pid or 0)
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(CLIENTS)
    ]
    try:
        hear = [client.stdout for client in clients if client.stdout]
        say = [client.stdin for client in clients if client.stdin]
        assert [lines.readline() for lines in hear] == ["ready\n"] * CLIENTS
        with engine_on_one_core(llm):
            for number, lines in enumerate(say):
                print(json.dumps([PROMPTS[number::CLIENTS], PARAMS]), file=lines, flush=True)
            # Not all: a client that began earlier may have its first answers before the last one has sent its prompts.
            eventually(lambda: in_flight(llm) > IN_FLIGHT // 2, "every client has requests in flight")
        killed_at = time.monotonic()
        os.kill(supervisor.pid, signal.SIGKILL)
        eventually(lambda: not any(is_live(process) for process in everything), "the old server fell")
        gone_s = time.monotonic() - killed_at
        answers = [[tuple(ids) for ids in json.loads(lines.readline())] for lines in hear]
        answered_s = time.monotonic() - killed_at
        found = [json.loads(lines.readline()) for lines in hear]
        report(
            f"SIGKILL supervisor, {CLIENTS} clients, {IN_FLIGHT} in flight",
            all_old_gone_s=gone_s,
            all_answers_s=answered_s,
            bare_start_s=load.start_s,
            undisturbed_s=load.undisturbed_s,
            ratio=answered_s / (load.start_s + load.undisturbed_s),
        )
        assert answers == [load.answers[number::CLIENTS] for number in range(CLIENTS)]
        assert llm.status().state is ServerState.READY
        ours = [llm.status().supervisor_pid, llm.status().server_pid]
        assert [pids for *pids, _ in found] == [ours] * CLIENTS
        assert ours[0] != supervisor.pid
        assert [started for *_, started in found].count(True) + llm.started_it in (1, 2)  # the fixture's was the first
        assert supervisors(load.home) == [ours[0]]
        (instance,) = directory.instances(load.home)
        eventually(lambda: marked(instance) == below(ours[0] or 0), "the server and its image, and nothing else")
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def marked(instance: directory.Instance) -> set[int]:
    return {process.pid for process in cleanup.marked_processes(instance)}


def below(pid: int) -> set[int]:
    return {process.pid for process in tree_below(pid)} - {pid}


def supervisors(home: Path) -> list[int]:
    """The supervisors of all instances below a state directory: found by their environment, not by our records."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                "managed_vllm.supervisor" in " ".join(process.cmdline())
                and process.environ().get("MANAGED_VLLM_HOME") == str(home)
                and is_live(process)
            ):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
