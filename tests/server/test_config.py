"""What to serve: who shares a server, what may stand in a file, which command starts it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from managed_vllm.config import Address, ServerSpec, SupervisorOrder, installed_vllm
from managed_vllm.errors import ConfigError
from managed_vllm.masking import Secret
from managed_vllm.policies import HangPolicy, RestartPolicy, SupervisionPolicy

COMMAND = ["serve-it", "--port", "{port}"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "VLLM_USE_V1", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def spec(model: str = "some/model", *, env: dict[str, str] | None = None, **engine_args: Any) -> ServerSpec:
    return ServerSpec.of(model, engine_args=engine_args, env=env, command=COMMAND)


# -- the key -----------------------------------------------------------------------------------------------------------


def test_the_same_arguments_in_any_order_share_a_server() -> None:
    one, other = spec(max_model_len=512, enforce_eager=True), spec(enforce_eager=True, max_model_len=512)
    assert one == other
    assert one.key == other.key


@pytest.mark.parametrize(
    "other",
    [
        lambda: spec("another/model"),
        lambda: spec(max_model_len=512),
        lambda: spec(env={"HF_HUB_OFFLINE": "1"}),
        lambda: spec(served_model_name="it"),
        lambda: ServerSpec.of("some/model", engine_args={}, command=[*COMMAND, "--more"]),
    ],
)
def test_whatever_changes_the_server_changes_the_key(other: Any) -> None:
    assert other().key != spec().key


def test_variables_that_change_answers_are_part_of_it_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = spec().key
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert spec().key == plain
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    on_one = spec()
    assert on_one.devices == {"CUDA_VISIBLE_DEVICES": "1"}
    assert on_one.key != plain
    monkeypatch.setenv("VLLM_USE_V1", "0")
    assert spec().key not in (plain, on_one.key)


def test_the_key_begins_with_what_a_person_recognises() -> None:
    assert spec("Qwen/Qwen3-VL-8B").key.startswith("qwen3-vl-8b-")
    assert spec(served_model_name="§").key.startswith("server-")


def test_a_folder_is_the_same_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert spec("model").model == spec(str(tmp_path / "model")).model == str(tmp_path / "model")


# -- secrets and differences -------------------------------------------------------------------------------------------


def test_no_secret_stands_in_what_is_written_to_a_file() -> None:
    secret = spec(env={"HF_TOKEN": "hf_abc", "PLAIN": "seen"}, some_api_key="sk-123")
    written = json.dumps(secret.masked().to_dict())
    assert "hf_abc" not in written
    assert "sk-123" not in written
    assert "seen" in written


def test_masking_is_stable_and_tells_secrets_apart() -> None:
    one, other = spec(env={"HF_TOKEN": "a"}), spec(env={"HF_TOKEN": "b"})
    assert one.masked() == one.masked().masked()
    assert one.masked() != other.masked()


def test_differences_name_each_field_and_hide_secrets() -> None:
    one = spec(max_model_len=512, env={"HF_TOKEN": "a"})
    other = spec(max_model_len=1024, enforce_eager=True, env={"HF_TOKEN": "b"})
    differences = one.differences(other)
    assert differences["max_model_len"] == (512, 1024)
    assert differences["enforce_eager"] == (None, True)
    assert set(differences) == {"max_model_len", "enforce_eager", "env HF_TOKEN"}
    assert differences["env HF_TOKEN"] == ("***", "***")
    assert one.differences(one) == {}


def test_differences_from_a_record_are_those_from_the_spec() -> None:
    one, other = spec(env={"HF_TOKEN": "a"}), spec(max_model_len=8, env={"HF_TOKEN": "a"})
    recorded = ServerSpec.from_dict(json.loads(json.dumps(other.masked().to_dict())))
    assert one.differences(recorded) == {"max_model_len": (None, 8)}


# -- there and back ----------------------------------------------------------------------------------------------------


def test_an_order_goes_to_the_supervisor_and_back_without_loss() -> None:
    order = SupervisorOrder(
        spec=spec(max_model_len=512, speculative_config={"method": "ngram"}, env={"A": "b"}),
        address=Address(host="0.0.0.0", port=8000, api_key=Secret("key")),
        policy=SupervisionPolicy(
            stop_grace_s=1.0,
            restart=RestartPolicy(not_retried=frozenset({"killed"})),
            hang=HangPolicy.never(),
        ),
    )
    assert SupervisorOrder.from_dict(json.loads(json.dumps(order.to_dict()))) == order


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_words_of_a_command_are_filled_in() -> None:
    words = ["it", "--at", "{host}:{port}", "--as={name}", "{model}", "{unknown}"]
    given = ServerSpec.of("some/model", engine_args={"served_model_name": "m"}, command=words)
    assert given.argv(host="h", port=1, uds=None) == ["it", "--at", "h:1", "--as=m", "some/model", "{unknown}"]


def test_args_stands_for_all_flags_of_vllm() -> None:
    given = ServerSpec.of("some/model", engine_args={"max_model_len": 8}, command=["it", "{args}"])
    assert given.argv(host="h", port=1, uds=None) == [
        *("it", "--model", "some/model", "--host", "h", "--port", "1"),
        *("--served-model-name=some/model", "--max-model-len=8"),
    ]
    assert "--host" not in given.argv(host="h", port=None, uds="/run/api.sock")


def test_vllm_is_started_with_the_guard_and_without_the_key_in_its_words() -> None:
    given = dataclasses.replace(spec(), command=None, vllm="vllm 0.32.0")
    argv = given.argv(host="h", port=1, uds=None)
    assert argv[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    assert argv[argv.index("--middleware") + 1] == "managed_vllm_guard.KeyGuard"
    assert not any("key=" in word or "--api-key" in word for word in argv)


def test_ray_s_executor_goes_through_without_what_its_workers_would_not_find() -> None:
    arguments: dict[str, Any] = {"distributed_executor_backend": "ray", "tensor_parallel_size": 8}
    across = ServerSpec.of("some/model", engine_args={**arguments, "pipeline_parallel_size": 2})
    argv = dataclasses.replace(across, vllm="vllm 0.32.0").argv(host="h", port=1, uds=None)
    assert "--distributed-executor-backend=ray" in argv
    assert {"--tensor-parallel-size=8", "--pipeline-parallel-size=2"} <= set(argv)
    assert "--worker-extension-cls" not in argv
    plain = dataclasses.replace(spec(), command=None, vllm="vllm 0.32.0")
    assert "--worker-extension-cls" in plain.argv(host="h", port=1, uds=None)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Address(port=0), "port"),
        (lambda: Address(port=65536), "port"),
        (lambda: Address(uds=True, port=8000), "uds"),
        (lambda: Address(api_key=Secret("two words")), "api_key"),
        (lambda: Address(api_key=Secret("")), "api_key"),
        (lambda: Address(host="0.0.0.0"), "host"),
        (lambda: spec(""), "model"),
        (lambda: ServerSpec.of("m", engine_args={}, command="serve it"), "command"),
        (lambda: ServerSpec.of("m", engine_args={}, command=[]), "command"),
        (lambda: ServerSpec.of("m", engine_args={}, command=["it", "--port", "8000"]), "command"),
        (lambda: ServerSpec.of("m", engine_args={}, command=COMMAND, python="python3"), "command"),
    ],
)
def test_what_can_be_known_to_be_wrong_is_refused_by_its_field(make: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field


def test_an_interpreter_may_be_a_name_that_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "my-python"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    for name in ("my-python", "./my-python", program):
        assert ServerSpec.of("m", engine_args={}, python=name).python == str(program)
    assert ServerSpec.of("m", engine_args={}, python="other-python").python == str(tmp_path / "other-python")


def test_an_interpreter_without_vllm_is_known_without_running_it(tmp_path: Path) -> None:
    assert installed_vllm(tmp_path / "bin" / "python") == "vllm missing"
