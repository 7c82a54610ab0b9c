"""One generation across the losses of its server: what to send next, what to keep, when to give up. No I/O in here.

A `Generation` is driven by a client, in this order:

1. `next()` says what to send. The client sends it.
2. What comes back goes in: each event of a stream into `feed`, any other answer into `take`.
3. If the answer was lost (`ResponseLostError`, raised by these two or by the client), the client calls `lost()`.
4. All over again, until `complete`. Then `answer()` has the shape of an unstreamed answer of the request's own route.

Where a generation can be resumed (`obstacle` says why not), it is streamed, and the tokens that came before a loss are
kept: it goes on as `/v1/completions` with the prompt's token ids and those kept. Else it is sent again as a whole.

Text is what needs care at the cut. vLLM holds back the text of tokens that end within a character, and where a prompt
ends within one, it returns the whole prompt as text (0.32; `DecodeStream` of tokenizers 0.22). So tokens are kept only
up to a point at which text was complete. With several tokens in one event that point can't be seen; then the server is
asked, by `/detokenize`, whether the last tokens end a character. If it can't tell, the last point that is certain
counts: after a single token that brought text, or before text that starts with ASCII, which never ends a character.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from managed_vllm.policies import RetryPolicy
from managed_vllm.request.responses import Decoded, converted, decoded

STREAM_INTERVAL = 8
"""Tokens in one event of a stream that is read for resuming only (vLLM 0.32: `stream_interval` of a request).

A loss costs the tokens of one event that was not complete, at most, and up to four that end within a character. Older
versions ignore the field and send one token per event, which costs three times as much: see RESUME_FROM.
"""

RESUME_FROM = 1024
"""`max_tokens` from which a generation is streamed, so that it can be resumed, unless the caller says.

Measured by benchmarks/streaming.py (vLLM 0.32, demo model, two CPU cores, 32 in flight), CPU time per token of client
and API server: 6 + 47 µs for a whole answer, 22 + 65 µs streamed with 8 tokens per event, 56 + 104 µs with one, 10 +
53 µs with 32; tokens per second were the same within the noise of the machine. So streaming costs every token 35 µs,
against the 10 ms and more that a token of a real model takes; only at thousands of tokens per second does it count.
What it saves is half a generation per death, on the average. With fewer than 1,024 tokens, at the usual 30 to 100 per
second, that is less than the restart takes for which the request waits anyway (vLLM: 25 s and more).
"""

_PENDING = 4
"""A character has at most four bytes, and a token at least one."""
_WINDOW = 64
"""At most so many last tokens are asked for their text: enough that a character cut at their start does not matter."""

_KEPT = frozenset(
    {
        *("model", "user", "priority", "request_id", "session_id", "cache_salt", "return_token_ids", "stream_interval"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop_token_ids", "ignore_eos"),
        *("skip_special_tokens", "include_stop_str_in_output", "logit_bias", "allowed_token_ids"),
        "return_tokens_as_token_ids",
    }
)
"""Fields that mean the same for the rest of a generation as for all of it, on either route."""
_COUNTED = frozenset({"max_tokens", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs"})
"""Fields that the rest of a generation gets in another form."""
_OF_THE_PROMPT = frozenset(
    {
        *("prompt", "messages", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "chat_template"),
        *("chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents", "reasoning_effort"),
    }
)
"""Fields that have done their part once the prompt's token ids are known."""
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
"""Values of other fields that mean nothing special. None, False, and an empty list, dict or text do so for each."""


