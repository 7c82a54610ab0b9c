"""The responses of vLLM's two generation routes, decoded: types are checked, unused fields are skipped.

Decoding JSON straight into these structs takes half the time of decoding into dicts, and makes a fifth of the garbage.
A value of a wrong type is a `msgspec.ValidationError` (a `ValueError`) that says where it is. Fields are those of vLLM
0.32; all but `choices` may be missing, for other servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading a response raises if it is of another shape."""


class TopLogprob(msgspec.Struct, gc=False):
    """One candidate, in a chat."""

    token: str
    logprob: float


class TokenLogprob(msgspec.Struct, gc=False):
    """One position, in a chat. `bytes` are those of the token's text, also where `token` is an id."""

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


class ResponseMessage(msgspec.Struct, gc=False):
    """A choice's message, in a chat."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class WeightVersionSpan(msgspec.Struct, frozen=True, gc=False):
    """The tokens `[start, end)` of an answer were sampled by the weights that are called `version`."""

    version: str
    start: int
    end: int


class Choice(msgspec.Struct, gc=False):
    """One of `n` answers: `message` in a chat, `text` in a completion."""

    index: int
    text: str | None = None
    message: ResponseMessage | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None
    routed_experts: str | None = None
    weight_versions: list[WeightVersionSpan] | None = None
    cached_tokens: int | None = None


class PromptTokensDetails(msgspec.Struct, gc=False):
    """Present if the server was started with `--enable-prompt-tokens-details`."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """The part of it that is used."""

    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens: int | None = None


class GenerationResponse(msgspec.Struct, gc=False):
    """The body of a whole response."""

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


_decoder = msgspec.json.Decoder(GenerationResponse)


class LazyJSON(Mapping[str, Any]):
    """A JSON object, decoded when it is first read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._decoded: dict[str, Any] | None = None

    def _dict(self) -> dict[str, Any]:
        if self._decoded is None:
            self._decoded = self.decode()
        return self._decoded

    def decode(self) -> dict[str, Any]:
        """The object, anew."""
        return msgspec.json.decode(self._data, type=dict[str, Any])

    def __getitem__(self, key: str) -> Any:
        return self._dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def __repr__(self) -> str:
        return repr(self._dict())

    def __reduce__(self) -> tuple[Any, ...]:
        return (LazyJSON, (self._data,))


class ParsedResponse(msgspec.Struct, gc=False):
    """A whole response, and the JSON object that it was decoded from."""

    response: GenerationResponse
    raw: Mapping[str, Any]


def parse(data: bytes) -> ParsedResponse:
    """From JSON. Raises `ValueError` or `RecursionError` if it is no such response."""
    return ParsedResponse(_decoder.decode(data), LazyJSON(data))


def parse_dict(raw: Mapping[str, Any]) -> ParsedResponse:
    """From dicts and lists. Raises as `parse`."""
    return ParsedResponse(msgspec.convert(raw, GenerationResponse, strict=True, str_keys=True), raw)


def is_cut(
    finish_reason: str | None, stop_reason: int | str | None, count: int | None, body: Mapping[str, Any]
) -> bool:
    """Whether an answer of `count` tokens ended at the limit of its request, though the server says "tool_calls".

    vLLM (0.32) says that as soon as one call was parsed, whatever ended the turn; `vllm.LLM` says "length" then. A turn
    that ends by itself with its very last token can't be told from a cut one.
    """
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if finish_reason not in ("tool_calls", "function_call") or stop_reason is not None or not isinstance(limit, int):
        return False
    return count is not None and count >= limit


class EventDecoder:
    """Splits a stream of server-sent events, which may come in pieces of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._first = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that is complete now: JSON, or `[DONE]`."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if self._first and lines:
            self._first, lines[0] = False, lines[0].removeprefix(b"\xef\xbb\xbf")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
