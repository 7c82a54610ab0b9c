"""The attempts of a run in its two files, to which they are added one by one.

    trajectories.jsonl    one line an attempt: {"crc32": "…", "head": {…}, "body": {…}}
    arrays.bin            token ids and logprobs, one block an attempt

The head is an `AttemptEntry`; body and block are a trajectory as `trajectory_codec` writes it. Lines and blocks have
checksums. What does not fit them is a `ValueError` here.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from managed_vllm.agent import trajectory_codec
from managed_vllm.agent.made_of import task_digest
from managed_vllm.agent.run_folder import ARRAYS, LINES, read_at, translated_errors, write_at
from managed_vllm.agent.run_writers import WRITERS
from managed_vllm.agent.trajectory_codec import Record
from managed_vllm.agent.types import FailureClass, StopReason, Trajectory

log = logging.getLogger(__name__)

_BLOCK = struct.Struct("<4sIQ")
"""Begins a block of numbers: these four bytes, CRC-32 of what follows, its length."""
_MAGIC = b"MVn1"
_BEFORE_SUM, _AFTER_SUM, _BEFORE_BODY = b'{"crc32":"', b'",', b',"body":'
"""A line is `{"crc32":"89abcdef","head":{…},"body":{…}}`. The sum is of all after it but the last brace. The third does
not occur in the head: its only keys are ours, and in a JSON string the quotes would be escaped."""
_READ_AHEAD = 1 << 20
_SUMMED_FROM = len(_BEFORE_SUM) + 8 + len(_AFTER_SUM)


@dataclass(frozen=True, slots=True)
class AttemptEntry:
    """An attempt as the index has it: what can be said of it without reading it. The head of its line.

    Attributes:
        task_digest: of instruction, seed and data of the task (`made_of.task_digest`); empty: not known.
        exact: as of the trajectory.
        task_id, rollout, attempt, group_round, ok, reward, stop_reason, started_at, duration_s: as of the trajectory.
        failure: whose fault; None for one that did not fail.
        steps: the number of turns.
        prompt_tokens, response_tokens: of all turns together.
        offset, size: bytes, of its line.
        block: of its numbers: offset, size, CRC-32.
        writer: in whose log; empty for that of a run's only writer.
    """

    task_id: str
    rollout: int
    attempt: int
    group_round: int
    ok: bool
    reward: float | None
    stop_reason: StopReason
    failure: FailureClass | None
    steps: int
    prompt_tokens: int
    response_tokens: int
    started_at: float
    duration_s: float
    offset: int
    size: int
    block: tuple[int, int, int]
    task_digest: str = ""
    exact: bool = True
    writer: str = ""

    @property
    def ended_at(self) -> float:
        """Unix time."""
        return self.started_at + self.duration_s

    @property
    def key(self) -> tuple[str, int]:
        """The rollout that it is an attempt at: task id and number."""
        return self.task_id, self.rollout


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a run's files that is not trusted: `path`, the byte `offset` there, and `why`."""

    path: str
    offset: int
    why: str

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}: {self.why}"


class AttemptLog:
    """The two files, open, of the run's only writer, or of one of several (`writer`). Not thread-safe.

    `start` is the byte from which on lines are read. Raises `RunStoreError` where the files can't be used.
    """

    def __init__(self, run: Path, *, writable: bool, writer: str = "", start: int = 0) -> None:
        self._path = folder = run / WRITERS / writer if writer else run
        self._writer = writer
        self._end = start  # of the last whole line that was read, or written
        self._arrays_end = 0
        self._dirty = False
        self._files = contextlib.ExitStack()
        mode = "r+" if writable else "r"
        with contextlib.ExitStack() as opening, translated_errors(folder):
            self._lines = opening.enter_context(io.FileIO(folder / LINES, mode))
            self._arrays = opening.enter_context(io.FileIO(folder / ARRAYS, mode))
            self._files = opening.pop_all()

    def close(self) -> None:
        self._files.close()

    @property
    def end(self) -> int:
        """Of the last whole line that was read, or written: a byte."""
        return self._end

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_on(self) -> Iterator[AttemptEntry | Damage]:
        """Whole lines from where the last reading stopped."""
        with translated_errors(self._path), os.fdopen(os.dup(self._lines.fileno()), "rb", _READ_AHEAD) as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset = self._end
                self._end += len(line)
                try:
                    yield self._entry_of(line, offset)
                except ValueError as error:
                    yield Damage(place_of(self._writer, LINES), offset, str(error))

    def _entry_of(self, line: bytes, offset: int) -> AttemptEntry:
        try:
            head, _ = _split(line)
        except ValueError:
            # It may have been read while the end of a killed writer's line was cut off and written over.
            head, _ = _split(read_at(self._lines, len(line), offset))
        entry = _entry(head, offset, len(line), self._writer)
        start, size, _ = entry.block
        begin = read_at(self._arrays, _BLOCK.size, start)
        if len(begin) < _BLOCK.size or os.fstat(self._arrays.fileno()).st_size < start + size:
            raise ValueError(f"its numbers are missing: {ARRAYS} ends before byte {start + size}")
        magic, _, length = _BLOCK.unpack(begin)
        if magic != _MAGIC or length != size - _BLOCK.size:
            raise ValueError(f"its numbers are damaged: no block begins at byte {start} of {ARRAYS}")
        return entry

    def read(self, entry: AttemptEntry) -> tuple[bytes, bytes]:
        """The line and the block of an attempt, not looked at yet."""
        return self.read_line(entry), self.read_block(entry)

    def read_line(self, entry: AttemptEntry) -> bytes:
        """The line of an attempt, not looked at yet."""
        with translated_errors(self._path):
            return read_at(self._lines, entry.size, entry.offset)

    def read_block(self, entry: AttemptEntry) -> bytes:
        """The block of an attempt, not looked at yet."""
        with translated_errors(self._path):
            return read_at(self._arrays, entry.block[1], entry.block[0])

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin_writing(self) -> None:
        """Cuts off what a killed writer left; everything was read before."""
        with translated_errors(self._path):
            if os.fstat(self._lines.fileno()).st_size > self._end:
                log.info("%s: a killed writer left a line without an end; it is cut off", self._path)
                os.ftruncate(self._lines.fileno(), self._end)
            self._arrays_end = os.fstat(self._arrays.fileno()).st_size

    def append(self, head: dict[str, Any], record: Record) -> AttemptEntry:
        """Adds an attempt. When this returns it is on the disk; when it raises nothing of it is there."""
        block = _BLOCK.pack(_MAGIC, zlib.crc32(record.numbers), len(record.numbers)) + record.numbers
        head = {**head, "block": (self._arrays_end, len(block), zlib.crc32(block))}
        summed = b'"head":' + trajectory_codec.as_json(head) + _BEFORE_BODY + record.text
        line = b"%b%08x%b%b}\n" % (_BEFORE_SUM, zlib.crc32(summed), _AFTER_SUM, summed)
        entry = _entry(head, self._end, len(line), self._writer)
        with translated_errors(self._path):
            if self._dirty:
                self._cut()
            self._dirty = True
            try:
                write_at(self._arrays, block, self._arrays_end)
                write_at(self._lines, line, self._end)
            except BaseException:
                with contextlib.suppress(OSError):  # else the next append tries again
                    self._cut()
                raise
            self._dirty = False
        self._arrays_end += len(block)
        self._end += len(line)
        return entry

    def _cut(self) -> None:
        """Takes back what an append that failed has written."""
        os.ftruncate(self._lines.fileno(), self._end)
        os.ftruncate(self._arrays.fileno(), self._arrays_end)
        self._dirty = False


