"""A synchronous environment in its own process: killed when it hangs, noticed when it dies, gone with its rollout."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from counting_world import until
from moved_clock import Clock
from processes import HANG_S, eventually, is_live, tree_below
from standin_environment import NoEnvironment, Obedient, WrongReturns

from managed_vllm.agent import Environment, Limits, Task
from managed_vllm.agent.actions import Custom, Wait
from managed_vllm.agent.environments.process_environment import MARKER, ProcessEnvironment
from managed_vllm.errors import (
    EnvironmentDiedError,
    EnvironmentFailedError,
    EnvironmentRaisedError,
    EnvironmentTimeoutError,
)

HERE = Path(__file__).parent.parent / "helpers"
TASK = Task("t")
QUICK = Limits(step_timeout_s=0.3, reset_timeout_s=HANG_S, close_timeout_s=HANG_S)


LONG = Limits(step_timeout_s=HANG_S, reset_timeout_s=HANG_S)
"""For calls that hang: the test moves the clock on once they do."""


def live(*pids: int) -> list[int]:
    """Which of them live. Only for pids of processes that must die: a number that is given away again counts."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if is_live(psutil.Process(pid)):
                found.append(pid)
    return found


def marked(folder: Path) -> list[int]:
    """All live processes that belong to the environment with this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == str(folder) and is_live(process):
                found.append(process.pid)
    return found


@contextlib.asynccontextmanager
async def environment(make: Any = Obedient, **options: Any) -> AsyncIterator[ProcessEnvironment]:
    """One that is closed at the end, and of which nothing may be left."""
    env = ProcessEnvironment(make, **options)
    try:
        yield env
    finally:
        keeper = env.pid
        family = tree_below(keeper) if keeper else set()
        with contextlib.suppress(EnvironmentFailedError):
            await env.close()
        assert not [process for process in family if is_live(process)]
        assert env.folder is None or not env.folder.exists()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * HANG_S))


# -- what works --------------------------------------------------------------------------------------------------------


def test_episodes_run_in_one_process_that_is_not_ours() -> None:
    async def test() -> None:
        async with environment(arguments={"level": 3}, environ={"STANDIN_VARIABLE": "given"}) as env:
            assert isinstance(env, Environment)
            seen = await env.reset(TASK)
            assert seen.text == "reset t"
            assert seen.extras["pid"] not in (os.getpid(), env.pid)
            assert seen.extras["arguments"] == {"level": 3}
            assert seen.extras["variable"] == "given"
            assert seen.extras["tmp"] == str(env.folder)
            result = await env.step(Wait())
            assert (result.reward, result.info) == (0.5, {"steps": 1})
            assert await env.evaluate() == 1.0
            again = await env.reset(Task("u"))
            assert again.text == "reset u"
            assert again.extras["pid"] == seen.extras["pid"]

    run(test)


@pytest.mark.parametrize(
    "make",
    [Obedient, "standin_environment:Obedient", functools.partial(Obedient, level=1)],
    ids=["class", "path", "partial"],
)
def test_what_makes_it_is_a_callable_or_a_path(make: Any) -> None:
    async def test() -> None:
        async with environment(make) as env:
            assert (await env.reset(TASK)).text == "reset t"

    run(test)


def test_nothing_is_started_before_the_first_reset() -> None:
    async def test() -> None:
        before = threads()  # of other tests: they may end meanwhile
        env = ProcessEnvironment(Obedient)
        assert env.pid is None
        assert threads() <= before
        await env.close()
        with pytest.raises(EnvironmentFailedError, match="closed"):
            await env.reset(TASK)

    run(test)


def threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("environment ")}


def test_another_interpreter_can_be_its_home() -> None:
    async def test() -> None:
        there = {"PYTHONPATH": f"{HERE}:{HERE.parent.parent}"}
        async with environment("standin_environment:Obedient", python=sys.executable, environ=there) as env:
            assert (await env.reset(TASK)).extras["executable"] == sys.executable

    run(test)


def test_an_interpreter_without_this_package_is_told_by_name(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)

    async def test() -> None:
        python, nothing = tmp_path / "venv/bin/python", {"PYTHONPATH": ""}
        async with environment("standin_environment:Obedient", python=python, environ=nothing) as env:
            with pytest.raises(EnvironmentDiedError, match=r"has no managed_vllm.*: install managed-vllm there"):
                await env.reset(TASK)

    run(test)


def test_a_function_of_the_main_script_can_make_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from standin_environment import Obedient\n"
        "from managed_vllm.agent import Task\n"
        "from managed_vllm.agent.environments.process_environment import ProcessEnvironment\n"
        "def make():\n"
        "    return Obedient(from_main=True)\n"
        "async def main():\n"
        "    env = ProcessEnvironment(make)\n"
        "    print((await env.reset(Task('t'))).extras['arguments'])\n"
        "    await env.close()\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("{'from_main': True}\n", 0), done.stderr


def test_sixteen_at_once_answer_for_themselves() -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            envs = [await stack.enter_async_context(environment(arguments={"level": n})) for n in range(16)]
            seen = await asyncio.gather(*(env.reset(Task(f"t{n}")) for n, env in enumerate(envs)))
            assert [one.extras["arguments"]["level"] for one in seen] == list(range(16))
            assert len({one.extras["pid"] for one in seen}) == 16
            results = await asyncio.gather(*(env.step(Wait()) for env in envs))
            assert all(result.reward == 0.5 for result in results)
            await asyncio.gather(*(env.close() for env in envs))

    run(test)


def test_much_output_stops_nothing_and_only_its_end_is_kept() -> None:
    async def test() -> None:
        async with environment() as env:
            await env.reset(TASK)
            await env.step(Custom("write", {"bytes": 5_000_000}))
            with pytest.raises(EnvironmentDiedError) as caught:
                await env.step(Custom("_exit", {"code": 5}))
            assert caught.value.output.endswith("famous last words\n")
            assert 10_000 < len(caught.value.output) < 100_000
            assert len(str(caught.value)) < 5_000

    run(test)


# -- what goes wrong inside --------------------------------------------------------------------------------------------


def test_what_it_raises_comes_back_with_type_message_and_traceback() -> None:
    async def test() -> None:
        async with environment() as env:
            await env.reset(TASK)
            with pytest.raises(
                EnvironmentRaisedError, match="Obedient: step raised ValueError: as it was told"
            ) as caught:
                await env.step(Custom("raise"))
            error = caught.value
            assert (error.call, error.error_type, error.error_message) == ("step", "ValueError", "as it was told")
            assert 'raise ValueError("as it was told")' in error.error_traceback
            with pytest.raises(
                EnvironmentFailedError, match="can't be used any more, step raised ValueError; make another"
            ):
                await env.step(Wait())

    run(test)


def test_an_exception_that_can_not_be_pickled_comes_back_too() -> None:
    async def test() -> None:
        async with environment() as env:
            with pytest.raises(EnvironmentRaisedError, match=r"standin_environment\.Unpicklable: this and that"):
                await env.reset(Task("t", data={"do": "raise the unpicklable"}))

    run(test)


def test_what_fails_in_making_says_so() -> None:
    async def test() -> None:
        for make, arguments, message in (
            (Obedient, {"fail": "make"}, "Obedient: make raised RuntimeError: it can't be made"),
            (NoEnvironment, {}, "has no step, evaluate, close: it is no SyncEnvironment"),
            ("standin_environment:Nothing", {}, "module 'standin_environment' has no attribute 'Nothing'"),
            ("no_such_module:make", {}, "No module named 'no_such_module'"),
        ):
            async with environment(make, arguments=arguments) as env:
                with pytest.raises(EnvironmentRaisedError, match=message):
                    await env.reset(TASK)

    run(test)


def test_returns_of_a_wrong_type_are_errors_where_they_were_made() -> None:
    async def test() -> None:
        async with environment(WrongReturns) as env:
            with pytest.raises(EnvironmentRaisedError, match="reset must return Observation, not tuple"):
                await env.reset(Task("reset"))
        async with environment(WrongReturns) as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentRaisedError, match="step must return StepResult, not tuple"):
                await env.step(Wait())
        async with environment(WrongReturns) as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentRaisedError, match="NaN"):
                await env.evaluate()
        async with environment() as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentRaisedError, match="pickle"):
                await env.step(Custom("return the unpicklable"))

    run(test)


@pytest.mark.parametrize(
    ("action", "exit_code", "how"),
    [
        (Custom("exit", {"code": 4}), 4, "exit code 4"),
        (Custom("_exit", {"code": 5}), 5, "exit code 5"),
        (Custom("signal", {"signal": signal.SIGKILL}), -9, "SIGKILL"),
        (Custom("signal", {"signal": signal.SIGSEGV}), -11, "SIGSEGV"),
    ],
    ids=["exit", "_exit", "SIGKILL", "SIGSEGV"],
)
def test_its_death_is_noticed_at_once_with_exit_code_and_last_words(action: Custom, exit_code: int, how: str) -> None:
    async def test() -> None:
        async with environment(limits=Limits(step_timeout_s=math.inf)) as env:
            await env.reset(TASK)
            left = (await env.step(Custom("leave processes"))).observation.extras["done"]
            with pytest.raises(EnvironmentDiedError, match=how) as caught:
                await env.step(action)
            assert caught.value.exit_code == exit_code
            assert "famous last words" in str(caught.value)
            assert not live(*left)
            with pytest.raises(EnvironmentFailedError, match="its process ended during step"):
                await env.evaluate()

    run(test)


def test_a_process_that_is_killed_between_two_calls_fails_the_next() -> None:
    async def test() -> None:
        async with environment() as env:
            seen = await env.reset(TASK)
            os.kill(seen.extras["pid"], signal.SIGKILL)
            eventually(lambda: not live(seen.extras["pid"]), "it is gone")
            with pytest.raises(EnvironmentDiedError, match="SIGKILL"):
                await env.step(Wait())

    run(test)


# -- what does not return ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["hang", "hang in C", "hang and ignore signals"])
def test_a_hung_call_is_ended_with_all_its_descendants(
    way: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "hang":
        monkeypatch.setattr("managed_vllm.agent.environments.process_environment.STACKS_S", HANG_S)

    async def test() -> None:
        async with environment(limits=LONG) as env:
            pid = (await env.reset(TASK)).extras["pid"]
            left = await env.step(Custom("leave processes"))
            call = asyncio.create_task(env.step(Custom(way, {"begun": str(tmp_path / "begun")})))
            await until((tmp_path / "begun").exists)
            clock.forward(HANG_S)
            with pytest.raises(
                EnvironmentTimeoutError, match=r"step was not over within 60 s; its processes were killed"
            ) as e:
                await call
            assert isinstance(e.value, TimeoutError)
            if way == "hang":
                assert "in hang" in str(e.value)  # the stack
            assert not live(pid, *left.observation.extras["done"])
            assert env.folder is not None
            assert not env.folder.exists()

    run(test)


def test_reset_evaluate_and_close_have_limits_too() -> None:
    async def test() -> None:
        async with environment(limits=Limits(reset_timeout_s=1.5)) as env:
            with pytest.raises(EnvironmentTimeoutError, match=r"reset was not over within 1\.5 s"):
                await env.reset(Task("t", data={"do": "hang"}))
        env = ProcessEnvironment(Obedient, arguments={"fail": "close hangs"}, limits=Limits(close_timeout_s=0.3))
        pid = (await env.reset(TASK)).extras["pid"]
        with pytest.raises(EnvironmentTimeoutError, match=r"close was not over within 0\.3 s"):
            await env.close()
        assert not live(pid)
        await env.close()

    run(test)


def test_cancelling_a_call_ends_the_process() -> None:
    async def test() -> None:
        async with environment() as env:
            seen = await env.reset(TASK)
            left = (await env.step(Custom("leave processes"))).observation.extras["done"]
            call = asyncio.create_task(env.step(Custom("hang")))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.to_thread(eventually, lambda: not live(seen.extras["pid"], *left), "all gone")
            with pytest.raises(EnvironmentFailedError, match="cancelled"):
                await env.step(Wait())

    run(test)


def test_a_reset_that_is_cancelled_while_the_process_starts_leaves_nothing() -> None:
    async def test() -> None:
        for turns in (0, 1, 2, 5):
            async with environment() as env:
                call = asyncio.create_task(env.reset(TASK))
                for _ in range(turns + 1):
                    await asyncio.sleep(0)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                await env.close()
                assert env.folder is None or (not env.folder.exists() and not marked(env.folder))

    run(test)


def test_the_loop_stays_responsive_while_environments_hang(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one answers while calls hang, and while those that hang are being killed, which is made to last."""
    monkeypatch.setattr("managed_vllm.agent.environments.process_environment.KEEPER_S", HANG_S)

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            envs = [await stack.enter_async_context(environment(limits=LONG)) for _ in range(4)]
            other = await stack.enter_async_context(environment())
            await asyncio.gather(*(env.reset(TASK) for env in (*envs, other)))
            calls = [
                asyncio.create_task(env.step(Custom("hang", {"begun": str(tmp_path / str(number))})))
                for number, env in enumerate(envs)
            ]
            await until(lambda: len(list(tmp_path.iterdir())) == 4)
            assert (await other.step(Wait())).reward == 0.5
            keepers = [env.pid for env in envs if env.pid is not None]
            for keeper in keepers:
                os.kill(keeper, signal.SIGSTOP)
            clock.forward(HANG_S)
            await until(lambda: all("step was not over" in repr(env) for env in envs))
            assert (await other.step(Wait())).reward == 0.5
            assert not any(call.done() for call in calls)
            for keeper in keepers:
                os.kill(keeper, signal.SIGCONT)
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [EnvironmentTimeoutError] * 4

    run(test)


