"""Environments by name, tasks from files, and what the `rollout` command says about wrong ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from counting_world import Worlds

from managed_vllm.agent import Limits, Task
from managed_vllm.agent.environments.desktop import DesktopEnvironment
from managed_vllm.agent.named_environments import FORMATS, named_environment, read_tasks
from managed_vllm.cli import main
from managed_vllm.errors import ConfigError

TESTS = Path(__file__).resolve().parent.parent / "helpers"


def test_the_embedded_desktop_has_tasks_of_its_own() -> None:
    place = named_environment("desktop", Limits())
    assert place.make is DesktopEnvironment
    assert place.tasks is not None
    assert [task.id for task in place.tasks(2, 0)] != [task.id for task in place.tasks(2, 1)]
    assert len(place.tasks(7, 3)) == 7


def test_a_function_of_a_module_makes_an_environment() -> None:
    place = named_environment("counting_world:Worlds", Limits())
    assert place.tasks is None
    make: Any = place.make
    assert make is Worlds


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope", "no environment 'nope'"),
        ("no.such.module:make", "can't be imported"),
        ("counting_world:nothing", "can't be imported"),
        ("counting_world:SIZE", "no function"),
        ("miniwob:", "no environment"),
    ],
)
def test_what_is_no_environment_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        named_environment(name, Limits())


def test_tasks_come_from_json_lines_or_a_list(tmp_path: Path) -> None:
    lines = tmp_path / "tasks.jsonl"
    lines.write_text('"Press it."\n\n{"id": "a", "instruction": "Go.", "seed": 4}\n')
    assert read_tasks(lines) == [Task("Press it.", "Press it."), Task("a", "Go.", 4, {"id": "a", "instruction": "Go.",
                                                                                    "seed": 4})]  # fmt: skip
    whole = tmp_path / "tasks.json"
    whole.write_text(json.dumps([{"task_id": "b"}]))
    assert [task.id for task in read_tasks(whole)] == ["b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"id": "a"}\n{"no": 1}\n', "line 2: not a task"), ("{", "line 1: "), ("[1]", "not a task"), ("[", "Expecting")],
)
def test_what_is_no_task_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tasks"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_tasks(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_tasks(tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env", "nope", "--tasks", "3"], "no environment 'nope'"),
        (["--env", "counting_world:Worlds", "--tasks", "3"], "needs --tasks FILE"),
        (["--env", "desktop", "--tasks", "none.jsonl"], "can't be read"),
        (["--env", "desktop", "--tasks", "3", "--sampling", "[1]"], "must be a JSON object"),
        (["--env", "desktop", "--tasks", "3", "--max-steps", "0"], "argument --max-steps: 0 must be 1 or more"),
        (["--env", "desktop", "--tasks", "3", "--reward", "nothing"], "names no function"),
        (["--env", "desktop", "--tasks", "3", "--n", "0"], "argument --n: 0 must be 1 or more"),
        (["--env", "desktop", "--tasks", "3", "--step-timeout", "0"], "0 is no duration"),
        (["--env", "desktop", "--tasks", "3", "--format", "qwen"], "no format 'qwen'; there are ui-tars, json"),
        (["--env", "desktop", "--tasks", "3", "--format", "embedded", "--coordinates", "absolute"], "are its own"),
    ],
)
def test_wrong_words_of_the_command_are_told_before_a_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setenv("MANAGED_VLLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(["rollout", *words, "--out", str(tmp_path / "run")])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "run").exists()


def test_every_format_has_a_name() -> None:
    assert {"ui-tars", "json", "tools", "embedded", "qwen3-vl", "opencua"} <= FORMATS.keys()
    for make in FORMATS.values():
        assert make().on_parse_error.retries == 0


def test_importing_the_agent_loads_nothing_heavy() -> None:
    code = (
        "import sys, managed_vllm.agent as agent\n"
        "agent.StreamingTaskScheduler, agent.run_agent_loop, agent.RunStore, agent.ProcessEnvironment\n"
        "heavy = {'numpy', 'PIL', 'torch', 'vllm', 'gymnasium', 'miniwob', 'selenium', 'jinja2', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
