"""One run, many writers: each rollout once, whoever dies, and one record for those who read it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acting_server import ActingServer, acting
from agent_samples import sample_failure, sample_trajectory
from counting_world import CountingWorld, Worlds, hang, right, tasks
from processes import HANG_S, eventually

from managed_vllm import VLLMClient
from managed_vllm.agent import RetryRollouts, RunStore, StreamingTaskScheduler, Trajectory, run_writers, ui_tars
from managed_vllm.agent.claims import Claim
from managed_vllm.agent.export import export
from managed_vllm.agent.tasks import begun_at
from managed_vllm.errors import ConfigError, RunStoreError

PROCESS = Path(__file__).resolve().parent.parent / "helpers/rollout_process.py"
AGENT = ui_tars("absolute", show_text=True)
KEY = "t-1", 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def server() -> Iterator[ActingServer]:
    with acting(right) as made:
        yield made


def attempt(rollout: int = 0, **more: Any) -> Trajectory:
    return sample_trajectory(**{"rollout": rollout, "steps": 2, **more})


def scheduler(server: ActingServer, store: RunStore, worlds: Worlds, **options: Any) -> StreamingTaskScheduler:
    client = VLLMClient(server.url, None, "acting")
    settings = {"sampling_params": {"max_tokens": 200}, "agent": AGENT, "max_concurrency": 4, **options}
    return StreamingTaskScheduler(client, worlds, store=store, **settings)


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_claimed_by_one_of_two_and_passed_on_when_it_is_let_go(path: Path) -> None:
    with RunStore.join(path) as one, RunStore.join(path) as other:
        assert one.claims is not None
        assert one.claim(*KEY) == (Claim.OURS, None)
        assert other.claim(*KEY)[0] is Claim.HELD
        assert other.claim("t-1", 1)[0] is Claim.OURS
        one.claims.let_go()
        assert other.claim(*KEY)[0] is Claim.INHERITED
        assert one.claim(*KEY)[0] is Claim.HELD


def test_what_one_has_finished_the_other_one_finds_and_does_not_claim(path: Path) -> None:
    with RunStore.join(path) as one, RunStore.join(path) as other:
        one.claim(*KEY)
        entry = one.append(attempt())
        eventually(lambda: (other.claim(*KEY)[1] or entry).writer == entry.writer and len(other) == 1, "it is found")
        found = other.claim(*KEY)[1]
        assert found is not None
        assert found.ok
        assert list(other) == list(one) == [attempt()]


def test_a_rollout_that_failed_for_good_is_waited_for_by_nobody_until_its_writer_is_gone(path: Path) -> None:
    with RunStore.join(path) as other:
        with RunStore.join(path) as one:
            assert one.claims is not None
            one.claim(*KEY)
            one.append(attempt(failure=sample_failure()))
            assert other.claim(*KEY)[0] is Claim.HELD
            one.claims.failed(KEY)
            assert other.claim(*KEY)[0] is Claim.FAILED
        claim, entry = other.claim(*KEY)
        assert claim is Claim.INHERITED
        assert entry is not None
        assert not entry.ok


def test_of_eight_threads_with_a_writer_each_exactly_one_gets_each_claim(path: Path) -> None:
    stores = [RunStore.join(path) for _ in range(8)]
    got: list[tuple[int, str]] = []
    start = threading.Barrier(len(stores))

    def work(number: int, store: RunStore) -> None:
        start.wait(HANG_S)
        for task in range(40):
            if store.claim(f"t-{task}", 0)[0] is not Claim.HELD:
                got.append((number, f"t-{task}"))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    for store in stores:
        store.close()
    assert Counter(task for _, task in got) == {f"t-{task}": 1 for task in range(40)}


def test_a_task_may_have_any_id(path: Path) -> None:
    odd = "../../\ud83d\x00/\n" + "x" * 1000
    with RunStore.join(path) as store, RunStore.join(path) as other:
        assert store.claim(odd, 0)[0] is Claim.OURS
        assert other.claim(odd, 0)[0] is Claim.HELD
        assert other.claim(odd, 10)[0] is Claim.OURS


def test_a_writer_of_more_claims_than_a_file_may_have_links_renews_and_frees_all_of_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_writers, "MOST_LINKS", 4)
    keys = [("t-1", rollout) for rollout in range(10)]
    with RunStore.join(path) as other:
        with RunStore.join(path) as one:
            assert [one.claim(*key)[0] for key in keys] == [Claim.OURS] * 10
            assert len(list(path.glob("writers/*/token-*"))) == 4
            assert [other.claim(*key)[0] for key in keys] == [Claim.HELD] * 10
        assert [other.claim(*key)[0] for key in keys] == [Claim.INHERITED] * 10


def test_a_file_system_without_locks_is_good_enough(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunStore.join(path) as one, RunStore.join(path) as other:
        assert one.claim(*KEY)[0] is Claim.OURS
        assert other.claim(*KEY)[0] is Claim.HELD
    with pytest.raises(RunStoreError, match="No locks"):
        RunStore.create(path)


def test_a_file_system_without_hard_links_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore.join(path) as store:

        def refuse(*_: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(RunStoreError, match="has no hard links"):
            store.claim(*KEY)


# -- writers that die --------------------------------------------------------------------------------------------------

CLAIMER = """
import sys
from managed_vllm.agent.store import RunStore
store = RunStore.join(sys.argv[1], lease_s=float(sys.argv[2]))
assert store.claim("t-1", 0)[0].name == "OURS"
print("ready", flush=True)
while sys.stdin.readline():
    print(store.claims.still_ours(("t-1", 0)), flush=True)
