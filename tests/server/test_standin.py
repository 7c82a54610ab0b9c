"""The stand-in itself: what the other tests rely on, each thing once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import standin
from free_ports import free_port
from processes import HANG_S, eventually
from prometheus_client.parser import text_string_to_metric_families

KEY = {"Authorization": "Bearer right"}
PROMPT = "Say: ü"
IDS = standin.prompt_ids(PROMPT)
MESSAGES = [{"role": "user", "content": "hi"}]


class Server:
    """A stand-in that serves on a port of its own."""

    def __init__(self, **order: Any) -> None:
        port = free_port()
        self.process = psutil.Popen(
            [sys.executable, standin.__file__, "--port", str(port)],
            env={**os.environ, **standin.orders(**order), "VLLM_API_KEY": "right"},
            stdout=subprocess.PIPE,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=KEY, trust_env=False, timeout=HANG_S)
        assert self.process.stdout.readline() == b"Application startup complete.\n"

    def complete(self, max_tokens: int = 8, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json=self.body(prompt=PROMPT, max_tokens=max_tokens, **fields))

    def events(self, route: str, **fields: Any) -> list[Any]:
        """The events of a stream; [DONE] as a word."""
        body = self.body(stream=True, **fields)
        with self.http.stream("POST", route, json=body) as response:
            assert response.status_code == 200
            found = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        return [event if event == "[DONE]" else json.loads(event) for event in found]

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"model": "stand-in", "return_token_ids": True, **fields}

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        samples = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
        assert samples[name].labels == {"engine": "0", "model_name": "stand-in"}
        return samples[name].value

    @property
    def engine(self) -> psutil.Process:
        return next(child for child in self.process.children() if "spawn_main" in " ".join(child.cmdline()))

    @property
    def worker(self) -> psutil.Process:
        return next(child for child in self.engine.children() if "spawn_main" in " ".join(child.cmdline()))


@contextlib.contextmanager
def serving(**order: Any) -> Iterator[Server]:
    server = Server(**order)
    with contextlib.suppress(psutil.Error):
        below = server.process.children(recursive=True)
    try:
        yield server
    finally:
        server.http.close()
        for process in [*below, server.process]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        server.process.wait()
        server.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(tree=True) as server:
        yield server


def order_fault(folder: Path, kind: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"1-{kind}").touch()


def test_answers_follow_the_rule_and_a_continuation_gives_the_same_tokens(server: Server) -> None:
    whole = standin.continuation(IDS, 8)
    answer = server.complete(logprobs=1).json()
    choice = answer["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (IDS, whole)
    assert (choice["text"], choice["finish_reason"]) == (standin.text_of(whole), "length")
    assert choice["logprobs"]["token_logprobs"] == [standin.logprob_of(token) for token in whole]
    assert answer["usage"] == {"prompt_tokens": len(IDS), "completion_tokens": 8, "total_tokens": len(IDS) + 8}
    rest = server.http.post("/v1/completions", json=server.body(prompt=[*IDS, *whole[:3]], max_tokens=5)).json()
    assert rest["choices"][0]["token_ids"] == whole[3:]


def test_chat_and_the_continuation_of_its_last_message(server: Server) -> None:
    whole = standin.continuation(standin.prompt_ids(MESSAGES), 6)
    body = server.body(messages=MESSAGES, max_tokens=6, n=2, logprobs=True)
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_token_ids"] == standin.prompt_ids(MESSAGES)
    assert [c["token_ids"] for c in answer["choices"]] == [whole, whole]
    assert answer["choices"][1]["message"]["content"] == standin.text_of(whole)
    begun = [*MESSAGES, {"role": "assistant", "content": standin.text_of(whole[:2])}]
    body = server.body(messages=begun, max_tokens=4, continue_final_message=True, add_generation_prompt=False)
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["token_ids"] == whole[2:]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_the_same(server: Server, chat: bool) -> None:
    what: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": PROMPT}
    asked = standin.prompt_ids(MESSAGES if chat else PROMPT)
    events = server.events(
        f"/v1/{'chat/' if chat else ''}completions",
        **what,
        max_tokens=6,
        logprobs=True if chat else 1,
        stream_options={"include_usage": True},
        standin_token_s=0.01,
    )
    assert events.pop() == "[DONE]"
    assert events.pop()["usage"]["completion_tokens"] == 6
    first = events[0]
    assert (first if chat else first["choices"][0])["prompt_token_ids"] == asked
    choices = [event["choices"][0] for event in events]
    ids = [token for choice in choices for token in choice.get("token_ids") or ()]
    assert ids == standin.continuation(asked, 6)
    text = "".join(c["delta"]["content"] if chat else c["text"] for c in choices)
    assert text == standin.text_of(ids)
    *earlier, last = [choice["finish_reason"] for choice in choices]
    assert (last, set(earlier) <= {None}) == ("length", True)  # tokens that are there at once come in one event
    if not chat:
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        assert offsets == [len(standin.text_of(ids[:index])) for index in range(6)]


def test_bad_requests_are_refused_as_vllm_does(server: Server) -> None:
    assert server.complete(0).status_code == 400
    assert server.http.post("/v1/completions", json=server.body(prompt=[10_000], max_tokens=2)).status_code == 400
    assert server.http.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code == 404


def test_the_metrics_count_and_want_the_key(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total"), server.metric("vllm:prompt_tokens_total")
    server.complete(5)
    assert server.metric("vllm:generation_tokens_total") == before[0] + 5
    assert server.metric("vllm:prompt_tokens_total") == before[1] + len(IDS)
    assert server.metric("vllm:iteration_tokens_total_count") > 0
    assert server.metric("vllm:num_requests_running") == 0
    for path, status in (("/metrics", 401), ("/v1/models", 401), ("/health", 200), ("/ping", 200)):
        assert server.http.get(path, headers={"Authorization": ""}).status_code == status


def _name(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/comm").read_text()


def test_the_tree_is_vllms(server: Server) -> None:
    eventually(lambda: _name(server.engine).startswith("VLLM::EngineCor"), "engine has its name")
    eventually(lambda: _name(server.worker).strip() == "VLLM::Worker", "worker has its name")


@pytest.mark.parametrize("who", ["engine", "worker"])
def test_while_one_is_stopped_only_health_and_metrics_answer(server: Server, who: str) -> None:
    process = getattr(server, who)
    process.suspend()
    try:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=server.body(prompt=PROMPT, max_tokens=2), timeout=0.4)
        assert server.http.get("/health").status_code == 200
        still = server.metric("vllm:generation_tokens_total")
        assert server.metric("vllm:generation_tokens_total") == still
    finally:
        process.resume()
    assert server.complete(2).json()["choices"][0]["token_ids"] == standin.continuation(IDS, 2)


def test_who_hangs_up_frees_its_request(server: Server) -> None:
    body = server.body(prompt=PROMPT, max_tokens=1000, standin_token_s=0.1)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=0.3)
    eventually(lambda: server.metric("vllm:num_requests_running") == 0, "given up")


@pytest.mark.parametrize("kind", ["crash-engine", "crash-worker"])
def test_the_engine_dead_means_500_and_exit_code_0(tmp_path: Path, kind: str) -> None:
    falls = tmp_path / "falls"
    with serving(tree=True, faults=str(tmp_path), falls=str(falls)) as server:
        order_fault(tmp_path, kind)
        assert server.complete(1).status_code == 200  # a probe claims no fault
        assert server.complete().status_code == 500
        assert server.http.get("/health").status_code == 503
        falls.touch()
        assert server.process.wait(HANG_S) == 0
        assert (tmp_path / f"1-{kind}.claimed").exists()


def test_an_engine_killed_under_a_stream_ends_it_with_an_error(tmp_path: Path) -> None:
    with serving(tree=True, token_s=0.05, falls=str(tmp_path / "never")) as server:
        body = server.body(prompt=PROMPT, max_tokens=4000, stream=True)
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            server.engine.send_signal(signal.SIGKILL)
            found = [line for line in lines if line]
        assert "error" in json.loads(found[-2].removeprefix("data: "))
        assert found[-1] == "data: [DONE]"


def test_faults_that_the_server_survives(tmp_path: Path) -> None:
    half = standin.continuation(IDS, 4)
    with serving(faults=str(tmp_path)) as server:
        for kind in ("500", "503"):
            order_fault(tmp_path, kind)
            assert server.complete().status_code == int(kind)
        order_fault(tmp_path, "streamerror")
        assert server.complete().status_code == 500
        order_fault(tmp_path, "abort")
        choice = server.complete().json()["choices"][0]
        assert (choice["token_ids"], choice["finish_reason"]) == (half, "abort")
        order_fault(tmp_path, "garbage")
        with pytest.raises(ValueError):
            server.complete().json()
        for kind in ("truncated", "halfstream"):
            order_fault(tmp_path, kind)
            with pytest.raises(httpx.RemoteProtocolError):
                server.complete()
            order_fault(tmp_path, kind)
            with pytest.raises(httpx.RemoteProtocolError):
                server.events("/v1/completions", prompt=PROMPT, max_tokens=8)
        order_fault(tmp_path, "streamerror")
        *tokens, error, done = server.events("/v1/completions", prompt=PROMPT, max_tokens=8)
        assert [token for event in tokens for token in event["choices"][0]["token_ids"]] == half
        assert error["error"]["code"] == 500
        assert done == "[DONE]"
        order_fault(tmp_path, "abort")
        events = server.events("/v1/completions", prompt=PROMPT, max_tokens=8)
        assert events[-2]["choices"][0]["finish_reason"] == "abort"
        assert server.complete().json()["choices"][0]["token_ids"] == standin.continuation(IDS, 8)


def test_an_api_server_that_hangs_answers_nothing_and_hears_nothing(tmp_path: Path) -> None:
    with serving(faults=str(tmp_path)) as server:
        order_fault(tmp_path, "hang-api")
        body = server.body(prompt=PROMPT, max_tokens=8, stream=True)
        with server.http.stream("POST", "/v1/completions", json=body):  # whoever hangs up meets no fault
            assert server.process.stdout.readline() == b"HANGS\n"
            server.process.terminate()
            with pytest.raises(httpx.ReadTimeout):
                server.http.get("/health", timeout=0.5)


def test_a_stolen_port_ends_it_with_vllms_line(tmp_path: Path) -> None:
    port = free_port()
    done = subprocess.run(
        [sys.executable, standin.__file__, "--port", str(port)],
        env={**os.environ, **standin.orders(steal_port=str(tmp_path / "stolen"))},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 1
    assert "OSError: [Errno 98]" in done.stdout + done.stderr
    assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200


def test_a_lost_port_a_segment_and_an_orphan(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").glob("psm_*"))
    loses = tmp_path / "loses"
    with serving(tree=True, lose_port=str(loses), shm=True, orphans=True) as server:
        server.complete(2)
        maps = Path(f"/proc/{server.worker.pid}/maps").read_text()
        segments = {path for path in set(Path("/dev/shm").glob("psm_*")) - before if str(path) in maps}
        assert len(segments) == 1
        orphan = next(child for child in server.process.children() if child.name() == "sh")
        assert os.getsid(orphan.pid) == orphan.pid
        port = server.http.base_url.port
        assert port is not None

        def refused() -> bool:
            with socket.socket() as knocking:
                return knocking.connect_ex(("127.0.0.1", port)) != 0

        loses.touch()
        eventually(refused, "it listens no more")
        assert server.process.is_running()
    segments.pop().unlink()
