"""Environments of gymnasium's shape, in a process or a thread, with typed actions; and threads in general."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import HANG_S, eventually
from standin_environment import NoEnvironment, Obedient, TinyEnv, WrongReturns, score, toward

from managed_vllm.agent import Environment, Limits, Observation, StepResult, Task
from managed_vllm.agent.actions import Action, CallUser, Click, Custom, Finished, Wait
from managed_vllm.agent.environments.gymnasium import GymnasiumEnvironment
from managed_vllm.agent.environments.thread_environment import ThreadEnvironment, hung_threads
from managed_vllm.errors import (
    EnvironmentDiedError,
    EnvironmentFailedError,
    EnvironmentRaisedError,
    EnvironmentTimeoutError,
)

pytest.importorskip("numpy")
pillow = pytest.importorskip("PIL.Image")

TASK = Task("t", seed=1, data={"options": {"place": 2}})
QUICK = Limits(step_timeout_s=0.3)
BOTH = pytest.mark.parametrize("isolation", ["process", "thread"])


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * HANG_S))


def worded(observation: Any, screenshot: bytes | None, info: Mapping[str, Any]) -> Observation:
    return Observation(text=f"at {observation[0]:.0f}", instruction="go right", extras={"info": sorted(info)})


def refuse(action: Action) -> Any:
    raise LookupError(f"no action for {action}")


def as_told(action: Action) -> int:
    """`to_action` that knows `Finished`."""
    return 1 if isinstance(action, Finished) else 0


# -- gymnasium ---------------------------------------------------------------------------------------------------------


@BOTH
def test_an_episode_by_clicks_on_the_picture(isolation: Any) -> None:
    async def test() -> None:
        env = GymnasiumEnvironment(TinyEnv, to_action=toward, isolation=isolation)
        assert isinstance(env, Environment)
        seen = await env.reset(TASK)
        assert white(seen) == (40, 60)
        assert seen.extras["observation"][0] == 2
        results = []
        for x in (99.0, 0.0, 70.0, 70.0):
            results.append(await env.step(Click(x, 20)))
        assert [white(result.observation) for result in results] == [(60, 80), (40, 60), (60, 80), (80, 100)]
        assert [result.reward for result in results] == [0.0, 0.0, 0.0, 1.0]
        assert [result.terminated for result in results] == [False, False, False, True]
        assert not any(result.truncated for result in results)
        assert results[-1].info == {"count": 4, "vector": [0, 1, 2], "nested": {"x": [0.5]}, "not_plain": ["lock"]}
        assert [type(results[-1].info["count"]), type(results[-1].reward)] == [int, float]
        assert await env.evaluate() is None
        await env.close()
        await env.close()

    run(test)


def white(seen: Observation) -> tuple[int, int]:
    """From where to where the picture is white."""
    assert seen.screenshot is not None
    assert seen.screenshot.startswith(b"\x89PNG")
    left, _, right, _ = pillow.open(io.BytesIO(seen.screenshot)).convert("L").getbbox()
    return left, right


@BOTH
def test_seed_options_evaluation_and_the_cut_by_a_limit_are_handed_on(isolation: Any) -> None:
    async def test() -> None:
        env = GymnasiumEnvironment(
            functools.partial(TinyEnv, render_mode=None, limit=2),
            to_action=toward,
            to_observation=worded,
            evaluate=score,
            isolation=isolation,
        )
        seeds = [(await env.reset(Task("t", seed=seed))).text for seed in (7, 7, 8, 9, 10, 11)]
        assert seeds[0] == seeds[1]
        assert len(set(seeds)) > 1
        seen = await env.reset(TASK)
        assert (seen.text, seen.screenshot, seen.instruction) == ("at 2", None, "go right")
        assert not (await env.step(Click(0, 0))).truncated
        assert (await env.step(Click(0, 0))).truncated
        await env.reset(Task("t", data={"options": {"place": 3}}))
        assert await env.evaluate() == 0.75
        await env.close()

    run(test)


def test_the_end_that_the_model_declares_is_not_the_environments() -> None:
    async def test() -> None:
        env = GymnasiumEnvironment(TinyEnv, to_action=refuse, isolation="thread")
        seen = await env.reset(TASK)
        for action in (Finished("done"), CallUser()):
            result = await env.step(action)
            assert result.observation == seen
            assert (result.reward, result.terminated, result.truncated) == (None, False, False)
        await env.close()
        env = GymnasiumEnvironment(TinyEnv, to_action=as_told, finishing=True, isolation="thread")
        await env.reset(TASK)
        assert white((await env.step(Finished())).observation) == (60, 80)
        await env.close()

    run(test)


@BOTH
def test_what_raises_is_a_failure_with_its_type(isolation: Any) -> None:
    async def test() -> None:
        for make, to_action, message in (
            (TinyEnv, toward, "step raised ValueError: as it was told"),
            (TinyEnv, refuse, "step raised LookupError: no action for Custom"),
        ):
            env = GymnasiumEnvironment(make, to_action=to_action, isolation=isolation)
            await env.reset(TASK)
            with pytest.raises(EnvironmentRaisedError, match=message) as caught:
                await env.step(Custom("raise"))
            assert "Traceback" in caught.value.error_traceback
            with pytest.raises(EnvironmentFailedError, match="make another one"):
                await env.step(Wait())
            await env.close()

    run(test)


def test_environments_of_the_old_gym_are_told_apart() -> None:
    async def test() -> None:
        env = GymnasiumEnvironment(functools.partial(TinyEnv, old=True), to_action=toward, isolation="thread")
        with pytest.raises(EnvironmentRaisedError, match=r"reset must return \(observation, info\).*not ndarray"):
            await env.reset(TASK)
        await env.close()

    run(test)


def test_a_hung_one_is_killed_and_one_that_dies_is_noticed() -> None:
    async def test() -> None:
        env = GymnasiumEnvironment(TinyEnv, to_action=toward, limits=Limits(step_timeout_s=1.5))
        await env.reset(TASK)
        with pytest.raises(
            EnvironmentTimeoutError, match=r"TinyEnv: step was not over within 1\.5 s; its processes were killed"
        ):
            await env.step(Custom("hang"))
        await env.close()
        env = GymnasiumEnvironment(TinyEnv, to_action=toward)
        await env.reset(TASK)
        with pytest.raises(EnvironmentDiedError, match="exit code 7"):
            await env.step(Custom("_exit"))
        await env.close()

    run(test)


def test_one_made_by_gymnasium_itself() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="pip install gymnasium")

    async def test() -> None:
        env = GymnasiumEnvironment(functools.partial(gymnasium.make, "CartPole-v1"), to_action=as_told)
        first = await env.reset(Task("t", seed=3))
        assert first.extras["observation"].shape == (4,)
        again = await env.reset(Task("t", seed=3))
        assert list(again.extras["observation"]) == list(first.extras["observation"])
        steps = 0
        while not (result := await env.step(Wait())).terminated:
            steps += 1
            assert result.reward == 1.0
        assert 3 < steps < 50
        await env.close()

    run(test)


def test_bad_arguments_of_gymnasiums_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="isolation"):
        GymnasiumEnvironment(TinyEnv, to_action=toward, isolation="fork")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to_action must be callable"):
        GymnasiumEnvironment(TinyEnv, to_action=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no lambda"):
        GymnasiumEnvironment(TinyEnv, to_action=lambda action: 0)
    with pytest.raises(ValueError, match="environ is for isolation='process'"):
        GymnasiumEnvironment(TinyEnv, to_action=toward, isolation="thread", environ={"A": "b"})
    GymnasiumEnvironment(TinyEnv, to_action=lambda action: 0, isolation="thread")


# -- threads -----------------------------------------------------------------------------------------------------------


def left_running() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("environment ")}


def test_a_thread_is_the_environments_own_and_ends_with_close() -> None:
    async def test() -> None:
        before = left_running()  # of another test: they may end meanwhile
        envs = [ThreadEnvironment(Obedient, arguments={"level": level}) for level in range(8)]
        assert left_running() <= before
        seen = await asyncio.gather(*(env.reset(Task("t")) for env in envs))
        assert [one.extras["arguments"]["level"] for one in seen] == list(range(8))
        assert len(left_running() - before) == 8
        await asyncio.gather(*(env.close() for env in envs))
        eventually(lambda: left_running() <= before, "threads ended")

    run(test)


class Meets(Obedient):
    """Its step is over when all have come to theirs."""

    def step(self, action: Action) -> StepResult:
        self.arguments["barrier"].wait(HANG_S)
        return super().step(action)


def test_threads_work_at_the_same_time() -> None:
    async def test() -> None:
        barrier = threading.Barrier(8)
        envs = [ThreadEnvironment(Meets, arguments={"barrier": barrier}) for _ in range(8)]
        await asyncio.gather(*(env.reset(Task("t")) for env in envs))
        await asyncio.gather(*(env.step(Wait()) for env in envs))
        await asyncio.gather(*(env.close() for env in envs))

    run(test)


def test_a_thread_that_nobody_has_any_more_closes_its_environment(tmp_path: Path) -> None:
    before = left_running()

    async def begin() -> None:
        await ThreadEnvironment(Obedient, arguments={"closed": str(tmp_path / "closed")}).reset(Task("t"))

    asyncio.run(begin())
    gc.collect()
    eventually(lambda: left_running() <= before and (tmp_path / "closed").exists(), "closed, and its thread ended")


class Blocks:
    """A `SyncEnvironment` that waits in `step` until it is released."""

    def __init__(self, released: threading.Event, closed: list[int]) -> None:
        self.released = released
        self.closed = closed

    def reset(self, task: Task) -> Observation:
        return Observation(text="ready")

    def step(self, action: Action) -> Any:
        self.released.wait()
        raise ValueError("released")

    def evaluate(self) -> float | None:
        return None

    def close(self) -> None:
        self.closed.append(1)


def test_hung_threads_are_abandoned_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("managed_vllm.agent.environments.thread_environment.MAX_ABANDONED", 3)
    released = threading.Event()
    closed: list[int] = []

    async def test() -> None:
        await asyncio.to_thread(eventually, lambda: not hung_threads(), "those of other tests have ended")
        envs = [
            ThreadEnvironment(Blocks, arguments={"released": released, "closed": closed}, limits=QUICK)
            for _ in range(4)
        ]
        await asyncio.gather(*(env.reset(Task("t")) for env in envs[:3]))
        results = await asyncio.gather(*(env.step(Wait()) for env in envs[:3]), return_exceptions=True)
        assert [type(result) for result in results] == [EnvironmentTimeoutError] * 3
        assert "can't be killed" in str(results[0])
        for env in envs[:3]:
            await env.close()  # returns at once: nothing can be done
        assert not released.is_set()
        with pytest.raises(EnvironmentFailedError, match="3 threads of environments did not return in time"):
            await envs[3].reset(Task("t"))
        released.set()
        await asyncio.to_thread(eventually, lambda: len(closed) == 3, "each closes itself once it is free")
        await asyncio.to_thread(eventually, lambda: not hung_threads(), "none is counted any more")
        assert (await envs[3].reset(Task("t"))).text == "ready"
        await envs[3].close()
        assert len(closed) == 4

    try:
        run(test)
    finally:
        released.set()


def test_a_cancelled_call_leaves_its_thread_to_itself() -> None:
    released = threading.Event()
    closed: list[int] = []

    async def test() -> None:
        env = ThreadEnvironment(Blocks, arguments={"released": released, "closed": closed})
        await env.reset(Task("t"))
        call = asyncio.create_task(env.step(Wait()))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(EnvironmentFailedError, match="cancelled"):
            await env.step(Wait())
        await env.close()
        released.set()
        await asyncio.to_thread(eventually, lambda: closed == [1], "closed once")
        await asyncio.to_thread(eventually, lambda: not hung_threads(), "gone")

    try:
        run(test)
    finally:
        released.set()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Obedient, {"fail": "make"}, "make raised RuntimeError: it can't be made"),
        (NoEnvironment, {}, "reset must return Observation, not NoneType"),
        (WrongReturns, {}, "reset must return Observation, not tuple"),
    ],
)
def test_failures_within_a_thread_have_their_type(make: Any, arguments: dict[str, Any], message: str) -> None:
    async def test() -> None:
        before = left_running()  # of another test: they may end meanwhile
        env = ThreadEnvironment(make, arguments=arguments)
        with pytest.raises(EnvironmentRaisedError, match=message):
            await env.reset(Task("reset"))
        try:
            await env.close()
        except EnvironmentRaisedError as error:
            assert error.call == "close"  # noqa: PT017 - NoEnvironment has none
        eventually(lambda: left_running() <= before, "its thread ended")

    run(test)


def test_an_exit_within_a_thread_is_a_failure_like_any_other() -> None:
    async def test() -> None:
        env = ThreadEnvironment(Obedient)
        await env.reset(Task("t"))
        with pytest.raises(EnvironmentRaisedError, match="SystemExit"):
            await env.step(Custom("exit", {"code": 3}))
        await env.close()

    run(test)
