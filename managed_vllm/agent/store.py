"""The record of a run on disk: one folder, to which attempts are added one by one, and from which a run is resumed.

    run.json              what was asked; replaced atomically
    trajectories.jsonl    one line an attempt: {"crc32": "…", "head": {…}, "body": {…}}
    arrays.bin            token ids and logprobs, one block an attempt
    images/ab/cdef….png   screenshots, by content
    writer.lock           held by the one process that writes; writer.json says who that is

What must hold:

1. When `append` has returned, the attempt is on the disk, whole: first its images and its block of numbers, then its
   line, each followed by fsync. When it raises, nothing of the attempt counts, and those before are as they were.
2. A writer that was killed leaves at most one line without an end. It does not count, and the next writer cuts it off.
3. Nothing damaged is trusted: lines and blocks have checksums. What is damaged is reported (`damaged`) and counts as
   not done; the rest is used.
4. One writer at a time, any number of readers meanwhile; they see whole lines only, and new ones by `refresh`.
5. An attempt comes back exactly as it was: see `records`.

Which attempts count: of each task those of the highest `group_round`, and of each rollout in it the first that is `ok`;
the last one where none is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import math
import os
import socket
import struct
import sys
import threading
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from managed_vllm import forks
from managed_vllm.agent import trajectory_codec
from managed_vllm.agent.image_store import ImageStore, unusable
from managed_vllm.agent.types import FailureClass, StopReason, Trajectory
from managed_vllm.errors import ConfigError, RunStoreError

log = logging.getLogger(__name__)

FORMAT = "managed-vllm run"
VERSION = 1

_RUN, _LINES, _ARRAYS, _IMAGES = "run.json", "trajectories.jsonl", "arrays.bin", "images"
_LOCK, _WRITER = "writer.lock", "writer.json"

_BLOCK = struct.Struct("<4sIQ")
"""Begins a block of numbers: these four bytes, CRC-32 of what follows, its length."""
_MAGIC = b"MVn1"
_BEFORE_SUM, _AFTER_SUM, _BEFORE_BODY = b'{"crc32":"', b'",', b',"body":'
"""A line is `{"crc32":"89abcdef","head":{…},"body":{…}}`. The sum is of all after it but the last brace. The third does
not occur in the head: its only keys are ours, and in a JSON string the quotes would be escaped."""
_SUMMED_FROM = len(_BEFORE_SUM) + 8 + len(_AFTER_SUM)


@dataclass(frozen=True, slots=True)
class AttemptEntry:
    """An attempt as the index has it: what can be said of it without reading it. The head of its line.

    Attributes:
        task_id, rollout, attempt, group_round, ok, reward, stop_reason, started_at, duration_s: as of the trajectory.
        failure: whose fault; None for one that did not fail.
        steps: the number of turns.
        prompt_tokens, response_tokens: of all turns together.
        offset, size: bytes, of its line.
        block: of its numbers: offset, size, CRC-32.
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


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run has come to.

    Attributes:
        attempts: all of them, each retry and each round.
        rollouts: distinct rollouts (task and number) in the last round of each task.
        finished: those of them with an attempt that counts.
        tasks: distinct tasks.
        stop_reasons: attempts by why they ended.
        failures: attempts that failed, by whose fault that was.
        mean_reward: over the finished rollouts that have a reward; None without any.
        rewarded: how many these are.
        steps, prompt_tokens, response_tokens: of all attempts.
        duration_s: seconds, of all attempts together.
        damaged: lines and blocks that are not trusted.
    """

    attempts: int
    rollouts: int
    finished: int
    tasks: int
    stop_reasons: Mapping[StopReason, int]
    failures: Mapping[FailureClass, int]
    mean_reward: float | None
    rewarded: int
    steps: int
    prompt_tokens: int
    response_tokens: int
    duration_s: float
    damaged: int


class RunStore:
    """A run's folder. `RunStore.create` makes or resumes one, to write; `RunStore.open` reads one.

    Thread-safe. `append` waits for the disk: call it in a thread where an event loop must go on.

    Attributes:
        path: the folder.
        config: what the run was asked for, as given when it was made.
        identity: the part of that on which resuming insists.
        created_at: Unix time.
        images: the `ImageStore` of its screenshots.
        writable: whether this one writes.
        damaged: what was found and is not trusted.
        duplicates: attempts that were `ok` though their rollout had one already: the first counts.
    """

    def __init__(self, path: Path, run: _Run, lock: io.FileIO | None) -> None:
        """For `create` and `open`."""
        self.path = path
        self.config: dict[str, Any] = run.config
        self.identity: dict[str, Any] = run.identity
        self.created_at: float = run.created_at
        self.images = ImageStore(path / _IMAGES)
        self.writable = lock is not None
        self.damaged: list[Damage] = []
        self.duplicates: list[AttemptEntry] = []
        self._lock = lock
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        _stores.add(self)
        self._closed = False
        self._dirty = False
        self._entries: list[AttemptEntry] = []
        self._chosen: dict[str, tuple[int, dict[int, AttemptEntry]]] = {}
        self._end = 0  # of the last whole line that was read, or written
        self._arrays_end = 0
        mode = "r+" if self.writable else "r"
        self._files = contextlib.ExitStack()
        try:
            with _errors(path):
                self._lines = self._files.enter_context(io.FileIO(path / _LINES, mode))
                self._arrays = self._files.enter_context(io.FileIO(path / _ARRAYS, mode))
            self._read_on()
            if self.writable:
                self._begin_writing()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        identity: Mapping[str, Any] | None = None,
        resume: bool = True,
    ) -> RunStore:
        """Makes the folder of a run, or goes on with the one that is there; to be closed.

        Args:
            path: the folder. It and its parents are made. One that holds anything else than a run is refused.
            config: what was asked for. Plain JSON values; recorded, not compared.
            identity: what must be the same when the run is resumed: model, tasks, sampling, …; as far as the caller
                thinks it matters. Plain JSON values.
            resume: whether to go on with a run that is there; else that is an error.

        Raises `RunStoreError`: another process writes to it; it is another run (the message lists what differs), none,
        or one of a later version; the disk is full or read-only. `ConfigError`: no JSON values.
        """
        folder = Path(path).absolute()
        asked = _plain(config, "config"), _plain(identity, "identity")
        with _errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _check_ours(folder)
        lock = _take_lock(folder)
        try:
            if not (folder / _RUN).exists():
                run = _Run(*asked, created_at=time.time(), resumed=[])
            else:
                run = _read_run(folder)
                if not resume:
                    raise RunStoreError(
                        f"there is a run already in {folder}: resume it, or give another folder", path=str(folder)
                    )
                if asked[1] != run.identity:
                    raise RunStoreError(
                        f"{folder} is another run; give another folder, or ask for the same:\n"
                        + "\n".join(_differences(run.identity, asked[1])),
                        path=str(folder),
                    )
                run.resumed.append({"at": time.time()})
                if asked[0] != run.config:
                    run.resumed[-1]["config"] = asked[0]
            with _errors(folder):
                for name in (_LINES, _ARRAYS):
                    (folder / name).touch()
                _replace(folder / _RUN, dataclasses.asdict(run))
                _replace(folder / _WRITER, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
            return cls(folder, run, lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunStore:
        """Reads a run, also while it is written; `refresh` sees what has come since.

        Raises `RunStoreError`: there is none, or one of a later version.
        """
        folder = Path(path).absolute()
        return cls(folder, _read_run(folder), None)

    # -- reading -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Attempts, all of them."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Trajectory]:
        return self.attempts()

    def entries(self) -> list[AttemptEntry]:
        """All attempts as the index has them, in the order in which they ended."""
        with self._mutex:
            return list(self._entries)

    def counting(self) -> list[AttemptEntry]:
        """The attempt of each rollout that counts, or the last one; by task in order of appearance, then by number."""
        with self._mutex:
            return [by_rollout[key] for _, by_rollout in self._chosen.values() for key in sorted(by_rollout)]

    def attempts(self) -> Iterator[Trajectory]:
        """All attempts, in the order in which they ended; read one by one. Damaged ones are left out and reported."""
        return self._load_all(self.entries())

    def trajectories(self) -> Iterator[Trajectory]:
        """Of each rollout the attempt that counts, or the last one; read one by one, in the order of `counting`."""
        return self._load_all(self.counting())

    def finished(self) -> set[tuple[str, int]]:
        """Rollouts (task id and number) that need not be done again: one attempt is `ok`, in the task's last round."""
        return {entry.key for entry in self.counting() if entry.ok}

    def load(self, entry: AttemptEntry) -> Trajectory:
        """The trajectory of an entry. Raises `RunStoreError` if its files are damaged; then it does not count any
        more."""
        line = self._read(self._lines, entry.offset, entry.size)
        block = self._read(self._arrays, entry.block[0], entry.block[1])
        try:
            why = f"{_LINES} at byte {entry.offset}"
            _, body = _split(line)
            why = f"{_ARRAYS} at byte {entry.block[0]}"
            return trajectory_codec.decode(body, _numbers_of(block, entry.block[2]))
        except ValueError as error:
            self._distrust(entry, why, str(error))
            raise RunStoreError(
                f"attempt {entry.attempt} at {entry.task_id}, rollout {entry.rollout}, is damaged "
                f"({self.path}, {why}): {error}",
                path=str(self.path),
            ) from error

    def refresh(self) -> list[AttemptEntry]:
        """Reads what another process has added since; returns that. Cheap: it begins where it stopped."""
        with self._mutex:
            self._check_open()
            return [] if self.writable else self._read_on()

    def verify(self) -> list[Damage]:
        """Reads everything, images included, and returns what is damaged or missing. Attempts whose line or numbers
        are damaged do not count any more."""
        for entry in self.entries():
            try:
                trajectory = self.load(entry)
            except RunStoreError:
                continue
            for ref in trajectory_codec.encode(trajectory).images:
                try:
                    self.images.read(ref)
                except RunStoreError as error:
                    self._report(Damage(error.path, 0, error.message))
        return list(self.damaged)

    def summary(self) -> RunSummary:
        """Counts, without reading the attempts."""
        with self._mutex:
            entries, counting = self.entries(), self.counting()
            rewards = [entry.reward for entry in counting if entry.ok and entry.reward is not None]
            return RunSummary(
                attempts=len(entries),
                rollouts=len(counting),
                finished=sum(entry.ok for entry in counting),
                tasks=len(self._chosen),
                stop_reasons=dict(Counter(entry.stop_reason for entry in entries)),
                failures=dict(Counter(entry.failure for entry in entries if entry.failure is not None)),
                mean_reward=sum(rewards) / len(rewards) if rewards else None,
                rewarded=len(rewards),
                steps=sum(entry.steps for entry in entries),
                prompt_tokens=sum(entry.prompt_tokens for entry in entries),
                response_tokens=sum(entry.response_tokens for entry in entries),
                duration_s=sum(entry.duration_s for entry in entries),
                damaged=len(self.damaged),
            )

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, trajectory: Trajectory) -> AttemptEntry:
        """Adds an attempt. When this returns it is on the disk.

        Its screenshots must have been put into `images`. Raises `RunStoreError`: one was not, a value can't be recorded
        (the message names it), the disk is full, the store is closed, only read, or was inherited by a fork.
        """
        try:
            record = trajectory_codec.encode(trajectory)
            head = _head(trajectory)
        except ValueError as error:
            raise RunStoreError(
                f"the trajectory of {trajectory.task.id}, rollout {trajectory.rollout}, can't be recorded: {error}",
                path=str(self.path),
            ) from error
        self._check_open(to_write=True)
        self.images.sync(record.images)
        with self._mutex:
            self._check_open(to_write=True)
            block = _BLOCK.pack(_MAGIC, zlib.crc32(record.numbers), len(record.numbers)) + record.numbers
            head["block"] = self._arrays_end, len(block), zlib.crc32(block)
            summed = b'"head":' + trajectory_codec.as_json(head) + _BEFORE_BODY + record.text
            line = b"%b%08x%b%b}\n" % (_BEFORE_SUM, zlib.crc32(summed), _AFTER_SUM, summed)
            entry = _entry(head, self._end, len(line))
            with _errors(self.path):
                if self._dirty:
                    self._cut()
                self._dirty = True
                try:
                    _write(self._arrays, block, self._arrays_end)
                    _write(self._lines, line, self._end)
                except BaseException:
                    with contextlib.suppress(OSError):  # else the next append tries again
                        self._cut()
                    raise
                self._dirty = False
            self._arrays_end += len(block)
            self._end += len(line)
            self._add(entry)
            return entry

    def close(self) -> None:
        """Lets another one write. A second time it does nothing."""
        with self._mutex:
            self._closed = True
            self._files.close()
            if self._lock is not None and not self._lock.closed:  # in a fork it is
                with contextlib.suppress(OSError):
                    (self.path / _WRITER).unlink()
                self._lock.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RunStore {self.path}: {len(self)} attempts, {'written' if self.writable else 'read'} here>"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check_open(self, *, to_write: bool = False) -> None:
        if self._closed:
            raise RunStoreError(f"the store of {self.path} was closed", path=str(self.path))
        if to_write and not self.writable:
            raise RunStoreError(
                f"the store of {self.path} was opened for reading; RunStore.create opens it for writing",
                path=str(self.path),
            )
        if to_write and self._pid != os.getpid():
            raise RunStoreError(
                f"the store of {self.path} belongs to process {self._pid}, this is a fork of it; only that one may "
                "write",
                path=str(self.path),
            )

    def _read(self, file: io.FileIO, offset: int, size: int) -> bytes:
        with self._mutex, _errors(self.path):
            self._check_open()
            return _pread(file, size, offset)

    def _load_all(self, entries: list[AttemptEntry]) -> Iterator[Trajectory]:
        for entry in entries:
            try:
                yield self.load(entry)
            except RunStoreError:
                if self._closed or entry in self._entries:
                    raise

    def _begin_writing(self) -> None:
        """Cuts off what a killed writer left, and looks at all blocks: what is damaged will be done again."""
        self.images.remove_unfinished()
        with _errors(self.path):
            if os.fstat(self._lines.fileno()).st_size > self._end:
                log.info("%s: a killed writer left a line without an end; it is cut off", self.path)
                os.ftruncate(self._lines.fileno(), self._end)
            self._arrays_end = os.fstat(self._arrays.fileno()).st_size
        for entry in self.entries():
            try:
                _numbers_of(self._read(self._arrays, entry.block[0], entry.block[1]), entry.block[2])
            except ValueError as error:
                self._distrust(entry, f"{_ARRAYS} at byte {entry.block[0]}", str(error))

    def _read_on(self) -> list[AttemptEntry]:
        """Reads whole lines from where the last reading stopped."""
        found = []
        with _errors(self.path), os.fdopen(os.dup(self._lines.fileno()), "rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset = self._end
                self._end += len(line)
                try:
                    entry = self._entry_of(line, offset)
                except ValueError as error:
                    self._report(Damage(_LINES, offset, str(error)))
                    continue
                self._add(entry)
                found.append(entry)
        return found

    def _entry_of(self, line: bytes, offset: int) -> AttemptEntry:
        try:
            head, _ = _split(line)
        except ValueError:
            # It may have been read while the end of a killed writer's line was cut off and written over.
            head, _ = _split(_pread(self._lines, len(line), offset))
        entry = _entry(head, offset, len(line))
        start, size, _ = entry.block
        begin = _pread(self._arrays, _BLOCK.size, start)
        if len(begin) < _BLOCK.size or os.fstat(self._arrays.fileno()).st_size < start + size:
            raise ValueError(f"its numbers are missing: {_ARRAYS} ends before byte {start + size}")
        magic, _, length = _BLOCK.unpack(begin)
        if magic != _MAGIC or length != size - _BLOCK.size:
            raise ValueError(f"its numbers are damaged: no block begins at byte {start} of {_ARRAYS}")
        return entry

    def _add(self, entry: AttemptEntry) -> None:
        self._entries.append(entry)
        self._choose(entry)

    def _choose(self, entry: AttemptEntry) -> None:
        last_round, by_rollout = self._chosen.get(entry.task_id, (-1, {}))
        if entry.group_round < last_round:
            return
        if entry.group_round > last_round:
            by_rollout = {}
            self._chosen[entry.task_id] = entry.group_round, by_rollout
        former = by_rollout.get(entry.rollout)
        if former is None or not former.ok:
            by_rollout[entry.rollout] = entry
        elif entry.ok:
            self.duplicates.append(entry)
            log.warning("%s: %s, rollout %s, has two attempts that count; the first does", self.path, *entry.key)

    def _distrust(self, entry: AttemptEntry, where: str, why: str) -> None:
        with self._mutex:
            if entry not in self._entries:
                return
            self._entries.remove(entry)
            self._chosen.clear()
            self.duplicates.clear()
            for each in self._entries:
                self._choose(each)
            path, _, offset = where.partition(" at byte ")
            self._report(Damage(path, int(offset), why))

    def _report(self, damage: Damage) -> None:
        if damage not in self.damaged:
            self.damaged.append(damage)
            log.warning("%s: %s; it does not count", self.path, damage)

    def _cut(self) -> None:
        """Takes back what an append that failed has written."""
        os.ftruncate(self._lines.fileno(), self._end)
        os.ftruncate(self._arrays.fileno(), self._arrays_end)
        self._dirty = False


_stores: weakref.WeakSet[RunStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_stores):
        store._mutex = threading.RLock()  # another thread may have held it
        if store._lock is not None:
            store._lock.close()  # our copy only: the lock stays the parent's, and does not outlive it


forks.call_in_child(_after_fork)


# -- lines and blocks --------------------------------------------------------------------------------------------------


def _head(trajectory: Trajectory) -> dict[str, Any]:
    """All but the place of the numbers. Raises `ValueError`."""
    reward = trajectory.reward
    try:
        head = {
            "task_id": trajectory.task.id,
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


def _entry(head: dict[str, Any], offset: int, size: int) -> AttemptEntry:
    """Raises `ValueError`."""
    try:
        if isinstance(head["reward"], str):
            head = {**head, "reward": float(head["reward"])}
        entry = msgspec.convert({**head, "offset": offset, "size": size}, AttemptEntry)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise ValueError(f"its head is none: {error}") from error
    return dataclasses.replace(entry, task_id=sys.intern(entry.task_id))


def _split(line: bytes) -> tuple[dict[str, Any], bytes]:
    """The head and the body's JSON of a line. Raises `ValueError` if it is damaged."""
    summed = line[_SUMMED_FROM:-2]
    if line[:_SUMMED_FROM] != b"%b%08x%b" % (_BEFORE_SUM, zlib.crc32(summed), _AFTER_SUM) or line[-2:] != b"}\n":
        raise ValueError("the line is damaged: its checksum does not fit")
    head, comma, body = summed.removeprefix(b'"head":').partition(_BEFORE_BODY)
    found = json.loads(head)
    if not comma or not isinstance(found, dict):
        raise ValueError("the line is none of ours")
    return found, body


def _numbers_of(block: bytes, checksum: int) -> bytes:
    """Raises `ValueError` if the block is damaged."""
    if zlib.crc32(block) != checksum:
        raise ValueError("the numbers are damaged: their checksum does not fit")
    return block[_BLOCK.size :]


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """`run.json`."""

    config: dict[str, Any]
    identity: dict[str, Any]
    created_at: float
    resumed: list[dict[str, Any]]
    format: str = FORMAT
    version: int = VERSION


def _read_run(folder: Path) -> _Run:
    path = folder / _RUN
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunStoreError(f"{folder} is no run: it has no {_RUN}", path=str(folder)) from error
    except OSError as error:
        raise unusable(path, error) from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RunStoreError(f"{folder} is no run: its {_RUN} is damaged, or of another program", path=str(folder))
    if found.get("version") != VERSION:
        raise RunStoreError(
            f"{folder} was written in version {found.get('version')} of the format, this library knows {VERSION}",
            path=str(folder),
        )
    try:
        return msgspec.convert(found, _Run)
    except msgspec.ValidationError as error:
        raise RunStoreError(f"{folder} is no run: its {_RUN} is damaged ({error})", path=str(folder)) from error


def _check_ours(folder: Path) -> None:
    """Refuses a folder with anything in it but a run, or the beginnings of one."""
    names = set(os.listdir(folder))
    if _RUN in names:
        return
    strange = names - {_LOCK, _WRITER, _LINES, _ARRAYS, _unfinished(_RUN), _unfinished(_WRITER)}
    for name in names & {_LINES, _ARRAYS}:
        if (folder / name).stat().st_size:
            strange.add(name)
    if strange:
        raise RunStoreError(
            f"{folder} is no run: it has no {_RUN}, but {', '.join(sorted(strange)[:3])}; give a new folder",
            path=str(folder),
        )


def _take_lock(folder: Path) -> io.FileIO:
    """The lock belongs to the open file, and the kernel lets go of it however its process ends.

    Not by filelock: a fork must close its copy, else one that outlives its parent keeps the lock (as with filelock
    3.20, which we allow).
    """
    with _errors(folder):
        lock = io.FileIO(folder / _LOCK, "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            lock.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise RunStoreError(
                f"{folder} is written by {_writer_of(folder)}; only one may at a time. Wait for it, or end it, or give "
                "another folder",
                path=str(folder),
            ) from error
    return lock


def _writer_of(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        writer = json.loads((folder / _WRITER).read_bytes())
        return f"process {writer['pid']} on {writer['host']}"
    return "another process"


def _differences(has: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(has.keys() | asked.keys()):
        left, right = has.get(name, _NOTHING), asked.get(name, _NOTHING)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"  {prefix}{name}: the run has {_shown(left)}, asked for is {_shown(right)}"


_NOTHING = object()


def _shown(value: Any) -> str:
    return "nothing" if value is _NOTHING else f"{value!r:.200}"


def _plain(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(values or {}), allow_nan=False))
        return found
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must be a dict of plain JSON values: {error}", field=name) from error


def _unfinished(name: str) -> str:
    return f".{name}-new"


def _replace(path: Path, values: Mapping[str, Any]) -> None:
    """Atomically, and on the disk when it returns. For the holder of the lock."""
    unfinished = path.with_name(_unfinished(path.name))
    with unfinished.open("wb") as file:
        file.write(json.dumps(values, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _pread(file: io.FileIO, size: int, offset: int) -> bytes:
    """Less only at the end of the file."""
    found = os.pread(file.fileno(), size, offset)
    while len(found) < size and (more := os.pread(file.fileno(), size - len(found), offset + len(found))):
        found += more
    return found


def _write(file: io.FileIO, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written
    os.fdatasync(file.fileno())


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unusable(path, error) from error
