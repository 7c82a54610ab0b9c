"""Where clients that are not ours reach a server with replicas: its router, or why there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from managed_vllm.errors import ConfigError
from managed_vllm.instance.public_address import public_connection
from managed_vllm.masking import Secret
from managed_vllm.status import Connection, RouterStatus, ServerState, ServerStatus

HERE = Connection(base_url="http://127.0.0.1:1/v1", api_key=Secret("key"), model="m")
ONE = ServerStatus(state=ServerState.READY, connection=HERE)
TWO = replace(ONE, replicas=(ONE, ONE))
ROUTED = "http://127.0.0.1:9/v1"
UP = RouterStatus(pid=7, base_url=ROUTED, ready=True)


class Told:
    """An attachment to a server of which the supervisor says one thing after the other."""

    def __init__(self, *statuses: ServerStatus) -> None:
        self._statuses = list(statuses)
        self.replicas = len(statuses[0].replicas) or 1

    def connection(self) -> tuple[Connection, int]:
        return HERE, 1

    def last_status(self) -> ServerStatus:
        return self._statuses[0]

    def wait_for_news(self, known: ServerStatus | None, timeout_s: float) -> None:
        assert known is self._statuses.pop(0)


def public(*statuses: ServerStatus) -> Connection:
    attachment: Any = Told(*statuses)
    return public_connection(attachment)


def test_a_single_server_is_reached_itself() -> None:
    assert public(ONE) == HERE


def test_replicas_are_reached_by_their_router_with_the_same_key() -> None:
    assert public(replace(TWO, router=UP)) == replace(HERE, base_url=ROUTED)


@pytest.mark.parametrize(
    "before", [RouterStatus(), RouterStatus(pid=6), replace(UP, ready=False, reason="it was killed")]
)
def test_a_router_that_comes_up_or_comes_back_is_waited_for(before: RouterStatus) -> None:
    assert public(replace(TWO, router=before), replace(TWO, router=UP)).base_url == UP.base_url


@pytest.mark.parametrize("router", [None, RouterStatus(reason="this kernel signs no segments")])
def test_where_there_will_be_none_the_error_says_why_and_what_to_install(router: RouterStatus | None) -> None:
    with pytest.raises(ConfigError, match=r"managed-vllm\[router\]") as raised:
        public(replace(TWO, router=router))
    assert "2 replicas" in str(raised.value)
    assert router is None or router.reason in str(raised.value)
