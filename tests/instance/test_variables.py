"""The environment variables of a server: the identity's, the first starter's, and what is neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from managed_vllm import variables
from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.errors import ConfigError
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.masking import Secret
from managed_vllm.policies import SupervisionPolicy

SERVICE = {
    "VLLM_SERVICE_HOST": "10.0.0.7",
    "VLLM_SERVICE_PORT": "8000",
    "VLLM_SERVICE_PORT_HTTP": "8000",
    "VLLM_PORT": "tcp://10.0.0.7:8000",
    "VLLM_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "VLLM_PORT_8000_TCP_PROTO": "tcp",
    "VLLM_PORT_8000_TCP_PORT": "8000",
    "VLLM_PORT_8000_TCP_ADDR": "10.0.0.7",
    "VLLM_GPU_BOX_SERVICE_HOST": "10.0.0.8",
    "VLLM_GPU_BOX_SERVICE_PORT": "80",
    "VLLM_GPU_BOX_PORT": "udp://10.0.0.8:80",
    "VLLM_GPU_BOX_PORT_80_UDP": "udp://10.0.0.8:80",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*variables.DEVICE_VARIABLES, *SERVICE):
        monkeypatch.delenv(name, raising=False)


def spec(**env: Any) -> ServerSpec:
    return ServerSpec.of("m", engine_args={}, env=env, command=["x", "{port}"])


def environment_of(one: ServerSpec) -> dict[str, str]:
    """What a server gets that is started from here."""
    order = SupervisorOrder.first(one, Address(), SupervisionPolicy())
    return {**order.environment.reveal(), **order.spec.variables()}


def test_devices_of_env_go_before_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    one, two = spec(CUDA_VISIBLE_DEVICES="1"), spec(CUDA_VISIBLE_DEVICES="2")
    assert one.key != two.key
    assert one.devices == {"CUDA_VISIBLE_DEVICES": "1"}
    assert environment_of(two)["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 1 ")
    assert spec().key == one.key


def test_no_devices_at_all_is_not_the_same_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = spec()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert spec().key != unset.key
    assert environment_of(spec())["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(unset)


def test_the_server_gets_what_the_spec_says_and_nothing_of_that_kind_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("VLLM_USE_THIS", "first")
    asked = spec()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("VLLM_USE_THIS", "later")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "OTHER")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setenv(lifeline.ROOT, "77")
    given = environment_of(asked)
    assert given["CUDA_VISIBLE_DEVICES"] == "0"
    assert given["VLLM_USE_THIS"] == "first"
    assert given["HTTPS_PROXY"] == "http://proxy"
    assert not {"VLLM_ATTENTION_BACKEND", "ROCR_VISIBLE_DEVICES", lifeline.ROOT} & given.keys()


def test_what_the_spec_covers_is_not_in_what_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later starter gets this from the first one, and must find nothing in it that its own spec contradicts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("VLLM_USE_THIS", "x")
    order = SupervisorOrder.first(spec(), Address(), SupervisionPolicy())
    assert not {"CUDA_VISIBLE_DEVICES", "VLLM_USE_THIS"} & order.environment.reveal().keys()


def test_service_links_of_kubernetes_are_neither_in_the_key_nor_in_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = spec()
    for name, value in SERVICE.items():
        monkeypatch.setenv(name, value)
    assert spec().key == plain.key
    assert not SERVICE.keys() & environment_of(spec()).keys()
    monkeypatch.setenv("VLLM_SERVICE_HOST", "10.0.0.9")
    assert spec().key == plain.key


def test_what_only_looks_like_a_service_link_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PORT", "5000")
    monkeypatch.setenv("VLLM_SERVICE_HOST", "mine")
    assert variables.service_links({"VLLM_PORT": "5000", "REDIS_PORT": "tcp://10.0.0.1:6379"}) == frozenset()
    assert spec().env == {"VLLM_SERVICE_HOST": "mine"}
    assert environment_of(spec())["VLLM_PORT"] == "5000"


def test_a_port_that_is_no_number_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PORT", "http")
    with pytest.raises(ConfigError, match="VLLM_PORT") as caught:
        environment_of(spec())
    assert caught.value.field == "VLLM_PORT"


def test_relative_paths_in_the_environment_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "libs:.")
    monkeypatch.setenv("HF_HOME", "hf")
    given = environment_of(spec(VLLM_CACHE_ROOT="./cache", VLLM_CONFIG_ROOT="config"))
    assert given["PYTHONPATH"] == f"{tmp_path}/libs:{tmp_path}"
    assert given["HF_HOME"] == f"{tmp_path}/hf"
    assert given["VLLM_CACHE_ROOT"] == f"{tmp_path}/cache"
    assert given["VLLM_CONFIG_ROOT"] == f"{tmp_path}/config"


def test_values_become_text() -> None:
    assert environment_of(spec(X=Secret("s")))["X"] == "s"
    assert spec(OMP_NUM_THREADS=4, X=0.5, P=Path("/x")).env == {"OMP_NUM_THREADS": "4", "P": "/x", "X": "0.5"}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"X": "a\0b"}, "NUL"),
        ({"A=B": "1"}, "name"),
        ({"": "1"}, "name"),
        ({"A\0": "1"}, "name"),
        ({"HF_HUB_OFFLINE": None}, "leave the name out"),
        ({"HF_HUB_OFFLINE": True}, "not bool"),
        ({"X": ["a"]}, "not list"),
        ({"VLLM_API_KEY": "x"}, "api_key="),
        ({"TMPDIR": "/x"}, "temporary directory of its own"),
        ({lifeline.MARKER: "/x"}, "ours"),
    ],
)
def test_what_can_be_no_variable_is_refused(env: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        spec(**env)
    assert caught.value.field == "env"


def test_an_error_does_not_show_the_value() -> None:
    with pytest.raises(ConfigError) as caught:
        spec(HF_TOKEN="hf_S3CRET\0")
    assert "S3CRET" not in str(caught.value)
