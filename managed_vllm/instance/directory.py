"""The state directory: one folder an instance, its locks and record, and the names.

What must hold:

1. The directory is ours alone: owned by us, mode 0700, not a symbolic link. Otherwise nothing in it is trusted.
2. A record is replaced atomically. A torn, foreign or garbage one is the same as none.
3. A live instance is one whose supervisor holds `supervisor.lock` *and* answers on `control.sock`; neither a record nor
   a pid in it proves anything (pids are reused).
4. A folder is removed only by the holder of its `start.lock`; a process that waited for the lock of a folder that is
   gone finds out (filelock ≥ 3.20 checks for unlinked files) and starts over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from managed_vllm import forks
from managed_vllm.errors import ConfigError, ConfigMismatchError, StateDirectoryError
from managed_vllm.in_server.managed_vllm_lifeline import MARKER

HOME_VARIABLE = "MANAGED_VLLM_HOME"
_KEPT_LOGS = 20
_CREATE_TRIES = 20
_RECORD_FIELDS = ("id", "spec", "pid", "state", "epoch")


def state_home() -> Path:
    """The state directory, created if need be and checked.

    `MANAGED_VLLM_HOME` if set; else `$XDG_RUNTIME_DIR/managed-vllm` if that runtime directory is ours; else
    `managed-vllm-<uid>` in the temp dir. Raises `StateDirectoryError` if it can't be made or is not safe to use.
    """
    explicit = os.environ.get(HOME_VARIABLE)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if explicit:
        home = Path(explicit).expanduser().absolute()
    elif runtime and is_own_directory(Path(runtime)) and os.access(runtime, os.W_OK):
        home = Path(runtime) / "managed-vllm"
    else:
        home = Path(tempfile.gettempdir()) / f"managed-vllm-{os.getuid()}"
    with _state_errors(home):
        home.mkdir(mode=0o700, parents=bool(explicit), exist_ok=True)
        check_private(home)
    return home


def check_private(folder: Path) -> None:
    """Raises `StateDirectoryError` unless `folder` is a real directory, owned by us, closed to everybody else."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise StateDirectoryError(f"{folder} is not a directory; remove it or set {HOME_VARIABLE}", path=str(folder))
    if status.st_uid != os.getuid():
        raise StateDirectoryError(
            f"{folder} belongs to uid {status.st_uid}, not to us ({os.getuid()}): that user could plant records "
            f"in it. Remove it, or set {HOME_VARIABLE} to a directory of yours",
            path=str(folder),
        )
    if status.st_mode & 0o077:
        raise StateDirectoryError(
            f"{folder} is open to other users (mode {status.st_mode & 0o777:04o}); run: chmod 700 {folder}",
            path=str(folder),
        )