def test_grace_lets_it_close_before_it_is_killed(tmp_path: Path) -> None:
    async def test() -> None:
        closed = tmp_path / "closed"
        async with environment(limits=QUICK, grace_s=20, arguments={"closed": str(closed)}) as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentTimeoutError):
                await env.step(Custom("hang"))
            assert closed.read_text() == "closed"
        closed.unlink()
        async with environment(limits=QUICK, arguments={"closed": str(closed)}) as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentTimeoutError):
                await env.step(Custom("hang"))
            assert not closed.exists()

    run(test)


def test_grace_is_bounded(clock: Clock, tmp_path: Path) -> None:
    async def test() -> None:
        async with environment(limits=LONG, grace_s=0.5) as env:
            await env.reset(TASK)
            deaf = Custom("hang and ignore signals", {"begun": str(tmp_path / "begun")})
            call = asyncio.create_task(env.step(deaf))
            await until((tmp_path / "begun").exists)
            clock.forward(HANG_S)
            began = time.monotonic()
            with pytest.raises(EnvironmentTimeoutError):
                await call
            assert time.monotonic() - began >= 0.5

    run(test)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_close_calls_the_environments_own_and_ends_what_it_left(tmp_path: Path) -> None:
    async def test() -> None:
        closed = tmp_path / "closed"
        env = ProcessEnvironment(Obedient, arguments={"closed": str(closed)})
        seen = await env.reset(TASK)
        left = (await env.step(Custom("leave processes"))).observation.extras["done"]
        folder = env.folder
        assert folder is not None
        assert (folder / "left").exists()
        await env.close()
        assert closed.read_text() == "closed"
        assert not live(seen.extras["pid"], *left)
        assert not folder.exists()
        assert env.pid is None
        await env.close()

    run(test)


