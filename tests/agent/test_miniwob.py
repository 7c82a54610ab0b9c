"""MiniWoB++ in a real Chromium: a scripted policy that reads the page and answers as UI-TARS would gets its reward."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import HANG_S, eventually, is_live, tree_below

from managed_vllm.agent import Environment, Limits, Observation, StepResult, Task
from managed_vllm.agent.actions import (
    Button,
    CallUser,
    Click,
    Custom,
    Direction,
    Drag,
    Finished,
    Hotkey,
    Scroll,
    Type,
    Wait,
    parse_ui_tars,
    smart_resize,
)
from managed_vllm.agent.environments.miniwob import MiniWoBEnvironment, SyncMiniWoB, missing, task_names
from managed_vllm.errors import EnvironmentFailedError, EnvironmentRaisedError, EnvironmentTimeoutError

pillow = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

HERE = Path(__file__).parent.parent / "helpers"
PATIENT = Limits(reset_timeout_s=90, step_timeout_s=60, close_timeout_s=20)
"""The browser's start takes 1.5 s by itself, and ten times that beside others."""


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * HANG_S))


@contextlib.asynccontextmanager
async def browser(task_name: str | None = None, **options: Any) -> AsyncIterator[MiniWoBEnvironment]:
    """An environment of which nothing may be left in the end."""
    env = MiniWoBEnvironment(task_name, **{"limits": PATIENT, "text": True, **options})
    try:
        yield env
    finally:
        family = tree_below(env.pid) if env.pid else set()
        await env.close()
        assert not [process for process in family if is_live(process)]
        assert env.folder is None or not env.folder.exists()


class Shared:
    """One browser at scale 1 for tests that only look at pages, with the loop that it belongs to."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.env = MiniWoBEnvironment(text=True, limits=PATIENT)

    def run(self, test: Callable[[MiniWoBEnvironment], Awaitable[None]]) -> None:
        self.runner.run(asyncio.wait_for(test(self.env), 4 * HANG_S))


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    one = Shared()
    with one.runner:
        yield one
        one.runner.run(one.env.close())


async def stepped_until(env: MiniWoBEnvironment, condition: Callable[[StepResult], bool]) -> StepResult:
    """Looks at the page until the condition holds of what is seen: it comes to its timers and frames when it can."""
    async with asyncio.timeout(HANG_S):
        while not condition(result := await env.step(Wait(0.05))):
            pass
    return result


def on(page: str, seed: int = 0) -> Task:
    return Task("t", seed=seed, data={"task_name": page})


def size(seen: Observation) -> tuple[int, int]:
    assert seen.screenshot is not None
    width, height = pillow.open(io.BytesIO(seen.screenshot)).size
    return width, height


def at(seen: Observation, *words: str) -> tuple[int, int]:
    """Where the element is whose line has all these words."""
    for line in (seen.text or "").splitlines():
        if all(word in line for word in words):
            found = re.search(r"\((\d+), (\d+)\)$", line)
            assert found, line
            return int(found[1]), int(found[2])
    raise AssertionError(f"no element {words} in\n{seen.text}")


# -- a policy that knows the answer ------------------------------------------------------------------------------------


def answers(page: str, seen: Observation) -> list[str]:
    """What a model that reads the page would say, in UI-TARS's words and its own pixels."""
    width, height = size(seen)
    seen_width, seen_height = smart_resize((width, height))

    def click(*words: str) -> str:
        x, y = at(seen, *words)
        x, y = round(x / width * seen_width), round(y / height * seen_height)
        return f"Thought: I click {words[-1]}.\nAction: click(start_box='<|box_start|>({x},{y})<|box_end|>')"

    assert seen.instruction is not None
    match page:
        case "click-test-2":
            return [click("button", "'ONE'")]
        case "click-button":
            wanted = re.search(r'"(.*)"', seen.instruction)
            assert wanted
            return [click("button", repr(wanted[1]))]
        case "enter-text":
            wanted = re.search(r'"(.*)"', seen.instruction)
            assert wanted
            return [click("input_text"), f"Action: type(content='{wanted[1]}')", click("button", "'Submit'")]
    raise AssertionError(page)


