"""The names of the service scripts: called as there, leaving on disk what they leave, without their defects."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acting_server import MODEL, ActingServer, acting, text_of
from PIL import Image

from managed_vllm import SamplingParams, VLLMClientWrapper
from managed_vllm.agent import RunStore, run_agent_loop
from managed_vllm.agent.export import export
from managed_vllm.agent.service_scripts import (
    StreamingTaskSchedulerWithService,
    run_agent_loop_with_service,
    run_streaming_task_sampling_sync_with_service,
    run_streaming_task_sampling_with_service,
)
from managed_vllm.errors import ConfigError

PARAMS = SamplingParams(n=1, temperature=1.0, top_p=1, max_tokens=256, logprobs=1)


def screen(left: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1920, 1080), (left * 20, 40, 40)).save(file, kind)
    return file.getvalue()


def answer(messages: list[dict[str, Any]]) -> str:
    """Three clicks, then finished."""
    said = sum(message["role"] == "assistant" for message in messages)
    return "Thought: t\nAction: click(start_box='(100,100)')" if said < 3 else "Thought: d\nAction: finished()"


class TrajectoryRunner:
    """As dart-gui's; made with the task's configuration."""

    made: list[TrajectoryRunner] = []  # noqa: RUF012 - reset by the fixture

    def __init__(self, task_config: dict[str, Any]) -> None:
        self.config = task_config
        self.executed: list[str] = []
        self.closed = False
        TrajectoryRunner.made.append(self)

    def get_task_config(self) -> dict[str, Any]:
        return self.config

    def get_obs(self) -> dict[str, Any]:
        return {"screenshot": screen(len(self.executed), self.config.get("kind", "PNG"))}

    def execute_action(self, code: str) -> None:
        if self.config.get("fault"):
            raise RuntimeError("the machine is gone")
        self.executed.append(code)

    def evaluate(self) -> float:
        return 1.0

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    TrajectoryRunner.made.clear()


@pytest.fixture(scope="module")
def server() -> Iterator[ActingServer]:
    with acting(answer) as made:
        yield made


@pytest.fixture
def llm(server: ActingServer) -> Iterator[VLLMClientWrapper]:
    with VLLMClientWrapper(server.url, "empty", MODEL) as made:
        yield made


def begun(instruction: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": f"Task: {instruction}"}]},
    ]


def dataset(count: int, **config: Any) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"t-{number}",
            "task_config": {"id": f"t-{number}", "instruction": f"Do {number}.", **config},
            "messages": begun(f"Do {number}."),
        }
        for number in range(count)
    ]


def sampled(llm: Any, save_dir: Path, items: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """As the test script of dart-gui calls it."""
    return run_streaming_task_sampling_sync_with_service(
        dataset=items,
        total_envs=4,
        rollout_n=2,
        llm=llm,
        sampling_params=PARAMS,
        processor=object(),
        max_steps=15,
        limit_images=5,
        save_dir=str(save_dir),
        **{"parallel": 0, "computer": 1, "runner": TrajectoryRunner, **more},
    )


# -- the client --------------------------------------------------------------------------------------------------------


def test_the_wrapper_has_the_names_of_the_openai_sdk_and_its_own(llm: VLLMClientWrapper, server: ActingServer) -> None:
    assert hasattr(llm, "chat")
    assert hasattr(llm.chat, "completions")
    assert [model.id for model in llm.models.list().data] == [MODEL]
    messages: Any = [{"role": "user", "content": "Go."}]
    said = llm.chat.completions.create(model=MODEL, messages=messages, max_tokens=50, extra_body={"top_k": 50})
    assert said.choices[0].message.content == answer([])
    assert server.requests[-1]["top_k"] == 50
    assert llm.chat(messages, PARAMS)[0].outputs[0].text == answer([])
    assert "conversation" in (llm.chat.__doc__ or "")


# -- the scheduler -----------------------------------------------------------------------------------------------------


def test_a_dataset_is_sampled_and_what_it_leaves_is_what_the_old_loop_left(
    llm: VLLMClientWrapper, server: ActingServer, tmp_path: Path
) -> None:
    results = sampled(llm, tmp_path / "out", dataset(3))
    assert sorted(result["task_id"] for result in results) == ["t-0", "t-1", "t-2"]
    for result in results:
        assert result["status"] == "completed"
        assert result["execution_time"] > 0
        assert result["data_dir"] == str(tmp_path / "out" / result["task_id"])
        assert result["folder_ids"] == [f"runner_{number}_{result['task_id']}" for number in range(2)]
        for name in result["folder_ids"]:
            check_folder(Path(result["data_dir"]) / name, result["task_id"])
    assert len(TrajectoryRunner.made) == 6
    assert all(len(runner.executed) == 3 and runner.closed for runner in TrajectoryRunner.made)
    assert all(text_of(body["messages"][0]) == "You are a helpful assistant." for body in server.requests[-4:])


def check_folder(folder: Path, task_id: str) -> None:
    assert json.loads((folder / "task_config.json").read_text())["id"] == task_id
    assert float((folder / "reward.txt").read_text()) == 1.0
    messages = json.loads((folder / "final_messages.json").read_text())
    assert [message["role"] for message in messages] == ["system", "user", *["assistant", "user"] * 3, "assistant"]
    assert messages[1]["content"][0]["type"] == "text"
    names = [part["image"] for message in messages for part in message["content"] if isinstance(part, dict)
             and part["type"] == "image"]  # fmt: skip
    assert names == [f"image_{number:04}" for number in range(1, 5)]
    for number, name in enumerate(names):
        with Image.open(folder / f"{name}.png") as image:
            assert (image.format, image.size) == ("PNG", (1920, 1080))
            assert image.convert("RGB").getpixel((0, 0)) == pytest.approx((number * 20, 40, 40), abs=3)
    times = json.loads((folder / "timestamp_info.json").read_text())
    assert [step["action"] for step in times["steps"]] == ["generate_response", "execute_action"] * 4


def test_screenshots_of_another_format_become_png_files(llm: VLLMClientWrapper, tmp_path: Path) -> None:
    (result,) = sampled(llm, tmp_path / "out", dataset(1, kind="JPEG"))
    check_folder(Path(result["data_dir"]) / "runner_0_t-0", "t-0")


def test_what_is_finished_is_not_played_again_and_what_failed_is(llm: VLLMClientWrapper, tmp_path: Path) -> None:
    items = dataset(2)
    broken = dataset(3, fault="yes")[2]
    first = sampled(llm, tmp_path / "out", [*items, broken])
    assert {result["task_id"]: result["status"] for result in first} == {
        "t-0": "completed",
        "t-1": "completed",
        "t-2": "failed",
    }
    (failed,) = [result for result in first if result["status"] == "failed"]
    assert "the machine is gone" in failed["error"]
    folder = tmp_path / "out/t-2/runner_0_t-2"
    assert not (folder / "reward.txt").exists(), "a failure is no reward"
    assert not (folder / "final_messages.json").exists()
    assert "the machine is gone" in json.loads((folder / "error_info.json").read_text())["error"]
    TrajectoryRunner.made.clear()
    assert [result["task_id"] for result in sampled(llm, tmp_path / "out", [*items, broken])] == ["t-2"]
    assert {runner.config["id"] for runner in TrajectoryRunner.made} == {"t-2"}


def test_of_several_computers_each_plays_its_part(llm: VLLMClientWrapper, tmp_path: Path) -> None:
    parts = [sampled(llm, tmp_path / str(part), dataset(5), parallel=part, computer=2) for part in range(2)]
    assert [sorted(result["task_id"] for result in part) for part in parts] == [["t-0", "t-2", "t-4"], ["t-1", "t-3"]]


def test_the_client_may_be_the_openai_sdks(server: ActingServer, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    (result,) = sampled(openai.OpenAI(base_url=server.url, api_key="empty"), tmp_path / "out", dataset(1))
    assert result["status"] == "completed"
    with pytest.raises(ConfigError, match="serves acting, and not other"):
        sampled(openai.OpenAI(base_url=server.url, api_key="empty"), tmp_path / "o", dataset(1), model_name="other")
    with pytest.raises(ConfigError, match="a client of ours or the OpenAI SDK's, not str"):
        sampled("http://127.0.0.1:1", tmp_path / "o", dataset(1))


def test_a_runner_may_be_a_rays_actor_class_or_a_path(llm: VLLMClientWrapper, tmp_path: Path) -> None:
    class Actor:
        """The shape of `@ray.remote` on a class, without references: its methods return at once."""

        remote = staticmethod(TrajectoryRunner)

    (result,) = sampled(llm, tmp_path / "a", dataset(1), runner=Actor)
    assert result["status"] == "completed"
    (result,) = sampled(llm, tmp_path / "b", dataset(1), runner="no_such_module_here:Runner")
    assert result["status"] == "failed"
    assert "no_such_module_here" in result["error"]


def test_tasks_are_added_one_by_one_and_runners_are_never_more_than_total_envs(
    llm: VLLMClientWrapper, tmp_path: Path
) -> None:
    together = threading.Barrier(4)

    class Meeting(TrajectoryRunner):
        def execute_action(self, code: str) -> None:
            together.wait(60)
            super().execute_action(code)

    async def main() -> StreamingTaskSchedulerWithService:
        scheduler = StreamingTaskSchedulerWithService(
            total_envs=4, rollout_n=2, llm=llm, sampling_params=PARAMS, save_dir=tmp_path / "out", runner=Meeting
        )
        assert scheduler.get_available_slots() == scheduler.max_concurrent_tasks == 2
        await scheduler.start()
        for item in dataset(4):
            await scheduler.add_task(item["task_id"], item["task_config"], item["messages"])
        await scheduler.stop()
        scheduler.close_all_envs()
        return scheduler

    scheduler = asyncio.run(main())
    assert len(scheduler.completed_tasks) == 4
    assert not scheduler.failed_tasks
    stats = scheduler.get_stats()
    assert (stats["total_tasks"], stats["completed_tasks"], stats["failed_tasks"]) == (4, 4, 0)
    assert stats["total_time"] > 0


def test_what_ends_the_run_comes_out(server: ActingServer, tmp_path: Path) -> None:
    with VLLMClientWrapper(server.url, "empty", MODEL) as llm:
        items = dataset(2)
        items[1]["task_id"] = "t-0"
        with pytest.raises(ConfigError, match="two tasks have the id 't-0'"):
            asyncio.run(
                run_streaming_task_sampling_with_service(
                    items, 2, 1, llm, PARAMS, save_dir=tmp_path / "out", runner=TrajectoryRunner
                )
            )
    with pytest.raises(TypeError, match="total_env"):
        run_streaming_task_sampling_sync_with_service(dataset=[], total_env=3)


# -- the loop, and the export ------------------------------------------------------------------------------------------


def test_the_loop_leaves_the_same_folders_and_returns_their_names(llm: VLLMClientWrapper, tmp_path: Path) -> None:
    runners = [TrajectoryRunner({"id": "a"}), TrajectoryRunner({"id": "b", "fault": "yes"})]
    messages = [begun("x"), begun("y")]
    names = run_agent_loop_with_service(
        llm, runners, messages, PARAMS, None, 15, 1000, 5, str(tmp_path / "out"), "ui_tars_1.5"
    )
    assert names == ["runner_0_a", None]
    check_folder(tmp_path / "out/runner_0_a", "a")
    assert not (tmp_path / "out/runner_1_b/reward.txt").exists()
    again = run_agent_loop(llm, runners, messages, PARAMS, max_steps=15, data_dir=str(tmp_path / "out"))
    assert again[0].reward == 1.0
    assert len(runners[0].executed) == 3, "not played again"


def test_a_run_is_exported_as_such_folders(llm: VLLMClientWrapper, tmp_path: Path) -> None:
    sampled(llm, tmp_path / "out", [*dataset(1), dataset(2, fault="yes")[1]])
    with RunStore.open(tmp_path / "out/.run") as store:
        report = export(store, "dart", tmp_path / "export")
        assert (report.trajectories, report.images) == (2, 4)
        assert report.left_out == {"failed: environment": 2}
        for number in range(2):
            check_folder(tmp_path / f"export/t-0/runner_{number}_t-0", "t-0")
        assert export(store, "dart", tmp_path / "all", include="all").trajectories == 4
        assert (tmp_path / "all/t-1/runner_0_t-1/error_info.json").exists()
