"""Reward functions of the caller's own: a recorded run scored anew, and episodes while they are played."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from acting_server import acting
from agent_samples import sample_failure, sample_trajectory
from counting_world import CountingWorld, Worlds, right, tasks
from processes import HANG_S

from managed_vllm.agent import (
    FailureClass,
    RunStore,
    StopReason,
    StreamingTaskScheduler,
    Trajectory,
    rescore,
    run_episode,
    ui_tars,
)
from managed_vllm.agent.export import export
from managed_vllm.agent.report import passes, rows
from managed_vllm.agent.scores import ScoreWriter, scores_of
from managed_vllm.cli import main
from managed_vllm.errors import ConfigError, RunStoreError, ScoringFailedError

REWARDS = """
import os, signal

def by_number(trajectory):
    return trajectory.rollout / 4, {"steps": len(trajectory.steps)}

def dies(trajectory):
    with open("calls", "a") as file:
        file.write(f"{trajectory.task.id} {trajectory.rollout}\\n")
    if os.environ.get("DIE_AT") == f"{trajectory.task.id} {trajectory.rollout}":
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.75

def raises(trajectory):
    if trajectory.rollout == 1:
        raise KeyError("no such button")
    return 1
"""
AGENT = ui_tars("absolute", show_text=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two tasks of three rollouts, the first of the second one failed and was played again."""
    folder = tmp_path / "run"
    with RunStore.create(folder) as store:
        for task in ("a", "b"):
            for rollout in range(3):
                again = (task, rollout) == ("b", 0)
                if again:
                    store.append(sample_trajectory(None, task_id=task, failure=sample_failure(), steps=2))
                kept: dict[str, Any] = {"task_id": task, "rollout": rollout, "attempt": int(again)}
                store.append(sample_trajectory(None, **kept, reward=float(rollout == 0), steps=2))
    return folder


def by_number(trajectory: Trajectory) -> tuple[float, dict[str, Any]]:
    return trajectory.rollout / 4, {"steps": len(trajectory.steps)}


def scored(run: Path, reward: Any, **options: Any) -> Any:
    with RunStore.open(run) as store:
        return rescore(store, reward, **options)


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def rewards(run: Path, score: str | None = None) -> dict[tuple[str, int], float | None]:
    with RunStore.open(run, score=score) as store:
        return {entry.key: entry.reward for entry in store.counting()}


# -- a recorded run ----------------------------------------------------------------------------------------------------


def test_a_score_stands_in_the_rewards_place_where_it_is_asked_for(run: Path) -> None:
    before = files(run)
    report = scored(run, by_number)
    assert (report.name, report.scored, report.kept, report.failed, report.left_out) == ("by_number", 6, 0, 0, 1)
    assert {name: data for name, data in files(run).items() if not name.startswith("scores/")} == before
    assert rewards(run) == {(task, n): float(n == 0) for task in "ab" for n in range(3)}
    assert rewards(run, "by_number") == {(task, n): n / 4 for task in "ab" for n in range(3)}
    with RunStore.open(run, score="by_number") as store:
        assert store.score == "by_number"
        assert store.summary().mean_reward == pytest.approx(0.25)
        failed, *others = [one for one in store.attempts() if one.task.id == "b"]
        assert (failed.reward, failed.failure is None) == (None, False)
        assert [one.info["score"] for one in others] == [
            {"by": "by_number", "before": float(n == 0), "details": {"steps": 2}} for n in range(3)
        ]
        assert [one.reward for one in store.selected([("a", 2), ("a", 1)])] == [0.5, 0.25]
        assert passes(rows(store), success_at=0.5) == [(1, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3)), (3, 1.0)]