async def play(env: MiniWoBEnvironment, page: str, seed: int) -> float:
    """One episode; returns its reward."""
    seen = await env.reset(Task(f"{page}-{seed}", seed=seed))
    rewards = []
    for answer in answers(page, seen):
        (action,) = parse_ui_tars(answer, size(seen)).actions
        result = await env.step(action)
        assert result.reward is not None
        rewards.append(result.reward)
    assert result.terminated
    assert rewards[:-1] == [0.0] * (len(rewards) - 1)
    assert await env.evaluate() == rewards[-1]
    return rewards[-1]


@pytest.mark.parametrize("scale", [1, 3])
def test_clicks_and_text_go_where_the_policy_meant_them(scale: int) -> None:
    async def episodes(page: str, reward: Any) -> list[float]:
        async with browser(page, scale=scale, reward=reward) as env:
            return [await play(env, page, seed) for seed in range(5)]

    async def test() -> None:
        all_rewards = await asyncio.gather(
            episodes("click-test-2", "raw"), episodes("click-button", "decayed"), episodes("enter-text", "raw")
        )
        assert all(reward > 0.9 for rewards in all_rewards for reward in rewards), all_rewards
        assert all(reward < 1.0 for reward in all_rewards[1])  # some of it went with the time

    run(test)


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_the_seed_decides_what_is_seen_and_one_browser_serves_all_pages() -> None:
    async def test() -> None:
        async with browser(scale=2) as env:
            assert isinstance(env, Environment)
            first = await env.reset(on("click-button", 5))
            browsers = chromium(env)
            other = await env.reset(on("click-button", 6))
            form = await env.reset(on("enter-text", 5))
            again = await env.reset(on("click-button", 5))
            assert (again.screenshot, again.text, again.instruction) == (
                first.screenshot,
                first.text,
                first.instruction,
            )
            assert other.text != first.text
            assert "input_text" in (form.text or "")
            assert size(first) == (320, 420)
            assert chromium(env) == browsers
            with pytest.raises(EnvironmentRaisedError, match="no page 'click-buton'; did you mean click-button"):
                await env.reset(on("click-buton"))

    run(test)


def chromium(env: MiniWoBEnvironment) -> list[psutil.Process]:
    """The browser's first process."""
    assert env.pid is not None
    family = {process: command_of(process) for process in tree_below(env.pid)}
    found = [one for one, said in family.items() if "--remote-debugging-port" in said and "--type=" not in said]
    assert found
    return [one for one in found if one.ppid() not in {each.pid for each in found}]  # a fork has its parent's command