"""


def claimer(path: Path, lease_s: float = 1000.0) -> subprocess.Popen[str]:
    """A process that has claimed the rollout."""
    command = [sys.executable, "-c", CLAIMER, str(path), str(lease_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_claim_of_a_killed_process_is_free_at_once_and_one_of_a_living_process_is_not(path: Path) -> None:
    with claimer(path) as process, RunStore.join(path) as store:
        try:
            assert store.claim(*KEY)[0] is Claim.HELD
        finally:
            process.kill()
            process.wait()
        assert store.claim(*KEY)[0] is Claim.INHERITED


def test_a_stopped_process_loses_its_claim_with_its_lease_and_notices_it(path: Path) -> None:
    with claimer(path, lease_s=0.5) as process, RunStore.join(path) as store:
        try:
            assert asked(process) == "True\n"
            os.kill(process.pid, signal.SIGSTOP)
            eventually(lambda: store.claim(*KEY)[0] is Claim.INHERITED, "the lease has run out")
            os.kill(process.pid, signal.SIGCONT)
            assert asked(process) == "False\n"
        finally:
            process.kill()
            process.wait()


def asked(process: subprocess.Popen[str]) -> str:
    """Whether its claim is still its own, as it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline()


def elsewhere(path: Path, **changes: Any) -> Path:
    """The token of a writer on another host, made of that of a closed one here; a hard link of it is its claim."""
    with RunStore.join(path) as store:
        store.claim(*KEY)
    (token,) = path.glob("writers/*/token-0")
    token.write_text(json.dumps({**json.loads(token.read_text()), "boot": "another", **changes}))
    return token


def test_a_writer_of_another_host_is_believed_as_long_as_its_lease_is_renewed(path: Path) -> None:
    token = elsewhere(path, lease_s=0.5)
    with RunStore.join(path) as store:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            now = time.time_ns()  # exact, so that each time is another: the file system's own clock may tick in 4 ms
            os.utime(token, ns=(now, now))
            assert store.claim(*KEY)[0] is Claim.HELD
        eventually(lambda: store.claim(*KEY)[0] is Claim.INHERITED, "nothing was heard of it for the lease")


