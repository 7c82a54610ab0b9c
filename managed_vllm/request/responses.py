"""The answers of vLLM's two routes as they are decoded: their types are checked, what nobody reads is skipped.

From JSON straight into these takes half the time, and a fifth of the garbage, of dicts; a value of a wrong type is an
error by its place (`msgspec.ValidationError`, a `ValueError`). Fields are those of vLLM 0.32; all but `choices` may be
missing, for other servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec


class TopLogprob(msgspec.Struct, gc=False):
    """One candidate, in a chat."""

    token: str
    logprob: float


class TokenLogprob(msgspec.Struct, gc=False):
    """One place, in a chat. `bytes` are those of the token's text, also where `token` is an id."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] | None = None


class Logprobs(msgspec.Struct, gc=False):
    """`content` is a chat's, the others are a completion's, one item per token."""

    content: list[TokenLogprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class AnswerMessage(msgspec.Struct, gc=False):
    """What a chat answers."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(msgspec.Struct, gc=False):
    """One of `n` answers: `message` in a chat, `text` in a completion."""

    index: int
    text: str | None = None
    message: AnswerMessage | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None
    routed_experts: str | None = None


class PromptTokensDetails(msgspec.Struct, gc=False):
    """Where the server is started with `--enable-prompt-tokens-details`."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """What of it is read."""

    prompt_tokens_details: PromptTokensDetails | None = None


class Answer(msgspec.Struct, gc=False):
    """A whole answer."""

    choices: list[Choice]
    id: str | int | None = None
    model: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None
    usage: Usage | None = None
    metrics: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(Answer)


class RawAnswer(Mapping[str, Any]):
    """An answer as it came, decoded when it is looked at."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._decoded: dict[str, Any] | None = None

    def _dict(self) -> dict[str, Any]:
        if self._decoded is None:
            self._decoded = msgspec.json.decode(self._data, type=dict[str, Any])
        return self._decoded

    def __getitem__(self, key: str) -> Any:
        return self._dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def __repr__(self) -> str:
        return repr(self._dict())

    def __reduce__(self) -> tuple[Any, ...]:
        return (RawAnswer, (self._data,))


class Decoded(msgspec.Struct, gc=False):
    """A whole answer, and what it was decoded from."""

    answer: Answer
    raw: Mapping[str, Any]


def decoded(data: bytes) -> Decoded:
    """From JSON. Raises `ValueError` or `RecursionError` for what is no answer."""
    return Decoded(_decoder.decode(data), RawAnswer(data))


def converted(raw: Mapping[str, Any]) -> Decoded:
    """From dicts and lists, as JSON has them. Raises as `decoded`."""
    return Decoded(msgspec.convert(raw, Answer, strict=True, str_keys=True), raw)
