"""Whether the server that runs is the one that a user asks for: compared before its lease counts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from managed_vllm import served_files
from managed_vllm.config import PROTOCOL, Address, ServerSpec, SupervisorOrder
from managed_vllm.errors import ConfigMismatchError, OtherNetworkError, SupervisorError
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.namespaces import network_namespace

log = logging.getLogger("managed_vllm")


def check(wanted: ServerSpec | None, address: Address, instance: Instance, reply: Mapping[str, Any]) -> SupervisorOrder:
    """The running supervisor's order, from its reply to a user that asked for a lease.

    `wanted` is None for a user that takes whatever runs.

    Raises `ConfigMismatchError`, `OtherNetworkError` or `SupervisorError` where that is not what is wanted.
    """
    check_protocol(reply, instance)
    running = _order_of(reply, instance)
    check_network(running.address, reply.get("network"), instance)
    if wanted is not None and wanted.identity != running.spec.identity:
        raise ConfigMismatchError(
            "another server holds this id", differences=wanted.differences(running.spec), instance=instance.id
        )
    check_address(address, running.address, instance.id, port=reply.get("port"))
    try:
        check_files(running.spec, reply.get("files"), instance.id)
    except ConfigMismatchError as error:
        if wanted is not None:  # whoever asks for a model wants it as it is now; else whatever runs
            raise
        log.warning("%s", error)
    return running


def check_room(instance: Instance, reply: Mapping[str, Any]) -> None:
    """Raises `SupervisorError` where a lease was refused because the supervisor has no descriptor left for one."""
    if "full" in reply:
        raise SupervisorError(
            f"the server has {reply['full']} users, as many as its supervisor may open files for; raise that limit "
            "(`ulimit -Hn`) where the server is started first, or share one handle among threads",
            instance=instance.id,
            log_path=str(instance.supervisor_log),
        )


def check_address(wanted: Address, running: Address, instance_id: str, *, port: int | None = None) -> None:
    """Raises `ConfigMismatchError` if an explicit address is not the running server's; `port` is where it listens.

    Starting a second server instead would put it on the same devices.
    """
    differences = wanted.differences(running, port=port)
    if differences:
        raise ConfigMismatchError(
            "the same server is running already, at another address; leave the address out to share it, "
            f"or end it first: managed-vllm down {instance_id}",
            differences=differences,
            instance=instance_id,
        )


def check_network(address: Address, theirs: str | None, instance: Instance) -> None:
    """Raises `OtherNetworkError` if the server listens on TCP in a network namespace that is not ours.

    Its 127.0.0.1 is not this process's: a request, with the key in it, would go to whoever listens there.
    """
    ours = network_namespace()
    if address.uds or theirs is None or ours is None or theirs == ours:
        return
    raise OtherNetworkError(
        "the server runs in another network namespace (a container, a unit with PrivateNetwork=), where its port can't "
        "be reached from here; give uds=True, so that it listens on a Unix socket in the state directory, or set "
        f"{directory.HOME_VARIABLE} to a directory that the two do not share",
        instance=instance.id,
        log_path=str(instance.supervisor_log),
    )


def check_files(spec: ServerSpec, served: served_files.Files | None, instance_id: str) -> None:
    """Raises `ConfigMismatchError` where the model's files are not what the running server has read.

    None: it has read nothing yet.
    """
    if served is None:
        return
    differences = served_files.changes(served, served_files.snapshot(spec))
    if differences:
        raise ConfigMismatchError(
            "the model's files have changed since the running server has read them; let it read them anew, for all its "
            f"users: managed-vllm restart {instance_id}",
            differences=differences,
            instance=instance_id,
        )


def is_of_another_version(said: Mapping[str, Any]) -> bool:
    """Whether a record, or a supervisor's reply, is of a version whose protocol is not ours."""
    return bool(said.get("protocol", PROTOCOL) != PROTOCOL)


def check_protocol(said: Mapping[str, Any], instance: Instance) -> None:
    """Raises `SupervisorError` where a record or a reply is of another version's supervisor."""
    if is_of_another_version(said):
        raise _another_version(instance)


def _another_version(instance: Instance) -> SupervisorError:
    return SupervisorError(
        "the server was started by another version of managed_vllm; use that one, or end the server: "
        f"managed-vllm down {instance.id}",
        instance=instance.id,
    )


def _order_of(reply: Mapping[str, Any], instance: Instance) -> SupervisorOrder:
    try:
        return SupervisorOrder.from_dict(reply["order"])
    except (KeyError, TypeError) as error:
        raise _another_version(instance) from error


def differences(spec: ServerSpec | None, record: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """How the server of a record differs from a spec; empty if that can't be told."""
    if spec is None:
        return {}
    try:
        return spec.differences(ServerSpec.from_dict(record["spec"]))
    except (KeyError, TypeError):
        return {}
