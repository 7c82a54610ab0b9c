"""A trajectory as one JSON text and one block of numbers, and back: exactly the same value.

`encode` and `decode` know nothing of files; `store` does. What must hold:

1. `decode(*encode(trajectory)) == trajectory`, tuples staying tuples and lists lists, for every trajectory of plain
   values (None, bool, int, float with NaN and infinities, str, `ImageRef`, lists, tuples, mappings). Scalars of numpy
   come back as Python's. Anything else is a `ValueError` that names the place.
2. Logprobs are 64-bit floats, ids are 32-bit integers: what the server said, to the bit.
3. An episode grows with its length, not with its square: each distinct message stands once, and of each prompt only
   what differs from the former prompt and answer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from managed_vllm.agent.actions import Action, Custom, action_from_dict, action_to_dict
from managed_vllm.agent.types import (
    Failure,
    FailureClass,
    ImageRef,
    Message,
    RejectedAnswer,
    Step,
    StepTimings,
    StopReason,
    Task,
    Trajectory,
)

_ZLIB_LEVEL = 1
"""For ids: runs of image placeholders all but vanish."""


class Record(NamedTuple):
    """A trajectory as `text` (JSON), `numbers` (ids and logprobs), and the `images` that it refers to."""

    text: bytes
    numbers: bytes
    images: frozenset[ImageRef]


def encode(trajectory: Trajectory) -> Record:
    """The trajectory as JSON and numbers. Raises `ValueError` for what would not come back as it was."""
    packer = _Packer()
    numbers = _Numbers()
    messages = _Messages(packer)
    steps = []
    for step in trajectory.steps:
        where = f"steps[{step.index}]"
        values = packer.fields(step, where, except_for=_APART)
        if step.weight_versions == ():  # nearly always
            del values["weight_versions"]
        values["messages"] = messages.of_step(step.messages, f"{where}.messages")
        values["numbers"] = numbers.of_step(step, where)
        values["actions"] = [
            packer.action(action, f"{where}.actions[{number}]") for number, action in enumerate(step.actions)
        ]
        if step.rejected:
            values["rejected"] = [
                packer.fields(each, f"{where}.rejected[{number}]") for number, each in enumerate(step.rejected)
            ]
        values["timings"] = packer.fields(step.timings, f"{where}.timings")
        values["lists"] = [name for name in _SEQUENCES if isinstance(getattr(step, name), list)]
        steps.append(values)
    body = packer.fields(trajectory, "", except_for=("task", "steps", "failure"))
    body["task"] = packer.fields(trajectory.task, "task")
    body["failure"] = None if trajectory.failure is None else packer.fields(trajectory.failure, "failure")
    body["lists"] = ["steps"] if isinstance(trajectory.steps, list) else []
    body["messages"] = messages.distinct
    body["steps"] = steps
    return Record(as_json(body), numbers.block(), frozenset(packer.images))


def decode(text: bytes, numbers: bytes) -> Trajectory:
    """The trajectory of a record. Raises `ValueError` if it is none, or of a later version's making."""
    try:
        body = json.loads(text)
        lists = body.pop("lists")
        messages = [_unpack(message) for message in body.pop("messages")]
        steps = tuple(_steps(body.pop("steps"), messages, numbers))
        task = _build(Task, body.pop("task"))
        failure = body.pop("failure")
        body["stop_reason"] = StopReason(body["stop_reason"])
        if failure is not None:
            failure = _build(Failure, {**failure, "kind": FailureClass(failure["kind"])})
        made: Trajectory = _build(
            Trajectory, body, task=task, failure=failure, steps=list(steps) if "steps" in lists else steps
        )
        return made
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error, zlib.error) as error:
        raise ValueError(f"no trajectory: {type(error).__name__}: {error}") from error


class _Named(msgspec.Struct):
    instruction: str = ""


class _Outline(msgspec.Struct):
    """What a line of a list shows of an attempt beside its head. The rest is skipped, not made into values."""

    task: _Named
    instruction: str = ""
    failure: dict[str, Any] | None = None


