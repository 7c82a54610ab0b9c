"""Short paths for Unix sockets: the kernel accepts 107 bytes, however long those of our directories are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

LONGEST_PATH = 100
"""Bytes of a socket's path that every program can bind; the kernel's limit is 107."""

_LONGEST_FOLDER = 40
"""Characters. Programs that make sockets in a temporary folder of ours (ZeroMQ, browsers) add some 60 of their own."""


def short_temporary_folder() -> str:
    """The directory for temporary folders that will hold sockets: the usual one, or `/tmp` if its path is too long."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_FOLDER or not os.access("/tmp", os.W_OK) else "/tmp"


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a Unix socket that fits into the kernel's 108 bytes, however long the path is."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