def test_what_close_raises_comes_after_everything_was_ended() -> None:
    async def test() -> None:
        env = ProcessEnvironment(Obedient, arguments={"fail": "close"})
        pid = (await env.reset(TASK)).extras["pid"]
        with pytest.raises(EnvironmentRaisedError, match="close raised RuntimeError: it can't be closed"):
            await env.close()
        assert not live(pid)
        await env.close()

    run(test)


def test_closing_during_a_call_ends_the_call() -> None:
    async def test() -> None:
        async with environment(limits=Limits(step_timeout_s=math.inf)) as env:
            await env.reset(TASK)
            call = asyncio.create_task(env.step(Custom("hang")))
            await asyncio.sleep(0.05)
            await env.close()
            with pytest.raises(EnvironmentFailedError, match="closed during step"):
                await call

    run(test)


def test_calls_out_of_order_are_refused() -> None:
    async def test() -> None:
        async with environment() as env:
            with pytest.raises(EnvironmentFailedError, match="step before reset"):
                await env.step(Wait())
            await env.reset(TASK)
            first = asyncio.create_task(env.step(Custom("sleep", {"seconds": 0.2})))
            await asyncio.sleep(0)
            with pytest.raises(EnvironmentFailedError, match="evaluate was called during step; one call at a time"):
                await env.evaluate()
            assert (await first).reward == 0.5

    run(test)


