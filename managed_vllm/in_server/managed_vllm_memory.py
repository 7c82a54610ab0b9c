"""A way for weights into the Workers by shared memory: the transfer engine `managed_vllm_memory` of vLLM's factory.

vLLM's own ways (0.32: NCCL, CUDA's IPC, …) are for GPUs. This one needs none, and no connection: for each part of the
weights, the trainer (`managed_vllm.instance.weight_sync`) makes a file in memory in the safetensors format, and names
it, `/proc/PID/fd/N`. The file is gone with the trainer, however that ends.

Imported by vLLM's factory, in a Worker, when the server is started with `--weight-transfer-config` for it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing need be agreed on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """`path`: the file. `names`, `dtype_names` and `shapes` are those of its tensors, as other engines have them."""

    path: str
    names: list[str]
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class MemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Loads checkpoint tensors as vLLM's engines do (0.32: `ipc_engine.py`): layer by layer, in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to be done."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, which waits for an accelerator and fails where there is none (0.32)."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        import safetensors

        with safetensors.safe_open(update_info.path, framework="pt") as file, _without_mtp_check():
            self.model.load_weights([(name, file.get_tensor(name)) for name in update_info.names])

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


def _without_mtp_check() -> Any:
    """A part of the weights is no complete set of them, and need not be."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        return contextlib.nullcontext()
    return disable_mtp_completeness_check()
