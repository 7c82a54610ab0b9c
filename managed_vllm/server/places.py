"""Places: which devices are taken, agreed upon by the supervisors of all users that share one directory.

A place is a device, and a file of its name; who holds that file's `flock` has the device. What must hold:

1. No place is held by two. A server takes all the places that it needs or none, so nobody waits for another while it
   holds something: there is no deadlock.
2. Nobody starves: a supervisor that has to wait stands in a line, in the order of arrival. It leaves alone whatever one
   before it may want, so one that needs many is not passed by those that need few. Places that none before it may have
   it takes at once.
3. The kernel ends both, holding and waiting, with the process: a killed supervisor is neither waited for nor counted.
   The server inherits the descriptors, so that a place is free when the supervisor *and* its server are gone, and not
   in the moment between. Who gives a place back unlocks it, whatever else may have inherited its descriptor.
4. Nothing is believed that another user has written. An `flock` can't be forged; the order is that of the times at
   which the tickets were changed, which the kernel sets; an owner is what the kernel says. The rest (instance, pid,
   since when) is only shown. A user can do no more harm than by holding places or standing in the line for good.

The directory is sticky where others may write to it, so that nobody removes another's files; no link in it is followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from managed_vllm.errors import StateDirectoryError

FOLDER_VARIABLE = "MANAGED_VLLM_DEVICES_DIR"
USUAL_FOLDER = "/tmp/managed-vllm-devices"

_NOTE_BYTES = 1 << 20
_TICKET = re.compile(r"line-[0-9a-f]{16}")
_OPEN_TO_ALL_S = 2.0
"""Seconds that another user may take between making the directory and opening it to all."""


@dataclass(frozen=True)
class Occupant:
    """Who holds a place or waits for some. The kernel vouches for `uid`; the rest is what that user's process says.

    `used_at` is when its server was last used, if it gives way to others (`managed_vllm.server.turns`), and `in_use`
    whether it still is.
    """

    uid: int
    instance: str
    pid: int
    since: float
    used_at: float | None = None
    in_use: bool = False

    def __str__(self) -> str:
        return f"instance {self.instance} of user {_user(self.uid)}, pid {self.pid}, since {_clock(self.since)}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _clock(since: float) -> str:
    """The local time of day; with the date if that is another day."""
    then, now = time.localtime(since), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%d %b %H:%M", then)


def _note_name(place: str) -> str:
    """One for each user, whose file it is: nobody can write another's."""
    return f"{place}.holder-{os.getuid()}"


@dataclass(frozen=True)
class Ticket:
    """One that stands in the line: for how many of which places, and since when by the kernel's word."""

    order: tuple[int, str]
    places: frozenset[str]
    wanted: int
    occupant: Occupant


