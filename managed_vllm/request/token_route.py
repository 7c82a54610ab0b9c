"""vLLM's `/inference/v1/generate`: token ids in, token ids out. What goes there, and what comes back.

It takes all of vLLM's `SamplingParams`, ranks every candidate, and says which weights sampled each token. Because
nothing becomes text, it costs the API server some 10 % less than `/v1/completions` (benchmarks/README.md). It takes
one prompt a request. Requests are kept in the shape of `/v1/completions` until they are sent: `wire_body` makes the
other.

What to know of it (vLLM 0.32):

- Unknown fields are ignored, also those of the sampling parameters, and what is left out has the default of
  `vllm.SamplingParams`, never that of the model's generation_config. Only without `max_tokens` an answer may fill the
  whole context: it is always sent.
- Of the candidates the first `logprobs` are returned, the sampled one first: where that is none of the likeliest, the
  last of these is missing. So one more is asked for.
- `output_mode="text"` (0.32) brings the text, and then candidates without their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from managed_vllm.request.responses import LazyJSON, Usage, WeightVersionSpan
from managed_vllm.request.retry import AbortedError, ServerFaultError
from managed_vllm.request.sampling import ONLY_BY_TOKENS

PATH = "/inference/v1/generate"
MOST_CANDIDATES = 19
"""Beyond that, one candidate more is more than a server returns by default (`--max-logprobs`: 20)."""

_BESIDE = frozenset(
    {"model", "request_id", "session_id", "priority", "cache_salt", "kv_transfer_params", "ec_transfer_params"}
)
"""Fields of the request beside its sampling parameters."""
SAMPLING = frozenset(
    {
        *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "bad_words", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "watermarking", "max_tokens", "min_tokens"),
        *("logprobs", "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "logit_bias"),
        *("include_stop_str_in_output", "allowed_token_ids", "structured_outputs", "thinking_token_budget"),
        *("repetition_detection", "stream_interval", "routed_experts_prompt_start", *ONLY_BY_TOKENS),
    }
)
"""Sampling parameters that mean the same on both routes."""
_MEANINGLESS = frozenset(
    {"prompt", "user", "add_special_tokens", "return_token_ids", "return_tokens_as_token_ids", "return_weight_versions"}
)
"""Fields that say nothing here: of the text of a prompt, or of what is told in any case."""
_KNOWN = _BESIDE | SAMPLING | _MEANINGLESS | {"vllm_xargs"}
_ID = "token_id:"


def obstacle(body: Mapping[str, Any]) -> str | None:
    """Why a request in the shape of `/v1/completions`, whose prompt is token ids, can't go there; None if it can."""
    for name, value in body.items():
        if value is not None and name not in _KNOWN:
            return f"{name}= is not taken there"
    if not body["prompt"]:
        return "a prompt has at least one token"
    return None


def wire_body(body: Mapping[str, Any], *, text: bool, candidates: int | None, stream: bool = False) -> dict[str, Any]:
    """The body for the route. `text`: with the answer's text; `candidates`: how many are asked for at each token."""
    params = {name: value for name, value in body.items() if name in SAMPLING and value is not None}
    params["max_tokens"] = body["max_tokens"]
    params["detokenize"] = text
    if candidates is not None:
        params["logprobs"] = candidates
    if body.get("vllm_xargs"):
        params["extra_args"] = body["vllm_xargs"]
    found = {name: value for name, value in body.items() if name in _BESIDE and value is not None}
    found |= {"token_ids": body["prompt"], "sampling_params": params}
    if text:
        found["output_mode"] = "text"
    return {**found, "stream": True} if stream else found


# -- what comes back ---------------------------------------------------------------------------------------------------


class Candidate(msgspec.Struct, gc=False):
    """One token at one position; with texts there is a `token` in place of its id, as in older vLLM, spelt."""

    logprob: float
    token_id: int | None = None
    rank: int | None = None
    token: str | None = None

    @property
    def id(self) -> int | None:
        """The token's id, if it is told."""
        name = self.token or ""
        if self.token_id is None and name.startswith(_ID) and name[len(_ID) :].isdecimal():
            return int(name[len(_ID) :])
        return self.token_id


class Position(Candidate, gc=False):
    """The sampled token, and the candidates, of which it is the first."""

    top_logprobs: list[Candidate] = []


class Positions(msgspec.Struct, gc=False):
    """Those of one answer."""

    content: list[Position] | None = None


class TokensChoice(msgspec.Struct, gc=False):
    """One of `n` answers, or what a part of a stream has of it."""

    index: int
    token_ids: list[int] | None = None
    text: str | None = None
    logprobs: Positions | None = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    routed_experts: str | None = None
    sampling_mask: list[list[int]] | None = None
    weight_versions: list[WeightVersionSpan] | None = None

    def tells(self, *, logprobs: bool, text: bool) -> bool:
        """Whether it has what our outputs are made of. An older vLLM's has no `stop_reason`."""
        if self.stop_reason is msgspec.UNSET or (logprobs and self.logprobs is None):
            return False
        content = (self.logprobs and self.logprobs.content) or []
        return text or all(at.id is not None for at in content)


class TokensResponse(msgspec.Struct, gc=False):
    """A response, or a part of a stream; `error` in the place of the choices."""

    choices: list[TokensChoice] | None = None
    error: Any = None
    request_id: str | None = None
    model: str | None = None
    usage: Usage | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None
    prompt_token_id_logprobs: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None


class TokensAnswer(msgspec.Struct, gc=False):
    """A whole answer, and the JSON object that it was decoded from."""

    response: TokensResponse
    choices: list[TokensChoice]
    raw: Mapping[str, Any]


_decoder = msgspec.json.Decoder(TokensResponse)
decode = _decoder.decode


def parse(data: bytes, *, text: bool) -> TokensAnswer:
    """A whole response from JSON.

    Raises `ResponseLostError` for one without an answer in each choice, and what `responses.MALFORMED` lists.
    """
    response = decode(data)
    choices = sorted(response.choices or (), key=_index)
    if not choices:
        raise ServerFaultError(f"the answer has no choices: {data[:500]!r}")
    for choice in choices:
        if choice.finish_reason == "abort":
            raise AbortedError("the server aborted the request")
        if choice.token_ids is None or (text and choice.text is None):
            raise ServerFaultError(f"a choice without its tokens or its text: {data[:500]!r}")
    return TokensAnswer(response, choices, LazyJSON(data))


def _index(choice: TokensChoice) -> int:
    return choice.index
