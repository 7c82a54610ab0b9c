"""The routes that control an engine: what is sent, what each refusal means, and that no call outlasts its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_server import Act, Script, hangs, says, sends

from managed_vllm.errors import EngineControlError, EngineLostError, EngineTimeoutError, EngineUnsupportedError
from managed_vllm.in_server.managed_vllm_guard import SUPERVISOR_AGENT
from managed_vllm.masking import Secret
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.status import Connection

PLENTY_S = 30.0
NO_ROUTE = says({"detail": "Not Found"}, 404)
NO_ROUTE_IN_VLLMS_WORDS = says({"error": {"message": "Not Found", "type": "NotFoundError", "code": 404}}, 404)


def ask(server: Script, call: Callable[[EngineRoutes], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        routes = EngineRoutes(Connection(f"{server.url}/v1", Secret("the-key"), "m"), Secret("control"))
        try:
            return await call(routes)
        finally:
            await routes.close()

    return asyncio.run(main())


def test_a_call_says_what_it_was_asked_for(script: Callable[..., Script]) -> None:
    server = script(says({"results": [None]}), says({"weight_version": "v2"}), says({}))

    async def calls(routes: EngineRoutes) -> str:
        await routes.reload_weights("/ck", timeout_s=PLENTY_S)
        version = await routes.weight_version(timeout_s=PLENTY_S)
        await routes.load_lora("a", "/lora", replace=True, timeout_s=PLENTY_S)
        return version

    assert ask(server, calls) == "v2"
    assert {one["user-agent"].encode() for one in server.headers} == {SUPERVISOR_AGENT}  # the guard knows us by it
    assert server.requests == [
        ("/collective_rpc", {"method": "managed_vllm_reload", "kwargs": {"weights_path": "/ck"}}),
        ("/weight_info", None),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/lora", "load_inplace": True}),
    ]


@pytest.mark.parametrize("absent", [NO_ROUTE, NO_ROUTE_IN_VLLMS_WORDS, says({}, 405), says({}, 501)])
def test_a_missing_route_is_said_with_what_it_would_take(script: Callable[..., Script], absent: Act) -> None:
    server = script(absent, absent)
    with pytest.raises(EngineUnsupportedError, match="VLLM_SERVER_DEV_MODE") as refused:
        ask(server, lambda routes: routes.sleep(1, timeout_s=PLENTY_S))
    assert refused.value.call == "sleep"
    with pytest.raises(EngineUnsupportedError, match="enable_lora"):
        ask(server, lambda routes: routes.unload_lora("a", timeout_s=PLENTY_S))


def test_what_a_server_offers_is_found_out_without_doing_it(script: Callable[..., Script]) -> None:
    server = script(says({}, 405), NO_ROUTE)

    async def asked(routes: EngineRoutes) -> list[bool]:
        return [await routes.offers("/pause"), await routes.offers("/weight_checker")]

    assert ask(server, asked) == [True, False]


def test_a_refusal_has_the_servers_own_words(script: Callable[..., Script]) -> None:
    missing = says({"error": {"message": "No adapter found for /none", "type": "NotFoundError"}}, 404)
    with pytest.raises(EngineControlError, match="No adapter found") as refused:
        ask(script(missing), lambda routes: routes.load_lora("a", "/none", timeout_s=PLENTY_S))
    assert (refused.value.status, isinstance(refused.value, EngineUnsupportedError)) == (404, False)


def test_a_server_that_hangs_or_ends_does_not_keep_the_caller(script: Callable[..., Script]) -> None:
    with pytest.raises(EngineTimeoutError):
        ask(script(hangs), lambda routes: routes.pause("keep", timeout_s=0.5))
    with pytest.raises(EngineLostError):
        ask(script(sends(b"")), lambda routes: routes.pause("keep", timeout_s=PLENTY_S))
