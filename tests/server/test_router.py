"""The front of a server's replicas: our guard on the public port, the vLLM project's router behind it."""

from __future__ import annotations

import base64
import concurrent.futures
import errno
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import standin
from free_ports import free_port
from fronted import KEY, Front, fronted
from processes import HANG_S, eventually, is_live
from prometheus_client.parser import text_string_to_metric_families
from scripted_server import ANSWER, Script, says

from managed_vllm.server import router_process, signed_sockets
from managed_vllm.server.routable import is_routable
from managed_vllm.status import RouterStatus, ServerState, ServerStatus

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
needs_router = pytest.mark.skipif(
    importlib.util.find_spec("vllm_router") is None or bool(router_process.why_not()),
    reason=router_process.why_not() or "vllm-router is not installed: pip install managed-vllm[router]",
)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """For tests that leave it as it is."""
    with fronted(tmp_path_factory.mktemp("front"), orders={"token_s": 0.002}) as front:
        yield front


def sdk(front: Front, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEY, timeout=HANG_S, **options)


def completion(prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
    return {"model": "stand-in", "prompt": prompt, "max_tokens": tokens, "return_token_ids": True, **fields}


def is_right(prompt: str, answer: dict[str, Any]) -> bool:
    ids = answer["choices"][0]["token_ids"]
    return bool(ids == standin.continuation(standin.prompt_ids(prompt), len(ids)))


# -- the way through ---------------------------------------------------------------------------------------------------


@needs_router
def test_the_openai_sdk_and_curl_are_answered(front: Front) -> None:
    client = sdk(front)
    assert [model.id for model in client.models.list()] == ["stand-in"]
    chat = client.chat.completions.create(model="stand-in", messages=[{"role": "user", "content": "hi"}])
    assert "echo hi from" in (chat.choices[0].message.content or "")
    said = ["curl", "-sS", "-u", f"anyone:{KEY}", f"{front.url}/tokenize", "-d", '{"prompt": "hi"}']
    found = subprocess.run(said, capture_output=True, text=True, timeout=HANG_S, check=True)
    assert json.loads(found.stdout) == {"tokens": standin.prompt_ids("hi")}


@needs_router
def test_a_stream_comes_bit_by_bit_and_ends_with_its_client(front: Front) -> None:
    stream = sdk(front).completions.create(model="stand-in", prompt="a long one", max_tokens=20_000, stream=True)
    seen = [next(stream) for _ in range(3)]
    assert all(part.choices[0].text for part in seen)
    eventually(lambda: sum(replica.running() for replica in front.replicas) == 1, "one is at work")
    stream.close()
    eventually(lambda: not any(replica.running() for replica in front.replicas), "the request has ended")


@needs_router
def test_bodies_and_answers_of_megabytes_go_through(front: Front) -> None:
    text = "x" * 1_500_000
    assert front.post("/tokenize", {"prompt": text}).json() == {"tokens": standin.prompt_ids(text)}


@needs_router
def test_sessions_stay_and_others_are_spread(front: Front) -> None:
    homes = {name: front.answered_by(name) for name in ("a", "b", "c", "d")}
    assert Counter(homes.values()) == {replica.pid: 2 for replica in front.replicas}
    for name, home in homes.items():
        assert {front.answered_by(name) for _ in range(3)} == {home}
    assert min(front.spread(20).values()) >= 5


@needs_router
def test_metrics_are_those_of_every_replica(front: Front) -> None:
    front.spread(8)

    def finished() -> dict[str, float]:
        text = requests.get(f"{front.url}/metrics", auth=("any", KEY), timeout=HANG_S).text
        told = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {one.labels["replica"]: one.value for one in told if one.name == "vllm:generation_tokens_total"}

    # One that does not answer in time is left out.
    assert all(eventually(lambda: len(found := finished()) == 2 and found, "both tell theirs").values())
    assert set(finished()) <= {"0", "1"}
    assert requests.get(f"{front.url}/metrics", timeout=HANG_S).status_code == 401


# -- who gets in -------------------------------------------------------------------------------------------------------


@needs_router
def test_only_the_key_opens_it(front: Front) -> None:
    for key in (None, "", "wrong", KEY[:-1]):
        refused = front.post("/v1/completions", completion("hi", 2), key=key)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == 401
    basic = base64.b64encode(f"user:{KEY}".encode()).decode()
    allowed = front.post("/v1/completions", completion("hi", 2), key=None, headers={"Authorization": f"Basic {basic}"})
    assert is_right("hi", allowed.json())
    for path in ("/health", "/ping"):
        assert requests.get(front.url + path, timeout=HANG_S).status_code == 200
    assert KEY not in front.log_path.read_text()


@needs_router
def test_neither_the_routers_own_routes_nor_those_that_change_the_engine_can_be_reached(front: Front) -> None:
    for path in ("/sleep", "/pause", "/collective_rpc", "/update_weights", "/v1/load_lora_adapter", "/adapters/x"):
        assert front.post(path, {}).status_code == 403
    stranger = "http://127.0.0.1:9"
    for path in (
        f"/add_worker?url={stranger}",
        f"/remove_worker?url={front.replicas[0].url}",
        "/workers",
        "/flush_cache",
    ):
        assert front.post(path, {}).json()["error"]["message"] == "no such route"  # a replica's words
        assert front.post("/v1/completions/.." + path, {}).status_code in (400, 404)
    assert set(front.spread(12)) == {replica.pid for replica in front.replicas}


def seen_at(port: int, user: int | None, source: str, timeout_s: float = 1.5) -> str:
    """What somebody sees who connects there."""
    code = """
        import socket, sys
        probe = socket.socket()
        probe.settimeout(float(sys.argv[3]))
        probe.bind((sys.argv[2], 0))
        try:
            probe.connect(("127.0.0.1", int(sys.argv[1])))
            probe.sendall(b"GET /list_workers HTTP/1.0\\r\\n\\r\\n")
            print(probe.recv(99))
        except OSError as error:
            print(type(error).__name__)
    """
    python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
    acting: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    words = [python, "-I", "-c", textwrap.dedent(code), str(port), source, str(timeout_s)]
    found = subprocess.run(words, **acting, env={}, cwd="/", capture_output=True, text=True, check=True)
    return str(found.stdout.strip())


@pytest.mark.parametrize("user", [pytest.param(NOBODY, marks=as_root), None])
@needs_router
def test_the_routers_own_ports_answer_nobody(front: Front, user: int | None) -> None:
    """One has its routes, one its metrics."""
    listening = [row.laddr.port for row in front.router_process().net_connections() if row.status == "LISTEN"]
    assert len(listening) == 2
    looks = [(port, user, source) for port in listening for source in ("127.0.0.1", "127.0.0.9")]
    with concurrent.futures.ThreadPoolExecutor(len(looks)) as pool:
        assert set(pool.map(lambda look: seen_at(*look), looks)) == {"TimeoutError"}
    public = int(front.url.rpartition(":")[2])
    assert "401" in seen_at(public, user, "127.0.0.1", HANG_S)
    assert front.answered_by()


@needs_router
def test_whoever_connects_before_its_port_is_closed_is_noticed() -> None:
    ours, theirs = os.pipe()
    words = [sys.executable, "-m", "managed_vllm.server.router_process"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[theirs]) as process:
        os.close(theirs)
        port, key = free_port(), signed_sockets.new_key()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"key": key.hex(), "port": port, "outcome": theirs}).encode() + b"\n")
        process.stdin.close()
        came_in = 0
        with os.fdopen(ours, "rb") as told:
            while not select.select([told], [], [], 0)[0]:
                came_in += connects(port)
            word = told.readline()
        came_in_later = connects(port)
        process.kill()
    assert word in (router_process.MET, router_process.SIGNED)
    assert word == router_process.MET or not came_in
    assert not came_in_later


