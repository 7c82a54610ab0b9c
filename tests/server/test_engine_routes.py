"""The routes that control an engine: what is sent, what each refusal means, and that no call outlasts its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_server import Script, hangs, says, sends

from managed_vllm.errors import EngineControlError, EngineLostError, EngineTimeoutError, EngineUnsupportedError
from managed_vllm.masking import Secret
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.status import Connection

PLENTY_S = 30.0
OFFERED = ["/pause", "/collective_rpc", "/v1/load_lora_adapter", "/weight_info"]
ALL = says({"paths": {path: {} for path in OFFERED}})
NO_OPENAPI = says({"detail": "Not Found"}, 404)


def ask(server: Script, call: Callable[[EngineRoutes], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        routes = EngineRoutes(Connection(f"{server.url}/v1", Secret("the-key"), "m"), Secret("control"))
        try:
            return await call(routes)
        finally:
            await routes.close()

    return asyncio.run(main())


def test_a_call_says_what_it_was_asked_for(script: Callable[..., Script]) -> None:
    server = script(ALL, says({"results": [None]}), says({"weight_version": "v2"}), says({}))

    async def calls(routes: EngineRoutes) -> str:
        await routes.reload_weights("/ck", timeout_s=PLENTY_S)
        version = await routes.weight_version(timeout_s=PLENTY_S)
        await routes.load_lora("a", "/lora", replace=True, timeout_s=PLENTY_S)
        return version

    assert ask(server, calls) == "v2"
    assert server.requests[1:] == [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/ck"}}),
        ("/weight_info", None),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/lora", "load_inplace": True}),
    ]


def test_what_the_server_does_not_list_is_not_asked_for(script: Callable[..., Script]) -> None:
    server = script(ALL)
    with pytest.raises(EngineUnsupportedError, match="VLLM_SERVER_DEV_MODE") as refused:
        ask(server, lambda routes: routes.sleep(1, timeout_s=PLENTY_S))
    assert refused.value.call == "sleep"
    assert [path for path, _ in server.requests] == ["/openapi.json"]


def test_where_the_server_lists_nothing_a_bare_404_says_the_same(script: Callable[..., Script]) -> None:
    with pytest.raises(EngineUnsupportedError, match="enable_lora"):
        ask(script(NO_OPENAPI, NO_OPENAPI), lambda routes: routes.unload_lora("a", timeout_s=PLENTY_S))


def test_a_refusal_has_the_servers_own_words(script: Callable[..., Script]) -> None:
    missing = says({"error": {"message": "No adapter found for /none", "type": "NotFoundError"}}, 404)
    with pytest.raises(EngineControlError, match="No adapter found") as refused:
        ask(script(ALL, missing), lambda routes: routes.load_lora("a", "/none", timeout_s=PLENTY_S))
    assert (refused.value.status, isinstance(refused.value, EngineUnsupportedError)) == (404, False)


def test_a_server_that_hangs_or_ends_does_not_keep_the_caller(script: Callable[..., Script]) -> None:
    with pytest.raises(EngineTimeoutError):
        ask(script(ALL, hangs), lambda routes: routes.pause("keep", timeout_s=0.5))
    with pytest.raises(EngineLostError):
        ask(script(ALL, sends(b"")), lambda routes: routes.pause("keep", timeout_s=PLENTY_S))
