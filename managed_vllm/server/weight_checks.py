"""What a server's Workers say of the weights that they have, while nobody is served: faults, and a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from managed_vllm.server.engine_routes import EngineRoutes


async def faults_of(routes: EngineRoutes, timeout_s: float) -> frozenset[str]:
    """What the Workers find wrong with their weights."""
    found = await routes.canary(timeout_s=timeout_s)
    broken = {f"{name} is not finite, or not there" for one in found for name in one.get("broken", ())}
    if any(one.get("logits") == "broken" for one in found):
        broken.add("the model computes NaN or infinity")
    return frozenset(broken)


async def checksum_by(routes: EngineRoutes, timeout_s: float) -> str:
    """One checksum over all weights of a server."""
    return checksum_of(await routes.weight_checksums(timeout_s=timeout_s))


def checksum_of(checksums: Mapping[str, str]) -> str:
    """One checksum over those of all weights."""
    return hashlib.sha256(json.dumps(dict(checksums), sort_keys=True).encode()).hexdigest()[:16]
