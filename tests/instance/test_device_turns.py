"""`share="sleep"`: servers take turns on devices that do not suffice for all of them."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import fake_gpus
import psutil
import pytest
import standin
from fake_gpus import FakeGpus
from processes import HANG_S, eventually

from managed_vllm import ManagedVLLM, RestartPolicy, RetryPolicy, ServerState, variables
from managed_vllm.errors import ConfigError


@pytest.fixture
def gpus(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    """One GPU, and a directory of places of the test's own."""
    for name in variables.DEVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANAGED_VLLM_DEVICES_DIR", str(tmp_path / "devices"))
    (tmp_path / "used").mkdir()
    found = fake_gpus.installed(tmp_path, monkeypatch)
    found.are(1)
    yield found
    sys.modules.pop("pynvml", None)
    assert list((tmp_path / "used").glob("*-twice")) == []


def server(folder: Path, model: str, **options: Any) -> ManagedVLLM:
    given: dict[str, Any] = {"keep_alive": 0, "progress": False, "devices": "auto", "share": "sleep", **options}
    return ManagedVLLM(model, command=standin.command(), env=standin.orders(used=str(folder / "used")), **given)


def ask(llm: ManagedVLLM, prompt: str, n: int = 8, **fields: Any) -> Any:
    """A request, whose answer is checked."""
    [output] = llm.generate(prompt, {"max_tokens": n, "temperature": 0}, **fields)
    assert output.outputs[0].text == standin.text_of(standin.continuation(standin.prompt_ids(prompt), n))
    return output


def holders_note(folder: Path, index: int = 0) -> Path:
    """What the one that holds a GPU says of itself."""
    return next((folder / "devices").glob(f"GPU-{index:08d}*.holder-*"))


def says_idle(note: Path) -> bool:
    said = json.loads(note.read_text())
    return said["used_at"] is not None and not said["in_use"]


def is_removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def test_two_models_take_turns_on_one_gpu(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "policy") as policy, server(tmp_path, "judge") as judge:
        assert judge.status().devices == ("GPU 0",)
        eventually(lambda: policy.status().devices == (), "the idle one has given way")
        assert policy.status().state is ServerState.SLEEPING
        assert ask(policy, "act").epoch == 2
        assert ask(judge, "judge").epoch == 2
        assert policy.status().restarts == 0, "a turn is no crash"
        policy.engine.reset_prefix_cache()  # a call wakes it, and is not remembered when it gives way the next time
        ask(judge, "once more")
        assert eventually(lambda: policy.status().state is ServerState.SLEEPING, "the policy sleeps")
        assert not [ticket for ticket in (tmp_path / "devices").glob("line-*")]


def test_what_is_in_flight_is_finished_first(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "policy") as policy, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, policy, "long", 20, extra_body={"standin_token_s": 0.3})
        eventually(lambda: policy.metrics().running, "it runs")
        with server(tmp_path, "judge") as judge:
            ask(judge, "good?")
            done = long.result(HANG_S)
            assert (done.attempts, done.epoch) == (1, 1)


def test_the_least_recently_used_gives_way(gpus: FakeGpus, tmp_path: Path) -> None:
    gpus.are(2)
    with server(tmp_path, "a") as a, server(tmp_path, "b") as b:
        ask(b, "first")
        stop = threading.Event()

        def keep_using() -> None:
            while not stop.wait(0.1):
                ask(a, "again")

        with ThreadPoolExecutor(1) as pool:
            using = pool.submit(keep_using)
            try:
                eventually(lambda: says_idle(holders_note(tmp_path, 1)), "it says that nobody uses it")
                with server(tmp_path, "c") as c:
                    ask(c, "hello")
                    assert b.status().state is ServerState.SLEEPING
                    assert a.status().epoch == 1
            finally:
                stop.set()
            using.result(HANG_S)


def test_one_that_users_have_paused_stays(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "policy") as policy, server(tmp_path, "judge", wait=False) as judge:
        with policy.engine.paused():
            judge.start()
            eventually(lambda: judge.status().stage == "waiting", "the judge waits")
            looks: set[int] = set()

            def has_looked() -> bool:
                looks.add(holders_note(tmp_path).stat().st_mtime_ns)
                return len(looks) > 4

            eventually(has_looked, "it knows for a while that one waits")
            assert policy.status().state is ServerState.READY
        judge.wait_ready(HANG_S)
        policy.engine.pause()  # a call of the engine wakes it, too
        assert policy.status().state is ServerState.READY
        policy.engine.resume()


def test_without_sharing_it_keeps_what_it_has(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "selfish", share=None) as selfish, server(tmp_path, "judge", wait=False) as judge:
        judge.start()
        eventually(lambda: judge.status().stage == "waiting", "the judge waits")
        assert ask(selfish, "mine").epoch == 1
        selfish.close()
        judge.wait_ready(HANG_S)


def test_a_directory_that_is_removed_ends_no_server(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "a") as a:
        before = a.status()
        eventually(lambda: is_removed(tmp_path / "devices"), "it is removed, though others write to it")
        eventually(lambda: a.status().health.answered > before.health.answered + 1, "it was looked at several times")
        assert a.status().supervisor_pid == before.supervisor_pid
        assert ask(a, "still there?").epoch == 1


def test_it_goes_with_devices_auto() -> None:
    with pytest.raises(ConfigError, match="devices='auto'") as refused:
        ManagedVLLM("m", command=["x", "{port}"], share="sleep")
    assert refused.value.field == "share"
    with pytest.raises(ConfigError, match="'sleep' or None"):
        ManagedVLLM("m", command=["x", "{port}"], devices="auto", share="stop")  # type: ignore[arg-type]


def storm(folder: Path, *, users: int, requests: int, kills: int) -> None:
    """Users of four servers on two GPUs, while servers and supervisors are killed: all answers are right."""
    kept = RestartPolicy(max_restarts=100, backoff_initial_s=0)
    patient = RetryPolicy(max_deaths=100)  # more than one kill may meet the same request
    order = random.Random(1)
    with contextlib.ExitStack() as stack:
        llms = [stack.enter_context(server(folder, f"m{n}", wait=False, restart=kept, retry=patient)) for n in range(4)]

        def use(seed: int) -> None:
            mine = random.Random(seed)
            for number in range(requests):
                ask(mine.choice(llms), f"{seed} asks {number}", mine.randrange(4, 12))

        with ThreadPoolExecutor(users) as pool:
            using = [pool.submit(use, seed) for seed in range(users)]
            while kills and not all(one.done() for one in using):
                status = order.choice(llms).status()
                pid = order.choice([status.supervisor_pid, status.server_pid])
                if status.state is ServerState.READY and pid is not None:
                    with contextlib.suppress(psutil.Error):
                        psutil.Process(pid).kill()
                        kills -= 1
                wait(using, timeout=0.5)
            for one in using:
                one.result(HANG_S * 5)
        for llm in llms:  # the folder of a supervisor that was killed waits for the next user
            assert llm.status().supervisor_pid
            ask(llm, "at the end")


def test_four_servers_take_turns_on_two_gpus_while_some_are_killed(gpus: FakeGpus, tmp_path: Path) -> None:
    gpus.are(2)
    storm(tmp_path, users=4, requests=3, kills=2)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_requests_of_eight_users(gpus: FakeGpus, tmp_path: Path) -> None:
    gpus.are(2)
    storm(tmp_path, users=8, requests=13, kills=20)
