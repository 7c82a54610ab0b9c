"""Conversations as callers write them, made into `"messages"` of `/v1/chat/completions`.

Programs give images in different ways: OpenAI's `image_url`, `image` of Hugging Face's chat templates, `image_pil` of
vLLM's own `LLM.chat`, or the picture itself in the list. `conversation` takes all of them and changes nothing else:
texts, other parts, other keys and their order stay as they are, and the caller's objects are not modified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from managed_vllm.errors import BadRequestError
from managed_vllm.request.arrays import without_numpy
from managed_vllm.request.images import Image, ImagePart

_KEYS: Mapping[str, tuple[str, ...]] = {
    "image_url": ("image_url",),
    "image": ("image", "url", "path"),
    "image_pil": ("image_pil",),
}
"""Types of parts that carry an image, and the keys under which it may be."""
_FETCHED_BY_SERVER = ("http://", "https://")


def conversation(messages: Any) -> list[dict[str, Any]]:
    """One conversation, checked, with an `ImagePart` in the place of each part that carries an image.

    `messages` is a sequence of mappings with a `role`. The items of a `content` that is a list may be

    - texts, and mappings of the type `text`;
    - mappings of the type `image_url` (the value, or `url` in the value), `image` (`image`, `url` or `path`) or
      `image_pil`, where the image is anything that `Image.of` takes, or an http(s) URL, which the server fetches;
    - images themselves, but not as text;
    - mappings of any other type (`input_audio`, `video_url`, …), which are passed on.

    A part's own `uuid` becomes the image's id; beside one, an `image_url` that is None is passed on.

    Files are read and pictures are encoded here, which takes 50 ms for a new one of Pillow's.

    Raises `BadRequestError` (field "messages") that names the message and the part: `messages[2].content[0]: …`.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Sequence):
        raise _wrong("messages", f"is a list of mappings with role and content, not {_what(messages)}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def is_message(given: Any) -> bool:
    """Whether it is one message: a mapping, or an object of the OpenAI SDK's."""
    return isinstance(given, Mapping) or hasattr(given, "model_dump")


def _message(message: Any, place: str) -> dict[str, Any]:
    if hasattr(message, "model_dump"):  # pydantic's: what the OpenAI SDK returns
        message = message.model_dump(exclude_none=True)
    if not isinstance(message, Mapping):
        raise _wrong(place, f"is a mapping with role and content, not {_what(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _wrong(place, f"has no role, such as 'user' ({_what(role)})" if "role" in message else "has no role")
    found = dict(message)
    if found.get("tool_calls"):
        found["tool_calls"] = [_tool_call(call) for call in found["tool_calls"]]
    content = without_numpy(message.get("content"))
    if content is None and "content" in message and role != "assistant":
        found["content"] = []  # as `vllm.LLM` takes it; the route takes None of assistants only
    if content is None or isinstance(content, str):
        return found
    if not isinstance(content, list | tuple):
        raise _wrong(f"{place}.content", f"is a text or a list of parts, not {_what(content)}; put an image in a list")
    found["content"] = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
    return found


def _tool_call(call: Any) -> Any:
    """With its arguments as text: chat templates take dicts, so scripts keep them; the route takes JSON."""
    if hasattr(call, "model_dump"):
        call = call.model_dump(exclude_none=True)
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _part(part: Any, place: str) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, ImagePart):
        return part
    if not isinstance(part, Mapping):
        return ImagePart(_image(part, place))
    kind = part.get("type")
    if kind is None and "image_url" in part:  # as vLLM takes it
        kind = "image_url"
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _wrong(place, f"has no text ({_what(part.get('text'))})")
        return dict(part)
    if not isinstance(kind, str):
        raise _wrong(place, "has no type, such as 'text' or 'image_url'")
    if kind not in _KEYS:
        return dict(part)
    return _image_part(part, kind, place)


def _image_part(part: Mapping[str, Any], kind: str, place: str) -> Any:
    key = next((key for key in _KEYS[kind] if key in part), None)
    if key is None:
        raise _wrong(place, f"is of the type {kind!r} but has no {' or '.join(map(repr, _KEYS[kind]))}")
    given = part[key]
    inner = given if isinstance(given, Mapping) else {}
    source = inner.get("url") if isinstance(given, Mapping) else given
    uuid = part.get("uuid")
    if uuid is not None and (not isinstance(uuid, str) or not uuid):
        raise _wrong(place, f"has a uuid that is no text ({_what(uuid)})")
    if source is None:
        if uuid is None:
            raise _wrong(place, f"has no image in {key!r}")
        return dict(part)
    fetched = isinstance(source, str) and source[:8].lower().startswith(_FETCHED_BY_SERVER)
    if fetched and key == "image_url":
        return dict(part)
    detail = inner.get("detail", part.get("detail"))
    extra = {name: value for name, value in part.items() if name not in (key, "type", "uuid", "detail")}
    if fetched:
        url = {"url": source} if detail is None else {"url": source, "detail": detail}
        return {"type": "image_url", "image_url": url, **({} if uuid is None else {"uuid": uuid}), **extra}
    if detail is not None and not isinstance(detail, str):
        raise _wrong(place, f"has a detail that is no text ({_what(detail)})")
    return ImagePart(_image(source, place), uuid, detail, extra)


def _image(source: Any, place: str) -> Image:
    try:
        return Image.of(source)
    except BadRequestError as error:
        raise _wrong(place, error.message) from error


def _wrong(place: str, what: str) -> BadRequestError:
    return BadRequestError(f"{place}: {what}" if place.endswith("]") else f"{place} {what}", field="messages")


def _what(value: Any) -> str:
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.80}"
    return os.path.basename(type(value).__name__)
