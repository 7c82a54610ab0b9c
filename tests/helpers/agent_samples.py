"""Trajectories as a run would leave them, made without a server: screenshots are drawn, answers are UI-TARS-like.

What belongs together does: the click of an answer lies on the drawn button, token ids have one `IMAGE_PAD` run for each
image in view, and a prompt begins with the former prompt and answer as long as no image has left the view.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

from managed_vllm.agent.actions import Action, Click, Finished, Hotkey, Scroll, Type, Wait
from managed_vllm.agent.actions.values import Direction
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.types import (
    Failure,
    FailureClass,
    ImageRef,
    Message,
    Step,
    StepTimings,
    StopReason,
    Task,
    Trajectory,
)

IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD = 151644, 151645, 151652, 151653, 151655
_SYSTEM = "You are a GUI agent. Answer with a thought and an action, in pixels of the screenshot."
_STOPS = {
    FailureClass.ENVIRONMENT: StopReason.ENV_FAILURE,
    FailureClass.MODEL_SERVER: StopReason.LLM_FAILURE,
    FailureClass.PARSER: StopReason.PARSE_ERROR,
    FailureClass.USER_CODE: StopReason.USER_FAILURE,
}


def screenshot(
    label: str, at: tuple[int, int], *, size: tuple[int, int] = (320, 180), form: str = "PNG", done: str = ""
) -> bytes:
    """An image file: a desktop with a window, and one button with that label, its middle at that pixel."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, (44, 62, 80))
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.rectangle((8, 8, width - 8, height - 8), fill=(236, 240, 241))
    draw.rectangle((8, 8, width - 8, 24), fill=(52, 152, 219))
    draw.text((12, 10), done or "Settings", fill=(255, 255, 255))
    x, y = at
    draw.rectangle((x - 30, y - 10, x + 30, y + 10), fill=(46, 204, 113), outline=(39, 60, 80))
    draw.text((x - 24, y - 6), label, fill=(0, 0, 0))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def sample_trajectory(
    images: ImageStore | None = None,
    *,
    task_id: str = "t-1",
    rollout: int = 0,
    steps: int = 3,
    reward: float | None = 1.0,
    failure: Failure | None = None,
    seed: int = 0,
    attempt: int = 0,
    group_round: int = 0,
    max_images: int = 5,
    stop_reason: StopReason | None = None,
    size: tuple[int, int] = (320, 180),
    logprobs: bool = True,
    model: str = "ui-tars-sample",
) -> Trajectory:
    """One attempt of that many steps. `images` None: one without screenshots. With a `failure` it has no reward."""
    draw = random.Random(f"{task_id}/{rollout}/{attempt}/{seed}")
    label = draw.choice(["Save", "OK", "Apply", "Close"])
    instruction = f'Click "{label}", then finish. Grüße: 設定 ✓'
    begun = 1_780_000_000.0 + draw.random() * 1000
    system_ids = [IM_START, *_ids(draw, 12), IM_END]
    task_ids = [IM_START, *_ids(draw, 9), IM_END]
    turns: list[tuple[ImageRef | None, list[int], str, list[int]]] = []
    made: list[Step] = []
    at = begun
    for index in range(steps):
        ref, where = _shown(images, draw, label, index, size)
        last = index == steps - 1 and failure is None
        thought, action, answer = _turn(draw, label, where, last=last, index=index)
        response_ids = [*_ids(draw, 8 + draw.randrange(12)), IM_END]
        shown_ids = [IM_START, *([VISION_START, *[IMAGE_PAD] * 20, VISION_END] if ref else _ids(draw, 6)), IM_END]
        turns.append((ref, shown_ids, answer, response_ids))
        messages, prompt_ids = _prompt(instruction, system_ids, task_ids, turns, max_images)
        queue_s, model_s, environment_s = draw.random() / 10, 0.2 + draw.random(), draw.random() / 2
        timings = StepTimings(at, queue_s, model_s, environment_s, queue_s + model_s + environment_s + 0.001)
        at += timings.total_s
        made.append(
            Step(
                index=index,
                screenshot=ref,
                text=None if images is not None else f"Screen:\n{label}({where[0]},{where[1]})",
                messages=messages,
                prompt_token_ids=prompt_ids,
                response=answer,
                response_token_ids=tuple(response_ids),
                response_logprobs=tuple(-draw.expovariate(2.0) for _ in response_ids) if logprobs else None,
                finish_reason="stop",
                thought=thought,
                actions=(action,),
                executed=1,
                reward=None if index < steps - 1 else reward,
                terminated=last,
                info={"url": f"https://example.org/{index}", "focused": None},
                timings=timings,
                model=model,
                epoch=1,
                attempts=1,
                weight_version="w-7",
            )
        )
    final, _ = _shown(images, draw, label, steps, size)
    if stop_reason is None:
        stop_reason = StopReason.FINISHED if failure is None else _STOPS[failure.kind]
    return Trajectory(
        task=Task(task_id, instruction, seed=seed, data={"app": "settings", "target": label}),
        rollout=rollout,
        attempt=attempt,
        steps=tuple(made),
        stop_reason=stop_reason,
        reward=None if failure is not None else reward,
        failure=failure,
        instruction=instruction,
        final_screenshot=final,
        started_at=begun,
        duration_s=at - begun + 0.5,
        reset_s=0.3,
        evaluate_s=0.2,
        group_round=group_round,
        info={"evaluator": "exact"},
    )


