"""Names: one live server each; lost neither to one that is stopping nor to one that nobody uses any more."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import standin
from processes import HANG_S, INSTANT, eventually, left_of

from managed_vllm import ManagedVLLM, ServerState
from managed_vllm.errors import ConfigError, ConfigMismatchError, StateDirectoryError
from managed_vllm.in_server.managed_vllm_lifeline import start_time
from managed_vllm.instance import directory, names
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance

ROOT = Path(__file__).resolve().parents[2]


def server(order: dict[str, Any] | None = None, **options: Any) -> ManagedVLLM:
    env = standin.orders(**(order or {}))
    return ManagedVLLM("m", command=standin.command(), env=env, **{"name": "judge", "keep_alive": INSTANT, **options})


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor() as executor:
        yield executor


def pid_of(llm: ManagedVLLM) -> int:
    pid = llm.status().server_pid
    assert pid is not None
    return pid


def test_a_name_survives_the_end_of_the_last_server_of_its_key(
    home: Path, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    deaf = {"ignore_sigterm": True}
    with server(deaf, keep_alive=0, stop_grace=HANG_S) as first:
        pid = pid_of(first)
        look = Channel.connect(Instance(home, str(first.id)).socket_path)
    eventually(lambda: look.request("status")["status"]["state"] == "stopping", "it is on its way out")
    look.close()
    second = server(deaf, keep_alive=0, stop_grace=HANG_S)
    entering = pool.submit(second.start)  # claims the name, and waits
    os.kill(pid, signal.SIGKILL)
    entering.result()
    with ManagedVLLM(name="judge", keep_alive=0) as by_name:
        assert by_name.id == second.id
    pid = pid_of(second)
    second.stop_server()
    second.close()
    os.kill(pid, signal.SIGKILL)


def test_a_start_that_is_refused_leaves_no_name(home: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean max_model_len"), ManagedVLLM("demo", name="a", max_modellen=5):
        pass
    assert left_of(home) == []
    with server(name=None) as llm:
        with pytest.raises(ConfigMismatchError, match="another address"), server(port=1):
            pass
        assert llm.id is not None
        assert names.named(home, "judge") is None
        with server() as named:
            assert named.id == llm.id
            assert names.named(home, "judge") == Instance(home, llm.id)


def test_a_server_that_nobody_uses_gives_its_name_to_one_with_other_arguments(home: Path) -> None:
    with server(keep_alive=HANG_S) as first:
        pid, id_of_first = pid_of(first), first.id
    with server(max_model_len=77) as second:
        assert start_time(pid) is None  # never two on the same devices
        assert second.id != id_of_first
        with pytest.raises(ConfigMismatchError, match="used by another handle of this process") as caught:
            server().start()
        assert caught.value.differences == {"max_model_len": (None, 77)}


def test_a_pinned_server_keeps_its_name(home: Path) -> None:
    with server() as llm:
        llm.pin()
    with pytest.raises(ConfigMismatchError):
        server(max_model_len=77).start()
    with ManagedVLLM(name="judge", keep_alive=0) as again:
        again.unpin()


@pytest.mark.parametrize("which", [{}, {"name": "judge"}])
def test_whoever_attaches_to_what_is_just_coming_up_waits_for_it(
    which: dict[str, str],
    home: Path,
    tmp_path: Path,
    pool: concurrent.futures.ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if any('managed_vllm.supervisor' in word for word in sys.orig_argv):\n"
        f"    while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    starter = server()
    starting = pool.submit(starter.start)
    eventually(lambda: [i for i in directory.instances(home) if directory.is_alive(i)], "somebody was elected")
    tries: list[Path] = []
    connect = Channel.connect.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Channel], /, path: Path, **options: Any) -> Channel:
        tries.append(path)
        return connect(cls, path, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(Channel, "connect", classmethod(counted))
    follower = ManagedVLLM(keep_alive=0, **which)  # type: ignore[arg-type]
    following = pool.submit(follower.start)
    eventually(lambda: len(tries) > 20, "it tries again and again")
    go.touch()
    assert following.result().id == starting.result().id
    assert follower.status().state is ServerState.READY
    follower.close()
    starter.close()


def test_a_lock_that_is_never_given_back_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LOCK_S", 0.1)
    directory.state_home()
    (home / "names").mkdir(mode=0o700)
    with filelock.FileLock(home / "names" / ".lock"), pytest.raises(StateDirectoryError, match="has been held"):
        names.take(home, "judge", Instance(home, "m-0123456789"))
    names.drop_names(home, "m-0123456789")


def test_a_name_is_taken_while_others_drop_theirs(
    home: Path, pool: concurrent.futures.ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever drops the last one removes the folder of names."""
    monkeypatch.setattr(names, "LOCK_S", HANG_S)
    directory.state_home()
    done = threading.Event()

    def drop() -> None:
        while not done.is_set():
            names.drop_names(home, "m-0123456789")

    dropping = pool.submit(drop)
    try:
        for _ in range(100):
            names.take(home, "judge", Instance(home, "m-0123456789"))
    finally:
        done.set()
    dropping.result()
    names.drop_names(home, "m-0123456789")
    assert not (home / "names").exists()
