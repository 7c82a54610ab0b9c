"""Sampling parameters and request fields: what is wrong dies at once, the rest is on the wire as it was meant."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from vllm_version import version_of_vllm

from managed_vllm import SamplingParams
from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.fields import (
    BOTH_ROUTES,
    CHAT_ONLY,
    COMPLETIONS_ONLY,
    NEWER,
    REFUSED,
    CallFields,
    checked,
    known,
)
from managed_vllm.request.sampling import ONLY_BY_TOKENS, REFUSED_IN_STRUCTURED_OUTPUTS, StructuredOutputsParams
from managed_vllm.request.sampling import REFUSED as REFUSED_PARAMETERS

FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}

# -- wrong values ------------------------------------------------------------------------------------------------------

ROWS: list[Any] = [[], [[]], [1], [[1], [1, 2]], [[-2]], [["1"]], "12", 5]
WRONG: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, -1, 1.5, "2", True)),
    *(("temperature", value) for value in (-0.1, 2.1, math.nan, math.inf, "hot", True)),
    *(("top_p", value) for value in (0, -0.1, 1.1, math.nan)),
    *(("top_k", value) for value in (-2, 1.0, "5")),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)),
    *(("repetition_penalty", value) for value in (0, -1, math.inf, math.nan)),
    *(("seed", value) for value in (2**63, -(2**63) - 1, 1.0)),
    *(("stop", value) for value in ("", ["a", ""], [1], 5, {"a": 1})),
    *(("stop_token_ids", value) for value in ("12", [1.5], [-1], ["1"], 7, [True])),
    *(("bad_words", value) for value in ("word", [""], [1])),
    *(("ignore_eos", value) for value in (2, "yes")),
    *(("max_tokens", value) for value in (0, -1, 1.5)),
    *(("min_tokens", value) for value in (-1, 0.5)),
    *((name, value) for name in ("logprobs", "prompt_logprobs") for value in (-2, 1.5)),
    *(("logprob_token_ids", value) for value in ([], list(range(129)), "1")),
    *(("allowed_token_ids", value) for value in ([], [-1])),
    *(("trace_decode_token_ids", value) for value in ([], [-1], "12", 5)),
    *(("prompt_logprob_token_ids", value) for value in ROWS),
    *(("prompt_logprob_start", value) for value in (-1, 1.5, 0)),  # 0: of nothing
    ("skip_reading_prefix_cache", "yes"),
    *(("truncate_prompt_tokens", value) for value in (-2, 1.5)),
    ("truncation_side", "middle"),
    *(("logit_bias", value) for value in ({"a": 1}, {1.5: 1}, {1: math.nan}, {-1: 0}, {1: "x"}, [1])),
    *(("thinking_token_budget", value) for value in (-2, 1.0, True)),
    ("repetition_detection", {"max_pattern_size": 3, "min_count": 1}),
    ("repetition_detection", {"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}),
    ("repetition_detection", 3),
    *(("extra_args", value) for value in ({"a": None}, {"a": {"b": 1}}, {"a": 2**65}, {1: 1}, [1])),
    ("stream_interval", 0),
    ("routed_experts_prompt_start", -1),
    ("watermarking", 2),
    *(("structured_outputs", value) for value in ({}, {"regex": ""}, {"regex": "a", "grammar": "b"}, "a", 5)),
    *(("structured_outputs", {"choice": value}) for value in ([], [""], [1])),
    *(("structured_outputs", {"json": value}) for value in ("{", "[]", 5)),
    ("structured_outputs", {"json_object": False}),
    ("structured_outputs", {"structural_tag": ""}),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r:.30}" for name, value in WRONG])
def test_a_wrong_value_dies_at_construction_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    assert pickle.loads(pickle.dumps(caught.value)).field == name


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(BadRequestError, match="min_tokens must be at most max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(BadRequestError, match="n must be 1 with temperature=0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(BadRequestError, match="stop can't be with detokenize=False"):
        SamplingParams(stop="a", detokenize=False)
    with pytest.raises(BadRequestError, match="trace_decode_token_ids is for n=1"):
        SamplingParams(n=2, trace_decode_token_ids=[1])
    assert SamplingParams(n=2).n == 2


# -- wrong names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "hint"), [("temprature", "'temperature'"), ("max_token", "'max_tokens'"), ("topp", "'top_p'")]
)
def test_a_misspelt_name_dies_with_the_nearest_one(wrong: str, hint: str) -> None:
    given: dict[str, Any] = {wrong: 1}
    makes: list[Callable[[], Any]] = [lambda: SamplingParams(**given), lambda: SamplingParams.of(given)]
    for make in makes:
        with pytest.raises(UnsupportedParameterError, match=f"did you mean.*{hint}") as caught:
            make()
        assert caught.value.field == wrong


def test_a_name_like_no_other_dies_with_all_that_are_known() -> None:
    with pytest.raises(UnsupportedParameterError, match=r"known are: allowed_token_ids, .*watermarking"):
        SamplingParams.of({"zzz": 1})


@pytest.mark.parametrize("name", sorted(REFUSED_PARAMETERS.keys() - {"output_kind"}))
def test_what_no_route_takes_is_refused_with_the_reason(name: str) -> None:
    assert name not in FIELDS
    with pytest.raises(UnsupportedParameterError, match=f"{name} can't be passed on") as caught:
        SamplingParams.of({name: True})
    assert REFUSED_PARAMETERS[name] in caught.value.message


def test_what_is_no_sampling_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedParameterError, match="not int"):
        SamplingParams.of(5)


# -- what becomes of right ones ----------------------------------------------------------------------------------------


NEUTRAL = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 16},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
}
"""What vLLM's `SamplingParams()` means, and a server would take from the model's generation_config."""


def sent(given: Any, *, chat: bool = False) -> dict[str, Any]:
    """The request fields, without those that only say what is meant by silence."""
    request = SamplingParams.of(given).to_request(chat=chat)
    return {name: value for name, value in request.items() if name not in NEUTRAL or value != NEUTRAL[name]}


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_what_is_left_out_has_vllms_default_and_not_the_models(chat: bool) -> None:
    assert SamplingParams().to_request(chat=chat) == SamplingParams.of({}).to_request(chat=chat) == NEUTRAL
    assert SamplingParams.of({"top_p": None}).top_p == 1.0
    assert body_of({}, {"temperature": 0.5}, chat=chat).items() >= {**NEUTRAL, "temperature": 0.5}.items()


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_without_sampling_parameters_the_server_has_its_own_and_16_tokens(chat: bool) -> None:
    def without(fields: dict[str, Any], extra: Any = None) -> dict[str, Any]:
        return CallFields(fields, extra, 1, chat=chat).with_params(None)

    assert without({}) == {"max_tokens": 16}
    assert without({"max_tokens": 5, "top_k": 3}) == {"max_tokens": 5, "top_k": 3}
    assert without({}, {"max_tokens": None}) == {}
    if chat:
        assert without({"max_completion_tokens": 5}) == {"max_completion_tokens": 5}


def test_no_limit_is_said_by_max_tokens_none() -> None:
    assert "max_tokens" not in SamplingParams(max_tokens=None).to_request(chat=True)
    assert SamplingParams.of({"max_tokens": None}).max_tokens is None


def test_fields_may_be_assigned_to_and_are_checked() -> None:
    params = SamplingParams(temperature=0)
    params.max_tokens = 5
    assert params.given == {"temperature", "max_tokens"}
    with pytest.raises(BadRequestError, match="min_tokens must be at most"):
        params.min_tokens = 6
    with pytest.raises(BadRequestError, match="top_p must be in"):
        params.top_p = 2
    with pytest.raises(UnsupportedParameterError, match="did you mean 'top_p'"):
        params.topp = 1
    assert (params.min_tokens, params.top_p, params.max_tokens) == (0, 1.0, 5)


def test_a_copy_is_one_of_its_own() -> None:
    params = SamplingParams(max_tokens=5)
    for copied in (params.clone(), copy.copy(params), pickle.loads(pickle.dumps(params)), SamplingParams.of(params)):
        assert copied == params
        assert copied.given == {"max_tokens"}
        copied.seed = 3
    assert params == SamplingParams(max_tokens=5)
    assert params.given == {"max_tokens"}


HARMLESS: list[dict[str, Any]] = [
    *({"output_kind": kind} for kind in ("FINAL_ONLY", 2)),
    *({"flat_logprobs": False}, {"skip_clone": False}, {"detokenize": True}, {"logprobs": None}, {"best_of": 1}),
    *({"trace_decode_token_ids": None}, {"skip_reading_prefix_cache": None}, {"extra_args": None}),
]


@pytest.mark.parametrize("given", HARMLESS, ids=str)
def test_what_asks_for_nothing_is_no_reason_to_refuse(given: dict[str, Any]) -> None:
    assert SamplingParams(**given) == SamplingParams.of(given) == SamplingParams()


def test_values_that_vllm_takes_are_taken() -> None:
    assert sent({"logprobs": False, "ignore_eos": 1}) == {"logprobs": 0, "ignore_eos": True}
    bias = {1: 1000, 2: -math.inf, 3: 5}
    assert sent({"logit_bias": bias})["logit_bias"] == {"1": 100, "2": -100, "3": 5}
    assert SamplingParams(logit_bias=bias).logit_bias == bias
    assert sent({"extra_args": {"on": True}}) == {"vllm_xargs": {"on": True}}


def test_values_are_kept_in_plain_types() -> None:
    class Number:
        """As numpy's and torch's integers."""

        def __index__(self) -> int:
            return 7

    params = SamplingParams(
        n=Number(),  # type: ignore[arg-type]
        stop="a",
        stop_token_ids=(token for token in (3, 3, Number())),  # type: ignore[arg-type]
        logit_bias={"5": 1},  # type: ignore[dict-item]
        logprobs=True,
    )
    assert (params.n, params.stop, params.stop_token_ids) == (7, ("a",), (3, 7))
    assert params.logit_bias == {5: 1}
    assert params.logprobs == 1
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).n == 2
    json.dumps(params.to_request(chat=True))


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_every_field_is_on_the_wire_under_a_name_that_the_route_knows(chat: bool) -> None:
    for name, value in EXAMPLES.items():
        request = sent({name: value}, chat=chat)
        assert request or name == "detokenize", name
        assert set(request) <= known(chat=chat), name
    assert set(EXAMPLES) | set(ONLY_BY_TOKENS) == FIELDS


EXAMPLES: dict[str, Any] = {
    **{"n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "seed": 1},
    **{"frequency_penalty": 1, "repetition_penalty": 1.1, "watermarking": False, "stop": ["x"], "stop_token_ids": [5]},
    **{"detokenize": False},
    **{"bad_words": ["x"], "ignore_eos": True, "max_tokens": 5, "min_tokens": 1, "logprobs": 2, "prompt_logprobs": 0},
    **{"logprob_token_ids": [1], "skip_special_tokens": False, "spaces_between_special_tokens": False},
    **{"include_stop_str_in_output": True, "truncate_prompt_tokens": 5, "truncation_side": "left"},
    **{"logit_bias": {5: 1.0}, "allowed_token_ids": [1, 2], "structured_outputs": {"regex": "a"}},
    **{"thinking_token_budget": 5, "repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
    **{"extra_args": {"a": [1, "b"]}, "stream_interval": 4, "routed_experts_prompt_start": 1},
}


def test_what_only_one_route_takes_is_refused_for_a_chat() -> None:
    rows: dict[str, Any] = {"prompt_logprob_token_ids": np.array([[1, -1], [3, 4]]), "prompt_logprob_start": 1}
    given: dict[str, Any] = {**rows, "skip_reading_prefix_cache": False, "trace_decode_token_ids": [7, 7]}
    assert sent(given) == {
        **{"prompt_logprob_token_ids": ((1, -1), (3, 4)), "prompt_logprob_start": 1},
        **{"skip_reading_prefix_cache": False, "trace_decode_token_ids": (7, 7)},
    }
    for name in ONLY_BY_TOKENS:
        asked = rows if name in rows else {name: given[name]}
        with pytest.raises(UnsupportedParameterError, match=r"is for generate\(\)"):
            sent(asked, chat=True)


def test_logprobs_are_said_in_the_words_of_each_route() -> None:
    def chat(count: int) -> dict[str, Any]:
        return sent({"logprobs": count}, chat=True)

    assert chat(0) == {"logprobs": True, "top_logprobs": 0}
    assert chat(1) == {"logprobs": True, "top_logprobs": 2}  # the sampled token counts there
    assert chat(19)["top_logprobs"] == chat(20)["top_logprobs"] == 20
    assert chat(-1)["top_logprobs"] == -1
    assert sent({"logprobs": 3}) == {"logprobs": 3}
    asked = {"logprob_token_ids": [4, 5]}
    assert sent(asked) == {"logprob_token_ids": (4, 5), "logprobs": 0}
    assert sent(asked, chat=True) == {"logprob_token_ids": (4, 5), "logprobs": True, "top_logprobs": 0}


def test_extra_arguments_are_split_as_vllm_joins_them() -> None:
    params = {"extra_args": {"mine": 1, "kv_transfer_params": {"a": {"b": None}}}}
    assert sent(params, chat=True) == {"vllm_xargs": {"mine": 1}, "kv_transfer_params": {"a": {"b": None}}}


class Schema:
    """Stands for a pydantic model class."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object"}


