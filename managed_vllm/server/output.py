"""What a server says: kept in server.log, its newest lines in memory, and each line told while the server starts."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import logging
import os
import re
import termios
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from managed_vllm.masking import Redactor
from managed_vllm.server import startup_log

log = logging.getLogger(__name__)

_LOG_LIMIT = 32 << 20
"""Bytes after which server.log becomes server.log.1."""

_LONGEST_LINE = 1 << 20

_TAIL_LINES = 2000
"""Lines kept in memory for the diagnosis: a worker's traceback may be followed by hundreds of lines of others."""


class ServerOutput:
    """Reads the output of one server, in a thread of its own, until the last process that writes to it has ended.

    `lines` is the newest output, `last_new_line_at` the time of the last line that was no repetition (monotonic clock).
    """

    def __init__(
        self, stream: IO[bytes], log_path: Path, on_line: Callable[[str], None], *, secrets: Collection[str] = ()
    ) -> None:
        """`on_line` is called, in the reader thread, for each line until `end_of_startup`.

        None of the `secrets` comes through, neither to the log nor to anybody else.
        """
        self.lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self.last_new_line_at = time.monotonic()
        self._stream = stream
        self._log_path = log_path
        self._on_line = on_line
        self._redactor = Redactor(secrets)
        self._messages_seen: set[int] = set()
        self._starting = True
        self._reader = threading.Thread(target=self._pump, name="server-log", daemon=True)
        self._reader.start()

    def end_of_startup(self) -> None:
        """From now on the output is only kept: `on_line` is not called any more."""
        self._starting = False
        self._messages_seen.clear()

    def drain(self, timeout_s: float = 1.0) -> None:
        """Waits for the rest of the output of a server that has ended."""
        self._reader.join(timeout_s)

    def catch_up(self, timeout_s: float = 0.2) -> None:
        """Waits until what the server has written so far is among `lines`."""
        deadline = time.monotonic() + timeout_s
        waiting = bytearray(4)
        with contextlib.suppress(OSError, ValueError):  # closed: all of it was read
            while time.monotonic() < deadline:
                fcntl.ioctl(self._stream.fileno(), termios.FIONREAD, waiting)
                if not any(waiting):
                    break
                time.sleep(0.001)  # the reader takes it at once

    def _pump(self) -> None:
        sink = _RotatingFile(self._log_path)
        pending = b""
        with self._stream as stream:
            for chunk in self._chunks(stream):
                sink.write(chunk)
                # tqdm redraws its line with a carriage return.
                *whole, pending = re.split(rb"[\r\n]", pending + chunk)
                if len(pending) > _LONGEST_LINE:  # it may never end
                    whole, pending = [*whole, pending], b""
                for raw in whole:
                    self._take_line(raw)
        if pending:
            self._take_line(pending)
        sink.close()

    def _chunks(self, stream: IO[bytes]) -> Iterator[bytes]:
        while chunk := os.read(stream.fileno(), 65536):
            yield self._redactor.feed(chunk)
        yield self._redactor.rest()

    def _take_line(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace")
        if line.strip():
            self.lines.append(line)
            if self._starting:
                # vLLM repeats that it is waiting, with a new time in front: that is no sign of life.
                message = hash(startup_log.message_of(line))
                if message not in self._messages_seen:
                    self.last_new_line_at = time.monotonic()
                    self._messages_seen.add(message)
                self._on_line(line)


class _RotatingFile:
    """server.log, mode 0600; a disk that is full loses log lines, never the server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._size = 0

    def write(self, chunk: bytes) -> None:
        try:
            if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
                self._file.close()  # the folder was removed; it may have been made anew
                self._file = None
            if self._file is None:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._file = os.fdopen(descriptor, "ab", buffering=0)
                self._size = os.fstat(descriptor).st_size
            self._file.write(chunk)
            self._size += len(chunk)
            if self._size > _LOG_LIMIT:
                self._file.close()
                self._file = None
                os.replace(self._path, self._path.with_suffix(".log.1"))
        except OSError as error:
            log.debug("server.log: %s", error)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
