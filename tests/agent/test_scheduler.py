"""Tasks × n rollouts through a pool of environments: order, retries, groups, pausing, stopping, and what it holds."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acting_server import ActingServer, Refusal, acting, text_of
from counting_world import CountingWorld, Worlds, hang, right, tasks, until
from moved_clock import Clock
from processes import HANG_S

from managed_vllm.agent import (
    AgentFormat,
    FailureClass,
    Group,
    GroupPolicy,
    History,
    Limits,
    RetryRollouts,
    RunStore,
    StopReason,
    StreamingTaskScheduler,
    Task,
    Trajectory,
    ui_tars,
)
from managed_vllm.agent.prompting import Chat
from managed_vllm.agent.run_progress import RunStats, describe, eta_s
from managed_vllm.agent.tasks import as_task
from managed_vllm.errors import AuthenticationError, ConfigError, ModelNotFoundError

PARAMS = {"max_tokens": 200, "temperature": 0}
AGENT = ui_tars("absolute", show_text=True)
QUICK = RetryRollouts(delay_s=0.01)


def scheduler(server: ActingServer, worlds: Any, **options: Any) -> StreamingTaskScheduler:
    given = {"sampling_params": PARAMS, "agent": AGENT, "retry": QUICK, **options}
    return StreamingTaskScheduler(server.client(), worlds, **given)


@pytest.fixture(scope="module")
def server() -> Iterator[ActingServer]:
    """One that always answers what is right."""
    with acting(right) as made:
        yield made


def failing(times: int, call: str = "step", only: str | None = None) -> Any:
    """A fault: that call raises, so many times."""
    left = [times]

    def fault(world: CountingWorld, name: str) -> None:
        assert world.task is not None
        if name == call and left[0] and only in (None, world.task.id):
            left[0] -= 1
            raise ConnectionError("the desktop does not answer")

    return fault


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_each_task_has_n_rollouts_and_each_comes_once(server: ActingServer) -> None:
    found = scheduler(server, Worlds(), n=4, max_concurrency=5).run_all(tasks(7, lambda number: number % 3))
    assert [one.key for one in found] == [(f"task-{task:03}", rollout) for task in range(7) for rollout in range(4)]
    assert {one.reward for one in found} == {1.0}


@pytest.mark.parametrize("most", [1, 3, 16])
def test_no_more_environments_than_max_concurrency_are_open_and_they_are_reused(
    server: ActingServer, most: int
) -> None:
    open_now, highest = 0, 0

    class Counted(CountingWorld):
        async def reset(self, task: Task) -> Any:
            nonlocal open_now, highest
            if not self.steps and self.number == len(self.worlds.made) - 1:
                open_now += 1
            highest = max(highest, sum(not world.closed for world in worlds.made))
            return await super().reset(task)

    worlds = Worlds()
    scheduler(server, lambda: Counted(None, worlds), n=3, max_concurrency=most).run_all(tasks(8))
    assert highest <= most
    assert len(worlds.made) <= most
    assert worlds.calls["reset"] == 24
    assert all(world.closed for world in worlds.made)


def test_without_reuse_every_episode_has_an_environment_of_its_own(server: ActingServer) -> None:
    worlds = Worlds()
    scheduler(server, worlds, max_concurrency=2, reuse_environments=False).run_all(tasks(6))
    assert len(worlds.made) == 6
    assert all(world.closed for world in worlds.made)


def test_environments_may_be_made_by_a_coroutine(server: ActingServer) -> None:
    worlds = Worlds()

    async def make() -> CountingWorld:
        await asyncio.sleep(0)
        return worlds()

    assert [one.reward for one in scheduler(server, make).run_all(tasks(3))] == [1.0] * 3


def test_an_environment_that_can_not_be_made_fails_the_attempt_and_is_tried_again(server: ActingServer) -> None:
    worlds = Worlds()
    left = [2]

    def make() -> CountingWorld:
        if left[0]:
            left[0] -= 1
            raise OSError("no virtual machine is free")
        return worlds()

    attempts: list[Trajectory] = []
    found = scheduler(server, make, on_attempt=attempts.append).run_all(tasks(1))
    assert [one.failure and one.failure.stage for one in attempts] == ["make", "make", None]
    assert found[0].reward == 1.0


def test_making_an_environment_has_a_time_out(server: ActingServer) -> None:
    async def make() -> CountingWorld:
        await hang()
        raise AssertionError

    options = {"limits": Limits(reset_timeout_s=0.1), "retry": RetryRollouts(max_attempts=1)}
    found = scheduler(server, make, **options).run_all(tasks(2))
    assert [one.failure and one.failure.error_type for one in found] == ["EnvironmentTimeoutError"] * 2


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_tasks_are_taken_only_as_there_is_room(server: ActingServer) -> None:
    taken = 0

    def endless() -> Iterator[Task]:
        nonlocal taken
        while True:
            taken += 1
            yield Task(f"task-{taken}", data={"presses": 1})

    async def main() -> int:
        ended = 0
        async for _ in scheduler(server, Worlds(), max_concurrency=4).run(endless()):
            ended += 1
            if ended == 20:
                break
        return ended

    assert asyncio.run(main()) == 20
    assert taken <= 20 + 3 * 4 + 1


def test_tasks_may_come_while_the_run_goes_on(server: ActingServer) -> None:
    """The second task is made from the first one's result."""
    results: asyncio.Queue[Trajectory] = asyncio.Queue()

    async def coming() -> AsyncIterator[Task]:
        yield Task("first", data={"presses": 1})
        first = await results.get()
        yield Task(f"after {first.task.id}", data={"presses": 1})

    async def main() -> list[str]:
        found = []
        async for trajectory in scheduler(server, Worlds()).run(coming()):
            results.put_nowait(trajectory)
            found.append(trajectory.task.id)
        return found

    assert asyncio.run(main()) == ["first", "after first"]


