"""The embedded desktop: its tasks, what actions do in it, what is seen, and that the demo model gets through."""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples

from managed_vllm import demo
from managed_vllm.agent.actions import (
    Action,
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
)
from managed_vllm.agent.environment import Environment
from managed_vllm.agent.environments.desktop import KINDS, DesktopEnvironment, desktop_tasks, oracle, world_of
from managed_vllm.agent.types import Observation, StepResult, Task
from managed_vllm.demo.screen import TextField
from managed_vllm.errors import EnvironmentFailedError

pillow = pytest.importorskip("PIL.Image")

Answer = Callable[[Observation], str]

TASK = desktop_tasks(1, kinds=["type_then_click"])[0]


def meant(answer: str, width: int, height: int) -> Action:
    """The action of an answer in the demo model's own notation, and of no other: the parser has tests of its own."""
    action = answer.rpartition("Action: ")[2]
    if found := re.fullmatch(r"click\(start_box='\((\d{1,3}),(\d{1,3})\)'\)", action):
        return Click(int(found[1]) * width / 1000, int(found[2]) * height / 1000)
    if found := re.fullmatch(r"type\(content='([^']*)'\)", action):
        return Type(found[1])
    if found := re.fullmatch(r"scroll\(start_box='\(500,500\)', direction='(up|down)'\)", action):
        return Scroll(Direction(found[1]), width / 2, height / 2)
    if action == "finished(content='done')":
        return Finished("done")
    return Custom("no action", {"answer": answer})


async def run(environment: DesktopEnvironment, task: Task, answer: Answer, steps: int = 12) -> tuple[float, int]:
    """The reward of an episode, and its number of steps."""
    observation = await environment.reset(task)
    taken, ended = 0, False
    while taken < steps and not ended:
        result = await environment.step(meant(answer(observation), environment.width, environment.height))
        observation, ended = result.observation, result.terminated
        taken += 1
    return await environment.evaluate(), taken


async def after(task: Task, *actions: Action, environment: DesktopEnvironment | None = None) -> list[StepResult]:
    environment = environment or DesktopEnvironment()
    await environment.reset(task)
    return [await environment.step(action) for action in actions]


def at(label: str, task: Task = TASK) -> Click:
    """A click into the middle of an element on the first page."""
    x, y = next((x, y) for name, x, y, *_ in task.data["pages"][0] if name == label)
    return Click(x * 640 / 1000, y * 400 / 1000)


def of_goal(number: int, task: Task = TASK) -> Click:
    return at(task.data["goals"][number][0], task)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_tasks_are_plain_json_with_ids_that_name_number_and_kind() -> None:
    tasks = desktop_tasks(25)
    assert [task.id for task in tasks[:2]] == ["desktop-0000-click", "desktop-0001-type"]
    assert len({task.id for task in tasks}) == 25
    assert {task.data["kind"] for task in tasks} == set(demo.LEARNT)
    for task in tasks:
        assert json.loads(json.dumps(task.data)) == task.data
        assert task.instruction


def test_a_task_depends_on_seed_number_and_kind_alone() -> None:
    assert desktop_tasks(5) == desktop_tasks(20)[:5]
    assert desktop_tasks(5, seed=1) == desktop_tasks(5, seed=1)
    ids = [{task.id for task in desktop_tasks(20, seed=seed)} for seed in (0, 1, 2)]
    assert len(set.union(*ids)) == 60
    only = desktop_tasks(3, kinds=["scroll"])
    assert [task.data["kind"] for task in only] == ["scroll"] * 3
    assert len({json.dumps(task.data) for task in only}) == 3


def test_bad_requests_for_tasks_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="no such kinds of desktop tasks: fly; there are click, type"):
        desktop_tasks(1, kinds=["fly"])
    with pytest.raises(ValueError, match="-1 tasks"):
        desktop_tasks(-1)
    with pytest.raises(ValueError, match="of 0 kinds"):
        desktop_tasks(1, kinds=[])
    assert desktop_tasks(0) == []


@pytest.mark.parametrize("size", [(640, 400), (320, 200), (1920, 1080)])
def test_no_two_elements_overlap_and_all_lie_within_the_page(size: tuple[int, int]) -> None:
    environment = DesktopEnvironment(width=size[0], height=size[1])
    for task in desktop_tasks(200, seed=3):
        for page in world_of(task).pages:
            boxes = [environment.box_of(element) for element in page]
            for index, (left, top, right, bottom) in enumerate(boxes):
                assert 0 <= left < right < size[0] * 0.968
                assert size[1] * 0.1 < top < bottom < size[1] * 0.92
                for other in boxes[:index]:
                    assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


# -- episodes ----------------------------------------------------------------------------------------------------------


