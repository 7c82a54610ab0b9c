"""`make test`: runs each of its parts, whatever became of the one before, and says at the end which of them failed.

    python tools/test_parts.py lint test-fast test-real      targets of the Makefile, in this order

The exit status is 0 if all of them passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """How a target of the Makefile ended; `status` is None if it was interrupted."""

    target: str
    status: int | None
    minutes: float

    def __str__(self) -> str:
        ended = {0: "passed", None: "interrupted"}.get(self.status, f"FAILED with status {self.status}")
        return f"==> {self.target}: {ended} after {self.minutes:.1f} minutes"


def run(targets: Sequence[str]) -> Iterator[Part]:
    """Runs them one after the other; ends early only if the user interrupts it."""
    for target in targets:
        started = time.monotonic()
        try:
            status = subprocess.run([os.environ.get("MAKE", "make"), "--no-print-directory", target]).returncode
        except KeyboardInterrupt:
            status = None
        yield Part(target, status, (time.monotonic() - started) / 60)
        if status is None:
            return


def main(targets: Sequence[str]) -> int:
    parts = list(run(targets))
    print("", *parts, sep="\n", flush=True)
    if parts and parts[-1].status is None:
        return 130
    return int(any(part.status != 0 for part in parts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
