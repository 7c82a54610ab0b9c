"""Standard error as a place for progress: writing there never fails, wherever it leads.

A terminal goes away (a dropped ssh connection), the reader of a pipe has read enough (`2>&1 | head`), a program has
closed the stream or has none. Progress that nobody can see is no reason to fail.
"""

from __future__ import annotations

import io
import sys
from typing import Any


class StandardError(io.TextIOBase):
    """The `sys.stderr` of now. After a write that failed, nothing is written any more."""

    def __init__(self) -> None:
        self._stream: Any = sys.stderr

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, OSError, ValueError):  # there is none, or it was closed
            return False

    def fileno(self) -> int:
        """Raises `OSError` where there is none."""
        try:
            return int(self._stream.fileno())
        except (AttributeError, ValueError) as error:
            raise io.UnsupportedOperation("standard error has no descriptor") from error

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (AttributeError, OSError, ValueError):
            self._stream = None
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (AttributeError, OSError, ValueError):
            self._stream = None
