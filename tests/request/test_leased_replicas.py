"""The replicas of one server as its lease tells them: where a request goes, and what becomes of one whose replica dies.

The servers are real, the supervisor's word is the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import standin
from free_ports import free_port
from processes import HANG_S, eventually

from managed_vllm.client import AsyncVLLMClient, VLLMClient
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import ServerDiedError, ServerStoppedError
from managed_vllm.masking import Secret
from managed_vllm.request.bounds import Bound
from managed_vllm.request.endpoints import Endpoint, Endpoints
from managed_vllm.request.leased_replicas import LeasedReplicas, placed
from managed_vllm.request.pending import TextRequest
from managed_vllm.request.placement import Search
from managed_vllm.status import Connection, ServerState, ServerStatus

KEY = "one-key-for-all"


class SaidByTest:
    """A lease on a server of which the test says what becomes of it; `find` and `ready` as an `Attachment` has them."""

    def __init__(self, *replicas: ServerStatus, known: bool = True) -> None:
        self.replicas: int | None = len(replicas) or 1 if known else None
        self._changed = threading.Condition()
        self._status: ServerStatus | None = None
        self.finders = 0
        self.say(*replicas)

    def say(self, *replicas: ServerStatus, state: ServerState = ServerState.READY) -> None:
        """The supervisor's next word."""
        connection = next((one.connection for one in replicas if one.state is ServerState.READY), None)
        epoch = max((one.epoch for one in replicas), default=0)
        self.put(ServerStatus(state=state, epoch=epoch, connection=connection, replicas=replicas))

    def put(self, status: ServerStatus | None) -> None:
        """The same, as a status; None without a supervisor."""
        with self._changed:
            self._status = status
            self._changed.notify_all()

    def last_status(self) -> ServerStatus | None:
        return self._status

    def wait_for_news(self, known: ServerStatus | None, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._status is not known, timeout_s)

    def ready(self) -> Endpoint | None:
        status = self._status
        if status is None or status.state is not ServerState.READY or status.connection is None:
            return None
        self.replicas = len(status.replicas) or 1
        return status.connection, status.epoch

    def find(self, lost_epoch: int | None, timeout_s: float | None, pause_s: float) -> Endpoint:
        with self._changed:
            self.finders += 1
            over = (ServerState.STOPPING, ServerState.FAILED)
            self._changed.wait_for(
                lambda: self.ready() or (self._status is not None and self._status.state in over), timeout_s or HANG_S
            )
        found = self.ready()
        if found is None:
            raise ServerStoppedError("the server was stopped")
        return found

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[VLLMClient]:
        made = AsyncVLLMClient(
            connection=self.find, ready=self.ready, placement=functools.partial(placed, self), **options
        )
        with VLLMClient.of(made) as client:
            yield client


class Replica:
    """A stand-in on a port of its own, without a supervisor."""

    def __init__(self, epoch: int, **orders: Any) -> None:
        port = free_port()
        words = [*standin.command()[:-1], "--port", str(port), "--served-model-name", "stand-in"]
        env = {**os.environ, **standin.orders(**orders), "VLLM_API_KEY": KEY}
        self._process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        connection = Connection(base_url=f"http://127.0.0.1:{port}/v1", api_key=Secret(KEY), model="stand-in")
        self.status = ServerStatus(state=ServerState.READY, epoch=epoch, connection=connection)
        self.endpoint = connection, epoch
        self.pid = self._process.pid
        eventually(lambda: is_open(port), "the replica listens")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def down(self) -> ServerStatus:
        return replace(self.status, state=ServerState.RESTARTING, connection=None)

    def engine(self, **state: Any) -> ServerStatus:
        return replace(self.status, engine=EngineState(**state))


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def replicas(count: int = 2, first: int = 1, **orders: Any) -> Iterator[list[Replica]]:
    made: list[Replica] = []
    try:
        for epoch in range(first, first + count):
            made.append(Replica(epoch, **orders))
        yield made
    finally:
        for one in made:
            one.kill()


@pytest.fixture
def pair() -> Iterator[list[Replica]]:
    with replicas() as made:
        yield made


