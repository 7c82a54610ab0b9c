"""The pytest plugin, in pytest runs of their own, against the stand-in server."""

from __future__ import annotations

import http.server
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inner_pytest
import psutil
import pytest
import standin
from processes import assert_nothing_left, eventually, left_of

pytestmark = pytest.mark.usefixtures("home")  # which checks that nothing is left of any server

USES = """
def test_it(managed_vllm):
    print("MODEL", managed_vllm.model, managed_vllm.status().server_pid)
"""


@pytest.fixture
def starts(pytester: pytest.Pytester) -> Path:
    """The file in which each start of the stand-in leaves its pid."""
    return pytester.path / "starts.txt"


def configure(pytester: pytest.Pytester, *lines: str, **order: Any) -> None:
    """Writes the inner run's ini file: the stand-in, with these orders, and further lines."""
    order.setdefault("count", str(pytester.path / "starts.txt"))
    settings = [
        "[pytest]",
        f"managed_vllm_command = {shlex.join(standin.command())}",
        f"managed_vllm_env =\n    STANDIN={json.dumps(order)}",
        *lines,
    ]
    if not any(line.startswith("managed_vllm_keep_alive") for line in lines):
        settings.append("managed_vllm_keep_alive = 0.2")
    if not any(line.startswith("managed_vllm_model") for line in lines):
        settings.append("managed_vllm_model = stand-in")
    pytester.makeini("\n".join(settings))


