"""What must be put right in a forked child: the one place that hooks into `os.fork`.

The child has only the thread that forked: every other one is missing, locks that they held are never released, and
inherited descriptors keep the parent's leases and file locks. Whatever has such state registers a function here. All of
them run in the child before `os.fork` returns there, in the order in which they were registered; one that fails is
logged, and the others still run.
"""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

log = logging.getLogger("managed_vllm")

_numbers = itertools.count()
_registered: dict[int, Callable[[], Any]] = {}
"""In order, each by a number of its own."""


def call_in_child(function: Callable[[], Any]) -> None:
    """Calls `function` in each child forked from now on.

    A bound method is held weakly: registering it does not keep its object alive.
    """
    number = next(_numbers)
    if isinstance(function, MethodType):
        # Bound now: when the interpreter ends, this module may be gone before the object.
        forget = partial(_registered.pop, number, None)
        reference = weakref.ref(function.__self__, lambda _: forget())
        _registered[number] = partial(_call, reference, function.__func__)
    else:
        _registered[number] = function


def _call(reference: weakref.ref[Any], method: Callable[[Any], Any]) -> None:
    owner = reference()
    if owner is not None:
        method(owner)


def _run_all() -> None:
    for function in list(_registered.values()):
        try:
            function()
        except Exception:
            log.exception("%r failed after a fork", function)


os.register_at_fork(after_in_child=_run_all)
