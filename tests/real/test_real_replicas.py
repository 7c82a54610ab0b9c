"""Updates of the weights over two replicas of the real vLLM, under load: every answer is of the weights that it names.

All at once and rolling; and where one replica dies in the middle, no answer is of other weights once the call is over.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from demo_checkpoints import copy_of_demo, edit_json, with_rows_swapped
from processes import HANG_S, eventually, own_state

from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy, ServerStatus, VLLMClient, demo
from managed_vllm.errors import CheckpointError, EngineControlError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PROMPTS = [[{"role": "user", "content": demo.random_screen(random.Random(n)).prompt()}] for n in range(4)]
PARAMS = {"temperature": 0, "max_tokens": 6}
FIRST, UNUSED = 299, 700
"""Every answer begins with the one, and no prompt has it; the other occurs nowhere."""


@dataclass(frozen=True)
class Answer:
    """When it was asked for and when it was there (monotonic clock), and the version of the weights that made it."""

    began_at: float
    ended_at: float
    version: str


@dataclass
class Trainer:
    """Two replicas, and the versions of their weights by the token with which answers of them begin."""

    llm: ManagedVLLM
    a: Path
    b: Path

    def replica(self, number: int) -> ServerStatus:
        return self.llm.status().replicas[number]

    def ask(self, client: ManagedVLLM | VLLMClient) -> list[Answer]:
        """One answer to each prompt; each is of the weights that it names."""
        began_at = time.monotonic()
        outputs = client.chat(PROMPTS, PARAMS)
        found = []
        for output in outputs:
            spans = output.outputs[0].weight_versions
            assert spans
            assert output.outputs[0].token_ids[0] == (UNUSED if spans[0].version.startswith("b") else FIRST)
            found.append(Answer(began_at, time.monotonic(), spans[-1].version))
        return found

    @contextlib.contextmanager
    def only(self, number: int) -> Iterator[VLLMClient]:
        """A client of that replica alone, once it is there."""
        eventually(lambda: self.replica(number).connection, "it is there")
        connection = self.replica(number).connection
        assert connection is not None
        client = VLLMClient(connection.base_url, connection.api_key.reveal(), connection.model)
        try:
            yield client
        finally:
            client.close()

    def served(self) -> list[set[str]]:
        """The versions of the answers that each replica itself gives."""
        found = []
        for number in (0, 1):
            with self.only(number) as client:
                found.append({one.version for one in self.ask(client)})
        return found


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("checkpoints")
    a, b = copy_of_demo(folder / "a"), copy_of_demo(folder / "b")
    with_rows_swapped(b, FIRST, UNUSED)
    policy = RestartPolicy(max_restarts=20, backoff_initial_s=0.1, backoff_factor=1.0)
    hang = HangPolicy(stopped_s=2 * HANG_S)  # tests stop one, for as long as a busy machine makes it
    with own_state(), ManagedVLLM("demo", replicas=2, keep_alive=0, restart=policy, hang=hang) as llm:
        llm.engine.update_weights(a, version="a0")
        yield Trainer(llm, a, b)


class Load:
    """Asks again and again until it is left; `answers` are those so far."""

    def __init__(self, trainer: Trainer) -> None:
        self.answers: list[Answer] = []
        self._trainer = trainer
        self._ended = threading.Event()
        self._threads = ThreadPoolExecutor(2)

    def __enter__(self) -> Load:
        self._asking = [self._threads.submit(self._ask) for _ in range(2)]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads.shutdown()
        for asking in self._asking:
            asking.result(HANG_S)

    def _ask(self) -> None:
        while not self._ended.is_set():
            self.answers += self._trainer.ask(self._trainer.llm)

    def await_more(self) -> None:
        seen = len(self.answers)
        eventually(lambda: len(self.answers) > seen or any(one.done() for one in self._asking), "answers go on")

    def await_later(self) -> set[str]:
        """The versions of answers that were asked for after this call had begun; there is one."""
        now = time.monotonic()

        def later() -> set[str]:
            return {one.version for one in self.answers if one.began_at > now}

        eventually(lambda: later() or any(one.done() for one in self._asking), "answers go on")
        return later()


def test_all_at_once_no_answer_is_of_the_old_weights_once_one_was_of_the_new(trainer: Trainer) -> None:
    with Load(trainer) as load:
        for version, folder in (("b1", trainer.b), ("a1", trainer.a)):
            load.await_more()
            updated = trainer.llm.engine.update_weights(folder, version=version)
            assert {one.engine.weight_checksum for one in trainer.llm.status().replicas} == {updated.checksum}
            assert load.await_later() == {version}
    for version in ("b1", "a1"):
        first = min(one.ended_at for one in load.answers if one.version == version)
        later = {one.version for one in load.answers if one.began_at > first}
        assert later <= ({"b1", "a1"} if version == "b1" else {"a1"})
    assert trainer.served() == [{"a1"}, {"a1"}]


def test_rolling_there_is_always_one_that_answers(trainer: Trainer) -> None:
    with Load(trainer) as load:
        load.await_more()
        trainer.llm.engine.update_weights(trainer.b, version="b2", rolling=True)
        assert load.await_later() == {"b2"}
    assert trainer.served() == [{"b2"}, {"b2"}]


def test_one_that_dies_in_the_middle_leaves_both_with_the_weights_from_before(trainer: Trainer) -> None:
    llm = trainer.llm
    before, victim = llm.engine.update_weights(trainer.b, version="b3"), trainer.replica(1)
    assert victim.server_pid is not None
    with Load(trainer) as load, ThreadPoolExecutor(1) as thread:
        load.await_more()
        os.kill(victim.server_pid, signal.SIGSTOP)  # so that it is the other one that has the new weights first
        updating = thread.submit(llm.engine.update_weights, trainer.a, version="a3")
        with trainer.only(0) as client:
            eventually(lambda: client.get_weight_version() == "a3", "replica 0 has them")
        os.kill(victim.server_pid, signal.SIGKILL)
        with pytest.raises(EngineControlError, match="replica 1"):
            updating.result(2 * HANG_S)
        load.await_more()
    assert "a3" not in {one.version for one in load.answers}
    assert trainer.served() == [{"b3"}, {"b3"}]
    assert trainer.replica(1).epoch > victim.epoch
    assert llm.engine.weights() == before


def test_rolling_back_leaves_both_with_the_weights_from_before(trainer: Trainer, tmp_path: Path) -> None:
    llm, changed = trainer.llm, copy_of_demo(tmp_path / "changed")
    before, second = llm.engine.update_weights(trainer.b, version="b4"), trainer.replica(1).server_pid
    assert second is not None
    with Load(trainer) as load, ThreadPoolExecutor(1) as thread:
        load.await_more()
        os.kill(second, signal.SIGSTOP)  # so that it is not updated before the checkpoint has changed
        try:
            updating = thread.submit(llm.engine.update_weights, changed, version="a4", rolling=True)
            eventually(lambda: trainer.replica(0).engine.weight_version == "a4", "replica 0 has them")
            edit_json(changed / "config.json", changed=True)
        finally:
            os.kill(second, signal.SIGCONT)
        with pytest.raises(CheckpointError, match="replica 1: its files have changed"):
            updating.result(2 * HANG_S)
        assert load.await_later() == {"b4"}
    assert trainer.served() == [{"b4"}, {"b4"}]
    assert llm.engine.weights() == before