@pytest.mark.parametrize(
    ("given_", "arrives"),
    [
        (Schema, {"json": {"type": "object"}}),
        ({"json": Schema}, {"json": {"type": "object"}}),
        ({"json": {"type": "string"}}, {"json": {"type": "string"}}),
        ({"json": '{"type": "string"}'}, {"json": '{"type": "string"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a", "b"]}, {"choice": ("a", "b")}),
        ({"grammar": "root ::= 'a'"}, {"grammar": "root ::= 'a'"}),
        ({"json_object": True, "disable_any_whitespace": False}, {"json_object": True}),
        ({"structural_tag": {"type": "structural_tag"}}, {"structural_tag": '{"type": "structural_tag"}'}),
        (StructuredOutputsParams(regex="b"), {"regex": "b"}),
    ],
)
def test_structured_outputs_of_each_kind(given_: Any, arrives: dict[str, Any]) -> None:
    assert sent({"structured_outputs": given_}) == {"structured_outputs": arrives}


def test_a_misspelt_structured_output_dies() -> None:
    with pytest.raises(UnsupportedParameterError, match="did you mean 'regex'"):
        SamplingParams(structured_outputs={"regexp": "a"})


@pytest.mark.parametrize("name", sorted(REFUSED_IN_STRUCTURED_OUTPUTS))
def test_what_the_server_alone_decides_of_structured_outputs_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedParameterError, match="vLLM does not read it") as caught:
        SamplingParams(structured_outputs={"json": {}, name: True})
    assert caught.value.field == name


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none() | st.integers() | st.floats() | st.text() | st.binary())
)
def test_whatever_is_given_is_taken_or_refused_by_type(given_: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**given_)
    except BadRequestError:
        return
    for chat in (False, True):
        if chat and params.given & ONLY_BY_TOKENS.keys():
            continue
        request = params.to_request(chat=chat)
        json.dumps(request, allow_nan=False)
        asked = {name for name, value in given_.items() if value is not None}
        assert len(request) >= len(asked - {"logprobs", "logprob_token_ids", "detokenize"})


