"""dart-gui's own test script against the real vLLM; what it leaves is read by its own later scripts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from dart_gui import read_back, run_script, set_stage
from processes import own_state

from managed_vllm import ManagedVLLM
from managed_vllm.demo.random_vlm import make_random_vlm

CHECKOUT = os.environ.get("DART_GUI_CHECKOUT")
NAME = "ui_tars_1.5"

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        CHECKOUT is None, reason="DART_GUI_CHECKOUT is not set: the folder of github.com/Computer-use-agents/dart-gui"
    ),
]


def test_its_script_runs_against_vllm(tmp_path: Path) -> None:
    """The model knows nothing: most of its answers are no actions, and the episodes are evaluated there."""
    pytest.importorskip("omegaconf", reason="pip install omegaconf")
    pytest.importorskip("torchvision", exc_type=ImportError)
    checkout, stage = Path(CHECKOUT or ""), tmp_path / "stage"
    stage.mkdir()
    script = set_stage(checkout, stage, tasks=6)
    with (
        own_state(),
        ManagedVLLM(
            str(make_random_vlm(tmp_path / "model")),
            keep_alive=0,
            served_model_name=NAME,
            enforce_eager=True,
            max_model_len=8192,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=2**28,
            limit_mm_per_prompt={"image": 5},
        ) as llm,
    ):
        environ = {**os.environ, "STAND_IN_URL": llm.base_url, "STAND_IN_KEY": llm.api_key}
        said = run_script(script, environ)
    assert "Completed tasks: 6" in said
    found = json.loads(read_back(checkout, script, environ))
    assert len(found["analysed"]) == found["loaded"] == 12
    assert all(reward in (0.0, 1.0) for _, _, reward in found["analysed"])
