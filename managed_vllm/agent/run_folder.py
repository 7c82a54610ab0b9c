"""A run's folder but for its attempts: `run.json`, the writer's lock, and how files are read and written.

run.json       what was asked; replaced atomically
writer.lock    held by the one process that writes; writer.json says who that is
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from managed_vllm.agent.image_store import unusable
from managed_vllm.errors import ConfigError, RunStoreError

FORMAT = "managed-vllm run"
VERSION = 1

RUN, LINES, ARRAYS, IMAGES = "run.json", "trajectories.jsonl", "arrays.bin", "images"
_LOCK, _WRITER = "writer.lock", "writer.json"


@dataclass
class RunFile:
    """`run.json`."""

    config: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    made_of: dict[str, Any] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    resumed: list[dict[str, Any]] = field(default_factory=list)
    format: str = FORMAT
    version: int = VERSION

    def resume(self, folder: Path, config: dict[str, Any], notes: dict[str, Any], *, force: bool) -> None:
        """Goes on with it. Raises `RunStoreError`: it is another run, unless `force`."""
        if config != self.config and not force:
            raise another_run(folder, self.config, config)
        self.resumed.append({"at": time.time()})
        if config != self.config:
            self.resumed[-1]["config"] = config
        if notes != self.notes:
            self.resumed[-1]["notes"] = notes

    def settle(self, folder: Path, made_of: dict[str, Any], *, force: bool) -> bool:
        """What it is made of, recorded once; whether that is to be written. Raises `RunStoreError` as `resume`."""
        if made_of == self.made_of:
            return False
        if not self.made_of:
            self.made_of = made_of
        elif not force:
            raise another_run(folder, self.made_of, made_of)
        elif self.resumed:
            self.resumed[-1]["made_of"] = made_of
        return True

    def write(self, folder: Path) -> None:
        """For the holder of the lock."""
        _replace(folder / RUN, asdict(self))


def another_run(folder: Path, has: Mapping[str, Any], asked: Mapping[str, Any]) -> RunStoreError:
    """The error that says what differs."""
    return RunStoreError(
        f"{folder} is a run made otherwise; ask for the same, give another folder, or force it (force=True, --force): "
        "what is missing is then played as asked for now\n" + "\n".join(differences(has, asked)),
        path=str(folder),
    )


def read_run(folder: Path) -> RunFile:
    """Raises `RunStoreError`: there is none, it is damaged, or of a later version."""
    path = folder / RUN
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunStoreError(f"{folder} is no run: it has no {RUN}", path=str(folder)) from error
    except OSError as error:
        raise unusable(path, error) from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RunStoreError(f"{folder} is no run: its {RUN} is damaged, or of another program", path=str(folder))
    if found.get("version") != VERSION:
        raise RunStoreError(
            f"{folder} was written in version {found.get('version')} of the format, this library knows {VERSION}",
            path=str(folder),
        )
    try:
        return msgspec.convert(found, RunFile)
    except msgspec.ValidationError as error:
        raise RunStoreError(f"{folder} is no run: its {RUN} is damaged ({error})", path=str(folder)) from error


def check_ours(folder: Path) -> None:
    """Refuses a folder with anything in it but a run, or the beginnings of one."""
    names = set(os.listdir(folder))
    if RUN in names:
        return
    strange = names - {_LOCK, _WRITER, LINES, ARRAYS, _unfinished(RUN), _unfinished(_WRITER)}
    for name in names & {LINES, ARRAYS}:
        if (folder / name).stat().st_size:
            strange.add(name)
    if strange:
        raise RunStoreError(
            f"{folder} is no run: it has no {RUN}, but {', '.join(sorted(strange)[:3])}; give a new folder",
            path=str(folder),
        )


def take_lock(folder: Path) -> io.FileIO:
    """The lock belongs to the open file, and the kernel lets go of it however its process ends.

    Not by filelock: a fork must close its copy, else one that outlives its parent keeps the lock (as with filelock
    3.20, which we allow).
    """
    with translated_errors(folder):
        lock = io.FileIO(folder / _LOCK, "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            lock.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise RunStoreError(
                f"{folder} is written by {_writer_of(folder)}; only one may at a time. Wait for it, or end it, or give "
                "another folder",
                path=str(folder),
            ) from error
    return lock


def tell_writer(folder: Path) -> None:
    """Says who holds the lock."""
    _replace(folder / _WRITER, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})


def let_go(folder: Path, lock: io.FileIO) -> None:
    """Lets another one write. In a fork, whose copy of the lock is closed, it does nothing."""
    if not lock.closed:
        with contextlib.suppress(OSError):
            (folder / _WRITER).unlink()
        lock.close()


def _writer_of(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        writer = json.loads((folder / _WRITER).read_bytes())
        return f"process {writer['pid']} on {writer['host']}"
    return "another process"


def differences(has: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What a run has and what is asked for, where they differ; one line each."""
    for name in sorted(has.keys() | asked.keys()):
        left, right = has.get(name, _NOTHING), asked.get(name, _NOTHING)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"  {prefix}{name}: the run has {_shown(left)}, asked for is {_shown(right)}"


_NOTHING = object()


def _shown(value: Any) -> str:
    return "nothing" if value is _NOTHING else f"{value!r:.200}"


def plain_json(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """As JSON has them. Raises `ConfigError`."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(values or {}), allow_nan=False))
        return found
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must be a dict of plain JSON values: {error}", field=name) from error


def _unfinished(name: str) -> str:
    return f".{name}-new"


def _replace(path: Path, values: Mapping[str, Any]) -> None:
    """Atomically, and on the disk when it returns. For the holder of the lock."""
    unfinished = path.with_name(_unfinished(path.name))
    with unfinished.open("wb") as file:
        file.write(json.dumps(values, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_at(file: io.FileIO, size: int, offset: int) -> bytes:
    """Less only at the end of the file."""
    found = os.pread(file.fileno(), size, offset)
    while len(found) < size and (more := os.pread(file.fileno(), size - len(found), offset + len(found))):
        found += more
    return found


def write_at(file: io.FileIO, data: bytes, offset: int) -> None:
    """All of it is on the disk when this returns."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written
    os.fdatasync(file.fileno())


@contextlib.contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Errors of the file system as `RunStoreError`."""
    try:
        yield
    except OSError as error:
        raise unusable(path, error) from error
