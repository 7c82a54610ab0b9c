"""The names of the service scripts, for programs that were written for them: only the import changes.

    from managed_vllm.agent.service_scripts import run_streaming_task_sampling_sync_with_service

`StreamingTaskSchedulerWithService`, `run_streaming_task_sampling_with_service` (and `…_sync_…`) and
`run_agent_loop_with_service` are called as there, and return and leave on disk what they do: results as dicts, and
below `save_dir` a folder for each task with one for each of its rollouts (`export.dart`). Below that they are
`StreamingTaskScheduler`: no barrier, failures are no rewards, and what is finished is known by the record (in
`save_dir/.run`), not by a folder that exists.

A runner is made for each rollout: dart-gui's `TrajectoryRunner` (a Ray actor), unless `runner=` says otherwise.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from managed_vllm.agent.blocking import blocking
from managed_vllm.agent.environments.thread_environment import ThreadEnvironment
from managed_vllm.agent.export.dart import file_name, write_dart_folder
from managed_vllm.agent.format import AgentFormat, ParseErrorPolicy, UITarsParser
from managed_vllm.agent.prompting import Continued
from managed_vllm.agent.runners import RunnerEnvironment, called, folder_of, run_agent_loop
from managed_vllm.agent.scheduler import StreamingTaskScheduler
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import Group, Limits, Task
from managed_vllm.client import AsyncVLLMClient, VLLMClient
from managed_vllm.errors import ConfigError

TRAJECTORY_RUNNER = "verl.workers.rollout.osworld_env.run_agent_loop:TrajectoryRunner"
"""Where dart-gui has its runner: a Ray actor that is made with a task's configuration."""

MODEL_NAME = "ui_tars_1.5"
"""The name under which the service scripts serve the model."""

_PATIENT = Limits(reset_timeout_s=900.0, step_timeout_s=300.0, evaluate_timeout_s=600.0)
"""Its machines are made on demand, somewhere else."""


