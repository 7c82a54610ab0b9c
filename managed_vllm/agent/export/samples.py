"""Training samples: prompt and response ids, mask and logprobs of a step, or of a whole trajectory.

Ids are taken as the server gave them; nothing is tokenized. In `per="trajectory"` steps are joined where each prompt
begins with the former prompt and answer token for token, and shows the former images first. Where one does not (an
image left the view, the chat template writes former answers in another way) the next sample begins: the longest pieces
that join.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from managed_vllm.agent.types import ImageRef, Message, Step, Trajectory
from managed_vllm.errors import ExportError

log = logging.getLogger(__name__)

Per = Literal["step", "trajectory"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a trainer learns from.

    Attributes:
        trajectory: it is of.
        first, last: the first and the last step in it; the same one in `per="step"`.
        is_last: whether it has the trajectory's last step.
        prompt_ids: of the first step's prompt.
        response_ids: the answers, and between them what the environment added.
        mask: 1 for a token of an answer, 0 for one that the environment added.
        logprobs: of each token of an answer, 0.0 for the others; None if they were not asked for.
        images: those of the prompt of the last step, in order.
        cut: why it does not go on with the sample before it; None for the first one, and in `per="step"`.
    """

    trajectory: Trajectory
    first: Step
    last: Step
    is_last: bool
    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[int]
    logprobs: list[float] | None
    images: tuple[ImageRef, ...]
    cut: str | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.response_ids), len(self.mask)} | (
            {len(self.logprobs)} if self.logprobs is not None else set()
        )
        if len(lengths) != 1:  # a bug of ours, were it to happen: better no export than a wrong one
            raise ExportError(f"{name_of(self.trajectory)}: ids, mask and logprobs are not equally long: {lengths}")


def samples_of(trajectory: Trajectory, per: Per = "step", *, logprobs: bool = True) -> Iterator[Sample]:
    """The samples of a trajectory, in the order of its steps, as `export` makes them.

    Args:
        trajectory: any; whether a failed one is learnt from is for the caller to say.
        per: as in `export`.
        logprobs: whether they must be there; else they are left out.

    Raises:
        ExportError: token ids or logprobs are missing, or are not those that were sampled.
    """
    if not trajectory.exact:
        raise ExportError(f"{name_of(trajectory)} was played with exact=False: its token ids are not those sampled")
    if per == "trajectory":
        yield from _pieces(trajectory, logprobs)
        return
    for step in trajectory.steps:
        yield Sample(
            trajectory,
            first=step,
            last=step,
            is_last=step is trajectory.steps[-1],
            prompt_ids=list(step.prompt_token_ids),
            response_ids=list(_answer_of(trajectory, step)),
            mask=[1] * len(step.response_token_ids),
            logprobs=list(_logprobs_of(trajectory, step)) if logprobs else None,
            images=tuple(images_of(step.messages)),
        )


def _pieces(trajectory: Trajectory, logprobs: bool) -> Iterator[Sample]:
    """The longest pieces that join: each step goes on with the last piece, or begins a new one."""
    piece: _Piece | None = None
    for step in trajectory.steps:
        cut = None if piece is None else piece.cut_before(step)
        if piece is not None and cut is None:
            piece.add(trajectory, step, logprobs)
            continue
        if piece is not None:
            log.debug("%s, step %d, begins a new sample: %s", name_of(trajectory), step.index, cut and cut[1])
            yield piece.sample(trajectory)
        piece = _Piece(step, cut and cut[0])
        piece.add(trajectory, step, logprobs)
    if piece is not None:
        yield piece.sample(trajectory)


