"""Prompts and conversations as the methods take them, made into request fields: one or many, texts, ids, images."""

from __future__ import annotations

import asyncio
import functools
import numbers
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from managed_vllm import forks
from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.arrays import token_ids, without_numpy
from managed_vllm.request.messages import conversation, is_message

_UNCHANGED = "{{ messages[0]['content'] }}"
"""A chat template for a prompt that is text already, with the placeholders of its images in it."""


def as_conversations(messages: Any) -> tuple[Sequence[Any], bool]:
    """The conversations that `chat` is given, and whether it was a single one, not a list of them."""
    if isinstance(messages, str | bytes | Mapping):
        raise BadRequestError(
            "chat() takes a list of messages such as {'role': 'user', 'content': …}, or a list of such lists",
            field="messages",
        )
    messages = without_numpy(messages)
    messages = messages if isinstance(messages, Sequence) else list(messages)
    single = bool(messages) and is_message(messages[0])
    return ([messages] if single else messages), single


def as_prompts(prompts: Any) -> tuple[Sequence[Any], bool]:
    """The prompts that `generate` is given, and whether it was a single one, not a list of them."""
    prompts = without_numpy(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts], True
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise BadRequestError(
            f"a prompt is a text, a list of token ids or a dict, not {type(prompts).__name__}", field="prompt"
        )
    each = prompts if isinstance(prompts, Sequence) else list(prompts)
    if len(each) and isinstance(each[0], numbers.Integral):
        return [each], True
    return each, False


def older_order(prompt_token_ids: Any, use_tqdm: Any, further: tuple[Any, ...]) -> tuple[Any, Any, tuple[Any, ...]]:
    """`prompt_token_ids`, `use_tqdm` and what follows by position: in older vLLM the first of them came third."""
    if isinstance(use_tqdm, bool) or callable(use_tqdm) or (use_tqdm is None and not further):
        return prompt_token_ids, use_tqdm or False, further
    return use_tqdm, bool(further and further[0]), further[1:]


def prompts_of(prompts: Any, prompt_token_ids: Any) -> Any:
    """What `generate` is given: its prompts, or token ids by the keyword of older vLLM.

    Raises `BadRequestError` for both, and for neither.
    """
    if (prompts is None) == (prompt_token_ids is None):
        given = "neither" if prompts is None else "both"
        raise BadRequestError(f"generate() takes prompts or prompt_token_ids; given are {given}", field="prompts")
    return prompt_token_ids if prompts is None else prompts


def as_score_inputs(data: Any, name: str) -> tuple[Sequence[Any], bool]:
    """The texts that `score` is given in one of its arguments (`name`), and whether it was one, not a list of them."""
    if isinstance(data, str | Mapping):
        return [data], True
    if isinstance(data, bytes) or not hasattr(data, "__iter__"):
        raise BadRequestError(f"{name} is a text or a list of texts, not {type(data).__name__}", field=name)
    return list(data), False


async def score_input(given: Any, name: str) -> Any:
    """One of them as the route takes it: a text, or a dict with `content`, whose images are read in threads."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping) or given.keys() != {"content"}:
        raise BadRequestError(
            f"{name} is a text, or a dict with content=[parts] as in a message, not {given!r:.80}", field=name
        )
    asked = await conversation_fields([{"role": "user", "content": given["content"]}])
    content = asked["messages"][0]["content"]
    return content if isinstance(content, str) else {"content": content}


def prompt_fields(prompt: Any) -> tuple[dict[str, Any], list[Any] | None]:
    """The request field of one prompt, and its images, if it has any."""
    prompt = without_numpy(prompt)
    fields: dict[str, Any] = {}
    if isinstance(prompt, Mapping):
        images, fields = _images(prompt), _fields_of(prompt)
        text, tokens = prompt.get("prompt"), without_numpy(prompt.get("prompt_token_ids"))
        if images:
            if not isinstance(text, str):
                raise UnsupportedParameterError(
                    "no route takes token ids and images; give the prompt as text", field="prompt_token_ids"
                )
            return {**fields, "prompt": text}, images
        if "mm_processor_kwargs" in fields:
            del fields["mm_processor_kwargs"]  # for images, and there are none
        prompt = text if tokens is None else tokens
    if isinstance(prompt, str):
        return {**fields, "prompt": prompt}, None
    if (ids := token_ids(prompt)) is not None:
        return {**fields, "prompt": ids}, None
    raise BadRequestError(
        f"a prompt is a text, a list of token ids, or a dict with one of them, not {prompt!r:.80}", field="prompt"
    )


_FIELDS = frozenset({"cache_salt", "mm_processor_kwargs"})
"""What a prompt may have that is a field of its request."""
_KEYS = _FIELDS | {"prompt", "prompt_token_ids", "multi_modal_data", "multi_modal_uuids"}


def _fields_of(prompt: Mapping[str, Any]) -> dict[str, Any]:
    for name in sorted(prompt.keys() - _KEYS):
        if prompt[name] is not None:
            raise UnsupportedParameterError(f"a prompt's {name!r} can't be passed on", field=name)
    return {name: prompt[name] for name in _FIELDS & prompt.keys() if prompt[name]}


def _images(prompt: Mapping[str, Any]) -> list[Any] | None:
    """The images of a prompt; with an id of their own (`multi_modal_uuids`) as parts of a message."""
    media = prompt.get("multi_modal_data") or {}
    if other := sorted(media.keys() - {"image"}):
        raise UnsupportedParameterError(f"generate() passes on images; {other[0]!r} works in chat()", field=other[0])
    found, uuids = media.get("image"), (prompt.get("multi_modal_uuids") or {}).get("image")
    if found is None:
        return None
    images = list(found) if isinstance(found, list | tuple) else [found]
    ids = list(uuids) if isinstance(uuids, list | tuple) else [uuids] * len(images)
    if len(ids) != len(images):
        raise BadRequestError(f"{len(images)} images but {len(ids)} multi_modal_uuids", field="multi_modal_uuids")
    parts = zip(images, ids, strict=True)
    return [{"type": "image", "image": one, **({} if its is None else {"uuid": its})} for one, its in parts]


async def conversation_fields(messages: Any) -> dict[str, Any]:
    """The request field of one conversation. Pictures are read and encoded in threads."""
    messages = without_numpy(messages)
    if isinstance(messages, list | tuple) and all(
        isinstance(message, Mapping) and isinstance(message.get("content"), str | None) for message in messages
    ):
        return {"messages": conversation(messages)}
    loop = asyncio.get_running_loop()
    return {"messages": await loop.run_in_executor(_threads(), conversation, messages)}


async def fields_with_images(text: str, images: list[Any]) -> dict[str, Any]:
    """The request fields of one prompt with images, for the chat route."""
    asked = await conversation_fields([{"role": "user", "content": [{"type": "text", "text": text}, *images]}])
    return {**asked, "chat_template": _UNCHANGED, "add_special_tokens": True}


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="managed-vllm-images")


forks.call_in_child(_threads.cache_clear)  # its threads stayed with the parent
