"""Each sampling parameter against the real vLLM with the embedded model: it changes what it should, on its route."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from processes import own_state
from pydantic import BaseModel

from managed_vllm import CompletionOutput, ManagedVLLM, RequestOutput, SamplingParams, demo
from managed_vllm.errors import BadRequestError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

CONVERSATION = [{"role": "user", "content": demo.random_screen(random.Random(3), done=False).prompt()}]
"""The answer is a thought and one click, of some tokens and the end-of-sequence token."""
BANG = 3
"""The token "!", which the model never says."""
routes = pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    """One server of the embedded model for all tests; at the end nothing of it may be left.

    The model is free to write spaces between the parts of JSON, and knows no JSON: it would write nothing else.
    """
    with own_state():
        compact = {"backend": "xgrammar", "disable_any_whitespace": True}
        with ManagedVLLM("demo", keep_alive=0, structured_outputs_config=compact) as handle:
            yield handle


def whole(llm: ManagedVLLM, *, chat: bool = True, resume: bool | None = None, **given: Any) -> RequestOutput:
    """Greedy unless said otherwise."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 64, **given})
    if chat:
        return llm.chat(CONVERSATION, params, resume=resume)[0]
    return llm.generate("Screen:\n", params, resume=resume)[0]


def said(llm: ManagedVLLM, **given: Any) -> CompletionOutput:
    return whole(llm, **given).outputs[0]


@pytest.fixture(scope="module")
def plain(llm: ManagedVLLM) -> CompletionOutput:
    """The greedy answer to the conversation."""
    output = said(llm)
    assert "Action: click(start_box=" in output.text
    assert output.finish_reason == "stop"
    return output


# -- how to choose -----------------------------------------------------------------------------------------------------

WILD: dict[str, Any] = {"temperature": 2, "max_tokens": 32, "ignore_eos": True, "chat": False}


def test_temperature(llm: ManagedVLLM) -> None:
    greedy = {**WILD, "temperature": 0}
    assert said(llm, **greedy).token_ids == said(llm, **greedy).token_ids
    assert len({tuple(said(llm, **WILD).token_ids) for _ in range(4)}) > 1


def test_seed(llm: ManagedVLLM) -> None:
    assert said(llm, **WILD, seed=5).token_ids == said(llm, **WILD, seed=5).token_ids
    assert len({tuple(said(llm, **WILD, seed=seed).token_ids) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda narrow: next(iter(narrow))
)
def test_top_k_top_p_and_min_p_leave_the_likeliest(llm: ManagedVLLM, narrow: dict[str, Any]) -> None:
    greedy = said(llm, **{**WILD, "temperature": 0}).token_ids
    assert said(llm, **WILD, **narrow, seed=1).token_ids == greedy
    assert said(llm, **WILD, seed=1).token_ids != greedy


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties(llm: ManagedVLLM, penalty: str) -> None:
    """Of some tokens that it never says, the model says one for ever, unless it is punished for that."""
    few: dict[str, Any] = {"allowed_token_ids": range(BANG + 20, BANG + 28), "max_tokens": 8, "chat": False}
    assert len(set(said(llm, **few).token_ids)) == 1
    assert len(set(said(llm, **few, **{penalty: 2}).token_ids)) > 1


@routes
def test_logit_bias(llm: ManagedVLLM, chat: bool) -> None:
    assert said(llm, chat=chat, max_tokens=4, logit_bias={BANG: 100}).token_ids == [BANG] * 4


@routes
def test_allowed_token_ids(llm: ManagedVLLM, chat: bool) -> None:
    assert set(said(llm, chat=chat, max_tokens=8, allowed_token_ids=[BANG, BANG + 1]).token_ids) <= {BANG, BANG + 1}


def test_bad_words(llm: ManagedVLLM, plain: CompletionOutput) -> None:
    logprobs = said(llm, logprobs=0).logprobs
    assert logprobs is not None
    word = logprobs[0][plain.token_ids[0]].decoded_token
    assert word
    assert said(llm, bad_words=[word]).token_ids[0] != plain.token_ids[0]


def test_n(llm: ManagedVLLM) -> None:
    outputs = whole(llm, **WILD, n=3, seed=1).outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in outputs}) > 1


# -- when to end -------------------------------------------------------------------------------------------------------


@routes
def test_max_tokens(llm: ManagedVLLM, chat: bool) -> None:
    output = said(llm, chat=chat, max_tokens=3, ignore_eos=True)
    assert (len(output.token_ids), output.finish_reason) == (3, "length")


