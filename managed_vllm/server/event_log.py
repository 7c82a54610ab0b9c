"""`events.jsonl`: one line for each change of a server's state, in the order in which they happened."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT_BYTES = 1 << 20
"""Size from which the file becomes `events.jsonl.1`, in place of an older one: some thousand events."""


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Adds one event. What can't be written, on a full disk, say, is lost: the server does not suffer for it."""
    with contextlib.suppress(OSError):
        with open(path, "a") as events:
            events.write(json.dumps(event) + "\n")
            size = events.tell()
        if size >= KEPT_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
