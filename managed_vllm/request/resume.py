"""One generation across the losses of its server: what to send next, and which tokens to keep. Does no I/O.

`attempts.Sender` drives a `Generation` in this order:

1. `next()` is the HTTP request to send.
2. The response goes in: each event of a stream by `feed`, a whole one by `take_json`.
3. If it is lost (`ResponseLostError`, raised by these two or by the sender), the sender calls `lost()`.
4. All over again, until `complete`. Then `answer()` has the shape of a whole response of the request's own route.

A generation that can be resumed (`obstacle` says why not) is streamed, and tokens that came before a loss are kept: it
goes on at `/v1/completions` with the prompt's token ids and those kept. Any other one is sent again as a whole.

The text needs care at the cut. vLLM holds back the text of tokens that end within a character; and of a prompt that
ends within one, it returns all of it as text (0.32; `DecodeStream` of tokenizers 0.22). So tokens are kept only up to a
point at which the text was complete. With several tokens in one event that point is hidden; then `/detokenize` says
whether the last tokens end a character. If it can't, the last certain point counts: after a single token that brought
text, or before text that starts with ASCII, which never ends a character.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from managed_vllm.request.deaths import content_of
from managed_vllm.request.pending import HTTPRequest
from managed_vllm.request.responses import MALFORMED, ParsedResponse, is_cut, parse, parse_dict
from managed_vllm.request.retry import AbortedError, ServerFaultError
from managed_vllm.request.streamed import Extent, StreamedAnswer

STREAM_INTERVAL = 8
"""Tokens in one event of a stream that is read for resuming only (vLLM 0.32: `stream_interval` of a request).

A loss costs at most the tokens of one incomplete event, and up to four that end within a character. Older versions
ignore the field and send one token per event, which costs three times as much: see RESUME_FROM.
"""

RESUME_FROM = 1024
"""The `max_tokens` from which a generation is streamed, so that it can be resumed, unless the caller decides.

Measured by benchmarks/streaming.py (vLLM 0.32, demo model, two CPU cores, 32 in flight), CPU time per token of client
and API server: 6 + 47 µs for a whole response, 22 + 65 µs streamed with 8 tokens per event, 56 + 104 µs with one, 10 +
53 µs with 32; tokens per second were the same within the noise of the machine. So streaming costs 35 µs per token, and
a token of a real model takes 10 ms and more; it matters only at thousands of tokens per second. It saves half a
generation per death on average. For fewer than 1,024 tokens, at the usual 30 to 100 per second, that is less than the
restart for which the request waits anyway (vLLM: 25 s and more).
"""

_NOTHING = Extent(0, 0, 0)
_PENDING = 4
"""A character has at most four bytes, and a token at least one."""
_WINDOW = 64
"""The text of at most so many last tokens is asked for: enough that a character cut at their start does not matter."""

_KEPT = frozenset(
    {
        *("model", "user", "priority", "request_id", "session_id", "cache_salt", "return_token_ids", "stream_interval"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop_token_ids", "ignore_eos"),
        *("skip_special_tokens", "include_stop_str_in_output", "logit_bias", "allowed_token_ids"),
        *("return_tokens_as_token_ids", "return_weight_versions", "skip_reading_prefix_cache"),
    }
)
"""Fields that mean the same for the rest of a generation as for the whole, on each route that takes them."""
_TOLD = ("return_token_ids", "return_weight_versions")
_COUNTED = frozenset({"max_tokens", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs"})
"""Fields that are adapted for the rest of a generation."""
_OF_THE_PROMPT = frozenset(
    {
        *("prompt", "messages", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "chat_template"),
        *("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents", "reasoning_effort"),
    }
)
"""Fields that no longer matter once the prompt's token ids are known."""
_WHY = {
    "n": "there are several answers",
    "stop": "a stop string may span the cut",
    "bad_words": "a bad word may span the cut",
    "presence_penalty": "it counts the tokens of one request only",
    "frequency_penalty": "it counts the tokens of one request only",
    "seed": "with a temperature above 0 the random numbers start anew",
    "spaces_between_special_tokens": "it depends on the token before",
}
_OFF: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
}
"""Values of other fields that ask for nothing special. For each, so do None, False, and an empty list, dict or text."""


# -- what can be resumed -----------------------------------------------------------------------------------------------


