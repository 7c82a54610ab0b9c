"""Start, attach, share and leave, against the stand-in server in real processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import patient_supervisors
import psutil
import pytest
import standin
from free_ports import free_port
from processes import HANG_S, INSTANT, assert_nothing_left, eventually, left_of

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState, ServerStatus
from managed_vllm.errors import (
    BadRequestError,
    ConfigError,
    ConfigMismatchError,
    EngineDiedError,
    ManagedVLLMError,
    NoServerError,
    RequestTimeoutError,
    ServerStoppedError,
    StartupError,
    StartupTimeoutError,
    SupervisorError,
)
from managed_vllm.in_server.managed_vllm_lifeline import start_time
from managed_vllm.instance import attach, directory
from managed_vllm.status import Cause

PATH = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "helpers")]


def server(keep_alive: float = INSTANT, *, order: dict[str, Any] | None = None, **options: Any) -> ManagedVLLM:
    """A handle for the stand-in; the same arguments share one server."""
    env = standin.orders(**(order or {}))
    return ManagedVLLM("stand-in", command=standin.command(), env=env, keep_alive=keep_alive, **options)


def script(code: str, **env: str) -> subprocess.Popen[str]:
    """A user in a process of its own, which finds `server` as `s`."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {PATH!r}; import test_session as s\n{code}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLDER = """
with s.server(order={order!r}, stop_grace=0.5) as llm:
    print(llm.status().server_pid, flush=True)
    sys.stdin.readline()
"""


def test_a_server_answers_and_is_gone_with_its_only_user(home: Path) -> None:
    with server(order={"tree": True}) as llm:
        assert llm.chat([{"role": "user", "content": "hi"}])[0].outputs[0].text.startswith("echo hi")
        outputs = llm.generate(["a", "b", "c"])
        assert [o.outputs[0].text.split()[1] for o in outputs] == ["a", "b", "c"]
        assert llm.started_it
        assert llm.model == "stand-in"
        assert llm.base_url.startswith("http://127.0.0.1:")
        assert llm.base_url.endswith("/v1")
    assert_nothing_left(home)


CROWD = """
import sys; sys.path.append({helpers!r})
import standin
from managed_vllm import ManagedVLLM
for number in range({rounds}):
    sys.stdin.readline()
    with ManagedVLLM("m", command=standin.command(), env=standin.orders(**{order!r}), keep_alive=0.2) as llm:
        print(llm.generate(str(number))[0].outputs[0].text.replace("echo ", ""), flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("rounds", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_sixteen_users_at_once_share_one_server_in_each_round(home: Path, tmp_path: Path, rounds: int) -> None:
    count = tmp_path / "starts"
    order = {"count": str(count), "start_s": 0.2}
    code = CROWD.format(order=order, rounds=rounds, helpers=PATH[-1])
    pipe = subprocess.PIPE
    users = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(16)]

    def tell_all() -> None:
        for user in users:
            assert user.stdin is not None
            user.stdin.write("\n")
            user.stdin.flush()

    for number in range(rounds):
        tell_all()
        answers = {line(user) for user in users}
        assert len(answers) == 1, answers
        assert answers.pop().startswith(f"{number} from ")
        assert len(count.read_text().splitlines()) == number + 1
        tell_all()
        assert_nothing_left(home)
    for user in users:
        user.communicate()
    assert [user.returncode for user in users] == [0] * 16


def test_a_stopped_supervisor_is_a_clear_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as llm:
        supervisor = psutil.Process(llm.status().supervisor_pid)
        supervisor.suspend()
        monkeypatch.setattr(attach, "ANSWER_S", 1.0)
        try:
            with pytest.raises(SupervisorError, match="does not answer"), server():
                pass
        finally:
            supervisor.resume()


def test_nesting_and_entering_twice_keep_one_lease(home: Path) -> None:
    llm = server()
    with llm, llm:
        with server() as other:
            assert other.status().users == 2
            assert not other.started_it
        assert llm.status().state is ServerState.READY
    assert_nothing_left(home)
    with llm:
        assert llm.generate("again")[0].outputs[0].text.startswith("echo again")


def test_a_handle_works_without_entering_and_from_many_threads(home: Path) -> None:
    llm = server()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: llm.generate(f"p{i}")[0].outputs[0].text.split()[1], range(32)))
    assert texts == [f"p{i}" for i in range(32)]
    assert llm.status().users == 1
    llm.close()


