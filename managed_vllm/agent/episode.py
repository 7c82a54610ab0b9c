"""One episode: one environment, one attempt at one rollout of a task, from `reset` to its reward.

In this order:

1. `reset`. What is seen is kept: the screenshot in the `ImageStore`, the words in the turn.
2. Each turn: the limits are looked at; the messages are built; the model is asked, once the gate is open; its answer is
   recorded with exact token ids and logprobs; it is parsed; its actions are carried out one by one, until one ends the
   episode.
3. `evaluate`, unless something failed. Without a verdict the reward is the sum of the steps'.

Whatever is raised in between, by the environment, the server, or the caller's own code, ends up as the trajectory's
`Failure`, and then there is no reward; only cancellation comes out. Every call of the environment is bounded by its own
limit. The episode's limit is looked at before each turn and bounds the model's answer, so that the environment is never
cut off in the middle of an action and can still be evaluated.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import re
import struct
import time
import traceback
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from managed_vllm import forks
from managed_vllm.agent.actions import Action, ActionParseError, CallUser, Finished
from managed_vllm.agent.environment import Environment
from managed_vllm.agent.format import NO_SCREENSHOT, AgentFormat, ThenWhat, ui_tars
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.prompting import History, Turn, images_of
from managed_vllm.agent.types import (
    Failure,
    FailureClass,
    ImageRef,
    Limits,
    Message,
    Observation,
    Step,
    StepResult,
    StepTimings,
    StopReason,
    Task,
    Trajectory,
)
from managed_vllm.client import AsyncVLLMClient, VLLMClient
from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    EnvironmentFailedError,
    EnvironmentTimeoutError,
    ManagedVLLMError,
    ModelNotFoundError,
    RequestError,
    RequestTimeout,
    ServerStoppedError,
    StartupError,
    UnsupportedParameterError,
)
from managed_vllm.request.images import Image
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.request.sampling import SamplingParams

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

_GRACE_S = 5.0
"""For a call of an environment that was cancelled to come to its end."""
_TRACEBACK_CHARS = 4000
_INFO_CHARS = 1000

StepHook = Callable[[Task, int, Step], Awaitable[None] | None]
"""Called with task, rollout and each step as it is complete. What it raises fails the attempt."""


def client_of(llm: Any) -> AsyncVLLMClient:
    """The asynchronous client of a `ManagedVLLM`, a `VLLMClient`, or itself. `ConfigError` for anything else."""
    if isinstance(llm, AsyncVLLMClient):
        return llm
    if isinstance(llm, VLLMClient) or hasattr(llm, "async_client"):
        found = llm.async_client
        if isinstance(found, AsyncVLLMClient):
            return found
    raise ConfigError(
        f"llm must be a ManagedVLLM, a VLLMClient or an AsyncVLLMClient, not {type(llm).__name__}; "
        "for a server by URL: VLLMClient(base_url, api_key, model_name)",
        field="llm",
    )


class Gate:
    """Lets requests to the model pass, or holds them back: `pause` while the weights are being changed."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inside = 0

    @property
    def paused(self) -> bool:
        return not self._open.is_set()

    @contextlib.asynccontextmanager
    async def passed(self) -> AsyncIterator[float]:
        """Waits until it is open, and yields the seconds that this took."""
        began = time.monotonic()
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._idle.clear()
        try:
            yield time.monotonic() - began
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    async def pause(self) -> None:
        """Lets nobody in any more, and returns when all who were inside are out."""
        self.close()
        await self._idle.wait()

    def close(self) -> None:
        """Lets nobody in any more."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()


@dataclass(frozen=True, slots=True)
class Rules:
    """What the episodes of a run have in common.

    Attributes:
        client: of the model's server.
        images: where screenshots are kept.
        params: sampling parameters, with logprobs.
        limits: how far an episode may go.
        agent: how the model is spoken to and understood.
        on_step: called with each step.
        gate: held while the model is asked.
        weight_version: tells which weights answer now.
        preflight: looks once whether the server takes as many images as the limits allow.
    """

    client: AsyncVLLMClient
    images: ImageStore
    params: SamplingParams
    limits: Limits
    agent: AgentFormat
    on_step: StepHook | None = None
    gate: Gate = field(default_factory=Gate)
    weight_version: Callable[[], str | None] = lambda: None
    preflight: Preflight = field(default_factory=lambda: Preflight())

    @classmethod
    def of(
        cls,
        llm: Any,
        images: ImageStore,
        sampling_params: Any = None,
        limits: Limits | None = None,
        agent: AgentFormat | None = None,
        **more: Any,
    ) -> Rules:
        """From what callers give. Raises `BadRequestError` for sampling parameters that can't be."""
        params = SamplingParams.of(sampling_params)
        if params.n not in (None, 1):
            raise BadRequestError("an episode has one answer a turn; for n rollouts a task use the scheduler's n=")
        if params.logprobs is None:
            params = replace(params, logprobs=0)  # of the sampled token alone
        return cls(client_of(llm), images, params, limits or Limits(), agent or ui_tars(), **more)


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
    )
    return await Episode(rules, environment, task, rollout=rollout, attempt=attempt).run()


