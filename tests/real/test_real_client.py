"""The client against the real vLLM: streams, tokens, refusals, cancelling; and the OpenAI SDK on our connections."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from processes import engine_on_one_core, eventually, own_state
from pydantic import BaseModel

from managed_vllm import ManagedVLLM, RequestOutput, demo
from managed_vllm.client import VLLMClient, VLLMClientWrapper
from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    RequestTimeoutError,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

TEXT = "Screen:\nOK(1,2)\nStatus: "
LONGEST = 4096
"""`max_model_len` of the demo model's defaults."""
SCREENS = [demo.random_screen(random.Random(number), done=False) for number in range(6)]
routes = pytest.mark.parametrize("prompt", [TEXT, SCREENS[0].messages()], ids=["completion", "chat"])


@contextmanager
def server(model: str, **arguments: Any) -> Iterator[ManagedVLLM]:
    """A server of its own; at the end nothing of it may be left."""
    with own_state():
        with ManagedVLLM(model, keep_alive=0, **arguments) as handle:
            yield handle


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    """One server of the embedded model for all tests but the last ones. Its parser makes tool calls of its text."""
    with server("demo", enable_auto_tool_choice=True, tool_call_parser="hermes") as handle:
        yield handle


@pytest.fixture(scope="module")
def spaces(llm: ManagedVLLM) -> dict[str, float]:
    """A `logit_bias` against white space, which JSON may have between its parts: the model would write nothing else."""
    return {str(token): -100 for text in " \n\t\r" for token in llm.client.tokenize(text)}


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 1, "seed": 3, "n": 2, "stop": ["e"], "logprobs": 0},
    ],
    ids=["greedy", "seeded"],
)
def test_prompts_that_go_together_are_answered_as_each_by_itself(llm: ManagedVLLM, params: dict[str, Any]) -> None:
    prompts: list[Any] = [[30 + number, 31, 32] for number in range(24)]
    prompts += ["Screen:", "OK", "a longer text than the others", [10**6], [5] * 5000, "x", "y", "z"]
    given = {"max_tokens": 12, **params}
    llm.generate("x", given)  # so that the server is known
    together = llm.generate(prompts, given, return_exceptions=True)
    alone = llm.generate(prompts, [given] * len(prompts), return_exceptions=True)
    again = llm.generate(prompts, given, return_exceptions=True)  # by now as much of each is cached
    for one, other in zip(again, alone, strict=True):
        assert seen(one) == seen(other)
    assert sum("-" in one.request_id[5:] for one in results_of(together)) >= 16  # in groups


def results_of(results: Sequence[Any]) -> list[RequestOutput]:
    """Those that are answers."""
    return [one for one in results if not isinstance(one, Exception)]


def seen(result: Any) -> Any:
    """What a caller sees of an output or an error; times and ids differ."""
    if isinstance(result, Exception):
        return type(result), str(result), getattr(result, "index", None)
    found = {name: value for name, value in result.to_dict().items() if name not in VARYING}
    return found, {name: value for name, value in result.raw.items() if name not in ("id", "created")}


VARYING = {"request_id", "attempts", "latency", "started_at"}


# -- streams -----------------------------------------------------------------------------------------------------------


def joined(parts: Sequence[RequestOutput]) -> tuple[str, list[int], list[Any], Any, Any]:
    """Text, token ids, logprobs, reasons of what came in parts."""
    outputs = [part.outputs[0] for part in parts]
    ids = [token for output in outputs for token in output.token_ids]
    logprobs = [place for output in outputs for place in output.logprobs or ()]
    return "".join(output.text for output in outputs), ids, logprobs, outputs[-1].finish_reason, outputs[-1].stop_reason


STREAMED: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 60, "logprobs": 2},
    {"temperature": 1, "seed": 4, "max_tokens": 30, "ignore_eos": True},
    {"temperature": 0, "max_tokens": 60, "stop": ["start"], "include_stop_str_in_output": True},
    {"temperature": 0, "max_tokens": 5, "structured_outputs": {"choice": ["left", "right"]}},
]


