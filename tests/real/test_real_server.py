"""The real vLLM with the embedded model: start, share, guard, fall, fail. One server at a time; sorted by cost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from processes import HANG_S, assert_nothing_left, eventually, own_state, tree
from startup_failures import STARTUP_FAILURES, StartupFailure

from managed_vllm import ManagedVLLM, demo
from managed_vllm.errors import StartupError
from managed_vllm.in_server.managed_vllm_lifeline import start_time
from managed_vllm.instance import cleanup, directory
from managed_vllm.instance.directory import Instance

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    """One server of the embedded model for the tests that don't break it; at the end nothing of it may be left."""
    with own_state():
        with ManagedVLLM("demo", keep_alive=0) as handle:
            yield handle


def test_the_embedded_model_clicks_the_right_button(llm: ManagedVLLM) -> None:
    rng = random.Random(20_260)
    screens = [demo.random_screen(rng) for _ in range(64)]
    conversations = [[{"role": "user", "content": screen.prompt()}] for screen in screens]
    outputs = llm.chat(conversations, {"temperature": 0, "max_tokens": 64})
    right = sum(screen.is_right(output.outputs[0].text) for screen, output in zip(screens, outputs, strict=True))
    assert right >= 0.9 * len(screens), f"{right} of {len(screens)}"
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}


def test_ids_and_logprobs_are_the_servers(llm: ManagedVLLM) -> None:
    params = {"temperature": 0, "max_tokens": 8, "logprobs": 1, "ignore_eos": True}
    one = llm.generate("Screen:", params)[0]
    completion = one.outputs[0]
    assert one.prompt_token_ids
    assert len(completion.token_ids) == 8
    assert completion.logprobs is not None
    assert all(
        entry[token].logprob <= 0 for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
    )
    again = llm.generate([list(one.prompt_token_ids)], params)[0]
    assert again.outputs[0].token_ids == completion.token_ids


