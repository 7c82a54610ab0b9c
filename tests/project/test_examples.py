"""The examples run, unchanged: against the stand-in, given by `VLLM_SERVER_URL`, or against the real demo model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import requests
import standin
from free_ports import free_port
from processes import HANG_S, assert_nothing_left, eventually, own_state

from managed_vllm import ManagedVLLM, demo

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
_OURS = ("VLLM_SERVER_URL", "VLLM_MODEL_NAME", "VLLM_API_KEY", "MANAGED_VLLM_ATTACH", "MANAGED_VLLM_HOME")


def _environment(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name not in _OURS}, **more}


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A stand-in that serves the model "demo" without a key."""
    port = free_port()
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


ELSEWHERE = {
    "08_trl.py",
    "09_external_rollout_server.py",
    "10_grpo_on_the_desktop.py",
    "12_osworld_on_a_virtual_screen.py",
}
"""Run by tests in tests/real, whose servers are for trainers, the third for two of its steps, not for minutes; the last
one by tests/agent/test_osworld_desktop.py."""
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


def test_osworld_without_its_checkout_says_what_is_missing() -> None:
    environment = {name: value for name, value in _environment().items() if name != "OSWORLD_CHECKOUT"}
    command = [sys.executable, str(EXAMPLES / "12_osworld_on_a_virtual_screen.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "what is missing: OSWORLD_CHECKOUT is not set: the folder of github.com/xlang-ai/OSWorld" in run.stderr
    assert "Traceback" not in run.stderr


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


SRUN = """#!/usr/bin/env bash
# In Slurm's place: runs the command once a node, with what Slurm tells a task; each "node" has its own port and TMPDIR.
while [[ $1 == --* ]]; do shift; done
trap 'kill $(jobs -p)' TERM
tasks=()
for node in $(seq 0 $((SLURM_NTASKS - 1))); do
    ports=($FAKE_PORTS)
    mkdir -p "$FAKE_NODES/$node"
    SLURM_PROCID=$node SLURM_LOCALID=0 SLURMD_NODENAME=127.0.0.1 \
        PORT=${ports[$node]} TMPDIR=$FAKE_NODES/$node "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do wait $task || code=$?; done
for task in "${tasks[@]}"; do wait $task; done
exit $code
"""
ASKING = """
import glob, os, stat
from managed_vllm import ManagedVLLM
key, = glob.glob("servers-7/key")
assert stat.S_IMODE(os.stat(key).st_mode) == 0o600, "nobody else reads the key"
with ManagedVLLM() as llm:
    for outputs in llm.chat([[{"role": "user", "content": f"Hello {number}"}] for number in range(8)]):
        print(outputs.outputs[0].text)
"""


def _slurm(tmp_path: Path, words: list[str]) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The job on two "nodes"; and what is left of it, after a while."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    environment = _environment(
        PATH=os.pathsep.join([str(srun.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
        SLURM_JOB_ID="7",
        SLURM_NTASKS="2",
        FAKE_NODES=str(tmp_path / "nodes"),
        FAKE_PORTS=f"{free_port()} {free_port()}",
        LISTEN="127.0.0.1",
        **standin.orders(echo=True),
    )
    script = ["bash", str(EXAMPLES / "slurm.sh"), *words]
    run = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=4 * HANG_S)
    for node in range(2):
        assert_nothing_left(tmp_path / "nodes" / str(node) / "managed-vllm-7-0")
    return run, [path.name for path in tmp_path.iterdir()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_slurm_job_has_a_server_on_each_node_and_leaves_none(tmp_path: Path) -> None:
    command = shlex.join(standin.command())
    run, left = _slurm(tmp_path, ["stand-in", "--command", command, "--", sys.executable, "-c", ASKING])
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    answers = [line for line in run.stdout.splitlines() if line.startswith("echo Hello")]
    assert len(answers) == 8
    assert len({line.rpartition(" ")[2] for line in answers}) == 2, "both servers have answered"
    assert sorted(left) == ["bin", "nodes"]
    assert [path.name for path in (tmp_path / "nodes").glob("*/*")] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_slurm_job_whose_servers_do_not_start_ends_with_the_reason(tmp_path: Path) -> None:
    run, left = _slurm(tmp_path, ["stand-in", "--command", "no-such-program {port}", "--", "true"])
    assert run.returncode not in (0, 2)
    assert "no-such-program" in run.stderr
    assert sorted(left) == ["bin", "nodes"]
    run = subprocess.run(["bash", EXAMPLES / "slurm.sh"], capture_output=True, text=True, timeout=HANG_S)
    assert run.returncode == 2
    assert "sbatch examples/slurm.sh" in run.stdout


def test_the_benchmark_measures_attaching_and_leaves_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = [sys.executable, str(ROOT / "benchmarks" / "attach.py"), "--server", "stand-in"]
    words += ["--entries", "5", "--processes", "1", "--json", str(report)]
    run = subprocess.run(words, env=_environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert "attach, 5 times in one process" in run.stdout
    assert report.exists()
    eventually(lambda: not _running_in(tmp_path), "nothing of it runs any more")


def _running_in(folder: Path) -> list[psutil.Process]:
    """Processes whose temporary files are in the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR", "").startswith(str(folder)):
                found.append(process)
    return found