def test_a_consumer_that_is_slow_holds_the_workers_up(server: ActingServer) -> None:
    worlds = Worlds()

    async def main() -> None:
        running = scheduler(server, worlds, max_concurrency=2, max_ahead=3)
        results = running.run(tasks(100, 0))
        await anext(results)
        # One was given, three wait, each of two workers has one more in its hand.
        await until(lambda: worlds.calls["evaluate"] >= 6)
        await asyncio.sleep(0.1)
        assert worlds.calls["evaluate"] == 6
        await results.aclose()

    asyncio.run(main())


def test_two_tasks_with_one_id_are_an_error(server: ActingServer) -> None:
    with pytest.raises(ConfigError, match="two tasks have the id 'a'"):
        scheduler(server, Worlds()).run_all([Task("a"), Task("b"), Task("a")])


@pytest.mark.parametrize(
    ("given", "task"),
    [
        ("Press it.", Task("Press it.", "Press it.")),
        ({"id": 7, "instruction": "x", "seed": 3}, Task("7", "x", 3, {"id": 7, "instruction": "x", "seed": 3})),
        ({"task_id": "t"}, Task("t", data={"task_id": "t"})),
    ],
)
def test_a_task_may_be_a_text_or_a_mapping(given: Any, task: Task) -> None:
    assert as_task(given) == task


@pytest.mark.parametrize("given", [3, {}, {"instruction": "x"}, None, ""])
def test_what_is_no_task_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="not a task"):
        as_task(given)


def test_a_text_in_place_of_a_list_is_refused(server: ActingServer) -> None:
    with pytest.raises(ConfigError, match="iterable of tasks"):
        scheduler(server, Worlds()).run_all("Press it.")


def test_what_the_callers_iterable_raises_comes_out(server: ActingServer) -> None:
    def some() -> Iterator[Task]:
        yield Task("a")
        raise KeyError("data set")

    with pytest.raises(KeyError, match="data set"):
        scheduler(server, Worlds()).run_all(some())


# -- retries -----------------------------------------------------------------------------------------------------------


def test_an_attempt_that_failed_is_played_again_with_its_number_counted_up(server: ActingServer) -> None:
    attempts: list[Trajectory] = []
    worlds = Worlds(failing(2))
    running = scheduler(server, worlds, on_attempt=attempts.append)
    found = running.run_all(tasks(1))
    assert [(one.attempt, one.ok) for one in attempts] == [(0, False), (1, False), (2, True)]
    assert [one.attempt for one in found] == [2]
    assert len(worlds.made) == 3
    assert (running.stats.retried, running.stats.failed) == (2, 0)


