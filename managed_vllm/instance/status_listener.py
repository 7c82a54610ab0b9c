"""Calling a user's function at each change of a server's state."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable

from managed_vllm import forks
from managed_vllm.status import ServerState, ServerStatus

log = logging.getLogger("managed_vllm")

_Statuses = queue.SimpleQueue[ServerStatus | None]


class StatusListener:
    """Calls a function for each new state or epoch, of a replica, too, one after the other, in a thread of its own.

    Not in the thread that reads the channel: the function may use the handle, and so wait for news from that thread.
    What the function raises is logged, `SystemExit` included. The thread starts with the first call and ends with the
    listener: in between it holds neither that nor the function, which may be a method of whoever owns the handle.
    """

    def __init__(self, function: Callable[[ServerStatus], None]) -> None:
        self._function = function
        self._begin()
        forks.call_in_child(self._begin)

    def _begin(self) -> None:
        self._last: tuple[tuple[ServerState, int], ...] = ()
        self._running = False
        self._statuses: _Statuses = queue.SimpleQueue()
        weakref.finalize(self, self._statuses.put, None).atexit = False

    def put(self, status: ServerStatus) -> None:
        """Takes the newest status; only called by the one thread that reads the channel."""
        new = tuple((one.state, one.epoch) for one in (status, *status.replicas))
        if new == self._last:
            return
        self._last = new
        self._statuses.put(status)
        if not self._running:
            self._running = True
            arguments = self._statuses, weakref.ref(self)
            threading.Thread(target=_call_for_each, args=arguments, name="managed-vllm-status", daemon=True).start()

    def call(self, status: ServerStatus) -> None:
        """Calls the function now."""
        try:
            self._function(status)
        except BaseException:
            log.exception("on_status failed")


def _call_for_each(statuses: _Statuses, reference: weakref.ref[StatusListener]) -> None:
    while (status := statuses.get()) is not None:
        listener = reference()
        if listener is not None:
            listener.call(status)
        del listener, status
