"""OSWorld's `DesktopEnv`, by a stand-in of its shape with a machine that misbehaves: what fails there is a failure."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin_osworld
from counting_world import until
from moved_clock import Clock
from processes import HANG_S, eventually
from standin_osworld import SIGNATURES, DesktopEnv, Machine, WithoutEvaluate

from managed_vllm.agent import Environment, Limits, Task
from managed_vllm.agent.actions import Button, CallUser, Click, Drag, Finished, Hotkey, Scroll, Type, Wait
from managed_vllm.agent.actions.values import Direction
from managed_vllm.agent.environments.osworld import OFFICIAL, OSWorldEnvironment
from managed_vllm.errors import EnvironmentRaisedError, EnvironmentTimeoutError

pillow = pytest.importorskip("PIL.Image")
HERE = Path(__file__).parent.parent / "helpers"


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


def task(func: str = "clicked", **more: Any) -> Task:
    return Task("os-1", "Click somewhere.", data={"evaluator": {"func": func}, "source": "a test", **more})


SET_UP = [{"type": "launch", "parameters": {"command": ["gimp"]}}]


@contextlib.asynccontextmanager
async def desktop(machine: Machine, make: Any = DesktopEnv, **options: Any) -> AsyncIterator[OSWorldEnvironment]:
    arguments = {"path_to_vm": machine.address, "provider_name": "docker"} if make is DesktopEnv else {}
    arguments |= options.pop("arguments", {})
    quick = {"pause_s": 0.01, "settle_s": 0.0, "evaluate_settle_s": 0.0}
    env = OSWorldEnvironment(make, arguments=arguments, **{**quick, **options})
    try:
        yield env
    finally:
        await env.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * HANG_S))


def red(screenshot: bytes | None) -> int:
    """How many commands the machine had carried out."""
    assert screenshot is not None
    return int(pillow.open(io.BytesIO(screenshot)).getpixel((0, 0))[0])


# -- what works --------------------------------------------------------------------------------------------------------


def test_an_episode_from_set_up_to_evaluation(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine, accessibility_tree=True) as env:
            assert isinstance(env, Environment)
            seen = await env.reset(task(config=SET_UP))
            assert (seen.instruction, red(seen.screenshot)) == ("Click somewhere.", 0)
            assert seen.text == "<desktop><button name='OK'/></desktop>"
            assert await env.evaluate() == 0.0
            result = await env.step(Click(100.4, 50.2))
            assert (result.reward, result.terminated, result.truncated) == (None, False, False)
            assert red(result.observation.screenshot) == 1
            last = await env.step(Finished("it is done"))
            assert (last.terminated, last.info) == (True, {"done": True})
            assert await env.evaluate() == 1.0
            state = machine.state()
            assert (state["used"], state["setups"]) == (True, ["/setup/launch"])
        assert not machine.state()["used"]

    run(test)


def test_each_action_reaches_the_machine_as_pyautogui(machine: Machine) -> None:
    text = 'it\'s "50" {x} \\n'

    async def test() -> None:
        async with desktop(machine) as env:
            await env.reset(task())
            for action in (
                Click(10, 20),
                Click(10, 20, Button.RIGHT),
                Click(10, 20, clicks=2),
                Drag(1, 2, 3, 4),
                Type(text, enter=True),
                Hotkey(("ctrl", "c")),
                Scroll(Direction.DOWN, 5, 6),
            ):
                result = await env.step(action)
                assert result.info == {}, action
                assert result.reward is None
            calls = machine.state()["calls"]
            names = {name for name, _, _ in calls}
            assert {"click", "hotkey", "scroll"} <= names
            # Typing is not bound to one function; all that was typed is the argument of some.
            assert any(text in arguments for _, arguments, _ in calls)

    run(test)


@pytest.mark.parametrize(
    ("action", "word", "terminated"),
    [(Finished(), "DONE", True), (CallUser(), "FAIL", True), (Wait(), "WAIT", False), (Wait(0.1), "WAIT", False)],
)
def test_actions_that_are_words(action: Any, word: str, terminated: bool) -> None:
    async def test() -> None:
        env = OSWorldEnvironment(WithoutEvaluate, evaluate=False, pause_s=0, settle_s=0)
        await env.reset(Task("t", "Do."))
        result = await env.step(action)
        assert result.info["actions"] == [word]
        assert result.terminated is terminated
        await env.close()

    run(test)


def test_calling_the_user_succeeds_where_the_task_is_infeasible(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            for func, reward in (("infeasible", 1.0), ("clicked", 0.0)):
                await env.reset(task(func))
                await env.step(CallUser())
                assert await env.evaluate() == reward

    run(test)


def test_waiting_takes_as_long_as_it_says(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine, pause_s=3600) as env:  # not added: it would be late
            await env.reset(task())
            began = time.monotonic()
            await env.step(Wait(0.4))
            assert time.monotonic() - began >= 0.4

    run(test)


def test_without_an_evaluator_there_is_no_reward(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine, WithoutEvaluate, evaluate=False) as env:
            await env.reset(Task("t", "Do."))
            await env.step(Click(1, 1))
            assert await env.evaluate() is None
        async with desktop(machine, WithoutEvaluate) as env:
            await env.reset(task())
            assert await env.evaluate() is None
        async with desktop(machine) as env:
            await env.reset(task("nothing"))
            assert await env.evaluate() is None

    run(test)


SETTLE_S = 50.0


def _settling(address: str, folder: str) -> DesktopEnv:
    """Time to settle passes when the test says so: it makes the file `settled` once there is `settling`."""
    sleep, settling, settled = time.sleep, Path(folder, "settling"), Path(folder, "settled")

    def settle(seconds: Any) -> None:
        if seconds != SETTLE_S:
            return sleep(seconds)
        settling.touch()
        while not settled.exists():
            sleep(0.01)
        settling.unlink()
        settled.unlink()

    time.sleep = settle
    return DesktopEnv(provider_name="docker", path_to_vm=address)


def test_the_first_screenshot_is_taken_when_the_task_has_settled(machine: Machine, tmp_path: Path) -> None:
    """The machine shows how much was done: something happens after the reset, before the screen is looked at."""

    async def test() -> None:
        arguments = {"address": machine.address, "folder": str(tmp_path)}
        async with desktop(machine, _settling, arguments=arguments, settle_s=SETTLE_S) as env:
            resetting = asyncio.create_task(env.reset(task(config=SET_UP)))
            await until((tmp_path / "settling").exists)
            assert machine.state()["setups"]
            machine.execute("pass")
            (tmp_path / "settled").touch()
            assert red((await resetting).screenshot) == 1

    run(test)


def test_settling_is_not_taken_from_the_limits(machine: Machine, tmp_path: Path, clock: Clock) -> None:
    async def settles(call: Awaitable[Any]) -> Any:
        result = asyncio.ensure_future(call)
        await until((tmp_path / "settling").exists)
        clock.forward(SETTLE_S)
        (tmp_path / "settled").touch()
        return await result

    async def test() -> None:
        limits = Limits(reset_timeout_s=0.8 * SETTLE_S, evaluate_timeout_s=0.8 * SETTLE_S)
        options: dict[str, Any] = {"settle_s": SETTLE_S, "evaluate_settle_s": SETTLE_S, "limits": limits}
        arguments = {"address": machine.address, "folder": str(tmp_path)}
        async with desktop(machine, _settling, arguments=arguments, **options) as env:
            await settles(env.reset(task()))
            assert await settles(env.evaluate()) == 0.0
            assert env.extra_s("reset") == env.extra_s("evaluate") == SETTLE_S
            assert env.extra_s("step", Click(1, 1)) == 0.0
            assert env.extra_s("step", Wait(70)) == 70.0

    run(test)


LONG = "".join(f"word{number:04} " for number in range(389))[:3500]


@pytest.mark.parametrize("typing", ["auto", "paste"])
def test_3500_characters_are_typed_whole_and_in_order(machine: Machine, typing: Any) -> None:
    async def test() -> None:
        async with desktop(machine, typing=typing) as env:
            await env.reset(task())
            await env.step(Type(LONG, enter=True))
            calls = machine.state()["calls"]
            typed = [arguments[0] for name, arguments, _ in calls if name == "write"]
            assert calls[-1][:2] == ["press", ["enter"]]
            if typing == "paste":
                assert machine.state()["copied"] == [LONG]
            else:
                assert "".join(typed) == LONG
                assert max(map(len, typed)) <= 400  # a command of the machine has 90 s
                assert env.extra_s("step", Type(LONG)) > len(LONG) * 0.02  # and a step as long as its keys take

    run(test)


def test_how_actions_become_source_can_be_chosen(machine: Machine) -> None:
    async def test() -> None:
        options: dict[str, Any] = {"typing": "paste", "keys": "as_said", "scroll_amount": 7, "decimals": 3}
        async with desktop(machine, **options) as env:
            await env.reset(task())
            for action in (Type("a"), Hotkey(("Page_Down",)), Scroll(Direction.DOWN), Click(1.23456, 2)):
                await env.step(action)
            calls = machine.state()["calls"]
            assert machine.state()["copied"] == ["a"]
            assert calls == [
                ["hotkey", ["ctrl", "v"], {}],
                ["press", ["Page_Down"], {}],
                ["scroll", [-7], {}],
                ["click", [1.235, 2.0], {"button": "left"}],
            ]

    run(test)


def test_the_official_options_are_those_of_osworlds_runner() -> None:
    env = OSWorldEnvironment(DesktopEnv, **OFFICIAL)
    assert (env.extra_s("reset"), env.extra_s("evaluate")) == (60.0, 20.0)
    assert OFFICIAL["pause_s"] == 3.0
    for wrong in ({"typing": "shout"}, {"settle_s": -1}, {"pause_s": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OSWorldEnvironment(DesktopEnv, **wrong)


# -- what fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error", "garbage"])
def test_a_screenshot_that_fails_three_times_fails_the_attempt(machine: Machine, fault: str) -> None:
    async def test() -> None:
        machine.faults(screenshot=fault)
        async with desktop(machine) as env:
            with pytest.raises(EnvironmentRaisedError, match="no screenshot after reset"):
                await env.reset(task())
        machine.faults()
        async with desktop(machine) as env:
            await env.reset(task())
            machine.faults(screenshot=fault)
            with pytest.raises(EnvironmentRaisedError, match="no screenshot after step"):
                await env.step(Click(1, 1))
            machine.faults()
        assert not machine.state()["used"]

    run(test)


def test_a_tree_that_was_asked_for_and_is_missing_fails_the_attempt(machine: Machine) -> None:
    async def test() -> None:
        machine.faults(accessibility="error")
        async with desktop(machine, accessibility_tree=True) as env:
            with pytest.raises(EnvironmentRaisedError, match="no accessibility tree after reset"):
                await env.reset(task())
        async with desktop(machine) as env:
            assert (await env.reset(task())).text is None

    run(test)


def test_a_set_up_that_failed_five_times_fails_the_attempt(machine: Machine) -> None:
    async def test() -> None:
        machine.faults(setup="error")
        async with desktop(machine) as env:
            with pytest.raises(EnvironmentRaisedError, match="OSWorld could not set task os-1 up"):
                await env.reset(task(config=SET_UP))
        async with desktop(machine) as env:
            await env.reset(task())  # nothing to set up

    run(test)


def test_a_command_that_the_machine_does_not_take_fails_the_attempt(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            await env.reset(task())
            machine.faults(execute="error")
            with pytest.raises(EnvironmentRaisedError, match="the machine did not execute Click"):
                await env.step(Click(1, 1))

    run(test)


def test_a_machine_that_can_not_execute_fails_the_attempt_and_is_not_the_models_fault(machine: Machine) -> None:
    """A script of ours has the model's words as literals only: what raises there is the machine."""

    async def test() -> None:
        async with desktop(machine, _broken_prefix, arguments={"address": machine.address}) as env:
            await env.reset(task())
            with pytest.raises(
                EnvironmentRaisedError, match=r"(?s)could not execute Click: .*ZeroDivisionError"
            ) as caught:
                await env.step(Click(1, 1))
            assert caught.value.call == "step"

    run(test)


