"""The public surface of `vllm.LLM`: each name works, or says why not and what to use."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import standin
from processes import INSTANT
from scripted_server import ANSWER, Script, client_of, says

from managed_vllm import AsyncVLLMClient, ManagedVLLM, VLLMClient
from managed_vllm.errors import BadRequestError, ConfigError, UnsupportedMethodError, UnsupportedParameterError
from managed_vllm.request.arrays import as_array
from managed_vllm.request.surface import NOT_HERE, OF_HANDLES

URL = "http://127.0.0.1:1"
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"choices": [{"index": 0, "message": {"content": "x"}, "token_ids": [7], "finish_reason": "stop"}]}


def each_kind() -> list[Any]:
    return [ManagedVLLM(base_url=URL), VLLMClient(URL, None, "m"), AsyncVLLMClient(URL, None, "m")]


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_what_is_not_here_says_why_and_is_no_attribute(name: str) -> None:
    for one in each_kind():
        assert not hasattr(one, name)
        with pytest.raises(UnsupportedMethodError, match=f"{name} of vllm.LLM is not here: .+") as caught:
            getattr(one, name)
        assert caught.value.method == name
        assert pickle.loads(pickle.dumps(caught.value)).method == name


def test_every_method_of_vllm_llm_is_here_or_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent.parent / "tools")
    tool = importlib.import_module("docs_client")
    for name in (*tool.METHODS, *tool.OLDER):
        assert hasattr(ManagedVLLM, name) != (name in NOT_HERE), name
        if name not in ("from_engine_args", *OF_HANDLES):
            assert hasattr(VLLMClient, name) == hasattr(AsyncVLLMClient, name) == hasattr(ManagedVLLM, name)


def test_another_name_is_a_plain_attribute_error() -> None:
    for one in each_kind():
        with pytest.raises(AttributeError, match="genrate") as caught:
            one.genrate  # noqa: B018
        assert not isinstance(caught.value, UnsupportedMethodError)


def test_the_attribute_error_of_a_property_is_shown_as_it_is() -> None:
    class Broken(VLLMClient):
        @property
        def half(self) -> Any:
            return None.whole  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'whole'"):
        Broken(URL, None, "m").half  # noqa: B018


def test_what_the_engine_says_of_its_weights_and_its_size(script: Callable[..., Script]) -> None:
    server = script(says({"weight_version": "v7"}), says({"world_size": 4}), says({"detail": "Not Found"}, 404))
    with client_of(server) as client:
        assert client.get_weight_version() == "v7"
        assert client.get_world_size(include_dp=False) == 4
        with pytest.raises(UnsupportedMethodError, match="/weight_info"):
            client.get_weight_version()
    assert [path for path, _ in server.requests[:2]] == ["/weight_info", "/get_world_size?include_dp=false"]


# -- pooling -----------------------------------------------------------------------------------------------------------

POOLED = {"data": [{"data": [[0.5], [1.0]]}]}
CLASSES = {"data": [{"probs": [0.25, 0.75], "label": "spam", "num_classes": 2}]}
SCORED = {"data": [{"score": 0.5}]}


def test_encode_and_reward_ask_the_pooling_route(script: Callable[..., Script]) -> None:
    server = script(says(POOLED))
    with client_of(server) as client:
        prompts: list[Any] = ["x", [1, 2]]
        encoded = client.encode(prompts, {"use_activation": False}, pooling_task="token_embed")
        assert [one.outputs.data.tolist() for one in encoded] == [[[0.5], [1.0]]] * 2
        (rewarded,) = client.reward("x", tokenization_kwargs={"truncate_prompt_tokens": 4})
        assert rewarded.outputs == encoded[0].outputs
    assert {path for path, _ in server.requests} == {"/pooling"}
    first, second = sorted((body for _, body in server.requests[:2]), key=lambda body: str(body["input"]))
    assert (first["input"], second["input"]) == ([1, 2], "x")
    assert (first["task"], first["use_activation"]) == ("token_embed", False)
    assert server.requests[2][1]["task"] == "token_classify"
    assert server.requests[2][1]["truncate_prompt_tokens"] == 4


def test_encoded_data_is_an_array_and_a_tensor_where_the_program_has_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert as_array([[0.5], [1.0]]).dtype == numpy.float32
    assert as_array([[0.5], [1.0, 2.0]]) == [[0.5], [1.0, 2.0]]
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert as_array([0.5]) == [0.5]
    torch = SimpleNamespace(float32="float32", tensor=lambda values, dtype: (values, dtype))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert as_array([0.5]) == ([0.5], "float32")


def test_classify_gives_probabilities(script: Callable[..., Script]) -> None:
    server = script(says(CLASSES))
    with client_of(server) as client:
        (output,) = client.classify("x")
    assert output.outputs.probs == [0.25, 0.75]
    assert (output.outputs.num_classes, output.outputs.label) == (2, "spam")
    assert server.requests[0][0] == "/classify"


def test_score_takes_parts_of_a_message_and_not_their_keys(script: Callable[..., Script]) -> None:
    server = script(says(SCORED))
    query = {"content": [{"type": "text", "text": "x"}]}
    with client_of(server) as client:
        assert [one.outputs.score for one in client.score(query, ["a", "b"])] == [0.5, 0.5]
        assert {body["text_2"] for _, body in server.requests} == {"a", "b"}
        assert [body["text_1"] for _, body in server.requests] == [query, query]
        with pytest.raises(BadRequestError, match="content") as caught:
            client.score({"text": "x"}, "y")
        assert caught.value.field == "data_1"
        with pytest.raises(UnsupportedParameterError, match="chat_template"):
            client.score("x", "y", chat_template="{{ x }}")


@pytest.mark.parametrize("method", ["embed", "encode", "classify", "reward"])
def test_pooling_of_a_server_for_another_task_says_so(script: Callable[..., Script], method: str) -> None:
    server = script(says({"detail": "Not Found"}, 404))
    with client_of(server) as client, pytest.raises(BadRequestError, match=r'runner="pooling"'):
        getattr(client, method)("x")


def test_pooling_params_that_no_route_takes_are_refused() -> None:
    client = VLLMClient(URL, None, "m")
    with pytest.raises(UnsupportedParameterError, match="step_tag_id"):
        client.encode("x", {"step_tag_id": 3})
    with pytest.raises(UnsupportedParameterError, match="name it by model="):
        client.embed("x", lora_request=object())


# -- beam search, the model, the engine --------------------------------------------------------------------------------


def test_beam_search_gives_the_prompts_tokens_and_the_answers(script: Callable[..., Script]) -> None:
    choices = [
        {
            "index": index,
            "text": f" {index}",
            "token_ids": [7 + index],
            "logprobs": {"token_logprobs": [-0.5 - index]},
            "finish_reason": "length",
            **({"prompt_token_ids": [1, 2]} if index == 0 else {}),
        }
        for index in (0, 1)
    ]
    server = script(says({"choices": choices}))
    with client_of(server) as client:
        ((best, second),) = [one.sequences for one in client.beam_search("a", {"beam_width": 2, "max_tokens": 1})]
        with pytest.raises(UnsupportedParameterError, match="structured_outputs"):
            client.beam_search("a", {"beam_width": 2, "max_tokens": 1, "structured_outputs": {}})
        with pytest.raises(BadRequestError, match="beam_search\\(\\) needs max_tokens"):
            client.beam_search("a", {"beam_width": 2})
    assert (best.tokens, best.cum_logprob, best.text) == ([1, 2, 7], -0.5, "a 0")
    assert (second.tokens, second.cum_logprob) == ([1, 2, 8], -1.5)
    ((_, body),) = server.requests
    assert (body["n"], body["use_beam_search"], body["length_penalty"]) == (2, True, 1.0)


def test_caches_and_the_profiler_are_commands_to_the_server(script: Callable[..., Script]) -> None:
    server = script(
        says({"success": False}), lambda client: client.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n")
    )
    with client_of(server) as client:
        assert client.reset_prefix_cache(reset_connector=True) is False
        client.reset_mm_cache()
        client.start_profile("x", max_iterations=3)
        client.stop_profile()
    paths = [path for path, _ in server.requests]
    assert paths == [
        "/reset_prefix_cache?reset_running_requests=false&reset_external=true",
        "/reset_mm_cache",
        "/start_profile",
        "/stop_profile",
    ]
    assert server.requests[2][1]["max_iterations"] == 3


def test_a_server_without_the_command_says_what_it_needs(script: Callable[..., Script]) -> None:
    server = script(says({"detail": "Not Found"}, 404))
    with client_of(server) as client:
        with pytest.raises(UnsupportedMethodError, match="VLLM_SERVER_DEV_MODE"):
            client.reset_prefix_cache()
        with pytest.raises(UnsupportedMethodError, match="profiler_config"):
            client.start_profile()


def test_default_sampling_params_are_those_of_the_generation_config(
    script: Callable[..., Script], tmp_path: Path
) -> None:
    config = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "eos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    server = script(says({"data": [{"id": "other", "root": "/"}, {"id": "m", "root": str(tmp_path)}]}))
    with client_of(server) as client:
        params = client.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, 99)


def test_default_sampling_params_of_files_that_are_elsewhere_say_so(script: Callable[..., Script]) -> None:
    server = script(says({"data": [{"id": "m", "root": "/no/such/folder"}]}))
    with client_of(server) as client, pytest.raises(UnsupportedMethodError, match="/no/such/folder"):
        client.get_default_sampling_params()


# -- arguments by position ---------------------------------------------------------------------------------------------


def test_chat_takes_by_position_what_vllm_llm_does(script: Callable[..., Script]) -> None:
    server = script(says(CHAT))
    with client_of(server) as client:
        client.chat(MESSAGES, {"max_tokens": 4}, False, None, 3, "{{ x }}", "auto", False, True)
        with pytest.raises(BadRequestError, match="was chat_template before"):
            client.chat(MESSAGES, {"max_tokens": 4}, False, None, "{{ x }}")
        with pytest.raises(BadRequestError, match="given twice"):
            client.chat(MESSAGES, {"max_tokens": 4}, False, None, 3, priority=3)
        with pytest.raises(BadRequestError, match="by position"):
            client.chat(MESSAGES, None, False, *[None] * 11)
        with pytest.raises(BadRequestError, match="lora_name and lora_path"):
            client.chat(MESSAGES, None, False, object())
    ((_, body),) = server.requests
    assert (body["priority"], body["chat_template"]) == (3, "{{ x }}")
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)


def test_an_adapter_is_the_model_of_a_request_to_a_server_that_has_it(script: Callable[..., Script]) -> None:
    server = script(says(CHAT))
    with client_of(server) as client:
        client.chat(MESSAGES, None, False, SimpleNamespace(lora_name="mine", lora_path="/x", lora_int_id=1))
    ((_, body),) = server.requests
    assert body["model"] == "mine"
    assert "lora_request" not in body


def test_generate_takes_what_older_versions_took(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    params = {"max_tokens": 4}
    with client_of(server) as typed:
        client: Any = typed
        client.generate("a", params, False)
        client.generate(prompt_token_ids=[[1, 2]], sampling_params=params)
        client.generate(None, params, [[3, 4]], False)
        client.generate(None, params, [5, 6])
        client.generate("a", params, None, False)
        with pytest.raises(BadRequestError, match="both"):
            client.generate("a", params, [[3, 4]])
        with pytest.raises(BadRequestError, match="neither"):
            client.generate()
    assert [body["prompt"] for _, body in server.requests] == ["a", [1, 2], [3, 4], [5, 6], "a"]


def test_tokenization_kwargs_become_fields_of_the_request(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    with client_of(server) as client:
        client.generate("a", tokenization_kwargs={"add_special_tokens": False}, lora_request=None)
        client.generate("a", tokenization_kwargs={})
        with pytest.raises(BadRequestError, match="given twice"):
            client.generate("a", tokenization_kwargs={"add_special_tokens": False}, add_special_tokens=True)
    assert [body.get("add_special_tokens") for _, body in server.requests] == [False, None]


@dataclass
class EngineArgs:
    """In the place of vLLM's."""

    model: str = "x"
    max_model_len: int | None = None
    seed: int = 0


def test_a_handle_from_engine_args_has_what_differs_from_the_defaults(home: Path) -> None:
    more: dict[str, Any] = {"command": standin.command(), "keep_alive": INSTANT}
    with (
        ManagedVLLM("m", max_model_len=256, **more) as plain,
        ManagedVLLM.from_engine_args(EngineArgs("m", max_model_len=256), **more) as made,
    ):
        assert (made.id, made.started_it) == (plain.id, False)
    with pytest.raises(ConfigError, match=r"vllm\.EngineArgs"):
        ManagedVLLM.from_engine_args({"model": "demo"})
