"""Runs for trainers and viewers: the server's own tokens, all of them, and nothing that only looks like a sample."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_samples import IM_END, IMAGE_PAD, sample_failure, sample_trajectory
from PIL import Image as pillow

from managed_vllm.agent.actions import Custom
from managed_vllm.agent.export import ExportReport, TrajectoryID, export, load_skyrl, load_verl, samples_of
from managed_vllm.agent.export.samples import turns_of
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import FailureClass, Step, StopReason, Task, Trajectory
from managed_vllm.errors import ExportError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(tmp_path / "run") as store:
        yield store


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def put(store: RunStore, rollout: int = 0, **more: Any) -> Trajectory:
    trajectory = sample_trajectory(store.images, rollout=rollout, **{"steps": 3, "reward": 0.5, **more})
    store.append(trajectory)
    return trajectory


def put_changed(store: RunStore, number: int, **changes: Any) -> Trajectory:
    """A trajectory in which the step of that number is another one."""
    trajectory = sample_trajectory(store.images, task_id="t-x", steps=3)
    steps = list(trajectory.steps)
    steps[number] = dataclasses.replace(steps[number], **changes)
    changed = dataclasses.replace(trajectory, steps=tuple(steps))
    store.append(changed)
    return changed


def opened(store: RunStore, step: Step) -> list[bytes]:
    """The pixels of the images that were sent in a step."""
    refs = [
        part["image"]
        for message in step.messages
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    return [pillow.open(io.BytesIO(store.images.read(ref))).tobytes() for ref in refs]


# -- verl --------------------------------------------------------------------------------------------------------------


def test_each_step_is_a_sample_with_the_tokens_of_the_server(store: RunStore, out: Path) -> None:
    given = [put(store, rollout, steps=7, max_images=2) for rollout in range(2)]
    report = export(store, "verl", out)
    assert report == ExportReport(str(out), "verl", 2, 14, 14, {})
    steps = [(trajectory, step) for trajectory in given for step in trajectory.steps]
    for sample, (trajectory, step) in zip(load_verl(out), steps, strict=True):
        assert sample["prompt_ids"] == list(step.prompt_token_ids)
        assert sample["response_ids"] == list(step.response_token_ids)
        assert sample["response_mask"] == [1] * len(step.response_token_ids)
        assert step.response_logprobs is not None
        assert sample["response_logprobs"] == list(step.response_logprobs)  # to the bit
        assert sample["reward_score"] == 0.5
        images = sample["multi_modal_data"]["images"]
        assert [image.tobytes() for image in images] == opened(store, step)
        assert len(images) == sample["prompt_ids"].count(IMAGE_PAD) / 20
        assert sample["extra_fields"]["uid"] == "t-1"
        assert sample["extra_fields"]["rollout"] == trajectory.rollout
        assert sample["extra_fields"]["step"] == step.index
        assert sample["extra_fields"]["is_last_step"] is (step.index == 6)
        assert sample["num_turns"] == turns_of(step.messages)
        assert sample["metrics"] == {
            "generate_sequences": step.timings.model_s,
            "tool_calls": step.timings.environment_s,
        }


def test_a_trajectory_is_one_sample_where_each_prompt_goes_on(store: RunStore, out: Path) -> None:
    given = put(store, steps=5)
    assert export(store, "verl", out, per="trajectory").samples == 1
    (sample,) = load_verl(out)
    last = given.steps[-1]
    assert sample["prompt_ids"] == list(given.steps[0].prompt_token_ids)
    assert sample["prompt_ids"] + sample["response_ids"] == [*last.prompt_token_ids, *last.response_token_ids]
    answers = [token for step in given.steps for token in step.response_token_ids]
    scores = [score for step in given.steps for score in step.response_logprobs or ()]
    rows = list(
        zip(sample["response_ids"], sample["response_mask"], sample["response_logprobs"], strict=True),
    )
    assert [token for token, mask, _ in rows if mask] == answers
    assert [score for _, mask, score in rows if mask] == scores
    assert {score for _, mask, score in rows if not mask} == {0.0}
    assert rows[-1][:2] == (IM_END, 1)
    assert [image.tobytes() for image in sample["multi_modal_data"]["images"]] == opened(store, last)
    assert sample["extra_fields"]["is_last_step"] is True


def test_samples_without_a_folder_are_those_of_an_export(store: RunStore, out: Path) -> None:
    given = put(store)
    export(store, "verl", out)
    written = list(load_verl(out))
    made = list(samples_of(given))
    for mine, theirs in zip(made, written, strict=True):
        assert mine.prompt_ids == theirs["prompt_ids"]
        assert mine.response_ids == theirs["response_ids"]
        assert mine.mask == theirs["response_mask"]
        assert mine.logprobs == theirs["response_logprobs"]
    with pytest.raises(ExportError, match="exact=False"):
        list(samples_of(dataclasses.replace(given, exact=False)))


def check_pieces(given: Trajectory, out: Path, spans: list[tuple[int, int]]) -> None:
    """That the samples are these steps, first and last one of each, with all of their tokens and none twice."""
    samples = list(load_verl(out))
    assert [sample["extra_fields"]["step"] for sample in samples] == [last for _, last in spans]
    for sample, (first, last) in zip(samples, spans, strict=True):
        begin, end = given.steps[first], given.steps[last]
        assert sample["prompt_ids"] == list(begin.prompt_token_ids)
        assert sample["prompt_ids"] + sample["response_ids"] == [*end.prompt_token_ids, *end.response_token_ids]
        masked = [token for token, mask in zip(sample["response_ids"], sample["response_mask"], strict=True) if mask]
        assert masked == [token for step in given.steps[first : last + 1] for token in step.response_token_ids]
        assert sample["extra_fields"]["is_last_step"] is (last == len(given.steps) - 1)


def test_steps_are_joined_until_an_image_leaves_the_view(store: RunStore, out: Path) -> None:
    given = put(store, steps=7, max_images=3)
    report = export(store, "verl", out, per="trajectory")
    assert (report.samples, report.cuts) == (5, {"other tokens": 4})
    check_pieces(given, out, [(0, 2), (3, 3), (4, 4), (5, 5), (6, 6)])
    assert json.loads((out / "export.json").read_text())["cuts"] == {"other tokens": 4}


@pytest.mark.parametrize("keep", ["shorter", "first token", "last token"])
def test_the_next_sample_begins_where_one_token_differs(store: RunStore, out: Path, keep: str) -> None:
    first = sample_trajectory(store.images, task_id="t-x", steps=3)
    ids = list(first.steps[2].prompt_token_ids)
    end = len(first.steps[1].prompt_token_ids) + len(first.steps[1].response_token_ids)
    why = "other tokens"
    if keep == "shorter":
        ids, why = ids[: end - 1], "the prompt is shorter"
    else:
        ids[0 if keep == "first token" else end - 1] += 1
    given = put_changed(store, 2, prompt_token_ids=tuple(ids))
    assert export(store, "verl", out, per="trajectory").cuts == {why: 1}
    check_pieces(given, out, [(0, 1), (2, 2)])


def test_the_next_sample_begins_where_another_image_is_behind_the_same_tokens(store: RunStore, out: Path) -> None:
    """Placeholders are the same for all images of one size."""
    given = sample_trajectory(store.images, task_id="t-x", steps=3)
    messages = list(given.steps[2].messages)
    assert isinstance(messages[2]["content"], list)
    messages[2] = {"role": "user", "content": [{"type": "image", "image": given.final_screenshot}]}
    given = put_changed(store, 2, messages=tuple(messages))
    assert export(store, "verl", out, per="trajectory").cuts == {"other images": 1}
    check_pieces(given, out, [(0, 1), (2, 2)])


def test_pieces_of_a_trajectory_are_rows_of_skyrl_and_the_last_one_has_the_reward(store: RunStore, out: Path) -> None:
    put(store, steps=5, max_images=3)
    put(store, rollout=1, steps=2)
    export(store, "skyrl", out, per="trajectory")
    output = load_skyrl(out, image_processor=Processor())
    check_generator_output(output)
    assert output["is_last_step"] == [False, False, True, True]
    assert [sum(rewards) for rewards in output["rewards"]] == [0.0, 0.0, 0.5, 0.5]


def test_text_alone_has_no_images_and_verl_may_ask_for_them(store: RunStore, out: Path) -> None:
    store.append(sample_trajectory(steps=2))
    assert export(store, "verl", out, per="trajectory").images == 0
    (sample,) = load_verl(out)
    assert sample["multi_modal_data"] == {}
    assert not (out / "images").exists()


def test_paths_of_images_are_relative_and_the_export_can_be_moved(store: RunStore, out: Path) -> None:
    put(store)
    export(store, "verl", out)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        for path in line["multi_modal_data"]["images"]:
            assert path.startswith("images/")
            assert (out / path).exists()
    moved = out.rename(out.with_name("moved"))
    assert len(list(load_verl(moved))) == 3
    for sample in load_verl(moved, images=False):
        assert all(Path(path).is_file() for path in sample["multi_modal_data"]["images"])


def test_images_are_linked_where_that_can_be_and_else_copied(
    store: RunStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)
    export(store, "verl", out)
    run = {path.stat().st_ino for path in store.images.folder.rglob("*.png")}
    assert {path.stat().st_ino for path in out.rglob("*.png")} < run  # the last screenshot was never sent

    def across(*paths: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    export(store, "verl", out.with_name("copied"))
    copied = list(out.with_name("copied").rglob("*.png"))
    assert len(copied) == 3
    assert not {path.stat().st_ino for path in copied} & run
    assert len(list(load_verl(out.with_name("copied")))) == 3


@pytest.mark.parametrize(
    ("roles", "turns"),
    [
        (["system", "user"], 2),
        (["system", "user", "user"], 2),
        (["user", "assistant", "user"], 4),
        (["system", "user", "assistant", "assistant", "user", "user"], 4),
    ],
)
def test_turns_are_counted_as_verl_does(roles: list[str], turns: int) -> None:
    assert turns_of([{"role": role, "content": ""} for role in roles]) == turns


# -- SkyRL -------------------------------------------------------------------------------------------------------------


def check_generator_output(output: dict[str, Any]) -> None:
    """What SkyRL's `validate_generator_output(…, step_wise=True)` asks for, in our words."""
    rows = len(output["response_ids"])
    assert rows
    for name, column in output.items():
        if isinstance(column, list) and name != "trajectory_generation_times":
            assert len(column) == rows, name
    for row in range(rows):
        length = len(output["response_ids"][row])
        assert length
        assert len(output["loss_masks"][row]) == len(output["rewards"][row]) == length
        if output["rollout_logprobs"] is not None:
            assert len(output["rollout_logprobs"][row]) == length
        if row + 1 < rows and output["trajectory_ids"][row] != output["trajectory_ids"][row + 1]:
            assert output["is_last_step"][row]
    assert output["is_last_step"][-1]
    seen = [each for each, last in zip(output["trajectory_ids"], output["is_last_step"], strict=True) if last]
    assert len(set(seen)) == len(seen)  # not interleaved
    assert len(output["trajectory_generation_times"]) == len(seen)


