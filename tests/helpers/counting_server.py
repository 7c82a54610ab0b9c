"""The model of the counting world as a server's program, for `ManagedVLLM(command=…)`: `counting_server.py PORT`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from acting_server import MODEL, ActingServer, text_of
from counting_world import right

COMMAND = [sys.executable, str(Path(__file__).resolve()), "{port}"]
"""For `ManagedVLLM(MODEL, command=COMMAND)`."""


def answer(messages: list[dict[str, Any]]) -> str:
    """As `right`; and anything to the supervisor, which asks for a token."""
    return right(messages) if "left" in text_of(messages[-1]) else "."


if __name__ == "__main__":
    server = ActingServer(answer, model=MODEL, port=int(sys.argv[1]))
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.close()
