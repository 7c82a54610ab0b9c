"""What is registered to be put right in forked children."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from managed_vllm import forks


def in_child(tell: Callable[[], str]) -> str:
    """What `tell` says in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, tell().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


class Counter:
    def __init__(self, calls: list[str], name: str) -> None:
        self.calls = calls
        self.name = name
        forks.call_in_child(self.after_fork)

    def after_fork(self) -> None:
        self.calls.append(self.name)


def test_functions_and_methods_run_in_the_child_in_the_order_of_their_registration() -> None:
    calls: list[str] = []
    first = Counter(calls, "first")
    forks.call_in_child(lambda: calls.append("second"))
    third = Counter(calls, "third")
    assert in_child(lambda: " ".join(calls)) == "first second third"
    assert calls == []
    assert (first.name, third.name) == ("first", "third")


def test_a_child_of_a_child_runs_them_too() -> None:
    calls: list[str] = []
    forks.call_in_child(lambda: calls.append("x"))
    assert in_child(lambda: in_child(lambda: " ".join(calls))) == "x x"


def test_registering_keeps_no_object_alive() -> None:
    calls: list[str] = []
    gone = Counter(calls, "gone")
    kept = Counter(calls, "kept")
    del gone
    gc.collect()
    assert in_child(lambda: " ".join(calls)) == "kept"
    assert kept.calls is calls


def test_one_that_fails_does_not_keep_the_next_from_running(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Counter):
        def after_fork(self) -> None:
            raise ValueError("no luck")

    calls: list[str] = []
    both = Failing(calls, "failing"), Counter(calls, "next")
    said = in_child(lambda: f"{calls} {caplog.text}")
    assert said.startswith("['next']")
    assert "ValueError: no luck" in said
    assert len(both) == 2


def test_objects_that_outlive_the_module_are_no_error_at_the_end_of_the_process() -> None:
    code = """
from managed_vllm import forks
class Late:
    def __init__(self): forks.call_in_child(self.after_fork)
    def after_fork(self): pass
import builtins
builtins.late = Late()
builtins.cycle = [builtins.late]
builtins.cycle.append(builtins.cycle)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