class _End(Exception):
    """The episode is over."""

    def __init__(self, reason: StopReason, failure: Failure | None = None, reward: float | None = None) -> None:
        self.reason = reason
        self.failure = failure
        self.reward = reward


class Episode:
    """One attempt. `run` plays it; `fatal` is then the error that ends the whole run, if there was one."""

    def __init__(
        self,
        rules: Rules,
        environment: Environment,
        task: Task,
        *,
        rollout: int = 0,
        attempt: int = 0,
        group_round: int = 0,
    ) -> None:
        self._rules = rules
        self._environment = environment
        self._task = task
        self._rollout = rollout
        self._attempt = attempt
        self._group_round = group_round
        self._instruction = task.instruction
        self._turns: list[Turn] = []
        self._steps: list[Step] = []
        self._tokens = 0
        self._corrections = 0
        self._deadline: float | None = None
        self._final: ImageRef | None = None
        self._reset_s = self._evaluate_s = 0.0
        self.fatal: ManagedVLLMError | None = None

    async def run(self) -> Trajectory:
        """The trajectory. Raises nothing but `CancelledError`."""
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
        return Trajectory(
            task=self._task,
            rollout=self._rollout,
            attempt=self._attempt,
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
            group_round=self._group_round,
            info=dict(self._steps[-1].info) if self._steps else {},
        )

    async def _play(self) -> None:
        limits = self._rules.limits
        began = time.monotonic()
        observation: Any = await self._call(
            "reset", lambda: self._environment.reset(self._task), limits.reset_timeout_s
        )
        self._reset_s = time.monotonic() - began
        if limits.episode_timeout_s is not None:
            self._deadline = time.monotonic() + limits.episode_timeout_s
        if isinstance(observation, Observation) and observation.instruction is not None:
            self._instruction = observation.instruction
        await self._see(observation, "reset")
        while True:
            if len(self._steps) >= limits.max_steps:
                raise _End(StopReason.MAX_STEPS)
            if limits.max_episode_tokens is not None and self._tokens >= limits.max_episode_tokens:
                raise _End(StopReason.MAX_TOKENS)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise _End(StopReason.EPISODE_TIMEOUT)
            await self._turn()

    # -- the environment -----------------------------------------------------------------------------------------------

    async def _call(self, stage: str, make: Callable[[], Awaitable[T]], seconds: float) -> T:
        """One call of the environment; what it raises ends the episode."""
        patience_s = float(getattr(self._environment, "patience_s", 0.0))
        try:
            return await bounded(make, seconds + patience_s, f"the environment's {stage}")
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
                shot = await self._keep(observation.screenshot)
            except ManagedVLLMError as error:  # no image
                raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, "observe", error) from error
            except OSError as error:  # a full disk
                raise self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "observe", error) from error
        self._final = shot or self._final
        self._turns.append(Turn(shot, observation.text, extras=observation.extras))

    async def _keep(self, data: bytes) -> ImageRef:
        return await asyncio.get_running_loop().run_in_executor(_keepers(), self._rules.images.put, data)

    async def _verdict(self) -> float | None:
        began = time.monotonic()
        said = await self._call("evaluate", self._environment.evaluate, self._rules.limits.evaluate_timeout_s)
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
        step, output, queue_s = await self._ask(step)
        self._tokens += len(step.response_token_ids)
        answer = output.outputs[0]
        self._turns[-1] = replace(turn, response=answer.text, tool_calls=tuple(answer.tool_calls), extras={})
        timings = StepTimings(started_at, queue_s, output.latency)
        environment_s = 0.0
        end: _End | None = None
        observation: Observation | None = None
        try:
            parsed = self._rules.agent.parse(answer, self._size(turn))
            if not parsed.actions:
                raise ActionParseError("the answer has no action", text=answer.text, span=(0, len(answer.text)))
            step = replace(step, thought=parsed.thought, actions=tuple(parsed.actions))
        except ActionParseError as error:
            step = replace(step, parse_error=str(error))
            end = self._not_an_action(error)
        except Exception as error:
            end = self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "parse", error)
        else:
            acting = time.monotonic()
            step, observation, end = await self._act(step)
            environment_s = time.monotonic() - acting
        timings = replace(timings, environment_s=environment_s, total_s=time.monotonic() - began)
        step = replace(step, timings=timings)
        self._steps.append(step)
        if self._rules.on_step is not None and (end is None or end.failure is None):
            try:
                said = self._rules.on_step(self._task, self._rollout, step)
                if said is not None:
                    await said
            except Exception as error:
                end = self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "hook", error)
        if end is not None and end.failure is not None:
            raise end
        if observation is not None and (end is None or observation.screenshot is not None):
            await self._see(observation, "step")
        if end is not None:
            raise end

    def _size(self, turn: Turn) -> tuple[int, int]:
        """Of the newest screenshot: a turn that only sends an answer back is about the one before."""
        shot = next((one.screenshot for one in reversed(self._turns) if one.screenshot is not None), turn.screenshot)
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
        observation: Observation | None = None
        end: _End | None = None
        for number, action in enumerate(step.actions, 1):
            call = functools.partial(self._environment.step, action)
            try:
                result: Any = await self._call("step", call, self._rules.limits.step_timeout_s)
                if not isinstance(result, StepResult):
                    error = TypeError(f"step must give a StepResult, not {type(result).__name__}")
                    raise self._failed(StopReason.ENV_FAILURE, FailureClass.ENVIRONMENT, "step", error)
                reward = None if result.reward is None else self._reward(result.reward, "step")
            except _End as failed:
                return step, observation, failed
            if reward is not None:
                reward += step.reward or 0.0
            step = replace(
                step,
                executed=number,
                reward=step.reward if reward is None else reward,
                terminated=result.terminated,
                truncated=result.truncated,
                info=_plain(result.info),
            )
            observation = result.observation
            end = _ending(action, result)
            if end is not None:
                break
        return step, observation, end

    # -- the model -----------------------------------------------------------------------------------------------------

    async def _ask(self, step: Step) -> tuple[Step, RequestOutput, float]:
        """The step with what was sent and what came back; the answer; and the seconds before it was sent."""
        rules = self._rules
        history = History(self._task, self._instruction, tuple(self._turns), rules.limits.max_images)
        try:
            built = rules.agent.build_messages(history)
            recorded, sent = await self._with_images(built)
        except Exception as error:
            raise self._failed(StopReason.USER_FAILURE, FailureClass.USER_CODE, "messages", error) from error
        try:
            images = len(images_of(recorded))
            if images:
                await rules.preflight.check(rules.client, max(images, rules.limits.max_images))
            async with rules.gate.passed() as waited:
                if self._deadline is not None:
                    self._deadline += waited
                version = rules.weight_version()
                began = time.monotonic()
                output = await self._generate(sent)
                took = time.monotonic() - began
            ids, logprobs = exact(output)
        except ContextLengthError as error:
            log.debug("%s/%d: %s", self._task.id, self._rollout, error)
            raise _End(StopReason.CONTEXT_OVERFLOW) from error
        except RequestTimeout as error:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise _End(StopReason.EPISODE_TIMEOUT) from error
            raise self._failed(StopReason.LLM_FAILURE, FailureClass.MODEL_SERVER, "generate", error) from error
        except Exception as error:
            if isinstance(error, FATAL):
                self.fatal = error
            ours = isinstance(error, BadRequestError) and error.status is None
            kind = FailureClass.USER_CODE if ours or isinstance(error, ConfigError) else FailureClass.MODEL_SERVER
            raise self._failed(StopReason.LLM_FAILURE, kind, "generate", error) from error
        answer = output.outputs[0]
        step = replace(
            step,
            messages=recorded,
            prompt_token_ids=list(output.prompt_token_ids),
            response=answer.text,
            response_token_ids=ids,
            response_logprobs=logprobs,
            finish_reason=answer.finish_reason,
            model=output.model,
            epoch=output.epoch,
            attempts=output.attempts,
            weight_version=version,
        )
        return step, output, waited + max(0.0, took - output.latency)

    async def _generate(self, messages: Sequence[Message]) -> RequestOutput:
        limits = self._rules.limits
        bounds = [limits.max_response_tokens, self._rules.params.max_tokens]
        if limits.max_episode_tokens is not None:
            bounds.append(limits.max_episode_tokens - self._tokens)
        most = min((bound for bound in bounds if bound is not None), default=None)
        params = self._rules.params if most is None else replace(self._rules.params, max_tokens=most)
        seconds = [limits.generate_timeout_s]
        if self._deadline is not None:
            seconds.append(max(0.001, self._deadline - time.monotonic()))
        timeout = min((one for one in seconds if one is not None), default=None)
        fields = dict(self._rules.agent.request)
        return (await self._rules.client.chat(messages, params, timeout=timeout, **fields))[0]

    async def _with_images(self, built: Sequence[Message]) -> tuple[list[Message], list[Message]]:
        """The messages as they are recorded, with `ImageRef`s, and as they are sent, with the files."""
        recorded: list[Message] = []
        sent: list[Message] = []
        for message in built:
            content = message.get("content")
            if not isinstance(content, list | tuple):
                recorded.append(dict(message))
                sent.append(message)
                continue
            kept = [await self._part(part) for part in content]
            recorded.append({**message, "content": [one for one, _ in kept]})
            sent.append({**message, "content": [one for _, one in kept]})
        return recorded, sent

    async def _part(self, part: Any) -> tuple[Any, Any]:
        if not images_of([{"content": [part]}]):
            return part, part
        source = part
        if isinstance(part, Mapping):
            source = part.get("image", part.get("image_url", part.get("image_pil")))
            if isinstance(source, Mapping):
                source = source.get("url")
            if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
                return part, part  # the server fetches it
        if not isinstance(source, ImageRef):
            image = await asyncio.get_running_loop().run_in_executor(_keepers(), Image.of, source)
            source = await self._keep(image.data)
        return {"type": "image", "image": source}, {"type": "image", "image": self._rules.images.load(source)}

    # -- failures ------------------------------------------------------------------------------------------------------

    def _failed(self, reason: StopReason, kind: FailureClass, stage: str, error: Exception) -> _End:
        inside = stage not in ("reset", "evaluate") and (self._turns or self._steps)
        trace = "".join(traceback.format_exception(error))
        failure = Failure(
            kind=kind,
            stage=stage,
            error_type=getattr(error, "error_type", None) or type(error).__name__,
            message=getattr(error, "message", None) or str(error),
            step=len(self._steps) if inside else None,
            details=trace[-_TRACEBACK_CHARS:],
        )
        log.debug("%s/%d: %s", self._task.id, self._rollout, failure)
        return _End(reason, failure)


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


