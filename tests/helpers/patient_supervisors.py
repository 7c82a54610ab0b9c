"""Supervisors that wait for their first user for as long as a test waits for anything.

For tests that count starts, or look at a supervisor to which nobody gets a lease: a user that a busy machine holds up
for longer than `FIRST_LEASE_S` would meet another supervisor than the one that it has started.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import HANG_S

import managed_vllm

_CODE = """
import sys
if any("managed_vllm.supervisor" in word for word in sys.orig_argv):
{more}
    from managed_vllm.instance import leases
    leases.FIRST_LEASE_S = {seconds}
"""


def are_made(folder: Path, patch: pytest.MonkeyPatch, *more: str) -> None:
    """Supervisors that are started from now on run what is in `folder`; `more`: lines of Python that they run first."""
    lines = "\n".join(f"    {line}" for line in more)
    (folder / "sitecustomize.py").write_text(_CODE.format(seconds=HANG_S, more=lines))
    root = str(Path(managed_vllm.__file__).parents[1])
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), root, *filter(None, [os.environ.get("PYTHONPATH")])]))
