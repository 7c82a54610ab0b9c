"""Updates of the weights on the real vLLM, under load: no wrong token, no lost request, bad checkpoints without effect;
and every answer says which weights made it.

One server for all of them. The two checkpoints differ in which token begins an answer, each as surely as the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import pytest
import requests
from demo_checkpoints import copy_of_demo, edit_json, rewritten, with_rows_swapped
from processes import HANG_S, eventually, own_state, tree

from managed_vllm import ManagedVLLM, RestartPolicy, demo
from managed_vllm.agent import Limits, Step, StreamingTaskScheduler, Task, Trajectory, embedded
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
from managed_vllm.errors import CheckpointError
from managed_vllm.request.outputs import RequestOutput

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PROMPTS = [[{"role": "user", "content": demo.random_screen(random.Random(n)).prompt()}] for n in range(8)]
PARAMS = {"temperature": 0, "max_tokens": 6}
FIRST, UNUSED = 299, 700
"""Every answer begins with the one, and no prompt has it; the other occurs nowhere."""
UPDATES = 20

Answers = list[tuple[int, ...]]
OnUpdate = Literal["finish", "restart", "continue"]
HOW: tuple[OnUpdate, ...] = get_args(OnUpdate)


@dataclass
class Trainer:
    """A server and checkpoints for it."""

    llm: ManagedVLLM
    folder: Path
    good: dict[str, Path]
    bad: list[Path]
    answers: dict[str, Answers] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def ask(self) -> Answers:
        return [tuple(one.outputs[0].token_ids) for one in self.llm.chat(PROMPTS, PARAMS)]

    def check(self, index: int, output: RequestOutput) -> int:
        """The answer to a prompt is that of the weights that it names, from the token on that it says. Their number."""
        ids, spans = output.outputs[0].token_ids, output.outputs[0].weight_versions
        assert spans
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(ids)
        assert ids[0] == {"a": FIRST, "b": UNUSED}[self.versions[spans[0].version]]
        if len(spans) == 1:
            assert tuple(ids) == self.answers[self.versions[spans[0].version]][index]
        return len(spans)


def bad_checkpoints(folder: Path) -> list[Path]:
    """Truncated, missing, of another shape, architecture and vocabulary, with a NaN, and one that only looks good."""
    made = {name: copy_of_demo(folder / name) for name in ("cut", "shape", "model", "words", "nan", "overflows")}
    os.truncate(made["cut"] / "model.safetensors", 500_000)
    edit_json(made["model"] / "config.json", architectures=["LlamaForCausalLM"])
    edit_json(made["words"] / "config.json", vocab_size=800)

    def changed(part: str, data: bytes) -> None:
        rewritten(
            folder / part,
            lambda name, dtype, shape, old: (dtype, shape, data * (len(old) // 2) if "norm" in name else old),
        )

    changed("nan", b"\xc0\x7f")
    changed("overflows", b"\x7f\x7f")  # finite numbers, with which the model computes infinity
    rewritten(
        made["shape"],
        lambda name, dtype, shape, old: (dtype, [len(old) // 2], old) if "mlp.down" in name else (dtype, shape, old),
    )
    return [folder / "missing", *made.values()]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("checkpoints")
    good = {name: copy_of_demo(folder / name) for name in ("a", "b")}
    with_rows_swapped(good["b"], FIRST, UNUSED)
    policy = RestartPolicy(max_restarts=20, backoff_initial_s=0.1, backoff_factor=1.0)
    with own_state(), ManagedVLLM("demo", keep_alive=0, restart=policy) as llm:
        found = Trainer(llm, folder, good, bad_checkpoints(folder))
        for name, path in good.items():
            llm.engine.update_weights(path)
            found.answers[name] = found.ask()
        assert {answer[0] for answer in found.answers["a"]} == {FIRST}
        assert {answer[0] for answer in found.answers["b"]} == {UNUSED}
        yield found


class Load(threading.Thread):
    """All the prompts, again and again, until it is ended."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self._ended = threading.Event()
        self.answers: list[tuple[int, RequestOutput]] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                self.answers += enumerate(self._trainer.llm.chat(PROMPTS, PARAMS))
        except BaseException as error:
            self.error = error

    def await_more(self) -> None:
        seen = len(self.answers)
        eventually(lambda: len(self.answers) > seen or self.error is not None, "answers go on")

    def end(self) -> None:
        self._ended.set()
        self.join(HANG_S)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def test_twenty_updates_under_load_of_which_one_in_five_is_bad(trainer: Trainer) -> None:
    trainer.versions = {"b": "b"}
    llm, loads, seconds = trainer.llm, [Load(trainer) for _ in range(4)], []
    served, bad = "b", iter(trainer.bad)
    for number in range(UPDATES):
        if number % 5 == 4:
            with pytest.raises(CheckpointError):
                llm.engine.update_weights(next(bad), version="bad")
        else:
            served = trainer.versions[f"v{number}"] = "ab"[number % 2]
            began = time.monotonic()
            how: OnUpdate = HOW[number % 3]
            llm.engine.update_weights(trainer.good[served], version=f"v{number}", on_update=how)
            seconds.append(time.monotonic() - began)
        assert trainer.ask() == trainer.answers[served]
        loads[0].await_more()
    for load in loads:
        load.end()
    spans = [trainer.check(*one) for load in loads for one in load.answers]
    worst = f"update, worst of {len(seconds)}: {max(seconds):.3f} s"
    print(f"weights | {len(spans)} answers, {sum(one > 1 for one in spans)} by two versions | {worst}")


