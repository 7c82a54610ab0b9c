"""The monotonic clock of the test's process, which a test can move on: deadlines pass without anybody waiting."""

from __future__ import annotations

import time

import pytest


class Clock:
    """`time.monotonic`, and with it the clock of asyncio's loops, plus what the test has added.

    A loop that sleeps is not woken: move the clock on from within the loop, or before something else wakes it. Only
    for loops that end with the test: timers that were set by then would be late when the clock goes back.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead_s = 0.0
        real = time.monotonic
        patch.setattr(time, "monotonic", lambda: real() + self._ahead_s)

    def forward(self, seconds: float) -> None:
        self._ahead_s += seconds
