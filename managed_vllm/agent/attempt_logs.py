"""All logs of a run: that of its only writer, and those of writers that joined it, as one row of attempts.

    trajectories.jsonl, arrays.bin                   of processes that wrote alone
    writers/<id>/trajectories.jsonl, arrays.bin      of one that wrote together with others, and of nobody else

Of a large log the index is read (`log_index`), and of the log what came after it.

A log that is not being read is closed: a run may have had thousands of writers. It is opened anew to see what has come,
so that NFS asks its server.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from managed_vllm.agent.attempt_log import AttemptEntry, AttemptLog, Damage
from managed_vllm.agent.image_store import unusable
from managed_vllm.agent.log_index import FEWEST, read_index, remove_index, write_index
from managed_vllm.agent.run_folder import ARRAYS, LINES, translated_errors
from managed_vllm.agent.run_writers import WRITERS, writers_of
from managed_vllm.agent.scores import Scores
from managed_vllm.agent.trajectory_codec import Record

_MOST_OPEN = 16


class AttemptLogs:
    """The logs of a run's folder. Not thread-safe. Raises `RunStoreError` where the files can't be used.

    `own`: the writer whose log is written here, "" for that of an only writer; None: none is. `scores`: what stands in
    the place of the rewards.
    """

    def __init__(self, run: Path, *, own: str | None = None, scores: Scores | None = None) -> None:
        self._run = run
        self._own = own
        self.scores = scores
        self._ends: dict[str, int] = {}
        self._open: OrderedDict[str, AttemptLog] = OrderedDict()
        if own:
            with translated_errors(run):
                for name in (LINES, ARRAYS):
                    (run / WRITERS / own / name).touch()
        self._indexed: dict[str, tuple[list[AttemptEntry], int]] = {}
        self._written = 0  # since the last index
        self._kept = {
            name: AttemptLog(run, writer=name, writable=name == own, start=self._read_index(name))
            for name in {"", own or ""}
        }

    def close(self) -> None:
        for log in (*self._kept.values(), *self._open.values()):
            log.close()
        self._open.clear()

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_on(self) -> list[AttemptEntry | Damage]:
        """What others have written since the last reading, in the order in which it ended."""
        found: list[AttemptEntry | Damage] = self._from_index("")
        read = list(self._kept[""].read_on())
        self._written += len(read) if self._own == "" else 0
        found += read
        others = [writer for writer in writers_of(self._run) if writer not in self._kept]
        for writer in others:
            found += self._read_on(writer)
        if others:
            found.sort(key=lambda each: each.ended_at if isinstance(each, AttemptEntry) else 0.0)
        if self.scores is not None:
            found = [self.scores.entry(each) if isinstance(each, AttemptEntry) else each for each in found]
        return found

    def _read_on(self, writer: str) -> list[AttemptEntry | Damage]:
        path = self._run / WRITERS / writer / LINES
        if writer not in self._ends:
            self._ends[writer] = self._read_index(writer)
        found, start = self._from_index(writer), self._ends[writer]
        try:
            with path.open("rb") as file:
                grown = file.seek(0, os.SEEK_END) > start
        except FileNotFoundError:
            return found  # it has just joined
        except OSError as error:
            raise unusable(path, error) from error
        if not grown:
            return found
        with contextlib.closing(AttemptLog(self._run, writer=writer, writable=False, start=start)) as log:
            found += log.read_on()
            self._ends[writer] = log.end
        return found

    def _read_index(self, writer: str) -> int:
        """Where the reading of the log itself begins."""
        self._indexed[writer] = read_index(self._folder_of(writer))
        return self._indexed[writer][1]

    def _from_index(self, writer: str) -> list[AttemptEntry | Damage]:
        """What the index had, the first time."""
        entries, end = self._indexed[writer]
        self._indexed[writer] = [], end
        return [*entries]

    def _folder_of(self, writer: str) -> Path:
        return self._run / WRITERS / writer if writer else self._run

    def was_checked(self, entry: AttemptEntry) -> bool:
        """Whether the index has it: whoever wrote that had looked at its numbers."""
        return entry.writer in self._indexed and entry.offset < self._indexed[entry.writer][1]

    def read(self, entry: AttemptEntry) -> tuple[bytes, bytes]:
        """The line and the block of an attempt, not looked at yet."""
        return self._log_of(entry).read(entry)

    def read_line(self, entry: AttemptEntry) -> bytes:
        """The line of an attempt, not looked at yet."""
        return self._log_of(entry).read_line(entry)

    def read_block(self, entry: AttemptEntry) -> bytes:
        """The block of an attempt, not looked at yet."""
        return self._log_of(entry).read_block(entry)

    def _log_of(self, entry: AttemptEntry) -> AttemptLog:
        if entry.writer in self._kept:
            return self._kept[entry.writer]
        log = self._open.pop(entry.writer, None) or AttemptLog(self._run, writer=entry.writer, writable=False)
        self._open[entry.writer] = log
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        return log

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin_writing(self) -> None:
        """Cuts off what a killed writer left in the log that is written here; everything was read before."""
        self._kept[self._own or ""].begin_writing()

    def append(self, head: dict[str, Any], record: Record) -> AttemptEntry:
        """Adds an attempt. When this returns it is on the disk; when it raises nothing of it is there."""
        self._written += 1
        return self._kept[self._own or ""].append(head, record)

    def index(self, entries: list[AttemptEntry], *, closing: bool = False) -> None:
        """Writes the index of the log that is written here, if enough is new. `entries`: of all logs, none damaged."""
        # Each time a tenth more: all of them together are no more than a few times the last one.
        if self._own is not None and self._written >= (1 if closing else max(FEWEST, len(entries) // 10)):
            self._written = 0
            mine = [entry for entry in entries if entry.writer == self._own]
            if len(mine) >= FEWEST:
                write_index(self._folder_of(self._own), mine, self._kept[self._own].end)

    def drop_index(self) -> None:
        """Of the log that is written here: something of it is damaged."""
        if self._own is not None:
            remove_index(self._folder_of(self._own))