def test_an_export_can_have_the_score_and_says_so(run: Path, tmp_path: Path) -> None:
    scored(run, by_number)
    with RunStore.open(run, score="by_number") as store:
        export(store, "verl", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["score"] == "by_number"
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {line["reward_score"] for line in lines} == {0.0, 0.25, 0.5}


def test_coroutine_functions_run_side_by_side_also_where_a_loop_runs(run: Path) -> None:
    begun = 0
    all_there = asyncio.Event()

    async def together(trajectory: Trajectory) -> float:
        nonlocal begun
        begun += 1
        if begun == 3:
            all_there.set()
        await all_there.wait()
        return 0.5

    async def in_a_notebook() -> int:
        return int(scored(run, together, max_concurrency=3, timeout_s=HANG_S).scored)

    assert asyncio.run(in_a_notebook()) == 6
    assert set(rewards(run, "together").values()) == {0.5}


def test_no_more_trajectories_are_in_memory_than_are_scored_at_once(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run") as store:
        for rollout in range(12):
            store.append(sample_trajectory(None, task_id="counted", rollout=rollout, steps=1))

    def living() -> int:
        """Those of this run. By their very type: to ask an object for its class may have a lazy one import things."""
        return sum(type(each) is Trajectory and each.task.id == "counted" for each in gc.get_objects())

    counted = []

    def watching(trajectory: Trajectory) -> float:
        if trajectory.rollout % 5 == 1:
            counted.append(living())
        return 0.0

    scored(tmp_path / "run", watching, max_concurrency=1)
    assert len(counted) == 3
    assert max(counted) <= 2


def test_what_raises_has_no_score_is_named_and_tried_again(run: Path) -> None:
    broken = True
    calls: list[tuple[str, int]] = []

    def reward(trajectory: Trajectory) -> float:
        calls.append(trajectory.key)
        if broken and trajectory.rollout == 1:
            raise KeyError("no such button")
        return 1.0

    report = scored(run, reward)
    assert (report.scored, report.failed) == (4, 2)
    assert report.failures == tuple(f"{task}, rollout 1, attempt 0: KeyError: 'no such button'" for task in "ab")
    assert rewards(run, "reward") == {(task, n): None if n == 1 else 1.0 for task in "ab" for n in range(3)}
    calls.clear()
    broken = False
    report = scored(run, reward)
    assert (report.scored, report.kept, report.failed) == (2, 4, 0)
    assert calls == [("a", 1), ("b", 1)]
    assert set(rewards(run, "reward").values()) == {1.0}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("good", "'good', which is no number"),
        (float("nan"), "nan, which is no reward"),
        ((1.0, 2), "a tuple is a reward and a mapping"),
        ((1.0, {"why": object()}), "not plain JSON values"),
        (SystemExit(3), "SystemExit"),
    ],
)
def test_what_is_no_reward_is_a_failure_of_the_function(run: Path, said: Any, words: str) -> None:
    def wrong(trajectory: Trajectory) -> Any:
        if isinstance(said, SystemExit):
            raise said
        return said

    report = scored(run, wrong)
    assert report.failed == 6
    assert words in report.failures[0]


def test_a_function_that_hangs_is_given_up(run: Path) -> None:
    async def hangs(trajectory: Trajectory) -> float:
        if trajectory.rollout == 1:
            await asyncio.Event().wait()
        return 1.0

    report = scored(run, hangs, timeout_s=0.05)
    assert (report.scored, report.failed) == (4, 2)
    assert "took more than 0.05 s" in report.failures[0]


def test_a_function_that_always_raises_ends_it_and_the_former_score_stays(run: Path) -> None:
    scored(run, by_number, name="mine")
    before = (run / "scores" / "mine.jsonl").read_bytes()

    def broken(trajectory: Trajectory) -> float:
        return 1 / 0

    with pytest.raises(
        ScoringFailedError, match=r"raised 3 times in a row.*a, rollout 2, attempt 0: ZeroDivisionError"
    ) as error:
        scored(run, broken, name="mine", overwrite=True, stop_after_failures=3)
    assert error.value.count == 3
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert (run / "scores" / "mine.jsonl").read_bytes() == before


def test_another_function_wants_another_name_or_overwrites(run: Path) -> None:
    scored(run, by_number, name="mine")
    with pytest.raises(ConfigError, match=r"by test_rescoring:by_number .* overwrite"):
        scored(run, lambda trajectory: 1.0, name="mine")
    with pytest.raises(ConfigError, match="can't be a score's name"):
        scored(run, lambda trajectory: 1.0)
    report = scored(run, lambda trajectory: None, name="mine", overwrite=True)
    assert (report.scored, report.kept) == (6, 0)
    assert set(rewards(run, "mine").values()) == {None}
    assert scores_of(run) == ["mine"]