class StreamingTaskSchedulerWithService:
    """Tasks × `rollout_n` runners, at most `total_envs` at once. `start`, `add_task` …, `stop`.

    Args:
        total_envs, rollout_n: runners at once, and rollouts a task.
        llm: a `VLLMClientWrapper`, any other client of ours, or the OpenAI SDK's `OpenAI`.
        sampling_params: ours, vLLM's, or a dict.
        processor: not needed; the server has its own.
        max_steps, limit_images: turns, and the newest images that are sent.
        save_dir: gets a folder for each task.
        runner: makes a runner from a task's configuration: a function, a class, a Ray actor's class, or where to import
            it; see `RunnerEnvironment` for what it needs.
        limits: in place of `max_steps` and `limit_images`.
        model_name: None: the client's own, or "ui_tars_1.5" if the server has it, or its only model.

    Attributes:
        completed_tasks, failed_tasks: results, as dicts.
        active_tasks: those that have begun and are not over, by id.
        stats: as there.
    """

    def __init__(
        self,
        total_envs: int,
        rollout_n: int,
        llm: Any,
        sampling_params: Any,
        processor: Any = None,
        max_steps: int = 100,
        limit_images: int = 5,
        save_dir: str | os.PathLike[str] = "uitars_rollouts",
        *,
        runner: Callable[..., Any] | str = TRAJECTORY_RUNNER,
        limits: Limits | None = None,
        model_name: str | None = None,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.max_concurrent_tasks = max(1, total_envs // rollout_n)
        self.active_tasks: dict[str, dict[str, Any]] = {}
        self.completed_tasks: list[dict[str, Any]] = []
        self.failed_tasks: list[dict[str, Any]] = []
        self.stats: dict[str, Any] = {"total_tasks": 0, "start_time": None, "end_time": None}
        self._begun: dict[str, Sequence[Any]] = {}
        self._tasks: asyncio.Queue[Task | None] = asyncio.Queue(1)
        self._playing: asyncio.Task[None] | None = None
        limits = limits or replace(_PATIENT, max_steps=max_steps, max_images=limit_images)
        client = client_of_service(llm, model_name)
        self._store = RunStore.create(self.save_dir / ".run")
        try:
            self._scheduler = StreamingTaskScheduler(
                client,
                lambda: _MadeRunner(runner, limits),
                n=rollout_n,
                max_concurrency=total_envs,
                sampling_params=sampling_params,
                limits=limits,
                agent=AgentFormat(self._messages, UITarsParser("resized"), ParseErrorPolicy()),
                store=self._store,
                reuse_environments=False,
            )
        except BaseException:
            self._store.close()
            raise

    def _messages(self, history: Any) -> Sequence[Any]:
        return Continued(self._begun[history.task.id])(history)

    async def start(self) -> None:
        """Begins to play what is added."""
        if self._playing is None:
            self.stats["start_time"] = time.time()
            self._playing = asyncio.create_task(self._play())

    async def add_task(self, task_id: str, task_config: Mapping[str, Any], messages: Sequence[Any]) -> None:
        """A task, and the conversation that its rollouts begin with; waits as long as there is no room."""
        self._begun[task_id] = [dict(message) for message in messages]
        self.stats["total_tasks"] += 1
        config = dict(task_config)
        task = Task(task_id, str(config.get("instruction") or ""), data=config)
        putting = asyncio.ensure_future(self._tasks.put(task))
        # A run that has ended takes nothing any more; what ended it comes out of `stop`.
        await asyncio.wait({putting, *filter(None, [self._playing])}, return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()

    async def stop(self) -> None:
        """Waits until all that was added is over. Raises what ended the run, if something did."""
        playing = self._playing
        try:
            if playing is not None:
                ending = asyncio.ensure_future(self._tasks.put(None))
                await asyncio.wait({ending, playing}, return_when=asyncio.FIRST_COMPLETED)
                ending.cancel()
                await playing
        finally:
            self.stats["end_time"] = time.time()
            self._store.close()

    def close_all_envs(self) -> None:
        """Every runner was closed when its rollout was over."""

    def get_available_slots(self) -> int:
        """How many more tasks could run at once."""
        return max(0, self.max_concurrent_tasks - len(self.active_tasks))

    def get_stats(self) -> dict[str, Any]:
        """`stats`, with counts and the seconds that it took."""
        counts = {"completed_tasks": len(self.completed_tasks), "failed_tasks": len(self.failed_tasks)}
        begun, ended = self.stats["start_time"], self.stats["end_time"]
        return {**self.stats, **counts, **({"total_time": ended - begun} if begun and ended else {})}

    def is_finished(self, task_id: str, rollout_n: int) -> bool:
        """Whether all rollouts of a task are in the record of an earlier run."""
        finished = self._store.finished()
        return all((task_id, rollout) in finished for rollout in range(rollout_n))

    async def _added(self) -> AsyncIterator[Task]:
        while (task := await self._tasks.get()) is not None:
            self.active_tasks[task.id] = {"start_time": time.time()}
            yield task

    async def _play(self) -> None:
        async for group in self._scheduler.run_groups(self._added()):
            began = self.active_tasks.pop(group.task.id)["start_time"]
            result = await asyncio.to_thread(self._result, group, time.time() - began)
            (self.completed_tasks if result["status"] == "completed" else self.failed_tasks).append(result)

    def _result(self, group: Group, seconds: float) -> dict[str, Any]:
        folder = self.save_dir / file_name(group.task.id)
        names = []
        for trajectory in group.trajectories:
            name = f"runner_{trajectory.rollout}_{file_name(group.task.id)}"
            write_dart_folder(trajectory, self._store.images, folder / name)
            names.append(name if trajectory.ok else None)
        failures = [trajectory.failure for trajectory in group.trajectories if trajectory.failure is not None]
        result: dict[str, Any] = {"task_id": group.task.id, "execution_time": seconds}
        if len(failures) == len(group.trajectories):
            return {**result, "status": "failed", "error": str(failures[0]) if failures else "no rollout"}
        return {**result, "status": "completed", "folder_ids": names, "data_dir": str(folder)}


async def run_streaming_task_sampling_with_service(
    dataset: Iterable[Mapping[str, Any]],
    total_envs: int,
    rollout_n: int,
    llm: Any,
    sampling_params: Any,
    processor: Any = None,
    max_steps: int = 100,
    limit_images: int = 5,
    save_dir: str | os.PathLike[str] = "uitars_rollouts",
    parallel: int = 0,
    computer: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    """Plays a dataset: items with `task_id`, `task_config` and `messages`. Returns one result a task that was played.

    Of several computers each plays every `computer`-th task, from the `parallel`-th on; each needs a `save_dir` of its
    own. Tasks whose rollouts are all in the record are not played again. `options`: further ones of
    `StreamingTaskSchedulerWithService`, whose arguments the others are.
    """
    scheduler = StreamingTaskSchedulerWithService(
        total_envs, rollout_n, llm, sampling_params, processor, max_steps, limit_images, save_dir, **options
    )
    await scheduler.start()
    try:
        for number, item in enumerate(dataset):
            task_id = str(item["task_id"])
            if number % computer == parallel and not scheduler.is_finished(task_id, rollout_n):
                await scheduler.add_task(task_id, item["task_config"], item["messages"])
    finally:
        await scheduler.stop()
    return scheduler.completed_tasks + scheduler.failed_tasks


def run_streaming_task_sampling_sync_with_service(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """`run_streaming_task_sampling_with_service`, for programs without asyncio. Ctrl-C ends it cleanly."""
    inspect.signature(run_streaming_task_sampling_with_service).bind(
        *arguments, **options
    )  # TypeError here, not inside
    return blocking(lambda: run_streaming_task_sampling_with_service(*arguments, **options))


def run_agent_loop_with_service(
    llm: Any,
    runners: Sequence[Any],
    messages: Sequence[Sequence[Mapping[str, Any]]],
    sampling_params: Any = None,
    processor: Any = None,
    max_steps: int = 1,
    action_parse_res_factor: int | None = 1000,
    limit_images: int = 5,
    data_dir: str | None = None,
    model_name: str | None = None,
) -> list[str | None]:
    """`run_agent_loop`, which returns the names of the folders in `data_dir`; None for a runner that failed."""
    found = run_agent_loop(
        client_of_service(llm, model_name),
        runners,
        messages,
        sampling_params,
        processor,
        max_steps,
        action_parse_res_factor,
        limit_images,
        data_dir,
    )
    return [
        folder_of(number, one.task) if one.ok and data_dir is not None else None for number, one in enumerate(found)
    ]


def client_of_service(llm: Any, model_name: str | None = None) -> Any:
    """A client of ours for what the service scripts call `llm`: one already, or the OpenAI SDK's `OpenAI`.

    Raises `ConfigError`: it is neither, or which model is meant can't be told.
    """
    if isinstance(llm, VLLMClient | AsyncVLLMClient) or hasattr(llm, "async_client"):
        return llm
    base_url, api_key = getattr(llm, "base_url", None), getattr(llm, "api_key", None)
    if base_url is None or not hasattr(llm, "models"):
        raise ConfigError(f"llm must be a client of ours or the OpenAI SDK's, not {type(llm).__name__}", field="llm")
    served = [model.id for model in llm.models.list().data]
    name = model_name or (MODEL_NAME if MODEL_NAME in served else served[0] if len(served) == 1 else None)
    if name is None or name not in served:
        raise ConfigError(
            f"the server at {base_url} serves {', '.join(served) or 'no model'}, and not {name or MODEL_NAME}; say "
            "which is meant with model_name=",
            field="model_name",
        )
    return VLLMClient(str(base_url), api_key if isinstance(api_key, str) else None, name)


class _MadeRunner:
    """An environment around a runner that is made for the task, and closed with it."""

    patience_s = ThreadEnvironment.patience_s

    def __init__(self, runner: Callable[..., Any] | str, limits: Limits) -> None:
        self._runner = runner
        self._limits = limits
        self._environment: ThreadEnvironment | None = None

    async def reset(self, task: Task) -> Any:
        self._environment = ThreadEnvironment(lambda: _OwnRunner(_made(self._runner, task)), limits=self._limits)
        return await self._environment.reset(task)

    async def step(self, action: Any) -> Any:
        return await self._reached.step(action)

    async def evaluate(self) -> float | None:
        return await self._reached.evaluate()

    async def close(self) -> None:
        if self._environment is not None:
            await self._environment.close()

    @property
    def _reached(self) -> ThreadEnvironment:
        assert self._environment is not None, "reset comes first"
        return self._environment


class _OwnRunner(RunnerEnvironment):
    """A runner that is ours to close."""

    def close(self) -> None:
        close = getattr(self.runner, "close", None)
        if close is not None:
            called(close)


def _made(runner: Callable[..., Any] | str, task: Task) -> Any:
    made: Any = runner
    if isinstance(runner, str):
        module, _, name = runner.partition(":")
        made = getattr(import_module(module), name)
    make = getattr(made, "remote", made)  # a Ray actor's class
    return make(dict(task.data))
