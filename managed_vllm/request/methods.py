"""The synchronous methods for requests, which `ManagedVLLM` and `VLLMClient` share: `chat`, `generate`, `stream` …

`RequestMethods` holds their signatures and documentation. Each waits for the method of the same name and signature of
`AsyncRequestMethods`, which has the one implementation.

Imports nothing beyond the standard library: `ManagedVLLM` derives from it, and has to be imported within milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from managed_vllm.request import portal
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
)
from managed_vllm.request.engine_methods import EngineMethods
from managed_vllm.request.pooling_methods import PoolingMethods

if TYPE_CHECKING:
    from managed_vllm.request.async_methods import AsyncRequestMethods
    from managed_vllm.request.outputs import RequestOutput


class RequestMethods(PoolingMethods, EngineMethods):
    """Requests to one server. What is documented for `chat` holds for all of them."""

    @property
    def async_client(self) -> AsyncRequestMethods:
        """The same methods for asyncio: `await llm.async_client.chat(…)`."""
        raise NotImplementedError

    @names_fields(ChatFields, positional=CHAT_POSITIONAL)
    def chat(
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
        """Answers one conversation (a list of messages) or many (a list of lists): one output each, in input order.

        Args:
            messages: one conversation, or a list of them. Images may be PIL images, bytes, paths, data: or http(s)
                URLs, in parts of the type `image_url`, `image` or `image_pil`.
            sampling_params: `SamplingParams`, a dict or a `vllm.SamplingParams`; one for all, or a list with one each.
                What they leave out has vLLM's default, `max_tokens=16` too. None: the model's own generation config,
                and 16 tokens.
            use_tqdm: whether to show a progress bar, or a function that makes one in place of `tqdm.auto.tqdm`. What
                `vllm.LLM` takes by position behind it is taken so, too.
            timeout: seconds for the whole call. None: no limit, so the call ends only with an answer or an error.
            request_timeout: seconds for each request, from the moment when it may be sent (`max_in_flight`).
            resume: whether tokens are kept when their server is lost, so that only the rest is generated again. None:
                where possible, if `max_tokens` is None or at least 1,024 (`request.resume.RESUME_FROM`). True: a
                `BadRequestError` says why where it is not possible. False: never.
            return_exceptions: put the error of a failed request in its place in the list. Otherwise the first error is
                raised once all requests are done, with the outcome of each in its `results`.
            extra_body: fields for the request body that are sent unchecked: those of a plugin, or of another version.
            **fields: fields of the request body, such as `tools=…` or `chat_template_kwargs=…`; each is listed in the
                signature, docs/parameters.md has more about them. An unknown name is an `UnsupportedParameterError`:
                vLLM would ignore it.

        A generation can't be resumed, and starts over after a loss, with several answers (`n`), images, tools,
        structured outputs, stop strings, `bad_words`, presence or frequency penalty, prompt logprobs, a `seed`
        unless the temperature is 0, a field that this library doesn't know, or a server that parses reasoning or tool
        calls. With temperature 0 a resumed answer equals an uninterrupted one, as far as the server itself gives equal
        answers to equal requests; after the cut the `decoded_token` of logprobs is missing. With `max_tokens=None`, a
        limit from the model's generation config (`max_new_tokens`) starts over after a loss.

        Cancelling or interrupting the call closes its connections; vLLM then stops generating.

        Raises:
            BadRequestError: a wrong argument or request; below it `ContextLengthError`, `ModelNotFoundError`,
                `UnsupportedParameterError`.
            AuthenticationError: the server wants another API key.
            RequestTimeoutError: the time ran out.
            ServerDiedError: the answer was lost more often than `RetryPolicy` allows.
            ServerBusyError: the server refused the request more often than that.
            StartupError, ServerStoppedError: a server of ours failed for good, or was stopped.
        """
        return portal.run(
            lambda: self.async_client.chat(
                messages,
                sampling_params,
                use_tqdm,
                *further,
                timeout=timeout,
                request_timeout=request_timeout,
                resume=resume,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
                **fields,
            )
        )

    @names_fields(CompletionFields, positional=GENERATE_POSITIONAL)
    def generate(
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
        """Completes one prompt or many: one output each, in input order.

        Args:
            prompts: one prompt, or a list of them. A prompt is a text, a list of token ids, or a dict with `prompt` or
                `prompt_token_ids`, as for `vllm.LLM`. Beside a text, the dict may have `multi_modal_data={"image": …}`
                with one image or a list. The text holds the model's own placeholders for them; without any, they are
                put before it. Such a prompt goes through the chat route with a template that changes nothing, so the
                server must be started with `--trust-request-chat-template`.
            sampling_params: as for `chat`. Without `max_tokens`, 16 tokens are generated, as vLLM does.
            use_tqdm: as for `chat`, and so are all other arguments.
            prompt_token_ids: in place of `prompts`, as for older vLLM (there also the third argument by position).

        Raises what `chat` raises.
        """
        return portal.run(
            lambda: self.async_client.generate(
                prompts,
                sampling_params,
                use_tqdm,
                *further,
                prompt_token_ids=prompt_token_ids,
                timeout=timeout,
                request_timeout=request_timeout,
                resume=resume,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
                **fields,
            )
        )

    @names_fields(ChatFields)
    def generate_with_messages(
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
        """`chat`, with the arguments of the service scripts.

        Args:
            messages: as for `chat`, and so are all other arguments but the next.
            processor: ignored; the server has its own.
        """
        return portal.run(
            lambda: self.async_client.generate_with_messages(
                messages,
                sampling_params,
                processor,
                use_tqdm,
                timeout=timeout,
                request_timeout=request_timeout,
                resume=resume,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
                **fields,
            )
        )

    @names_fields(StreamFields)
    def stream(
        self,
        /,
        prompt: Prompt | Conversation,
        sampling_params: Params | None = None,
        *,
        timeout: float | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Unpack[StreamFields],
    ) -> Iterator[RequestOutput]:
        """Answers one prompt or one conversation piece by piece.

        Each output holds what is new; joined, their texts and token ids are those of `generate` or `chat`. The last
        one is `finished`, and has epoch, attempts, times, the reason for the end, and tool calls. Leaving the loop
        early ends the generation on the server, once the iterator is closed or collected.

        A lost server goes unnoticed where the generation can be resumed (see `chat`). Where it can't, the generation
        starts over if nothing has been given out yet; otherwise `ServerDiedError` says that it can't go on.

        Args:
            prompt: a prompt as for `generate`, or a conversation as for `chat`.
            sampling_params: as for `chat`.
            timeout: seconds until the last output.
            extra_body: as for `chat`.
            **fields: as for `chat` or `generate`.

        Raises what `chat` raises, and `UnsupportedParameterError` for `n` above 1.
        """
        return portal.iterate(
            self.async_client.stream(prompt, sampling_params, timeout=timeout, extra_body=extra_body, **fields)
        )

    @names_fields(TokenizeFields)
    def tokenize(
        self,
        /,
        prompt: str | Conversation,
        *,
        timeout: float | None = None,
        **fields: Unpack[TokenizeFields],
    ) -> list[int]:
        """The token ids of a text, or of a conversation in the model's chat template, as the server makes them.

        Args:
            prompt: a text, or a conversation as for `chat`.
            timeout: seconds for the call.
            **fields: fields of the route; for a text, `add_special_tokens` only.

        Raises what `chat` raises.
        """
        return portal.run(lambda: self.async_client.tokenize(prompt, timeout=timeout, **fields))

    def detokenize(self, /, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids, special tokens included; `timeout` in seconds. Raises what `chat` raises."""
        return portal.run(lambda: self.async_client.detokenize(token_ids, timeout=timeout))
