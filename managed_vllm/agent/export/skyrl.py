"""For SkyRL: each line of `samples.jsonl` is one row of its `GeneratorOutput`; `load_skyrl` makes the columns.

As of `skyrl/train/generators/base.py`, August 2026, and its rules for step-wise training: all rows of a trajectory
follow each other, the last one has `is_last_step`, and the reward stands at the last token of that row, 0.0 everywhere
else. `trajectory_ids` give the group: `instance_id` is the task's id, `repetition_id` the rollout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from managed_vllm.agent.export.image_files import ExportedImages, load_images
from managed_vllm.agent.export.lines import read_lines
from managed_vllm.agent.export.samples import Sample, name_of, reward_of
from managed_vllm.errors import ExportError


@dataclass(frozen=True, slots=True)
class TrajectoryID:
    """Has the fields and the method of SkyRL's own, for where that can't be imported."""

    instance_id: str
    repetition_id: int

    def to_string(self) -> str:
        return f"{self.instance_id}_{self.repetition_id}"


def line_of(sample: Sample, images: ExportedImages) -> dict[str, Any]:
    """As JSON. Raises `ExportError`."""
    trajectory = sample.trajectory
    reward = reward_of(trajectory)
    if reward is None:
        raise ExportError(f"{name_of(trajectory)} has no reward; SkyRL wants one")
    steps = [step for step in trajectory.steps if sample.first.index <= step.index <= sample.last.index]
    return {
        "prompt_token_ids": sample.prompt_ids,
        "response_ids": sample.response_ids,
        "rewards": [0.0] * (len(sample.response_ids) - 1) + [float(reward) if sample.is_last else 0.0],
        "loss_masks": sample.mask,
        "stop_reasons": sample.last.finish_reason or "unknown",
        "rollout_logprobs": sample.logprobs,
        "trajectory_ids": {"instance_id": trajectory.task.id, "repetition_id": trajectory.rollout},
        "is_last_step": sample.is_last,
        "env_metrics": {"stop_reason": str(trajectory.stop_reason), "steps": len(trajectory.steps)},
        "images": [images.path(ref) for ref in sample.images],
        "llm_s": sum(step.timings.model_s for step in steps),
        "env_s": sum(step.timings.environment_s for step in steps),
        "duration_s": trajectory.duration_s,
    }


_COLUMNS = (
    *("prompt_token_ids", "response_ids", "rewards", "loss_masks", "stop_reasons", "rollout_logprobs"),
    *("trajectory_ids", "is_last_step", "env_metrics"),
)


def load_skyrl(
    path: str | os.PathLike[str],
    *,
    image_processor: Callable[..., Any] | None = None,
    trajectory_id: Callable[[str, int], Any] = TrajectoryID,
) -> dict[str, Any]:
    """An export for SkyRL as one `GeneratorOutput`. All of it is in memory then.

    Args:
        path: the export.
        image_processor: makes `pixel_values` and `image_grid_thw` of PIL images, the model's own
            (`AutoProcessor.from_pretrained(model).image_processor`), with the server's limits of pixels; needed if
            there are images. Called with `images=` and `return_tensors="pt"`.
        trajectory_id: SkyRL's `TrajectoryID`, where it can be imported.

    Raises `ExportError`: no such export, or it has images and there is no `image_processor`.
    """
    folder = Path(path).absolute()
    found: dict[str, Any] = {name: [] for name in _COLUMNS}
    pixels: list[Any] = []
    grids: list[Any] = []
    durations: list[float] = []
    splits: dict[str, list[float]] = {"llm": [], "env": []}
    begins = True
    for row in read_lines(folder, "skyrl"):
        for name in _COLUMNS:
            found[name].append(row[name])
        found["trajectory_ids"][-1] = trajectory_id(*row["trajectory_ids"].values())
        if begins:  # these columns have one entry a trajectory
            durations.append(row["duration_s"])
            for times in splits.values():
                times.append(0.0)
        for name, times in splits.items():
            times[-1] += row[f"{name}_s"]
        begins = row["is_last_step"]
        made = _processed(folder, row["images"], image_processor)
        pixels.append(made and made["pixel_values"])
        grids.append(made and made["image_grid_thw"])
    if not any(found["rollout_logprobs"]):
        found["rollout_logprobs"] = None
    with_images = any(each is not None for each in pixels)
    return {
        **found,
        "rollout_metrics": None,
        "trajectory_generation_times": durations,
        "trajectory_time_splits": splits,
        "rollout_expert_indices": None,
        "pixel_values": pixels if with_images else None,
        "image_grid_thw": grids if with_images else None,
    }


def _processed(folder: Path, names: list[str], image_processor: Callable[..., Any] | None) -> Any:
    if not names:
        return None
    if image_processor is None:
        raise ExportError(f"{folder} has images: give image_processor=, the model's own, to make tensors of them")
    return image_processor(images=load_images(folder, names), return_tensors="pt")