def test_one_that_fails_each_time_comes_out_with_its_failure(server: ActingServer) -> None:
    running = scheduler(server, Worlds(failing(99)), retry=RetryRollouts(max_attempts=2, delay_s=0))
    found = running.run_all(tasks(1))
    assert found[0].attempt == 1
    assert found[0].failure is not None
    assert found[0].failure.kind is FailureClass.ENVIRONMENT
    assert (running.stats.failed, running.stats.done, running.stats.mean_reward) == (1, 1, None)


def test_failures_of_the_callers_code_are_not_tried_again(server: ActingServer) -> None:
    def hook(*_: Any) -> None:
        raise ZeroDivisionError

    attempts: list[Trajectory] = []
    found = scheduler(server, Worlds(), on_step=hook, on_attempt=attempts.append).run_all(tasks(1))
    assert len(attempts) == 1
    assert found[0].stop_reason is StopReason.USER_FAILURE


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (Refusal(401, "wrong key"), AuthenticationError),
        (Refusal(404, "The model `acting` does not exist."), ModelNotFoundError),
    ],
)
def test_an_error_that_every_request_would_meet_ends_the_run(refusal: Refusal, error: type[Exception]) -> None:
    worlds = Worlds()
    with acting(lambda _: refusal) as refusing:
        refusing_scheduler = scheduler(refusing, worlds, max_concurrency=2, agent=no_pictures())
        with pytest.raises(error):
            refusing_scheduler.run_all(tasks(50))
    assert worlds.calls["reset"] < 10
    assert all(world.closed for world in worlds.made)


def no_pictures() -> AgentFormat:
    return replace(AGENT, build_messages=Chat(show_screenshot=False))


# -- groups ------------------------------------------------------------------------------------------------------------


async def groups_of(running: StreamingTaskScheduler, given: Any) -> list[Group]:
    return [group async for group in running.run_groups(given)]


def test_groups_come_as_they_are_complete(server: ActingServer) -> None:
    found = asyncio.run(groups_of(scheduler(server, Worlds(), n=3), tasks(4)))
    assert sorted(group.task.id for group in found) == [f"task-{number:03}" for number in range(4)]
    for group in found:
        assert [one.rollout for one in group.trajectories] == [0, 1, 2]
        assert group.complete
        assert not group.dropped


ONE_BAD = "task-001"


def test_a_group_is_kept_with_a_gap(server: ActingServer) -> None:
    worlds = Worlds(failing(99, only=ONE_BAD))
    found = asyncio.run(groups_of(scheduler(server, worlds, n=2), tasks(2)))
    bad = next(group for group in found if group.task.id == ONE_BAD)
    assert not bad.complete
    assert not bad.dropped
    assert [one.reward for one in bad.trajectories] == [None, None]


def test_a_group_is_dropped_whole_and_the_rest_of_it_is_not_played(server: ActingServer) -> None:
    async def main() -> tuple[list[Group], list[Trajectory]]:
        worlds = Worlds(failing(99, only=ONE_BAD))
        options: dict[str, Any] = {
            "n": 8,
            "group": "drop",
            "max_concurrency": 2,
            "retry": RetryRollouts(max_attempts=1),
        }
        groups = await groups_of(scheduler(server, worlds, **options), tasks(3))
        bad_resets = sum(1 for _, call in worlds.log if call == "reset") - 16
        assert 1 <= bad_resets <= 3
        alone = [one async for one in scheduler(server, worlds, **options).run(tasks(3))]
        return groups, alone

    groups, alone = asyncio.run(main())
    assert {group.task.id: group.dropped for group in groups} == {
        "task-000": False,
        ONE_BAD: True,
        "task-002": False,
    }
    assert Counter(one.task.id for one in alone) == {"task-000": 8, "task-002": 8}


def test_a_group_is_repeated_whole(server: ActingServer) -> None:
    attempts: list[Trajectory] = []
    running = scheduler(
        server,
        Worlds(failing(1, only=ONE_BAD)),
        n=3,
        group=GroupPolicy.REPEAT,
        retry=RetryRollouts(max_attempts=1, max_rounds=2),
        on_attempt=attempts.append,
    )
    found = running.run_all(tasks(2))
    assert [one.key for one in found] == [(f"task-{task:03}", rollout) for task in range(2) for rollout in range(3)]
    assert {one.group_round for one in found if one.task.id == ONE_BAD} == {1}
    assert {one.reward for one in found} == {1.0}
    assert running.stats.done == 6