def test_it_can_be_closed_from_another_loop() -> None:
    env = ProcessEnvironment(Obedient)

    async def begin() -> int:
        return int((await env.reset(TASK)).extras["pid"])

    pid = asyncio.run(begin())
    assert live(pid)
    run(env.close)
    assert not live(pid)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_one_that_nobody_has_any_more_ends_its_process() -> None:
    async def begin() -> tuple[int, Path]:
        env = ProcessEnvironment(Obedient)
        seen = await env.reset(TASK)
        assert env.folder is not None
        return seen.extras["pid"], env.folder

    pid, folder = asyncio.run(begin())
    gc.collect()
    eventually(lambda: not live(pid) and not folder.exists(), "its process and folder gone")


OWNER = """
import asyncio, os, sys
from standin_environment import Obedient
from managed_vllm.agent import Task
from managed_vllm.agent.actions import Custom
from managed_vllm.agent.environments.process_environment import ProcessEnvironment

async def main():
    envs = [ProcessEnvironment(Obedient) for _ in range(3)]
    seen = await asyncio.gather(*(env.reset(Task("t")) for env in envs))
    if "fork" in sys.argv and os.fork() == 0:
        import time; time.sleep(3600)           # holds copies of all sockets
    pids = [env.pid for env in envs] + [one.extras["pid"] for one in seen]
    for env in envs[:2]:
        pids += (await env.step(Custom("leave processes"))).observation.extras["done"]
    print(*pids, *[env.folder for env in envs], flush=True)
    await envs[0].step(Custom("hang"))

asyncio.run(main())
"""


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child"])
def test_sigkill_of_the_rollout_leaves_nothing(forked: bool) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *(["fork"] if forked else [])],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent}"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert owner.stdout is not None
        words = owner.stdout.readline().split()
        pids = [int(word) for word in words if word.isdigit()]
        folders = [Path(word) for word in words if not word.isdigit()]
        assert len(pids) == 10
        assert sorted(live(*pids)) == sorted(pids)
        owner.kill()
        owner.wait()
        eventually(lambda: not live(*pids), "all processes gone")
        eventually(lambda: not any(folder.exists() for folder in folders), "all folders gone")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()


