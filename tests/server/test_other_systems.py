"""Systems that are not as usual: old Pythons, sandboxes, pid namespaces, long paths and names in other encodings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import INSTANT, assert_nothing_left

from managed_vllm import ManagedVLLM
from managed_vllm.config import Address
from managed_vllm.errors import ConfigError
from managed_vllm.server import pidfd
from managed_vllm.server.process import listeners_can_be_seen


def server(command: list[str] | None = None, **options: Any) -> ManagedVLLM:
    orders = standin.orders(tree=True)
    return ManagedVLLM("m", command=command or standin.command(), env=orders, keep_alive=INSTANT, **options)


def test_a_python_without_pidfd_open_starts_a_server(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.pidfd_open\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with server() as llm:
        assert llm.generate("x")[0].outputs[0].text.startswith("echo x")
    assert_nothing_left(home)


def test_the_end_of_a_process_is_told_without_pidfd_open_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    descriptor = pidfd.pidfd_open(os.getpid())
    assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("anon_inode:")
    os.close(descriptor)
    with pytest.raises(ProcessLookupError):
        pidfd.pidfd_open(1 << 22)


def test_where_nobody_sees_who_listens_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listeners_can_be_seen()

    def unreadable(**_: Any) -> Any:
        raise FileNotFoundError("/proc/net/tcp")

    monkeypatch.setattr(psutil, "net_connections", unreadable)
    assert not listeners_can_be_seen()


UNSHARE = ["unshare", "-pf", "--mount-proc", "--kill-child"]
CAN_UNSHARE = subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not CAN_UNSHARE, reason="no new pid namespaces here")
@pytest.mark.parametrize("within", [[], ["sh", "-c", '"$@"; exit $?', "sh"]], ids=["directly", "below a shell"])
def test_a_command_may_run_its_server_in_a_pid_namespace_of_its_own(home: Path, within: list[str]) -> None:
    # The first process of a namespace gets no SIGTERM from outside unless it has a handler.
    with server([*UNSHARE, *within, *standin.command()], stop_grace=0.5) as llm:
        assert llm.generate("x")[0].outputs[0].text.startswith("echo x")
    assert_nothing_left(home)


@pytest.mark.parametrize("name", ["d" * 120, "ä ö 漢", "a\nb"])
def test_a_state_directory_may_have_any_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    elsewhere = tmp_path / name / "home"
    monkeypatch.setenv("MANAGED_VLLM_HOME", str(elsewhere))
    with server(uds=True) as llm:
        assert llm.generate("x")[0].outputs[0].text.startswith("echo x")
    assert_nothing_left(elsewhere)


def test_a_model_whose_name_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="no valid text") as caught:
        ManagedVLLM(os.fsdecode(b"/models/k\xf6ln"))
    assert caught.value.field == "model"


def test_a_host_may_be_written_as_in_a_url() -> None:
    assert Address(host="[::1]") == Address(host="::1")
