"""Outputs have vLLM's shape: exact ids and ranks of logprobs' candidates on either route; pickled, as dicts."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples

from managed_vllm.request.fields import with_candidates_as_ids
from managed_vllm.request.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.sampling import SamplingParams

# -- vLLM's own way from an engine's logprobs to a route's answer ------------------------------------------------------


def of_engine(sampled: int, values: dict[int, float], count: int) -> dict[int, Logprob]:
    """What `vllm.LLM` returns for one token (0.32, `append_logprobs_for_next_position`): the sampled one first."""
    ordered = sorted(values, key=lambda token: -values[token])
    top = ordered if count < 0 else ordered[:count]
    found = {sampled: Logprob(values[sampled], ordered.index(sampled) + 1, f"<{sampled}>")}
    found |= {token: Logprob(values[token], rank, f"<{token}>") for rank, token in enumerate(top, 1)}
    return found


def name(token: int, body: dict[str, Any]) -> str:
    return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else f"<{token}>"


def answer_of(route: str, body: dict[str, Any], tokens: list[int], values: list[dict[int, float]]) -> dict[str, Any]:
    """As vLLM 0.32's `_create_chat_logprobs` and `_create_completion_logprobs`."""
    chat = route == "chat"
    asked = body["top_logprobs"] if chat else body["logprobs"]
    places = [of_engine(token, of, asked) for token, of in zip(tokens, values, strict=True)]
    choice: dict[str, Any] = {"index": 0, "token_ids": tokens, "finish_reason": "stop", "stop_reason": None}
    if chat:
        content = []
        for token, place in zip(tokens, places, strict=True):
            shown = [one for i, one in enumerate(place.items()) if asked == -1 or i < asked]
            top = [{"token": name(t, body), "logprob": p.logprob, "bytes": [1]} for t, p in shown]
            entry = {"token": name(token, body), "logprob": place[token].logprob, "top_logprobs": top}
            content.append({**entry, "bytes": list(f"<{token}>".encode())})
        choice |= {"message": {"content": "text"}, "logprobs": {"content": content}}
        return {"id": "chat-1", "choices": [choice], "prompt_token_ids": [1, 2]}
    choice["logprobs"] = {
        "tokens": [name(token, body) for token in tokens],
        "token_logprobs": [place[token].logprob for token, place in zip(tokens, places, strict=True)],
        "top_logprobs": [
            {name(t, body): p.logprob for i, (t, p) in enumerate(place.items()) if asked == -1 or asked >= i}
            for place in places
        ],
    }
    return {"id": "cmpl-1", "choices": [{**choice, "text": "text", "prompt_token_ids": [1, 2]}]}


def output_of(route: str, count: int, tokens: list[int], values: list[dict[int, float]]) -> RequestOutput:
    params = SamplingParams(logprobs=count)
    body = with_candidates_as_ids(params.to_request(chat=route == "chat"), chat=route == "chat")
    answer = json.loads(json.dumps(answer_of(route, body, tokens, values)))
    return RequestOutput.from_response(answer, body, chat=route == "chat", logprobs=count)


distinct = st.permutations(range(30)).map(lambda order: {token: -0.5 - place / 8 for place, token in enumerate(order)})


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["chat", "completion"]),
    st.sampled_from([-1, 0, 1, 2, 5, 19]),
    st.lists(st.tuples(st.integers(0, 29), distinct), min_size=1, max_size=3),
)
def test_ids_logprobs_and_ranks_are_those_of_vllm(
    route: str, count: int, places: list[tuple[int, dict[int, float]]]
) -> None:
    tokens = [token for token, _ in places]
    output = output_of(route, count, tokens, [values for _, values in places])
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    for found, (token, values) in zip(logprobs, places, strict=True):
        expected = of_engine(token, values, count)
        assert list(found) == list(expected)
        for candidate, one in found.items():
            assert one.logprob == expected[candidate].logprob
            if one.rank is None:  # the routes don't tell it
                assert candidate == token
                assert count == 0 or expected[token].rank > count  # type: ignore[operator]
            else:
                assert one.rank == expected[candidate].rank
    total = output.outputs[0].cumulative_logprob
    assert total == pytest.approx(sum(values[token] for token, values in places))


