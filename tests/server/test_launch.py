"""Where a server listens and what is in its environment, from one epoch to the next."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port
from processes import eventually

from managed_vllm.config import Address, ServerSpec, SupervisorOrder, vllm_folder
from managed_vllm.in_server import managed_vllm_guard
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance.directory import Instance
from managed_vllm.masking import Secret
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.server import launch
from managed_vllm.server.launch import Launch


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(tmp_path, "m-0123456789")


def order(*, env: dict[str, str] | None = None, **address: Any) -> SupervisorOrder:
    return SupervisorOrder.first(
        spec=ServerSpec.of("m", engine_args={}, env=env, command=["it", "--port", "{port}", "{uds}"]),
        address=Address(**{"api_key": Secret("key"), **address}),
        policy=SupervisionPolicy(),
    )


def prepare(instance: Instance, asked: SupervisorOrder, last_port: int | None = None) -> Launch:
    return launch.prepare(asked, instance, scratch=Path("/scratch"), last_port=last_port)


@pytest.mark.skipif(vllm_folder() is None, reason="what flags there are is read from vLLM's source")
@pytest.mark.parametrize(
    ("grace_s", "given", "flag"),
    [(5.0, {}, None), (60.0, {}, "--shutdown-timeout=55"), (60.0, {"shutdown_timeout": 7}, "--shutdown-timeout=7")],
)
def test_a_grace_beyond_the_default_is_left_to_requests_in_flight(
    grace_s: float, given: dict[str, Any], flag: str | None
) -> None:
    spec = ServerSpec.of("m", engine_args=given)
    asked = SupervisorOrder.first(spec, Address(), SupervisionPolicy(stop_grace_s=grace_s))
    words = asked.argv(host="127.0.0.1", port=1, uds=None)
    assert [word for word in words if word.startswith("--shutdown-timeout")] == ([flag] if flag else [])


# -- the address -------------------------------------------------------------------------------------------------------


def test_a_server_listens_on_a_free_port_of_loopback(instance: Instance) -> None:
    launched = prepare(instance, order())
    eventually(lambda: can_be_listened_on(prepare(instance, order()).port), "it is free")
    assert launched.connection.base_url == f"http://127.0.0.1:{launched.port}/v1"
    assert launched.connection.api_key.reveal() == "key"
    assert launched.argv == ["it", "--port", str(launched.port), "None"]


def can_be_listened_on(port: int | None) -> bool:
    """Not where somebody else has been given it meanwhile."""
    assert port
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_the_next_epoch_keeps_the_port_unless_somebody_took_it(instance: Instance) -> None:
    first = free_port()
    assert prepare(instance, order(), first).port == first
    with socket.create_server(("127.0.0.1", first)):
        assert prepare(instance, order(), first).port != first


def test_the_kernel_gives_the_port_to_nobody_else_meanwhile(instance: Instance) -> None:
    lowest_given = int(launch.GIVEN_PORTS.read_text().split()[0])
    if lowest_given < 11_000:
        pytest.skip("the kernel gives nearly all ports of this machine")
    assert 10_000 <= (prepare(instance, order()).port or 0) < min(lowest_given, 30_000)


def test_where_the_kernel_gives_nearly_all_ports_it_gives_ours(
    instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "range"
    given.write_text("1024\t60999\n")
    monkeypatch.setattr(launch, "GIVEN_PORTS", given)
    with socket.create_server(("127.0.0.1", prepare(instance, order()).port or 0)):
        pass


def test_a_port_that_was_asked_for_is_taken_as_it_is(instance: Instance) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert prepare(instance, order(port=port), last_port=None).port == port


@pytest.mark.parametrize(
    ("host", "reached_at"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("localhost", "localhost"),
        ("127.0.0.2", "127.0.0.2"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_users_get_an_address_that_they_can_connect_to(instance: Instance, host: str, reached_at: str) -> None:
    launched = prepare(instance, order(host=host, port=8000))
    assert launched.connection.base_url == f"http://{reached_at}:8000/v1"


def test_a_unix_socket_means_no_port_and_no_stale_file(instance: Instance) -> None:
    instance.create()
    instance.uds_path.touch()
    launched = prepare(instance, order(uds=True))
    assert launched.port is None
    assert launched.connection.uds == launched.argv[-1] == str(instance.uds_path)
    assert not instance.uds_path.exists()


# -- the environment ---------------------------------------------------------------------------------------------------


def test_the_environment_marks_every_process_and_names_the_supervisor(instance: Instance) -> None:
    environment = prepare(instance, order()).environment
    assert environment[lifeline.MARKER] == instance.marker
    ours = os.getpid(), lifeline.start_time(os.getpid()), lifeline.pid_namespace()
    assert environment[lifeline.SUPERVISOR] == ":".join(map(str, ours))
    assert environment["TMPDIR"] == "/scratch"
    assert environment["VLLM_API_KEY"] == "key"


def test_what_runs_in_the_server_is_found_before_what_the_user_wants_found(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_server = str(Path(lifeline.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert prepare(instance, order()).environment["PYTHONPATH"] == f"{in_server}:/ours"
    assert prepare(instance, order(env={"PYTHONPATH": "/asked"})).environment["PYTHONPATH"] == f"{in_server}:/asked"
    monkeypatch.delenv("PYTHONPATH")
    assert prepare(instance, order()).environment["PYTHONPATH"] == in_server


def test_the_users_variables_win_but_not_over_what_guards_the_server(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIN", "ours")
    monkeypatch.setenv(lifeline.ROOT, "77")  # we run inside of another server
    monkeypatch.setenv("VLLM_API_KEY", "none")
    monkeypatch.setenv("TMPDIR", "/x")
    asked = order(env={"PLAIN": "asked", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "7"})
    environment = prepare(instance, asked).environment
    assert environment["PLAIN"] == "asked"
    assert environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "7"
    assert environment["VLLM_API_KEY"] == "key"
    assert environment["TMPDIR"] == "/scratch"
    assert lifeline.ROOT not in environment


def test_a_server_that_must_be_put_back_is_held_until_it_is_admitted(instance: Instance, tmp_path: Path) -> None:
    assert managed_vllm_guard.HELD not in prepare(instance, order()).environment
    launched = launch.prepare(order(), instance, scratch=tmp_path, last_port=None, held=True)
    hold = Path(launched.environment[managed_vllm_guard.HELD])
    assert hold.exists()
    launched.admit()
    launched.admit()
    assert not hold.exists()


def test_a_launch_is_a_value(instance: Instance) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepare(instance, order()).port = 1  # type: ignore[misc]


# -- control of the engine ---------------------------------------------------------------------------------------------


def of_vllm(instance: Instance, *, env: dict[str, str] | None = None, **engine_args: Any) -> Launch:
    spec = ServerSpec.of("m", engine_args=engine_args, env=env)
    asked = SupervisorOrder(spec=spec, address=Address(api_key=Secret("key")), policy=SupervisionPolicy())
    return prepare(instance, asked)


def test_the_routes_that_control_the_engine_are_on_and_the_guard_keeps_them_to_us(instance: Instance) -> None:
    launched = of_vllm(instance, enable_lora=True)
    environment = launched.environment
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["MANAGED_VLLM_CONTROL_KEY"] == launched.control_key.reveal() != "key"
    assert environment["MANAGED_VLLM_CONTROLLED"] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_SERVER_DEV_MODE"
    assert of_vllm(instance).control_key != launched.control_key


def test_adapters_at_run_time_are_for_servers_that_can_have_them(instance: Instance) -> None:
    """vLLM refuses to start several API servers with them (0.32: entrypoints/cli/serve.py)."""
    without = (
        of_vllm(instance),
        of_vllm(instance, enable_lora=True, data_parallel_size=2),
        of_vllm(instance, enable_lora=True, api_server_count=2),
    )
    assert [one for one in without if "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in one.environment] == []


def test_whoever_switches_the_routes_on_has_them_with_the_ordinary_key(instance: Instance) -> None:
    mine = of_vllm(instance, env={"VLLM_SERVER_DEV_MODE": "1"}, enable_lora=True)
    assert mine.control_key == Secret("key")
    assert "MANAGED_VLLM_CONTROL_KEY" not in mine.environment
    lora = of_vllm(instance, env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, enable_lora=True)
    assert lora.environment["MANAGED_VLLM_CONTROLLED"] == "VLLM_SERVER_DEV_MODE"
    off = of_vllm(instance, env={"VLLM_SERVER_DEV_MODE": "0"})
    assert off.environment["VLLM_SERVER_DEV_MODE"] == "0"


@pytest.mark.parametrize("given", [True, False, None])
def test_the_guard_keeps_what_scale_out_opens_to_us_unless_a_user_asked_for_it(
    instance: Instance, given: bool | None
) -> None:
    spec = ServerSpec.of("m", engine_args={} if given is None else {"enable_scale_out": given})
    asked = SupervisorOrder.first(spec, Address(api_key=Secret("key")), SupervisionPolicy())
    if "enable_scale_out" not in {*asked.defaults, *spec.engine_args}:
        pytest.skip("the installed vLLM has no such argument")
    launched = prepare(instance, asked)
    assert ("--enable-scale-out" in launched.argv) is (given is not False)
    assert ("enable_scale_out" in launched.environment["MANAGED_VLLM_CONTROLLED"]) is (given is None)


def test_nothing_is_switched_on_in_a_program_that_may_have_no_guard(instance: Instance) -> None:
    launched = prepare(instance, order())
    assert launched.control_key == Secret("key")
    assert {"VLLM_SERVER_DEV_MODE", "MANAGED_VLLM_CONTROL_KEY"}.isdisjoint(launched.environment)
