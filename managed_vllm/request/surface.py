"""What of `vllm.LLM`'s public surface a server can't give, with the reason and what to use instead.

`RequestMethods` has the rest. docs/client.md lists both; tests/project/test_docs.py compares the list with the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from managed_vllm.errors import UnsupportedMethodError

_ENGINE = "the engine is in the server's process"
_WEIGHTS = (
    "the weights are the server's, and shared by all its users: llm.engine.update_weights() takes those of another "
    "checkpoint, llm.engine.weights() tells which they are; a trainer sends its own with "
    "llm.engine.weight_sync_client() (for_training=True)"
)
_QUEUE = "requests are on their way at once: generate() or chat() with all of them, or tasks with async_client"

NOT_HERE: Mapping[str, str] = {
    "apply_model": f"{_ENGINE}: no function can be sent there; start the server with a worker_extension_cls=",
    "collective_rpc": f"{_ENGINE}, and a method of its workers acts on all users; with VLLM_SERVER_DEV_MODE=1 "
    "the server has a route for it, /collective_rpc",
    "enqueue": _QUEUE,
    "enqueue_chat": _QUEUE,
    "wait_for_completion": _QUEUE,
    "get_metrics": "metrics() has them as one typed snapshot, of all users; GET /metrics of the server, with its key, "
    "has the text for Prometheus",
    "release_kv_cache_memory": "sleep() gives the memory of the weights back as well, and keeps what is in flight",
    "finish_weight_update": _WEIGHTS,
    "init_weight_transfer_engine": _WEIGHTS,
    "shutdown_weight_transfer_engine": _WEIGHTS,
    "start_draft_weight_update": _WEIGHTS,
    "start_weight_update": _WEIGHTS,
    "update_weight_version": _WEIGHTS,
    "update_weights": _WEIGHTS,
    "set_tokenizer": "the server has its own: tokenizer= when it is started",
    # Attributes of its instances.
    "chat_template": "it is an argument of chat(), and of the server: ManagedVLLM(chat_template=…)",
    "chat_template_config": "it is an argument of chat(), and of the server: ManagedVLLM(chat_template=…)",
    "default_sampling_params": "get_default_sampling_params() has them",
    "engine_class": _ENGINE,
    "input_processor": f"{_ENGINE}; tokenize() makes token ids",
    "llm_engine": f"{_ENGINE}; status() and logs() say how it is, openai.models.list() has max_model_len",
    "model_config": f"{_ENGINE}; openai.models.list() has max_model_len and the model's folder (root)",
    "pooling_io_processors": _ENGINE,
    "pooling_task": f"{_ENGINE}; embed(), classify(), score() and encode() say whether the server does that",
    "renderer": f"{_ENGINE}; tokenize() renders a conversation into token ids",
    "request_counter": _ENGINE,
    "runner_type": f"{_ENGINE}; it is runner= of the server",
    "supported_tasks": f"{_ENGINE}; embed(), classify(), score() and encode() say whether the server does that",
}
"""Names of `vllm.LLM` (0.32 and before) that raise `UnsupportedMethodError`."""

OF_HANDLES: Mapping[str, str] = dict.fromkeys(
    ("sleep", "wake_up"),
    "it goes through the supervisor of a server of ours: ManagedVLLM has it, and llm.engine all that belongs to it",
)
"""Names of `vllm.LLM` that `ManagedVLLM` has, and clients don't."""


class WithoutTheRest:
    """Says for what is not here why not, in place of a bare `AttributeError`."""

    if not TYPE_CHECKING:  # else a type checker would take any name

        def __getattr__(self, name: str) -> Any:
            if why := NOT_HERE.get(name) or OF_HANDLES.get(name):
                raise UnsupportedMethodError(f"{name} of vllm.LLM is not here: {why}", method=name)
            return object.__getattribute__(self, name)  # raises what it raised before, that of a property as well
