"""What is in a relayed response: of each of its answers text, token ids and logprobs, exactly as the server told them.

The responses are those of vLLM's two generation routes, whole or as a stream, asked for with `return_token_ids` and
logprobs. A whole response counts as a stream of one event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from managed_vllm.request.weight_versions import VersionedParts


@dataclass(frozen=True, slots=True)
class RelayedAnswer:
    """One of the answers of a response.

    Attributes:
        index: its number among them.
        prompt_token_ids, token_ids: as the server made and sampled them.
        logprobs: of `token_ids`, one each; None where the server did not tell all of them.
        text, reasoning: as its parsers left them.
        tool_calls: of OpenAI's shape.
        finish_reason: None for an answer that was broken off.
        weight_versions: `(version, start, end)` of each part of the answer; empty where the server does not tell.
    """

    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float] | None
    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    finish_reason: str | None
    weight_versions: tuple[tuple[str, int, int], ...]

    @property
    def exact(self) -> bool:
        """Whether ids and logprobs of all tokens are known."""
        said = self.text or self.reasoning or self.tool_calls
        return bool(self.prompt_token_ids and self.logprobs is not None and (self.token_ids or not said))


@dataclass
class _Parts:
    """What has come of one answer."""

    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    versions: VersionedParts = field(default_factory=VersionedParts)

    def add(self, choice: Mapping[str, Any]) -> None:
        said = choice.get("message") or choice.get("delta") or {}
        self.text += said.get("content") or choice.get("text") or ""
        self.reasoning += said.get("reasoning") or said.get("reasoning_content") or ""
        self.token_ids += choice.get("token_ids") or ()
        self.logprobs += _logprobs_of(choice.get("logprobs") or {})
        self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.versions.add(choice.get("weight_versions"))
        for place, call in enumerate(said.get("tool_calls") or ()):
            _join(self.tool_calls.setdefault(call.get("index", place), {}), call)

    def answer(self, index: int) -> RelayedAnswer:
        count = len(self.token_ids)
        # With `echo` a completion tells those of the prompt before them.
        known = [one for one in self.logprobs[len(self.logprobs) - count :] if one is not None] if count else []
        spans = self.versions.spans(count) or ()
        return RelayedAnswer(
            index=index,
            prompt_token_ids=list(self.prompt_token_ids),
            token_ids=list(self.token_ids),
            logprobs=known if len(known) == count <= len(self.logprobs) else None,
            text=self.text,
            reasoning=self.reasoning,
            tool_calls=[self.tool_calls[key] for key in sorted(self.tool_calls)],
            finish_reason=self.finish_reason,
            weight_versions=tuple((span["version"], span["start"], span["end"]) for span in spans),
        )


class RelayedAnswers:
    """The answers of one response, of which `add` takes the parts as they come."""

    def __init__(self) -> None:
        self._prompt_token_ids: list[int] = []
        self._parts: dict[int, _Parts] = {}

    def add(self, response: Mapping[str, Any]) -> None:
        """Takes a whole response, or an event of a stream. Raises what `MALFORMED` lists for another shape."""
        self._prompt_token_ids = response.get("prompt_token_ids") or self._prompt_token_ids
        for choice in response["choices"]:
            self._parts.setdefault(choice.get("index", 0), _Parts()).add(choice)

    def found(self) -> list[RelayedAnswer]:
        """What has come so far, by index; without those of which no token has."""
        for parts in self._parts.values():
            parts.prompt_token_ids = parts.prompt_token_ids or self._prompt_token_ids
        return [
            self._parts[index].answer(index)
            for index in sorted(self._parts)
            if self._parts[index].token_ids or self._parts[index].text or self._parts[index].finish_reason
        ]


def _logprobs_of(told: Mapping[str, Any]) -> list[float | None]:
    """Of the sampled tokens: those of a chat, or of a completion."""
    if told.get("content"):
        return [place["logprob"] for place in told["content"]]
    return list(told.get("token_logprobs") or ())


def _join(call: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Adds a part of a tool call: in a stream the function's arguments come piece by piece."""
    for name, value in part.items():
        if name == "function" and isinstance(value, Mapping):
            function = call.setdefault("function", {})
            for key, text in value.items():
                function[key] = (
                    (function.get(key) or "") + text if key == "arguments" and text else text or function.get(key)
                )
        elif name != "index" and value is not None:
            call[name] = value
