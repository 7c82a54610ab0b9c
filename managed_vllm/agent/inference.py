"""Asking the model for the next answer of an episode: the messages as they are recorded and sent, and what comes back.

`prompt_of` builds the messages, `sample` sends them. What a server says is exact, or an error: token ids and logprobs
are those that it sampled, and nothing is ever tokenized anew.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from managed_vllm import forks
from managed_vllm.agent.bounded import Deadline
from managed_vllm.agent.format import PictureParser
from managed_vllm.agent.prompting import History, images_of
from managed_vllm.agent.rules import Rules
from managed_vllm.agent.types import ImageRef, Message
from managed_vllm.errors import RequestError, RequestTimeoutError
from managed_vllm.request.images import Image
from managed_vllm.request.outputs import RequestOutput

UNNAMED = "default"
"""What vLLM calls weights that nobody has given a version."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The messages of a request, twice.

    Attributes:
        recorded: with an `ImageRef` in the place of each image.
        sent: with the images' files.
    """

    recorded: list[Message]
    sent: list[Message]


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answer.

    Attributes:
        output: what the server said.
        token_ids: as sampled.
        logprobs: of these tokens, one each; None if they are not exact.
        queue_s: seconds before the request was sent: at the gate, and waiting for a place.
        weight_version: of the weights that sampled the last token; None if nobody told.
    """

    output: RequestOutput
    token_ids: list[int]
    logprobs: list[float] | None
    queue_s: float
    weight_version: str | None


async def prompt_of(rules: Rules, history: History) -> Prompt:
    """The messages that the format builds. Raises what the builder raises, or what its images are to blame for."""
    prompt = Prompt([], [])
    for message in rules.agent.build_messages(history):
        content = message.get("content")
        if not isinstance(content, list | tuple):
            prompt.recorded.append(dict(message))
            prompt.sent.append(message)
            continue
        parts = [await _part(rules, part) for part in content]
        prompt.recorded.append({**message, "content": [recorded for recorded, _ in parts]})
        prompt.sent.append({**message, "content": [sent for _, sent in parts]})
    return prompt


async def sample(
    rules: Rules,
    prompt: Prompt,
    *,
    deadline: Deadline,
    tokens_so_far: int,
    session: str,
    temperature: float | None = None,
) -> Sampled:
    """The model's answer, once the gate is open; the time at the gate does not count for the deadline.

    `session`: of the episode, so that one of several servers answers all of it. `temperature`: another one than the
    sampling parameters say.

    Raises what the client raises, `RequestError`: the server does not tell ids or logprobs, and `ConfigError`: it
    resizes screenshots otherwise than the parser thinks (`pictures`).
    """
    images = len(images_of(prompt.recorded))
    if images and rules.exact:  # another server than vLLM may refuse what the look ahead asks for
        await rules.preflight.check(rules.client, max(images, rules.limits.max_images))
    async with rules.gate.passed() as waited:
        deadline.put_off(waited)
        version = rules.weight_version()
        began = time.monotonic()
        output = await _chat(rules, prompt.sent, deadline, tokens_so_far, session, temperature)
        version = _version_of(output, version)
        took = time.monotonic() - began
    ids, logprobs = exact(output) if rules.exact else (list(output.outputs[0].token_ids), None)
    parser = rules.agent.parse
    if isinstance(parser, PictureParser) and parser.reads_pictures:
        refs = [part["image"] for part in images_of(prompt.recorded) if isinstance(part.get("image"), ImageRef)]
        rules.pictures.look(parser, refs if len(refs) == images else (), output.prompt_token_ids)
    return Sampled(output, ids, logprobs, waited + max(0.0, took - output.latency), version)


async def _chat(
    rules: Rules,
    messages: Sequence[Message],
    deadline: Deadline,
    tokens_so_far: int,
    session: str,
    temperature: float | None,
) -> RequestOutput:
    limits, params = rules.limits, rules.params
    if temperature is not None:
        params = params.with_({"temperature": temperature})
    bounds = [limits.max_response_tokens, params.max_tokens]
    if limits.max_episode_tokens is not None:
        bounds.append(limits.max_episode_tokens - tokens_so_far)
    most = min((bound for bound in bounds if bound is not None), default=None)
    if most is not None:
        params = params.with_({"max_tokens": most})
    bounds_s = [each for each in (limits.generate_timeout_s, deadline.left_s()) if each is not None]
    fields = dict(rules.agent.request)
    if rules.exact:
        fields.setdefault("session_id", session)
    else:
        # Another server than vLLM may refuse fields that it does not know.
        not_asked = dict.fromkeys({"top_k", "min_p", "repetition_penalty"} - params.given)
        fields["extra_body"] = {"return_token_ids": None, **not_asked, **(fields.get("extra_body") or {})}
        fields["resume"] = False
    seconds = min(bounds_s, default=None)
    try:
        async with rules.gate.limited(seconds) as limit:
            outputs = await rules.client.chat(messages, params, **fields)
        return outputs[0]
    except TimeoutError as error:
        if not limit.timeout.expired():
            raise
        raise RequestTimeoutError(f"no answer within {seconds:g} s") from error
    finally:
        deadline.put_off(limit.held_s)


def _version_of(output: RequestOutput, told: str | None) -> str | None:
    """What the server says, exact; what we were `told` where it says nothing, or that nobody has named its weights."""
    version = output.outputs[0].weight_version
    return told or version if version in (None, UNNAMED) else version


def exact(output: RequestOutput) -> tuple[list[int], list[float]]:
    """The sampled token ids and their logprobs, as the server told them. Raises `RequestError` if it did not."""
    answer = output.outputs[0]
    ids = list(answer.token_ids)
    if not output.prompt_token_ids or (answer.text and not ids):
        raise RequestError(
            "the server does not tell token ids (vLLM does since 0.10.2), and rollouts are never tokenized anew; to "
            "evaluate a model on such a server without them: exact=False"
        )
    places = answer.logprobs
    if places is None or len(places) != len(ids):
        found = "none" if places is None else str(len(places))
        raise RequestError(
            f"the server told {found} logprobs for {len(ids)} tokens; to evaluate a model on such a server without "
            "them: exact=False"
        )
    return ids, [place[token].logprob for token, place in zip(ids, places, strict=True)]


# -- images ------------------------------------------------------------------------------------------------------------


async def _part(rules: Rules, part: Any) -> tuple[Any, Any]:
    """A part of a message as it is recorded, and as it is sent."""
    if not images_of([{"content": [part]}]):
        return part, part
    source = part
    if isinstance(part, Mapping):
        source = part.get("image", part.get("image_url", part.get("image_pil")))
        if isinstance(source, Mapping):
            source = source.get("url")
        if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
            return part, part  # the server fetches it
    if not isinstance(source, ImageRef):
        image = await _in_thread(Image.of, source)
        source = await keep_image(rules, image.data)
    return {"type": "image", "image": source}, {"type": "image", "image": rules.images.load(source)}


async def keep_image(rules: Rules, data: bytes) -> ImageRef:
    """Puts an image file into the store, in a thread. Raises what `ImageStore.put` raises."""
    ref: ImageRef = await _in_thread(rules.images.put, data)
    return ref


async def _in_thread(function: Any, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_image_threads(), function, *arguments)


@functools.cache
def _image_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="managed-vllm-screenshots")


forks.call_in_child(_image_threads.cache_clear)  # its threads stayed with the parent
