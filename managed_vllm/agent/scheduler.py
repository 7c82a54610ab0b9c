"""`StreamingTaskScheduler`: tasks × n rollouts through a pool of environments, each trajectory at its own pace.

There is no barrier anywhere. A pool of workers has one environment each; a worker takes the next rollout as soon as it
has ended its last one, so a slow or stuck environment holds up nobody but itself. In this order:

1. Tasks are taken from the caller's iterable as there is room for them, and become a group of `n` rollouts each. What a
   store has finished already is not played again.
2. A worker plays a rollout (`episode`). Each attempt goes to the store before anybody sees it. One that failed is
   played again, with its number counted up, as `RetryRollouts` allows, and the environment that failed is closed first.
3. Rollouts come out as they finish (`run`), or groups as they are complete (`run_groups`). A consumer that is slow
   holds the workers up: at most `max_ahead` results wait.
4. Whatever ends the iteration (its end, an error, `break`, cancellation, Ctrl-C), ends all that is in flight, closes
   every environment within its limit, and leaves on disk what had finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import itertools
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
    Sized,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from managed_vllm.agent.blocking import blocking
from managed_vllm.agent.environment import Environment
from managed_vllm.agent.episode import Episode, Gate, Preflight, Rules, StepHook, bounded, own_images
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.run_progress import RunProgress, RunStats
from managed_vllm.agent.store import AttemptEntry, RunStore
from managed_vllm.agent.tasks import Tasks, each_task
from managed_vllm.agent.types import (
    Failure,
    FailureClass,
    Group,
    Limits,
    StopReason,
    Task,
    Trajectory,
)
from managed_vllm.errors import ConfigError, ManagedVLLMError

log = logging.getLogger("managed_vllm.agent")


MakeEnvironment = Callable[[], Environment | Awaitable[Environment]]

_LONGEST_DELAY_S = 30.0
_GRACE_S = 40.0
"""On top of the environments' own limit for closing, when a run is stopped: for calls that do not heed cancellation,
and for the `patience_s` of environments."""


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


class StreamingTaskScheduler:
    """Plays `n` rollouts of each task, at most `max_concurrency` at once. One run at a time.

    Args:
        llm: a `ManagedVLLM`, `VLLMClient` or `AsyncVLLMClient`.
        make_environment: makes one environment; called once for each worker, and again after a failure. It may be a
            coroutine function. What takes long belongs there, or into `reset`.
        n: rollouts a task.
        max_concurrency: environments, and so episodes, at once.
        sampling_params: for each answer. A run without a seed: with one, all rollouts of a task would be the same.
        limits: of each episode.
        agent: how the model is spoken to and understood; None: UI-TARS (`format.ui_tars()`).
        retry: what is tried again.
        group: what becomes of a group one of whose rollouts failed for good.
        decide_n: called with task and trajectories so far, whenever a rollout of the task has ended for good; returns
            how many rollouts the task is to have now. More are started; of those too many, none is started, and those
            that run are cancelled.
        store: where attempts are kept; what is finished there is not played again.
        images: where screenshots are kept, without a store; None: in a temporary folder.
        on_step: called with task, rollout and each step. May be a coroutine function.
        on_attempt: called with each attempt, failed ones included, after it was stored.
        max_ahead: results that wait for the consumer, at most; None: as many as `max_concurrency`.
        reuse_environments: whether an environment serves one episode after the other (as long as it does not fail).
        progress: whether to show what is done; None: if standard error is a terminal.

    Attributes:
        weight_version: set it when the weights of the model are changed; each step tells which ones answered.
        stats: of the current or last run.
    """

    def __init__(
        self,
        llm: Any,
        make_environment: MakeEnvironment,
        *,
        n: int = 1,
        max_concurrency: int = 16,
        sampling_params: Any = None,
        limits: Limits | None = None,
        agent: AgentFormat | None = None,
        retry: RetryRollouts | None = None,
        group: GroupPolicy | str = GroupPolicy.KEEP,
        decide_n: Callable[[Task, Sequence[Trajectory]], int] | None = None,
        store: RunStore | None = None,
        images: ImageStore | None = None,
        on_step: StepHook | None = None,
        on_attempt: Callable[[Trajectory], None] | None = None,
        max_ahead: int | None = None,
        reuse_environments: bool = True,
        progress: bool | None = False,
    ) -> None:
        if n < 1 or max_concurrency < 1 or (max_ahead is not None and max_ahead < 1):
            raise ConfigError("n, max_concurrency and max_ahead must be 1 or more")
        if not callable(make_environment):
            raise ConfigError("make_environment must be a function that makes an environment", field="make_environment")
        self.weight_version: str | None = None
        self.stats = RunStats()
        self._llm = llm
        self._make_environment = make_environment
        self._n = n
        self._max_concurrency = max_concurrency
        self._retry = retry or RetryRollouts()
        self._policy = GroupPolicy(group)
        self._decide_n = decide_n
        self._store = store
        self._on_attempt = on_attempt
        self._max_ahead = max_ahead or max_concurrency
        self._reuse = reuse_environments
        self._progress = progress
        if images is None:
            images = own_images() if store is None else store.images
        self._rules = Rules.of(
            llm,
            images,
            sampling_params,
            limits,
            agent,
            on_step=on_step,
            weight_version=lambda: self.weight_version,
        )
        self._current: _Run | None = None

    @property
    def limits(self) -> Limits:
        return self._rules.limits

    # -- running -------------------------------------------------------------------------------------------------------

    async def run(self, tasks: Tasks) -> AsyncGenerator[Trajectory, None]:
        """Rollouts as they end for good, in that order; those that failed for good are there, with their `failure`.

        With a `group` policy other than `KEEP` a group's trajectories come when it is complete, and those of a dropped
        one do not. What the store had finished does not come again (`run_all` and `run_groups` have it).

        Raises what every other rollout would meet, too (`episode.FATAL`), what `decide_n` or `on_attempt` raise, and
        what the store raises.
        """
        async with contextlib.aclosing(self._events(tasks)) as events:
            async for event in events:
                if isinstance(event, Trajectory):
                    if self._policy is GroupPolicy.KEEP:
                        yield event
                elif self._policy is not GroupPolicy.KEEP and not event.group.dropped:
                    for trajectory in event.group.trajectories:
                        if trajectory.key not in event.stored:
                            yield trajectory

    async def run_groups(self, tasks: Tasks) -> AsyncGenerator[Group, None]:
        """Groups as they are complete, with those of their trajectories that the store had; dropped ones, too."""
        async with contextlib.aclosing(self._events(tasks, whole=True)) as events:
            async for event in events:
                if not isinstance(event, Trajectory):
                    yield event.group

    def run_all(self, tasks: Tasks, *, keep: bool = True) -> list[Trajectory]:
        """All rollouts of the tasks, in the order of tasks and numbers, for programs without asyncio.

        Those that a store had finished are among them, those of dropped groups are not. Ctrl-C ends it cleanly: what
        had finished is in the store. `keep=False` returns nothing: for runs that memory does not hold, with a store.
        """
        order: dict[str, int] = {}

        async def ordered() -> AsyncIterator[Task]:
            async for task in each_task(tasks):
                order.setdefault(task.id, len(order))
                yield task

        async def collect() -> list[Group]:
            if keep:
                return [group async for group in self.run_groups(ordered())]
            async for _ in self.run(ordered()):
                pass
            return []

        if isinstance(tasks, Sized):
            self._known = len(tasks)
        try:
            groups = blocking(collect)
        finally:
            self._known = None
        groups.sort(key=lambda group: order[group.task.id])
        return [trajectory for group in groups if not group.dropped for trajectory in group.trajectories]

    _known: int | None = None

    # -- from outside --------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Lets no request to the model begin any more, and returns when all that were on their way have been answered.

        For a change of the weights. Episodes go on with what needs no model, and wait then; the time does not count
        for their limit. Before a run it holds the first requests. From another thread than that of the run:
        `asyncio.run(scheduler.pause())`.
        """
        gate, current = self._rules.gate, self._current
        if current is None or current.loop is asyncio.get_running_loop():
            await gate.pause()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(gate.pause(), current.loop))

    def resume(self) -> None:
        """Goes on after `pause`; from any thread."""
        gate, current = self._rules.gate, self._current
        if current is None:
            gate.resume()
        else:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                current.loop.call_soon_threadsafe(gate.resume)

    def stop(self) -> None:
        """Ends the run, from any thread: the iteration ends, as soon as all that was in flight is cancelled."""
        current = self._current
        if current is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                current.loop.call_soon_threadsafe(current.abort, None)

    async def _events(self, tasks: Tasks, *, whole: bool = False) -> AsyncGenerator[Trajectory | _GroupEnd, None]:
        if self._current is not None:
            raise ConfigError("this scheduler runs already; make another one, or wait for its end")
        self.stats = RunStats(tasks_known=self._known)
        if self.stats.tasks_known is None and isinstance(tasks, Sized):
            self.stats.tasks_known = len(tasks)
        # Locks belong to an event loop, and the next run may be in another one.
        gate = Gate()
        if self._rules.gate.paused:
            gate.close()
        self._rules = replace(self._rules, gate=gate, preflight=Preflight())
        run = self._current = _Run(self, tasks, whole=whole)
        try:
            with RunProgress(self.stats, self._progress):
                run.start()
                async for event in run.results():
                    yield event
        finally:
            try:
                await run.close()
            finally:
                self._current = None


