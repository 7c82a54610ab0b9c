"""A run as a table that is looked at page by page: filtered, sorted and summed up from the index of its attempts.

Only the rows of a page are read from the run's folder, for what the index has not: the instruction, and why an attempt
failed. A run that still grows is looked at anew once a second at most.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from managed_vllm.agent import trajectory_codec
from managed_vllm.agent.attempt_log import AttemptEntry, body_of
from managed_vllm.agent.attempt_logs import AttemptLogs
from managed_vllm.agent.report import entry_row, pass_at
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.viewer.record import TrajectoryRecord, number_record, row_record
from managed_vllm.errors import RunStoreError

T = TypeVar("T")

MOST_ROWS = 500
"""Of one page."""
_REFRESH_S = 1.0
_KEPT_QUERIES = 8
_MOST_BARS = 64
"""Rewards of a task that are drawn."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which attempts, and in which order.

    Attributes:
        text: words that must stand in the task's id, the stop reason or the failure's class; `"t-1"` in quotes is the
            whole of a task's id.
        stop, failure: a `StopReason`, a `FailureClass`; of the latter also `-`: none, and `+`: some. Empty: any.
        reward: `success`, `below` (that), `none`; empty: any.
        low, high: the least and the highest reward.
        stands: only the one attempt that stands for its rollout.
        sort: a column of `COLUMNS` or `TASK_COLUMNS`; empty: as recorded. down: the highest first.
    """

    text: str = ""
    stop: str = ""
    failure: str = ""
    reward: str = ""
    low: float | None = None
    high: float | None = None
    stands: bool = False
    sort: str = ""
    down: bool = False


COLUMNS: dict[str, Callable[[AttemptEntry], Any]] = {
    "task": lambda one: one.task_id,
    "rollout": lambda one: one.rollout,
    "attempt": lambda one: (one.group_round, one.attempt),
    "reward": lambda one: one.reward,
    "stop": lambda one: str(one.stop_reason),
    "failure": lambda one: None if one.failure is None else str(one.failure),
    "steps": lambda one: one.steps,
    "tokens": lambda one: one.response_tokens,
    "seconds": lambda one: one.duration_s,
    "started": lambda one: one.started_at,
}
TASK_COLUMNS = ("task", "rollouts", "success", "passn", "reward", "spread", "steps", "tokens", "failures", "change")


@dataclass(frozen=True, slots=True)
class Selected:
    """What a query has found: `numbers` of attempts, and what they come to."""

    version: int
    numbers: Sequence[int]
    summary: dict[str, Any]


class RunTable:
    """Thread-safe. The store stays the caller's to close.

    Args:
        store: the run, opened for reading.
        success_at: the reward from which on a rollout is a success.
        against: another run, with which the tasks of this one are compared; None: with none.
    """

    def __init__(self, store: RunStore, success_at: float, against: RunTable | None = None) -> None:
        self.store = store
        self.against = against
        self.success_at = success_at
        self._mutex = threading.RLock()
        self._lines = AttemptLogs(store.path)
        self._entries: list[AttemptEntry] = []
        self._stands: list[bool] = []
        self._looked = -math.inf
        self._found: OrderedDict[Query, Selected] = OrderedDict()
        self._tasks: tuple[Any, list[dict[str, Any]]] | None = None

    def close(self) -> None:
        with self._mutex:
            self._lines.close()

    @property
    def version(self) -> int:
        """Counts up with what has come. Looks for it, once a second at most."""
        with self._mutex:
            if time.monotonic() - self._looked > _REFRESH_S:
                self.store.refresh()
                entries = self.store.entries()
                if len(entries) != len(self._entries):
                    standing = {id(entry) for entry in self.store.counting()}
                    self._stands = [id(entry) in standing for entry in entries]
                self._entries = entries
                self._looked = time.monotonic()
            return len(self._entries)

    def overview(self) -> dict[str, Any]:
        """What the page needs to know of the run before it shows any row."""
        with self._mutex:
            self.version  # noqa: B018 - looks
            stops = Counter(str(one.stop_reason) for one in self._entries)
            failures = Counter(str(one.failure) for one in self._entries if one.failure is not None)
            return {
                "total": len(self._entries),
                "stops": stops.most_common(),
                "failures": failures.most_common(),
                "damaged": [str(each) for each in self.store.damaged],
            }

    def page(self, query: Query, offset: int, limit: int) -> dict[str, Any]:
        """Rows of what the query finds, with the sum of all of it."""
        with self._mutex:
            found = self._select(query)
            numbers = found.numbers[offset : offset + min(limit, MOST_ROWS)]
            return {
                "version": found.version,
                "total": len(self._entries),
                "length": len(found.numbers),
                "summary": found.summary,
                "offset": offset,
                "rows": [self._row(number) for number in numbers],
            }

    def find(self, query: Query, task: str, rollout: int, group_round: int, attempt: int) -> dict[str, Any] | None:
        """The row of an attempt, with its place in what the query finds (`at`); None without one."""
        with self._mutex:
            found = self._select(query)
            wanted = (task, rollout, group_round, attempt)
            for number, one in enumerate(self._entries):
                if (one.task_id, one.rollout, one.group_round, one.attempt) == wanted:
                    at = next((at for at, each in enumerate(found.numbers) if each == number), -1)
                    return {**self._row(number), "at": at}
            return None

    def trajectory(self, number: int) -> dict[str, Any] | None:
        """What a film strip shows; None without such an attempt. Raises `RunStoreError`: it is damaged."""
        with self._mutex:
            self.version  # noqa: B018 - looks
            if not 0 <= number < len(self._entries):
                return None
            entry = self._entries[number]
        value: dict[str, Any] = TrajectoryRecord(self.store.load(entry)).value
        return value

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _row(self, number: int) -> dict[str, Any]:
        one = self._entries[number]
        instruction, why = self._outline(one)
        row = dataclasses.replace(
            entry_row(one), instruction=instruction, failure_text=why, stands=self._stands[number]
        )
        return {**row_record(row), "number": number}

    def _outline(self, entry: AttemptEntry) -> tuple[str, str]:
        """Instruction, and why it failed."""
        try:
            return trajectory_codec.outline(body_of(self._lines.read_line(entry)))
        except (ValueError, RunStoreError):
            return "", "its record is damaged"

    # -- selecting -----------------------------------------------------------------------------------------------------

    def _select(self, query: Query) -> Selected:
        version = self.version
        found = self._found.pop(query, None)
        if found is None or found.version != version:
            chosen = [
                number for number, one in enumerate(self._entries) if self._fits(query, one, self._stands[number])
            ]
            if query.sort in COLUMNS:
                value = COLUMNS[query.sort]
                chosen = _in_order(chosen, lambda number: value(self._entries[number]), down=query.down)
            found = Selected(version, chosen, self._sum(chosen))
        self._found[query] = found
        if len(self._found) > _KEPT_QUERIES:
            self._found.popitem(last=False)
        return found

    def _fits(self, query: Query, one: AttemptEntry, stands: bool) -> bool:
        if query == _ALL:
            return True
        failure = "" if one.failure is None else str(one.failure)
        if query.stands and not stands:
            return False
        if query.stop and str(one.stop_reason) != query.stop:
            return False
        if query.failure and failure != {"-": "", "+": failure or None}.get(query.failure, query.failure):
            return False
        if not self._fits_reward(query, one.reward):
            return False
        return not query.text or _has_words(query.text, one, failure)

    def _fits_reward(self, query: Query, reward: float | None) -> bool:
        if query.reward == "none":
            return reward is None
        if not query.reward and query.low is None and query.high is None:
            return True
        if reward is None:
            return False
        if query.reward and (reward >= self.success_at) != (query.reward == "success"):
            return False
        return (query.low is None or reward >= query.low) and (query.high is None or reward <= query.high)

    def _sum(self, numbers: Iterable[int]) -> dict[str, Any]:
        """As the list's head shows it."""
        some = [(self._entries[number], self._stands[number]) for number in numbers]
        counting = [one for one, stands in some if one.ok and stands]
        rewards = [one.reward for one in counting if one.reward is not None]
        failures = Counter(_failure_of(one) for one, _ in some)
        failures.pop("", None)
        return {
            "attempts": len(some),
            "rollouts": len({one.key for one, _ in some}),
            "counting": len(counting),
            "rewarded": len(rewards),
            "successes": sum(reward >= self.success_at for reward in rewards),
            "reward": number_record(math.fsum(rewards) / len(rewards)) if rewards else None,
            "steps": sum(one.steps for one in counting) / len(counting) if counting else None,
            "tokens": sum(one.response_tokens for one, _ in some),
            "failures": failures.most_common(),
        }

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def tasks(self, query: Query, offset: int, limit: int) -> dict[str, Any]:
        """A row for each task of what the query finds: its group of rollouts, how far they spread, pass@k."""
        with self._mutex:
            version = self.version
            key = version, self.against and self.against.version, query
            if self._tasks is None or self._tasks[0] != key:
                rows = self.groups(query)
                if self.against is not None:
                    rows = _compared(rows, self.against.groups(Query()))
                if query.sort in TASK_COLUMNS:
                    rows = _in_order(rows, lambda row: row.get(query.sort), down=query.down)
                self._tasks = key, rows
            rows = self._tasks[1]
            others = [row["other"] for row in rows if row.get("other")]
            return {
                "version": version,
                "length": len(rows),
                "offset": offset,
                "passes": _passes([row for row in rows if row["other"]] if others else rows),
                "others": _passes(others),
                "common": len(others),
                "rows": rows[offset : offset + min(limit, MOST_ROWS)],
            }

    def groups(self, query: Query) -> list[dict[str, Any]]:
        """A row for each task of what the query finds, as they appeared."""
        with self._mutex:
            groups: dict[str, list[int]] = {}
            for number in self._select(dataclasses.replace(query, sort="", down=False)).numbers:
                groups.setdefault(self._entries[number].task_id, []).append(number)
            return [self._task(task, numbers) for task, numbers in groups.items()]

    def _task(self, task: str, numbers: list[int]) -> dict[str, Any]:
        some = [self._entries[number] for number in numbers]
        counting = sorted(
            (one for one, number in zip(some, numbers, strict=True) if one.ok and self._stands[number]),
            key=lambda one: one.rollout,
        )
        rewarded = [one for one in counting if one.reward is not None]
        rewards = [one.reward for one in rewarded if one.reward is not None]
        n, c = len(rewards), sum(reward >= self.success_at for reward in rewards)
        finite = [reward for reward in rewards if math.isfinite(reward)]
        mean = math.fsum(finite) / len(finite) if finite else None
        return {
            "task": task,
            "rollouts": len({one.rollout for one in some}),
            "counting": len(counting),
            "rewarded": n,
            "successes": c,
            "success": c / n if n else None,
            "passn": float(c > 0) if n else None,
            "reward": mean,
            "spread": None if mean is None else math.sqrt(sum((each - mean) ** 2 for each in finite) / len(finite)),
            "rewards": [number_record(reward) for reward in rewards[:_MOST_BARS]],
            "attempts": [(one.rollout, one.group_round, one.attempt) for one in rewarded[:_MOST_BARS]],
            "steps": sum(one.steps for one in counting) / len(counting) if counting else None,
            "tokens": sum(one.response_tokens for one in some),
            "failures": sum(one.failure is not None for one in some),
        }


