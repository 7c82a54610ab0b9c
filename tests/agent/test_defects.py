"""The defects of the service scripts that this library replaces (published in dart-gui and ARPO): none of them is ours.

One test, or more, for each row of the list that the design of the agent side starts from, named after the row.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acting_server import MODEL, Refusal, acting, ids_of, logprob_of, prompt_of, text_of
from counting_world import CountingWorld, Worlds, hang, picture, right, tasks, until
from processes import HANG_S

from managed_vllm import VLLMClient
from managed_vllm.agent import (
    FailureClass,
    Limits,
    RetryRollouts,
    RunStore,
    StopReason,
    StreamingTaskScheduler,
    Trajectory,
    bounded,
    run_agent_loop,
    run_episode,
    ui_tars,
)
from managed_vllm.errors import ConfigError, UnsupportedParameterError

PARAMS = {"max_tokens": 200, "temperature": 0}
AGENT = ui_tars("absolute", show_text=True)
ONCE = RetryRollouts(max_attempts=1)


def scheduler(server: Any, worlds: Any, **options: Any) -> StreamingTaskScheduler:
    given = {"sampling_params": PARAMS, "agent": AGENT, "retry": RetryRollouts(delay_s=0.01), **options}
    return StreamingTaskScheduler(server.client(), worlds, **given)


# -- one batched generate per step: one slow desktop stalls all --------------------------------------------------------


def test_a_slow_desktop_stalls_no_other_trajectory() -> None:
    """The slow one goes on only after all of the others have ended: with a barrier anywhere this would never end."""
    others_done = asyncio.Event()

    async def slow_until_all_others_are_done() -> None:
        await others_done.wait()

    def fault(world: CountingWorld, call: str) -> Any:
        assert world.task is not None
        return slow_until_all_others_are_done() if call == "step" and world.task.id == "task-000" else None

    async def main() -> list[str]:
        ended = []
        with acting(right) as server:
            async for trajectory in scheduler(server, Worlds(fault), max_concurrency=8).run(tasks(8, 3)):
                ended.append(trajectory.task.id)
                assert trajectory.reward == 1.0
                if len(ended) == 7:
                    others_done.set()
        return ended

    assert asyncio.run(main())[-1] == "task-000"


# -- messages rebound in the loop: runners 3-7 of 8 die after step 0 ---------------------------------------------------


class Runner:
    """As the scripts have it: a desktop that was reset to its task."""

    def __init__(self, number: int, presses: int) -> None:
        self.number = number
        self.left = presses
        self.evaluated = 0
        self.executed: list[str] = []

    def get_task_config(self) -> dict[str, Any]:
        return {"id": f"os-{self.number}", "instruction": f"runner {self.number}"}

    def get_obs(self) -> dict[str, Any]:
        return {"screenshot": picture(self.left, f"runner {self.number}"), "accessibility_tree": f"{self.left} left"}

    def execute_action(self, code: str) -> None:
        compile(code, "action", "exec")
        self.executed.append(code)
        self.left -= 1

    def evaluate(self) -> float:
        self.evaluated += 1
        return float(self.left == 0)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_no_runner_is_lost_with_n_from_1_to_64_and_mixed_lengths(n: int) -> None:
    runners = [Runner(number, number % 5) for number in range(n)]
    messages = [[{"role": "user", "content": f"I am runner {number}."}] for number in range(n)]
    with acting(right) as server:
        client = VLLMClient(server.url, None, MODEL)
        found = run_agent_loop(
            client, runners, messages, PARAMS, None, max_steps=8, coordinates="absolute", show_text=True
        )
        client.close()
    assert [trajectory.reward for trajectory in found] == [1.0] * n
    assert [len(trajectory.steps) for trajectory in found] == [number % 5 + 1 for number in range(n)]
    assert [len(runner.executed) for runner in runners] == [number % 5 for number in range(n)]
    for number, trajectory in enumerate(found):
        for step in trajectory.steps:
            assert text_of(step.messages[0]) == f"I am runner {number}."


# -- limit_images ignored ----------------------------------------------------------------------------------------------


def test_the_newest_n_images_are_sent_and_all_of_the_text() -> None:
    with acting(right) as server:
        limits = Limits(max_steps=20, max_images=3)
        worlds = Worlds()
        found = asyncio.run(play(server, worlds, tasks(1, 9)[0], limits=limits))
    assert found.reward == 1.0
    chats = [body for body in server.requests if text_of(body["messages"][-1])]
    assert len(chats) == 10
    for turn, body in enumerate(chats):
        parts = [part for message in body["messages"] if isinstance(message["content"], list)
                 for part in message["content"]]  # fmt: skip
        images = [part for part in parts if part["type"] == "image_url"]
        assert len(images) == min(3, turn + 1)
        texts = [part["text"] for part in parts if part["type"] == "text"]
        assert texts[1:] == [f"{left} left" for left in range(9, 8 - turn, -1)]
        shown = [ref.sha256 for ref in images_of_step(found, turn)]
        assert shown == [hashlib.sha256(picture(9 - seen, "task-000")).hexdigest()
                         for seen in range(max(0, turn - 2), turn + 1)]  # fmt: skip


def images_of_step(trajectory: Trajectory, index: int) -> list[Any]:
    return [part["image"] for message in trajectory.steps[index].messages if isinstance(message["content"], list)
            for part in message["content"] if part["type"] == "image"]  # fmt: skip


def test_a_server_that_takes_fewer_images_is_found_before_any_episode_meets_it() -> None:
    with acting(right, most_images=4) as server:
        worlds = Worlds()
        with pytest.raises(ConfigError, match=r"takes 4 images .*max_images is 5.*limit_mm_per_prompt={.image.: 5}"):
            scheduler(server, worlds, limits=Limits(max_images=5)).run_all(tasks(3))
        assert worlds.calls["step"] == 0
        assert all(world.closed for world in worlds.made)
        found = scheduler(server, worlds, limits=Limits(max_images=4)).run_all(tasks(3, 7))
    assert [trajectory.reward for trajectory in found] == [1.0] * 3


# -- sampling parameters dropped without a word ------------------------------------------------------------------------


def test_a_sampling_parameter_that_can_not_be_passed_on_is_an_error() -> None:
    with acting(right) as server:
        with pytest.raises(UnsupportedParameterError, match="top_kk"):
            scheduler(server, Worlds(), sampling_params={"top_kk": 5})


def test_every_sampling_parameter_goes_on_the_wire() -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.05, "seed": 3, "max_tokens": 100,
             "repetition_penalty": 1.1, "stop": ["END"], "logprobs": 2}  # fmt: skip
    with acting(right) as server:
        asyncio.run(play(server, Worlds(), tasks(1)[0], sampling_params=given))
        body = server.requests[-1]
    assert {name: body[name] for name in given if name != "logprobs"} == {
        name: value for name, value in given.items() if name != "logprobs"
    }
    assert body["logprobs"] is True


# -- token ids and logprobs empty --------------------------------------------------------------------------------------


def test_ids_and_logprobs_of_every_step_are_those_that_the_server_sampled() -> None:
    with acting(right) as server:
        found = asyncio.run(play(server, Worlds(), tasks(1, 4)[0]))
        sent = [body for body in server.requests if text_of(body["messages"][-1])]
    assert len(found.steps) == len(sent) == 5
    for step, body in zip(found.steps, sent, strict=True):
        assert list(step.response_token_ids) == ids_of(step.response)
        assert list(step.response_logprobs or ()) == [logprob_of(token) for token in ids_of(step.response)]
        assert list(step.prompt_token_ids) == ids_of(prompt_of(body["messages"]))


@pytest.mark.parametrize("without", ["token_ids", "logprobs"])
def test_a_server_that_does_not_tell_them_fails_the_attempt(without: str) -> None:
    with acting(right, **{without: False}) as server:
        found = asyncio.run(play(server, Worlds(), tasks(1)[0]))
    assert found.stop_reason is StopReason.LLM_FAILURE
    assert found.failure is not None
    assert found.failure.kind is FailureClass.MODEL_SERVER
    assert without.replace("_", " ") in found.failure.message
    assert found.reward is None


def test_retokenizing_is_nowhere_in_the_agent() -> None:
    package = Path(__file__).resolve().parent.parent.parent / "managed_vllm" / "agent"
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(sources) > 15
    for path, source in sources.items():
        for word in ("AutoTokenizer", "import tokenizers", "import transformers", ".tokenize(", ".encode_chat"):
            assert word not in source, f"{path.name}: {word}"


# -- an API error becomes "", then an assertion, then a vanished trajectory --------------------------------------------


def test_an_error_of_the_server_is_a_typed_failure_on_the_attempt() -> None:
    def answer(messages: list[dict[str, Any]]) -> Any:
        return Refusal(400, "the picture is upside down") if "1 left" in text_of(messages[-1]) else right(messages)

    with acting(answer) as server:
        found = scheduler(server, Worlds(), retry=ONCE).run_all(tasks(3, lambda number: number))
    assert [trajectory.task.id for trajectory in found] == ["task-000", "task-001", "task-002"]
    assert found[0].reward == 1.0
    for trajectory, step in ((found[1], 0), (found[2], 1)):
        assert trajectory.stop_reason is StopReason.LLM_FAILURE
        failure = trajectory.failure
        assert failure is not None
        assert (failure.kind, failure.stage, failure.step) == (FailureClass.MODEL_SERVER, "generate", step)
        assert failure.error_type == "BadRequestError"
        assert "upside down" in failure.message
        assert trajectory.reward is None
        assert len(trajectory.steps) == step


# -- an environment failure is scored as reward 0 ----------------------------------------------------------------------


@pytest.mark.parametrize("call", ["reset", "step", "evaluate"])
def test_an_environment_failure_has_no_reward(call: str) -> None:
    def fault(world: CountingWorld, name: str) -> None:
        if name == call:
            raise RuntimeError("the desktop is gone")

    with acting(right) as server:
        found = scheduler(server, Worlds(fault), retry=ONCE).run_all(tasks(1))[0]
    assert found.reward is None
    assert found.stop_reason is StopReason.ENV_FAILURE
    assert found.failure is not None
    assert found.failure.kind is FailureClass.ENVIRONMENT
    assert found.failure.stage == call
    assert found.failure.message == "the desktop is gone"


def test_a_reward_of_zero_is_the_evaluators_word() -> None:
    with acting(lambda _: "Action: finished()") as server:
        found = asyncio.run(play(server, Worlds(), tasks(1)[0]))
    assert found.reward == 0.0
    assert found.failure is None
    assert found.ok


# -- after three failed screenshots another VM is used silently --------------------------------------------------------


def test_a_desktop_that_fails_is_never_replaced_within_an_attempt() -> None:
    """The attempt ends with it. The retry has a fresh one, which is reset to the task before anything else."""

    def fault(world: CountingWorld, call: str) -> None:
        if world.number == 0 and world.steps == 2 and call == "step":
            raise RuntimeError("no screenshot")

    worlds = Worlds(fault)
    attempts: list[Trajectory] = []
    with acting(right) as server:
        found = scheduler(server, worlds, on_attempt=attempts.append).run_all(tasks(1, 4))
    assert [(one.attempt, one.stop_reason) for one in attempts] == [
        (0, StopReason.ENV_FAILURE),
        (1, StopReason.FINISHED),
    ]
    assert [trajectory.attempt for trajectory in found] == [1]
    assert [call for number, call in worlds.log if number == 0] == ["reset", "step", "step", "close"]
    assert [call for number, call in worlds.log if number == 1] == ["reset", *["step"] * 5, "evaluate", "close"]


# -- no timeouts on execute and evaluate -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["reset", "step", "evaluate", "close"])
def test_every_call_of_an_environment_has_a_hard_time_out(call: str) -> None:
    limit: dict[str, Any] = {f"{call}_timeout_s": 0.2}
    limits = replace(Limits(), **limit)

    def fault(world: CountingWorld, name: str) -> Any:
        return hang() if name == call else None

    with acting(right) as server:
        found = scheduler(server, Worlds(fault), limits=limits, retry=ONCE).run_all(tasks(1))[0]
    if call == "close":
        assert found.reward == 1.0
        return
    assert found.failure is not None
    assert found.failure.error_type == "EnvironmentTimeoutError"
    assert found.failure.stage == call
    assert found.reward is None


# -- resume = "the directory exists" -----------------------------------------------------------------------------------


def test_resume_goes_by_the_recorded_status_and_not_by_what_exists(tmp_path: Path) -> None:
    broken = True

    def fault(world: CountingWorld, call: str) -> None:
        assert world.task is not None
        if broken and call == "evaluate" and world.task.id == "task-001":
            raise RuntimeError("the evaluator crashed")

    worlds = Worlds(fault)
    with acting(right) as server, RunStore.create(tmp_path / "run", {}) as store:
        first = scheduler(server, worlds, store=store, retry=ONCE).run_all(tasks(3))
        assert [trajectory.reward for trajectory in first] == [1.0, None, 1.0]
        broken = False
        resets = worlds.calls["reset"]
        second = scheduler(server, worlds, store=store, retry=ONCE).run_all(tasks(3))
        assert [trajectory.reward for trajectory in second] == [1.0, 1.0, 1.0]
        assert worlds.calls["reset"] == resets + 1, "only the one that had failed is played again"
        assert [(entry.task_id, entry.attempt, entry.ok) for entry in store.entries()].count(("task-001", 1, True)) == 1


# -- stop() races queue.join() and hangs -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stop", "break", "cancel"])
def test_a_run_that_is_stopped_ends_in_bounded_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of its environments hang in a step, one does not even heed cancellation."""
    monkeypatch.setattr(bounded, "GRACE_S", 0.5)
    never = threading.Event()

    async def stubborn() -> None:
        while not never.is_set():
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if time.monotonic() - began > 2 * HANG_S:  # a test that fails must end, too
                    gave_in.append(True)
                    raise

    def fault(world: CountingWorld, call: str) -> Any:
        assert world.task is not None
        if call != "step" or world.task.id == "task-000":
            return None
        return stubborn() if world.task.id == "task-001" else hang()

    worlds = Worlds(fault)
    began = time.monotonic()
    gave_in: list[bool] = []

    async def main() -> None:
        with acting(right) as server:
            running = scheduler(server, worlds, max_concurrency=8, limits=Limits(close_timeout_s=1))
            if way == "cancel":
                task = asyncio.create_task(drain(running))
                await until(lambda: worlds.calls["step"] >= 8)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                async for trajectory in running.run(tasks(100)):
                    assert trajectory.task.id == "task-000"
                    if way == "stop":
                        running.stop()
                    else:
                        break
            # `break` leaves the end of the generator to the event loop.
            await until(lambda: all(world.closed for world in worlds.made))
            never.set()

    asyncio.run(main())
    assert all(world.closed for world in worlds.made)
    assert not gave_in
    assert worlds.calls["reset"] <= 9


