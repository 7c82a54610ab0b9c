"""`make test`: all its parts are run, and each that failed is named at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "test_parts.py"
MAKE = """#!/bin/sh
shift  # --no-print-directory
echo "making $1"
test "$1" != broken || exit 2
"""


def run(tmp_path: Path, *targets: str) -> tuple[int, str]:
    make = tmp_path / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    command = [sys.executable, str(TOOL), *targets]
    done = subprocess.run(command, env={**os.environ, "MAKE": str(make)}, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_part_that_fails_keeps_no_other_from_being_run(tmp_path: Path) -> None:
    status, said = run(tmp_path, "lint", "broken", "real")
    assert status == 1
    assert re.sub(r"\d+\.\d minutes", "… minutes", said).splitlines() == [
        *("making lint", "making broken", "making real", ""),
        "==> lint: passed after … minutes",
        "==> broken: FAILED with status 2 after … minutes",
        "==> real: passed after … minutes",
    ]


def test_all_parts_passed_is_status_0(tmp_path: Path) -> None:
    status, said = run(tmp_path, "lint", "fast")
    assert status == 0
    assert "FAILED" not in said