# -- bounded calls -----------------------------------------------------------------------------------------------------


async def bounded(make: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """Awaits what `make` makes, for so many seconds at most, also where it does not heed cancellation.

    Raises `EnvironmentTimeoutError`. A call that goes on for some seconds after it was cancelled is left alone.
    """

    async def calling() -> T:
        return await make()

    task = asyncio.create_task(calling())
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        await _stop(task, what)
        raise
    if not task.done():
        await _stop(task, what)
        raise EnvironmentTimeoutError(f"{what} took more than {seconds:g} s")
    if task.cancelled():
        raise EnvironmentFailedError(f"{what} was cancelled from within")
    return task.result()


async def _stop(task: asyncio.Task[Any], what: str) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=_GRACE_S)
    if task.done():
        if not task.cancelled():
            task.exception()  # asyncio tells of one that nobody has looked at
        return
    log.warning("%s goes on %g s after it was cancelled; it is left alone", what, _GRACE_S)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


@functools.cache
def own_images() -> ImageStore:
    """This process's own temporary folder for screenshots, gone with it."""
    return ImageStore.temporary()


@functools.cache
def _keepers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="managed-vllm-screenshots")


forks.call_in_child(_keepers.cache_clear)  # its threads stayed with the parent
forks.call_in_child(own_images.cache_clear)


