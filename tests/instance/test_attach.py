"""One process's hold on a server: which one is found, what is kept of it, and what `close`, forks and pickling do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
from processes import HANG_S, INSTANT, assert_nothing_left, eventually, left_of

from managed_vllm import ManagedVLLM
from managed_vllm.config import Address, ServerSpec
from managed_vllm.errors import ConfigMismatchError, NoServerError, ServerStoppedError
from managed_vllm.instance import attach, cleanup, directory, names
from managed_vllm.instance.admission import check_address
from managed_vllm.instance.attach import ATTACH_VARIABLE, Attachment, AttachOptions, find
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.masking import Secret
from managed_vllm.status import ServerState, ServerStatus


def options(*, address: Address | None = None, name: str | None = None, **order: Any) -> AttachOptions:
    spec = ServerSpec.of("stand-in", engine_args={}, env=standin.orders(**order), command=standin.command())
    return AttachOptions(
        model="stand-in", spec=spec, name=name, keep_alive_s=INSTANT, address=address or Address(), progress=False
    )


def handle(**order: Any) -> ManagedVLLM:
    return ManagedVLLM("stand-in", command=standin.command(), env=standin.orders(**order), keep_alive=INSTANT)


ONE, TWO = "one-0123456789", "two-0123456789"


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(home: Path) -> Any:
    """Makes instances that count as alive: their supervisor's lock is held."""
    held: list[tuple[Instance, int]] = []

    def make(*ids: str) -> list[Instance]:
        directory.state_home()
        for name in ids:
            instance = Instance(home, name)
            instance.create()
            lock = instance.take_supervisor_lock()
            assert lock is not None
            held.append((instance, lock))
        return [instance for instance, _ in held]

    yield make
    for instance, lock in held:
        instance.hand_on_lock(lock)
        cleanup.remove_instance(instance)
        names.drop_names(home, instance.id)


Running = Callable[..., list[Instance]]


def test_a_spec_means_its_own_instance_whether_it_runs_or_not(home: Path) -> None:
    wanted = options()
    assert wanted.spec is not None
    assert find(wanted, home) == Instance(home, wanted.spec.key)


def test_without_a_spec_the_only_server_is_meant(home: Path, running: Running) -> None:
    only = running(ONE)
    assert [find(AttachOptions(), home)] == only
    running(TWO)
    with pytest.raises(NoServerError, match=rf"several servers are running \(running: {ONE}, {TWO}\)") as caught:
        find(AttachOptions(), home)
    assert caught.value.candidates == (ONE, TWO)


