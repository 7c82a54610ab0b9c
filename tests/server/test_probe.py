"""The questions over HTTP: what each answer means, and that none of them hangs or raises."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from free_ports import free_port
from scripted_server import Act, Script, drips, hangs, says, sends
from scripted_server import http as response

from managed_vllm.masking import Secret
from managed_vllm.server.probe import Answer, Probe
from managed_vllm.status import Connection

MODELS = {"data": [{"id": "m"}]}
PLENTY_S = 30.0
METRICS = """\
# HELP vllm:num_requests_running As vLLM's.
vllm:num_requests_running{engine="0"} 1.0
vllm:generation_tokens_total{engine="0"} 7.0
vllm:iteration_tokens_total_bucket{engine="0",le="8"} 3.0
vllm:iteration_tokens_total_sum{engine="0"} 9.0
process_cpu_seconds_total 3.5
"""


def ask(server: Script, question: Callable[[Probe], Awaitable[Any]], *, is_vllm: bool = True) -> Any:
    async def main() -> Any:
        probe = Probe(Connection(f"{server.url}/v1", Secret("the-key"), "m"), is_vllm=is_vllm)
        try:
            return await question(probe)
        finally:
            await probe.close()

    return asyncio.run(main())


def paths(server: Script) -> list[str]:
    return [path for path, _ in server.requests]


def test_up_means_health_answers(script: Callable[..., Script]) -> None:
    assert ask(script(says({})), lambda probe: probe.is_up(PLENTY_S)).ok
    dead = ask(script(says({}, 503)), lambda probe: probe.is_up(PLENTY_S))
    assert (dead.ok, dead.status) == (False, 503)


def test_another_kind_of_server_need_not_have_health(script: Callable[..., Script]) -> None:
    server = script(says({}, 404), says(MODELS))
    assert ask(server, lambda probe: probe.is_up(PLENTY_S), is_vllm=False).ok
    assert paths(server) == ["/health", "/v1/models"]
    assert ask(script(says({}, 404)), lambda probe: probe.is_up(PLENTY_S)).status == 404


def test_nobody_listens_is_told_apart_from_no_answer(script: Callable[..., Script]) -> None:
    server = script(hangs)
    silent = ask(server, lambda probe: probe.is_up(0.1))
    assert silent == Answer(False, None, silent.body)
    assert not silent.refused
    server.url = f"http://127.0.0.1:{free_port()}"
    assert ask(server, lambda probe: probe.is_up(PLENTY_S)).refused


@pytest.mark.parametrize("act", [drips(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"), drips(b"HTTP/1.1 2")])
def test_a_body_that_drips_for_ever_is_no_answer(script: Callable[..., Script], act: Act) -> None:
    assert ask(script(act), lambda probe: probe.is_up(0.3)).status is None


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"])
def test_what_is_no_http_is_no_answer(script: Callable[..., Script], data: bytes) -> None:
    assert not ask(script(sends(data)), lambda probe: probe.is_up(PLENTY_S)).ok


def test_the_model_must_be_listed(script: Callable[..., Script]) -> None:
    assert ask(script(says(MODELS)), lambda probe: probe.serves_model(PLENTY_S)).ok
    other = ask(script(says({"data": [{"id": "other"}]})), lambda probe: probe.serves_model(PLENTY_S))
    assert not other.ok
    assert "does not list 'm'" in other.body


def test_a_token_is_asked_for_where_the_model_can_give_one(script: Callable[..., Script]) -> None:
    no_route, wrong_kind, vector = says({}, 404), says({"message": "The model does not support Chat"}, 400), says({})
    server = script(no_route, wrong_kind, vector)
    assert ask(server, lambda probe: probe.generates(PLENTY_S)).ok
    assert paths(server) == ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    assert all(body["model"] == "m" for _, body in server.requests)


def test_a_server_whose_model_gives_vectors_for_tokens_alone_becomes_ready(script: Callable[..., Script]) -> None:
    """vLLM 0.32 has the route for embeddings then, too, and answers it with 501."""
    server = script(*[says({}, 404)] * 2, says({"message": "The model does not support Embeddings API"}, 501), says({}))
    assert ask(server, lambda probe: probe.generates(PLENTY_S)).ok
    assert len(paths(server)) == 4


@pytest.mark.parametrize("name", ['a"b', "a\\b", "模型 mit Leerzeichen", "m"])
@pytest.mark.parametrize("others", [0, 500])
def test_a_model_is_found_in_any_list_whatever_its_name(script: Callable[..., Script], name: str, others: int) -> None:
    listed = {
        "object": "list",
        "data": [{"id": f"another-{n}", "object": "model"} for n in range(others)] + [{"id": name}],
    }

    async def listed_by(server: Script) -> Answer:
        probe = Probe(Connection(f"{server.url}/v1", Secret("the-key"), name))
        try:
            return await probe.serves_model(PLENTY_S)
        finally:
            await probe.close()

    assert asyncio.run(listed_by(script(says(listed)))).ok
    assert not asyncio.run(listed_by(script(says({"data": [{"id": f"{name}-2"}]})))).ok
    assert not asyncio.run(listed_by(script(says("<html>")))).ok


@contextlib.contextmanager
def server_of_one_route(route: str) -> Iterator[tuple[str, list[bytes]]]:
    """A server that has one route to generate by, and its URL and the bodies that came there."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == route:
                bodies.append(body)
            self.send_response(200 if self.path == route else 404)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        server.shutdown()


