"""What HTTP responses say that are no answer: the errors for them, by the messages of vLLM 0.32."""

from __future__ import annotations

import contextlib
import email.utils
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from yarl import URL

from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    CassetteMissError,
    ContextLengthError,
    ModelNotFoundError,
    RequestError,
)
from managed_vllm.request.responses import MALFORMED
from managed_vllm.request.retry import ResponseLostError
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
NOT_RECORDED = 477
"""The HTTP status with which a cassette says that it has no answer (`cassettes.server`). No server says it."""
_NO_ROOM = "max_tokens must be at least 1, got 0"
"""What vLLM says of a prompt that leaves no room for a single token, whatever `max_tokens` was asked for."""


def error_for_status(
    status: int, message: str, connection: Connection, body: Mapping[str, Any] | None = None
) -> RequestError:
    """The error for HTTP 4xx to a request. vLLM's messages are those of `renderers/params.py` and `v1/engine`."""
    body = body or {}
    if status == NOT_RECORDED:
        return CassetteMissError(message, status=status)
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


def may_be_json(data: bytes) -> bool:
    """Whether a body that can't be decoded looks like JSON that was cut, rather than like a page of a proxy."""
    return data.lstrip()[:1] in (b"{", b"[", b"")


def retry_after_s(header: str | None) -> float | None:
    """The seconds of a `Retry-After` header, which may also be a date (RFC 9110, 10.2.3); None for what is neither."""
    if header is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header.strip()):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def repeated_error(fault: ResponseLostError) -> RequestError:
    """The error for a request that a healthy server has answered twice with the same `ServerFaultError`."""
    said = f"{fault} (said twice, by a server that is healthy: it comes from the request)"
    return RequestError(said, status=fault.status)


def unexpected_error(status: int, data: bytes, connection: Connection, location: str | None = None) -> RequestError:
    """The error for what no API server says: a redirect, another 2xx than 200, a body that is not JSON.

    A proxy or a login page says that, and would say it again.
    """
    if 300 <= status < 400:
        target = f" to {_shown(location)}" if location else ""
        said = f"{connection.base_url} redirects{target} (HTTP {status}); give base_url= as where the server itself is"
        return RequestError(said, status=status)
    return RequestError(
        f"{connection.base_url} answers with what is no answer: HTTP {status}, {data[:500]!r}", status=status
    )


def _shown(location: str) -> str:
    """A URL without what may be secret in it."""
    try:
        return str(URL(location).with_query(None).with_fragment(None).with_user(None))
    except ValueError:
        return "an address that is none"


@contextlib.contextmanager
def checked_shape(response: Any) -> Iterator[None]:
    """Raises a `RequestError` for a response of another shape."""
    try:
        yield
    except MALFORMED as error:
        raise RequestError(f"not an answer of the route ({error}): {str(response)[:500]}") from error


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    digits = "" if found is None else next(group for group in found.groups() if group is not None)
    return int(digits) if 0 < len(digits) < 20 else None
