"""The generations of one call of `chat`, `generate` or `stream`: from its parameters to bodies, and on to outputs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from managed_vllm.errors import BadRequestError, ModelNotFoundError, UnsupportedParameterError
from managed_vllm.request.attempts import Loss, Sender
from managed_vllm.request.completion_groups import completions
from managed_vllm.request.fields import CallFields, to_look_up
from managed_vllm.request.groups import Groups, size_for
from managed_vllm.request.http_errors import checked_shape
from managed_vllm.request.outputs import RequestOutput, without_texts
from managed_vllm.request.pending import JSONRequest, RequestStats
from managed_vllm.request.prompts import conversation_fields, fields_with_images, prompt_fields
from managed_vllm.request.responses import ParsedResponse
from managed_vllm.request.resume import Generation, is_long, obstacle
from managed_vllm.request.sampling import SamplingParams
from managed_vllm.request.token_calls import VERSIONS, ByTokens


class Call:
    """What the generations of one call have in common.

    Args:
        sender: sends them.
        count: how many there are.
        sampling_params: as the caller gives them: one for all, or one each.
        fields: the caller's keywords for the request body.
        extra_body: fields that are sent unchecked.
    """

    def __init__(
        self,
        sender: Sender,
        count: int,
        sampling_params: Any,
        fields: Mapping[str, Any],
        extra_body: Mapping[str, Any] | None,
    ) -> None:
        self._sender = sender
        self._count = count
        self._sampling_params = sampling_params
        self._fields = fields
        self._extra_body = extra_body
        self._groups: Groups | None = None
        self._parses_tools = True  # until the server says that it doesn't
        self._by_tokens = ByTokens(sender)
        self._chat = True
        self._looked_up: dict[str, bool] = {}
        self._routes: dict[bool, tuple[CallFields, list[SamplingParams | None], list[dict[str, Any]]]] = {}

    async def look_up(self, *, chat: bool, deadline: float | None, prompts: Sequence[Any] = ()) -> None:
        """Asks the server for what only it can tell about: fields, and another route; mostly there is nothing.

        Raises as `check`.
        """
        names = to_look_up(self._fields, chat=chat)
        if names:
            there = await self._sender.routes.fields(self._sender, chat=chat, deadline=deadline)
            self._chat, self._looked_up = chat, {name: name in there for name in names}
        if not chat:
            if self._looked_up.get(VERSIONS) is False:
                self._looked_up[VERSIONS] = await self._by_tokens.take_versions(deadline)
            _, params, _ = self._route(chat=False)
            await self._by_tokens.look_up(params, prompts, deadline)

    def check(self, *, chat: bool) -> None:
        """Raises `BadRequestError` or `UnsupportedParameterError` for wrong parameters, before anything is sent."""
        self._route(chat=chat)

    def _route(self, *, chat: bool) -> tuple[CallFields, list[SamplingParams | None], list[dict[str, Any]]]:
        """For one route: the fields, the sampling parameters, and bodies without a prompt; one for all, or one each."""
        found = self._routes.get(chat)
        if found is not None:
            return found
        looked_up = self._looked_up if chat == self._chat else {}
        fields = CallFields(self._fields, self._extra_body, self._count, chat=chat, looked_up=looked_up)
        given = self._sampling_params
        if isinstance(given, list | tuple):
            if len(given) != self._count:
                raise BadRequestError(f"{self._count} prompts but {len(given)} sampling parameters")
            params = [_params(one) for one in given]
        else:
            params = [_params(given)]
        rests = [fields.with_params(one) for one in params]
        for rest in rests:
            if rest.get("stream") or rest.get("stream_options"):
                raise BadRequestError(
                    "stream= is not for this client: chat() and generate() return whole answers; see stream()"
                )
        self._routes[chat] = fields, params, rests
        return self._routes[chat]

    def _body(self, index: int, asked: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
        fields, _, rests = self._route(chat=chat)
        body = fields.body(asked, rests[index if len(rests) > 1 else 0], index)
        if not self._parses_tools and body.get("tools") and "tool_choice" not in body:
            body["tool_choice"] = "none"
        return body

    def _params(self, index: int, *, chat: bool) -> SamplingParams | None:
        _, params, _ = self._route(chat=chat)
        return params[index if len(params) > 1 else 0]

    def _wanted_logprobs(self, index: int, *, chat: bool) -> int | None:
        fields, _, _ = self._route(chat=chat)
        params = self._params(index, chat=chat)
        return fields.candidates if params is None or params.logprobs is None else params.logprobs

    async def _bounded(self, body: dict[str, Any], deadline: float | None, *, chat: bool) -> dict[str, Any]:
        """The body with a number for "up to the model's length", which /v1/completions takes for 16 tokens."""
        if chat or "max_tokens" in body:
            return body
        prompt = body["prompt"]
        asked = {"prompt": prompt if isinstance(prompt, str) else ""}
        if "add_special_tokens" in body:
            asked["add_special_tokens"] = body["add_special_tokens"]
        request = JSONRequest("/tokenize", asked, "count", "max_model_len")
        await self._sender.send(request, deadline)
        found = request.answer()
        with checked_shape(found):
            used = int(found["count"]) if isinstance(prompt, str) else len(prompt)
            kept = body.get("truncate_prompt_tokens")
            if kept is not None and kept >= 0:
                used = min(used, kept)
            return {**body, "max_tokens": max(1, int(found["max_model_len"]) - used)}

    # -- whole answers -------------------------------------------------------------------------------------------------

    async def answer_conversation(
        self, index: int, messages: Any, deadline: float | None, *, resume: bool | None, timeout_s: float | None
    ) -> RequestOutput:
        """The answer to one conversation. `resume` and `timeout_s` are those of `chat`."""
        asked = await conversation_fields(messages)
        return await self._generate(index, asked, deadline, resume, timeout_s, chat=True)

    async def complete_prompt(
        self, index: int, prompt: Any, deadline: float | None, *, resume: bool | None, timeout_s: float | None
    ) -> RequestOutput:
        """The completion of one prompt."""
        asked, images = prompt_fields(prompt)
        if images is None:
            return await self._generate(index, asked, deadline, resume, timeout_s, chat=False)
        text = asked.pop("prompt")
        asked = {**asked, **await fields_with_images(text, images)}
        return replace(await self._generate(index, asked, deadline, resume, timeout_s, chat=True), prompt=text)

    async def _generate(
        self,
        index: int,
        asked: Mapping[str, Any],
        deadline: float | None,
        resume: bool | None,
        timeout_s: float | None,
        *,
        chat: bool,
    ) -> RequestOutput:
        body = await self._bounded(self._body(index, asked, chat=chat), deadline, chat=chat)
        before = 0
        if not chat and self._goes_by_tokens(index, body, deadline, resume, timeout_s):
            params, streamed = self._params(index, chat=False), _is_streamed(body, resume)
            if resume and params is not None and params.detokenize:
                raise BadRequestError("this generation can't be resumed with its text: it can with detokenize=False")
            output = await self._by_tokens.answer(body, params, deadline, timeout_s, stream=streamed)
            if output is not None:
                return output
            before = 1
        while True:
            try:
                return await self._send(index, body, deadline, resume, timeout_s, chat=chat, before=before)
            except BadRequestError as error:
                body, before = self._otherwise(index, body, error, chat=chat), before + 1

    def _otherwise(self, index: int, body: dict[str, Any], error: BadRequestError, *, chat: bool) -> dict[str, Any]:
        """The body that asks for the same in another way; raises the error where there is none."""
        wanted = self._wanted_logprobs(index, chat=chat)
        if chat and wanted and body.get("top_logprobs") == wanted + 1 and "logprobs" in error.message:
            # For a chat one candidate more is requested, which may be one too many (`--max-logprobs`).
            return {**body, "top_logprobs": wanted}
        if _NO_TOOL_PARSER in error.message and "tool_choice" not in body:
            self._parses_tools = False
            return {**body, "tool_choice": "none"}
        if error.status == 404 and not isinstance(error, ModelNotFoundError):
            raise _wrong_task(error, chat=chat) from error
        raise explained(error, body)

    async def _send(
        self,
        index: int,
        body: dict[str, Any],
        deadline: float | None,
        resume: bool | None,
        timeout_s: float | None,
        *,
        chat: bool,
        before: int = 0,
    ) -> RequestOutput:
        async def alone(
            lost: Loss | None, on_loss: Callable[[], None] | None
        ) -> tuple[ParsedResponse | Mapping[str, Any], RequestStats]:
            generation = Generation(_route_of(chat=chat), body, stream=_is_streamed(body, resume))
            stats = await self._sender.send(generation, deadline, timeout_s=timeout_s, lost=lost, on_loss=on_loss)
            return generation.whole or generation.answer(), stats

        groups = None if chat or before or resume else self._grouped(body, deadline, timeout_s)
        response, stats = await (alone(None, None) if groups is None else groups.answer(body, alone))
        return self._output(index, response, body, stats, chat=chat, before=before)

    def _goes_by_tokens(
        self,
        index: int,
        body: Mapping[str, Any],
        deadline: float | None,
        resume: bool | None,
        timeout_s: float | None,
    ) -> bool:
        def grouped() -> bool:
            groups = None if resume else self._grouped(body, deadline, timeout_s)
            return groups is not None and completions(body).key(body) is not None

        return self._by_tokens.takes(body, self._params(index, chat=False), grouped)

    def _grouped(self, body: Mapping[str, Any], deadline: float | None, timeout_s: float | None) -> Groups | None:
        """The groups of this call; None where each prompt goes alone."""
        size = size_for(self._count, self._sender.max_in_flight)
        if size > 1 and self._groups is None and not isinstance(self._sampling_params, list | tuple):
            self._groups = Groups(self._sender, completions(body), size, deadline, timeout_s)
        return self._groups

    def _output(
        self,
        index: int,
        response: ParsedResponse | Mapping[str, Any],
        body: Mapping[str, Any],
        stats: RequestStats | None,
        *,
        chat: bool,
        before: int = 0,
    ) -> RequestOutput:
        with checked_shape(response):
            wanted = self._wanted_logprobs(index, chat=chat)
            output = RequestOutput.from_response(response, body, stats, chat=chat, logprobs=wanted, before=before)
        params = self._params(index, chat=chat)
        return output if params is None or params.detokenize else without_texts(output)

    # -- streams -------------------------------------------------------------------------------------------------------

    async def stream(self, prompt: Any, deadline: float | None, *, chat: bool) -> AsyncGenerator[RequestOutput, None]:
        """The parts of one answer."""
        if chat:
            asked = await conversation_fields(prompt)
        else:
            asked, images = prompt_fields(prompt)
            if images is not None:
                text = asked.pop("prompt")
                asked, chat = {**asked, **await fields_with_images(text, images)}, True
        body = await self._bounded(self._body(0, asked, chat=chat), deadline, chat=chat)
        self._by_tokens.refuse(body, "stream() does not go")
        for name, harmless in (("n", 1), ("echo", False)):
            if body.get(name) not in (None, harmless):
                raise UnsupportedParameterError(f"{name}= does not go with stream(); llm.openai streams it", field=name)
        while True:
            generation = Generation(
                _route_of(chat=chat), {"stream_interval": 1, **body}, stream=True, obstacle=obstacle(body)
            )
            try:
                async with contextlib.aclosing(self._parts(generation, deadline)) as parts:
                    async for part, stats in parts:
                        yield self._output(0, part, body, stats, chat=chat)
                return
            except BadRequestError as error:  # before the first part
                body = self._otherwise(0, body, error, chat=chat)

    async def _parts(
        self, generation: Generation, deadline: float | None
    ) -> AsyncGenerator[tuple[Mapping[str, Any], RequestStats | None], None]:
        """Each new part of a generation as it comes; with the last one, how it was served."""
        news = asyncio.Event()
        sending = asyncio.create_task(self._sender.send(generation, deadline, news.set))
        sending.add_done_callback(lambda _: news.set())
        try:
            while True:
                await news.wait()
                news.clear()
                stats = None
                if sending.done():
                    stats = sending.result()
                elif generation.complete:
                    continue  # the last part needs the stats
                part = generation.new_part()
                if part is not None:
                    yield part, stats
                if stats is not None:
                    return
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.wait({sending})
            if not sending.cancelled():
                sending.exception()  # asyncio would report one that nobody has seen


def _wrong_task(error: BadRequestError, *, chat: bool) -> BadRequestError:
    """vLLM has the routes of its model's task only: 404 for the others (0.32)."""
    message = f"the server has no /v1{_route_of(chat=chat)}: its model is for another task than generating; "
    return BadRequestError(message + error.message, status=404)


