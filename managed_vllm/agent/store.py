"""The record of a run on disk: one folder, to which attempts are added one by one, and from which a run is resumed.

    run.json              what was asked; replaced atomically
    trajectories.jsonl    one line an attempt: {"crc32": "…", "head": {…}, "body": {…}}
    arrays.bin            token ids and logprobs, one block an attempt
    index.msgpack         of a large run: the heads of its attempts; a copy that may be removed (`log_index`)
    images/ab/cdef….png   screenshots, by content
    scores/NAME.jsonl     scores that were given afterwards (`scores`)
    writer.lock           held by the one process that writes; writer.json says who that is

Where several processes write together (`RunStore.join`), each has a log and a lease of its own (`writers/<id>/`,
`run_writers`), and they agree by claims on who plays which rollout (`claims`). Readers see one row of attempts.

What must hold:

1. When `append` has returned, the attempt is on the disk, whole: first its images and its block of numbers, then its
   line, each followed by fsync. When it raises, nothing of the attempt counts, and those before are as they were.
2. A writer that was killed leaves at most one line without an end. It does not count, and the next writer cuts it off.
3. Nothing damaged is trusted: lines and blocks have checksums. What is damaged is reported (`damaged`) and counts as
   not done; the rest is used.
4. One writer of a log, any number of readers meanwhile; they see whole lines only, and new ones by `refresh`.
5. An attempt comes back exactly as it was: see `trajectory_codec`.

Which attempts count: of each task those of the highest `group_round`, and of each rollout in it the first that is `ok`;
the last one where none is. Of several writers' attempts the one that ended first counts as the first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from managed_vllm import forks
from managed_vllm.agent import run_folder, trajectory_codec
from managed_vllm.agent.attempt_log import (
    AttemptEntry,
    Damage,
    DamagedError,
    head_of,
    numbers_of,
    place_of,
    trajectory_of,
)
from managed_vllm.agent.attempt_logs import AttemptLogs
from managed_vllm.agent.claims import Claim, Claims
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.run_writers import LEASE_S, RunWriter
from managed_vllm.agent.scores import Scores
from managed_vllm.agent.types import FailureClass, StopReason, Trajectory
from managed_vllm.errors import RunStoreError

log = logging.getLogger(__name__)

_REFRESH_S = 0.5
"""Between two looks for what other writers have finished, at least; and 20 times as long as such a look takes, which
asks for the log of each of them."""


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


class StoredTrajectories(Sequence[Trajectory]):
    """Trajectories that are read from a run's folder each time that one is asked for. Also when its store is closed."""

    def __init__(self, path: Path, entries: tuple[AttemptEntry, ...], scores: Scores | None = None) -> None:
        self._path = path
        self._entries = entries
        self._scores = scores

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> StoredTrajectories: ...

    def __getitem__(self, index: int | slice) -> Trajectory | StoredTrajectories:
        """Raises `RunStoreError`: its files are damaged, or gone."""
        if isinstance(index, slice):
            return StoredTrajectories(self._path, self._entries[index], self._scores)
        return next(self._read([self._entries[index]]))

    def __iter__(self) -> Iterator[Trajectory]:
        return self._read(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} trajectories of {self._path}>"

    def _read(self, entries: Iterable[AttemptEntry]) -> Iterator[Trajectory]:
        with contextlib.closing(AttemptLogs(self._path, scores=self._scores)) as attempts:
            for entry in entries:
                yield read_attempt(attempts, self._path, entry)


def read_attempt(attempts: AttemptLogs, path: Path, entry: AttemptEntry) -> Trajectory:
    """The trajectory of an entry. Raises `RunStoreError`, of a `DamagedError` if its files are damaged."""
    line, block = attempts.read(entry)
    try:
        trajectory = trajectory_of(entry, line, block)
        return trajectory if attempts.scores is None else attempts.scores.trajectory(entry, trajectory)
    except DamagedError as error:
        raise RunStoreError(
            f"attempt {entry.attempt} at {entry.task_id}, rollout {entry.rollout}, is damaged ({path}, {error.damage})",
            path=str(path),
        ) from error


