"""The users' calls that change a server's weights: from a checkpoint, and from a trainer, with one way back."""

from __future__ import annotations

from managed_vllm.config import SupervisorOrder
from managed_vllm.server.engine import Engine
from managed_vllm.server.good_weights import GoodWeights
from managed_vllm.server.weight_transfers import WeightTransfers
from managed_vllm.server.weights import WeightUpdates


def add_to(engine: Engine, order: SupervisorOrder) -> None:
    """Adds them to those of `engine`. `order` says what is served first, and where the hub's cache is."""
    good = GoodWeights(engine, order)
    WeightUpdates(engine, good)
    WeightTransfers(engine, good)
