"""OSWorld's own machine server on a virtual screen: real clicks and keys, real pixels, and its own evaluator's word."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import string
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import example_modules
import osworld_machine
import pytest
from acting_server import Refusal, acting, text_of
from osworld_machine import SIZE, Machine
from processes import HANG_S, eventually

from managed_vllm.agent import RunStore, Task, Trajectory, run_episode
from managed_vllm.agent.actions import Action, Button, Click, Direction, Drag, Hotkey, Move, Scroll, Type, Wait
from managed_vllm.agent.environments.osworld import OSWorldEnvironment
from managed_vllm.agent.environments.osworld_tasks import osworld_tasks
from managed_vllm.agent.export import export

pillow = pytest.importorskip("PIL.Image")
MISSING = osworld_machine.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

example = example_modules.example("12_osworld_on_a_virtual_screen")
FIELD, SAVE, DISCARD, FIVE, said = example.FIELD, example.SAVE, example.DISCARD, example.FIVE, example.said
FORM_COLOUR, FORM_CORNER = (0x2E, 0x8B, 0x57), (1850, 1000)
PATIENT = example.PATIENT


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with osworld_machine.machine() as made:
        yield made


@pytest.fixture
def folder(machine: Machine) -> Path:
    """Where the form writes, on the machine."""
    return Path(tempfile.mkdtemp(dir=machine.folder))


def form(folder: Path, expected: str = "", *, after_s: int = 0) -> Task:
    """The form is to be filled in and saved; it takes seconds to appear."""
    evaluator = {
        "func": "exact_match",
        "result": {"type": "vm_command_line", "command": ["cat", str(folder / "saved")]},
        "expected": {"type": "rule", "rules": {"expected": expected}},
    }
    data = example.config(folder, evaluator, after_s=after_s)
    return Task(f"form-{folder.name}", "Fill in the form and save it.", data=data)


@contextlib.asynccontextmanager
async def desktop(machine: Machine, **options: Any) -> AsyncIterator[OSWorldEnvironment]:
    given = {**example.QUICK, **options}
    env = OSWorldEnvironment(osworld_machine.desktop_env, arguments=machine.arguments, **given)
    try:
        yield env
    finally:
        await env.close()


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), 4 * HANG_S))


async def there(file: Path) -> Path:
    """Waits for what the form writes."""
    await asyncio.to_thread(eventually, file.exists, f"the form has written {file.name}")
    return file


def pixels(screenshot: bytes | None) -> Any:
    assert screenshot is not None
    image = pillow.open(io.BytesIO(screenshot)).convert("RGB")
    assert image.size == SIZE
    return image


def shows_the_form(screenshot: bytes | None) -> bool:
    return bool(pixels(screenshot).getpixel(FORM_CORNER) == FORM_COLOUR)


async def seen_when(env: OSWorldEnvironment, condition: Callable[[bytes | None], bool]) -> None:
    """Looks at the screen until the condition holds: an app draws when it comes to it."""
    async with asyncio.timeout(HANG_S):
        while not condition((await env.step(Wait(0.1))).observation.screenshot):
            pass


def ink(screenshot: bytes | None) -> int:
    """Dark pixels in the field's first line."""
    return sum(pixels(screenshot).crop((60, 60, 1200, 80)).convert("L").histogram()[:100])


# -- episodes, by what a model says ------------------------------------------------------------------------------------


def played(machine: Machine, folder: Path, task: Task, answers: list[str]) -> Trajectory:
    """An episode. The model answers when the form is there, and the last time when it has done what it was told."""

    async def answer(messages: list[dict[str, Any]]) -> str | Refusal:
        turn: int = sum(message["role"] == "assistant" for message in messages)
        await there(folder / ("saved" if answers[turn].endswith("finished()") else "shown"))
        return answers[turn]

    async def test() -> Trajectory:
        with acting(answer) as server:
            async with desktop(machine) as env:
                return await run_episode(server.client(), env, task, limits=PATIENT)

    played: Trajectory = run(test)
    return played