def test_a_clock_that_is_set_forward_is_no_death(path: Path) -> None:
    token = elsewhere(path, lease_s=1000.0)
    with RunStore.join(path) as store:
        hours_ago = time.time() - 10_000
        os.utime(token, (hours_ago, hours_ago))
        assert store.claim(*KEY)[0] is Claim.HELD, "it was not watched yet"
        assert store.claim(*KEY)[0] is Claim.HELD


# -- one record --------------------------------------------------------------------------------------------------------


def test_an_only_writer_and_joined_ones_keep_each_other_out(path: Path) -> None:
    with RunStore.create(path):
        with pytest.raises(RunStoreError, match=f"is written by process {os.getpid()} on "):
            RunStore.join(path)
    with RunStore.join(path), RunStore.join(path):
        with pytest.raises(RunStoreError, match=rf"is written by process {os.getpid()} on .*and.*--join"):
            RunStore.create(path)
    RunStore.create(path).close()


def test_an_only_writer_sees_the_lease_of_a_joined_one_whose_lock_does_not_reach_it(path: Path) -> None:
    token = elsewhere(path, host="far-away")
    os.utime(token)
    with pytest.raises(RunStoreError, match="far-away"):
        RunStore.create(path)


def test_a_run_is_gone_on_with_alone_or_together(path: Path, tmp_path: Path) -> None:
    with RunStore.create(path, {"a": 1}) as store:
        store.append(attempt(0))
    with RunStore.join(path, {"a": 1}) as one, RunStore.join(path, {"a": 1}) as other:
        assert one.finished() == {("t-1", 0)}
        one.append(attempt(1))
        other.append(attempt(2))
        assert [entry.rollout for entry in one.refresh()] == [2]
        assert one.refresh() == []
    with RunStore.create(path, {"a": 1}) as store:
        store.append(attempt(3))
    with RunStore.open(path) as store:
        assert list(store.trajectories()) == [attempt(rollout) for rollout in range(4)]
        assert store.summary().finished == 4
        assert len(store.selected(("t-1", rollout) for rollout in range(4))) == 4
        assert store.verify() == []
        assert export(store, "atif", tmp_path / "out").trajectories == 4


def test_another_run_is_refused_with_what_differs(path: Path) -> None:
    with RunStore.join(path, {"model": "a"}) as store:
        store.settle({"limits": {"max_steps": 5}})
        with pytest.raises(RunStoreError, match="model: the run has 'a', asked for is 'b'"):
            RunStore.join(path, {"model": "b"})
        with RunStore.join(path, {"model": "a"}) as other:
            other.settle({"limits": {"max_steps": 5}})
            with pytest.raises(RunStoreError, match=r"limits\.max_steps: the run has 5, asked for is 9"):
                other.settle({"limits": {"max_steps": 9}})
        with RunStore.join(path, {"model": "b"}, force=True) as other:
            other.settle({"limits": {"max_steps": 9}})
    with RunStore.create(path, {"model": "a"}) as store:
        assert store.made_of == {"limits": {"max_steps": 5}}
        store.settle({"limits": {"max_steps": 5}})


def test_of_two_attempts_that_count_that_which_ended_first_does_whoever_reads_when(path: Path) -> None:
    early = replace(attempt(), started_at=1000.0, info={"which": "early"})
    late = replace(attempt(), started_at=2000.0, info={"which": "late"})
    with RunStore.open(_made(path)) as reader, RunStore.join(path) as one, RunStore.join(path) as other:
        one.append(late)
        reader.refresh()
        other.append(early)
        reader.refresh()
        for store in (reader, RunStore.open(path)):
            assert [each.info["which"] for each in store.trajectories()] == ["early"]
            assert len(store.duplicates) == 1


def _made(path: Path) -> Path:
    RunStore.create(path).close()
    return path


def test_damage_in_a_joined_log_is_named_and_its_rollout_played_again(path: Path) -> None:
    with RunStore.join(path) as store:
        store.append(attempt(0))
        store.append(attempt(1))
    (lines,) = path.glob("writers/*/trajectories.jsonl")
    text = bytearray(lines.read_bytes())
    text[40] ^= 1
    lines.write_bytes(text)
    with RunStore.open(path) as store:
        assert store.finished() == {("t-1", 1)}
        assert store.damaged[0].path == str(lines.relative_to(path))


