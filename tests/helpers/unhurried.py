"""A client that gives up nothing: for tests that count requests, attempts or connections; a machine may stall."""

from __future__ import annotations

import pytest
from processes import HANG_S

from managed_vllm.request import connections, exchange, groups, health, server_routes


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own limits are those of what hangs. Else a stall costs it a connection, a scout, or a server.

    It also waits for the end of each stream: one that is to have none needs a shorter `exchange.STREAM_END_S`.
    """
    for module, name in (
        (connections, "CONNECT_TIMEOUT_S"),
        (connections, "MAX_IDLE_S"),
        (exchange, "STREAM_END_S"),
        (groups, "SCOUT_S"),
        (health, "HEALTH_S"),
        (server_routes, "LOOK_S"),
        (server_routes, "READ_S"),
    ):
        monkeypatch.setattr(module, name, HANG_S)
