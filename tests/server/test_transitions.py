"""The states of a server: the table that the supervisor asserts, and the page that explains it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import standin

from managed_vllm import ManagedVLLM, ServerState
from managed_vllm.errors import ManagedVLLMError
from managed_vllm.server.life import TRANSITIONS, IllegalTransitionError

ROOT = Path(__file__).resolve().parents[2]
OVER = {ServerState.GONE}


def test_the_page_has_every_transition_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## States")[2].partition("\n## ")[0]
    said = set()
    for row in re.findall(r"^\| (`.*?) \| `(\w+)` \|", section, re.MULTILINE):
        said |= {(ServerState(old), ServerState(row[1])) for old in re.findall(r"`(\w+)`", row[0])}
    assert said == {(old, new) for old, following in TRANSITIONS.items() for new in following}


def test_every_state_is_reached_and_leads_to_an_end() -> None:
    reached = {ServerState.STARTING}.union(*TRANSITIONS.values())
    assert reached == set(ServerState)
    assert {state for state in TRANSITIONS if not TRANSITIONS[state]} == OVER
    for state in reached - OVER - {ServerState.FAILED}:
        assert TRANSITIONS[state] & {ServerState.FAILED, ServerState.STOPPING, ServerState.GONE}


def test_an_end_is_not_left_again() -> None:
    assert TRANSITIONS[ServerState.STOPPING] == {ServerState.GONE}
    assert TRANSITIONS[ServerState.FAILED] == {ServerState.RESTARTING}  # of one replica of several
    error = IllegalTransitionError(ServerState.STOPPING, ServerState.READY)
    assert (error.old, error.new) == (ServerState.STOPPING, ServerState.READY)
    assert str(error) == "ready can't follow stopping"


def test_a_transition_that_the_table_lacks_fails_the_server_and_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('managed_vllm.supervisor' in word for word in sys.orig_argv):\n"
        "    from managed_vllm import status; from managed_vllm.server import life\n"
        "    old = status.ServerState.STARTING\n"
        "    life.TRANSITIONS[old] = life.TRANSITIONS[old] - {status.ServerState.READY}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    llm = ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), keep_alive=0)
    with pytest.raises(ManagedVLLMError, match=r"IllegalTransitionError: ready can't follow starting"):
        llm.start()
    llm.close()