def obstacle(body: Mapping[str, Any]) -> str | None:
    """Why this request can only be sent again as a whole; None if the tokens that it has generated can be kept.

    A field that is not known to be harmless is an obstacle: better to generate twice than to join parts that don't fit.
    """
    for name, value in body.items():
        if name in _COUNTED or name in _OF_THE_PROMPT or (name in _KEPT and name != "seed"):
            continue
        if value is None or value is False or value in ([], (), {}, "") or value in _OFF.get(name, ()):
            continue
        if name == "seed" and body.get("temperature") == 0:
            continue
        return f"{name}={value!r:.60}: {_WHY.get(name, 'it may not mean the same for a part of an answer')}"
    prompt = body.get("prompt")
    if "prompt" in body and not (isinstance(prompt, str) or all(isinstance(token, int) for token in prompt or ())):
        return "the prompt is neither one text nor one list of token ids"
    for message in body.get("messages", ()):
        if message.get("tool_calls") or message.get("role") == "tool":
            return "tools are used in the conversation"
        content = message.get("content")
        parts = () if content is None or isinstance(content, str) else content
        if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in parts):
            return "the conversation has more than text in it, and the tokens of images can't be sent back"
    return None


def is_long(body: Mapping[str, Any]) -> bool:
    """Whether a request is worth streaming, by `RESUME_FROM`. A chat without a limit is."""
    limit = _limit(body)
    return "messages" in body if limit is None else limit >= RESUME_FROM


def _limit(body: Mapping[str, Any]) -> int | None:
    limit = body.get("max_completion_tokens")
    return body.get("max_tokens") if limit is None else limit


# -- one generation ---------------------------------------------------------------------------------------------------


