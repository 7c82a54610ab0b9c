"""Many requests in one call: in order, side by side, bounded, and each with an answer or an error of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import pickle
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import HANG_S, eventually
from scripted_server import ANSWER, QUICK, Act, Script, client_of, hangs, http, says

from managed_vllm import AsyncVLLMClient, RetryPolicy, VLLMClient
from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ModelNotFoundError,
    RequestError,
    RequestTimeoutError,
    ServerBusyError,
    ServerDiedError,
)
from managed_vllm.masking import Secret
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.status import Connection

pytestmark = pytest.mark.usefixtures("unhurried")
SHORT = {"max_tokens": 4}
APART = {"max_tokens": 200}
"""Too long to go together."""
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


class Echo(Script):
    """Answers each prompt with itself; what a prompt begins with may make it late, wrong, or lost."""

    def __init__(self) -> None:
        super().__init__(self._act)
        self.now = 0
        self.most = 0
        self.together: threading.Barrier | None = None
        """None is answered before so many are there."""
        self._count = threading.Lock()

    def _act(self, client: socket.socket) -> None:
        with self._count:
            self.now += 1
            self.most = max(self.most, self.now)
        if self.together is not None:
            self.together.wait(HANG_S)
        prompt = self._prompts.pop(threading.get_ident())
        text = str(prompt)
        if text.startswith("late"):
            time.sleep(0.02 * (len(text) % 7))
        with self._count:
            self.now -= 1
        if text.startswith("wrong"):
            says({"error": {"message": f"no {text}"}}, 400)(client)
        elif text.startswith("lost"):
            says({"error": {"message": "x"}}, 500)(client)
        else:
            choice = {"index": 0, "text": f"<{text}>", "token_ids": [7], "finish_reason": "stop"}
            says({"id": "1", "choices": [choice], "prompt_token_ids": [1, 2, 3]})(client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as file:
            while file.readline():
                size = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if found := re.match(rb"content-length: (\d+)", header, re.IGNORECASE):
                        size = int(found[1])
                body = json.loads(file.read(size) or b"null")
                if body is None:  # /health
                    says({}, 503)(client)
                    continue
                self.requests.append(("", body))
                self._prompts[threading.get_ident()] = body["prompt"]
                self._act(client)

    _prompts: dict[int, Any] = {}  # noqa: RUF012


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@contextlib.contextmanager
def serving(*acts: Act) -> Iterator[Script]:
    server = Script(*acts)
    try:
        yield server
    finally:
        server.close()


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [one.outputs[0].text for one in outputs]


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_outputs_come_in_input_order(echo: Echo) -> None:
    prompts = [f"late {'x' * (number % 11)} {number}" for number in range(100)]
    with client_of(echo) as client:
        assert texts(client.generate(prompts, SHORT)) == [f"<{prompt}>" for prompt in prompts]


def test_one_failure_does_not_sink_the_rest(echo: Echo) -> None:
    with client_of(echo) as client:
        found = client.generate(["a", "wrong 1", "b", "lost", "wrong 2", "c"], SHORT, return_exceptions=True)
    assert [found[i].outputs[0].text for i in (0, 2, 5)] == ["<a>", "<b>", "<c>"]
    assert isinstance(found[1], BadRequestError)
    assert isinstance(found[3], ServerDiedError)
    assert "no wrong 2" in str(found[4])
    assert [one.index for one in found if isinstance(one, RequestError)] == [1, 3, 4]
    assert all(one.results is None for one in found if isinstance(one, RequestError))


def test_the_first_error_in_input_order_is_raised_with_all_results(echo: Echo) -> None:
    with client_of(echo) as client, pytest.raises(ServerDiedError) as caught:
        client.generate(["a", "lost", "wrong", "b"], SHORT)
    error = caught.value
    assert error.index == 1
    assert error.results is not None
    assert [type(one).__name__ for one in error.results] == [
        *("RequestOutput", "ServerDiedError", "BadRequestError", "RequestOutput")
    ]
    assert error.results[1] is error


def test_an_error_with_its_results_crosses_processes(echo: Echo) -> None:
    with client_of(echo) as client, pytest.raises(BadRequestError) as caught:
        client.generate(["a", "wrong"], SHORT)
    error = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, BadRequestError)
    assert str(error) == str(caught.value)
    assert (error.index, error.status) == (1, 400)
    assert error.results is not None
    assert error.results[0].outputs[0].text == "<a>"
    assert error.results[1] is error


def test_the_error_of_a_single_request_has_neither_index_nor_results(echo: Echo) -> None:
    with client_of(echo) as client, pytest.raises(BadRequestError) as caught:
        client.generate("wrong", SHORT)
    assert (caught.value.index, caught.value.results) == (None, None)


def test_nothing_asked_is_nothing_answered(echo: Echo) -> None:
    with client_of(echo) as client:
        assert client.generate([], SHORT) == []
        assert client.generate(iter(()), SHORT) == []
        assert client.chat([], SHORT, use_tqdm=True) == []
        assert client.generate([], []) == []
        assert client.embed([]) == []
        assert client.score([], []) == []
    assert echo.requests == []


PROMPTS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "generator": (lambda: (f"p{i}" for i in range(3)), ["p0", "p1", "p2"]),
    "tuple": (lambda: ("a", "b"), ["a", "b"]),
    "token ids": (lambda: [1, 2, 3], [[1, 2, 3]]),
    "tuple of token ids": (lambda: (1, 2), [[1, 2]]),
    "several": (lambda: [[1, 2], (3,), "x", {"prompt": "y"}], [[1, 2], [3], "x", "y"]),
    "array of token ids": (lambda: np.array([1, 2, 3]), [[1, 2, 3]]),
    "array of int32": (lambda: np.array([[1, 2], [3, 4]], dtype=np.int32), [[1, 2], [3, 4]]),
    "arrays": (lambda: [np.array([1]), np.array([2, 3])], [[1], [2, 3]]),
    "array of texts": (lambda: np.array(["a", "b"]), ["a", "b"]),
    "array in a dict": (lambda: {"prompt_token_ids": np.array([5, 6])}, [[5, 6]]),
    "keys": (lambda: {"a": 1, "b": 2}.keys(), ["a", "b"]),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_may_come_in_many_shapes(echo: Echo, kind: str) -> None:
    make, expected = PROMPTS[kind]
    with client_of(echo, max_in_flight=1) as client:
        found = texts(client.generate(make(), SHORT))
    assert found == [f"<{prompt}>" for prompt in expected]
    assert [body["prompt"] for _, body in echo.requests] == expected


@pytest.mark.parametrize("prompt", [[1, "a"], [1.5], [[1], 2.5], 5, None, b"x", [True, 1], ["a", None], [["a"]]])
def test_what_is_no_prompt_is_refused(echo: Echo, prompt: Any) -> None:
    with client_of(echo) as client, pytest.raises(BadRequestError):
        client.generate(prompt, SHORT)


def test_each_prompt_may_have_parameters_of_its_own(echo: Echo) -> None:
    with client_of(echo, max_in_flight=1) as client:
        client.generate(["a", "b"], [{"max_tokens": 1}, {"max_tokens": 2}])
        with pytest.raises(BadRequestError, match="2 prompts but 1 sampling parameters"):
            client.generate(["a", "b"], [{"max_tokens": 1}])
    assert [body["max_tokens"] for _, body in echo.requests] == [1, 2]


# -- progress ----------------------------------------------------------------------------------------------------------


def test_a_progress_bar_is_shown_on_request(echo: Echo, capfd: pytest.CaptureFixture[str]) -> None:
    with client_of(echo) as client:
        client.generate(["a", "b"], SHORT)
        assert capfd.readouterr().err == ""
        client.generate(["a", "b", "wrong"], SHORT, use_tqdm=True, return_exceptions=True)
    shown = capfd.readouterr().err
    assert "Processed prompts" in shown
    assert "3/3" in shown


def test_the_progress_bar_may_be_of_ones_own_making(echo: Echo) -> None:
    from tqdm import tqdm

    made: list[Any] = []
    file = io.StringIO()

    def make(**options: Any) -> Any:
        made.append(tqdm(**options, file=file))
        return made[-1]

    with client_of(echo) as client:
        client.generate([f"{i}" for i in range(7)], SHORT, make)
    assert (made[0].total, made[0].n) == (7, 7)
    assert made[0].disable  # closed
    assert "7/7" in file.getvalue()


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_a_progress_bar_that_fails_ends_the_call_and_not_the_client(echo: Echo, error: type[BaseException]) -> None:
    class Broken:
        def __init__(self, **options: Any) -> None:
            pass

        def update(self, count: int) -> None:
            raise error

        def close(self) -> None:
            pass

    with client_of(echo) as client:
        with pytest.raises(error):
            client.generate(["a", "b", "c"], SHORT, Broken)
        assert texts(client.generate(["a"], SHORT)) == ["<a>"]


# -- how many at once --------------------------------------------------------------------------------------------------


class Counted(dict[str, Any]):
    """A prompt that counts how often any of its kind was read."""

    read = 0

    def __getitem__(self, key: str) -> Any:
        Counted.read += 1
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        Counted.read += 1
        return super().get(key, default)


def test_what_is_past_its_deadline_is_not_prepared(script: Callable[..., Script]) -> None:
    with client_of(script(hangs), max_in_flight=4) as client:
        prompts = [Counted(prompt=f"x{number}") for number in range(5000)]
        results: list[Any] = client.generate(prompts, SHORT, timeout=0.5, return_exceptions=True)
    assert {type(result) for result in results} == {RequestTimeoutError}
    assert [result.index for result in results] == list(range(5000))
    assert Counted.read < 100


@pytest.mark.parametrize("timeout", ["5", True, float("nan"), [3], 1j])
def test_a_timeout_that_is_no_number_of_seconds_is_an_error_by_type(echo: Echo, timeout: Any) -> None:
    with client_of(echo) as client:
        for method in (client.generate, client.tokenize):
            with pytest.raises(BadRequestError, match="timeout is a number of seconds, not") as caught:
                method("x", timeout=timeout)
            assert caught.value.field == "timeout"
        with pytest.raises(BadRequestError, match="request_timeout is a number of seconds"):
            client.generate("x", request_timeout=timeout)
        assert client.generate("x", SHORT, timeout=np.float64(60), request_timeout=float("inf"))


def test_no_more_are_in_flight_than_allowed(echo: Echo) -> None:
    echo.together = threading.Barrier(5)
    with client_of(echo, max_in_flight=5) as client:
        threads = [threading.Thread(target=client.generate, args=(["x"] * 60, APART)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
    assert len(echo.requests) == 120
    assert echo.most == 5
    assert echo.connections == 5


def busy(capacity: int, seconds: float, status: int = 429) -> Act:
    """Works on so many at once, and refuses others."""
    free = threading.Semaphore(capacity)

    def act(client: socket.socket) -> None:
        if not free.acquire(blocking=False):
            return says({"error": {"message": "too many"}}, status)(client)
        try:
            time.sleep(seconds)
        finally:
            free.release()
        says(ANSWER)(client)

    return act


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_refused_waits_and_is_answered(status: int) -> None:
    """The server works on four at once; all of them take three times as long as one request would try on its own."""
    policy = RetryPolicy(max_lost=20, backoff_initial_s=0.01, backoff_max_s=0.05)
    with serving(busy(4, 0.05, status)) as server, client_of(server, policy) as client:
        outputs = client.generate(["x"] * 120, SHORT)
    assert texts(outputs) == ["fine"] * 120
    assert len(server.requests) < 4 * 120


def test_a_server_that_is_busy_for_ever_is_an_error_that_says_so() -> None:
    with serving(says({"error": {"message": "the house is full"}}, 429)) as server, client_of(server) as client:
        found: list[Any] = client.generate(["x"] * 300, SHORT, return_exceptions=True)
    assert [type(one) for one in found] == [ServerBusyError] * 300
    assert [one.index for one in found] == list(range(300))
    assert all(one.status == 429 and "the house is full" in str(one) for one in found)


def test_without_file_descriptors_fewer_are_in_flight() -> None:
    source = """if True:
        import resource, sys
        from managed_vllm import RetryPolicy, VLLMClient
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
        policy = RetryPolicy(max_lost=12, backoff_initial_s=0.01, backoff_max_s=0.1)
        outputs = VLLMClient(sys.argv[1], "", "m", retry=policy).generate(["x"] * 200, {"max_tokens": 4})
        print([one.outputs[0].text for one in outputs] == ["fine"] * 200)
    """

    def slow(client: socket.socket) -> None:
        time.sleep(0.1)
        says(ANSWER)(client)

    with serving(slow) as server:
        words = [sys.executable, "-c", source, server.url]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=HANG_S)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_the_program_around_the_client_can_open_files_however_many_requests_there_are() -> None:
    source = """if True:
        import os, resource, sys, threading
        from managed_vllm import VLLMClient
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        over, failed = threading.Event(), []

        def open_files():
            while not over.wait(0.01):
                try:
                    for file in [open(os.devnull) for _ in range(40)]:
                        file.close()
                except OSError as error:
                    failed.append(error)

        program = threading.Thread(target=open_files)
        program.start()
        outputs = VLLMClient(sys.argv[1], "", "m").generate(["x"] * 600, {"max_tokens": 4})
        over.set()
        program.join()
        print([one.outputs[0].text for one in outputs] == ["fine"] * 600, failed)
    """

    def slow(client: socket.socket) -> None:
        time.sleep(0.2)
        says(ANSWER)(client)

    with serving(slow) as server:
        words = [sys.executable, "-c", source, server.url]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=HANG_S)
    assert (ended.stdout, ended.stderr) == ("True []\n", "")


def test_a_new_life_of_the_server_takes_in_as_many_as_the_first() -> None:
    alive, together = threading.Event(), threading.Event()
    all_of_them = threading.Barrier(60)
    now = [1]

    def act(client: socket.socket) -> None:
        if together.is_set():
            all_of_them.wait(HANG_S)
        says(ANSWER if alive.is_set() else {"error": {"message": "dead"}}, 200 if alive.is_set() else 503)(client)

    async def main() -> None:
        with serving(act) as server:

            def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> tuple[Connection, int]:
                if len(server.requests) > 100:
                    alive.set()
                    now[0] = 2
                return Connection(base_url=f"{server.url}/v1", api_key=Secret(""), model="m"), now[0]

            client = AsyncVLLMClient(connection=connection, retry=RetryPolicy(backoff_initial_s=0.01, spread_s=0))
            outputs = await client.generate(["x"] * 60, SHORT)
            assert texts(outputs) == ["fine"] * 60
            together.set()
            outputs = await client.generate(["x"] * 60, SHORT)  # which are answered once all are in flight
            assert texts(outputs) == ["fine"] * 60
            await client.aclose()

    asyncio.run(main())


# -- very many ---------------------------------------------------------------------------------------------------------

WAVES = """if True:
    import asyncio, sys, threading
    sys.path.insert(0, sys.argv[1])
    import stub_server
    stub_server.raise_open_files()
    held, stats = [], stub_server.Stats()

    class Holding(stub_server.Connection):
        def _write(self, answer):
            held.append((super()._write, answer))

    async def main():
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Holding(stats, 1e-9), "127.0.0.1", 0, backlog=4096)
        print("http://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
        waves, left = [4096, 2048, 1024, 512, 1], 9001
        while True:
            await asyncio.sleep(0.05)
            wave = min(waves[-1], left)
            if wave and len(held) >= wave:
                for write, answer in held[:wave]:
                    write(answer)
                del held[:wave]
                left -= wave
                waves[1:] = waves[1:-1]

    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
    sys.stdin.read()
"""
"""The stub server, but it answers in waves: the client's bound grows by what is answered while others wait, from 1,024
by 512, 1,024 and 2,048 to 4,096, and then as many are in flight at once."""
MANY = """if True:
    import os, sys, time
    sys.path.insert(0, sys.argv[2])
    import stub_server
    stub_server.raise_open_files()
    from managed_vllm import VLLMClient

    def files():
        return len(os.listdir("/proc/self/fd"))

    with VLLMClient(sys.argv[1], "", "stub") as client:
        client.generate(["x"], {"max_tokens": 4})
        before = files()
        outputs = client.generate([str(i) for i in range(9000)], {"max_tokens": 256})  # too long to go together
        assert len(outputs) == 9000
        assert all(len(one.outputs[0].token_ids) == stub_server.TOKENS for one in outputs)
        print("in flight", stub_server.stats_of(sys.argv[1]).most_in_flight)
        assert files() <= before + 4096
        while files() > before:
            time.sleep(0.02)
"""


@pytest.mark.slow
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 5000, reason="too few file descriptors allowed")
def test_9000_requests_in_one_call_with_4096_in_flight() -> None:
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", WAVES, str(BENCHMARKS)]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None
        words = [sys.executable, "-c", MANY, server.stdout.readline().strip(), str(BENCHMARKS)]
        try:
            ended = subprocess.run(words, capture_output=True, text=True, timeout=200)
        finally:
            server.kill()
    assert ended.stderr == ""
    said = dict(line.rsplit(" ", 1) for line in ended.stdout.splitlines())
    assert int(said["in flight"]) == 4096


# -- refusals ----------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Act, type[RequestError], str]] = {
    "wrong key": (says({"error": "Unauthorized"}, 401), AuthenticationError, "Unauthorized"),
    "forbidden": (says({"error": {"message": "no"}}, 403), AuthenticationError, "no"),
    "unknown model": (
        says({"error": {"message": "The model `m` does not exist. Valid aliases: x.", "code": 404}}, 404),
        ModelNotFoundError,
        "Valid aliases: x",
    ),
    "unknown route": (
        says({"error": {"message": "Not Found"}}, 404),
        BadRequestError,
        "its model is for another task",
    ),
    "FastAPI's own": (says({"detail": [{"msg": "field required"}]}, 422), BadRequestError, "field required"),
    "no JSON": (lambda client: client.sendall(http(b"<h1>no</h1>", 400)), BadRequestError, "<h1>no</h1>"),
    "not UTF-8": (lambda client: client.sendall(http(b"\xff\xfe", 400)), BadRequestError, "HTTP 400"),
    "nothing": (lambda client: client.sendall(http(b"", 413)), BadRequestError, "HTTP 413"),
    "too deep": (lambda client: client.sendall(http(b"[" * 100_000, 400)), BadRequestError, "HTTP 400"),
    "a number": (says(5, 400), BadRequestError, "HTTP 400"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refusals_come_in_types(case: str) -> None:
    act, kind, words = ERRORS[case]
    with serving(act) as server, client_of(server) as client, pytest.raises(kind) as caught:
        client.generate("x", SHORT)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    if isinstance(caught.value, ModelNotFoundError):
        assert caught.value.model == "m"
    if isinstance(caught.value, AuthenticationError):
        assert caught.value.base_url.startswith(server.url)
    assert len(server.requests) == 1
    assert caught.value.status is not None
    assert type(pickle.loads(pickle.dumps(caught.value))) is kind


def test_a_wrong_key_ends_each_request_of_a_batch() -> None:
    with serving(says({"error": "Unauthorized"}, 401)) as server:
        client = VLLMClient(server.url, "wrong", "m", retry=QUICK)
        with pytest.raises(AuthenticationError) as caught:
            client.generate(["a", "b", "c"], SHORT)
        client.close()
        assert caught.value.results is not None
        assert [one.index for one in caught.value.results] == [0, 1, 2]
        eventually(lambda: server.hung_up == server.connections, "no connection is left")
