"""What a user sees while waiting for a server: on a terminal one line that is updated, elsewhere a line per stage."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any

from managed_vllm.standard_error import StandardError
from managed_vllm.status import ServerState, ServerStatus

log = logging.getLogger("managed_vllm")


class StartupProgress:
    """Shows stage, detail and elapsed seconds on standard error while it is entered.

    `show` is True (always), False (never) or None: only if standard error is a terminal. Each change of stage also goes
    to the logger `managed_vllm`.
    """

    def __init__(self, title: str, show: bool | None) -> None:
        self._stream: Any = StandardError()
        terminal = self._stream.isatty()
        self._title = title
        self._lines = bool(show) and not terminal
        self._moving = terminal and show is not False
        self._started = time.monotonic()
        self._live: Any = None
        self._last = ""
        self._lock = threading.Lock()

    def update(self, status: ServerStatus) -> None:
        """Takes the newest status; may be called from any thread."""
        text = describe(status)
        with self._lock:
            if text == self._last:
                return
            self._last = text
            elapsed = time.monotonic() - self._started
            log.info("%s: %s (%.1f s)", self._title, text, elapsed)
            if self._lines:
                print(f"[{elapsed:5.1f} s] {self._title}: {text}", file=self._stream, flush=True)
            elif self._moving and status.state in (ServerState.STARTING, ServerState.RESTARTING):
                self._show(text)

    def _show(self, text: str) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._live.start()
            self._live.add_task("")
        self._live.update(self._live.task_ids[0], description=f"{self._title}: {text}")

    def __enter__(self) -> StartupProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None


def describe(status: ServerStatus) -> str:
    """A status in a few words: `starting, loading (3/12 shards)`."""
    words = str(status.state)
    if status.state in (ServerState.STARTING, ServerState.RESTARTING) and status.stage:
        words += f", {status.stage.replace('_', ' ')}"
    return f"{words} ({status.detail})" if status.detail else words