class AttemptIndex:
    """Which attempts there are, and which of them count. `duplicates`: `ok`, though their rollout had one already."""

    def __init__(self) -> None:
        self.entries: list[AttemptEntry] = []
        self.duplicates: list[AttemptEntry] = []
        self._chosen: dict[str, tuple[int, dict[int, AttemptEntry]]] = {}

    def add(self, entry: AttemptEntry) -> None:
        """One more, after all others."""
        self.entries.append(entry)
        self._choose(entry)

    def remove(self, entry: AttemptEntry) -> None:
        """It does not count any more, and another one may."""
        self.entries.remove(entry)
        self._chosen.clear()
        self.duplicates.clear()
        for each in self.entries:
            self._choose(each)

    def tasks(self) -> int:
        """Distinct tasks."""
        return len(self._chosen)

    def standing(self, key: tuple[str, int]) -> AttemptEntry | None:
        """The attempt of a rollout that counts, or the last one; None without any."""
        return self._chosen.get(key[0], (0, {}))[1].get(key[1])

    def counting(self) -> list[AttemptEntry]:
        """The attempt of each rollout that counts, or the last one; by task in order of appearance, then by number."""
        return [by_rollout[key] for _, by_rollout in self._chosen.values() for key in sorted(by_rollout)]

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
            if entry.writer != former.writer and entry.ended_at < former.ended_at:  # read later, but first
                by_rollout[entry.rollout], entry = entry, former
            self.duplicates.append(entry)
            log.warning("%s, rollout %s, has two attempts that count; the first does", *entry.key)


def _summary(index: AttemptIndex, damaged: int) -> RunSummary:
    entries, counting = index.entries, index.counting()
    rewards = [entry.reward for entry in counting if entry.ok and entry.reward is not None]
    return RunSummary(
        attempts=len(entries),
        rollouts=len(counting),
        finished=sum(entry.ok for entry in counting),
        tasks=index.tasks(),
        stop_reasons=dict(Counter(entry.stop_reason for entry in entries)),
        failures=dict(Counter(entry.failure for entry in entries if entry.failure is not None)),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        rewarded=len(rewards),
        steps=sum(entry.steps for entry in entries),
        prompt_tokens=sum(entry.prompt_tokens for entry in entries),
        response_tokens=sum(entry.response_tokens for entry in entries),
        duration_s=sum(entry.duration_s for entry in entries),
        damaged=damaged,
    )


