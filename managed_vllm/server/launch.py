"""How one epoch of the server is launched: where it listens, what is in its environment, which command runs.

Values in, values out; nothing is started here. From epoch to epoch the key stays the same, and the port where it can.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from managed_vllm import variables
from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.in_server import managed_vllm_guard
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
from managed_vllm.masking import Secret, reveal
from managed_vllm.server.devices import TakenDevices
from managed_vllm.socket_paths import LONGEST_PATH
from managed_vllm.status import Connection, is_loopback

log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Which ports the kernel gives to whoever asks for any."""
_LOWEST_PORT, _HIGHEST_PORT, _FEWEST_PORTS = 10_000, 30_000, 1_000
"""Kubernetes redirects connections to ports from 30,000 on without anybody listening there (its node ports)."""
_PORTS_TRIED = 50


@dataclass(frozen=True)
class Launch:
    """All that it takes to start the server and to reach it. `port` is None for a server on a Unix socket.

    `control_key` is the key for the routes that change the engine for everybody. `places` are descriptors that it
    inherits, so that its devices are taken as long as it lives (`managed_vllm.server.places`). As long as the file
    `hold` exists, its guard admits no requests of users.
    """

    argv: list[str]
    environment: Mapping[str, str]
    connection: Connection
    port: int | None
    control_key: Secret
    places: tuple[int, ...] = ()
    hold: Path | None = None

    def admit(self) -> None:
        """Users' requests may come."""
        if self.hold is not None:
            self.hold.unlink(missing_ok=True)


def prepare(
    order: SupervisorOrder,
    instance: Instance,
    *,
    scratch: Path,
    last_port: int | None,
    devices: TakenDevices = TakenDevices(),  # noqa: B008  (frozen)
    held: bool = False,
) -> Launch:
    """The launch of the next epoch. `scratch` is the server's temporary folder, `last_port` the port it had before.

    `held`: it is not yet what users should meet, until `Launch.admit`.

    `order.address.api_key` must be set: the server is never without one.
    """
    spec, address = order.spec, order.address
    uds = str(_uds_path(instance, scratch)) if address.uds else None
    if uds is not None:
        Path(uds).unlink(missing_ok=True)  # vLLM leaves it behind, and then can't bind it (0.32)
    port = None if uds is not None else _choose_port(address, last_port)
    environment = {**_environment(order, instance, scratch), **devices.variables}
    controls = _controls(order, environment)
    hold = None
    if held:
        hold = scratch / "held"
        hold.touch()
        environment[managed_vllm_guard.HELD] = str(hold)
    return Launch(
        argv=order.argv(host=address.host or _LOOPBACK, port=port, uds=uds),
        environment={**environment, **controls},
        connection=Connection(
            base_url="http://localhost/v1" if uds is not None else f"http://{reachable(address.host)}:{port}/v1",
            api_key=address.api_key or Secret(""),
            model=spec.served_model_name,
            uds=uds,
        ),
        port=port,
        control_key=Secret(controls.get(managed_vllm_guard.CONTROL_KEY) or reveal(address.api_key) or ""),
        places=devices.descriptors,
        hold=hold,
    )


def _uds_path(instance: Instance, scratch: Path) -> Path:
    """In the instance's folder, or in the server's temporary one if the kernel does not take so long a path."""
    path = instance.uds_path
    return path if len(os.fsencode(path)) <= LONGEST_PATH else scratch / path.name


def _environment(order: SupervisorOrder, instance: Instance, scratch: Path) -> dict[str, str]:
    """The server's environment: its first starter's, what the spec says, and what marks and guards it."""
    in_server = str(Path(lifeline.__file__).parent)
    replica = {} if instance.replica is None else {lifeline.REPLICA: lifeline.replica_value(instance.replica)}
    given = {**order.environment.reveal(), "PYTHONUNBUFFERED": "1", **order.spec.variables()}
    path = given.get("PYTHONPATH")
    if links := sorted(variables.service_links(os.environ)):
        log.info("not passed on, because a service of Kubernetes is behind them: %s", ", ".join(links))
    return {
        # torch keeps compiled kernels, which are run as code, in the temp dir unless told otherwise: ours lives only as
        # long as the server, and in the common one another user might have put them.
        "TORCHINDUCTOR_CACHE_DIR": str(directory.cache_folder("torchinductor")),
        **given,
        "PYTHONPATH": f"{in_server}{os.pathsep}{path}" if path else in_server,
        "TMPDIR": str(scratch),
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_API_KEY": reveal(order.address.api_key) or "",
        # vLLM's setproctitle would wipe the environment, and our marker with it.
        "SPT_NOENV": "1",
        **replica,
        **marks(instance),
    }


