"""dart-gui's own test script, its imports changed and nothing else; what it leaves is read by its own later scripts.

DART_GUI_CHECKOUT is the folder of github.com/Computer-use-agents/dart-gui; nothing of it is carried here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from acting_server import acting
from dart_gui import read_back, run_script, set_stage

CHECKOUT = os.environ.get("DART_GUI_CHECKOUT")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHECKOUT is None, reason="DART_GUI_CHECKOUT is not set: the folder of github.com/Computer-use-agents/dart-gui"
    ),
]


def answer(messages: list[dict[str, Any]]) -> str:
    said = sum(message["role"] == "assistant" for message in messages)
    return "Thought: t\nAction: click(start_box='(100,100)')" if said < 3 else "Thought: d\nAction: finished()"


def test_its_script_runs_and_its_later_scripts_read_what_it_leaves(tmp_path: Path) -> None:
    pytest.importorskip("omegaconf", reason="pip install omegaconf")
    checkout = Path(CHECKOUT or "")
    script = set_stage(checkout, tmp_path)
    with acting(answer, model="ui_tars_1.5") as server:
        environ = {**os.environ, "STAND_IN_URL": server.url}
        said = run_script(script, environ)
    tasks = sum(map(len, json.loads((tmp_path / "evaluation_examples/test_simple_task_v3.json").read_text()).values()))
    assert f"Total tasks processed: {tasks}" in said
    assert f"Completed tasks: {tasks}" in said
    assert "Streaming task scheduler test completed successfully!" in said
    found = json.loads(read_back(checkout, script, environ))
    assert len(found["analysed"]) == found["loaded"] == 2 * tasks
    assert all((steps, reward) == (4, 1.0) for _, steps, reward in found["analysed"])
    assert sum(found["filtered"].values()) == tasks
    assert found["split"] == 2 * tasks * 3