def test_if_the_keeper_is_killed_nothing_is_left_either() -> None:
    async def test() -> None:
        async with environment(limits=Limits(step_timeout_s=math.inf)) as env:
            seen = await env.reset(TASK)
            left = (await env.step(Custom("leave processes"))).observation.extras["done"]
            call = asyncio.create_task(env.step(Custom("hang")))
            await asyncio.sleep(0.05)
            assert env.pid is not None
            os.kill(env.pid, signal.SIGKILL)
            with pytest.raises(EnvironmentDiedError, match="killed"):
                await call
            assert not live(seen.extras["pid"], *left)

    run(test)


def test_sigterm_to_the_keeper_ends_all_in_order() -> None:
    async def test() -> None:
        async with environment(limits=Limits(step_timeout_s=math.inf)) as env:
            seen = await env.reset(TASK)
            left = (await env.step(Custom("leave processes"))).observation.extras["done"]
            assert env.pid is not None
            os.kill(env.pid, signal.SIGTERM)
            with pytest.raises(EnvironmentDiedError):
                await env.step(Custom("hang"))
            assert not live(seen.extras["pid"], *left)

    run(test)


@pytest.mark.slow
def test_a_keeper_that_is_stopped_is_killed_with_all_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("managed_vllm.agent.environments.process_environment.KEEPER_S", 1.0)

    async def test() -> None:
        async with environment(limits=QUICK) as env:
            seen = await env.reset(TASK)
            env.limits = Limits()  # it takes longer on a busy machine than the call that hangs may
            left = (await env.step(Custom("leave processes"))).observation.extras["done"]
            env.limits = QUICK
            assert env.pid is not None
            os.kill(env.pid, signal.SIGSTOP)
            with pytest.raises(EnvironmentTimeoutError):
                await env.step(Custom("hang"))
            assert not live(seen.extras["pid"], *left)

    run(test)


