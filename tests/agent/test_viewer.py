"""A run looked at: the HTML file, in Chromium too; the summary; `managed-vllm view` and `export`."""

from __future__ import annotations

import dataclasses
import html.parser
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_samples import sample_failure, sample_trajectory
from browsing import Browser
from processes import HANG_S, eventually

from managed_vllm.agent.actions import Click, Custom, Direction, Drag, Finished, Hotkey, Scroll, Type, Wait
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.report import SUCCESS_AT, Row, rows, summary_table
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import FailureClass, ImageRef, Step, StopReason, Task, Trajectory
from managed_vllm.agent.viewer import MAX_BYTES, WrittenPage, page, write_html
from managed_vllm.agent.viewer.record import MOST_CHARACTERS
from managed_vllm.errors import ConfigError

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install jinja2")
pytest.importorskip("PIL", reason="Pillow is not installed: pip install pillow")

HOSTILE = [
    "</script><script>window.owned = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.owned = 1'>",
    "\"'`${window.owned = 1}` & &lt; {{ 7 * 7 }} {% raw %}",
    "line\u2028paragraph\u2029end\x00\x1b[31m\r\n\t",
    "half a pair \ud83d, turned \udc4d, whole 👍",
    "javascript:window.owned=1",
]


class Page(html.parser.HTMLParser):
    """What a browser's parser finds in the file: each script's attributes and text, and all other attributes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._in: dict[str, str | None] | None = None
        self.text = Path(path).read_bytes().decode("utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in = dict(attrs)
            self.scripts.append((self._in, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in = None

    def handle_data(self, data: str) -> None:
        if self._in is not None:
            self.scripts[-1] = (self._in, self.scripts[-1][1] + data)

    def data(self, name: str) -> str:
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return found

    def json(self, name: str) -> Any:
        return json.loads(self.data(name))

    @property
    def images(self) -> set[str]:
        return {str(each["id"])[1:] for each, _ in self.scripts if str(each.get("id", "")).startswith("i")}


def bare(*steps: Step, task: str = "t", **fields: Any) -> Trajectory:
    fields.setdefault("stop_reason", StopReason.FINISHED)
    return Trajectory(Task(task, data=fields.pop("data", {})), fields.pop("rollout", 0), steps=steps, **fields)


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_needs_nothing_else_and_lets_only_its_own_script_run(tmp_path: Path, images: ImageStore) -> None:
    written = write_html([sample_trajectory(images, rollout=n) for n in range(3)], tmp_path / "run.html", images=images)
    found = Page(written)
    assert written.files is None
    assert sorted(each.name for each in tmp_path.iterdir()) == ["images", "run.html"]
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form") or tag == "form", tag
        assert not {"src", "href", "action", "style"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    kinds = [attributes.get("type") for attributes, _ in found.scripts]
    assert kinds.count(None) == 1
    assert set(kinds) == {None, "application/json", "text/plain"}
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", found.text)


def test_all_of_a_run_is_in_it(tmp_path: Path, images: ImageStore) -> None:
    failed = sample_trajectory(images, task_id="t-2", failure=sample_failure(), attempt=0)
    given = [sample_trajectory(images, task_id="t-1"), failed, sample_trajectory(images, task_id="t-2", attempt=1)]
    found = Page(write_html(given, tmp_path / "run.html", images=images, title="A & B"))
    run = found.json("run")
    assert run["title"] == "A & B"
    assert [(r["task"], r["attempt"], r["reward"], r["failure"], r["stands"]) for r in run["rows"]] == [
        ("t-1", 0, 1.0, None, True),
        ("t-2", 0, None, "environment", False),
        ("t-2", 1, 1.0, None, True),
    ]
    for number, trajectory in enumerate(given):
        record = found.json(f"t{number}")
        assert len(record["steps"]) == len(trajectory.steps)
        for its, step in zip(record["steps"], trajectory.steps, strict=True):
            assert its["response"] == step.response
            assert its["tokens"] == list(step.response_token_ids)
            assert its["logprobs"] == pytest.approx(list(step.response_logprobs or ()), abs=1e-4)
            assert its["promptTokens"] == len(step.prompt_token_ids)
            assert record["images"][its["screenshot"]][0] == step.screenshot.sha256  # type: ignore[union-attr]
            assert [record["messages"][n]["role"] for n in its["messages"]] == [m["role"] for m in step.messages]
    assert found.json("t1")["failure"]["type"] == "EnvironmentTimeoutError"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_model_or_an_environment_ends_a_script_or_is_changed(tmp_path: Path, text: str) -> None:
    step = Step(0, text=text, response=text, thought=text, parse_error=text, messages=[{"role": text, "content": text}])
    step = dataclasses.replace(step, actions=(Type(text), Custom(text, {text: [text]})), info={text: text}, model=text)
    failure = dataclasses.replace(sample_failure(), message=text, details=text, stage=text, error_type=text)
    one = bare(step, task=text, instruction=text, info={text: text}, data={text: text}, failure=failure)
    plain = bare(Step(0), task="plain")
    found = Page(write_html([one], tmp_path / "a.html", title=text))
    assert [a for a, _ in found.scripts] == [a for a, _ in Page(write_html([plain], tmp_path / "b.html")).scripts]
    record = found.json("t0")
    its = record["steps"][0]
    assert [its["text"], its["response"], its["thought"], its["parseError"], its["modelName"]] == [text] * 5
    assert its["info"] == record["info"] == record["task"]["data"] == {text: text}
    assert its["actions"][0]["fields"]["text"] == text
    assert record["messages"] == [{"role": text, "content": text}]
    assert (record["failure"]["message"], record["failure"]["details"]) == (text, text)
    assert found.json("run")["title"] == found.json("run")["rows"][0]["task"] == text


def test_what_json_cannot_hold_is_written_in_words(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested]
    info: dict[Any, Any] = {"big": 2**63, "set": {1}, "nested": nested, 5: b"bytes"}
    step = Step(
        0,
        response_token_ids=(1, 2, 3, 4),
        response_logprobs=(float("nan"), float("-inf"), -0.25, float("inf")),
        info=info,
        actions=(Custom("x", {"y": b"bytes"}), Click(float("nan"), 1.0)),
    )
    record = Page(write_html([bare(step, reward=float("nan"))], tmp_path / "a.html")).json("t0")
    its = record["steps"][0]
    assert its["logprobs"] == ["NaN", "-Infinity", -0.25, "Infinity"]
    assert its["info"]["big"] == str(2**63)
    assert its["info"]["set"] == "{1}"
    assert its["info"]["5"] == "b'bytes'"
    assert "Custom" in its["actions"][0]["said"]
    assert "Click" in its["actions"][1]["said"]
    assert Page(tmp_path / "a.html").json("run")["rows"][0]["reward"] == "NaN"


def test_a_long_text_is_cut_and_the_page_says_so(tmp_path: Path) -> None:
    found = Page(write_html([bare(Step(0, text="x" * (MOST_CHARACTERS + 1234)))], tmp_path / "a.html"))
    text = found.json("t0")["steps"][0]["text"]
    assert text.startswith("x" * MOST_CHARACTERS + "\n")
    assert "1,234 more characters" in text


def test_a_message_that_was_sent_with_every_step_stands_once(tmp_path: Path) -> None:
    def messages(n: int) -> list[dict[str, Any]]:  # equal ones, not the same objects
        return [{"role": "user", "content": f"m{each} " + "x" * 1000} for each in range(n)]

    steps = [Step(n, messages=messages(n + 1)) for n in range(40)]
    written = write_html([bare(*steps)], tmp_path / "a.html")
    assert len(Page(written).json("t0")["messages"]) == 40
    assert written.path.stat().st_size < 150_000  # 820 messages of 1 kB were sent


def test_an_image_is_in_the_file_once_whatever_shows_it(tmp_path: Path, images: ImageStore) -> None:
    one = sample_trajectory(images)
    found = Page(write_html([one, dataclasses.replace(one, rollout=1)], tmp_path / "a.html", images=images))
    wanted = {step.screenshot.sha256 for step in one.steps if step.screenshot} | {one.final_screenshot.sha256}  # type: ignore[union-attr]
    assert found.images == wanted
    assert len(wanted) == 4


def test_images_beyond_the_bound_are_all_beside_the_file_and_it_is_said(tmp_path: Path, images: ImageStore) -> None:
    one = sample_trajectory(images)
    refs = {ref.sha256: ref for ref in [*(step.screenshot for step in one.steps), one.final_screenshot] if ref}
    inside = sum(-(-len(images.read(ref)) // 3) * 4 for ref in refs.values())
    out = tmp_path / "my run#1.html"
    assert write_html([one], out, images=images, max_bytes=inside).files is None
    written = write_html([one], out, images=images, max_bytes=inside - 1)
    assert written.files == tmp_path / "my run#1_files"
    assert str(written.files) in str(written)
    assert {each.name for each in written.files.iterdir()} == {f"{sha256}.png" for sha256 in refs}
    for ref in refs.values():
        assert (written.files / f"{ref.sha256}.png").read_bytes() == images.read(ref)
    assert Page(written).images == set()
    assert Page(written).json("run")["folder"] == "my run#1_files"
    torn = written.files / f"{next(iter(refs))}.png"
    torn.write_bytes(torn.read_bytes()[:10])
    write_html([one], out, images=images, max_bytes=0)
    assert torn.read_bytes() == images.read(next(iter(refs.values())))


def test_an_image_that_is_gone_costs_that_image_only(tmp_path: Path, images: ImageStore) -> None:
    one = sample_trajectory(images)
    gone = one.steps[1].screenshot
    assert gone is not None
    images.path(gone).unlink()
    for max_bytes in (MAX_BYTES, 0):
        written = write_html([one], tmp_path / "a.html", images=images, max_bytes=max_bytes)
        assert set(written.missing) == {gone.sha256}
        assert gone.sha256[:12] in str(written)
        assert written.images == 3
        assert list(Page(written).json("run")["missing"]) == [gone.sha256]


def test_a_hash_that_is_a_path_names_no_file(tmp_path: Path) -> None:
    ref = ImageRef("../../evil", "image/png", 10, 10)
    (tmp_path / "in").mkdir()
    written = write_html(
        [bare(Step(0, screenshot=ref))], tmp_path / "in" / "a.html", images=lambda _: b"x", max_bytes=0
    )
    assert "../../evil" in written.missing
    assert {each.name for each in tmp_path.rglob("*")} <= {"in", "a.html", "a_files"}


def test_a_function_may_read_the_images(tmp_path: Path, images: ImageStore) -> None:
    asked: list[ImageRef] = []

    def read(ref: ImageRef) -> bytes:
        asked.append(ref)
        return images.read(ref)

    assert write_html([sample_trajectory(images)], tmp_path / "a.html", images=read).images == 4
    assert len(asked) == 4


def test_a_run_that_breaks_off_leaves_the_old_page_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    write_html([bare(Step(0))], out)
    before = out.read_bytes()

    def breaking() -> Iterator[Trajectory]:
        yield bare(Step(0))
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_html(breaking(), out)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


WITHOUT_ROOM = """
import resource, sys
from managed_vllm.agent.types import Step, Task, Trajectory
from managed_vllm.agent.viewer import write_html
from managed_vllm.errors import ManagedVLLMError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # Python ignores SIGXFSZ: it is an OSError
try:
    write_html([Trajectory(Task("t"), n, steps=(Step(0, response="x" * 15_000),)) for n in range(5)], sys.argv[1])
