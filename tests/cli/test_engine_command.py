"""`managed-vllm engine`: what it asks for stays, without a lease of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import standin
from demo_checkpoints import copy_of_demo
from processes import INSTANT

from managed_vllm import ManagedVLLM
from managed_vllm.cli import main
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import UnsupportedMethodError


def test_the_engine_is_controlled_from_the_shell(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lora").mkdir()
    monkeypatch.chdir(tmp_path)

    def said(*words: str) -> str:
        assert main(["engine", *words]) == 0, capsys.readouterr()
        return capsys.readouterr().out

    with ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), keep_alive=INSTANT) as llm:
        assert "as it was started" in said()
        said("load-lora", "mine", "lora")
        assert said("loras") == f"mine  {tmp_path / 'lora'}\n"
        said("--server", llm.id or "", "pause", "--mode", "abort")
        assert said().splitlines() == [f"lora      mine  {tmp_path / 'lora'}", "paused    abort"]
        assert main(["status"]) == 0
        assert "ready, paused" in capsys.readouterr().out
        said("resume")
        said("unload-lora", "mine")
        assert "checksum" in said("weights")
        said("sleep", "--level", "1")
        assert llm.status().engine == EngineState(sleep_level=1)
        said("wake")
        assert main(["engine", "load-lora", "mine", "none"]) == 1
        assert "No adapter found" in capsys.readouterr().err
        assert llm.status().engine == EngineState()


def test_weights_are_updated_from_the_shell_or_all_that_speaks_against_it_is_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of_demo(tmp_path / "step-1")
    (tmp_path / "step-1" / "standin.json").write_text('{"name": "step-1"}')
    monkeypatch.chdir(tmp_path)
    with ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), keep_alive=INSTANT) as llm:
        words = ["engine", "update-weights", "./step-1", "--version", "v1", "--on-update", "continue"]
        assert main(words) == 0, capsys.readouterr()
        assert capsys.readouterr().out.splitlines()[:2] == ["version   v1", f"path      {tmp_path / 'step-1'}"]
        assert llm.engine.weights().version == "v1"
        assert main(["engine", "update-weights", "./step-1", "--expect", "another"]) == 1
        assert "expected is another" in capsys.readouterr().err
        assert main(["engine", "update-weights", "./step-2"]) == 1
        assert "no such folder" in capsys.readouterr().err
        assert llm.engine.weights().version == "v1"


def test_sleep_and_wake_up_as_vllm_llm_has_them(home: Path) -> None:
    with ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(), keep_alive=INSTANT) as llm:
        llm.sleep(level=1)
        assert llm.engine.is_sleeping()
        llm.wake_up()
        assert not llm.engine.is_sleeping()
        with pytest.raises(UnsupportedMethodError, match="ManagedVLLM has it"):
            llm.client.sleep  # type: ignore[attr-defined]  # noqa: B018
