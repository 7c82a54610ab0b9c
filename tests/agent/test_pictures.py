"""Clicks land where they were meant: parser and server resize screenshots alike, or it is said."""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Any

import pytest
from acting_server import acting
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from managed_vllm.agent import (
    AgentFormat,
    FailureClass,
    Limits,
    Observation,
    StepResult,
    StreamingTaskScheduler,
    Task,
    Trajectory,
    json_actions,
    run_episode,
    ui_tars,
)
from managed_vllm.agent.actions import Action, Click, smart_resize
from managed_vllm.agent.pictures import picture_of
from managed_vllm.errors import ConfigError

SMALL = (160, 210)
SERVERS_OWN = smart_resize(SMALL, min_pixels=3136)
"""What Qwen2.5-VL's own image processor makes of it: 168 x 224, 48 tokens. UI-TARS' limits make 252 x 336 of it."""


class Screen:
    """Screenshots of one size; `clicked` has the points."""

    def __init__(self, size: tuple[int, int] = SMALL) -> None:
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "PNG")
        self.seen = Observation(file.getvalue())
        self.clicked: list[Action] = []

    async def reset(self, task: Task) -> Observation:
        return self.seen

    async def step(self, action: Action) -> StepResult:
        self.clicked.append(action)
        return StepResult(self.seen)

    async def evaluate(self) -> float:
        return 1.0

    async def close(self) -> None:
        pass


def clicked(answer: str, tokens: int | None, agent: AgentFormat, screen: Screen | None = None) -> Trajectory:
    async def play() -> Trajectory:
        async with server.client() as client:
            task = Task("t", "Click the centre.")
            return await run_episode(client, screen or Screen(), task, agent=agent, limits=Limits(max_steps=2))

    with acting(lambda _: answer, tokens_of_image=tokens) as server:
        return asyncio.run(play())


@given(
    st.tuples(st.integers(28, 2500), st.integers(28, 2500)).filter(lambda size: max(size) < 100 * min(size)),
    st.sampled_from([3136, 78_400, 200_000, 2_000_000]),
    st.sampled_from([300_000, 1_003_520, 12_845_056]),
)
def test_the_number_of_tokens_tells_the_size(size: tuple[int, int], least: int, most: int) -> None:
    resized = smart_resize(size, min_pixels=min(least, most), max_pixels=most)
    assert picture_of(size, resized[0] * resized[1] // 28**2) == resized


def test_a_number_of_tokens_that_no_limits_make_is_none() -> None:
    assert picture_of((1920, 1080), 2691) == (1932, 1092)
    assert picture_of((1920, 1080), 2690) is None


@pytest.mark.parametrize(
    ("agent", "answer"),
    [
        (ui_tars(), "Action: click(start_box='(84,112)')"),
        (json_actions("resized"), '{"action": "click", "x": 84, "y": 112}'),
        (ui_tars("osworld", prompt="{instruction}"), "Action: click(start_box='(84,112)')"),
    ],
    ids=["ui-tars", "json", "osworld"],
)
def test_a_click_lands_where_the_model_saw_it_whatever_the_servers_limits_are(
    agent: AgentFormat, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The centre of the picture of 168 x 224 is the centre of the screenshot, from the first turn on; it is told."""
    screen = Screen()
    with caplog.at_level(logging.WARNING, "managed_vllm.agent"):
        found = clicked(answer, 48, agent, screen)
    assert found.failure is None
    assert found.steps[0].actions == (Click(80, 105),)
    assert len([record for record in caplog.records if "a picture of 168x224" in record.getMessage()]) == 1


def test_nothing_is_told_where_all_is_as_expected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "managed_vllm.agent"):
        found = clicked("Action: click(start_box='(966,546)')", 2691, ui_tars(), Screen((1920, 1080)))
    assert found.steps[0].actions == (Click(960, 540),)
    assert not [record for record in caplog.records if record.name == "managed_vllm.agent"]


def test_limits_that_the_caller_gives_must_be_the_servers() -> None:
    right = clicked("Action: click(start_box='(84,112)')", 48, ui_tars(min_pixels=3136))
    assert right.steps[0].actions == (Click(80, 105),)
    wrong = clicked("Action: click(start_box='(84,112)')", 48, ui_tars(min_pixels=78_400))
    assert wrong.failure is not None
    assert wrong.failure.kind is FailureClass.USER_CODE
    assert "every click would land elsewhere" in wrong.failure.message


def test_a_model_of_another_kind_ends_the_run_at_its_first_turn() -> None:
    """2,040 tokens, as of squares of 32 pixels, and one more: no size of Qwen2.5-VL's."""
    screens: list[Screen] = []

    def make() -> Screen:
        screens.append(Screen((1920, 1080)))
        return screens[-1]

    with acting(lambda _: "Action: click(start_box='(1,1)')", tokens_of_image=2041) as server:
        scheduler = StreamingTaskScheduler(server.client(), make, max_concurrency=1)
        with pytest.raises(ConfigError, match="coordinates are not those of the resized picture"):
            scheduler.run_all(["a", "b"])
    assert not any(screen.clicked for screen in screens)


@pytest.mark.parametrize("agent", [ui_tars("relative1000"), ui_tars("absolute"), json_actions()])
def test_other_coordinates_have_nothing_to_do_with_it(agent: Any) -> None:
    found = clicked("Action: click(start_box='(10,10)')", 2041, agent)
    assert found.failure is None


def test_a_server_that_shows_no_image_tokens_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "managed_vllm.agent"):
        found = clicked("Action: click(start_box='(126,168)')", None, ui_tars())
    assert found.steps[1].actions == (Click(80, 105),)
    assert len([record for record in caplog.records if "show no image tokens" in record.getMessage()]) == 1