class ResponseLostError(Exception):
    """The answer was lost, perhaps with its server: worth another try. `status` is the HTTP status, if one came.

    `sent`: the request may have reached the server. One that was refused at the door can't be what kills it.
    """

    def __init__(self, message: str, *, status: int | None = None, sent: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.sent = sent


# -- how often, and when -----------------------------------------------------------------------------------------------


class Losses:
    """Counts what one request has lost."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._reason = ""
        self.ever = False
        self.deaths = 0
        self.lost = 0
        self._sent = False
        self.status: int | None = None

    def add(self, loss: ResponseLostError, *, progressed: bool) -> float:
        """One more answer lost; returns seconds to wait, at most, for another epoch. `progressed`: tokens were kept."""
        if progressed:
            self.deaths = self.lost = 0
        self.ever = True
        self.lost += 1
        self.status = loss.status
        self._sent = self._sent or loss.sent
        self._reason = str(loss)
        longest = min(self._policy.backoff_max_s, self._policy.backoff_initial_s * 2.0 ** min(self.lost - 1, 60))
        return random.uniform(0, longest)

    def new_epoch(self) -> float:
        """The last loss was a death: another epoch is ready. Returns seconds to wait before sending."""
        self.deaths += self._sent
        self.lost, self._sent = 0, False
        return random.uniform(0, self._policy.spread_s)

    @property
    def too_many(self) -> str | None:
        """What to tell the caller once it is enough; else None."""
        if self.deaths >= self._policy.max_deaths:
            times = "once" if self.deaths == 1 else f"{self.deaths} times"
            return f"the server died {times} under this request; it may be what kills it. At last: {self._reason}"
        if self.lost >= self._policy.max_lost:
            times = "once" if self.lost == 1 else f"{self.lost} times in a row"
            return f"the answer was lost {times}, without a new life of the server. At last: {self._reason}"
        return None


# -- what can be resumed -----------------------------------------------------------------------------------------------


def obstacle(body: Mapping[str, Any]) -> str | None:
    """Why this request can only be sent again as a whole; None if what it has generated can be kept.

    A field that is not known to be harmless is an obstacle: better to generate twice than to join what does not fit.
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
    """Whether a request is worth streaming for its own sake: see `RESUME_FROM`. A chat without a limit is long."""
    limit = _limit(body)
    return "messages" in body if limit is None else limit >= RESUME_FROM


def _limit(body: Mapping[str, Any]) -> int | None:
    limit = body.get("max_completion_tokens")
    return body.get("max_tokens") if limit is None else limit


# -- streams -----------------------------------------------------------------------------------------------------------


class Events:
    """Cuts a stream of server-sent events into their data; `feed` takes bytes however they come."""

    def __init__(self) -> None:
        self._rest = b""
        self._first = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that is whole now: JSON, or `[DONE]`."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if self._first and lines:
            self._first, lines[0] = False, lines[0].removeprefix(b"\xef\xbb\xbf")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@dataclass(frozen=True)
class Step:
    """One HTTP request: `path` is below the server's root, `body` goes as JSON, `stream` says what may come back."""

    method: str
    path: str
    body: dict[str, Any] | None
    stream: bool = False


class Generation:
    """One request to `/chat/completions` or `/completions` (`route`); `stream=False`: it is never resumed.

    `kept` is the number of tokens, within `answer()`, that were received before the last loss.
    """

    def __init__(self, route: str, body: Mapping[str, Any], *, stream: bool) -> None:
        self._route = route
        self._body = dict(body)
        self._chat = route.startswith("/chat")
        self._stream = stream
        logprobs = body.get("logprobs")
        self._with_logprobs = logprobs is not None and logprobs is not False  # 0 means: those of the sampled tokens
        self._limit = _limit(body)
        if self._limit is None and not self._chat:
            self._limit = 16  # vLLM's default for completions, which the rest of a generation must not get anew
        self._asked = ""
        self._most = 0
        self._given = (0, 0, 0)
        self.complete = False
        self.obstacle: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._head: dict[str, Any] = {}
        self._prompt_ids: list[int] | None = None
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._reasoning: list[str] = []
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._finish: tuple[str, int | str | None] | None = None
        self._said = False
        self._certain = (0, 0)
        self._doubts = 0
        self._continued = False
        self._whole: Decoded | None = None
        self.kept = 0

    # -- what to send --------------------------------------------------------------------------------------------------

    def next(self) -> Step:
        """What to send now. If the server refuses it (HTTP 4xx) though it is `optional`, `take(None)` says so."""
        if self._doubts:
            self._asked = "text"
            return Step("POST", "/detokenize", {"tokens": self._ids[self._window :]})
        if self._ids and self._limit is None:
            self._asked = "models"
            return Step("GET", "/v1/models", None)
        self._asked = "answer"
        self._continued = bool(self._ids)
        if self._continued:
            return Step("POST", "/v1/completions", self._rest(), stream=True)
        body = {**self._body, "return_token_ids": True}
        if self._stream:
            body = {"stream_interval": STREAM_INTERVAL, **body, "stream": True}
        return Step("POST", f"/v1{self._route}", body, stream=self._stream)

    @property
    def _window(self) -> int:
        """Where the last tokens begin, of which the text is asked for: where a character begins, if that is near."""
        return max(self._certain[0], len(self._ids) - _WINDOW)

    @property
    def optional(self) -> bool:
        """Whether the last step was only for not losing tokens: there is another way without it."""
        return self._asked != "answer" or self._continued

    def _rest(self) -> dict[str, Any]:
        """The body for what is still to be generated."""
        assert self._prompt_ids is not None
        assert self._limit is not None
        body = {name: value for name, value in self._body.items() if name in _KEPT}
        body["prompt"] = [*self._prompt_ids, *self._ids]
        body["max_tokens"] = self._limit - len(self._ids)
        if self._body.get("min_tokens"):
            body["min_tokens"] = max(0, self._body["min_tokens"] - len(self._ids))
        if self._with_logprobs:
            body["logprobs"] = self._body.get("top_logprobs") or 0 if self._chat else self._body["logprobs"]
        return {"stream_interval": STREAM_INTERVAL, **body, "stream": True, "return_token_ids": True}

    # -- what came back ------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """One event of a stream. Raises `ResponseLostError` for an error, an abort, or what is no part of an answer."""
        if self.complete or data == b"[DONE]":
            return
        try:
            chunk = msgspec.json.decode(data)
            choices = chunk.get("choices")
            if choices:
                self._feed_choice(chunk, choices[0])
            elif choices is None:
                raise ResponseLostError(f"in mid-stream: {data[:500].decode(errors='replace')}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ResponseLostError(f"no part of an answer: {data[:200]!r}") from error

    def _feed_choice(self, chunk: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        if not self._head:
            self._head = {name: chunk[name] for name in ("id", "created", "model") if name in chunk}
        if self._prompt_ids is None:
            self._prompt_ids = _ids(chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")) or None
        tokens = _ids(choice.get("token_ids"))
        own = self._chat and not self._continued
        if own:
            delta = choice["delta"]
            text = delta.get("content")
            self._said = self._said or text is not None or delta.get("refusal") is not None
            if text is None or len(delta) > 1:
                self._feed_parsed(delta, tokens)
                text = text or ""
        else:
            text = choice["text"]
            self._said = True
        if not isinstance(text, str):
            raise TypeError
        if tokens:
            if self._with_logprobs:  # before the rest: what does not fit must leave nothing behind
                self._feed_logprobs(choice.get("logprobs"), len(tokens), own=own)
            if text and text[0] < "\x80":
                self._certain = (len(self._ids), len(self._texts))
            self._ids += tokens
        elif text:
            self.obstacle = "the server does not return token ids"
        if text:
            self._texts.append(text)
            if tokens and len(tokens) == 1 and text[-1] != "\ufffd":
                self._certain = (len(self._ids), len(self._texts))
        finish = choice.get("finish_reason")
        if finish == "abort":
            raise ResponseLostError(
                "the server aborted the request"
            )  # vLLM 0.32 says so, with HTTP 200, while it goes down
        if finish:
            stop_reason = choice.get("stop_reason")
            if type(finish) is not str or type(stop_reason) not in (int, str, type(None)):
                raise TypeError
            if not (self._said or self._ids or self._reasoning or self._tool_calls):
                raise ResponseLostError("the answer ended before it began")
            self._finish = (finish, stop_reason)
            self.complete = True

    def _feed_parsed(self, delta: Mapping[str, Any], tokens: Any) -> None:
        """A delta that is not just content: the first one, or a parser of reasoning or tool calls is at work."""
        reasoning = delta.get("reasoning") or delta.get("reasoning_content")
        calls = delta.get("tool_calls")
        if reasoning or calls or (tokens and delta.get("content") is None):
            self.obstacle = "the server takes the answer apart (reasoning, tool calls)"
        if reasoning:
            if not isinstance(reasoning, str):
                raise TypeError
            self._reasoning.append(reasoning)
        for part in calls or ():
            call = self._tool_calls.setdefault(part["index"], {"type": "function", "function": {"arguments": ""}})
            function = part.get("function") or {}
            call.update({name: part[name] + "" for name in ("id", "type") if part.get(name)})
            call["function"]["arguments"] += function.get("arguments") or ""
            if function.get("name"):
                call["function"]["name"] = function["name"] + ""

    def _feed_logprobs(self, logprobs: Any, count: int, *, own: bool) -> None:
        """Keeps one entry per token, in the form of the request's own route."""
        if logprobs is None:
            self.obstacle = "the server does not return logprobs"
            self._with_logprobs = False
            return
        if own:
            entries = logprobs["content"]
        else:
            if not all(type(token) is str for token in logprobs["tokens"]):
                raise TypeError
            entries = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
            if self._chat:
                most = self._body.get("top_logprobs") or 0
                entries = [_chat_logprob(token, logprob, top, most) for token, logprob, top in entries]
        if len(entries) != count:
            raise ValueError(f"{len(entries)} logprobs for {count} tokens")
        self._logprobs += entries

    def take_json(self, data: bytes | None) -> None:
        """The whole answer to a step; None: refused. Raises `ResponseLostError`, or `ValueError` for what is none."""
        if data is None or self._asked != "answer" or self._continued:
            self.take(None if data is None else _mapping(data))
        else:
            self._take_answer(decoded(data))

    def take(self, answer: Mapping[str, Any] | None) -> None:
        """As `take_json`, decoded."""
        if self._asked == "text":
            self._take_text(None if answer is None else answer.get("prompt"))
        elif self._asked == "models":
            self._take_models(answer)
        elif self._continued:
            if answer is not None and not answer.get("choices"):
                raise ResponseLostError(f"the answer has no choices: {str(answer)[:500]}")
            self._again("the server refuses to go on" if answer is None else "the server does not stream the rest")
        else:
            try:
                found = converted(answer or {})
            except ValueError as error:
                raise ResponseLostError(f"not an answer ({error}): {str(answer)[:500]}") from error
            self._take_answer(found)

    def _take_answer(self, found: Decoded) -> None:
        choices = found.answer.choices
        if not choices:
            raise ResponseLostError(f"the answer has no choices: {str(found.raw)[:500]}")
        for choice in choices:
            if choice.finish_reason == "abort":
                raise ResponseLostError("the server aborted the request")
            if self._chat:
                message = choice.message
                if message is None:
                    raise ResponseLostError(f"a choice without its message: {str(found.raw)[:500]}")
                if message.content is None and not choice.token_ids:
                    told = message.reasoning or message.reasoning_content or message.refusal or message.tool_calls
                    if not told:
                        raise ResponseLostError(f"a message without content: {str(found.raw)[:500]}")
            elif choice.text is None:
                raise ResponseLostError(f"a choice without its text: {str(found.raw)[:500]}")
        self._forget()
        self._whole = found
        self.complete = True

    def _take_text(self, text: Any) -> None:
        """The text of the last tokens: if they end within a character, without the last one, and ask again.

        Half a character may also stand before special tokens, which have a text here but none in the stream. So all of
        it must be whole, but for its beginning, where the window may have cut one.
        """
        if isinstance(text, str) and self._window > self._certain[0]:
            text = text.lstrip("\ufffd")
        if isinstance(text, str) and text and "\ufffd" not in text:
            self._doubts = 0
        elif self._doubts <= _PENDING and len(self._ids) > self._certain[0] + 1 and str(text).endswith("\ufffd"):
            self._doubts += 1
            del self._ids[-1]
            if self._with_logprobs:
                del self._logprobs[-1]
            return
        else:
            self._doubts = 0
            self._back_to_certain()
        self._settled()

    def _take_models(self, answer: Mapping[str, Any] | None) -> None:
        assert self._prompt_ids is not None
        try:
            cards = [card for card in (answer or {})["data"] if isinstance(card.get("max_model_len"), int)]
            length = next((card for card in cards if card["id"] == self._body.get("model")), cards[0])["max_model_len"]
        except (KeyError, TypeError, AttributeError, IndexError):
            self._again("the server does not tell its max_model_len")
        else:
            self._limit = length - len(self._prompt_ids)
            self._settled()

    # -- after a loss --------------------------------------------------------------------------------------------------

    def lost(self) -> bool:
        """The answer to the last step was lost. Returns whether there were more tokens than ever; may be `complete`."""
        if self.complete or self._asked != "answer":
            return False
        more = len(self._ids) > self._most
        self._most = max(self._most, len(self._ids))
        if self.obstacle is None and self._ids and not self._prompt_ids:
            self.obstacle = "the server does not return the prompt's token ids"
        if self.obstacle is not None:
            self._again(self.obstacle)
        elif len(self._ids) > max(self.kept, self._certain[0]):
            self._doubts = 1
        else:
            self._back_to_certain()
            self._settled()
        return more

    def _again(self, why: str) -> None:
        """As a whole from now on: a stream would only cost."""
        self.obstacle = why
        self._stream = False
        self._forget()

    def _back_to_certain(self) -> None:
        ids, texts = self._certain
        del self._ids[ids:]
        del self._texts[texts:]
        if self._with_logprobs:
            del self._logprobs[ids:]

    def _settled(self) -> None:
        """What is kept is certain now; perhaps it is all there is."""
        self._certain = (len(self._ids), len(self._texts))
        self.kept = len(self._ids)
        if not self._ids:
            self._forget()
        elif self._limit is not None and len(self._ids) >= self._limit:
            self._finish = ("length", None)
            self.complete = True

    # -- the result ----------------------------------------------------------------------------------------------------

    @property
    def torn(self) -> bool:
        """Whether something that was given by `fresh` is lost: then the answer can't go on."""
        if self._whole is not None:
            return False
        ids, texts, reasoning = self._given
        return ids > len(self._ids) or texts > len(self._texts) or reasoning > len(self._reasoning)

    def fresh(self) -> Mapping[str, Any] | None:
        """What has become certain since the last call, in the form of the route's answer; None: nothing.

        Certain is what will still be so after a loss. Where nothing can be kept after a loss, all is given at once, and
        `torn` says when it was in vain. Tool calls come with the last part only, the reason of its end too.
        """
        if self._whole is not None:
            return self._whole.raw
        ids, texts, reasoning = self._given
        to_ids, to_texts = len(self._ids), len(self._texts)
        if not self.complete and self.obstacle is None:
            to_ids, to_texts = self._certain
        self._given = (max(ids, to_ids), max(texts, to_texts), max(reasoning, len(self._reasoning)))
        if not self.complete and self._given == (ids, texts, reasoning):
            return None
        logprobs = self._logprobs[ids:to_ids] if self._with_logprobs else None
        return self._answer(
            self._ids[ids:to_ids], "".join(self._texts[texts:to_texts]), logprobs, self._reasoning[reasoning:]
        )

    @property
    def whole(self) -> Decoded | None:
        """The answer, where it came whole."""
        return self._whole

    def answer(self) -> Mapping[str, Any]:
        """The complete answer, as the route gives it unstreamed; `usage` counts each token once."""
        assert self.complete
        if self._whole is not None:
            return self._whole.raw
        assert self._finish is not None
        logprobs = self._logprobs if self._with_logprobs else None
        answer = self._answer(self._ids, "".join(self._texts), logprobs, self._reasoning)
        prompt, completion = len(self._prompt_ids or ()), len(self._ids)
        answer["usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        return answer

    def _answer(self, ids: list[int], text: str, logprobs: list[Any] | None, reasoning: list[str]) -> dict[str, Any]:
        finish, stop_reason = self._finish if self.complete and self._finish is not None else (None, None)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "stop_reason": stop_reason}
        choice["token_ids"] = ids
        choice["logprobs"] = None
        answer = {**self._head, "choices": [choice]}
        answer.setdefault("created", int(time.time()))
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if reasoning:
                message["reasoning"] = "".join(reasoning)
            if self._tool_calls and self.complete:
                message["tool_calls"] = [call for _, call in sorted(self._tool_calls.items())]
            choice["message"] = message
            answer["object"] = "chat.completion"
            answer["prompt_token_ids"] = self._prompt_ids
            if logprobs is not None:
                choice["logprobs"] = {"content": logprobs}
        else:
            choice["text"] = text
            choice["prompt_token_ids"] = self._prompt_ids
            answer["object"] = "text_completion"
            if logprobs is not None:
                choice["logprobs"] = _completion_logprobs(logprobs)
        return answer


def _mapping(data: bytes) -> dict[str, Any]:
    answer = msgspec.json.decode(data)
    if not isinstance(answer, dict):
        raise ValueError("not an object")
    return answer


def _ids(given: Any) -> list[int]:
    """Token ids, if they are: numbers, and not True. Raises `TypeError`."""
    if not given:
        return []
    if type(given) is not list or set(map(type, given)) != {int}:
        raise TypeError
    return given


def _chat_logprob(token: str, logprob: float, top: Mapping[str, float] | None, most: int) -> dict[str, Any]:
    """One entry of a chat's logprobs from those of a completion, which have one candidate more (vLLM 0.32).

    Candidates with the same text are one there, unless they come as ids (`return_tokens_as_token_ids`); so a chat may
    have fewer of them behind a cut. With ids, a completion does not tell the bytes of the sampled token.
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
