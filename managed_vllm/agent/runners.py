"""`run_agent_loop`, as the scripts that this library replaces call it: runners and their begun conversations.

A runner is what those scripts have for each desktop: an object (or a Ray actor) with `get_obs()`,
`execute_action(code)` and `evaluate()`. Each is an environment of its own here, and its trajectory runs at its
own pace.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from managed_vllm.agent.actions import Action, CallUser, Coordinates, Finished, to_pyautogui
from managed_vllm.agent.environment import Environment
from managed_vllm.agent.environments.thread_environment import ThreadEnvironment
from managed_vllm.agent.export.dart import file_name, write_dart_folder
from managed_vllm.agent.format import AgentFormat, ParseErrorPolicy, UITarsParser
from managed_vllm.agent.prompting import Continued
from managed_vllm.agent.rewards import RewardFunction
from managed_vllm.agent.rollout_policies import RetryRollouts
from managed_vllm.agent.scheduler import StreamingTaskScheduler
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import Limits, Observation, StepResult, Task, Trajectory
from managed_vllm.errors import ConfigError


class RunnerEnvironment:
    """A runner of the old scripts as a (synchronous) environment.

    Args:
        runner: has `get_obs() -> {"screenshot": bytes, …}`, `execute_action(code)` with Python source for pyautogui or
            the word `FAIL`, and `evaluate() -> float`; each may be the method of a Ray actor. What `execute_action`
            returns may be nothing, or OSWorld's `(obs, reward, done, info)`, whose `done` ends the episode.
    """

    def __init__(self, runner: Any) -> None:
        missing = [name for name in ("get_obs", "execute_action", "evaluate") if not hasattr(runner, name)]
        if missing:
            raise ConfigError(f"{type(runner).__name__} is no runner: it has no {', '.join(missing)}", field="runners")
        self.runner = runner

    def reset(self, task: Task) -> Observation:
        """What the runner shows: it was reset to its task when it was made."""
        return _seen(self._call("get_obs"))

    def step(self, action: Action) -> StepResult:
        """Executes the action's code. `finished` ends the episode; `call_user` does, and the runner is told `FAIL`."""
        if isinstance(action, Finished):
            return StepResult(Observation(), terminated=True)
        if isinstance(action, CallUser):
            # OSWorld's evaluators look at it: a task that can't be done is done by saying so.
            self._call("execute_action", "FAIL")
            return StepResult(Observation(), terminated=True)
        said = self._call("execute_action", to_pyautogui([action]))
        if isinstance(said, tuple) and len(said) == 4:
            obs, reward, done, info = said
            return StepResult(_seen(obs or self._call("get_obs")), reward, terminated=bool(done), info=info or {})
        return StepResult(_seen(self._call("get_obs")))

    def evaluate(self) -> float | None:
        """The runner's verdict."""
        said = self._call("evaluate")
        return None if said is None else float(said)

    def close(self) -> None:
        """Nothing: the runner is the caller's."""

    def _call(self, name: str, *arguments: Any) -> Any:
        return called(getattr(self.runner, name), *arguments)


def called(method: Any, *arguments: Any) -> Any:
    """A method's result, also of a Ray actor's."""
    if not hasattr(method, "remote"):
        return method(*arguments)
    return sys.modules["ray"].get(method.remote(*arguments))  # it is loaded, if there are actors


def _seen(obs: Any) -> Observation:
    if not isinstance(obs, Mapping) or not isinstance(obs.get("screenshot"), bytes):
        raise TypeError(f"an observation has the bytes of a screenshot, not {obs!r:.200}")
    text = obs.get("accessibility_tree")
    return Observation(obs["screenshot"], text if isinstance(text, str) else None)


