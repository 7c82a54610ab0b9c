"""A run in numbers: one `Row` an attempt, which of the attempts count, and the summary for the terminal.

An attempt counts if nothing failed in it, it was not cancelled, and no other one stands for its rollout: of a task only
the last round of its group counts, and in it the first attempt at a rollout that is `ok`. Where none is, the last one
stands for the rollout, and does not count. Means of rewards are taken over what counts and has a reward.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from managed_vllm.agent.types import FailureClass, StopReason, Trajectory
from managed_vllm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from managed_vllm.agent.attempt_log import AttemptEntry

SUCCESS_AT = 0.5
"""The reward from which on a rollout is a success, if nothing else is said. MiniWoB++ gives -1 and up to 1, OSWorld 0
to 1."""


@runtime_checkable
class Attempts(Protocol):
    """Where a run's attempts come from, a `RunStore` say."""

    def attempts(self) -> Iterable[Trajectory]:
        """All of them, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One attempt, without its steps.

    Attributes:
        task, kind: the task's id, and `Task.data["kind"]`; the id again where there is none.
        instruction: what the model was told to do.
        rollout, attempt, group_round, stop_reason, reward, started_at, duration_s, ok: as in `Trajectory`.
        failure: whose fault; None without a failure.
        failure_text: where and why it failed, in one line; empty without a failure.
        steps: their number.
        tokens: of all answers.
        stands: whether it is the one attempt that stands for its rollout.
    """

    task: str
    kind: str
    instruction: str
    rollout: int
    attempt: int
    group_round: int
    stop_reason: StopReason
    reward: float | None
    failure: FailureClass | None
    failure_text: str
    steps: int
    tokens: int
    started_at: float
    duration_s: float
    ok: bool
    stands: bool = True

    @classmethod
    def of(cls, trajectory: Trajectory) -> Row:
        """That of one attempt, as if there were no other at its rollout."""
        task, failure = trajectory.task, trajectory.failure
        kind = task.data.get("kind")
        return cls(
            task=task.id,
            kind=kind if isinstance(kind, str) and kind else task.id,
            instruction=trajectory.instruction or task.instruction,
            rollout=trajectory.rollout,
            attempt=trajectory.attempt,
            group_round=trajectory.group_round,
            stop_reason=trajectory.stop_reason,
            reward=trajectory.reward,
            failure=failure.kind if failure is not None else None,
            failure_text=str(failure) if failure is not None else "",
            steps=len(trajectory.steps),
            tokens=trajectory.response_tokens,
            started_at=trajectory.started_at,
            duration_s=trajectory.duration_s,
            ok=trajectory.ok,
        )

    @property
    def counts(self) -> bool:
        """Whether its reward counts."""
        return self.ok and self.stands


def entry_row(entry: AttemptEntry) -> Row:
    """That of an attempt that stands for its rollout, by the index alone: without its kind and its words."""
    return Row(
        task=entry.task_id,
        kind=entry.task_id,
        instruction="",
        rollout=entry.rollout,
        attempt=entry.attempt,
        group_round=entry.group_round,
        stop_reason=entry.stop_reason,
        reward=entry.reward,
        failure=entry.failure,
        failure_text="",
        steps=entry.steps,
        tokens=entry.response_tokens,
        started_at=entry.started_at,
        duration_s=entry.duration_s,
        ok=entry.ok,
    )


def rows(source: Attempts | Iterable[Trajectory | Row]) -> list[Row]:
    """One row an attempt, in the order of the source; `stands` says which ones stand for their rollouts."""
    given = source.attempts() if isinstance(source, Attempts) else source
    return who_stands([each if isinstance(each, Row) else Row.of(each) for each in given])


def who_stands(made: Sequence[Row]) -> list[Row]:
    """The same rows, with `stands` as the whole of them says."""
    last_round: dict[str, int] = {}
    for row in made:
        last_round[row.task] = max(row.group_round, last_round.get(row.task, 0))
    standing: dict[tuple[str, int], int] = {}
    for number, row in enumerate(made):
        if row.group_round == last_round[row.task]:
            before = standing.get((row.task, row.rollout))
            if before is None or not made[before].ok:
                standing[row.task, row.rollout] = number
    numbers = set(standing.values())
    return [dataclasses.replace(row, stands=number in numbers) for number, row in enumerate(made)]


