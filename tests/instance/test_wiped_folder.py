"""The state directory is removed under a running server: by a logout, a tmp cleaner, a user who tidies up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import INSTANT, assert_nothing_left, eventually, is_live, tree_below

from managed_vllm import ManagedVLLM
from managed_vllm.instance import directory, names
from managed_vllm.instance.directory import Instance


def server(**options: Any) -> ManagedVLLM:
    return ManagedVLLM("m", command=standin.command(), env=standin.orders(tree=True), keep_alive=INSTANT, **options)


def wipe(folder: Path) -> None:
    """Removes it in one moment: who looks meanwhile finds all of it, or nothing."""
    gone = folder.with_name("gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def test_a_supervisor_makes_its_folder_anew_and_stays_the_only_one(home: Path) -> None:
    with server(name="judge") as llm:
        pid = llm.status().server_pid
        assert llm.id is not None
        instance = Instance(home, llm.id)
        marker = instance.marker
        wipe(home)
        eventually(lambda: instance.socket_path.exists() and instance.record_path.exists(), "made anew")
        with server() as other, ManagedVLLM(name="judge", keep_alive=0) as named:
            assert other.status().server_pid == named.status().server_pid == pid
            assert not other.started_it
        assert instance.marker == marker  # the processes of the server carry this one
        eventually(lambda: names.named(home, "judge") == instance, "the name is its own again")


def test_a_pinned_server_is_not_forgotten(home: Path) -> None:
    with server() as llm:
        llm.pin()
    wipe(home)
    eventually(lambda: [i for i in directory.instances(home) if i.socket_path.exists()], "made anew")
    with ManagedVLLM(keep_alive=0) as again:
        assert again.status().pinned
        again.unpin()


def test_where_another_supervisor_was_faster_the_old_one_ends_and_its_users_go_over(home: Path) -> None:
    with server() as llm:
        old = llm.status()
        assert old.server_pid is not None
        assert old.supervisor_pid is not None
        processes = tree_below(old.supervisor_pid)
        os.kill(old.supervisor_pid, 19)  # SIGSTOP: it can't look while the next one comes up
        wipe(home)
        with server() as other:
            new = other.status()
            assert new.server_pid != old.server_pid
            assert is_live(psutil.Process(old.server_pid)), "nobody's server is killed for a folder that is gone"
            os.kill(old.supervisor_pid, 18)
            eventually(lambda: not any(is_live(process) for process in processes), "the old one ends")
            assert llm.generate("x", {"max_tokens": 2})[0].outputs[0].token_ids
            assert llm.status().server_pid == other.status().server_pid == new.server_pid


def test_a_server_on_a_socket_in_the_folder_gets_a_new_one(home: Path) -> None:
    with server(uds=True) as llm:
        epoch = llm.status().epoch
        wipe(home)
        llm.wait_ready(timeout=60, after_epoch=epoch)
        assert llm.generate("x", {"max_tokens": 2})[0].outputs[0].token_ids


@pytest.mark.parametrize("wiped", ["names", "instance.json", "server.log"])
def test_a_part_that_is_missing_does_no_harm(home: Path, wiped: str) -> None:
    with server(name="judge") as llm:
        assert llm.id is not None
        path = home / wiped if wiped == "names" else home / llm.id / wiped
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert llm.generate("x", {"max_tokens": 2})[0].outputs[0].token_ids
        with server() as other:
            assert other.status().server_pid == llm.status().server_pid


def test_a_server_that_crashes_where_its_folder_was_just_removed_is_started_in_a_new_one(home: Path) -> None:
    """Before the supervisor has looked: without the folder to run in, its program seems to be missing."""
    with server() as llm:
        assert llm.id is not None
        wipe(Instance(home, llm.id).folder)
        psutil.Process(llm.status().server_pid).kill()
        status = llm.wait_ready(60, after_epoch=1)
        assert Path(psutil.Process(status.server_pid).cwd()) == Instance(home, llm.id).folder
        assert llm.generate("hi")
    assert_nothing_left(home)  # whether the supervisor has looked by now, or not
