"""A trainer in another process sends its weights to the real vLLM, by shared memory, without a GPU."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_checkpoints import copy_of_demo, rewritten, with_rows_swapped
from processes import HANG_S, eventually, own_state, tree

from managed_vllm import ManagedVLLM, RestartPolicy, demo
from managed_vllm.errors import BadWeightsError, WeightsLostError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
PROMPTS = [[{"role": "user", "content": demo.random_screen(random.Random(n)).prompt()}] for n in range(4)]
POLICY = RestartPolicy(max_restarts=20, backoff_initial_s=0.1, backoff_factor=1.0)
FIRST, UNUSED = 299, 700
"""Every answer begins with the one, and no prompt has it; the other occurs nowhere."""

Answers = list[tuple[int, ...]]


def ask(llm: ManagedVLLM) -> Answers:
    return [tuple(one.outputs[0].token_ids) for one in llm.chat(PROMPTS, {"temperature": 0, "max_tokens": 6})]


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    with own_state(), ManagedVLLM("demo", for_training=True, keep_alive=0, restart=POLICY) as server:
        yield server


@pytest.fixture(scope="module")
def other(llm: ManagedVLLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """A checkpoint, and what a server answers that was started with it."""
    folder = copy_of_demo(tmp_path_factory.mktemp("checkpoints") / "other")
    with_rows_swapped(folder, FIRST, UNUSED)
    small: dict[str, Any] = {**demo.engine_defaults(), "env": demo.environment_defaults()}
    with ManagedVLLM(folder, keep_alive=0, **small) as started:
        return folder, ask(started)


class Trainer:
    def __init__(self) -> None:
        path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(HELPERS / "trainer_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    def does(self, *words: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@contextlib.contextmanager
def trainer() -> Iterator[Trainer]:
    made = Trainer()
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def test_what_a_trainer_sends_is_what_a_server_started_with_it_would_answer(
    llm: ManagedVLLM, other: tuple[Path, Answers], tmp_path: Path
) -> None:
    folder, answers = other
    first, epoch = ask(llm), llm.status().epoch
    assert first != answers
    with trainer() as sends:
        sends.does("load", folder)
        sends.does("send", "step-1")
        assert ask(llm) == answers
        assert llm.status().engine.weight_version == "step-1"
        before = llm.engine.weights()
        assert before.path is None

        sends.does("start")
        sends.process.kill()
    assert ask(llm) == answers
    assert llm.engine.weights() == before

    torch = pytest.importorskip("safetensors.torch")
    nan = copy_of_demo(tmp_path / "nan")
    rewritten(
        nan, lambda name, dtype, shape, old: (dtype, shape, b"\xc0\x7f" * (len(old) // 2) if "norm" in name else old)
    )
    client = llm.engine.weight_sync_client()
    tensors = torch.load_file(nan / "model.safetensors")
    for bad in (tensors, {name: one for name, one in tensors.items() if "q_proj" not in name}):
        with pytest.raises(BadWeightsError):
            client.send(bad.items())
        assert ask(llm) == answers
        assert llm.engine.weights() == before
    assert llm.status().epoch == epoch


def test_the_example_of_an_external_rollout_server(llm: ManagedVLLM) -> None:
    pytest.importorskip("transformers")
    example = HELPERS.parents[1] / "examples" / "09_external_rollout_server.py"
    run = subprocess.run([sys.executable, example, "2"], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    first, second = run.stdout.splitlines()
    assert first.endswith("sent step-1")
    assert second.endswith("with the weights step-1; sent step-2")
    assert llm.engine.weights().version == "step-2"  # it was this server


def test_after_the_death_of_the_engine_they_serve_again_or_have_to_be_sent_again(
    llm: ManagedVLLM, other: tuple[Path, Answers]
) -> None:
    folder, answers = other
    with trainer() as sends:
        sends.does("load", folder)
        sends.does("send", "saved", folder)
        before, epoch = llm.engine.weights(), llm.status().epoch
        os.kill(tree(llm)["EngineCore"].pid, signal.SIGKILL)
        eventually(lambda: llm.wait_ready(HANG_S).epoch > epoch, "started again")
        assert llm.engine.weights() == before
        assert ask(llm) == answers

        sends.does("send", "unsaved")
        os.kill(tree(llm)["EngineCore"].pid, signal.SIGKILL)
        with pytest.raises(WeightsLostError, match="version unsaved"):
            eventually(lambda: llm.wait_ready(HANG_S) is None, "it has failed")
    with trainer() as sends:
        sends.does("load", folder)
        sends.does("send", "again")
        assert ask(llm) == answers