@dataclass(frozen=True)
class Instance:
    """One instance's folder and the files in it. The folder need not exist."""

    home: Path
    id: str

    @property
    def folder(self) -> Path:
        return self.home / self.id

    @property
    def record_path(self) -> Path:
        return self.folder / "instance.json"

    @property
    def socket_path(self) -> Path:
        return self.folder / "control.sock"

    @property
    def uds_path(self) -> Path:
        """The server's own Unix socket, with `uds=True`."""
        return self.folder / "api.sock"

    @property
    def server_log(self) -> Path:
        return self.folder / "server.log"

    @property
    def image_log(self) -> Path:
        """What the server's warm image has said."""
        return self.folder / "image.log"

    @property
    def supervisor_log(self) -> Path:
        return self.folder / "supervisor.log"

    @property
    def failed_mark(self) -> Path:
        """Made by a supervisor that fails by itself: the user that waits for it must not simply start another one."""
        return self.folder / "supervisor.failed"

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def marker(self) -> str:
        """The value of our marker in the environment of each of the server's processes."""
        return f"{MARKER}={self.folder}"

    def create(self) -> None:
        """Makes the folder, mode 0700. Raises `StateDirectoryError`."""
        with _state_errors(self.folder):
            for _ in range(_CREATE_TRIES):
                # Between any two of these calls the last supervisor of this instance may remove it.
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    self.folder.mkdir(mode=0o700, exist_ok=True)
                    return check_private(self.folder)
            check_private(self.folder)

    def start_lock(self) -> filelock.BaseFileLock:
        """Held while a user checks for a supervisor and spawns one: for a moment, never for the start of vLLM."""
        return filelock.FileLock(self.folder / "start.lock", mode=0o600, thread_local=False)

    def take_supervisor_lock(self) -> int | None:
        """Takes `supervisor.lock` and returns its descriptor; None if a supervisor holds it.

        The lock belongs to the open file: a user takes it and passes the descriptor to the supervisor, so that the
        instance counts as alive without a gap. The kernel releases it when the last copy is closed, however that is.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / "supervisor.lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        _taken.add(descriptor)
        return descriptor

    @staticmethod
    def hand_on_lock(descriptor: int) -> None:
        """Closes our copy of what `take_supervisor_lock` gave: the supervisor has its own, if it was started."""
        _taken.discard(descriptor)
        os.close(descriptor)

    def read_record(self) -> dict[str, Any] | None:
        """The record, or None if there is none that can be trusted."""
        try:
            descriptor = os.open(self.record_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size > 4 << 20:
                return None
            try:
                record = json.loads(file.read())
            except (ValueError, OSError, RecursionError):
                return None
        if (
            not isinstance(record, dict)
            or any(name not in record for name in _RECORD_FIELDS)
            or record["id"] != self.id
        ):
            return None
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Replaces the record atomically."""
        with _state_errors(self.record_path):
            write_atomically(self.record_path, json.dumps({"id": self.id, **record}, indent=1))

    def remove_folder(self) -> None:
        """Removes the folder and all in it. Only for the holder of `start_lock`; see `cleanup.remove_instance`."""
        # The locks last: when a process that waits gets one, the rest must be gone.
        for name in sorted(self._listing(), key=lambda entry: entry.endswith(".lock")):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _listing(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except OSError:
            return []

    def keep_log(self) -> Path | None:
        """Moves the log of a failed server to where it survives the folder; the newest 20 are kept."""
        return self._keep(".log", lambda target: os.replace(self.server_log, target))

    def keep_stacks(self, text: str) -> Path | None:
        """Writes the stacks of a hung server to where they survive the folder; the newest 20 are kept."""
        return self._keep(".stacks", lambda target: write_atomically(target, text))

    def _keep(self, suffix: str, put: Callable[[Path], None]) -> Path | None:
        kept = self.home / "failed"
        target = kept / f"{self.id}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{suffix}"
        try:
            kept.mkdir(mode=0o700, exist_ok=True)
            put(target)
            for old in sorted(kept.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]:
                old.unlink(missing_ok=True)
        except OSError:
            return None
        return target


_taken: set[int] = set()


def _forget_taken() -> None:
    """A child that another thread forks in the middle of a start would keep the lock for as long as it lives."""
    while _taken:
        os.close(_taken.pop())


forks.call_in_child(_forget_taken)


def instances(home: Path) -> list[Instance]:
    """Every instance that has a folder, alive or not."""
    try:
        entries = sorted(os.scandir(home), key=lambda entry: entry.name)
    except OSError:
        return []
    reserved = ("failed", "names")
    return [Instance(home, e.name) for e in entries if e.is_dir(follow_symlinks=False) and e.name not in reserved]


# -- names -------------------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raises `ConfigError` unless the name can stand as a file name on every system."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ConfigError(f"name={name!r} must be 1 to 63 letters, digits, '.', '_' or '-'", field="name")


def claim_name(home: Path, name: str, instance_id: str, differences: Any) -> None:
    """Makes `name` stand for the instance, if no live instance has it.

    `differences(record)` tells how a live holder of the name differs from what is asked for. Raises
    `ConfigMismatchError` where another live instance has the name.
    """
    check_name(name)
    with _state_errors(home / "names"):
        (home / "names").mkdir(mode=0o700, exist_ok=True)
        with filelock.FileLock(home / "names" / ".lock", mode=0o600, timeout=10):
            holder = named(home, name)
            if holder is not None and holder.id != instance_id and is_alive(holder):
                record = holder.read_record() or {}
                raise ConfigMismatchError(
                    f"the server named {name!r} is running with other arguments; use its arguments, another name, "
                    f"or end it first: managed-vllm down {name}",
                    differences=differences(record),
                    instance=holder.id,
                )
            write_atomically(home / "names" / f"{name}.json", json.dumps({"id": instance_id}))


def named(home: Path, name: str) -> Instance | None:
    """The instance that last had the name, alive or not."""
    try:
        data = json.loads((home / "names" / f"{name}.json").read_text())
        return Instance(home, str(data["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def drop_names(home: Path, instance_id: str) -> None:
    """Forgets the names of an instance that is gone; removes the folder of names when it is empty."""
    names = home / "names"
    if not names.is_dir():
        return
    with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(names / ".lock", mode=0o600, timeout=2):
        for path in names.glob("*.json"):
            holder = named(home, path.stem)
            if holder is None or holder.id == instance_id:
                path.unlink(missing_ok=True)
        if not list(names.glob("*.json")):
            (names / ".lock").unlink(missing_ok=True)
            names.rmdir()


def is_alive(instance: Instance) -> bool:
    """True if a supervisor holds the instance's lock at this moment."""
    # Not through filelock: it would create the file again in a folder that is being removed.
    try:
        descriptor = os.open(instance.folder / "supervisor.lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# -- files -------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Writes a file of mode 0600 that readers see whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def is_own_directory(folder: Path) -> bool:
    """True for a real directory, no symbolic link, that is owned by us."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


@contextlib.contextmanager
def _state_errors(path: Path) -> Iterator[None]:
    """Turns what the file system says into a `StateDirectoryError` that says what to do."""
    try:
        yield
    except StateDirectoryError:
        raise
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "your disk quota is used up; free some space",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOTDIR: "a part of the path is not a directory",
            errno.EEXIST: "it exists and is not a directory",
            errno.ENAMETOOLONG: "the path is too long",
        }.get(error.errno or 0, error.strerror or str(error))
        raise StateDirectoryError(
            f"can't use the state directory: {path}: {reason}. Set {HOME_VARIABLE} to a writable directory of yours "
            "to have it elsewhere",
            path=str(path),
        ) from error


def tail(path: Path, lines: int) -> str:
    """The last `lines` lines of a log; empty if there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 400 * lines - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
