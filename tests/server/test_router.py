"""The front of a server's replicas: our guard on the public port, the vLLM project's router behind it."""

from __future__ import annotations

import json

from managed_vllm.status import RouterStatus, ServerState, ServerStatus


def test_its_status_crosses_the_channel() -> None:
    front = RouterStatus(pid=7, base_url="http://127.0.0.1:8000/v1", ready=True, restarts=1)
    status = ServerStatus(ServerState.READY, router=front)
    assert ServerStatus.from_dict(json.loads(json.dumps(status.to_dict()))) == status
    newer = {**front.to_dict(), "since": 1}
    assert RouterStatus.from_dict(newer) == front
    assert ServerStatus.from_dict({"state": "ready"}).router is None
