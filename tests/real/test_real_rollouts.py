"""Rollouts on the real vLLM: the demo model on the embedded desktop, an image model on MiniWoB++ in Chromium."""

from __future__ import annotations

import io
import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from killing import check_after_kills, play_while_killing
from PIL import Image, ImageDraw
from processes import own_state

from managed_vllm import ManagedVLLM
from managed_vllm.agent import (
    AgentFormat,
    Limits,
    Observation,
    RunStore,
    StepResult,
    StopReason,
    StreamingTaskScheduler,
    Task,
    Trajectory,
    embedded,
    ui_tars,
)
from managed_vllm.agent.actions import Action, Click, Finished, ParsedResponse, Type, ui_tars_regex
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
from managed_vllm.agent.environments.miniwob import MiniWoBEnvironment, missing
from managed_vllm.agent.export import export
from managed_vllm.agent.prompting import Chat
from managed_vllm.agent.viewer import write_html
from managed_vllm.demo.random_vlm import make_random_vlm

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

SCALE = 2
SIZE = (160 * SCALE, 210 * SCALE)


@pytest.fixture(scope="module")
def demo() -> Iterator[ManagedVLLM]:
    with own_state(), ManagedVLLM("demo", keep_alive=0) as llm:
        yield llm


def test_the_demo_model_plays_the_embedded_desktop(demo: ManagedVLLM, tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", {"model": "demo"}) as store:
        scheduler = StreamingTaskScheduler(
            demo,
            DesktopEnvironment,
            n=2,
            max_concurrency=16,
            sampling_params={"temperature": 0.5, "max_tokens": 64},
            limits=Limits(max_steps=10),
            agent=embedded(),
            store=store,
        )
        found = scheduler.run_all(desktop_tasks(20, seed=7))
        assert len(found) == 40
        assert all(one.ok for one in found)
        by_kind = Counter(one.task.data["kind"] for one in found if one.reward == 1.0)
        assert sum(by_kind.values()) > 0.8 * 40, by_kind
        page = write_html(store, tmp_path / "view.html")
        assert Path(page).stat().st_size > 100_000
        assert [one for one in store.trajectories()] == sorted(found, key=order_of(store))
    check_records(demo, found)


def order_of(store: RunStore) -> Any:
    places = {entry.key: place for place, entry in enumerate(store.counting())}
    return lambda one: places[one.key]


def check_records(llm: ManagedVLLM, found: Sequence[Trajectory]) -> None:
    """What is recorded is what the server has: asked for once more, it gives the same ids."""
    for one in found[:10]:
        for step in one.steps:
            ids = list(step.response_token_ids)
            assert list(step.prompt_token_ids) == llm.client.tokenize(list(step.messages))
            ended = step.finish_reason == "stop"
            assert llm.client.detokenize(ids[: len(ids) - ended]) == step.response
            assert len(step.response_logprobs or ()) == len(ids)
            assert all(value <= 0 for value in step.response_logprobs or ())


def test_no_trajectory_is_lost_or_scored_when_vllm_is_killed(demo: ManagedVLLM) -> None:
    killed(demo, kills=1)


@pytest.mark.soak
def test_no_trajectory_is_lost_or_scored_when_vllm_is_killed_three_times(demo: ManagedVLLM) -> None:
    killed(demo, kills=3)


def killed(llm: ManagedVLLM, kills: int) -> None:
    first = llm.status().epoch

    def kill(status: Any) -> None:
        os.kill(status.server_pid, signal.SIGKILL)

    found = play_while_killing(llm, kill, count=12, turns=8, kills=kills)
    check_after_kills(found, count=12, turns=8, kills=kills)
    assert {step.epoch for one in found for step in one.steps} == set(range(first, first + kills + 1))


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedVLLM]:
    pytest.importorskip("torchvision", exc_type=ImportError)  # vLLM needs it for this model
    model = make_random_vlm(tmp_path_factory.mktemp("vlm") / "model")
    with own_state():
        with ManagedVLLM(
            str(model),
            keep_alive=0,
            enforce_eager=True,
            max_model_len=8192,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=2**28,
            limit_mm_per_prompt={"image": 3},
        ) as llm:
            yield llm


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_an_image_model_plays_miniwob_in_real_browsers(vlm: ManagedVLLM, tmp_path: Path) -> None:
    """The model knows nothing; its answers are held to the notation, so that pixels go in and actions come out."""
    pages = ("click-test-2", "click-button", "enter-text")
    actions = ("click", "left_double", "type", "scroll", "wait", "finished")
    regex = ui_tars_regex(SIZE, actions=actions, max_thought=20, max_text=8)
    limits = Limits(max_steps=4, max_images=3)
    tasks = [Task(f"{page}-{seed}", seed=seed, data={"task_name": page}) for page in pages for seed in range(4)]
    with RunStore.create(tmp_path / "run", {}) as store:
        scheduler = StreamingTaskScheduler(
            vlm,
            lambda: MiniWoBEnvironment("click-test-2", scale=SCALE, limits=limits),
            max_concurrency=3,
            sampling_params={"temperature": 1.0, "max_tokens": 100, "structured_outputs": {"regex": regex}},
            limits=limits,
            agent=ui_tars(),
            store=store,
        )
        found = scheduler.run_all(tasks)
        assert [one.failure for one in found] == [None] * 12
        steps = [step for one in found for step in one.steps]
        assert all(step.parse_error is None and step.actions for step in steps)
        assert all(one.stop_reason is not StopReason.PARSE_ERROR for one in found)
        seen = Counter(type(step.actions[0]) for step in steps)
        assert seen[Click] + seen[Type] > 0
        for one in found:
            assert one.instruction, "the page says what is to be done"
            assert one.reward is not None
            for step in one.steps:
                ref = step.screenshot
                assert ref is not None
                assert (ref.width, ref.height) == SIZE
                assert len(step.response_token_ids) == len(step.response_logprobs or ())
                in_view = min(step.index + 1, 3)
                shown = [part for message in step.messages for part in message["content"]
                         if isinstance(part, dict) and part["type"] == "image"]  # fmt: skip
                assert len(shown) == in_view
                # Each image is many placeholder tokens: the ids are those of the whole prompt.
                assert len(step.prompt_token_ids) > in_view * 50
        assert len({one.instruction for one in found}) > 3