def run_agent_loop(
    llm: Any,
    runners: Sequence[Any],
    messages: Sequence[Sequence[Mapping[str, Any]]],
    sampling_params: Any = None,
    processor: Any = None,
    max_steps: int = 1,
    action_parse_res_factor: int | None = None,
    limit_images: int = 5,
    data_dir: str | None = None,
    model_name: str | None = None,
    *,
    coordinates: Coordinates = "resized",
    show_text: bool = False,
    limits: Limits | None = None,
    agent: AgentFormat | None = None,
    on_parse_error: ParseErrorPolicy | None = None,
    exact: bool = True,
    reward: RewardFunction | None = None,
    on_trajectory: Callable[[Trajectory], None] | None = None,
    join: bool = False,
) -> list[Trajectory]:
    """Plays one episode on each runner, all at once and each at its own pace; waits for all of them.

    It is a run of `StreamingTaskScheduler` with one rollout a runner, and resumes as that does.

    Args:
        llm: a `ManagedVLLM`, `VLLMClient` (`VLLMClientWrapper`) or `AsyncVLLMClient`.
        runners: one desktop each, see `RunnerEnvironment`; or an `Environment`, which is reset, and stays the caller's.
        messages: one begun conversation for each runner, with its instruction; screenshots and answers come after it.
        sampling_params: ours, vLLM's, or a dict.
        processor: not needed; the server has its own.
        max_steps: turns, at most.
        action_parse_res_factor: only None, or 1000, the value with which the old parser left Qwen2.5-VL's coordinates
            alone; say `coordinates="relative1000"` for models that give thousandths.
        limit_images: the newest images that are sent; all of the text is.
        data_dir: a folder for the run (`RunStore`), in which each runner leaves a folder, too, as the old loop did
            (`export.dart`); None: nothing is kept. One that is there is gone on with: runners (by their number and
            their task's id) whose episode is finished there are not played again.
        model_name: another name than the client's under which the server has the model, an adapter's say.
        coordinates: what the model's numbers are; see `parse_ui_tars`.
        show_text: whether a runner's `accessibility_tree` is sent beside its screenshot.
        limits: in place of `max_steps` and `limit_images`.
        agent: in place of UI-TARS' notation and of `messages`.
        on_parse_error: what an answer that is no action leads to.
        exact: whether the server must tell token ids and logprobs, as for `StreamingTaskScheduler`.
        reward: called with each trajectory when it is over; what it returns is the reward (see `rewards`). None: what
            the runner's `evaluate` said.
        on_trajectory: called with each trajectory as it is finished.
        join: whether further processes have the same `data_dir`, also on other hosts (`RunStore.join`), each with
            runners of its own: for other tasks, or for the same ones, each of which is played on one process's runner.
            The others' trajectories of the latter are returned as if they had been played here.

    Returns one trajectory for each runner, in their order; one that failed says so in `failure` and has no reward.

    Raises `ConfigError` and `BadRequestError` for arguments that can't be, before anything is played; and what every
    other episode would meet, too (a wrong key, a server given up for good).
    """
    if len(runners) != len(messages):
        raise ConfigError(f"{len(runners)} runners but {len(messages)} conversations", field="messages")
    if action_parse_res_factor not in (None, 1000):
        raise ConfigError(
            f"action_parse_res_factor={action_parse_res_factor} has no meaning for models that give pixels of the "
            'resized image; say what the numbers are with coordinates="relative1000" or "absolute"',
            field="action_parse_res_factor",
        )
    for runner in runners:
        if not _is_environment(runner):
            RunnerEnvironment(runner)  # is it one?
    if join and data_dir is None:
        raise ConfigError("join= is about the run in data_dir=: give one", field="join")
    if not runners:
        return []
    limits = limits or Limits(max_steps=max_steps, max_images=limit_images)
    tasks = [_task(number, runner) for number, runner in enumerate(runners)]
    runner_of = {task.id: runner for task, runner in zip(tasks, runners, strict=True)}
    if agent is None:
        begun = {task.id: [dict(message) for message in one] for task, one in zip(tasks, messages, strict=True)}
        agent = AgentFormat(
            lambda history: Continued(begun[history.task.id], show_text)(history),
            UITarsParser(coordinates),
            on_parse_error or ParseErrorPolicy(),
            {} if model_name is None else {"model": model_name},
        )
    notes = {"runners": len(runners)}
    enter = RunStore.join if join else RunStore.create
    played: set[tuple[str, int]] = set()

    def on_attempt(trajectory: Trajectory) -> None:
        played.add(trajectory.key)
        if on_trajectory is not None:
            on_trajectory(trajectory)

    with contextlib.nullcontext() if data_dir is None else enter(data_dir, notes=notes) as store:
        scheduler = StreamingTaskScheduler(
            llm,
            lambda: _WithItsRunner(runner_of, limits),
            max_concurrency=len(runners),
            sampling_params=sampling_params,
            limits=limits,
            agent=agent,
            retry=RetryRollouts(max_attempts=1),  # a runner can't be reset
            store=store,
            on_attempt=on_attempt,
            reuse_environments=False,
            exact=exact,
            reward=reward,
            stop_after_failures=None,
        )
        found = list(scheduler.run_all(tasks))
        if store is not None:
            for number, trajectory in enumerate(found):
                folder = store.path / folder_of(number, trajectory.task)
                # What another process has played it also writes, perhaps at this moment.
                if not join or trajectory.key in played or not folder.exists():
                    write_dart_folder(trajectory, store.images, folder)
        return found