def test_bad_checkpoints_leave_everything_as_it_was(trainer: Trainer) -> None:
    llm = trainer.llm
    before, epoch = llm.engine.update_weights(trainer.good["b"], version="best"), llm.status().epoch
    for path in trainer.bad:
        began = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            llm.engine.update_weights(path)
        assert trainer.ask() == trainer.answers["b"]
        print(f"weights | {path.name} | served again after {time.monotonic() - began:.3f} s | {caught.value.faults[0]}")
    assert llm.engine.weights() == before
    assert llm.status().epoch == epoch


def spanning(trainer: Trainer, once: Callable[[], tuple[RequestOutput, int]]) -> tuple[RequestOutput, int]:
    """What `once` gives, as soon as its answer spans an update.

    A server that has the cores may have sent the whole answer before its client gets to read of the beginning.
    """
    for _ in range(8):
        trainer.llm.engine.update_weights(trainer.good["a"])
        output, noted = once()
        if len(output.outputs[0].weight_versions or []) != 1:
            return output, noted
    raise AssertionError("each answer was complete before the update")


def test_requests_in_flight_go_on_with_the_new_weights(trainer: Trainer) -> None:
    llm = trainer.llm

    def once() -> tuple[RequestOutput, int]:
        tokens = updated_at = 0
        for output in llm.stream(PROMPTS[0], {"temperature": 0, "max_tokens": 1500, "ignore_eos": True}):
            tokens += len(output.outputs[0].token_ids)
            if not updated_at and tokens >= 5:
                llm.engine.pause("keep")  # or it would have ended before the checkpoint is looked through
                llm.engine.update_weights(trainer.good["b"], on_update="continue")
                llm.engine.resume()
                updated_at = tokens
        assert tokens == 1500
        assert trainer.ask() == trainer.answers["b"]
        return output, updated_at

    output, updated_at = spanning(trainer, once)
    first, second = output.outputs[0].weight_versions or []
    assert (first.version, first.start, second.version, second.end) == ("a", 0, "b", 1500)
    assert updated_at <= first.end == second.start