def inner(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(*inner_pytest.OPTIONS, *arguments, timeout=100)


def pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def models(result: pytest.RunResult) -> list[str]:
    """The model of each test that printed it, in the order of execution."""
    return [line.split()[1] for line in result.outlines if line.startswith("MODEL ")]


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_all_workers_of_xdist_share_one_server(pytester: pytest.Pytester, starts: Path, home: Path) -> None:
    # Once all have a lease, worker after worker runs out of tests; with keep_alive = 0 only the others' leases hold it.
    configure(pytester, "managed_vllm_keep_alive = 0", start_s=0.5)
    pytester.makepyfile("""
        import os, pathlib, time
        import pytest

        @pytest.mark.parametrize("number", range(20))
        def test_chat(managed_vllm, number, worker_id):
            pathlib.Path(f"has-lease-{worker_id}").touch()
            while len(list(pathlib.Path().glob("has-lease-*"))) < 4:
                time.sleep(0.02)
            time.sleep(0.02 * number)
            answer = managed_vllm.chat([{"role": "user", "content": str(number)}])[0].outputs[0].text
            with open("answers.txt", "a") as file:
                file.write(f"{os.getpid()} {answer}\\n")
    """)
    inner(pytester, "-n", "4").assert_outcomes(passed=20)
    answers = [line.split() for line in (pytester.path / "answers.txt").read_text().splitlines()]
    assert len({worker for worker, *_ in answers}) == 4
    assert sorted(int(number) for _, _, number, _, _ in answers) == list(range(20))
    (started,) = pids(starts)
    assert {int(pid) for *_, pid in answers} == {started}
    assert_nothing_left(home)
    eventually(lambda: not psutil.pid_exists(started), "it has ended")


def test_another_run_on_the_machine_shares_it_and_outlives_the_first(pytester: pytest.Pytester, starts: Path) -> None:
    configure(pytester, "managed_vllm_keep_alive = 0")
    first_file = pytester.makepyfile(
        test_first="""
        import pathlib, time
        def test_it(managed_vllm):
            pathlib.Path("first").write_text(str(managed_vllm.status().server_pid))
            while not pathlib.Path("second").exists():
                time.sleep(0.02)
    """
    )
    second_file = pytester.makepyfile(
        test_second="""
        import os, pathlib, time
        def test_it(managed_vllm):
            first = pathlib.Path("first").read_text()
            pathlib.Path("second").write_text(str(managed_vllm.status().server_pid))
            while not pathlib.Path("first_is_gone").exists():
                time.sleep(0.02)
            while managed_vllm.status().users != 1:
                time.sleep(0.02)
            assert str(managed_vllm.status().server_pid) == first
            assert managed_vllm.generate("x")[0].outputs[0].text.endswith(f"from {first}")
    """
    )
    words = [*inner_pytest.WORDS, "-q"]
    output = subprocess.DEVNULL
    with subprocess.Popen([*words, str(first_file)], cwd=pytester.path, stdout=output) as first:
        eventually((pytester.path / "first").exists, "the first run has the server", 60)
        with subprocess.Popen([*words, str(second_file)], cwd=pytester.path, stdout=output) as second:
            assert first.wait(60) == 0
            (pytester.path / "first_is_gone").touch()
            assert second.wait(60) == 0
    assert len(pids(starts)) == 1


def test_the_server_outlives_the_run_by_keep_alive(pytester: pytest.Pytester, starts: Path, home: Path) -> None:
    configure(pytester, "managed_vllm_keep_alive = 600")
    pytester.makepyfile(USES)
    inner(pytester, "--managed-vllm-keep-alive=300").assert_outcomes(passed=1)
    assert left_of(home)
    inner(pytester, "--managed-vllm-keep-alive=0").assert_outcomes(passed=1)
    (started,) = pids(starts)
    assert psutil.pid_exists(started), "the longest keep_alive holds"
    subprocess.run(
        [sys.executable, "-c", "from managed_vllm import ManagedVLLM; ManagedVLLM(keep_alive=0).stop_server()"],
        check=True,
    )


# -- settings ----------------------------------------------------------------------------------------------------------


def test_marker_before_command_line_before_ini(pytester: pytest.Pytester, starts: Path) -> None:
    configure(pytester, "managed_vllm_model = from-ini")
    pytester.makepyfile("""
        import pytest

        @pytest.fixture(scope="session")
        def own(managed_vllm):
            return managed_vllm.model

        def test_plain(managed_vllm, own):
            print("\\nMODEL", managed_vllm.model)
            assert own == managed_vllm.model

        @pytest.mark.managed_vllm(model="from-marker")
        @pytest.mark.parametrize("number", [1, 2])
        def test_marked(managed_vllm, own, number):
            print("\\nMODEL", managed_vllm.model)
            assert own == managed_vllm.model

        @pytest.mark.managed_vllm("from-class")
        class TestMarked:
            def test_class(self, managed_vllm):
                print("\\nMODEL", managed_vllm.model)

            @pytest.mark.managed_vllm(served_model_name="from-test")
            def test_nearest(self, managed_vllm):
                print("\\nMODEL", managed_vllm.model)

            def test_without(self):
                pass

        def test_plain_again(managed_vllm, own):
            print("\\nMODEL", managed_vllm.model)
            assert own == managed_vllm.model
    """)
    result = inner(pytester, "-s", "-v")
    result.assert_outcomes(passed=7)
    assert sorted(models(result)) == sorted(
        ["from-ini", "from-marker", "from-marker", "from-class", "from-test", "from-ini"]
    )
    assert len(pids(starts)) == 4, "a server that tests come back to is still there"
    result.stdout.fnmatch_lines_random(
        ["*::test_marked[[]1[]]*", "*::TestMarked::test_nearest*", "managed_vllm: from-ini"]
    )
    assert "test_nearest[" not in result.stdout.str()

    result = inner(pytester, "-s", "--managed-vllm-model=from-line", "-k", "plain or test_marked")
    result.assert_outcomes(passed=4, deselected=3)
    assert sorted(models(result)) == ["from-line", "from-line", "from-marker", "from-marker"]
    assert "managed_vllm: from" not in result.stdout.str()


def test_engine_arguments_and_variables_are_merged_by_name(pytester: pytest.Pytester) -> None:
    configure(pytester, "managed_vllm_args = --max-model-len 512 --seed 1 --dtype 'float32'")
    pytester.makepyfile("""
        import json, pathlib, psutil, pytest

        @pytest.mark.managed_vllm(seed=3, dtype=None, env={"EXTRA": "yes"})
        def test_it(managed_vllm):
            server = psutil.Process(managed_vllm.status().server_pid)
            words = server.cmdline()
            assert "--max-model-len=1024" in words
            assert "--seed=3" in words
            assert "--enforce-eager" in words
            assert not any("dtype" in word for word in words)
            assert server.environ()["EXTRA"] == "yes"
            assert "STANDIN" in server.environ()
    """)
    inner(pytester, "--managed-vllm-args=--max-model-len=1024 --seed=2 --enforce-eager").assert_outcomes(passed=1)


@pytest.mark.parametrize("how", ["option", "variable"])
def test_server_of_somebody_else(
    pytester: pytest.Pytester, starts: Path, home: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str, how: str
) -> None:
    configure(pytester, "managed_vllm_model =")
    pytester.makepyfile(USES)
    if how == "variable":
        monkeypatch.setenv("VLLM_SERVER_URL", elsewhere)
    result = inner(pytester, "-s", *([f"--managed-vllm-url={elsewhere}"] if how == "option" else []))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*MODEL elsewhere None*"])
    assert not pids(starts)
    configure(pytester, "managed_vllm_model =", "managed_vllm_args = --max-model-len 512")
    inner(pytester, f"--managed-vllm-url={elsewhere}").assert_outcomes(passed=1)
    result = inner(pytester, f"--managed-vllm-url={elsewhere}", "--managed-vllm-args=--seed=1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["ConfigError: **seed=*"])
    result = inner(pytester, f"--managed-vllm-url={elsewhere}", "--managed-vllm-model=other")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["ModelNotServedError: **'other'*elsewhere*"])
    assert not home.exists()


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of a server that is not ours."""

    class Handler(standin.Handler):
        model = "elsewhere"

    with standin.Server(("127.0.0.1", 0), Handler) as server:
        assert isinstance(server, http.server.HTTPServer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("managed_vllm_args = 512", "*ConfigError: managed_vllm_args: '512' belongs to no flag*"),
        ("managed_vllm_args = --chat-template '", "*ConfigError: managed_vllm_args: No closing quotation*"),
        ("managed_vllm_keep_alive = long", "*ConfigError: managed_vllm_keep_alive: 'long' is no number of seconds*"),
    ],
)
def test_unreadable_setting(pytester: pytest.Pytester, setting: str, message: str, home: Path) -> None:
    configure(pytester, setting)
    pytester.makepyfile(USES)
    result = inner(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    assert not home.exists()


def test_marker_that_would_be_ignored_fails(pytester: pytest.Pytester, starts: Path) -> None:
    configure(pytester)
    pytester.makepyfile("""
        import unittest
        import pytest

        @pytest.mark.managed_vllm("other")
        @pytest.mark.usefixtures("managed_vllm")
        class TestOld(unittest.TestCase):
            def test_it(self):
                pass
    """)
    result = inner(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*works on plain test functions and classes only*"])
    assert not pids(starts)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_failing_start_is_tried_once_and_told_briefly(pytester: pytest.Pytester, starts: Path) -> None:
    configure(pytester, exit=2, say=["api_server.py: error: unrecognized arguments: --no-such-flag"])
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("number", range(5))
        def test_it(managed_vllm, number):
            pass

        @pytest.mark.managed_vllm(env={"STANDIN": "{}"})
        def test_another_server(managed_vllm):
            pass

        def test_last(managed_vllm):
            pass

        def test_without_server():
            pass
    """)
    result = inner(pytester)
    result.assert_outcomes(errors=6, passed=2)
    assert len(pids(starts)) == 1
    result.stdout.fnmatch_lines(["*EngineArgumentError: *", "*--no-such-flag*", "*remedy: *", "*log: *"])
    text = result.stdout.str()
    section = text.split("ERROR at setup of test_it[0]")[1].split("ERROR at setup of")[0]
    assert len(section.splitlines()) < 12, section
    assert "session.py" not in text
    assert "Traceback" not in text


