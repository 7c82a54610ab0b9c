"""Ports for servers that a test starts, some of them again and again."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_LOWEST, _HIGHEST = 10_000, 32_767


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens.

    It is none of those that the kernel gives to connections: one that was just free would now and then be somebody's by
    the time a server wants it, or wants it again.
    """
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    highest = max(_LOWEST + 1000, min(_HIGHEST, given - 1))
    while True:
        port = random.SystemRandom().randrange(_LOWEST, highest)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """A URL of 127.0.0.1 that refuses connections: the port is held, and nobody listens on it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
