"""Which weights sampled each token of an answer: `return_weight_versions` for a vLLM whose OpenAI routes lack it.

vLLM 0.32 keeps the versions of each answer (`CompletionOutput.weight_versions`), and its `/v1/chat/completions` and
`/v1/completions` drop them; 0.33 passes them on to who asks. `install` has 0.32 answer in the same shape:

- a request with `"return_weight_versions": true` gets `"weight_versions": [{"version": …, "start": …, "end": …}, …]` in
  each choice: spans of the answer's tokens, without a gap. A stream has it in each choice's last event.
- A stream with `"return_token_ids": true` has it earlier, too: in the first event with tokens, and in each in which the
  version changes. That is ours: it tells about the tokens of an answer that is cut.

`/inference/v1/generate` always tells, at the end. A stream of it tells earlier, too, as above: that is one more
function, wrapped by itself.

Four functions are wrapped, but only if all of them, and what they handle, are as we know them; else the field is
ignored as before. A request that does not ask goes through vLLM's own functions, at the price of one look.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

FIELD = "return_weight_versions"

_CHAT = "vllm.entrypoints.openai.chat_completion.serving"
_COMPLETION = "vllm.entrypoints.openai.completion.serving"
_KNOWN = {
    (_CHAT, "OpenAIServingChat", "chat_completion_full_generator"): ("request", "result_generator"),
    (_CHAT, "OpenAIServingChat", "chat_completion_stream_generator"): ("request", "result_generator"),
    (_COMPLETION, "OpenAIServingCompletion", "request_output_to_completion_response"): ("final_res_batch", "request"),
    (_COMPLETION, "OpenAIServingCompletion", "completion_stream_generator"): (
        *("request", "engine_inputs", "result_generator"),
    ),
}
"""The functions that make the answers, and how their parameters begin after `self` (vLLM 0.32)."""
_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.serving"
_REQUESTS = ((_CHAT, "ChatCompletionRequest"), (_COMPLETION, "CompletionRequest"))
_ADVERTISED = {
    "title": "Return Weight Versions",
    "type": "boolean",
    "default": False,
    "description": "Each choice has weight_versions: which weights sampled which of its tokens.",
}


def install() -> str | None:
    """Wraps vLLM's functions, once. Returns None; or why not, and then nothing was changed.

    For the API server, once it has imported its routes: nothing is imported here.
    """
    _install_for_tokens()
    reason = _why_not()
    if reason is not None:
        return reason
    wrappers = (_with_versions, _with_versions_in_stream, _with_versions_in_batch, _with_versions_in_batch_stream)
    for (module, owner, name), wrap in zip(_KNOWN, wrappers, strict=True):
        kind = getattr(sys.modules[module], owner)
        setattr(kind, name, wrap(getattr(kind, name)))
    for module, name in _REQUESTS:
        _advertise(getattr(sys.modules[module], name))
    return None


def _install_for_tokens() -> None:
    kind, name = getattr(sys.modules.get(_TOKENS), "ServingTokens", None), "serve_tokens_stream_generator"
    function = inspect.getattr_static(kind, name, None)
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return
    if tuple(inspect.signature(function).parameters)[:3] == ("self", "request", "result_generator"):
        setattr(kind, name, _with_versions_ahead(function))


def _why_not() -> str | None:
    if missing := [name for name in (_CHAT, _COMPLETION, "vllm.outputs") if name not in sys.modules]:
        return f"{missing[0]} is not there"
    if "weight_versions" not in getattr(sys.modules["vllm.outputs"].CompletionOutput, "__dataclass_fields__", {}):
        return "vllm.outputs.CompletionOutput has no weight_versions"
    for module, name in _REQUESTS:
        request = getattr(sys.modules[module], name, None)
        if FIELD in getattr(request, "model_fields", {FIELD: None}):
            return f"{name} has {FIELD}, or is not what we know"
        if getattr(request, "model_config", {}).get("extra") != "allow":
            return f"{name} takes no fields that it does not know"
    for (module, owner, name), parameters in _KNOWN.items():
        function = inspect.getattr_static(getattr(sys.modules[module], owner, None), name, None)
        if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
            return f"{owner}.{name} is not what we know"
        found = tuple(inspect.signature(function).parameters)
        if found[: len(parameters) + 1] != ("self", *parameters):
            return f"{owner}.{name} takes {inspect.signature(function)}"
    return None


def _advertise(request: Any) -> None:
    """The field in the server's /openapi.json, where clients look for it. Already looked at by pydantic: no check."""
    before = request.model_config.get("json_schema_extra")
    if before is None:
        request.model_config["json_schema_extra"] = lambda schema: schema["properties"].update({FIELD: _ADVERTISED})


def _is_asked(request: Any) -> bool:
    return (request.model_extra or {}).get(FIELD) is True


def _plain(spans: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"version": one.version, "start": one.start, "end": one.end} for one in spans]


# -- whole answers -----------------------------------------------------------------------------------------------------


