"""Who gets which server: devices, environment, interpreter, files, address, and no secret where others see it.

Against the stand-in, in real processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
from processes import INSTANT, assert_nothing_left, eventually

from managed_vllm import ManagedVLLM, variables
from managed_vllm.errors import ConfigError, ConfigMismatchError, ServerStoppedError, SupervisorError
from managed_vllm.instance import attach
from managed_vllm.masking import Secret

PATH = [str(Path(__file__).parent), str(Path(standin.__file__).parent)]
KEY = f"S3CRET-{secrets.token_hex(10)}"
"""This process's own: in the command lines of the machine are those of other tests, too."""


@pytest.fixture(autouse=True)
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in variables.DEVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def server(model: Any = "stand-in", *, env: dict[str, str] | None = None, **options: Any) -> ManagedVLLM:
    given: dict[str, Any] = {"command": standin.command(), "keep_alive": INSTANT, "progress": False, **options}
    return ManagedVLLM(model, env={**standin.orders(), **(env or {})}, **given)


def environment_of(llm: ManagedVLLM) -> dict[str, str]:
    return psutil.Process(llm.status().server_pid).environ()


def user(code: str, program: str = sys.executable, **env: str) -> subprocess.Popen[str]:
    """A user in a process of its own, which finds this module as `t`."""
    return subprocess.Popen(
        [program, "-c", f"import sys; sys.path[:0] = {PATH!r}; import test_identity as t\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


HOLDER = """
with t.server({arguments}) as llm:
    print(llm.status().supervisor_pid, flush=True)
    sys.stdin.readline()
"""


def command_line(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "managed_vllm.cli", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


def command_lines() -> str:
    """What any user of the machine sees with `ps`."""
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return "\n".join(line for line in lines if "pytest" not in line)


# -- point 10: devices, environment, interpreter -----------------------------------------------------------------------


def test_devices_given_by_env_are_the_servers_whatever_is_set_outside(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with server(env={"CUDA_VISIBLE_DEVICES": "1"}) as one, server(env={"CUDA_VISIBLE_DEVICES": "2"}) as two:
        assert one.id != two.id
        assert environment_of(one)["CUDA_VISIBLE_DEVICES"] == "1"
        assert environment_of(two)["CUDA_VISIBLE_DEVICES"] == "2"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        with server() as same:
            assert same.id == two.id


def test_devices_are_those_of_the_moment_at_which_the_handle_was_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    llm = server()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with llm:
        assert environment_of(llm)["CUDA_VISIBLE_DEVICES"] == "0"


def test_an_unpickled_handle_starts_its_server_on_the_devices_of_the_process_where_it_was_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pickled = pickle.dumps(server())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as in a Ray task without GPUs
    with pickle.loads(pickled) as llm:
        assert environment_of(llm)["CUDA_VISIBLE_DEVICES"] == "0"


def test_devices_environment_and_key_stay_when_a_user_with_another_environment_starts_the_next_supervisor(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = user(
        HOLDER.format(arguments="name='judge'"),
        CUDA_VISIBLE_DEVICES="0",
        HTTPS_PROXY="http://the-first:1",
        VLLM_OF_THE_FIRST="yes",
    )
    supervisor = int(line(first))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HTTPS_PROXY", "http://another:1")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "OTHER")
    with ManagedVLLM(name="judge", keep_alive=INSTANT) as llm:
        before, key = environment_of(llm), llm.api_key
        first.kill()
        first.wait()
        os.kill(supervisor, signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(supervisor), "the supervisor is gone")
        assert llm.generate("next")[0].epoch == 2
        assert llm.started_it
        after = environment_of(llm)
        changing = {name for name in before if name.startswith("MANAGED_VLLM_")} | {"TMPDIR", "VLLM_RPC_BASE_PATH"}
        assert {n: v for n, v in after.items() if n not in changing} == {
            n: v for n, v in before.items() if n not in changing
        }
        assert (after["CUDA_VISIBLE_DEVICES"], after["HTTPS_PROXY"]) == ("0", "http://the-first:1")
        assert after["VLLM_OF_THE_FIRST"] == "yes"
        assert "VLLM_ATTENTION_BACKEND" not in after
        assert llm.api_key == key


FAKE_VLLM = """
import os, runpy, sys
sys.argv[:2] = [{standin!r}, "--model"]  # `vllm serve MODEL …`
sys.path.insert(0, os.path.dirname({standin!r}))
runpy.run_path({standin!r}, run_name="__main__")
"""


def test_the_interpreter_stays_when_a_user_without_vllm_starts_the_next_supervisor(home: Path, tmp_path: Path) -> None:
    """The first user's environment has a vLLM (a stand-in by that name), the second one's has none of that version."""
    libs = tmp_path / "libs"
    for folder in ("vllm-0.1.0.dist-info", "vllm/entrypoints/cli"):
        (libs / folder).mkdir(parents=True)
    (libs / "vllm-0.1.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.1.0\n")
    for folder in ("vllm", "vllm/entrypoints", "vllm/entrypoints/cli"):
        (libs / folder / "__init__.py").touch()
    (libs / "vllm/entrypoints/cli/main.py").write_text(FAKE_VLLM.format(standin=standin.__file__))
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    path = ":".join([str(libs), *sys.path])
    first = user(HOLDER.format(arguments="'m', command=None, name='judge'"), program=str(python), PYTHONPATH=path)
    supervisor = int(line(first))
    with ManagedVLLM(name="judge", keep_alive=INSTANT) as llm:
        before = psutil.Process(llm.status().server_pid).cmdline()
        assert before[0] == str(python)
        first.kill()
        first.wait()
        os.kill(supervisor, signal.SIGKILL)
        eventually(lambda: not psutil.pid_exists(supervisor), "the supervisor is gone")
        assert llm.generate("next")[0].epoch == 2
        assert psutil.Process(llm.status().server_pid).cmdline()[:3] == before[:3]


# -- point 11: files that changed --------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("old")
    return folder


def test_weights_that_were_overwritten_are_not_served_from_memory(home: Path, model: Path) -> None:
    with server(model, keep_alive=60) as llm:
        with server(model):
            pass
        (model / "model.safetensors").write_text("new ones")
        with pytest.raises(ConfigMismatchError, match="managed-vllm restart") as caught:
            server(model).start()
        assert list(caught.value.differences) == [str(model / "model.safetensors")]
        assert llm.generate("still")[0].outputs[0].text  # who is in stays
        llm.restart()
        with server(model) as other:
            assert other.status().server_pid == llm.status().server_pid
        llm.stop_server()


def test_who_asks_for_what_runs_gets_it_and_is_told_that_the_files_changed(
    home: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with server(model):
        (model / "config.json").write_text('{"new": 1}')
        with caplog.at_level(logging.WARNING, "managed_vllm"), ManagedVLLM(keep_alive=INSTANT) as bare:
            assert "config.json" in caplog.text
            bare.restart()
        with server(model):
            pass


def test_a_restart_from_the_command_line_reads_the_files_anew(home: Path, model: Path) -> None:
    with server(model) as llm:
        (model / "model.safetensors").write_text("new ones")
        done = command_line("restart", str(llm.id))
        assert (done.returncode, done.stdout) == (0, f"{llm.id} serves again, epoch 2.\n"), done.stderr
        with server(model) as other:
            assert other.status().epoch == 2


def test_a_crash_serves_the_new_files_and_the_log_says_so(home: Path, model: Path) -> None:
    with server(model) as llm:
        pid = llm.status().server_pid
        assert pid is not None
        (model / "model.safetensors").write_text("new ones")
        os.kill(pid, signal.SIGKILL)
        llm.wait_ready(60, after_epoch=1)
        with server(model):
            pass
        assert "have changed since the last epoch" in (home / str(llm.id) / "supervisor.log").read_text()


# -- point 13: one server for one thing --------------------------------------------------------------------------------


def test_one_folder_by_all_its_spellings_is_one_server(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model.parent / "link").symlink_to(model)
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    with server(model) as llm:
        for spelling in (f"{model}/", "model", "./model", "~/model", "link", Path("link")):
            with server(spelling) as other:
                assert (other.id, other.model) == (llm.id, str(model))


def test_one_value_by_all_its_spellings_is_one_server(home: Path) -> None:
    with server(max_model_len=512, tensor_parallel_size=1) as llm:
        for arguments in ({"max_model_len": "512"}, {"max_model_len": 512.0, "enforce_eager": False}):
            with server(**arguments) as other:
                assert other.id == llm.id


def test_an_explicit_address_that_is_the_servers_shares_it(home: Path) -> None:
    with server() as llm:
        port = int(llm.base_url.split(":")[2].removesuffix("/v1"))
        address: dict[str, Any]
        for address in ({"host": "127.0.0.1"}, {"host": "localhost"}, {"port": port}, {"api_key": llm.api_key}):
            with server(**address) as other:
                assert other.id == llm.id
        for address in ({"host": "127.0.0.2"}, {"port": port + 1}, {"uds": True}, {"api_key": KEY}):
            with pytest.raises(ConfigMismatchError):
                server(**address).start()


# -- point 15: relative paths ------------------------------------------------------------------------------------------


def test_demo_is_the_embedded_model_whatever_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from managed_vllm import demo
    from managed_vllm.config import ServerSpec

    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    by_name, by_path = ServerSpec.of("demo", engine_args={}), ServerSpec.of("./demo", engine_args={})
    assert (by_name.model, by_name.served_model_name) == (str(demo.weights_path()), "demo")
    assert by_path.model == ServerSpec.of(Path("demo"), engine_args={}).model == str(tmp_path / "demo")


def test_a_relative_command_and_pythonpath_are_the_callers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, script, *rest = standin.command()
    (tmp_path / "serve.sh").write_text(f'#!/bin/sh\nexec "{program}" "{script}" "$@"\n')
    (tmp_path / "serve.sh").chmod(0o755)
    (tmp_path / "serve.py").write_text(
        f"import os, sys; os.execv({program!r}, [{program!r}, {script!r}, *sys.argv[1:]])"
    )
    monkeypatch.setenv("PYTHONPATH", f"libs:{os.environ.get('PYTHONPATH', '')}")
    for words in (["./serve.sh", *rest], [program, "serve.py", *rest]):
        with server(command=words) as llm:
            assert llm.generate("x")
            assert f"{tmp_path}/libs" in environment_of(llm)["PYTHONPATH"].split(":")


# -- point 18: secrets -------------------------------------------------------------------------------------------------


def shown_by(llm: ManagedVLLM) -> str:
    """All that is printed, logged or pickled of a handle."""
    status = llm.status()
    return repr([llm, status, status.connection, str(status), pickle.dumps(status), pickle.dumps(status.connection)])


def files_of(home: Path) -> str:
    found = []
    for path in home.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a record that has just replaced the last one
            found += [path.read_text(errors="replace")] if path.is_file() else []
    return "\n".join(found)


def test_the_key_is_neither_printed_nor_pickled_nor_written(home: Path) -> None:
    with server() as llm:
        key = llm.api_key
        assert key not in shown_by(llm)
        assert key.encode() not in pickle.dumps(llm)
        assert key not in files_of(home)
        assert key not in command_lines()
        assert llm.status().connection.api_key == Secret(key)  # type: ignore[union-attr]


def test_secrets_in_arguments_and_variables_are_seen_by_the_server_alone(home: Path, tmp_path: Path) -> None:
    """The stand-in is started by a Python that writes down what it was given, and prints it."""
    program, script, *rest = standin.command()
    (tmp_path / "serve.py").write_text(
        f"import sys, os; open({str(tmp_path / 'told')!r}, 'w').write(repr((sys.argv, dict(os.environ))))\n"
        f"print(sys.argv, os.environ, flush=True); os.execv({program!r}, [{program!r}, {script!r}, *sys.argv[1:]])"
    )
    env = {"MY_PASSWORD": KEY, "HTTPS_PROXY": f"http://me:{KEY}@proxy"}
    with server(command=[program, str(tmp_path / "serve.py"), *rest], env=env, hf_token=KEY) as llm:
        told = (tmp_path / "told").read_text()
        assert f"'HF_TOKEN': '{KEY}'" in told
        assert f"'MY_PASSWORD': '{KEY}'" in told
        eventually(lambda: llm.logs(1000).count("***") >= 2, "what it has printed is in the log")
        assert KEY not in llm.logs(1000)
        assert KEY not in files_of(home)
        assert KEY not in command_lines()
        assert KEY not in repr(llm.status())
    with pytest.raises(ConfigError, match="pass it by env="):
        server(kv_transfer_config={"api_key": KEY}).start()


def test_what_users_are_is_shown_without_their_secrets(home: Path) -> None:
    words = ["serve", "--model", "stand-in", "--api-key", KEY, "--command", " ".join(standin.command())]
    serving = subprocess.Popen(
        [sys.executable, "-m", "managed_vllm.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert serving.stdout is not None
    while "stop:" not in serving.stdout.readline():
        assert serving.poll() is None
    for more in ([], ["--json"]):
        found = command_line("status", *more)
        assert "stand-in" in found.stdout
        assert KEY not in found.stdout
    assert KEY not in files_of(home)
    serving.send_signal(signal.SIGINT)
    serving.communicate(timeout=60)


def test_a_key_can_be_given_by_a_file(home: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    words = ["up", "--model", "stand-in", "--keep-alive", "0", "--api-key-file", str(tmp_path / "key"), "--command"]
    up = command_line(*words, " ".join(standin.command()), "--json")
    assert up.returncode == 0, up.stderr
    with ManagedVLLM(keep_alive=0) as llm:
        assert llm.api_key == KEY
        llm.unpin()
    for wrong, said in (("nowhere", "No such file"), (str(tmp_path), "Is a directory")):
        failed = command_line("serve", "--model", "x", "--api-key-file", wrong)
        assert failed.returncode == 2
        assert said in failed.stderr


def test_a_mismatch_shows_what_differs_but_no_secret(home: Path) -> None:
    with server(name="judge", max_num_batched_tokens=4096, hf_token=KEY):
        with pytest.raises(ConfigMismatchError) as caught:
            server(name="judge", max_num_batched_tokens=2048, hf_token="hf_another").start()
        assert caught.value.differences == {"max_num_batched_tokens": (2048, 4096), "hf_token": ("***", "***")}
        assert KEY not in str(caught.value)


# -- point 19: Kubernetes ----------------------------------------------------------------------------------------------


def test_service_links_of_kubernetes_do_not_reach_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VLLM_PORT": "tcp://10.0.0.7:8000", "VLLM_SERVICE_HOST": "10.0.0.7"}.items():
        monkeypatch.setenv(name, value)
    with server() as llm:
        assert not {"VLLM_PORT", "VLLM_SERVICE_HOST"} & environment_of(llm).keys()
        assert "VLLM_PORT" in (home / str(llm.id) / "supervisor.log").read_text()
        monkeypatch.setenv("VLLM_SERVICE_HOST", "10.0.0.9")
        with server() as same:
            assert same.id == llm.id


# -- point 29: typed errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"keep_alive": "5"}, "keep_alive"),
        ({"keep_alive": float("inf")}, "keep_alive"),
        ({"keep_alive": float("nan")}, "keep_alive"),
        ({"keep_alive": -1}, "keep_alive"),
        ({"startup_timeout": "5"}, "startup_timeout_s"),
        ({"startup_timeout": 0}, "startup_timeout_s"),
        ({"stop_grace": None}, "stop_grace_s"),
        ({"env": {"X": "a\0b"}}, "env"),
        ({"env": {"X": None}}, "env"),
        ({"env": ["X"]}, "env"),
        ({"api_key": "schlüssel"}, "api_key"),
        ({"api_key": "a\tb"}, "api_key"),
        ({"api_key": 5}, "api_key"),
        ({"port": 80.5}, "port"),
        ({"port": "80"}, "port"),
        ({"host": 5}, "host"),
        ({"host": "a b"}, "host"),
        ({"command": ["x\0", "{port}"]}, "command"),
        ({"command": "x {port}"}, "command"),
        ({"command": 5}, "command"),
        ({"python": 5, "command": None}, "python"),
        ({"python": "a\0b", "command": None}, "python"),
        ({"name": "a/b"}, "name"),
        ({"name": 5}, "name"),
        ({"max_model_len": Path}, "max_model_len"),
    ],
    ids=str,
)
def test_wrong_arguments_are_typed_errors_that_name_the_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ManagedVLLM("stand-in", **{"command": standin.command(), **options})
    assert caught.value.field == field


@pytest.mark.parametrize("model", ["", 5, "x" * 5000, "a\0b", b"model", "-m"])
def test_a_model_that_can_be_none_is_a_typed_error(model: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ManagedVLLM(model, command=standin.command())
    assert caught.value.field == "model"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["5s", "ten", "inf", "-1", "nan"])
def test_a_keep_alive_variable_that_is_no_duration_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MANAGED_VLLM_KEEP_ALIVE", text)
    with pytest.raises(ConfigError, match="MANAGED_VLLM_KEEP_ALIVE"):
        ManagedVLLM("stand-in", command=standin.command())


def test_the_variable_for_the_image_takes_the_words_of_the_flag(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANAGED_VLLM_WARM", "yes")
    with pytest.raises(ConfigError, match="MANAGED_VLLM_WARM is 'yes', but must be one of auto, on, off"):
        ManagedVLLM("stand-in")
    monkeypatch.setenv("MANAGED_VLLM_WARM", "on")
    with server() as llm:  # a command of one's own is launched plainly, whatever is wanted of all others
        assert llm.status().launch == "plain"


def test_asking_a_supervisor_that_hangs_is_a_typed_error_and_closing_does_not_wait_for_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = server()
    llm.start()
    supervisor = psutil.Process(llm.status().supervisor_pid)
    supervisor.suspend()
    monkeypatch.setattr(attach, "ANSWER_S", 1.0)
    try:
        with pytest.raises(SupervisorError, match="does not answer"):
            llm.status()
        llm.close()
    finally:
        supervisor.resume()
    assert_nothing_left(home)


@pytest.mark.parametrize("op", ["status", "pin", "unpin"])
def test_asking_a_supervisor_that_goes_is_a_typed_error(home: Path, op: str) -> None:
    llm, other = server(keep_alive=0), server(keep_alive=0)
    with llm, other:
        other.stop_server()
        with pytest.raises((ServerStoppedError, SupervisorError)):
            eventually(lambda: not all(getattr(llm, op)() is not False for _ in range(1000)), "it is gone")


def test_a_record_never_holds_invalid_json(home: Path) -> None:
    with server() as llm:
        record = (home / str(llm.id) / "instance.json").read_text()
        json.loads(record, parse_constant=lambda constant: pytest.fail(constant))