def test_a_function_of_a_notebook_that_was_changed_is_another_one(run: Path) -> None:
    def of(text: str) -> Any:
        names: dict[str, Any] = {}
        exec(text, names)
        return names["f"]

    assert scored(run, of("def f(trajectory): return 1.0")).scored == 6
    assert scored(run, of("def f(trajectory):\n    return 1.0")).kept == 6
    with pytest.raises(ConfigError, match="in another state or by another function"):
        scored(run, of("def f(trajectory): return 2.0"))


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "x" * 200, "ü"])
def test_a_name_is_no_path(run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't be a score's name"):
        scored(run, by_number, name=name)
    with pytest.raises(ConfigError, match="has no score"):
        RunStore.open(run, score=name)


def test_a_run_that_has_grown_is_scored_where_it_has(run: Path) -> None:
    scored(run, by_number)
    with RunStore.create(run) as store:
        store.append(sample_trajectory(None, task_id="c", rollout=3, steps=1))
        with RunStore.open(run, score="by_number") as reading:
            assert [entry.reward for entry in reading.counting()][-1] is None
        report = rescore(store, by_number)
    assert (report.scored, report.kept) == (1, 6)
    assert rewards(run, "by_number")["c", 3] == 0.75


def test_writers_that_joined_have_their_own_scores(tmp_path: Path) -> None:
    """Their attempts may begin at the same byte, each of its own log."""
    for rollout in range(3):
        with RunStore.join(tmp_path / "run") as store:
            store.append(sample_trajectory(None, rollout=rollout, steps=1))
    scored(tmp_path / "run", by_number)
    assert rewards(tmp_path / "run", "by_number") == {("t-1", n): n / 4 for n in range(3)}


def test_one_process_makes_a_score_at_a_time(run: Path) -> None:
    with ScoreWriter(run, "by_number", "m:f", "", overwrite=False):
        with pytest.raises(RunStoreError, match="is being made by another process"):
            scored(run, by_number)
        scored(run, by_number, name="other")


def test_a_line_that_was_cut_off_is_scored_again(run: Path) -> None:
    report = scored(run, by_number)
    whole = report.path.read_bytes()
    report.path.with_name(".by_number.jsonl-new").write_bytes(whole[:-10])
    report.path.unlink()
    report = scored(run, by_number)
    assert (report.scored, report.kept) == (1, 5)
    assert rewards(run, "by_number") == {(task, n): n / 4 for task in "ab" for n in range(3)}


def test_a_score_that_was_made_anew_meanwhile_is_an_error_and_no_wrong_details(run: Path) -> None:
    scored(run, by_number)
    with RunStore.open(run, score="by_number") as store:
        scored(run, lambda trajectory: (0.5, {"another": "one" * trajectory.rollout}), name="by_number", overwrite=True)
        with pytest.raises(RunStoreError, match="open the run again"):
            list(store.trajectories())


# -- the command -------------------------------------------------------------------------------------------------------


def rescore_command(run: Path, function: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    (run.parent / "myrewards.py").write_text(REWARDS)
    command = [
        sys.executable,
        "-m",
        "managed_vllm.cli",
        "rescore",
        str(run),
        "--reward",
        f"myrewards:{function}",
        *words,
    ]
    return subprocess.run(
        command, cwd=run.parent, env={**os.environ, **env}, capture_output=True, text=True, timeout=4 * HANG_S
    )


def test_killed_in_the_middle_the_same_command_goes_on(run: Path) -> None:
    died = rescore_command(run, "dies", DIE_AT="b 1")
    assert died.returncode == -signal.SIGKILL
    assert scores_of(run) == []
    with pytest.raises(ConfigError, match="has no score 'dies'"):
        RunStore.open(run, score="dies")
    done = rescore_command(run, "dies")
    assert done.returncode == 0, done.stderr
    assert "2 attempts scored, 4 kept" in done.stdout
    calls = (run.parent / "calls").read_text().splitlines()
    assert calls == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 1", "b 2"]
    assert set(rewards(run, "dies").values()) == {0.75}


def test_ctrl_c_before_the_first_score_loses_none_of_the_next_call(run: Path) -> None:
    interrupted = True

    def slow(trajectory: Trajectory) -> float:
        if interrupted:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        scored(run, slow)
    interrupted = False
    assert scored(run, slow).scored == 6
    assert set(rewards(run, "slow").values()) == {0.5}
    assert scored(run, slow).kept == 6


def test_the_command_scores_names_what_raised_and_view_and_export_show_the_score(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "myrewards_here.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["rescore", str(run), "--reward", "myrewards_here:raises"]) == 1
    said = capsys.readouterr()
    assert "error: a, rollout 1, attempt 0: KeyError: 'no such button'" in said.err
    assert "2 attempts have no score" in said.err
    assert "mean reward 1.000, recorded 0.333" in said.out
    assert (
        main(["rescore", str(run), "--reward", "myrewards_here:by_number", "--name", "n", "--success-at", "0.4"]) == 0
    )
    assert "pass@1 33.3%  pass@2 66.7%  pass@3 100.0%" in capsys.readouterr().out
    assert main(["view", str(run), "--score", "n", "--out", str(tmp_path / "page.html")]) == 0
    assert "run, scored by n" in (tmp_path / "page.html").read_text()
    assert main(["export", str(run), "--score", "n", "--to", "atif", "--out", str(tmp_path / "atif")]) == 0
    assert main(["view", str(run), "--score", "none"]) == 2
    assert "has no score 'none'; there is n, raises" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["nothing", "no.such:function", "json:nothing", "json:__name__"])
def test_a_function_that_is_not_there_is_told_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    before = files(run)
    assert main(["rescore", str(run), "--reward", word]) == 2
    assert word.partition(":")[0] in capsys.readouterr().err
    assert files(run) == before


# -- while it is played ------------------------------------------------------------------------------------------------


def played(reward: Any) -> Trajectory:
    async def play() -> Trajectory:
        with acting(right) as server:
            async with server.client() as client:
                return await run_episode(client, CountingWorld(), tasks(1)[0], agent=AGENT, reward=reward)

    return asyncio.run(play())


def test_a_reward_function_has_the_last_word() -> None:
    async def shaped(trajectory: Trajectory) -> tuple[float, dict[str, Any]]:
        assert trajectory.reward == 1.0
        return trajectory.reward - 0.1 * len(trajectory.steps), {"steps": len(trajectory.steps)}

    found = played(shaped)
    assert found.reward == pytest.approx(0.7)
    assert found.info["score"] == {
        "by": "test_rescoring:test_a_reward_function_has_the_last_word.<locals>.shaped",
        "before": 1.0,
        "details": {"steps": 3},
    }
    assert played(lambda trajectory: None).reward is None


def test_what_a_reward_function_raises_fails_the_attempt() -> None:
    def broken(trajectory: Trajectory) -> float:
        raise LookupError("no such file")

    found = played(broken)
    assert (found.stop_reason, found.reward) == (StopReason.USER_FAILURE, None)
    assert found.failure is not None
    assert (found.failure.kind, found.failure.stage, found.failure.step) == (FailureClass.USER_CODE, "reward", None)
    assert len(found.steps) == 3


def test_a_run_is_made_of_its_reward_function(tmp_path: Path) -> None:
    def play(reward: Any) -> list[float | None]:
        with acting(right) as server, RunStore.create(tmp_path / "run") as store:
            scheduler = StreamingTaskScheduler(server.client(), Worlds(), agent=AGENT, store=store, reward=reward)
            return [trajectory.reward for trajectory in scheduler.run_all(tasks(2))]

    assert play(by_number) == [0.0, 0.0]
    with pytest.raises(RunStoreError, match="reward: the run has 'test_rescoring:by_number', asked for is nothing"):
        play(None)


def test_the_rollout_command_takes_a_reward_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "myrewards_played.py").write_text(REWARDS)
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "presses": 1}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--env", "counting_world:CountingWorld", "--tasks", "tasks.jsonl", "--n", "2", "--max-images", "0"]
    with acting(lambda messages: "Thought: done\nAction: finished(content='done')") as server:
        monkeypatch.setenv("VLLM_SERVER_URL", server.url)
        monkeypatch.setenv("VLLM_MODEL_NAME", "acting")
        code = main(["rollout", *words, "--out", "run", "--reward", "myrewards_played:by_number", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert json.loads(said.out)["mean_reward"] == 0.125
    assert rewards(tmp_path / "run") == {("a", 0): 0.0, ("a", 1): 0.25}
