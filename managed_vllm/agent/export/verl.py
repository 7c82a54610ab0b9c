"""For verl: each line of `samples.jsonl` has the fields of its `AgentLoopOutput`.

As of verl 0.7 (`verl/experimental/agent_loop/agent_loop.py`): `prompt_ids`, `response_ids`, `response_mask`,
`response_logprobs`, `multi_modal_data` (`{"images": […]}`), `reward_score`, `num_turns`, `metrics`, `extra_fields`.
verl puts the extra fields into the batch: `uid`, by which GRPO groups, is the task's id.

In `per="step"` each sample of a trajectory has the trajectory's reward. GRPO's mean over a `uid` then counts a
trajectory once for each of its steps; `extra_fields.is_last_step` lets a trainer take one of each.

An image in the samples is a path, relative to the export.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from managed_vllm.agent.export.image_files import ExportedImages, load_images
from managed_vllm.agent.export.lines import read_lines
from managed_vllm.agent.export.samples import Sample, reward_of, turns_of


def line_of(sample: Sample, images: ExportedImages) -> dict[str, Any]:
    """As JSON. Raises `ExportError`."""
    return fields_of(sample, [images.path(ref) for ref in sample.images])


def fields_of(sample: Sample, images: Sequence[Any] = ()) -> dict[str, Any]:
    """`AgentLoopOutput(**fields_of(sample))`, in an agent loop of verl's; the images as it wants them.

    Raises `ExportError`.
    """
    trajectory = sample.trajectory
    steps = [step for step in trajectory.steps if sample.first.index <= step.index <= sample.last.index]
    return {
        "prompt_ids": sample.prompt_ids,
        "response_ids": sample.response_ids,
        "response_mask": sample.mask,
        "response_logprobs": sample.logprobs,
        # Never null: verl asks it for "images".
        "multi_modal_data": {"images": list(images)} if images else {},
        "reward_score": reward_of(trajectory),
        "num_turns": turns_of(sample.last.messages) if sample.last.messages else 2,
        "metrics": {
            "generate_sequences": sum(step.timings.model_s for step in steps),
            "tool_calls": sum(step.timings.environment_s for step in steps),
        },
        "extra_fields": {
            "uid": trajectory.task.id,
            "rollout": trajectory.rollout,
            "attempt": trajectory.attempt,
            "step": sample.last.index,
            "is_last_step": sample.is_last,
            "stop_reason": str(trajectory.stop_reason),
            "finish_reason": sample.last.finish_reason,
            "weight_version": sample.last.weight_version,
            "weight_versions": [list(part) for part in sample.last.weight_versions],
        },
    }


def load_verl(path: str | os.PathLike[str], *, images: bool = True) -> Iterator[dict[str, Any]]:
    """The samples of an export for verl, read one by one: `AgentLoopOutput(**sample)`.

    `images`: as PIL images, opened when their sample is asked for; else as absolute paths.

    Raises `ExportError`: no such export, or an image of it is missing.
    """
    folder = Path(path).absolute()
    for sample in read_lines(folder, "verl"):
        names = sample["multi_modal_data"].get("images")
        if names:
            sample["multi_modal_data"]["images"] = (
                load_images(folder, names) if images else [str(folder / name) for name in names]
            )
        yield sample