@pytest.mark.soak
def test_many_starts_and_kills_leave_nothing() -> None:
    async def test() -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            async with contextlib.AsyncExitStack() as stack:
                envs = [await stack.enter_async_context(environment(limits=QUICK)) for _ in range(8)]
                await asyncio.gather(*(env.reset(TASK) for env in envs))
                await asyncio.gather(
                    *(
                        env.step(Custom(("hang", "raise", "sleep")[n % 3], {"seconds": 0}))
                        for n, env in enumerate(envs)
                    ),
                    return_exceptions=True,
                )
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2

    asyncio.run(test())


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_at_once() -> None:
    def local() -> Obedient:
        return Obedient()

    for make in (local, lambda: Obedient()):
        with pytest.raises(TypeError, match="Give a function or class of a module"):
            ProcessEnvironment(make)
    with pytest.raises(TypeError, match="must be callable"):
        ProcessEnvironment(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"package\.module:name"):
        ProcessEnvironment("standin_environment.Obedient")
    with pytest.raises(TypeError, match="pickled"):
        ProcessEnvironment(Obedient, arguments={"file": sys.stdout})
    with pytest.raises(ValueError, match="grace_s"):
        ProcessEnvironment(Obedient, grace_s=-1)


def test_an_action_that_can_not_be_pickled_is_named() -> None:
    async def test() -> None:
        async with environment() as env:
            await env.reset(TASK)
            with pytest.raises(EnvironmentFailedError, match=r"Custom\(name='x'.*can't be pickled"):
                await env.step(Custom("x", {"file": sys.stdout}))

    run(test)


def test_an_interpreter_that_does_not_exist_is_a_failure_not_a_hang() -> None:
    async def test() -> None:
        async with environment("standin_environment:Obedient", python="/no/such/python") as env:
            with pytest.raises(EnvironmentDiedError, match="/no/such/python"):
                await env.reset(TASK)

    run(test)


def test_the_adapters_import_nothing_heavy() -> None:
    source = (
        "import sys\n"
        "import managed_vllm.agent, managed_vllm.agent.environments\n"
        "for name in ('process_environment', 'thread_environment', 'gymnasium', 'osworld', 'miniwob'):\n"
        "    __import__('managed_vllm.agent.environments.' + name)\n"
        "heavy = {'numpy', 'PIL', 'gymnasium', 'miniwob', 'selenium', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=HERE.parent.parent)