class Screens:
    """Another picture of the task's size after each step."""

    async def reset(self, task: Task) -> Observation:
        self.size, self.turn = (task.data["width"], task.data["height"]), 0
        return self.seen()

    def seen(self) -> Observation:
        file = io.BytesIO()
        Image.new("RGB", self.size, (self.turn * 40, 90, 20)).save(file, "PNG")
        return Observation(file.getvalue())

    async def step(self, action: Action) -> StepResult:
        self.turn += 1
        return StepResult(self.seen())

    async def evaluate(self) -> float:
        return 1.0

    async def close(self) -> None:
        pass


def test_a_click_on_a_small_screenshot_lands_where_the_model_saw_it(vlm: ManagedVLLM) -> None:
    """The server shows 168 x 224 pixels of 160 x 210, not the 252 x 336 that UI-TARS 1.5 was made for."""
    sampling = {"max_tokens": 60, "structured_outputs": {"regex": r"Action: click\(start_box='\(84,112\)'\)"}}
    limits = Limits(max_steps=2, max_images=3)
    scheduler = StreamingTaskScheduler(vlm, Screens, sampling_params=sampling, limits=limits)
    (found,) = scheduler.run_all([Task("t", "Click the centre.", data={"width": 160, "height": 210})])
    assert found.failure is None
    assert [step.actions for step in found.steps] == [(Click(80, 105),)] * 2


def test_special_tokens_of_answers_are_in_the_next_prompt_and_trajectories_join(
    vlm: ManagedVLLM, tmp_path: Path
) -> None:
    special, word = (vlm.client.tokenize(text)[-1] for text in ("<|vision_pad|>", "click"))
    sampling = {"max_tokens": 8, "min_tokens": 8, "ignore_eos": True, "allowed_token_ids": [special, word]}
    agent = AgentFormat(Chat(prompt="{instruction}"), lambda answer, size: ParsedResponse("", (Click(1, 1),)))
    with RunStore.create(tmp_path / "run") as store:
        scheduler = StreamingTaskScheduler(
            vlm, Screens, sampling_params=sampling, limits=Limits(max_steps=3, max_images=3), agent=agent, store=store
        )
        task = Task("t", "Go on.", data={"width": 112, "height": 112})
        found = next(one for one in scheduler.run_all([task]))
        so_far = 0
        for before, after in itertools.pairwise(found.steps):
            so_far += list(before.response_token_ids).count(special)
            assert list(after.prompt_token_ids).count(special) == so_far
        assert so_far > 0
        assert export(store, "verl", tmp_path / "x", per="trajectory").samples == 1


class Painted:
    """Shows one picture, whose colours are the task's."""

    async def reset(self, task: Task) -> Observation:
        rng = random.Random(task.seed)
        picture = Image.new("RGB", SIZE, tuple(rng.choices(range(256), k=3)))
        pen = ImageDraw.Draw(picture)
        for _ in range(30):
            x, y = rng.randrange(SIZE[0]), rng.randrange(SIZE[1])
            pen.rectangle((x, y, x + rng.randrange(150), y + rng.randrange(90)), tuple(rng.choices(range(256), k=3)))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return Observation(file.getvalue())

    async def step(self, action: Any) -> StepResult:
        return StepResult(Observation(), terminated=True)

    async def evaluate(self) -> float | None:
        return None

    async def close(self) -> None:
        pass


def test_the_answer_depends_on_the_screenshot(vlm: ManagedVLLM) -> None:
    """All else is equal: the same picture gives the same logprobs, another one others."""
    scheduler = StreamingTaskScheduler(
        vlm,
        Painted,
        n=2,
        max_concurrency=1,
        sampling_params={"temperature": 0, "max_tokens": 4},
        limits=Limits(max_steps=1, max_images=1),
        agent=AgentFormat(Chat(prompt="What is there?"), lambda answer, size: ParsedResponse("", (Finished(),))),
    )
    found = scheduler.run_all([Task(str(seed), seed=seed) for seed in range(4)])
    first = [next(iter(one.steps[0].response_logprobs or ())) for one in found]
    for number in range(4):
        assert first[2 * number] == pytest.approx(first[2 * number + 1], abs=1e-3)
    values = sorted(first[::2])
    assert min(later - earlier for earlier, later in itertools.pairwise(values)) > 2e-3, values