async def _all_right(tasks: list[Task], environment: DesktopEnvironment) -> list[int]:
    steps = []
    for task in tasks:
        reward, taken = await run(environment, task, oracle)
        assert reward == 1.0, task
        steps.append(taken)
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_earn_the_reward(kind: str) -> None:
    steps = asyncio.run(_all_right(desktop_tasks(8, seed=5, kinds=[kind]), DesktopEnvironment()))
    least = 1 + sum(1 if goal == "click" else 2 for goal in demo.KINDS[kind].goals) + demo.KINDS[kind].scroll
    assert all(least <= taken <= least + demo.KINDS[kind].scroll for taken in steps)


@pytest.mark.parametrize("size", [(320, 200), (1280, 720), (641, 399)])
def test_thousandths_hit_at_any_size(size: tuple[int, int]) -> None:
    asyncio.run(_all_right(desktop_tasks(20), DesktopEnvironment(width=size[0], height=size[1])))


def test_the_parser_of_rollouts_understands_right_answers() -> None:
    async def rewards(tasks: list[Task]) -> list[float]:
        environment, size = DesktopEnvironment(width=1280, height=720), (1280, 720)
        got = []
        for task in tasks:
            observation, ended = await environment.reset(task), False
            while not ended:
                (action,) = parse_ui_tars(oracle(observation), size, coordinates="relative1000").actions
                result = await environment.step(action)
                assert result.info["effect"] is not None
                observation, ended = result.observation, result.terminated
            got.append(await environment.evaluate())
        return got

    assert asyncio.run(rewards(desktop_tasks(40, kinds=KINDS))) == [1.0] * 40


def test_clicking_elsewhere_earns_nothing() -> None:
    async def rewards() -> set[float]:
        def elsewhere(observation: Observation) -> str:
            answer = oracle(observation)
            return re.sub(r"click\(.*", "click(start_box='(2,50)')", answer)

        return {
            (await run(DesktopEnvironment(), task, elsewhere))[0] for task in desktop_tasks(len(KINDS), kinds=KINDS)
        }

    assert asyncio.run(rewards()) == {0.0}


def test_a_goal_that_was_reached_earns_nothing_before_the_model_says_so() -> None:
    async def reward(*actions: Action) -> float:
        environment = DesktopEnvironment()
        await after(TASK, *actions, environment=environment)
        return await environment.evaluate()

    text = TASK.data["goals"][0][1]
    right = (of_goal(0), Type(text), of_goal(1))
    assert asyncio.run(reward(*right)) == 0.0
    assert asyncio.run(reward(*right, Finished())) == 1.0
    assert asyncio.run(reward(Finished())) == 0.0
    assert asyncio.run(reward(of_goal(1), of_goal(0), Type(text), Finished())) == 0.0  # the other way round
    assert asyncio.run(reward(of_goal(0), Type("something else"), of_goal(1), Finished())) == 0.0
    assert asyncio.run(reward(*right, of_goal(0), Type("other"), Finished())) == 0.0  # undone
    assert asyncio.run(reward(of_goal(1), *right, Finished())) == 1.0  # a detour
    assert asyncio.run(reward(of_goal(0), Finished(), Type(text), of_goal(1), Finished())) == 0.0  # after the end


def test_environments_serve_one_task_after_the_other_and_side_by_side() -> None:
    async def rewards() -> list[float]:
        async def several(environment: DesktopEnvironment, tasks: list[Task]) -> list[float]:
            return [(await run(environment, task, oracle))[0] for task in tasks]

        tasks = desktop_tasks(32)
        parts = [several(DesktopEnvironment(), tasks[number::4]) for number in range(4)]
        return [reward for part in await asyncio.gather(*parts) for reward in part]

    assert asyncio.run(rewards()) == [1.0] * 32


# -- actions -----------------------------------------------------------------------------------------------------------


def test_a_click_into_a_field_gives_it_the_focus_and_typing_replaces_its_content() -> None:
    first, typed, again = asyncio.run(after(TASK, of_goal(0), Type("one"), Type("two", enter=True)))
    label = TASK.data["goals"][0][0]
    assert first.info == {"effect": f'clicked "{label}"'}
    assert f'Status: clicked "{label}"' in str(first.observation.text)
    assert typed.info == {"effect": 'typed "one"'}
    assert re.search(rf"^{label}\(\d+,\d+\)=one$", str(typed.observation.text), re.MULTILINE)
    assert 'Status: typed "two"' in str(again.observation.text)
    assert re.search(rf"^{label}\(\d+,\d+\)=two$", str(again.observation.text), re.MULTILINE)
    assert len({result.observation.screenshot for result in (first, typed, again)}) == 3


