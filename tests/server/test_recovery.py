"""A server that dies: when it is started again, when it is given up, who is told, and what is left of the old one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import HANG_S, INSTANT, assert_nothing_left, eventually, is_live, tree

from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy, ServerState, ServerStatus
from managed_vllm.errors import EngineArgumentError, EngineDiedError, ManagedVLLMError, RequestTimeoutError
from managed_vllm.in_server.managed_vllm_lifeline import start_time
from managed_vllm.instance import cleanup, directory
from managed_vllm.status import Cause

PATH = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "helpers")]
AT_ONCE = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)


def server(
    restart: RestartPolicy = AT_ONCE,
    *,
    hang: HangPolicy | None = None,
    on_status: Any = None,
    wait: bool = True,
    **order: Any,
) -> ManagedVLLM:
    return ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(**order),
        keep_alive=INSTANT,
        hang=hang or HangPolicy(),
        restart=restart,
        on_status=on_status,
        wait=wait,
    )


def segments(instance: directory.Instance) -> list[Path]:
    """The server's segments of shared memory, once they are recorded."""
    return [
        Path(path)
        for path in eventually(lambda: (instance.read_record() or {}).get("shared_memory"), "recorded")
        if "/psm_" in path
    ]


@pytest.mark.parametrize("victim", ["APIServer", "EngineCore", "Worker"])
def test_the_end_of_any_process_is_the_end_of_all_and_a_new_epoch(home: Path, victim: str) -> None:
    seen: list[ServerStatus] = []
    with server(tree=True, on_status=seen.append) as llm:
        processes = tree(llm)
        processes[victim].kill()
        assert llm.wait_ready(HANG_S, after_epoch=1).epoch == 2
        assert not any(is_live(process) for process in processes.values())
        eventually(lambda: (seen[-1].state, seen[-1].epoch) == (ServerState.READY, 2), "told of the second life")
        states = [(status.state, status.epoch) for status in seen]
        assert states[-4:] == [
            (ServerState.READY, 1),
            (ServerState.RESTARTING, 1),
            (ServerState.RESTARTING, 2),
            (ServerState.READY, 2),
        ]
        reason = seen[-3].diagnosis
        assert reason is not None
        assert reason.cause in (Cause.KILLED, Cause.ENGINE_DIED, Cause.WORKER_DIED, Cause.ENGINE_BROKEN, Cause.UNKNOWN)


def test_a_first_start_that_is_killed_from_outside_is_tried_again(home: Path) -> None:
    with server(wait=False, start_s=1.0) as llm:
        pid = eventually(lambda: llm.status().server_pid, "launched")
        os.kill(pid, signal.SIGKILL)
        assert llm.generate("x", timeout=60)[0].epoch == 2


def test_what_on_status_raises_is_only_logged(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(status: ServerStatus) -> None:
        raise RuntimeError("mine")

    with server(on_status=fails) as llm:
        assert llm.generate("x")[0].outputs[0].text
        eventually(lambda: "on_status failed" in caplog.text, "logged")


IMPORT = "from managed_vllm.errors import DeadlyRequestError\n"
WAITER = """
try:
    with s.server({policy}, wait=False, **{order!r}) as llm:
        print("here", flush=True)
        while True:
            llm.generate("x", timeout=300)
            time.sleep(0.05)
except s.EngineDiedError as error:
    d = error.diagnosis
    print(d.cause, d.facts.get("restarts"), d.facts.get("last_cause"), d.root_line, flush=True)
except DeadlyRequestError as error:
    print("deadly", len(error.epochs), flush=True)
"""


@pytest.mark.parametrize(
    ("order", "restarts"),
    [
        ({"say": ["ValueError: broken"], "exit": 3}, None),  # bad from the start, and says so: no restart at all
        ({"say": ["killed"], "exit": "SIGKILL"}, 2),  # bad from the start, without a word
        ({"exit_after": 1.0, "exit": 3}, 2),  # bad once it is used, each time
    ],
    ids=["from the start", "killed in each start", "after a while"],
)
def test_a_crash_loop_is_given_up_and_every_waiter_gets_the_same_diagnosis(
    home: Path, tmp_path: Path, order: dict[str, Any], restarts: int | None
) -> None:
    count, go = tmp_path / "starts", tmp_path / "go"
    order = {**order, "count": str(count), "held": str(go)}
    policy = "s.RestartPolicy(max_restarts=2, backoff_initial_s=0.3)"
    said = three_waiters(WAITER.format(policy=policy, order=order), go)
    if restarts is None:
        assert all(text == "unknown None None ValueError: broken" for text in said), said
    else:
        assert len(set(said)) == 1, said
        assert said[0].startswith(f"crash_loop {restarts} ")
        assert len(count.read_text().splitlines()) == restarts + 1
    assert_nothing_left(home)


def three_waiters(code: str, go: Path) -> list[str]:
    """What three users say at their end, of a server that does nothing before all of them are there."""
    program = f"import sys, time; sys.path[:0] = {PATH!r}; import test_recovery as s\n{IMPORT}{code}"
    users = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for user in users:
        assert user.stdout is not None
        assert user.stdout.readline() == "here\n"
    go.touch()
    return [user.communicate(timeout=4 * HANG_S)[0].strip() for user in users]


def test_a_server_that_crashes_at_each_first_request_is_given_up_or_the_requests_are(
    home: Path, tmp_path: Path
) -> None:
    """Whichever comes first: what was in flight at two deaths is not sent again, nor counted against the server."""
    count, go = tmp_path / "starts", tmp_path / "go"
    order = {"crash_at": 1, "count": str(count), "held": str(go)}
    policy = "s.RestartPolicy(max_restarts=2, backoff_initial_s=0.3)"
    said = three_waiters(WAITER.format(policy=policy, order=order), go)
    assert all(text == "deadly 2" or text.startswith("crash_loop 2 ") for text in said), said
    assert len(count.read_text().splitlines()) <= 1 + 2 + 2 * 2  # with those that don't count
    assert_nothing_left(home)


def test_a_configuration_error_is_not_retried_at_all(home: Path, tmp_path: Path) -> None:
    count = tmp_path / "starts"
    with server(count=str(count), once=str(tmp_path / "once")) as llm:
        pid = llm.status().server_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)  # the crash is retried; what its next start says is not
        with pytest.raises(EngineArgumentError) as caught:
            llm.wait_ready(HANG_S, after_epoch=1)
        assert caught.value.diagnosis.cause is Cause.INVALID_FLAG
        assert len(count.read_text().splitlines()) == 2