def marks(instance: Instance) -> dict[str, str]:
    """What marks a process as one of the instance's, and as begun by us."""
    return {
        lifeline.MARKER: instance.marker,
        lifeline.SUPERVISOR: f"{os.getpid()}:{lifeline.start_time(os.getpid())}:{lifeline.pid_namespace()}",
    }


def _controls(order: SupervisorOrder, environment: Mapping[str, str]) -> dict[str, str]:
    """What switches the routes that control the engine on, and has the guard keep them to us.

    A user that has switched them on itself has them with the ordinary key, as vLLM itself would have it. A command= may
    start anything, without our guard: nothing is switched on there.
    """
    spec = order.spec
    if spec.command is not None:
        return {}
    wanted = {managed_vllm_guard.DEV_MODE: "1"}
    if spec.engine_args.get("enable_lora") and not _has_several_api_servers(spec):
        wanted[managed_vllm_guard.LORA_UPDATING] = "1"
    ours = {name: value for name, value in wanted.items() if name not in environment}
    if _is_on(environment.get(managed_vllm_guard.DEV_MODE)):
        return ours
    scale_out = [managed_vllm_guard.SCALE_OUT] if managed_vllm_guard.SCALE_OUT in order.defaults else []
    guarded = {managed_vllm_guard.CONTROLLED: " ".join(sorted([*ours, *scale_out]))}
    return {**ours, **guarded, managed_vllm_guard.CONTROL_KEY: secrets.token_urlsafe(32)}


def _is_on(value: str | None) -> bool:
    """As vLLM reads its variables."""
    return (value or "0").strip().lower() in ("1", "true")


def _has_several_api_servers(spec: ServerSpec) -> bool:
    """vLLM refuses to start several ones with adapters that are loaded at run time (0.32: entrypoints/cli/serve.py)."""
    asked = [spec.engine_args.get(name) for name in ("api_server_count", "data_parallel_size")]
    return any(str(value) not in ("None", "1") for value in asked)


# -- the address -------------------------------------------------------------------------------------------------------


def _choose_port(address: Address, last: int | None) -> int:
    """The port that was asked for, else the last one if nobody took it meanwhile, else a free one."""
    if address.port is not None:
        return address.port
    host = address.host or _LOOPBACK
    return last if last is not None and _is_free(host, last) else _free_port(host)


def reachable(host: str | None) -> str:
    """The host part of the URL for users on this machine: an address that means "all" can't be connected to."""
    host = host or _LOOPBACK
    if not is_loopback(host):
        host = {"0.0.0.0": _LOOPBACK, "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _free_port(host: str) -> int:
    """A free port, where possible none of those that the kernel gives to connections and to port 0.

    Up to minutes pass until vLLM, which is being imported, binds it, and again after each restart. One of the kernel's
    would now and then be somebody's by then.
    """
    for port in _ports_not_given():
        if _is_free(host, port):
            return port
    return _given_port(host)


def _ports_not_given() -> Iterator[int]:
    try:
        room = min(int(GIVEN_PORTS.read_text().split()[0]), _HIGHEST_PORT) - _LOWEST_PORT
    except (OSError, ValueError, IndexError):
        return
    if room >= _FEWEST_PORTS:
        yield from (_LOWEST_PORT + secrets.randbelow(room) for _ in range(_PORTS_TRIED))


def _given_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:  # not an address of this machine: vLLM says so itself
            probe.bind(("::1" if family == socket.AF_INET6 else _LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