async def drain(running: StreamingTaskScheduler) -> None:
    async for _ in running.run(tasks(100)):
        pass


# -- env.done discarded, wait() a no-op --------------------------------------------------------------------------------


def test_an_environments_own_end_is_honoured() -> None:
    class Ending(CountingWorld):
        async def step(self, action: Any) -> Any:
            result = await super().step(action)
            kind = "terminated" if self.worlds.made.index(self) == 0 else "truncated"
            ends: dict[str, Any] = {kind: self.left == 1}
            return type(result)(result.observation, result.reward, **ends)

    worlds = Worlds()

    def make() -> Ending:
        return Ending(None, worlds)

    with acting(right) as server:
        found = scheduler(server, make, max_concurrency=1, reuse_environments=False).run_all(tasks(2, 5))
    assert [trajectory.stop_reason for trajectory in found] == [StopReason.TERMINATED, StopReason.TRUNCATED]
    assert [len(trajectory.steps) for trajectory in found] == [4, 4]
    assert found[0].steps[-1].terminated
    assert found[1].steps[-1].truncated


def test_done_of_an_old_runner_is_honoured() -> None:
    class Done(Runner):
        def execute_action(self, code: str) -> Any:
            super().execute_action(code)
            return self.get_obs(), 0.5, self.left == 1, {"left": self.left}

    with acting(right) as server:
        client = VLLMClient(server.url, None, MODEL)
        messages = [[{"role": "user", "content": "Go."}]]
        found = run_agent_loop(
            client, [Done(0, 4)], messages, PARAMS, max_steps=9, coordinates="absolute", show_text=True
        )[0]
        client.close()
    assert found.stop_reason is StopReason.TERMINATED
    assert [step.reward for step in found.steps] == [0.5] * 3