def test_a_cause_that_is_not_retried_ends_it_at_once(home: Path, tmp_path: Path) -> None:
    count = tmp_path / "starts"
    policy = RestartPolicy(not_retried=frozenset({Cause.KILLED}))
    seen: list[ServerStatus] = []
    with server(policy, on_status=seen.append, count=str(count)) as llm:
        pid = llm.status().server_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: seen and seen[-1].state is ServerState.FAILED, "given up")
        with pytest.raises(EngineDiedError) as caught:
            llm.wait_ready(HANG_S)
        assert caught.value.diagnosis.cause is Cause.KILLED
        assert len(count.read_text().splitlines()) == 1


def test_the_supervisor_learns_of_an_exit_from_the_kernel(home: Path) -> None:
    """Nobody else would tell it: hangs are not looked for."""
    heard: list[ServerStatus] = []
    with server(RestartPolicy(backoff_initial_s=0), on_status=heard.append, hang=HangPolicy.never()) as llm:
        pid = llm.status().server_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: any(s.state is ServerState.RESTARTING for s in heard), "told of the end")


def test_leaked_shared_memory_and_sockets_are_gone_before_the_next_start(home: Path) -> None:
    with server(tree=True, shm=True) as llm:
        instance = directory.instances(home)[0]
        leaked = segments(instance)
        assert all(path.exists() for path in leaked)
        record = instance.read_record()
        assert record is not None
        scratch = Path(record["scratch"])
        (scratch / "a_socket").touch()
        (scratch / "vllm_dist_x").mkdir()
        _kill_at_once(llm)  # the resource tracker as well: nobody is left to tidy up
        assert llm.wait_ready(HANG_S, after_epoch=1).epoch == 2
        assert not any(path.exists() for path in leaked)
        assert not (scratch / "a_socket").exists()
        assert not (scratch / "vllm_dist_x").exists()
        assert scratch.exists()
        last = segments(instance)
    assert_nothing_left(home)
    assert not any(path.exists() for path in last)


