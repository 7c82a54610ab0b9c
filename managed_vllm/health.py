"""What the supervisor's checks of `/health` have shown, as a value: latencies, and how many were not answered."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the histogram's buckets; beyond the last there is one more."""


@dataclass(frozen=True)
class HealthChecks:
    """The checks of a server that was ready, of all epochs since the supervisor was started.

    Attributes:
        last_s: seconds that the last answered check took; None before the first one.
        total_s: of all that were answered.
        buckets: how many were answered within each of `BOUNDS_S` but not within the one before, and how many later.
        unanswered: how many got no answer in time, or no connection.
    """

    last_s: float | None = None
    total_s: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    unanswered: int = 0

    @property
    def answered(self) -> int:
        """How many were answered."""
        return sum(self.buckets)

    def counting(self, latency_s: float | None) -> HealthChecks:
        """With one more, answered after that many seconds; None: not answered."""
        if latency_s is None:
            return replace(self, unanswered=self.unanswered + 1)
        at = bisect.bisect_left(BOUNDS_S, latency_s)
        buckets = (*self.buckets[:at], self.buckets[at] + 1, *self.buckets[at + 1 :])
        return replace(self, last_s=latency_s, total_s=self.total_s + latency_s, buckets=buckets)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HealthChecks:
        """Back from plain JSON values. Buckets of another version count as none."""
        buckets = tuple(data.get("buckets", ()))
        if len(buckets) != len(BOUNDS_S) + 1:
            return cls(last_s=data.get("last_s"), unanswered=int(data.get("unanswered", 0)))
        return cls(data["last_s"], data["total_s"], buckets, data["unanswered"])