def outline(text: bytes) -> tuple[str, str]:
    """Of a record: what the model was told to do, and why it failed; empty where it did not. Raises `ValueError`."""
    try:
        found = msgspec.json.decode(text, type=_Outline)
    except msgspec.DecodeError:  # half a surrogate pair, which only `json` takes
        found = msgspec.convert(json.loads(text), _Outline)
    failure = found.failure
    why = "" if failure is None else str(_build(Failure, {**failure, "kind": FailureClass(failure["kind"])}))
    return found.instruction or found.task.instruction, why


def as_json(value: Any) -> bytes:
    """Plain values as JSON in one line. Raises `ValueError`: too deep, or a number too long."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        try:
            return text.encode()
        except UnicodeEncodeError:  # half a character, which JSON has only as \ud800
            return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


_SEQUENCES = ("messages", "prompt_token_ids", "response_token_ids", "response_logprobs", "actions", "rejected")
_APART = (*_SEQUENCES, "timings")


# -- plain values ------------------------------------------------------------------------------------------------------


class _Packer:
    """Values as JSON has them. What it has not is a dict with one key: `$tuple`, `$image`, `$float`, `$dict`."""

    def __init__(self) -> None:
        self.images: set[ImageRef] = set()

    def fields(self, value: Any, where: str, *, except_for: Sequence[str] = ()) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(value) if field.name not in except_for]
        prefix = where and f"{where}."
        return {name: self.pack(getattr(value, name), f"{prefix}{name}") for name in names}

    def action(self, action: Action, where: str) -> dict[str, Any]:
        if isinstance(action, Custom):  # its arguments are the caller's own: tuples stay tuples
            arguments = self.pack(action.arguments, f"{where}.arguments")
            return {"type": "custom", "name": self.pack(action.name, f"{where}.name"), "arguments": arguments}
        try:
            return action_to_dict(action)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def pack(self, value: Any, where: str) -> Any:
        try:
            return self._pack(value, where)
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deep") from error

    def _pack(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return value if type(value) is str else str.__str__(value)
        if isinstance(value, int):
            return value if type(value) is int else int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, list):
            return [self._pack(each, f"{where}[{number}]") for number, each in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self._pack(each, f"{where}[{number}]") for number, each in enumerate(value)]}
        if isinstance(value, ImageRef):
            self.images.add(value)
            return {"$image": [value.sha256, value.mime, value.width, value.height]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {str.__str__(key): self._pack(each, f"{where}.{key}") for key, each in value.items()}
            items = value.items()
            return {"$dict": [[self._pack(key, where), self._pack(each, f"{where}.{key}")] for key, each in items]}
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
            return self._pack(value.item(), where)
        raise ValueError(
            f"{where} is of type {type(value).__name__}, which can't be recorded: plain JSON values and ImageRef can"
        )


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key.startswith("$"):
            return _TAGS[key](inner)
    return {key: _unpack(each) for key, each in value.items()}


_TAGS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda inner: tuple(_unpack(inner)),
    "$image": lambda inner: ImageRef(*inner),
    "$float": float,
    "$dict": lambda inner: {_unpack(key): _unpack(value) for key, value in inner},
}


def _build(cls: type[Any], values: Mapping[str, Any], **made: Any) -> Any:
    unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}: a later version wrote it")
    return cls(**{name: _unpack(value) for name, value in values.items()}, **made)


def _steps(steps: list[dict[str, Any]], messages: list[Any], block: bytes) -> Iterator[Step]:
    numbers = _NumbersReader(block)
    shown: list[int] = []
    for values in steps:
        same, rest = values.pop("messages")
        shown = [*shown[:same], *rest]
        made: dict[str, Any] = numbers.of_step(values.pop("numbers"))
        made["messages"] = tuple(messages[index] for index in shown)
        made["actions"] = tuple(_action(action) for action in values.pop("actions"))
        made["rejected"] = tuple(_build(RejectedAnswer, each) for each in values.pop("rejected", ()))
        made["timings"] = _build(StepTimings, values.pop("timings"))
        for name in values.pop("lists"):
            made[name] = list(made[name])
        yield _build(Step, values, **made)
    numbers.end()


def _action(values: dict[str, Any]) -> Action:
    if values["type"] == "custom":
        return Custom(values["name"], _unpack(values["arguments"]))
    return action_from_dict(values)


# -- messages ----------------------------------------------------------------------------------------------------------


class _Messages:
    """Each distinct message once; per step how many are the same as in the step before, and the places of the rest."""

    def __init__(self, packer: _Packer) -> None:
        self.distinct: list[Any] = []
        self._packer = packer
        self._places: dict[bytes, int] = {}
        self._by_id: dict[int, int] = {}  # the trajectory holds them, so ids stay theirs
        self._before: list[int] = []

    def of_step(self, messages: Sequence[Message], where: str) -> tuple[int, list[int]]:
        shown = [self._place(message, f"{where}[{number}]") for number, message in enumerate(messages)]
        same = _common(self._before, shown)
        self._before = shown
        return same, shown[same:]

    def _place(self, message: Message, where: str) -> int:
        place = self._by_id.get(id(message))
        if place is None:
            packed = self._packer.pack(message, where)
            place = self._places.setdefault(as_json(packed), len(self.distinct))
            if place == len(self.distinct):
                self.distinct.append(packed)
            self._by_id[id(message)] = place
        return place


# -- ids and logprobs --------------------------------------------------------------------------------------------------

_IDS = struct.Struct("<I")
"""Begins a block: bytes of the ids, which follow it, compressed. Then come the logprobs, as they are."""


class _Numbers:
    """Of a step stand in the text: how many ids of the prompt are as in the former prompt and answer, how many more it
    has, how many the answer has, and how many logprobs (null without any)."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._logprobs = array("d")
        self._before = array("i")

    def of_step(self, step: Step, where: str) -> tuple[int, int, int, int | None]:
        prompt = _array("i", step.prompt_token_ids, f"{where}.prompt_token_ids")
        response = _array("i", step.response_token_ids, f"{where}.response_token_ids")
        same = _common(self._before, prompt)
        self._ids += prompt[same:]
        self._ids += response
        self._before = prompt + response
        if step.response_logprobs is None:
            return same, len(prompt) - same, len(response), None
        logprobs = _array("d", step.response_logprobs, f"{where}.response_logprobs")
        self._logprobs += logprobs
        return same, len(prompt) - same, len(response), len(logprobs)

    def block(self) -> bytes:
        ids = zlib.compress(_little(self._ids), _ZLIB_LEVEL)
        return _IDS.pack(len(ids)) + ids + _little(self._logprobs)