def test_a_group_that_fails_in_every_round_is_dropped(server: ActingServer) -> None:
    running = scheduler(
        server,
        Worlds(failing(99, only=ONE_BAD)),
        n=2,
        group="repeat",
        retry=RetryRollouts(max_attempts=1, max_rounds=3, delay_s=0),
    )
    found = asyncio.run(groups_of(running, tasks(2)))
    bad = next(group for group in found if group.task.id == ONE_BAD)
    assert bad.dropped
    assert {one.group_round for one in bad.trajectories} == {2}


def test_decide_n_asks_for_more_rollouts_or_is_content_with_fewer(server: ActingServer) -> None:
    asked: list[tuple[str, int]] = []

    def decide(task: Task, so_far: Any) -> int:
        asked.append((task.id, len(so_far)))
        return 5 if task.id == "task-000" else 1

    found = scheduler(server, Worlds(), n=2, decide_n=decide, max_concurrency=1).run_all(tasks(2))
    assert Counter(one.task.id for one in found) == {"task-000": 5, "task-001": 1}
    assert ("task-000", 5) in asked


def test_rollouts_that_are_not_needed_any_more_are_cancelled(server: ActingServer) -> None:
    """The first to end decides; the others hang, and would never end."""
    running_now = asyncio.Event()
    worlds = Worlds()

    def fault(world: CountingWorld, call: str) -> Any:
        if call != "step":
            return None
        if worlds.calls["step"] >= 4:
            running_now.set()
        return running_now.wait() if world.number == 0 else hang()

    worlds.fault = fault
    found = asyncio.run(groups_of(scheduler(server, worlds, n=4, decide_n=lambda *_: 1), tasks(1, 1)))
    assert [len(group.trajectories) for group in found] == [1]
    assert found[0].trajectories[0].reward == 1.0
    assert all(world.closed for world in worlds.made)


def test_a_decision_that_is_no_number_is_an_error(server: ActingServer) -> None:
    with pytest.raises(ConfigError, match="decide_n"):
        scheduler(server, Worlds(), decide_n=lambda *_: None).run_all(tasks(1))


# -- pausing and weights -----------------------------------------------------------------------------------------------


def test_pause_waits_for_what_is_on_its_way_and_holds_back_the_rest() -> None:
    release = threading.Event()

    async def slowly(messages: list[dict[str, Any]]) -> str:
        await until(release.is_set)
        return right(messages)

    asking = Asking(AGENT)

    async def main() -> list[Trajectory]:
        with acting(lambda messages: slowly(messages)) as slow:
            limits = Limits(episode_timeout_s=4 * HANG_S)
            running = scheduler(slow, Worlds(), max_concurrency=4, limits=limits, agent=asking.agent)
            running.weight_version = "v1"
            playing = asyncio.create_task(collect(running, tasks(4, 2)))
            await until(lambda: slow.in_flight == 4)
            pausing = asyncio.create_task(running.pause())
            await asyncio.sleep(0.05)
            assert not pausing.done()
            release.set()
            await pausing
            assert slow.in_flight == 0
            asked = len(slow.requests)
            running.weight_version = "v2"
            await until(lambda: asking.count == 8)
            await asyncio.sleep(0.2)
            assert len(slow.requests) == asked, "nobody asks while it is paused"
            running.resume()
            return await playing

    found = asyncio.run(main())
    assert [one.reward for one in found] == [1.0] * 4
    assert {tuple(step.weight_version for step in one.steps) for one in found} == {("v1", "v2", "v2")}
    assert all(one.steps[1].timings.queue_s > 0.05 for one in found)


class Asking:
    """An agent, and how many requests it has come to: each of them is at the gate, unless it was the run's first with
    images, for which the server is looked at before."""

    def __init__(self, agent: AgentFormat) -> None:
        self.count = 0
        self._build = agent.build_messages
        self.agent = replace(agent, build_messages=self._counted)

    def _counted(self, history: History) -> Any:
        self.count += 1
        return self._build(history)


