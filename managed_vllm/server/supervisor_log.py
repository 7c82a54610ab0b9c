"""`supervisor.log`: all that the supervisor says, down to its last words; a file that does not grow for ever."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

KEPT_BYTES = 4 << 20
"""Size from which the file becomes `supervisor.log.1`, in place of an older one: weeks, as a rule."""


class BoundedLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to standard error, which is the file at `path`, and begins another file when it is full."""

    def __init__(self, path: Path) -> None:
        super().__init__(sys.stderr)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record. On a full disk it is lost."""
        super().emit(record)
        with contextlib.suppress(OSError):
            written = os.fstat(2)
            # Another supervisor's, where the folder was removed and made anew, is not ours to move.
            if written.st_size >= KEPT_BYTES and os.path.samestat(written, os.stat(self._path)):
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
                write_output_to(self._path)


def write_output_to(path: Path) -> None:
    """From now on standard output and error go to the end of this file."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.close(descriptor)
