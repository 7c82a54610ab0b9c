"""The record of a run: exact, whole or not at all, one writer, and resumed after whatever happened to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import pytest
from agent_samples import sample_failure, sample_trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from hypothesis_profiles import examples
from processes import HANG_S, eventually

from managed_vllm.agent import attempt_logs, trajectory_codec
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
)
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import (
    Failure,
    FailureClass,
    ImageRef,
    Step,
    StepTimings,
    StopReason,
    Task,
    Trajectory,
)
from managed_vllm.errors import ConfigError, RunStoreError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def attempt(rollout: int = 0, **more: Any) -> Trajectory:
    return sample_trajectory(**{"rollout": rollout, "steps": 2, **more})


# -- exactly as it was -------------------------------------------------------------------------------------------------


def round_trip(trajectory: Trajectory) -> Trajectory:
    record = trajectory_codec.encode(trajectory)
    assert b"\n" not in record.text
    return trajectory_codec.decode(record.text, record.numbers)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("with_images", [True, False])
def test_a_trajectory_comes_back_exactly(path: Path, steps: int, with_images: bool) -> None:
    with RunStore.create(path) as store:
        given = sample_trajectory(store.images if with_images else None, steps=steps)
        store.append(given)
        assert list(store.attempts()) == [given]
    with RunStore.open(path) as store:
        assert list(store.attempts()) == list(store.trajectories()) == list(store) == [given]
        (back,) = store
        assert repr(back) == repr(given)  # also types: tuples are tuples, floats floats
        assert [step.messages for step in back.steps] == [step.messages for step in given.steps]
        for step in back.steps:
            assert step.screenshot is None or store.images.read(step.screenshot).startswith(b"\x89PNG")


texts = some.text(some.characters(), max_size=8)  # half characters, zeros, line separators
floats = some.floats(allow_nan=False)
refs = some.builds(ImageRef, some.text("0123456789abcdef", min_size=64, max_size=64), texts, *[some.integers()] * 2)
values = some.recursive(
    some.one_of(some.none(), some.booleans(), some.integers(), floats, texts, refs),
    lambda inner: some.one_of(
        some.lists(inner, max_size=3),
        some.lists(inner, max_size=3).map(tuple),
        some.dictionaries(some.one_of(texts, some.sampled_from(["$tuple", "$x", "image"])), inner, max_size=3),
    ),
    max_leaves=8,
)
mappings = some.dictionaries(texts, values, max_size=3)
finite = some.floats(allow_nan=False, allow_infinity=False)
actions = some.one_of(
    some.builds(Click, finite, finite, some.sampled_from(Button), some.integers(1, 3)),
    some.builds(Drag, *[finite] * 4),
    some.builds(Type, texts, some.booleans()),
    some.builds(Hotkey, some.lists(texts, max_size=3).map(tuple)),
    some.builds(Scroll, some.sampled_from(Direction), some.none() | finite, some.none() | finite, some.none()),
    some.builds(Wait, some.none() | finite),
    some.builds(Finished, texts),
    some.builds(CallUser, texts),
    some.builds(Custom, texts, mappings),
)


def sequences(of: Any) -> Any:
    return some.lists(of, max_size=4) | some.lists(of, max_size=4).map(tuple)


ids = sequences(some.integers(-(2**31), 2**31 - 1))
steps = some.builds(
    Step,
    index=some.integers(0, 99),
    screenshot=some.none() | refs,
    text=some.none() | texts,
    messages=sequences(mappings),
    prompt_token_ids=ids,
    response=texts,
    response_token_ids=ids,
    response_logprobs=some.none() | sequences(floats),
    finish_reason=some.none() | texts,
    thought=texts,
    actions=sequences(actions),
    executed=some.integers(0, 3),
    parse_error=some.none() | texts,
    reward=some.none() | floats,
    terminated=some.booleans(),
    info=mappings,
    timings=some.builds(StepTimings, floats, floats),
    weight_version=some.none() | texts,
    weight_versions=sequences(some.tuples(texts, some.integers(0, 9), some.integers(0, 9))),
)
failures = some.builds(Failure, some.sampled_from(FailureClass), texts, texts, texts, some.none() | some.integers())
trajectories = some.builds(
    Trajectory,
    task=some.builds(Task, texts.filter(bool), texts, some.none() | some.integers(), mappings),
    rollout=some.integers(0, 9),
    attempt=some.integers(0, 9),
    steps=sequences(steps),
    stop_reason=some.sampled_from(StopReason),
    failure=some.none() | failures,
    instruction=texts,
    final_screenshot=some.none() | refs,
    started_at=finite,
    group_round=some.integers(0, 3),
    info=mappings,
)


@settings(deadline=None, max_examples=examples(40), suppress_health_check=list(HealthCheck))
@given(trajectories)
def test_whatever_a_trajectory_holds_comes_back_exactly(trajectory: Trajectory) -> None:
    back = round_trip(trajectory)
    assert back == trajectory
    assert repr(back) == repr(trajectory)


@settings(deadline=None, max_examples=examples(10), suppress_health_check=list(HealthCheck))
@given(some.lists(trajectories, max_size=3))
def test_whatever_trajectories_hold_they_come_back_from_a_folder(
    tmp_path_factory: pytest.TempPathFactory, given: list[Trajectory]
) -> None:
    path = tmp_path_factory.mktemp("run")
    with RunStore.create(path) as store:
        store.images.sync = lambda refs: None  # type: ignore[method-assign]  # they refer to no image
        for trajectory in given:
            store.append(trajectory)
    with RunStore.open(path) as store:
        assert list(store) == given
        assert [entry.key for entry in store.entries()] == [trajectory.key for trajectory in given]
        assert [entry.ok for entry in store.entries()] == [trajectory.ok for trajectory in given]


def test_numbers_that_are_none_come_back_to_the_bit() -> None:
    odd = (math.nan, -math.inf, math.inf, -0.0, 5e-324, -1.7976931348623157e308, 0.1 + 0.2)
    step = Step(0, response_token_ids=(1,) * 7, response_logprobs=odd, reward=math.nan, info={"x": (math.nan, -0.0)})
    back = round_trip(Trajectory(Task("t"), 0, steps=(step,), reward=math.nan)).steps[0]
    assert back.response_logprobs is not None
    assert numpy.array(back.response_logprobs).tobytes() == numpy.array(odd).tobytes()
    assert math.isnan(back.reward or 0)
    assert repr(back.info) == "{'x': (nan, -0.0)}"


def test_scalars_of_numpy_come_back_as_python_numbers() -> None:
    info = {"i": numpy.int64(3), "f": numpy.float32(0.5), "b": numpy.bool_(True), 7: MappingProxyType({"k": "v"})}
    step = Step(0, prompt_token_ids=numpy.arange(3), response_logprobs=(), info=info)  # type: ignore[arg-type]
    back = round_trip(Trajectory(Task("t"), 0, steps=(step,))).steps[0]
    assert back.info == {"i": 3, "f": 0.5, "b": True, 7: {"k": "v"}}
    assert back.prompt_token_ids == (0, 1, 2)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"info": {"deep": [{"x": b"bytes"}]}}, r"steps\[0\].info.deep\[0\].x is of type bytes"),
        ({"info": {"x": numpy.zeros(3)}}, r"steps\[0\].info.x is of type ndarray"),
        ({"messages": ({"role": "user", "content": [object()]},)}, r"steps\[0\].messages\[0\].content\[0\]"),
        ({"actions": ("click",)}, r"steps\[0\].actions\[0\]"),
        ({"actions": (Click(math.nan, 1.0),)}, r"steps\[0\].actions\[0\]: click.x is nan"),
        ({"prompt_token_ids": (1, 2**31)}, r"steps\[0\].prompt_token_ids: not all are 32-bit integers"),
        ({"prompt_token_ids": b"12345678"}, r"steps\[0\].prompt_token_ids: not all are 32-bit integers"),
        ({"response_token_ids": (1.5,)}, r"steps\[0\].response_token_ids: not all are 32-bit integers"),
        ({"response_logprobs": (None,)}, r"steps\[0\].response_logprobs: not all are floats"),
    ],
)
def test_what_can_not_be_recorded_is_refused_by_name_and_nothing_is_written(
    path: Path, change: dict[str, Any], where: str
) -> None:
    with RunStore.create(path) as store:
        store.append(attempt(0))
        wrong = Trajectory(Task("t-9"), 4, steps=(dataclasses.replace(Step(0), **change),))
        with pytest.raises(RunStoreError, match=f"t-9, rollout 4, can't be recorded: {where}"):
            store.append(wrong)
        store.append(attempt(1))
        assert [entry.rollout for entry in store.entries()] == [0, 1]
        assert store.verify() == []


def test_what_is_nested_without_end_is_refused(path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with RunStore.create(path) as store, pytest.raises(RunStoreError, match="nested too deep"):
        store.append(Trajectory(Task("t"), 0, info={"x": cycle}))


def test_a_field_of_a_later_version_is_not_dropped_in_silence() -> None:
    record = trajectory_codec.encode(attempt())
    values = json.loads(record.text)
    values["steps"][1]["mood"] = "good"
    with pytest.raises(ValueError, match="Step has no field mood: a later version"):
        trajectory_codec.decode(json.dumps(values).encode(), record.numbers)


@pytest.mark.parametrize("max_images", [5, 1000])
def test_an_episode_grows_with_its_length_and_not_with_its_square(max_images: int) -> None:
    def size(length: int) -> int:
        made = sample_trajectory(steps=length, max_images=max_images, seed=3)
        record = trajectory_codec.encode(made)
        return len(record.text) + len(record.numbers)

    assert size(80) < 2.3 * size(40)


# -- who counts --------------------------------------------------------------------------------------------------------


def test_the_first_attempt_that_is_ok_counts_and_the_last_where_none_is(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failure = sample_failure()
    with RunStore.create(path) as store:
        store.append(attempt(0, failure=failure))
        store.append(attempt(0, attempt=1, reward=0.5))
        store.append(attempt(1, failure=failure))
        store.append(attempt(1, attempt=1, failure=failure))
        store.append(attempt(2, stop_reason=StopReason.CANCELLED))
        assert store.duplicates == []
        store.append(attempt(0, attempt=2, reward=0.75))
    assert "has two attempts that count" in caplog.text
    with RunStore.open(path) as store:
        found = {each.key: each for each in store.trajectories()}
        assert [found["t-1", rollout].attempt for rollout in range(3)] == [1, 1, 0]
        assert found["t-1", 0].reward == 0.5
        assert store.finished() == {("t-1", 0)}
        assert [entry.attempt for entry in store.duplicates] == [2]


def test_of_a_repeated_group_only_the_last_round_counts(path: Path) -> None:
    with RunStore.create(path) as store:
        for rollout in range(3):
            store.append(attempt(rollout))
        store.append(attempt(0, task_id="t-2"))
        store.append(attempt(1, group_round=1, reward=0.0))
        store.append(attempt(2, group_round=0, attempt=5))  # came late
        assert [each.key for each in store.trajectories()] == [("t-1", 1), ("t-2", 0)]
        assert store.finished() == {("t-1", 1), ("t-2", 0)}
        assert len(store) == 6
        assert store.duplicates == []


def test_the_summary_counts_rewards_of_those_that_are_ok_only(path: Path) -> None:
    with RunStore.create(path) as store:
        assert store.summary().mean_reward is None
        store.append(attempt(0, reward=1.0))
        store.append(attempt(1, reward=0.0))
        store.append(attempt(2, failure=sample_failure(FailureClass.ENVIRONMENT)))
        store.append(attempt(2, attempt=1, failure=sample_failure(FailureClass.MODEL_SERVER)))
        store.append(attempt(3, reward=None, stop_reason=StopReason.MAX_STEPS))
        store.append(attempt(4, stop_reason=StopReason.CANCELLED, reward=1.0))
        summary = store.summary()
        given = list(store)
    assert (summary.attempts, summary.rollouts, summary.finished, summary.tasks) == (6, 5, 3, 1)
    assert (summary.mean_reward, summary.rewarded) == (0.5, 2)
    assert summary.failures == {FailureClass.ENVIRONMENT: 1, FailureClass.MODEL_SERVER: 1}
    assert sum(summary.stop_reasons.values()) == 6
    assert summary.stop_reasons[StopReason.CANCELLED] == 1
    assert summary.response_tokens == sum(each.response_tokens for each in given)
    assert summary.steps == 12


# -- made and resumed --------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_same_config(path: Path) -> None:
    asked = {"model": "m", "sampling": {"temperature": 1.0}, "tasks": ("a", "b")}
    with RunStore.create(path, asked, notes={"note": 1}) as store:
        store.append(attempt(0))
        created_at = store.created_at
    with RunStore.create(path, asked, notes={"note": 2}) as store:
        assert (store.notes, store.created_at) == ({"note": 1}, created_at)
        assert store.finished() == {("t-1", 0)}
        store.append(attempt(1))
    with RunStore.open(path) as store:
        assert len(store) == 2
        assert store.config == {"model": "m", "sampling": {"temperature": 1.0}, "tasks": ["a", "b"]}
    (resumed,) = json.loads((path / "run.json").read_text())["resumed"]
    assert resumed["notes"] == {"note": 2}
    assert "config" not in resumed


def test_another_run_is_refused_with_what_differs(path: Path) -> None:
    asked = {"model": "m", "sampling": {"temperature": 1.0, "top_p": 1}}
    RunStore.create(path, asked).close()
    other = {"model": "m", "sampling": {"temperature": 0.5, "top_p": 1}, "n": 8}
    with pytest.raises(RunStoreError) as caught:
        RunStore.create(path, other)
    assert "sampling.temperature: the run has 1.0, asked for is 0.5" in caught.value.message
    assert "n: the run has nothing, asked for is 8" in caught.value.message
    assert "top_p" not in caught.value.message
    assert "model" not in caught.value.message
    with pytest.raises(RunStoreError, match="there is a run already"):
        RunStore.create(path, asked, resume=False)
    RunStore.create(path, asked).close()  # neither of them holds the lock
    with RunStore.create(path, other, force=True) as store:
        assert store.config == asked
    assert json.loads((path / "run.json").read_text())["resumed"][-1]["config"] == other


def test_what_a_run_is_made_of_is_recorded_and_compared(path: Path) -> None:
    with RunStore.create(path) as store:
        store.settle({"model": "a", "limits": {"max_steps": 5}})
        store.settle({"model": "a", "limits": {"max_steps": 5}})
    with RunStore.create(path) as store:
        assert store.made_of == {"model": "a", "limits": {"max_steps": 5}}
        with pytest.raises(RunStoreError, match=r"limits\.max_steps: the run has 5, asked for is 9"):
            store.settle({"model": "a", "limits": {"max_steps": 9}})
    with RunStore.create(path, force=True) as store:
        store.settle({"model": "b", "limits": {"max_steps": 5}})
    told = json.loads((path / "run.json").read_text())
    assert told["made_of"]["model"] == "a"
    assert told["resumed"][-1]["made_of"]["model"] == "b"


@pytest.mark.parametrize("name", ["config", "notes"])
def test_a_config_that_is_no_json_is_refused_and_nothing_is_made(path: Path, name: str) -> None:
    for wrong in ({"x": object()}, {"x": math.nan}, {"x": b""}):
        with pytest.raises(ConfigError) as caught:
            RunStore.create(path, **{name: wrong})  # type: ignore[arg-type]
        assert caught.value.field == name
    assert not path.exists()


def test_trajectories_are_read_when_they_are_asked_for_also_when_the_store_is_closed(path: Path) -> None:
    with RunStore.create(path) as store:
        given = [attempt(rollout) for rollout in range(4)]
        for each in given:
            store.append(each)
        found = store.selected(("t-1", rollout) for rollout in (3, 0, 2))
    assert len(found) == 3
    assert list(found) == [given[3], given[0], given[2]]
    assert (found[0], found[-1], list(found[1:])) == (given[3], given[2], [given[0], given[2]])
    with pytest.raises(IndexError):
        found[3]
    with pytest.raises(KeyError):
        with RunStore.open(path) as store:
            store.selected([("t-1", 9)])


def test_a_folder_that_is_no_run_is_refused_and_left_alone(path: Path) -> None:
    with pytest.raises(RunStoreError, match="is no run"):
        RunStore.open(path)
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    for make in (RunStore.create, RunStore.open):
        with pytest.raises(RunStoreError, match="is no run"):
            make(path)
    assert [each.name for each in path.iterdir()] == ["notes.txt"]


def test_a_file_in_its_place_is_refused(path: Path) -> None:
    path.write_text("mine")
    for place in (path, path / "below"):
        for make in (RunStore.create, RunStore.open):
            with pytest.raises(RunStoreError) as caught:
                make(place)
            assert caught.value.path == str(place)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "damaged"),
        ("[1]", "damaged"),
        ('{"format": "other"}', "another program"),
        ('{"format": "managed-vllm run", "version": 2}', "version 2 of the format"),
        ('{"format": "managed-vllm run", "version": 1, "config": 3}', "damaged"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_run_json_that_is_none_is_refused(path: Path, content: str, why: str) -> None:
    RunStore.create(path).close()
    (path / "run.json").write_text(content)
    for make in (RunStore.create, RunStore.open):
        with pytest.raises(RunStoreError, match=why):
            make(path)
    assert (path / "run.json").read_text() == content


def test_a_run_without_its_run_json_is_not_made_another(path: Path) -> None:
    with RunStore.create(path) as store:
        store.append(attempt())
    (path / "run.json").unlink()
    with pytest.raises(RunStoreError, match="no run"):
        RunStore.create(path)


def test_a_maker_that_was_killed_before_run_json_is_no_obstacle(path: Path) -> None:
    path.mkdir()
    for name in ("writer.lock", "trajectories.jsonl", "arrays.bin", ".run.json-new"):
        (path / name).touch()
    RunStore.create(path, resume=False).close()


def test_a_closed_store_and_one_for_reading_say_so(path: Path) -> None:
    with RunStore.create(path) as store:
        store.append(attempt())
    store.close()
    with pytest.raises(RunStoreError, match="was closed"):
        store.append(attempt())
    with pytest.raises(RunStoreError, match="was closed"):
        list(store)
    with RunStore.open(path) as store:
        with pytest.raises(RunStoreError, match="opened for reading"):
            store.append(attempt())


def test_an_image_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    with RunStore.create(path) as store, RunStore.create(tmp_path / "other") as other:
        with pytest.raises(RunStoreError, match="was never put into this store"):
            store.append(sample_trajectory(other.images))
        assert len(store) == 0
        store.append(attempt())


# -- damage ------------------------------------------------------------------------------------------------------------


def three(path: Path) -> list[Trajectory]:
    given = [attempt(rollout) for rollout in range(3)]
    with RunStore.create(path) as store:
        for each in given:
            store.append(each)
    return given


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def test_a_torn_last_line_does_not_count_and_is_cut_off_by_the_next_writer(path: Path) -> None:
    given = three(path)
    lines = path / "trajectories.jsonl"
    whole = lines.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in [last + 1, last + 30, len(whole) - 1]:
        lines.write_bytes(whole[:cut])
        with RunStore.open(path) as store:
            assert list(store) == given[:2]
            assert store.damaged == []  # it may be on its way
        assert lines.read_bytes() == whole[:cut]  # a reader changes nothing
        with RunStore.create(path) as store:
            assert store.finished() == {("t-1", 0), ("t-1", 1)}
            assert lines.read_bytes() == whole[:last]  # what comes next may be shorter than what was left
            store.append(given[2])
            assert list(store) == given


@pytest.mark.parametrize("where", ["sum", "head", "body", "newline"])
def test_a_damaged_line_in_the_middle_is_reported_and_not_trusted(
    path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = three(path)
    lines = path / "trajectories.jsonl"
    first = lines.read_bytes().index(b"\n") + 1
    second = lines.read_bytes().index(b"\n", first)
    flip(lines, {"sum": first + 12, "head": first + 40, "body": second - 50, "newline": first - 1}[where])
    lost = {0, 1} if where == "newline" else {1}
    for make in (RunStore.open, RunStore.create):
        caplog.clear()
        with make(path) as store:
            assert list(store) == [each for each in given if each.rollout not in lost]
            assert len(store.finished()) == 3 - len(lost)
            (damage,) = store.damaged
            assert (damage.path, damage.offset) == ("trajectories.jsonl", 0 if where == "newline" else first)
            assert "checksum does not fit" in caplog.text
            assert store.summary().damaged == 1
    with RunStore.create(path) as store:
        store.append(given[1])
    with RunStore.open(path) as store:
        assert ("t-1", 1) in store.finished()


def test_damaged_numbers_are_reported_and_their_attempt_is_not_trusted(path: Path) -> None:
    given = three(path)
    with RunStore.open(path) as store:
        start, size, _ = store.entries()[1].block
        flip(path / "arrays.bin", start + size - 3)
        entry = store.entries()[1]
        with pytest.raises(RunStoreError, match=f"arrays.bin at byte {start}"):
            store.load(entry)
        assert store.finished() == {("t-1", 0), ("t-1", 2)}
    with RunStore.open(path) as store:
        assert list(store) == [given[0], given[2]]
        assert [damage.offset for damage in store.damaged] == [start]
    with RunStore.create(path) as store:  # a writer looks at once: it says what must be done again
        assert store.finished() == {("t-1", 0), ("t-1", 2)}
        store.append(given[1])
        assert len(store.finished()) == 3


def test_numbers_that_are_missing_are_noticed_without_reading_the_attempt(path: Path) -> None:
    three(path)
    with RunStore.open(path) as store:
        start, size, _ = store.entries()[2].block
    os.truncate(path / "arrays.bin", start + size - 1)
    with RunStore.open(path) as store:
        assert store.finished() == {("t-1", 0), ("t-1", 1)}
        assert "numbers are missing" in str(store.damaged[0])


def test_verify_finds_images_that_are_missing_or_changed(path: Path) -> None:
    with RunStore.create(path) as store:
        given = sample_trajectory(store.images, steps=3)
        store.append(given)
        assert store.verify() == []
        first, second = given.steps[0].screenshot, given.steps[1].screenshot
        assert first is not None
        assert second is not None
        store.images.path(first).unlink()
        flip(store.images.path(second), 100)
        assert len(store.verify()) == 2
        assert list(store) == [given]  # the attempt itself is whole


def test_lines_of_garbage_are_reported_each(path: Path) -> None:
    given = three(path)
    lines = path / "trajectories.jsonl"
    lines.write_bytes(b"\n{}\n\xff\xfe\x00\n" + lines.read_bytes())
    with RunStore.open(path) as store:
        assert list(store) == given
        assert len(store.damaged) == 3


# -- one writer, many readers ------------------------------------------------------------------------------------------

WRITER = """
import sys
from agent_samples import sample_trajectory
from managed_vllm.agent.store import RunStore
path, first = sys.argv[1], int(sys.argv[2])
with RunStore.create(path) as store:
    print("ready", flush=True)
    for rollout in range(first, 10**6):
        store.append(sample_trajectory(rollout=rollout, steps=rollout % 7))
        print(rollout, flush=True)
        if sys.argv[3:] and not sys.stdin.readline():
            break
