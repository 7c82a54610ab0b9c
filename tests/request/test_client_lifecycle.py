"""A client among processes, threads, event loops and signals: nobody is disturbed, nothing hangs, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from moved_clock import Clock
from processes import HANG_S, eventually
from scripted_server import (
    ANSWER,
    FIRST,
    QUICK,
    Act,
    Script,
    client_of,
    hangs,
    http,
    says,
    stop_listening,
    streams,
    token,
)

from managed_vllm import AsyncVLLMClient, RequestOutput, RetryPolicy, VLLMClient
from managed_vllm.errors import RequestTimeoutError, ServerDiedError
from managed_vllm.masking import Secret
from managed_vllm.request import connections, portal
from managed_vllm.status import Connection

SHORT = {"max_tokens": 4}
SOURCE = """
import asyncio, gc, multiprocessing, os, signal, socket, sys, threading, time, weakref
from managed_vllm import AsyncVLLMClient, RetryPolicy, VLLMClient

def sockets():
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink("/proc/self/fd/" + name).startswith("socket:")
        except OSError:
            pass
    return found

def ask(client, prompt):
    return client.generate(prompt, {"max_tokens": 4})[0]

def told(word):
    print(word, flush=True)

url, kind = sys.argv[1], sys.argv[2]
"""


@contextlib.contextmanager
def program(source: str, url: str, kind: str = "") -> Iterator[subprocess.Popen[str]]:
    """A program with `SOURCE` before it, in a process of its own."""
    words = [sys.executable, "-c", SOURCE + textwrap.dedent(source), url, kind]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str], timeout_s: float = HANG_S) -> list[str]:
    """Waits for the program's end and returns its lines. It must have succeeded, and been silent on stderr."""
    out, err = process.communicate(timeout=timeout_s)
    assert (process.returncode, err) == (0, ""), (process.returncode, out, err)
    return out.splitlines()


def output_of(source: str, url: str, kind: str = "") -> list[str]:
    with program(source, url, kind) as process:
        return end_of(process)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], word: str = "go") -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


@contextlib.contextmanager
def serving(*acts: Act) -> Iterator[Script]:
    server = Script(*acts)
    try:
        yield server
    finally:
        server.close()


