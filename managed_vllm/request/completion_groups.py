"""Completions of several prompts in one request (`groups`): which may go together, and the answers for each of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import msgspec

from managed_vllm.request.groups import CHARACTERS, Body, Shape
from managed_vllm.request.responses import (
    Choice,
    GenerationResponse,
    LazyJSON,
    ParsedResponse,
    PromptTokensDetails,
    Usage,
    parse,
)
from managed_vllm.request.resume import check_whole, with_what_is_told

SHORT = 128
"""The `max_tokens` up to which completions go together. That saves 0.7 to 0.9 ms of the API server's CPU for each
prompt, of 1.3 for 8 tokens, of 2.7 for 128, and of more with logprobs (benchmarks/README.md); and the answers of a
group come with the slowest of them."""

_OF_THE_PROMPT = ("prompt", "model", "priority", "cache_salt")
"""What may differ among the prompts of one call; those of a group have all but the prompt in common."""
_SAMPLING = frozenset(
    {
        *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "bad_words"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "min_tokens", "logit_bias"),
        *("logprobs", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "structured_outputs"),
        *("response_format", "watermarking", "thinking_token_budget", "repetition_detection", "skip_special_tokens"),
        *("spaces_between_special_tokens", "include_stop_str_in_output", "return_tokens_as_token_ids"),
        *("add_special_tokens", "truncate_prompt_tokens", "truncation_side", "user", "return_weight_versions"),
    }
)
"""Fields that say for each of several prompts what they say for one (vLLM 0.32: `OpenAIServingCompletion`)."""
_NUMBERS = ("n", "logprobs", "prompt_logprobs")
_TOGETHER = _SAMPLING.union(_OF_THE_PROMPT)


class _Completions:
    """`single`: of one answer for each prompt; of several, vLLM never tells the times."""

    path = "/v1/completions"

    def __init__(self, *, single: bool) -> None:
        self.kind = f"{self.path} {'single' if single else 'n'}"

    def key(self, body: Body) -> Hashable | None:
        prompt, limit = body.get("prompt"), body.get("max_tokens")
        if not prompt or not isinstance(prompt, str | list) or type(limit) is not int or limit > SHORT:
            return None
        numbers = [body[name] for name in _NUMBERS if body.get(name) is not None]
        if not body.keys() <= _TOGETHER or any(type(number) is not int or number < 0 for number in numbers):
            return None
        key = (type(prompt), *(body.get(name) for name in _OF_THE_PROMPT[1:]))
        return key if all(isinstance(part, type | str | int | None) for part in key) else None

    def work(self, body: Body) -> int:
        answers = (body.get("n") or 1) * body["max_tokens"] * (2 + (body.get("logprobs") or 0))
        prompt_logprobs = body.get("prompt_logprobs")
        length = len(body["prompt"]) // (CHARACTERS if isinstance(body["prompt"], str) else 1)
        prompt = length * (1 if prompt_logprobs is None else 2 + prompt_logprobs)
        return int(answers) + prompt

    def joined(self, bodies: Sequence[Body]) -> dict[str, Any]:
        return with_what_is_told({**bodies[0], "prompt": [body["prompt"] for body in bodies]})

    def split(self, data: bytes, bodies: Sequence[Body], headers: Mapping[str, str]) -> list[ParsedResponse]:
        parsed = parse(data)
        check_whole(parsed, chat=False)
        found, n = parsed.response, bodies[0].get("n") or 1
        choices = sorted(found.choices, key=_index)
        if [choice.index for choice in choices] != list(range(n * len(bodies))):
            raise ValueError(f"{len(choices)} choices for {len(bodies)} prompts")
        if _tells_cached_tokens(found) and any(choice.cached_tokens is None for choice in choices):
            raise ValueError("of several prompts, the cached tokens of one")
        return [_part(found, parsed.raw, number, n, choices[number * n :][:n]) for number in range(len(bodies))]

    def is_plain(self, response: Any) -> bool | None:
        if not isinstance(response, ParsedResponse):
            return None  # streamed
        found = response.response
        first, told = found.choices[0], (found.metrics, found.kv_transfer_params, found.ec_transfer_params)
        ids = first.token_ids is not None and first.prompt_token_ids is not None
        return ids and not any(told) and (first.cached_tokens is not None or not _tells_cached_tokens(found))


_SINGLE, _SEVERAL = _Completions(single=True), _Completions(single=False)


def completions(body: Body) -> Shape:
    """The shape of a group of such requests."""
    return _SINGLE if body.get("n") in (None, 1) else _SEVERAL


def _tells_cached_tokens(found: GenerationResponse) -> bool:
    return found.usage is not None and found.usage.prompt_tokens_details is not None


def _index(choice: Choice) -> int:
    return choice.index


def _part(
    found: GenerationResponse, raw: Mapping[str, Any], number: int, n: int, choices: Sequence[Choice]
) -> ParsedResponse:
    """The answers to one prompt, in the shape of the response to a single one."""
    if any(choice.token_ids is None or choice.prompt_token_ids is None for choice in choices):
        raise ValueError("a choice without token ids")
    for place, choice in enumerate(choices):
        choice.index = place
    name = f"{found.id}-{number}"  # that of the prompt's own request within vLLM
    usage = Usage(PromptTokensDetails(choices[0].cached_tokens)) if _tells_cached_tokens(found) else None
    response = GenerationResponse(list(choices), name, found.model, usage=usage)
    return ParsedResponse(response, _RawPart(raw, name, number, n))


class _RawPart(LazyJSON):
    """The JSON object of one prompt's answers, made from the group's when it is first read."""

    def __init__(self, whole: Mapping[str, Any], name: str, number: int, n: int) -> None:
        super().__init__(b"")
        self._whole = whole
        self._part = name, number, n

    def decode(self) -> dict[str, Any]:
        """The object."""
        name, number, n = self._part
        every = sorted(self._whole["choices"], key=lambda choice: choice["index"])
        choices = [{**choice, "index": place} for place, choice in enumerate(every[number * n :][:n])]
        prompt, completion = len(choices[0]["prompt_token_ids"]), sum(len(one["token_ids"]) for one in choices)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage = {**(self._whole.get("usage") or {}), **counts}
        if usage.get("prompt_tokens_details"):
            usage["prompt_tokens_details"] = {
                **usage["prompt_tokens_details"],
                "cached_tokens": choices[0].get("cached_tokens"),
            }
        return {**self._whole, "id": name, "choices": choices, "usage": usage}

    def __reduce__(self) -> tuple[Any, ...]:
        return (LazyJSON, (msgspec.json.encode(dict(self)),))
