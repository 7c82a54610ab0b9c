"""How many tokens of each prompt were cached, where several are completed in one request.

vLLM (0.32, 0.33) tells those of the last prompt only (`usage.prompt_tokens_details`, with
`--enable-prompt-tokens-details`). `install` has each choice of `/v1/completions` say it: `"cached_tokens": 12`, in
single requests too, so that clients see that it would be there for several. Nothing else changes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

_MODULE = "vllm.entrypoints.openai.completion.serving"
_METHOD = "request_output_to_completion_response"
_INSTALLED = "_managed_vllm_tells_cached_tokens"


def install() -> str | None:
    """Wraps vLLM's function, once. Returns None; or why not, and then nothing was changed.

    For the API server, once it has imported its routes: nothing is imported here.
    """
    kind = getattr(sys.modules.get(_MODULE), "OpenAIServingCompletion", None)
    original = inspect.getattr_static(kind, _METHOD, None)
    if not inspect.isfunction(original) or hasattr(kind, _INSTALLED):
        return f"{_METHOD} is not what we know, or was wrapped before"
    if tuple(inspect.signature(original).parameters)[:3] != ("self", "final_res_batch", "request"):
        return f"{_METHOD} takes {inspect.signature(original)}"
    setattr(kind, _METHOD, _with_cached_tokens(original))
    setattr(kind, _INSTALLED, True)
    return None


def _with_cached_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def full(self: Any, final_res_batch: Any, request: Any, *rest: Any, **more: Any) -> Any:
        response = original(self, final_res_batch, request, *rest, **more)
        if getattr(self, "enable_prompt_tokens_details", False):
            _add_to_choices(response, final_res_batch)
        return response

    return full


def _add_to_choices(response: Any, results: Sequence[Any]) -> None:
    """The choices are made of the results, one for each output, in their order; an error has none."""
    cached = [result.num_cached_tokens for result in results for _ in result.outputs]
    choices = getattr(response, "choices", ())
    if len(choices) == len(cached):
        for choice, number in zip(choices, cached, strict=True):
            choice.cached_tokens = number
