"""What the Workers say of their weights, while nobody is served: `--worker-extension-cls managed_vllm_canary.Canary`.

`/health` and a reload that answers 200 prove nothing (vLLM 0.32): NaN weights are taken without a word, and a model
whose reload failed half-way answers until it is used. A generated token would prove more, but a paused engine generates
none, and one that goes on serves everybody. So the Worker looks itself: are all weights there and finite, and are the
logits of one real forward pass?

Called by `/collective_rpc`, between two steps of the engine.
"""

import inspect
from typing import Any

_MOST_NAMES = 1000


class Canary:
    """Made a base class of vLLM's Worker, whose attributes it uses."""

    def managed_vllm_reload(self, weights_path: str | None = None) -> None:
        """vLLM's own `reload_weights`, and what it forgets on a CPU.

        An output layer that is tied to the embeddings keeps the packed copy of the weights of the start (0.32:
        `layers/utils.py`, `dispatch_cpu_unquantized_gemm`): without a word the model is half of one checkpoint and half
        of another.
        """
        import torch

        self.reload_weights(weights_path=weights_path)  # type: ignore[attr-defined]
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