class Generation:
    """One request to `/chat/completions` or `/completions` (`route`), as a `PendingRequest`.

    Args:
        route: below `/v1`.
        body: of the request.
        stream: whether it may be resumed, for which it is streamed.
        obstacle: why it can't be resumed, if it is streamed nevertheless.

    `kept` counts the tokens of `answer()` that came before the last loss.
    """

    def __init__(self, route: str, body: Mapping[str, Any], *, stream: bool, obstacle: str | None = None) -> None:
        self._route = route
        self._body = dict(body)
        self._stream = stream
        self._obstacle = obstacle
        self._limit = _limit(body)
        if self._limit is None and not self._chat:
            self._limit = 16  # vLLM's default for completions, which the rest of a generation must not get anew
        self._asked_for = ""  # what the last HTTP request is for: "answer", "rest", "text" or "models"
        self._most_tokens = 0
        self._given_out = _NOTHING
        self.complete = False
        self._start_over()

    def _start_over(self) -> None:
        self._streamed: StreamedAnswer | None = None
        self._doubtful = 0  # n: the text of the last tokens is due for the n-th time; 0: all kept tokens are certain
        self._whole: ParsedResponse | None = None
        self._aborted = False
        self.kept = 0

    @property
    def content(self) -> str:
        """What is asked for, however much of it has come."""
        return content_of(self._route, self._body)

    @property
    def session(self) -> str | None:
        """The session that the body names."""
        found = self._body.get("session_id")
        return found if isinstance(found, str) else None

    @property
    def _chat(self) -> bool:
        return self._route.startswith("/chat")

    @property
    def _received(self) -> StreamedAnswer:
        """What has come by streams. Made when it is first used: most generations are not streamed."""
        if self._streamed is None:
            logprobs = self._body.get("logprobs")
            self._streamed = StreamedAnswer(
                chat=self._chat,
                logprobs=logprobs is not None and logprobs is not False,  # 0 means: those of the sampled tokens
                top_logprobs=self._body.get("top_logprobs") or 0,
            )
        return self._streamed

    @property
    def obstacle(self) -> str | None:
        """Why it can't be resumed, as far as is known."""
        return self._obstacle or (None if self._streamed is None else self._streamed.obstacle)

    # -- what to send --------------------------------------------------------------------------------------------------

    def next(self) -> HTTPRequest:
        """The HTTP request to send now. Where the server refuses an `optional` one, `take_json(None)` follows."""
        ids = self._streamed.ids if self._streamed is not None else ()
        if self._doubtful:
            self._asked_for = "text"
            return HTTPRequest("POST", "/detokenize", {"tokens": ids[self._window :]})
        if ids and self._limit is None:
            self._asked_for = "models"
            return HTTPRequest("GET", "/v1/models", None)
        if ids:
            self._asked_for = "rest"
            self._received.versions.begin_part(len(ids))
            return HTTPRequest("POST", "/v1/completions", self._rest(), stream=True)
        self._asked_for = "answer"
        body = with_what_is_told(self._body)
        if self._stream:
            body = {"stream_interval": STREAM_INTERVAL, **body, "stream": True}
        return HTTPRequest("POST", f"/v1{self._route}", body, stream=self._stream)

    @property
    def _window(self) -> int:
        """The first of the last tokens whose text is asked for: at the start of a character, if that is near."""
        return max(self._received.certain.ids, len(self._received.ids) - _WINDOW)

    @property
    def optional(self) -> bool:
        """Whether the last HTTP request only saves tokens: there is another way without it."""
        return self._asked_for != "answer"

    def _rest(self) -> dict[str, Any]:
        """The body for what is still to be generated."""
        received = self._received
        assert received.prompt_ids is not None
        assert self._limit is not None
        body = {name: value for name, value in self._body.items() if name in _KEPT}
        body["prompt"] = [*received.prompt_ids, *received.ids]
        body["max_tokens"] = self._limit - len(received.ids)
        if self._body.get("min_tokens"):
            body["min_tokens"] = max(0, self._body["min_tokens"] - len(received.ids))
        if received.logprobs is not None:
            body["logprobs"] = self._body.get("top_logprobs") or 0 if self._chat else self._body["logprobs"]
        return {"stream_interval": STREAM_INTERVAL, **with_what_is_told(body), "stream": True}

    # -- responses -----------------------------------------------------------------------------------------------------

    def feed(self, event: bytes) -> None:
        """Takes one event of a stream. Raises `ResponseLostError` for an error, an abort, or another shape."""
        if self.complete or event == b"[DONE]":
            return
        try:
            chunk = msgspec.json.decode(event)
            choices = chunk.get("choices")
            if choices:
                self._received.add(chunk, choices[0], continued=self._asked_for == "rest")
                self._begin_anew_after_update()
                self.complete = self._received.finish is not None
                self._tell_if_cut()
            elif choices is None:
                raise error_in_stream(chunk, event)
        except MALFORMED as error:
            raise ServerFaultError(f"no part of an answer: {event[:200]!r}") from error
        except AbortedError:
            self._aborted = True
            raise

    def _begin_anew_after_update(self) -> None:
        """An answer that was aborted goes on with the same weights only; where tokens were given out, with any.

        So requests that an update has aborted (`on_update="restart"`) are answered by the new weights alone.
        """
        if self._aborted and self._given_out is _NOTHING and self._received.versions.goes_on_otherwise:
            self._start_over()
            raise AbortedError("the weights were replaced: the answer begins anew")

    def _tell_if_cut(self) -> None:
        received = self._received
        if received.finish is not None and is_cut(*received.finish, len(received.ids), self._body):
            received.finish = ("length", None)

    def take_json(self, data: bytes | None) -> None:
        """Takes a whole response; None: refused. Raises `ResponseLostError`, or a `ValueError` for another shape."""
        if data is None or self._asked_for != "answer":
            self.take(None if data is None else _dict(data))
        else:
            self._take_answer(parse(data))

    def take_headers(self, headers: Mapping[str, str]) -> None:
        """There is nothing in them."""

    def take(self, response: Mapping[str, Any] | None) -> None:
        """As `take_json`, decoded."""
        if self._asked_for == "text":
            self._take_text(None if response is None else response.get("prompt"))
        elif self._asked_for == "models":
            self._take_models(response)
        elif self._asked_for == "rest":
            if response is not None and not response.get("choices"):
                raise ServerFaultError(f"the answer has no choices: {str(response)[:500]}")
            self._give_up("the server refuses to go on" if response is None else "the server does not stream the rest")
        else:
            try:
                parsed = parse_dict(response or {})
            except ValueError as error:
                raise ServerFaultError(f"not an answer ({error}): {str(response)[:500]}") from error
            self._take_answer(parsed)

    def _take_answer(self, parsed: ParsedResponse) -> None:
        check_whole(parsed, chat=self._chat)
        self._start_over()
        self._whole = parsed
        self.complete = True

    def _take_text(self, text: Any) -> None:
        """Takes the text of the last tokens. If they end within a character: drops the last one, to ask again.

        Half a character may also precede special tokens, which have a text here but none in the stream. So the whole
        text must consist of whole characters, but for its beginning, where the window may have cut one.
        """
        received = self._received
        if isinstance(text, str) and self._window > received.certain.ids:
            text = text.lstrip("\ufffd")
        whole = isinstance(text, str) and text and "\ufffd" not in text
        may_drop = self._doubtful <= _PENDING and len(received.ids) > received.certain.ids + 1
        if not whole and may_drop and str(text).endswith("\ufffd"):
            self._doubtful += 1
            received.drop_last_token()
            return
        self._doubtful = 0
        if not whole:
            received.cut_to_certain()
        self._settle()

    def _take_models(self, response: Mapping[str, Any] | None) -> None:
        assert self._received.prompt_ids is not None
        try:
            cards = [card for card in (response or {})["data"] if isinstance(card.get("max_model_len"), int)]
            length = next((card for card in cards if card["id"] == self._body.get("model")), cards[0])["max_model_len"]
        except MALFORMED:
            self._give_up("the server does not tell its max_model_len")
        else:
            self._limit = length - len(self._received.prompt_ids)
            self._settle()

    # -- after a loss --------------------------------------------------------------------------------------------------

    def lost(self) -> bool:
        """The last response was lost. Returns whether there were more tokens than ever; may be `complete` then."""
        received = self._received
        if self.complete or self._asked_for not in ("answer", "rest"):
            return False
        more = len(received.ids) > self._most_tokens
        self._most_tokens = max(self._most_tokens, len(received.ids))
        if self.obstacle is not None:
            self._give_up(self.obstacle)
        elif received.ids and not received.prompt_ids:
            self._give_up("the server does not return the prompt's token ids")
        elif len(received.ids) > max(self.kept, received.certain.ids):
            self._doubtful = 1
        else:
            received.cut_to_certain()
            self._settle()
        return more

    def _give_up(self, why: str) -> None:
        """Starts over, without a stream, which would only cost."""
        self._obstacle = why
        self._stream = False
        self._start_over()

    def _settle(self) -> None:
        """The tokens that are kept are certain now; perhaps they are all there are."""
        received = self._received
        received.certain = received.extent
        self.kept = len(received.ids)
        if not received.ids:
            self._start_over()
        elif self._limit is not None and len(received.ids) >= self._limit:
            received.finish = ("length", None)
            self.complete = True

    # -- the result ----------------------------------------------------------------------------------------------------

    @property
    def broken_off(self) -> bool:
        """Whether tokens that `new_part` has given out are lost: then the answer can't go on."""
        if self._whole is not None or self._given_out is _NOTHING:
            return False
        return any(given > there for given, there in zip(self._given_out, self._received.extent, strict=True))

    def new_part(self) -> Mapping[str, Any] | None:
        """The tokens that have become certain since the last call, in the shape of the route's response; None: none.

        Certain tokens will be kept after a loss. Where nothing can be kept, all is given out at once, and `broken_off`
        says when it was in vain. Tool calls, and the reason for the end, come with the last part only.
        """
        if self._whole is not None:
            return self._whole.raw
        received, start = self._received, self._given_out
        end = received.extent
        if not self.complete and self.obstacle is None:
            end = received.certain._replace(reasoning=end.reasoning)
        self._given_out = Extent(*map(max, start, end))
        if not self.complete and self._given_out == start:
            return None
        return received.to_response(start, end, complete=self.complete)

    @property
    def whole(self) -> ParsedResponse | None:
        """The response, if it came whole."""
        return self._whole

    def answer(self) -> Mapping[str, Any]:
        """The complete answer, in the shape of a whole response; `usage` counts each token once."""
        assert self.complete
        if self._whole is not None:
            return self._whole.raw
        received = self._received
        answer = received.to_response(_NOTHING, received.extent, complete=True)
        prompt, completion = len(received.prompt_ids or ()), len(received.ids)
        answer["usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        return answer


def with_what_is_told(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with what is asked for in any case: token ids, and which weights they are of.

    None, by `extra_body`, is for a server that refuses the field, and then hardly knows the other one.
    """
    ids = body.get("return_token_ids", True)
    asked = {"return_token_ids": ids, "return_weight_versions": ids, **body}
    return {name: value for name, value in asked.items() if value is not None or name not in _TOLD}


def error_in_stream(chunk: Mapping[str, Any], event: bytes) -> ServerFaultError:
    """vLLM says the HTTP status that it could not send any more: `{"error": {"message": …, "code": 400}}`."""
    error = chunk.get("error")
    code = error.get("code") if isinstance(error, Mapping) else None
    status = code if type(code) is int else None
    return ServerFaultError(f"in mid-stream: {event[:500].decode(errors='replace')}", status=status)


def check_whole(parsed: ParsedResponse, *, chat: bool) -> None:
    """Raises `ResponseLostError` for a response without an answer in each choice."""
    choices = parsed.response.choices
    if not choices:
        raise ServerFaultError(f"the answer has no choices: {str(parsed.raw)[:500]}")
    for choice in choices:
        if choice.finish_reason == "abort":
            raise AbortedError("the server aborted the request")
        if chat:
            message = choice.message
            if message is None:
                raise ServerFaultError(f"a choice without its message: {str(parsed.raw)[:500]}")
            if message.content is None and not choice.token_ids:
                other = message.reasoning or message.reasoning_content or message.refusal or message.tool_calls
                if not other:
                    raise ServerFaultError(f"a message without content: {str(parsed.raw)[:500]}")
        elif choice.text is None:
            raise ServerFaultError(f"a choice without its text: {str(parsed.raw)[:500]}")


def _dict(data: bytes) -> dict[str, Any]:
    found = msgspec.json.decode(data)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found