# -- the scheduler -----------------------------------------------------------------------------------------------------


def test_two_schedulers_share_the_rollouts_and_both_have_all_of_them(path: Path, server: ActingServer) -> None:
    given, n = tasks(12, 2), 3
    worlds = Worlds(), Worlds()
    found: dict[int, list[Trajectory]] = {}

    def play(number: int) -> None:
        with RunStore.join(path) as store:
            found[number] = list(scheduler(server, store, worlds[number], n=n).run_all(given))

    threads = [threading.Thread(target=play, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert [one.key for one in found[0]] == [(task.id, rollout) for task in given for rollout in range(n)]
    assert found[0] == found[1]
    played = [each.calls["reset"] for each in worlds]
    assert sum(played) == len(given) * n
    with RunStore.open(path) as store:
        assert len(store) == len(store.finished()) == len(given) * n


def test_a_rollout_that_fails_for_good_in_one_holds_up_neither(path: Path, server: ActingServer) -> None:
    def fault(world: CountingWorld, call: str) -> None:
        if call == "step" and world.task is not None and world.task.id == "task-001":
            raise RuntimeError("broken")

    results: list[int] = []

    def play() -> None:
        with RunStore.join(path) as store:
            options = {"retry": RetryRollouts(max_attempts=2, delay_s=0.0)}
            made = scheduler(server, store, Worlds(fault), **options)
            made.run_all(tasks(4, 1), keep=False)
            results.append(made.stats.failed)

    threads = [threading.Thread(target=play) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert results == [1, 1]
    with RunStore.open(path) as store:
        assert store.summary().finished == 3


def test_what_many_others_play_on_a_slow_file_system_keeps_nobody_from_what_is_free(
    path: Path, server: ActingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tasks(201, 1)
    with RunStore.join(path) as other, RunStore.join(path) as store:
        for task in given[:-1]:
            other.claim(task.id, 0)
        claim = store.claim

        def slowly(task_id: str, rollout: int) -> Any:
            time.sleep(0.02)  # as over NFS: to look at all of them takes longer than until they are looked at again
            return claim(task_id, rollout)

        monkeypatch.setattr(store, "claim", slowly)

        async def first() -> Trajectory:
            async with asyncio.timeout(HANG_S):
                async for trajectory in scheduler(server, store, Worlds(), max_concurrency=2).run(given):
                    return trajectory
            raise AssertionError("nothing was played")

        assert asyncio.run(first()).task == given[-1]


def test_a_run_that_was_broken_off_leaves_its_rollouts_to_others(path: Path, server: ActingServer) -> None:
    with RunStore.join(path) as store, RunStore.join(path) as other:

        def fault(world: CountingWorld, call: str) -> Any:
            return hang() if call == "step" and world.number > 0 else None

        async def first_only() -> None:
            async for _ in scheduler(server, store, Worlds(fault), max_concurrency=3).run(tasks(6, 1)):
                break

        asyncio.run(first_only())
        assert len(scheduler(server, other, Worlds()).run_all(tasks(6, 1))) == 6


def test_an_attempt_whose_rollout_was_taken_over_meanwhile_is_not_recorded(
    path: Path, server: ActingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunStore.join(path) as store:
        assert store.claims is not None
        claims, still_ours = store.claims, store.claims.still_ours
        lost: list[tuple[str, int]] = []

        def lose_the_first(key: tuple[str, int]) -> bool:
            if lost:
                return still_ours(key)
            lost.append(key)
            claims.let_go(key)
            return False

        monkeypatch.setattr(claims, "still_ours", lose_the_first)
        made = scheduler(server, store, Worlds())
        assert [one.reward for one in made.run_all(tasks(3, 1))] == [1.0] * 3
        assert (len(store), made.stats.done) == (3, 3)
        assert len(lost) == 1


@pytest.mark.parametrize("begin", [0.0, 0.4, 0.99])
def test_a_process_that_begins_elsewhere_has_all_of_the_tasks_once(begin: float) -> None:
    given = tasks(7)
    assert sorted(task.id for task in begun_at(given, begin)) == sorted(task.id for task in given)
    assert begun_at(given, begin)[0] == given[int(7 * begin)]
    assert begun_at([], begin) == []


def test_whole_groups_are_refused(path: Path, server: ActingServer) -> None:
    with RunStore.join(path) as store:
        for options in ({"group": "drop"}, {"decide_n": lambda task, so_far: 1}):
            with pytest.raises(ConfigError, match="several writers"):
                scheduler(server, store, Worlds(), **options)


# -- killed at any moment ----------------------------------------------------------------------------------------------


def grown_or_over(log: Path, size: int, running: list[subprocess.Popen[bytes]]) -> bool:
    return log.stat().st_size > size or all(process.poll() == 0 for process in running)


def killed_at_random_moments(run: Path, log: Path, server: ActingServer, kills: int, seed: int) -> None:
    """Three processes play into one run; one or two of them are killed and started again, again and again."""
    count, n = 4 * kills, 2
    draw = random.Random(seed)
    words = [sys.executable, PROCESS, server.url, run, log, count, n, "join"]
    log.touch()
    running = [subprocess.Popen([str(word) for word in words]) for _ in range(3)]
    try:
        for _ in range(kills):
            eventually(functools.partial(grown_or_over, log, log.stat().st_size, running), "a reset")
            time.sleep(draw.random() * 0.1)  # not to wait for anything: the moment is what is drawn
            victim = draw.randrange(3)
            running[victim].kill()
            running[victim].wait()
            running[victim] = subprocess.Popen([str(word) for word in words])
        for process in running:
            assert process.wait(HANG_S) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    with RunStore.open(run) as store:
        oks = Counter(entry.key for entry in store.entries() if entry.ok)
        assert oks == {(task.id, rollout): 1 for task in tasks(count) for rollout in range(n)}, "each exactly once"
        assert store.duplicates == []
        assert store.damaged == []
        for trajectory in store.trajectories():
            assert trajectory.reward == 1.0
            assert len(trajectory.steps) == int(trajectory.task.data["presses"]) + 1
    played = Counter(line.split()[1] for line in log.read_text().splitlines())
    assert sum(played.values()) <= count * n + 8 * kills, "no more was played twice than was in flight when killed"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_writers_that_are_killed_have_every_rollout_exactly_once(path: Path, server: ActingServer) -> None:
    killed_at_random_moments(path, path.with_name("resets"), server, 8, seed=3)


@pytest.mark.soak
def test_three_writers_killed_very_often_have_every_rollout_exactly_once(path: Path, server: ActingServer) -> None:
    killed_at_random_moments(path, path.with_name("resets"), server, 150, seed=int(time.time()))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_commands_share_a_run(path: Path) -> None:
    words = [sys.executable, "-m", "managed_vllm.cli", "rollout", "--env", "desktop", "--tasks", "12", "--n", "2"]
    words += ["--out", str(path), "--join", "--json", "--max-steps", "2", "--format", "ui-tars"]
    with acting(lambda messages: "Thought: None of my business.\nAction: finished(content='')") as server:
        environment = {**os.environ, "VLLM_SERVER_URL": server.url, "VLLM_MODEL_NAME": "acting"}
        start = functools.partial(
            subprocess.Popen, words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        both = [start() for _ in range(2)]
        try:
            said = [process.communicate(timeout=HANG_S) for process in both]
        finally:
            for process in both:
                process.kill()
                process.wait()
    for process, (out, errors) in zip(both, said, strict=True):
        assert process.returncode == 0, errors
        assert (json.loads(out)["done"], json.loads(out)["rollouts"]) == (24, 24)
    with RunStore.open(path) as store:
        assert len(store) == len(store.finished()) == 24
