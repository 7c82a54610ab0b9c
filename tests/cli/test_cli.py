"""The command line, as real processes against the stand-in server."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
from free_ports import free_port
from processes import HANG_S

from managed_vllm.cli.logs import LogReader
from managed_vllm.instance import cleanup, directory, names
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance

PROGRAM = [sys.executable, "-m", "managed_vllm.cli"]
STANDIN = ["--command", shlex.join(standin.command())]
HOLDER = """
import sys
from managed_vllm import ManagedVLLM
with ManagedVLLM(name=sys.argv[1], keep_alive=0):
    print("held", flush=True)
    sys.stdin.read()
"""


def until(condition: Callable[[], Any], what: str, timeout_s: float = HANG_S) -> Any:
    """Waits until `condition()` is true and returns its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
    return value


class Started:
    """A process that runs, and what it has said so far."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.out, self.err = "", ""
        self._threads = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in ("out", "err")]
        for thread in self._threads:
            thread.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, f"std{name}"):
            setattr(self, name, getattr(self, name) + line)

    def until_said(self, text: str, times: int = 1) -> None:
        def said() -> bool:
            if self.process.poll() is not None:  # what it said before is still being read
                self._join()
                assert self.out.count(text) >= times, (self.out, self.err)
            return self.out.count(text) >= times

        until(said, f"{text!r} in output")

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(HANG_S)
        self._join()
        return code

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(HANG_S)


class Cli:
    """The command line in a state directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[Started] = []
        foreign = ("VLLM_", "MANAGED_VLLM_", "STANDIN")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.env[directory.HOME_VARIABLE] = str(home)

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*PROGRAM, *words], env={**self.env, **env}, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *words: str, **env: str) -> Started:
        return self.start_words([*PROGRAM, *words], **env)

    def start_words(self, words: list[str], **env: str) -> Started:
        self.started.append(Started(words, {**self.env, **env}))
        return self.started[-1]

    def up(self, *words: str, **env: str) -> dict[str, Any]:
        done = self("up", "--model", "m", *STANDIN, "--keep-alive", "0", "--json", *words, **env)
        assert done.returncode == 0, done.stderr
        row: dict[str, Any] = json.loads(done.stdout)
        return row

    def status(self, *words: str) -> list[dict[str, Any]]:
        done = self("status", "--json", *words)
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def instance(self, row: dict[str, Any]) -> Instance:
        return Instance(self.home, row["id"])

    def left(self) -> list[Any]:
        """Folders and processes of instances."""
        return [(i.id, cleanup.marked_processes(i)) for i in directory.instances(self.home)]


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    home = tmp_path / "home"
    made = Cli(home)
    yield made
    for started in made.started:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()
    done = made("down", "--all", "--force")
    assert done.returncode == 0, done.stderr
    assert not made.left()


def key_of(cli: Cli, row: dict[str, Any]) -> str:
    return str(cli.status(row["id"], "--show-key")[0]["api_key"])


# -- words -------------------------------------------------------------------------------------------------------------


def test_without_a_command_help_is_shown(cli: Cli) -> None:
    done = cli()
    assert done.returncode == 0
    for command in ("serve", "up", "down", "status", "logs", "check", "demo"):
        assert command in done.stdout
        assert "examples:" in cli(command, "--help").stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("managed-vllm 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["up"], "which model"),
        (["up", "--model", "m", "--env", "NONSENSE", *STANDIN], "NAME=VALUE"),
        (["up", "--model", "m", "stray", *STANDIN], "'stray' belongs to no flag"),
        (["up", "--model", "m", "--host", "0.0.0.0", *STANDIN], "api_key"),
        (["up", "--model", "m", "--name", "a/b", *STANDIN], "name="),
        (["up", "--model", "m", "--startup-timeout", "0", *STANDIN], "startup_timeout_s"),
        (["up", "--model", "m", "--startup-silence", "0", *STANDIN], "startup_silence_s"),
        (["up", "--model", "m", "--first-request-timeout", "0", *STANDIN], "first_request_timeout_s"),
        (["up", "--model", "m", "--stop-grace", "-1", *STANDIN], "stop_grace_s"),
        (["up", "--model", "m", "--gpu-release-timeout", "-1", *STANDIN], "gpu_release_timeout_s"),
        (["status", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["down", "--all", "x"], "exclude"),
        (["check"], "no server is running; give a URL"),
        (["demo", "--workers", "2"], "at least three"),
    ],
)
def test_wrong_words_exit_with_2_and_one_message(cli: Cli, words: list[str], message: str) -> None:
    done = cli(*words)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert message in done.stderr
    assert not cli.left()