@pytest.mark.parametrize(("button", "reward"), [(SAVE, 1.0), (DISCARD, 0.0)], ids=["right", "wrong"])
def test_its_evaluator_says_1_for_what_was_done_and_0_for_the_wrong_action(
    machine: Machine, folder: Path, button: tuple[int, int], reward: float
) -> None:
    text = "it's <b>5 > 3</b>"
    answers = [
        said("click", FIELD),
        'Thought: next\nAction: type(content="it\'s <b>5 > 3</b>")',
        said("click", button),
        "Thought: next\nAction: finished()",
    ]
    trajectory = played(machine, folder, form(folder, text), answers)
    assert trajectory.failure is None
    assert trajectory.reward == reward
    assert (folder / "saved").read_text() == (text if reward else "")


def test_what_the_machine_can_not_do_fails_the_attempt_and_is_no_reward(machine: Machine, folder: Path) -> None:
    """Without xclip nothing can be pasted there: that is not for the model to answer for."""
    program = machine.folder / "bin" / "xclip"
    away = program.rename(machine.folder / "xclip")
    try:
        trajectory = played(machine, folder, form(folder), [said("click", FIELD), "Action: type(content='é')"])
    finally:
        away.rename(program)
    assert trajectory.reward is None
    assert "the machine could not execute Type" in str(trajectory.failure)
    assert "copy/paste mechanism" in str(trajectory.failure)


# -- five tasks, played by an oracle -----------------------------------------------------------------------------------


def as_files(folder: Path, task: str) -> Path:
    """A list of OSWorld's with that task, and its file."""
    place = folder / "examples" / "form"
    place.mkdir(parents=True)
    script = FIVE[task]
    data = {**example.config(folder, script.evaluator(folder)), "id": task, "instruction": script.instruction}
    (place / f"{task}.json").write_text(json.dumps(data))
    (folder / "test_all.json").write_text(json.dumps({"form": [task]}))
    return folder / "test_all.json"


@pytest.mark.parametrize("task", FIVE)
def test_osworlds_evaluator_says_1_for_a_task_that_an_oracle_plays(machine: Machine, folder: Path, task: str) -> None:
    (given,) = osworld_tasks(as_files(folder, task))
    answers = [*FIVE[task].answers, "Action: finished()"]

    async def answer(messages: list[dict[str, Any]]) -> str:
        turn: int = sum(message["role"] == "assistant" for message in messages)
        await there(folder / "shown")
        if turn == len(answers) - 1:
            await asyncio.to_thread(eventually, partial(FIVE[task].is_done, folder), "the app has noted it")
        return str(answers[turn])

    with RunStore.create(folder / "run") as store:

        async def test() -> Trajectory:
            with acting(answer) as server:
                async with desktop(machine) as env:
                    return await run_episode(server.client(), env, given, limits=PATIENT, images=store.images)

        trajectory = run(test)
        assert trajectory.failure is None
        assert trajectory.reward == 1.0
        store.append(trajectory)
        export(store, "osworld", folder / "results")
    (result,) = (folder / "results").glob(f"pyautogui/screenshot/*/form/{task}/result.txt")
    assert float(result.read_text()) == 1.0


def test_the_example_plays_the_five_by_itself_and_leaves_nothing() -> None:
    run = subprocess.run([sys.executable, example.__file__], capture_output=True, text=True, timeout=4 * HANG_S)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert [line.split() for line in run.stdout.splitlines()] == [[name, "1.0"] for name in FIVE]


def test_a_model_plays_the_five_by_the_example(machine: Machine, folder: Path) -> None:
    """It answers as the oracle does, by the instruction that it is told."""

    given = example.tasks(machine.folder)
    by_instruction = {task.instruction: (FIVE[name], its) for name, (task, its) in given.items()}

    async def answer(messages: list[dict[str, Any]]) -> str:
        told = text_of(messages[1])
        ((script, its),) = [found for words, found in by_instruction.items() if words in told]
        turn = sum(message["role"] == "assistant" for message in messages)
        await there(its / "shown")
        if turn == len(script.answers):
            await asyncio.to_thread(eventually, partial(script.is_done, its), "the app has noted it")
        return str([*script.answers, "Action: finished()"][turn])

    with acting(answer) as server:
        rewards = example.model(server.client(), machine, given, folder / "run")
    assert rewards == dict.fromkeys(FIVE, 1.0)


