"""What each of several prompts in one request has used, of which vLLM (0.32, 0.33) tells the sum, or the last one's.

- Each choice of `/v1/completions` says how many tokens of its prompt were cached, `"cached_tokens": 12`, if the server
  was started with `--enable-prompt-tokens-details`.
- The responses of the pooling routes have the header `X-Prompt-Tokens: 12,7`: the number of tokens of each prompt.

Both are there for a single prompt, too, so that clients see that they would be there for several. Each function is
wrapped only if it is as we know it; nothing else changes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HEADER = "X-Prompt-Tokens"

_COMPLETION = "vllm.entrypoints.openai.completion.serving"
_METHOD = "request_output_to_completion_response"
_POOLING = {
    "vllm.entrypoints.pooling.classify.serving": "ServingClassification",
    "vllm.entrypoints.pooling.embed.serving": "ServingEmbedding",
    "vllm.entrypoints.pooling.pooling.serving": "ServingPooling",
    "vllm.entrypoints.pooling.scoring.serving": "ServingScores",
}
_INSTALLED = "_managed_vllm_tells_of_each_prompt"


def install() -> list[str]:
    """Wraps vLLM's functions, each once; returns what was not.

    For the API server, once it has imported its routes: nothing is imported here.
    """
    return [*_install_completion(), *_install_pooling()]


def _install_completion() -> Iterator[str]:
    kind = getattr(sys.modules.get(_COMPLETION), "OpenAIServingCompletion", None)
    yield from _wrap(kind, _METHOD, ("self", "final_res_batch", "request"), _with_cached_tokens)


def _install_pooling() -> Iterator[str]:
    for module, name in _POOLING.items():
        wrap = _with_scored_tokens if name == "ServingScores" else _with_prompt_tokens
        yield from _wrap(getattr(sys.modules.get(module), name, None), "_build_response", ("self", "ctx"), wrap)


def _wrap(kind: Any, name: str, parameters: Sequence[str], wrap: Callable[..., Any]) -> Iterator[str]:
    original = inspect.getattr_static(kind, name, None)
    if not inspect.isfunction(original) or hasattr(kind, _INSTALLED):
        yield f"{name} is not what we know, or was wrapped before"
    elif tuple(inspect.signature(original).parameters)[: len(parameters)] != tuple(parameters):
        yield f"{name} takes {inspect.signature(original)}"
    else:
        setattr(kind, name, wrap(original))
        setattr(kind, _INSTALLED, True)


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


def _with_prompt_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(self: Any, ctx: Any) -> Any:
        response = original(self, ctx)
        _tell(response, [len(one.prompt_token_ids) for one in ctx.final_res_batch or ()])
        return response

    return build


def _with_scored_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """A pair is one input of a cross-encoder, and two of another model, the first texts before the second ones."""

    @functools.wraps(original)
    def build(self: Any, ctx: Any) -> Any:
        response = original(self, ctx)
        counts = [self._extract_prompt_len(one["prompts"]) for one in ctx.engine_inputs]
        pairs = len(ctx.final_res_batch)
        if len(counts) == 2 * pairs:
            counts = [one + other for one, other in zip(counts[:pairs], counts[pairs:], strict=True)]
        if len(counts) == pairs:
            _tell(response, counts)
        return response

    return build


def _tell(response: Any, counts: Sequence[int]) -> None:
    if counts:
        response.headers[HEADER] = ",".join(map(str, counts))