def answered_by(client: VLLMClient, **fields: Any) -> int:
    return int(client.generate("hi", **fields)[0].outputs[0].text.rpartition(" from ")[2])


def session_of(client: VLLMClient, pid: int) -> str:
    """A session whose requests go there."""
    names = (f"s{number}" for number in range(99))
    return next(name for name in names if answered_by(client, session_id=name) == pid)


# -- which replica -----------------------------------------------------------------------------------------------------


def test_requests_take_turns_and_sessions_stay(pair: list[Replica]) -> None:
    lease = SaidByTest(*(one.status for one in pair))
    with lease.client() as client:
        assert Counter(answered_by(client) for _ in range(8)) == {one.pid: 4 for one in pair}
        homes = {name: answered_by(client, session_id=name) for name in "abcd"}
        assert Counter(homes.values()) == {one.pid: 2 for one in pair}
        for name, home in homes.items():
            assert {answered_by(client, session_id=name) for _ in range(3)} == {home}
    assert lease.finders == 0  # nobody was asked, nobody waited


def test_answers_carry_the_epoch_of_their_replica(pair: list[Replica]) -> None:
    with SaidByTest(*(one.status for one in pair)).client() as client:
        outputs = [client.generate("hi")[0] for _ in range(4)]
        by_pid = {int(one.outputs[0].text.rpartition(" from ")[2]): one.epoch for one in outputs}
    assert by_pid == {one.pid: one.status.epoch for one in pair}


def test_one_whose_engine_stands_still_is_left_to_its_sessions(pair: list[Replica]) -> None:
    first, second = pair
    lease = SaidByTest(first.status, second.status)
    with lease.client() as client:
        home = session_of(client, first.pid)
        lease.say(first.engine(updating="wait"), second.status)
        assert {answered_by(client) for _ in range(4)} == {second.pid}
        assert answered_by(client, session_id="new") == second.pid
        assert answered_by(client, session_id=home) == first.pid
        lease.say(first.engine(paused="keep"), second.engine(paused="keep"))  # none works: then any will do
        assert {answered_by(client) for _ in range(4)} == {first.pid, second.pid}


def test_a_client_that_learns_of_the_replicas_by_attaching_uses_all_of_them(pair: list[Replica]) -> None:
    lease = SaidByTest(*(one.status for one in pair), known=False)
    with lease.client() as client:
        assert Counter(answered_by(client) for _ in range(8)) == {one.pid: 4 for one in pair}


def test_a_client_that_learns_that_there_is_one_server_uses_that(pair: list[Replica]) -> None:
    lease = SaidByTest(known=False)
    lease.put(pair[1].status)
    with lease.client() as client:
        assert {answered_by(client) for _ in range(4)} == {pair[1].pid}
        assert not client.metrics().replicas


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_a_dead_one_is_left_before_the_supervisor_has_a_word_of_it(pair: list[Replica]) -> None:
    first, second = pair
    lease = SaidByTest(first.status, second.status)
    with lease.client() as client:
        home = session_of(client, first.pid)
        first.kill()
        assert answered_by(client, session_id=home) == second.pid
        assert {answered_by(client) for _ in range(4)} == {second.pid}
        lease.say(first.down(), second.status)
        assert {answered_by(client) for _ in range(2)} == {second.pid}
        with replicas(1, first=3) as (again,):
            lease.say(again.status, second.status)
            assert {answered_by(client) for _ in range(4)} == {again.pid, second.pid}
            assert answered_by(client, session_id=home) == second.pid  # where its prefix is by now


def test_a_stream_goes_on_where_it_was_cut() -> None:
    with replicas(token_s=0.01) as pair, SaidByTest(*(one.status for one in pair)).client() as client:
        ids: list[int] = []
        by_pid = {one.pid: one for one in pair}
        home = answered_by(client, session_id="one")
        for part in client.stream("a long answer", {"max_tokens": 120}, session_id="one"):
            ids += part.outputs[0].token_ids
            if len(ids) >= 30:
                by_pid[home].kill()
        assert ids == standin.continuation(standin.prompt_ids("a long answer"), 120)


