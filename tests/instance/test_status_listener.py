"""The user's function is called for each change of state."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import standin
from processes import HANG_S, INSTANT, eventually, left_of

from managed_vllm import ManagedVLLM
from managed_vllm.instance.status_listener import StatusListener
from managed_vllm.status import ServerState, ServerStatus

STARTING = ServerStatus(state=ServerState.STARTING, epoch=1)
READY = ServerStatus(state=ServerState.READY, epoch=1)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "managed-vllm-status"]


def test_each_change_is_told_once_and_in_order(caplog: pytest.LogCaptureFixture) -> None:
    told: list[ServerStatus] = []

    def function(status: ServerStatus) -> None:
        told.append(status)
        if status is READY:
            raise ValueError("the user's own fault")

    listener = StatusListener(function)
    again = ServerStatus(state=ServerState.READY, epoch=2)
    for status in (STARTING, STARTING, READY, READY, again):
        listener.put(status)
    eventually(lambda: len(told) == 3, "told")
    assert told == [STARTING, READY, again]
    assert "the user's own fault" in caplog.text


def test_a_function_that_wants_to_exit_is_called_again(caplog: pytest.LogCaptureFixture) -> None:
    told: list[ServerStatus] = []

    def function(status: ServerStatus) -> None:
        told.append(status)
        raise SystemExit(1)

    listener = StatusListener(function)
    listener.put(STARTING)
    listener.put(READY)
    eventually(lambda: told == [STARTING, READY], "told")
    assert "on_status failed" in caplog.text


def test_a_handle_whose_owner_listens_by_a_method_gives_its_lease_back_with_its_owner(home: Path) -> None:
    class Owner:
        def __init__(self) -> None:
            command, env = standin.command(), standin.orders()
            self.told: list[ServerState] = []
            self.llm = ManagedVLLM("m", command=command, env=env, keep_alive=INSTANT, on_status=self.listen)

        def listen(self, status: ServerStatus) -> None:
            self.told.append(status.state)

    owner = Owner()
    told = owner.told
    owner.llm.start()
    eventually(lambda: ServerState.READY in told, "told")
    del owner

    def is_gone() -> bool:
        gc.collect()  # it is a cycle, of which the listener's thread may still have been holding a part
        return not left_of(home)

    eventually(is_gone, "the lease is given back")


def test_its_thread_starts_with_the_first_call_and_ends_with_the_listener() -> None:
    before = set(threads())  # of other tests
    called_in: list[threading.Thread] = []
    listener = StatusListener(lambda status: called_in.append(threading.current_thread()))
    assert set(threads()) <= before
    listener.put(READY)
    [thread] = eventually(lambda: called_in, "called")
    assert (thread in before, thread.name) == (False, "managed-vllm-status")
    del listener
    gc.collect()
    thread.join(HANG_S)
    assert not thread.is_alive()


def test_a_forked_child_has_a_thread_of_its_own() -> None:
    reading, writing = os.pipe()
    listener = StatusListener(lambda status: os.close(writing) if os.write(writing, status.state.encode()) else None)
    child = os.fork()
    if child == 0:
        try:
            listener.put(READY)
            threading.Event().wait(HANG_S)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "ready"
    os.kill(child, 9)
    os.waitpid(child, 0)