# -- fields of the request ---------------------------------------------------------------------------------------------


def body_of(fields: dict[str, Any], params: Any = None, *, chat: bool = False, extra: Any = None) -> dict[str, Any]:
    common = CallFields(fields, extra, 1, chat=chat)
    made = common.with_params(SamplingParams.of(params))
    return common.body({"messages": []} if chat else {"prompt": "x"}, made, 0)


def test_known_fields_go_into_the_body() -> None:
    tools = [{"type": "function"}]
    assert body_of({"tools": tools, "echo": None}, {"top_k": 3}, chat=True) == {
        **NEUTRAL,
        "messages": [],
        "tools": tools,
        "top_k": 3,
    }


@pytest.mark.parametrize(
    ("name", "chat", "why"),
    [
        ("chat_template_kwarg", True, "did you mean 'chat_template_kwargs'"),
        ("zzz", True, r"no such field in vLLM 0.32 and 0.33, nor has the server; extra_body=\{'zzz'"),
        ("tools", False, r"only chat\(\) takes it"),
        ("suffix", True, r"only generate\(\) takes it"),
        ("guided_json", True, r"vLLM ignores it; use structured_outputs=\{'json'"),
        ("stream", True, r"return whole answers; stream\(\) streams"),
        ("prompt", False, "first argument"),
        ("lora_request", True, "name it by model="),
        ("tokenization_kwargs", False, "add_special_tokens="),
    ],
)
def test_a_field_that_the_route_does_not_know_is_refused(name: str, chat: bool, why: str) -> None:
    with pytest.raises(UnsupportedParameterError, match=why) as caught:
        checked({name: {"a": 1}}, chat=chat)
    assert caught.value.field == name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields_are_in_no_other_table(name: str) -> None:
    assert name not in BOTH_ROUTES | CHAT_ONLY | COMPLETIONS_ONLY


