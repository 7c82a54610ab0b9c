"""What has come of one streamed generation: tokens, texts and logprobs, event by event, over one or more streams.

A chat that goes on after a loss goes on as a completion; so the events may be of two shapes, and are kept in the shape
of the request's own route.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from managed_vllm.request.retry import AbortedError, ResponseLostError
from managed_vllm.request.weight_versions import VersionedParts


class Extent(NamedTuple):
    """How far an answer goes, as numbers of token ids, texts, and pieces of reasoning."""

    ids: int
    texts: int
    reasoning: int


class StreamedAnswer:
    """One answer, as far as it has come.

    Attributes:
        head: id, time and model of the response.
        prompt_ids: the prompt's token ids, once the server has sent them.
        ids: the token ids.
        texts: the pieces of text, which are not one for each token.
        logprobs: an entry for each token, in the shape of the route; None if there are none.
        reasoning: the pieces that the server's reasoning parser has taken out.
        tool_calls: by their index.
        finish: finish_reason and stop_reason, once it has ended.
        certain: up to there, the text of the tokens is complete.
        versions: which weights sampled the tokens.
        obstacle: why it can't go on after a loss, if the stream shows that.
    """

    def __init__(self, *, chat: bool, logprobs: bool, top_logprobs: int) -> None:
        self._chat = chat
        self._top_logprobs = top_logprobs
        self._started = False
        self.head: dict[str, Any] = {}
        self.prompt_ids: list[int] | None = None
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[Any] | None = [] if logprobs else None
        self.reasoning: list[str] = []
        self.tool_calls: dict[int, dict[str, Any]] = {}
        self.finish: tuple[str, int | str | None] | None = None
        self.certain = Extent(0, 0, 0)
        self.versions = VersionedParts()
        self.obstacle: str | None = None

    @property
    def extent(self) -> Extent:
        """All that has come."""
        return Extent(len(self.ids), len(self.texts), len(self.reasoning))

    def add(self, chunk: Mapping[str, Any], choice: Mapping[str, Any], *, continued: bool) -> None:
        """Adds one event with its `choice`; `continued`: from `/v1/completions`, whatever the request's own route.

        Raises `ResponseLostError`, or what `responses.MALFORMED` lists.
        """
        if not self.head:
            self.head = {name: chunk[name] for name in ("id", "created", "model") if name in chunk}
        if self.prompt_ids is None:
            self.prompt_ids = _ids(chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")) or None
        ids = _ids(choice.get("token_ids"))
        self.versions.add(choice.get("weight_versions"))
        chat = self._chat and not continued
        if chat:
            text = self._text_of_delta(choice["delta"], ids)
        else:
            text = choice["text"]
            self._started = True
        if not isinstance(text, str):
            raise TypeError
        if ids:
            if self.logprobs is not None:  # first: if they don't fit, nothing of the event must stay
                self._add_logprobs(choice.get("logprobs"), len(ids), chat=chat)
            if text and text[0] < "\x80":
                self.certain = self.extent
            self.ids += ids
        elif text:
            self.obstacle = "the server does not return token ids"
        if text:
            self.texts.append(text)
            if ids and len(ids) == 1 and text[-1] != "\ufffd":
                self.certain = self.extent
        if choice.get("finish_reason"):
            self._end(choice["finish_reason"], choice.get("stop_reason"))

    def _text_of_delta(self, delta: Mapping[str, Any], ids: list[int]) -> Any:
        text = delta.get("content")
        self._started = self._started or text is not None or delta.get("refusal") is not None
        if text is None or len(delta) > 1:
            self._add_parsed(delta, ids)
        return "" if text is None else text

    def _add_parsed(self, delta: Mapping[str, Any], ids: list[int]) -> None:
        """A delta that is more than content: the first one, or from the server's reasoning or tool parser."""
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        calls = delta.get("tool_calls")
        if reasoning or calls or (ids and delta.get("content") is None):
            self.obstacle = "the server takes the answer apart (reasoning, tool calls)"
        if reasoning:
            if not isinstance(reasoning, str):
                raise TypeError
            self.reasoning.append(reasoning)
        for part in calls or ():
            call = self.tool_calls.setdefault(part["index"], {"type": "function", "function": {"arguments": ""}})
            function = part.get("function") or {}
            call.update({name: part[name] + "" for name in ("id", "type") if part.get(name)})
            call["function"]["arguments"] += function.get("arguments") or ""
            if function.get("name"):
                call["function"]["name"] = function["name"] + ""

    def _add_logprobs(self, logprobs: Any, count: int, *, chat: bool) -> None:
        assert self.logprobs is not None
        if logprobs is None:
            self.obstacle = "the server does not return logprobs"
            self.logprobs = None
            return
        if chat:
            entries = logprobs["content"]
        else:
            if not all(type(token) is str for token in logprobs["tokens"]):
                raise TypeError
            entries = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
            if self._chat:
                entries = [_chat_logprob(token, logprob, top, self._top_logprobs) for token, logprob, top in entries]
        if len(entries) != count:
            raise ValueError(f"{len(entries)} logprobs for {count} tokens")
        self.logprobs += entries

    def _end(self, finish_reason: Any, stop_reason: Any) -> None:
        if finish_reason == "abort":  # vLLM 0.32 sends that, with HTTP 200, while it goes down
            raise AbortedError("the server aborted the request")
        if type(finish_reason) is not str or type(stop_reason) not in (int, str, type(None)):
            raise TypeError
        if not (self._started or self.ids or self.reasoning or self.tool_calls):
            raise ResponseLostError("the answer ended before it began")
        self.finish = (finish_reason, stop_reason)

    def drop_last_token(self) -> None:
        """Drops one token, but no text: it had none."""
        del self.ids[-1]
        if self.logprobs is not None:
            del self.logprobs[-1]

    def cut_to_certain(self) -> None:
        """Drops what is not certain."""
        ids, texts, _ = self.certain
        del self.ids[ids:]
        del self.texts[texts:]
        if self.logprobs is not None:
            del self.logprobs[ids:]

    def to_response(self, start: Extent, end: Extent, *, complete: bool) -> dict[str, Any]:
        """A part of it in the shape of a whole response of the route; `complete`: with how it ended."""
        finish, stop_reason = self.finish if complete and self.finish is not None else (None, None)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "stop_reason": stop_reason}
        choice["token_ids"] = self.ids[start.ids : end.ids]
        choice["logprobs"] = None
        text = "".join(self.texts[start.texts : end.texts])
        logprobs = None if self.logprobs is None else self.logprobs[start.ids : end.ids]
        if complete and (spans := self.versions.spans(len(self.ids))) is not None:
            choice["weight_versions"] = spans
        response = {**self.head, "choices": [choice]}
        response.setdefault("created", int(time.time()))
        if self._chat:
            choice["message"] = self._message(text, self.reasoning[start.reasoning : end.reasoning], complete=complete)
            response["object"] = "chat.completion"
            response["prompt_token_ids"] = self.prompt_ids
            if logprobs is not None:
                choice["logprobs"] = {"content": logprobs}
        else:
            choice["text"] = text
            choice["prompt_token_ids"] = self.prompt_ids
            response["object"] = "text_completion"
            if logprobs is not None:
                choice["logprobs"] = _completion_logprobs(logprobs)
        return response

    def _message(self, text: str, reasoning: list[str], *, complete: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning:
            message["reasoning"] = "".join(reasoning)
        if self.tool_calls and complete:
            message["tool_calls"] = [call for _, call in sorted(self.tool_calls.items())]
        return message


def _ids(given: Any) -> list[int]:
    """The token ids, if they are numbers, and not True. Raises `TypeError`."""
    if not given:
        return []
    if type(given) is not list or set(map(type, given)) != {int}:
        raise TypeError
    return given


def _chat_logprob(token: str, logprob: float, top: Mapping[str, float] | None, most: int) -> dict[str, Any]:
    """An entry of a chat's logprobs from one of a completion, which has one candidate more (vLLM 0.32).

    A completion merges candidates of the same text, unless they come as ids (`return_tokens_as_token_ids`); so a chat
    may have fewer of them after a cut. With ids, a completion does not return the bytes of the sampled token.
    """
    candidates = list((top or {}).items())[: most if most >= 0 else None]
    return {
        "token": token,
        "logprob": logprob,
        "bytes": None if token.startswith("token_id:") else _bytes(token),
        "top_logprobs": [{"token": text, "logprob": value, "bytes": _bytes(text)} for text, value in candidates],
    }


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", errors="replace"))


def _completion_logprobs(entries: list[tuple[str, float, Mapping[str, float]]]) -> dict[str, Any]:
    offsets, offset = [], 0
    for token, _, _ in entries:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [logprob for _, logprob, _ in entries],
        "tokens": [token for token, _, _ in entries],
        "top_logprobs": [top for _, _, top in entries],
    }
