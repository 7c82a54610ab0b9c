"""`managed-vllm doctor`: planted faults are found, each with its remedy; `--fix` touches only what is ours."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import INSTANT, eventually

from managed_vllm import ManagedVLLM
from managed_vllm.config import installed_vllm
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup, directory

DOCTOR = [sys.executable, "-m", "managed_vllm.cli", "doctor", "--offline"]


def doctor(
    *words: str, before: str = "", env: dict[str, str] | None = None, python: str | None = "missing"
) -> tuple[int, list[dict[str, Any]]]:
    """Runs it after some words of a shell. Without vLLM, unless that is what is looked at: importing it takes long."""
    command = [*DOCTOR, "--json", *words, *(["--python", python] if python else [])]
    done = subprocess.run(
        ["sh", "-c", f"{before} exec {shlex.join(command)}"],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def found(topic: str, findings: list[dict[str, Any]], level: str | None = None) -> list[dict[str, Any]]:
    return [each for each in findings if each["topic"] == topic and level in (None, each["level"])]


@pytest.fixture
def vllm_without_gpu(tmp_path: Path) -> str:
    """An interpreter whose vLLM fails as one for GPUs does on a machine without."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    (site,) = tmp_path.glob("lib/python3*/site-packages")
    (site / "vllm-0.40.0.dist-info").mkdir()
    (site / "vllm-0.40.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.40.0\n")
    (site / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    (site / "vllm.py").write_text("")
    return str(python)


@pytest.mark.skipif(installed_vllm() == "vllm missing", reason="without vLLM a machine is not well")
def test_a_machine_that_is_well_has_no_errors(home: Path) -> None:
    code, findings = doctor(python=None)
    assert code == 0, found
    assert [each for each in findings if each["level"] == "error"] == []
    assert found("interpreter", findings, "ok")
    assert found("state directory", findings, "ok")
    assert found("vLLM", findings, "ok")


def test_each_variable_that_leads_elsewhere_is_named(home: Path) -> None:
    _, findings = doctor(
        env={
            "VLLM_SERVER_URL": "http://me:secret@elsewhere:8000",
            "VLLM_PORT": "tcp://10.0.0.7:8000",
            "http_proxy": "http://proxy:3128",
            "no_proxy": "",
            "NO_PROXY": "",
            "HF_HUB_OFFLINE": "1",
        }
    )
    texts = [each["text"] for each in found("variables", findings)]
    assert any(text.startswith("VLLM_SERVER_URL=") and "secret" not in text for text in texts)
    assert any("VLLM_PORT" in text and "Kubernetes" in text for text in texts)
    assert any("HF_HUB_OFFLINE" in text for text in texts)
    (proxy,) = found("proxies", findings)
    assert "no_proxy=127.0.0.1" in proxy["remedy"]


def test_a_port_that_is_no_number_is_an_error(home: Path) -> None:
    code, findings = doctor(env={"VLLM_PORT": "eight"})
    assert code == 1
    (error,) = found("variables", findings, "error")
    assert error["remedy"] == "unset VLLM_PORT"


def test_few_open_files_are_an_error(home: Path) -> None:
    code, findings = doctor(before="ulimit -n 256;")
    assert code == 1
    assert found("open files", findings, "error")
    _, findings = doctor(before="ulimit -Sn 512;")
    assert found("open files", findings, "warning")


def test_a_state_directory_that_is_open_to_others_is_an_error(home: Path) -> None:
    directory.state_home().chmod(0o755)
    code, findings = doctor()
    assert code == 1
    assert "chmod 700" in found("state directory", findings, "error")[0]["text"]


def test_an_interpreter_without_vllm_is_an_error(home: Path) -> None:
    code, findings = doctor()
    assert code == 1
    assert "pip install vllm" in found("vLLM", findings, "error")[0]["remedy"]


def test_a_vllm_that_can_not_be_imported_is_diagnosed(home: Path, vllm_without_gpu: str) -> None:
    code, findings = doctor(python=vllm_without_gpu)
    assert code == 1
    assert "known are 0.20 to 0.33" in found("vLLM", findings, "warning")[0]["text"]
    (error,) = found("vLLM", findings, "error")
    assert "libcudart.so.12" in error["text"]
    assert error["remedy"]


def test_what_a_killed_supervisor_left_is_found_and_fixed_and_a_live_server_is_not_touched(home: Path) -> None:
    command = standin.command()
    dead = ManagedVLLM("dead", command=command, env=standin.orders(tree=True), keep_alive=INSTANT)
    with dead, ManagedVLLM("live", command=command, keep_alive=INSTANT) as live:
        assert dead.id is not None
        status = dead.status()
        stray = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"],
            env={**os.environ, **_marker_of(directory.Instance(home, dead.id))},
        )
        os.kill(status.supervisor_pid or 0, signal.SIGKILL)
        dead.close()
        eventually(lambda: not psutil.pid_exists(status.supervisor_pid or 0), "killed")
        _, findings = doctor()
        assert any(dead.id in each["text"] for each in found("dead servers", findings, "warning"))
        assert any(f"pid {stray.pid} " in each["text"] for each in found("strays", findings, "warning"))
        _, findings = doctor("--fix")
        assert all(each["fixed"] for each in findings if each["can_be_fixed"])
        assert stray.wait(30) == -signal.SIGKILL
        _, findings = doctor()
        assert not found("dead servers", findings)
        assert not found("strays", findings)
        assert live.generate("hi")


def _marker_of(instance: directory.Instance) -> dict[str, str]:
    return {lifeline.MARKER: instance.marker}


def test_scratch_folders_that_nobody_uses_are_found_and_removed(home: Path) -> None:
    old, young = cleanup.make_scratch(), cleanup.make_scratch()
    os.utime(old, (time.time() - 3600,) * 2)
    try:
        with ManagedVLLM("stand-in", command=standin.command(), keep_alive=INSTANT) as llm:
            (instance,) = directory.instances(home)
            used = Path((instance.read_record() or {})["scratch"])
            os.utime(used, (time.time() - 3600,) * 2)
            _, findings = doctor("--fix")
            assert [each["fixed"] for each in found("scratch folders", findings) if str(old) in each["text"]]
            assert not any(str(folder) in each["text"] for each in findings for folder in (young, used))
            assert (old.exists(), young.exists(), used.exists()) == (False, True, True)
            assert llm.generate("hi")
    finally:
        for folder in (old, young):
            cleanup.remove_scratch(folder)


def test_what_it_prints_is_to_be_read(home: Path) -> None:
    done = subprocess.run([*DOCTOR, "--python", "missing"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ERROR  vLLM: " in done.stdout
    assert "→ " in done.stdout
    assert "findings: 1 errors" in done.stdout