def test_the_openai_sdk_streams(llm: ManagedVLLM) -> None:
    messages: Any = [{"role": "user", "content": demo.random_screen(random.Random(3)).prompt()}]
    stream = llm.openai.chat.completions.create(model=llm.model, messages=messages, max_tokens=32, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_every_route_but_health_and_ping_wants_the_key(llm: ManagedVLLM) -> None:
    root = llm.base_url.removesuffix("/v1")
    with_key = {"Authorization": f"Bearer {llm.api_key}"}
    routes = requests.get(f"{root}/openapi.json", headers=with_key, timeout=HANG_S).json()["paths"]
    assert "/invocations" in routes
    assert "/tokenize" in routes
    # Dev-mode routes exist only by a switch; the guard does not know which paths exist, so they stand for themselves.
    paths = {*routes, "/metrics", "/docs", "/sleep", "/collective_rpc", "/reset_prefix_cache", "/no/such/route"}
    for path in paths - {"/health", "/ping"}:
        for method in ("GET", "POST", "OPTIONS"):
            answer = requests.request(method, root + path.replace("{", "").replace("}", ""), json={}, timeout=HANG_S)
            assert answer.status_code == 401, f"{method} {path}: {answer.status_code}"
    assert requests.get(f"{root}/health", timeout=HANG_S).status_code == 200
    assert requests.get(f"{root}/ping", timeout=HANG_S).status_code == 200
    wrong = {"Authorization": "Bearer wrong"}
    assert requests.get(f"{root}/v1/models", headers=wrong, timeout=HANG_S).status_code == 401
    assert requests.get(f"{root}/v1/models", headers=with_key, timeout=HANG_S).status_code == 200


def test_the_key_is_in_no_command_line_and_the_marker_in_every_process(llm: ManagedVLLM) -> None:
    processes = tree(llm)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert llm.api_key not in " ".join(process.cmdline())
    assert llm.id is not None
    marked = {process.pid for process in cleanup.marked_processes(Instance(directory.state_home(), llm.id))}
    assert {process.pid for process in processes.values()} <= marked


def test_the_supervisors_looks_are_not_in_the_log(llm: ManagedVLLM) -> None:
    llm.generate("Screen:", {"max_tokens": 2})
    eventually(lambda: "POST /v1/completions" in llm.logs(2000), "requests are logged")
    assert 'GET /health HTTP/1.1" 200' not in llm.logs(2000)
    assert 'GET /metrics HTTP/1.1" 200' not in llm.logs(2000)  # one without the key is refused, and logged


def test_listens_on_loopback_only(llm: ManagedVLLM) -> None:
    for process in tree(llm).values():
        for entry in process.net_connections("inet"):
            if entry.status == psutil.CONN_LISTEN:
                assert entry.laddr.ip in ("127.0.0.1", "::1")


def has_ended(process: psutil.Process) -> bool:
    return start_time(process.pid) is None


def test_the_api_server_killed_takes_its_children_along_and_comes_back(llm: ManagedVLLM) -> None:
    processes, epoch = tree(llm), llm.status().epoch
    url, key = llm.base_url, llm.api_key
    supervisor = psutil.Process(llm.status().supervisor_pid)
    supervisor.suspend()  # nobody cleans up: the processes must fall by themselves
    try:
        processes["APIServer"].kill()
        for name in ("EngineCore", "Worker"):
            eventually(partial(has_ended, processes[name]), f"{name} fell")
    finally:
        supervisor.resume()
    output = llm.generate("Screen:", {"max_tokens": 4})[0]
    assert output.epoch == epoch + 1
    assert len(output.outputs[0].token_ids) > 0
    assert (llm.base_url, llm.api_key) == (url, key)


CROWD = 16
MEMBER = """
import sys
from managed_vllm import ManagedVLLM
with ManagedVLLM("demo", keep_alive=0) as llm:
    llm.generate("Screen:", {"max_tokens": 2})
    print(llm.status().server_pid, llm.started_it, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("round_", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_sixteen_processes_at_once_share_one_server_and_none_is_left(home: Path, round_: int) -> None:
    crowd = [
        subprocess.Popen([sys.executable, "-c", MEMBER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(CROWD)
    ]
    said = [process.stdout.readline().split() for process in crowd if process.stdout]
    assert len({pid for pid, _ in said}) == 1, said
    assert [started for _, started in said].count("True") == 1
    if round_ == 0:
        for process in crowd:
            process.communicate("\n")
        assert [process.returncode for process in crowd] == [0] * CROWD
    else:  # every user is killed in the same moment
        for process in crowd:
            process.kill()
        for process in crowd:
            process.communicate()
    assert_nothing_left(home)


def test_the_supervisor_killed_its_server_falls_with_it(home: Path) -> None:
    user = subprocess.Popen([sys.executable, "-c", MEMBER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None
    pid = int(user.stdout.readline().split()[0])
    pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    instance = directory.instances(home)[0]
    record = instance.read_record()
    assert record is not None
    user.kill()
    os.kill(record["pid"], signal.SIGKILL)
    user.communicate()
    eventually(lambda: all(start_time(p) is None for p in pids), "the whole chain fell")
    # Files are all that is left, until the next user or `managed-vllm down --all`.
    assert cleanup.marked_processes(instance) == []
    done = subprocess.run([sys.executable, "-m", "managed_vllm.cli", "down", "--all"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "failure", [pytest.param(f, marks=() if f.always else pytest.mark.soak, id=f.name) for f in STARTUP_FAILURES]
)
def test_a_failing_start_ends_in_its_typed_error(failure: StartupFailure, home: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = failure.prepare(tmp_path, demo.weights_path())
    arguments = {"enforce_eager": True, **arguments}
    if "kv_cache_memory_bytes" not in arguments and "VLLM_CPU_KVCACHE_SPACE" not in arguments.get("env", {}):
        arguments["env"] = {"VLLM_CPU_KVCACHE_SPACE": "1", **arguments.get("env", {})}
    llm = ManagedVLLM(**arguments, keep_alive=0, wait=False)
    if failure.name == "unknown_flag":
        # Known before a process is started: ours refuses it, with the nearest names.
        with pytest.raises(ValueError, match="no engine argument"):
            llm.start()
        return
    llm.start()
    died = watch_exit(llm)
    with pytest.raises(StartupError) as caught:
        llm.wait_ready()
    told = time.monotonic()
    error = caught.value
    assert error.diagnosis.cause is failure.cause, str(error)
    assert type(error) is failure.error
    assert error.diagnosis.remedy
    assert error.log_path is not None
    assert Path(error.log_path).exists()
    if died and not failure.serves:
        assert told - died[0] < HANG_S  # long before a time-out of the start
    llm.close()
    assert_nothing_left(home)


def watch_exit(llm: ManagedVLLM) -> list[float]:
    """Waits for the exit of the server that is starting; returns the moment, or nothing if it is over already."""
    with contextlib.suppress(Exception):
        pid = eventually(lambda: llm.status().server_pid, "launched")
        eventually(lambda: start_time(pid) is None, "exited", 240)
        return [time.monotonic()]
    return []