def test_what_goes_on_after_a_crash_says_so_too(trainer: Trainer) -> None:
    llm = trainer.llm

    def once() -> tuple[RequestOutput, int]:
        tokens, epoch, engine = 0, llm.status().epoch, tree(llm)["EngineCore"].pid
        for output in llm.stream(PROMPTS[0], {"temperature": 0, "max_tokens": 1500, "ignore_eos": True}):
            if tokens == 0:
                llm.engine.pause()  # or it would have ended before anybody is killed
                llm.engine.update_weights(trainer.good["b"], on_update="continue")
                os.kill(engine, signal.SIGKILL)
                eventually(lambda: llm.wait_ready(HANG_S).epoch > epoch, "started again")
                llm.engine.resume()
            tokens += len(output.outputs[0].token_ids)
        assert tokens == 1500
        return output, tokens

    output, tokens = spanning(trainer, once)
    assert 0 < output.resumed_tokens < tokens
    first, second = output.outputs[0].weight_versions or []
    assert (first.version, first.start, second.version, second.end) == ("a", 0, "b", 1500)
    assert first.end == output.resumed_tokens


def test_rollouts_in_flight_say_which_weights_answered(trainer: Trainer) -> None:
    llm = trainer.llm
    trainer.versions = {"r0": "a", "r1": "b", "r2": "a"}
    llm.engine.update_weights(trainer.good["a"], version="r0")

    async def main() -> list[Trajectory]:
        asked, updated = asyncio.Queue[str | None](), asyncio.Event()

        async def told(task: Task, rollout: int, step: Step) -> None:
            await asked.put(step.weight_version)

        async def given() -> AsyncIterator[Task]:
            for task in desktop_tasks(10_000, seed=3):
                yield task
                if updated.is_set():
                    return

        running = StreamingTaskScheduler(
            llm, DesktopEnvironment, n=2, max_concurrency=8, limits=Limits(max_steps=6), agent=embedded(), on_step=told
        )

        async def update() -> None:
            for version, how in (("r1", "finish"), ("r2", "continue")):
                await asked.get()
                await running.update_weights(trainer.good[trainer.versions[version]], version=version, on_update=how)
                while await asked.get() != version:
                    pass
            updated.set()

        updating = asyncio.create_task(update())
        found = [one async for one in running.run(given())]
        await updating
        return found

    found = asyncio.run(main())
    assert all(one.ok and one.attempt == 0 for one in found)
    for one in found:
        versions = [step.weight_version for step in one.steps]
        assert versions == sorted(versions, key=str)
        for step in one.steps:
            first = step.weight_versions[0][0] if step.weight_versions else step.weight_version
            assert step.response_token_ids[0] == {"a": FIRST, "b": UNUSED}[trainer.versions[str(first)]]
    assert {step.weight_version for one in found for step in one.steps} == {"r0", "r1", "r2"}


@pytest.mark.parametrize("killed", ["EngineCore", pytest.param("APIServer", marks=pytest.mark.soak), "supervisor"])
def test_they_survive_a_kill(trainer: Trainer, killed: str) -> None:
    llm = trainer.llm
    before, epoch = llm.engine.update_weights(trainer.good["b"], version="v9"), llm.status().epoch
    supervisor = llm.status().supervisor_pid
    assert supervisor is not None
    with asked_over_and_over(llm) as answered:
        os.kill(supervisor if killed == "supervisor" else tree(llm)[killed].pid, signal.SIGKILL)
        eventually(lambda: llm.wait_ready(HANG_S).epoch > epoch, "started again")
        assert llm.engine.weights() == before
        assert trainer.ask() == trainer.answers["b"]
    assert answered <= {UNUSED}


@contextlib.contextmanager
def asked_over_and_over(llm: ManagedVLLM) -> Iterator[set[int]]:
    """By one who knows its address and does not look whether it is ready: the first tokens of all answers."""
    found: set[int] = set()
    ended = threading.Event()
    url, key = f"{llm.base_url}/chat/completions", {"Authorization": f"Bearer {llm.api_key}"}
    asked = {"model": llm.model, "messages": PROMPTS[0], "max_tokens": 1, "temperature": 0, "return_token_ids": True}

    def ask() -> None:
        while not ended.is_set():
            with contextlib.suppress(requests.RequestException):
                answer = requests.post(url, json=asked, headers=key, timeout=HANG_S)
                if answer.status_code == 200:
                    found.update(answer.json()["choices"][0]["token_ids"])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join(HANG_S)
