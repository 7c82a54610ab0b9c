"""Sampling parameters with vLLM's names, and what they become on the wire.

A real `vllm.SamplingParams` or a dict is taken as well. A parameter that can't be passed on to a server raises
`UnsupportedParameterError`: vLLM ignores unknown request fields silently (0.32, every endpoint), we don't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from managed_vllm.errors import UnsupportedParameterError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. None means: the server's own default (its generation_config, or vLLM's).

    The fields are those of `vllm.SamplingParams` that the OpenAI-compatible API of vLLM 0.32 takes. `logprobs` is the
    number of top candidates per token, `structured_outputs` a dict with one of `json`, `regex`, `choice`, `grammar`.
    """

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, value: Any) -> SamplingParams:
        """From None, ours, a dict or a `vllm.SamplingParams`. `UnsupportedParameterError` names what can't be."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            given = dict(value)
        elif type(value).__name__ == "SamplingParams" and hasattr(value, "__struct_fields__"):
            given = _set_in_vllm(value)
        else:
            raise UnsupportedParameterError(
                f"sampling parameters must be a SamplingParams or a dict, not {type(value).__name__}"
            )
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise UnsupportedParameterError(
                    f"the sampling parameter {name!r} can't be passed on to a server; "
                    f"known are: {', '.join(sorted(known))}"
                )
        return cls(**given)

    def to_request(self, *, chat: bool) -> dict[str, Any]:
        """The request fields for `/v1/chat/completions` (`chat`) or `/v1/completions`."""
        request = {field.name: getattr(self, field.name) for field in fields(self)}
        request = {name: value for name, value in request.items() if value is not None}
        if chat and "logprobs" in request:
            request["top_logprobs"] = request["logprobs"]
            request["logprobs"] = True
        if "logit_bias" in request:
            request["logit_bias"] = {str(token): bias for token, bias in request["logit_bias"].items()}
        return request


def _set_in_vllm(params: Any) -> dict[str, Any]:
    """What differs from vLLM's own defaults in a `vllm.SamplingParams`."""
    defaults = type(params)()
    given = {}
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name.startswith("_") or name == "output_kind" or value == getattr(defaults, name):
            continue
        given[name] = value
    # These two have other defaults on a server, where a generation_config may decide.
    return {"temperature": params.temperature, "max_tokens": params.max_tokens, **given}
