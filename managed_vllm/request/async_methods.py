"""The asynchronous methods for requests, which `AsyncVLLMClient` has: the one implementation of all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, Unpack

from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.arguments import (
    ChatFields,
    CompletionFields,
    Conversation,
    Params,
    ProgressBar,
    Prompt,
    StreamFields,
    TokenizeFields,
    names_fields,
    names_of,
)
from managed_vllm.request.attempts import Sender
from managed_vllm.request.batches import named, run_batch
from managed_vllm.request.calls import Call, checked_shape
from managed_vllm.request.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from managed_vllm.request.pending import JSONRequest, RequestStats
from managed_vllm.request.prompts import as_conversations, as_prompts, conversation_fields, prompt_fields

T = TypeVar("T")


class AsyncRequestMethods:
    """Requests to one server. `RequestMethods` documents each in full.

    Args:
        sender: sends them.
        instance: returns the server's short id, for errors.
    """

    def __init__(self, sender: Sender, instance: Callable[[], str | None]) -> None:
        self.sender = sender
        self._instance = instance

    # -- generating ----------------------------------------------------------------------------------------------------

    @names_fields(ChatFields)
    async def chat(
        self,
        /,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: ProgressBar = False,
        *,
        timeout: float | None = None,
        request_timeout: float | None = None,
        resume: bool | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[ChatFields],
    ) -> list[RequestOutput]:
        """Answers one conversation or many: one output each, in input order. See `RequestMethods.chat`."""
        conversations, single = as_conversations(messages)
        call = Call(self.sender, len(conversations), sampling_params, fields, extra_body)
        call.check(chat=True)
        deadline = _deadline(timeout)

        def one(index: int) -> Awaitable[RequestOutput]:
            conversation = conversations[index]
            return call.answer_conversation(index, conversation, deadline, resume=resume, timeout_s=request_timeout)

        return await self._batch(one, len(conversations), single, return_exceptions, use_tqdm)

    @names_fields(CompletionFields)
    async def generate(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: ProgressBar = False,
        *,
        timeout: float | None = None,
        request_timeout: float | None = None,
        resume: bool | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[CompletionFields],
    ) -> list[RequestOutput]:
        """Completes one prompt or many: one output each, in input order. See `RequestMethods.generate`."""
        each, single = as_prompts(prompts)
        call = Call(self.sender, len(each), sampling_params, fields, extra_body)
        call.check(chat=False)
        deadline = _deadline(timeout)

        def one(index: int) -> Awaitable[RequestOutput]:
            return call.complete_prompt(index, each[index], deadline, resume=resume, timeout_s=request_timeout)

        return await self._batch(one, len(each), single, return_exceptions, use_tqdm)

    @names_fields(ChatFields)
    async def generate_with_messages(
        self,
        /,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params | Sequence[Params] | None = None,
        processor: object = None,
        use_tqdm: ProgressBar = False,
        *,
        timeout: float | None = None,
        request_timeout: float | None = None,
        resume: bool | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[ChatFields],
    ) -> list[RequestOutput]:
        """`chat`, with the arguments of the service scripts; `processor` is ignored."""
        return await self.chat(
            messages,
            sampling_params,
            use_tqdm,
            timeout=timeout,
            request_timeout=request_timeout,
            resume=resume,
            return_exceptions=return_exceptions,
            extra_body=extra_body,
            **fields,
        )

    @names_fields(StreamFields)
    async def stream(
        self,
        /,
        prompt: Prompt | Conversation,
        sampling_params: Params | None = None,
        *,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[StreamFields],
    ) -> AsyncIterator[RequestOutput]:
        """Answers one prompt or one conversation piece by piece. See `RequestMethods.stream`.

        A reader that stops early closes the iterator (`aclose`), or leaves it to the garbage collector: the server then
        stops generating.
        """
        chat = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
        call = Call(self.sender, 1, sampling_params, fields, extra_body)
        async with contextlib.aclosing(call.stream(prompt, _deadline(timeout), chat=chat)) as outputs:
            with named(None, self._instance):
                async for output in outputs:
                    yield output

    # -- other tasks ---------------------------------------------------------------------------------------------------

    async def embed(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        use_tqdm: ProgressBar = False,
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt. See `RequestMethods.embed`."""
        each, single = as_prompts(prompts)
        deadline = _deadline(timeout)

        async def one(index: int) -> EmbeddingRequestOutput:
            asked, images = prompt_fields(each[index])
            if images is not None:
                raise UnsupportedParameterError("embed() takes texts and token ids", field="multi_modal_data")
            body = {"input": asked["prompt"], "encoding_format": "float", **(extra_body or {})}
            answer, stats = await self._request("/v1/embeddings", body, "data", deadline)
            with checked_shape(answer):
                vector = [float(value) for value in answer["data"][0]["embedding"]]
                return EmbeddingRequestOutput.of(answer, EmbeddingOutput(vector), stats)

        return await self._batch(one, len(each), single, return_exceptions, use_tqdm)

    async def score(
        self,
        /,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        use_tqdm: ProgressBar = False,
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well pairs of texts fit. See `RequestMethods.score`."""
        second = [data_2] if isinstance(data_2, str) else list(data_2)
        first = [data_1] * len(second) if isinstance(data_1, str) else list(data_1)
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            raise BadRequestError(f"{len(first)} texts can't be paired with {len(second)}", field="data_1")
        deadline = _deadline(timeout)

        async def one(index: int) -> ScoringRequestOutput:
            body = {"text_1": first[index], "text_2": second[index], **(extra_body or {})}
            answer, stats = await self._request("/score", body, "data", deadline)
            with checked_shape(answer):
                return ScoringRequestOutput.of(answer, ScoringOutput(float(answer["data"][0]["score"])), stats)

        single = isinstance(data_1, str) and isinstance(data_2, str)
        return await self._batch(one, len(second), single, return_exceptions, use_tqdm)

    @names_fields(TokenizeFields)
    async def tokenize(
        self,
        /,
        prompt: str | Conversation,
        *,
        timeout: float | None = None,
        **fields: Unpack[TokenizeFields],
    ) -> list[int]:
        """The token ids of a text, or of a conversation. See `RequestMethods.tokenize`."""
        known = names_of(TokenizeFields) if not isinstance(prompt, str) else {"add_special_tokens"}
        for name in fields.keys() - known:
            raise UnsupportedParameterError(f"tokenize() has no {name}=", field=name)
        asked = {"prompt": prompt} if isinstance(prompt, str) else await conversation_fields(prompt)
        with named(None, self._instance):
            answer, _ = await self._request("/tokenize", {**asked, **fields}, "tokens", _deadline(timeout))
            with checked_shape(answer):
                return [int(token) for token in answer["tokens"]]

    async def detokenize(self, /, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids, special tokens included. See `RequestMethods.detokenize`."""
        body = {"tokens": [int(token) for token in token_ids]}
        with named(None, self._instance):
            answer, _ = await self._request("/detokenize", body, "prompt", _deadline(timeout))
            with checked_shape(answer):
                if not isinstance(answer["prompt"], str):
                    raise TypeError("the text is none")
                return answer["prompt"]

    # -- what they share -----------------------------------------------------------------------------------------------

    async def _request(
        self, path: str, body: dict[str, Any], key: str, deadline: float | None
    ) -> tuple[Mapping[str, Any], RequestStats]:
        """A whole response, which has `key`, and how it was served."""
        request = JSONRequest(path, body, key)
        stats = await self.sender.send(request, deadline)
        return request.answer(), stats

    async def _batch(
        self,
        one: Callable[[int], Awaitable[T]],
        count: int,
        single: bool,
        return_exceptions: bool,
        use_tqdm: ProgressBar,
    ) -> list[T]:
        return await run_batch(
            one,
            count,
            single=single,
            at_once=self.sender.max_in_flight,
            return_exceptions=return_exceptions,
            use_tqdm=use_tqdm,
            instance=self._instance,
        )


def _deadline(timeout_s: float | None) -> float | None:
    """On the monotonic clock."""
    return None if timeout_s is None else time.monotonic() + timeout_s
