"""A supervisor's hold on its instance's folder, which others may remove: tmp cleaners, a logout, `rm -rf`.

The lock is what makes an instance alive, so a folder that was removed means that another supervisor may come up. What
must hold: one supervisor an instance. The one whose folder is gone makes it anew and takes the lock in it, or finds
that another one has it, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable

from managed_vllm.errors import StateDirectoryError
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance

log = logging.getLogger("managed_vllm.supervisor")

_LOOK_S = 1.0
"""Seconds between two looks whether the folder is still there."""

_REFRESH_S = 3600.0
"""Seconds between two touches of our files: tmp cleaners remove what is old, commonly after ten days."""


class FolderHold:
    """Holds `supervisor.lock` of an instance by its descriptor."""

    def __init__(self, instance: Instance, lock: int) -> None:
        """`lock` is the descriptor of the locked file."""
        self._instance = instance
        self._lock = lock
        self._refreshed = time.monotonic()
        self._token = directory.token_of(instance.home)

    def release(self) -> None:
        """Gives the lock back: a child of whoever started us may have a copy of the descriptor."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    @property
    def is_intact(self) -> bool:
        """True if the lock file at the instance's path is the one that we hold."""
        try:
            found = (self._instance.folder / directory.SUPERVISOR_LOCK).lstat()
        except OSError:
            return False
        held = os.fstat(self._lock)
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    async def keep(self, on_renewed: Callable[[], Awaitable[None]], on_lost: Callable[[], None]) -> None:
        """Makes the folder anew whenever somebody removes it, until another supervisor was faster: `on_lost`."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.is_intact:
                await asyncio.to_thread(self.refresh)
                continue
            log.warning("%s was removed: it is made anew", self._instance.folder)
            try:
                if not self.renew():
                    on_lost()
                    return
                await on_renewed()
            except OSError as error:
                log.warning("it can't be made yet: %s", error)

    def refresh(self) -> None:
        """Keeps tmp cleaners away, now and then."""
        if time.monotonic() - self._refreshed > _REFRESH_S:
            self._refreshed = time.monotonic()
            for path in (self._instance.home, self._instance.folder, *self._instance.folder.iterdir()):
                with contextlib.suppress(OSError):
                    os.utime(path, follow_symlinks=False)

    def regain(self) -> bool:
        """Whether the folder is ours, or one that was made since for our server to run in: then it is ours again."""
        with contextlib.suppress(StateDirectoryError):
            return self.is_intact or (self._instance.folder.exists() and self.renew())
        return False

    def renew(self) -> bool:
        """Makes the folder anew and takes its lock. False: another supervisor has it. Raises `StateDirectoryError`."""
        home = self._instance.home
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700, parents=True)
        directory.check_private(home)
        directory.restore_token(home, self._token)
        self._instance.create()
        try:
            lock = self._instance.take_supervisor_lock()
        except OSError as error:
            raise StateDirectoryError(f"can't lock {self._instance.folder}: {error}", path=str(home)) from error
        if lock is None:
            return False
        self._instance.keep_lock(lock)
        os.close(self._lock)
        self._lock = lock
        return True