# -- lines and blocks --------------------------------------------------------------------------------------------------


def place_of(writer: str, name: str) -> str:
    """The path of a log's file within the run's folder."""
    return f"{WRITERS}/{writer}/{name}" if writer else name


def trajectory_of(entry: AttemptEntry, line: bytes, block: bytes) -> Trajectory:
    """The attempt. Raises `DamagedError`."""
    where = place_of(entry.writer, LINES), entry.offset
    try:
        _, body = _split(line)
        where = place_of(entry.writer, ARRAYS), entry.block[0]
        return trajectory_codec.decode(body, numbers_of(entry, block))
    except ValueError as error:
        raise DamagedError(Damage(*where, str(error))) from error


def body_of(line: bytes) -> bytes:
    """The body's JSON of a line. Raises `ValueError` if it is damaged."""
    return _split(line)[1]


class DamagedError(ValueError):
    """Bytes of an attempt are not those that were written."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(damage.why)
        self.damage = damage


def head_of(trajectory: Trajectory) -> dict[str, Any]:
    """The head of an attempt's line, but for the place of its numbers. Raises `ValueError`."""
    reward = trajectory.reward
    try:
        head = {
            "task_id": trajectory.task.id,
            "task_digest": task_digest(trajectory.task),
            "exact": bool(trajectory.exact),
            "rollout": int(trajectory.rollout),
            "attempt": int(trajectory.attempt),
            "group_round": int(trajectory.group_round),
            "ok": trajectory.ok,
            # Text for what JSON has no number for.
            "reward": reward if reward is None else float(reward) if math.isfinite(reward) else str(float(reward)),
            "stop_reason": StopReason(trajectory.stop_reason),
            "failure": None if trajectory.failure is None else FailureClass(trajectory.failure.kind),
            "steps": len(trajectory.steps),
            "prompt_tokens": sum(len(step.prompt_token_ids) for step in trajectory.steps),
            "response_tokens": trajectory.response_tokens,
            "started_at": float(trajectory.started_at),
            "duration_s": float(trajectory.duration_s),
        }
        trajectory_codec.as_json(head)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return head


def _entry(head: dict[str, Any], offset: int, size: int, writer: str) -> AttemptEntry:
    """Raises `ValueError`."""
    try:
        if isinstance(head["reward"], str):
            head = {**head, "reward": float(head["reward"])}
        entry = msgspec.convert({**head, "offset": offset, "size": size, "writer": writer}, AttemptEntry)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise ValueError(f"its head is none: {error}") from error
    object.__setattr__(
        entry, "task_id", sys.intern(entry.task_id)
    )  # ours alone yet; `replace` takes three times as long
    return entry


def _split(line: bytes) -> tuple[dict[str, Any], bytes]:
    """The head and the body's JSON of a line. Raises `ValueError` if it is damaged."""
    summed = line[_SUMMED_FROM:-2]
    if line[:_SUMMED_FROM] != b"%b%08x%b" % (_BEFORE_SUM, zlib.crc32(summed), _AFTER_SUM) or line[-2:] != b"}\n":
        raise ValueError("the line is damaged: its checksum does not fit")
    head, comma, body = summed.removeprefix(b'"head":').partition(_BEFORE_BODY)
    found = msgspec.json.decode(head) if head.isascii() and b"\\u" not in head else json.loads(head)
    if not comma or not isinstance(found, dict):
        raise ValueError("the line is none of ours")
    return found, body


def numbers_of(entry: AttemptEntry, block: bytes) -> bytes:
    """What is in a block. Raises `ValueError` if it is damaged."""
    if zlib.crc32(block) != entry.block[2]:
        raise ValueError("the numbers are damaged: their checksum does not fit")
    return block[_BLOCK.size :]
