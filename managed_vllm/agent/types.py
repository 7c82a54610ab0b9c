"""The vocabulary of rollouts: what the other modules of `managed_vllm.agent` pass to each other, all frozen values.

In the order in which they occur:

- `Task`: what is to be done. One task has `n` rollouts, which together are its group.
- `Observation`: what the environment shows: instruction, screenshot, text.
- `Step`: one turn of an episode: the messages that were sent, what the model answered to the token, the
  actions that this means, and what became of them.
- `Trajectory`: one attempt at one rollout, from `reset` to its `StopReason`, with its reward or its `Failure`.

A reward is a float only if the environment or the evaluator said so. An attempt that failed has no reward (`None`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from managed_vllm.agent.actions import Action
from managed_vllm.errors import ConfigError

Message = Mapping[str, Any]
"""One message of a chat request. In records an image is an `ImageRef` in a part `{"type": "image", "image": ref}`."""


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    FINISHED = "finished"
    """The model said so: `finished()`."""

    CALL_USER = "call_user"
    """The model asked for a person: `call_user()`."""

    MAX_STEPS = "max_steps"
    """`Limits.max_steps` turns were taken."""

    MAX_TOKENS = "max_tokens"
    """The answers have `Limits.max_episode_tokens` tokens together."""

    TERMINATED = "terminated"
    """The environment reached an end of its own (gymnasium's `terminated`)."""

    TRUNCATED = "truncated"
    """The environment cut the episode off (gymnasium's `truncated`)."""

    PARSE_ERROR = "parse_error"
    """The model's answer was no action, and the policy for that case gave up."""

    CONTEXT_OVERFLOW = "context_overflow"
    """The prompt does not fit into the model's context any more."""

    EPISODE_TIMEOUT = "episode_timeout"
    """`Limits.episode_timeout_s` seconds were over."""

    ENV_FAILURE = "env_failure"
    """The environment raised, hung beyond its limit, or died."""

    LLM_FAILURE = "llm_failure"
    """The model server did not answer, for good, or refused the request."""

    USER_FAILURE = "user_failure"
    """Code of the caller raised: a message builder, a parser's own bug, a hook."""

    CANCELLED = "cancelled"
    """The run was stopped, or the rollout was not needed any more."""


class FailureClass(enum.StrEnum):
    """Whose fault a failure is."""

    ENVIRONMENT = "environment"
    """`reset`, `step`, `evaluate` or the environment's process."""

    MODEL_SERVER = "model_server"
    """The server, the way to it, or its refusal of the request."""

    PARSER = "parser"
    """The answer was no action."""

    USER_CODE = "user_code"
    """What the caller passed in: a hook, a message builder."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in an attempt, and where.

    Attributes:
        kind: whose fault.
        stage: what was being done: `make`, `reset`, `observe`, `messages`, `generate`, `parse`, `step`, `evaluate`,
            `reward`, `hook`.
        error_type: the exception's class, by name.
        message: the exception's message.
        step: the index of the turn; None outside of one.
        details: the traceback's last lines, or whatever else helps; may be empty.
    """

    kind: FailureClass
    stage: str
    error_type: str
    message: str
    step: int | None = None
    details: str = ""

    def __str__(self) -> str:
        where = self.stage if self.step is None else f"{self.stage} of step {self.step}"
        return f"{self.kind} ({where}): {self.error_type}: {self.message}"


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done.

    Attributes:
        id: names the task within a run; resuming goes by it.
        instruction: in words, for the model.
        seed: for environments that draw their task at random; None: theirs to choose.
        data: whatever the environment needs beside it. Plain JSON values.
    """

    id: str
    instruction: str = ""
    seed: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ConfigError("a task needs an id", field="id")


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment shows.

    Attributes:
        screenshot: an encoded image file (PNG, JPEG, …), or None.
        text: an accessibility tree, or the screen in words; None where there is none.
        instruction: what is to be done, where only the environment knows it; else None, and `Task.instruction` holds.
        extras: anything else, for parsers and message builders. Not recorded.
    """

    screenshot: bytes | None = field(default=None, repr=False)
    text: str | None = None
    instruction: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an action led to, in gymnasium's terms.

    Attributes:
        observation: what is seen now. After the end (`terminated`, `truncated`) it may be an empty one.
        reward: of this action; None where the environment gives none before `evaluate`.
        terminated: the task's own end.
        truncated: cut off from outside, a time limit say.
        info: what else the environment says; plain JSON values are recorded.
    """

    observation: Observation
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image in a record: its file is kept once, by content.

    Attributes:
        sha256: hex digest of the file's bytes, exactly as they were sent.
        mime: `image/png`, `image/jpeg`, …
        width, height: pixels.
    """

    sha256: str
    mime: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Seconds of one turn.

    Attributes:
        started_at: Unix time at which the turn began.
        queue_s: waiting for a place among the requests, or while the scheduler was paused.
        model_s: from sending the request to the whole answer, retries and waiting for a restarted server included.
        environment_s: all calls of `step`.
        total_s: the whole turn.
    """

    started_at: float = 0.0
    queue_s: float = 0.0
    model_s: float = 0.0
    environment_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RejectedAnswer:
    """An answer of a turn that was no action, and in whose place another one was sampled.

    Attributes:
        response, response_token_ids, response_logprobs, finish_reason, parse_error: as in `Step`.
    """

    response: str = ""
    response_token_ids: Sequence[int] = field(default=(), repr=False)
    response_logprobs: Sequence[float] | None = field(default=None, repr=False)
    finish_reason: str | None = None
    parse_error: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One turn: what was seen and sent, what came back, what was done.

    Attributes:
        index: 0, 1, … within the episode.
        screenshot: what was seen before the actions; None without one.
        text: the observation's text; None without one.
        messages: what was sent, with an `ImageRef` in the place of each image.
        prompt_token_ids: of the whole prompt, image placeholders included, as the server made them.
        response: the answer's text.
        response_token_ids: as sampled by the server.
        response_logprobs: of the sampled tokens, one each; None where they were not asked for.
        finish_reason: `stop`, `length`, …
        thought: the words before the action; empty without any.
        actions: what the answer means, in pixels of the screenshot. Empty if it could not be parsed.
        executed: how many of them were carried out (an episode may end within them).
        parse_error: why it could not be parsed; None if it could.
        rejected: answers to the same prompt before this one, which were no action (`ParseErrorPolicy.resample`).
        reward: sum of the rewards of its actions; None if there was none.
        terminated, truncated: what the environment said at the last action.
        info: of the last action.
        timings: in seconds.
        model: the name that was asked.
        epoch: the life of the server that answered.
        attempts: number of sendings of the request.
        weight_version: of the weights that sampled the last token: as the server says, else as the scheduler was told;
            None where nobody says.
        weight_versions: where an update came in between, `(version, start, end)` of each part of the answer, in tokens;
            empty where one version sampled all of it.
    """

    index: int
    screenshot: ImageRef | None = None
    text: str | None = None
    messages: Sequence[Message] = field(default=(), repr=False)
    prompt_token_ids: Sequence[int] = field(default=(), repr=False)
    response: str = ""
    response_token_ids: Sequence[int] = field(default=(), repr=False)
    response_logprobs: Sequence[float] | None = field(default=None, repr=False)
    finish_reason: str | None = None
    thought: str = ""
    actions: Sequence[Action] = ()
    executed: int = 0
    parse_error: str | None = None
    rejected: Sequence[RejectedAnswer] = ()
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)
    timings: StepTimings = field(default_factory=StepTimings, repr=False)
    model: str = ""
    epoch: int = 0
    attempts: int = 1
    weight_version: str | None = None
    weight_versions: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which attempt it is, of which rollout.

    Attributes:
        task: what is to be done.
        rollout: 0 … n-1 within the task's group.
        number: 0 for the first, counted up by retries.
        group_round: 0, counted up where a whole group is repeated.
    """

    task: Task
    rollout: int = 0
    number: int = 0
    group_round: int = 0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One attempt at one rollout of a task.

    Attributes:
        task: what was to be done.
        rollout: 0 … n-1 within the task's group.
        attempt: 0 for the first, counted up by retries.
        steps: the turns; the last one is cut short where `failure` names its step (see `Step.executed`).
        stop_reason: why it ended.
        reward: what the evaluator said, else the sum of the steps' rewards; None if neither said anything, and always
            None where `failure` is set. Where a reward function of the caller's own was given, what that said.
        failure: what went wrong; None for an attempt that counts.
        instruction: what the model was told to do.
        final_screenshot: what was seen after the last action; None where nothing was.
        started_at: Unix time of the beginning.
        duration_s: seconds, from `reset` to the end of `evaluate`.
        reset_s, evaluate_s: seconds of these calls.
        group_round: 0, counted up where a whole group is repeated.
        info: what the environment said at the end, hooks may add to it. Plain JSON values.
        exact: whether token ids and logprobs are those that the server sampled; False: it told none or they were not
            asked for, and no trainer may have the attempt.
    """

    task: Task
    rollout: int
    attempt: int = 0
    steps: Sequence[Step] = ()
    stop_reason: StopReason = StopReason.CANCELLED
    reward: float | None = None
    failure: Failure | None = None
    instruction: str = ""
    final_screenshot: ImageRef | None = None
    started_at: float = 0.0
    duration_s: float = 0.0
    reset_s: float = 0.0
    evaluate_s: float = 0.0
    group_round: int = 0
    info: Mapping[str, Any] = field(default_factory=dict, repr=False)
    exact: bool = True

    def __post_init__(self) -> None:
        if self.failure is not None and self.reward is not None:
            raise ValueError("an attempt that failed has no reward")

    @property
    def ok(self) -> bool:
        """Whether the attempt counts: nothing failed, and it was not cancelled. Its reward may be 0, or not known."""
        return self.failure is None and self.stop_reason is not StopReason.CANCELLED

    @property
    def key(self) -> tuple[str, int]:
        """The rollout that this is an attempt at: task id and number."""
        return self.task.id, self.rollout

    @property
    def response_tokens(self) -> int:
        """Tokens of all answers, those that were rejected not included."""
        return sum(len(step.response_token_ids) for step in self.steps)


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one task.

    Attributes:
        task: theirs.
        trajectories: the last attempt at each rollout, by number; those that failed for good included.
        dropped: the policy says that none of them is to be used.
    """

    task: Task
    trajectories: Sequence[Trajectory]
    dropped: bool = False

    @property
    def complete(self) -> bool:
        """Whether all of them count."""
        return all(trajectory.ok for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far an episode may go. None: no bound. What an environment does always has one.

    Attributes:
        max_steps: turns.
        max_images: the newest images that stay in the prompt; all text stays.
        max_response_tokens: tokens of one answer; None: as the sampling parameters say.
        max_episode_tokens: tokens of all answers together.
        reset_timeout_s, step_timeout_s, evaluate_timeout_s, close_timeout_s: seconds of each such call, making the
            environment being part of the first `reset`.
        generate_timeout_s: seconds for one answer, waiting for a server that is being restarted included.
        episode_timeout_s: seconds from `reset` until the last action; the evaluation comes on top.
    """

    max_steps: int = 15
    max_images: int = 5
    max_response_tokens: int | None = None
    max_episode_tokens: int | None = None
    reset_timeout_s: float = 300.0
    step_timeout_s: float = 60.0
    evaluate_timeout_s: float = 300.0
    close_timeout_s: float = 30.0
    generate_timeout_s: float | None = None
    episode_timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_response_tokens", "max_episode_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}", field=name)
        if self.max_images < 0:
            raise ConfigError(f"max_images must be 0 or more, not {self.max_images}", field="max_images")
        for name in self.__slots__:
            if name.endswith("_s") and (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name} must be more than 0 s, not {value}", field=name)