_NO_TOOL_PARSER = "tool choice requires --enable-auto-tool-choice"
"""vLLM 0.32: `tools` without `tool_choice` means "auto", and a server without a parser refuses that. `vllm.LLM` has the
tools in the prompt and parses nothing, which is `tool_choice="none"`."""
_OPTIONS = (
    (_NO_TOOL_PARSER, "tool_choice", "enable_auto_tool_choice=True and tool_call_parser="),
    ("--trust-request-chat-template", "chat_template", "trust_request_chat_template=True"),
    ("--trust-request-mm-kwargs", "mm_processor_kwargs", "trust_request_mm_kwargs=True"),
)
"""What a server refuses unless it was started with an option: what it says, of which argument, and the option."""


def explained(error: BadRequestError, body: Mapping[str, Any]) -> BadRequestError:
    """The error with our argument that the server refuses, where that is known."""
    for said, name, option in _OPTIONS:
        if error.field is None and said in error.message and body.get(name) is not None:
            message = f"{name}= needs a server that was started with {option}: {error.message}"
            return BadRequestError(message, field=name, index=error.index, status=error.status)
    return error


def _params(given: Any) -> SamplingParams | None:
    """None stays None: the server's own defaults."""
    return None if given is None else SamplingParams.of(given)


def _route_of(*, chat: bool) -> str:
    return "/chat/completions" if chat else "/completions"


def _is_streamed(body: Mapping[str, Any], resume: bool | None) -> bool:
    if resume is False or (resume is None and not is_long(body)):
        return False
    why = obstacle(body)
    if why is not None and resume:
        raise BadRequestError(f"this generation can't be resumed: {why}")
    return why is None