def command_of(process: psutil.Process) -> str:
    """Its command line; nothing for one that has just ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_the_end_keeps_what_was_seen_and_later_actions_do_nothing(shared: Shared) -> None:
    async def test(env: MiniWoBEnvironment) -> None:
        seen = await env.reset(on("click-test-2"))
        wrong = await env.step(Click(*at(seen, "'TWO'")))
        assert (wrong.reward, wrong.terminated, wrong.info["raw_reward"]) == (-1.0, True, -1)
        assert wrong.observation == seen
        after = await env.step(Click(*at(seen, "'ONE'")))
        assert (after.reward, after.terminated) == (-1.0, True)
        assert "the episode was over" in after.info["ignored"]
        assert await env.evaluate() == -1.0

    shared.run(test)


def test_saying_that_it_is_done_is_no_success(shared: Shared) -> None:
    async def test(env: MiniWoBEnvironment) -> None:
        await env.reset(on("click-test-2"))
        for action in (Finished("clicked it"), CallUser(), Wait(0.05)):
            result = await env.step(action)
            assert (result.reward, result.terminated) == (0.0, False)
            assert "ignored" not in result.info
        assert await env.evaluate() == 0.0

    shared.run(test)


def test_the_time_of_a_page_is_ours_to_choose() -> None:
    async def test() -> None:
        async with browser("click-test-2", page_time_limit_s=0.5, text=False) as env:
            seen = await env.reset(Task("t", seed=0))
            assert seen.text is None
            result = await stepped_until(env, lambda result: result.terminated)
            assert (result.reward, result.terminated, result.info["reason"]) == (-1.0, True, "timed out")

    run(test)


@pytest.mark.soak
def test_every_page_is_shown_and_takes_a_click() -> None:
    async def test() -> None:
        async with browser(scale=2) as env:
            for page in task_names():
                seen = await env.reset(on(page, 3))
                assert seen.instruction, page
                assert size(seen) == ((750, 1334) if page.startswith("flight.") else (320, 420)), page
                width, height = size(seen)
                assert "ignored" not in (await env.step(Click(width / 2, height - 20))).info, page

    run(test)


# -- actions -----------------------------------------------------------------------------------------------------------


def test_keys_double_clicks_and_drags_reach_the_page() -> None:
    scale = 2

    async def test() -> None:
        async with browser(scale=scale) as env:
            seen = await env.reset(on("enter-text", 1))
            field = at(seen, "input_text")

            async def value(*actions: Any) -> str:
                for action in actions:
                    result = await env.step(action)
                    assert "ignored" not in result.info
                found = re.search(r"input_text value='(.*?)'", result.observation.text or "")
                return found[1] if found else ""

            assert await value(Click(*field), Type("Grün 10 % ü\t")) == "Grün 10 % ü"
            assert await value(Click(*field), Hotkey(("ctrl", "a")), Type("two words")) == "two words"
            assert await value(Hotkey(("backspace",)), Hotkey(("Home",)), Type("X")) == "Xtwo word"
            assert await value(Hotkey(("shift", "end")), Hotkey(("delete",))) == "X"
            assert await value(Hotkey(("ctrl", "a")), Type("word")) == "word"
            left = (field[0] - 55 * scale, field[1])
            assert await value(Click(*left, clicks=2), Type("other")) == "other"
            assert await value(Click(*field, button=Button.RIGHT), Click(*field)) == "other"
            assert await value(Drag(*field, left[0] - 6 * scale, left[1]), Hotkey(("delete",))) == ""

            seen = await env.reset(on("drag-box", 2))
            small, large = at(seen, "'s'"), at(seen, "'L'")
            assert not (await env.step(Drag(*small, *large))).terminated
            assert (await env.step(Click(*at(seen, "button", "Submit")))).reward == 1.0

    run(test)


def test_enter_submits_and_scrolling_moves_what_is_seen(shared: Shared) -> None:
    async def test(env: MiniWoBEnvironment) -> None:
        seen = await env.reset(on("scroll-text", 1))
        area = at(seen, "textarea")
        await env.step(Scroll(Direction.DOWN, *area, amount=4))
        down = await stepped_until(env, lambda result: result.observation.screenshot != seen.screenshot)
        far = difference(down.observation, seen)
        up = await env.step(Scroll(Direction.UP, amount=20))  # where the pointer is
        assert "ignored" not in up.info
        await stepped_until(env, lambda result: difference(result.observation, seen) < far)
        seen = await env.reset(on("terminal", 1))
        await env.step(Click(*at(seen, "user$")))
        typed = await env.step(Type("ls", enter=True))
        assert ".gif" in (typed.observation.text or "")
        assert (typed.observation.text or "").count("user$") == 2  # the line that was entered, and the next one

    shared.run(test)


def difference(one: Observation, other: Observation) -> int:
    """The number of pixels in which they differ."""
    pictures = [pillow.open(io.BytesIO(seen.screenshot or b"")).convert("L") for seen in (one, other)]
    return sum(a != b for a, b in zip(pictures[0].tobytes(), pictures[1].tobytes(), strict=True))


def test_what_no_page_knows_does_nothing_and_says_so(shared: Shared) -> None:
    async def test(env: MiniWoBEnvironment) -> None:
        await env.reset(on("click-test-2"))
        for action, why in (
            (Click(160, 5), "(160, 5) is outside of the page's 160 x 210 pixels"),
            (Drag(5, 5, 5, -1), "(5, -1) is outside"),
            (Scroll(Direction.UP, 5, 300), "(5, 300) is outside"),
            (Hotkey(("ctrl", "warp")), "'warp' is no key of a page"),
            (Custom("fly"), "Custom fly is no action of a page"),
        ):
            result = await env.step(action)
            assert why in result.info["ignored"]
            assert (result.reward, result.terminated) == (0.0, False)

    shared.run(test)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hung", ["chromedriver", "page"])
def test_a_browser_that_hangs_is_ended_with_all_its_processes(hung: str) -> None:
    async def test() -> None:
        async with browser("click-test-2") as env:
            await env.reset(Task("t", seed=0))
            assert env.pid is not None
            family = tree_below(env.pid)
            names = {"chromedriver": "chromedriver", "page": "--type=renderer"}
            stopped = [process for process in family if names[hung] in command_of(process)]
            assert stopped
            for process in stopped:
                process.suspend()
            env.limits = Limits(step_timeout_s=1.0)
            with pytest.raises(
                EnvironmentTimeoutError, match=r"MiniWoB\+\+ click-test-2: step was not over within 1 s"
            ):
                await env.step(Click(5, 5))
            assert not [process for process in family if is_live(process)]
            assert env.folder is not None
            assert not env.folder.exists()

    run(test)


def test_a_browser_that_was_killed_fails_the_step() -> None:
    async def test() -> None:
        async with browser("click-test-2") as env:
            await env.reset(Task("t", seed=0))
            for process in chromium(env):
                process.kill()
            with pytest.raises(EnvironmentRaisedError, match="selenium"):
                await env.step(Click(5, 5))

    run(test)


OWNER = """
import asyncio
from managed_vllm.agent import Task
from managed_vllm.agent.environments.miniwob import MiniWoBEnvironment

