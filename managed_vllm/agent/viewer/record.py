"""A trajectory as JSON for the page: what `viewer.js` reads, and nothing that it does not show.

Values from models and environments are kept as they are, with these exceptions, each of which the page says: texts
beyond `MOST_CHARACTERS` are cut, of a prompt only the number of tokens is kept, logprobs have four decimals, and what
JSON can't hold is written as Python would. A message that several steps have sent stands once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from managed_vllm.agent.actions import Action, action_to_dict, describe
from managed_vllm.agent.report import Row
from managed_vllm.agent.types import ImageRef, Step, Trajectory

MOST_CHARACTERS = 20_000
"""Of one text. An accessibility tree can have a megabyte, once in each of 15,000 steps."""

_MOST_NESTED = 40
_EXACT_INTEGER = 2**53
"""JavaScript's numbers are floats: an integer beyond it would come out as another one."""
_NOT_IN_HTML = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def to_json(value: Any) -> str:
    """JSON in one line that can stand in a `<script>`: no `<`, so neither `</script` nor `<!--`, and valid UTF-8.

    Half a surrogate pair, which a text cut in its middle can have, would not encode.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _NOT_IN_HTML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def row_record(row: Row) -> dict[str, Any]:
    """One line of the list."""
    return {
        "task": _cut(row.task),
        "instruction": row.instruction[:400],
        "rollout": row.rollout,
        "attempt": row.attempt,
        "round": row.group_round,
        "reward": number_record(row.reward),
        "stop": str(row.stop_reason),
        "failure": None if row.failure is None else str(row.failure),
        "why": row.failure_text[:400],
        "steps": row.steps,
        "tokens": row.tokens,
        "started": number_record(row.started_at),
        "seconds": number_record(row.duration_s),
        "ok": row.ok,
        "stands": row.stands,
    }


class TrajectoryRecord:
    """One trajectory as plain values, in `value`; and the images that it shows, in `images`."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.images: list[ImageRef] = []
        self._numbers: dict[ImageRef, int] = {}
        self._messages: list[Any] = []
        self._known: dict[str, int] = {}
        # One object is looked at once: builders send the same messages again with each turn.
        self._seen: dict[int, int] = {}
        failure, task = trajectory.failure, trajectory.task
        steps = [self._step(step) for step in trajectory.steps]
        self.value: dict[str, Any] = {
            "task": {"id": task.id, "instruction": task.instruction, "seed": self._plain(task.seed)}
            | {"data": self._plain(task.data)},
            "instruction": _cut(trajectory.instruction or task.instruction),
            "failure": None
            if failure is None
            else {
                "kind": str(failure.kind),
                "stage": failure.stage,
                "type": failure.error_type,
                "message": _cut(failure.message),
                "step": failure.step,
                "details": _cut(failure.details),
            },
            "resetSeconds": number_record(trajectory.reset_s),
            "evaluateSeconds": number_record(trajectory.evaluate_s),
            "info": self._plain(trajectory.info),
            "final": self._image(trajectory.final_screenshot),
            "steps": steps,
        }
        self.value["messages"] = self._messages
        self.value["images"] = [[ref.sha256, ref.mime, ref.width, ref.height] for ref in self.images]

    def _step(self, step: Step) -> dict[str, Any]:
        logprobs, timings = step.response_logprobs, step.timings
        return {
            "index": step.index,
            "screenshot": self._image(step.screenshot),
            "text": None if step.text is None else _cut(step.text),
            "messages": [self._message(message) for message in step.messages],
            "promptTokens": len(step.prompt_token_ids),
            "response": _cut(step.response),
            "tokens": [int(token) for token in step.response_token_ids],
            "logprobs": None if logprobs is None else [number_record(float(each), 4) for each in logprobs],
            "finish": step.finish_reason,
            "thought": _cut(step.thought),
            "actions": [self._action(action) for action in step.actions],
            "executed": step.executed,
            "parseError": None if step.parse_error is None else _cut(step.parse_error),
            "reward": number_record(step.reward),
            "terminated": step.terminated,
            "truncated": step.truncated,
            "info": self._plain(step.info),
            "started": number_record(timings.started_at),
            "queue": number_record(timings.queue_s),
            "model": number_record(timings.model_s),
            "environment": number_record(timings.environment_s),
            "total": number_record(timings.total_s),
            "modelName": step.model,
            "epoch": step.epoch,
            "attempts": step.attempts,
            "weights": step.weight_version,
        }

    def _action(self, action: Action) -> dict[str, Any]:
        try:
            record = action_to_dict(action)
            said = describe(action, most=MOST_CHARACTERS)
        except ValueError:  # one of the caller's own, with values that JSON can't hold
            return {"type": "custom", "said": _cut(repr(action)), "fields": {}}
        kind = record.pop("type")
        return {"type": kind, "said": _cut(said), "fields": self._plain(record)}

    def _message(self, message: Mapping[str, Any]) -> int:
        number = self._seen.get(id(message))
        if number is None:
            plain = self._plain(message)
            key = json.dumps(plain, sort_keys=True)
            number = self._known.setdefault(key, len(self._messages))
            if number == len(self._messages):
                self._messages.append(plain)
            self._seen[id(message)] = number
        return number

    def _image(self, ref: ImageRef | None) -> int | None:
        if ref is None:
            return None
        number = self._numbers.setdefault(ref, len(self.images))
        if number == len(self.images):
            self.images.append(ref)
        return number

    def _plain(self, value: Any, depth: int = 0) -> Any:
        """The value in JSON's terms; an image becomes `{"$image": its number}`."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _cut(str(value))
        if isinstance(value, int):
            return int(value) if abs(value) < _EXACT_INTEGER else str(int(value))
        if isinstance(value, float):
            return number_record(float(value))
        if isinstance(value, ImageRef):
            return {"$image": self._image(value)}
        if depth < _MOST_NESTED:
            if isinstance(value, Mapping):
                return {_cut(str(key)): self._plain(each, depth + 1) for key, each in value.items()}
            if isinstance(value, list | tuple):
                return [self._plain(each, depth + 1) for each in value]
        return _cut(repr(value))


def number_record(value: float | None, decimals: int = 6) -> float | str | None:
    """A float that JSON can hold; nan and infinity by the names that JavaScript has for them."""
    if value is None or math.isfinite(value):
        return value if value is None else round(value, decimals)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}\n… ({len(text) - MOST_CHARACTERS:,} more characters are in the run, not here)"
