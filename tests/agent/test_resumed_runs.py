"""A run is resumed only as what it is: what it was made of is compared, and nothing is mixed without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acting_server import ActingServer, acting
from counting_world import Worlds, right, tasks

from managed_vllm import VLLMClient
from managed_vllm.agent import (
    Limits,
    RetryRollouts,
    RunStore,
    StreamingTaskScheduler,
    Task,
    Trajectory,
    trajectory_codec,
    ui_tars,
)
from managed_vllm.agent.actions import Finished, ParsedResponse
from managed_vllm.errors import RunStoreError
from managed_vllm.request.outputs import CompletionOutput

PARAMS = {"max_tokens": 200, "temperature": 0}
AGENT = ui_tars("absolute", show_text=True)


@pytest.fixture(scope="module")
def server() -> Iterator[ActingServer]:
    with acting(right) as made:
        yield made


def play(
    server: ActingServer, folder: Path, given: list[Task], *, model: str = "a", force: bool = False, **options: Any
) -> list[Trajectory]:
    with (
        VLLMClient(server.url, None, model) as client,
        RunStore.create(folder, force=force) as store,
    ):
        worlds = Worlds()
        settings = {"sampling_params": PARAMS, "agent": AGENT, "retry": RetryRollouts(max_attempts=1), **options}
        return list(StreamingTaskScheduler(client, worlds, store=store, **settings).run_all(given))


def finished(answer: CompletionOutput, size: Any) -> ParsedResponse:
    return ParsedResponse("", (Finished(),))


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"model": "b"}, "model: the run has 'a', asked for is 'b'"),
    ({"sampling_params": {**PARAMS, "temperature": 0.5}}, "sampling.temperature: the run has 0, asked for is 0.5"),
    ({"limits": Limits(max_steps=3)}, "limits.max_steps: the run has 15, asked for is 3"),
    ({"agent": ui_tars("absolute", show_text=True, prompt="Do {instruction}")}, "agent.build_messages.prompt: the run"),
    ({"agent": replace(AGENT, parse=finished)}, "agent.parse: the run has"),
]


@pytest.mark.parametrize(("other", "words"), OTHERS, ids=[words.partition(":")[0] for _, words in OTHERS])
def test_another_model_or_setting_is_refused_and_said(
    server: ActingServer, tmp_path: Path, other: dict[str, Any], words: str
) -> None:
    play(server, tmp_path / "run", tasks(2, 1))
    before = len(server.requests)
    with pytest.raises(RunStoreError) as caught:
        play(server, tmp_path / "run", tasks(2, 1), n=2, **other)
    assert words in caught.value.message
    assert len(server.requests) == before
    with RunStore.open(tmp_path / "run") as store:
        assert len(store) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": "Delete it."}, "instruction: the run has 'Press next until none is left.', asked for is 'Del"),
        ({"seed": 7}, "seed: the run has None, asked for is 7"),
        ({"data": {"presses": 5}}, "data.presses: the run has 1, asked for is 5"),
    ],
)
def test_another_task_with_the_same_id_is_refused_and_said(
    server: ActingServer, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    given = tasks(2, 1)
    play(server, tmp_path / "run", given)
    with pytest.raises(RunStoreError, match="task 'task-001' is another one") as caught:
        play(server, tmp_path / "run", [given[0], replace(given[1], **change)], n=2)
    assert words in caught.value.message


def test_forced_it_goes_on_with_the_rest_and_says_so_in_the_record(server: ActingServer, tmp_path: Path) -> None:
    first = play(server, tmp_path / "run", tasks(2, 1))
    changed = [replace(task, instruction="Again.") for task in tasks(2, 1)]
    found = play(server, tmp_path / "run", changed, model="b", n=2, force=True)
    assert [one.key for one in found] == [("task-000", 0), ("task-000", 1), ("task-001", 0), ("task-001", 1)]
    assert [found[0], found[2]] == first
    assert {step.model for step in found[1].steps} == {"b"}
    assert found[1].instruction == "Again."
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert told["made_of"]["model"] == "a"
    assert told["resumed"][-1]["made_of"]["model"] == "b"


def test_more_rollouts_tasks_and_time_and_other_retries_are_the_same_run(server: ActingServer, tmp_path: Path) -> None:
    play(server, tmp_path / "run", tasks(2, 1))
    found = play(
        server,
        tmp_path / "run",
        tasks(3, 1),
        n=2,
        max_concurrency=2,
        retry=RetryRollouts(max_attempts=5),
        limits=Limits(step_timeout_s=500.0, episode_timeout_s=1000.0),
    )
    assert len(found) == 6
    with RunStore.open(tmp_path / "run") as store:
        assert len(store) == 6


# -- large runs --------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_read_before_somebody_asks_for_it(
    server: ActingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(server, tmp_path / "run", tasks(20, 1))
    decoded = []
    decode = trajectory_codec.decode

    def counted(text: bytes, numbers: bytes) -> Trajectory:
        decoded.append(len(text))
        return decode(text, numbers)

    monkeypatch.setattr(trajectory_codec, "decode", counted)
    with VLLMClient(server.url, None, "a") as client, RunStore.create(tmp_path / "run") as store:
        scheduler = StreamingTaskScheduler(client, Worlds(), sampling_params=PARAMS, agent=AGENT, store=store)
        found = scheduler.run_all(tasks(20, 1))
        assert len(found) == 20
        assert not decoded
        assert found[7].key == ("task-007", 0)
        assert len(decoded) == 1