def connects(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- deaths ------------------------------------------------------------------------------------------------------------


def play(front: Front, prompts: list[str], at_once: int, on_answer: Callable[[int], None]) -> None:
    """Asks for all, without any retry of the client's; all must be right."""

    def one(number: int) -> None:
        response = front.post("/v1/completions", completion(prompts[number], 12))
        assert response.status_code == 200, response.text
        assert is_right(prompts[number], response.json())
        on_answer(number)

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(one, number) for number in range(len(prompts))]:
            done.result(4 * HANG_S)


@needs_router
def test_no_request_fails_while_a_replica_and_vllm_router_are_killed(tmp_path: Path) -> None:
    with fronted(tmp_path, orders={"token_s": 0.002}) as front:
        first, second = front.replicas

        def strike(number: int) -> None:
            if number == 40:
                first.kill()  # nobody says so: it is found by those that ask it
            if number == 80:
                front.router_process().kill()

        play(front, [f"prompt {number}" for number in range(140)], 8, strike)
        front.serve(second)
        assert set(front.spread(6)) == {second.pid}
        first.start()
        front.serve(first, second)
        eventually(lambda: set(front.spread(4)) == {first.pid, second.pid}, "both are in use")
        eventually(lambda: front.status.restarts >= 1, "vllm-router was started again")


