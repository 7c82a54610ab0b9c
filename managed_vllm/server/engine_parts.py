"""What an engine's control has beside `Engine` itself: adapters, weights with one way back, sleep when idle."""

from __future__ import annotations

import math

from managed_vllm.config import SupervisorOrder
from managed_vllm.server.adapters import Adapters
from managed_vllm.server.engine import Engine
from managed_vllm.server.good_weights import GoodWeights
from managed_vllm.server.idle_sleep import IdleSleep
from managed_vllm.server.weight_transfers import WeightTransfers
from managed_vllm.server.weights import WeightUpdates


def add_to(engine: Engine, order: SupervisorOrder) -> None:
    """Adds them to `engine`. `order` says what is served first, where the hub's cache is, and when it is idle."""
    Adapters(engine)
    good = GoodWeights(engine, order)
    WeightUpdates(engine, good)
    WeightTransfers(engine, good)
    if order.policy.idle_sleep_s != math.inf:
        IdleSleep(engine, order.policy.idle_sleep_s)
