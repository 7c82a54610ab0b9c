"""What the servers of a client tell of their routes: the fields of one, and whether `/inference/v1/generate` is on.

Of several servers each is asked, and what counts is what all of them have that answer: which of them a request goes to
is decided only when it is sent. One that comes later, or again, without a route says so then (`no_tokens_here`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from managed_vllm.errors import ManagedVLLMError, ModelNotFoundError, RequestError, RequestTimeoutError
from managed_vllm.request.fields import fields_in
from managed_vllm.request.pending import JSONRequest, PendingRequest, RequestStats
from managed_vllm.request.responses import MALFORMED
from managed_vllm.request.token_route import PATH
from managed_vllm.status import Connection

_IS_OFF = frozenset({403, 404, 405})
LOOK_S = 2.0
"""Seconds in which one of several servers answers, or is asked no more: it may be down."""
READ_S = 10.0
"""As `LOOK_S`, for /openapi.json: vLLM takes a second of its CPU for the first one (0.32)."""


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
                asked = [_has_tokens(sender, one, _bounded(deadline, one, LOOK_S)) for one in servers]
                known = {one for one in await asyncio.gather(*asked) if one is not None}
                self.has_tokens = all(known) if known else None
        return bool(self.has_tokens)

    async def token_fields(self, sender: Sender, deadline: float | None) -> frozenset[str]:
        """The fields that `/inference/v1/generate` takes at all servers, sampling parameters included.

        None where one lacks the route, or does not tell. Raises a `RequestError` where none answers.
        """
        if not self._token_fields:
            servers = await sender.servers(deadline)
            asked = [self._told(sender, one, _bounded(deadline, one, READ_S)) for one in servers]
            told = await asyncio.gather(*asked, return_exceptions=len(asked) > 1)
            found = [_token_fields(one) for one in told if not isinstance(one, BaseException)]
            for error in told if not found else ():
                if isinstance(error, BaseException):
                    raise error
            self._token_fields = frozenset.intersection(*found)
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


def _bounded(deadline: float | None, server: Connection | None, seconds: float) -> float | None:
    """The deadline, or the end of so many seconds, where the server is one of several."""
    if server is None:
        return deadline
    end = time.monotonic() + seconds
    return end if deadline is None else min(deadline, end)


async def _openapi(sender: Sender, server: Connection | None, deadline: float | None) -> Mapping[str, Any]:
    request = JSONRequest("/openapi.json", None, "paths", "components")
    try:
        await sender.send(request, deadline, only=server)
    except RequestError as error:
        if isinstance(error, RequestTimeoutError) or (server is not None and error.status is None):
            raise
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