def test_scrolling_shows_the_other_page_and_leaves_the_status_alone() -> None:
    task = desktop_tasks(1, kinds=["scroll"])[0]
    down, again, up = asyncio.run(
        after(task, Scroll(Direction.DOWN), Scroll(Direction.DOWN), Scroll(Direction.UP, 1.0, 1.0, 5))
    )
    assert down.info == {"effect": "scrolled down"}
    assert "\nMore: up\nStatus: ready\n" in str(down.observation.text)
    assert again.info == {"effect": None, "reason": "the page does not scroll down"}
    assert again.observation == down.observation
    assert "\nMore: down\nStatus: ready\n" in str(up.observation.text)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (Click(3.0, 60.0), r"nothing to click at \(3, 60\)"),
        (Click(-1e9, 1e300), "nothing to click"),
        (Click(math.nan, math.inf), "nothing to click"),
        (Click(320.0, 200.0, Button.RIGHT), "only single clicks"),
        (Click(320.0, 200.0, clicks=2), "only single clicks"),
        (Type("blue"), "no text field has the focus"),
        (Scroll(Direction.DOWN), "does not scroll down"),
        (Scroll(Direction.LEFT), "does not scroll left"),
        (Drag(1, 2, 3, 4), "Drag does nothing"),
        (Hotkey(("ctrl", "c")), "Hotkey does nothing"),
        (Wait(5.0), "nothing happens by itself"),
        (CallUser("help"), "there is no user"),
        (Custom("fly", {"to": "moon"}), "Custom does nothing"),
        ("no action at all", "str does nothing"),
    ],
)
def test_actions_without_effect_change_nothing_and_say_why(action: Any, reason: str) -> None:
    async def check() -> None:
        environment = DesktopEnvironment()
        before = await environment.reset(TASK)
        result = await environment.step(action)
        assert result.info["effect"] is None
        assert re.search(reason, result.info["reason"])
        assert (result.observation, result.terminated, result.truncated) == (before, False, False)
        assert await environment.evaluate() == 0.0

    asyncio.run(check())


def test_an_element_is_hit_to_its_edge_and_not_beside_it() -> None:
    async def check() -> None:
        environment = DesktopEnvironment()
        await environment.reset(TASK)
        for element in environment.world.elements:
            left, top, right, bottom = environment.box_of(element)
            for x, y in ((left, top), (right - 1, bottom - 1)):
                assert (await environment.step(Click(x, y))).info["effect"] == f'clicked "{element.label}"'
            for x, y in ((left - 1, top), (left, top - 1), (right, top), (left, bottom)):
                assert (await environment.step(Click(x, y))).info["effect"] is None

    asyncio.run(check())


def test_a_field_takes_one_line_and_says_what_it_leaves_out() -> None:
    _, line, long, nothing = asyncio.run(after(TASK, of_goal(0), Type("a\nb\tc"), Type("x" * 100_000), Type("\n")))
    assert line.info == {"effect": 'typed "a b c"', "reason": "a text field takes one line of 64 characters"}
    assert long.info["effect"] == f'typed "{"x" * 64}"'
    assert nothing.info == {"effect": None, "reason": "there is nothing to type"}
    assert nothing.observation == long.observation


texts = st.text(alphabet=st.characters(), max_size=80)  # lone surrogates, too
numbers = st.floats() | st.floats(0, 640)
actions = st.one_of(
    st.builds(Click, numbers, numbers),
    st.sampled_from([of_goal(0), of_goal(1), Finished()]),
    st.builds(Type, texts, st.booleans()),
    st.builds(Scroll, st.sampled_from(Direction), st.none() | numbers, st.none() | numbers),
    st.builds(Custom, texts),
)


@pytest.mark.no_cover
@settings(max_examples=examples(50), deadline=None)
@given(st.lists(actions, max_size=8))
def test_no_sequence_of_actions_raises_and_the_text_says_what_is_there(sequence: list[Action]) -> None:
    async def check() -> None:
        environment = DesktopEnvironment()
        await environment.reset(TASK)
        for action in sequence:
            observation = (await environment.step(action)).observation
            assert demo.read_screen(str(observation.text)).prompt() == observation.text
            str(observation.text).encode()
        assert await environment.evaluate() in (0.0, 1.0)

    asyncio.run(check())


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_an_observation_has_a_png_the_text_and_the_task() -> None:
    observation = asyncio.run(DesktopEnvironment().reset(TASK))
    image = pillow.open(io.BytesIO(observation.screenshot or b""))
    assert (image.format, image.size) == ("PNG", (640, 400))
    assert observation.instruction == TASK.instruction
    assert observation.text is not None
    assert observation.text.endswith(f"Status: ready\nTask: {TASK.instruction}")


