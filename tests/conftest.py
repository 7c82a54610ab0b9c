"""Fixtures of all tests: a state directory for each test, and the check that nothing is left in it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import assert_nothing_left, end_everything

pytest_plugins = ["pytester"]


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell: the processes of the tests would inherit it, and Ctrl-C could not be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_REDIRECTING = (
    "VLLM_SERVER_URL",
    "VLLM_MODEL_NAME",
    "VLLM_API_KEY",
    "MANAGED_VLLM_ATTACH",
    "MANAGED_VLLM_KEEP_ALIVE",
)


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
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of the test's own; at the end no process, socket, lock or folder may be left in it."""
    with tempfile.TemporaryDirectory(prefix="mvt-") as folder:
        path = Path(folder) / "home"
        monkeypatch.setenv("MANAGED_VLLM_HOME", str(path))
        for name in _REDIRECTING:
            monkeypatch.delenv(name, raising=False)
        try:
            yield path
            assert_nothing_left(path)
        finally:
            if path.exists():
                end_everything(path)