class RunStore:
    """A run's folder. `RunStore.create` makes or resumes one, to write; `RunStore.join` writes together with others;
    `RunStore.open` reads one.

    Thread-safe. `append` waits for the disk: call it in a thread where an event loop must go on.

    Attributes:
        path: the folder.
        images: the `ImageStore` of its screenshots.
        damaged: what was found and is not trusted.
        force: whether differences to what the run was made of are none of its concern.
        claims: of this process on rollouts, where it has joined others; else None.
    """

    def __init__(
        self,
        path: Path,
        run: run_folder.RunFile,
        lock: io.FileIO | None,
        *,
        force: bool = False,
        writer: RunWriter | None = None,
        scores: Scores | None = None,
    ) -> None:
        """For `create`, `join` and `open`."""
        self.path = path
        self.force = force
        self.images = ImageStore(path / run_folder.IMAGES)
        self.damaged: list[Damage] = []
        self._run = run
        self._lock = lock
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._index = AttemptIndex()
        self._closed = False
        self._next_refresh = 0.0
        self._writer = writer
        self.claims = None if writer is None else Claims(path, writer)
        own = writer.id if writer is not None else "" if self.writable else None
        self._log = AttemptLogs(path, own=own, scores=scores)
        _stores.add(self)
        try:
            self._read_on()
            if self.writable:
                self._begin_writing()
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> dict[str, Any]:
        """What the run was asked for, as given when it was made."""
        return self._run.config

    @property
    def notes(self) -> dict[str, Any]:
        """What was noted beside it."""
        return self._run.notes

    @property
    def made_of(self) -> dict[str, Any]:
        """Model, format, limits and sampling parameters, as the first scheduler that played it had them."""
        return self._run.made_of

    @property
    def created_at(self) -> float:
        """Unix time."""
        return self._run.created_at

    @property
    def score(self) -> str | None:
        """Which score stands in the rewards' place; None: none does."""
        return None if self._log.scores is None else self._log.scores.name

    @property
    def writable(self) -> bool:
        """Whether this one writes."""
        return self._lock is not None

    @property
    def duplicates(self) -> list[AttemptEntry]:
        """Attempts that were `ok` though their rollout had one already: the first counts."""
        return self._index.duplicates

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        notes: Mapping[str, Any] | None = None,
        resume: bool = True,
        force: bool = False,
    ) -> RunStore:
        """Makes the folder of a run, or goes on with the one that is there; to be closed.

        Args:
            path: the folder. It and its parents are made. One that holds anything else than a run is refused.
            config: what was asked for, and must be the same when the run is resumed. Plain JSON values. What a
                scheduler plays it with (model, prompt, sampling, tasks) is compared in any case.
            notes: anything else that is to be recorded, and may be another time otherwise. Plain JSON values.
            resume: whether to go on with a run that is there; else that is an error.
            force: go on with it even if it was made otherwise: what is finished stays, the rest is played as asked for
                now. `run.json` says so.

        Raises `RunStoreError`: another process writes to it; it is another run (the message lists what differs), none,
        or one of a later version; the disk is full or read-only. `ConfigError`: no JSON values.
        """
        folder = Path(path).absolute()
        asked = run_folder.plain_json(config, "config"), run_folder.plain_json(notes, "notes")
        run, lock = run_folder.begin(folder, *asked, resume=resume, force=force)
        try:
            return cls(folder, run, lock, force=force)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def join(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        notes: Mapping[str, Any] | None = None,
        force: bool = False,
        lease_s: float = LEASE_S,
    ) -> RunStore:
        """Writes a run together with other processes, also on other hosts that share the file system; to be closed.

        The first one makes the run. Each rollout is played by one of them (`claims`); what a dead one had claimed is
        free at once on the same host, elsewhere when its lease has run out. Any number of them; not beside `create`.

        Args:
            path, config, notes, force: as for `create`; the config must be the same for all of them.
            lease_s: seconds after which others may take this process for dead, if they hear nothing of it.

        Raises `RunStoreError`: a process writes to it that has not joined; it is another run (the message lists what
        differs), none, or one of a later version; the disk is full or read-only, or its file system has no hard links.
        `ConfigError`: no JSON values.
        """
        folder = Path(path).absolute()
        asked = run_folder.plain_json(config, "config"), run_folder.plain_json(notes, "notes")
        run, lock = run_folder.begin_together(folder, *asked, force=force)
        writer: RunWriter | None = None
        try:
            writer = RunWriter(folder, lease_s)
            run_folder.write_json(writer.folder / "asked.json", {"config": asked[0], "notes": asked[1]})
            return cls(folder, run, lock, force=force, writer=writer)
        except BaseException:
            if writer is not None:
                writer.close()
            lock.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, score: str | None = None) -> RunStore:
        """Reads a run, also while it is written; `refresh` sees what has come since.

        `score`: one that `rescore` has made, in the rewards' place; what it has not scored has no reward then.

        Raises `RunStoreError`: there is none, or one of a later version. `ConfigError`: it has no such score.
        """
        folder = Path(path).absolute()
        run = run_folder.read_run(folder)
        return cls(folder, run, None, scores=None if score is None else Scores(folder, score))

    # -- reading -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Attempts, all of them."""
        return len(self._index.entries)

    def __iter__(self) -> Iterator[Trajectory]:
        return self.attempts()

    def entries(self) -> list[AttemptEntry]:
        """All attempts as the index has them, in the order in which they ended."""
        with self._mutex:
            return list(self._index.entries)

    def counting(self) -> list[AttemptEntry]:
        """The attempt of each rollout that counts, or the last one; by task in order of appearance, then by number."""
        with self._mutex:
            return self._index.counting()

    def attempts(self) -> Iterator[Trajectory]:
        """All attempts, in the order in which they ended; read one by one. Damaged ones are left out and reported."""
        return self._load_all(self.entries())

    def trajectories(self) -> Iterator[Trajectory]:
        """Of each rollout the attempt that counts, or the last one; read one by one, in the order of `counting`."""
        return self._load_all(self.counting())

    def finished(self) -> set[tuple[str, int]]:
        """Rollouts (task id and number) that need not be done again: one attempt is `ok`, in the task's last round."""
        return {entry.key for entry in self.counting() if entry.ok}

    def selected(self, keys: Iterable[tuple[str, int]]) -> StoredTrajectories:
        """Of these rollouts (task id and number) the attempts that count, or the last ones, in this order."""
        with self._mutex:
            by_key = {entry.key: entry for entry in self._index.counting()}
        return StoredTrajectories(self.path, tuple(by_key[key] for key in keys), self._log.scores)

    def load(self, entry: AttemptEntry) -> Trajectory:
        """The trajectory of an entry. Raises `RunStoreError` if its files are damaged; then it does not count any
        more."""
        with self._mutex:
            self._check_open()
            try:
                return read_attempt(self._log, self.path, entry)
            except RunStoreError as error:
                if isinstance(error.__cause__, DamagedError):
                    self._distrust(entry, error.__cause__.damage)
                raise

    def refresh(self) -> list[AttemptEntry]:
        """Reads what other processes have added since; returns that. Cheap: it begins where it stopped."""
        with self._mutex:
            self._check_open()
            return [] if self.writable and self.claims is None else self._read_on()

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
            return _summary(self._index, len(self.damaged))

    # -- together with others ------------------------------------------------------------------------------------------

    def claim(self, task_id: str, rollout: int) -> tuple[Claim, AttemptEntry | None]:
        """Claims a rollout, if others write, too: what became of it, and its attempt that counts, or its last one.

        One that is finished is not claimed.
        """
        key = task_id, rollout
        with self._mutex:
            self._check_open(to_write=True)
            found = self._index.standing(key)
            if self.claims is None or (found is not None and found.ok):
                return Claim.OURS, found
            claim = self.claims.take(key)
            if claim is Claim.INHERITED or (claim is not Claim.OURS and time.monotonic() > self._next_refresh):
                began = time.monotonic()
                self._read_on()
                ended = time.monotonic()
                self._next_refresh = ended + max(_REFRESH_S, 20 * (ended - began))
            found = self._index.standing(key)
            if claim is Claim.INHERITED and found is not None and found.ok:
                self.claims.finished(key)
            return claim, found

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, trajectory: Trajectory) -> AttemptEntry:
        """Adds an attempt. When this returns it is on the disk.

        Its screenshots must have been put into `images`. Raises `RunStoreError`: one was not, a value can't be recorded
        (the message names it), the disk is full, the store is closed, only read, or was inherited by a fork.
        """
        try:
            record = trajectory_codec.encode(trajectory)
            head = head_of(trajectory)
        except ValueError as error:
            raise RunStoreError(
                f"the trajectory of {trajectory.task.id}, rollout {trajectory.rollout}, can't be recorded: {error}",
                path=str(self.path),
            ) from error
        self._check_open(to_write=True)
        self.images.sync(record.images)
        with self._mutex:
            self._check_open(to_write=True)
            entry = self._log.append(head, record)
            self._index.add(entry)
            if not self.damaged:
                self._log.index(self._index.entries)
            if self.claims is not None and entry.ok:
                self.claims.finished(entry.key)
            return entry

    def settle(self, made_of: Mapping[str, Any]) -> None:
        """Says what the run is made of; recorded the first time, compared from then on.

        Raises `RunStoreError`: it was made otherwise (the message lists what differs), and `force` was not given.
        """
        asked = run_folder.plain_json(made_of, "made_of")
        with self._mutex:
            self._check_open(to_write=True)
            if self.claims is not None:
                with run_folder.translated_errors(self.path):
                    self._run.settle_together(self.path, asked, force=self.force)
            elif self._run.settle(self.path, asked, force=self.force):
                with run_folder.translated_errors(self.path):
                    self._run.write(self.path)

    def close(self) -> None:
        """Lets another one write. A second time it does nothing."""
        with self._mutex:
            if not self._closed and self._pid == os.getpid() and not self.damaged:
                self._log.index(self._index.entries, closing=True)
            self._closed = True
            self._log.close()
            if self._writer is not None:
                self._writer.close()
            if self._lock is not None:
                run_folder.let_go(self.path, self._lock, alone=self._writer is None)

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

    def _load_all(self, entries: list[AttemptEntry]) -> Iterator[Trajectory]:
        for entry in entries:
            try:
                yield self.load(entry)
            except RunStoreError:
                if self._closed or entry in self._index.entries:
                    raise

    def _begin_writing(self) -> None:
        """Cuts off what a killed writer left, and looks at all blocks: what is damaged will be done again."""
        self.images.remove_unfinished()
        self._log.begin_writing()
        for entry in self.entries():
            if self._log.was_checked(entry):
                continue
            try:
                numbers_of(entry, self._log.read_block(entry))
            except ValueError as error:
                self._distrust(entry, Damage(place_of(entry.writer, run_folder.ARRAYS), entry.block[0], str(error)))

    def _read_on(self) -> list[AttemptEntry]:
        """Reads whole lines from where the last reading stopped."""
        found = []
        for read in self._log.read_on():
            if isinstance(read, Damage):
                self._report(read)
            else:
                self._index.add(read)
                found.append(read)
        return found

    def _distrust(self, entry: AttemptEntry, damage: Damage) -> None:
        with self._mutex:
            if entry in self._index.entries:
                self._index.remove(entry)
                self._report(damage)

    def _report(self, damage: Damage) -> None:
        if damage not in self.damaged:
            self.damaged.append(damage)
            self._log.drop_index()
            log.warning("%s: %s; it does not count", self.path, damage)


_stores: weakref.WeakSet[RunStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_stores):
        store._mutex = threading.RLock()  # another thread may have held it
        if store._lock is not None:
            store._lock.close()  # our copy only: the lock stays the parent's, and does not outlive it


forks.call_in_child(_after_fork)