class _Piece:
    """Steps of which each goes on where the one before ended, while they are joined."""

    def __init__(self, first: Step, cut: str | None) -> None:
        self.first = self.last = first
        self.cut = cut
        self.prompt = list(first.prompt_token_ids)
        self.response: list[int] = []
        self.mask: list[int] = []
        self.scores: list[float] | None = None
        self.images: tuple[ImageRef, ...] = ()

    def cut_before(self, step: Step) -> tuple[str, str] | None:
        """Why the step does not go on here: the kind of reason, and the place; None if it does."""
        so_far = self.prompt + self.response
        prompt = list(step.prompt_token_ids)
        if prompt[: len(so_far)] != so_far:
            at = next((at for at, pair in enumerate(zip(prompt, so_far, strict=False)) if pair[0] != pair[1]), None)
            if at is None:
                return "the prompt is shorter", f"{len(prompt)} tokens after {len(so_far)}"
            return "other tokens", f"at token {at} its prompt has {prompt[at]}, before there was {so_far[at]}"
        if tuple(images_of(step.messages))[: len(self.images)] != self.images:
            return "other images", "its first images are not those of the step before"
        return None

    def add(self, trajectory: Trajectory, step: Step, logprobs: bool) -> None:
        """Its answer, and what the environment added before it."""
        answer = _answer_of(trajectory, step)
        added = list(step.prompt_token_ids[len(self.prompt) + len(self.response) :])
        self.response += [*added, *answer]
        self.mask += [0] * len(added) + [1] * len(answer)
        if logprobs:
            self.scores = [*(self.scores or ()), *[0.0] * len(added), *_logprobs_of(trajectory, step)]
        self.images = tuple(images_of(step.messages))
        self.last = step

    def sample(self, trajectory: Trajectory) -> Sample:
        return Sample(
            trajectory,
            first=self.first,
            last=self.last,
            is_last=self.last is trajectory.steps[-1],
            prompt_ids=self.prompt,
            response_ids=self.response,
            mask=self.mask,
            logprobs=self.scores,
            images=self.images,
            cut=self.cut,
        )


def _answer_of(trajectory: Trajectory, step: Step) -> Sequence[int]:
    for name, ids in (("prompt", step.prompt_token_ids), ("answer", step.response_token_ids)):
        if not ids:
            raise ExportError(
                f"{name_of(trajectory)}, step {step.index}: the token ids of its {name} are missing; they can't be "
                "made up for afterwards, the server must return them"
            )
    return step.response_token_ids


def _logprobs_of(trajectory: Trajectory, step: Step) -> Sequence[float]:
    found = step.response_logprobs
    where = f"{name_of(trajectory)}, step {step.index}"
    if found is None:
        raise ExportError(f"{where}: its logprobs are missing; ask the server for them, or export with logprobs=False")
    if len(found) != len(step.response_token_ids):
        raise ExportError(f"{where}: it has {len(found)} logprobs for {len(step.response_token_ids)} tokens")
    if not all(map(math.isfinite, found)):
        raise ExportError(f"{where}: not all of its logprobs are finite; export with logprobs=False, or leave it out")
    return found


def reward_of(trajectory: Trajectory) -> float | None:
    """The reward, if it is a number or there is none. Raises `ExportError`."""
    if trajectory.reward is not None and not math.isfinite(trajectory.reward):
        raise ExportError(f"{name_of(trajectory)}: its reward is {trajectory.reward}; leave it out with choose=")
    return trajectory.reward


def images_of(messages: Sequence[Message]) -> Iterator[ImageRef]:
    """The images in messages, in order."""
    for message in messages:
        yield from _images_in(message.get("content"))


def _images_in(value: Any) -> Iterator[ImageRef]:
    if isinstance(value, ImageRef):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _images_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _images_in(each)


def turns_of(messages: Sequence[Message]) -> int:
    """Chat turns, the answer included, as verl counts them: messages of one role that follow each other are one, those
    of the system none."""
    roles = [message.get("role") for message in messages if message.get("role") != "system"]
    return len([role for role, before in zip(roles, [None, *roles], strict=False) if role != before]) + 1


def name_of(trajectory: Trajectory) -> str:
    """For messages."""
    return f"{trajectory.task.id}, rollout {trajectory.rollout}"
