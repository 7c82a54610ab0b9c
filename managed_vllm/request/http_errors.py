"""The errors for HTTP responses that refuse a request, by the messages of vLLM 0.32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    RequestError,
)
from managed_vllm.request.responses import MALFORMED
from managed_vllm.status import Connection

_MAX_MODEL_LEN = re.compile(
    r"maximum context length (?:is|of) (\d+)|(?:maximum )?model length(?: of|:)? (\d+)|context length \((\d+)\)"
    r"|max_(?:model_len|total_tokens)[= ]+(\d+)"
)
_PROMPT_TOKENS = re.compile(
    r"contains (?:at least )?(\d+) (?:input tokens|characters)|prompt \(length (\d+)\)|\((\d+) in the messages"
    r"|request has (\d+) input tokens|Input length \((\d+)\)|prompt length (\d+)"
)
_MAX_TOKENS = re.compile(
    r"requested (\d+) output tokens|max(?:_completion|_output)?_tokens'? ?(?:is too large: |=)(\d+)"
    r"|(\d+) in the completion"
)
_NO_ROOM = "max_tokens must be at least 1, got 0"
"""What vLLM says of a prompt that leaves no room for a single token, whatever `max_tokens` was asked for."""


def error_for_status(
    status: int, message: str, connection: Connection, body: Mapping[str, Any] | None = None
) -> RequestError:
    """The error for HTTP 4xx to a request. vLLM's messages are those of `renderers/params.py` and `v1/engine`."""
    body = body or {}
    said = f"HTTP {status}: {message}"
    if status in (401, 403):
        return AuthenticationError(said, base_url=connection.base_url, status=status)
    if status == 404 and "model" in message.lower():
        return ModelNotFoundError(said, model=str(body.get("model") or connection.model), status=status)
    if (max_model_len := _number(_MAX_MODEL_LEN, message)) is not None:
        prompt_tokens = None if "characters" in message else _number(_PROMPT_TOKENS, message)
        return ContextLengthError(
            said,
            max_model_len=max_model_len,
            prompt_tokens=prompt_tokens,
            max_tokens=_number(_MAX_TOKENS, message),
            status=status,
        )
    wanted = body.get("max_tokens", body.get("max_completion_tokens"))
    if _NO_ROOM in message and body and wanted != 0:
        return ContextLengthError(f"the prompt leaves no room for an answer; {said}", max_tokens=wanted, status=status)
    return BadRequestError(said, status=status)


def message_of(data: bytes) -> str:
    """The message in the body of an error response."""
    try:
        error = msgspec.json.decode(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except MALFORMED:
        return data[:1000].decode(errors="replace")


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    digits = "" if found is None else next(group for group in found.groups() if group is not None)
    return int(digits) if 0 < len(digits) < 20 else None
