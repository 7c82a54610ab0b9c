"""Rollouts while things are killed: the process that plays them, and the server that answers."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from acting_server import acting
from counting_world import Worlds, right, tasks
from killing import Counting, answered, check_after_kills, play_while_killing
from processes import HANG_S, INSTANT, eventually

from managed_vllm import ManagedVLLM
from managed_vllm.agent import RunStore, StreamingTaskScheduler, Trajectory
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.prompting import Chat

TESTS = Path(__file__).resolve().parent.parent / "helpers"


def grown_or_over(log: Path, size: int, process: subprocess.Popen[bytes]) -> bool:
    return log.stat().st_size > size or process.poll() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("most", [8, pytest.param(40, marks=pytest.mark.soak)])
def test_a_run_killed_at_random_moments_has_every_rollout_once_and_plays_no_finished_one_again(
    tmp_path: Path, most: int
) -> None:
    count, n = 2 * most, 3
    rng = random.Random(5)
    run, log = tmp_path / "run", tmp_path / "resets"
    log.touch()
    kills = 0
    finished: set[tuple[str, int]] = set()
    with acting(right) as server:
        while True:
            words = [sys.executable, TESTS / "rollout_process.py", server.url, run, log, str(count), str(n)]
            seen = log.stat().st_size
            process = subprocess.Popen([str(word) for word in words])
            try:
                if kills < most:
                    # At any moment of its life: of its start, of the first episodes, or later on.
                    if kills % 4:
                        eventually(functools.partial(grown_or_over, log, seen, process), "a reset")
                    time.sleep(rng.uniform(0, 0.12))  # not to wait for anything: the moment is what is drawn
                    process.kill()
                    code = process.wait()
                    assert code in (0, -signal.SIGKILL)
                    kills = kills + 1 if code else most  # 0: the kill came late, all was played before
                else:
                    assert process.wait(120) == 0
            finally:
                process.kill()
                process.wait()
            played = Counter(line.split()[1] for line in log.read_bytes()[seen:].decode().splitlines())
            # Of a task all of whose rollouts were finished before, none was begun again.
            whole = {task for task, many in Counter(task for task, _ in finished).items() if many == n}
            assert not whole & played.keys()
            for task, many in Counter(task for task, _ in finished).items():
                assert played[task] <= n - many
            if not run.exists() or not (run / "run.json").exists():
                continue
            with RunStore.open(run) as store:
                now = store.finished()
                assert finished <= now, "what was finished stays so"
                finished = now
                if kills >= most and len(now) == count * n:
                    oks = Counter(entry.key for entry in store.entries() if entry.ok)
                    assert set(oks.values()) == {1}, "each exactly once"
                    for trajectory in store.trajectories():
                        assert trajectory.reward == 1.0
                        assert len(trajectory.steps) == int(trajectory.task.data["presses"]) + 1
                    break


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_trajectory_is_lost_when_the_server_is_killed_three_times(home: Path) -> None:
    def kill(status: Any) -> None:
        os.kill(status.server_pid, signal.SIGKILL)

    count, turns = 12, 6
    environment = standin.orders(token_s=0.005)
    with ManagedVLLM("demo", command=standin.command(), env=environment, keep_alive=INSTANT, progress=False) as llm:
        found = play_while_killing(llm, kill, count=count, turns=turns, kills=3)
    check_after_kills(found, count=count, turns=turns, kills=3)
    for one in found:
        for step in one.steps:
            # The stand-in's rule: what follows from the prompt, whichever life has answered.
            assert list(step.response_token_ids) == standin.continuation(list(step.prompt_token_ids), 24)
            assert list(step.response_logprobs or ()) == [standin.logprob_of(one) for one in step.response_token_ids]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_is_stopped_for_good_ends_the_run_and_leaves_what_was_finished(
    home: Path, tmp_path: Path
) -> None:
    environment = standin.orders(token_s=0.002)
    worlds = Worlds()
    with (
        RunStore.create(tmp_path / "run", {}) as store,
        ManagedVLLM("demo", command=standin.command(), env=environment, keep_alive=INSTANT, progress=False) as llm,
    ):
        stopped: list[Trajectory] = []

        def stop_in_the_middle(trajectory: Trajectory) -> None:
            if len(store) >= 10 and not stopped:  # another thread appends: several may have come since the last look
                stopped.append(trajectory)
                llm.stop_server()

        scheduler = StreamingTaskScheduler(
            llm,
            lambda: Counting(None, worlds),
            max_concurrency=4,
            sampling_params={"max_tokens": 8},
            agent=AgentFormat(Chat(show_screenshot=False), answered),
            store=store,
            on_attempt=stop_in_the_middle,
        )
        with pytest.raises(Exception, match=r"stopped|gone"):
            scheduler.run_all(tasks(200, 2))
        assert 10 <= len(store.finished()) < 200
        assert all(world.closed for world in worlds.made)
        assert all(entry.reward is None for entry in store.entries() if not entry.ok)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly_by_a_signal_and_goes_on_when_it_is_run_again(
    home: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """`managed-vllm rollout` on the embedded desktop; the stand-in says nothing sensible, but answers."""
    run = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "managed_vllm.cli",
        "rollout",
        "--env",
        "desktop",
        "--tasks",
        "300",
        "--out",
        str(run),
    ]
    words += ["--model", "demo", "--command", " ".join(standin.command()), "--keep-alive", "0.2", "--max-tokens", "8"]
    go_on = tmp_path / "go on"  # without it, the signal might come when all is done
    words += [
        "--server-env",
        f"STANDIN={standin.orders(token_s=0.002, hold=[200, str(go_on)])['STANDIN']}",
        "--max-steps",
        "3",
        "--retries",
        "2",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finished() -> int:
        if not (run / "run.json").exists():
            return 0
        with RunStore.open(run) as store:
            return len(store.finished())

    try:
        eventually(lambda: finished() > 5 or process.poll() is not None, "some rollouts")
        process.send_signal(number)
        said, errors = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (130 if number == signal.SIGINT else 143), errors
    assert "The same command goes on from here" in errors
    assert "managed-vllm view" in said
    before = finished()
    assert 5 < before < 300
    go_on.touch()
    again = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=2 * HANG_S)
    assert again.returncode == 0, again.stderr
    assert f'"stored_before": {before}' in again.stdout
    assert '"done": 300' in again.stdout
    assert finished() == 300

    def running() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["cmdline"]) if str(run) in (one.info["cmdline"] or [])]

    eventually(lambda: not running(), "nothing of it runs any more")
