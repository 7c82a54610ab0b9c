"""`VLLMClient` and `AsyncVLLMClient`: what `vllm.LLM` offers, against a server, in the shape of `vllm.LLM`.

Requests of one call run side by side and come back in input order. A request whose answer the server lost (it died, was
restarted, answered with an "abort" that nobody asked for, or with half an answer) is sent again when the server is
back; a long generation goes on where it was cut (`resume`). The caller's deadlines bound all of it: waiting for the
server, connecting, and reading, byte by byte.

There is one implementation, the asynchronous one. `VLLMClient` runs it in the loop of `portal`; so it works in threads,
in a notebook's running event loop, and in a forked child.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self, TypeVar, Unpack

from managed_vllm import forks
from managed_vllm.errors import (
    BadRequestError,
    ManagedVLLMError,
    RequestError,
    UnsupportedParameterError,
)
from managed_vllm.policies import RetryPolicy
from managed_vllm.request.attempts import Exchange, Found, Question, Told
from managed_vllm.request.concurrency import MOST
from managed_vllm.request.field_types import (
    ChatFields,
    CompletionFields,
    StreamFields,
    TokenizeFields,
    names_fields,
    names_of,
)
from managed_vllm.request.fields import Common
from managed_vllm.request.messages import conversation
from managed_vllm.request.methods import Conversation, Params, ProgressBar, Prompt, RequestMethods
from managed_vllm.request.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput, ScoringOutput
from managed_vllm.request.outputs import ScoringRequestOutput as ScoringRequestOutput
from managed_vllm.request.responses import Decoded
from managed_vllm.request.resume import Generation, is_long, obstacle
from managed_vllm.request.sampling import SamplingParams
from managed_vllm.status import Connection
from managed_vllm.urls import normalized_url

T = TypeVar("T")

_NOT_AN_ANSWER = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
_AS_IT_IS = "{{ messages[0]['content'] }}"
"""A chat template for a prompt that is text already, with the placeholders of its images in it."""
_COMPLETIONS, _CHAT = "/completions", "/chat/completions"


class AsyncVLLMClient:
    """A client of one server, for asyncio. Usable from any number of event loops, one after the other or side by side.

    Args:
        base_url: with or without `/v1`.
        api_key: None or empty: none is sent.
        model_name: the name under which the server has the model.
        retry: how often a lost request is sent again.
        max_in_flight: requests in flight at once, at most. Fewer while the server refuses some (HTTP 429, 503).
        media_ids: whether an image that the server has already is sent as its id alone. The server must be a vLLM that
            takes `uuid` (0.11 and later); for one that is found by `ManagedVLLM` this is on.
        connection: for servers that may move: asked before each attempt for `(Connection, epoch)`, with the epoch that
            was lost (None at first), the seconds that are left (None: no bound), and the seconds that it may wait for
            another epoch before it returns the lost one once more. It may wait for the server to come back, and raises
            `TimeoutError` if that takes longer than is left. It is called in a thread.
        ready: the same, at once: the connection and epoch of a server that is ready now, or None.
        instance: tells the server's short id, for errors.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        model_name: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        max_in_flight: int = MOST,
        media_ids: bool = False,
        connection: Callable[[int | None, float | None, float], Found] | None = None,
        ready: Callable[[], Found | None] | None = None,
        instance: Callable[[], str | None] | None = None,
    ) -> None:
        if max_in_flight < 1:
            raise BadRequestError("max_in_flight must be 1 or more", field="max_in_flight")
        if connection is None:
            if base_url is None or model_name is None:
                raise BadRequestError("a client needs base_url and model_name")
            fixed = Connection(base_url=normalized_url(base_url), api_key=api_key or "", model=model_name), 0

            def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> Found:
                return fixed

            def ready() -> Found | None:
                return fixed

        self._instance = instance or (lambda: None)
        self._max_in_flight = max_in_flight
        self._exchange = Exchange(
            connection,
            ready or (lambda: None),
            retry=retry or RetryPolicy(),
            max_in_flight=max_in_flight,
            media_ids=media_ids,
        )
        weakref.finalize(self, self._exchange.close).atexit = False

    @property
    def retry(self) -> RetryPolicy:
        """How often a lost request is sent again."""
        return self._exchange.retry

    @property
    def bytes_sent(self) -> int:
        """Bytes of all request bodies so far."""
        return self._exchange.bytes_sent

    def close(self) -> None:
        """Ends what is in flight with `ServerDiedError`; nothing is sent again. From any thread, also twice."""
        self._exchange.close()

    async def aclose(self) -> None:
        """As `close`; the connections of the running loop are closed when it returns."""
        await self._exchange.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

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
        messages, single = _one_or_many_conversations(messages)
        call = _Call(self, len(messages), sampling_params, fields, extra_body, resume, request_timeout)
        call.check(chat=True)

        async def one(index: int, deadline: float | None) -> RequestOutput:
            asked = {"messages": await _conversation(messages[index])}
            return await call.generate(index, asked, deadline, chat=True)

        return await self._all(one, len(messages), single, timeout, return_exceptions, use_tqdm)

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
        each, single = _one_or_many_prompts(prompts)
        call = _Call(self, len(each), sampling_params, fields, extra_body, resume, request_timeout)
        call.check(chat=False)

        async def one(index: int, deadline: float | None) -> RequestOutput:
            asked, images = _prompt(each[index])
            if images is None:
                return await call.generate(index, asked, deadline, chat=False)
            output = await call.generate(index, await _with_images(asked, images), deadline, chat=True)
            return replace(output, prompt=asked["prompt"])

        return await self._all(one, len(each), single, timeout, return_exceptions, use_tqdm)

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
        call = _Call(self, 1, sampling_params, fields, extra_body, None, None)
        asked: Mapping[str, Any]
        if chat:
            asked = {"messages": await _conversation(prompt)}
        else:
            asked, images = _prompt(prompt)
            if images is not None:
                asked, chat = await _with_images(asked, images), True
        body = call.body(0, asked, chat=chat)
        for name, harmless in (("n", 1), ("echo", False)):
            if body.get(name) not in (None, harmless):
                raise UnsupportedParameterError(f"{name}= does not go with stream(); llm.openai streams it", field=name)
        generation = Generation(_CHAT if chat else _COMPLETIONS, {"stream_interval": 1, **body}, stream=True)
        generation.obstacle = obstacle(body)
        deadline = None if timeout is None else time.monotonic() + timeout
        news = asyncio.Event()
        asking = asyncio.create_task(self._exchange.ask(generation, deadline, news.set))
        asking.add_done_callback(lambda _: news.set())
        try:
            while True:
                await news.wait()
                news.clear()
                told = None
                if asking.done():
                    with self._named(None):
                        told = asking.result()
                elif generation.complete:
                    continue  # the last part tells how it ended
                part = generation.fresh()
                if part is not None:
                    yield call.output(0, part, body, told, chat=chat)
                if told is not None:
                    return
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
            if not asking.cancelled():
                asking.exception()  # asyncio tells of one that nobody has looked at

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
        each, single = _one_or_many_prompts(prompts)

        async def one(index: int, deadline: float | None) -> EmbeddingRequestOutput:
            asked, images = _prompt(each[index])
            if images is not None:
                raise UnsupportedParameterError("embed() takes texts and token ids", field="multi_modal_data")
            body = {"input": asked["prompt"], "encoding_format": "float", **(extra_body or {})}
            answer, told = await self._ask(Question("/v1/embeddings", body, "data"), deadline)
            with _checked(answer):
                vector = [float(value) for value in answer["data"][0]["embedding"]]
                return EmbeddingRequestOutput.of(answer, EmbeddingOutput(vector), told)

        return await self._all(one, len(each), single, timeout, return_exceptions, use_tqdm)

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

        async def one(index: int, deadline: float | None) -> ScoringRequestOutput:
            body = {"text_1": first[index], "text_2": second[index], **(extra_body or {})}
            answer, told = await self._ask(Question("/score", body, "data"), deadline)
            with _checked(answer):
                return ScoringRequestOutput.of(answer, ScoringOutput(float(answer["data"][0]["score"])), told)

        single = isinstance(data_1, str) and isinstance(data_2, str)
        return await self._all(one, len(second), single, timeout, return_exceptions, use_tqdm)

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
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": await _conversation(prompt)}
        deadline = None if timeout is None else time.monotonic() + timeout
        answer, _ = await self._ask(Question("/tokenize", {**asked, **fields}, "tokens"), deadline)
        with _checked(answer):
            return [int(token) for token in answer["tokens"]]

    async def detokenize(self, /, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids, special tokens included. See `RequestMethods.detokenize`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        body = {"tokens": [int(token) for token in token_ids]}
        answer, _ = await self._ask(Question("/detokenize", body, "prompt"), deadline)
        with _checked(answer):
            if not isinstance(answer["prompt"], str):
                raise TypeError
            return answer["prompt"]

    # -- what they share -----------------------------------------------------------------------------------------------

    async def _ask(self, question: Question, deadline: float | None) -> tuple[Mapping[str, Any], Told]:
        with self._named(None):
            told = await self._exchange.ask(question, deadline)
        return question.answer(), told

    @contextlib.contextmanager
    def _named(self, index: int | None) -> Iterator[None]:
        """Errors say which request and which server they are of."""
        try:
            yield
        except RequestError as error:
            error.index = index if error.index is None else error.index
            error.instance = error.instance or self._instance()
            raise

    async def _all(
        self,
        one: Callable[[int, float | None], Awaitable[T]],
        count: int,
        single: bool,
        timeout: float | None,
        return_exceptions: bool,
        use_tqdm: ProgressBar,
    ) -> list[T]:
        """The results of `one(index, deadline)`, in order; so many at once as may be in flight."""
        deadline = None if timeout is None else time.monotonic() + timeout
        results: list[Any] = [None] * count
        indices = iter(range(count))
        failed: list[int] = []

        async def work() -> None:
            for index in indices:
                try:
                    with self._named(None if single else index):
                        results[index] = await one(index, deadline)
                except ManagedVLLMError as error:
                    results[index] = error
                    failed.append(index)
                if progress is not None:
                    progress.add(results[index])

        with _Progress.of(use_tqdm, count) as progress:
            if count == 1:
                await work()
            else:
                await _side_by_side(work, min(count, self._max_in_flight))
        if failed and not return_exceptions:
            error: ManagedVLLMError = results[min(failed)]
            error.results = None if single else results
            raise error
        return results


class VLLMClient(RequestMethods):
    """`AsyncVLLMClient` for programs without asyncio: the same arguments and methods, and the results as they are.

    Works from many threads at once, within a running event loop (which it blocks, as any call does), and in a forked
    child. `VLLMClient(base_url, api_key, model_name)` is what the service scripts call `VLLMClientWrapper`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        model_name: str | None = None,
        **options: Any,
    ) -> None:
        """`options` are the other arguments of `AsyncVLLMClient`."""
        self._client = AsyncVLLMClient(base_url, api_key, model_name, **options)

    @classmethod
    def of(cls, client: AsyncVLLMClient) -> Self:
        """The same client, its connections and its bounds, without asyncio."""
        made = cls.__new__(cls)
        made._client = client
        return made

    @property
    def async_client(self) -> AsyncVLLMClient:
        """The same client for asyncio."""
        return self._client

    @property
    def retry(self) -> RetryPolicy:
        """How often a lost request is sent again."""
        return self._client.retry

    @property
    def bytes_sent(self) -> int:
        """Bytes of all request bodies so far."""
        return self._client.bytes_sent

    def close(self) -> None:
        """Closes all connections. What is in flight ends with `ServerDiedError` and is not sent again."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


VLLMClientWrapper = VLLMClient
"""The name under which the service scripts know the client: `VLLMClientWrapper(base_url, api_key, model_name)`."""


# -- one call ----------------------------------------------------------------------------------------------------------


class _Call:
    """What the requests of one call have in common."""

    def __init__(
        self,
        client: AsyncVLLMClient,
        count: int,
        sampling_params: Any,
        fields: Mapping[str, Any],
        extra_body: Mapping[str, Any] | None,
        resume: bool | None,
        within: float | None,
    ) -> None:
        self._client = client
        self._count = count
        self._given = sampling_params
        self._fields = fields
        self._extra_body = extra_body
        self._resume = resume
        self._within = within
        self._routes: dict[bool, tuple[Common, list[SamplingParams], list[dict[str, Any]]]] = {}

    def check(self, *, chat: bool) -> None:
        """Raises for wrong parameters, before anything is sent."""
        self._route(chat=chat)

    def _route(self, *, chat: bool) -> tuple[Common, list[SamplingParams], list[dict[str, Any]]]:
        """What goes into the bodies for one route: parameters, and all of a body but what it asks; one for all, or one
        each."""
        found = self._routes.get(chat)
        if found is not None:
            return found
        common = Common(self._fields, self._extra_body, self._count, chat=chat)
        given = self._given
        if isinstance(given, list | tuple):
            if len(given) != self._count:
                raise BadRequestError(f"{self._count} prompts but {len(given)} sampling parameters")
            params = [SamplingParams.of(one, chat=chat) for one in given]
        else:
            params = [SamplingParams.of(given, chat=chat)]
        rests = [common.with_params(one.to_request(chat=chat)) for one in params]
        for rest in rests:
            if rest.get("stream") or rest.get("stream_options"):
                raise BadRequestError("stream= is not for this client: what comes back is whole; see stream()")
        self._routes[chat] = common, params, rests
        return self._routes[chat]

    def body(self, index: int, asked: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
        common, _, rests = self._route(chat=chat)
        return common.body(asked, rests[index if len(rests) > 1 else 0], index)

    async def generate(
        self, index: int, asked: Mapping[str, Any], deadline: float | None, *, chat: bool
    ) -> RequestOutput:
        body = self.body(index, asked, chat=chat)
        try:
            return await self._send(index, body, deadline, chat=chat)
        except BadRequestError as error:
            # For a chat one candidate more was asked for, which may be one too many (`--max-logprobs`).
            wanted = self._wanted(index, chat=chat)
            fewer = chat and wanted and body.get("top_logprobs") == wanted + 1 and "logprobs" in error.message
            if not fewer:
                raise
        return await self._send(index, {**body, "top_logprobs": wanted}, deadline, chat=chat, before=1)

    async def _send(
        self, index: int, body: dict[str, Any], deadline: float | None, *, chat: bool, before: int = 0
    ) -> RequestOutput:
        generation = Generation(_CHAT if chat else _COMPLETIONS, body, stream=_is_streamed(body, self._resume))
        told = await self._client._exchange.ask(generation, deadline, within=self._within)
        return self.output(index, generation.whole or generation.answer(), body, told, chat=chat, before=before)

    def _wanted(self, index: int, *, chat: bool) -> int | None:
        _, params, _ = self._route(chat=chat)
        return params[index if len(params) > 1 else 0].logprobs

    def output(
        self,
        index: int,
        answer: Decoded | Mapping[str, Any],
        body: Mapping[str, Any],
        told: Told | None,
        *,
        chat: bool,
        before: int = 0,
    ) -> RequestOutput:
        """`told` is None for a part of an answer; `before` are attempts that it does not know of."""
        with _checked(answer):
            return RequestOutput.from_answer(
                answer, body, told, chat=chat, logprobs=self._wanted(index, chat=chat), before=before
            )


@contextlib.contextmanager
def _checked(answer: Any) -> Iterator[None]:
    """What is not of the shape of an answer is an error by type."""
    try:
        yield
    except _NOT_AN_ANSWER as error:
        raise RequestError(f"not an answer of the route ({error}): {str(answer)[:500]}") from error


def _is_streamed(body: Mapping[str, Any], resume: bool | None) -> bool:
    if resume is False or (resume is None and not is_long(body)):
        return False
    why = obstacle(body)
    if why is not None and resume:
        raise BadRequestError(f"this generation can't be resumed: {why}")
    return why is None


# -- what is asked -----------------------------------------------------------------------------------------------------


def _one_or_many_conversations(messages: Any) -> tuple[Sequence[Conversation], bool]:
    if isinstance(messages, str | bytes | Mapping):
        raise BadRequestError(
            "chat() takes a list of messages such as {'role': 'user', 'content': …}, or a list of such lists",
            field="messages",
        )
    messages = messages if isinstance(messages, Sequence) else list(messages)
    single = bool(messages) and isinstance(messages[0], Mapping)
    return ([messages] if single else messages), single


def _one_or_many_prompts(prompts: Any) -> tuple[Sequence[Any], bool]:
    prompts = _plain(prompts)
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


def _prompt(given: Any) -> tuple[dict[str, Any], list[Any] | None]:
    """The request field of one prompt, and its images, if it has any."""
    given = _plain(given)
    images: list[Any] | None = None
    if isinstance(given, Mapping):
        unknown = sorted(given.keys() - {"prompt", "prompt_token_ids", "multi_modal_data"})
        if unknown:
            raise UnsupportedParameterError(f"a prompt's {unknown[0]!r} can't be passed on", field=unknown[0])
        media = given.get("multi_modal_data") or {}
        if other := sorted(media.keys() - {"image"}):
            raise UnsupportedParameterError(
                f"generate() passes on images; {other[0]!r} works in chat()", field=other[0]
            )
        found = media.get("image")
        if found is not None:
            images = list(found) if isinstance(found, list | tuple) else [found]
        text, tokens = given.get("prompt"), _plain(given.get("prompt_token_ids"))
        if images:
            if not isinstance(text, str):
                raise UnsupportedParameterError(
                    "no route takes token ids and images; give the prompt as text", field="prompt_token_ids"
                )
            return {"prompt": text}, images
        given = text if tokens is None else tokens
    if isinstance(given, str):
        return {"prompt": given}, None
    if isinstance(given, Sequence) and not isinstance(given, bytes) and all(type(token) is int for token in given):
        return {"prompt": given if isinstance(given, list) else list(given)}, None
    raise BadRequestError(
        f"a prompt is a text, a list of token ids, or a dict with one of them, not {given!r:.80}", field="prompt"
    )


def _plain(value: Any) -> Any:
    """numpy's arrays and torch's tensors as lists."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


async def _with_images(asked: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    parts: list[Any] = [{"type": "text", "text": asked["prompt"]}]
    content = [*parts, *({"type": "image", "image": image} for image in images)]
    return {
        "messages": await _conversation([{"role": "user", "content": content}]),
        "chat_template": _AS_IT_IS,
        "add_special_tokens": True,
        "max_tokens": 16,
    }


async def _conversation(messages: Any) -> list[dict[str, Any]]:
    """`messages.conversation`; pictures are read and encoded beside the event loop."""
    if isinstance(messages, list | tuple) and not any(
        isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple) for message in messages
    ):
        return conversation(messages)
    return await asyncio.get_running_loop().run_in_executor(_encoders(), conversation, messages)


@functools.cache
def _encoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="managed-vllm-images")


forks.call_in_child(_encoders.cache_clear)  # its threads stayed with the parent


# -- many --------------------------------------------------------------------------------------------------------------


async def _side_by_side(work: Callable[[], Coroutine[Any, Any, None]], workers: int) -> None:
    tasks = [asyncio.create_task(work()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Progress:
    """The progress bar of a batch, as vLLM has it."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._started = time.monotonic()
        self._tokens = [0, 0]

    @classmethod
    @contextlib.contextmanager
    def of(cls, use_tqdm: ProgressBar, count: int) -> Iterator[_Progress | None]:
        if not use_tqdm:
            yield None
            return
        make: Any = use_tqdm
        if not callable(use_tqdm):
            from tqdm.auto import tqdm

            make = tqdm
        with contextlib.closing(make(total=count, desc="Processed prompts", dynamic_ncols=True)) as bar:
            yield cls(bar)

    def add(self, result: Any) -> None:
        if isinstance(result, RequestOutput):
            self._tokens[0] += len(result.prompt_token_ids)
            self._tokens[1] += sum(len(one.token_ids) for one in result.outputs)
            took = max(1e-3, time.monotonic() - self._started)
            speed = [tokens / took for tokens in self._tokens]
            if hasattr(self._bar, "set_postfix_str"):
                said = f"est. speed input: {speed[0]:.2f} toks/s, output: {speed[1]:.2f} toks/s"
                self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(1)