def _compared(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with that of the same task in the other run (`other`), and by how much its mean reward changed."""
    by_task = {row["task"]: row for row in others}
    made = []
    for row in rows:
        other = by_task.get(row["task"])
        known = other is not None and other["reward"] is not None and row["reward"] is not None
        made.append({**row, "other": other, "change": row["reward"] - other["reward"] if known and other else None})
    return made


def _passes(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return pass_at([(row["rewarded"], row["successes"]) for row in rows])


_ALL = Query()


def _has_words(text: str, one: AttemptEntry, failure: str) -> bool:
    if len(text) > 2 and text[0] == text[-1] == '"':
        return one.task_id == text[1:-1]
    haystack = f"{one.task_id}\n{one.stop_reason}\n{failure}".lower()
    return all(word in haystack for word in text.lower().split())


def _failure_of(one: AttemptEntry) -> str:
    if one.failure is not None:
        return str(one.failure)
    return "cancelled" if one.stop_reason == "cancelled" else ""


def _in_order(some: list[T], value: Callable[[T], Any], *, down: bool) -> list[T]:
    """Sorted; what has no value comes last either way."""

    def none(found: Any) -> bool:
        return found is None or (isinstance(found, float) and math.isnan(found))

    known = [each for each in some if not none(value(each))]
    known.sort(key=value, reverse=down)
    return [*known, *(each for each in some if none(value(each)))]