@routes
@pytest.mark.parametrize("params", STREAMED, ids=["greedy", "seeded", "stop", "structured"])
def test_a_stream_says_what_the_whole_answer_says(llm: ManagedVLLM, prompt: Any, params: dict[str, Any]) -> None:
    whole = (llm.generate if isinstance(prompt, str) else llm.chat)(prompt, params)
    parts = list(llm.client.stream(prompt, params))
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert joined(parts) == joined(whole)
    assert parts[0].prompt_token_ids == whole[0].prompt_token_ids

    async def follow() -> list[RequestOutput]:
        return [part async for part in llm.async_client.stream(prompt, params)]

    assert joined(asyncio.run(follow())) == joined(whole)


def test_a_stream_comes_as_it_is_generated(llm: ManagedVLLM) -> None:
    params = {**ENDLESS, "max_tokens": 1000}
    whole = llm.generate(TEXT, params)
    with engine_on_one_core(llm):
        for _ in range(8):  # a test that is held up sees nothing before the end
            stream = llm.client.stream(TEXT, params)
            first, is_running = next(stream), running(llm)
            parts = [first, *stream]
            assert joined(parts) == joined(whole)
            if is_running:
                break
    assert is_running, "a part was there before the server was done"
    told = parts[-1]
    assert told.time_to_first_token is not None
    assert 0 < told.time_to_first_token < told.latency


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokenize_says_what_the_server_makes_of_a_prompt_and_detokenize_takes_it_back(llm: ManagedVLLM) -> None:
    text = f"{TEXT}é漢 <|im_end|>"
    tokens = llm.client.tokenize(text)
    assert tokens == llm.generate(text, {"max_tokens": 1})[0].prompt_token_ids
    assert llm.client.detokenize(tokens) == text
    messages = SCREENS[1].messages()
    assert llm.client.tokenize(messages) == llm.chat(messages, {"max_tokens": 1})[0].prompt_token_ids
    open_ended = llm.client.tokenize(messages, add_generation_prompt=False)
    assert open_ended == llm.client.tokenize(messages)[: len(open_ended)]
    assert len(open_ended) < len(llm.client.tokenize(messages))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_told_in_numbers(llm: ManagedVLLM) -> None:
    with pytest.raises(ContextLengthError) as caught:
        llm.generate([5] * (LONGEST + 900), {"max_tokens": 4})
    assert (caught.value.max_model_len, caught.value.prompt_tokens) == (LONGEST, LONGEST + 900)
    assert caught.value.instance == llm.id
    long = TEXT * LONGEST
    asks: list[Callable[[], Any]] = [
        lambda: llm.generate(long),
        lambda: llm.chat([{"role": "user", "content": long}]),
    ]
    for ask in asks:
        with pytest.raises(ContextLengthError) as caught:
            ask()
        assert caught.value.max_model_len == LONGEST
        assert (
            caught.value.prompt_tokens is None or caught.value.prompt_tokens > LONGEST
        )  # it is not counted to its end


def both(llm: ManagedVLLM) -> list[tuple[Callable[..., Any], Any]]:
    """Each way of asking, and something to ask."""
    return [(llm.generate, TEXT), (llm.chat, SCREENS[0].messages())]


def test_an_answer_that_is_too_long_is_told_in_numbers(llm: ManagedVLLM) -> None:
    for ask, prompt in both(llm):
        with pytest.raises(ContextLengthError) as caught:
            ask(prompt, {"max_tokens": LONGEST + 1})
        assert (caught.value.max_model_len, caught.value.max_tokens) == (LONGEST, LONGEST + 1)