def _broken_prefix(address: str) -> DesktopEnv:
    env = DesktopEnv(provider_name="docker", path_to_vm=address)
    env.controller.pkgs_prefix = "1 / 0; {command}"
    return env


def test_a_command_that_hangs_is_ended_and_the_machine_given_back(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine, limits=Limits(step_timeout_s=2.0)) as env:
            await env.reset(task())
            machine.faults(execute="hang")
            with pytest.raises(EnvironmentTimeoutError, match=r"OSWorld: step was not over within 2 s"):
                await env.step(Click(1, 1))
            assert not machine.state()["used"]  # within release_s

    run(test)


def test_an_evaluation_that_raises_is_a_failure_and_one_that_hangs_is_ended(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            await env.reset(task("no_such_metric"))
            with pytest.raises(EnvironmentRaisedError, match=r"evaluate raised AttributeError: .*no_such_metric"):
                await env.evaluate()
        async with desktop(machine, limits=Limits(evaluate_timeout_s=1.0)) as env:
            await env.reset(task("hang"))
            with pytest.raises(EnvironmentTimeoutError):
                await env.evaluate()

    run(test)


def test_a_machine_that_is_gone_fails_the_step(machine: Machine) -> None:
    async def test() -> None:
        arguments = {"path_to_vm": machine.address, "provider_name": "docker"}
        env = OSWorldEnvironment(DesktopEnv, arguments=arguments, pause_s=0.01, settle_s=0)
        await env.reset(task())
        machine.process.kill()
        machine.process.wait()
        with pytest.raises(EnvironmentRaisedError, match=r"no screenshot after step|did not execute"):
            await env.step(Click(1, 1))
        with pytest.raises(EnvironmentRaisedError, match="close raised"):
            await env.close()

    run(test)


def test_a_task_without_evaluator_and_another_action_space_are_refused(machine: Machine) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            with pytest.raises(EnvironmentRaisedError, match="task t has no 'evaluator' in its data"):
                await env.reset(Task("t", "Do."))
        async with desktop(machine, arguments={"action_space": "computer_13"}) as env:
            with pytest.raises(EnvironmentRaisedError, match="make it with action_space='pyautogui'"):
                await env.reset(task())
        assert not machine.state()["used"]

    run(test)


def test_sigkill_of_the_rollout_gives_the_machine_back(machine: Machine) -> None:
    source = (
        "import asyncio, sys\n"
        "from standin_osworld import DesktopEnv\n"
        "from managed_vllm.agent import Task\n"
        "from managed_vllm.agent.environments.osworld import OSWorldEnvironment\n"
        "async def main():\n"
        "    env = OSWorldEnvironment(DesktopEnv, arguments={'path_to_vm': sys.argv[1], 'provider_name': 'docker'},\n"
        "        settle_s=0, evaluate_settle_s=0)\n"
        "    await env.reset(Task('t', 'Do.', data={'evaluator': {'func': 'hang'}}))\n"
        "    print('ready', flush=True)\n"
        "    await env.evaluate()\n"
        "asyncio.run(main())\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", source, machine.address],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent}"},
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert machine.state()["used"]
        owner.send_signal(signal.SIGKILL)
        eventually(lambda: not machine.state()["used"], "the machine given back")
    finally:
        owner.kill()
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()


