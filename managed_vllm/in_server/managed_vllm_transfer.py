"""Tells vLLM of `managed_vllm_memory`, the transfer engine for weights that come by shared memory, by its name."""

import contextlib

MEMORY_ENGINE = "managed_vllm_memory"
"""The `backend` of `--weight-transfer-config`."""


def offer() -> None:
    """Called in a Worker, before it makes the engine that the server was started with."""
    with contextlib.suppress(ImportError, AttributeError, ValueError):  # a vLLM without, or it has one of that name
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        WeightTransferEngineFactory.register_engine(MEMORY_ENGINE, "managed_vllm_memory", "MemoryEngine")