class PlacesFolder:
    """The directory, open. `close` it; what was taken stays taken."""

    def __init__(self, path: Path) -> None:
        """Makes the directory if need be, open to all users. Raises `StateDirectoryError`."""
        self.path = path
        self._folder = _opened_folder(path)
        with contextlib.suppress(OSError):  # systemd-tmpfiles leaves a directory alone that somebody has locked
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        os.close(self._folder)

    # -- places --------------------------------------------------------------------------------------------------------

    def take(self, place: str) -> int | None:
        """Takes a place and returns its descriptor; None if somebody holds it. Raises `StateDirectoryError`."""
        return self._locked(place, fcntl.LOCK_EX)

    def is_held(self, place: str) -> bool:
        """Whether somebody holds a place. Looking holds it for a moment, which whoever wants it then tries again."""
        descriptor = self._locked(place, fcntl.LOCK_SH)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def note(self, place: str, occupant: Occupant) -> None:
        """Says who holds a place, for those who wait to read."""
        with contextlib.suppress(OSError):  # a full disk, or somebody has put another file there: it is only shown
            self._put(_note_name(place), json.dumps(asdict(occupant)))

    def forget(self, place: str) -> None:
        """Takes the note away, when the place is given back."""
        with contextlib.suppress(OSError):
            os.unlink(_note_name(place), dir_fd=self._folder)

    def holder(self, place: str) -> Occupant | None:
        """Who holds a place, as the newest note of it says; None if there is none."""
        newest: tuple[float, Occupant] | None = None
        for name in self._listing():
            if re.fullmatch(re.escape(place) + r"\.holder-\d+", name) and (read := self._read(name)) is not None:
                text, status = read
                occupant = _occupant(text, status.st_uid)
                if occupant is not None and (newest is None or status.st_mtime > newest[0]):
                    newest = status.st_mtime, occupant
        return None if newest is None else newest[1]

    def _locked(self, place: str, how: int) -> int | None:
        name = f"{place}.place"
        for _ in range(100):
            descriptor = self._opened_place(name)
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), self._stat(name)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(descriptor)
                raise self._unusable(name, f"it can't be locked ({error.strerror}): take a local directory") from error
            os.close(descriptor)  # somebody has removed the file meanwhile
        raise self._unusable(name, "somebody keeps removing it")

    def _opened_place(self, name: str) -> int:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for _ in range(100):
            try:
                descriptor = os.open(name, flags, dir_fd=self._folder)
            except FileNotFoundError:
                self._put(name, "", replace=False)
                continue
            except OSError as error:
                raise self._unusable(name, str(error.strerror)) from error
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
            raise self._unusable(name, "it is no regular file")
        raise self._unusable(name, "somebody keeps removing it")

    def _unusable(self, name: str, why: str) -> StateDirectoryError:
        return StateDirectoryError(f"{self.path / name} can't be used: {why}; see to it, or {_ELSEWHERE}", path=name)

    # -- the line ------------------------------------------------------------------------------------------------------

    def join(self, places: Collection[str], wanted: int, occupant: Occupant) -> Waiting:
        """Takes a ticket for `wanted` of these places, at the end of the line. Raises `StateDirectoryError`."""
        self._remove_dead_tickets()
        name = f"line-{secrets.token_hex(8)}"
        text = json.dumps({**asdict(occupant), "places": sorted(places), "wanted": wanted})
        descriptor = self._put(name, text, lock=True)
        assert descriptor is not None
        return Waiting(self, name, descriptor)

    def line(self) -> list[Ticket]:
        """All that wait, the first to come first."""
        return sorted(self._tickets(), key=lambda ticket: ticket.order)

    def _tickets(self) -> Iterator[Ticket]:
        for name in filter(_TICKET.fullmatch, self._listing()):
            read = self._read(name, only_if_locked=True)
            if read is None:
                continue
            text, status = read
            occupant, asked = _occupant(text, status.st_uid), _object(text)
            places, wanted = asked.get("places"), asked.get("wanted")
            if occupant is not None and isinstance(places, list) and isinstance(wanted, int):
                yield Ticket((status.st_ctime_ns, name), frozenset(map(str, places)), wanted, occupant)

    def _remove_dead_tickets(self) -> None:
        """Those of our user's processes that were killed while they waited."""
        for name in filter(_TICKET.fullmatch, self._listing()):
            with contextlib.suppress(OSError):
                if self._stat(name).st_uid == os.getuid() and self._read(name, only_if_locked=True) is None:
                    os.unlink(name, dir_fd=self._folder)

    def order_of(self, name: str, descriptor: int) -> tuple[int, str]:
        """The order of our own ticket."""
        return os.fstat(descriptor).st_ctime_ns, name

    def remove(self, name: str) -> None:
        """Removes a file of ours."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _listing(self) -> list[str]:
        return os.listdir(self._folder)

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._folder, follow_symlinks=False)

    def _put(self, name: str, text: str, *, replace: bool = True, lock: bool = False) -> int | None:
        """Makes a file that all may read, whole or not at all; with `lock` it is locked before it can be seen.

        Returns the locked descriptor. Raises `StateDirectoryError`.
        """
        temporary = f".new-{secrets.token_hex(8)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=self._folder)
            try:
                os.write(descriptor, text.encode())
                os.fchmod(descriptor, 0o644)
                if lock:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if replace:
                    os.rename(temporary, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                else:
                    with contextlib.suppress(FileExistsError):
                        os.link(temporary, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                    os.unlink(temporary, dir_fd=self._folder)
            except BaseException:
                os.close(descriptor)
                self.remove(temporary)
                raise
        except OSError as error:
            raise self._unusable(name, str(error.strerror)) from error
        if lock:
            return descriptor
        os.close(descriptor)
        return None

    def _read(self, name: str, *, only_if_locked: bool = False) -> tuple[str, os.stat_result] | None:
        """The text of a small regular file, and its owner and times; None if it is none, or its user is dead."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=self._folder)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _NOTE_BYTES:
                return None
            if only_if_locked and not _is_locked(descriptor):
                return None
            with contextlib.suppress(OSError, ValueError):
                return file.read(_NOTE_BYTES).decode(), status
        return None


