"""`StreamingTaskScheduler`: tasks × n rollouts through a pool of environments, each trajectory at its own pace.

There is no barrier anywhere. A pool of workers has one environment each; a worker takes the next rollout as soon as it
has ended its last one, so a slow or stuck environment holds up nobody but itself. In this order:

1. Tasks are taken from the caller's iterable as there is room for them, and become a group of `n` rollouts each. What a
   store has finished already is not played again.
2. A worker plays a rollout (`run`, `episode`). Each attempt goes to the store before anybody sees it. One that failed
   is played again, with its number counted up, as `RetryRollouts` allows; the environment that failed is closed first.
3. Rollouts come out as they finish (`run`), or groups as they are complete (`run_groups`). A consumer that is slow
   holds the workers up: at most `max_ahead` results wait.
4. Whatever ends the iteration (its end, an error, `break`, cancellation, Ctrl-C), ends all that is in flight, closes
   every environment within its limit, and leaves on disk what had finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence, Sized
from dataclasses import replace
from typing import Any

from managed_vllm.agent.blocking import blocking
from managed_vllm.agent.engine_watch import EngineWatch, known_state
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.gate import Gate
from managed_vllm.agent.image_store import ImageStore, own_images
from managed_vllm.agent.loop_watch import LoopWatch
from managed_vllm.agent.made_of import made_of
from managed_vllm.agent.pictures import Pictures
from managed_vllm.agent.preflight import Preflight
from managed_vllm.agent.rewards import RewardFunction
from managed_vllm.agent.rollout_policies import GroupPolicy, RetryRollouts
from managed_vllm.agent.rules import Rules, StepHook
from managed_vllm.agent.run import GroupEnd, MakeEnvironment, Run, RunPlan
from managed_vllm.agent.run_progress import RunProgress, RunStats
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.tasks import Tasks, each_task
from managed_vllm.agent.types import Group, Limits, Task, Trajectory
from managed_vllm.errors import ConfigError


class StreamingTaskScheduler:
    """Plays `n` rollouts of each task, at most `max_concurrency` at once. One run at a time.

    Args:
        llm: a `ManagedVLLM`, `VLLMClient` or `AsyncVLLMClient`.
        make_environment: makes one environment; called once for each worker, and again after a failure. It may be a
            coroutine function. What takes long belongs there, or into `reset`.
        n: rollouts a task.
        max_concurrency: environments, and so episodes, at once.
        sampling_params: for each answer; what they leave out has vLLM's default (no top_p, no top_k), not that of the
            model's generation_config. A run without a seed: with one, all rollouts of a task would be the same.
        limits: of each episode.
        agent: how the model is spoken to and understood; None: UI-TARS (`format.ui_tars()`).
        retry: what is tried again.
        group: what becomes of a group one of whose rollouts failed for good.
        decide_n: called with task and trajectories so far, whenever a rollout of the task has ended for good; returns
            how many rollouts the task is to have now. More are started; of those too many, none is started, and those
            that run are cancelled.
        store: where attempts are kept; what is finished there is not played again. With one from `RunStore.join`, this
            scheduler plays what no other process of the run does, and ends when all of it has ended, here or there.
        images: where screenshots are kept, without a store; None: in a temporary folder.
        on_step: called with task, rollout and each step. May be a coroutine function.
        reward: called with each attempt that is `ok`, after `evaluate`; what it returns is the reward (see `rewards`).
            What it raises fails the attempt. None: the environment's reward.
        on_attempt: called with each attempt, failed ones included, after it was stored.
        max_ahead: results that wait for the consumer, at most; None: as many as `max_concurrency`.
        reuse_environments: whether an environment serves one episode after the other (as long as it does not fail).
        exact: whether the server must tell token ids and logprobs. False: for evaluation on a server that does not
            (SGLang, a hosted API); the attempts say so, and are not exported to trainers.
        stop_after_failures: so many attempts in a row (and at least two for each environment) that all fail the same
            way end the run; None: never.
        progress: whether to show what is done; None: if standard error is a terminal.

    Attributes:
        weight_version: what the model's weights are called, for the steps of servers whose answers do not say so. Known
            where the supervisor knows it (`llm.engine.update_weights`); else set it when you change them.
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
        reward: RewardFunction | None = None,
        on_attempt: Callable[[Trajectory], None] | None = None,
        max_ahead: int | None = None,
        reuse_environments: bool = True,
        exact: bool = True,
        stop_after_failures: int | None = 20,
        progress: bool | None = False,
    ) -> None:
        self._llm = llm
        self._told_version: str | None = None
        self.stats = RunStats()
        if images is None:
            images = own_images() if store is None else store.images
        self._plan = RunPlan(
            rules=Rules.of(
                llm,
                images,
                sampling_params,
                limits,
                agent,
                on_step=on_step,
                reward=reward,
                exact=exact,
                weight_version=lambda: self.weight_version,
            ),
            make_environment=make_environment,
            n=n,
            max_concurrency=max_concurrency,
            retry=retry or RetryRollouts(),
            group_policy=GroupPolicy(group),
            decide_n=decide_n,
            store=store,
            on_attempt=on_attempt,
            max_ahead=max_concurrency if max_ahead is None else max_ahead,
            reuse_environments=reuse_environments,
            stop_after_failures=stop_after_failures,
        )
        self._progress = progress
        self._known_tasks: int | None = None
        self._current: Run | None = None

    @property
    def limits(self) -> Limits:
        """Of each episode."""
        return self._plan.rules.limits

    @property
    def weight_version(self) -> str | None:
        """As the supervisor knows it, else as it was set; None: nobody has named the weights."""
        return known_state(getattr(self._llm, "engine", None)).weight_version or self._told_version

    @weight_version.setter
    def weight_version(self, version: str | None) -> None:
        self._told_version = version

    # -- running -------------------------------------------------------------------------------------------------------

    async def run(self, tasks: Tasks) -> AsyncGenerator[Trajectory, None]:
        """Rollouts as they end for good, in that order; those that failed for good are there, with their `failure`.

        With a `group` policy other than `KEEP` a group's trajectories come when it is complete, and those of a dropped
        one do not. What the store had finished does not come again (`run_all` and `run_groups` have it).

        Raises what every other rollout would meet, too (`episode.FATAL`), `RolloutsFailedError`
        (`stop_after_failures`), what `decide_n` or `on_attempt` raise, and what the store raises.
        """
        keep_groups = self._plan.group_policy is GroupPolicy.KEEP
        async with contextlib.aclosing(self._events(tasks)) as events:
            async for event in events:
                if isinstance(event, Trajectory):
                    if keep_groups:
                        yield event
                elif not keep_groups and not event.group.dropped:
                    for trajectory in event.group.trajectories:
                        if trajectory.key not in event.stored:
                            yield trajectory

    async def run_groups(self, tasks: Tasks) -> AsyncGenerator[Group, None]:
        """Groups as they are complete, with those of their trajectories that the store had; dropped ones, too."""
        async with contextlib.aclosing(self._events(tasks, whole=True)) as events:
            async for event in events:
                if not isinstance(event, Trajectory):
                    yield event.group

    def run_all(self, tasks: Tasks, *, keep: bool = True) -> Sequence[Trajectory]:
        """All rollouts of the tasks, in the order of tasks and numbers, for programs without asyncio.

        Those that a store had finished are among them, those of dropped groups are not. With a store they are read from
        it one by one, each time that one is asked for, so that memory need not hold them; without one it is a list.
        Ctrl-C ends the run cleanly: what had finished is in the store. `keep=False` returns nothing.
        """
        order: dict[str, int] = {}
        rollouts: dict[str, Sequence[int]] = {}

        async def ordered() -> AsyncIterator[Task]:
            async for task in each_task(tasks):
                order.setdefault(task.id, len(order))
                yield task

        def note(task: Task, numbers: Sequence[int], dropped: bool) -> None:
            rollouts[task.id] = () if dropped else tuple(numbers)

        async def collect() -> list[Group]:
            if keep and self._plan.store is None:
                return [group async for group in self.run_groups(ordered())]
            async for _ in self.run(ordered()):
                pass
            return []

        if isinstance(tasks, Sized):
            self._known_tasks = len(tasks)
        plan = self._plan
        if keep and plan.store is not None:
            self._plan = replace(plan, on_group=note)
        try:
            groups = blocking(collect)
        finally:
            self._known_tasks = None
            self._plan = replace(self._plan, on_group=None)
        if keep and plan.store is not None:
            return plan.store.selected((name, number) for name in order for number in rollouts.get(name, ()))
        groups.sort(key=lambda group: order[group.task.id])
        return [trajectory for group in groups if not group.dropped for trajectory in group.trajectories]

    # -- from outside --------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Lets no request to the model begin any more, and returns when all that were on their way have been answered.

        For a change of the weights. Episodes go on with what needs no model, and wait then; the time does not count
        for their limit. Before a run it holds the first requests. From another thread than that of the run:
        `asyncio.run(scheduler.pause())`.
        """
        gate, current = self._plan.rules.gate, self._current
        if current is None or current.loop is asyncio.get_running_loop():
            await gate.pause()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(gate.pause(), current.loop))

    def resume(self) -> None:
        """Goes on after `pause`; from any thread."""
        gate, current = self._plan.rules.gate, self._current
        if current is None:
            gate.resume()
        else:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                current.loop.call_soon_threadsafe(gate.resume)

    async def update_weights(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        version: str | None = None,
        expect: str | None = None,
        on_update: str = "finish",
        timeout: float = 600.0,
    ) -> Any:
        """Has the model's server take other weights, in the midst of a run: `llm.engine.update_weights`, with the same
        arguments, result, and errors.

        While the engine is paused no request begins, and the time does not count for the limits of the episodes. Each
        step says which weights answered. No rollout fails for it; a checkpoint that is refused leaves the run as it
        was. `llm.engine.update_weights`, of whichever thread or process, does the same to the run.

        Raises `ConfigError` where `llm` is a client, which has no engine.
        """
        engine = getattr(self._llm, "async_engine", None)
        if engine is None:
            raise ConfigError("update_weights() needs a ManagedVLLM as llm: a client can't change weights", field="llm")
        return await engine.update_weights(
            path_or_id, version=version, expect=expect, on_update=on_update, timeout=timeout
        )

    def stop(self) -> None:
        """Ends the run, from any thread: the iteration ends, as soon as all that was in flight is cancelled."""
        current = self._current
        if current is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                current.loop.call_soon_threadsafe(current.abort, None)

    async def _events(self, tasks: Tasks, *, whole: bool = False) -> AsyncGenerator[Trajectory | GroupEnd, None]:
        if self._current is not None:
            raise ConfigError("this scheduler runs already; make another one, or wait for its end")
        if whole and self._plan.joined:
            raise ConfigError("of a run with several writers (RunStore.join) no process plays whole groups; use run()")
        known = len(tasks) if isinstance(tasks, Sized) else self._known_tasks
        self.stats = RunStats(tasks_known=known)
        # Locks belong to an event loop, and the next run may be in another one.
        gate = Gate()
        if self._plan.rules.gate.paused:
            gate.close()
        rules = replace(self._plan.rules, gate=gate, preflight=Preflight(), pictures=Pictures())
        self._plan = replace(self._plan, rules=rules)
        if self._plan.store is not None:
            self._plan.store.settle(made_of(rules))
        run = self._current = Run(self._plan, self.stats, tasks, whole=whole)
        try:
            with RunProgress(self.stats, self._progress), LoopWatch():
                async with EngineWatch(self._llm, gate):
                    run.start()
                    async for event in run.results():
                        yield event
        finally:
            try:
                await run.close()
            finally:
                self._current = None
