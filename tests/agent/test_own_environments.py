"""Mistakes in an environment of one's own, and servers other than vLLM: what is said, and what goes on all the same."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from acting_server import ActingServer, acting, text_of
from counting_world import CountingWorld, Worlds, picture, right, tasks
from processes import HANG_S, eventually

from managed_vllm.agent import (
    FailureClass,
    Limits,
    Observation,
    RetryRollouts,
    RunStore,
    StepResult,
    StreamingTaskScheduler,
    Task,
    Trajectory,
    loop_watch,
    run_episode,
    ui_tars,
)
from managed_vllm.agent.actions import Action
from managed_vllm.agent.export import Format, export
from managed_vllm.agent.named_environments import named_environment
from managed_vllm.errors import ConfigError, ExportError, RolloutsFailedError

AGENT = ui_tars("absolute", show_text=True)


@pytest.fixture(scope="module")
def server() -> Iterator[ActingServer]:
    with acting(right) as made:
        yield made


def scheduler(server: ActingServer, make: Any, **options: Any) -> StreamingTaskScheduler:
    given = {"agent": AGENT, "retry": RetryRollouts(max_attempts=1), **options}
    return StreamingTaskScheduler(server.client(), make, **given)


def told(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "managed_vllm.agent"]
    return [message for message in found if words in message]


# -- a step that blocks the event loop ---------------------------------------------------------------------------------


class Blocking(CountingWorld):
    """Its first step blocks the loop, until that was seen for longer than a step may take."""

    async def step(self, action: Action) -> StepResult:
        if self.task is not None and self.task.id == "task-000" and self.steps == 0:
            task, seen = asyncio.current_task(), threading.Event()
            assert task is not None
            threading.Thread(target=self.look, args=(task, seen)).start()
            seen.wait()  # the mistake
        return await super().step(action)

    @staticmethod
    def look(task: asyncio.Task[Any], seen: threading.Event) -> None:
        try:
            eventually(lambda: loop_watch.blocked_s(task) > 2, "the blocked loop was seen")
        finally:
            seen.set()


def test_a_step_that_blocks_the_loop_is_named_and_told_how_to_mend_and_its_limit_counts(
    server: ActingServer, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(step_timeout_s=1.5)  # of the others none is in the middle of a step when its time is looked at
    with caplog.at_level(logging.WARNING, "managed_vllm.agent"):
        found = scheduler(server, Blocking, max_concurrency=4, limits=limits).run_all(tasks(4, 2))
    assert found[0].failure is not None
    assert (found[0].failure.kind, found[0].failure.stage) == (FailureClass.ENVIRONMENT, "step")
    assert "step of Blocking took more than 1.5 s: it blocked the event loop" in found[0].failure.message
    (message,) = told(caplog, "has blocked the event loop")
    assert message.startswith("step of Blocking has blocked the event loop for")
    assert f"{__file__}:" in message
    assert "seen.wait()" in message
    assert "ThreadEnvironment" in message
    assert [one.reward for one in found[1:]] == [1.0] * 3


class Waiting(CountingWorld):
    async def step(self, action: Action) -> StepResult:
        await asyncio.sleep(2)
        return await super().step(action)


def test_a_step_that_awaits_is_not_blamed(server: ActingServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "managed_vllm.agent"):
        found = scheduler(server, Waiting).run_all(tasks(2, 1))
    assert [one.reward for one in found] == [1.0] * 2
    assert not told(caplog, "blocked")


def test_watching_ends_with_the_run(server: ActingServer) -> None:
    scheduler(server, CountingWorld).run_all(tasks(1, 1))
    for thread in threading.enumerate():
        if thread.name == "managed-vllm-loop-watch":
            thread.join(HANG_S)
            assert not thread.is_alive()


# -- what is no environment --------------------------------------------------------------------------------------------


class Synchronous:
    def reset(self, task: Task) -> Observation:
        return Observation(picture(1))

    def step(self, action: Action) -> StepResult:
        return StepResult(Observation(picture(1)))

    def evaluate(self) -> float:
        return 1.0

    def close(self) -> None:
        pass


def test_synchronous_methods_get_a_hint_once(server: ActingServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "managed_vllm.agent"):
        found = scheduler(server, Synchronous).run_all(tasks(3))
    for one in found:
        assert one.failure is not None
        assert one.failure.kind is FailureClass.ENVIRONMENT
        assert "reset of Synchronous is not asynchronous" in one.failure.message
        assert "ProcessEnvironment or ThreadEnvironment" in one.failure.message
    assert len(told(caplog, "reset of Synchronous is not asynchronous")) == 1


class WithoutEvaluate:
    async def reset(self, task: Task) -> Observation:
        return Observation(picture(1), "1 left")

    async def step(self, action: Action) -> StepResult:
        return StepResult(Observation(picture(1), "1 left"))

    async def close(self) -> None:
        pass


def test_an_environment_without_a_method_fails_its_episode_alone(server: ActingServer) -> None:
    made = iter([WithoutEvaluate(), CountingWorld(), CountingWorld()])
    found = scheduler(server, lambda: next(made), max_concurrency=1).run_all(tasks(2))
    assert found[0].failure is not None
    assert (
        "WithoutEvaluate has no evaluate: an environment has reset, step, evaluate, close" in found[0].failure.message
    )
    assert found[0].steps == ()
    assert found[1].reward == 1.0


@pytest.mark.parametrize("call", ["reset", "step", "evaluate"])
def test_an_environment_that_exits_fails_its_episode_alone(server: ActingServer, call: str) -> None:
    def fault(world: CountingWorld, called: str) -> None:
        if called == call and world.task is not None and world.task.id == "task-001":
            raise SystemExit(3)

    found = scheduler(server, Worlds(fault)).run_all(tasks(3))
    assert [one.reward for one in found] == [1.0, None, 1.0]
    assert found[1].failure is not None
    assert (found[1].failure.kind, found[1].failure.stage) == (FailureClass.ENVIRONMENT, call)
    assert f"{call} of CountingWorld raised SystemExit(3)" in found[1].failure.message


def test_an_environment_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module_here.py").write_text("class Env:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    assert named_environment("my_module_here:Env", Limits()).make.__name__ == "Env"
    with pytest.raises(ConfigError, match="no_such_module_here:Env can't be imported"):
        named_environment("no_such_module_here:Env", Limits())


# -- runs in which everything fails the same way -----------------------------------------------------------------------


def test_a_run_in_which_everything_fails_the_same_way_stops_early_and_says_so(
    server: ActingServer, tmp_path: Path
) -> None:
    def fault(world: CountingWorld, call: str) -> None:
        if call == "reset":
            raise RuntimeError(f"no machine at 10.0.0.{world.number}: tried {world.number} s")

    worlds = Worlds(fault)
    with RunStore.create(tmp_path / "run") as store:
        running = scheduler(server, worlds, store=store, max_concurrency=2, retry=RetryRollouts(delay_s=0.001))
        with pytest.raises(RolloutsFailedError, match=r"20 attempts in a row .*RuntimeError: no machine at") as caught:
            running.run_all(tasks(1000))
        assert caught.value.count == 20
        assert 20 <= len(store) <= 22
    assert worlds.calls["reset"] <= 22


def test_failures_that_differ_or_are_not_in_a_row_end_nothing(server: ActingServer) -> None:
    def fault(world: CountingWorld, call: str) -> None:
        number = 0 if world.task is None else int(world.task.id[-3:])
        if call == "reset" and number % 10:
            raise RuntimeError("no machine")
        if call == "reset" and number == 0:
            raise ValueError("another one")

    found = scheduler(server, Worlds(fault), max_concurrency=1).run_all(tasks(60, 1))
    assert len(found) == 60


def test_it_may_fail_as_often_as_the_caller_likes(server: ActingServer) -> None:
    def fault(world: CountingWorld, call: str) -> None:
        raise RuntimeError("no machine")

    assert len(scheduler(server, Worlds(fault), stop_after_failures=None).run_all(tasks(60))) == 60
    with pytest.raises(RolloutsFailedError, match=r"^4 attempts"):
        scheduler(server, Worlds(fault), stop_after_failures=3, max_concurrency=2).run_all(tasks(60))
    with pytest.raises(ConfigError, match="stop_after_failures"):
        scheduler(server, Worlds(), stop_after_failures=0)


# -- servers without token ids or logprobs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lacks", [{"token_ids": False}, {"logprobs": False}, {"token_ids": False, "logprobs": False}], ids=str
)
def test_a_server_without_ids_or_logprobs_can_be_evaluated_and_the_record_says_so(
    tmp_path: Path, lacks: dict[str, bool]
) -> None:
    with acting(right, **lacks) as hosted, RunStore.create(tmp_path / "run") as store:
        (found,) = scheduler(hosted, Worlds(), store=store, exact=False).run_all(tasks(1, 1))
        assert (found.reward, found.failure, found.exact) == (1.0, None, False)
        assert all(step.response_logprobs is None for step in found.steps)
        assert [entry.exact for entry in store.entries()] == [False]
        asked = [body for body in hosted.requests if any(map(text_of, body["messages"]))]
        for body in asked:
            assert not {"return_token_ids", "logprobs", "top_logprobs", "skip_special_tokens"} & body.keys()
        for to in get_args(Format):
            if to not in ("atif", "dart", "osworld"):  # they say so themselves, or have no place for ids
                with pytest.raises(ExportError, match="exact=False"):
                    export(store, to, tmp_path / to)
        assert export(store, "atif", tmp_path / "atif").trajectories == 1
        assert '"exact": false' in (tmp_path / "atif" / "task-000-0.json").read_text()


def test_without_it_the_attempt_fails_and_says_what_to_do() -> None:
    with acting(right, token_ids=False) as hosted:
        (found,) = scheduler(hosted, Worlds()).run_all(tasks(1, 1))
    assert found.failure is not None
    assert found.failure.kind is FailureClass.MODEL_SERVER
    assert "exact=False" in found.failure.message


# -- answers have an end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "limits", "most"),
    [
        (None, Limits(), 1024),
        ({"temperature": 0.5}, Limits(), 1024),
        ({"max_tokens": 5000}, Limits(), 5000),
        (None, Limits(max_response_tokens=77), 77),
        ({"max_tokens": 5000}, Limits(max_response_tokens=77), 77),
    ],
)
def test_an_answer_has_at_most_1024_tokens_where_nothing_else_is_said(
    server: ActingServer, params: Any, limits: Limits, most: int
) -> None:
    server.requests.clear()

    async def play() -> Trajectory:
        async with server.client() as client:
            return await run_episode(
                client, CountingWorld(), tasks(1, 0)[0], agent=AGENT, sampling_params=params, limits=limits
            )

    assert asyncio.run(play()).reward == 1.0
    assert server.requests[-1]["max_tokens"] == most
