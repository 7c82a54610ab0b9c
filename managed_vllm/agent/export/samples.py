"""Training samples: prompt and response ids, mask and logprobs of a step, or of a whole trajectory.

Ids are taken as the server gave them; nothing is tokenized. In `per="trajectory"` the steps are put together only where
each prompt begins with the former prompt and answer token for token, and shows the former images first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from managed_vllm.agent.types import ImageRef, Message, Step, Trajectory
from managed_vllm.errors import ExportError

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

    def __post_init__(self) -> None:
        lengths = {len(self.response_ids), len(self.mask)} | (
            {len(self.logprobs)} if self.logprobs is not None else set()
        )
        if len(lengths) != 1:  # a bug of ours, were it to happen: better no export than a wrong one
            raise ExportError(f"{name_of(self.trajectory)}: ids, mask and logprobs are not equally long: {lengths}")


def samples_of(trajectory: Trajectory, per: Per, *, logprobs: bool) -> Iterator[Sample]:
    """The samples of a trajectory, in the order of its steps. Raises `ExportError`."""
    if per == "trajectory":
        yield _merged(trajectory, logprobs)
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


def _merged(trajectory: Trajectory, logprobs: bool) -> Sample:
    prompt = list(trajectory.steps[0].prompt_token_ids)
    response: list[int] = []
    mask: list[int] = []
    scores: list[float] = []
    shown: tuple[ImageRef, ...] = ()
    for number, step in enumerate(trajectory.steps):
        answer = _answer_of(trajectory, step)
        images = tuple(images_of(step.messages))
        if number:
            so_far = prompt + response
            _check_begins(trajectory, step, so_far)
            if images[: len(shown)] != shown:
                raise _apart(trajectory, step, "its first images are not those of the step before")
            added = step.prompt_token_ids[len(so_far) :]
            response += added
            mask += [0] * len(added)
            scores += [0.0] * len(added)
        shown = images
        response += answer
        mask += [1] * len(answer)
        if logprobs:
            scores += _logprobs_of(trajectory, step)
    return Sample(
        trajectory,
        first=trajectory.steps[0],
        last=trajectory.steps[-1],
        is_last=True,
        prompt_ids=prompt,
        response_ids=response,
        mask=mask,
        logprobs=scores if logprobs else None,
        images=shown,
    )


def _check_begins(trajectory: Trajectory, step: Step, so_far: Sequence[int]) -> None:
    prompt = list(step.prompt_token_ids)
    if prompt[: len(so_far)] == so_far:
        return
    if len(prompt) < len(so_far) and so_far[: len(prompt)] == prompt:
        why = f"its prompt has only {len(prompt)} tokens, the former prompt and answer have {len(so_far)}"
    else:
        at = next(at for at, (left, right) in enumerate(zip(prompt, so_far, strict=False)) if left != right)
        why = (
            f"at token {at} its prompt has {prompt[at]}, where the former prompt and answer ({len(so_far)} tokens) "
            f"have {so_far[at]}: something left the view, or the chat template writes former answers in another way"
        )
    raise _apart(trajectory, step, why)


def _apart(trajectory: Trajectory, step: Step, why: str) -> ExportError:
    return ExportError(
        f"{name_of(trajectory)}, step {step.index}, does not go on where the step before ended: {why}. Export it with "
        "per='step'"
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
