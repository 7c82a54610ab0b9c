"""Leases, directly: one process holds both ends, the supervisor's on an event loop and the users' in threads."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import lone_server
import pytest
from lone_server import LIMIT_S, answered

from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.errors import SupervisorError
from managed_vllm.instance import admission, leases
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.leases import Leases
from managed_vllm.masking import Secret
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.socket_paths import short_path
from managed_vllm.status import ServerState, ServerStatus

ORDER = SupervisorOrder(
    spec=ServerSpec.of("m", engine_args={}, command=["it", "{port}"]),
    address=Address(api_key=Secret("secret")),
    policy=SupervisionPolicy(),
)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late a test's first user comes, the end is not decided before."""
    monkeypatch.setattr(leases, "FIRST_LEASE_S", 3600.0)


@dataclasses.dataclass
class Supervisor:
    """What stands in for it: a status, and what it was told."""

    instance: Instance
    status: ServerStatus
    ended: asyncio.Future[str]
    restarts: int = 0

    def end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    def restart(self) -> None:
        self.restarts += 1


@asynccontextmanager
async def listening(folder: Path) -> AsyncIterator[tuple[Supervisor, Leases]]:
    instance = Instance(folder, "m-0123456789")
    instance.create()
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    supervisor = Supervisor(instance, ServerStatus(ServerState.STARTING), ended)
    held = Leases(
        instance, ORDER, status=lambda: supervisor.status, on_end=supervisor.end, on_restart=supervisor.restart
    )
    await held.listen()
    try:
        yield supervisor, held
    finally:
        held.close()


def run(folder: Path, scenario: Callable[[Supervisor, Leases], Awaitable[None]]) -> None:
    async def main() -> None:
        async with listening(folder) as (supervisor, held):
            await scenario(supervisor, held)

    lone_server.run(main)


async def connect(supervisor: Supervisor) -> Channel:
    return await asyncio.to_thread(Channel.connect, supervisor.instance.socket_path)


async def ask(channel: Channel, op: str, **fields: Any) -> dict[str, Any]:
    return await asyncio.to_thread(channel.request, op, **fields)


async def lease(supervisor: Supervisor, keep_alive_s: float = 0.0) -> Channel:
    channel = await connect(supervisor)
    assert (await ask(channel, "lease", keep_alive_s=keep_alive_s, what="a test"))["ok"]
    return channel


async def left(held: Leases, users: int) -> None:
    """Until there are so many; asked in the loop that counts them."""

    async def has_them() -> bool:
        return held.status().users == users

    await answered(has_them)


def connected(supervisor: Supervisor) -> socket.socket:
    """A connection without a `Channel`."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(supervisor.instance.socket_path) as name:
        made.connect(name)
    return made


def long_text() -> str:
    """Some twenty of it fill what the kernel holds for one that does not read, however much that is on this machine."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as any_one:
        return "x" * max(10_000, any_one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 20)


async def told(channel: Channel, condition: Callable[[ServerStatus | None], bool]) -> ServerStatus | None:
    return await asyncio.to_thread(channel.wait_until, condition, LIMIT_S)


