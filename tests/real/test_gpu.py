"""What needs a GPU: its memory is free again when the last user is gone, however that one went."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import assert_nothing_left, eventually

HAS_GPU = shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU (`nvidia-smi -L` lists none)"),
]

USER = """
import time
from managed_vllm import ManagedVLLM
with ManagedVLLM("demo", keep_alive=0) as llm:
    llm.generate("Screen:", {"max_tokens": 2})
    print("ready", flush=True)
    time.sleep(3600)
"""


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) for line in subprocess.check_output(query, text=True).split())


def test_gpu_memory_is_free_again_after_the_last_user_was_killed(home: Path) -> None:
    before = used_mib()
    with subprocess.Popen([sys.executable, "-c", USER], stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline().strip() == "ready"
        assert used_mib() > before
        user.kill()
    assert_nothing_left(home)
    eventually(lambda: used_mib() <= before + 16, "GPU memory released")
