"""What a run has done so far (`RunStats`), and what of it somebody who waits sees (`RunProgress`)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from managed_vllm.agent.types import FailureClass, StopReason, Trajectory
from managed_vllm.standard_error import StandardError

_EVERY_S = 10.0
"""Between the lines where standard error is no terminal."""


@dataclass
class RunStats:
    """What a run has done so far. Only the scheduler changes it.

    Attributes:
        started_at: of the monotonic clock.
        tasks: taken from the caller's iterable. tasks_known: of how many; None if it does not say.
        expected: rollouts of the tasks taken, those that the store had included.
        done: rollouts that ended for good, those that failed for good and those that the store had included.
        stored: those that the store had, or has got from other processes.
        failed: those that failed for good.
        running: episodes that run now.
        retried: attempts that failed and were tried again.
        steps, tokens: turns, and tokens of answers, of all attempts.
        rewards: how many trajectories have a reward, reward_sum: the sum of them.
        stop_reasons, failures: of attempts, by kind.
    """

    started_at: float = field(default_factory=time.monotonic)
    tasks: int = 0
    tasks_known: int | None = None
    expected: int = 0
    done: int = 0
    stored: int = 0
    failed: int = 0
    running: int = 0
    retried: int = 0
    steps: int = 0
    tokens: int = 0
    rewards: int = 0
    reward_sum: float = 0.0
    stop_reasons: Counter[StopReason] = field(default_factory=Counter)
    failures: Counter[FailureClass] = field(default_factory=Counter)

    def count_attempt(self, trajectory: Trajectory) -> None:
        """An attempt has ended."""
        self.steps += len(trajectory.steps)
        self.tokens += trajectory.response_tokens
        self.stop_reasons[trajectory.stop_reason] += 1
        if trajectory.failure is not None:
            self.failures[trajectory.failure.kind] += 1

    def count_rollout(self, trajectory: Trajectory) -> None:
        """A rollout has ended for good, with this attempt."""
        self.done += 1
        if trajectory.failure is not None:
            self.failed += 1
        if trajectory.reward is not None:
            self.rewards += 1
            self.reward_sum += trajectory.reward

    @property
    def mean_reward(self) -> float | None:
        """Over all trajectories of this run that have one."""
        return self.reward_sum / self.rewards if self.rewards else None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at


class RunProgress:
    """Shows a run's statistics on standard error while it is entered: one line that moves, or lines now and then.

    `show` is True (always), False (never) or None: only where standard error is a terminal.
    """

    def __init__(self, stats: RunStats, show: bool | None) -> None:
        self._stream: Any = StandardError()
        terminal = self._stream.isatty()
        self._stats = stats
        self._moving = terminal and show is not False
        self._lines = bool(show) and not terminal
        self._live: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunProgress:
        if self._moving:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                get_renderable=lambda: _bar(self._stats), console=Console(file=self._stream), refresh_per_second=4
            )
            self._live.start()
        elif self._lines:
            self._thread = threading.Thread(target=self._tell, name="managed-vllm-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
        if self._thread is not None:
            self._thread.join()
            self._print()

    def _tell(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._print()

    def _print(self) -> None:
        print(describe(self._stats), file=self._stream, flush=True)


def describe(stats: RunStats) -> str:
    """A run in a line: `rollouts 12/64, 8 running, 1 failed, reward 0.83, 3.2 steps/s, 41 tokens/s, ETA 0:40`."""
    took = max(1e-3, stats.elapsed_s)
    words = [f"rollouts {stats.done}/{_total(stats)}", f"{stats.running} running"]
    if stats.failed or stats.retried:
        words.append(f"{stats.failed} failed ({stats.retried} retried)")
    if stats.mean_reward is not None:
        words.append(f"reward {stats.mean_reward:.2f}")
    words.append(f"{stats.steps / took:.1f} steps/s")
    words.append(f"{stats.tokens / took:.0f} tokens/s")
    left = eta_s(stats)
    if left is not None:
        words.append(f"ETA {int(left) // 60}:{int(left) % 60:02}")
    return ", ".join(words)


def eta_s(stats: RunStats) -> float | None:
    """Seconds that are left, if the rest goes on like this; None as long as nothing can be said."""
    played = stats.done - stats.stored
    total = _expected(stats)
    if total is None or played <= 0:
        return None
    return (total - stats.done) * stats.elapsed_s / played


def _expected(stats: RunStats) -> int | None:
    """Rollouts in all, as far as it is known how many tasks there are."""
    if stats.tasks_known is None or not stats.tasks:
        return stats.expected if stats.tasks_known == stats.tasks else None
    return round(stats.expected * max(1.0, stats.tasks_known / stats.tasks))


def _total(stats: RunStats) -> str:
    total = _expected(stats)
    return f"{stats.expected}+" if total is None else str(total)


def _bar(stats: RunStats) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    total = _expected(stats)
    grid = Table.grid(padding=(0, 1))
    pulse = total is None
    bar = ProgressBar(total=total or 1, completed=stats.done, width=24, pulse=pulse, animation_time=time.monotonic())
    grid.add_row(bar, Text(describe(stats)))
    return grid