def test_what_asks_for_nothing_is_taken() -> None:
    assert checked({"use_beam_search": False, "lora_request": None, "stream": False}, chat=True) == {}


def test_token_ids_cannot_be_switched_off() -> None:
    with pytest.raises(UnsupportedParameterError, match="return_token_ids"):
        checked({"return_token_ids": False}, chat=False)


def test_extra_body_passes_anything_and_has_the_last_word() -> None:
    body = body_of({"user": "me"}, {"top_k": 3}, extra={"zzz": 1, "top_k": 4})
    assert body == {**NEUTRAL, "prompt": "x", "user": "me", "zzz": 1, "top_k": 4}


def test_none_in_extra_body_takes_a_field_out() -> None:
    assert "min_p" not in body_of({}, {}, extra={"min_p": None})
    assert body_of({}, {}, extra={"return_token_ids": None})["return_token_ids"] is None


def test_a_keyword_goes_before_the_defaults_of_sampling_parameters() -> None:
    assert body_of({"max_tokens": 5, "top_p": 0.5}, {"top_k": 3}).items() >= {"max_tokens": 5, "top_p": 0.5}.items()
    chat = body_of({"max_completion_tokens": 5}, {"top_k": 3}, chat=True)
    assert (chat["max_completion_tokens"], chat.get("max_tokens")) == (5, None)