@needs_router
def test_the_front_comes_back_under_its_address_when_it_is_killed(tmp_path: Path) -> None:
    with fronted(tmp_path) as front:
        url, pid, client = front.url, front.status.pid, sdk(front, max_retries=8)
        router = front.router_process()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert client.completions.create(model="stand-in", prompt="hi").choices[0].text
        eventually(lambda: not is_live(router), "vllm-router has ended with it")
        eventually(lambda: not front.status.reason, "it is what it was")
        assert front.url == url
        assert front.status.restarts >= 1  # vllm-router itself may have needed a second start
        assert front.status.pid != pid
        assert set(front.spread(8)) == {replica.pid for replica in front.replicas}


@needs_router
def test_a_request_that_kills_its_servers_is_given_up(tmp_path: Path) -> None:
    with fronted(tmp_path, replicas=4, orders={"poison": "poison"}) as front:
        refused = front.post("/v1/completions", completion("poison", 3, stream_options={"odd": 1}))
        assert refused.status_code == 502
        assert "not sent again" in refused.json()["error"]["message"]
        # A process that ends closes its connections before it counts as ended.
        eventually(lambda: sum(replica.is_alive() for replica in front.replicas) == 1, "three have ended")
        assert front.answered_by()


@needs_router
def test_a_stream_that_is_cut_does_not_look_complete(tmp_path: Path) -> None:
    with fronted(tmp_path, orders={"token_s": 0.005}) as front:
        body = completion("a long one", 40_000, stream=True)
        for path in ("/v1/completions", "/v1/chat/completions"):
            asked = body if path == "/v1/completions" else {**body, "messages": [{"role": "user", "content": "x"}]}
            with front.post(path, asked, stream=True) as response:
                assert response.status_code == 200, response.text
                parts = response.iter_lines()
                assert next(parts)
                (victim,) = eventually(lambda: [one for one in front.replicas if one.running()], "one is at work")
                victim.kill()
                with pytest.raises(requests.RequestException):
                    list(parts)
            victim.start()


@needs_router
def test_a_request_waits_for_the_first_replica_that_comes_back(tmp_path: Path) -> None:
    with fronted(tmp_path, replicas=1) as front, concurrent.futures.ThreadPoolExecutor(1) as pool:
        front.replicas[0].kill()
        front.serve()
        eventually(lambda: requests.get(f"{front.url}/health", timeout=HANG_S).status_code == 503, "none is left")
        front.replicas[0].start()
        answer = pool.submit(front.answered_by)  # which waits for some seconds only
        front.serve(*front.replicas)
        assert answer.result(HANG_S) == front.replicas[0].pid


