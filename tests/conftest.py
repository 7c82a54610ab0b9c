"""Fixtures of all tests: a state directory of a test's own, in which nothing may be left, and scripted servers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis_profiles import register_profiles
from moved_clock import Clock
from processes import own_state
from scripted_server import Act, Script

pytest_plugins = ["pytester", "browsing", "unhurried"]

register_profiles()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: the processes of the tests would inherit it, and Ctrl-C could not be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first; what is marked `soak` is left out, unless `-m` speaks of it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if "soak" in (config.option.markexpr or ""):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


@pytest.fixture
def home() -> Iterator[Path]:
    """A state directory of the test's own; at the end no process, socket, lock or folder may be left in it."""
    with own_state() as path:
        yield path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves on."""
    return Clock(monkeypatch)


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    """Makes servers that play a script."""
    made: list[Script] = []

    def make(*acts: Act) -> Script:
        made.append(Script(*acts))
        return made[-1]

    yield make
    for server in made:
        server.close()