"""


@contextlib.contextmanager
def writer(path: Path, first: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A process that appends one attempt after the other, and says so after each; with `more`, one for each line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(path), str(first), *more]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_told_who_the_first_is(path: Path) -> None:
    with writer(path, 0) as process:
        with pytest.raises(RunStoreError, match=f"written by process {process.pid} on "):
            RunStore.create(path)
        process.kill()
        process.wait()
        RunStore.create(path).close()
    with RunStore.create(path):
        with pytest.raises(RunStoreError, match=f"written by process {os.getpid()} on "):
            RunStore.create(path)
    RunStore.create(path).close()


def killed_at_a_random_moment(path: Path, rounds: int, seed: int) -> None:
    draw = random.Random(seed)
    done = -1
    for _ in range(rounds):
        with writer(path, done + 1) as process:
            assert process.stdout is not None
            for _ in range(draw.randrange(1, 12)):
                done = int(process.stdout.readline())
            time.sleep(draw.random() * 0.004)  # not to wait for anything: the moment is what is drawn
            process.kill()
            for line in process.stdout.read().splitlines():
                done = int(line)
        with RunStore.open(path) as store:
            kept = [entry.rollout for entry in store.entries()]
        # All of which `append` returned, and at most one more, of which it had not returned yet.
        assert kept in (list(range(done + 1)), list(range(done + 2)))
        done = len(kept) - 1
    with RunStore.create(path) as store:
        assert store.damaged == []
        store.append(sample_trajectory(rollout=done + 1, steps=(done + 1) % 7))
        expected = (sample_trajectory(rollout=rollout, steps=rollout % 7) for rollout in range(done + 2))
        for found, made in zip(store, expected, strict=True):
            assert found == made


def test_nothing_finished_is_lost_and_nothing_torn_is_trusted_after_kills(path: Path) -> None:
    killed_at_a_random_moment(path, 20, seed=1)


@pytest.mark.soak
def test_nothing_finished_is_lost_after_many_kills(path: Path) -> None:
    killed_at_a_random_moment(path, 300, seed=int(time.time()))


def test_readers_see_whole_attempts_while_they_are_written(path: Path) -> None:
    with writer(path, 0, "one by one") as process, contextlib.ExitStack() as stack:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        readers = [stack.enter_context(RunStore.open(path)) for _ in range(2)]
        assert [len(store) for store in readers] == [1, 1]
        for rollout in range(1, 6):
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{rollout}\n"
            assert [entry.rollout for entry in readers[0].refresh()] == [rollout]
        assert readers[0].refresh() == []
        assert [entry.rollout for entry in readers[1].refresh()] == [1, 2, 3, 4, 5]
        assert list(readers[0]) == [sample_trajectory(rollout=rollout, steps=rollout) for rollout in range(6)]


def test_a_reader_beside_a_busy_writer_finds_no_damage(path: Path) -> None:
    with writer(path, 0), RunStore.open(path) as store:
        while len(store) < 100:
            for entry in store.refresh():
                assert store.load(entry).rollout == entry.rollout
        assert [entry.rollout for entry in store.entries()] == list(range(len(store)))
        assert store.damaged == []


def test_many_threads_append_at_once(path: Path) -> None:
    with RunStore.create(path) as store:

        def work(task: int) -> None:
            for rollout in range(8):
                store.append(sample_trajectory(store.images, task_id=f"t-{task}", rollout=rollout, steps=2))

        threads = [threading.Thread(target=work, args=(task,)) for task in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store) == len(store.finished()) == 48
        assert store.verify() == []
    with RunStore.open(path) as store:
        for found in store:
            assert found == sample_trajectory(store.images, task_id=found.task.id, rollout=found.rollout, steps=2)


def in_a_fork(work: Any) -> str:
    """What `work` returns in a forked process."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        try:
            there.send(str(work()))
        except BaseException as error:
            there.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        assert here.poll(HANG_S)
        return str(here.recv())
    finally:
        process.join(HANG_S)
        process.kill()
        process.join()


