"""One run of the scheduler: its workers, what they play, and what waits for the consumer.

`RunPlan` says what is to be done and is never changed. `Run` does it once: it takes the caller's tasks in as there is
room, its workers play rollouts and keep how they ended, and the results wait in a queue of bounded length.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from managed_vllm.agent.bounded import bounded
from managed_vllm.agent.claims import Claim
from managed_vllm.agent.earlier_attempts import EarlierAttempts
from managed_vllm.agent.environment import Environment
from managed_vllm.agent.episode import Episode
from managed_vllm.agent.rollout_policies import FailuresAlike, GroupPolicy, RetryRollouts
from managed_vllm.agent.rollout_queue import GroupState, Job, RolloutQueue
from managed_vllm.agent.rules import Rules
from managed_vllm.agent.run_progress import RunStats
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.tasks import Tasks, each_task
from managed_vllm.agent.types import Attempt, Failure, FailureClass, Group, StopReason, Task, Trajectory
from managed_vllm.errors import ConfigError, ManagedVLLMError

log = logging.getLogger("managed_vllm.agent")

MakeEnvironment = Callable[[], Environment | Awaitable[Environment]]

_GRACE_S = 40.0
"""On top of the environments' own limit for closing, when a run is stopped: for calls that do not heed cancellation,
and for the `patience_s` of environments."""

_LOOK_AGAIN_S = 0.5
"""Until a rollout is looked at again that another process of the same run plays."""
_LOOKS_PER_S = 100.0
"""At most, at all of these: each costs a few questions to a file system that may be far away. With thousands of them
nothing else would be done, and no file server would bear a hundred processes that do so."""
_SLOW_LOOK_S, _SLOW_LOOKS_S = 0.1, 60.0
"""What one look counts for at most, as something else may have held it up; and for how long slow ones put one off."""

_HARMLESS = frozenset({FailureClass.MODEL_SERVER, FailureClass.PARSER})
"""Failures after which the environment is as good as before."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run is to do: the arguments of `StreamingTaskScheduler`, checked.

    `on_group` is called when a group is complete or dropped, with its task, the numbers of its rollouts, and whether it
    is dropped.
    """

    rules: Rules
    make_environment: MakeEnvironment
    n: int
    max_concurrency: int
    retry: RetryRollouts
    group_policy: GroupPolicy
    decide_n: Callable[[Task, Sequence[Trajectory]], int] | None
    store: RunStore | None
    on_attempt: Callable[[Trajectory], None] | None
    max_ahead: int
    reuse_environments: bool
    stop_after_failures: int | None = None
    on_group: Callable[[Task, Sequence[int], bool], None] | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_concurrency < 1 or self.max_ahead < 1:
            raise ConfigError("n, max_concurrency and max_ahead must be 1 or more")
        if self.stop_after_failures is not None and self.stop_after_failures < 1:
            raise ConfigError("stop_after_failures must be 1 or more, or None", field="stop_after_failures")
        if not callable(self.make_environment):
            raise ConfigError("make_environment must be a function that makes an environment", field="make_environment")
        if self.joined and (self.group_policy is not GroupPolicy.KEEP or self.decide_n is not None):
            raise ConfigError(
                "of a run with several writers (RunStore.join) no process plays whole groups: group= must be 'keep', "
                "and decide_n= can't be given",
                field="group" if self.decide_n is None else "decide_n",
            )

    @property
    def joined(self) -> bool:
        """Whether others write into the same run."""
        return self.store is not None and self.store.claims is not None

    def wanted_n(self, group: GroupState) -> int:
        """How many rollouts a group is to have, as `decide_n` says. Raises what that raises."""
        if self.decide_n is None:
            return group.n
        n: Any = self.decide_n(group.task, group.finished())
        if not isinstance(n, int) or n < 0:
            raise ConfigError(f"decide_n must return a number of rollouts, not {n!r}", field="decide_n")
        return int(n)


@dataclass(frozen=True, slots=True)
class GroupEnd:
    """A group that is complete, or dropped; `stored` are those of its rollouts that the store had."""

    group: Group
    stored: frozenset[tuple[str, int]]


class Run:
    """One iteration over the tasks. `whole`: groups come out, with what the store has of them."""

    def __init__(self, plan: RunPlan, stats: RunStats, tasks: Tasks, *, whole: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self._plan = plan
        self._stats = stats
        self._tasks = tasks
        self._whole = whole
        self._queue = RolloutQueue(plan.max_concurrency)
        self._ids: set[str] = set()
        self._error: BaseException | None = None
        self._stopping = False
        self._out: asyncio.Queue[Trajectory | GroupEnd | None] = asyncio.Queue(plan.max_ahead)
        self._workers: set[asyncio.Task[None]] = set()
        self._finisher: asyncio.Task[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="managed-vllm-store")
        self._alike = FailuresAlike(plan.stop_after_failures, plan.max_concurrency)
        self._earlier = EarlierAttempts(plan.store)

    # -- its life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to play."""
        self._workers.add(self.loop.create_task(self._guarded(self._feed)))
        for _ in range(self._plan.max_concurrency):
            self._workers.add(self.loop.create_task(self._guarded(self._work)))
        self._finisher = self.loop.create_task(self._finish())

    async def results(self) -> AsyncIterator[Trajectory | GroupEnd]:
        """What ends, as it ends. Raises what ended the run."""
        while (found := await self._out.get()) is not None:
            yield found
        if self._error is not None:
            raise self._error

    async def _finish(self) -> None:
        await asyncio.wait(self._workers)
        await self._out.put(None)

    def abort(self, error: BaseException | None) -> None:
        """Ends it; the consumer gets what waits for it, then the error."""
        if self._stopping:
            return
        self._stopping = True
        self._error = error
        for worker in self._workers:
            worker.cancel()

    async def close(self) -> None:
        """Ends all that is left, in bounded time."""
        self.abort(None)
        if self._finisher is not None:
            self._finisher.cancel()
        self._queue.abandon()
        running = {worker for worker in self._workers if not worker.done()}
        try:
            if running:
                seconds = self._plan.rules.limits.close_timeout_s + _GRACE_S
                _, left = await asyncio.wait(running, timeout=seconds)
                if left:
                    log.warning("%d environments did not close within %g s", len(left), seconds)
        finally:  # the end of the event loop cancels the closing of an iteration that was broken off
            if self._plan.store is not None and self._plan.store.claims is not None:
                self._writer.submit(self._plan.store.claims.let_go)
        self._writer.shutdown(wait=True)  # appends are short, and what was begun is to be whole

    async def _guarded(self, part: Callable[[], Awaitable[None]]) -> None:
        """What a worker raises ends the run, and comes out of the iteration."""
        try:
            await part()
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        except Exception as error:
            self.abort(error)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        """Takes tasks as there is room for them."""
        plan, stats = self._plan, self._stats
        async for task in each_task(self._tasks):
            if task.id in self._ids:
                raise ConfigError(f"two tasks have the id {task.id!r}; resuming and groups go by it", field="id")
            self._ids.add(task.id)
            group = GroupState(task, plan.n)
            self._earlier.fill(group, all_of_them=plan.decide_n is not None)
            stats.tasks += 1
            stats.expected += group.n
            stats.done += len(group.stored)
            stats.stored += len(group.stored)
            if group.stored and (plan.decide_n is not None or self._whole):
                group.results.update(await self.loop.run_in_executor(self._writer, self._earlier.read, group))
                self._resize(group)
            await self._queue.put(group.missing())
            await self._settle(group)
            await self._queue.wait_for_room()
        await self._queue.close()

    # -- workers -------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        environment: Environment | None = None
        try:
            while (job := await self._queue.take()) is not None:
                try:
                    if not await self._is_ours(job):
                        continue
                    mine, environment = environment, None
                    self._stats.running += 1
                    try:
                        trajectory, environment = await self._play(job, mine)
                    finally:
                        self._stats.running -= 1
                    if trajectory is not None:
                        await self._ended(job, trajectory)
                finally:
                    await self._queue.done()
        finally:
            if environment is not None:
                await self._close(environment)

    async def _is_ours(self, job: Job) -> bool:
        """Whether the rollout is for this process to play; if not, what others make of it is taken note of."""
        store = self._plan.store
        if store is None or store.claims is None or job.tries:
            return True
        began = time.monotonic()
        claim, entry = await self.loop.run_in_executor(self._writer, store.claim, job.group.task.id, job.rollout)
        look_s = min(time.monotonic() - began, _SLOW_LOOK_S)
        if (entry is not None and entry.ok) or claim is Claim.FAILED:
            self._stats.done += 1
            self._stats.stored += 1
            self._stats.failed += claim is Claim.FAILED
            job.group.results[job.rollout] = None
            job.group.jobs.pop(job.rollout, None)
            await self._settle(job.group)
            return False
        if claim is Claim.HELD:
            waiting = self._queue.put_off
            # Half of the time at most goes into looking again: the rest is for what nobody has looked at yet.
            slow_s = min(2 * look_s * waiting, _SLOW_LOOKS_S)
            self._queue.put_later(job, max(_LOOK_AGAIN_S, waiting / _LOOKS_PER_S, slow_s), last=True)
            return False
        if entry is not None:
            job.attempt = max(job.attempt, entry.attempt + 1)
        return True

    async def _play(self, job: Job, environment: Environment | None) -> tuple[Trajectory | None, Environment | None]:
        """The attempt, or None if it is not wanted any more; and the environment, if it is fit for another."""
        fatal: ManagedVLLMError | None = None
        made = environment

        async def attempt() -> Trajectory:
            nonlocal fatal, made
            if made is None:
                try:
                    made = await bounded(self._make, self._plan.rules.limits.reset_timeout_s, "making an environment")
                except Exception as error:
                    return _not_made(job.as_attempt(), error)
            episode = Episode(self._plan.rules, made, job.as_attempt())
            trajectory = await episode.run()
            fatal = episode.fatal
            return trajectory

        job.playing = self.loop.create_task(attempt())
        fit = False
        try:
            try:
                await asyncio.wait({job.playing})
            except asyncio.CancelledError:
                job.playing.cancel()
                await asyncio.wait({job.playing})
                if not job.playing.cancelled():  # it had just ended
                    await self._keep(job.playing.result())
                raise
            if job.playing.cancelled():
                return None, None
            trajectory = job.playing.result()
            unharmed = trajectory.failure is None or trajectory.failure.kind in _HARMLESS
            fit = self._plan.reuse_environments and unharmed and fatal is None
        finally:
            job.playing = None
            if made is not None and not fit:
                await self._close(made)
        if fatal is not None:
            await self._keep(trajectory)
            raise fatal
        return trajectory, made if fit else None

    async def _make(self) -> Environment:
        made = self._plan.make_environment()
        return await made if inspect.isawaitable(made) else made

    async def _close(self, environment: Environment) -> None:
        """What closing raises is told in the log: the trajectory is over."""
        try:
            seconds = self._plan.rules.limits.close_timeout_s + float(getattr(environment, "patience_s", 0.0))
            await bounded(environment.close, seconds, "closing the environment")
        except Exception as error:
            log.warning("an environment could not be closed: %s: %s", type(error).__name__, error)

    # -- results -------------------------------------------------------------------------------------------------------

    async def _keep(self, trajectory: Trajectory) -> bool:
        """To the store, the statistics, and the caller's hook. False: another process has taken the rollout over."""
        # A cancellation takes back nothing that has ended: it is written all the same, and close() waits for it.
        if not await asyncio.shield(self.loop.run_in_executor(self._writer, self._append, trajectory)):
            log.warning("%s, rollout %s, was taken over: our lease had run out", *trajectory.key)
            return False
        self._stats.count_attempt(trajectory)
        self._alike.count(trajectory)
        if self._plan.on_attempt is not None:
            self._plan.on_attempt(trajectory)
        return True

    def _append(self, trajectory: Trajectory) -> bool:
        store = self._plan.store
        if store is not None:
            if store.claims is not None and not store.claims.still_ours(trajectory.key):
                return False
            store.append(trajectory)
        return True

    async def _ended(self, job: Job, trajectory: Trajectory) -> None:
        plan, group = self._plan, job.group
        if not await self._keep(trajectory):
            group.jobs[job.rollout] = replace(job, tries=0, playing=None)
            self._queue.put_later(group.jobs[job.rollout], _LOOK_AGAIN_S)
            return
        self._alike.check()
        group.attempts[job.rollout] += 1
        if job.unwanted or job.round != group.round:
            return
        failure = trajectory.failure
        if failure is not None and failure.kind in plan.retry.retried and job.tries + 1 < plan.retry.max_attempts:
            self._stats.retried += 1
            again = group.jobs[job.rollout] = job.again()
            self._queue.put_later(again, plan.retry.delay_before_s(job.tries))
            return
        if failure is not None and plan.store is not None and plan.store.claims is not None:
            await self.loop.run_in_executor(self._writer, plan.store.claims.failed, trajectory.key)
        group.results[job.rollout] = trajectory
        group.jobs.pop(job.rollout, None)
        self._stats.count_rollout(trajectory)
        if plan.group_policy is GroupPolicy.KEEP and not self._whole:
            await self._out.put(trajectory)
        if failure is not None and plan.group_policy is not GroupPolicy.KEEP:
            await self._broken(group)
        elif plan.decide_n is not None:
            self._resize(group)
            await self._queue.put(group.missing())
        await self._settle(group)

    def _resize(self, group: GroupState) -> None:
        """As many rollouts as `decide_n` wants now."""
        before = group.n
        group.resize(self._plan.wanted_n(group))
        self._stats.expected += group.n - before

    async def _broken(self, group: GroupState) -> None:
        """A rollout has failed for good, and the policy is not to keep its group."""
        group.cancel()
        if self._plan.group_policy is GroupPolicy.REPEAT and group.round + 1 < self._plan.retry.max_rounds:
            self._stats.done -= len(group.results)
            group.restart()
            await self._queue.put(group.missing())
            return
        self._stats.expected -= group.n - len(group.results)
        await self._tell(group, dropped=True)

    async def _settle(self, group: GroupState) -> None:
        """Tells of the group once, when all of it is there."""
        if group.over and not group.settled:
            await self._tell(group, dropped=False)

    async def _tell(self, group: GroupState, *, dropped: bool) -> None:
        group.settled = True
        task = group.task
        if self._plan.on_group is not None:
            self._plan.on_group(task, sorted(group.results), dropped)
        if self._whole or self._plan.group_policy is not GroupPolicy.KEEP:
            stored = frozenset((task.id, number) for number in group.stored)
            await self._out.put(GroupEnd(Group(task, tuple(group.finished()), dropped), stored))
        group.results = dict.fromkeys(group.results)  # the trajectories are the consumer's now


def _not_made(attempt: Attempt, error: Exception) -> Trajectory:
    """The attempt for which no environment could be made."""
    failure = Failure(
        FailureClass.ENVIRONMENT,
        "make",
        type(error).__name__,
        getattr(error, "message", None) or str(error),
        details="".join(traceback.format_exception(error))[-4000:],
    )
    return Trajectory(
        attempt.task,
        attempt.rollout,
        attempt.number,
        stop_reason=StopReason.ENV_FAILURE,
        failure=failure,
        instruction=attempt.task.instruction,
        started_at=time.time(),
        group_round=attempt.group_round,
    )