def test_a_field_given_twice_is_refused_unless_it_says_the_same() -> None:
    with pytest.raises(BadRequestError, match="top_k is given twice") as caught:
        body_of({"top_k": 4}, {"top_k": 3})
    assert caught.value.field == "top_k"
    assert body_of({"top_k": 3}, {"top_k": 3})["top_k"] == 3


def test_priorities_are_for_all_or_one_each() -> None:
    def priorities(given: object) -> list[int]:
        common = CallFields({"priority": given}, None, 2, chat=False)
        return [common.body({"prompt": "x"}, common.with_params(None), index)["priority"] for index in range(2)]

    assert priorities([1, 2]) == [1, 2]
    assert priorities(3) == [3, 3]
    with pytest.raises(BadRequestError, match="2 prompts but 1 of priority="):
        priorities([1])


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_candidates_are_asked_for_as_ids(chat: bool) -> None:
    flag = "return_tokens_as_token_ids"
    assert body_of({}, {"logprobs": 2}, chat=chat)[flag] is True
    assert body_of({}, {"logprobs": -1}, chat=chat)[flag] is True
    assert body_of({}, {"logprob_token_ids": [1]}, chat=chat)[flag] is True
    assert flag not in body_of({}, {"logprobs": 0}, chat=chat)
    assert flag not in body_of({}, {}, chat=chat)
    assert body_of({flag: False}, {"logprobs": 2}, chat=chat)[flag] is False