def test_a_fork_may_not_write_and_does_not_let_go_of_the_lock(path: Path) -> None:
    with RunStore.create(path) as store:
        assert "this is a fork of it" in in_a_fork(lambda: store.append(attempt()))
        assert in_a_fork(store.close) == "None"
        with pytest.raises(RunStoreError, match="is written by process"):
            RunStore.create(path)
        store.append(attempt())
        assert len(store) == 1


def test_a_child_that_outlives_a_killed_writer_does_not_block(path: Path) -> None:
    """As an environment's process may, forked by the writer."""
    program = f"""
import os, signal
from managed_vllm.agent.store import RunStore
store = RunStore.create({str(path)!r})
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            eventually(lambda: _made(path), "the lock is free")
        finally:
            os.kill(child, signal.SIGKILL)


def _made(path: Path) -> bool:
    with contextlib.suppress(RunStoreError):
        RunStore.create(path).close()
        return True
    return False


# -- disks -------------------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount a small file system here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path, leave: int) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - leave)


@needs_root
@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384])
def test_on_a_full_disk_what_was_there_stays_and_what_comes_is_refused(tiny_disk: Path, leave: int) -> None:
    path = tiny_disk / "run"
    large = sample_trajectory(rollout=2, steps=40)
    with RunStore.create(path) as store:
        given = [attempt(0), attempt(1)]
        for each in given:
            store.append(each)
        before = {name: (path / name).read_bytes() for name in ("trajectories.jsonl", "arrays.bin")}
        fill(tiny_disk, leave)
        for _ in range(2):
            with pytest.raises(RunStoreError, match="the disk is full"):
                store.append(large)
        assert before == {name: (path / name).read_bytes() for name in before}
        assert list(store) == given
        (tiny_disk / "filler").unlink()
        store.append(large)
        assert list(store) == [*given, large]
        assert store.verify() == []


@needs_root
def test_an_image_for_which_there_is_no_room_is_refused_and_leaves_nothing(tiny_disk: Path) -> None:
    with RunStore.create(tiny_disk / "run") as store:
        given = sample_trajectory(store.images, steps=1)
        fill(tiny_disk, 0)
        with pytest.raises(RunStoreError, match="the disk is full"):
            sample_trajectory(store.images, steps=30, seed=2)
        (tiny_disk / "filler").unlink()
        store.append(given)
        assert not [name for _, _, names in os.walk(store.images.folder) for name in names if name.startswith(".")]


@needs_root
def test_a_read_only_folder_can_be_read_and_not_written(tiny_disk: Path) -> None:
    path = tiny_disk / "run"
    given = three(path)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for place in (path, tiny_disk / "new"):
        with pytest.raises(RunStoreError, match="read-only"):
            RunStore.create(place)
    with RunStore.open(path) as store:
        assert list(store) == given


@needs_root
def test_a_disk_without_room_for_a_run_is_said(tiny_disk: Path) -> None:
    fill(tiny_disk, 0)
    with pytest.raises(RunStoreError, match="the disk is full"):
        RunStore.create(tiny_disk / "run", {"x": "y" * 10_000})
    (tiny_disk / "filler").unlink()
    RunStore.create(tiny_disk / "run", resume=False).close()


# -- many --------------------------------------------------------------------------------------------------------------


def test_the_index_of_many_attempts_is_small_and_quick(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import tracemalloc

    caplog.set_level(logging.ERROR)
    with RunStore.create(path) as store:
        store.append(sample_trajectory(steps=10))
        line = (path / "trajectories.jsonl").read_bytes()
    with (path / "trajectories.jsonl").open("ab") as lines:
        for _ in range(1999):
            lines.write(line)  # the same attempt: they share their numbers
    tracemalloc.start()
    try:
        with RunStore.open(path) as store:
            held, peak = tracemalloc.get_traced_memory()
            assert len(store) == 2000
    finally:
        tracemalloc.stop()
    assert held < 2000 * 1200
    assert peak < held + 2_000_000  # the lines have 20 MB


def indexed(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Trajectory]:
    """A run of six attempts that has an index; runs have one from five on."""
    monkeypatch.setattr(attempt_logs, "FEWEST", 5)
    given = [attempt(rollout) for rollout in range(6)]
    with RunStore.create(path) as store:
        for each in given:
            store.append(each)
    assert (path / "index.msgpack").exists()
    return given


def test_a_large_run_is_opened_by_its_index_as_if_all_was_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = indexed(path, monkeypatch)
    with RunStore.open(path) as by_index:
        entries = by_index.entries()
        assert list(by_index) == given
    with RunStore.create(path) as store:
        assert store.entries() == entries
        store.append(attempt(6))
    with RunStore.open(path) as store:  # the index has not been written since: what came after it is read
        assert [entry.rollout for entry in store.entries()] == list(range(7))
    (path / "index.msgpack").unlink()
    with RunStore.open(path) as store:
        assert store.entries()[:6] == entries
        assert len(store) == 7


@pytest.mark.parametrize("name", ["trajectories.jsonl", "arrays.bin", "index.msgpack"])
def test_an_index_is_not_trusted_when_a_file_was_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given = indexed(path, monkeypatch)
    before_ns = (path / name).stat().st_mtime_ns
    flip(path / name, 60)
    os.utime(path / name, ns=(before_ns + 10**9, before_ns + 10**9))  # not within one tick of a file system's clock
    with RunStore.create(path) as store:
        assert list(store) == (given if name == "index.msgpack" else given[1:])
        assert len(store.damaged) == (name != "index.msgpack")
    with RunStore.open(path) as store:  # nor is there one that has the damaged attempt in it
        assert len(store.finished()) == 6 if name == "index.msgpack" else 5


def test_damage_behind_an_index_is_found_when_the_attempt_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = indexed(path, monkeypatch)
    with RunStore.create(path) as store:
        flip(path / "arrays.bin", 60)
        store.append(attempt(6))
        assert list(store) == [*given[1:], attempt(6)]
    with RunStore.create(path) as store:
        assert store.finished() == {("t-1", rollout) for rollout in range(1, 7)}


def test_a_task_that_no_index_can_name_costs_the_index_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_logs, "FEWEST", 1)
    given = Trajectory(Task("half a pair \ud83d"), 0, stop_reason=StopReason.FINISHED)
    with RunStore.create(path) as store:
        store.append(given)
    assert not (path / "index.msgpack").exists()
    with RunStore.open(path) as store:
        assert list(store) == [given]