class ByPrompt:
    """Answers "slow…" once `release` is set, "hangs…" never, "stream…" with a stream without end, others at once."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.hung_up = 0
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as self._socket:
            self._socket = self._socket.dup()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.prompts: list[str] = []
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as file:
            while file.readline():
                size = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        size = int(header.split()[1])
                prompt = json.loads(file.read(size))["prompt"]
                self.prompts.append(prompt)
                if prompt.startswith("hangs"):
                    hangs(client)
                if prompt.startswith("stream"):
                    streams(FIRST, token(2), token(3), ends=False)(client)
                if prompt.startswith("slow"):
                    self.release.wait(HANG_S)
                choice = {"index": 0, "text": f"<{prompt}>", "token_ids": [7], "finish_reason": "stop"}
                says({"id": "1", "choices": [choice]})(client)
        self.hung_up += 1

    def close(self) -> None:
        self.release.set()
        stop_listening(self._socket)


@pytest.fixture
def server() -> Iterator[ByPrompt]:
    made = ByPrompt()
    yield made
    made.close()


@contextlib.asynccontextmanager
async def asynchronous(server: ByPrompt | Script, **options: Any) -> AsyncIterator[AsyncVLLMClient]:
    async with AsyncVLLMClient(server.url, "key", "m", **{"retry": QUICK, **options}) as client:
        yield client


async def until(condition: Callable[[], Any], what: str) -> None:
    """`eventually`, within an event loop."""
    await asyncio.to_thread(eventually, condition, what)


# -- forks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["os._exit", "sys.exit", "multiprocessing"])
def test_a_fork_disturbs_nothing_that_is_in_flight(server: ByPrompt, end: str) -> None:
    source = """
        client = VLLMClient(url, "", "m")
        ask(client, "first")
        answers = []
        asking = threading.Thread(target=lambda: answers.extend(client.generate(["slow 1", "slow 2"])))
        asking.start()
        sys.stdin.readline()

        def work():
            told(ask(client, "of the child").outputs[0].text)
            gc.collect()

        if kind == "multiprocessing":
            child = multiprocessing.get_context("fork").Process(target=work)
            child.start()
            child.join()
            told(child.exitcode)
        else:
            pid = os.fork()
            if pid == 0:
                work()
                os._exit(0) if kind == "os._exit" else sys.exit(0)
            told(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        asking.join()
        told([(answer.outputs[0].text, answer.attempts) for answer in answers])
        told(ask(client, "last").outputs[0].text)
    """
    with program(source, server.url, end) as process:
        eventually(lambda: len(server.prompts) == 3, "both are in flight")
        tell(process)
        assert line_of(process) == "<of the child>"
        assert line_of(process) == "0"
        server.release.set()
        assert end_of(process) == ["[('<slow 1>', 1), ('<slow 2>', 1)]", "<last>"]


@pytest.mark.parametrize("end", ["os._exit", "multiprocessing"])
def test_a_fork_within_an_event_loop_disturbs_nothing_that_is_in_flight(server: ByPrompt, end: str) -> None:
    source = """
        client = AsyncVLLMClient(url, "", "m")

        async def once(prompt):
            return (await client.generate(prompt))[0]

        def work():
            told(asyncio.run(once("of the child")).outputs[0].text)
            gc.collect()

        async def main():
            asking = [asyncio.create_task(once(prompt)) for prompt in ("slow 1", "slow 2")]
            await asyncio.to_thread(sys.stdin.readline)
            if kind == "multiprocessing":
                child = multiprocessing.get_context("fork").Process(target=work)
                child.start()
                child.join()
            else:
                pid = os.fork()
                if pid == 0:
                    work()
                    os._exit(0)
                os.waitpid(pid, 0)
            told("forked")
            answers = await asyncio.gather(*asking)
            told([(answer.outputs[0].text, answer.attempts) for answer in answers])
            told((await once("last")).outputs[0].text)

        asyncio.run(main())
    """
    with program(source, server.url, end) as process:
        eventually(lambda: len(server.prompts) == 2, "both are in flight")
        tell(process)
        assert line_of(process) == "<of the child>"
        assert line_of(process) == "forked"
        server.release.set()
        assert end_of(process) == ["[('<slow 1>', 1), ('<slow 2>', 1)]", "<last>"]


def test_a_forked_child_that_stays_does_not_keep_the_parents_connections_open(server: ByPrompt) -> None:
    """Else the server would not notice that the parent cancels, and would generate to the end."""
    source = """
        client = VLLMClient(url, "", "m")

        def interrupt(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGUSR1, interrupt)
        pids = []
        def fork():
            sys.stdin.readline()
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            pids.append(pid)
            os.kill(os.getpid(), signal.SIGUSR1)
        threading.Thread(target=fork).start()
        try:
            client.generate(["hangs 1", "hangs 2", "hangs 3"])
        except KeyboardInterrupt:
            told("cancelled")
        sys.stdin.readline()
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)
    """
    with program(source, server.url) as process:
        eventually(lambda: len(server.prompts) == 3, "all are in flight")
        tell(process)
        assert line_of(process) == "cancelled"
        eventually(lambda: server.hung_up == 3, "the server sees that nobody listens")
        tell(process)
        end_of(process)


def test_a_child_encodes_pictures_though_its_parent_has_done_so() -> None:
    source = """
        from PIL import Image
        client = VLLMClient(url, "", "m")

        def chat():
            picture = Image.new("RGB", (8, 8), (os.getpid() % 256, 0, 0))
            return client.chat([{"role": "user", "content": [{"type": "image", "image": picture}]}], timeout=60)

        for _ in range(8):
            chat()
        pid = os.fork()
        if pid == 0:
            chat()
            told("answered")
            sys.exit(0)
        told(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    choice = {"index": 0, "message": {"content": "a"}, "token_ids": [7], "finish_reason": "stop"}
    with serving(says({"id": "1", "choices": [choice]})) as server:
        assert output_of(source, server.url) == ["answered", "0"]


def test_a_stream_that_is_open_at_a_fork_is_the_parents(server: ByPrompt) -> None:
    source = """
        client = VLLMClient(url, "", "m")
        for part in client.stream("stream", {"max_tokens": 9}):
            pid = os.fork()
            if pid == 0:
                sys.exit(0)
            told(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            if 3 in part.outputs[0].token_ids:
                break
        told("done")
    """
    lines = output_of(source, server.url)
    assert set(lines[:-1]) == {"0"}
    assert lines[-1] == "done"


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unhurried")
def test_one_client_serves_32_threads_at_once(server: ByPrompt) -> None:
    found: dict[int, list[str]] = {}
    with client_of(server) as client:  # type: ignore[arg-type]

        def work(number: int) -> None:
            outputs = [client.generate([f"{number}.{i}", f"{number}.{i}b"], SHORT) for i in range(10)]
            found[number] = [one.outputs[0].text for both in outputs for one in both]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
    assert found == {n: [f"<{n}.{i}{b}>" for i in range(10) for b in ("", "b")] for n in range(32)}
    assert len(server.prompts) == 640
    assert server.connections <= 64


def test_300_requests_that_wait_for_one_server_use_one_thread(server: ByPrompt) -> None:
    back = threading.Event()
    calls: list[int | None] = []

    def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> tuple[Connection, int]:
        calls.append(lost)
        back.wait(HANG_S)
        return Connection(base_url=f"{server.url}/v1", api_key=Secret(""), model="m"), 1

    before = set(threading.enumerate())  # some of which may be other tests', and end by and by

    def threads() -> int:
        return sum(thread.name == "managed-vllm-find" for thread in set(threading.enumerate()) - before)

    async def main() -> None:
        client = AsyncVLLMClient(connection=connection, retry=QUICK)
        asking = asyncio.create_task(client.generate([str(i) for i in range(300)], {"max_tokens": 200}))
        await until(lambda: calls, "somebody waits")
        await asyncio.sleep(0.1)
        assert threads() == 1
        assert not server.prompts
        back.set()
        outputs = await asking
        assert [one.outputs[0].text for one in outputs] == [f"<{i}>" for i in range(300)]
        await client.aclose()

    asyncio.run(main())
    assert calls == [None]
    eventually(lambda: threads() == 0, "the thread ends")


# -- event loops -------------------------------------------------------------------------------------------------------


def test_one_client_outlives_its_event_loops(server: ByPrompt) -> None:
    client = AsyncVLLMClient(server.url, "", "m", retry=QUICK)
    for number in range(5):
        outputs = asyncio.run(client.generate([f"{number}", f"{number}b"], SHORT))
        assert [one.outputs[0].text for one in outputs] == [f"<{number}>", f"<{number}b>"]
    client.close()
    with pytest.raises(ServerDiedError, match="closed"):
        asyncio.run(client.generate("x"))
    assert client.bytes_sent > 0


def test_loops_that_end_without_aclose_leave_nothing(server: ByPrompt) -> None:
    source = """
        client = AsyncVLLMClient(url, "", "m")
        before = sockets()
        sent = 0
        for number in range(20):
            asyncio.run(client.generate(["a", "b", "c"]))
            assert client.bytes_sent > sent
            sent = client.bytes_sent
        gc.collect()
        loops = sum(isinstance(one, asyncio.AbstractEventLoop) for one in gc.get_objects())
        told(f"{sockets() - before <= 3} {loops <= 2}")
        del client
        gc.collect()
        told(sockets() - before)
    """
    assert output_of(source, server.url) == ["True True", "0"]


def test_loops_side_by_side_share_a_client(server: ByPrompt) -> None:
    client = AsyncVLLMClient(server.url, "", "m", retry=QUICK)
    found: list[str] = []

    def work(number: int) -> None:
        for i in range(5):
            found.append(asyncio.run(client.generate(f"{number}.{i}", SHORT))[0].outputs[0].text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    client.close()
    assert sorted(found) == sorted(f"<{n}.{i}>" for n in range(8) for i in range(5))


def test_the_synchronous_client_works_within_a_running_loop(server: ByPrompt) -> None:
    """As in a notebook's cell."""

    async def cell() -> list[str]:
        with client_of(server) as client:  # type: ignore[arg-type]
            whole = [one.outputs[0].text for one in client.generate(["a", "b"], SHORT)]
            return whole + [one.outputs[0].text for one in client.generate("c", SHORT)]

    assert asyncio.run(cell()) == ["<a>", "<b>", "<c>"]


# -- interrupted, cancelled, closed ------------------------------------------------------------------------------------


def test_ctrl_c_in_a_batch_ends_it_on_the_server_too(server: ByPrompt) -> None:
    source = """
        client = VLLMClient(url, "", "m")
        try:
            client.generate([f"hangs {i}" for i in range(50)])
        except KeyboardInterrupt:
            told("interrupted")
        sys.stdin.readline()
        told(ask(client, "afterwards").outputs[0].text)
    """
    with program(source, server.url) as process:
        eventually(lambda: len(server.prompts) == 50, "all are in flight")
        process.send_signal(signal.SIGINT)
        assert line_of(process) == "interrupted"
        eventually(lambda: server.hung_up == 50, "the server sees that nobody listens")
        tell(process)
        assert end_of(process) == ["<afterwards>"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_ctrl_c_ends_a_program_that_does_not_expect_it(server: ByPrompt, kind: str) -> None:
    source = """
        prompts = [f"hangs {i}" for i in range(20)]
        if kind == "sync":
            VLLMClient(url, "", "m").generate(prompts)
        else:
            asyncio.run(AsyncVLLMClient(url, "", "m").generate(prompts))
    """
    with program(source, server.url, kind) as process:
        eventually(lambda: len(server.prompts) == 20, "all are in flight")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANG_S)
        assert process.returncode == -signal.SIGINT
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert "never retrieved" not in err
        assert "destroyed" not in err
        assert "nclosed" not in err
        eventually(lambda: server.hung_up == 20, "no connection is left")


def test_a_cancelled_batch_is_ended_on_the_server_and_the_others_go_on(server: ByPrompt) -> None:
    async def main() -> None:
        async with asynchronous(server, max_in_flight=40) as client:
            other = asyncio.create_task(client.generate(["slow 1", "slow 2"], SHORT))
            await until(lambda: len(server.prompts) == 2, "the other is in flight")
            batch = asyncio.create_task(client.generate([f"hangs {i}" for i in range(100)]))
            await until(lambda: len(server.prompts) == 40, "all places are taken")
            batch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await batch
            await until(lambda: server.hung_up == 38, "the server sees that nobody listens")
            assert (await client.generate("meanwhile", SHORT))[0].outputs[0].text == "<meanwhile>"
            server.release.set()
            assert [one.outputs[0].text for one in await other] == ["<slow 1>", "<slow 2>"]
            assert client.in_flight == 0

    asyncio.run(main())


def test_close_from_another_thread_ends_a_batch(server: ByPrompt) -> None:
    client = VLLMClient(server.url, "", "m", retry=QUICK, max_in_flight=10)
    found: list[Any] = []

    def work() -> None:
        found.extend(client.generate([f"hangs {i}" for i in range(30)], return_exceptions=True))

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: len(server.prompts) == 10, "all places are taken")
    client.close()
    client.close()
    thread.join(HANG_S)
    assert [type(one) for one in found] == [ServerDiedError] * 30
    assert [one.index for one in found] == list(range(30))
    assert len(server.prompts) == 10
    eventually(lambda: server.hung_up == 10, "no connection is left")


def test_aclose_has_closed_the_connections_when_it_returns(server: ByPrompt) -> None:
    source = """
        from managed_vllm.request import connections
        connections.MAX_IDLE_S = 3600  # not because they are idle

        async def main():
            before = sockets()
            async with AsyncVLLMClient(url, "", "m") as client:
                await client.generate(["a", "b", "c"])
                assert sockets() > before
            told(sockets() - before)

        asyncio.run(main())
    """
    assert output_of(source, server.url) == ["0"]


def test_a_client_that_is_garbage_leaves_no_connection(server: ByPrompt) -> None:
    source = """
        from managed_vllm.request import connections
        connections.MAX_IDLE_S = 3600  # not because they are idle
        before = 3  # the portal's own sockets
        ask(VLLMClient(url, "", "m"), "a")
        while sockets() > before:
            gc.collect()
            time.sleep(0.02)
        for number in range(20):
            client = VLLMClient(url, "", "m")
            client.generate(["a", "b", "c"])
            del client
        gc.collect()
        while sockets() > before:
            time.sleep(0.02)
    """
    assert output_of(source, server.url) == []


def test_a_client_that_is_dropped_is_gone_before_the_garbage_collector_comes(server: ByPrompt) -> None:
    """It may hold a lease on a server: what belongs to it must not be in a reference cycle."""
    source = """
        gc.disable()
        client = VLLMClient(url, "", "m")
        client.generate(["a", "b"])
        list(client.stream("c", {"max_tokens": 4}))
        sender = weakref.ref(client.async_client.sender)
        del client
        while sender() is not None:  # the thread of the client's loop may be about to let go of it
            time.sleep(0.01)
    """
    assert output_of(source, server.url) == []


@pytest.mark.parametrize("kind", ["unused", "sync", "async", "stream", "in flight", "cycle"])
def test_an_interpreter_that_ends_with_an_open_client_is_silent(server: ByPrompt, kind: str) -> None:
    source = """
        client = VLLMClient(url, "", "m")
        if kind == "sync":
            client.generate(["a", "b", "c"])
        if kind == "async":
            other = AsyncVLLMClient(url, "", "m")
            asyncio.run(other.generate(["a", "b", "c"]))
        if kind == "stream":
            parts = client.stream("stream", {"max_tokens": 9})
            next(parts)
        if kind == "in flight":
            threading.Thread(target=ask, args=(client, "hangs"), daemon=True).start()
            sys.stdin.readline()
        if kind == "cycle":
            class Holder: pass
            holder = Holder()
            holder.me, holder.client = holder, client
            holder.parts = client.stream("stream", {"max_tokens": 9})
            next(holder.parts)
            del holder
        told("end")
    """
    with program(source, server.url, kind) as process:
        if kind == "in flight":
            eventually(lambda: server.prompts, "it is in flight")
            tell(process)
        assert end_of(process) == ["end"]


# -- connections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_idle_connections_are_closed_before_the_server_does_it(server: ByPrompt, kind: str) -> None:
    async def main() -> None:
        async with asynchronous(server) as client:
            await client.generate(["a", "b", "c"], SHORT)
            await until(lambda: server.hung_up == server.connections, "all are closed")

    if kind == "async":
        asyncio.run(main())
    else:
        with client_of(server) as client:  # type: ignore[arg-type]
            client.generate(["a", "b", "c"], SHORT)
            eventually(lambda: server.hung_up == server.connections, "all are closed")
    assert server.connections > 0
    assert connections.MAX_IDLE_S < 5  # uvicorn's own limit


def test_a_server_that_closes_idle_connections_in_between_is_no_error() -> None:
    def once(client: socket.socket) -> None:
        says(ANSWER)(client)
        client.shutdown(socket.SHUT_RDWR)

    with serving(once) as server, client_of(server) as client:
        for number in range(20):
            assert client.generate("x", SHORT)[0].outputs[0].text == "fine"
            if number % 2:
                eventually(lambda: server.hung_up == server.connections, "it is closed")


@pytest.mark.parametrize("later", [False, True])
def test_a_connection_with_more_on_it_than_the_answer_is_not_used_again(later: bool) -> None:
    """Else the next request would be answered with what belongs to nobody."""
    right = http(json.dumps(ANSWER).encode())
    choice = {"index": 0, "text": "wrong", "token_ids": [1], "finish_reason": "stop"}
    more = http(json.dumps({"id": "2", "choices": [choice]}).encode())
    answered, all_sent = threading.Semaphore(0), threading.Semaphore(0)

    def act(client: socket.socket) -> None:
        client.sendall(right if later else right + more)
        answered.acquire(timeout=HANG_S)
        client.sendall(more if later else b"")
        all_sent.release()

    with serving(act) as server, client_of(server) as client:
        for _ in range(4):
            assert client.generate("x", SHORT)[0].outputs[0].text == "fine"
            answered.release()
            assert all_sent.acquire(timeout=HANG_S)
            portal.run(lambda: asyncio.sleep(0))  # since then, the client's loop has looked at its sockets


@pytest.mark.usefixtures("unhurried")
def test_http_over_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    heads: list[bytes] = []

    def serve() -> None:
        client, _ = listening.accept()
        with client, client.makefile("rb") as file:
            while line := file.readline():
                heads.append(line.strip())
                size = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        size = int(header.split()[1])
                file.read(size)
                says(ANSWER)(client)

    threading.Thread(target=serve, daemon=True).start()

    def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> tuple[Connection, int]:
        return Connection(base_url="http://localhost/v1", api_key=Secret(""), model="m", uds=path), 1

    client = VLLMClient(connection=connection, retry=QUICK)
    for _ in range(3):
        assert client.generate("x", SHORT)[0].outputs[0].text == "fine"
    client.close()
    stop_listening(listening)
    assert heads == [b"POST /v1/completions HTTP/1.1"] * 3

    nobody = VLLMClient(connection=connection, retry=RetryPolicy(max_lost=2, backoff_initial_s=0.001))
    with pytest.raises(ServerDiedError, match="can't connect"):
        nobody.generate("x", SHORT)
    nobody.close()


def test_without_file_descriptors_requests_wait_and_are_answered(server: ByPrompt) -> None:
    source = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        client = VLLMClient(url, "", "m")
        outputs = client.generate([str(i) for i in range(300)], {"max_tokens": 4})
        told([one.outputs[0].text for one in outputs] == [f"<{i}>" for i in range(300)])
    """
    assert output_of(source, server.url) == ["True"]


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_the_deadline_of_a_request_begins_when_it_has_its_place(clock: Clock) -> None:
    def slow(client: socket.socket) -> None:
        clock.forward(600)
        says(ANSWER)(client)

    async def main(server: Script) -> list[RequestOutput]:
        async with AsyncVLLMClient(server.url, "", "m", retry=QUICK, max_in_flight=1) as client:
            return list(await client.generate(["x"] * 5, SHORT, request_timeout=1000))

    with serving(slow) as server:
        outputs = asyncio.run(main(server))
    assert [one.outputs[0].text for one in outputs] == ["fine"] * 5
    assert all(600 <= one.latency < 1000 for one in outputs)


async def late(server: ByPrompt, clock: Clock, prompts: list[str], **limits: Any) -> list[Any]:
    """What the prompts, one after the other, come to, if an hour passes while the server hangs."""
    async with asynchronous(server, max_in_flight=1) as client:
        batch = asyncio.create_task(client.generate(prompts, SHORT, return_exceptions=True, **limits))
        for prompt in prompts:
            if prompt.startswith("hangs"):
                await until(partial(server.prompts.__contains__, prompt), f"{prompt!r} is sent")
                clock.forward(3600)
        return list(await batch)


def test_a_request_that_is_late_does_not_make_the_next_one_late(server: ByPrompt, clock: Clock) -> None:
    found = asyncio.run(late(server, clock, ["hangs 1", "a", "hangs 2", "b"], request_timeout=1000))
    assert isinstance(found[0], RequestTimeoutError)
    assert isinstance(found[2], RequestTimeoutError)
    assert [found[i].outputs[0].text for i in (1, 3)] == ["<a>", "<b>"]


def test_the_deadline_for_all_bounds_the_waiting_for_a_place_too(server: ByPrompt, clock: Clock) -> None:
    found = asyncio.run(late(server, clock, ["a", "hangs", "b", "c"], timeout=1000))
    assert found[0].outputs[0].text == "<a>"
    assert [type(one) for one in found[1:]] == [RequestTimeoutError] * 3
    assert server.prompts == ["a", "hangs"]


def test_the_deadline_of_a_call_bounds_its_waiting_for_a_place_too(server: ByPrompt) -> None:
    with client_of(server, max_in_flight=1) as client:  # type: ignore[arg-type]
        other = threading.Thread(target=lambda: client.generate("slow", SHORT))
        other.start()
        eventually(lambda: server.prompts[-1:] == ["slow"], "the only place is taken")
        with pytest.raises(RequestTimeoutError, match="before the request was sent"):
            client.generate("d", SHORT, timeout=0.2)
        server.release.set()
        other.join(HANG_S)
        assert "d" not in server.prompts
