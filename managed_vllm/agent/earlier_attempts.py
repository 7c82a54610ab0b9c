"""What a run's store has of earlier runs: the finished rollouts, the attempts so far, and the rounds of the groups."""

from __future__ import annotations

from collections import Counter

from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.made_of import described, task_digest
from managed_vllm.agent.rollout_queue import GroupState
from managed_vllm.agent.run_folder import differences
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import Task, Trajectory
from managed_vllm.errors import RunStoreError


class EarlierAttempts:
    """Read once, when a run begins; without a store there are none."""

    def __init__(self, store: RunStore | None) -> None:
        self._store = store
        self._finished: dict[str, dict[int, AttemptEntry]] = {}
        self._attempts: dict[str, Counter[int]] = {}
        self._rounds: dict[str, int] = {}
        self._of_task: dict[str, AttemptEntry] = {}
        if store is None:
            return
        for entry in store.entries():
            self._attempts.setdefault(entry.task_id, Counter())[entry.rollout] += 1
            self._of_task[entry.task_id] = entry
            self._rounds[entry.task_id] = max(entry.group_round, self._rounds.get(entry.task_id, 0))
        for entry in store.counting():
            if entry.ok:
                self._finished.setdefault(entry.task_id, {})[entry.rollout] = entry

    def fill(self, group: GroupState, *, all_of_them: bool) -> None:
        """The group as the earlier runs left it; `all_of_them`: also rollouts beyond its `n`.

        Raises `RunStoreError`: the store has attempts at another task with this id.
        """
        task_id = group.task.id
        self._check(group.task)
        group.stored = {number for number in self._finished.get(task_id, ()) if all_of_them or number < group.n}
        group.results.update(dict.fromkeys(group.stored))
        group.attempts.update(self._attempts.get(task_id, ()))
        group.round = self._rounds.get(task_id, 0)

    def _check(self, task: Task) -> None:
        entry = self._of_task.get(task.id)
        if self._store is None or self._store.force or entry is None or not entry.task_digest:
            return
        if entry.task_digest != task_digest(task):
            before = self._store.load(entry).task
            has, asked = (
                {"instruction": each.instruction, "seed": each.seed, "data": each.data} for each in (before, task)
            )
            raise RunStoreError(
                f"task {task.id!r} is another one than {self._store.path} has attempts at; give it another id or the "
                "run another folder, or force it (force=True, --force): its finished rollouts then stay\n"
                + "\n".join(differences(described(has), described(asked))),
                path=str(self._store.path),
            )

    def read(self, group: GroupState) -> dict[int, Trajectory]:
        """The finished trajectories of a group."""
        assert self._store is not None
        entries = self._finished[group.task.id]
        return {number: self._store.load(entries[number]) for number in sorted(group.stored)}