def test_with_none_ready_a_request_waits_for_the_word_that_one_is(pair: list[Replica]) -> None:
    first, second = pair
    lease = SaidByTest(*(one.status for one in pair))
    lease.say(first.down(), second.down(), state=ServerState.RESTARTING)
    pids: list[int] = []
    with lease.client() as client:
        waiting = threading.Thread(target=lambda: pids.append(answered_by(client)))
        waiting.start()
        eventually(lambda: lease.finders, "it waits")
        lease.say(first.down(), second.status)
        waiting.join(HANG_S)
        assert pids == [second.pid]
        lease.say(first.down(), second.down(), state=ServerState.STOPPING)
        with pytest.raises(ServerStoppedError):
            client.generate("hi")


def test_after_the_supervisor_was_killed_the_next_ones_replicas_are_used(pair: list[Replica]) -> None:
    lease = SaidByTest(*(one.status for one in pair))
    with lease.client() as client, replicas(first=3) as others:
        assert answered_by(client) in {one.pid for one in pair}
        for one in pair:
            one.kill()
        lease.put(None)
        pids: list[int] = []
        waiting = threading.Thread(target=lambda: pids.append(answered_by(client)))
        waiting.start()
        eventually(lambda: lease.finders, "it waits")
        lease.say(*(one.status for one in others))
        waiting.join(HANG_S)
        assert set(pids) < {one.pid for one in others}
        assert {answered_by(client) for _ in range(4)} == {one.pid for one in others}


# -- what concerns each of them ----------------------------------------------------------------------------------------


def test_metrics_are_those_of_all_and_of_each(pair: list[Replica]) -> None:
    with SaidByTest(*(one.status for one in pair)).client(supervisor=untold) as client:
        before = client.metrics()
        for _ in range(4):
            client.generate([[1, 2, 3]], max_tokens=20)
        after = client.metrics()
    assert (after.epoch, [one.epoch for one in after.replicas]) == (2, [1, 2])
    grown = [
        (now.generation_tokens or 0) - (then.generation_tokens or 0)
        for now, then in zip(after.replicas, before.replicas, strict=True)
    ]
    assert grown == [40, 40]
    assert after.generation_tokens == sum(one.generation_tokens or 0 for one in after.replicas)


async def untold(_: float | None) -> None:
    return None


def test_a_call_for_each_does_not_wait_for_a_replica_that_is_another_now(pair: list[Replica]) -> None:
    first, second = pair

    async def body() -> None:
        lease = SaidByTest(first.status, second.status)
        client = AsyncVLLMClient(connection=lease.find, ready=lease.ready, placement=functools.partial(placed, lease))
        async with asyncio.timeout(HANG_S), client:
            servers = await client.sender.servers(None)
            assert list(servers) == [first.status.connection, second.status.connection]
            lease.say(replace(second.status, epoch=3), second.status)
            with pytest.raises(ServerDiedError, match="started again elsewhere"):
                await client.sender.send(TextRequest("/metrics"), None, only=servers[0])

    asyncio.run(body())


# -- one that falls silent ---------------------------------------------------------------------------------------------


def test_one_that_does_not_answer_is_left_out_until_it_does(pair: list[Replica]) -> None:
    first, second = (one.endpoint for one in pair)
    healthy = threading.Event()

    async def look(_: Connection, with_model: bool) -> bool:
        assert not with_model
        return healthy.is_set()

    async def body() -> None:
        lease = SaidByTest(*(one.status for one in pair))
        servers = LeasedReplicas(lease, Endpoints(lease.find, lease.ready), look)
        async with asyncio.timeout(HANG_S), Bound(set(), None, "") as bound:
            await servers.known(Search({}, bound))
            assert list(servers.up()) == [first, second]
            await servers.look(first)
            assert list(servers.up()) == [second]
            healthy.set()
            while len(servers.up()) < 2:  # nobody says a word: it is asked again
                await servers.wait(1.0)
            await servers.look(second)
            assert list(servers.up()) == [first, second]

    asyncio.run(body())