def test_flags_go_to_the_server_as_vllm_takes_them(cli: Cli) -> None:
    port = free_port()
    row = cli.up(
        *("--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5"),
        *("--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching", "-O2"),
        *("--hf-overrides", '{"a": 1}', "--served-model-name", "served", "--seed", "-1", "--env", "ONE=1=2"),
    )
    assert row["base_url"] == f"http://127.0.0.1:{port}/v1"
    assert row["model"] == "served"
    record = cli.instance(row).read_record()
    assert record is not None
    assert record["spec"]["engine_args"] == {
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
        "hf_overrides": {"a": 1},
        "max_model_len": 512,
        "optimization_level": 2,
        "seed": -1,
        "tensor_parallel_size": 2,
    }
    assert record["spec"]["env"] == {"ONE": "1=2"}


def test_model_may_stand_first_as_in_vllm_serve(cli: Cli) -> None:
    done = cli("up", "some/model", *STANDIN, "--keep-alive", "0", "--json", VLLM_SERVER_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "some/model"


def test_a_home_whose_name_is_no_text_starts_a_server(cli: Cli) -> None:
    """Latin-1 in a UTF-8 locale: Python has it as lone surrogates, which it refuses to print."""
    with tempfile.TemporaryDirectory(prefix="mvt-") as folder:  # a short path: else the socket's is another one
        home = Path(folder) / os.fsdecode(b"caf\xe9")
        home.mkdir()
        env = {**cli.env, "HOME": str(home), "MANAGED_VLLM_HOME": str(home / "state"), "TMPDIR": str(home)}
        words = [*PROGRAM, "up", "--model", "m", "--uds", "--keep-alive", "0", *STANDIN]
        utf8 = {"PYTHONIOENCODING": "utf-8:strict"}
        up = subprocess.run(words, env={**env, **utf8}, cwd=home, capture_output=True)
        try:
            assert up.returncode == 0, up.stderr
            assert b"caf\xe9/state/" in up.stdout
        finally:
            down = subprocess.run([*PROGRAM, "down", "--all"], env=env, cwd=home, capture_output=True)
        assert down.returncode == 0, down.stderr
        assert [path.name for path in (home / "state").iterdir() if path.name != "failed"] == [".token"]


# -- serve -------------------------------------------------------------------------------------------------------------


def test_up_names_the_server_that_it_has_started_also_with_a_preset(cli: Cli) -> None:
    row = cli.up("--for-training", "--idle-sleep", "600")
    assert [one["id"] for one in cli.status()] == [row["id"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_serve_shows_the_log_and_leaves_nothing_when_it_is_ended(cli: Cli, number: int, code: int) -> None:
    serving = cli.start("serve", "--model", "m", *STANDIN, "--api-key", "geheim", **standin.orders(tree=True))
    serving.until_said("Application startup complete.")
    assert "export VLLM_SERVER_URL=http://127.0.0.1:" in serving.out
    assert "VLLM_MODEL_NAME=m" in serving.out
    assert serving.end(number) == code
    assert "geheim" not in serving.out + serving.err
    assert "Traceback" not in serving.err
    assert not cli.left()


def test_serve_tells_of_a_crash_and_that_it_serves_again(cli: Cli) -> None:
    serving = cli.start("serve", "--model", "m", *STANDIN)
    serving.until_said("Application startup complete.")
    os.kill(cli.status()[0]["server_pid"], signal.SIGKILL)
    until(lambda: "serving again, epoch 2" in serving.err, "told of it")
    assert "the server was ended by SIGKILL; it is started again" in serving.err
    assert serving.end(signal.SIGINT) == 130
    assert not cli.left()


def test_serve_interrupted_during_the_start_leaves_nothing(cli: Cli) -> None:
    serving = cli.start("serve", "--model", "m", *STANDIN, **standin.orders(start_s=600))
    until(lambda: [row for row in cli.status() if row["server_pid"]], "server launched")
    assert serving.end(signal.SIGINT) == 130
    assert "Traceback" not in serving.err
    assert not cli.left()


def test_serve_ends_with_an_error_when_somebody_stops_its_server(cli: Cli) -> None:
    serving = cli.start("serve", "--model", "m", *STANDIN)
    serving.until_said("Application startup complete.")
    refused = cli("down")
    assert refused.returncode == 1
    assert f"pid {serving.process.pid}" in refused.stderr
    assert cli("down", "--force").returncode == 0
    assert serving.end() == 1
    assert "error: the server was stopped" in serving.err
    assert "Traceback" not in serving.err


def test_a_failed_start_is_one_message_and_its_log_is_kept(cli: Cli) -> None:
    done = cli("serve", "--model", "m", *STANDIN, **standin.orders(exit=3, say=["what a pity"]))
    assert done.returncode == 1
    assert "error: " in done.stderr
    until(lambda: not cli.left(), "the failed server is gone")
    shown = cli("logs")
    assert shown.returncode == 1
    assert "managed-vllm logs --failed" in shown.stderr
    kept = cli("logs", "--failed")
    assert kept.returncode == 0
    assert "what a pity" in kept.stdout


# -- up, status, down --------------------------------------------------------------------------------------------------


def test_up_status_down(cli: Cli) -> None:
    row = cli.up("--name", "mine", "--api-key", "geheim")
    assert row["state"] == "ready"
    assert row["users"] == []
    assert row["pinned"]
    again = cli("up", "--model", "m", *STANDIN, "--name", "mine")
    assert "was running already" in again.stdout
    assert f"managed-vllm status {row['id']} --show-key" in again.stdout

    (seen,) = cli.status()
    assert (seen["id"], seen["names"], seen["state"], seen["epoch"]) == (row["id"], ["mine"], "ready", 1)
    assert seen["server_pid"] == row["server_pid"]
    table = cli("status")
    for word in (row["id"], "mine", "ready", row["base_url"], str(row["server_pid"])):
        assert word in table.stdout
    for shown in (json.dumps(row), json.dumps(seen), table.stdout, again.stdout):
        assert "geheim" not in shown
    assert key_of(cli, row) == "geheim"
    assert "VLLM_API_KEY=geheim" in cli("status", row["id"][:4], "--show-key").stdout

    done = cli("down", "mine")
    assert done.returncode == 0, done.stderr
    assert not cli.left()
    assert cli.status() == []
    assert "No server is running" in cli("status").stdout
    assert cli("down").returncode == 1
    assert cli("down", "--all").returncode == 0


def test_up_without_waiting_returns_while_the_server_starts(cli: Cli, tmp_path: Path) -> None:
    row = cli.up("--no-wait", **standin.orders(start_s=600))
    assert row["state"] == "starting"
    assert row["base_url"] is None
    assert cli("down", row["id"]).returncode == 0
    assert not cli.left()


def test_down_does_not_wait_for_keep_alive(cli: Cli) -> None:
    done = cli("up", "--model", "m", *STANDIN, "--keep-alive", "3600")
    assert done.returncode == 0
    assert cli("down").returncode == 0
    assert not cli.left()


def test_down_refuses_while_others_use_it_unless_forced(cli: Cli) -> None:
    row = cli.up("--name", "mine")
    holder = cli.start_words([sys.executable, "-c", HOLDER, "mine"])
    holder.until_said("held")
    refused = cli("down", "mine")
    assert refused.returncode == 1
    assert f"pid {holder.process.pid}" in refused.stderr
    assert "--force" in refused.stderr
    (seen,) = cli.status()
    assert (seen["state"], seen["pinned"], len(seen["users"])) == ("ready", False, 1)
    assert f"user {holder.process.pid}" in cli("status", "mine").stdout
    assert cli("down", row["id"], "--force").returncode == 0
    assert not cli.left()


def test_which_server_must_be_clear(cli: Cli) -> None:
    first, second = cli.up("--max-model-len", "1", "--name", "one"), cli.up("--max-model-len", "2")
    for command in ("down", "logs"):
        for words in ([], ["m"], ["nobody"]):
            done = cli(command, *words)
            assert done.returncode == 1
            assert f"{first['id']} (one)" in done.stderr
            assert second["id"] in done.stderr
    assert [row["id"] for row in cli.status("one")] == [first["id"]]
    assert cli("down", "one", second["id"]).returncode == 0
    assert not cli.left()


def test_what_a_killed_supervisor_left_is_shown_as_dead_and_removed(cli: Cli) -> None:
    row = cli.up("--name", "mine")
    os.kill(row["supervisor_pid"], signal.SIGKILL)
    until(lambda: cli.status()[0]["state"] == "dead", "dead")
    assert "managed-vllm down --all" in cli("status").stdout
    assert "managed-vllm down --all" in cli("down").stderr
    assert cli("down", "--all").returncode == 0
    assert not cli.left()
    assert names.named(cli.home, "mine") is None


def test_a_supervisor_that_hangs_is_ended_by_force(cli: Cli) -> None:
    row = cli.up()
    os.kill(row["supervisor_pid"], signal.SIGSTOP)
    try:
        done = cli("down", "--force")
        assert done.returncode == 0, done.stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(row["supervisor_pid"], signal.SIGCONT)
    assert not cli.left()


def test_looking_keeps_nothing_alive(cli: Cli) -> None:
    row = cli.up()
    log = cli.start("logs", "-f")
    log.until_said("Application startup complete.")
    with_look = Channel.connect(cli.instance(row).socket_path)
    with_look.request("unpin")
    with_look.wait_until(lambda _: False, HANG_S)
    assert log.end() == 0
    until(lambda: not cli.left(), "nothing is left of it")


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs_shows_the_last_lines(cli: Cli) -> None:
    cli.up(**standin.orders(say=[f"line {number}" for number in range(300)]))
    last = ["line 298", "line 299", "Application startup complete."]
    until(lambda: cli("logs", "-n", "3").stdout.splitlines() == last, "the server's words are in the log")
    assert len(cli("logs").stdout.splitlines()) == 100


def test_logs_follows_a_restart_until_ctrl_c(cli: Cli) -> None:
    row = cli.up()
    log = cli.start("logs", "-f")
    log.until_said("Application startup complete.")
    channel = Channel.connect(cli.instance(row).socket_path)
    channel.request("restart")
    channel.close()
    log.until_said("Application startup complete.", times=2)
    assert log.end(signal.SIGINT) == 130
    assert "Traceback" not in log.err
    assert cli.status()[0]["state"] in ("ready", "restarting")


def test_a_closed_pipe_is_no_error(cli: Cli) -> None:
    cli.up(**standin.orders(say=["x" * 100] * 1000))
    piped = subprocess.run(
        f"{shlex.join(PROGRAM)} logs -n 2000 | head -n 1", shell=True, env=cli.env, capture_output=True, timeout=60
    )
    assert piped.stdout.startswith(b"xxx")
    assert piped.stderr == b""


def test_log_reader_loses_nothing_when_the_log_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    with LogReader(path) as reader:
        assert reader.backlog(5) == ""
        path.write_bytes("eins\nzwei\nü".encode()[:-1])
        assert reader.news() == "eins\nzwei\n"
        with open(path, "ab") as old:
            old.write("ü\n".encode()[1:])
            old.flush()
            path.rename(tmp_path / "server.log.1")
            assert reader.news() == "ü\n"
            old.write(b"last\n")
            old.flush()
            path.write_text("first\n")
            assert reader.news() == "last\nfirst\n"
    with LogReader(path) as reader:
        assert reader.backlog(None) == "first\n"
        assert reader.news() == ""


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_of_a_good_server(cli: Cli) -> None:
    row = cli.up("--api-key", "geheim")
    url = row["base_url"]
    for words, env in (
        ([], {}),
        ([url, "--api-key", "geheim"], {}),
        ([url.removesuffix("/v1")], {"VLLM_API_KEY": "geheim"}),
        ([], {"VLLM_SERVER_URL": url, "VLLM_API_KEY": "geheim", "VLLM_MODEL_NAME": "m"}),
    ):
        done = cli("check", *words, **env)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert done.stdout.count(" ok ") == 3
        assert "geheim" not in done.stdout
    others = {"VLLM_SERVER_URL": "http://127.0.0.1:9", "VLLM_API_KEY": "geheim"}
    assert "wants an API key" in cli("check", url, **others).stderr
    told = json.loads(cli("check", "--json").stdout)
    assert told["ok"]
    assert [(check["name"], check["ok"]) for check in told["checks"]] == [
        ("health", True),
        ("models", True),
        ("answer", True),
    ]
    assert all(check["latency_s"] > 0 for check in told["checks"])


def test_check_says_what_is_wrong(cli: Cli) -> None:
    url = cli.up("--api-key", "geheim")["base_url"]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{silent.getsockname()[1]}"
        for words, message in (
            ([url, "--api-key", "wrong"], "refuses this API key"),
            ([url], "wants an API key"),
            ([url, "--api-key", "geheim", "--model", "other"], "does not serve 'other'"),
            ([nobody], "nothing answers"),
        ):
            done = cli("check", *words)
            assert done.returncode == 1
            assert "failed" in done.stdout
            assert "managed-vllm doctor" in done.stdout
            assert f"error: {'nothing' if words == [nobody] else 'the server at'}" in done.stderr
            assert message in done.stderr
        told = json.loads(cli("check", nobody, "--json").stdout)
        assert not told["ok"]
        assert told["error"]["type"] == "ServerUnreachableError"
        silent.listen()
        assert "within 0.2 s" in cli("check", nobody, "--timeout", "0.2").stderr


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo_shares_one_server_and_leaves_nothing(cli: Cli) -> None:
    done = cli("demo", "--screens", "2", *STANDIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started the server") == 1
    assert done.stdout.count("attached to it") == 3
    assert "with 4 users" in done.stdout
    assert "6 answers in" in done.stdout
    assert "no process and no file of it is left" in done.stdout
    assert not cli.left()


def test_demo_leaves_a_server_alone_that_others_hold(cli: Cli) -> None:
    up = cli("up", "--model", "demo", *STANDIN, "--keep-alive", "0")
    assert up.returncode == 0, up.stderr
    done = cli("demo", "--screens", "1", *STANDIN)
    assert done.returncode == 0, done.stderr
    assert "nobody had to start it" in done.stdout
    assert "stays" in done.stdout
    assert len(cli.status()) == 1


def test_demo_fails_with_its_server(cli: Cli) -> None:
    done = cli("demo", *STANDIN, **standin.orders(exit=1))
    assert done.returncode == 1
    assert "error: " in done.stderr
    until(lambda: not cli.left(), "the failed server is gone")


def test_demo_interrupted_leaves_nothing(cli: Cli) -> None:
    shown = cli.start("demo", *STANDIN, **standin.orders(start_s=600))
    until(lambda: [row for row in cli.status() if len(row["users"]) == 4], "all wait for the server")
    assert shown.end(signal.SIGTERM) == 143
    assert "Traceback" not in shown.err
    until(lambda: not cli.left(), "all gone")