def test_every_element_is_drawn_where_it_is_clicked() -> None:
    environment = DesktopEnvironment()
    observation = asyncio.run(environment.reset(TASK))
    image = pillow.open(io.BytesIO(observation.screenshot or b"")).convert("RGB")
    background = image.getpixel((2, 200))
    for element in environment.world.elements:
        left, top, right, bottom = environment.box_of(element)
        inside = {image.getpixel((x, (top + bottom) // 2)) for x in (left, left + 3, right - 2, right - 1)}
        assert background not in inside
        above = image.getpixel((right - 3, top - 2))  # of a field, its label stands on the left there
        assert above == background


def test_the_same_task_gives_the_same_bytes_in_another_process() -> None:
    code = """
import asyncio, hashlib
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
for task in desktop_tasks(12, seed=4):
    print(hashlib.sha256(asyncio.run(DesktopEnvironment().reset(task)).screenshot).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 12


def test_the_focus_the_content_and_the_end_can_be_seen() -> None:
    results = asyncio.run(after(TASK, of_goal(0), Type("blue"), of_goal(1), Finished()))
    assert len({result.observation.screenshot for result in results}) == 4
    assert [result.terminated for result in results] == [False, False, False, True]


def test_importing_the_module_loads_no_pillow() -> None:
    code = (
        "import sys, managed_vllm.agent.environments.desktop;"
        "print([m for m in ('PIL', 'numpy', 'torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


# -- life cycle --------------------------------------------------------------------------------------------------------


def test_it_is_an_environment() -> None:
    assert isinstance(DesktopEnvironment(), Environment)


def test_a_task_with_a_seed_alone_is_drawn() -> None:
    first = asyncio.run(DesktopEnvironment().reset(Task("any", seed=3)))
    assert asyncio.run(DesktopEnvironment().reset(Task("other", seed=3))) == first
    assert asyncio.run(DesktopEnvironment().reset(Task("any", seed=4))) != first


@pytest.mark.parametrize(
    "task",
    [
        Task("nothing"),
        Task("other", data={"config": []}),
        Task("bad", data={"pages": [[["OK", 5, 5]]], "goals": [["Save", None]]}),
        Task("bad", data={"pages": [[["OK", 5]]], "goals": [["OK", None]]}),
        Task("bad", data={"pages": [[["OK", 5, 5]]], "goals": []}),
        Task("bad", data={"pages": 3, "goals": []}),
    ],
)
def test_a_task_of_another_environment_is_refused(task: Task) -> None:
    with pytest.raises(EnvironmentFailedError, match=r"none for the desktop.*desktop_tasks"):
        asyncio.run(DesktopEnvironment().reset(task))


def test_calls_out_of_order_say_what_is_missing() -> None:
    async def check() -> None:
        environment = DesktopEnvironment()
        with pytest.raises(EnvironmentFailedError, match=r"call reset\(task\) first"):
            await environment.step(Wait())
        with pytest.raises(EnvironmentFailedError, match=r"call reset\(task\) first"):
            await environment.evaluate()
        await environment.reset(TASK)
        await environment.close()
        await environment.close()
        with pytest.raises(EnvironmentFailedError, match="is closed"):
            await environment.step(Wait())
        with pytest.raises(EnvironmentFailedError, match="is closed"):
            await environment.reset(TASK)

    asyncio.run(check())


def test_a_window_too_small_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 320x200 pixels, not 100x100"):
        DesktopEnvironment(width=100, height=100)


# -- the demo model in it ----------------------------------------------------------------------------------------------


def test_the_demo_model_gets_through_most_tasks() -> None:
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("transformers")
    from managed_vllm.demo.train import answer, read_model

    async def rewards(tasks: list[Task]) -> list[float]:
        """All episodes turn by turn, one batch a turn: a batch is as fast as one."""
        model, tokenizer = read_model(demo.weights_path())
        environments = [DesktopEnvironment(width=320, height=200) for _ in tasks]
        seen = [await environment.reset(task) for environment, task in zip(environments, tasks, strict=True)]
        active = list(range(len(tasks)))
        for _ in range(8):
            conversations = [[{"role": "user", "content": str(seen[index].text)}] for index in active]
            for index, said in zip(list(active), answer(model, tokenizer, conversations), strict=True):
                result = await environments[index].step(meant(said, 320, 200))
                seen[index] = result.observation
                if result.terminated:
                    active.remove(index)
            if not active:
                break
        return [await environment.evaluate() for environment in environments]

    tasks = desktop_tasks(64, seed=8)
    got = asyncio.run(rewards(tasks))
    lost = [task.id for task, reward in zip(tasks, got, strict=True) if reward != 1.0]
    assert len(lost) < 0.2 * len(tasks), lost


def test_random_tasks_have_fields_with_and_without_content() -> None:
    fields = [
        element
        for task in desktop_tasks(100)
        for page in world_of(task).pages
        for element in page
        if isinstance(element, TextField)
    ]
    assert {field.content for field in fields} & set(demo.WORDS)
    assert any(not field.content for field in fields)
    assert random.Random(0).choice(fields).label in demo.FIELDS
