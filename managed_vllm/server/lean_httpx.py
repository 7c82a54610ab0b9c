"""httpx for the supervisor, without its command-line client, which it imports wherever click is installed.

With that come click, rich and pygments: a third of the CPU time of a supervisor's imports, at each start of a server.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _missing(name: str) -> Iterator[None]:
    """As if that module were not installed; unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with _missing("click"):
    import httpx as httpx
