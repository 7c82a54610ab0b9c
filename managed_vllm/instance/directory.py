"""The state directory: one folder an instance, its locks and record.

What must hold:

1. The directory is ours alone: owned by us, mode 0700, not a symbolic link. Otherwise nothing in it is trusted.
2. A record is replaced atomically. A torn, foreign or garbage one is the same as none.
3. A live instance is one whose supervisor holds `supervisor.lock` *and* answers on `control.sock`; neither a record nor
   a pid in it proves anything (pids are reused).
4. A folder is removed only by the holder of its `start.lock`; a process that waited for the lock of a folder that is
   gone finds out and starts over.
5. Other things may lie in the directory, for a user may name any as `MANAGED_VLLM_HOME`. An instance is a folder that
   is named as one *and* holds our lock or record; in it, only files that we know are removed.
6. All processes of a user on this machine find the same directory, whatever their environment: a shell, cron, ssh, a
   service. Therefore neither `TMPDIR` nor `XDG_RUNTIME_DIR` decides (and the latter is removed at logout).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from managed_vllm import forks
from managed_vllm.errors import StateDirectoryError

HOME_VARIABLE = "MANAGED_VLLM_HOME"
_KEPT_LOGS = 20
_CREATE_TRIES = 1000
_LOCK_TRIES = 10
_RECORD_FIELDS = ("id", "spec", "pid", "state", "epoch")
SUPERVISOR_LOCK = "supervisor.lock"
START_LOCK = "start.lock"
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?-[0-9a-f]{10}")
_TOKEN = ".token"


def state_home() -> Path:
    """The state directory, created if need be and checked.

    `MANAGED_VLLM_HOME` if set, else `/tmp/managed-vllm-<uid>`. Raises `StateDirectoryError` if it can't be made or is
    not safe to use.
    """
    explicit = os.environ.get(HOME_VARIABLE)
    home = Path(explicit).expanduser().absolute() if explicit else _usual_home()
    with state_errors(home):
        home.mkdir(mode=0o700, parents=bool(explicit), exist_ok=True)
        check_private(home)
    return home


def _usual_home() -> Path:
    temporary = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()
    return Path(temporary) / f"managed-vllm-{os.getuid()}"


def other_homes(home: Path) -> list[Path]:
    """Directories of ours in which earlier versions, or other settings of the environment, may have put servers."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    places = (_usual_home(), Path(runtime) / "managed-vllm", Path(tempfile.gettempdir()) / _usual_home().name)
    return [place for place in dict.fromkeys(places) if place != home and is_own_directory(place)]