def test_min_tokens(llm: ManagedVLLM, plain: CompletionOutput) -> None:
    least = len(plain.token_ids) + 5
    assert len(said(llm, min_tokens=least, max_tokens=least + 20).token_ids) >= least


def test_ignore_eos(llm: ManagedVLLM, plain: CompletionOutput) -> None:
    output = said(llm, ignore_eos=True, max_tokens=len(plain.token_ids) + 5)
    assert (len(output.token_ids), output.finish_reason) == (len(plain.token_ids) + 5, "length")
    assert output.token_ids[: len(plain.token_ids)] == plain.token_ids


def test_stop_and_include_stop_str_in_output(llm: ManagedVLLM, plain: CompletionOutput) -> None:
    before = plain.text.partition("_box")[0]
    output = said(llm, stop=["never", "_box"])
    assert (output.text, output.finish_reason, output.stop_reason) == (before, "stop", "_box")
    assert said(llm, stop="_box", include_stop_str_in_output=True).text == before + "_box"


def test_stop_token_ids(llm: ManagedVLLM, plain: CompletionOutput) -> None:
    token = plain.token_ids[3]
    output = said(llm, stop_token_ids=[token])
    assert output.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)


def test_repetition_detection(llm: ManagedVLLM) -> None:
    repeating: dict[str, Any] = {"logit_bias": {BANG: 100}, "max_tokens": 50}
    detection = {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 4}
    assert len(said(llm, **repeating).token_ids) == 50
    assert len(said(llm, **repeating, repetition_detection=detection).token_ids) < 50


# -- the prompt --------------------------------------------------------------------------------------------------------


@routes
def test_truncate_prompt_tokens(llm: ManagedVLLM, chat: bool) -> None:
    full = whole(llm, chat=chat, max_tokens=1).prompt_token_ids

    def cut(**given: Any) -> list[int]:
        return whole(llm, chat=chat, max_tokens=1, truncate_prompt_tokens=2, **given).prompt_token_ids

    assert len(cut()) == 2
    assert cut(truncation_side="left") == full[-2:]
    assert cut(truncation_side="right") == full[:2]


# -- the text ----------------------------------------------------------------------------------------------------------


def test_skip_special_tokens(llm: ManagedVLLM, plain: CompletionOutput) -> None:
    on: dict[str, Any] = {"ignore_eos": True, "max_tokens": len(plain.token_ids) + 3}
    assert "<|im_end|>" in said(llm, **on, skip_special_tokens=False).text
    assert "<|im_end|>" not in said(llm, **on).text


# -- logprobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
@routes
def test_logprobs_have_exact_ids_and_ranks(llm: ManagedVLLM, chat: bool, count: int, resume: bool) -> None:
    output = said(llm, chat=chat, logprobs=count, max_tokens=12, ignore_eos=True, resume=resume)
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == 12
    for token, place in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(place)) == token
        assert len(place) == max(1, count)  # greedy: the sampled one is the likeliest
        values = [one.logprob for one in place.values()]
        assert values == sorted(values, reverse=True)
        if count:
            assert [one.rank for one in place.values()] == list(range(1, count + 1))
    assert output.cumulative_logprob == pytest.approx(
        sum(place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True))
    )


@routes
def test_an_unlikely_sampled_token_costs_no_candidate(llm: ManagedVLLM, chat: bool) -> None:
    """Raw logprobs are told, from before the bias; so "!" is far behind."""
    output = said(llm, chat=chat, logprobs=3, max_tokens=3, logit_bias={BANG: 100})
    assert output.logprobs is not None
    for place in output.logprobs:
        assert next(iter(place)) == BANG
        assert [one.rank for one in place.values()] == [None, 1, 2, 3]


@routes
def test_logprob_token_ids(llm: ManagedVLLM, chat: bool) -> None:
    output = said(llm, chat=chat, logprob_token_ids=[BANG, BANG + 1], max_tokens=3, ignore_eos=True)
    assert output.logprobs is not None
    for token, place in zip(output.token_ids, output.logprobs, strict=True):
        assert set(place) == {token, BANG, BANG + 1}


@routes
def test_prompt_logprobs(llm: ManagedVLLM, chat: bool) -> None:
    output = whole(llm, chat=chat, prompt_logprobs=2, max_tokens=1)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    for token, place in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert place is not None
        assert place[token].decoded_token is not None
        assert {1, 2} <= {one.rank for one in place.values()}


