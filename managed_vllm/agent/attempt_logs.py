"""All logs of a run: that of its only writer, and those of writers that joined it, as one row of attempts.

    trajectories.jsonl, arrays.bin                   of processes that wrote alone
    writers/<id>/trajectories.jsonl, arrays.bin      of one that wrote together with others, and of nobody else

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
from managed_vllm.agent.run_folder import ARRAYS, LINES, translated_errors
from managed_vllm.agent.run_writers import WRITERS, writers_of
from managed_vllm.agent.trajectory_codec import Record

_MOST_OPEN = 16


class AttemptLogs:
    """The logs of a run's folder. Not thread-safe. Raises `RunStoreError` where the files can't be used.

    `own`: the writer whose log is written here, "" for that of an only writer; None: none is.
    """

    def __init__(self, run: Path, *, own: str | None = None) -> None:
        self._run = run
        self._own = own
        self._ends: dict[str, int] = {}
        self._open: OrderedDict[str, AttemptLog] = OrderedDict()
        if own:
            with translated_errors(run):
                for name in (LINES, ARRAYS):
                    (run / WRITERS / own / name).touch()
        self._kept = {name: AttemptLog(run, writer=name, writable=name == own) for name in {"", own or ""}}

    def close(self) -> None:
        for log in (*self._kept.values(), *self._open.values()):
            log.close()
        self._open.clear()

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_on(self) -> list[AttemptEntry | Damage]:
        """What others have written since the last reading, in the order in which it ended."""
        found: list[AttemptEntry | Damage] = list(self._kept[""].read_on())
        others = [writer for writer in writers_of(self._run) if writer not in self._kept]
        for writer in others:
            found += self._read_on(writer)
        if others:
            found.sort(key=lambda each: each.ended_at if isinstance(each, AttemptEntry) else 0.0)
        return found

    def _read_on(self, writer: str) -> list[AttemptEntry | Damage]:
        path, start = self._run / WRITERS / writer / LINES, self._ends.get(writer, 0)
        try:
            with path.open("rb") as file:
                grown = file.seek(0, os.SEEK_END) > start
        except FileNotFoundError:
            return []  # it has just joined
        except OSError as error:
            raise unusable(path, error) from error
        if not grown:
            return []
        with contextlib.closing(AttemptLog(self._run, writer=writer, writable=False, start=start)) as log:
            found = list(log.read_on())
            self._ends[writer] = log.end
        return found

    def read(self, entry: AttemptEntry) -> tuple[bytes, bytes]:
        """The line and the block of an attempt, not looked at yet."""
        return self._log_of(entry).read(entry)

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
        return self._kept[self._own or ""].append(head, record)
