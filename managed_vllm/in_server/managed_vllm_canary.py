"""What the Workers say of their weights, while nobody is served: `--worker-extension-cls managed_vllm_canary.Canary`.

`/health` and a reload that answers 200 prove nothing (vLLM 0.32): NaN weights are taken without a word, and a model
whose reload failed half-way answers until it is used. A generated token would prove more, but a paused engine generates
none, and one that goes on serves everybody. So the Worker looks itself: are all weights there and finite, and are the
logits of one real forward pass?

Called by `/collective_rpc`, between two steps of the engine.
"""

import contextlib
import inspect
import itertools
from typing import Any

import managed_vllm_transfer  # type: ignore[import-not-found]

_MOST_NAMES = 1000

managed_vllm_transfer.offer()  # vLLM imports this module in each Worker, ahead of the model


class Canary:
    """Made a base class of vLLM's Worker, whose attributes it uses."""

    def managed_vllm_reload(self, weights_path: str | None = None) -> None:
        """vLLM's own `reload_weights`, and what it forgets on a CPU.

        An output layer that is tied to the embeddings keeps the packed copy of the weights of the start (0.32:
        `layers/utils.py`, `dispatch_cpu_unquantized_gemm`): without a word the model is half of one checkpoint and half
        of another.
        """
        self._managed_vllm_discard()
        self.reload_weights(weights_path=weights_path)  # type: ignore[attr-defined]
        self._managed_vllm_renew_tied()

    def managed_vllm_renew(self) -> None:
        """After a transfer: what a reload renews, and a transfer forgets (0.32: `finish_weight_update`)."""
        self._managed_vllm_renew_tied()
        for name in ("reset_encoder_cache", "reset_mm_cache"):
            if (reset := getattr(self.model_runner, name, None)) is not None:  # type: ignore[attr-defined]
                reset()

    def managed_vllm_keep(self) -> None:
        """Copies all weights into the host's memory, for `managed_vllm_put_back`."""
        import torch

        model = self.get_model()  # type: ignore[attr-defined]
        tensors = itertools.chain(model.named_parameters(), model.named_buffers())
        with torch.inference_mode():
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors}
        # On a CPU a layer's weights may be nowhere but in here, packed; a load makes new ones.
        packed = [(one, one.cpu_linear) for one in model.modules() if "cpu_linear" in vars(one)]
        self._managed_vllm_kept = copies, packed

    def managed_vllm_put_back(self) -> None:
        """Makes the weights what they were at `managed_vllm_keep`. What was half loaded is dropped."""
        import torch

        copies, packed = self._managed_vllm_kept
        self._managed_vllm_discard()
        model = self.get_model()  # type: ignore[attr-defined]
        with torch.inference_mode():
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                tensor.copy_(copies[name])
        for module, linear in packed:
            module.cpu_linear = linear
        self.managed_vllm_renew()
        self.model_runner.reset_lora_state()  # type: ignore[attr-defined]

    def managed_vllm_drop(self) -> None:
        """Gives the memory of the copy back."""
        self._managed_vllm_kept = {}, []

    def _managed_vllm_discard(self) -> None:
        """Ends a load that has begun, whatever has come of it: the layers have the weights from before again.

        Without it a reload takes up where the last one has failed (0.32), and fails as well.
        """
        self._weight_update_active = False
        if (engine := getattr(self, "weight_transfer_engine", None)) is not None:
            engine.reset_weight_update_target()
        with contextlib.suppress(ImportError, AttributeError):  # a vLLM that loads in another way
            from vllm.model_executor.model_loader.reload import layerwise

            model, begun = self.get_model(), False  # type: ignore[attr-defined]
            for layer in model.modules():
                info = layerwise.get_layerwise_info(layer)
                if info.can_load():
                    begun, info.load_numel, info.loaded_weights = True, 0, []
            if begun:
                from vllm.config import set_current_vllm_config

                with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
                    layerwise.finalize_layerwise_reload(model, self.model_config)  # type: ignore[attr-defined]

    def _managed_vllm_renew_tied(self) -> None:
        import torch

        with torch.inference_mode():
            for module in self.get_model().modules():  # type: ignore[attr-defined]
                if "cpu_linear" in vars(module) and hasattr(module, "num_embeddings"):
                    module.quant_method.process_weights_after_loading(module)

    def managed_vllm_canary(self) -> dict[str, Any]:
        """`broken`: names of weights that are not finite or not there; `logits`: "finite", "broken", "none here".

        Logits are not looked at ("not looked at") where weights are broken, or vLLM's dummy run is not as we know it.
        """
        import torch

        model = self.get_model()  # type: ignore[attr-defined]
        with torch.inference_mode():
            broken = [name for name, weight in model.named_parameters() if not _is_finite(torch, weight)]
            logits = "not looked at" if broken else self._managed_vllm_logits(torch, model)
        return {"broken": broken[:_MOST_NAMES], "logits": logits}

    def _managed_vllm_logits(self, torch: Any, model: Any) -> str:
        """Those of one token, with attention: without it a dummy run computes nothing that means anything."""
        run: Any = getattr(self.model_runner, "_dummy_run", None)  # type: ignore[attr-defined]
        known = set() if run is None else set(inspect.signature(run).parameters)
        if "uniform_decode" not in known or not known & {"force_attention", "skip_attn"}:
            return "not looked at"
        # vLLM has two model runners (0.32): in `v1/worker/gpu` attention is there unless it is skipped.
        found = run(1, uniform_decode=True, **({"force_attention": True} if "force_attention" in known else {}))
        hidden = found[-1] if isinstance(found, tuple) else found
        if not isinstance(hidden, torch.Tensor) or not hasattr(model, "compute_logits"):
            return "none here"  # not the last stage of a pipeline, or a model that generates nothing
        logits = model.compute_logits(hidden[:1])
        if logits is None:
            return "none here"
        # A model may rule tokens out by -inf.
        return "broken" if bool(torch.isnan(logits).any()) or not bool(torch.isfinite(logits).any()) else "finite"


def _is_finite(torch: Any, weight: Any) -> bool:
    if weight.is_meta:
        return False
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    if weight.element_size() == 1:  # 8-bit floats have no arithmetic
        weight = weight.to(torch.bfloat16)
    return bool(torch.isfinite(weight.sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