def test_the_time_of_a_pause_does_not_count_for_the_episode(server: ActingServer, clock: Clock) -> None:
    async def main() -> list[Trajectory]:
        asking = Asking(no_pictures())
        running = scheduler(server, Worlds(), limits=Limits(episode_timeout_s=1000), agent=asking.agent)
        await running.pause()
        playing = asyncio.create_task(collect(running, tasks(1)))
        await until(lambda: asking.count)
        clock.forward(3600)
        running.resume()
        return await playing

    assert [one.reward for one in asyncio.run(main())] == [1.0]


def test_another_thread_can_pause_and_resume(server: ActingServer) -> None:
    """The last task waits for it."""
    steps, resumed = threading.Semaphore(0), threading.Event()

    def fault(world: CountingWorld, call: str) -> Any:
        if call == "step":
            steps.release()
        last = world.task is not None and world.task.id == "task-005"
        return until(resumed.is_set) if call == "reset" and last else None

    running = scheduler(server, Worlds(fault), max_concurrency=2)
    found: list[Trajectory] = []
    thread = threading.Thread(target=lambda: found.extend(running.run_all(tasks(6, 3))))
    thread.start()
    assert steps.acquire(timeout=HANG_S)
    asyncio.run(running.pause())
    paused_at = len(server.requests)
    running.weight_version = "new"
    assert len(server.requests) == paused_at
    running.resume()
    resumed.set()
    thread.join(HANG_S)
    assert [one.reward for one in found] == [1.0] * 6
    assert found[-1].steps[-1].weight_version == "new"


async def collect(running: StreamingTaskScheduler, given: Any) -> list[Trajectory]:
    return [one async for one in running.run(given)]


# -- stores ------------------------------------------------------------------------------------------------------------


def test_what_the_store_has_finished_is_not_played_again_and_comes_with_the_rest(
    server: ActingServer, tmp_path: Path
) -> None:
    with RunStore.create(tmp_path / "run", {}) as store:
        scheduler(server, Worlds(), n=2, store=store).run_all(tasks(3))
    with RunStore.create(tmp_path / "run", {}) as store:
        worlds = Worlds()
        running = scheduler(server, worlds, n=3, store=store)
        found = running.run_all(tasks(4))
        assert [one.key for one in found] == [(f"task-{task:03}", number) for task in range(4) for number in range(3)]
        assert worlds.calls["reset"] == 6
        assert (running.stats.stored, running.stats.done, running.stats.expected) == (6, 12, 12)
        assert len(store) == 12
        fresh = scheduler(server, worlds, n=3, store=store)
        assert asyncio.run(collect(fresh, tasks(4))) == []


