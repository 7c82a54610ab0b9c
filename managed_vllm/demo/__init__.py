"""The embedded default model: a small Qwen3 that clicks, types and scrolls, and how to serve it.

It answers a `Screen` (text) with a UI-TARS style action, is carried as package data (1 MB) and was trained on a CPU by
`python -m managed_vllm.demo.train`, in minutes. So everything that this library does can be tried, tested and taught
without a download and without a GPU, with a model that really acts. Importing this package loads no torch, no
transformers and no vLLM; and its own generator of screens only when a name of that is used, because every process that
attaches to a server imports this one.

`managed_vllm.agent.environments.desktop` is the world in which it acts over several steps.
`managed_vllm.demo.random_vlm` makes a random vision-language model in seconds, for everything with pictures.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from managed_vllm.demo.screen import (
        BUTTONS,
        COORDINATES,
        FIELDS,
        KINDS,
        LABELS,
        LEARNT,
        WORDS,
        Button,
        Element,
        Goal,
        Kind,
        Screen,
        TextField,
        World,
        random_buttons,
        random_screen,
        random_state,
        random_world,
        read_screen,
    )

__all__ = [
    "BUTTONS",
    "COORDINATES",
    "FIELDS",
    "KINDS",
    "LABELS",
    "LEARNT",
    "NAME",
    "WORDS",
    "Button",
    "Element",
    "Goal",
    "Kind",
    "Screen",
    "TextField",
    "World",
    "engine_defaults",
    "environment_defaults",
    "random_buttons",
    "random_screen",
    "random_state",
    "random_world",
    "read_screen",
    "weights_path",
]

NAME = "demo"
"""The name by which the model is asked for, `ManagedVLLM("demo")`, and under which it is served."""


def weights_path() -> Path:
    """The folder with the model's weights, config, tokenizer and chat template."""
    return Path(__file__).parent / "weights"


def engine_defaults() -> dict[str, object]:
    """vLLM engine arguments with which the demo model is best served; what the user sets goes before them."""
    return {
        # Compiling and capturing graphs takes longer than everything a demo ever generates.
        "enforce_eager": True,
        "max_model_len": 4096,
        # By default vLLM takes 92 % of the GPU, which somebody's real model may need. With the size of the cache given,
        # this fraction is only what must be free at the start (vLLM 0.32: v1/worker/gpu_worker.py).
        "gpu_memory_utilization": 0.1,
        # 1 KiB a token: 64 sequences of full length. On a CPU too, where vLLM would take 92 % of the memory otherwise.
        "kv_cache_memory_bytes": 256 * 2**20,
    }


def environment_defaults() -> dict[str, str]:
    """Environment variables of the server, to be set only where the user has not.

    VLLM_CPU_KVCACHE_SPACE is not among them: it silently overrules `kv_cache_memory_bytes`, the user's included
    (vLLM 0.32: platforms/cpu.py, "Legacy setting").
    """
    # Everything is in the weights' folder, so that nothing may wait for a network.
    return {"HF_HUB_OFFLINE": "1"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("managed_vllm.demo.screen"), name)
    globals()[name] = value
    return value