class _NumbersReader:
    def __init__(self, block: bytes) -> None:
        (size,) = _IDS.unpack_from(block)
        self._ids = array("i")
        self._ids.frombytes(zlib.decompress(block[_IDS.size : _IDS.size + size]))
        self._logprobs = array("d")
        self._logprobs.frombytes(block[_IDS.size + size :])
        for numbers in (self._ids, self._logprobs):
            if sys.byteorder == "big":
                numbers.byteswap()
        self._id = self._logprob = 0
        self._before: tuple[int, ...] = ()

    def of_step(self, counts: tuple[int, int, int, int | None]) -> dict[str, Any]:
        same, more, answered, scored = counts
        prompt = self._before[:same] + self._take(more)
        response = self._take(answered)
        self._before = prompt + response
        logprobs = None
        if scored is not None:
            logprobs = tuple(self._logprobs[self._logprob : self._logprob + scored])
            self._logprob += scored
        return {"prompt_token_ids": prompt, "response_token_ids": response, "response_logprobs": logprobs}

    def _take(self, number: int) -> tuple[int, ...]:
        self._id += number
        return tuple(self._ids[self._id - number : self._id])

    def end(self) -> None:
        if (self._id, self._logprob) != (len(self._ids), len(self._logprobs)):
            raise ValueError("the numbers are not those of the text")


def _array(kind: str, values: Sequence[Any], where: str) -> array[Any]:
    try:
        if isinstance(values, bytes | bytearray | str):
            raise TypeError(f"they are {type(values).__name__}")  # array() would take them for its memory
        return array(kind, values)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{where}: not all are {'32-bit integers' if kind == 'i' else 'floats'}: {error}") from error


def _little(numbers: array[Any]) -> bytes:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _common(before: Any, now: Any) -> int:
    """The length of the longest common beginning, by bisection: slices are compared in C."""
    low, high = 0, min(len(before), len(now))
    if before[:high] == now[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if before[low:middle] == now[low:middle]:
            low = middle
        else:
            high = middle
    return low