def _with_versions(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def full(self: Any, request: Any, result_generator: Any, *rest: Any, **more: Any) -> Any:
        if not _is_asked(request):
            return await original(self, request, result_generator, *rest, **more)
        last: list[Any] = []

        async def heard() -> AsyncIterator[Any]:
            async for result in result_generator:
                last[:] = [result]
                yield result

        response = await original(self, request, heard(), *rest, **more)
        _add_to_choices(response, [output for result in last for output in result.outputs])
        return response

    return full


def _with_versions_in_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def full(self: Any, final_res_batch: Any, request: Any, *rest: Any, **more: Any) -> Any:
        response = original(self, final_res_batch, request, *rest, **more)
        if _is_asked(request):
            _add_to_choices(response, [output for result in final_res_batch for output in result.outputs])
        return response

    return full


def _add_to_choices(response: Any, outputs: Sequence[Any]) -> None:
    """The choices are made of the outputs, one each, in their order; an error has none."""
    choices = getattr(response, "choices", ())
    if len(choices) == len(outputs):
        for choice, output in zip(choices, outputs, strict=True):
            if output.weight_versions is not None:
                choice.weight_versions = _plain(output.weight_versions)


# -- streams -----------------------------------------------------------------------------------------------------------


def _with_versions_in_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def stream(self: Any, request: Any, result_generator: Any, *rest: Any, **more: Any) -> Any:
        if not _is_asked(request):
            return original(self, request, result_generator, *rest, **more)
        told = _Told(self, ahead=request.return_token_ids)
        return _passed_on(original(self, request, told.heard(result_generator), *rest, **more), told)

    return stream


def _with_versions_ahead(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def stream(self: Any, request: Any, result_generator: Any, *rest: Any, **more: Any) -> Any:
        told = _Told(self, ahead=True)
        return _passed_on(original(self, request, told.heard(result_generator), *rest, **more), told)

    return stream


def _with_versions_in_batch_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def stream(self: Any, request: Any, inputs: Any, result_generator: Any, *rest: Any, **more: Any) -> Any:
        if not _is_asked(request):
            return original(self, request, inputs, result_generator, *rest, **more)
        told = _Told(self, ahead=request.return_token_ids)

        async def heard() -> AsyncIterator[Any]:
            async for number, result in result_generator:
                told.look(result, number * (request.n or 1))
                yield number, result

        return _passed_on(original(self, request, inputs, heard(), *rest, **more), told)

    return stream


async def _passed_on(events: Any, told: _Told) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        async for event in events:
            yield told.add_to(event) if told.news else event


class _Told:
    """What one stream's outputs have told, and what of it is still to be passed on: spans, by choice."""

    def __init__(self, serving: Any, *, ahead: bool | None) -> None:
        self.news: dict[int, list[dict[str, Any]]] = {}
        self._processor: Any = None
        if ahead:
            self._processor = getattr(serving.engine_client, "output_processor", None)
        self._states: dict[int, Any] = {}
        self._tokens: dict[int, int] = {}
        self._spans: dict[int, int] = {}

    async def heard(self, results: Any) -> AsyncIterator[Any]:
        """The results of one prompt, looked at."""
        async for result in results:
            self.look(result, 0)
            yield result

    def look(self, result: Any, first: int) -> None:
        """Takes a result in; `first` is the number of its first choice."""
        for output in result.outputs:
            choice = first + output.index
            count = self._tokens[choice] = self._tokens.get(choice, 0) + len(output.token_ids)
            if output.finish_reason is not None:
                if output.weight_versions is not None:
                    self.news[choice] = _plain(output.weight_versions)
            elif self._processor is not None and count:
                self._look_ahead(result.request_id, output.index, choice, count)

    def _look_ahead(self, request_id: str, index: int, choice: int, count: int) -> None:
        """The spans of an answer that goes on, where there are more of them than were passed on."""
        state = self._states.get(choice)
        if state is None:
            state = self._states[choice] = self._state_of(request_id, index)
        starts = [(version, start) for version, start in getattr(state, "weight_version_starts", ()) if start < count]
        if len(starts) > self._spans.get(choice, 0):
            self._spans[choice] = len(starts)
            ends = [*(start for _, start in starts[1:]), count]
            self.news[choice] = [
                {"version": version, "start": start, "end": end}
                for (version, start), end in zip(starts, ends, strict=True)
            ]

    def _state_of(self, request_id: str, index: int) -> Any:
        """vLLM's state of the request, which it forgets when the answer ends."""
        with contextlib.suppress(AttributeError):
            for internal in self._processor.external_req_ids.get(request_id, ()):
                state = self._processor.request_states.get(internal)
                if state is not None and state.request_index == index:
                    return state
        return None

    def add_to(self, event: str) -> str:
        """The event, with the news about its choices: those that bring tokens, or end."""
        if not event.startswith("data: {"):
            return event
        chunk, added = json.loads(event[6:]), False
        for choice in chunk.get("choices", ()):
            if choice.get("token_ids") or choice.get("finish_reason"):
                spans = self.news.pop(choice["index"], None)
                if spans is not None:
                    choice["weight_versions"], added = spans, True
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n" if added else event