class Processor:
    """In the place of a model's image processor."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Any]:
        assert return_tensors == "pt"
        self.asked.append(len(images))
        return {
            "pixel_values": [image.tobytes() for image in images],
            "image_grid_thw": [image.size for image in images],
        }


@pytest.mark.parametrize("per", ["step", "trajectory"])
def test_a_run_is_a_generator_output(store: RunStore, out: Path, per: Any) -> None:
    given = [put(store, rollout, steps=rollout + 1, task_id=task) for task in ("a", "b") for rollout in range(2)]
    report = export(store, "skyrl", out, per=per)
    assert report.samples == (6 if per == "step" else 4)
    processor = Processor()
    output = load_skyrl(out, image_processor=processor)
    check_generator_output(output)
    assert output["trajectory_generation_times"] == [each.duration_s for each in given]
    assert output["trajectory_time_splits"]["llm"] == pytest.approx(
        [sum(step.timings.model_s for step in each.steps) for each in given]
    )
    assert {each.to_string() for each in output["trajectory_ids"]} == {"a_0", "a_1", "b_0", "b_1"}
    assert sum(map(sum, output["rewards"])) == 4 * 0.5
    for rewards, last in zip(output["rewards"], output["is_last_step"], strict=True):
        assert rewards[-1] == (0.5 if last else 0.0)
        assert not any(rewards[:-1])
    assert set(output["stop_reasons"]) == {"stop"}
    assert output["pixel_values"][0] == opened(store, given[0].steps[0])
    assert processor.asked == ([1, 1, 2] * 2 if per == "step" else [1, 2] * 2)
    if per == "step":
        steps = [step for each in given for step in each.steps]
        assert output["prompt_token_ids"] == [list(step.prompt_token_ids) for step in steps]
        assert output["response_ids"] == [list(step.response_token_ids) for step in steps]
        assert output["rollout_logprobs"] == [list(step.response_logprobs or ()) for step in steps]


def test_skyrls_own_ids_and_no_logprobs(store: RunStore, out: Path) -> None:
    store.append(sample_trajectory(steps=2, logprobs=False))
    with pytest.raises(ExportError, match="t-1, rollout 0, step 0: its logprobs are missing"):
        export(store, "skyrl", out)
    export(store, "skyrl", out, logprobs=False)
    output = load_skyrl(out, trajectory_id=lambda instance, repetition: (instance, repetition))
    check_generator_output(output)
    assert output["rollout_logprobs"] is None
    assert output["pixel_values"] is None
    assert output["trajectory_ids"] == [("t-1", 0), ("t-1", 0)]


def test_images_are_not_dropped_in_silence(store: RunStore, out: Path) -> None:
    put(store)
    export(store, "skyrl", out)
    with pytest.raises(ExportError, match="give image_processor="):
        load_skyrl(out)
    assert TrajectoryID("a", 1).to_string() == "a_1"


# -- ATIF --------------------------------------------------------------------------------------------------------------


def documents(out: Path) -> dict[str, dict[str, Any]]:
    """By file name; each is what the models of the format take, and its images are there."""
    atif = pytest.importorskip("atif")
    found = {}
    for path in sorted(out.glob("*.json")):
        if path.name != "export.json":
            found[path.name] = json.loads(path.read_text())
            assert found[path.name]["schema_version"] == "ATIF-v1.7"
            model = atif.Trajectory.model_validate(found[path.name])
            assert model.to_json_dict() == found[path.name]
            for source in sources(found[path.name]):
                with pillow.open(out / source["path"]) as image:
                    assert image.get_format_mimetype() == source["media_type"]
    return found


def sources(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if value.get("type") == "image":
            yield value["source"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from sources(each)


def test_a_trajectory_is_an_atif_document(store: RunStore, out: Path) -> None:
    given = put(store, steps=4, max_images=2)
    assert export(store, "atif", out) == ExportReport(str(out), "atif", 1, 1, 5, {})
    (document,) = documents(out).values()
    system, told, seen, *turns = document["steps"]
    assert (system["source"], told["source"], seen["source"]) == ("system", "user", "user")
    assert told["message"] == given.instruction
    assert len(turns) == 4
    for number, (turn, step) in enumerate(zip(turns, given.steps, strict=True)):
        assert (turn["source"], turn["message"], turn["reasoning_content"]) == ("agent", step.response, step.thought)
        assert turn["metrics"]["completion_token_ids"] == list(step.response_token_ids)
        assert turn["metrics"]["prompt_token_ids"] == list(step.prompt_token_ids)
        assert turn["metrics"]["logprobs"] == list(step.response_logprobs or ())
        (call,) = turn["tool_calls"]
        (result,) = turn["observation"]["results"]
        assert result["source_call_id"] == call["tool_call_id"]
        shown = given.steps[number + 1].screenshot if number < 3 else given.final_screenshot
        assert shown is not None
        (part,) = result["content"]
        assert (out / part["source"]["path"]).read_bytes() == store.images.read(shown)
        assert turn["timestamp"].endswith("Z")
    assert turns[0]["tool_calls"][0]["function_name"] == "click"
    assert turns[3]["tool_calls"][0] == {
        "tool_call_id": "call_3_0",
        "function_name": "finished",
        "arguments": {"content": "done"},
    }
    assert document["final_metrics"]["extra"]["reward"] == 0.5
    assert document["final_metrics"]["total_completion_tokens"] == given.response_tokens
    assert document["extra"]["stop_reason"] == "finished"


def test_odd_trajectories_are_valid_atif_too(store: RunStore, out: Path) -> None:
    store.append(Trajectory(Task("nothing"), 0, stop_reason=StopReason.MAX_STEPS, reward=0.0))
    store.append(Trajectory(Task("a/b c"), 0, stop_reason=StopReason.MAX_STEPS, reward=0.0, instruction="go"))
    store.append(Trajectory(Task("a b/c"), 0, stop_reason=StopReason.MAX_STEPS, reward=0.0, instruction="go"))
    store.append(Trajectory(Task("../" * 100), 0, stop_reason=StopReason.MAX_STEPS, reward=0.0))
    step = Step(
        0,
        text="a screen",
        messages=(
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "example"}]},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": [{"type": "other", "x": math.inf}]},
        ),
        response="half \ud800",
        actions=(Custom("press", {"keys": ("a", "b"), "at": math.nan}),),
        info={"x": math.nan, "y": (1, 2)},
        parse_error="no",
    )
    store.append(Trajectory(Task("odd"), 0, steps=(step, Step(1, text="then")), stop_reason="max_steps", reward=1.0))  # type: ignore[arg-type]
    assert export(store, "atif", out).trajectories == 5
    found = documents(out)
    assert len(found) == 5
    odd = found["odd-0.json"]["steps"]
    assert [step["source"] for step in odd] == ["system", "user", "agent", "user", "agent", "agent"]
    assert odd[4]["tool_calls"][0]["function_name"] == "press"
    assert odd[4]["tool_calls"][0]["arguments"] == {"keys": ["a", "b"], "at": "nan"}
    assert odd[4]["observation"]["results"] == [{"content": "then"}]
    assert odd[4]["extra"]["info"] == {"x": "nan", "y": [1, 2]}


def test_failed_attempts_are_exported_for_viewers_only_if_asked_for(store: RunStore, out: Path) -> None:
    put(store, 0)
    put(store, 1, failure=sample_failure())
    put(store, 2, stop_reason=StopReason.CANCELLED)
    report = export(store, "atif", out, include="all")
    assert (report.trajectories, report.left_out) == (3, {})
    found = documents(out)
    assert "EnvironmentTimeoutError" in found["t-1-1.json"]["extra"]["failure"]
    assert "reward" not in found["t-1-1.json"]["final_metrics"]["extra"]
    assert "failure" not in found["t-1-0.json"]["extra"]


def test_logprobs_of_an_atif_document_are_there_as_asked_for(store: RunStore, out: Path) -> None:
    store.append(sample_trajectory(steps=1, logprobs=False))
    store.append(sample_trajectory(steps=1, rollout=1))
    export(store, "atif", out)
    assert ["logprobs" in each["steps"][-1]["metrics"] for each in documents(out).values()] == [False, True]
    export(store, "atif", out.with_name("without"), logprobs=False)
    assert not any("logprobs" in each["steps"][-1]["metrics"] for each in documents(out.with_name("without")).values())
    with pytest.raises(ExportError, match="logprobs are missing"):
        export(store, "atif", out.with_name("with"), logprobs=True)


def test_a_type_of_image_that_atif_has_not_is_refused(store: RunStore, out: Path) -> None:
    file = io.BytesIO()
    pillow.new("RGB", (4, 4)).save(file, "BMP")
    ref = store.images.put(file.getvalue())
    store.append(Trajectory(Task("t"), 0, final_screenshot=ref, stop_reason=StopReason.FINISHED, reward=1.0))
    store.append(dataclasses.replace(next(iter(store)), steps=(Step(0, screenshot=ref),), rollout=1))
    with pytest.raises(ExportError, match="ATIF has no image/bmp"):
        export(store, "atif", out)


# -- what is left out, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["verl", "skyrl"])
def test_only_what_counts_and_has_a_reward_becomes_a_sample_and_the_rest_is_counted(
    store: RunStore, out: Path, to: Any
) -> None:
    put(store, 0)
    put(store, 1, failure=sample_failure(FailureClass.ENVIRONMENT))
    put(store, 2, failure=sample_failure(FailureClass.MODEL_SERVER))
    put(store, 3, failure=sample_failure(FailureClass.ENVIRONMENT))
    put(store, 3, attempt=1)  # the retry counts
    put(store, 4, stop_reason=StopReason.CANCELLED)
    put(store, 5, reward=None)
    put(store, 6, steps=0)
    put(store, 7)
    put(store, 8, reward=0.0)
    report = export(store, to, out, choose=lambda entry: entry.rollout != 7)
    assert (report.trajectories, report.samples) == (3, 9)
    assert report.left_out == {
        "failed: environment": 1,
        "failed: model_server": 1,
        "cancelled": 1,
        "without a reward": 1,
        "without a step": 1,
        "not chosen": 1,
    }
    about = json.loads((out / "export.json").read_text())
    assert about["left_out"] == report.left_out
    assert about["run"] == str(store.path)


def test_a_trainer_may_make_the_reward_itself(store: RunStore, out: Path) -> None:
    put(store, reward=None)
    assert export(store, "verl", out, include="ok").samples == 3
    assert [sample["reward_score"] for sample in load_verl(out)] == [None] * 3


def test_a_damaged_attempt_is_left_out_and_counted(store: RunStore, out: Path) -> None:
    put(store, 0)
    put(store, 1)
    start, size, _ = store.entries()[0].block
    with (store.path / "arrays.bin").open("r+b") as file:
        file.seek(start + size // 2)
        file.write(b"\0\1\2\3")
    report = export(store, "verl", out)
    assert (report.trajectories, report.left_out) == (1, {"damaged": 1})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompt_token_ids": ()}, "the token ids of its prompt are missing"),
        ({"response_token_ids": (), "response_logprobs": ()}, "the token ids of its answer are missing"),
        ({"response_logprobs": None}, "its logprobs are missing"),
        ({"response_logprobs": (0.0,)}, r"it has 1 logprobs for \d+ tokens"),
        ({"response_token_ids": (1, 2), "response_logprobs": (0.0, math.nan)}, "not all of its logprobs are finite"),
    ],
)
@pytest.mark.parametrize("to", ["verl", "skyrl"])
def test_missing_or_wrong_numbers_are_an_error_and_not_made_up_for(
    store: RunStore, out: Path, to: Any, changes: dict[str, Any], why: str
) -> None:
    put_changed(store, 1, **changes)
    with pytest.raises(ExportError, match=f"t-x, rollout 0, step 1: {why}"):
        export(store, to, out)
    assert not out.exists()


def test_a_reward_that_is_no_number_is_an_error(store: RunStore, out: Path) -> None:
    put(store, reward=math.nan)
    for to in ("verl", "skyrl", "atif", "osworld"):
        with pytest.raises(ExportError, match="its reward is nan"):
            export(store, to, out)


def test_a_missing_image_is_an_error_with_its_path(store: RunStore, out: Path) -> None:
    given = put(store)
    assert given.steps[1].screenshot is not None
    path = store.images.path(given.steps[1].screenshot)
    path.unlink()
    with pytest.raises(ExportError, match=f"{path} is missing"):
        export(store, "verl", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"to": "csv"}, "to='csv' is not known; it may be verl, skyrl, atif"),
        ({"to": "verl", "per": "token"}, "per='token' is not known"),
        ({"to": "verl", "include": "some"}, "include='some' is not known"),
        ({"to": "verl", "include": "all"}, "only ATIF, dart and osworld take them"),
        ({"to": "skyrl", "include": "ok"}, "wants a reward"),
        ({"to": "atif", "per": "trajectory"}, "means nothing there"),
    ],
)
def test_what_can_not_be_asked_for_is_said(store: RunStore, out: Path, wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ExportError, match=why):
        export(store, out=out, **wrong)


def test_a_folder_in_use_is_not_written_to_and_an_empty_one_is(store: RunStore, out: Path) -> None:
    put(store)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="is there already"):
        export(store, "verl", out)
    (out / "notes.txt").unlink()
    export(store, "verl", out)
    (out.with_name("file")).write_text("mine")
    for place in (out.with_name("file"), out.with_name("file") / "below"):
        with pytest.raises(ExportError):
            export(store, "verl", place)


def test_what_is_no_export_of_that_kind_is_said(store: RunStore, out: Path) -> None:
    with pytest.raises(ExportError, match="is no export for verl"):
        next(load_verl(out))
    put(store)
    export(store, "verl", out)
    with pytest.raises(ExportError, match="is an export for verl, not for skyrl"):
        load_skyrl(out)
    for path in out.rglob("*.png"):
        path.unlink()
    with pytest.raises(ExportError, match="can't be opened"):
        next(load_verl(out))


def test_an_export_while_the_run_is_written_has_what_was_there(store: RunStore, out: Path) -> None:
    put(store, 0)
    with RunStore.open(store.path) as reader:
        put(store, 1)
        assert export(reader, "verl", out).trajectories == 1
        reader.refresh()
        assert export(reader, "verl", out.with_name("again")).trajectories == 2


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys, managed_vllm.agent.store, managed_vllm.agent.export\n"
        "print(sorted({'numpy', 'PIL', 'torch', 'pydantic', 'atif', 'vllm', 'openai'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