def test_a_prompt_that_fills_the_context_to_the_last_token_is_too_long(llm: ManagedVLLM) -> None:
    """vLLM 0.32 says "max_tokens must be at least 1, got 0" then."""
    full = [5] * LONGEST
    output = llm.generate([full[1:]], {"max_tokens": 8})[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
    with pytest.raises(ContextLengthError, match="no room for an answer"):
        llm.generate([full], {"max_tokens": 8})
    with pytest.raises(BadRequestError) as caught:
        llm.generate(TEXT, extra_body={"max_tokens": 0})
    assert not isinstance(caught.value, ContextLengthError)


def test_one_that_is_too_long_spoils_no_other(llm: ManagedVLLM) -> None:
    prompts: list[str | list[int]] = [TEXT, [5] * (LONGEST + 1), TEXT]
    found: list[Any] = llm.generate(prompts, {"max_tokens": 4}, return_exceptions=True)
    assert [type(one) for one in found] == [RequestOutput, ContextLengthError, RequestOutput]
    assert found[1].index == 1


def test_a_model_that_the_server_does_not_have_is_named(llm: ManagedVLLM) -> None:
    for ask, prompt in both(llm):
        with pytest.raises(ModelNotFoundError, match="other-model") as caught:
            ask(prompt, model="other-model")
        assert caught.value.model == "other-model"


def test_a_wrong_key_is_an_authentication_error(llm: ManagedVLLM) -> None:
    for key in ("wrong", None):
        client = VLLMClient(llm.base_url, key, llm.model)
        try:
            asks: list[tuple[Callable[[Any], Any], Any]]
            asks = [(client.generate, TEXT), (client.tokenize, TEXT), (client.detokenize, [5])]
            for ask, given in asks:
                with pytest.raises(AuthenticationError):
                    ask(given)
        finally:
            client.close()


# -- cancelling --------------------------------------------------------------------------------------------------------


def metric(llm: ManagedVLLM, name: str, label: str = "") -> float:
    """Of the server's `/metrics`, the sum of one metric, with `label` in its labels."""
    key = {"Authorization": f"Bearer {llm.api_key}"}
    said = requests.get(f"{llm.base_url.removesuffix('/v1')}/metrics", headers=key, timeout=30).text
    found = re.findall(rf"^vllm:{name}\{{([^}}]*)\}} (\S+)$", said, re.MULTILINE)
    return sum(float(value) for labels, value in found if label in labels)


def running(llm: ManagedVLLM) -> float:
    return metric(llm, "num_requests_running") + metric(llm, "num_requests_waiting")


@contextmanager
def ended_early(llm: ManagedVLLM, count: int) -> Iterator[None]:
    """What is asked within, `count` requests with `ENDLESS`, ends on the server at once, unfinished."""
    before = metric(llm, "generation_tokens_total")
    with engine_on_one_core(llm):
        yield
        eventually(lambda: running(llm) == 0, "none of them runs")
    assert metric(llm, "generation_tokens_total") - before < count * ENDLESS["max_tokens"]


ENDLESS = {"temperature": 0, "max_tokens": LONGEST - 200, "ignore_eos": True}


@pytest.mark.parametrize("resume", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_cancelled_batch_ends_on_the_server(llm: ManagedVLLM, chat: bool, resume: bool) -> None:
    async def cancel() -> None:
        client = llm.async_client
        if chat:
            asking = asyncio.create_task(client.chat([s.messages() for s in SCREENS], ENDLESS, resume=resume))
        else:
            asking = asyncio.create_task(client.generate([s.prompt() for s in SCREENS], ENDLESS, resume=resume))
        await asyncio.to_thread(eventually, lambda: running(llm) == len(SCREENS), "all of them run", 60)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    with ended_early(llm, len(SCREENS)):
        asyncio.run(cancel())


def test_a_deadline_ends_generations_on_the_server(llm: ManagedVLLM) -> None:
    with ended_early(llm, len(SCREENS)), pytest.raises(RequestTimeoutError):
        llm.generate([s.prompt() for s in SCREENS], ENDLESS, timeout=0.5)


def test_a_stream_that_is_left_ends_on_the_server(llm: ManagedVLLM) -> None:
    with ended_early(llm, 1):
        parts = llm.client.stream(TEXT, ENDLESS)
        next(parts)
        del parts


# -- as the service scripts do -----------------------------------------------------------------------------------------


def judge(llm: Any, screens: Sequence[demo.Screen]) -> list[str]:
    """Code that is written for both, `vllm.LLM` and the wrapper of a server."""
    params = {"temperature": 0, "max_tokens": 64}
    conversations = [screen.messages() for screen in screens]
    if hasattr(llm, "generate_with_messages"):
        outputs = llm.generate_with_messages(conversations, params, None, use_tqdm=False)
    else:
        outputs = llm.generate([screen.prompt() for screen in screens], params)
    return [output.outputs[0].text for output in outputs]


def test_code_that_asks_for_generate_with_messages_finds_it(llm: ManagedVLLM) -> None:
    wrapper = VLLMClientWrapper(llm.base_url, llm.api_key, llm.model)
    try:
        answers = judge(llm, SCREENS)
        assert judge(wrapper, SCREENS) == answers
    finally:
        wrapper.close()
    assert all(screen.is_right(answer) for screen, answer in zip(SCREENS, answers, strict=True)), answers


# -- the OpenAI SDK ----------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"go": {"type": "boolean"}},
    "required": ["go"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "click", "strict": True, "parameters": SCHEMA}}]