def test_failing_start_under_xdist(pytester: pytest.Pytester, starts: Path) -> None:
    configure(pytester, exit=2, say=["api_server.py: error: unrecognized arguments: --no-such-flag"])
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("number", range(12))
        def test_it(managed_vllm, number):
            pass
    """)
    inner(pytester, "-n", "2").assert_outcomes(errors=12)
    assert 1 <= len(pids(starts)) <= 2, "at most once a worker"


# -- those who don't use it --------------------------------------------------------------------------------------------


def test_costs_and_says_nothing_where_it_is_not_used(pytester: pytest.Pytester, home: Path) -> None:
    pytester.makepyfile("""
        import sys

        def test_it():
            assert "managed_vllm.pytest_plugin" in sys.modules
            ours = {name for name in sys.modules if name.startswith("managed_vllm.")}
            assert ours == {"managed_vllm.pytest_plugin"}
            heavy = {"openai", "httpx", "vllm", "torch", "transformers", "filelock", "psutil", "requests", "rich"}
            assert not heavy & sys.modules.keys()
    """)
    # Other plugins of this environment import heavy things themselves.
    others = ["-p", "no:anyio", "-p", "no:xdist", "-p", "no:xdist.looponfail", "-p", "no:hypothesispytest"]
    result = inner(pytester, *others)
    result.assert_outcomes(passed=1)
    said = [line for line in result.outlines if "managed" in line and not line.startswith("plugins: ")]
    assert said == []
    assert not home.exists()
    result = inner(pytester, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.managed_vllm(model=None, [*][*]arguments)*"])
