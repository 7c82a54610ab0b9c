"""`rescore`: a run that was recorded is scored anew, by a reward function of the caller's own.

The run stays as it is. The score is kept beside its rewards, under a name (`scores`), and takes their place where it is
asked for: `RunStore.open(run, score=NAME)`, and so in summaries, the viewer and exports.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.blocking import blocking
from managed_vllm.agent.bounded import bounded
from managed_vllm.agent.rewards import WHAT, RewardFunction, name_of, score_of
from managed_vllm.agent.scores import ScoreWriter, key_of
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import Trajectory
from managed_vllm.errors import ConfigError, ManagedVLLMError, RunStoreError, ScoringFailedError

_FIRST = 10
"""Failures that a report names."""


@dataclass(frozen=True, slots=True)
class RescoreReport:
    """What a rescoring came to.

    Attributes:
        path: the score's file.
        name: of the score.
        scored: attempts that were scored now.
        kept: attempts that the same function had scored before.
        failed: attempts for which the function raised, or took too long. They have no score, and are scored again by
            the next call.
        failures: the first of these: which attempt, and what was raised.
        left_out: attempts that nobody scores, as they failed or were cancelled; and damaged ones.
    """

    path: Path
    name: str
    scored: int
    kept: int
    failed: int
    failures: tuple[str, ...]
    left_out: int


def rescore(
    store: RunStore,
    reward: RewardFunction,
    *,
    name: str | None = None,
    overwrite: bool = False,
    max_concurrency: int = 8,
    timeout_s: float = 600.0,
    stop_after_failures: int | None = 20,
    on_scored: Callable[[int, int], None] | None = None,
) -> RescoreReport:
    """Scores each attempt of a run that is `ok`, and keeps the scores in the run's folder under a name.

    Neither the attempts nor other scores are changed. The new score is there when all of it is; a process that is
    killed before leaves the former one, and the next call goes on where it ended. A run that has grown is scored by
    another call: what the same function has scored is kept. "The same" means its name and its source file (in
    a notebook, its code); what that imports is not looked at, `overwrite=True` scores all of it again.

    Args:
        store: the run, open to read or to write.
        reward: called with each trajectory; see `rewards`. Trajectories are read one by one.
        name: of the score; None: the function's own name.
        overwrite: replace a score of that name, by whatever function.
        max_concurrency: trajectories at once, where the function is a coroutine function. Another one is called in the
            caller's thread, one by one.
        timeout_s: seconds for each call of a coroutine function.
        stop_after_failures: so many calls in a row that raise end it; None: never.
        on_scored: called with the number of attempts that are done, and that of all.

    Raises `ScoringFailedError` (`stop_after_failures`). `ConfigError`: there is a score of that name by another
    function, or no such name may be. `RunStoreError`: another process makes it; the disk is full or read-only.
    """
    if max_concurrency < 1:
        raise ConfigError(f"max_concurrency must be 1 or more, not {max_concurrency}", field="max_concurrency")
    named = name_of(reward)
    name = named.rpartition(":")[2].rpartition(".")[2] if name is None else name
    with ScoreWriter(store.path, name, named, _source_of(reward), overwrite=overwrite) as writer:
        entries = store.entries()
        wanted = [entry for entry in entries if entry.ok]
        missing = [entry for entry in wanted if key_of(entry) not in writer.known]
        scoring = _Scoring(store, reward, writer, missing, timeout_s, stop_after_failures, on_scored)
        at_once = max_concurrency if _is_asynchronous(reward) else 1
        blocking(lambda: scoring.run(at_once))
        writer.finish()
    return RescoreReport(
        path=writer.path,
        name=name,
        scored=scoring.scored,
        kept=len(wanted) - len(missing),
        failed=scoring.failed,
        failures=tuple(scoring.failures),
        left_out=len(entries) - len(wanted) + scoring.damaged,
    )


class _Scoring:
    """One pass over the attempts that have no score yet."""

    def __init__(
        self,
        store: RunStore,
        reward: RewardFunction,
        writer: ScoreWriter,
        missing: list[AttemptEntry],
        timeout_s: float,
        stop_after: int | None,
        on_scored: Callable[[int, int], None] | None,
    ) -> None:
        self.scored = self.failed = self.damaged = 0
        self.failures: list[str] = []
        self._store = store
        self._reward = reward
        self._writer = writer
        self._missing = missing
        self._timeout_s = timeout_s
        self._stop_after = stop_after
        self._on_scored = on_scored
        self._in_a_row = 0

    async def run(self, max_concurrency: int) -> None:
        entries = iter(self._missing)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(max_concurrency, len(self._missing))):
                    group.create_task(self._work(entries))
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__

    async def _work(self, entries: Iterator[AttemptEntry]) -> None:
        """Attempts one after the other; `entries` is shared with the other workers."""
        for entry in entries:
            trajectory = self._loaded(entry)
            if trajectory is not None:
                await self._score(entry, trajectory)
            if self._on_scored is not None:
                self._on_scored(self.scored + self.failed + self.damaged, len(self._missing))
            await asyncio.sleep(0)  # for Ctrl-C, where the function awaits nothing

    def _loaded(self, entry: AttemptEntry) -> Trajectory | None:
        try:
            return self._store.load(entry)
        except RunStoreError:
            if entry in self._store.entries():
                raise  # not damaged: the store is closed, say
            self.damaged += 1
            return None

    async def _score(self, entry: AttemptEntry, trajectory: Trajectory) -> None:
        try:
            score = await bounded(lambda: score_of(self._reward, trajectory), self._timeout_s, WHAT)
        except Exception as error:
            self._raised(entry, error)
            return
        self._writer.add(entry, score)
        self.scored += 1
        self._in_a_row = 0

    def _raised(self, entry: AttemptEntry, error: Exception) -> None:
        self.failed += 1
        self._in_a_row += 1
        told = error.message if isinstance(error, ManagedVLLMError) else str(error)
        why = f"{type(error).__name__}: {told}"[:1000]
        self._writer.add(entry, None, why)
        said = f"{entry.task_id}, rollout {entry.rollout}, attempt {entry.attempt}: {why}"
        if len(self.failures) < _FIRST:
            self.failures.append(said)
        if self._stop_after is not None and self._in_a_row >= self._stop_after:
            raise ScoringFailedError(
                f"{WHAT} has raised {self._in_a_row} times in a row, so scoring ends here: {said}. What was scored "
                "before is kept for the next call; the run and its scores are as they were",
                count=self._in_a_row,
                last=said,
            ) from error


def _is_asynchronous(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _source_of(function: RewardFunction) -> str:
    """Tells one state of the function's source from another: its file, or its code where there is none (a notebook)."""
    plain = inspect.unwrap(function) if inspect.isroutine(function) else type(function)
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(plain) or "").read_bytes()).hexdigest()
    except (TypeError, OSError):
        code = getattr(plain, "__code__", None)
        return "" if code is None else hashlib.sha256(repr(_parts_of(code)).encode()).hexdigest()


def _parts_of(code: CodeType) -> tuple[object, ...]:
    """What a function does, without the place where it was written."""
    constants = [_parts_of(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    return code.co_code, code.co_names, constants