# -- what is typed -----------------------------------------------------------------------------------------------------

PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n\t"
LONG = "".join(f"word{number:04} " for number in range(389))[:3500]


@pytest.mark.parametrize(
    "text",
    [
        LONG[:310] + PRINTABLE,
        LONG[:3486] + "Straße, naïve\n",
        pytest.param(LONG, marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
    ids=["408-by-keys", "3500-by-paste", "3500-by-keys"],
)
def test_text_is_typed_whole_and_in_order(machine: Machine, folder: Path, text: str) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            await env.reset(form(folder, text))
            await there(folder / "shown")
            before = ink((await env.step(Click(*FIELD))).observation.screenshot)
            await env.step(Type(text))
            await seen_when(env, lambda screenshot: ink(screenshot) > before + 100)
            await env.step(Click(*SAVE))
            assert (await there(folder / "saved")).read_text() == text
            assert await env.evaluate() == 1.0

    asyncio.run(asyncio.wait_for(test(), 10 * HANG_S))


# -- what is clicked and pressed ---------------------------------------------------------------------------------------


def events(folder: Path) -> list[list[Any]]:
    file = folder / "events"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def arrived(folder: Path, earlier: int, at_least: int = 0) -> list[list[Any]] | None:
    """What came after so many events, motions left out; None as long as it is less."""
    found = [event for event in events(folder)[earlier:] if event[0] != "motion"]
    return found if len(found) >= at_least else None


def canvas(x: int, y: int) -> tuple[int, int]:
    """Of the screen, from the canvas's own."""
    return 1300 + x, 60 + y


def both(button: int, x: int, y: int) -> list[list[Any]]:
    return [["press", button, x, y], ["release", button, x, y]]


CASES: list[tuple[Action, list[list[Any]]]] = [
    (Click(*canvas(100, 140)), both(1, 100, 140)),
    (Click(*canvas(20, 30), Button.RIGHT), both(3, 20, 30)),
    (Click(*canvas(40, 50), clicks=2), [*both(1, 40, 50), ["double", 1, 40, 50], ["release", 1, 40, 50]]),
    (Drag(*canvas(60, 70), *canvas(300, 400)), [["press", 1, 60, 70], ["release", 1, 300, 400]]),
    (Scroll(Direction.UP, *canvas(10, 10)), both(4, 10, 10) * 5),
    (Scroll(Direction.DOWN, *canvas(10, 10), 2), both(5, 10, 10) * 2),
    (Hotkey(("ctrl", "shift", "a")), [["key", "Control_L"], ["key", "Shift_L"], ["key", "A"]]),
    (Hotkey(("arrowleft",)), [["key", "Left"]]),
    (Hotkey(("f5",)), [["key", "F5"]]),
]


def test_each_action_arrives_at_the_app_as_it_was_said(machine: Machine, folder: Path) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            await env.reset(form(folder))
            await there(folder / "shown")
            await env.step(Move(*canvas(1, 1)))
            for action, expected in CASES:
                before = len(events(folder))
                await env.step(action)
                await asyncio.to_thread(eventually, partial(arrived, folder, before, len(expected)), str(action))
                assert arrived(folder, before) == expected, action
            assert ["motion", 0, 1, 1] in events(folder)

    run(test)


# -- what takes its time -----------------------------------------------------------------------------------------------


def test_an_app_that_takes_seconds_to_appear_is_on_the_first_screenshot(machine: Machine, folder: Path) -> None:
    async def test() -> None:
        async with desktop(machine, settle_s=34.0) as env:
            assert shows_the_form((await env.reset(form(folder, after_s=4))).screenshot)

    run(test)


def test_without_settling_it_is_not_and_neither_is_the_app_of_the_task_before(machine: Machine, folder: Path) -> None:
    async def test() -> None:
        async with desktop(machine) as env:
            await env.reset(form(folder))
            await there(folder / "shown")
            await seen_when(env, shows_the_form)
            assert not shows_the_form((await env.reset(form(folder, after_s=600))).screenshot)

    run(test)