class Waiting:
    """A ticket in the line, until `leave`, or the end of this process."""

    def __init__(self, folder: PlacesFolder, name: str, descriptor: int) -> None:
        self._folder = folder
        self._name = name
        self._descriptor = descriptor
        self._order = folder.order_of(name, descriptor)

    def before(self, places: Collection[str]) -> list[Ticket]:
        """Those that came earlier, and want some of these places."""
        earlier = [ticket for ticket in self._folder.line() if ticket.order < self._order]
        return [ticket for ticket in earlier if not ticket.places.isdisjoint(places)]

    def take(self, places: Sequence[str], wanted: int, is_free: Callable[[str], bool]) -> dict[str, int]:
        """Takes as many places as are `wanted`, the first of `places` first, and tells their descriptors; or none.

        None that one before us in the line may want, and none that is not free in spite of its lock.
        """
        reserved = frozenset[str]().union(*(ticket.places for ticket in self.before(places)))
        taken: dict[str, int] = {}
        try:
            for place in places:
                if len(taken) == wanted:
                    break
                if place not in reserved and (descriptor := self._folder.take(place)) is not None:
                    taken[place] = descriptor
                    if not is_free(place):
                        give_back({place: taken.pop(place)})
        except BaseException:
            give_back(taken)
            raise
        if len(taken) == wanted:
            return taken
        give_back(taken)
        return {}

    def leave(self) -> None:
        """Leaves the line; safe to call again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._folder.remove(self._name)
            os.close(descriptor)


def give_back(taken: dict[str, int]) -> None:
    """Unlocks places and closes their descriptors, whatever process has inherited them."""
    while taken:
        _, descriptor = taken.popitem()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


# -- the directory -----------------------------------------------------------------------------------------------------

_ELSEWHERE = f"set {FOLDER_VARIABLE} to another directory, the same for all who share these devices"


def _opened_folder(path: Path) -> int:
    deadline = time.monotonic() + _OPEN_TO_ALL_S
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
                path.chmod(0o1777)  # the process's umask would have its say above
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.ENOENT) and path.parent.is_dir() and time.monotonic() < deadline:
                time.sleep(0.02)  # another user has just made it, or removed it
                continue
            raise StateDirectoryError(f"{path} can't be used: {error.strerror}; {_ELSEWHERE}", path=str(path)) from None
        if _is_writable(folder) or time.monotonic() > deadline:
            break
        os.close(folder)
        time.sleep(0.02)
    if why := _unsafe(os.fstat(folder), writable=_is_writable(folder)):
        os.close(folder)
        raise StateDirectoryError(f"{path} can't be used: {why}; or {_ELSEWHERE}", path=str(path))
    return folder


def _is_writable(folder: int) -> bool:
    return os.access(".", os.W_OK | os.X_OK, dir_fd=folder)


def _unsafe(status: os.stat_result, *, writable: bool) -> str:
    if not writable:
        return f"we may not write to it (it belongs to user {_user(status.st_uid)}): chmod 1777 it"
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        return "others may write to it, and would remove our files: chmod +t it"
    return ""


# -- what others have written ------------------------------------------------------------------------------------------


def _is_locked(descriptor: int) -> bool:
    """Whether the one that made the file lives. Who finds that it does not holds the lock until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def _occupant(text: str, uid: int) -> Occupant | None:
    found = _object(text)
    instance, pid, since = found.get("instance"), found.get("pid"), found.get("since")
    if not isinstance(instance, str) or not re.fullmatch(r"[\w.-]{1,64}", instance, re.ASCII):
        return None
    if not isinstance(pid, int) or not isinstance(since, int | float) or not 0 <= since < 1e11:
        return None
    used_at = found.get("used_at")
    used = float(used_at) if isinstance(used_at, int | float) and 0 <= used_at < 1e11 else None
    return Occupant(
        uid=uid, instance=instance, pid=pid, since=float(since), used_at=used, in_use=found.get("in_use") is True
    )