# -- the installed vLLM ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_the_tables_of_fields_are_those_of_the_installed_vllm() -> None:
    chat = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol", reason="vllm is not installed")
    completion = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    of_chat, of_completion = (
        set(chat.ChatCompletionRequest.model_fields),
        set(completion.CompletionRequest.model_fields),
    )
    version = version_of_vllm()
    if version not in ("0.32", "0.33"):
        pytest.skip(f"the tables name the fields of vLLM 0.32 and 0.33, not of {version}")
    newer = {name for name, since in NEWER.items() if since > version}
    refused = set(REFUSED)
    assert set(BOTH_ROUTES) - newer == (of_chat & of_completion) - refused
    assert set(CHAT_ONLY) == of_chat - of_completion - refused
    assert set(COMPLETIONS_ONLY) == of_completion - of_chat - refused
    assert refused <= of_chat | of_completion


@pytest.mark.real
def test_real_every_parameter_of_vllms_class_is_taken_or_refused() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    theirs = {name for name in vllm.SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert theirs <= FIELDS | set(REFUSED_PARAMETERS)
    assert {"truncate_prompt_tokens", "truncation_side"} == FIELDS - theirs
    structured = {name for name in vllm.StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_")}
    ours = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    assert structured == ours | set(REFUSED_IN_STRUCTURED_OUTPUTS)
    assert FIELDS & set(REFUSED_PARAMETERS) == set()


@pytest.mark.real
def test_real_what_vllms_class_refuses_ours_refuses() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    tried = 0
    for name, value in WRONG:
        if name not in vllm.SamplingParams.__struct_fields__ or name == "structured_outputs":
            continue
        try:
            vllm.SamplingParams(**{name: value})
        except Exception:  # vLLM has a class of its own for it
            tried += 1
    assert tried >= 25  # and test_a_wrong_value_dies_at_construction_with_its_name has refused all of them
    for name, value in EXAMPLES.items():
        if name in vllm.SamplingParams.__struct_fields__ and name not in ("structured_outputs", "repetition_detection"):
            vllm.SamplingParams(**{name: value})


INF, NAN = math.inf, math.nan
VALUES: list[dict[str, Any]] = [
    *({"n": value} for value in (0, 1, 64, True, 2.0)),
    {"n": 64, "temperature": 0},
    *({"max_tokens": value} for value in (0, 1, None, 3.0, np.int64(3))),
    *({"temperature": value} for value in (NAN, INF, -0.1, 0, 1, 2.0, 2.5, "0.5", np.float32(0.5), 1e-6, 0.001)),
    *({"top_p": value} for value in (0, 1, 1.1, NAN)),
    *({"top_k": value} for value in (0, -1, -2, 10.0, 10**9)),
    *({"min_p": value} for value in (0, 1, 1.5, NAN)),
    *({"presence_penalty": 2.5}, {"frequency_penalty": -3}),
    *({"repetition_penalty": value} for value in (0, 3.0, -1)),
    *({"seed": value} for value in (-1, 2**63 - 1, 2**63, 2**64, 1.5, None)),
    *({"stop": value} for value in ("x", ["x"], [], "", [""], ("a", "b"), ["a"] * 5, [1])),
    *({"stop_token_ids": value} for value in ([1, 1], (1, 2), {1, 2}, [-1], ["1"], 5)),
    *({"bad_words": value} for value in (["a"], "a", [""])),
    *({"logprobs": value} for value in (-1, -2, 0, True, False, 50, 1.0)),
    *({"prompt_logprobs": value} for value in (0, -1, True, False)),
    *({"logit_bias": value} for value in ({1: 1000}, {"1": 5}, {1: -INF}, {1: INF}, {1: -100}, {-1: 1}, {})),
    *({"allowed_token_ids": value} for value in ([], [1])),
    *({"min_tokens": 5, "max_tokens": 3}, {"min_tokens": -1}, {"detokenize": False}, {"detokenize": True}),
    *({"detokenize": False, "stop": "x"}, {"skip_special_tokens": False}, {"skip_special_tokens": 1}),
    *({"include_stop_str_in_output": True, "stop": ["a"]}, {"ignore_eos": 1}, {"ignore_eos": True}),
    *({"extra_args": value} for value in ({"a": None}, {"a": True}, {"a": [1, 2]}, {"a": {"b": 1}}, None)),
    *({"structured_outputs": None}, {"stop_token_ids": None, "stop": None}, {"spaces_between_special_tokens": False}),
    *({"thinking_token_budget": -1}, {"flat_logprobs": False}, {"skip_clone": False}, {"output_kind": None}),
    {"truncate_prompt_tokens": 5},
]
"""What scripts give, and what they give by mistake."""
OUR_VERDICT: dict[str, str] = {
    "{'n': True}": "a flag is no number of answers",
    "{'max_tokens': 3.0}": "no integer, and the route refuses it",
    "{'logprobs': 1.0}": "no integer, and the route refuses it",
    "{'seed': 9223372036854775808}": "the route takes 64 bits",
    "{'seed': 18446744073709551616}": "the route takes 64 bits",
    "{'seed': 1.5}": "no integer, and the route refuses it",
    "{'stop': ('a', 'b')}": "vLLM asserts that it is a list; a tuple means the same",
    "{'stop_token_ids': [-1]}": "no token has this id",
    "{'bad_words': 'a'}": "vLLM takes each letter for a word",
    "{'logit_bias': {-1: 1}}": "no token has this id; vLLM finds out when the request runs",
    "{'allowed_token_ids': []}": "vLLM refuses it when the request is made",
    "{'extra_args': {'a': None}}": "the route takes texts, numbers and lists of them",
    "{'extra_args': {'a': {'b': 1}}}": "the route takes texts, numbers and lists of them",
    "{'truncate_prompt_tokens': 5}": "vLLM has it in tokenization_kwargs, the route among the others",
}
"""Where ours is another than that of `vllm.SamplingParams` (0.32), and why."""


def taken(make: Callable[[], Any]) -> bool:
    try:
        make()
    except Exception:  # vLLM has several classes for it
        return False
    return True


@pytest.mark.real
def test_real_vllms_verdict_on_a_value_is_ours_but_for_the_reasons_above() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    assert len(VALUES) > 70
    others = {
        str(value)
        for value in VALUES
        if taken(lambda: vllm.SamplingParams(**value)) != taken(lambda: SamplingParams(**value))  # noqa: B023
    }
    assert others == set(OUR_VERDICT)


@pytest.mark.real
def test_real_what_both_take_means_the_same_from_vllms_class_as_from_ours() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    compared = 0
    for value in VALUES:
        if str(value) in OUR_VERDICT or not taken(lambda: SamplingParams(**value)):  # noqa: B023
            continue
        assert meant(SamplingParams.of(vllm.SamplingParams(**value))) == meant(SamplingParams(**value)), value
        compared += 1
    assert compared > 45


def meant(params: SamplingParams) -> dict[str, Any]:
    """Its values, with vLLM's spelling of nothing, no seed, no budget, and a temperature too small for it."""
    found: dict[str, Any] = dataclasses.asdict(params)
    nothing: dict[str, tuple[Any, ...]] = {"seed": (-1,), "thinking_token_budget": (-1,)}
    for name, value in found.items():
        if value in ((), {}) or value in nothing.get(name, ()):
            found[name] = None
    if 0 < found["temperature"] < 0.01:
        found["temperature"] = 0.01
    return found


@pytest.mark.real
def test_real_a_vllm_sampling_params_says_what_it_means() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    defaults = SamplingParams.of(vllm.SamplingParams())
    assert defaults.to_request(chat=False) == NEUTRAL
    assert SamplingParams() == defaults
    assert {name: getattr(vllm.SamplingParams(), name) for name in NEUTRAL} == NEUTRAL
    theirs = vllm.SamplingParams(
        **{"n": 2, "stop": "a", "bad_words": ["b"], "logprobs": 2, "prompt_logprobs": 1, "seed": 3, "min_tokens": 2},
        structured_outputs=vllm.StructuredOutputsParams(choice=["a", "b"]),
        repetition_detection=vllm.RepetitionDetectionParams(max_pattern_size=2, min_count=2),
        output_kind=vllm.RequestOutputKind.FINAL_ONLY,
        logit_bias={1: 2.0},
    )
    request = SamplingParams.of(theirs).to_request(chat=False)
    expected = {
        **{"n": 2, "stop": ("a",), "bad_words": ("b",), "logprobs": 2, "prompt_logprobs": 1, "seed": 3},
        **{"min_tokens": 2, "logit_bias": {"1": 2.0}},
        "structured_outputs": {"choice": ("a", "b")},
        "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 0, "min_count": 2},
    }
    assert {name: request.get(name) for name in expected} == expected
    compact = vllm.StructuredOutputsParams(json={}, disable_any_whitespace=True)
    with pytest.raises(UnsupportedParameterError, match="structured_outputs_config="):
        SamplingParams.of(vllm.SamplingParams(structured_outputs=compact))
    with pytest.raises(UnsupportedParameterError, match="flat_logprobs"):
        SamplingParams.of(vllm.SamplingParams(flat_logprobs=True))
    rows = SamplingParams.of(vllm.SamplingParams(prompt_logprob_token_ids=[[1]]))
    assert rows.given & ONLY_BY_TOKENS.keys() == {"prompt_logprob_token_ids"}
    unlimited = vllm.SamplingParams(max_tokens=None)
    assert "max_tokens" not in SamplingParams.of(unlimited).to_request(chat=True)


@pytest.mark.real
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_real_each_parameter_comes_out_of_vllms_route_as_it_went_in(chat: bool) -> None:
    """Without a server: vLLM's own request model reads what is on the wire, and makes its sampling parameters of it."""
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    if chat:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as Request
    else:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Request
    for name, value in EXAMPLES.items():
        body = body_of({}, SamplingParams(**{name: value}), chat=chat)
        request = Request.model_validate(json.loads(json.dumps(body)))
        assert not request.model_extra, name
        if name == "detokenize":  # the client's own
            continue
        if name in ("truncate_prompt_tokens", "truncation_side"):
            assert getattr(request, name) == value
            continue
        arrived = getattr(request.to_sampling_params(request.max_tokens or 16, {}), name)
        if name == "structured_outputs":
            value = vllm.StructuredOutputsParams(**value)
        elif name == "repetition_detection":
            value = vllm.RepetitionDetectionParams(**value)
        elif name == "logprobs" and chat:
            value += 1  # the sampled token is one of the candidates
        assert arrived == value, name


@pytest.mark.real
def test_real_structured_outputs_pass_vllms_check() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vllm is not installed")
    xgrammar = pytest.importorskip("vllm.v1.structured_output.backend_xgrammar")
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "hello"}}
    kinds: list[dict[str, Any]] = [
        *({"json": Schema}, {"regex": "[0-9]{3}"}, {"choice": ["a", "b"]}, {"grammar": 'root ::= "yes" | "no"'}),
        *({"json_object": True}, {"structural_tag": tag}),
    ]
    for kind in kinds:
        sent = json.loads(json.dumps(StructuredOutputsParams.of(kind).to_request()))
        theirs = vllm.SamplingParams(structured_outputs=vllm.StructuredOutputsParams(**sent))
        xgrammar.validate_xgrammar_grammar(theirs)


def test_a_clone_is_another_that_is_equal() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], extra_args={"a": [1]})
    clone = params.clone()
    assert clone == params
    assert clone is not params
