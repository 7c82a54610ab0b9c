"""What a run's store has of earlier runs: the finished rollouts, the attempts so far, and the rounds of the groups."""

from __future__ import annotations

from collections import Counter

from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.rollout_queue import GroupState
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import Trajectory


class EarlierAttempts:
    """Read once, when a run begins; without a store there are none."""

    def __init__(self, store: RunStore | None) -> None:
        self._store = store
        self._finished: dict[str, dict[int, AttemptEntry]] = {}
        self._attempts: dict[str, Counter[int]] = {}
        self._rounds: dict[str, int] = {}
        if store is None:
            return
        for entry in store.entries():
            self._attempts.setdefault(entry.task_id, Counter())[entry.rollout] += 1
            self._rounds[entry.task_id] = max(entry.group_round, self._rounds.get(entry.task_id, 0))
        for entry in store.counting():
            if entry.ok:
                self._finished.setdefault(entry.task_id, {})[entry.rollout] = entry

    def fill(self, group: GroupState, *, all_of_them: bool) -> None:
        """The group as the earlier runs left it; `all_of_them`: also rollouts beyond its `n`."""
        task_id = group.task.id
        group.stored = {number for number in self._finished.get(task_id, ()) if all_of_them or number < group.n}
        group.results.update(dict.fromkeys(group.stored))
        group.attempts.update(self._attempts.get(task_id, ()))
        group.round = self._rounds.get(task_id, 0)

    def read(self, group: GroupState) -> dict[int, Trajectory]:
        """The finished trajectories of a group."""
        assert self._store is not None
        entries = self._finished[group.task.id]
        return {number: self._store.load(entries[number]) for number in sorted(group.stored)}