@dataclass(frozen=True, slots=True)
class _GroupEnd:
    group: Group
    stored: frozenset[tuple[str, int]]


@dataclass
class _Job:
    """One rollout that is to be played, or is."""

    group: _Group
    rollout: int
    attempt: int = 0
    tries: int = 0
    """In this run: what the store has of earlier ones does not count for `max_attempts`."""
    round: int = 0
    playing: asyncio.Task[Trajectory] | None = None
    unwanted: bool = False

    def cancel(self) -> None:
        self.unwanted = True
        if self.playing is not None:
            self.playing.cancel()


@dataclass
class _Group:
    task: Task
    n: int
    round: int = 0
    jobs: dict[int, _Job] = field(default_factory=dict)
    results: dict[int, Trajectory | None] = field(default_factory=dict)
    """By number, those that ended for good; None: the store has it, and it was not read."""
    attempts: Counter[int] = field(default_factory=Counter)
    """By number: how many attempts there have been in all, the store's included."""
    stored: set[int] = field(default_factory=set)
    settled: bool = False


class _Run:
    """One iteration: its workers, what is to be played, and what waits for the consumer."""

    def __init__(self, scheduler: StreamingTaskScheduler, tasks: Tasks, *, whole: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self._s = scheduler
        self._tasks = tasks
        self._whole = whole
        self._stats = scheduler.stats
        self._pending: deque[_Job] = deque()
        self._given = asyncio.Condition()  # jobs were given out, or there will be none any more
        self._room = asyncio.Event()
        self._fed = False
        self._busy = 0  # jobs that are played, or wait for their next attempt
        self._ids: set[str] = set()
        self._error: BaseException | None = None
        self._stopping = False
        self._out: asyncio.Queue[Trajectory | _GroupEnd | None] = asyncio.Queue(scheduler._max_ahead)
        self._workers: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._finisher: asyncio.Task[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="managed-vllm-store")
        self._known = _Known(scheduler._store)

    # -- its life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._workers.add(self.loop.create_task(self._guarded(self._feed)))
        for _ in range(self._s._max_concurrency):
            self._workers.add(self.loop.create_task(self._guarded(self._work)))
        self._finisher = self.loop.create_task(self._finish())

    async def results(self) -> AsyncIterator[Trajectory | _GroupEnd]:
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
        for timer in self._timers:
            timer.cancel()
        limits = self._s.limits
        running = {worker for worker in self._workers if not worker.done()}
        if running:
            _, left = await asyncio.wait(running, timeout=limits.close_timeout_s + _GRACE_S)
            if left:
                log.warning("%d environments did not close within %g s", len(left), limits.close_timeout_s + _GRACE_S)
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
        async for task in each_task(self._tasks):
            if task.id in self._ids:
                raise ConfigError(f"two tasks have the id {task.id!r}; resuming and groups go by it", field="id")
            self._ids.add(task.id)
            group = _Group(task, self._s._n)
            self._known.fill(group, all_of_them=self._s._decide_n is not None)
            self._stats.tasks += 1
            self._stats.expected += group.n
            self._stats.done += len(group.stored)
            self._stats.stored += len(group.stored)
            if group.stored and (self._s._decide_n is not None or self._whole):
                group.results.update(await self.loop.run_in_executor(self._writer, self._known.read, group))
                self._set_n(group, self._wanted_n(group))
            await self._extend(group)
            await self._settle(group)
            while len(self._pending) >= self._s._max_concurrency:
                self._room.clear()
                await self._room.wait()
        self._fed = True
        await self._maybe_over()

    async def _extend(self, group: _Group) -> None:
        """Gives out the rollouts that the group is to have and that nobody has begun, lowest numbers first."""
        numbers = itertools.count()
        before = len(self._pending)
        while len(group.results) + len(group.jobs) < group.n:
            rollout = next(numbers)
            if rollout not in group.results and rollout not in group.jobs:
                job = _Job(group, rollout, group.attempts[rollout], round=group.round)
                group.jobs[rollout] = job
                self._pending.append(job)
        async with self._given:
            self._given.notify(len(self._pending) - before)

    # -- workers -------------------------------------------------------------------------------------------------------

    async def _take(self) -> _Job | None:
        """The next rollout; None when there will be none any more."""
        async with self._given:
            while True:
                while self._pending:
                    job = self._pending.popleft()
                    self._room.set()
                    if not job.unwanted:
                        self._busy += 1
                        return job
                if self._fed and not self._busy:
                    self._given.notify_all()
                    return None
                await self._given.wait()

    async def _maybe_over(self) -> None:
        """Sends the workers home, if nobody has anything to do any more, or can get it."""
        if self._fed and not self._busy:
            async with self._given:
                self._given.notify_all()

    async def _work(self) -> None:
        environment: Environment | None = None
        try:
            while (job := await self._take()) is not None:
                mine, environment = environment, None
                try:
                    self._stats.running += 1
                    try:
                        trajectory, environment = await self._play(job, mine)
                    finally:
                        self._stats.running -= 1
                    if trajectory is not None:
                        await self._ended(job, trajectory)
                finally:
                    self._busy -= 1
                    await self._maybe_over()
        finally:
            if environment is not None:
                await self._close(environment)

    async def _play(self, job: _Job, environment: Environment | None) -> tuple[Trajectory | None, Environment | None]:
        """The attempt, or None if it is not wanted any more; and the environment, if it is fit for another."""
        fatal: ManagedVLLMError | None = None
        made = environment

        async def attempt() -> Trajectory:
            nonlocal fatal, made
            if made is None:
                try:
                    made = await bounded(self._make, self._s.limits.reset_timeout_s, "making an environment")
                except Exception as error:
                    return self._not_made(job, error)
            episode = Episode(
                self._s._rules,
                made,
                job.group.task,
                rollout=job.rollout,
                attempt=job.attempt,
                group_round=job.round,
            )
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
            fit = self._s._reuse and unharmed and fatal is None
        finally:
            job.playing = None
            if made is not None and not fit:
                await self._close(made)
        if fatal is not None:
            await self._keep(trajectory)
            raise fatal
        return trajectory, made if fit else None

    async def _make(self) -> Environment:
        made = self._s._make_environment()
        return await made if inspect.isawaitable(made) else made

    @staticmethod
    def _not_made(job: _Job, error: Exception) -> Trajectory:
        failure = Failure(
            FailureClass.ENVIRONMENT,
            "make",
            type(error).__name__,
            getattr(error, "message", None) or str(error),
            details="".join(traceback.format_exception(error))[-4000:],
        )
        task = job.group.task
        return Trajectory(
            task,
            job.rollout,
            job.attempt,
            stop_reason=StopReason.ENV_FAILURE,
            failure=failure,
            instruction=task.instruction,
            started_at=time.time(),
            group_round=job.round,
        )

    async def _close(self, environment: Environment) -> None:
        """What closing raises is told in the log: the trajectory is over."""
        try:
            seconds = self._s.limits.close_timeout_s + float(getattr(environment, "patience_s", 0.0))
            await bounded(environment.close, seconds, "closing the environment")
        except Exception as error:
            log.warning("an environment could not be closed: %s: %s", type(error).__name__, error)

    # -- results -------------------------------------------------------------------------------------------------------

    async def _keep(self, trajectory: Trajectory) -> None:
        """To the store, the statistics, and the caller's hook."""
        store = self._s._store
        if store is not None:
            # A cancellation takes back nothing that has ended: it is written all the same, and close() waits for it.
            await asyncio.shield(self.loop.run_in_executor(self._writer, store.append, trajectory))
        stats = self._stats
        stats.steps += len(trajectory.steps)
        stats.tokens += trajectory.response_tokens
        stats.stop_reasons[trajectory.stop_reason] += 1
        if trajectory.failure is not None:
            stats.failures[trajectory.failure.kind] += 1
        if self._s._on_attempt is not None:
            self._s._on_attempt(trajectory)

    async def _ended(self, job: _Job, trajectory: Trajectory) -> None:
        group = job.group
        await self._keep(trajectory)
        group.attempts[job.rollout] += 1
        if job.unwanted or job.round != group.round:
            return
        failure = trajectory.failure
        retry = self._s._retry
        if failure is not None and failure.kind in retry.retried and job.tries + 1 < retry.max_attempts:
            self._stats.retried += 1
            again = _Job(group, job.rollout, trajectory.attempt + 1, job.tries + 1, job.round)
            group.jobs[job.rollout] = again
            self._later(again, min(_LONGEST_DELAY_S, retry.delay_s * 2**job.tries))
            return
        group.results[job.rollout] = trajectory
        group.jobs.pop(job.rollout, None)
        stats = self._stats
        stats.done += 1
        if failure is not None:
            stats.failed += 1
        if trajectory.reward is not None:
            stats.rewards += 1
            stats.reward_sum += trajectory.reward
        if self._s._policy is GroupPolicy.KEEP and not self._whole:
            await self._out.put(trajectory)
        if failure is not None and self._s._policy is not GroupPolicy.KEEP:
            await self._broken(group)
        elif self._s._decide_n is not None:
            self._set_n(group, self._wanted_n(group))
            await self._extend(group)
        await self._settle(group)

    def _later(self, job: _Job, seconds: float) -> None:
        """Gives the job out again after a while; until then it counts as busy, so that no worker goes home."""
        self._busy += 1

        async def give_out() -> None:
            async with self._given:
                self._busy -= 1
                self._pending.appendleft(job)
                self._given.notify()

        def due() -> None:
            self._timers.discard(timer)
            task = self.loop.create_task(self._guarded(give_out))
            self._workers.add(task)
            task.add_done_callback(self._workers.discard)

        timer = self.loop.call_later(seconds, due)
        self._timers.add(timer)

    def _wanted_n(self, group: _Group) -> int:
        decide = self._s._decide_n
        if decide is None:
            return group.n
        found = [group.results[number] for number in sorted(group.results)]
        n: Any = decide(group.task, [trajectory for trajectory in found if trajectory is not None])
        if not isinstance(n, int) or n < 0:
            raise ConfigError(f"decide_n must return a number of rollouts, not {n!r}", field="decide_n")
        return int(n)

    def _set_n(self, group: _Group, n: int) -> None:
        """More rollouts, or fewer: those that ended stay, and of the others the last ones are not wanted."""
        n = max(n, len(group.results))
        self._stats.expected += n - group.n
        group.n = n
        for rollout in sorted(group.jobs)[n - len(group.results) :]:
            group.jobs.pop(rollout).cancel()

    async def _broken(self, group: _Group) -> None:
        """A rollout has failed for good, and the policy is not to keep its group."""
        for job in group.jobs.values():
            job.cancel()
        group.jobs.clear()
        if self._s._policy is GroupPolicy.REPEAT and group.round + 1 < self._s._retry.max_rounds:
            self._stats.done -= len(group.results)
            group.round += 1
            group.results.clear()
            group.stored.clear()
            await self._extend(group)
            return
        self._stats.expected -= group.n - len(group.results)
        await self._tell(group, dropped=True)

    async def _settle(self, group: _Group) -> None:
        """Tells of the group once, when all of it is there."""
        if not group.jobs and len(group.results) >= group.n and not group.settled:
            await self._tell(group, dropped=False)

    async def _tell(self, group: _Group, *, dropped: bool) -> None:
        group.settled = True
        task = group.task
        if self._whole or self._s._policy is not GroupPolicy.KEEP:
            found = [one for _, one in sorted(group.results.items()) if one is not None]
            stored = frozenset((task.id, number) for number in group.stored)
            await self._out.put(_GroupEnd(Group(task, tuple(found), dropped), stored))
        group.results = dict.fromkeys(group.results)  # the trajectories are the consumer's now


_HARMLESS = frozenset({FailureClass.MODEL_SERVER, FailureClass.PARSER})
"""Failures after which the environment is as good as before."""


class _Known:
    """What a store has of earlier runs: the finished rollouts, the attempts so far, and the rounds of the groups."""

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

    def fill(self, group: _Group, *, all_of_them: bool) -> None:
        """The group as the earlier runs left it; `all_of_them`: also rollouts beyond its `n`."""
        task_id = group.task.id
        group.stored = {number for number in self._finished.get(task_id, ()) if all_of_them or number < group.n}
        group.results.update(dict.fromkeys(group.stored))
        group.attempts.update(self._attempts.get(task_id, ()))
        group.round = self._rounds.get(task_id, 0)

    def read(self, group: _Group) -> dict[int, Trajectory]:
        """The finished trajectories of a group."""
        assert self._store is not None
        entries = self._finished[group.task.id]
        return {number: self._store.load(entries[number]) for number in sorted(group.stored)}