MESSAGES: Any = SCREENS[0].messages()


class Go(BaseModel):
    go: bool


def is_go(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["go"] and isinstance(found["go"], bool)


def test_the_sdk_streams(llm: ManagedVLLM) -> None:
    asked: dict[str, Any] = {"model": llm.model, "messages": MESSAGES, "max_tokens": 64, "temperature": 0}
    expected = llm.chat(MESSAGES, {"max_tokens": 64, "temperature": 0})[0].outputs[0].text
    chunks = list(llm.openai.chat.completions.create(**asked, stream=True))
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected

    async def follow() -> list[Any]:
        async with await llm.async_openai.chat.completions.create(**asked, stream=True) as stream:
            return [chunk async for chunk in stream]

    chunks = asyncio.run(follow())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected


def test_a_stream_of_the_sdk_that_is_closed_ends_on_the_server(llm: ManagedVLLM) -> None:
    asked: dict[str, Any] = {"model": llm.model, "prompt": TEXT, "temperature": 0, "max_tokens": ENDLESS["max_tokens"]}
    with ended_early(llm, 1):
        with llm.openai.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "click"}}], ids=["required", "named"]
)
def test_the_sdk_calls_tools(llm: ManagedVLLM, spaces: dict[str, int], choice: Any) -> None:
    asked: dict[str, Any] = {"model": llm.model, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}
    asked.update(max_tokens=100, temperature=0, logit_bias=spaces, parallel_tool_calls=False)
    (call,) = llm.openai.chat.completions.create(**asked).choices[0].message.tool_calls or [None]
    assert call is not None
    assert call.function.name == "click"
    assert is_go(call.function.arguments)

    told = [
        part
        for chunk in llm.openai.chat.completions.create(**asked, stream=True)
        if chunk.choices
        for part in chunk.choices[0].delta.tool_calls or ()
    ]
    assert "".join(part.function.name or "" for part in told) == "click"
    assert json.loads("".join(part.function.arguments or "" for part in told)) == json.loads(call.function.arguments)

    params = {"max_tokens": 100, "temperature": 0, "logit_bias": spaces}
    only = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    ours = llm.chat(MESSAGES, params, **only)[0].outputs[0]
    assert [one["function"]["arguments"] for one in ours.tool_calls] == [call.function.arguments]


def test_tools_that_need_not_be_called_change_nothing_else(llm: ManagedVLLM) -> None:
    done = llm.openai.chat.completions.create(model=llm.model, messages=MESSAGES, tools=TOOLS, max_tokens=64)
    assert done.choices[0].message.content
    assert not done.choices[0].message.tool_calls


@pytest.mark.parametrize(
    "how",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "go", "schema": SCHEMA, "strict": True}}},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    ],
    ids=["response_format", "extra_body"],
)
def test_the_sdk_gets_structured_outputs(llm: ManagedVLLM, spaces: dict[str, int], how: dict[str, Any]) -> None:
    completions = llm.openai.chat.completions
    done = completions.create(model=llm.model, messages=MESSAGES, max_tokens=64, logit_bias=spaces, **how)
    assert is_go(done.choices[0].message.content or "")


def test_the_sdk_parses_into_a_model(llm: ManagedVLLM, spaces: dict[str, int]) -> None:
    done = llm.openai.chat.completions.parse(
        model=llm.model, messages=MESSAGES, max_tokens=64, logit_bias=spaces, response_format=Go
    )
    assert isinstance(done.choices[0].message.parsed, Go)


