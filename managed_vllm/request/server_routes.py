"""What the servers of a client tell of their routes: the fields of one, and whether `/inference/v1/generate` is on.

Of several servers each is asked, and what counts is what all of them have: which of them a request goes to is decided
only when it is sent. A server that comes later, or again, without a route says so then (`no_tokens_here`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from managed_vllm.errors import ManagedVLLMError, ModelNotFoundError, RequestError, RequestTimeoutError
from managed_vllm.request.fields import fields_in
from managed_vllm.request.pending import JSONRequest, PendingRequest, RequestStats
from managed_vllm.request.responses import MALFORMED
from managed_vllm.request.token_route import PATH
from managed_vllm.status import Connection

_IS_OFF = frozenset({403, 404, 405})


class Sender(Protocol):
    """Sends requests to the servers of one client: `attempts.Sender`."""

    async def send(
        self, request: PendingRequest, deadline: float | None, *, only: Connection | None = None
    ) -> RequestStats:
        """Sends a request until it is complete, to a server of several."""

    async def servers(self, deadline: float | None) -> Sequence[Connection | None]:
        """All servers, for `only`."""


class ServerRoutes:
    """What is known of the servers of one sender, which is an argument: an attribute would make a cycle of the two.

    Attributes:
        has_tokens: whether they all have `/inference/v1/generate`; None: nobody has asked.
    """

    def __init__(self) -> None:
        self._openapi: dict[str | None, Mapping[str, Any]] = {}
        self._token_fields: frozenset[str] = frozenset()
        self.has_tokens: bool | None = None

    async def fields(self, sender: Sender, *, chat: bool, deadline: float | None) -> frozenset[str]:
        """The request fields of a route, as a server says in /openapi.json; none where it does not say. Kept."""
        with contextlib.suppress(*MALFORMED):
            return fields_in(await self._told(sender, None, deadline), chat=chat)
        return frozenset()

    async def look_for_tokens(self, sender: Sender, deadline: float | None) -> bool:
        """Whether all servers have `/inference/v1/generate`; asked until it is known, without generating.

        What keeps a server from saying so is told by the requests for whose sake this is asked.
        """
        if self.has_tokens is None:
            with contextlib.suppress(ManagedVLLMError):
                servers = await sender.servers(deadline)
                found = [await _has_tokens(sender, server, deadline) for server in servers]
                self.has_tokens = None if None in found else all(found)
        return bool(self.has_tokens)

    async def token_fields(self, sender: Sender, deadline: float | None) -> frozenset[str]:
        """The fields that `/inference/v1/generate` takes at all servers, sampling parameters included.

        None where one lacks the route, or does not tell.
        """
        if not self._token_fields:
            servers = await sender.servers(deadline)
            found = [_token_fields(await self._told(sender, one, deadline)) for one in servers]
            self._token_fields = frozenset.intersection(*found) if found else frozenset()
        return self._token_fields

    async def _told(self, sender: Sender, server: Connection | None, deadline: float | None) -> Mapping[str, Any]:
        name = None if server is None else server.base_url
        if not self._openapi.get(name):
            self._openapi[name] = await _openapi(sender, server, deadline)
        return self._openapi[name]

    def no_tokens_here(self) -> None:
        """A server has refused the route."""
        self.has_tokens, self._token_fields = False, frozenset()
        self._openapi.clear()


def is_off(error: RequestError) -> bool:
    """Whether an error of the route means that the server does not have it."""
    return error.status in _IS_OFF and not isinstance(error, ModelNotFoundError)


async def _openapi(sender: Sender, server: Connection | None, deadline: float | None) -> Mapping[str, Any]:
    request = JSONRequest("/openapi.json", None, "paths", "components")
    try:
        await sender.send(request, deadline, only=server)
    except RequestTimeoutError:
        raise
    except RequestError:
        return {}
    return request.answer()


async def _has_tokens(sender: Sender, server: Connection | None, deadline: float | None) -> bool | None:
    """An empty request is refused as such (400, 422) by a server that has the route, else for its sake."""
    try:
        await sender.send(JSONRequest(PATH, {}, "choices"), deadline, only=server)
    except RequestError as error:
        if error.status in (400, 422):
            return True
        return False if is_off(error) else None
    return None


def _token_fields(openapi: Mapping[str, Any]) -> frozenset[str]:
    with contextlib.suppress(*MALFORMED):
        schema = _resolved(
            openapi, openapi["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
        )
        params = _resolved(openapi, schema["properties"]["sampling_params"])
        return frozenset({*schema["properties"], *params["properties"]})
    return frozenset()


def _resolved(openapi: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found