def test_the_server_that_a_parent_passed_on_goes_before_all_others(
    home: Path, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(ONE, TWO)
    monkeypatch.setenv(ATTACH_VARIABLE, TWO)
    assert find(AttachOptions(), home).id == TWO


def test_a_name_means_the_live_instance_that_has_it(home: Path, running: Running) -> None:
    one, _ = running(ONE, TWO)
    names.claim(home, "judge", one, lambda record: {})
    assert find(AttachOptions(name="judge"), home) == one
    with pytest.raises(NoServerError, match="no server named 'other' is running"):
        find(AttachOptions(name="other"), home)


@pytest.mark.parametrize(
    ("wanted", "different"),
    [
        (Address(), set()),
        (Address(host="127.0.0.1", port=8000, api_key=Secret("theirs")), set()),
        (Address(port=8001), {"port"}),
        (Address(host="localhost"), set()),
        (Address(host="::1"), {"host"}),
        (Address(api_key=Secret("mine")), {"api_key"}),
        (Address(uds=True), {"uds"}),
    ],
)
def test_an_address_must_fit_where_it_is_asked_for(wanted: Address, different: set[str]) -> None:
    there = Address(host="127.0.0.1", port=8000, api_key=Secret("theirs"))
    if not different:
        check_address(wanted, there, "an-id")
        return
    with pytest.raises(ConfigMismatchError) as caught:
        check_address(wanted, there, "an-id")
    assert set(caught.value.differences) == different
    assert "theirs" not in str(caught.value)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_what_was_asked_for_is_kept_apart_from_what_was_found(home: Path) -> None:
    wanted = options()
    attachment = Attachment(wanted)
    assert attachment.wait_ready().state is ServerState.READY
    assert attachment.options is wanted
    assert wanted.address == Address()
    assert attachment.known is not None
    assert attachment.known.order.spec == wanted.spec
    assert attachment.known.order.address.api_key == attachment.connection()[0].api_key
    assert attachment.started_it
    other = Attachment(AttachOptions(progress=False))
    assert other.wait_ready().supervisor_pid == attachment.status().supervisor_pid
    assert other.known == attachment.known
    assert not other.started_it
    other.close()
    attachment.close()


def test_a_server_that_was_attached_to_without_a_spec_can_be_started_again(home: Path) -> None:
    with handle() as owner:
        bare = Attachment(AttachOptions(keep_alive_s=INSTANT, progress=False))
        first = bare.wait_ready()
        key = owner.api_key
    assert first.supervisor_pid is not None
    os.kill(first.supervisor_pid, signal.SIGKILL)
    eventually(lambda: bare.ready() is None, "its end was noticed")
    second = bare.wait_ready(60)
    assert second.supervisor_pid != first.supervisor_pid
    assert second.connection is not None
    assert second.connection.api_key.reveal() == key
    assert bare.started_it
    bare.close()


def test_an_unpickled_handle_gets_the_key_with_its_lease_and_starts_the_same_server_again(home: Path) -> None:
    with handle() as llm:
        key, instance = llm.api_key, llm.id
        pickled = pickle.dumps(llm)
        with pickle.loads(pickled) as user:
            assert user.api_key == key
    assert_nothing_left(home)
    assert key.encode() not in pickled
    copy = pickle.loads(pickled)
    assert not copy.started_it
    with copy:
        assert copy.id == instance
        assert copy.api_key != key
        assert copy.started_it


def test_a_bare_handle_is_pickled_with_the_server_that_it_means_here(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with handle() as llm, handle(tree=True) as other:
        monkeypatch.setenv(ATTACH_VARIABLE, str(other.id))
        bare = ManagedVLLM(keep_alive=INSTANT)
        pickled = pickle.dumps(bare)
        monkeypatch.setenv(ATTACH_VARIABLE, str(llm.id))
        with pickle.loads(pickled) as copy:
            assert copy.id == other.id
        bare.close()


# -- close -------------------------------------------------------------------------------------------------------------


def test_closed_is_closed_and_its_successor_attaches_to_the_same_server(home: Path) -> None:
    attachment = Attachment(options())
    attachment.wait_ready()
    keeper = Attachment(AttachOptions(progress=False))
    keeper.attach()
    attachment.close()
    for use in (attachment.attach, attachment.wait_ready, attachment.connection, attachment.status):
        with pytest.raises(ServerStoppedError, match="closed while waiting"):
            use()
    assert attachment.ready() is None
    successor = attachment.successor()
    assert successor.known == attachment.known
    assert successor.started_it
    assert successor.wait_ready().supervisor_pid == keeper.status().supervisor_pid
    successor.close()
    keeper.close()


def test_close_ends_the_waiting_of_another_thread(home: Path) -> None:
    attachment = Attachment(options(start_s=600))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(attachment.wait_ready)
        eventually(lambda: attachment.known, "attached")
        attachment.close()
        with pytest.raises(ServerStoppedError):
            waiting.result(60)
    assert_nothing_left(home)


def test_close_does_not_wait_for_an_election_and_its_winner_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from managed_vllm.instance import spawn

    spawning, closed = threading.Event(), threading.Event()
    start = spawn.start_supervisor

    def late(*arguments: Any) -> spawn.ComingUp | None:
        spawning.set()
        assert closed.wait(60)
        return start(*arguments)

    monkeypatch.setattr(spawn, "start_supervisor", late)
    attachment = Attachment(options(start_s=600))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        attaching = pool.submit(attachment.attach)
        assert spawning.wait(60)
        attachment.close()
        closed.set()
        with pytest.raises(ServerStoppedError):
            attaching.result(60)
    assert_nothing_left(home)


def test_close_ends_the_wait_for_an_election_of_others(home: Path) -> None:
    wanted = options()
    directory.state_home()
    instance = find(wanted, home)
    instance.create()
    attachment = Attachment(wanted)
    with instance.start_lock(30), concurrent.futures.ThreadPoolExecutor(1) as pool:
        attaching = pool.submit(attachment.attach)
        eventually(lambda: attaching.running() and not directory.is_alive(instance), "waiting for the lock")
        attachment.close()
        with pytest.raises(ServerStoppedError):
            attaching.result(30)  # of the 60 s for which it would have waited
    cleanup.remove_instance(instance)


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes of Python that are started now hang at once; the file is there when one has begun."""
    begun = tmp_path / "begun"
    code = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return begun


def test_close_ends_the_wait_for_a_supervisor_that_does_not_come_up(home: Path, stuck: Path) -> None:
    attachment = Attachment(options(name="judge"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        attaching = pool.submit(attachment.attach)
        eventually(stuck.exists, "it is being started")
        attachment.close()
        with pytest.raises(ServerStoppedError):
            attaching.result(30)  # of the 45 s for which it would have waited
    assert_nothing_left(home)


def test_cancelling_an_async_with_takes_effect_while_the_supervisor_is_being_started(home: Path, stuck: Path) -> None:
    async def main() -> None:
        entering = asyncio.create_task(handle().__aenter__())
        await asyncio.to_thread(eventually, stuck.exists, "it is being started")
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(entering, 30)

    asyncio.run(main())
    assert_nothing_left(home)


def test_cancelling_one_entering_of_several_does_not_wait_for_the_server(home: Path) -> None:
    llm = handle(start_s=600)

    async def main() -> None:
        first, second = (asyncio.create_task(llm.__aenter__()) for _ in range(2))
        await asyncio.to_thread(eventually, lambda: "not attached" not in repr(llm), "attached")
        for task in (second, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 30)

    asyncio.run(main())
    assert_nothing_left(home)


def test_an_interrupt_while_a_lease_is_asked_for_leaves_no_lease(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, request = threading.Event(), Channel.request

    def asking(channel: Channel, op: str, **fields: Any) -> dict[str, Any]:
        if op == "lease":
            asked.set()
        return request(channel, op, **fields)

    def interrupt() -> None:
        assert asked.wait(HANG_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with handle() as keeper:
        supervisor = keeper.status().supervisor_pid
        assert supervisor is not None
        llm = handle()
        monkeypatch.setattr(attach, "ANSWER_S", HANG_S)  # for which it would have waited
        monkeypatch.setattr(Channel, "request", asking)
        interrupting = threading.Thread(target=interrupt)
        os.kill(supervisor, signal.SIGSTOP)  # slow for a moment
        interrupting.start()
        try:
            with pytest.raises(KeyboardInterrupt), llm:
                raise AssertionError("entered")
            interrupting.join()
        finally:
            os.kill(supervisor, signal.SIGCONT)
        eventually(lambda: keeper.status().users == 1, "there is no lease of it")
        with llm:
            assert keeper.status().users == 2
        eventually(lambda: keeper.status().users == 1, "the lease is given back")
    assert_nothing_left(home)


def test_a_handle_that_is_dropped_gives_its_lease_back(home: Path) -> None:
    attachment = Attachment(options())
    attachment.wait_ready()
    del attachment
    assert_nothing_left(home)


def test_asking_goes_on_with_the_supervisor_after_one_that_was_killed(home: Path) -> None:
    with handle() as llm:
        for number in range(1, 6):
            before = llm.status()
            assert before.supervisor_pid is not None
            os.kill(before.supervisor_pid, signal.SIGKILL)
            after = llm.status()
            assert after.supervisor_pid != before.supervisor_pid
            llm.wait_ready()
            assert llm.status().epoch == number + 1


def test_a_client_keeps_the_lease_of_a_handle_that_is_dropped(home: Path) -> None:
    llm = handle()
    client = llm.client
    first = client.generate("x")[0].outputs[0].text
    del llm
    assert client.generate("x")[0].outputs[0].text == first
    del client

    def is_gone() -> bool:
        gc.collect()  # it may be part of a cycle, which a thread may still have been holding
        return not left_of(home)

    eventually(is_gone, "the lease is given back")


def test_one_entering_that_is_cancelled_leaves_the_others_their_lease(home: Path) -> None:
    llm = handle(start_s=1.0)

    async def main() -> ServerStatus:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(llm.__aenter__())
            await asyncio.to_thread(eventually, lambda: "not attached" not in repr(llm), "attached")
            second = group.create_task(llm.__aenter__())
            await asyncio.sleep(0)
            second.cancel()
            await first
        return await asyncio.to_thread(llm.status)

    assert asyncio.run(main()).users == 1
    llm.__exit__(None, None, None)
    assert_nothing_left(home)


# -- forks -------------------------------------------------------------------------------------------------------------


def test_a_forked_child_attaches_although_another_thread_was_attaching(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Attachment(options())
    keeper.wait_ready()
    attachment = keeper.successor()
    attaching, forked = threading.Event(), threading.Event()
    state_home = directory.state_home

    def late() -> Path:
        if threading.current_thread() is holder:
            attaching.set()
            forked.wait(60)
        return state_home()

    monkeypatch.setattr(directory, "state_home", late)
    holder = threading.Thread(target=attachment.attach)
    holder.start()
    assert attaching.wait(60)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, f"{attachment.status().users} {attachment.started_it}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "2 False"
    os.waitpid(child, 0)
    forked.set()
    holder.join()
    assert attachment.started_it
    attachment.close()
    keeper.close()