def test_what_is_refused_of_structured_outputs_has_no_effect_in_vllm(llm: ManagedVLLM) -> None:
    """If this fails, vLLM has come to read it: `sampling.REFUSED_IN_STRUCTURED_OUTPUTS` should let it pass."""
    asked: dict[str, Any] = {"model": llm.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    for without in ({"disable_any_whitespace": True}, {"whitespace_pattern": "_"}):
        body = {"structured_outputs": {"json": SCHEMA, **without}}
        text = llm.openai.chat.completions.create(**asked, extra_body=body).choices[0].message.content
        assert text
        assert " " in text


# -- other models ------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.slow
def test_a_pooling_server_starts_embeds_and_scores() -> None:
    with server("demo", runner="pooling", convert="embed") as llm:
        screens = [screen.prompt() for screen in SCREENS]
        outputs = llm.client.embed(screens)
        assert {output.outputs.hidden_size for output in outputs} == {128}
        assert len({tuple(output.outputs.embedding) for output in outputs}) == len(screens)
        tokens = llm.client.tokenize(screens[0])
        assert llm.client.embed([tokens])[0].outputs.embedding == pytest.approx(outputs[0].outputs.embedding, abs=1e-3)
        assert outputs[0].usage["prompt_tokens"] == len(tokens)

        same, *others = [one.outputs.score for one in llm.client.score(screens[0], screens)]
        assert same == pytest.approx(1, abs=0.01)
        cosines = [
            sum(a * b for a, b in zip(outputs[0].outputs.embedding, output.outputs.embedding, strict=True))
            for output in outputs[1:]
        ]
        assert others == pytest.approx(cosines, abs=0.02)

        together = llm.client.embed(screens * 4)
        pairs = llm.client.score([screens[0]] * 24, screens * 4)
        assert sum(one.request_id.count("-") == 2 for one in [*together, *pairs]) >= 40  # in groups
        vectors = [value for one in together[-len(screens) :] for value in one.outputs.embedding]
        assert vectors == pytest.approx([value for one in outputs for value in one.outputs.embedding], abs=1e-3)
        assert [one.outputs.score for one in pairs[-len(screens) :]] == pytest.approx([same, *others], abs=0.01)
        for number, screen in enumerate(screens):
            assert together[-len(screens) :][number].usage == outputs[number].usage
            assert pairs[-len(screens) :][number].usage == llm.client.score(screens[0], screen)[0].usage

        long: Any = [screens[0], "OK(1,2)\n" * LONGEST]
        found: list[Any] = llm.client.embed(long, return_exceptions=True)
        assert isinstance(found[1], ContextLengthError)
        with pytest.raises(BadRequestError):
            llm.generate(TEXT)


@pytest.mark.soak
@pytest.mark.slow
def test_generate_takes_images_as_chat_does(tmp_path: Path) -> None:
    """`generate` with `multi_modal_data` says to the model what a conversation with the same content says."""
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision", exc_type=ImportError)  # vLLM needs it for this model
    from managed_vllm.demo.random_vlm import make_random_vlm

    model = make_random_vlm(tmp_path / "model")
    arguments: dict[str, Any] = {"enforce_eager": True, "max_model_len": 8192, "gpu_memory_utilization": 0.1}
    arguments.update(kv_cache_memory_bytes=2**28, limit_mm_per_prompt={"image": 2}, trust_request_chat_template=True)
    params = {"temperature": 0, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
    red, blue = (pillow.new("RGB", (320, 200), color) for color in ("red", "blue"))
    with server(str(model), **arguments) as llm:
        content = [{"type": "image", "image": red}, {"type": "text", "text": "What"}, {"type": "image", "image": blue}]
        chat = llm.chat([{"role": "user", "content": content}], params)[0]
        with_names = llm.chat([{"role": "user", "content": content}], params, return_prompt_text=True)[0]
        assert with_names.prompt is not None
        text = with_names.prompt  # with the placeholders, as the model's own template puts them
        given = {"prompt": text, "multi_modal_data": {"image": [red, blue]}}
        output = llm.generate(given, params)[0]
        assert output.prompt_token_ids == chat.prompt_token_ids
        assert output.outputs[0].token_ids == chat.outputs[0].token_ids
        other = llm.generate({"prompt": text, "multi_modal_data": {"image": [blue, red]}}, params)[0]
        assert other.prompt_token_ids == chat.prompt_token_ids
        # Without placeholders the images stand before the text.
        prompts: list[Any] = [{"prompt": "What", "multi_modal_data": {"image": red}}, "What"]
        alone = llm.generate(prompts, params)
        assert len(alone[0].prompt_token_ids) > len(alone[1].prompt_token_ids) + 10
        (part,) = [one for one in llm.client.stream(given, {**params, "max_tokens": 1}) if one.outputs[0].token_ids]
        assert part.outputs[0].token_ids == output.outputs[0].token_ids[:1]