def folder_of(number: int, task: Task) -> str:
    """The folder of a runner in `data_dir`: its number, and its task's id where it has one."""
    name = task.data.get("id", task.data.get("task_id"))
    return f"runner_{number}" if name is None else f"runner_{number}_{file_name(str(name))}"


class _WithItsRunner:
    """An environment that is, from its `reset` on, the one of the runner that the task is for."""

    def __init__(self, runner_of: Mapping[str, Any], limits: Limits) -> None:
        self._runner_of = runner_of
        self._limits = limits
        self._environment: Environment | None = None
        self._ours = False

    @property
    def patience_s(self) -> float:
        """See `Environment`; the longest of those that there may be, as long as it is not known which."""
        return float(getattr(self._environment, "patience_s", ThreadEnvironment.patience_s))

    def extra_s(self, call: str, action: Action | None = None) -> float:
        """See `Environment`."""
        extra_s = getattr(self._environment, "extra_s", None)
        return 0.0 if extra_s is None else float(extra_s(call, action))

    async def reset(self, task: Task) -> Observation:
        runner = self._runner_of[task.id]
        self._ours = not _is_environment(runner)
        made: Environment = runner
        if self._ours:
            made = ThreadEnvironment(lambda: RunnerEnvironment(runner), limits=self._limits)
        self._environment = made
        return await made.reset(task)

    async def step(self, action: Action) -> StepResult:
        return await self._reached.step(action)

    async def evaluate(self) -> float | None:
        return await self._reached.evaluate()

    async def close(self) -> None:
        """Ends the thread. Runners and environments are the caller's, and stay as they are."""
        if self._ours:
            await self._reached.close()

    @property
    def _reached(self) -> Environment:
        assert self._environment is not None, "reset comes first"
        return self._environment


def _is_environment(runner: Any) -> bool:
    return isinstance(runner, Environment) and inspect.iscoroutinefunction(runner.step)


def _task(number: int, runner: Any) -> Task:
    """Named by the runner's number and its task's id, where the runner tells one."""
    config: Any = None
    if hasattr(runner, "get_task_config"):
        config = called(runner.get_task_config)
    name = f"runner-{number}"
    if isinstance(config, Mapping):
        its = config.get("id", config.get("task_id"))
        name = f"{name}-{its}" if its is not None else name
        return Task(name, str(config.get("instruction") or ""), data=dict(config))
    return Task(name)
