"""What becomes of rollouts that fail: `RetryRollouts`; of their group: `GroupPolicy`; of the run: `FailuresAlike`."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from managed_vllm.agent.types import Failure, FailureClass, Trajectory
from managed_vllm.errors import ConfigError, RolloutsFailedError

_LONGEST_DELAY_S = 30.0
_NUMBER = re.compile(r"[0-9a-fx.]*\d[0-9a-fx.]*")
"""Addresses, times, places: they differ between failures that are alike."""


class GroupPolicy(enum.StrEnum):
    """What becomes of a group when one of its rollouts has failed for good."""

    KEEP = "keep"
    """It stays, with a gap: the failed one is there, without a reward."""

    DROP = "drop"
    """All of it is dropped; what still runs is cancelled."""

    REPEAT = "repeat"
    """All of it is played again, up to `RetryRollouts.max_rounds` times in all, then dropped."""


@dataclass(frozen=True, slots=True)
class RetryRollouts:
    """What is tried again.

    Attributes:
        max_attempts: at one rollout, the first included.
        retried: whose failures are worth another attempt. The caller's own code is not: it would fail again.
        delay_s: before the second attempt; twice as long before each further one, up to 30 s.
        max_rounds: of a whole group, with `GroupPolicy.REPEAT`.
    """

    max_attempts: int = 3
    retried: frozenset[FailureClass] = frozenset(
        {FailureClass.ENVIRONMENT, FailureClass.MODEL_SERVER, FailureClass.PARSER}
    )
    delay_s: float = 0.5
    max_rounds: int = 2

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.max_rounds < 1 or self.delay_s < 0:
            raise ConfigError("max_attempts and max_rounds must be 1 or more, delay_s not negative")

    def delay_before_s(self, tries: int) -> float:
        """Seconds before another attempt at a rollout, after so many tries before the one that just failed."""
        return min(_LONGEST_DELAY_S, self.delay_s * 2.0**tries)


class FailuresAlike:
    """Counts attempts in a row that fail the same way. `most` None: any number may."""

    def __init__(self, most: int | None, environments: int) -> None:
        self._most = None if most is None else max(most, 2 * environments)
        self._last: Failure | None = None
        self._count = 0

    def count(self, trajectory: Trajectory) -> None:
        """One more attempt; those that were cancelled say nothing."""
        failure = trajectory.failure
        if failure is None:
            if trajectory.ok:
                self._count = 0
            return
        self._count = self._count + 1 if self._last is not None and _kind(self._last) == _kind(failure) else 1
        self._last = failure

    def check(self) -> None:
        """Raises `RolloutsFailedError`: they were too many."""
        if self._most is not None and self._count >= self._most and self._last is not None:
            raise RolloutsFailedError(
                f"{self._count} attempts in a row have failed the same way, so the run ends here: {self._last}. What "
                "had finished stays; the same run goes on once this is mended. stop_after_failures=None never ends it",
                count=self._count,
                last=str(self._last),
            )


def _kind(failure: Failure) -> tuple[str, ...]:
    """What two failures have in common that are alike: all but numbers, and the step."""
    return (
        failure.kind,
        failure.stage,
        failure.error_type,
        re.sub(r"[0-9a-fx.]*\d[0-9a-fx.]*", "#", failure.message)[:200],
    )