def test_a_lease_tells_all_that_it_takes_to_start_the_same_server_again(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        reply = await ask(await connect(supervisor), "lease", keep_alive_s=7, what="a test")
        assert SupervisorOrder.from_dict(reply["order"]) == ORDER
        status = ServerStatus.from_dict(reply["status"])
        assert status.users == 1
        assert status.extra["keep_alive_s"] == 7
        assert [(user["pid"], user["what"]) for user in status.extra["users"]] == [(os.getpid(), "a test")]

    run(tmp_path, scenario)


def test_every_lease_is_sent_each_status_and_whoever_only_looks_is_not(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        users = [await lease(supervisor) for _ in range(3)]
        onlooker = await connect(supervisor)
        await ask(onlooker, "status")
        supervisor.status = dataclasses.replace(supervisor.status, state=ServerState.READY)
        held.publish()
        for user in users:
            status = await told(user, lambda now: now is not None and now.state is ServerState.READY)
            assert status is not None
            assert status.users == 3
        assert onlooker.status is not None
        assert onlooker.status.state is ServerState.STARTING

    run(tmp_path, scenario)


def test_the_last_user_gone_ends_it_and_an_earlier_one_does_not(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        first, last = await lease(supervisor), await lease(supervisor)
        first.close()
        await left(held, 1)
        assert not supervisor.ended.done()
        last.close()
        assert await supervisor.ended == "the last user is gone"

    run(tmp_path, scenario)


def test_a_user_that_is_killed_gives_its_lease_back(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from managed_vllm.instance.channel import Channel\n"
        "Channel.connect(Path(sys.argv[1])).request('lease', keep_alive_s=0)\n"
        "print(flush=True); time.sleep(60)"
    )

    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        user = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, str(supervisor.instance.socket_path)), stdout=asyncio.subprocess.PIPE
        )
        assert user.stdout is not None
        await user.stdout.readline()
        assert held.status().users == 1
        user.kill()
        assert await supervisor.ended == "the last user is gone"
        assert held.status().users == 0
        await user.wait()

    run(tmp_path, scenario)


def test_a_pin_takes_the_place_of_a_user(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        user, onlooker = await lease(supervisor), await connect(supervisor)
        assert (await ask(onlooker, "pin"))["status"]["pinned"]
        user.close()
        await left(held, 0)
        assert not supervisor.ended.done()
        await ask(onlooker, "unpin")
        assert await supervisor.ended == "the last user is gone"

    run(tmp_path, scenario)


def test_nobody_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FIRST_LEASE_S", 0.1)

    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        await connect(supervisor)  # a look is no lease
        assert await supervisor.ended == "nobody took a lease"

    run(tmp_path, scenario)


def test_the_longest_keep_alive_of_all_holds(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        patient = await lease(supervisor, keep_alive_s=3600)
        hasty = await lease(supervisor, keep_alive_s=0)
        for user in (patient, hasty):
            user.close()
        await left(held, 0)
        assert not supervisor.ended.done()
        assert held.status().extra["keep_alive_s"] == 3600

    run(tmp_path, scenario)


def test_once_the_end_was_decided_nobody_is_let_in(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        user = await lease(supervisor)
        held.refuse_new()
        late = await connect(supervisor)
        reply = await ask(late, "lease", keep_alive_s=0)
        assert not reply["ok"]
        assert reply["status"]["state"] == ServerState.STOPPING
        held.close()
        for channel in (user, late):
            await told(channel, lambda _: False)
            assert channel.closed
            assert not channel.given_back

    run(tmp_path, scenario)


def test_a_failure_is_told_to_whoever_had_begun_to_ask_before_it_and_to_nobody_after(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        supervisor.status = ServerStatus(ServerState.FAILED)
        held.publish()
        assert (await ask(await connect(supervisor), "lease", keep_alive_s=0, what="", asking_for_s=3600))["ok"]
        reply = await ask(await connect(supervisor), "lease", keep_alive_s=0, what="", asking_for_s=0)
        assert (reply["ok"], reply["status"]["state"]) == (False, ServerState.STOPPING)

    run(tmp_path, scenario)


def test_a_server_gives_way_to_another_only_if_nobody_wants_it(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        looking = await connect(supervisor)
        assert not (await ask(looking, "give_way"))["ok"]  # the user that started it is about to come
        user = await lease(supervisor, keep_alive_s=3600)
        assert not (await ask(looking, "give_way"))["ok"]
        await ask(user, "pin")
        user.close()
        await left(held, 0)
        assert not (await ask(looking, "give_way"))["ok"]
        await ask(looking, "unpin")
        assert (await ask(looking, "give_way"))["ok"]
        assert "its name" in await supervisor.ended

    run(tmp_path, scenario)


def test_restart_and_stop_are_handed_on(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        user = await lease(supervisor)
        onlooker = await connect(supervisor)
        assert await ask(onlooker, "restart") == {"id": 1, "ok": True, "epoch": 0}
        assert supervisor.restarts == 1
        assert not (await ask(onlooker, "stop", unless_used=True))["ok"]
        assert not supervisor.ended.done()
        user.close()
        await left(held, 0)
        assert (await ask(onlooker, "stop", unless_used=True))["ok"]
        assert (await supervisor.ended) in (f"asked by pid {os.getpid()}", "the last user is gone")

    run(tmp_path, scenario)


@pytest.mark.parametrize("line", [b"no JSON\n", b"[1]\n", b'{"op": "lease", "keep_alive_s": "x"}\n', b"{}\n"])
def test_nonsense_costs_its_sender_the_connection_and_nobody_else(tmp_path: Path, line: bytes) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        user = await lease(supervisor)
        with connected(supervisor) as vandal:
            vandal.sendall(line)
            while await asyncio.to_thread(vandal.recv, 4096):
                pass
        assert (await ask(user, "status"))["status"]["users"] == 1
        assert (await ask(user, "no such thing")) == {"id": 3, "ok": False, "error": "unknown request 'no such thing'"}

    run(tmp_path, scenario)


def test_a_user_that_reads_nothing_is_spared_progress_but_not_what_counts(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        with connected(supervisor) as stopped, stopped.makefile("rb") as lines:
            stopped.sendall(b'{"op": "lease", "id": 1}\n')
            await asyncio.to_thread(lines.readline)
            supervisor.status = dataclasses.replace(supervisor.status, detail=long_text())
            for _ in range(1000):
                held.publish(droppable=True)
                await asyncio.sleep(0)
            supervisor.status = dataclasses.replace(supervisor.status, state=ServerState.FAILED)
            held.publish()
            received = 0
            while json.loads(await asyncio.to_thread(lines.readline))["status"]["state"] != ServerState.FAILED:
                received += 1
            assert received < 500

    run(tmp_path, scenario)


def test_a_user_that_reads_nothing_costs_a_bounded_amount_of_memory_and_then_learns_the_newest(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        with connected(supervisor) as stopped, stopped.makefile("rb") as lines:
            stopped.sendall(b'{"op": "lease", "id": 1}\n')
            await asyncio.to_thread(lines.readline)
            text = long_text()
            for epoch in range(1000):
                supervisor.status = ServerStatus(ServerState.RESTARTING, epoch=epoch, detail=text)
                held.publish()
                await asyncio.sleep(0)
            assert held.unsent_bytes < 2 << 20
            received = 0
            while json.loads(await asyncio.to_thread(lines.readline))["status"]["epoch"] != 999:
                received += 1
            assert received < 900

    run(tmp_path, scenario)


def test_a_user_for_whom_no_descriptor_is_left_is_refused_and_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "most_leases", lambda: 2)

    async def scenario(supervisor: Supervisor, held: Leases) -> None:
        first, second = await lease(supervisor), await lease(supervisor)
        third = await connect(supervisor)
        refused = await ask(third, "lease", keep_alive_s=0, what="a test")
        assert (refused["ok"], refused["full"]) == (False, 2)
        with pytest.raises(SupervisorError, match="has 2 users"):
            admission.check_room(supervisor.instance, refused)
        assert (await ask(third, "status"))["status"]["users"] == 2
        second.close()
        await left(held, 1)
        assert (await ask(third, "lease", keep_alive_s=0, what="a test"))["ok"]
        for channel in (first, third):
            channel.close()

    run(tmp_path, scenario)


@pytest.mark.parametrize(("soft", "most"), [(1024, 768), (256, 128), (20_000, 19_744), (1, 1)])
def test_some_descriptors_are_for_the_server(monkeypatch: pytest.MonkeyPatch, soft: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert leases.most_leases() == most