def test_async_with(home: Path) -> None:
    async def main() -> str:
        async with server() as llm:
            return (await asyncio.to_thread(llm.generate, "hi"))[0].outputs[0].text

    assert asyncio.run(main()).startswith("echo hi")


def test_cancelled_while_entering_leaves_nothing(home: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(1.0), server(order={"start_s": 60}):
            raise AssertionError("entered")

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert_nothing_left(home)


def test_the_starter_killed_others_notice_nothing(home: Path) -> None:
    starter = script(HOLDER.format(order={"tree": True}))
    pid = int(line(starter))
    with server(order={"tree": True}) as llm:
        starter.kill()
        starter.wait()
        eventually(lambda: llm.status().users == 1, "the dead user's lease is gone")
        assert llm.status().server_pid == pid
        assert llm.status().epoch == 1
        assert llm.generate("still")[0].attempts == 1


def test_last_user_gone_by_sigkill_stops_the_server(home: Path) -> None:
    user = script(HOLDER.format(order={"tree": True, "ignore_sigterm": True}))
    line(user)
    assert left_of(home)
    user.kill()
    user.wait()
    assert_nothing_left(home)


def test_ctrl_c_during_start_leaves_nothing(home: Path) -> None:
    user = script("with s.server(order={'start_s': 60}): pass")
    eventually(lambda: list(home.glob("*/instance.json")), "the supervisor is up")
    eventually(lambda: left_of(home), "the server was launched")
    user.send_signal(signal.SIGINT)
    assert user.wait(HANG_S) != 0
    assert_nothing_left(home)


def test_fork_takes_a_lease_of_its_own(home: Path) -> None:
    with server() as llm:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                text = llm.generate("child")[0].outputs[0].text
                os.write(writing, f"{llm.status().users} {text}".encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert pipe.read().startswith("2 echo child")
        os.waitpid(child, 0)
        eventually(lambda: llm.status().users == 1, "the child's lease is gone")


def test_a_forked_child_that_stays_does_not_hold_the_parents_lease(home: Path) -> None:
    llm = server()
    llm.start()
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        llm.close()
        assert_nothing_left(home)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _ask(llm: ManagedVLLM) -> str:
    with llm:
        return llm.generate("spawned")[0].outputs[0].text


def test_a_pickled_handle_attaches_to_the_same_server(home: Path) -> None:
    with server() as llm:
        mine = llm.generate("x")[0].outputs[0].text.split()[-1]
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            texts = list(pool.map(_ask, [llm, llm]))
        assert {text.split()[-1] for text in texts} == {mine}
        assert not pickle.loads(pickle.dumps(llm)).started_it


def test_environ_leads_a_bare_handle_to_this_very_server(home: Path) -> None:
    with server() as llm, server(order={"tree": True}) as other:
        assert llm.id != other.id
        with pytest.raises(NoServerError, match="several servers"):
            ManagedVLLM().start()
        code = "from managed_vllm import ManagedVLLM\nwith ManagedVLLM() as llm: print(llm.status().server_pid)"
        for handle in (llm, other):
            child = script(code, **handle.environ(), MANAGED_VLLM_KEEP_ALIVE="0")
            assert int(child.communicate()[0]) == handle.status().server_pid


def test_a_bare_handle_without_any_server_says_so(home: Path) -> None:
    with pytest.raises(NoServerError, match="no server is running"):
        ManagedVLLM().start()


def test_a_name_finds_its_server_and_refuses_other_arguments(home: Path) -> None:
    with server(name="judge") as llm:
        assert ManagedVLLM(name="judge", keep_alive=0).id == llm.id
        with server() as unnamed:
            assert unnamed.id == llm.id
        with pytest.raises(ConfigMismatchError) as caught, server(name="judge", max_model_len=77):
            pass
        assert caught.value.differences == {"max_model_len": (77, None)}
    assert_nothing_left(home)
    with server(name="judge", max_model_len=77) as llm:
        assert llm.status().state is ServerState.READY


def test_an_explicit_address_is_kept_and_must_match(home: Path) -> None:
    port = free_port()
    with server(port=port, api_key="mine") as llm:
        assert llm.base_url == f"http://127.0.0.1:{port}/v1"
        assert llm.api_key == "mine"
        with server() as sharing:
            assert sharing.base_url == llm.base_url
        with pytest.raises(ConfigMismatchError, match="port"), server(port=port + 1):
            pass


def test_the_key_of_an_earlier_server_is_no_wish_for_the_next_one(home: Path) -> None:
    first = server()
    first.generate("x")
    key, status = first.api_key, first.status()
    assert status.supervisor_pid is not None
    os.kill(status.supervisor_pid, signal.SIGKILL)
    with server() as second:  # somebody else starts the next one, with another key
        assert second.api_key != key
        assert first.generate("y")[0].outputs[0].text.startswith("echo y")
        assert first.api_key == second.api_key
        first.close()


def test_uds_serves_without_tcp(home: Path) -> None:
    with server(uds=True) as llm:
        assert llm.generate("hi")[0].outputs[0].text.startswith("echo hi")
        assert llm.openai.models.list().data[0].id == "stand-in"
        path = llm.status().connection.uds  # type: ignore[union-attr]
        assert path is not None
        assert os.stat(path).st_mode & 0o077 == 0
        pid = llm.status().server_pid
        assert pid is not None
        assert psutil.Process(pid).net_connections("tcp") == []


def test_a_crash_is_restarted_and_the_request_is_answered(home: Path) -> None:
    with server(order={"tree": True}) as llm:
        first = llm.status()
        assert first.server_pid is not None
        os.kill(first.server_pid, signal.SIGKILL)
        output = llm.generate("after")[0]
        assert output.outputs[0].text.startswith("echo after")
        assert output.epoch == 2
        assert llm.status().restarts == 1
        assert llm.base_url == first.connection.base_url  # type: ignore[union-attr]
        assert llm.api_key == first.connection.api_key.reveal()  # type: ignore[union-attr]


def test_exit_code_0_that_nobody_asked_for_is_a_crash(home: Path) -> None:
    once = RestartPolicy(max_restarts=1, backoff_initial_s=0)
    seen: list[ServerStatus] = []
    with server(order={"exit": 0, "exit_after": 0.3}, restart=once, on_status=seen.append) as llm:
        assert llm.generate("x")[0].epoch == 1
        status = llm.wait_ready(HANG_S, after_epoch=1)
        assert status.epoch == 2
        assert llm.generate("x")[0].epoch == 2
        eventually(lambda: seen and seen[-1].state is ServerState.FAILED, "given up after the second crash")
        assert seen[-1].diagnosis is not None
        assert seen[-1].diagnosis.cause is Cause.CRASH_LOOP


def test_restart_is_a_new_epoch_at_the_same_address(home: Path) -> None:
    with server() as llm:
        url = llm.base_url
        assert llm.restart().epoch == 2
        assert llm.base_url == url
        assert llm.status().restarts == 0


def test_whoever_enters_while_a_restart_stops_the_server_waits_for_the_next_epoch(home: Path) -> None:
    deaf = {"ignore_sigterm": True}
    with server(order=deaf, stop_grace=HANG_S) as llm, concurrent.futures.ThreadPoolExecutor() as pool:
        first = llm.status().server_pid
        assert first is not None
        restarting = pool.submit(llm.restart)
        told = eventually(lambda: (now := llm.status()).state is not ServerState.READY and now, "it is no longer ready")
        assert (told.state, told.connection, told.epoch) == (ServerState.RESTARTING, None, 1)
        assert start_time(first) is not None
        with server(order=deaf, wait=False) as other:
            entering = pool.submit(other.wait_ready)
            eventually(lambda: llm.status().users == 2, "another user has come")
            assert not entering.done()
            os.kill(first, signal.SIGKILL)
            assert (entering.result().epoch, restarting.result().epoch) == (2, 2)
        second = llm.status().server_pid
        assert second is not None
        llm.stop_server()
        os.kill(second, signal.SIGKILL)


def test_a_failed_start_reaches_every_waiter_with_the_same_error(home: Path) -> None:
    order = {"say": ["ValueError: no such thing"], "exit": 3}
    code = f"""
try:
    s.server(order={order!r}).start()
except s.StartupError as error:
    print(type(error).__name__, error.diagnosis.cause, error.diagnosis.root_line, error.log_path)
"""
    users = [script(code) for _ in range(4)]
    said = [user.communicate()[0].strip() for user in users]
    assert all(text.startswith("EngineDiedError unknown ValueError: no such thing") for text in said), said
    log = Path(said[0].split()[-1])
    assert "no such thing" in log.read_text()


def test_a_silent_start_is_ended_and_says_so(home: Path) -> None:
    with pytest.raises(StartupTimeoutError) as caught, server(order={"silent": True}, startup_silence=0.5):
        pass
    assert caught.value.diagnosis.cause is Cause.STARTUP_SILENCE


def test_a_start_that_takes_too_long_is_ended(home: Path) -> None:
    with pytest.raises(StartupTimeoutError) as caught, server(order={"start_s": 60}, startup_timeout=0.5):
        pass
    assert caught.value.diagnosis.cause is Cause.STARTUP_TIMEOUT


def test_a_command_that_does_not_exist_is_a_launch_error(home: Path) -> None:
    with pytest.raises(StartupError) as caught, ManagedVLLM("m", command=["/no/such/program", "{port}"], keep_alive=0):
        pass
    assert caught.value.diagnosis.cause is Cause.LAUNCHER_NOT_FOUND


def test_an_unknown_engine_argument_dies_before_a_process_is_started(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean max_model_len"), ManagedVLLM("demo", max_modellen=5):
        pass
    assert left_of(home) == []


def test_wait_false_returns_at_once_and_the_first_use_waits(home: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    held = ["sh", "-c", f'until test -e {go}; do sleep 0.02; done; exec "$@"', "sh", *standin.command()]
    with ManagedVLLM("stand-in", command=held, keep_alive=INSTANT, wait=False) as llm:
        assert llm.status().state is ServerState.STARTING
        go.touch()
        assert llm.generate("hi")[0].outputs[0].text.startswith("echo hi")


def test_stopped_under_a_user_is_told_to_it(home: Path) -> None:
    with server(order={"start_s": 30}, wait=False) as llm:
        llm.stop_server()
        with pytest.raises(ServerStoppedError):
            llm.wait_ready(HANG_S)


def test_a_failure_between_two_uses_is_told_once_and_then_tried_anew(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient_supervisors.are_made(tmp_path, monkeypatch)
    count = tmp_path / "starts"
    llm = server(order={"count": str(count), "exit": 4}, wait=False)
    llm.start()
    assert_nothing_left(home)  # it has failed while nobody waited
    assert len(count.read_text().splitlines()) == 1
    with pytest.raises(EngineDiedError):
        llm.wait_ready()
    assert len(count.read_text().splitlines()) == 1
    with pytest.raises(EngineDiedError):
        llm.generate("x")
    assert len(count.read_text().splitlines()) == 2


def test_a_deadline_bounds_the_wait_for_a_server_that_is_not_ready(home: Path) -> None:
    with server(order={"start_s": 3600}, wait=False) as llm:
        with pytest.raises(RequestTimeoutError, match="not ready before the deadline"):
            llm.generate("x", timeout=0.3)


def test_pin_keeps_the_server_without_users(home: Path) -> None:
    with server(keep_alive=0) as llm:
        llm.pin()
        pid = llm.status().server_pid
    with server(keep_alive=0) as again:
        assert again.status().server_pid == pid
        assert again.status().pinned
        again.unpin()


def test_a_pin_a_name_and_the_longest_keep_alive_outlive_a_supervisor_that_is_killed(home: Path) -> None:
    with server(keep_alive=0, name="judge") as llm:
        with server(keep_alive=HANG_S):
            pass
        llm.pin()
        killed = llm.status().supervisor_pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        assert llm.generate("x")[0].outputs[0].text.startswith("echo x")

        def is_ready_again() -> ServerStatus | None:  # the old server may have answered as it fell
            now = llm.wait_ready(HANG_S)
            return now if now.supervisor_pid != killed else None

        again = eventually(is_ready_again, "the next supervisor's server is ready")
        assert (again.pinned, again.extra["keep_alive_s"]) == (True, HANG_S)
    with ManagedVLLM(name="judge", keep_alive=0) as by_name:
        assert by_name.status().server_pid == again.server_pid
        by_name.stop_server()


def test_supervisor_killed_its_server_falls_and_a_user_starts_the_next(home: Path) -> None:
    with server(order={"tree": True}) as llm:
        status = llm.status()
        assert status.supervisor_pid is not None
        assert status.server_pid is not None
        pid = status.server_pid
        os.kill(status.supervisor_pid, signal.SIGKILL)
        # Until the kernel has ended it, it may still answer.
        eventually(lambda: start_time(pid) is None, "the old server is gone")
        assert llm.generate("next")[0].outputs[0].text.startswith("echo next")
        again = llm.status()
        assert again.supervisor_pid != status.supervisor_pid
        assert again.connection is not None
        assert again.connection.api_key == status.connection.api_key  # type: ignore[union-attr]


def test_a_bad_request_is_not_retried(home: Path) -> None:
    with server() as llm, pytest.raises(BadRequestError) as caught:
        llm.chat([{"role": "user", "content": "x"}], model="other")
    assert caught.value.status == 404


def test_leaving_with_a_request_in_flight_does_not_hang(home: Path) -> None:
    llm = server(order={"ignore_sigterm": True}, stop_grace=0.5)
    llm.start()
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            llm.generate("slow", extra_body={"standin_sleep": 3600}, timeout=10 * HANG_S)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    eventually(lambda: llm.client.in_flight == 1, "it is in flight")
    llm.close()
    assert_nothing_left(home)
    thread.join(HANG_S)
    llm.close()


def test_errors_cross_processes(home: Path) -> None:
    with pytest.raises(EngineDiedError) as caught, server(order={"exit": 1}):
        pass
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.diagnosis == caught.value.diagnosis
    assert isinstance(copy, ManagedVLLMError)


def test_records_never_hold_the_key_or_a_secret(home: Path) -> None:
    env = {**standin.orders(), "HF_TOKEN": "hf_very_secret"}
    with ManagedVLLM("stand-in", command=standin.command(), env=env, keep_alive=INSTANT) as llm:
        key = llm.api_key
        for path in home.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a record that has just replaced the last one
                mode, text = path.stat().st_mode, path.read_text(errors="replace") if path.is_file() else ""
                assert mode & 0o077 == 0, path
                assert key not in text, path
                assert "hf_very_secret" not in text, path
        assert json.loads(next(home.glob("*/instance.json")).read_text())["state"] == "ready"
    assert directory.state_home() == home


def test_a_handle_has_no_more_in_flight_than_it_is_told(home: Path) -> None:
    with server(max_in_flight=2) as llm:
        assert llm.client.async_client.sender.max_in_flight == 2
        assert pickle.loads(pickle.dumps(llm)).client.async_client.sender.max_in_flight == 2
        assert len(llm.generate(["x"] * 5, {"max_tokens": 2})) == 5
    for wrong in (0, -1, 2.5, "2", True):
        with pytest.raises(ConfigError, match="max_in_flight must be 1 or more") as caught:
            ManagedVLLM("demo", max_in_flight=wrong)  # type: ignore[arg-type]
        assert caught.value.field == "max_in_flight"