except ManagedVLLMError as error:
    print(error)
"""


def test_a_disk_that_is_full_is_an_error_with_the_file_and_leaves_the_old_page(tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    write_html([bare(Step(0))], out)
    before = out.read_bytes()
    done = subprocess.run([sys.executable, "-c", WITHOUT_ROOM, out], capture_output=True, text=True)
    assert str(out) in done.stdout, done.stderr
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_written_stands_for_its_path(tmp_path: Path) -> None:
    written = write_html(iter([bare(Step(0))]), str(tmp_path / "a.html"))
    assert isinstance(written, WrittenPage)
    assert Path(written) == written.path == tmp_path / "a.html"
    with open(written) as file:
        assert file.read(15) == "<!doctype html>"
    assert [row.task for row in written.rows] == ["t"]


def test_wrong_arguments_are_told_before_anything_is_written(
    tmp_path: Path, images: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [sample_trajectory(images)]
    wrong: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path, {}, "is a folder"),
        (tmp_path / "none" / "a.html", {}, "no folder"),
        (tmp_path / "a.html", {}, "give the ImageStore"),
        (tmp_path / "a.html", {"images": 5}, "not int"),
        (tmp_path / "a.html", {"images": images, "max_bytes": -1}, "max_bytes"),
        (tmp_path / "a.html", {"images": images, "success_at": float("nan")}, "success_at"),
    ]
    for out, options, told in wrong:
        with pytest.raises(ConfigError, match=told):
            write_html(one, out, **options)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'managed-vllm\[agent\]'"):
        write_html(one, tmp_path / "a.html", images=images)
    assert [each.name for each in tmp_path.iterdir()] == ["images"]


def test_neither_script_nor_style_could_end_its_element() -> None:
    home = Path(page.__file__).parent
    for name in ("viewer.js", "viewer.css"):
        text = (home / name).read_text(encoding="utf-8").lower()
        assert not re.search(r"</s(cript|tyle)|<!--|https?://(?!www\.w3\.org/2000/svg)", text), name


def test_importing_the_viewer_loads_nothing_heavy() -> None:
    code = "import sys, managed_vllm.agent.viewer, managed_vllm.agent.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jinja2", "rich", "PIL", "numpy", "selenium"} & set(loaded)


# -- the summary -------------------------------------------------------------------------------------------------------


def printed(table: Any, width: int = 160) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_attempts_that_stand_are_those_of_the_store(tmp_path: Path) -> None:
    for seed in range(12):
        draw = random.Random(seed)
        with RunStore.create(tmp_path / str(seed)) as store:
            for _ in range(14):
                failure = sample_failure() if draw.random() < 0.4 else None
                at = {"rollout": draw.randrange(2), "attempt": draw.randrange(3), "group_round": draw.randrange(2)}
                reward = None if failure else draw.random()
                stop = draw.choice([StopReason.FINISHED, StopReason.CANCELLED])
                its = bare(task=draw.choice("ab"), failure=failure, reward=reward, stop_reason=stop, **at)
                store.append(dataclasses.replace(its, started_at=draw.random()))
            stand = sorted(row.started_at for row in rows(store) if row.stands)
            assert stand == sorted(entry.started_at for entry in store.counting())
            counting = [row.reward for row in rows(store) if row.counts and row.reward is not None]
            assert store.summary().mean_reward == (pytest.approx(sum(counting) / len(counting)) if counting else None)


def test_the_summary_says_for_each_kind_what_came_out() -> None:
    run = [
        bare(Step(0), Step(1), task="a1", data={"kind": "click"}, reward=1.0),
        bare(Step(0), task="a2", data={"kind": "click"}, reward=0.25),
        bare(task="a3", data={"kind": "type"}, failure=sample_failure(), stop_reason=StopReason.ENV_FAILURE),
        bare(task="a3", data={"kind": "type"}, failure=sample_failure(FailureClass.PARSER), attempt=1),
        bare(task="a4", data={"kind": "type"}, rollout=1, stop_reason=StopReason.CANCELLED),
        bare(Step(0), task="no-kind", reward=None),
    ]
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed(summary_table(run, title="T")).splitlines()]
    lines = [line for line in lines if line[0] in ("click", "type", "no-kind", "all")]
    assert lines == [
        ["click", "2", "50.0%", "0.625", "1.5", "0.0"],
        ["type", "0 of 2", "–", "–", "–", "–", "1 environment, 1 parser, 1 cancelled"],
        ["no-kind", "1", "–", "–", "1.0", "0.0", "1 without a reward"],
        ["all", "3 of 5", "50.0%", "0.625", "1.3", "0.0", "1 environment, 1 parser, 1 cancelled, 1 without a reward"],
    ]
    assert "100.0%" in printed(summary_table(run, by="task", success_at=0.25))
    assert "mine" in printed(summary_table(run, by=lambda row: "mine"))
    assert printed(summary_table([Row.of(each) for each in run])) == printed(summary_table(run))
    for wrong in ({"by": "colour"}, {"max_rows": 0}):
        with pytest.raises(ConfigError):
            summary_table(run, **wrong)


def test_lines_of_the_summary_beyond_the_bound_are_one_more_line() -> None:
    run = [bare(task=f"task-{n:02}", reward=float(n >= 3)) for n in range(10)]
    text = printed(summary_table(run, max_rows=3))
    assert "task-02" in text
    assert "task-03" not in text
    assert re.search(r"… 7 more\s+7\s+100\.0%", text)
    assert "task-03" in printed(summary_table(run[:4], max_rows=3))  # one more line is as long as that one
    assert "all" not in printed(summary_table(run[:1]))
    printed(summary_table([]))


def test_names_of_tasks_do_nothing_to_the_terminal() -> None:
    text = printed(summary_table([bare(task="[red]x[/nothing]\x1b[2J\n\ud800", reward=1.0), bare(task="b")]))
    assert r"[red]x[/nothing]\x1b[2J\n\ud800" in text
    assert "\x1b" not in text


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "monday"
    with RunStore.create(folder) as store:
        for n in range(3):
            failure = sample_failure() if n == 2 else None
            store.append(sample_trajectory(store.images, task_id=f"t-{n}", reward=1.0, failure=failure))
    return folder


def cli(*words: str | os.PathLike[str], **env: str | None) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    command = [sys.executable, "-m", "managed_vllm.cli", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_view_writes_the_page_into_the_run_and_sums_it_up(run_folder: Path) -> None:
    done = cli("view", run_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "monday" in done.stdout
    assert "1 environment" in done.stdout
    assert f"{run_folder / 'view.html'}: 3 attempts" in done.stdout
    assert len(Page(run_folder / "view.html").json("run")["rows"]) == 3
    RunStore.open(run_folder).close()  # what is beside a run's files does not matter to it


def test_view_takes_the_words_for_file_title_and_bounds(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    words = ["--out", str(out), "--title", "My run", "--max-mb", "0", "--success-at", "2", "--by", "task"]
    done = cli("view", run_folder, *words)
    assert done.returncode == 0, done.stderr
    assert "out_files" in done.stdout
    assert "t-1" in done.stdout
    assert " 0.0%" in done.stdout
    assert (Page(out).json("run")["title"], Page(out).json("run")["successAt"]) == ("My run", 2)
    assert not (run_folder / "view.html").exists()


def test_view_shows_a_run_that_is_being_written(run_folder: Path) -> None:
    with RunStore.create(run_folder) as store:
        assert cli("view", run_folder).returncode == 0
        store.append(sample_trajectory(store.images, task_id="t-9"))
    assert cli("view", run_folder).returncode == 0
    assert len(Page(run_folder / "view.html").json("run")["rows"]) == 4


def test_view_opens_the_page_in_the_browser_or_says_that_there_is_none(run_folder: Path, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {tmp_path}/asked\n')
    browser.chmod(0o755)
    done = cli("view", run_folder, "--open", BROWSER=f"{browser} %s")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text() == (run_folder / "view.html").as_uri()
    done = cli("view", run_folder, "--open", BROWSER=None, PATH=str(tmp_path / "empty"), DISPLAY=None)
    assert done.returncode == 1
    assert "no browser" in done.stderr


def test_view_says_what_is_damaged(run_folder: Path) -> None:
    lines = (run_folder / "trajectories.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"Thought", b"Thinner", 1)
    (run_folder / "trajectories.jsonl").write_bytes(b"".join(lines))
    done = cli("view", run_folder)
    assert done.returncode == 0, done.stderr
    assert "1 damaged records are left out" in done.stdout
    run = Page(run_folder / "view.html").json("run")
    assert (len(run["rows"]), len(run["damaged"])) == (2, 1)


def test_view_fails_with_1_for_what_is_no_run_and_with_2_for_wrong_words(run_folder: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path, Path(__file__)):
        done = cli("view", folder)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr.startswith("error: ")
        assert str(folder) in done.stderr
    run = str(run_folder)
    for words in ([run, "--out", str(tmp_path)], [run, "--max-mb", "x"], [], [run, "--by", "colour"]):
        assert cli("view", *words).returncode == 2, words


def test_the_defaults_of_the_command_are_those_of_the_function() -> None:
    from managed_vllm.cli.arguments import build_parser

    given = build_parser().parse_args(["view", "x"])
    assert (given.success_at, given.max_mb * 10**6) == (SUCCESS_AT, MAX_BYTES)


def test_export_writes_the_run_for_a_trainer_and_says_what_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    done = cli("export", run_folder, "--to", "verl", "--out", tmp_path / "verl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 trajectories as 6 samples for verl" in done.stdout
    assert "left out: 1 failed: environment" in done.stdout
    assert len((tmp_path / "verl" / "samples.jsonl").read_text().splitlines()) == 6
    words = ["--to", "skyrl", "--per", "trajectory", "--no-logprobs", "--out", str(tmp_path / "skyrl")]
    done = cli("export", run_folder, *words)
    assert "2 trajectories as 2 samples for skyrl" in done.stdout, done.stderr
    done = cli("export", run_folder, "--to", "atif", "--include", "all", "--out", tmp_path / "atif")
    assert "3 trajectories as 3 samples for atif" in done.stdout, done.stderr
    assert "left out" not in done.stdout


def test_export_fails_with_1_for_what_is_not_there_and_with_2_for_wrong_words(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder, words, told in [
        (tmp_path / "nowhere", ["--to", "verl"], "nowhere"),
        (run_folder, ["--to", "verl", "--include", "all"], "ATIF"),
        (run_folder, ["--to", "atif", "--per", "trajectory"], "per="),
    ]:
        done = cli("export", folder, *words, "--out", out)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr.startswith("error: ")
        assert told in done.stderr
        assert not out.exists()
    done = cli("export", run_folder, "--to", "verl", "--out", run_folder)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    for wrong in (["--to", "csv", "--out", out], ["--to", "verl"], ["--out", out]):
        assert cli("export", run_folder, *wrong).returncode == 2, wrong


def test_export_of_nothing_is_a_failure(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run") as store:
        store.append(bare(failure=sample_failure(), stop_reason=StopReason.ENV_FAILURE))
    done = cli("export", tmp_path / "run", "--to", "verl", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "left out: 1 failed: environment" in done.stdout
    assert "nothing of this run" in done.stderr


# -- in Chromium -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, images: ImageStore) -> WrittenPage:
    """Eight attempts at six rollouts."""
    run = []
    for n in range(6):
        if n in (2, 4):
            failure = sample_failure(FailureClass.ENVIRONMENT if n == 2 else FailureClass.PARSER)
            run.append(sample_trajectory(images, task_id=f"task-{n}", failure=failure))
        run.append(sample_trajectory(images, task_id=f"task-{n}", attempt=int(n in (2, 4)), reward=n / 5, steps=n + 1))
    return write_html(run, tmp_path / "small.html", images=images, title="Small")


def test_the_list_shows_all_attempts_and_sums_up_what_it_shows(browser: Browser, small: WrittenPage) -> None:
    browser.open(small)
    assert browser.driver.title == "Small"
    assert browser.tasks() == [f"task-{n}" for n in (0, 1, 2, 2, 3, 4, 4, 5)]
    assert [browser.tile(name) for name in ("attempts", "rollouts", "that count")] == ["8", "6", "6"]
    assert (browser.tile("success"), browser.tile("mean reward")) == ("50.0 % (3/6)", "0.5")
    assert browser.tile("failures") == "1 environment1 parser"
    assert "EnvironmentTimeoutError" in browser.texts("#body tr[data-at='2']")[0]
    assert browser.js("return performance.getEntriesByType('resource').length") == 0


def test_the_list_is_filtered_by_text_reason_reward_and_failure(browser: Browser, small: WrittenPage) -> None:
    browser.open(small)
    for field, value, tasks in [
        ("f-text", "task-3", "3"),
        ("f-text", "TIMEOUT step", "2"),
        ("f-text", "nothing like it", ""),
        ("f-stop", "env_failure", "2"),
        ("f-reward", "success", "345"),
        ("f-reward", "below", "012"),
        ("f-reward", "none", "24"),
        ("f-from", "0.4", "2345"),
        ("f-to", "0.2", "01"),
        ("f-failure", "parser", "4"),
        ("f-failure", "-", "012345"),
        ("f-failure", "+", "24"),
    ]:
        browser.set(field, value)
        assert browser.tasks() == [f"task-{n}" for n in tasks], (field, value)
        assert browser.tile("attempts") == f"{len(tasks)} of 8"
        assert browser.js("return document.getElementById('none').hidden") == bool(tasks)
        browser.set(field, "")
    browser.click("#f-stands")
    assert browser.tasks() == [f"task-{n}" for n in range(6)]
    browser.set("f-reward", "below")
    browser.click("#filters button")
    eventually(lambda: len(browser.tasks()) == 8, "the filters are cleared")


def test_the_list_is_sorted_by_any_column_with_what_has_no_value_last(browser: Browser, small: WrittenPage) -> None:
    browser.open(small)
    original = browser.tasks()
    heads = browser.js("return [...document.querySelectorAll('#heads th')].map((each) => each.id)")
    assert len(heads) == 10
    for head in heads:
        orders = []
        for sorting in ("ascending", "descending"):
            browser.click(f"#{head} button")
            assert browser.js("return document.getElementById(arguments[0]).ariaSort", head) == sorting
            assert sorted(browser.tasks()) == sorted(original)
            orders.append(browser.texts("#body tr[data-at]"))
        if head in ("h-task", "h-reward", "h-steps", "h-started", "h-tokens"):
            assert orders[0] != orders[1], head
        browser.click(f"#{head} button")
        assert browser.tasks() == original
    browser.click("#h-reward button")
    assert browser.tasks()[:6] == [f"task-{n}" for n in range(6)]
    browser.click("#h-reward button")
    assert browser.tasks()[:6] == [f"task-{n}" for n in (5, 4, 3, 2, 1, 0)]
    assert set(browser.tasks()[6:]) == {"task-2", "task-4"}


def test_keys_lead_through_steps_and_trajectories_and_back(browser: Browser, small: WrittenPage) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(small)
    browser.press("j", "j", "k", Keys.ENTER)
    browser.until("return !document.getElementById('trajectory').hidden")
    assert browser.fragment == "#task-1/0/0.0"
    assert browser.step == "0"
    for key, step in [("j", "1"), (Keys.ARROW_RIGHT, "2"), ("j", "2"), ("k", "1"), (Keys.ARROW_LEFT, "0"), ("k", "0")]:
        browser.press(key)
        assert browser.step == step, key
    browser.press(Keys.END)
    assert browser.fragment == "#task-1/0/0.0/end"
    assert "final screenshot" in browser.js("return document.querySelector('#shot img').alt")
    browser.press("n")
    assert browser.fragment == "#task-2/0/0.0"
    assert "EnvironmentTimeoutError" in browser.texts("#about .failure")[0]
    browser.press("n")
    assert browser.fragment == "#task-2/0/0.1"
    assert browser.texts("#about .failure") == []
    browser.press("p", "p")
    assert browser.fragment == "#task-1/0/0.0"
    browser.press(Keys.ESCAPE)
    browser.until("return !document.getElementById('list').hidden")
    assert browser.js("return document.querySelector('tr.chosen a').textContent") == "task-1"
    browser.driver.back()
    browser.until("return document.getElementById('list').hidden")
    assert browser.fragment == "#task-1/0/0.0"
    browser.press(Keys.ESCAPE)
    browser.until("return !document.getElementById('list').hidden")
    browser.press("/", "task-5 njp")  # in a field they are letters
    assert browser.js("return document.getElementById('f-text').value") == "task-5 njp"


def test_a_link_leads_to_a_step(browser: Browser, small: WrittenPage) -> None:
    browser.open(small, "#task-3/0/0.0/2")
    assert browser.step == "2"
    assert browser.texts("#about h1") == ["task-3"]
    browser.open(small, "#task-2/0/0.1/end")
    assert (browser.step, browser.texts("#about h1")) == ("3", ["task-2"])
    for nowhere in ("#task-99/0/0.0", "#%E0%A4%A", "#/", "#task-3/0/0.0/9999"):
        browser.open(small, nowhere)
    assert browser.step == "4"  # beyond the end is the end


@pytest.mark.parametrize(("size", "ratio"), [((320, 180), 1.0), ((1920, 1080), 1.0), ((160, 210), 2.0)])
def test_marks_are_where_the_actions_went_at_any_scale(
    browser: Browser, tmp_path: Path, images: ImageStore, size: tuple[int, int], ratio: float
) -> None:
    width, height = size
    base = sample_trajectory(images, size=size, steps=2)
    draw = random.Random(1)
    points = [(float(draw.randrange(width)), draw.random() * height) for _ in range(3)]
    (x0, y0), (x1, y1), (x2, y2) = points
    actions = (Click(x0, y0), Drag(x1, y1, x2, y2), Scroll(Direction.UP, x1, y1), Click(0.0, 0.0, clicks=2), Wait())
    step = dataclasses.replace(base.steps[0], actions=actions, executed=2)
    one = dataclasses.replace(base, steps=(step, base.steps[1]))
    written = write_html([one], tmp_path / "a.html", images=images)
    metrics = {"width": 1400, "height": 1000, "deviceScaleFactor": ratio, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.open(written, "#t-1/0/0.0/0")
        for frame in ("#shot", "#strip li:first-child .frame"):
            browser.until("const i = document.querySelector(arguments[0] + ' img'); return i && i.naturalWidth", frame)
            left, top, shown_width, shown_height = browser.box(f"{frame} img")
            assert shown_width / shown_height == pytest.approx(width / height, rel=0.03)
            for selector, (x, y) in [
                ("[data-mark='0'] .dot", points[0]),
                ("[data-mark='1'] .dot", points[1]),
                ("[data-mark='2'] .ring", points[1]),
                ("[data-mark='3'] .dot", (0.0, 0.0)),
            ]:
                where = browser.middle(f"{frame} {selector}")
                wanted = (left + x / width * shown_width, top + y / height * shown_height)
                assert where == pytest.approx(wanted, abs=1.0), (frame, selector)
            # The tip of an arrow: the end of its shaft.
            line = browser.js(
                "const l = document.querySelector(arguments[0] + ' line.shaft'), m = l.getScreenCTM();"
                "const at = (x, y) => { const p = new DOMPoint(x, y).matrixTransform(m); return [p.x, p.y]; };"
                "return at(l.x2.baseVal.value, l.y2.baseVal.value)",
                frame,
            )
            wanted = (left + x2 / width * shown_width, top + y2 / height * shown_height)
            assert line == pytest.approx(wanted, abs=1.0)
        executed = browser.js("return [...document.querySelectorAll('#shot .mark')].map((m) => m.matches('.undone'))")
        assert executed == [False, False, True, True]
        assert len(browser.texts("#stage .badge")) == 5
        assert "not executed" in browser.texts("#stage .badge")[4]
        if width == 1920:  # at its actual size, after a click on it
            browser.click("#shot")
            left, top, shown_width, shown_height = browser.box("#shot img")
            assert (shown_width, shown_height) == pytest.approx((1920, 1080), abs=0.5)
            wanted = (left + x0, top + y0)
            assert browser.middle("#shot [data-mark='0'] .dot") == pytest.approx(wanted, abs=1.0)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_mark_stays_in_its_place_when_the_window_changes(browser: Browser, small: WrittenPage) -> None:
    browser.open(small, "#task-5/0/0.0/0")
    record = Page(small).json("t7")
    action, (_, _, width, height) = record["steps"][0]["actions"][0]["fields"], record["images"][0]
    seen = set()
    try:
        for window in (1400, 1000, 700):
            metrics = {"width": window, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

            def right() -> bool:
                left, top, shown_width, shown_height = browser.box("#shot img")
                wanted = (left + action["x"] / width * shown_width, top + action["y"] / height * shown_height)
                fits = shown_width < browser.box("#stage")[2] and browser.box("#shot")[2] not in seen
                return fits and browser.middle("#shot .dot") == pytest.approx(wanted, abs=1.0)

            eventually(right, f"another size, with the mark in its place, at {window}")
            seen.add(browser.box("#shot")[2])
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_step_shows_all_that_is_known_of_it(browser: Browser, tmp_path: Path, images: ImageStore) -> None:
    base = sample_trajectory(images, steps=2)
    step = dataclasses.replace(
        base.steps[0],
        actions=(Type("two\nlines", enter=True), Hotkey(("ctrl", "s")), Finished("it is done")),
        executed=3,
        reward=0.5,
        response_logprobs=tuple(-0.5 * n for n in range(len(base.steps[0].response_token_ids))),
        timings=dataclasses.replace(base.steps[0].timings, queue_s=0.1, model_s=0.2, environment_s=0.05, total_s=0.4),
        epoch=7,
        attempts=3,
        weight_version="w-19",
        finish_reason="length",
        truncated=True,
    )
    odd = dataclasses.replace(base.steps[1], actions=(), executed=0, parse_error="no action in it", thought="")
    one = dataclasses.replace(base, steps=(step, odd))
    browser.open(write_html([one], tmp_path / "a.html", images=images), "#t-1/0/0.0/0")
    facts = dict(
        browser.js(
            "return [...document.querySelectorAll('#side tr')].map((r) => [...r.cells].map((c) => c.textContent))"
        )
    )
    count = len(step.response_token_ids)
    assert facts | {"reward": "0.5", "executed": "3 of 3", "finish reason": "length", "truncated": "yes"} == facts
    assert facts | {"epoch": "7", "attempts": "3", "weight version": "w-19", "answer": str(count)} == facts
    assert facts["prompt"] == str(len(step.prompt_token_ids))
    assert float(facts["mean logprob"]) == pytest.approx(-0.5 * (count - 1) / 2)
    assert float(facts["least logprob"]) == pytest.approx(-0.5 * (count - 1))
    cells = browser.js(
        "return [...document.querySelectorAll('.heat i')].map((each) => [each.title, each.style.background])"
    )
    assert [title for title, _ in cells] == [
        f"token {n}: id {token}, logprob {-0.5 * n:g}".replace("-0", "-0" if n else "0")
        for n, token in enumerate(step.response_token_ids)
    ]
    assert len({background for _, background in cells}) > 5
    widths = browser.js(
        "return [...document.querySelectorAll('.times i')].map((each) => each.getBoundingClientRect().width)"
    )
    whole = browser.box(".times")[2]
    assert [width / whole for width in widths] == pytest.approx([0.25, 0.5, 0.125, 0.125], abs=0.01)
    badges = browser.js("return [...document.querySelectorAll('.badge')].map((each) => each.dataset.action)")
    assert badges == ["type", "hotkey", "finished"]
    assert browser.texts("#side .thought")[0] == step.thought
    assert browser.texts("#side .raw")[0] == step.response
    # Messages are made when they are wished for, and stay at the next step.
    assert browser.texts(".message") == []
    browser.click("[data-fold='messages'] summary")
    browser.until("return document.querySelectorAll('.message').length === arguments[0]", len(step.messages))
    browser.press("j")
    assert len(browser.texts(".message")) == len(odd.messages)
    assert len(browser.texts(".message .frame")) == 2
    assert "no action in it" in browser.texts("#side .wrong")[0]
    assert browser.texts("#strip .wrong .caption") == ["1parse error"]


def test_what_is_not_known_is_said_and_nothing_breaks(browser: Browser, tmp_path: Path, images: ImageStore) -> None:
    gone = sample_trajectory(images, task_id="gone")
    assert gone.steps[0].screenshot is not None
    images.path(gone.steps[0].screenshot).unlink()
    odd = Step(
        0,
        screenshot=ImageRef("f" * 64, "image/png", 100, 50),
        actions=(Click(-5.0, 900.0), Custom("own", {"x": 1})),
        response_token_ids=(1, 2),
        response_logprobs=(float("nan"), float("-inf")),
        messages=[{"role": "user", "content": [{"type": "strange", "n": 1}]}, {"tool_calls": []}],
        text="in words",
    )
    run = [bare(), bare(Step(0, text="in words"), task="words"), bare(odd, task="odd"), gone]
    written = write_html(run, tmp_path / "a.html", images=images)
    browser.open(written)
    assert "2 images are missing" in browser.texts("#notes")[0]
    browser.open(written, "#t/0/0.0")
    assert "no final screenshot" in browser.texts("#stage")[0]
    browser.open(written, "#words/0/0.0")
    assert "in words" in browser.texts("#stage pre")[0]
    browser.open(written, "#odd/0/0.0")
    assert "image is missing" in browser.texts("#shot .gone")[0]
    assert "outside of the screenshot" in browser.texts("#stage .badge")[0]
    browser.click("[data-fold='messages'] summary")
    browser.until("return document.querySelectorAll('.message').length === 2")
    browser.open(written, "#gone/0/0.0/0")
    assert "was never put" in browser.texts("#shot .gone")[0]
    browser.open(write_html([], tmp_path / "empty.html"))
    assert "no attempts yet" in browser.texts("#none")[0]


def test_hostile_texts_are_shown_as_they_are_and_do_nothing(
    browser: Browser, tmp_path: Path, images: ImageStore
) -> None:
    base = sample_trajectory(images, steps=1)
    run = []
    for n, text in enumerate(HOSTILE):
        step = dataclasses.replace(base.steps[0], thought=text, response=text, model=text, info={text: text}, text=text)
        step = dataclasses.replace(step, actions=(Type(text),), messages=[{"role": text, "content": text}])
        failure = dataclasses.replace(sample_failure(), message=text, details=text)
        task = Task(f"{n} {text}", text)
        run.append(dataclasses.replace(base, task=task, steps=(step,), failure=failure, reward=None, instruction=text))
    written = write_html(run, tmp_path / "a.html", images=images, title=HOSTILE[0])
    browser.open(written)
    shown = [text.replace("\ud83d,", "\ufffd,").replace("\udc4d", "\ufffd") for text in HOSTILE]
    assert [task[2:] for task in browser.tasks()] == shown
    for n, text in enumerate(shown):
        browser.js("location.hash = document.querySelectorAll('#body a')[arguments[0]].getAttribute('href')", n)
        browser.until("return document.querySelector('#about h1')?.textContent.startsWith(arguments[0])", f"{n} ")
        assert browser.texts("#side .thought")[0] == text
        assert browser.texts("#side .raw")[0] == text
        if n == 0:
            for name in ("messages", "text", "info", "ids"):
                browser.click(f"[data-fold='{name}'] summary")
            browser.until("return document.querySelectorAll('[data-fold][open]').length === 4")
        assert browser.texts(".message pre") == [text]
        browser.press("\ue00c")  # Escape
        browser.until("return !document.getElementById('list').hidden")
    assert browser.js("return window.owned") is None
    assert browser.js("return document.querySelectorAll('img[src=x], #body script, #side script').length") == 0


def test_images_beside_the_file_are_shown(browser: Browser, tmp_path: Path, images: ImageStore) -> None:
    written = write_html([sample_trajectory(images)], tmp_path / "my run#1 %41.html", images=images, max_bytes=0)
    browser.open(written)
    assert "belongs to this file" in browser.texts("#notes")[0]
    browser.open(written, "#t-1/0/0.0/0")
    browser.until("return document.querySelector('#shot img')?.naturalWidth === 320")
    browser.until("return [...document.querySelectorAll('#strip img')].every((each) => each.naturalWidth === 320)")


def test_a_file_that_was_cut_off_shows_what_it_has(browser: Browser, tmp_path: Path, images: ImageStore) -> None:
    run = [sample_trajectory(images, task_id=f"t-{n}") for n in range(3)]
    written = write_html(run, tmp_path / "a.html", images=images)
    text = written.path.read_bytes()
    written.path.write_bytes(text[: text.index(b'id="t1"') + 500])
    browser.open(written)
    assert browser.tasks() == ["t-0", "t-1", "t-2"]
    for n in (1, 2):
        browser.open(written, f"#t-{n}/0/0.0")
        assert "cut off" in browser.texts("#stage")[0]
    browser.open(written, "#t-0/0/0.0")
    assert "cut off" in browser.texts("#shot .gone")[0]


def test_the_list_is_there_before_the_rest_and_a_link_waits_for_its_trajectory(
    browser: Browser, tmp_path: Path, images: ImageStore
) -> None:
    run = [sample_trajectory(images, task_id=f"t-{n}") for n in range(3)]
    text = write_html(run, tmp_path / "a.html", images=images).path.read_bytes()
    cut = text.index(b'id="t1"') + 500
    go_on = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.html" else 204)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            if self.path == "/a.html":
                self.wfile.write(text[:cut])
                self.wfile.flush()
                go_on.wait(4 * HANG_S)
                self.wfile.write(text[cut:])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.go(f"http://127.0.0.1:{server.server_port}/a.html#t-1/0/0.0/2")
            browser.until("return document.getElementById('stage').textContent.includes('is being read')")
            assert browser.js("return document.readyState") == "loading"
            browser.press("\ue00c")  # Escape
            browser.until("return !document.getElementById('list').hidden")
            assert browser.tasks() == ["t-0", "t-1", "t-2"]
            browser.press("k", "k", "\ue007")  # Enter
            browser.until("return document.querySelectorAll('#strip li').length === 4")
            assert browser.texts("#about h1") == ["t-0"]
            assert "is being read" in browser.texts("#shot .gone")[0]
            browser.press("n")
            assert "is being read" in browser.texts("#stage")[0]
            go_on.set()
            browser.until("return document.querySelector('#shot img')?.naturalWidth === 320")
            assert browser.texts("#about h1") == ["t-1"]
        finally:
            go_on.set()
            browser.driver.get("about:blank")
            server.shutdown()
            thread.join(HANG_S)


def test_a_thousand_trajectories_of_fifteen_steps_are_a_list_to_work_with(
    browser: Browser, tmp_path: Path, images: ImageStore
) -> None:
    bases = [sample_trajectory(images, steps=15, seed=seed) for seed in range(4)]

    def run() -> Iterator[Trajectory]:  # never all at once
        for n in range(1000):
            task = Task(f"task-{n // 4:04}", f"Instruction {n}")
            yield dataclasses.replace(bases[n % 4], task=task, rollout=n % 4, reward=n / 1000)

    browser.open(write_html(run(), tmp_path / "big.html", images=images))
    assert browser.tile("attempts") == "1,000"
    count: Callable[[], int] = lambda: browser.js("return document.querySelectorAll('#body tr[data-at]').length")  # noqa: E731
    assert 20 < count() < 80
    assert browser.js("const b = document.getElementById('rows'); return b.scrollHeight") >= 34_000
    browser.js("const b = document.getElementById('rows'); b.scrollTop = b.scrollHeight")
    browser.until("return document.querySelector('tr[data-at=\"999\"]') !== null")
    assert 20 < count() < 80
    assert browser.tasks()[-1] == "task-0249"
    browser.set("f-text", "task-0123")
    assert browser.tasks() == ["task-0123"] * 4  # at once: the filter is not put off
    browser.set("f-text", "")
    browser.click("#h-reward button")
    browser.click("#h-reward button")
    assert browser.tasks()[0] == "task-0249"
    # One trajectory is in the document, the others are text.
    browser.click("#body tr[data-at='0'] a")
    browser.until("return !document.getElementById('trajectory').hidden")
    assert len(browser.texts("#strip li")) == 16
    assert browser.js("return document.querySelectorAll('#trajectory *').length") < 2000
    browser.press("n", "n", "\ue00c")
    browser.until("return !document.getElementById('list').hidden")
    assert browser.js("return document.querySelector('tr.chosen').dataset.at") == "2"


def test_text_can_be_read_in_light_and_in_dark(browser: Browser, small: WrittenPage) -> None:
    script = """
    const light = (colour) => {
      const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const under = (e) => {
      for (; e; e = e.parentElement) {
        const its = getComputedStyle(e).backgroundColor;
        if (!/rgba\\(.*, 0\\)$/.test(its)) return its;
      }
    };
    const worst = [];
    for (const e of document.querySelectorAll('body *')) {
      if (e.closest('svg, script, style, noscript, option, .hidden, :disabled') || !e.offsetParent) continue;
      if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
      const [a, b] = [light(getComputedStyle(e).color), light(under(e))].sort((x, y) => y - x);
      worst.push([(a + 0.05) / (b + 0.05), e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 30)]);
    }
    return worst.sort((x, y) => x[0] - y[0]).slice(0, 3).concat([[worst.length, '']]);
    """
    backs = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for fragment in ("", "#task-2/0/0.0/1"):
            *worst, (many, _) = browser.open(small, fragment).js(script)
            assert many > 20
            assert worst[0][0] >= 4.5, (scheme, fragment, worst)
        backs.add(browser.js("return getComputedStyle(document.body).backgroundColor"))
    assert len(backs) == 2
