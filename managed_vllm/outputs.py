"""What comes back from a request, in the shape of `vllm.RequestOutput`: exact token ids, as the server sampled them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """One candidate at one place. `rank` is 1 for the likeliest; None where the server does not say."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One of the `n` answers. `finish_reason` is "stop" or "length"; `stop_reason` the stop string or token id hit.

    `logprobs` has one dict per token, the sampled token first, as far as the server names the candidates' ids.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one request. `latency` is in seconds, `attempts` counts sendings.

    `epoch` is the life of the server that ended the answer; `resumed_tokens` of its tokens came from lives or
    connections before, and were not generated again.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    model: str = ""
    epoch: int = 0
    latency: float = 0.0
    attempts: int = 1
    resumed_tokens: int = 0
    finished: bool = True
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
