"""`run_agent_loop`, as the service scripts call it. (What those scripts did wrong is in test_agent_defects.py.)"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acting_server import MODEL, ActingServer, acting, text_of
from counting_world import CountingWorld, picture, right
from moved_clock import Clock
from processes import HANG_S

from managed_vllm import SamplingParams, VLLMClient, VLLMClientWrapper
from managed_vllm.agent import Limits, RunStore, StopReason, Task, run_agent_loop
from managed_vllm.errors import ConfigError

PARAMS = {"max_tokens": 200}


class Runner:
    def __init__(self, presses: int, name: str = "a") -> None:
        self.left = presses
        self.name = name
        self.executed: list[str] = []

    def get_task_config(self) -> dict[str, Any]:
        return {"id": self.name, "instruction": f"press {self.name}"}

    def get_obs(self) -> dict[str, Any]:
        return {"screenshot": picture(self.left), "accessibility_tree": f"{self.left} left"}

    def execute_action(self, code: str) -> None:
        self.executed.append(code)
        self.left -= 1

    def evaluate(self) -> float:
        return float(self.left == 0)


@pytest.fixture(scope="module")
def server() -> Iterator[ActingServer]:
    with acting(right) as made:
        yield made


@pytest.fixture
def client(server: ActingServer) -> Iterator[VLLMClient]:
    with VLLMClientWrapper(server.url, None, MODEL) as made:
        yield made


def begun(*words: str) -> list[Any]:
    return [[{"role": "user", "content": word}] for word in words]


def test_it_is_called_as_the_old_code_calls_it(client: VLLMClient, tmp_path: Path) -> None:
    """By position: llm, runners, messages, sampling_params, processor, max_steps, factor, limit_images, data_dir."""
    runners = [Runner(2, "a"), Runner(1, "b")]
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=50, max_tokens=200)
    processor = object()
    with pytest.raises(ConfigError, match="conversations"):
        run_agent_loop(client, runners, begun("x"), params, processor)
    found = run_agent_loop(
        client, runners, begun("x", "y"), params, processor, 5, 1000, 3, str(tmp_path / "data"), MODEL,
        coordinates="absolute", show_text=True,
    )  # fmt: skip
    assert [one.reward for one in found] == [1.0, 1.0]
    assert [one.task.id for one in found] == ["runner-0-a", "runner-1-b"]
    assert found[0].task.instruction == "press a"
    names = list(inspect.signature(run_agent_loop).parameters)[:10]
    assert names == ["llm", "runners", "messages", "sampling_params", "processor", "max_steps",
                     "action_parse_res_factor", "limit_images", "data_dir", "model_name"]  # fmt: skip


def test_processes_that_join_have_one_run_and_play_a_task_of_both_once(client: VLLMClient, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data_dir": str(tmp_path / "d"), "coordinates": "absolute", "show_text": True}
    runners = {"one": [Runner(1, "a"), Runner(2, "both")], "other": [Runner(1, "b"), Runner(2, "both")]}
    found: dict[str, Any] = {}

    def play(who: str) -> None:
        found[who] = run_agent_loop(client, runners[who], begun("x", "y"), PARAMS, None, 5, join=True, **options)

    threads = [threading.Thread(target=play, args=(who,)) for who in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert [one.task.id for one in found["one"]] == ["runner-0-a", "runner-1-both"]
    assert found["one"][1] == found["other"][1]
    assert [one.reward for each in found.values() for one in each] == [1.0] * 4
    assert sorted(len(each[1].executed) for each in runners.values()) == [0, 2], "on one of the runners"
    with RunStore.open(tmp_path / "d") as store:
        assert len(store) == len(store.finished()) == 3
    folders = sorted(path.parent.name for path in (tmp_path / "d").glob("*/reward.txt"))
    assert folders == ["runner_0_a", "runner_0_b", "runner_1_both"]


def test_to_join_needs_a_folder(client: VLLMClient) -> None:
    with pytest.raises(ConfigError, match="data_dir"):
        run_agent_loop(client, [Runner(1)], begun("x"), PARAMS, join=True)


def test_runners_of_a_folder_that_are_finished_are_not_played_again(client: VLLMClient, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data_dir": str(tmp_path / "d"), "coordinates": "absolute", "show_text": True}
    runners = [Runner(1, "a"), Runner(99, "b")]
    run_agent_loop(client, runners, begun("x", "y"), PARAMS, max_steps=3, **options)
    again = [Runner(5, "a"), Runner(5, "c")]
    found = run_agent_loop(client, again, begun("x", "y"), PARAMS, max_steps=3, **options)
    assert again[0].executed == []
    assert len(again[1].executed) == 3
    assert [one.task.id for one in found] == ["runner-0-a", "runner-1-c"]
    with RunStore.open(tmp_path / "d") as store:
        assert {entry.task_id for entry in store.entries()} == {"runner-0-a", "runner-1-b", "runner-1-c"}


def test_environments_may_stand_in_the_place_of_runners(client: VLLMClient) -> None:
    worlds = [CountingWorld(), CountingWorld()]
    found = run_agent_loop(client, worlds, begun("x", "y"), PARAMS, max_steps=5, coordinates="absolute", show_text=True)
    assert [one.reward for one in found] == [1.0, 1.0]
    assert not any(world.closed for world in worlds), "they are the caller's"


def test_methods_of_ray_actors_are_called_by_remote(client: VLLMClient, monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        """The shape of an actor's method: a reference comes back, which `ray.get` turns into the value."""

        def __init__(self, method: Any) -> None:
            self.remote = lambda *arguments: ("reference", method(*arguments))

    class Actor:
        def __init__(self, runner: Runner) -> None:
            for name in ("get_obs", "execute_action", "evaluate", "get_task_config"):
                setattr(self, name, Remote(getattr(runner, name)))

    class Ray:
        @staticmethod
        def get(reference: Any) -> Any:
            assert reference[0] == "reference"
            return reference[1]

    monkeypatch.setitem(__import__("sys").modules, "ray", Ray)
    runner = Runner(2)
    found = run_agent_loop(client, [Actor(runner)], begun("x"), PARAMS, max_steps=5, coordinates="absolute",
                           show_text=True)  # fmt: skip
    assert found[0].reward == 1.0
    assert len(runner.executed) == 2


