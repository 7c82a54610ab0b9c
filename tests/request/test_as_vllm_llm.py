"""What scripts give to `vllm.LLM` is taken, and means the same: prompts, conversations, limits, tools, pictures."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image as pillow
from PIL import ImageOps
from scripted_server import ANSWER, Script, client_of, says, streams

from managed_vllm import Image, Logprob, SamplingParams, VLLMClient
from managed_vllm.errors import BadRequestError, UnsupportedParameterError

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"choices": [{"index": 0, "message": {"content": "x"}, "token_ids": [7], "finish_reason": "stop"}]}


def loose(client: VLLMClient) -> Any:
    """For what a type checker would refuse, and scripts do."""
    return client


@contextlib.contextmanager
def loosely(server: Script, **options: Any) -> Iterator[Any]:
    with client_of(server, **options) as client:
        yield client


# -- nothing else than vllm.LLM does -----------------------------------------------------------------------------------


def test_generate_without_a_limit_goes_to_the_models_length(script: Callable[..., Script]) -> None:
    room = {"count": 3, "max_model_len": 64, "tokens": [1, 2, 3]}
    server = script(says(room), says(ANSWER))
    with loosely(server) as client:
        client.generate("a b c", {"max_tokens": None}, add_special_tokens=False)
    assert server.requests[0][0] == "/tokenize"
    assert server.requests[0][1]["add_special_tokens"] is False
    assert server.requests[1][1]["max_tokens"] == 61
    server = script(says({**room, "count": 0}), says(ANSWER))
    with loosely(server) as client:
        client.generate([5] * 10, SamplingParams(max_tokens=None))
        client.generate([5] * 10, SamplingParams(max_tokens=7))
    assert [body["max_tokens"] for path, body in server.requests if path != "/tokenize"] == [54, 7]


def test_without_detokenizing_there_is_no_text(script: Callable[..., Script]) -> None:
    given: Any = ANSWER
    choice = {**given["choices"][0], "logprobs": {"tokens": ["fine"], "token_logprobs": [-0.5]}}
    server = script(says({**ANSWER, "choices": [choice]}))
    with loosely(server) as client:
        (output,) = client.generate("a", {"detokenize": False, "logprobs": 0})
    (completion,) = output.outputs
    assert (completion.text, completion.token_ids) == ("", [7])
    assert completion.logprobs == [{7: Logprob(-0.5)}]
    assert "detokenize" not in server.requests[0][1]


def test_echo_would_have_no_effect_and_is_refused() -> None:
    with pytest.raises(UnsupportedParameterError, match="outputs have the prompt"):
        loose(VLLMClient("http://127.0.0.1:1", None, "m")).generate("a", echo=True)


@pytest.mark.parametrize("mark", [None, 1, 3, 6, 8])
def test_a_picture_arrives_as_it_is_meant_to_be_seen(mark: int | None) -> None:
    picture = pillow.new("RGB", (40, 20), "red")
    if mark is not None:
        picture.getexif()[0x0112] = mark
    seen = pillow.open(io.BytesIO(Image.of(picture).data))
    assert seen.size == ImageOps.exif_transpose(picture).size == ((20, 40) if mark in (6, 8) else (40, 20))


# -- nothing refused without need --------------------------------------------------------------------------------------


def test_a_prompt_may_have_what_becomes_a_field_of_its_request(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    prompt = {"prompt": "a", "cache_salt": "mine", "multi_modal_data": None, "multi_modal_uuids": None}
    with loosely(server) as client:
        client.generate({**prompt, "mm_processor_kwargs": {}})
        with pytest.raises(UnsupportedParameterError, match="prompt_embeds"):
            client.generate({"prompt": "a", "prompt_embeds": [1.0]})
    ((_, body),) = server.requests
    assert (body["cache_salt"], body["prompt"]) == ("mine", "a")
    assert "mm_processor_kwargs" not in body


def test_images_of_a_prompt_may_have_ids_of_their_own(script: Callable[..., Script]) -> None:
    server = script(says(CHAT))
    picture = pillow.new("RGB", (4, 4))
    prompt = {
        "prompt": "<image>a",
        "multi_modal_data": {"image": [picture, picture]},
        "multi_modal_uuids": {"image": ["one", None]},
        "mm_processor_kwargs": {"size": 3},
    }
    with loosely(server, media_ids=True) as client:
        client.generate(prompt)
        with pytest.raises(BadRequestError, match="2 images but 1"):
            client.generate({**prompt, "multi_modal_uuids": {"image": ["one"]}})
    body = server.requests[0][1]
    _, first, second = body["messages"][0]["content"]
    assert first["uuid"] == "one" != second["uuid"]
    assert body["mm_processor_kwargs"] == {"size": 3}


def test_numpys_numbers_and_object_arrays_are_taken(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    with loosely(server, max_in_flight=1) as client:
        client.generate([np.int64(1), np.int64(2)], {"max_tokens": np.int64(3)}, priority=np.int64(4))
        client.generate(np.array(["a", "b"], dtype=object))
        client.generate([{"prompt_token_ids": [np.int32(5)]}, [np.int64(6), 7]])
    bodies = [body for _, body in server.requests]
    assert [body["prompt"] for body in bodies] == [[1, 2], "a", "b", [5], [6, 7]]
    assert (bodies[0]["max_tokens"], bodies[0]["priority"]) == (3, 4)


class Message:
    """In the place of the OpenAI SDK's `ChatCompletionMessage`."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self, *, exclude_none: bool) -> dict[str, Any]:
        return {name: value for name, value in self.fields.items() if value is not None or not exclude_none}


