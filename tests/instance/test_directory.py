"""A full disk, an unwritable directory, garbage records, stale sockets, reused pids: healed, or a clear error."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import HANG_S, INSTANT, eventually

from managed_vllm import ManagedVLLM
from managed_vllm.config import ServerSpec
from managed_vllm.errors import StateDirectoryError
from managed_vllm.in_server.managed_vllm_lifeline import start_time
from managed_vllm.instance import cleanup, directory
from managed_vllm.instance.directory import Instance
from managed_vllm.socket_paths import short_path


def server() -> ManagedVLLM:
    return ManagedVLLM("stand-in", command=standin.command(), keep_alive=INSTANT)


def instance_of(home: Path) -> Instance:
    """The folder that `server()` will use."""
    return Instance(home, ServerSpec.of("stand-in", engine_args={}, command=standin.command()).key)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"[]", b'{"id": "x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"id": 1, "spec": 2}'],
    ids=["empty", "text", "list", "torn", "binary", "deep", "foreign"],
)
def test_a_garbage_record_is_the_same_as_none(home: Path, content: bytes) -> None:
    directory.state_home()
    instance = instance_of(home)
    instance.create()
    instance.record_path.write_bytes(content)
    assert instance.read_record() is None
    with server() as llm:
        assert llm.generate("hi")
        assert instance.read_record() is not None


def test_a_folder_that_a_supervisor_removes_while_it_is_made_is_made_again(home: Path) -> None:
    directory.state_home()
    instance = instance_of(home)
    made = threading.Event()

    def remove() -> None:
        while not made.is_set():
            with contextlib.suppress(OSError):
                instance.folder.rmdir()
            time.sleep(rng.random() / 2000)  # at any moment of what the other does, but not at each one

    rng = random.Random(1)
    removing = threading.Thread(target=remove)
    removing.start()
    try:
        for _ in range(2000):
            instance.create()
    finally:
        made.set()
        removing.join()
    with contextlib.suppress(OSError):
        instance.folder.rmdir()


def test_a_record_that_is_a_link_or_a_pipe_is_not_read(home: Path) -> None:
    directory.state_home()
    instance = instance_of(home)
    instance.create()
    target = home / "target.json"
    target.write_text(json.dumps({"id": instance.id, "spec": {}, "pid": 1, "state": "ready", "epoch": 1}))
    instance.record_path.symlink_to(target)
    assert instance.read_record() is None
    instance.record_path.unlink()
    os.mkfifo(instance.record_path)
    assert instance.read_record() is None
    instance.record_path.unlink()
    target.unlink()
    instance.folder.rmdir()


def test_a_stale_socket_and_stale_locks_are_no_server(home: Path) -> None:
    directory.state_home()
    instance = instance_of(home)
    instance.create()
    with socket.socket(socket.AF_UNIX) as stale, short_path(instance.socket_path) as name:
        stale.bind(name)
    (instance.folder / "supervisor.lock").touch()
    (instance.folder / "start.lock").touch()
    assert not directory.is_alive(instance)
    with server() as llm:
        assert llm.generate("hi")


def test_the_start_lock_never_makes_a_folder_that_was_removed(home: Path) -> None:
    directory.state_home()
    instance = instance_of(home)
    with pytest.raises(FileNotFoundError), instance.start_lock(30):
        pass
    assert not instance.folder.exists()
    instance.create()
    with instance.start_lock(30):
        with pytest.raises(TimeoutError), instance.start_lock(0.05):
            pass
        (instance.folder / "start.lock").unlink()
        with instance.start_lock(30):  # the one that we hold is nobody's any more
            pass
    instance.remove_folder()
    assert not instance.folder.exists()


def test_a_folder_that_comes_and_goes_stays_closed_to_others(home: Path) -> None:
    directory.state_home()
    instance = instance_of(home)
    over = threading.Event()

    def remove() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), instance.start_lock(30):
                instance.remove_folder()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        removing = pool.submit(remove)
        try:
            for _ in range(500):
                instance.create()  # raises if it finds the folder open to others
                with contextlib.suppress(FileNotFoundError), instance.start_lock(30):
                    assert not instance.folder.stat().st_mode & 0o077
        finally:
            over.set()
        removing.result(30)
    instance.create()
    with instance.start_lock(30):
        instance.remove_folder()


def test_a_reused_pid_is_neither_attached_to_nor_touched(home: Path) -> None:
    directory.state_home()
    instance = instance_of(home)
    instance.create()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        record = {"spec": {}, "pid": stranger.pid, "state": "ready", "epoch": 1, "scratch": str(Path.home())}
        instance.write_record(record)
        with server() as llm:
            assert llm.status().supervisor_pid != stranger.pid
        eventually(lambda: not instance.folder.exists(), "the folder is gone")
        assert psutil.Process(stranger.pid).is_running()
        assert Path.home().exists()
        stranger.communicate(b"\n")


def test_a_scratch_folder_is_removed_only_if_it_is_one(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    cleanup.remove_scratch(precious)
    assert precious.exists()
    scratch = cleanup.make_scratch()
    cleanup.remove_scratch(scratch)
    assert not scratch.exists()


def test_a_predecessors_scratch_folder_and_processes_are_cleared(home: Path) -> None:
    with server() as llm:
        status = llm.status()
        instance = instance_of(home)
        record = instance.read_record()
        assert record is not None
        scratch = Path(record["scratch"])
        assert scratch.exists()
        assert status.supervisor_pid is not None
        pid = status.server_pid
        assert pid is not None
        os.kill(status.supervisor_pid, 9)
        # Until the kernel has ended it, the old server may still answer.
        eventually(lambda: start_time(pid) is None, "the old server is gone")
        assert llm.generate("hi")
        assert not scratch.exists()


def test_a_directory_open_to_others_is_refused(home: Path) -> None:
    home.mkdir(mode=0o755)
    with pytest.raises(StateDirectoryError, match="chmod 700"), server():
        pass
    home.rmdir()


def test_a_directory_that_is_a_link_or_a_file_is_refused(home: Path, tmp_path: Path) -> None:
    home.symlink_to(tmp_path)
    with pytest.raises(StateDirectoryError), server():
        pass
    home.unlink()
    home.write_text("")
    with pytest.raises(StateDirectoryError), server():
        pass
    home.unlink()


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user or mount a file system")


@needs_root
def test_a_directory_of_somebody_else_is_refused(home: Path) -> None:
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    with pytest.raises(StateDirectoryError, match="belongs to uid 65534"), server():
        pass
    home.rmdir()


@pytest.fixture
def tiny_disk(home: Path) -> Path:
    """`home` on a file system of its own with 64 KiB."""
    home.mkdir(mode=0o700)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(home)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"can't mount a small file system here: {done.stderr.strip()}")
    return home


@needs_root
def test_a_disk_without_room_for_a_folder_is_said(tiny_disk: Path) -> None:
    try:
        subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(tiny_disk)], check=True)
        with pytest.raises(StateDirectoryError, match="disk is full"), server():
            pass
    finally:
        subprocess.run(["umount", "-l", str(tiny_disk)], check=True)


@needs_root
def test_a_disk_that_fills_up_does_not_take_the_server_down(tiny_disk: Path) -> None:
    try:
        with server() as llm:
            with contextlib.suppress(OSError), open(tiny_disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(b"x" * 4096)
            assert llm.generate("hi")
            assert llm.restart(HANG_S).epoch == 2
            (tiny_disk / "filler").unlink()
        eventually(lambda: not directory.instances(tiny_disk), "gone")
    finally:
        subprocess.run(["umount", "-l", str(tiny_disk)], check=True)


@needs_root
def test_a_read_only_directory_is_said(tiny_disk: Path) -> None:
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
        with pytest.raises(StateDirectoryError, match="read-only"), server():
            pass
    finally:
        subprocess.run(["umount", "-l", str(tiny_disk)], check=True)


def test_a_long_state_directory_still_has_working_sockets(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    deep = home.parent / ("d" * 100) / "home"
    monkeypatch.setenv("MANAGED_VLLM_HOME", str(deep))
    with server() as llm:
        assert llm.generate("hi")
    eventually(lambda: not directory.instances(deep), "gone")


# -- what else may lie there -------------------------------------------------------------------------------------------


def test_a_users_own_folders_in_the_state_directory_are_no_instances(home: Path) -> None:
    directory.state_home()
    thesis = home / "thesis"
    looks_like_one = home / "thesis-0123456789"
    for folder in (thesis, looks_like_one):
        (folder / "chapters").mkdir(parents=True, mode=0o700)
        (folder / "chapters" / "1.tex").write_text("years")
    (thesis / "instance.json").write_text("{}")  # named as ours are, by chance
    assert directory.instances(home) == []
    for folder in (thesis, looks_like_one):
        Instance(home, folder.name).remove_folder()
    run = subprocess.run(
        [sys.executable, "-m", "managed_vllm.cli", "down", "--all"], capture_output=True, text=True, timeout=HANG_S
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for folder in (thesis, looks_like_one):
        assert (folder / "chapters" / "1.tex").read_text() == "years"
    shutil.rmtree(thesis)
    shutil.rmtree(looks_like_one)


def test_what_a_user_puts_into_an_instances_folder_stays(home: Path) -> None:
    instance = Instance(directory.state_home(), "m-0123456789")
    instance.create()
    lock = instance.take_supervisor_lock()
    assert lock is not None
    instance.hand_on_lock(lock)
    (instance.folder / "notes.txt").write_text("mine")
    instance.remove_folder()
    assert os.listdir(instance.folder) == ["notes.txt"]
    shutil.rmtree(instance.folder)


def test_lookers_do_not_take_each_other_for_a_supervisor(home: Path) -> None:
    instance = Instance(directory.state_home(), "m-0123456789")
    instance.create()
    lock = instance.take_supervisor_lock()
    assert lock is not None
    assert directory.is_alive(instance)
    instance.hand_on_lock(lock)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: directory.is_alive(instance), range(4000)))
        over = threading.Event()

        def look() -> None:
            while not over.is_set():
                directory.is_alive(instance)

        looking = [pool.submit(look) for _ in range(4)]
        try:  # nor do those who look keep a supervisor from starting
            instance.hand_on_lock(eventually(instance.take_supervisor_lock, "the lock is taken"))
        finally:
            over.set()
        concurrent.futures.wait(looking)
    instance.remove_folder()


def test_every_environment_of_a_user_finds_the_same_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell in a session, cron, ssh, `docker exec`: one server for all of them."""
    monkeypatch.delenv(directory.HOME_VARIABLE, raising=False)
    found = set()
    for runtime in (None, str(tmp_path), "/run/user/0"):
        for temporary in (None, str(tmp_path)):
            code = "from managed_vllm.instance import directory; print(directory._usual_home())"
            asked = {"XDG_RUNTIME_DIR": runtime, "TMPDIR": temporary}
            env = {**os.environ, **{name: value for name, value in asked.items() if value}}
            found.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout)
    assert found == {f"/tmp/managed-vllm-{os.getuid()}\n"}


def test_caches_that_are_read_as_code_are_ours_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = directory.cache_folder("torchinductor")
    assert folder == tmp_path / "cache" / "managed-vllm" / "torchinductor"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # somebody else could have put something in it
    assert directory.cache_folder("torchinductor") == home / "cache" / "torchinductor"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert directory.cache_folder("torchinductor") == home / "cache" / "torchinductor"
    shutil.rmtree(home / "cache")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_an_error_that_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StateDirectoryError, match="has no file locks"):
        ManagedVLLM("m", command=standin.command(), name="judge").start()
    instance = Instance(home, "m-0123456789")
    instance.create()
    (instance.folder / directory.SUPERVISOR_LOCK).touch()
    assert not directory.is_alive(instance)
    instance.remove_folder()
