"""Requests to the routes of pooling models for several prompts at once (`groups`), and the answers for each of them.

`usage` has the sum of all prompts' tokens. Of token ids each prompt's number is known; of texts our own servers tell it
in a header (`in_server/managed_vllm_each_prompt.py`), and other servers get one text a request.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from managed_vllm.request.groups import CHARACTERS, Body
from managed_vllm.request.pending import JSONRequest

_INPUTS = ("input", "text_1", "text_2")
_TOGETHER = frozenset(
    {
        *("encoding_format", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "use_activation"),
        *("dimensions", "task", *_INPUTS),
    }
)
"""Fields that say for each of several prompts what they say for one (vLLM 0.32)."""
_COUNTS = "X-Prompt-Tokens"


@dataclass(frozen=True, slots=True)
class Pooled:
    """A response; `counted`: its headers have the number of tokens of each prompt."""

    answer: Mapping[str, Any]
    counted: bool = True


class Pooling:
    """One route, for prompts that are texts, or pairs of them; or for token ids."""

    def __init__(self, path: str, *, texts: bool) -> None:
        self.path = path
        self.kind = f"{path} {'texts' if texts else 'ids'}"
        self._texts = texts

    def key(self, body: Body) -> Hashable | None:
        inputs = [body[name] for name in _INPUTS if name in body]
        alike = inputs and all(one and isinstance(one, str if self._texts else list) for one in inputs)
        if not alike or not body.keys() <= _TOGETHER or body.get("encoding_format", "float") != "float":
            return None
        return None if not self._texts and body.get("truncate_prompt_tokens") is not None else self.kind

    def work(self, body: Body) -> int:
        return sum(len(body[name]) for name in _INPUTS if name in body) // (CHARACTERS if self._texts else 1)

    def joined(self, bodies: Sequence[Body]) -> dict[str, Any]:
        names = [name for name in _INPUTS if name in bodies[0]]
        return {**bodies[0], **{name: [body[name] for body in bodies] for name in names}}

    def split(self, data: bytes, bodies: Sequence[Body], headers: Mapping[str, str]) -> list[Any]:
        answer = msgspec.json.decode(data, type=dict[str, Any])
        items = sorted(answer["data"], key=lambda item: item["index"])
        counts = _counts(headers) if self._texts else [len(body["input"]) for body in bodies]
        if [item["index"] for item in items] != list(range(len(bodies))) or len(counts) != len(items):
            raise ValueError(f"{len(items)} answers for {len(bodies)} prompts")
        return [_part(answer, *part) for part in zip(range(len(items)), items, counts, strict=True)]

    def is_plain(self, response: Any) -> bool | None:
        return not self._texts or bool(response.counted)


def pooled(request: JSONRequest) -> Pooled:
    """The response to a single request."""
    return Pooled(request.answer(), _COUNTS in request.headers)


def _counts(headers: Mapping[str, str]) -> list[int]:
    return [int(count) for count in headers[_COUNTS].split(",")]


def _part(answer: Mapping[str, Any], number: int, item: Mapping[str, Any], count: int) -> Pooled:
    """The answer for one prompt, in the shape of that to a single request."""
    usage = {**(answer.get("usage") or {}), "prompt_tokens": count, "total_tokens": count}
    return Pooled({**answer, "id": f"{answer.get('id')}-{number}", "data": [{**item, "index": 0}], "usage": usage})
