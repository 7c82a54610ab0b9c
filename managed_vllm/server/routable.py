"""Which requests vllm-router passes on as they came; all others go past it.

vllm-router 0.1.17 reads a body into its own types and writes it anew. What is not in these is lost without a word
within messages, tools and a few more places (`strict` of a tool, `continuous_usage_stats`, …), while unknown fields of
the request itself stay. It does not pass the key on where it only proxies (`/tokenize`, `/pooling`, …), and embeddings
lose every field that is not OpenAI's. What it can't read it refuses, in words of its own (422): that shows afterwards.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

LARGEST_BYTES = 256 << 10
"""Beyond that, the time to read and write it once more is more than the router's choice is worth: milliseconds
(`benchmarks/router.py`)."""


class _Exact(msgspec.Struct, forbid_unknown_fields=True):
    """An object in which the router would lose other fields."""


class _CalledFunction(_Exact):
    name: str
    arguments: str


class _Call(_Exact):
    id: str
    type: Literal["function"]
    function: _CalledFunction


class _Message(_Exact):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None
    tool_calls: list[_Call] | msgspec.UnsetType = msgspec.UNSET
    tool_call_id: str | msgspec.UnsetType = msgspec.UNSET


class _Function(_Exact):
    name: str
    parameters: dict[str, Any]
    description: str | msgspec.UnsetType = msgspec.UNSET


class _Tool(_Exact):
    type: Literal["function"]
    function: _Function


class _JsonSchema(_Exact):
    name: str
    schema: dict[str, Any]
    strict: bool | msgspec.UnsetType = msgspec.UNSET


class _ResponseFormat(_Exact):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | msgspec.UnsetType = msgspec.UNSET


class _StreamOptions(_Exact):
    include_usage: bool


class _Completion(msgspec.Struct):
    prompt: str | list[Any]
    stream_options: _StreamOptions | None = None


class _ChatCompletion(msgspec.Struct):
    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | None = None
    response_format: _ResponseFormat | None = None
    stream_options: _StreamOptions | None = None


_READ: dict[str, msgspec.json.Decoder[Any]] = {
    "/v1/completions": msgspec.json.Decoder(_Completion),
    "/v1/chat/completions": msgspec.json.Decoder(_ChatCompletion),
}
"""The routes on which it passes on key, answer and unknown fields."""


def is_routable(path: str, body: bytes) -> bool:
    """Whether a POST of this body to this path reaches a server through the router as it is."""
    decoder = _READ.get(path)
    if decoder is None or len(body) > LARGEST_BYTES:
        return False
    try:
        decoder.decode(body)
    except msgspec.DecodeError:  # `ValidationError` is one
        return False
    return True
