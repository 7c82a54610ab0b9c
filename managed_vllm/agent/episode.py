"""One episode: one environment, one attempt at one rollout of a task, from `reset` to its reward.

In this order:

1. `reset`. What is seen is kept: the screenshot in the `ImageStore`, the words in the turn.
2. Each turn: the limits are looked at; the model is asked (`inference`); its answer is recorded with exact token ids
   and logprobs; it is parsed; its actions are carried out one by one, until one ends the episode.
3. `evaluate`, unless something failed. Without a verdict the reward is the sum of the steps'. A reward function of the
   caller's own has the last word.

Whatever is raised in between, by the environment, the server, or the caller's own code, ends up as the trajectory's
`Failure`, and then there is no reward; only cancellation comes out. Every call of the environment is bounded by its own
limit. The episode's limit is looked at before each turn and bounds the model's answer, so that the environment is never
cut off in the middle of an action and can still be evaluated.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from managed_vllm import tracing
from managed_vllm.agent import inference
from managed_vllm.agent.actions import Action, ActionParseError, CallUser, Finished, ParsedResponse, Wait
from managed_vllm.agent.bounded import Deadline, bounded
from managed_vllm.agent.environment import Environment
from managed_vllm.agent.format import AgentFormat, PictureParser, ThenWhat
from managed_vllm.agent.image_store import ImageStore, own_images
from managed_vllm.agent.prompting import NO_SCREENSHOT, History, Turn
from managed_vllm.agent.rewards import WHAT, RewardFunction, name_of, score_of, with_score
from managed_vllm.agent.rules import Rules, StepHook
from managed_vllm.agent.types import (
    Attempt,
    Failure,
    FailureClass,
    ImageRef,
    Limits,
    Observation,
    RejectedAnswer,
    Step,
    StepResult,
    StepTimings,
    StopReason,
    Task,
    Trajectory,
)
from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    ManagedVLLMError,
    ModelNotFoundError,
    RequestTimeoutError,
    ServerStoppedError,
    StartupError,
    UnsupportedParameterError,
)
from managed_vllm.request.outputs import CompletionOutput

log = logging.getLogger("managed_vllm.agent")

T = TypeVar("T")

FATAL = (
    StartupError,
    ServerStoppedError,
    AuthenticationError,
    ModelNotFoundError,
    UnsupportedParameterError,
    ConfigError,
)
"""Errors that every other request would meet, too: a run ends with them."""

_TRACEBACK_CHARS = 4000
_INFO_CHARS = 1000


async def run_episode(
    llm: Any,
    environment: Environment,
    task: Task,
    *,
    sampling_params: Any = None,
    limits: Limits | None = None,
    agent: AgentFormat | None = None,
    images: ImageStore | None = None,
    on_step: StepHook | None = None,
    reward: RewardFunction | None = None,
    exact: bool = True,
    rollout: int = 0,
    attempt: int = 0,
) -> Trajectory:
    """Plays one episode and returns it, whatever happened; see the top of this module.

    Args:
        llm: a `ManagedVLLM`, `VLLMClient` or `AsyncVLLMClient`.
        environment: is reset, and neither closed nor, after a failure, fit for further use.
        task: what is to be done.
        sampling_params: for each answer; logprobs of the sampled tokens are asked for in any case.
        limits: steps, tokens, images, seconds.
        agent: how the model is spoken to; None: `format.ui_tars()`.
        images: where screenshots are kept, by content; None: in a temporary folder of this process.
        on_step: called with task, rollout and each step.
        reward: called with the trajectory when it is over; what it returns is the reward (see `rewards`).
        exact: whether the server must tell token ids and logprobs; False: for evaluation on one that does not.
        rollout, attempt: numbers of the trajectory that is returned.

    Raises what the caller's arguments are to blame for (`BadRequestError`, `ConfigError`), and `CancelledError`.
    """
    rules = Rules.of(
        llm,
        images if images is not None else own_images(),
        sampling_params,
        limits,
        agent,
        on_step=on_step,
        reward=reward,
        exact=exact,
    )
    return await Episode(rules, environment, Attempt(task, rollout, attempt)).run()


class _End(Exception):
    """The episode is over."""

    def __init__(self, reason: StopReason, failure: Failure | None = None, reward: float | None = None) -> None:
        self.reason = reason
        self.failure = failure
        self.reward = reward


class Episode:
    """One attempt. `run` plays it; `fatal` is then the error that ends the whole run, if there was one."""

    def __init__(self, rules: Rules, environment: Environment, attempt: Attempt) -> None:
        self.fatal: ManagedVLLMError | None = None
        self._rules = rules
        self._environment = environment
        self._attempt = attempt
        self._session = f"{attempt.task.id}/{attempt.rollout}/{secrets.token_hex(4)}"
        self._instruction = attempt.task.instruction
        self._turns: list[Turn] = []
        self._steps: list[Step] = []
        self._tokens = 0
        self._corrections = 0
        self._waits_left = rules.agent.call_user_waits
        self._deadline = Deadline(None)
        self._final: ImageRef | None = None
        self._reset_s = self._evaluate_s = 0.0

    async def run(self) -> Trajectory:
        """The trajectory. Raises nothing but `CancelledError`."""
        with tracing.episode_span(self._attempt.task.id, self._attempt.rollout, self._attempt.number) as span:
            found = await self._run()
            failure = found.failure
            error = None if failure is None else (failure.error_type, str(failure))
            span.tell(error, reward=found.reward, steps=len(found.steps))
            span.tell(stop_reason=str(found.stop_reason))
            return found

    async def _run(self) -> Trajectory:
        began, started_at = time.monotonic(), time.time()
        reward: float | None = None
        try:
            await self._play()
            raise AssertionError("an episode has an end")
        except _End as end:
            reason, failure, reward = end.reason, end.failure, end.reward
        if failure is None and reward is None:
            try:
                reward = await self._verdict()
            except _End as end:
                reason, failure, reward = end.reason, end.failure, None
        found = Trajectory(
            task=self._attempt.task,
            rollout=self._attempt.rollout,
            attempt=self._attempt.number,
            steps=tuple(self._steps),
            stop_reason=reason,
            reward=reward,
            failure=failure,
            instruction=self._instruction,
            final_screenshot=self._final,
            started_at=started_at,
            duration_s=time.monotonic() - began,
            reset_s=self._reset_s,
            evaluate_s=self._evaluate_s,
            group_round=self._attempt.group_round,
            info=dict(self._steps[-1].info) if self._steps else {},
            exact=self._rules.exact,
        )
        return found if self._rules.reward is None or not found.ok else await self._scored(found, self._rules.reward)

    async def _scored(self, found: Trajectory, function: RewardFunction) -> Trajectory:
        """With the reward of the caller's function; what that raises is a failure of the attempt."""
        try:
            score = await bounded(lambda: score_of(function, found), self._rules.limits.evaluate_timeout_s, WHAT)
        except Exception as error:
            end = self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "reward", error)
            return replace(found, stop_reason=end.reason, failure=end.failure, reward=None)
        return with_score(found, name_of(function), score)

    async def _play(self) -> None:
        limits = self._rules.limits
        self._check_environment()
        began = time.monotonic()
        observation: Any = await self._call(
            "reset", lambda: self._environment.reset(self._attempt.task), limits.reset_timeout_s
        )
        self._reset_s = time.monotonic() - began
        self._deadline = Deadline(limits.episode_timeout_s)
        if isinstance(observation, Observation) and observation.instruction is not None:
            self._instruction = observation.instruction
        await self._see(observation, "reset")
        while True:
            if len(self._steps) >= limits.max_steps:
                raise _End(StopReason.MAX_STEPS)
            if self._out_of_tokens:
                raise _End(StopReason.MAX_TOKENS)
            if self._deadline.passed:
                raise _End(StopReason.EPISODE_TIMEOUT)
            with tracing.step_span(len(self._steps)):
                await self._turn()

    def _check_environment(self) -> None:
        names = ("reset", "step", "evaluate", "close")
        missing = [name for name in names if not callable(getattr(self._environment, name, None))]
        if missing:
            error = TypeError(
                f"{type(self._environment).__name__} has no {', '.join(missing)}: an environment has {', '.join(names)}"
            )
            raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, "reset", error)

    # -- the environment -----------------------------------------------------------------------------------------------

    async def _call(
        self, stage: str, make: Callable[[], Awaitable[T]], seconds: float, action: Action | None = None
    ) -> T:
        """One call of the environment; what it raises ends the episode."""
        try:
            seconds += float(getattr(self._environment, "patience_s", 0.0))
            extra_s = getattr(self._environment, "extra_s", None)
            if extra_s is not None:
                seconds += float(extra_s(stage, action))
            return await bounded(make, seconds, f"{stage} of {type(self._environment).__name__}")
        except Exception as error:
            raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, stage, error) from error

    async def _see(self, observation: Any, stage: str) -> None:
        """Keeps what is seen, as the next turn."""
        if not isinstance(observation, Observation):
            error = TypeError(f"{stage} must give an Observation, not {type(observation).__name__}")
            raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, stage, error)
        shot: ImageRef | None = None
        if observation.screenshot is not None:
            try:
                shot = await inference.keep_image(self._rules, observation.screenshot)
            except ManagedVLLMError as error:  # no image
                raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, "observe", error) from error
            except OSError as error:  # a full disk
                raise self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "observe", error) from error
        self._final = shot or self._final
        self._turns.append(Turn(shot, observation.text, extras=observation.extras))

    async def _verdict(self) -> float | None:
        began = time.monotonic()
        said = await self._call("evaluate", lambda: self._environment.evaluate(), self._rules.limits.evaluate_timeout_s)
        self._evaluate_s = time.monotonic() - began
        if said is not None:
            return self._reward(said, "evaluate")
        rewards = [step.reward for step in self._steps if step.reward is not None]
        return sum(rewards) if rewards else None

    def _reward(self, said: Any, stage: str) -> float:
        try:
            reward = float(said)
            if math.isfinite(reward):
                return reward
            error: Exception = ValueError(f"{said!r} is no reward")
        except (TypeError, ValueError) as bad:
            error = bad
        raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, stage, error)

    # -- one turn ------------------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        began, started_at = time.monotonic(), time.time()
        turn = self._turns[-1]
        step = Step(index=len(self._steps), screenshot=turn.screenshot, text=turn.text)
        step, end = await self._answered(step)
        observation: Observation | None = None
        environment_s = 0.0
        if step.actions:
            acting = time.monotonic()
            step, observation, end = await self._act(step)
            environment_s = time.monotonic() - acting
        times = {"started_at": started_at, "environment_s": environment_s, "total_s": time.monotonic() - began}
        step = replace(step, timings=replace(step.timings, **times))
        self._steps.append(step)
        if end is None or end.failure is None:
            end = await self._told_of(step) or end
        if end is not None and end.failure is not None:
            raise end
        if observation is not None and (end is None or observation.screenshot is not None):
            await self._see(observation, "step")
        if end is not None:
            raise end

    async def _told_of(self, step: Step) -> _End | None:
        """Tells the caller's hook; what that raises is the end."""
        if self._rules.on_step is None:
            return None
        try:
            said = self._rules.on_step(self._attempt.task, self._attempt.rollout, step)
            if said is not None:
                await said
        except Exception as error:
            return self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "hook", error)
        return None

    async def _answered(self, step: Step) -> tuple[Step, _End | None]:
        """The turn with an answer that is an action, or the last of those that are none; and what follows from it."""
        policy = self._rules.agent.on_parse_error
        rejected: list[RejectedAnswer] = []
        timings = StepTimings()
        while True:
            step, sampled = await self._ask(step, policy.resample_temperature if rejected else None)
            self._tokens += len(step.response_token_ids)
            timings = replace(
                timings,
                queue_s=timings.queue_s + sampled.queue_s,
                model_s=timings.model_s + sampled.output.latency,
            )
            answer = sampled.output.outputs[0]
            refused: Exception | None = None
            try:
                parsed = self._parsed(answer)
                step = replace(step, thought=parsed.thought, actions=tuple(parsed.actions))
            except Exception as error:
                refused = error
            if not isinstance(refused, ActionParseError) or len(rejected) >= policy.resample or self._out_of_tokens:
                break
            rejected.append(_rejected(step, refused))
        step = replace(step, timings=timings, rejected=tuple(rejected))
        self._turns[-1] = replace(self._turns[-1], response=answer.text, tool_calls=tuple(answer.tool_calls), extras={})
        if isinstance(refused, ActionParseError):
            return replace(step, parse_error=str(refused)), self._not_an_action(refused)
        if refused is not None:
            return step, self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "parse", refused)
        return step, None

    def _parsed(self, answer: CompletionOutput) -> ParsedResponse:
        """Raises `ActionParseError`, or whatever a parser of the caller's own raises."""
        parse, size = self._rules.agent.parse, self._size()
        if isinstance(parse, PictureParser):
            parsed = parse(answer, size, self._rules.pictures.of(size))
        else:
            parsed = parse(answer, size)
        if not parsed.actions:
            raise ActionParseError("the answer has no action", text=answer.text, span=(0, len(answer.text)))
        return parsed

    @property
    def _out_of_tokens(self) -> bool:
        most = self._rules.limits.max_episode_tokens
        return most is not None and self._tokens >= most

    def _size(self) -> tuple[int, int]:
        """Of the newest screenshot: a turn that only sends an answer back is about the one before."""
        shot = next((one.screenshot for one in reversed(self._turns) if one.screenshot is not None), None)
        return NO_SCREENSHOT if shot is None else (shot.width, shot.height)

    def _not_an_action(self, error: ActionParseError) -> _End | None:
        """The end that follows from an answer that is no action, or None: the model is told, and asked again."""
        policy = self._rules.agent.on_parse_error
        if self._corrections < policy.retries:
            self._corrections += 1
            self._turns.append(Turn(text=policy.correction.replace("{error}", error.message)))
            return None
        if policy.then is ThenWhat.FAIL:
            return self._failed(StopReason.PARSE_ERROR, FailureClass.PARSER, "parse", error)
        return _End(StopReason.PARSE_ERROR, reward=policy.penalty if policy.then is ThenWhat.PENALISE else None)

    async def _act(self, step: Step) -> tuple[Step, Observation | None, _End | None]:
        """Carries the actions out, until one of them ends the episode."""
        if self._gives_up(step):
            step, observation, end = await self._carried_out(step, CallUser(), executed=0)
            return step, observation, end if end is not None and end.failure is not None else _End(StopReason.MAX_STEPS)
        observation = None
        end = None
        for number, action in enumerate(step.actions, 1):
            if isinstance(action, CallUser) and self._waits_left > 0:
                self._waits_left -= 1
                action = Wait()
            step, seen, end = await self._carried_out(step, action, executed=number)
            observation = seen or observation
            if end is not None:
                break
        return step, observation, end

    def _gives_up(self, step: Step) -> bool:
        """Whether the turn is the last one, and is not carried out (`AgentFormat.give_up_at_last_step`)."""
        if not self._rules.agent.give_up_at_last_step or step.index + 1 < self._rules.limits.max_steps:
            return False
        return not any(isinstance(action, Finished | CallUser | Wait) for action in step.actions)

    async def _carried_out(
        self, step: Step, action: Action, *, executed: int
    ) -> tuple[Step, Observation | None, _End | None]:
        """One action: the turn with what it led to, what is seen, and the end if it is one."""
        call = functools.partial(self._environment.step, action)
        try:
            result: Any = await self._call("step", call, self._rules.limits.step_timeout_s, action)
            if not isinstance(result, StepResult):
                error = TypeError(f"step must give a StepResult, not {type(result).__name__}")
                raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, "step", error)
            reward = None if result.reward is None else self._reward(result.reward, "step")
        except _End as failed:
            return step, None, failed
        if reward is not None:
            reward += step.reward or 0.0
        step = replace(
            step,
            executed=executed,
            reward=step.reward if reward is None else reward,
            terminated=result.terminated,
            truncated=result.truncated,
            info=_plain(result.info),
        )
        return step, result.observation, _ending(action, result)

    # -- the model -----------------------------------------------------------------------------------------------------

    async def _ask(self, step: Step, temperature: float | None) -> tuple[Step, inference.Sampled]:
        """The step with what was sent and what came back; and the answer."""
        rules = self._rules
        history = History(self._attempt.task, self._instruction, tuple(self._turns), rules.limits.max_images)
        try:
            prompt = await inference.prompt_of(rules, history)
        except Exception as error:
            raise self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "messages", error) from error
        try:
            sampled = await inference.sample(
                rules,
                prompt,
                deadline=self._deadline,
                tokens_so_far=self._tokens,
                session=self._session,
                temperature=temperature,
            )
        except Exception as error:
            raise self._unanswered(error) from error
        output = sampled.output
        step = replace(
            step,
            messages=prompt.recorded,
            prompt_token_ids=list(output.prompt_token_ids),
            response=output.outputs[0].text,
            response_token_ids=sampled.token_ids,
            response_logprobs=sampled.logprobs,
            finish_reason=output.outputs[0].finish_reason,
            model=output.model,
            epoch=output.epoch,
            attempts=output.attempts,
            weight_version=sampled.weight_version,
            weight_versions=_parts(output.outputs[0]),
        )
        return step, sampled

    def _unanswered(self, error: Exception) -> _End:
        """What follows from a request that has no answer."""
        if isinstance(error, ContextLengthError):
            log.debug("%s/%d: %s", self._attempt.task.id, self._attempt.rollout, error)
            return _End(StopReason.CONTEXT_OVERFLOW)
        if isinstance(error, RequestTimeoutError) and self._deadline.passed:
            return _End(StopReason.EPISODE_TIMEOUT)
        if isinstance(error, FATAL):
            self.fatal = error
        refused_here = isinstance(error, BadRequestError) and error.status is None
        ours = refused_here or isinstance(error, ConfigError)
        kind = FailureClass.USER_CODE if ours else FailureClass.MODEL_SERVER
        return self._failed(StopReason.LLM_FAILURE, kind, "generate", error)

    # -- failures ------------------------------------------------------------------------------------------------------

    def _failed(self, reason: StopReason, kind: FailureClass, stage: str, error: Exception) -> _End:
        inside = stage not in ("reset", "evaluate", "reward") and (self._turns or self._steps)
        trace = "".join(traceback.format_exception(error))
        failure = Failure(
            kind=kind,
            stage=stage,
            error_type=getattr(error, "error_type", None) or type(error).__name__,
            message=getattr(error, "message", None) or str(error),
            step=len(self._steps) if inside else None,
            details=trace[-_TRACEBACK_CHARS:],
        )
        log.debug("%s/%d: %s", self._attempt.task.id, self._attempt.rollout, failure)
        return _End(reason, failure)


def _parts(answer: CompletionOutput) -> tuple[tuple[str, int, int], ...]:
    spans = answer.weight_versions or ()
    return tuple((span.version, span.start, span.end) for span in spans) if len(spans) > 1 else ()


def _rejected(step: Step, error: ActionParseError) -> RejectedAnswer:
    return RejectedAnswer(
        step.response, step.response_token_ids, step.response_logprobs, step.finish_reason, str(error)
    )


def _ending(action: Action, result: StepResult) -> _End | None:
    if isinstance(action, Finished):
        return _End(StopReason.FINISHED)
    if isinstance(action, CallUser):
        return _End(StopReason.CALL_USER)
    if result.terminated:
        return _End(StopReason.TERMINATED)
    if result.truncated:
        return _End(StopReason.TRUNCATED)
    return None


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment says, as JSON has it; what JSON has not stands there as text."""
    if not info:
        return {}

    def other(value: Any) -> Any:
        if hasattr(value, "tolist"):  # numpy's
            return value.tolist()
        return repr(value)[:_INFO_CHARS]

    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(info), default=other, skipkeys=True))
        return found
    except (TypeError, ValueError, RecursionError) as error:
        return {"unreadable": f"{type(error).__name__}: {error}"[:_INFO_CHARS]}
