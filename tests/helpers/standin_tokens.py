"""The stand-in's `/inference/v1/generate`: what it takes and says, from and to the shape of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PATH = "/inference/v1/generate"
OFF = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
PARAMS = (
    *("n", "temperature", "max_tokens", "min_tokens", "logprobs", "detokenize", "skip_reading_prefix_cache"),
    *("trace_decode_token_ids", "prompt_logprob_token_ids"),
)
"""Sampling parameters that it takes: fewer than vLLM's, which has `prompt_logprob_start`, too."""
_FIELDS = ("request_id", "token_ids", "sampling_params", "model", "output_mode", "stream", "priority")
_COMPLETION_FIELDS = ("prompt", "max_tokens", "return_weight_versions")


def openapi(*, scale_out: bool) -> dict[str, Any]:
    """What /openapi.json says of the two routes; vLLM leaves out one that is off."""
    params = {"type": "object", "properties": {name: {} for name in PARAMS}}
    schemas = {
        "CompletionRequest": {"properties": {name: {} for name in _COMPLETION_FIELDS}},
        "GenerateRequest": {"properties": {**{name: {} for name in _FIELDS}, "sampling_params": params}},
    }
    routes = {"/v1/completions": "CompletionRequest", **({PATH: "GenerateRequest"} if scale_out else {})}
    return {
        "paths": {path: {"post": {"requestBody": _takes(name)}} for path, name in routes.items()},
        "components": {"schemas": schemas},
    }


def _takes(name: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}


def as_completion(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request in the shape of `/v1/completions`. Raises `KeyError`, `ValueError` for what vLLM refuses."""
    params = body["sampling_params"]
    ids = body["token_ids"]
    if not ids or any(token < 0 for token in ids):
        raise ValueError("token_ids must have tokens")
    if "max_tokens" not in params:
        raise ValueError("without max_tokens the answer would fill the context")
    others = {name: value for name, value in body.items() if name.startswith("standin_") or name == "stream"}
    told = {"return_token_ids": True, "return_weight_versions": True, "return_tokens_as_token_ids": True}
    return {**others, **params, **told, "prompt": ids, "text": body.get("output_mode") == "text"}


def as_tokens(answer: dict[str, Any], *, text: bool) -> dict[str, Any]:
    """An answer, or an event of a stream, from the shape of `/v1/completions`."""
    choices = [_choice(choice, text=text) for choice in answer["choices"]]
    return {"request_id": f"generate-tokens-{answer['id']}", "usage": answer.get("usage"), "choices": choices}


def _choice(choice: dict[str, Any], *, text: bool) -> dict[str, Any]:
    found = {name: value for name, value in choice.items() if name not in ("text", "prompt_token_ids", "logprobs")}
    logprobs = choice.get("logprobs")
    if text:
        found["text"] = choice["text"]
    if logprobs is None:
        return {**found, "logprobs": None}
    tokens = [int(name.removeprefix("token_id:")) for name in logprobs["tokens"]]
    content = []
    for token, logprob in zip(tokens, logprobs["token_logprobs"], strict=True):
        entry = {"token": f"<{token}>"} if text else {"token_id": token, "rank": 1}
        content.append({**entry, "logprob": logprob, "top_logprobs": [{**entry, "logprob": logprob}]})
    return {**found, "logprobs": {"content": content}}
