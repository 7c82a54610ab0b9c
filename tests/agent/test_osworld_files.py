"""OSWorld's files: its lists of tasks become ours, and a run becomes results that its own scripts read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_samples import sample_failure, sample_trajectory

from managed_vllm.agent import RunStore, Task, Trajectory
from managed_vllm.agent.actions import CallUser, Click, Custom, Finished, Wait
from managed_vllm.agent.environments.osworld_tasks import osworld_tasks
from managed_vllm.agent.export import export
from managed_vllm.agent.export.osworld import action_source
from managed_vllm.agent.named_environments import read_tasks
from managed_vllm.errors import ConfigError, ExportError

LISTED = {"os": ["id-a", "id-b"], "vlc": ["id-c"]}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list with its tasks, as in OSWorld's `evaluation_examples`."""
    for domain, ids in LISTED.items():
        folder = tmp_path / "examples" / domain
        folder.mkdir(parents=True)
        for one in ids:
            task = {
                "id": one,
                "snapshot": "base",
                "instruction": f"Do {one}.",
                "config": [],
                "evaluator": {"func": "x"},
            }
            (folder / f"{one}.json").write_text(json.dumps(task))
    file = tmp_path / "test_all.json"
    file.write_text(json.dumps(LISTED))
    return file


# -- its tasks ---------------------------------------------------------------------------------------------------------


def test_a_list_becomes_tasks_in_its_order_with_all_of_their_files(listed: Path) -> None:
    tasks = osworld_tasks(listed)
    assert [task.id for task in tasks] == ["id-a", "id-b", "id-c"]
    assert [task.data["domain"] for task in tasks] == ["os", "os", "vlc"]
    assert tasks[2].instruction == "Do id-c."
    assert tasks[2].data["evaluator"] == {"func": "x"}
    assert read_tasks(listed) == tasks  # as --tasks has it
    assert [task.id for task in osworld_tasks(listed, domains=["vlc"])] == ["id-c"]
    moved = listed.rename(listed.parent.parent / "test_small.json")
    assert osworld_tasks(moved, examples=listed.parent / "examples") == tasks


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "can't be read"),
        ("[]", "ids by domain"),
        ('{"os": "id-a"}', "ids by domain"),
        ('{"os": ["id-x"]}', "id-x.json can't be read"),
        ('{"os": ["id-a", "id-a"]}', "the task id-a twice"),
        ('{"os": ["../../../id-a"]}', "is not in"),
    ],
)
def test_a_list_that_is_none_is_a_config_error(listed: Path, content: str, said: str) -> None:
    listed.write_text(content)
    with pytest.raises(ConfigError, match=said):
        osworld_tasks(listed)


