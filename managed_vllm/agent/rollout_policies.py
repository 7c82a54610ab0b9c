"""What becomes of rollouts that fail: of one (`RetryRollouts`), and of the group that it belongs to (`GroupPolicy`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from managed_vllm.agent.types import FailureClass
from managed_vllm.errors import ConfigError

_LONGEST_DELAY_S = 30.0


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
