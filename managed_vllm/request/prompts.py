"""Prompts and conversations as the methods take them, made into request fields: one or many, texts, ids, images."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from managed_vllm import forks
from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.messages import conversation

_UNCHANGED = "{{ messages[0]['content'] }}"
"""A chat template for a prompt that is text already, with the placeholders of its images in it."""


def as_conversations(messages: Any) -> tuple[Sequence[Any], bool]:
    """The conversations that `chat` is given, and whether it was a single one, not a list of them."""
    if isinstance(messages, str | bytes | Mapping):
        raise BadRequestError(
            "chat() takes a list of messages such as {'role': 'user', 'content': …}, or a list of such lists",
            field="messages",
        )
    messages = messages if isinstance(messages, Sequence) else list(messages)
    single = bool(messages) and isinstance(messages[0], Mapping)
    return ([messages] if single else messages), single


def as_prompts(prompts: Any) -> tuple[Sequence[Any], bool]:
    """The prompts that `generate` is given, and whether it was a single one, not a list of them."""
    prompts = _without_numpy(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts], True
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise BadRequestError(
            f"a prompt is a text, a list of token ids or a dict, not {type(prompts).__name__}", field="prompt"
        )
    each = prompts if isinstance(prompts, Sequence) else list(prompts)
    if len(each) and isinstance(each[0], int):
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
    prompt = _without_numpy(prompt)
    images: list[Any] | None = None
    if isinstance(prompt, Mapping):
        images = _images(prompt)
        text, tokens = prompt.get("prompt"), _without_numpy(prompt.get("prompt_token_ids"))
        if images:
            if not isinstance(text, str):
                raise UnsupportedParameterError(
                    "no route takes token ids and images; give the prompt as text", field="prompt_token_ids"
                )
            return {"prompt": text}, images
        prompt = text if tokens is None else tokens
    if isinstance(prompt, str):
        return {"prompt": prompt}, None
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and all(type(token) is int for token in prompt):
        return {"prompt": prompt if isinstance(prompt, list) else list(prompt)}, None
    raise BadRequestError(
        f"a prompt is a text, a list of token ids, or a dict with one of them, not {prompt!r:.80}", field="prompt"
    )


def _images(prompt: Mapping[str, Any]) -> list[Any] | None:
    unknown = sorted(prompt.keys() - {"prompt", "prompt_token_ids", "multi_modal_data"})
    if unknown:
        raise UnsupportedParameterError(f"a prompt's {unknown[0]!r} can't be passed on", field=unknown[0])
    media = prompt.get("multi_modal_data") or {}
    if other := sorted(media.keys() - {"image"}):
        raise UnsupportedParameterError(f"generate() passes on images; {other[0]!r} works in chat()", field=other[0])
    found = media.get("image")
    if found is None:
        return None
    return list(found) if isinstance(found, list | tuple) else [found]


def _without_numpy(value: Any) -> Any:
    """An array of numpy's, or a tensor of torch's, as a list."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


async def conversation_fields(messages: Any) -> dict[str, Any]:
    """The request field of one conversation. Pictures are read and encoded in threads."""
    if isinstance(messages, list | tuple) and not any(
        isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple) for message in messages
    ):
        return {"messages": conversation(messages)}
    loop = asyncio.get_running_loop()
    return {"messages": await loop.run_in_executor(_threads(), conversation, messages)}


async def fields_with_images(text: str, images: list[Any]) -> dict[str, Any]:
    """The request fields of one prompt with images, for the chat route."""
    content = [{"type": "text", "text": text}, *({"type": "image", "image": image} for image in images)]
    asked = await conversation_fields([{"role": "user", "content": content}])
    return {**asked, "chat_template": _UNCHANGED, "add_special_tokens": True, "max_tokens": 16}


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="managed-vllm-images")


forks.call_in_child(_threads.cache_clear)  # its threads stayed with the parent