def test_wait_reaches_the_environment() -> None:
    said = iter(["Action: wait()", "Action: wait()"])
    with acting(lambda messages: next(said, None) or right(messages)) as server:
        found = asyncio.run(play(server, Worlds(), tasks(1, 1)[0]))
    assert [type(step.actions[0]).__name__ for step in found.steps] == ["Wait", "Wait", "Click", "Finished"]
    assert [step.executed for step in found.steps] == [1, 1, 1, 1]
    runner = Runner(0, 1)
    said = iter(["Action: wait()"])
    with acting(lambda messages: next(said, None) or "Action: finished()") as server:
        client = VLLMClient(server.url, None, MODEL)
        run_agent_loop(client, [runner], [[{"role": "user", "content": "Go."}]], PARAMS, max_steps=3)
        client.close()
    assert len(runner.executed) == 1
    assert "sleep" in runner.executed[0]


# -- JPEG sent, PNG saved; the first new screenshot overwrites the first image -----------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_what_was_sent_is_what_is_stored_byte_for_byte(tmp_path: Path, format: str) -> None:
    from PIL import Image

    class Formatted(CountingWorld):
        def seen(self) -> Any:
            seen = super().seen()
            file = io.BytesIO()
            Image.open(io.BytesIO(seen.screenshot or b"")).save(file, format)
            return type(seen)(file.getvalue(), seen.text)

    with acting(right) as server, RunStore.create(tmp_path / "run", {}) as store:
        scheduler(server, Formatted, store=store).run_all(tasks(2, 3))
        by_task = {trajectory.task.id: trajectory for trajectory in store.trajectories()}
        sent = [body for body in server.requests if text_of(body["messages"][-1])]
        assert len(sent) == 8
        seen: set[str] = set()
        for trajectory in by_task.values():
            for step in trajectory.steps:
                refs = [one for one in images_of_step(trajectory, step.index)]
                body = next(
                    one for one in sent if ids_of(prompt_of(one["messages"])) == list(step.prompt_token_ids)
                    and hashes_of(one) == [ref.sha256 for ref in refs]
                )  # fmt: skip
                for ref, data in zip(refs, images_in(body), strict=True):
                    assert store.images.read(ref) == data
                    assert ref.mime == f"image/{format.lower()}"
                    seen.add(ref.sha256)
        assert len(seen) == 2 * 4, "every screenshot has its own file"


def images_in(body: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for message in body["messages"]
            if isinstance(message["content"], list) for part in message["content"]
            if part["type"] == "image_url"]  # fmt: skip


def hashes_of(body: dict[str, Any]) -> list[str]:
    return [hashlib.sha256(data).hexdigest() for data in images_in(body)]


async def play(server: Any, worlds: Worlds, task: Any, **options: Any) -> Trajectory:
    world = worlds()
    async with server.client() as client:
        try:
            return await run_episode(client, world, task, **{"sampling_params": PARAMS, "agent": AGENT, **options})
        finally:
            await world.close()