def test_what_is_no_task_and_no_domain_is_named(listed: Path) -> None:
    with pytest.raises(ConfigError, match="no domain gimp; there are os, vlc"):
        osworld_tasks(listed, domains=["gimp"])
    (listed.parent / "examples" / "os" / "id-a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"id-a\.json is no task"):
        osworld_tasks(listed)


# -- its results -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(tmp_path / "run", {"model": "org/model"}) as store:
        yield store


def put(store: RunStore, task: Task, **more: Any) -> Trajectory:
    trajectory = sample_trajectory(store.images, task_id=task.id, model="org/model", **more)
    kept = dataclasses.replace(trajectory, task=task)
    store.append(kept)
    return kept


def test_each_attempt_is_where_and_as_osworlds_runner_leaves_it(store: RunStore, listed: Path, tmp_path: Path) -> None:
    tasks = osworld_tasks(listed)
    given = put(store, tasks[0], steps=3, reward=1.0)
    put(store, tasks[2], steps=1, reward=0.25)
    out = tmp_path / "results"
    report = export(store, "osworld", out)
    assert (report.trajectories, report.samples) == (2, 2)
    model = out / "pyautogui" / "screenshot" / "org_model"
    folder = model / "os" / "id-a"
    assert float((folder / "result.txt").read_text()) == 1.0
    assert float((model / "vlc" / "id-c" / "result.txt").read_text()) == 0.25
    lines = [json.loads(line) for line in (folder / "traj.jsonl").read_text().splitlines()]
    assert [line["step_num"] for line in lines] == [1, 2, 3]
    assert [line["response"] for line in lines] == [step.response for step in given.steps]
    assert [line["action"] for line in lines] == [action_source(step.actions[0]) for step in given.steps]
    assert [line["done"] for line in lines] == [False, False, True]
    assert lines[-1]["reward"] == 1.0
    after = [*(step.screenshot for step in given.steps[1:]), given.final_screenshot]
    for line, ref in zip(lines, after, strict=True):
        assert ref is not None
        assert line["screenshot_file"].startswith(f"step_{line['step_num']}_{line['action_timestamp']}")
        assert (folder / line["screenshot_file"]).read_bytes() == store.images.read(ref)
    assert json.loads((model / "args.json").read_text())["model"] == "org_model"


def test_a_failed_attempt_has_no_result_and_counts_as_not_played(store: RunStore, listed: Path, tmp_path: Path) -> None:
    tasks = osworld_tasks(listed)
    put(store, tasks[0], failure=sample_failure())
    assert export(store, "osworld", tmp_path / "without").trajectories == 0
    export(store, "osworld", tmp_path / "with", include="all")
    (folder,) = (tmp_path / "with").glob("pyautogui/*/*/os/id-a")
    assert not (folder / "result.txt").exists()
    *_, last = (json.loads(line) for line in (folder / "traj.jsonl").read_text().splitlines())
    assert last["Error"].startswith("os/id-a - ")


def test_further_rollouts_are_results_of_their_own(store: RunStore, listed: Path, tmp_path: Path) -> None:
    for rollout in range(3):
        put(store, osworld_tasks(listed)[0], rollout=rollout, steps=1, reward=float(rollout))
    out = tmp_path / "results"
    export(store, "osworld", out)
    for rollout, root in enumerate([out, out / "rollout-1", out / "rollout-2"]):
        (result,) = root.glob("pyautogui/*/*/os/id-a/result.txt")
        assert float(result.read_text()) == rollout


def test_several_actions_of_a_turn_and_answers_that_are_none_have_lines(store: RunStore, tmp_path: Path) -> None:
    task = Task("t/1", data={"snapshot": "gimp"})
    trajectory = sample_trajectory(store.images, task_id=task.id, steps=2)
    first, second = trajectory.steps
    both = dataclasses.replace(first, actions=(Click(1, 2), Wait(), CallUser()), executed=2)
    none = dataclasses.replace(second, actions=(), executed=0, parse_error="no action")
    store.append(dataclasses.replace(trajectory, task=task, steps=(both, none)))
    export(store, "osworld", tmp_path / "results")
    (file,) = (tmp_path / "results").glob("pyautogui/*/*/gimp/t_1/traj.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["action"] for line in lines] == [action_source(Click(1, 2)), "WAIT", ""]
    assert [line["screenshot_file"] is None for line in lines] == [True, False, True]
    assert lines[2]["parse_error"] == "no action"


def test_actions_are_what_desktop_env_is_given() -> None:
    assert [action_source(each) for each in (Finished(), CallUser(), Wait(3))] == ["DONE", "FAIL", "WAIT"]
    assert "pyautogui.click(5, 6" in action_source(Click(5, 6))
    assert action_source(Custom("fly", {"to": "x"})) == "Custom(name='fly', arguments={'to': 'x'})"


def test_two_tasks_of_one_folder_are_an_error(store: RunStore, tmp_path: Path) -> None:
    for name in ("a/b", "a_b"):
        put(store, Task(name), steps=1)
    with pytest.raises(ExportError, match="another task has the folder a_b"):
        export(store, "osworld", tmp_path / "results")
    assert not (tmp_path / "results").exists()


CHECKOUT = os.environ.get("OSWORLD_CHECKOUT", "")


@pytest.mark.skipif(not Path(CHECKOUT, "show_result.py").is_file(), reason="OSWORLD_CHECKOUT has no show_result.py")
def test_osworlds_own_script_counts_them(store: RunStore, listed: Path, tmp_path: Path) -> None:
    for task, reward in zip(osworld_tasks(listed), (1.0, 0.0, 0.25), strict=True):
        put(store, task, steps=1, reward=reward)
    out = tmp_path / "results"
    export(store, "osworld", out)
    command = [sys.executable, str(Path(CHECKOUT).absolute() / "show_result.py"), "--model", "org_model"]
    shown = subprocess.run([*command, "--result_dir", str(out)], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "Domain: os Runned: 2 Success Rate: 50.0 %" in shown
    assert "Runned: 3 Current Success Rate: 41.67 %" in shown
