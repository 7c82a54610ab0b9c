"""For dart-gui and the service scripts: one folder a trajectory, as their loop leaves it and their scripts read it.

    final_messages.json     the conversation, images as {"type": "image", "image": "image_0001"}
    image_0001.png …        in the order of the conversation
    reward.txt              also as reward_from_env.txt
    task_config.json        the task's data
    timestamp_info.json     when each answer came and each action was carried out

As there, the first screenshot stands in the message with the instruction. An attempt that failed has no reward and no
`final_messages.json`, so that no script takes it for one of reward 0: it has `partial_messages.json` and
`error_info.json`. Unlike there no image is written over another one, and it is the very image that was sent.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.types import ImageRef, Message, Trajectory
from managed_vllm.errors import ExportError


class DartWriter:
    """Writes `TASK/runner_ROLLOUT_TASK/` for each trajectory."""

    def __init__(self, folder: Path, images: ImageStore) -> None:
        self._folder = folder
        self._images = images
        self._there: set[ImageRef] = set()
        self.cuts: Counter[str] = Counter()

    def add(self, trajectory: Trajectory) -> int:
        name = file_name(trajectory.task.id)
        self._there |= write_dart_folder(
            trajectory, self._images, self._folder / name / f"runner_{trajectory.rollout}_{name}"
        )
        return 1

    @property
    def images(self) -> int:
        """Distinct images so far."""
        return len(self._there)

    def close(self) -> None:
        """Every file is closed already."""


def file_name(task_id: str) -> str:
    """A task's id as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", task_id)[:120].lstrip(".") or "task"


def write_dart_folder(trajectory: Trajectory, images: ImageStore, folder: Path) -> set[ImageRef]:
    """Writes one trajectory's folder; returns the images in it.

    Raises `ExportError`: one can't be made a PNG file. `RunStoreError`: one is missing or damaged. `OSError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbered = _Numbered()
    messages = [numbered.message(message) for message in conversation_of(trajectory)]
    for number, ref in enumerate(numbered.refs, 1):
        write_png(images, ref, folder / f"image_{number:04}.png")
    _write_json(folder / "task_config.json", dict(trajectory.task.data))
    _write_json(folder / "timestamp_info.json", _timestamps(trajectory))
    if trajectory.failure is not None or trajectory.reward is None:
        error = str(trajectory.failure or f"no reward ({trajectory.stop_reason})")
        _write_json(folder / "partial_messages.json", messages)
        _write_json(folder / "error_info.json", {"error": error, "step": len(trajectory.steps)})
        return set(numbered.refs)
    # The files that scripts look for come last: whoever sees them sees all.
    for name in ("reward_from_env.txt", "reward.txt"):
        (folder / name).write_text(str(trajectory.reward))
    _write_json(folder / "final_messages.json", messages)
    return set(numbered.refs)


def conversation_of(trajectory: Trajectory) -> list[Message]:
    """All that was said and seen, though no single prompt had all of its images; one message a turn and role."""
    if not trajectory.steps:
        return []
    messages = list(trajectory.steps[0].messages)
    for number, step in enumerate(trajectory.steps):
        messages.append({"role": "assistant", "content": step.response})
        after = trajectory.steps[number + 1 : number + 2]
        parts: list[Any] = []
        shot = after[0].screenshot if after else trajectory.final_screenshot
        if shot is not None and shot != step.screenshot:
            parts.append({"type": "image", "image": shot})
        if after and shot is None and after[0].text is not None:
            parts.append({"type": "text", "text": after[0].text})
        if parts:
            messages.append({"role": "user", "content": parts})
    return _joined(messages)


def _joined(messages: list[Message]) -> list[Message]:
    """Messages of one user that follow each other become one: the instruction and the first screenshot."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and message.get("role") == joined[-1].get("role") == "user":
            joined[-1] = {**joined[-1], "content": [*_parts(joined[-1]), *_parts(message)]}
        else:
            joined.append(dict(message))
    return list(joined)


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or ())


class _Numbered:
    """Messages with names in the place of images; `refs` are these, in order."""

    def __init__(self) -> None:
        self.refs: list[ImageRef] = []

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [self._part(part) for part in content]
        return {**message, "content": content}

    def _part(self, part: Any) -> Any:
        if isinstance(part, Mapping) and isinstance(part.get("image"), ImageRef):
            self.refs.append(part["image"])
            return {"type": "image", "image": f"image_{len(self.refs):04}"}
        return part


def write_png(images: ImageStore, ref: ImageRef, target: Path) -> None:
    """An image as a PNG file: a link to the run's if that can be. Raises `ExportError`, `RunStoreError`, `OSError`."""
    data = images.read(ref)  # what is exported is what was sent
    target.unlink(missing_ok=True)
    if ref.mime != "image/png":
        target.write_bytes(_as_png(data, ref))
        return
    try:
        os.link(images.path(ref), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(images.path(ref), target)


def _as_png(data: bytes, ref: ImageRef) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise ExportError(f"Pillow is missing, which makes PNG files of {ref.mime}: pip install pillow") from error
    file = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(file, "PNG")
    return file.getvalue()


def _timestamps(trajectory: Trajectory) -> dict[str, Any]:
    steps = []
    for step in trajectory.steps:
        began, times = step.timings.started_at, step.timings
        answered = began + times.queue_s + times.model_s
        steps.append({"step": step.index, "action": "generate_response", "timestamp": _time(answered)})
        if step.executed:
            steps.append({"step": step.index, "action": "execute_action", "timestamp": _time(began + times.total_s)})
    ended = trajectory.started_at + trajectory.duration_s
    return {"start_time": _time(trajectory.started_at), "steps": steps, "end_time": _time(ended)}


def _time(unix_time: float) -> str:
    return datetime.datetime.fromtimestamp(unix_time).isoformat()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str), encoding="utf-8")
