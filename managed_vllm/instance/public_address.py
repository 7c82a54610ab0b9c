"""Where clients that are not ours reach a server: the server itself, or the router in front of its replicas."""

from __future__ import annotations

import time
from dataclasses import replace

from managed_vllm.errors import ConfigError
from managed_vllm.instance.attach import Attachment
from managed_vllm.status import Connection, RouterStatus

_ROUTER_S = 30.0
"""Seconds for a router to come up, or to be back after its death."""


def public_connection(attachment: Attachment) -> Connection:
    """The connection to give to other clients. Waits until the server is ready, and the router if there is to be one.

    Raises `ConfigError` for replicas without a router, and what the server ended with.
    """
    until = time.monotonic() + _ROUTER_S
    while True:
        connection, _ = attachment.connection()
        status = attachment.last_status()
        if attachment.replicas == 1 or (status is not None and not status.replicas):
            return connection
        router = None if status is None else status.router
        if router is not None and router.ready and router.base_url:
            return replace(connection, base_url=router.base_url)
        if status is not None and (_never_comes(router) or time.monotonic() > until):
            raise _no_router(attachment.replicas, router)
        attachment.wait_for_news(status, 1.0)


def _never_comes(router: RouterStatus | None) -> bool:
    return router is None or bool(router.reason and router.pid is None and router.base_url is None)


def _no_router(replicas: int | None, router: RouterStatus | None) -> ConfigError:
    why = router.reason if router is not None and router.reason else "there is none"
    return ConfigError(
        f"{replicas} replicas have one address only with a router in front of them: {why}. It comes with the extra "
        "managed-vllm[router]. The methods of this handle and llm.openai need none: they choose the replica themselves",
        field="replicas",
    )
