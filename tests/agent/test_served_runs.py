"""A run that is served: who may look, what can be read, pages, and a run that grows meanwhile; in Chromium, too."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from agent_samples import sample_failure, sample_trajectory
from browsing import Browser
from processes import HANG_S, eventually

from managed_vllm.agent.report import pass_at
from managed_vllm.agent.rescoring import rescore
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import FailureClass, ImageRef
from managed_vllm.agent.viewer import RunServer, write_html
from managed_vllm.errors import ConfigError

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install jinja2")
pytest.importorskip("PIL", reason="Pillow is not installed: pip install pillow")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunStore]:
    """One that is written here: 6 tasks of 4 rollouts, and a failed attempt at the first rollout of two of them."""
    with RunStore.create(tmp_path / "run") as store:
        for task in range(6):
            for rollout in range(4):
                name: dict[str, Any] = {"task_id": f"task-{task}", "rollout": rollout}
                failed = rollout == 0 and task in (2, 4)
                if failed:
                    failure = sample_failure(FailureClass.ENVIRONMENT if task == 2 else FailureClass.PARSER)
                    store.append(sample_trajectory(store.images, **name, steps=2, failure=failure))
                reward = float(rollout < task)
                store.append(sample_trajectory(store.images, **name, steps=2, attempt=int(failed), reward=reward))
        yield store


@pytest.fixture
def server(run: RunStore) -> Iterator[RunServer]:
    with RunStore.open(run.path) as store, RunServer(store, title="Live") as made:
        yield made


def ask(server: RunServer, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of an answer; the path goes as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port or 0, timeout=HANG_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        kind = answer.headers["Content-Type"]
        return answer.status, json.loads(body) if body and kind == "application/json" else body, dict(answer.headers)
    finally:
        connection.close()


def api(server: RunServer, name: str, **words: Any) -> Any:
    path = f"/api/{name}?{urlencode(words)}"
    status, value, _ = ask(server, path, Authorization=f"Bearer {server.token}")
    assert status in (200, 204), value
    return value


# -- who may look ------------------------------------------------------------------------------------------------------


def test_every_path_wants_the_token(server: RunServer, run: RunStore) -> None:
    image = next(iter(run)).final_screenshot
    assert image is not None
    paths = ["/", "/api/run", "/api/rows", "/api/tasks", "/api/trajectory?number=0", f"/image/{image.sha256}.png", "/x"]
    for path in paths:
        join = "&" if "?" in path else "?"
        for wrong in ("", f"{join}token=", f"{join}token=wrong", f"{join}token={server.token}x"):
            status, value, _ = ask(server, path + wrong)
            assert (status, list(value)) == (401, ["error"]), path
        assert ask(server, path, Authorization="Bearer wrong")[0] == 401
        expected = 404 if path == "/x" else 200
        assert ask(server, f"{path}{join}token={server.token}")[0] == expected
        assert ask(server, path, Authorization=f"Bearer {server.token}")[0] == expected


def test_a_name_of_another_site_that_leads_here_is_refused(server: RunServer) -> None:
    path = f"/?token={server.token}"
    port = urlsplit(server.url).port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example", ""):
        assert ask(server, path, Host=host)[0] == 421, host
    assert ask(server, path, Host=f"localhost:{port}")[0] == 200


def test_nothing_but_the_run_can_be_read(server: RunServer, run: RunStore) -> None:
    secret = run.path.parent / "secret.png"
    secret.write_bytes(b"secret")
    inside = ImageRef("0" * 64, "image/png", 1, 1)
    link = run.images.path(inside)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    for path in (
        "/image/../../secret.png",
        "/image/..%2f..%2fsecret.png",
        "/../secret.png",
        "//run.json",
        "/run.json",
        f"/image/{'0' * 64}.png",
        f"/image/{'0' * 64}.json",
        f"/image/{'g' * 64}.png",
        "/api/trajectory?number=-1",
        "/api/trajectory?number=999",
        "/api/trajectory?number=../0",
        "/api/rows?offset=x",
    ):
        status, value, _ = ask(server, path, Authorization=f"Bearer {server.token}")
        assert status in (400, 404), path
        assert "secret" not in json.dumps(value).replace("secret.png", ""), path


def test_it_is_only_looked_at(server: RunServer) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(server, f"/?token={server.token}", method)[0] == 405
    status, body, _ = ask(server, f"/?token={server.token}", "HEAD")
    assert (status, body) == (200, b"")


def test_the_page_lets_only_its_own_script_run_and_is_in_no_frame(server: RunServer) -> None:
    _, body, headers = ask(server, f"/?token={server.token}")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert (headers["X-Frame-Options"], headers["Referrer-Policy"]) == ("DENY", "no-referrer")
    assert server.token.encode() not in body


def test_a_port_that_is_taken_is_told(server: RunServer, run: RunStore) -> None:
    with RunStore.open(run.path) as store, pytest.raises(ConfigError, match="can't be listened on"):
        RunServer(store, port=urlsplit(server.url).port or 0)


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_follow_each_other_without_a_gap(server: RunServer) -> None:
    rows: list[dict[str, Any]] = []
    while part := api(server, "rows", offset=len(rows), limit=7)["rows"]:
        assert len(part) <= 7
        rows += part
    assert [row["number"] for row in rows] == list(range(26))
    assert rows[8]["why"].startswith("environment")
    assert [rows[8]["stands"], rows[9]["stands"], rows[9]["attempt"]] == [False, True, 1]
    assert rows[0]["instruction"].startswith("Click")


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ({"text": "task-3"}, 4),
        ({"text": '"task-3"'}, 4),
        ({"text": '"task-"'}, 0),
        ({"text": "TASK-2 environment"}, 1),
        ({"stop": "finished"}, 24),
        ({"failure": "parser"}, 1),
        ({"failure": "+"}, 2),
        ({"failure": "-"}, 24),
        ({"reward": "success"}, 14),
        ({"reward": "below"}, 10),
        ({"reward": "none"}, 2),
        ({"from": "0.5"}, 14),
        ({"to": "0.5"}, 10),
        ({"stands": "true"}, 24),
    ],
)
def test_rows_are_filtered_and_summed_up(server: RunServer, words: dict[str, str], length: int) -> None:
    found = api(server, "rows", **words)
    assert (found["length"], len(found["rows"]), found["total"]) == (length, length, 26)
    assert found["summary"]["attempts"] == length


@pytest.mark.parametrize("column", ["task", "rollout", "attempt", "reward", "stop", "failure", "steps", "started"])
def test_rows_are_sorted_with_what_has_no_value_last(server: RunServer, column: str) -> None:
    up, down = (
        [row["number"] for row in api(server, "rows", sort=column, down=word)["rows"]] for word in ("false", "true")
    )
    assert sorted(up) == sorted(down) == list(range(26))
    if column == "reward":
        assert set(up[-2:]) == set(down[-2:]) == {8, 17}


def test_a_task_has_its_group_with_spread_and_pass_at_k(server: RunServer) -> None:
    found = api(server, "tasks", sort="spread", down="true")
    assert found["length"] == 6
    first = found["rows"][0]
    assert (first["task"], first["rollouts"], first["successes"], first["spread"]) == ("task-2", 4, 2, 0.5)
    assert (first["rewards"], first["failures"]) == ([1.0, 1.0, 0.0, 0.0], 1)
    assert found["passes"][0] == [1, pytest.approx(14 / 24)]
    assert found["passes"][-1] == [4, pytest.approx(5 / 6)]


def test_pass_at_k_is_the_chance_of_a_success_among_k_of_them() -> None:
    assert pass_at([]) == []
    assert pass_at([(4, 1)]) == [(1, 0.25), (2, 0.5), (4, 1.0)]
    assert pass_at([(3, 0), (3, 3), (1, 1)]) == [(1, pytest.approx(2 / 3)), (2, 0.5), (3, 0.5)]


def test_a_trajectory_and_its_images_come_by_number_and_hash(server: RunServer, run: RunStore) -> None:
    record = api(server, "trajectory", number=3)
    assert record["task"]["id"] == "task-0"
    sha256, mime, width, _ = record["images"][record["steps"][0]["screenshot"]]
    status, data, headers = ask(server, f"/image/{sha256}.png?token={server.token}")
    assert (status, headers["Content-Type"], data[:4], width) == (200, mime, b"\x89PNG", 320)
    assert data == run.images.read(ImageRef(sha256, mime, 0, 0))


def test_a_run_that_grows_is_seen_and_one_that_does_not_costs_nothing(server: RunServer, run: RunStore) -> None:
    found = api(server, "rows", limit=1)
    assert api(server, "rows", since=found["version"]) == b""
    run.append(sample_trajectory(run.images, task_id="task-9", steps=1))
    grown = eventually(lambda: api(server, "rows", since=found["version"]), "the new attempt is seen")
    assert grown["total"] == 27
    assert api(server, "row", of="task-9", rollout=0, round=0, attempt=0)["row"]["at"] == 26
    assert api(server, "row", of="task-10", rollout=0, round=0, attempt=0) == {"row": None}


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[RunStore]:
    """Another run: one of the tasks, and one of its own, of two rollouts each."""
    with RunStore.create(tmp_path / "earlier") as store:
        for rollout in range(2):
            store.append(sample_trajectory(store.images, task_id="task-3", rollout=rollout, steps=1, reward=0.0))
            store.append(sample_trajectory(store.images, task_id="gone", rollout=rollout, steps=1))
        yield store


def test_two_runs_are_compared_task_by_task(run: RunStore, earlier: RunStore) -> None:
    with RunStore.open(run.path) as store, RunServer(store, against=earlier) as server:
        found = api(server, "tasks", sort="change", down="true")
    first = found["rows"][0]
    assert (first["task"], first["change"], first["other"]["rewarded"]) == ("task-3", 0.75, 2)
    assert [row["other"] for row in found["rows"][1:]] == [None] * 5
    assert (found["length"], found["common"]) == (6, 1)
    assert (found["passes"][0], found["others"][0]) == ([1, 0.75], [1, 0.0])


def test_a_score_is_served_in_the_rewards_place(run: RunStore) -> None:
    rescore(run, lambda trajectory: trajectory.rollout / 4, name="quarters")
    with (
        RunStore.open(run.path, score="quarters") as store,
        RunStore.open(run.path) as recorded,
        RunServer(store, against=recorded) as server,
    ):
        rows = api(server, "rows", stands="true")["rows"]
        tasks = api(server, "tasks")["rows"]
        info = api(server, "trajectory", number=rows[-1]["number"])["info"]
    assert [row["reward"] for row in rows] == [0.0, 0.25, 0.5, 0.75] * 6
    assert [row["change"] for row in tasks] == [0.375 - min(task, 4) / 4 for task in range(6)]
    assert info["score"] == {"by": "quarters", "before": 1}


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_ctrl_c_and_leaves_nothing(run: RunStore) -> None:
    before = sorted(str(each.relative_to(run.path)) for each in run.path.rglob("*"))
    words = [sys.executable, "-m", "managed_vllm.cli", "view", str(run.path), "--serve"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert "serving 26 attempts at http://127.0.0.1:" in said
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert sorted(str(each.relative_to(run.path)) for each in run.path.rglob("*")) == before
    assert os.getpid() != process.pid


# -- in Chromium -------------------------------------------------------------------------------------------------------


@pytest.fixture
def looking(browser: Browser, server: RunServer) -> Iterator[Browser]:
    """A browser that has left the page when its server ends: it would go on asking, and complain."""
    yield browser
    browser.driver.get("about:blank")
    browser.until("return location.href === 'about:blank'")


def test_a_live_run_is_listed_filtered_and_opened(looking: Browser, server: RunServer, run: RunStore) -> None:
    looking.go(server.url)
    looking.until("return document.querySelectorAll('#body tr[data-at] a').length === 26")
    assert looking.tile("attempts") == "26"
    assert looking.driver.title == "Live"
    run.append(sample_trajectory(run.images, task_id="task-new", steps=2))
    looking.until("return document.querySelectorAll('#body tr[data-at] a').length === 27")
    looking.set("f-text", "task-new")
    looking.until("return document.querySelectorAll('#body tr[data-at] a').length === 1")
    looking.click("#body tr[data-at] a")
    looking.until("return document.querySelector('#shot img')?.naturalWidth === 320")
    assert looking.texts("#about h1") == ["task-new"]
    looking.press("\ue00c")  # Escape
    looking.until("return !document.getElementById('list').hidden")
    looking.set("f-text", "")
    looking.click("#to-tasks")
    looking.until("return document.querySelectorAll('#group-body tr[data-task]').length === 7")
    assert looking.tile("pass@4") == "83.3 %"
    looking.click("#group-body tr[data-task='task-4'] a.one:nth-child(2)")
    looking.until("return document.querySelector('#about')?.textContent.includes('rollout 1')")
    looking.until("return !document.querySelector('#about').textContent.includes('not in the filter')")
    looking.press("\ue00c")  # Escape
    looking.click("#to-tasks")
    looking.until("return document.querySelectorAll('#group-body tr[data-task]').length === 7")
    looking.click("#group-body tr[data-at='3'] a")
    looking.until("return document.querySelectorAll('#body tr[data-at] a').length === 4")
    assert set(looking.tasks()) == {"task-3"}


def test_a_link_leads_to_an_attempt_whose_page_is_not_there_yet(looking: Browser, server: RunServer) -> None:
    looking.go(f"{server.url}#task-4/0/0.0/1")
    looking.until("return document.querySelectorAll('#strip li').length === 3")
    assert looking.texts("#about h1") == ["task-4"]
    assert looking.step == "1"
    looking.go(f"{server.url}#task-99/0/0.0")
    looking.until("return document.querySelectorAll('#body tr[data-at] a').length === 26")


def test_the_file_says_of_each_task_what_the_server_says(
    browser: Browser, run: RunStore, earlier: RunStore, tmp_path: Path
) -> None:
    with RunStore.open(run.path) as store, RunServer(store, against=earlier) as server:
        written = write_html(store, tmp_path / "run.html", against=earlier)
        told = api(server, "tasks")
    browser.open(written, "#tasks")
    found, passes = browser.js(
        """
        const run = JSON.parse(document.getElementById("run").textContent), by = runGroups(run.successAt);
        const rows = by.compared(by.groups(run.rows), by.groups(run.againstRows));
        return [rows, by.passes(rows.filter((row) => row.other))];
        """
    )
    assert found == told["rows"]
    assert [k for k, _ in passes] == [k for k, _ in told["passes"]]
    assert [share for _, share in passes] == pytest.approx([share for _, share in told["passes"]])
    assert browser.tile("tasks") == "6, 1 in both"
    assert browser.tile("pass@1") == "75.0 %  from 0.0 %"
    assert browser.texts("#group-body tr[data-task='task-3'] .chip") == ["yes", "+0.75"]


def test_the_tasks_of_the_file_are_filtered_sorted_and_lead_to_their_rollouts(
    browser: Browser, run: RunStore, tmp_path: Path
) -> None:
    browser.open(write_html(run, tmp_path / "run.html"))
    browser.click("#to-tasks")
    browser.until("return document.querySelectorAll('#group-body tr[data-at]').length === 6")
    assert [browser.tile(name) for name in ("pass@1", "pass@4")] == ["58.3 %", "83.3 %"]
    browser.click("#g-reward button")
    browser.click("#g-reward button")
    tasks = browser.texts("#group-body tr[data-at] td:first-child")
    assert tasks == [f"task-{number}" for number in (4, 5, 3, 2, 1, 0)]
    browser.set("f-reward", "below")
    assert browser.texts("#group-body tr[data-at] td:first-child") == [f"task-{n}" for n in (0, 1, 2, 3)]
    browser.set("f-reward", "")
    browser.click("#group-body tr[data-task='task-2'] a.one:nth-child(2)")
    browser.until("return !document.getElementById('trajectory').hidden")
    assert browser.fragment == "#task-2/1/0.0"
    browser.driver.back()
    browser.until("return !document.getElementById('groups').hidden")
    browser.click("#group-body tr[data-task='task-2'] a.why")
    assert browser.tasks() == ["task-2"]
    assert browser.tile("failures") == "1 environment"
    browser.set("f-failure", "")
    assert browser.tasks() == ["task-2"] * 5