def test_of_a_chats_twenty_candidates_one_may_be_missing() -> None:
    """The server gives no 21st, and the sampled one counts."""
    values = {token: -float(token) for token in range(30)}
    found = output_of("chat", 20, [25], [values]).outputs[0].logprobs
    assert found is not None
    assert list(found[0]) == [25, *range(19)]
    assert found[0][25].rank is None


@pytest.mark.parametrize("route", ["chat", "completion"])
def test_equally_likely_ones_have_each_a_rank_of_their_own(route: str) -> None:
    values = {token: -1.0 for token in range(6)}
    found = output_of(route, 3, [2], [values]).outputs[0].logprobs
    assert found is not None
    assert found[0][2].rank == 1
    assert sorted(one.rank or 0 for one in found[0].values()) == [1, 2, 3]


def test_texts_of_tokens_come_where_the_routes_tell_them() -> None:
    values = {token: -float(token) for token in range(9)}

    def text(route: str, count: int) -> str | None:
        logprobs = output_of(route, count, [1], [values]).outputs[0].logprobs
        assert logprobs is not None
        return logprobs[0][1].decoded_token

    assert text("chat", 0) == text("completion", 0) == text("chat", 2) == "<1>"
    assert text("completion", 2) is None


def test_chosen_candidates_have_no_ranks() -> None:
    body = {"logprobs": 0, "logprob_token_ids": [7, 8], "return_tokens_as_token_ids": True}
    top = {"token_id:5": -1.0, "token_id:7": -3.0, "token_id:8": -2.0}
    told = {"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": [top]}
    choice = {"index": 0, "text": "x", "token_ids": [5], "logprobs": told}
    found = RequestOutput.from_response({"choices": [choice]}, body, chat=False).outputs[0].logprobs
    assert found == [{5: Logprob(-1.0), 7: Logprob(-3.0), 8: Logprob(-2.0)}]


def test_without_ids_of_the_candidates_the_sampled_token_is_there() -> None:
    told = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0, "b": -2.0}]}
    choice = {"index": 0, "text": "a", "token_ids": [5], "logprobs": told}
    found = RequestOutput.from_response({"choices": [choice]}, {"logprobs": 2}, chat=False).outputs[0].logprobs
    assert found == [{5: Logprob(-1.0, None, "a")}]


def test_with_echo_the_prompts_logprobs_are_left_out() -> None:
    told = {"tokens": ["p", "a"], "token_logprobs": [None, -1.0], "top_logprobs": [None, {"a": -1.0}]}
    choice = {"index": 0, "text": "a", "token_ids": [5], "logprobs": told}
    output = RequestOutput.from_response({"choices": [choice]}, {"logprobs": 0, "echo": True}, chat=False).outputs[0]
    assert output.logprobs == [{5: Logprob(-1.0, None, "a")}]
    assert output.cumulative_logprob == -1.0


# -- the rest of an answer ---------------------------------------------------------------------------------------------

