"""One request of an agent: what is sent in its place, what the agent sees of the answer, and the steps that it makes.

What must hold:

1. The agent sees what the server would have told it without us: fields that it did not ask for are taken out.
2. A step has the ids and logprobs of the server's own answer. A request with several answers (`n`, several prompts)
   makes one step of each.
3. An image of a message stands in the record as its `ImageRef`, the file as it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.prompting import images_of
from managed_vllm.agent.types import ImageRef, Message, Step, StepTimings
from managed_vllm.errors import BadRequestError
from managed_vllm.request.images import Image
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.relayed_answers import RelayedAnswer

ROUTES = {"/chat/completions": True, "/completions": False}
"""Those that are recorded, and whether they are for chats."""
_NOT_RECORDED = frozenset(
    {
        "messages",
        "prompt",
        "model",
        "stream",
        "stream_options",
        "session_id",
        "return_token_ids",
        "return_weight_versions",
    }
)
"""Fields of a request that the record has elsewhere, or that say nothing of how tokens are sampled."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A request of an agent.

    Attributes:
        chat: which of the two routes it is for.
        asked: its body, as the agent sent it.
        sent: the body that the server gets.
        messages: as they are recorded.
    """

    chat: bool
    asked: Mapping[str, Any]
    sent: Mapping[str, Any]
    messages: Sequence[Message] = field(repr=False)

    @classmethod
    def of(cls, route: str, asked: Mapping[str, Any], session: str, images: ImageStore) -> Turn:
        """Puts the images of its messages into the store, which may block. Raises `RunStoreError`."""
        chat = ROUTES[route]
        sent = {**asked, "return_token_ids": True, "return_weight_versions": True}
        if chat:
            sent["logprobs"] = True
        elif asked.get("logprobs") is None:
            sent["logprobs"] = 0  # of the sampled token alone
        sent.setdefault("session_id", session)
        return cls(chat, asked, sent, tuple(_messages_of(asked, images)))

    @property
    def settings(self) -> dict[str, Any]:
        """How it samples: the fields of the request that are neither the prompt nor the way of transport."""
        return {name: value for name, value in self.asked.items() if name not in _NOT_RECORDED}

    # -- what the agent sees -------------------------------------------------------------------------------------------

    def shown(self, response: dict[str, Any]) -> dict[str, Any]:
        """The response, or an event of a stream, as if only the agent had asked; changed in place."""
        if not self.asked.get("return_token_ids"):
            _hide(response, "prompt_token_ids")
        for choice in response.get("choices") or ():
            if not self.asked.get("return_token_ids"):
                _hide(choice, "token_ids")
                _hide(choice, "prompt_token_ids")
            if not self.asked.get("return_weight_versions"):
                choice.pop("weight_versions", None)
            if not self._wants_logprobs and "logprobs" in choice:
                choice["logprobs"] = None
        return response

    @property
    def _wants_logprobs(self) -> bool:
        given = self.asked.get("logprobs")
        return bool(given) if self.chat else given is not None

    # -- what is recorded ----------------------------------------------------------------------------------------------

    def steps(self, answers: Sequence[RelayedAnswer], stats: RequestStats, first: int, **info: Any) -> list[Step]:
        """A step for each of its answers, from the index `first` on."""
        parts = [part for part in images_of(self.messages) if isinstance(part, Mapping)]
        shots = [part["image"] for part in parts if isinstance(part.get("image"), ImageRef)]
        several = len(answers) > 1
        return [
            Step(
                index=first + place,
                screenshot=shots[-1] if shots else None,
                messages=self.messages,
                prompt_token_ids=answer.prompt_token_ids,
                response=answer.text,
                response_token_ids=answer.token_ids,
                response_logprobs=answer.logprobs,
                finish_reason=answer.finish_reason or "abort",
                info={
                    **({"choice": answer.index, "choices": len(answers)} if several else {}),
                    **({"tool_calls": answer.tool_calls} if answer.tool_calls else {}),
                    **({"reasoning": answer.reasoning} if answer.reasoning else {}),
                    **info,
                },
                timings=StepTimings(started_at=stats.started_at, model_s=stats.latency, total_s=stats.latency),
                model=str(self.asked.get("model") or stats.model),
                epoch=stats.epoch,
                attempts=stats.attempts,
                weight_version=answer.weight_versions[-1][0] if answer.weight_versions else None,
                weight_versions=answer.weight_versions if len(answer.weight_versions) > 1 else (),
            )
            for place, answer in enumerate(answers)
        ]


def _hide(holder: dict[str, Any], name: str) -> None:
    """vLLM names what was not asked for, with null, in whole responses only; null says as little in both."""
    if holder.get(name) is not None:
        holder[name] = None


# -- messages ----------------------------------------------------------------------------------------------------------


def _messages_of(asked: Mapping[str, Any], images: ImageStore) -> list[Message]:
    prompt = asked.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = asked.get("messages")
    if not isinstance(messages, list):
        return []  # the server refuses it, or the prompt is token ids
    return [_recorded(message, images) for message in messages if isinstance(message, Mapping)]


def _recorded(message: Mapping[str, Any], images: ImageStore) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_part(part, images) for part in content]}


def _part(part: Any, images: ImageStore) -> Any:
    """A part of a message with its image in the store; one that is no image that we know stays as it is."""
    source = part.get("image_url") if isinstance(part, Mapping) else None
    url = source.get("url") if isinstance(source, Mapping) else source
    if not isinstance(url, str) or url[:5].lower() != "data:":
        return part
    try:
        return {"type": "image", "image": images.put(Image.of(url).data)}
    except BadRequestError:
        return part


def decoded(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises `ValueError`."""
    found = msgspec.json.decode(body)
    if not isinstance(found, dict):
        raise ValueError("the body is no JSON object")
    return found
