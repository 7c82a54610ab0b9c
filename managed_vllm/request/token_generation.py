"""One generation by `/inference/v1/generate` across the losses of its server. Does no I/O; as `resume.Generation`.

It is simpler there than with texts: each token that has come is kept, and the rest is asked for with the prompt's ids
and those. A stream is only made for that, as long as nothing keeps it from being resumed (`resume.obstacle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from managed_vllm.request.deaths import content_of
from managed_vllm.request.pending import HTTPRequest
from managed_vllm.request.responses import MALFORMED, LazyJSON, WeightVersionSpan
from managed_vllm.request.resume import STREAM_INTERVAL, error_in_stream
from managed_vllm.request.retry import AbortedError, ServerFaultError
from managed_vllm.request.token_route import (
    PATH,
    Position,
    Positions,
    TokensAnswer,
    TokensChoice,
    TokensResponse,
    decode,
    parse,
    wire_body,
)
from managed_vllm.request.weight_versions import VersionedParts


class TokenGeneration:
    """One request, as a `PendingRequest`.

    Args:
        body: in the shape of `/v1/completions`: its `prompt` is token ids, and it has `max_tokens`.
        text: whether the answer's text is asked for.
        candidates: how many are asked for at each token, beside the sampled one; None: no logprobs.
        stream: whether it is streamed, to be resumed.
    """

    broken_off = False

    def __init__(self, body: Mapping[str, Any], *, text: bool, candidates: int | None, stream: bool) -> None:
        self._body = dict(body)
        self._text = text
        self._candidates = candidates
        self._stream = stream and not text
        self._most_tokens = 0
        self._found: TokensAnswer | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._ids: list[int] = []
        self._positions: list[Position] = []
        self._versions = VersionedParts()
        self._first = TokensResponse()
        self._aborted = False
        self.kept = 0

    @property
    def complete(self) -> bool:
        """Whether `found` has the answer."""
        return self._found is not None

    @property
    def optional(self) -> bool:
        """Whether the last HTTP request was for the rest of an answer, which can also be generated anew."""
        return self.kept > 0

    @property
    def content(self) -> str:
        """What is asked for, however much of it has come."""
        return content_of(PATH, self._body)

    @property
    def session(self) -> str | None:
        """The session that the body names."""
        found = self._body.get("session_id")
        return found if isinstance(found, str) else None

    def next(self) -> HTTPRequest:
        """The HTTP request to send now."""
        body = self._body
        if self._stream:
            body = {"stream_interval": STREAM_INTERVAL, **body}
        if count := len(self._ids):
            self._versions.begin_part(count)
            body = {**body, "prompt": [*body["prompt"], *self._ids], "max_tokens": body["max_tokens"] - count}
            body["min_tokens"] = max(0, (body.get("min_tokens") or 0) - count)
        wire = wire_body(body, text=self._text, candidates=self._candidates, stream=self._stream)
        return HTTPRequest("POST", PATH, wire, stream=self._stream)

    # -- responses -----------------------------------------------------------------------------------------------------

    def take_headers(self, headers: Mapping[str, str]) -> None:
        """There is nothing in them."""

    def take_json(self, data: bytes | None) -> None:
        """Takes a whole response; None: the server refuses to go on. Raises `ResponseLostError`."""
        if data is None or self.kept:
            self._stream = False
            self._start_over()
        else:
            self._found = parse(data, text=self._text)

    def feed(self, event: bytes) -> None:
        """Takes one event of a stream. Raises `ResponseLostError` for an error, an abort, or another shape."""
        if self.complete or event == b"[DONE]":
            return
        try:
            part = decode(event)
            if part.choices is None:
                raise error_in_stream(msgspec.json.decode(event), event)
            for choice in part.choices[:1]:
                self._add(part, choice)
        except MALFORMED as error:
            raise ServerFaultError(f"no part of an answer: {event[:200]!r}") from error

    def _add(self, part: TokensResponse, choice: TokensChoice) -> None:
        ids = choice.token_ids or []
        if self._candidates is not None and ids:
            content = (choice.logprobs and choice.logprobs.content) or []
            if len(content) != len(ids):
                raise ServerFaultError(f"{len(content)} logprobs for {len(ids)} tokens")
            self._positions += content
        if self._first.request_id is None:
            self._first = part
        self._ids += ids
        self._versions.add(choice.weight_versions)
        self._begin_anew_after_update()
        if choice.finish_reason == "abort":
            self._aborted = True
            raise AbortedError("the server aborted the request")
        if choice.finish_reason is not None:
            self._end(choice.finish_reason, choice.stop_reason)

    def _begin_anew_after_update(self) -> None:
        """An answer that an update of the weights has aborted (`on_update="restart"`) is that of the new ones alone."""
        if self._aborted and self._versions.goes_on_otherwise:
            self._start_over()
            raise AbortedError("the weights were replaced: the answer begins anew")

    def lost(self) -> bool:
        """The last response was lost. Returns whether there were more tokens than ever; may be `complete` then."""
        more = len(self._ids) > self._most_tokens
        self._most_tokens = max(self._most_tokens, len(self._ids))
        self.kept = len(self._ids)
        if self.kept >= self._body["max_tokens"] and not self.complete:
            self._end("length", None)
        return more

    # -- the result ----------------------------------------------------------------------------------------------------

    def _end(self, finish_reason: str, stop_reason: int | str | msgspec.UnsetType | None) -> None:
        spans = self._versions.spans(len(self._ids))
        choice = TokensChoice(
            index=0,
            token_ids=self._ids,
            logprobs=None if self._candidates is None else Positions(self._positions),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            weight_versions=None if spans is None else msgspec.convert(spans, list[WeightVersionSpan]),
        )
        response = TokensResponse(choices=[choice], request_id=self._first.request_id, model=self._first.model)
        self._found = TokensAnswer(response, [choice], LazyJSON(msgspec.json.encode(response)))

    @property
    def found(self) -> TokensAnswer:
        """The complete answer."""
        assert self._found is not None
        return self._found

    def answer(self) -> Mapping[str, Any]:
        """The complete answer, as JSON."""
        return self.found.raw