def test_runners_block_each_other_in_no_way(client: VLLMClient) -> None:
    """All of them are in their step at the same time, or none would come out of it."""
    together = threading.Barrier(40)

    class Slow(Runner):
        def execute_action(self, code: str) -> None:
            together.wait(HANG_S)
            super().execute_action(code)

    runners = [Slow(1, str(number)) for number in range(40)]
    found = run_agent_loop(
        client, runners, begun(*"x" * 40), PARAMS, max_steps=3, coordinates="absolute", show_text=True
    )
    assert [one.reward for one in found] == [1.0] * 40


def test_a_runner_that_hangs_fails_alone(client: VLLMClient, clock: Clock) -> None:
    hangs, released = threading.Event(), threading.Event()

    class Hanging(Runner):
        def execute_action(self, code: str) -> None:
            hangs.set()
            released.wait()  # until the loop has come to its end

    class Last(Runner):
        def evaluate(self) -> float:
            assert hangs.wait(HANG_S)
            clock.forward(1000)  # beyond the other one's limit; this call has a longer one
            return super().evaluate()

    limits = Limits(max_steps=3, step_timeout_s=500, evaluate_timeout_s=5000)
    try:
        found = run_agent_loop(client, [Hanging(1), Last(1, "b")], begun("x", "y"), PARAMS, coordinates="absolute",
                               show_text=True, limits=limits)  # fmt: skip
    finally:
        released.set()
    assert found[0].stop_reason is StopReason.ENV_FAILURE
    assert found[0].reward is None
    assert found[1].reward == 1.0


def test_the_begun_conversation_comes_first_and_its_images_count(client: VLLMClient, server: ActingServer) -> None:
    from PIL import Image

    server.requests.clear()
    example = {"type": "image", "image": Image.new("RGB", (40, 40), "red")}
    shown: dict[str, Any] = {"role": "user", "content": [example, {"type": "text", "text": "As here."}]}
    messages = [[{"role": "system", "content": "Be."}, shown]]
    found = run_agent_loop(client, [Runner(2)], messages, PARAMS, max_steps=5, limit_images=2, coordinates="absolute",
                           show_text=True)  # fmt: skip
    assert found[0].reward == 1.0
    bodies = [body["messages"] for body in server.requests if text_of(body["messages"][-1])]
    images = [sum(part.get("type") == "image_url" for message in body if isinstance(message["content"], list)
                  for part in message["content"]) for body in bodies]  # fmt: skip
    assert images == [2, 2, 2]
    assert all(text_of(body[0]) == "Be." and text_of(body[1]) == "As here." for body in bodies)


def test_a_runner_is_told_fail_when_the_model_calls_the_user() -> None:
    """OSWorld's evaluators look at it: what can't be done is done by saying so."""
    runner = Runner(2)
    with (
        acting(lambda _: "Thought: impossible\nAction: call_user()") as server,
        VLLMClient(server.url, "", MODEL) as llm,
    ):
        found = run_agent_loop(llm, [runner], begun("x"), PARAMS, max_steps=5)
    assert runner.executed == ["FAIL"]
    assert found[0].stop_reason is StopReason.CALL_USER
    assert found[0].failure is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"action_parse_res_factor": 999}, "no meaning"),
        ({"runners": [object()]}, "is no runner"),
    ],
)
def test_wrong_arguments_are_refused(client: VLLMClient, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_agent_loop(**{"llm": client, "runners": [Runner(1)], "messages": begun("x"), **given})


def test_another_name_of_the_model_is_asked_for(server: ActingServer) -> None:
    server.requests.clear()
    with VLLMClient(server.url, None, "base") as client:
        run_agent_loop(client, [Runner(0)], begun("x"), PARAMS, model_name="adapter", coordinates="absolute",
                       show_text=True)  # fmt: skip
    assert server.requests[-1]["model"] == "adapter"


def test_a_runner_without_a_task_has_a_number(client: VLLMClient) -> None:
    class Nameless:
        def __init__(self) -> None:
            runner = Runner(0)
            self.get_obs, self.execute_action, self.evaluate = runner.get_obs, runner.execute_action, runner.evaluate

    found = run_agent_loop(client, [Nameless()], begun("x"), PARAMS, coordinates="absolute", show_text=True)
    assert found[0].task == Task("runner-0")