def test_conversations_may_be_objects_and_arrays_and_have_arguments_as_dicts(script: Callable[..., Script]) -> None:
    server = script(says(CHAT))
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "ä"}}}
    with loosely(server) as client:
        client.chat([Message(role="user", content="hi", refusal=None)])
        client.chat(np.array([{"role": "user", "content": np.array([{"type": "text", "text": "a"}], dtype=object)}]))
        client.chat([*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}])
        client.chat([{"role": "user", "content": None}])
    first, second, third, fourth = (body["messages"] for _, body in server.requests)
    assert fourth == [{"role": "user", "content": []}]
    assert first == [{"role": "user", "content": "hi"}]
    assert second == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert third[1]["tool_calls"][0]["function"]["arguments"] == '{"x": "ä"}'
    assert third[1]["content"] is None
    assert call["function"]["arguments"] == {"x": "ä"}  # the caller's own is as it was


# -- tools without a parser --------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
NO_PARSER = {
    "error": {"message": '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'}
}


def test_tools_without_a_parser_are_in_the_prompt_and_not_parsed(script: Callable[..., Script]) -> None:
    server = script(says(NO_PARSER, 400), says(CHAT))
    with loosely(server, max_in_flight=1) as client:
        outputs = client.chat([MESSAGES, MESSAGES], tools=TOOLS)
    assert [output.outputs[0].text for output in outputs] == ["x", "x"]
    assert [body.get("tool_choice") for _, body in server.requests] == [None, "none", "none"]


def test_a_stream_with_tools_goes_without_a_parser(script: Callable[..., Script]) -> None:
    chunk = {"id": "1", "choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [7], "finish_reason": "stop"}]}
    server = script(says(NO_PARSER, 400), streams(chunk, b"[DONE]"))
    with loosely(server) as client:
        assert "".join(part.outputs[0].text for part in client.stream(MESSAGES, tools=TOOLS)) == "x"


@pytest.mark.parametrize(
    ("field", "value", "says_", "option"),
    [
        ("tool_choice", "auto", NO_PARSER["error"]["message"], "tool_call_parser="),
        (
            "chat_template",
            "{{ x }}",
            "but --trust-request-chat-template is not set",
            "trust_request_chat_template=True",
        ),
        ("mm_processor_kwargs", {"a": 1}, "but --trust-request-mm-kwargs is not set", "trust_request_mm_kwargs=True"),
    ],
)
def test_what_a_server_refuses_for_want_of_an_option_names_our_argument(
    script: Callable[..., Script], field: str, value: Any, says_: str, option: str
) -> None:
    server = script(says({"error": {"message": says_}}, 400))
    with (
        client_of(server) as client,
        pytest.raises(BadRequestError, match=f"{field}= needs a server .*{re.escape(option)}") as caught,
    ):
        client.chat(MESSAGES, tools=TOOLS, **{field: value})
    assert caught.value.field == field
    assert len(server.requests) == 1
