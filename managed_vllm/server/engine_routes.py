"""The routes by which a vLLM server's engine is controlled: pause, sleep, weights, adapters, caches.

What a server can do is found out by asking it, and not concluded from its version: where a route is missing it says
404, and to a method that a route does not have 405. (Its /openapi.json would tell all at once, but vLLM 0.32 makes that
when it is first asked for, which takes a second in which no stream goes on.)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from managed_vllm.engine_state import PauseMode
from managed_vllm.errors import EngineControlError, EngineLostError, EngineTimeoutError, EngineUnsupportedError
from managed_vllm.in_server.managed_vllm_guard import SUPERVISOR_AGENT, USE
from managed_vllm.masking import Secret
from managed_vllm.server.lean_httpx import httpx
from managed_vllm.status import Connection

_DEV_MODE = "a vLLM with that route, and not with env={'VLLM_SERVER_DEV_MODE': '0'}; a command= server with =1"
_LORA = (
    "enable_lora=True, one API server, and not env={'VLLM_ALLOW_RUNTIME_LORA_UPDATING': '0'}; a command= server with =1"
)
_NO_ROUTE = frozenset({"not found", "no such route", "", "{}"})
"""What servers say where there is no route; of a thing that is missing behind one they say more."""

_NO_CANARY = (
    "update_weights: the server's workers can't look at their weights. A worker_extension_cls= of your own derives "
    "from managed_vllm_canary.Canary; command= servers, and those under Ray, can't be updated from here"
)

_TRANSFER_ROUTES = {
    "init": "/init_weight_transfer_engine",
    "start": "/start_weight_update",
    "update": "/update_weights",
    "finish": "/finish_weight_update",
    "shutdown": "/shutdown_weight_transfer_engine",
}
_TRANSFER = "vLLM 0.20 or later, and for_training=True (or weight_transfer_config= and VLLM_SERVER_DEV_MODE)"
_NO_TRANSFER = "the server takes no weights from a trainer: start it with for_training=True, or weight_transfer_config="

Query = Iterable[tuple[str, str]]


class EngineRoutes:
    """Controls one server's engine by HTTP. Every call ends within `timeout_s` seconds.

    Raises `EngineUnsupportedError` where the server lacks the route, `EngineTimeoutError`, `EngineLostError` where it
    gives no answer because it is gone, and `EngineControlError` with the server's own words where it refuses.
    """

    def __init__(self, connection: Connection, key: Secret) -> None:
        """`key` is the one that the server wants for these routes."""
        # vLLM closes a connection after an error of its own, which a request that is sent at once would run into.
        # With the variables of a trainer the key is that of users: the guard knows us by the agent.
        agent = SUPERVISOR_AGENT.decode()
        self._headers = {"Authorization": f"Bearer {key.reveal()}", "User-Agent": agent, "Connection": "close"}
        self._root = connection.base_url.removesuffix("/v1")
        transport = httpx.AsyncHTTPTransport(uds=connection.uds, verify=False)  # as in `probe`
        self._client = httpx.AsyncClient(trust_env=False, transport=transport)

    async def close(self) -> None:
        await self._client.aclose()

    # -- what it can do ------------------------------------------------------------------------------------------------

    async def offers(self, path: str, *, timeout_s: float = 10.0) -> bool:
        """Whether the server has a route. Nothing is done by asking."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.options(self._root + path, headers=self._headers, timeout=None)
        except TimeoutError:
            raise EngineTimeoutError(f"{path}: no answer within {timeout_s:.3g} s", call="offers") from None
        except httpx.HTTPError as error:
            raise EngineLostError(f"{path}: {type(error).__name__} {error}".rstrip(), call="offers") from error
        return response.status_code != 404

    async def use(self, *, timeout_s: float) -> tuple[int, int]:
        """How many requests of users are in the server, and how many have come since it started; our guard counts."""
        found = await self._ask("idle_sleep", "GET", USE, timeout_s=timeout_s, needs="our guard, and one API server")
        return int(found["in_flight"]), int(found["requests"])

    # -- scheduling ----------------------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode, *, timeout_s: float) -> None:
        """Pauses; with "wait" it returns once nothing is in flight. Nothing of the caches is dropped."""
        await self._command("pause", "/pause", [("mode", mode), ("clear_cache", "false")], timeout_s=timeout_s)

    async def resume(self, *, timeout_s: float) -> None:
        await self._command("resume", "/resume", timeout_s=timeout_s)

    async def is_paused(self, *, timeout_s: float) -> bool:
        return bool((await self._look("is_paused", "/is_paused", timeout_s=timeout_s)).get("is_paused"))

    async def sleep(self, level: int, *, mode: PauseMode = "keep", timeout_s: float) -> None:
        """Puts the engine to sleep; what is in flight goes on after `wake`, or as `mode` says."""
        await self._command("sleep", "/sleep", [("level", str(level)), ("mode", mode)], timeout_s=timeout_s)

    async def wake(self, tags: Sequence[str] = (), *, timeout_s: float) -> bool:
        """Wakes it; with `tags` ("weights", "kv_cache") only that part. Whether all of it is awake now."""
        answer = await self._command("wake", "/wake_up", [("tags", tag) for tag in tags], timeout_s=timeout_s)
        return str(answer.get("status", "sleeping" if tags else "awake")) == "awake"

    async def is_sleeping(self, *, timeout_s: float) -> bool:
        """Also true of an engine that is only paused (vLLM 0.32)."""
        return bool((await self._look("is_sleeping", "/is_sleeping", timeout_s=timeout_s)).get("is_sleeping"))

    # -- caches --------------------------------------------------------------------------------------------------------

    async def reset_prefix_cache(self, *, running: bool = False, timeout_s: float) -> bool:
        """Empties it; with `running` the requests in flight are computed anew from their tokens. Whether it did."""
        asked = [("reset_running_requests", str(running).lower())]
        answer = await self._command("reset_prefix_cache", "/reset_prefix_cache", asked, timeout_s=timeout_s)
        return answer.get("success") is not False

    async def reset_mm_cache(self, *, timeout_s: float) -> None:
        await self._command("reset_mm_cache", "/reset_mm_cache", timeout_s=timeout_s)

    # -- weights -------------------------------------------------------------------------------------------------------

    async def reload_weights(self, path: str | None = None, *, timeout_s: float) -> None:
        """Loads the weights of another checkpoint folder in place; None: those it was started with."""
        kwargs = {} if path is None else {"weights_path": path}
        await self._ask_workers("managed_vllm_reload", kwargs, timeout_s=timeout_s)

    async def canary(self, *, timeout_s: float) -> list[dict[str, Any]]:
        """What each Worker says of its weights (`managed_vllm.in_server.managed_vllm_canary`)."""
        found = await self._ask_workers("managed_vllm_canary", {}, timeout_s=timeout_s)
        return [one for one in found if isinstance(one, dict)]

    async def keep_weights(self, *, timeout_s: float) -> None:
        """Has the Workers copy their weights into the host's memory, for `put_kept_weights_back`."""
        await self._ask_workers("managed_vllm_keep", {}, timeout_s=timeout_s)

    async def put_kept_weights_back(self, *, timeout_s: float) -> None:
        """Makes the weights what they were at `keep_weights`, also after half a load."""
        await self._ask_workers("managed_vllm_put_back", {}, timeout_s=timeout_s)

    async def drop_kept_weights(self, *, timeout_s: float) -> None:
        await self._ask_workers("managed_vllm_drop", {}, timeout_s=timeout_s)

    async def _ask_workers(self, method: str, kwargs: Mapping[str, Any], *, timeout_s: float) -> Sequence[Any]:
        body = {"method": method, "kwargs": kwargs}
        try:
            answer = await self._command("update_weights", "/collective_rpc", body=body, timeout_s=timeout_s)
        except EngineControlError as error:
            if error.status == 500 and f"no attribute '{method}'" in error.message:
                raise EngineUnsupportedError(_NO_CANARY, call="update_weights", status=500) from error
            raise
        results: Sequence[Any] = answer.get("results") or ()
        return results

    async def weight_checksums(self, *, timeout_s: float) -> dict[str, str]:
        """A checksum of each of the server's weights, by name."""
        body = {"action": "checksum"}
        found = (await self._command("weights", "/weight_checker", body=body, timeout_s=timeout_s)).get("checksums")
        if not isinstance(found, Mapping):
            raise EngineControlError("/weight_checker gave no checksums", call="weights")
        return {str(name): str(value) for name, value in found.items()}

    async def weight_version(self, *, timeout_s: float) -> str:
        """What the server calls its weights."""
        return str((await self._look("weights", "/weight_info", timeout_s=timeout_s)).get("weight_version") or "")

    async def set_weight_version(self, version: str, *, timeout_s: float) -> None:
        body = {"new_version": version}
        await self._command("update_weights", "/update_weight_version", body=body, timeout_s=timeout_s)

    # -- weights of a trainer ------------------------------------------------------------------------------------------

    async def init_weight_transfer(self, init_info: Mapping[str, Any], *, timeout_s: float) -> None:
        """Connects the Workers with a trainer, as `init_info` of vLLM's transfer engine says."""
        await self._transfer("init", {"init_info": init_info}, timeout_s=timeout_s)

    async def start_weight_transfer(self, *, timeout_s: float) -> None:
        """From here on the weights are half old and half new, until `finish_weight_transfer`."""
        await self._transfer("start", None, timeout_s=timeout_s)

    async def receive_weights(self, update_info: Any, *, timeout_s: float) -> None:
        """Has the Workers load some weights, which come as `update_info` of vLLM's transfer engine says."""
        await self._transfer("update", {"update_info": update_info}, timeout_s=timeout_s)

    async def finish_weight_transfer(self, *, timeout_s: float) -> None:
        """Has the Workers use what they have received, all of it: vLLM's own route leaves parts of the old (0.32)."""
        await self._transfer("finish", None, timeout_s=timeout_s)
        await self._ask_workers("managed_vllm_renew", {}, timeout_s=timeout_s)

    async def shut_weight_transfer_down(self, *, timeout_s: float) -> None:
        """Ends the connection with a trainer."""
        await self._transfer("shutdown", None, timeout_s=timeout_s)

    async def _transfer(self, step: str, body: Mapping[str, Any] | None, *, timeout_s: float) -> None:
        try:
            await self._command(
                "weight_sync_client", _TRANSFER_ROUTES[step], body=body, timeout_s=timeout_s, needs=_TRANSFER
            )
        except EngineControlError as error:
            if error.status == 500 and "not configured" in error.message:
                raise EngineUnsupportedError(_NO_TRANSFER, call="weight_sync_client", status=500) from error
            raise

    # -- adapters ------------------------------------------------------------------------------------------------------

    async def load_lora(self, name: str, path: str, *, replace: bool = False, timeout_s: float) -> None:
        """Loads an adapter; with `replace` in place of the one of that name, whose cache entries stay valid for it."""
        body = {"lora_name": name, "lora_path": path, "load_inplace": replace}
        await self._command("load_lora", "/v1/load_lora_adapter", body=body, timeout_s=timeout_s, needs=_LORA)

    async def unload_lora(self, name: str, *, timeout_s: float) -> None:
        body = {"lora_name": name}
        await self._command("unload_lora", "/v1/unload_lora_adapter", body=body, timeout_s=timeout_s, needs=_LORA)

    async def loras(self, *, timeout_s: float) -> dict[str, str]:
        """The adapters that are served, those of the server's command line included: name to folder."""
        found = await self._look("loras", "/v1/models", timeout_s=timeout_s)
        return {str(one["id"]): str(one.get("root")) for one in found.get("data", ()) if one.get("parent")}

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    async def _look(self, call: str, path: str, *, timeout_s: float) -> dict[str, Any]:
        return await self._ask(call, "GET", path, timeout_s=timeout_s)

    async def _command(
        self,
        call: str,
        path: str,
        query: Query = (),
        *,
        body: Mapping[str, Any] | None = None,
        timeout_s: float,
        needs: str = _DEV_MODE,
    ) -> dict[str, Any]:
        return await self._ask(call, "POST", path, query, body, timeout_s=timeout_s, needs=needs)

    async def _ask(
        self,
        call: str,
        method: str,
        path: str,
        query: Query = (),
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        needs: str = _DEV_MODE,
    ) -> dict[str, Any]:
        """The answer's object. `needs` says what the server would have to be started with to have the route."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._send(call, method, path, query, body, needs=needs)
        except EngineControlError:
            raise
        except TimeoutError:
            raise EngineTimeoutError(f"{path}: no answer within {timeout_s:.3g} s", call=call) from None

    async def _send(
        self,
        call: str,
        method: str,
        path: str,
        query: Query = (),
        body: Mapping[str, Any] | None = None,
        *,
        needs: str = _DEV_MODE,
    ) -> dict[str, Any]:
        """One request, without a bound of its own."""
        try:
            response = await self._client.request(
                method, self._root + path, params=list(query), json=body, headers=self._headers, timeout=None
            )
        except httpx.HTTPError as error:
            raise EngineLostError(f"{path}: {type(error).__name__} {error}".rstrip(), call=call) from error
        if response.is_success:
            return _object_in(response.text)
        status, said = response.status_code, _message_in(response.text)
        if status in (405, 501) or (status == 404 and said.lower() in _NO_ROUTE):
            raise _unsupported(call, path, needs, status)
        raise EngineControlError(f"{path}: HTTP {status}: {said[:500]}", call=call, status=status)


def _unsupported(call: str, path: str, needs: str, status: int) -> EngineUnsupportedError:
    return EngineUnsupportedError(
        f"{call}: the server has no route {path}; it would take {needs}", call=call, status=status
    )


def _object_in(text: str) -> dict[str, Any]:
    """An answer's JSON object; empty for an answer of another kind: some of these routes answer with nothing."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message_in(text: str) -> str:
    """The message in an error's body, of whichever of vLLM's shapes."""
    found = _object_in(text)
    error = found.get("error", found.get("detail", found or text))
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return str(error).strip()