def sample_failure(kind: FailureClass = FailureClass.ENVIRONMENT, *, step: int | None = 1) -> Failure:
    """What went wrong, of that kind."""
    stages = {
        FailureClass.ENVIRONMENT: ("step", "EnvironmentTimeoutError", "step did not return within 60 s, and was ended"),
        FailureClass.MODEL_SERVER: ("generate", "ServerDiedError", "the server died under this request"),
        FailureClass.PARSER: ("parse", "ActionParseError", "no action: 'I am not sure'"),
        FailureClass.USER_CODE: ("hook", "KeyError", "'missing'"),
    }
    stage, error_type, message = stages[kind]
    return Failure(kind, stage, error_type, message, step, "Traceback (most recent call last): …")


def _ids(draw: random.Random, number: int) -> list[int]:
    return [draw.randrange(1000, 150_000) for _ in range(number)]


def _shown(
    images: ImageStore | None, draw: random.Random, label: str, index: int, size: tuple[int, int]
) -> tuple[ImageRef | None, tuple[int, int]]:
    where = (draw.randrange(50, size[0] - 50), draw.randrange(40, size[1] - 30))
    if images is None:
        return None, where
    return images.put(screenshot(label, where, size=size, done=f"Settings, step {index}")), where


def _turn(
    draw: random.Random, label: str, where: tuple[int, int], *, last: bool, index: int
) -> tuple[str, Action, str]:
    x, y = where
    if last:
        return "It is done.", Finished("done"), "Thought: It is done.\nAction: finished(content='done')"
    choices: list[tuple[str, Action, str]] = [
        (f'The button "{label}" is at ({x}, {y}).', Click(float(x), float(y)), f"click(start_box='({x},{y})')"),
        ("The field wants a name: naïve 名前.", Type("naïve 名前", enter=True), "type(content='naïve 名前\\n')"),
        (
            "Further down.",
            Scroll(Direction.DOWN, float(x), float(y)),
            f"scroll(start_box='({x},{y})', direction='down')",
        ),
        ("Save it.", Hotkey(("ctrl", "s")), "hotkey(key='ctrl s')"),
        ("It is loading.", Wait(), "wait()"),
    ]
    thought, action, call = choices[0] if index == 0 else draw.choice(choices)
    return thought, action, f"Thought: {thought}\nAction: {call}"


def _prompt(
    instruction: str,
    system_ids: Sequence[int],
    task_ids: Sequence[int],
    turns: Sequence[tuple[ImageRef | None, Sequence[int], str, Sequence[int]]],
    max_images: int,
) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """The newest images and all the text."""
    messages: list[Message] = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": instruction}]
    ids = [*system_ids, *task_ids]
    for number, (ref, shown_ids, answer, response_ids) in enumerate(turns):
        if ref is None or number >= len(turns) - max_images:
            part: dict[str, Any] = {"type": "text", "text": "(screen in words)"}
            if ref is not None:
                part = {"type": "image", "image": ref}
            messages.append({"role": "user", "content": [part]})
            ids += shown_ids
        if number < len(turns) - 1:
            messages.append({"role": "assistant", "content": answer})
            ids += response_ids
    return tuple(messages), tuple(ids)
