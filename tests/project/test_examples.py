"""The examples run, unchanged: against the stand-in, given by `VLLM_SERVER_URL`, or against the real demo model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import requests
import standin
from processes import HANG_S, own_state

from managed_vllm import ManagedVLLM, demo

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
_OURS = ("VLLM_SERVER_URL", "VLLM_MODEL_NAME", "VLLM_API_KEY", "MANAGED_VLLM_ATTACH", "MANAGED_VLLM_HOME")


def _environment(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name not in _OURS}, **more}


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A stand-in that serves the model "demo" without a key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = [sys.executable, str(ROOT / "tests" / "helpers" / "standin.py"), "--port", str(port), "--model", "demo"]
    process = subprocess.Popen([*words, "--served-model-name", "demo"], env=_environment(**standin.orders(echo=True)))
    try:
        session = requests.Session()
        session.trust_env = False
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                session.get(f"{url}/health", timeout=HANG_S)
                break
            except requests.ConnectionError:
                assert process.poll() is None, "the stand-in ended"
                assert time.monotonic() < deadline, "the stand-in does not listen"
                time.sleep(0.02)
        yield url
    finally:
        process.kill()
        process.wait()


ELSEWHERE = {"08_trl.py", "09_external_rollout_server.py"}
"""Run by tests in tests/real, whose servers are for trainers."""
NEEDS = {"06_inspect_ai.py": "inspect_ai", "08_trl.py": "trl", "09_external_rollout_server.py": "transformers"}
"""What an example uses beside this library, where that is no dependency."""


def _skip_without_third_party(example: str) -> None:
    needed = NEEDS.get(example)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{example} needs {needed}, which is not installed (and no dependency)")


def _run(example: str, environment: Mapping[str, str], timeout_s: float = 120) -> str:
    run = subprocess.run(
        [sys.executable, EXAMPLES / example], env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return run.stdout


def test_chat(server_url: str, tmp_path: Path) -> None:
    said = _run("01_chat.py", _environment(VLLM_SERVER_URL=server_url, MANAGED_VLLM_HOME=str(tmp_path)))
    assert said.count("→ 'echo Screen:") == 4


def test_shared_by_processes(server_url: str, tmp_path: Path) -> None:
    said = _run("02_shared_by_processes.py", _environment(VLLM_SERVER_URL=server_url, MANAGED_VLLM_HOME=str(tmp_path)))
    assert [f"echo Hello from worker {number} " in said for number in range(4)] == [True] * 4


def test_child_process_environ(server_url: str, tmp_path: Path) -> None:
    environment = _environment(VLLM_SERVER_URL=server_url, MANAGED_VLLM_HOME=str(tmp_path))
    said = _run("04_child_process_environ.py", environment)
    assert "child: demo echo Hello" in said
    assert "any client: echo Hello" in said


def test_async_images(server_url: str, tmp_path: Path) -> None:
    said = _run("05_async_images.py", _environment(VLLM_SERVER_URL=server_url, MANAGED_VLLM_HOME=str(tmp_path)))
    assert [f"echo What colour is screen {number}?" in said for number in range(8)] == [True] * 8


def test_record_an_agent(server_url: str, tmp_path: Path) -> None:
    environment = _environment(VLLM_SERVER_URL=server_url, MANAGED_VLLM_HOME=str(tmp_path))
    said = _run("11_record_an_agent.py", environment)
    assert [f"screen-{number} 0.0 " in said for number in range(4)] == [True] * 4  # an echo does not click


@pytest.fixture(scope="module")
def real_demo() -> Iterator[dict[str, str]]:
    """The environment in which one server of the demo model runs, for all examples that ask for it."""
    with own_state(), ManagedVLLM("demo", keep_alive=0) as llm:
        yield dict(os.environ)
        llm.stop_server()  # the examples want it to outlive them for a while


def test_an_evaluation_by_inspect_ai(server_url: str, tmp_path: Path) -> None:
    _skip_without_third_party("06_inspect_ai.py")
    said = _run("06_inspect_ai.py", _environment(VLLM_SERVER_URL=server_url, MANAGED_VLLM_HOME=str(tmp_path)))
    assert "accuracy: 0.00 of 20 screens" in said  # an echo does not click


@pytest.mark.parametrize("example", sorted(NEEDS))
def test_an_example_with_a_third_party_says_how_to_install_it(example: str) -> None:
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    assert f"pip install {NEEDS[example].replace('_', '-')}" in text


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not demo.weights_path().is_dir(), reason="the demo model's weights are not there")
@pytest.mark.parametrize("example", sorted({path.name for path in EXAMPLES.glob("[01]*.py")} - ELSEWHERE))
def test_with_the_real_model(real_demo: dict[str, str], example: str) -> None:
    _skip_without_third_party(example)
    said = _run(example, real_demo, timeout_s=500)
    assert said.strip()
    if example.startswith(("01", "03")):
        assert "click(start_box='(" in said
    if example.startswith("06"):
        assert "accuracy: 1.00" in said or "accuracy: 0.9" in said


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_shell_script_explains_itself() -> None:
    assert subprocess.run(["bash", "-n", EXAMPLES / "service.sh"], timeout=HANG_S).returncode == 0
    run = subprocess.run(["bash", EXAMPLES / "service.sh"], capture_output=True, text=True, timeout=HANG_S)
    assert run.returncode == 2
    assert "examples/service.sh start" in run.stdout


def test_the_benchmark_measures_attaching_and_leaves_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = [sys.executable, str(ROOT / "benchmarks" / "attach.py"), "--server", "stand-in"]
    words += ["--entries", "5", "--processes", "1", "--json", str(report)]
    run = subprocess.run(words, env=_environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert "attach, 5 times in one process" in run.stdout
    assert report.exists()
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR", "").startswith(str(tmp_path)):
                left.append(process)
        except psutil.Error:
            continue
    assert left == []