# -- the stand-in itself -----------------------------------------------------------------------------------------------


def parameters(function: Any) -> list[tuple[str, Any]]:
    found = list(inspect.signature(function).parameters.values())[1:]
    return [(one.name, ... if one.default is inspect.Parameter.empty else one.default) for one in found]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_stand_in_has_the_signatures_of_the_real_one(name: str) -> None:
    kind, _, method = name.partition(".")
    assert parameters(getattr(getattr(standin_osworld, kind), method)) == SIGNATURES[name]


def test_the_recorded_signatures_are_those_of_the_installed_one() -> None:
    found = importlib.util.find_spec("desktop_env")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps desktop-env==1.0.2, to compare with its source")
    for path in ("desktop_env.py", "controllers/python.py"):
        tree = ast.parse((Path(found.origin).parent / path).read_text())
        for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            for method in (node for node in kind.body if isinstance(node, ast.FunctionDef)):
                name = f"{kind.name}.{method.name}"
                if name in SIGNATURES:
                    assert [argument.arg for argument in method.args.args[1:]] == [one for one, _ in SIGNATURES[name]]
                    defaults = [ast.unparse(default) for default in method.args.defaults]
                    for (_, recorded), default in zip(
                        [one for one in SIGNATURES[name] if one[1] is not ...], defaults, strict=True
                    ):
                        if "environ" not in default:
                            assert repr(recorded) == default, name