# -- what the server said ----------------------------------------------------------------------------------------------


def exact(output: RequestOutput) -> tuple[list[int], list[float]]:
    """The sampled token ids and their logprobs, as the server told them. Raises `RequestError` if it did not."""
    answer = output.outputs[0]
    ids = list(answer.token_ids)
    if not output.prompt_token_ids or (answer.text and not ids):
        raise RequestError(
            "the server does not tell token ids (vLLM does since 0.10.2), and rollouts are never tokenized anew"
        )
    places = answer.logprobs
    if places is None or len(places) != len(ids):
        found = "none" if places is None else str(len(places))
        raise RequestError(f"the server told {found} logprobs for {len(ids)} tokens")
    return ids, [place[token].logprob for token, place in zip(ids, places, strict=True)]


class Preflight:
    """Looks once whether the server takes as many images in a request as the limits allow.

    vLLM refuses a request with more than `--limit-mm-per-prompt` says; without a look ahead that would show in the
    middle of the episodes only, after all work of the environments.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._checked = 0
        self._error: ConfigError | None = None

    async def check(self, client: AsyncVLLMClient, images: int) -> None:
        """Raises `ConfigError`: the server takes fewer, or no images at all."""
        if images <= self._checked:
            return
        async with self._lock:
            if self._error is not None:
                raise self._error
            if images <= self._checked:
                return
            part = {"type": "image", "image": _blank_png()}
            try:
                await client.chat([{"role": "user", "content": [part] * images}], SamplingParams(max_tokens=1))
            except BadRequestError as error:
                self._error = _as_config_error(error, images)
                if self._error is not None:
                    raise self._error from error
            except ManagedVLLMError:
                return  # no word about images; the episode's own request will meet it, and tell
            self._checked = images


def _as_config_error(error: BadRequestError, images: int) -> ConfigError | None:
    most = re.search(r"[Aa]t most (\d+) image", error.message)
    if most is not None:
        return ConfigError(
            f"the server takes {most[1]} images in a request, Limits.max_images is {images}: start it with "
            f"limit_mm_per_prompt={{'image': {images}}}, or lower max_images",
            field="max_images",
        )
    if re.search(r"not a multimodal model|does not support multimodal|reads text only", error.message):
        return ConfigError(
            f"the model takes no images ({error.message:.200}); Limits(max_images=0) sends text alone",
            field="max_images",
        )
    return None


@functools.cache
def _blank_png(side: int = 56) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * 3 * side) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
