"""A run's folder but for its attempts: `run.json`, the writer's lock, and how files are read and written.

run.json       what was asked; replaced atomically
made_of.json   what the run is made of, where several write: the first of them says so, by `link`
writer.lock    held by the one process that writes, or shared by those that write together; writer.json says who the
               one is
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from managed_vllm.agent.image_store import unusable
from managed_vllm.agent.run_writers import living_writers
from managed_vllm.errors import ConfigError, RunStoreError

FORMAT = "managed-vllm run"
VERSION = 1

RUN, LINES, ARRAYS, IMAGES = "run.json", "trajectories.jsonl", "arrays.bin", "images"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""A file system without locks: writers that have joined agree without them."""
_LOCK, _WRITER, _MADE_OF = "writer.lock", "writer.json", "made_of.json"


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
        self.compare(folder, config, force=force)
        self.resumed.append({"at": time.time()})
        if config != self.config:
            self.resumed[-1]["config"] = config
        if notes != self.notes:
            self.resumed[-1]["notes"] = notes

    def compare(self, folder: Path, config: dict[str, Any], *, force: bool) -> None:
        """Raises `RunStoreError`: it is another run, unless `force`."""
        if config != self.config and not force:
            raise another_run(folder, self.config, config)

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

    def settle_together(self, folder: Path, made_of: dict[str, Any], *, force: bool) -> None:
        """As `settle`, while others write, too: the first of them says what it is. Raises `RunStoreError`."""
        if not self.made_of and not _make(folder / _MADE_OF, made_of):
            self.made_of = _made_of(folder)
        self.made_of = self.made_of or made_of
        if made_of != self.made_of and not force:
            raise another_run(folder, self.made_of, made_of)

    def write(self, folder: Path) -> None:
        """For the holder of the lock."""
        _replace(folder / RUN, asdict(self))

    def make(self, folder: Path) -> bool:
        """Writes it while others may, too; False: there is one."""
        return _make(folder / RUN, asdict(self))


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
        run = msgspec.convert(found, RunFile)
        run.made_of = run.made_of or _made_of(folder)
        return run
    except msgspec.ValidationError as error:
        raise RunStoreError(f"{folder} is no run: its {RUN} is damaged ({error})", path=str(folder)) from error


def _made_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _MADE_OF).read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unusable(folder / _MADE_OF, error) from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunStoreError(f"{folder} is no run: its {_MADE_OF} is damaged", path=str(folder))
    return found


def check_ours(folder: Path) -> None:
    """Refuses a folder with anything in it but a run, or the beginnings of one."""
    names = set(os.listdir(folder))
    if RUN in names:
        return
    strange = names - {_LOCK, _WRITER, LINES, ARRAYS, _unfinished(RUN), _unfinished(_WRITER)}
    strange = {name for name in strange if not name.startswith(_unfinished(RUN))}
    for name in names & {LINES, ARRAYS}:
        if (folder / name).stat().st_size:
            strange.add(name)
    if strange:
        raise RunStoreError(
            f"{folder} is no run: it has no {RUN}, but {', '.join(sorted(strange)[:3])}; give a new folder",
            path=str(folder),
        )


def begin(
    folder: Path, config: dict[str, Any], notes: dict[str, Any], *, resume: bool, force: bool
) -> tuple[RunFile, io.FileIO]:
    """Makes the run, or goes on with it, as its only writer, whose lock it returns. Raises `RunStoreError`."""
    lock = _enter(folder, together=False)
    try:
        if not (folder / RUN).exists():
            run = RunFile(config, notes)
        else:
            run = read_run(folder)
            if not resume:
                raise RunStoreError(
                    f"there is a run already in {folder}: resume it, or give another folder", path=str(folder)
                )
            run.resume(folder, config, notes, force=force)
        with translated_errors(folder):
            for name in (LINES, ARRAYS):
                (folder / name).open("ab").close()  # `touch` would change the time of those that are there
            run.write(folder)
            tell_writer(folder)
        return run, lock
    except BaseException:
        lock.close()
        raise


def begin_together(
    folder: Path, config: dict[str, Any], notes: dict[str, Any], *, force: bool
) -> tuple[RunFile, io.FileIO]:
    """As `begin`, beside others. The first of them makes the run."""
    lock = _enter(folder, together=True)
    try:
        with translated_errors(folder):
            for name in (LINES, ARRAYS):
                (folder / name).open("ab").close()  # `touch` would change the time of those that are there
            if not (folder / RUN).exists():
                RunFile(config, notes).make(folder)
        run = read_run(folder)
        run.compare(folder, config, force=force)
        return run, lock
    except BaseException:
        lock.close()
        raise


def _enter(folder: Path, *, together: bool) -> io.FileIO:
    with translated_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_ours(folder)
    return take_lock(folder, shared=together)


def take_lock(folder: Path, *, shared: bool = False) -> io.FileIO:
    """The lock belongs to the open file, and the kernel lets go of it however its process ends.

    `shared`: with others that write together. Where locks don't reach other hosts, an only writer sees the leases of
    those there; nobody ever writes into another one's files, whatever the locks say.

    Not by filelock: a fork must close its copy, else one that outlives its parent keeps the lock (as with filelock
    3.20, which we allow).
    """
    with translated_errors(folder):
        lock = io.FileIO(folder / _LOCK, "a+")
        try:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if not shared or error.errno not in _NO_LOCKS:
                    raise
            if not shared and living_writers(folder, folder / _LOCK):
                raise BlockingIOError
        except BaseException as error:
            lock.close()
            if not isinstance(error, BlockingIOError):
                raise
            hint = "" if shared else ", write together with it (join, --join) if it does so, too"
            raise RunStoreError(
                f"{folder} is written by {_writer_of(folder)}; only one may at a time. Wait for it, or end it, or give "
                f"another folder{hint}",
                path=str(folder),
            ) from error
    return lock


def tell_writer(folder: Path) -> None:
    """Says who holds the lock."""
    _replace(folder / _WRITER, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})


def let_go(folder: Path, lock: io.FileIO, *, alone: bool) -> None:
    """Lets another one write. In a fork, whose copy of the lock is closed, it does nothing."""
    if not lock.closed:
        if alone:
            with contextlib.suppress(OSError):
                (folder / _WRITER).unlink()
        lock.close()


def _writer_of(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        writer = json.loads((folder / _WRITER).read_bytes())
        return f"process {writer['pid']} on {writer['host']}"
    with contextlib.suppress(OSError, RunStoreError):
        if together := living_writers(folder, folder / _LOCK):
            return " and ".join([*map(str, together[:3]), *(["others"] if together[3:] else [])])
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
    write_json(unfinished, values)
    os.replace(unfinished, path)
    sync_folder(path)


def _make(path: Path, values: Mapping[str, Any]) -> bool:
    """As `_replace`, but only if there is none, whoever else tries it."""
    unfinished = path.with_name(f"{_unfinished(path.name)}-{secrets.token_hex(4)}")
    try:
        write_json(unfinished, values)
        os.link(unfinished, path)
    except FileExistsError:
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path)
    return True


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """On the disk when it returns."""
    with path.open("wb") as file:
        file.write(json.dumps(values, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """So that the names in the folder of the path are on the disk."""
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
