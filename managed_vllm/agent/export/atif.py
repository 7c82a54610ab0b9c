"""ATIF 1.7, the Agent Trajectory Interchange Format: one JSON document a trajectory, images beside them.

A document has the system's and the user's first messages as they were sent, then one agent step for each turn: the
answer as its message, the thought as `reasoning_content`, the actions as `tool_calls`, and as `observation` what was
seen after them. Token ids and logprobs are in `metrics`. What was sent again with each turn is not repeated.

Image paths are relative to the document.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from managed_vllm.agent.actions import Custom, action_to_dict
from managed_vllm.agent.export.image_files import ExportedImages
from managed_vllm.agent.export.samples import name_of, reward_of
from managed_vllm.agent.types import ImageRef, Message, Step, Trajectory
from managed_vllm.errors import ExportError

VERSION = "ATIF-v1.7"
_MEDIA_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_NOTES = (
    "Each agent step's prompt had the newest images only; what was sent again with each turn is not repeated here. "
    "metrics.prompt_token_ids has the whole prompt of each step."
)


class AtifWriter:
    def __init__(self, folder: Path, images: ExportedImages, logprobs: bool | None) -> None:
        self._folder = folder
        self._images = images
        self._logprobs = logprobs
        self.cuts: Counter[str] = Counter()

    def add(self, trajectory: Trajectory) -> int:
        document = _Document(trajectory, self._images, self._logprobs).made()
        path = self._folder / f"{_file_name(trajectory.task.id)}-{trajectory.rollout}.json"
        with path.open("x", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
        return 1

    @property
    def images(self) -> int:
        """Distinct images so far."""
        return len(self._images)

    def close(self) -> None:
        pass


class _Document:
    def __init__(self, trajectory: Trajectory, images: ExportedImages, logprobs: bool | None) -> None:
        self._trajectory = trajectory
        self._images = images
        self._logprobs = logprobs
        self._name = name_of(trajectory)

    def made(self) -> dict[str, Any]:
        trajectory = self._trajectory
        steps = [*self._begin()]
        for number, step in enumerate(trajectory.steps):
            steps.append(self._turn(step, number))
        prompt_tokens = sum(len(step.prompt_token_ids) for step in trajectory.steps)
        failure = trajectory.failure
        return _without_none(
            {
                "schema_version": VERSION,
                "session_id": f"{trajectory.task.id}/{trajectory.rollout}",
                "trajectory_id": f"{trajectory.task.id}/{trajectory.rollout}/{trajectory.attempt}",
                "agent": _without_none(
                    {
                        "name": "managed-vllm",
                        "version": _version(),
                        "model_name": trajectory.steps[0].model or None if trajectory.steps else None,
                    }
                ),
                "steps": [{"step_id": number, **step} for number, step in enumerate(steps, 1)],
                "notes": _NOTES,
                "final_metrics": _without_none(
                    {
                        "total_prompt_tokens": prompt_tokens or None,
                        "total_completion_tokens": trajectory.response_tokens or None,
                        "total_steps": len(steps),
                        "extra": _without_none({"reward": reward_of(trajectory), "duration_s": trajectory.duration_s}),
                    }
                ),
                "extra": _without_none(
                    {
                        "task": {
                            "id": trajectory.task.id,
                            "seed": trajectory.task.seed,
                            "data": self._json(trajectory.task.data),
                        },
                        "rollout": trajectory.rollout,
                        "attempt": trajectory.attempt,
                        "group_round": trajectory.group_round,
                        "stop_reason": str(trajectory.stop_reason),
                        "failure": None if failure is None else str(failure),
                        "info": self._json(trajectory.info) or None,
                        "exact": None if trajectory.exact else False,
                    }
                ),
            }
        )

    def _begin(self) -> list[dict[str, Any]]:
        """What the agent was told, and saw, before its first answer."""
        first = self._trajectory.steps[0] if self._trajectory.steps else None
        if first is None or not first.messages:
            shown = [] if first is None else self._seen(first.screenshot, first.text)
            return [{"source": "user", "message": self._joined([self._text(self._trajectory.instruction), *shown])}]
        made: list[dict[str, Any]] = []
        for message in first.messages:
            role = message.get("role")
            source = "system" if role == "system" else "agent" if role == "assistant" else "user"
            made.append({"source": source, "message": self._content(message)})
            if source == "agent":
                made[-1]["is_copied_context"] = True  # an example in the prompt: nobody sampled it here
        return made

    def _turn(self, step: Step, number: int) -> dict[str, Any]:
        calls = []
        for place, action in enumerate(step.actions):
            if isinstance(action, Custom):
                name, arguments = action.name, self._json(action.arguments)
            else:
                arguments = action_to_dict(action)
                name = arguments.pop("type")
            calls.append({"tool_call_id": f"call_{number}_{place}", "function_name": name, "arguments": arguments})
        after = self._trajectory.steps[number + 1 : number + 2]
        if after:
            seen = self._seen(after[0].screenshot, after[0].text)
        else:
            seen = self._seen(self._trajectory.final_screenshot, None)
        result: dict[str, Any] = {"content": self._joined(seen)}
        if 0 < step.executed <= len(calls):
            result["source_call_id"] = calls[step.executed - 1]["tool_call_id"]
        extra = {
            "executed": step.executed,
            "parse_error": step.parse_error,
            "reward": self._json(step.reward),
            "terminated": step.terminated or None,
            "truncated": step.truncated or None,
            "finish_reason": step.finish_reason,
            "weight_version": step.weight_version,
            "weight_versions": [list(part) for part in step.weight_versions] or None,
            "info": self._json(step.info) or None,
            "timings": {
                "queue_s": step.timings.queue_s,
                "model_s": step.timings.model_s,
                "environment_s": step.timings.environment_s,
                "total_s": step.timings.total_s,
            },
        }
        return _without_none(
            {
                "source": "agent",
                "timestamp": _timestamp(step.timings.started_at),
                "model_name": step.model or None,
                "message": step.response,
                "reasoning_content": step.thought or None,
                "tool_calls": calls or None,
                "observation": {"results": [result]} if seen else None,
                "metrics": self._metrics(step),
                "llm_call_count": 1,
                "extra": _without_none(extra),
            }
        )

    def _metrics(self, step: Step) -> dict[str, Any] | None:
        logprobs = None
        if self._logprobs is not False and step.response_logprobs is not None:
            logprobs = list(step.response_logprobs)
            if len(logprobs) != len(step.response_token_ids) or not all(map(math.isfinite, logprobs)):
                raise ExportError(
                    f"{self._name}, step {step.index}: it has {len(logprobs)} logprobs for "
                    f"{len(step.response_token_ids)} tokens, or one that is not finite; export with logprobs=False"
                )
        elif self._logprobs:
            raise ExportError(f"{self._name}, step {step.index}: its logprobs are missing; export with logprobs=False")
        return (
            _without_none(
                {
                    "prompt_tokens": len(step.prompt_token_ids) or None,
                    "completion_tokens": len(step.response_token_ids) or None,
                    "prompt_token_ids": list(step.prompt_token_ids) or None,
                    "completion_token_ids": list(step.response_token_ids) or None,
                    "logprobs": logprobs,
                }
            )
            or None
        )

    # -- content -------------------------------------------------------------------------------------------------------

    def _content(self, message: Message) -> str | list[dict[str, Any]]:
        content = message.get("content")
        if content is None or isinstance(content, str):
            return content or ""
        parts = []
        for part in content if isinstance(content, list | tuple) else [content]:
            image = part.get("image") if isinstance(part, Mapping) else None
            if isinstance(image, ImageRef):
                parts.append(self._image(image))
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts.append(self._text(part["text"]))
            else:
                parts.append(self._text(json.dumps(self._json(part))))
        return parts

    def _seen(self, screenshot: ImageRef | None, text: str | None) -> list[dict[str, Any]]:
        shown = [] if text is None else [self._text(text)]
        return shown if screenshot is None else [*shown, self._image(screenshot)]

    @staticmethod
    def _joined(parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """As text where there is nothing else."""
        if all(part["type"] == "text" for part in parts):
            return "\n".join(part["text"] for part in parts)
        return list(parts)

    @staticmethod
    def _text(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text}

    def _image(self, ref: ImageRef) -> dict[str, Any]:
        if ref.mime not in _MEDIA_TYPES:
            raise ExportError(f"{self._name}: ATIF has no {ref.mime}; take screenshots as PNG, JPEG, GIF or WebP")
        return {"type": "image", "source": {"media_type": ref.mime, "path": self._images.path(ref)}}

    def _json(self, value: Any) -> Any:
        """As JSON can have it: an image as its path, a float that is no number as text."""
        if isinstance(value, ImageRef):
            return self._images.path(value)
        if isinstance(value, Mapping):
            return {str(key): self._json(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._json(each) for each in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _timestamp(unix_time: float) -> str | None:
    if not unix_time:
        return None
    return datetime.datetime.fromtimestamp(unix_time, datetime.UTC).isoformat().replace("+00:00", "Z")


def _version() -> str:
    try:
        return importlib.metadata.version("managed-vllm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _file_name(task_id: str) -> str:
    """The id where it is a safe name; else what of it is, and a hash that tells it from others."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", task_id)[:100].lstrip(".")
    if safe == task_id:
        return safe
    return f"{safe}-{hashlib.sha256(task_id.encode(errors='surrogatepass')).hexdigest()[:12]}"