def test_shared_memory_of_a_server_whose_supervisor_was_killed_is_removed_by_down(home: Path) -> None:
    with server(tree=True, shm=True) as llm:
        leaked = segments(directory.instances(home)[0])
        supervisor = psutil.Process(llm.status().supervisor_pid)
        supervisor.suspend()
        _kill_at_once(llm)
        supervisor.kill()
        assert all(path.exists() for path in leaked)
    done = subprocess.run([sys.executable, "-m", "managed_vllm.cli", "down", "--all"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in leaked)
    assert_nothing_left(home)


def test_shared_memory_that_nobody_has_seen_is_removed_when_a_starting_server_dies_as_a_whole(
    home: Path, tmp_path: Path
) -> None:
    """Killed in the moment in which the Worker has made it; the supervisor looks once a second what there is."""
    noted = tmp_path / "segments"
    with server(tree=True, shm=str(noted), start_s=600, wait=False) as llm:
        llm.start()
        (segment,) = eventually(lambda: noted.exists() and noted.read_text().split(), "made")
        _kill_at_once(llm)
        eventually(lambda: llm.status().epoch >= 2, "a new epoch")
        assert not Path(segment).exists()
    assert_nothing_left(home)
    assert not any(Path(path).exists() for path in noted.read_text().split())


def _kill_at_once(llm: ManagedVLLM) -> None:
    """SIGKILL for each process of the server in the same instant: all of them are stopped before."""
    instance = directory.Instance(directory.state_home(), str(llm.id))  # its supervisor may be stopped
    root = psutil.Process(eventually(lambda: (instance.read_record() or {}).get("server_pid"), "recorded"))
    family = [root, *root.children(recursive=True)]
    for process in family:
        process.suspend()
    for process in reversed(family):
        with contextlib.suppress(psutil.NoSuchProcess):  # stopped for too long: its supervisor was quicker
            process.kill()
    eventually(lambda: not any(is_live(process) for process in family), "all of it is dead")


def test_an_orphan_in_a_session_of_its_own_is_ended_before_the_next_start(home: Path) -> None:
    with server(orphans=True) as llm:
        instance = directory.instances(home)[0]
        pid = llm.status().server_pid
        orphans = eventually(
            lambda: [p for p in cleanup.marked_processes(instance) if p.pid != pid], "it has left an orphan"
        )
        llm.restart()
        assert not any(is_live(process) for process in orphans)
    assert_nothing_left(home)


def test_a_stolen_port_leads_to_another_one(home: Path, tmp_path: Path) -> None:
    with server(steal_port=str(tmp_path / "stolen")) as llm:
        assert llm.generate("x")[0].outputs[0].text.startswith("echo x")
        assert llm.status().epoch == 2


def test_epochs_go_on_when_the_supervisor_was_killed(home: Path) -> None:
    with server() as llm:
        llm.restart()
        status = llm.status()
        assert status.epoch == 2
        assert status.supervisor_pid is not None
        os.kill(status.supervisor_pid, signal.SIGKILL)
        eventually(lambda: start_time(status.server_pid or 0) is None, "its server has fallen with it")
        assert llm.generate("next")[0].epoch == 3


def test_a_deadline_bounds_the_wait_for_a_supervisor_that_does_not_answer(home: Path) -> None:
    with server() as llm:
        supervisor = psutil.Process(llm.status().supervisor_pid)
        supervisor.suspend()
        other = server()
        try:
            with pytest.raises(RequestTimeoutError):
                other.generate("x", timeout=0.5)
        finally:
            supervisor.resume()
            other.close()


def test_a_fault_of_the_supervisor_itself_is_told_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A site module of ours breaks the supervisor from within at its first look at the server.
    (tmp_path / "usercustomize_fault.pth").touch()
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('managed_vllm.supervisor' in word for word in sys.orig_argv):\n"
        "    import managed_vllm.server.startup_log as d\n"
        "    def broken(*a, **k): raise RuntimeError('a fault of ours')\n"
        "    d.StartupLog.__init__ = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(directory.__file__).parents[2]}")
    with pytest.raises(ManagedVLLMError, match="supervisor failed") as caught, server():
        pass
    assert "a fault of ours" in str(caught.value)
    assert_nothing_left(home)


def test_a_flooded_log_takes_nothing_down(home: Path, tmp_path: Path) -> None:
    with server(faults=str(tmp_path)) as llm:
        (tmp_path / "1-flood").touch()
        assert llm.generate("x", {"max_tokens": 4}, timeout=60)[0].epoch == 1
        folder = directory.instances(home)[0].folder
        assert sum(path.stat().st_size for path in folder.glob("server.log*")) < 80 << 20
        assert start_time(llm.status().server_pid or 0) is not None


def test_a_starter_killed_in_the_middle_leads_to_no_second_supervisor(home: Path) -> None:
    # The supervisor is slow to import, and its starter is killed before it listens: the next user waits for that one.
    code = f"import sys, time; sys.path[:0] = {PATH!r}; import test_recovery as s\n"
    code += "llm = s.server(tree=True).start()\ntime.sleep(3600)"
    for _ in range(3):
        starter = subprocess.Popen([sys.executable, "-c", code])
        eventually(lambda: list(home.glob("*/supervisor.lock")), "it has begun")
        starter.kill()
        starter.wait()
        with server(tree=True) as llm:
            assert llm.generate("x")[0].outputs[0].text.startswith("echo x")
            instance, ours = directory.instances(home)[0], llm.status().supervisor_pid
            # One that came too late may just be leaving.
            eventually(lambda i=instance, o=ours: supervisors(i, home) == [o], "there is one")  # type: ignore[misc]
            assert llm.status().supervisor_pid == ours
        assert_nothing_left(home)


def supervisors(instance: directory.Instance, home: Path) -> list[int]:
    """The pids of those of an instance: tests that run beside this one have servers of its key, in their own `home`."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if instance.id in (process.info["cmdline"] or [])
        and "managed_vllm.supervisor" in str(process.info["cmdline"])
        and (process.info["environ"] or {}).get("MANAGED_VLLM_HOME") == str(home)
    ]
