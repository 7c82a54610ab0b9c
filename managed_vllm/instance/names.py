"""Names: which instance a `name=` stands for, as files below `names/` in the state directory.

What must hold:

1. A name stands for one live instance at most. Of two that ask for it with different arguments, the later one gets a
   `ConfigMismatchError`, unless nobody uses the earlier one's server any more and nobody pinned it: that server gives
   way, and the later one waits until it is gone.
2. A name is claimed before a server is started, so that others learn of it in time, and again once there is a lease,
   for the last server of the same key may have dropped its names meanwhile.
3. A start that comes to nothing leaves no name behind. A name that a killed process has left stands for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from managed_vllm.errors import ConfigError, ConfigMismatchError, StateDirectoryError, SupervisorError
from managed_vllm.instance import directory
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.lock_holders import stopped_holder

Differences = Callable[[Mapping[str, Any]], dict[str, tuple[Any, Any]]]
"""From the record of a live instance: how it differs from what is asked for."""

LOCK_S = 10.0
_TRIES = 1000
_GONE_S = 60.0
"""Seconds in which a server that gives way must be gone: `stop_grace` and the release of GPU memory fit in."""


def check_name(name: object) -> None:
    """Raises `ConfigError` unless the name can stand as a file name on every system."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ConfigError(f"name={name!r} must be 1 to 63 letters, digits, '.', '_' or '-'", field="name")


def named(home: Path, name: str) -> Instance | None:
    """The instance that last had the name, alive or not."""
    try:
        data = json.loads(_path(home, name).read_text())
        return Instance(home, str(data["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def claimed(
    home: Path,
    name: str | None,
    instance: Instance,
    differences: Differences,
    deadline: float | None = None,
    check_wanted: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], None]]:
    """Makes `name` stand for the instance while it is attached to; gives what claims it again.

    The claim stays if all goes well, and else only if it was there before. Without a name, nothing happens. Raises
    `ConfigMismatchError` if a live instance that is used has the name, `TimeoutError` at the `deadline`, and what
    `check_wanted` raises once the name is not wanted any more.
    """
    if name is None:
        yield lambda: None
        return
    was_ours = named(home, name) == instance
    try:
        claim(home, name, instance, differences, deadline, check_wanted)
        yield lambda: claim(home, name, instance, differences, deadline, check_wanted)
    except BaseException:
        if not (was_ours and directory.is_alive(instance)):
            _drop(home, lambda path: path == _path(home, name) and named(home, name) == instance)
        raise


def claim(
    home: Path,
    name: str,
    instance: Instance,
    differences: Differences,
    deadline: float | None = None,
    check_wanted: Callable[[], None] = lambda: None,
) -> None:
    """As `claimed`, for good."""
    check_name(name)
    until = time.monotonic() + _GONE_S if deadline is None else deadline
    while named(home, name) != instance:
        holder = take(home, name, instance)
        if holder is None:
            return
        check_wanted()
        _have_it_give_way(holder, name, differences, until, check_wanted)
        if time.monotonic() > until:
            if deadline is not None:
                raise TimeoutError
            raise SupervisorError(
                f"the last server named {name!r} is not gone after {_GONE_S:g} s; its log is {holder.supervisor_log}",
                instance=holder.id,
            )


def take(home: Path, name: str, instance: Instance) -> Instance | None:
    """Makes the name stand for the instance, unless another live one has it: returns that one. Waits for nobody."""
    with _locked(home):
        holder = named(home, name)
        if holder is not None and holder != instance and directory.is_alive(holder):
            return holder
        directory.write_atomically(_path(home, name), json.dumps({"id": instance.id}))
        return None


def _have_it_give_way(
    holder: Instance, name: str, differences: Differences, until: float, check_wanted: Callable[[], None]
) -> None:
    """Waits until the name's holder, which nobody uses, is gone, or the time is over."""
    try:
        channel = Channel.connect(holder.socket_path)
    except OSError:  # it does not listen yet, or not any more
        time.sleep(0.02)
        return
    try:
        reply = channel.request("give_way")
        if not reply["ok"]:
            raise ConfigMismatchError(
                f"the server named {name!r} is running with other arguments{_used_by(reply)}; use its arguments, "
                f"another name, or end it first: managed-vllm down {name}",
                differences=differences(holder.read_record() or {}),
                instance=holder.id,
            )

        def unwanted(_: object) -> bool:
            check_wanted()
            return False

        channel.wait_until(unwanted, max(0.0, until - time.monotonic()))
    except (ConnectionError, TimeoutError):
        pass  # it has gone, or does not answer: the caller knows how long that may take
    finally:
        channel.close()


def _used_by(reply: Mapping[str, Any]) -> str:
    users = [user["pid"] for user in reply.get("status", {}).get("extra", {}).get("users", ())]
    if not users:
        return ""
    known = ["another handle of this process" if pid == os.getpid() else f"pid {pid}" for pid in dict.fromkeys(users)]
    return f", used by {', '.join(known[:5])}"


def drop_names(home: Path, instance_id: str) -> None:
    """Forgets the names of an instance that is gone; removes the folder of names when it is empty."""

    def stale(path: Path) -> bool:
        holder = named(home, path.stem)
        return holder is None or holder.id == instance_id or not holder.folder.exists()

    _drop(home, stale)


def _drop(home: Path, wrong: Callable[[Path], bool]) -> None:
    folder = home / "names"
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError, filelock.Timeout), _lock(home, timeout=2):
        for path in folder.glob("*.json"):
            if wrong(path):
                path.unlink(missing_ok=True)
        if not list(folder.glob("*.json")):
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def _path(home: Path, name: str) -> Path:
    return home / "names" / f"{name}.json"


def _lock(home: Path, timeout: float) -> filelock.BaseFileLock:
    return filelock.FileLock(home / "names" / ".lock", mode=0o600, timeout=timeout)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Holds the lock of the names, which nobody has for longer than it takes to write a file."""
    folder = home / "names"
    with directory.state_errors(folder), _acquired(home):
        yield


def _acquired(home: Path) -> contextlib.AbstractContextManager[object]:
    folder = home / "names"
    for _ in range(_TRIES):
        # Whoever drops the last name removes the folder, between any two of these calls.
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                return _lock(home, LOCK_S).acquire()
            except filelock.Timeout:
                break
    holder = stopped_holder(folder / ".lock")
    what = f"pid {holder}, which is stopped: continue it (fg, kill -CONT) or end it" if holder else "a process"
    raise StateDirectoryError(f"{folder / '.lock'} has been held for {LOCK_S:g} s by {what}", path=str(folder))