@pytest.mark.parametrize("route", ["/v1/audio/transcriptions", "/v1/rerank", "/v1/images/generations"])
def test_a_server_that_hears_ranks_or_draws_is_ready_as_well(route: str) -> None:
    async def main(url: str) -> Answer:
        probe = Probe(Connection(url, Secret("the-key"), "m"), is_vllm=False)
        try:
            return await probe.generates(PLENTY_S)
        finally:
            await probe.close()

    with server_of_one_route(route) as (url, bodies):
        assert asyncio.run(main(url)).ok
    assert len(bodies) == (0 if "images" in route else 1)  # an image would cost minutes
    assert all(b"WAVE" in body for body in bodies if "audio" in route)


def test_a_model_that_does_not_exist_is_no_missing_route(script: Callable[..., Script]) -> None:
    server = script(says({"error": {"message": "The model `m` does not exist."}}, 404))
    assert not ask(server, lambda probe: probe.generates(PLENTY_S)).ok


def test_another_kind_of_server_may_take_chats_only(script: Callable[..., Script]) -> None:
    server = script(says({"error": "give messages"}, 400), says({}))
    assert ask(server, lambda probe: probe.generates(PLENTY_S), is_vllm=False).ok
    refused = ask(script(says({}, 404), says({"error": "bad"}, 400)), lambda probe: probe.generates(PLENTY_S))
    assert (refused.ok, refused.status) == (False, 400)


def test_another_kind_of_server_may_guard_its_health(script: Callable[..., Script]) -> None:
    server = script(says({}, 401), says(MODELS))
    assert ask(server, lambda probe: probe.is_up(PLENTY_S), is_vllm=False).ok


def test_an_error_of_the_server_is_the_answer_and_nothing_else_is_tried(script: Callable[..., Script]) -> None:
    server = script(says({"error": "boom"}, 500))
    answer = ask(server, lambda probe: probe.generates(PLENTY_S))
    assert (answer.ok, answer.status) == (False, 500)
    assert len(server.requests) == 1


def test_signs_of_life_are_what_only_a_step_of_the_engine_changes(script: Callable[..., Script]) -> None:
    server = script(sends(response(METRICS.encode(), kind="text/plain"), then_closes=False))
    signs = ask(server, lambda probe: probe.signs_of_life(PLENTY_S))
    assert signs.splitlines() == [
        'vllm:num_requests_running{engine="0"} 1.0',
        'vllm:generation_tokens_total{engine="0"} 7.0',
        'vllm:iteration_tokens_total_sum{engine="0"} 9.0',
    ]
    assert ask(script(says({}, 404)), lambda probe: probe.signs_of_life(PLENTY_S)) is None


def test_an_engine_rests_if_it_says_so(script: Callable[..., Script]) -> None:
    assert ask(script(says({"is_paused": True})), lambda probe: probe.is_paused_or_asleep(PLENTY_S))
    assert ask(
        script(says({"is_paused": False}), says({"is_sleeping": True})),
        lambda probe: probe.is_paused_or_asleep(PLENTY_S),
    )
    assert not ask(script(says({}, 404)), lambda probe: probe.is_paused_or_asleep(PLENTY_S))
