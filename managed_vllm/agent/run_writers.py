"""The processes that write into one run together: who each one is, and whether it still lives.

    writers/<id>/token-0    who it is; its mtime is renewed as long as the writer lives, its hard links are its claims

What must hold, also on NFS and whatever the hosts' clocks say:

1. A writer writes only files of its own. What several want is decided by `link`, which one of them gets.
2. Times are those of the file system: a writer's age is the mtime of its token against that of our own, touched now.
   The clocks of the hosts are compared with each other nowhere.
3. A writer on this host that is dead is known to be so at once (pid, start time, boot and pid namespace). Of others the
   lease must have run out, and nothing been heard of them while we looked: a file system's clock that is set forward is
   no death.
4. A writer that closes says so (mtime 0): all its claims are free at once.

Not guaranteed: a writer that was stopped for longer than its lease (SIGSTOP, a hung mount) may go on while another one
has taken over what it played. It looks before it records anything (`lapsed`); where both record, the first counts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from managed_vllm.agent.image_store import unusable
from managed_vllm.errors import ConfigError, RunStoreError

log = logging.getLogger(__name__)

WRITERS = "writers"
LEASE_S = 60.0
"""After which a writer on another host, of which nothing was heard, is taken for dead."""
_RENEWALS = 6
"""Within a lease."""
MOST_LINKS = 30_000
"""Of a token: ext4 allows 65,000."""


@dataclass(frozen=True, slots=True)
class Token:
    """Who a writer is. `renewed_at` is its mtime in seconds, 0 for a writer that has closed."""

    writer: str
    pid: int
    started: str
    boot: str
    namespace: str
    host: str
    lease_s: float
    renewed_at: float = 0.0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def read_token(path: Path) -> Token | None:
    """The token, or a claim made with it; None where there is no such file.

    It is opened anew each time, so that NFS asks the server. Raises `RunStoreError`.
    """
    try:
        with path.open("rb") as file:
            text, renewed_at = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(path, error) from error
    try:
        return msgspec.convert({**json.loads(text), "renewed_at": renewed_at}, Token)
    except (ValueError, TypeError, msgspec.ValidationError) as error:
        raise RunStoreError(f"{path} is damaged: it says of no writer who it is", path=str(path)) from error


def writers_of(folder: Path) -> list[str]:
    """The ids of all that ever joined a run."""
    try:
        return sorted(os.listdir(folder / WRITERS))
    except (FileNotFoundError, NotADirectoryError):
        return []


def living_writers(folder: Path, clock: Path) -> list[Token]:
    """Those that joined a run and may still write; `clock` is a file there that we may touch."""
    if not (found := writers_of(folder)):
        return []
    now = _touched(clock)
    tokens = [read_token(folder / WRITERS / writer / "token-0") for writer in found]
    return [one for one in tokens if one and not _is_dead_here(one) and now - one.renewed_at < one.lease_s]


class RunWriter:
    """This process as one of a run's writers, to be closed. Thread-safe.

    Raises `RunStoreError` where the folder can't be used, also for a file system without hard links.
    """

    def __init__(self, folder: Path, lease_s: float = LEASE_S) -> None:
        if not lease_s > 0:
            raise ConfigError(f"lease_s must be more than 0 s, not {lease_s}", field="lease_s")
        self.id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self.folder = folder / WRITERS / self.id
        self.lease_s = lease_s
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._tokens: list[Path] = []
        self._links = 0
        self._renewed = _seconds()
        self._lapses = 0
        self._dead: set[str] = set()
        self._seen: dict[str, tuple[float, float]] = {}
        self._over = threading.Event()
        self.folder.mkdir(parents=True)
        self._add_token()
        threading.Thread(target=self._keep_alive, name="managed-vllm-lease", daemon=True).start()

    @property
    def token(self) -> Path:
        """A file that only those see who share this very folder."""
        return self._tokens[0]

    def link(self, path: Path) -> bool:
        """Makes `path` a claim of ours; False: there is one already. Raises `RunStoreError`."""
        with self._mutex:
            if self._links >= MOST_LINKS:
                self._add_token()
            for folder in ((), (path.parent,)):
                try:
                    for each in folder:
                        each.mkdir(parents=True, exist_ok=True)
                    os.link(self._tokens[-1], path)
                except FileNotFoundError:
                    continue  # the first one in its folder
                except FileExistsError:
                    return False
                except OSError as error:
                    raise _no_link(path, error) from error
                self._links += 1
                return True
        raise unusable(path, FileNotFoundError(errno.ENOENT, "its folder is gone"))

    def is_gone(self, other: Token) -> bool:
        """Whether another writer is dead, has closed, or has let its lease run out."""
        if other.writer in self._dead:
            return True
        if other.renewed_at == 0 or _is_dead_here(other):
            self._dead.add(other.writer)
            return True
        renewed, since = self._seen.get(other.writer, (None, 0.0))
        if renewed != other.renewed_at:
            self._seen[other.writer] = other.renewed_at, _seconds()
            return False
        if _seconds() - since < other.lease_s / 3:
            return False
        return self.renew() - other.renewed_at > other.lease_s

    @property
    def lapses(self) -> int:
        """How often this writer has not renewed its lease in time: others may have taken it for dead then."""
        with self._mutex:
            return self._lapses + (_seconds() - self._renewed > self.lease_s / 2)

    def renew(self) -> float:
        """Says that we live; the time of the file system."""
        with self._mutex:
            if self._over.is_set():
                return 0.0
            began = _seconds()
            now = [_touched(token) for token in self._tokens][-1]
            self._lapses += _seconds() - self._renewed > self.lease_s / 2
            self._renewed = began
            return now

    def close(self) -> None:
        """All claims are free. In a fork it does nothing."""
        if os.getpid() == self._pid and not self._over.is_set():
            self._over.set()
            with self._mutex, contextlib.suppress(OSError):
                for token in self._tokens:
                    os.utime(token, (0, 0))

    def _add_token(self) -> None:
        """One more file for links; whole before it has its name."""
        values = {
            "writer": self.id,
            "pid": self._pid,
            "started": _start_of(self._pid) or "",
            "boot": _boot(),
            "namespace": _namespace(),
            "host": socket.gethostname(),
            "lease_s": self.lease_s,
        }
        unfinished, token = self.folder / ".token-new", self.folder / f"token-{len(self._tokens)}"
        try:
            unfinished.write_bytes(json.dumps(values).encode())
            unfinished.rename(token)
        except OSError as error:
            raise unusable(token, error) from error
        self._tokens.append(token)
        self._links = 0

    def _keep_alive(self) -> None:
        while not self._over.wait(self.lease_s / _RENEWALS):
            try:
                self.renew()
            except (OSError, RunStoreError) as error:
                log.warning("the lease on %s could not be renewed: %s", self.folder, error)


def _no_link(path: Path, error: OSError) -> RunStoreError:
    if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
        return RunStoreError(
            f"{path} can't be made: the file system has no hard links ({error.strerror}), by which several writers "
            "agree; give the run a folder elsewhere, or let one process write it (without join)",
            path=str(path),
        )
    return unusable(path, error)


def _touched(path: Path) -> float:
    """The file's mtime, which is now."""
    os.utime(path)
    return path.stat().st_mtime


def _seconds() -> float:
    """Of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# -- processes of this host --------------------------------------------------------------------------------------------


def _is_dead_here(token: Token) -> bool:
    """Whether it was a process of this host that is not there any more. False for what can't be seen from here."""
    if (token.boot, token.namespace) != (_boot(), _namespace()) or not token.boot:
        return False
    return _start_of(token.pid) != token.started


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the boot; None without one, or for one that has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if words[0] in ("Z", "X") else words[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
