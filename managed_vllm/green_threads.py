"""Threads that are none: gevent and eventlet put their own in place of the standard library's.

What we do in threads (reading the lease's channel, asyncio's event loop) never gets its turn under them, or holds up
all others. So a patched program gets an error that says so, in place of a call that hangs.
"""

from __future__ import annotations

import sys

from managed_vllm.errors import ConfigError


def refuse() -> None:
    """Raises `ConfigError` in a program whose threads were patched by gevent (`monkey.patch_all`) or eventlet."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("threading"):
        _raise("gevent")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        _raise("eventlet")


def _raise(library: str) -> None:
    raise ConfigError(
        f"{library} has replaced the threads of this program, under which managed_vllm can't work. Use it in a process "
        "of its own: start the server with `managed-vllm up` and ask it over HTTP, or run what needs it as a subprocess"
    )
