"""The heads of a log's attempts in one small file, so that a large run is opened without reading all of it.

    index.msgpack    beside the two files of a log: how large they were and when changed, and an entry an attempt

What must hold:

1. It is a copy, written by the log's writer, replaced atomically, and never needed: without it the log is read.
2. It is trusted as long as the two files have only grown since, or are as they were. It is written only by those that
   have read, or written, every line and every block that it speaks of, and found no damage.
3. What is damaged later within what it speaks of is found when the attempt is read: lines and blocks have checksums.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.run_folder import ARRAYS, LINES

log = logging.getLogger(__name__)

NAME = "index.msgpack"
FEWEST = 1000
"""Attempts from which on there is an index, and between two of them: so many are read in a fraction of a second."""
_VERSION = 1


class _Index(msgspec.Struct):
    version: int
    files: tuple[tuple[int, int], tuple[int, int]]
    """Size, and mtime in nanoseconds."""
    end: int
    """Of the lines that it speaks of: a byte."""
    entries: list[AttemptEntry]


_decoder = msgspec.msgpack.Decoder(_Index)


def read_index(folder: Path) -> tuple[list[AttemptEntry], int]:
    """The entries, and the byte of the lines up to which they are; none where there is no index to be trusted."""
    try:
        found = _decoder.decode((folder / NAME).read_bytes())
        now = _files(folder)
    except (OSError, ValueError):
        return [], 0
    grown = all(now[each][0] >= found.files[each][0] for each in (0, 1)) and now[0][0] > found.files[0][0]
    if found.version != _VERSION or not (now == found.files or grown):
        return [], 0
    return found.entries, found.end


def write_index(folder: Path, entries: Sequence[AttemptEntry], end: int) -> None:
    """For the writer of the log, of all of its attempts. One that can't be written is no error."""
    unfinished = folder / f".{NAME}-new"
    try:
        index = _Index(_VERSION, _files(folder), end, list(entries))
        unfinished.write_bytes(msgspec.msgpack.encode(index))
        os.replace(unfinished, folder / NAME)
    except (OSError, ValueError) as error:  # the disk is full, say; or half a surrogate pair in a task's id
        log.debug("no index in %s: %s", folder, error)
        remove_index(folder)


def remove_index(folder: Path) -> None:
    """It speaks of something that is damaged."""
    with contextlib.suppress(OSError):
        (folder / NAME).unlink(missing_ok=True)


def _files(folder: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    lines, arrays = (os.stat(folder / name) for name in (LINES, ARRAYS))
    return (lines.st_size, lines.st_mtime_ns), (arrays.st_size, arrays.st_mtime_ns)
