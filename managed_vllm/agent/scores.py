"""Scores that a run was given afterwards: each has a name, and lies in the run's folder beside its rewards.

    scores/NAME.jsonl        a head, and a line for each attempt that was scored
    scores/.NAME.jsonl-new   the same while it is being made
    scores/.NAME.lock        held by the one process that makes it

What must hold:

1. The attempts stay as they are, and so do their rewards and all other scores.
2. `NAME.jsonl` is whole: it is replaced in one step when all of the new one is on the disk.
3. A process that was killed leaves its lines behind, and the next one goes on after them, if it scores with the same
   function from the same source file. Else it begins anew.
4. A line names its attempt by the log and the byte at which it is there. Logs only grow.

`RunStore.open(run, score=NAME)` reads the run with the score in the reward's place.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from managed_vllm.agent import trajectory_codec
from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.rewards import Score, with_score
from managed_vllm.agent.run_folder import sync_folder, translated_errors
from managed_vllm.agent.types import Trajectory
from managed_vllm.errors import ConfigError, RunStoreError

FOLDER = "scores"
_FORMAT, _VERSION = "managed-vllm scores", 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_SAME = ("format", "version", "reward", "source")
"""What two heads have in common whose scores may stand in one file."""

Key = tuple[str, int]
"""Of an attempt: whose log, and the byte."""


def key_of(entry: AttemptEntry) -> Key:
    """Where the attempt is."""
    return entry.writer, entry.offset


def scores_of(run: Path) -> list[str]:
    """The names of the scores that a run has."""
    return sorted(path.stem for path in (run / FOLDER).glob("[!.]*.jsonl"))


class Scores:
    """A score of a run, read. Reads the details of an attempt when that is asked for.

    Raises `ConfigError`: the run has none of that name. `RunStoreError`: it can't be read.
    """

    def __init__(self, run: Path, name: str) -> None:
        self.name = name
        self._path = run / FOLDER / f"{name}.jsonl"
        self._rewards: dict[Key, float | None] = {}
        self._places: dict[Key, tuple[int, int]] = {}
        if name not in scores_of(run):
            there = ", ".join(scores_of(run)) or "none; `managed-vllm rescore` makes one"
            raise ConfigError(f"{run} has no score {name!r:.100}; there is {there}", field="score")
        with translated_errors(self._path):
            for line, place in _lines(self._path):
                if "error" not in line:
                    self._rewards[_key(line)] = line["score"]
                    if line.get("details"):
                        self._places[_key(line)] = place

    def __len__(self) -> int:
        return len(self._rewards)

    def entry(self, entry: AttemptEntry) -> AttemptEntry:
        """The attempt with the score as its reward; None where it has none."""
        return replace(entry, reward=self._rewards.get(key_of(entry)))

    def trajectory(self, entry: AttemptEntry, trajectory: Trajectory) -> Trajectory:
        """The same of the whole attempt."""
        return with_score(trajectory, self.name, Score(self._rewards.get(key_of(entry)), self._details(entry)))

    def _details(self, entry: AttemptEntry) -> Mapping[str, Any]:
        place = self._places.get(key_of(entry))
        if place is None:
            return {}
        with translated_errors(self._path), self._path.open("rb") as file:
            file.seek(place[0])
            line = _line(file.read(place[1]))
        if line is None or _key(line) != key_of(entry):
            raise RunStoreError(f"{self._path} was made anew; open the run again", path=str(self._path))
        details: Mapping[str, Any] = line["details"]
        return details


class ScoreWriter:
    """Makes a score. As a context manager it holds the score's lock; what is written stays, also without `finish`.

    Args:
        run: the run's folder.
        name: of the score.
        reward: the function's name.
        source: tells one state of its source from another.
        overwrite: whether a score of that name by another function is replaced.

    Raises `ConfigError`: no such name may be, or it is another function's. `RunStoreError`: another process makes it;
    the disk is full or read-only.

    Attributes:
        known: attempts that need not be scored again.
    """

    def __init__(self, run: Path, name: str, reward: str, source: str, *, overwrite: bool) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r:.100} can't be a score's name: letters, digits, _, - and . are what it may have", field="name"
            )
        folder = run / FOLDER
        self.path = folder / f"{name}.jsonl"
        self.known: set[Key] = set()
        self._unfinished = folder / f".{name}.jsonl-new"
        self._head = {"format": _FORMAT, "version": _VERSION, "name": name, "reward": reward, "source": source}
        with contextlib.ExitStack() as opening, translated_errors(folder):
            folder.mkdir(exist_ok=True)
            opening.enter_context(_locked(folder / f".{name}.lock", self.path))
            self._check(overwrite)
            self._file = opening.enter_context(self._begun(overwrite))
            self._files = opening.pop_all()

    def add(self, entry: AttemptEntry, score: Score | None, error: str | None = None) -> None:
        """Writes what an attempt was given; an `error` in place of a score that could not be had."""
        about = {name: getattr(entry, name) for name in ("task_id", "rollout", "attempt", "group_round")}
        line = {"writer": entry.writer, "offset": entry.offset, **about}
        if score is None:
            line["error"] = error
        else:
            line |= {"score": score.reward, **({"details": score.details} if score.details else {})}
        self._write(line)

    def finish(self) -> None:
        """Puts the score in the place of the former one."""
        with translated_errors(self._unfinished):
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._unfinished, self.path)
            sync_folder(self.path)

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        with translated_errors(self._unfinished):
            self._file.write(trajectory_codec.as_json(line) + b"\n")
            self._file.flush()

    def _check(self, overwrite: bool) -> None:
        head = _head_of(self.path)
        if head is not None and not overwrite and not self._is_same(head):
            raise ConfigError(
                f"{self.path} is there already, by {head.get('reward')} in another state or by another function; give "
                "another name (name=, --name), or overwrite it (overwrite=True, --overwrite)",
                field="name",
            )

    def _is_same(self, head: Mapping[str, Any] | None) -> bool:
        return head is not None and all(head.get(name) == self._head[name] for name in _SAME)

    def _begun(self, overwrite: bool) -> io.BufferedWriter:
        """The unfinished file, with what need not be done again."""
        if self._is_same(_head_of(self._unfinished)):
            with self._unfinished.open("rb") as unfinished:
                end = len(unfinished.readline())
            for line, (offset, size) in _lines(self._unfinished):
                end = offset + size
                self._know(line)
            os.truncate(self._unfinished, end)
            return self._unfinished.open("ab")
        file = self._unfinished.open("wb")
        file.write(trajectory_codec.as_json({**self._head, "made_at": time.time()}) + b"\n")
        if not overwrite and self.path.exists():  # by the same function
            for line, _ in _lines(self.path):
                if self._know(line):
                    file.write(trajectory_codec.as_json(line) + b"\n")
        return file

    def _know(self, line: Mapping[str, Any]) -> bool:
        if "error" not in line:
            self.known.add(_key(line))
        return "error" not in line


@contextlib.contextmanager
def _locked(path: Path, score: Path) -> Iterator[None]:
    with io.FileIO(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunStoreError(f"{score} is being made by another process", path=str(score)) from error
        yield


def _head_of(path: Path) -> dict[str, Any] | None:
    """None: there is no file, or it is none of ours."""
    try:
        with path.open("rb") as file:
            head = _parsed(file.readline())
    except FileNotFoundError:
        return None
    return head if head is not None and head.get("format") == _FORMAT else None


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], tuple[int, int]]]:
    """The lines after the head, each with its place; those that are damaged, or have no end, left out."""
    with path.open("rb") as file:
        offset = len(file.readline())
        for text in file:
            line = _line(text)
            if line is not None:
                yield line, (offset, len(text))
            offset += len(text)


def _line(text: bytes) -> dict[str, Any] | None:
    found = _parsed(text)
    return found if found is not None and "offset" in found and ("score" in found or "error" in found) else None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _key(line: Mapping[str, Any]) -> Key:
    return line["writer"], line["offset"]