CHAT = {
    "id": "chat-1",
    "choices": [
        {
            "index": 1,
            "message": {"content": None, "reasoning": "hm", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
            "token_ids": [9, 9],
            "finish_reason": "tool_calls",
            "stop_reason": None,
        },
        {"index": 0, "message": {"content": "a"}, "token_ids": [8], "finish_reason": "stop", "stop_reason": "x"},
    ],
    "prompt_token_ids": [1, 2],
    "prompt_text": "rendered",
    "prompt_logprobs": [None, {"2": {"logprob": -1.0, "rank": 2, "decoded_token": "b"}}],
    "usage": {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
    "metrics": {"time_to_first_token_ms": 3.0},
    "kv_transfer_params": {"a": 1},
}


def test_everything_that_the_server_tells_has_its_place() -> None:
    output = RequestOutput.from_response(CHAT, {}, chat=True)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("chat-1", "rendered", [1, 2])
    assert output.prompt_logprobs == [None, {2: Logprob(-1.0, 2, "b")}]
    assert (output.num_cached_tokens, output.metrics) == (1, {"time_to_first_token_ms": 3.0})
    assert output.kv_transfer_params == {"a": 1}
    assert output.finished
    first, second = output.outputs
    assert (first.index, first.text, first.token_ids, first.stop_reason) == (0, "a", [8], "x")
    assert (second.text, second.reasoning, second.tool_calls) == ("", "hm", CHAT["choices"][0]["message"]["tool_calls"])  # type: ignore[index]
    assert first.logprobs is None
    assert first.cumulative_logprob is None
    assert first.finished()


def full() -> RequestOutput:
    logprobs = [{5: Logprob(-1.0, 1, "a"), 6: Logprob(-2.0, 2)}]
    one = CompletionOutput(0, "text" * 50, [5], -1.0, logprobs, "stop", 7, tool_calls=[{"id": "c"}])
    return RequestOutput("r", "prompt", [1], [one], [None, {2: Logprob(-1.0)}], model="m", epoch=3, raw={"a": 1})


def test_as_a_dict_as_json_pickled_and_back_it_is_the_same() -> None:
    output = full()
    assert RequestOutput.from_dict(output.to_dict()) == output
    assert RequestOutput.from_dict(json.loads(json.dumps(output.to_dict()))) == output
    again = pickle.loads(pickle.dumps(output))
    assert again == output
    assert again.raw == {"a": 1}
    assert "raw" not in output.to_dict()
    assert output != RequestOutput("other", None, [], [])


@pytest.mark.parametrize("wrong", [{}, {"outputs": [5]}, {"outputs": [], "zzz": 1}, {"outputs": None}])
def test_another_dict_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the dict of a RequestOutput"):
        RequestOutput.from_dict(wrong)


def test_outputs_are_hashable_by_their_ids() -> None:
    stats = RequestStats("m", 1, 1, 0, 0.0, 0.0, None)
    one = EmbeddingRequestOutput.of({"id": "a"}, EmbeddingOutput([1.0]), stats)
    same = EmbeddingRequestOutput.of({"id": "a"}, EmbeddingOutput([1.0]), stats)
    other = EmbeddingRequestOutput.of({"id": "b"}, EmbeddingOutput([1.0]), stats)
    assert one == same
    assert one != other
    assert len({one, same, other}) == 2
    output = RequestOutput(request_id="a", prompt=None, prompt_token_ids=[1], outputs=[])
    assert {output: 1}[dataclasses.replace(output)] == 1


def of_tools(count: int, **more: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "click", "arguments": "{}"}}
    choice = {"index": 0, "finish_reason": "tool_calls", "token_ids": [7] * count}
    return {"id": "1", "choices": [{**choice, "message": {"content": None, "tool_calls": [call]}, **more}]}


def test_a_tool_call_that_was_cut_by_max_tokens_is_told_from_a_whole_one() -> None:
    def reason(answer: dict[str, Any], **body: Any) -> str | None:
        output = RequestOutput.from_response(answer, body, chat=True).outputs[0]
        assert output.tool_calls
        return output.finish_reason

    assert reason(of_tools(24), max_tokens=24) == "length"
    assert reason(of_tools(24), max_completion_tokens=24) == "length"
    assert reason(of_tools(23), max_tokens=24) == "tool_calls"
    assert reason(of_tools(24)) == "tool_calls"
    assert reason(of_tools(24, stop_reason=5), max_tokens=24) == "tool_calls"
    without_ids = of_tools(0, token_ids=None)
    assert reason({**without_ids, "usage": {"completion_tokens": 24}}, max_tokens=24) == "length"
    assert reason(without_ids, max_tokens=24) == "tool_calls"


def test_its_repr_is_short() -> None:
    assert len(repr(full())) < 300
    assert "1 prompt tokens" in repr(full())


@pytest.mark.real
def test_real_the_attributes_are_those_of_vllm() -> None:
    vllm = pytest.importorskip("vllm.outputs", reason="vllm is not installed")
    theirs = vllm.RequestOutput("r", None, [1], None, [], finished=True)
    assert {attribute for attribute in vars(theirs) if not hasattr(full(), attribute)} == set()
    fields = vllm.CompletionOutput.__dataclass_fields__
    assert {attribute for attribute in fields if not hasattr(full().outputs[0], attribute)} == set()
    logprobs = pytest.importorskip("vllm.logprobs")
    assert set(logprobs.Logprob.__dataclass_fields__) == {"logprob", "rank", "decoded_token"}
