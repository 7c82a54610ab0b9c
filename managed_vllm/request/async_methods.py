"""The asynchronous methods for requests, which `AsyncVLLMClient` has: the one implementation of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from typing import Any, Unpack

from managed_vllm.errors import UnsupportedParameterError
from managed_vllm.request.arguments import (
    CHAT_POSITIONAL,
    GENERATE_POSITIONAL,
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
from managed_vllm.request.async_engine import AsyncEngineMethods
from managed_vllm.request.async_pooling import AsyncPoolingMethods
from managed_vllm.request.async_requests import deadline_of
from managed_vllm.request.batches import named
from managed_vllm.request.bounds import checked_timeout
from managed_vllm.request.calls import Call
from managed_vllm.request.fields import by_name
from managed_vllm.request.http_errors import checked_shape
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.request.prompts import as_conversations, as_prompts, conversation_fields, older_order, prompts_of


class AsyncRequestMethods(AsyncPoolingMethods, AsyncEngineMethods):
    """Requests to one server. `RequestMethods` documents each in full.

    Args:
        sender: sends them.
        instance: returns the server's short id, for errors.
        load_adapter: loads adapters on their first use; None: the server must have them.
    """

    # -- generating ----------------------------------------------------------------------------------------------------

    @names_fields(ChatFields, positional=CHAT_POSITIONAL)
    async def chat(
        self,
        /,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: ProgressBar = False,
        *further: Any,
        timeout: float | None = None,
        request_timeout: float | None = None,
        resume: bool | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[ChatFields],
    ) -> list[RequestOutput]:
        """Answers one conversation or many: one output each, in input order. See `RequestMethods.chat`."""
        conversations, single = as_conversations(messages)
        named_fields = by_name("chat", CHAT_POSITIONAL, further, fields)
        deadline, limit_s = deadline_of(timeout), checked_timeout("request_timeout", request_timeout)
        named_fields = await self._with_adapters(named_fields, len(conversations), timeout)
        call = Call(self.sender, len(conversations), sampling_params, named_fields, extra_body)
        await call.look_up(chat=True, deadline=deadline)
        call.check(chat=True)

        def one(index: int) -> Awaitable[RequestOutput]:
            conversation = conversations[index]
            return call.answer_conversation(index, conversation, deadline, resume=resume, timeout_s=limit_s)

        return await self._batch(one, len(conversations), single, return_exceptions, use_tqdm, deadline=deadline)

    @names_fields(CompletionFields, positional=GENERATE_POSITIONAL)
    async def generate(
        self,
        /,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: ProgressBar = False,
        *further: Any,
        prompt_token_ids: Iterable[int] | Iterable[Iterable[int]] | None = None,
        timeout: float | None = None,
        request_timeout: float | None = None,
        resume: bool | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[CompletionFields],
    ) -> list[RequestOutput]:
        """Completes one prompt or many: one output each, in input order. See `RequestMethods.generate`."""
        prompt_token_ids, use_tqdm, further = older_order(prompt_token_ids, use_tqdm, further)
        each, single = as_prompts(prompts_of(prompts, prompt_token_ids))
        named_fields = by_name("generate", GENERATE_POSITIONAL, further, fields)
        deadline, limit_s = deadline_of(timeout), checked_timeout("request_timeout", request_timeout)
        named_fields = await self._with_adapters(named_fields, len(each), timeout)
        call = Call(self.sender, len(each), sampling_params, named_fields, extra_body)
        await call.look_up(chat=False, deadline=deadline, prompts=each)
        call.check(chat=False)

        def one(index: int) -> Awaitable[RequestOutput]:
            return call.complete_prompt(index, each[index], deadline, resume=resume, timeout_s=limit_s)

        return await self._batch(one, len(each), single, return_exceptions, use_tqdm, deadline=deadline)

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
        deadline = deadline_of(timeout)
        call = Call(self.sender, 1, sampling_params, await self._with_adapters(fields, 1, timeout), extra_body)
        await call.look_up(chat=chat, deadline=deadline)
        async with contextlib.aclosing(call.stream(prompt, deadline, chat=chat)) as outputs:
            with named(None, self._instance):
                async for output in outputs:
                    yield output

    # -- tokens --------------------------------------------------------------------------------------------------------

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
            answer, _ = await self._request("/tokenize", {**asked, **fields}, "tokens", deadline_of(timeout))
            with checked_shape(answer):
                return [int(token) for token in answer["tokens"]]

    async def detokenize(self, /, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids, special tokens included. See `RequestMethods.detokenize`."""
        body = {"tokens": [int(token) for token in token_ids]}
        with named(None, self._instance):
            answer, _ = await self._request("/detokenize", body, "prompt", deadline_of(timeout))
            with checked_shape(answer):
                if not isinstance(answer["prompt"], str):
                    raise TypeError("the text is none")
                return answer["prompt"]