def test_rollouts_that_decide_n_had_asked_for_are_not_played_again(server: ActingServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n": 2, "decide_n": lambda *_: 5}
    with RunStore.create(tmp_path / "run", {}) as store:
        scheduler(server, Worlds(), store=store, **options).run_all(tasks(2))
        worlds = Worlds()
        found = scheduler(server, worlds, store=store, **options).run_all(tasks(2))
    assert worlds.calls["reset"] == 0
    assert Counter(one.task.id for one in found) == {"task-000": 5, "task-001": 5}


def test_attempts_of_earlier_runs_count_on(server: ActingServer, tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", {}) as store:
        once = RetryRollouts(max_attempts=1)
        for _ in range(2):
            scheduler(server, Worlds(failing(99)), store=store, retry=once).run_all(tasks(1))
        found = scheduler(server, Worlds(), store=store).run_all(tasks(1))
        assert [one.attempt for one in found] == [2]
        assert [(entry.attempt, entry.ok) for entry in store.entries()] == [(0, False), (1, False), (2, True)]


def test_a_repeated_group_goes_on_in_its_round(server: ActingServer, tmp_path: Path) -> None:
    repeat: dict[str, Any] = {"n": 2, "group": "repeat", "retry": RetryRollouts(max_attempts=1, max_rounds=2)}
    with RunStore.create(tmp_path / "run", {}) as store:
        scheduler(server, Worlds(failing(1)), store=store, max_concurrency=1, **repeat).run_all(tasks(1))
        rounds = {entry.key: entry.group_round for entry in store.counting() if entry.ok}
        assert rounds == {("task-000", 0): 1, ("task-000", 1): 1}
        worlds = Worlds()
        scheduler(server, worlds, store=store, **repeat).run_all(tasks(1))
        assert worlds.calls["reset"] == 0


def test_a_store_that_fails_ends_the_run_with_its_error(server: ActingServer, tmp_path: Path) -> None:
    worlds = Worlds()
    with RunStore.create(tmp_path / "run", {}) as store:
        running = scheduler(server, worlds, store=store)
        store.close()
        with pytest.raises(Exception, match="closed"):
            running.run_all(tasks(20))
    assert all(world.closed for world in worlds.made)


# -- its end -----------------------------------------------------------------------------------------------------------


def test_what_a_hook_of_the_run_raises_ends_it_and_comes_out(server: ActingServer) -> None:
    worlds = Worlds()

    def hook(trajectory: Trajectory) -> None:
        raise LookupError("my bookkeeping")

    with pytest.raises(LookupError, match="my bookkeeping"):
        scheduler(server, worlds, on_attempt=hook).run_all(tasks(20))
    assert all(world.closed for world in worlds.made)


def test_one_scheduler_runs_once_at_a_time_and_any_number_of_times(server: ActingServer) -> None:
    running = scheduler(server, Worlds())

    async def main() -> None:
        first = running.run(tasks(5))
        await anext(first)
        with pytest.raises(ConfigError, match="runs already"):
            await anext(running.run(tasks(1)))
        await first.aclose()

    asyncio.run(main())
    for _ in range(3):
        assert [one.reward for one in running.run_all(tasks(2))] == [1.0] * 2


def test_run_all_works_within_a_running_event_loop(server: ActingServer) -> None:
    async def notebook() -> list[Trajectory]:
        return list(scheduler(server, Worlds()).run_all(tasks(2)))

    assert [one.reward for one in asyncio.run(notebook())] == [1.0] * 2


def test_an_environment_that_can_not_be_closed_is_told_in_the_log(
    server: ActingServer, caplog: pytest.LogCaptureFixture
) -> None:
    found = scheduler(server, Worlds(failing(99, "close"))).run_all(tasks(2))
    assert [one.reward for one in found] == [1.0] * 2
    assert "could not be closed: ConnectionError: the desktop does not answer" in caplog.text


@pytest.mark.parametrize("wrong", [{"n": 0}, {"max_concurrency": 0}, {"max_ahead": 0}, {"group": "lose"}])
def test_wrong_arguments_are_refused(server: ActingServer, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        scheduler(server, Worlds(), **wrong)


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"max_images": -1}, {"step_timeout_s": 0}])
def test_wrong_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_line_that_is_shown_says_what_is_done_and_what_is_left() -> None:
    class AfterTenSeconds(RunStats):
        elapsed_s = 10.0

    stats = AfterTenSeconds(tasks=10, tasks_known=20, expected=40, done=30, failed=2, running=8, retried=3, rewards=20,
                            reward_sum=15.0, steps=90, tokens=900, stored=10)  # fmt: skip
    line = describe(stats)
    assert line == ("rollouts 30/80, 8 running, 2 failed (3 retried), reward 0.75, 9.0 steps/s, 90 tokens/s, ETA 0:25")
    assert eta_s(stats) == 25


def test_progress_tells_of_the_run_where_there_is_no_terminal(
    server: ActingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler(server, Worlds(), progress=True).run_all(tasks(3))
    assert "rollouts 3/3, 0 running, reward 1.00" in capsys.readouterr().err


def test_the_servers_errors_show_in_no_other_trajectory() -> None:
    """Half of the rollouts are refused; the others do not notice."""

    def answer(messages: list[dict[str, Any]]) -> Any:
        return Refusal(400, "no") if "odd" in text_of(messages[1]) else right(messages)

    given = [Task(str(number), "odd" if number % 2 else "even", data={"presses": 1}) for number in range(40)]
    with acting(answer) as refusing:
        found = scheduler(refusing, Worlds(), retry=RetryRollouts(max_attempts=1)).run_all(given)
    assert [one.ok for one in found] == [True, False] * 20
