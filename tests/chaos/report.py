"""What came out of a run, and of many runs together."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recovery:
    """Seconds from a strike to the first answer to a request that began after it, or was sent again."""

    kind: str
    seconds: float
    seed: int


@dataclass
class Outcome:
    """One run. `failed` counts typed errors by their class; `broken` must be empty."""

    requests: int = 0
    answered: int = 0
    retries: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    took_s: float = 0.0

    def fail(self, kind: str, example: str) -> None:
        self.failed[kind] += 1
        self.examples.setdefault(kind, example)


def summary(outcomes: Sequence[Outcome], took_s: float) -> str:
    """The report at the end."""
    struck: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    examples: dict[str, str] = {}
    recoveries: list[Recovery] = []
    for outcome in outcomes:
        struck += outcome.struck
        failed += outcome.failed
        missed += Counter(outcome.missed)
        examples = {**outcome.examples, **examples}
        recoveries += outcome.recoveries
    median_s = statistics.median(outcome.took_s for outcome in outcomes)
    lines = [
        "",
        f"runs                {len(outcomes)} in {took_s:.0f} s, {median_s:.1f} s each (median)",
        f"requests            {sum(o.requests for o in outcomes)}",
        f"answered            {sum(o.answered for o in outcomes)}, sent again {sum(o.retries for o in outcomes)} times",
        f"typed failures      {sum(failed.values())}",
        *(f"    {count:5d} {kind}\n          e.g. {examples[kind]}" for kind, count in failed.most_common()),
        f"faults met          {sum(struck.values())}: "
        + ", ".join(f"{kind} {count}" for kind, count in sorted(struck.items())),
        "victim not there    " + (", ".join(f"{kind} {count}" for kind, count in sorted(missed.items())) or "0"),
    ]
    if recoveries:
        worst = max(recoveries, key=lambda recovery: recovery.seconds)
        middle = statistics.median(recovery.seconds for recovery in recoveries)
        lines.append(
            f"recovery            median {middle:.2f} s, worst {worst.seconds:.2f} s ({worst.kind}, seed {worst.seed})"
        )
        for kind in sorted({recovery.kind for recovery in recoveries}):
            found = [recovery.seconds for recovery in recoveries if recovery.kind == kind]
            lines.append(f"    {kind:20s}{statistics.median(found):6.2f} {max(found):6.2f}")
    lines.append(f"broken invariants   {sum(len(o.broken) - 1 for o in outcomes if o.broken)}")
    return "\n".join(lines)