def cache_folder(name: str) -> Path:
    """A folder for what is kept across servers because it is slow to make, and read as code: ours alone, mode 0700.

    Below `$XDG_CACHE_HOME/managed-vllm` (by default in `~/.cache`), or in the state directory where that can't be had.
    Raises `StateDirectoryError`.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    for parent in (Path(cache).expanduser() / "managed-vllm", state_home() / "cache"):
        with contextlib.suppress(OSError, RuntimeError):  # no home directory, a read-only one, somebody else's
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(parent)
            folder = parent / name
            folder.mkdir(mode=0o700, exist_ok=True)
            check_private(folder)
            return folder
    raise StateDirectoryError(f"no private cache folder can be made: set XDG_CACHE_HOME or {HOME_VARIABLE}", path=cache)


def token_of(home: Path) -> str:
    """Random text that only this state directory has, made when it is first asked for.

    The same path may be another directory for a process in another mount namespace, or after a wipe.
    """
    return restore_token(home, secrets.token_hex(16))


def restore_token(home: Path, token: str) -> str:
    """Gives a state directory the token that it had before it was wiped, unless it has one; returns the one it has."""
    path = home / _TOKEN
    with state_errors(path):
        if not path.exists():
            with tempfile.NamedTemporaryFile("w", dir=home, prefix=f"{_TOKEN}-") as temporary:
                temporary.write(token)
                temporary.flush()
                with contextlib.suppress(FileExistsError):
                    os.link(temporary.name, path)  # whole or not at all, and never over another one's
        return path.read_text()


def check_locks(home: Path) -> None:
    """Raises `StateDirectoryError` where the file system of the state directory has no locks (some network ones)."""
    token_of(home)
    path = home / _TOKEN
    with state_errors(path), open(path, "r+b") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


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
    """One instance's folder and the files in it. The folder need not exist.

    `replica` is the number of one server of an instance that has several: what concerns that one alone (its log, its
    processes) is its own then, and the rest is the instance's.
    """

    home: Path
    id: str
    replica: int | None = None

    def of_replica(self, number: int) -> Instance:
        """The same instance, as its server with this number sees it."""
        return Instance(self.home, self.id, number)

    @property
    def label(self) -> str:
        """What people call it: the id, and the replica."""
        return self.id if self.replica is None else f"{self.id}, replica {self.replica}"

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
        return self.folder / ("server.log" if self.replica is None else f"server-{self.replica}.log")

    @property
    def image_log(self) -> Path:
        """What the server's warm image has said."""
        return self.folder / "image.log"

    @property
    def router_log(self) -> Path:
        """What the router in front of several replicas has said."""
        return self.folder / "router.log"

    @property
    def supervisor_log(self) -> Path:
        return self.folder / "supervisor.log"

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def marker(self) -> str:
        """The value of our marker in the environment of each of the server's processes."""
        return f"{self.folder}#{token_of(self.home)}"

    @property
    def exists(self) -> bool:
        """True if the folder is an instance's: named as one, ours, and with a lock or record of ours in it."""
        return (
            _ID.fullmatch(self.id) is not None
            and is_own_directory(self.folder)
            and any((self.folder / name).is_file() for name in (SUPERVISOR_LOCK, START_LOCK, "instance.json"))
        )

    def create(self) -> None:
        """Makes the folder, mode 0700. Raises `StateDirectoryError`."""
        with state_errors(self.folder):
            for _ in range(_CREATE_TRIES):
                # Between any two of these calls the last supervisor of this instance may remove it.
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    self.folder.mkdir(mode=0o700, exist_ok=True)
                    return check_private(self.folder)
            check_private(self.folder)

    @contextlib.contextmanager
    def start_lock(self, timeout_s: float) -> Iterator[None]:
        """Held while a user checks for a supervisor and spawns one: for a moment, never for the start of vLLM.

        Raises `TimeoutError` if somebody else has it for `timeout_s` seconds, `FileNotFoundError` without the folder.
        """
        # Not through filelock: where the folder has just been removed, it would make it again, open to everybody.
        deadline = time.monotonic() + timeout_s
        while (descriptor := _locked_file(self.folder / START_LOCK)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder / START_LOCK} is held")
            time.sleep(0.01)
        _taken.add(descriptor)
        try:
            yield
        finally:
            if descriptor in _taken:  # not in a child that was forked meanwhile
                _taken.discard(descriptor)
                os.close(descriptor)

    def take_supervisor_lock(self) -> int | None:
        """Takes `supervisor.lock` and returns its descriptor; None if a supervisor holds it.

        The lock belongs to the open file: a user takes it and passes the descriptor to the supervisor, so that the
        instance counts as alive without a gap. The kernel releases it when the last copy is closed, however that is.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = above_standard(os.open(self.folder / SUPERVISOR_LOCK, flags, 0o600))
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        _taken.add(descriptor)
        return descriptor

    @staticmethod
    def keep_lock(descriptor: int) -> None:
        """What `take_supervisor_lock` gave stays with us: we are the supervisor."""
        _taken.discard(descriptor)

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
        with state_errors(self.record_path):
            write_atomically(self.record_path, json.dumps({"id": self.id, **record}, indent=1))

    def remove_folder(self) -> None:
        """Removes our files, and the folder if nothing else is in it.

        Only for the holder of `start_lock`; see `cleanup.remove_instance`.
        """
        if not self.exists:
            return
        # The locks last: who waits for one must find the rest gone.
        for name in sorted(filter(_is_ours, self._listing()), key=lambda entry: entry.endswith(".lock")):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
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
        which = "" if self.replica is None else f"-{self.replica}"
        target = kept / f"{self.id}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{which}{suffix}"
        try:
            kept.mkdir(mode=0o700, exist_ok=True)
            put(target)
            for old in sorted(kept.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]:
                old.unlink(missing_ok=True)
        except OSError:
            return None
        return target


_OUR_FILES = r"\.instance\.json-\w+|.*events\.jsonl(\.1)?|(server(-\d+)?|router)\.log(\.1)?"


def _is_ours(name: str) -> bool:
    return re.fullmatch(_OUR_FILES, name) is not None or name in (
        "instance.json",
        "image.log",
        "control.sock",
        "api.sock",
        "supervisor.log",
        "supervisor.log.1",
        START_LOCK,
        SUPERVISOR_LOCK,
    )


def _lock(descriptor: int) -> bool:
    """Takes the lock of an open file; False if a supervisor has it. Those who only look share it for a moment."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
        else:
            return True
    return False


def _locked_file(path: Path) -> int | None:
    """Opens and locks a file; None if somebody else has the lock, or has just removed the file."""
    descriptor = above_standard(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


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
    return [found for found in (Instance(home, entry.name) for entry in entries) if found.exists]


def is_alive(instance: Instance) -> bool:
    """True if a supervisor holds the instance's lock at this moment."""
    try:
        descriptor = os.open(instance.folder / SUPERVISOR_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)  # not known: what may live must not be removed
    try:
        # Shared: with an exclusive one, whoever looks at the same moment would take us for the supervisor.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, on which no supervisor has one
        return False
    finally:
        os.close(descriptor)
    return False


# -- files -------------------------------------------------------------------------------------------------------------


def above_standard(descriptor: int) -> int:
    """The same open file under a number above 2, which whoever opens or redirects standard streams can't hit.

    In a process that was started with these closed, the next file that is opened gets their number.
    """
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


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
def state_errors(path: Path) -> Iterator[None]:
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
            errno.ENOLCK: "this file system has no file locks",
            errno.EOPNOTSUPP: "this file system has no file locks",
            errno.ENOSYS: "this file system has no file locks",
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
