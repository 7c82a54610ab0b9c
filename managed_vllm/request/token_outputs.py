"""Outputs of answers that came by `/inference/v1/generate`: the same objects as by the other routes.

What is better there: each candidate has its rank, the sampled one too. What is missing: `decoded_token`, and `metrics`
of the server.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from managed_vllm.request.outputs import CompletionOutput, Logprob, RequestOutput, prompt_logprobs_of, served
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.token_route import Position, TokensAnswer, TokensChoice


def output_of(
    answer: TokensAnswer,
    body: Mapping[str, Any],
    stats: RequestStats,
    *,
    prompt: str | None,
    wanted: int | None,
    before: int = 0,
) -> RequestOutput:
    """The output of one request.

    Args:
        answer: the answer.
        body: of the request, with its prompt as token ids.
        stats: how it was served; `before` are attempts that these don't count.
        prompt: the prompt, if it was text.
        wanted: how many candidates the caller wants at each token; -1: all.

    Raises what `responses.MALFORMED` lists for what does not fit together.
    """
    response = answer.response
    details = None if response.usage is None else response.usage.prompt_tokens_details
    return RequestOutput(
        request_id=str(response.request_id or uuid.uuid4()),
        prompt=prompt,
        prompt_token_ids=list(body["prompt"]),
        outputs=[_completion(choice, wanted or 0) for choice in answer.choices],
        prompt_logprobs=prompt_logprobs_of(response.prompt_logprobs),
        prompt_token_id_logprobs=response.prompt_token_id_logprobs,
        num_cached_tokens=None if details is None else details.cached_tokens,
        kv_transfer_params=response.kv_transfer_params,
        ec_transfer_params=response.ec_transfer_params,
        metrics=response.metrics,
        raw=answer.raw,
        **served(stats, before),
    )


def _completion(choice: TokensChoice, wanted: int) -> CompletionOutput:
    ids = choice.token_ids or []
    content = None if choice.logprobs is None else choice.logprobs.content or []
    return CompletionOutput(
        index=choice.index,
        text=choice.text or "",
        token_ids=ids,
        cumulative_logprob=None if content is None else sum((at.logprob for at in content), 0.0),
        logprobs=None if content is None else _places(content, ids, wanted),
        finish_reason=choice.finish_reason,
        stop_reason=None if choice.stop_reason is msgspec.UNSET else choice.stop_reason,
        routed_experts=choice.routed_experts,
        weight_versions=choice.weight_versions,
        sampling_mask=choice.sampling_mask,
    )


def _places(content: Sequence[Position], ids: Sequence[int], wanted: int) -> list[dict[int, Logprob]]:
    places = []
    for token, at in zip(ids, content, strict=True):
        spelt = at.token if at.id is None else None
        place = {token: Logprob(at.logprob, at.rank, spelt)}
        for others, one in enumerate(at.top_logprobs) if wanted else ():
            number = one.id
            if number is None:
                raise ValueError("candidates without ids")
            its = one.rank or (others if one.logprob > at.logprob else others + 1)
            if number != token and (wanted < 0 or its <= wanted):
                place[number] = Logprob(one.logprob, one.rank)
        places.append(place)
    return places
