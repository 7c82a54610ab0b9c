"""The patch of vLLM's OpenAI routes: only where all is as we know it. In vLLM itself tests/real has it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from managed_vllm.in_server import managed_vllm_weight_versions as versions

SPAN = {"version": "v2", "start": 0, "end": 2}


class Output(SimpleNamespace):
    """One answer; `weight_versions` is what `install` looks for."""

    __dataclass_fields__: ClassVar = {"weight_versions": None}


class Request:
    """As pydantic's: what it does not know is in `model_extra`."""

    model_fields: ClassVar[dict[str, Any]] = {}
    model_config: ClassVar[dict[str, Any]] = {"extra": "allow"}

    def __init__(self, **extra: Any) -> None:
        self.model_extra = extra
        self.return_token_ids, self.n = True, 1


def make_vllm(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Modules as vLLM's; the classes of its two routes."""

    class OpenAIServingChat:
        engine_client = SimpleNamespace(output_processor=None)

        async def chat_completion_full_generator(self, request: Any, result_generator: Any, request_id: str) -> Any:
            async for result in result_generator:
                last = result
            return SimpleNamespace(choices=[SimpleNamespace(index=one.index) for one in last.outputs])

        async def chat_completion_stream_generator(
            self, request: Any, result_generator: Any, request_id: str
        ) -> AsyncIterator[str]:
            async for result in result_generator:
                for one in result.outputs:
                    choice = {"index": one.index, "token_ids": one.token_ids, "finish_reason": one.finish_reason}
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

    class OpenAIServingCompletion:
        def request_output_to_completion_response(self, final_res_batch: Any, request: Any) -> Any:
            return SimpleNamespace(choices=[SimpleNamespace() for one in final_res_batch for _ in one.outputs])

        async def completion_stream_generator(
            self, request: Any, engine_inputs: Any, result_generator: Any
        ) -> AsyncIterator[str]:
            yield "data: [DONE]\n\n"

    made = {"openai.chat_completion.serving": OpenAIServingChat, "openai.completion.serving": OpenAIServingCompletion}
    for name, kind in made.items():
        module = ModuleType(f"vllm.entrypoints.{name}")
        setattr(module, kind.__name__, kind)
        request = "ChatCompletionRequest" if kind is OpenAIServingChat else "CompletionRequest"
        setattr(module, request, type(request, (Request,), {"model_config": {"extra": "allow"}}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    outputs = ModuleType("vllm.outputs")
    outputs.CompletionOutput = Output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.outputs", outputs)
    return OpenAIServingChat, OpenAIServingCompletion


def result(*tokens: int, ends: bool = False) -> Any:
    spans = [SimpleNamespace(**SPAN)] if ends else None
    output = Output(index=0, token_ids=list(tokens), finish_reason="stop" if ends else None, weight_versions=spans)
    return SimpleNamespace(outputs=[output], request_id="r")


async def results() -> AsyncIterator[Any]:
    yield result(1)
    yield result(2, ends=True)


def test_who_asks_is_told_in_the_shape_of_a_later_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, completion = make_vllm(monkeypatch)
    assert versions.install() is None
    asked, silent = Request(return_weight_versions=True), Request(return_weight_versions="yes")
    whole = asyncio.run(chat().chat_completion_full_generator(asked, results(), "r"))
    assert whole.choices[0].weight_versions == [SPAN]
    response = completion().request_output_to_completion_response([result(1, ends=True)], asked)
    assert response.choices[0].weight_versions == [SPAN]
    assert not hasattr(completion().request_output_to_completion_response([result(1)], silent).choices[0], "index")

    async def events(request: Request) -> list[str]:
        return [event async for event in chat().chat_completion_stream_generator(request, results(), "r")]

    first, last, done = asyncio.run(events(asked))
    assert "weight_versions" not in first
    assert json.loads(last[6:])["choices"][0]["weight_versions"] == [SPAN]
    assert done == "data: [DONE]\n\n"
    assert not any("weight_versions" in event for event in asyncio.run(events(silent)))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_stream_of_token_ids_tells_ahead_whoever_asks(monkeypatch: pytest.MonkeyPatch, is_known: bool) -> None:
    class ServingTokens:
        state = SimpleNamespace(request_index=0, weight_version_starts=[("v2", 0)])
        engine_client = SimpleNamespace(
            output_processor=SimpleNamespace(external_req_ids={"r": ["x"]}, request_states={"x": state})
        )

        async def serve_tokens_stream_generator(
            self, request: Any, result_generator: Any, request_id: str
        ) -> AsyncIterator[str]:
            async for each in result_generator:
                choice = {"index": 0, "token_ids": each.outputs[0].token_ids, "weight_versions": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"

        if not is_known:

            async def serve_tokens_stream_generator(self, results: Any) -> AsyncIterator[str]:  # type: ignore[misc]
                yield ""

    module = ModuleType("vllm.entrypoints.scale_out.token_in_token_out.serving")
    module.ServingTokens = ServingTokens  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = ServingTokens.serve_tokens_stream_generator
    versions.install()  # the other routes need not be there
    assert (ServingTokens.serve_tokens_stream_generator is before) is not is_known
    if is_known:

        async def events() -> list[str]:
            return [one async for one in ServingTokens().serve_tokens_stream_generator(Request(), results(), "r")]

        told = [json.loads(event[6:])["choices"][0]["weight_versions"] for event in asyncio.run(events())]
        assert told == [[{**SPAN, "end": 1}], [SPAN]]


def test_it_is_in_the_schema_that_clients_read(monkeypatch: pytest.MonkeyPatch) -> None:
    make_vllm(monkeypatch)
    assert versions.install() is None
    schema: dict[str, Any] = {"properties": {}}
    request = sys.modules["vllm.entrypoints.openai.completion.serving"].CompletionRequest
    request.model_config["json_schema_extra"](schema)
    assert schema["properties"]["return_weight_versions"]["type"] == "boolean"


def test_a_stranger_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, completion = make_vllm(monkeypatch)

    def other(self: Any, response: Any) -> Any:
        return response

    before = chat.chat_completion_full_generator
    monkeypatch.setattr(completion, "request_output_to_completion_response", other)
    assert "request_output_to_completion_response takes" in str(versions.install())
    assert chat.chat_completion_full_generator is before


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("model_fields", {"return_weight_versions": None}, "has return_weight_versions"),
        ("model_config", {"extra": "forbid"}, "takes no fields"),
    ],
)
def test_a_server_that_has_it_itself_needs_nothing(
    monkeypatch: pytest.MonkeyPatch, field: str, value: Any, why: str
) -> None:
    make_vllm(monkeypatch)
    request = sys.modules["vllm.entrypoints.openai.chat_completion.serving"].ChatCompletionRequest
    monkeypatch.setattr(request, field, value)
    assert why in str(versions.install())


def test_it_is_installed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make_vllm(monkeypatch)
    assert versions.install() is None
    assert "is not what we know" in str(versions.install())