async def main():
    envs = [MiniWoBEnvironment("click-test-2") for _ in range(2)]
    await asyncio.gather(*(env.reset(Task("t", seed=0)) for env in envs))
    print(*(env.pid for env in envs), *(env.folder for env in envs), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_sigkill_of_the_rollout_leaves_no_browser_and_no_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        words = owner.stdout.readline().split()
        family = set().union(*(tree_below(int(word)) for word in words[:2]))
        folders = [Path(word) for word in words[2:]]
        commands = [command_of(process) for process in family]
        assert sum("chromedriver" in command for command in commands) >= 2
        assert sum("--type=renderer" in command for command in commands) >= 2
        assert all(folder.exists() for folder in folders)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        eventually(lambda: not [process for process in family if is_live(process)], "all processes gone")
        eventually(lambda: not [folder for folder in folders if folder.exists()], "all folders gone")
        assert list(home.rglob("*")) == []
    finally:
        owner.kill()
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EnvironmentFailedError, match=r"Chromium \(/no/chromium is no program\): apt-get install chromium"
    ):
        MiniWoBEnvironment("click-test-2", chromium="/no/chromium")
    with pytest.raises(EnvironmentFailedError, match=r"chromedriver \(/no/driver is no program\): apt-get install"):
        MiniWoBEnvironment("click-test-2", chromedriver="/no/driver")
    for name in ("MINIWOB_CHROME_BINARY", "MINIWOB_CHROMEDRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/no/path")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = missing()
    assert said is not None
    assert "pip install" in said
    assert said.count("apt-get install chromium chromium-driver") == 2
    with pytest.raises(EnvironmentFailedError, match="pip install"):
        task_names()


def test_bad_arguments_are_refused_at_once() -> None:
    names = task_names()
    assert {"click-test-2", "enter-text", "flight.AA"} <= set(names)
    assert len(names) > 120
    with pytest.raises(ValueError, match="no page 'click-tes-2'; did you mean click-test-2"):
        MiniWoBEnvironment("click-tes-2")
    for options in ({"scale": 0}, {"scale": 1.5}, {"reward": "best"}, {"page_time_limit_s": 0}, {"pause_s": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MiniWoBEnvironment("click-test-2", **options)


def test_a_task_must_say_which_page_it_is() -> None:
    env = SyncMiniWoB.__new__(SyncMiniWoB)
    env._task_name = None
    with pytest.raises(ValueError, match="which page is task t"):
        env.reset(Task("t"))