def pass_at(groups: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """pass@k for k = 1, 2, 4, … over groups of (rollouts, successes): the mean of 1 - C(n-c, k) / C(n, k).

    Each over the groups that are large enough, up to the size of most of them: the last ones of a run that goes on are
    not complete yet.
    """
    sizes = Counter(n for n, _ in groups if n)
    most = max(sizes, key=lambda n: (sizes[n], n), default=0)
    ks = sorted({*(2**power for power in range(most.bit_length())), most} - {0})
    found = []
    for k in ks:
        enough = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in groups if n >= k]
        found.append((k, math.fsum(enough) / len(enough)))
    return found


def passes(made: Iterable[Row], success_at: float = SUCCESS_AT) -> list[tuple[int, float]]:
    """pass@k of a run: of its tasks, each with its rollouts that count and have a reward; see `pass_at`."""
    groups: dict[str, list[float]] = {}
    for row in made:
        if row.counts and row.reward is not None:
            groups.setdefault(row.task, []).append(row.reward)
    return pass_at([(len(its), sum(reward >= success_at for reward in its)) for its in groups.values()])


# -- the terminal ------------------------------------------------------------------------------------------------------


def summary_table(
    source: Attempts | Iterable[Trajectory | Row],
    *,
    by: Literal["task", "kind"] | Callable[[Row], str] = "kind",
    success_at: float = SUCCESS_AT,
    max_rows: int = 50,
    title: str | None = None,
) -> Table:
    """The run as a table for `rich.print`: rollouts, success, and means of reward, steps and tokens; failures by class.

    Args:
        source: a `RunStore`, or trajectories, or rows made of these before.
        by: what makes a line: the task's id, its kind (`Task.data["kind"]`), or what a function says of a `Row`.
        success_at: the reward from which on a rollout is a success.
        max_rows: lines; what is beyond them is one more line. The last line is the whole run.
        title: above it.

    Raises `ConfigError`: `by` or `max_rows` is none of these.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if max_rows < 1:
        raise ConfigError(f"max_rows must be 1 or more, not {max_rows}", field="max_rows")
    if callable(by):
        name, key = "", by
    elif by in ("task", "kind"):
        name, key = by, lambda row: str(getattr(row, by))
    else:
        raise ConfigError(f"by must be 'task', 'kind' or a function of a Row, not {by!r}", field="by")

    groups: dict[str, list[Row]] = {}
    everything = rows(source)
    for row in everything:
        groups.setdefault(key(row), []).append(row)
    lines = list(groups.items())
    if len(lines) > max_rows + 1:
        rest = [row for _, some in lines[max_rows:] for row in some]
        lines = [*lines[:max_rows], (f"… {len(lines) - max_rows} more", rest)]

    above = None if title is None else Text(printable(title))
    table = Table(title=above, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=len(groups) > 1)
    total = _cells(everything, success_at)
    heads = ("rollouts", "success", "reward", "steps", "tokens", "failures")
    table.add_column(name, footer="all", overflow="fold")
    for head, footer in zip(heads, total, strict=True):
        numeric = head != "failures"
        table.add_column(head, footer=footer, justify="right" if numeric else "left", no_wrap=numeric)
    for label, some in lines:
        table.add_row(Text(printable(label)), *_cells(some, success_at))
    return table


def _cells(some: list[Row], success_at: float) -> list[str]:
    counting = [row for row in some if row.counts]
    rollouts = len({(row.task, row.rollout) for row in some})
    rewards = [row.reward for row in counting if row.reward is not None]
    successes = sum(reward >= success_at for reward in rewards)
    failed = Counter(row.failure for row in some if row.failure is not None)
    told = [f"{failed[kind]} {kind}" for kind in FailureClass if failed[kind]]
    cancelled = sum(row.stop_reason is StopReason.CANCELLED and row.failure is None for row in some)
    if cancelled:
        told.append(f"{cancelled} cancelled")
    silent = len(counting) - len(rewards)
    if silent:
        told.append(f"{silent} without a reward")
    return [
        str(rollouts) if len(counting) == rollouts else f"{len(counting)} of {rollouts}",
        f"{successes / len(rewards):.1%}" if rewards else "–",
        f"{math.fsum(rewards) / len(rewards):.3f}" if rewards else "–",
        _mean([row.steps for row in counting]),
        _mean([row.tokens for row in counting]),
        ", ".join(told),
    ]


def _mean(values: list[int]) -> str:
    return f"{sum(values) / len(values):.1f}" if values else "–"


def printable(text: str) -> str:
    """A text from outside, for a terminal: control characters, which could do anything there, as Python writes them."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
