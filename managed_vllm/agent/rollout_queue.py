"""The rollouts that are to be played: given out to workers one by one, until there will be none any more."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field

from managed_vllm.agent.types import Attempt, Task, Trajectory


@dataclass
class Job:
    """One rollout that is to be played, or is."""

    group: GroupState
    rollout: int
    attempt: int = 0
    tries: int = 0
    """In this run: what the store has of earlier ones does not count for `max_attempts`."""
    round: int = 0
    playing: asyncio.Task[Trajectory] | None = None
    unwanted: bool = False

    def cancel(self) -> None:
        """It is not wanted any more, and is ended if it is being played."""
        self.unwanted = True
        if self.playing is not None:
            self.playing.cancel()

    def as_attempt(self) -> Attempt:
        """What the episode is told of it."""
        return Attempt(self.group.task, self.rollout, self.attempt, self.round)

    def again(self) -> Job:
        """The same rollout, once more."""
        return Job(self.group, self.rollout, self.attempt + 1, self.tries + 1, self.round)


@dataclass
class GroupState:
    """The rollouts of a task while they are played."""

    task: Task
    n: int
    round: int = 0
    jobs: dict[int, Job] = field(default_factory=dict)
    """By number: to be played, or being played."""
    results: dict[int, Trajectory | None] = field(default_factory=dict)
    """By number, those that ended for good; None: the store has it, and it was not read."""
    attempts: Counter[int] = field(default_factory=Counter)
    """By number: how many attempts there have been in all, the store's included."""
    stored: set[int] = field(default_factory=set)
    settled: bool = False

    def missing(self) -> list[Job]:
        """Jobs for the rollouts that the group is to have and that nobody has begun, lowest numbers first."""
        made: list[Job] = []
        rollout = 0
        while len(self.results) + len(self.jobs) < self.n:
            if rollout not in self.results and rollout not in self.jobs:
                job = self.jobs[rollout] = Job(self, rollout, self.attempts[rollout], round=self.round)
                made.append(job)
            rollout += 1
        return made

    def resize(self, n: int) -> None:
        """More rollouts, or fewer: those that ended stay, and of the others the last ones are not wanted."""
        self.n = max(n, len(self.results))
        for rollout in sorted(self.jobs)[self.n - len(self.results) :]:
            self.jobs.pop(rollout).cancel()

    def cancel(self) -> None:
        """Nothing of it that has not ended is wanted any more."""
        for job in self.jobs.values():
            job.cancel()
        self.jobs.clear()

    def restart(self) -> None:
        """All of it is to be played once more, in the next round."""
        self.round += 1
        self.results.clear()
        self.stored.clear()

    def finished(self) -> list[Trajectory]:
        """What is known of the rollouts that ended for good, by number."""
        return [one for _, one in sorted(self.results.items()) if one is not None]

    @property
    def over(self) -> bool:
        """Whether all of its rollouts have ended for good."""
        return not self.jobs and len(self.results) >= self.n


class RolloutQueue:
    """Jobs, first in, first out. A worker that holds one counts as busy, since it may put others in.

    Args:
        room: how many may wait before `wait_for_room` holds the tasks back.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._pending: deque[Job] = deque()
        self._changed = asyncio.Condition()  # jobs were put in, or there will be none any more
        self._has_room = asyncio.Event()
        self._closed = False
        self._busy = 0
        self._timers: set[asyncio.TimerHandle] = set()
        self._putting: set[asyncio.Task[None]] = set()

    async def put(self, jobs: list[Job]) -> None:
        """Jobs for whoever takes them."""
        self._pending.extend(jobs)
        async with self._changed:
            self._changed.notify(len(jobs))

    async def wait_for_room(self) -> None:
        """Returns when fewer than `room` jobs wait."""
        while len(self._pending) >= self._room:
            self._has_room.clear()
            await self._has_room.wait()

    async def take(self) -> Job | None:
        """The next job, to be given back by `done`; None when there will be none any more."""
        async with self._changed:
            while True:
                while self._pending:
                    job = self._pending.popleft()
                    self._has_room.set()
                    if not job.unwanted:
                        self._busy += 1
                        return job
                if self._over:
                    self._changed.notify_all()
                    return None
                await self._changed.wait()

    async def done(self) -> None:
        """A job that was taken is over, and has put in what follows from it."""
        self._busy -= 1
        await self._wake_if_over()

    async def close(self) -> None:
        """No more tasks will come."""
        self._closed = True
        await self._wake_if_over()

    def put_later(self, job: Job, seconds: float, *, last: bool = False) -> None:
        """Puts the job in after a while, before all others or after them; until then it counts as busy, so that no
        worker goes."""
        self._busy += 1

        def due() -> None:
            self._timers.discard(timer)
            putting = asyncio.create_task(self._put_due(job, last))
            self._putting.add(putting)
            putting.add_done_callback(self._putting.discard)

        timer = asyncio.get_running_loop().call_later(seconds, due)
        self._timers.add(timer)

    @property
    def put_off(self) -> int:
        """How many are to come later."""
        return len(self._timers)

    def abandon(self) -> None:
        """Nothing that was to come later comes any more."""
        for timer in self._timers:
            timer.cancel()

    async def _put_due(self, job: Job, last: bool) -> None:
        async with self._changed:
            self._busy -= 1
            (self._pending.append if last else self._pending.appendleft)(job)
            self._changed.notify()

    @property
    def _over(self) -> bool:
        return self._closed and not self._busy and not self._pending

    async def _wake_if_over(self) -> None:
        if self._closed and not self._busy:
            async with self._changed:
                self._changed.notify_all()
