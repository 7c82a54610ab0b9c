"""`managed-vllm logs`, and a reader that follows a log across rotations."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

from managed_vllm.cli import running
from managed_vllm.errors import ConfigError, NoServerError
from managed_vllm.instance import directory
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.server_logs import headed, logs_in

_PATIENCE_S = 3.0
"""How long a killed supervisor may be missing before the server counts as gone: one of its users starts the next."""


class LogReader:
    """Reads a log that grows and is rotated: first `backlog`, from then on `news`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def backlog(self, lines: int | None) -> str:
        """The last lines of what is there now (None: all); empty if there is no log yet."""
        if not self._open():
            return ""
        assert self._file is not None
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0 if lines is None else max(0, size - 400 * lines - 65536))
        text = self._read()
        if lines is None:
            return text
        return "".join(text.splitlines(keepends=True)[-lines:]) if lines else ""

    def news(self) -> str:
        """What was written since the last call."""
        if self._file is None:
            return self._read() if self._open() else ""
        text = self._read()
        if self._is_moved():
            text += self._read()
            self._file.close()
            self._file = None
            text += self.news()
        return text

    def _open(self) -> bool:
        try:
            self._file = open(self._path, "rb")  # noqa: SIM115 - read for as long as we live
        except OSError:
            return False
        return True

    def _read(self) -> str:
        assert self._file is not None
        return self._decoder.decode(self._file.read())

    def _is_moved(self) -> bool:
        """Whether the path now leads to another file. Until then the old one may still grow."""
        assert self._file is not None
        try:
            now = self._path.stat()
        except OSError:
            return False
        return now.st_ino != os.fstat(self._file.fileno()).st_ino

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class ServerLogs:
    """All logs of a server as one: those of several replicas line by line, each with the replica's number before it.

    Args:
        instance: whose logs they are.
        replica: the only one to read, as it is; None: all.
    """

    def __init__(self, instance: Instance, replica: int | None = None) -> None:
        self._instance = instance
        self._replica = replica
        self._readers: dict[int | None, LogReader] = {}
        self._begun: dict[int | None, str] = {}
        """Of each log the line that is not whole yet."""

    def backlog(self, lines: int | None) -> str:
        """As `LogReader.backlog`, of each."""
        self._find()
        return "".join(self._whole(which, reader.backlog(lines)) for which, reader in self._readers.items())

    def news(self) -> str:
        """As `LogReader.news`, of those that have appeared since, too."""
        self._find()
        return "".join(self._whole(which, reader.news()) for which, reader in self._readers.items())

    def _find(self) -> None:
        for which, path in logs_in(self._instance).items():
            if which not in self._readers and self._replica in (None, which):
                self._readers[which] = LogReader(path)

    def _whole(self, which: int | None, text: str) -> str:
        if which is None or which == self._replica:
            return text
        lines, newline, self._begun[which] = (self._begun.get(which, "") + text).rpartition("\n")
        return headed(lines + newline, which)

    def __enter__(self) -> ServerLogs:
        return self

    def __exit__(self, *details: object) -> None:
        for reader in self._readers.values():
            reader.__exit__(*details)


class _ServerWatch:
    """Finds out whether a server is gone, without a lease and without touching its locks."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._channel: Channel | None = None
        self._lost_at: float | None = None

    def is_gone(self) -> bool:
        if self._channel is not None and not self._channel.closed:
            return False
        try:
            self._channel = Channel.connect(self._instance.socket_path, timeout_s=1.0)
        except OSError:
            now = time.monotonic()
            self._lost_at = self._lost_at or now
            return not self._instance.folder.exists() or now - self._lost_at > _PATIENCE_S
        self._lost_at = None
        return False

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


def logs(given: argparse.Namespace) -> int:
    """`managed-vllm logs`."""
    home = directory.state_home()
    if given.failed:
        return _show_failed(home, given.which or "", given.lines)
    try:
        instance = running.find(home, given.which) if given.which else running.the_only_one(home)
    except NoServerError as error:
        kept = _failed(home, given.which or "")
        if kept:
            hint = f"the log of the last one that failed is kept: managed-vllm logs --failed ({kept[-1]})"
            raise NoServerError(f"{error.message}; {hint}", candidates=error.candidates) from None
        raise
    if given.replica is not None and given.replica not in logs_in(instance):
        there = ", ".join(str(which) for which in logs_in(instance) if which is not None)
        raise ConfigError(f"{instance.id} has no log of a replica {given.replica}; there are: {there or 'none'}")
    with ServerLogs(instance, given.replica) as reader:
        write(reader.backlog(given.lines))
        if given.follow:
            _follow(reader, instance)
    return 0


def _follow(reader: ServerLogs, instance: Instance) -> None:
    server = _ServerWatch(instance)
    try:
        while True:
            gone = server.is_gone()
            text = reader.news()  # read after the check, so that a server's last words are shown
            write(text)
            if gone:
                return
            if not text:
                time.sleep(0.1)
    finally:
        server.close()


def write(text: str) -> None:
    """To standard output, at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _failed(home: Path, which: str) -> list[Path]:
    """The logs kept of failed servers, the newest last."""
    found = [path for path in (home / "failed").glob("*.log") if path.name.startswith(which)]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _show_failed(home: Path, which: str, lines: int) -> int:
    kept = _failed(home, which)
    if not kept:
        raise NoServerError("no log of a failed server is kept" + (f" for {which!r}" if which else ""))
    print(f"{kept[-1]}:", file=sys.stderr)
    with LogReader(kept[-1]) as reader:
        write(reader.backlog(lines))
    return 0