@needs_router
def test_nothing_is_left_of_it_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    code = """
        import asyncio, pathlib, sys
        from managed_vllm.masking import Secret
        from managed_vllm.server.router import Router

        async def run():
            told = lambda: print(router.status.pid, int(router.status.ready), flush=True)
            log, key = pathlib.Path(sys.argv[1]), Secret("k")
            router = Router(host=None, port=None, api_key=key, log_path=log, marks={}, on_change=told)
            await router.start()
            await asyncio.sleep(3600)

        asyncio.run(run())
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        ready = next(line for line in supervisor.stdout if line.endswith(" 1\n"))
        front = psutil.Process(int(ready.split()[0]))
        below = [front, *front.children(recursive=True)]
        assert len(below) == 2
        supervisor.kill()
    eventually(lambda: not any(map(is_live, below)), "its processes have ended")


# -- where there is none -----------------------------------------------------------------------------------------------


def test_without_the_extra_there_is_none_and_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_router", None)
    front = Front(tmp_path)
    front.close()
    assert not front.status.ready
    front = Front(tmp_path)
    try:
        assert "managed-vllm[router]" in front.status.reason
        assert front.status.base_url is None
    finally:
        front.close()


@needs_router
def test_where_the_kernel_can_t_sign_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    monkeypatch.setattr(signed_sockets, "sign", refuses)
    front = Front(tmp_path)
    try:
        assert "TCP_MD5SIG" in front.status.reason
        assert "Protocol not available" in front.status.reason
    finally:
        front.close()


@needs_router
def test_an_address_that_can_t_be_had_is_told(tmp_path: Path) -> None:
    front = Front(tmp_path, host="192.0.2.1")
    try:
        assert "can't listen on 192.0.2.1" in front.status.reason
    finally:
        front.close()


def test_its_status_crosses_the_channel() -> None:
    front = RouterStatus(pid=7, base_url="http://127.0.0.1:8000/v1", ready=True, restarts=1)
    status = ServerStatus(ServerState.READY, router=front)
    assert ServerStatus.from_dict(json.loads(json.dumps(status.to_dict()))) == status
    newer = {**front.to_dict(), "since": 1}
    assert RouterStatus.from_dict(newer) == front
    assert ServerStatus.from_dict({"state": "ready"}).router is None


# -- what goes through vllm-router -------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}, "description": "d"}
AS_THEY_CAME: list[tuple[str, dict[str, Any]]] = [
    (
        "completions",
        {"prompt": "x", "max_tokens": 5, "temperature": 0.7, "seed": -1, "odd": {"b": [1, {}], "a": 1e-9}},
    ),
    ("completions", {"prompt": [[1, 2], [3]], "logprobs": 3, "stream_options": {"include_usage": True}}),
    (
        "chat/completions",
        {"messages": [USER], "top_logprobs": 3, "logprobs": True, "chat_template_kwargs": {"a": False}},
    ),
    (
        "chat/completions",
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "s"}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}, "uuid": "1"}]},
                {
                    "role": "assistant",
                    "content": "a",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "r", "tool_call_id": "1"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "auto",
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
            "structured_outputs": {"json": {"type": "object"}},
            "vllm_xargs": {"a": 1},
        },
    ),
]
"""Bodies with everything in them that vllm-router keeps."""
LOST: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("chat/completions", {"messages": [{**USER, "refusal": "r"}]}),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "r"}]}),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a", "tool_call_id": "1", "name": "f"}]}),
    (
        "chat/completions",
        {"messages": [USER], "tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]},
    ),
    ("chat/completions", {"messages": [USER], "response_format": {"type": "structural_tag"}}),
    ("embeddings", {"input": "x", "truncate_prompt_tokens": -1}),
]
"""Bodies in which it would lose something, or which it refuses."""


def test_what_it_would_change_goes_past_it() -> None:
    for path, body in AS_THEY_CAME:
        assert is_routable(f"/v1/{path}", json.dumps(body).encode()), body
    for path, body in LOST:
        assert not is_routable(f"/v1/{path}", json.dumps(body).encode()), body
    assert not is_routable("/v1/completions", b'{"prompt": "x"')
    assert not is_routable("/v1/completions", json.dumps({"prompt": "x" * (1 << 18)}).encode())


def kept(sent: Any, got: Any) -> bool:
    """Whether all that was sent is there."""
    if isinstance(sent, dict):
        return isinstance(got, dict) and all(name in got and kept(value, got[name]) for name, value in sent.items())
    if isinstance(sent, list):
        return isinstance(got, list) and len(sent) == len(got) and all(map(kept, sent, got))
    return bool(sent == got)


@needs_router
def test_every_request_reaches_a_server_as_it_came(tmp_path: Path, script: Callable[..., Script]) -> None:
    """Whichever way: this is what tells that another version of vllm-router drops something else."""
    played = script(says(ANSWER))
    with fronted(tmp_path, replicas=0) as front:
        front.serve(played)
        eventually(lambda: requests.get(f"{front.url}/health", timeout=HANG_S).ok, "it knows of the server")
        eventually(lambda: "/health" in [path for path, _ in played.requests], "vllm-router has asked for its health")
        for number, (path, body) in enumerate(AS_THEY_CAME + LOST):
            sent = {"model": "m", **body}
            response = front.post(f"/v1/{path}", sent, headers={"X-Mine": str(number)})
            assert response.json() == ANSWER
            assert not response.headers.keys() & {"access-control-allow-origin", "vary"}
            at = next(at for at, headers in enumerate(played.headers) if headers.get("x-mine") == str(number))
            assert kept(sent, played.requests[at][1]), played.requests[at]
            assert played.headers[at]["authorization"] == f"Bearer {KEY}"