@routes
def test_more_logprobs_than_the_server_gives_are_refused(llm: ManagedVLLM, chat: bool) -> None:
    with pytest.raises(BadRequestError, match="max allowed: 20"):
        said(llm, chat=chat, logprobs=21)


# -- structured outputs ------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"go": {"type": "boolean"}},
    "required": ["go"],
    "additionalProperties": False,
}


class Go(BaseModel):
    go: bool


def is_go(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["go"] and isinstance(found["go"], bool)


@pytest.mark.parametrize(
    ("constraint", "right"),
    [
        pytest.param({"json": SCHEMA}, is_go, id="json"),
        pytest.param({"json": json.dumps(SCHEMA)}, is_go, id="json-text"),
        pytest.param({"json": Go}, is_go, id="pydantic"),
        pytest.param({"regex": "[0-9]{3}"}, re.compile("[0-9]{3}").fullmatch, id="regex"),
        pytest.param({"choice": ["left", "right"]}, ["left", "right"].__contains__, id="choice"),
        pytest.param({"grammar": 'root ::= "yes" | "no"'}, ["yes", "no"].__contains__, id="grammar"),
        pytest.param({"json_object": True}, lambda text: text.lstrip().startswith("{"), id="json_object"),
        pytest.param(
            {"structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": "hello"}}},
            "hello".__eq__,
            id="structural_tag",
        ),
    ],
)
@routes
def test_structured_outputs(llm: ManagedVLLM, chat: bool, constraint: dict[str, Any], right: Any) -> None:
    output = said(llm, chat=chat, structured_outputs=constraint)
    assert right(output.text), output.text


# -- whole and streamed ------------------------------------------------------------------------------------------------


def test_a_list_has_one_for_each_prompt(llm: ManagedVLLM) -> None:
    limits: Sequence[int] = (1, 5, 3)
    params = [SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True) for limit in limits]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(limits)


# -- by token ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True], ids=["whole", "streamed"])
def test_by_token_ids_all_is_the_same_and_each_rank_is_told(llm: ManagedVLLM, resume: bool) -> None:
    ids = llm.tokenize(str(CONVERSATION[0]["content"]))
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 48, "ignore_eos": True, "logprobs": 2}
    wild = {**given, "temperature": 2, "seed": 3, "logprobs": 19, "n": 2}
    for params in (given,) if resume else (given, wild, {**given, "logprobs": 0, "prompt_logprobs": 1}):
        text = llm.generate(ids, params, resume=resume)[0]
        tokens = llm.generate(ids, {**params, "detokenize": False}, resume=resume)[0]
        assert (text.request_id[:5], tokens.request_id[:9]) == ("cmpl-", "generate-")
        assert tokens.prompt_token_ids == text.prompt_token_ids == ids
        assert (tokens.prompt_logprobs is None) is (text.prompt_logprobs is None)
        for one, other in zip(tokens.outputs, text.outputs, strict=True):
            assert (one.text, one.token_ids) == ("", other.token_ids)
            assert (one.finish_reason, one.weight_versions) == (other.finish_reason, other.weight_versions)
            assert one.weight_version == "default"
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=0.05)
            assert one.logprobs is not None
            assert other.logprobs is not None
            for token, place, theirs in zip(one.token_ids, one.logprobs, other.logprobs, strict=True):
                mine = [each.logprob for each in place.values()]  # equally likely candidates may be others
                assert mine == pytest.approx([each.logprob for each in theirs.values()], abs=0.02)
                rank = place[token].rank
                assert rank is not None
                assert theirs[token].rank in (rank, None)
                assert rank > sum(each.logprob > place[token].logprob for each in place.values())


def test_a_parameter_that_only_goes_by_token_ids(llm: ManagedVLLM) -> None:
    prompt = "A long text to be read once, and then again. " * 20
    params = SamplingParams(temperature=0, max_tokens=4)
    llm.generate(prompt, params)
    cached = llm.generate(prompt, params)[0]
    anew = llm.generate(prompt, params.with_({"skip_reading_prefix_cache": True}))[0]
    assert (cached.num_cached_tokens or 0) > 0
    assert anew.num_cached_tokens == 0
    assert (anew.prompt, anew.prompt_token_ids) == (prompt, cached.prompt_token_ids)
    assert (anew.outputs[0].token_ids, anew.outputs[0].text) == (cached.outputs[0].token_ids, cached.outputs[0].text)
    with pytest.raises(BadRequestError, match="enable-trace-replay"):  # the route has it, this server does not
        llm.generate(prompt, params.with_({"trace_decode_token_ids": [5]}))
