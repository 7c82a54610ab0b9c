"""The methods for requests: each class has the same names and full signatures, and every argument arrives."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from scripted_server import ANSWER, FIRST, Script, says, streams, token

from managed_vllm import AsyncVLLMClient, ManagedVLLM, VLLMClient
from managed_vllm.request.arguments import ChatFields, CompletionFields, StreamFields, TokenizeFields
from managed_vllm.request.methods import RequestMethods

METHODS = (
    *("chat", "generate", "generate_with_messages", "stream", "tokenize", "detokenize"),
    *("embed", "encode", "classify", "reward", "score"),
    *("beam_search", "reset_prefix_cache"),
)
FIELDS: dict[str, Any] = {
    "chat": ChatFields,
    "generate": CompletionFields,
    "generate_with_messages": ChatFields,
    "stream": StreamFields,
    "tokenize": TokenizeFields,
}


@pytest.mark.parametrize("name", METHODS)
def test_the_three_classes_have_the_same_signature(name: str) -> None:
    sync = inspect.signature(getattr(RequestMethods, name))
    assert inspect.signature(getattr(ManagedVLLM, name)) == sync
    assert inspect.signature(getattr(VLLMClient, name)) == sync
    assert inspect.signature(getattr(AsyncVLLMClient, name)).parameters == sync.parameters


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [ManagedVLLM, VLLMClient, AsyncVLLMClient])
def test_help_shows_every_parameter_with_its_type(kind: type, name: str) -> None:
    method = getattr(kind, name)
    shown = pydoc.plain(pydoc.render_doc(method))
    parameters = list(inspect.signature(method).parameters.values())[1:]
    assert {parameter.name for parameter in parameters} >= set(getattr(FIELDS.get(name), "__annotations__", ()))
    for parameter in parameters:
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert parameter.annotation not in (parameter.empty, "Any", Any)
        assert f"{parameter.name}: " in shown
    assert method.__doc__


class Recorder:
    """In the place of an `AsyncVLLMClient`: returns the arguments of a call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return self.arguments(name, args, kwargs)

        async def parts(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            yield self.arguments(name, args, kwargs)

        return parts if name == "stream" else call

    def arguments(self, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        return inspect.signature(getattr(AsyncVLLMClient, name)).bind(self, *args, **kwargs).arguments


class Recording(RequestMethods):
    @property
    def async_client(self) -> Any:
        return Recorder()


@pytest.mark.parametrize("name", METHODS)
def test_each_argument_reaches_the_asynchronous_method_under_its_name(name: str) -> None:
    method = getattr(Recording(), name)
    given = {parameter: f"<{parameter}>" for parameter in inspect.signature(method).parameters}
    found = method(**given)
    arguments = next(found) if name == "stream" else found
    arguments.pop("self")
    assert arguments == given


def test_a_handle_has_every_method(script: Callable[..., Script]) -> None:
    server = script(
        says({"data": [{"id": "m"}]}),
        says(ANSWER),
        streams(FIRST, token(2, "stop"), b"[DONE]"),
        says({"tokens": [1, 2]}),
        says({"prompt": "text"}),
        says({"data": [{"embedding": [0.5]}]}),
        says({"data": [{"score": 0.25}]}),
    )
    with ManagedVLLM(base_url=server.url) as llm:
        assert llm.generate("x", {"max_tokens": 4})[0].outputs[0].text == "fine"
        assert [id for part in llm.stream("x", max_tokens=4) for id in part.outputs[0].token_ids] == [1, 2]
        assert llm.tokenize("x") == [1, 2]
        assert llm.detokenize([1, 2]) == "text"
        assert llm.embed("x")[0].outputs.embedding == [0.5]
        assert llm.score("x", "y")[0].outputs.score == 0.25


def test_importing_the_handle_loads_neither_aiohttp_nor_msgspec() -> None:
    heavy = "{'aiohttp', 'msgspec', 'openai', 'httpx', 'vllm', 'torch'}"
    program = f"import sys; from managed_vllm import ManagedVLLM; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout == "set()\n", run.stderr
