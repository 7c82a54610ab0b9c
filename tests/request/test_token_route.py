"""vLLM's `/inference/v1/generate`: when it is used, what comes of it, and that nobody can tell but by what it adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import standin
from free_ports import nobody
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import INSTANT
from scripted_server import QUICK, Script, client_of, hangs, says
from standin_tokens import openapi as standin_openapi

from managed_vllm import ManagedVLLM, RequestOutput, RestartPolicy, SamplingParams, VLLMClient
from managed_vllm.errors import BadRequestError, RequestTimeoutError, UnsupportedParameterError
from managed_vllm.request.outputs import without_texts
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.retry import ResponseLostError
from managed_vllm.request.token_generation import TokenGeneration
from managed_vllm.request.token_outputs import output_of
from managed_vllm.request.token_route import PATH, parse

pytestmark = pytest.mark.usefixtures("unhurried")
PATIENT = RestartPolicy(max_restarts=100, backoff_initial_s=0.0)
IDS = [50, 51, 52]
THERE = says({"error": {"message": "token_ids: Field required", "code": 400}}, 400)
OFF = says({"error": {"message": "Scale-out endpoints are disabled.", "code": 403}}, 403)
CHOICE: dict[str, Any] = {"index": 0, "token_ids": [7], "finish_reason": "length", "stop_reason": None}
TOKENS = says({"request_id": "t", "choices": [CHOICE]})
COMPLETION = says({"id": "1", "choices": [{"index": 0, "text": "fine", "token_ids": [7], "finish_reason": "stop"}]})
NO_TEXT: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "detokenize": False}


def server(**order: Any) -> ManagedVLLM:
    environment = standin.orders(**{"scale_out": True, **order})
    return ManagedVLLM("stand-in", command=standin.command(), env=environment, keep_alive=INSTANT, restart=PATIENT)


def paths(server: Script) -> list[str]:
    return [path for path, _ in server.requests]


# -- when it is used ---------------------------------------------------------------------------------------------------


def test_token_ids_without_texts_go_there_where_the_server_has_it(script: Callable[..., Script]) -> None:
    ranked = [{"token_id": token, "logprob": -1.0 * rank, "rank": rank} for token, rank in ((7, 5), (4, 1), (3, 2))]
    candidates = {"content": [{**ranked[0], "top_logprobs": ranked}]}
    scripted = script(THERE, says({"choices": [{**CHOICE, "logprobs": candidates}]}), TOKENS)
    with client_of(scripted) as client:
        given = {**NO_TEXT, "logprobs": 2, "seed": 3, "stop_token_ids": [9], "extra_args": {"a": 1}}
        fields: dict[str, Any] = {"priority": 2, "cache_salt": "s", "user": "me", "session_id": "x"}
        first = client.generate(IDS, given, **fields)[0].outputs[0]
        output = client.generate(IDS, NO_TEXT)[0]
    assert paths(scripted)[0] == PATH
    assert scripted.requests[0][1] == {"model": "m"}  # asked once, with nothing to generate
    wire = scripted.requests[1][1]
    assert {name: wire[name] for name in ("model", "token_ids", "priority", "cache_salt", "session_id")} == {
        **{"model": "m", "token_ids": IDS, "priority": 2, "cache_salt": "s", "session_id": "x"}
    }
    assert wire["sampling_params"].items() >= {"max_tokens": 200, "detokenize": False, "logprobs": 3, "seed": 3}.items()
    assert wire["sampling_params"]["extra_args"] == {"a": 1}
    assert "user" not in wire
    assert "stream" not in wire
    assert set(paths(scripted)) == {PATH}
    assert [{token: one.rank for token, one in place.items()} for place in first.logprobs or ()] == [{7: 5, 4: 1, 3: 2}]
    assert (output.outputs[0].token_ids, output.outputs[0].text, output.prompt_token_ids) == ([7], "", IDS)


@pytest.mark.parametrize(
    ("prompt", "params", "fields"),
    [
        (IDS, {"max_tokens": 200}, {}),
        ("text", NO_TEXT, {}),
        (IDS, {**NO_TEXT, "logprobs": 20}, {}),
        (IDS, {**NO_TEXT, "logprobs": -1}, {}),
        (IDS, {**NO_TEXT, "logprob_token_ids": [4]}, {}),
        (IDS, {**NO_TEXT, "truncate_prompt_tokens": 2}, {}),
        (IDS, NO_TEXT, {"response_format": {"type": "text"}}),
        (IDS, NO_TEXT, {"extra_body": {"a_field_of_tomorrow": 1}}),
    ],
    ids=str,
)
def test_all_else_goes_by_completions(script: Callable[..., Script], prompt: Any, params: Any, fields: Any) -> None:
    def act(client: Any) -> None:
        path, _ = scripted.asked
        (THERE if path == PATH else COMPLETION)(client)

    scripted = script(act)
    with client_of(scripted) as client:
        client.generate(prompt, params, **fields)
    assert [(path, set(body)) for path, body in scripted.requests if path == PATH] in ([], [(PATH, {"model"})])
    assert paths(scripted)[-1] == "/v1/completions"


@pytest.mark.parametrize("missing", [OFF, says({"detail": "Not Found"}, 404), says({"detail": "x"}, 405)])
def test_a_server_without_the_route_is_asked_once_and_then_by_completions(
    script: Callable[..., Script], missing: Any
) -> None:
    scripted = script(missing, COMPLETION)
    with client_of(scripted) as client:
        for _ in range(2):
            assert client.generate(IDS, NO_TEXT)[0].outputs[0].text == ""
    assert paths(scripted) == [PATH, "/v1/completions", "/v1/completions"]


def test_a_server_that_comes_back_without_the_route_is_asked_by_completions(script: Callable[..., Script]) -> None:
    scripted = script(THERE, TOKENS, OFF, COMPLETION)
    with client_of(scripted) as client:
        outputs = [client.generate(IDS, NO_TEXT)[0] for _ in range(3)]
    assert [one.outputs[0].token_ids for one in outputs] == [[7]] * 3
    assert [one.attempts for one in outputs] == [1, 2, 1]
    assert paths(scripted) == [PATH, PATH, PATH, "/v1/completions", "/v1/completions"]


def test_an_older_vllm_spells_its_candidates(script: Callable[..., Script]) -> None:
    def answer(*names: str) -> Any:
        ranked = [{"token": name, "logprob": -1.0 * place} for place, name in enumerate(names)]
        return says({"choices": [{**CHOICE, "logprobs": {"content": [{**ranked[0], "top_logprobs": ranked}]}}]})

    scripted = script(THERE, answer("token_id:7", "token_id:5", "token_id:4"), answer("seven"), COMPLETION)
    with client_of(scripted) as client:
        first = client.generate(IDS, {**NO_TEXT, "logprobs": 1})[0].outputs[0]
        assert [list(place) for place in first.logprobs or ()] == [[7]]  # the likeliest itself
        client.generate(IDS, {**NO_TEXT, "logprobs": 1})
    assert paths(scripted)[-2:] == [PATH, "/v1/completions"]


def test_a_cassette_is_not_asked(script: Callable[..., Script]) -> None:
    scripted = script(COMPLETION)
    with client_of(scripted) as client:
        client.async_client.sender.one_by_one = True
        client.generate(IDS, NO_TEXT)
    assert paths(scripted) == ["/v1/completions"]


def test_a_server_that_does_not_answer_is_a_matter_of_the_request(script: Callable[..., Script]) -> None:
    with client_of(script(hangs)) as client:
        errors = client.generate([IDS], NO_TEXT, timeout=0.2, return_exceptions=True)
    found: list[Any] = [(type(one), getattr(one, "index", None)) for one in errors]
    assert found == [(RequestTimeoutError, 0)]


def test_an_older_vllm_that_does_not_tell_all_is_asked_by_completions(script: Callable[..., Script]) -> None:
    old = says({"choices": [{"index": 0, "token_ids": [7], "finish_reason": "stop"}]})  # no stop_reason
    scripted = script(THERE, old, COMPLETION)
    with client_of(scripted) as client:
        for _ in range(2):
            assert client.generate(IDS, NO_TEXT)[0].outputs[0].token_ids == [7]
    assert paths(scripted) == [PATH, PATH, "/v1/completions", "/v1/completions"]


def test_of_several_servers_all_must_have_it(script: Callable[..., Script]) -> None:
    def scripted(probe: Any) -> Script:
        def act(client: Any) -> None:
            path, body = made.asked
            ((TOKENS if body.get("token_ids") else probe) if path == PATH else COMPLETION)(client)

        made = script(act)
        return made

    for probes, used in (((THERE, THERE), True), ((THERE, OFF), False)):
        servers = [scripted(probe) for probe in probes]
        with VLLMClient([one.url for one in servers], "key", "m", retry=QUICK) as client:
            client.generate([IDS] * 4, NO_TEXT)
        asked = [(path, body) for one in servers for path, body in one.requests if path in (PATH, "/v1/completions")]
        assert [path for path, body in asked if "token_ids" in body or "prompt" in body] == [
            PATH if used else "/v1/completions"
        ] * 4


def test_one_of_several_servers_that_is_down_is_not_waited_for(script: Callable[..., Script]) -> None:
    def act(client: Any) -> None:
        path, body = up.asked
        if path == "/openapi.json":
            return says(standin_openapi(scale_out=True))(client)
        (TOKENS if body.get("token_ids") else THERE)(client)

    up = script(act)
    with nobody() as down, VLLMClient([up.url, down], "key", "m", retry=QUICK) as client:
        outputs = client.generate([IDS] * 3, NO_TEXT)
        outputs += client.generate(IDS, {**NO_TEXT, "skip_reading_prefix_cache": True})
    assert [one.outputs[0].token_ids for one in outputs] == [[7]] * 4
    assert {path for path, body in up.requests if body} == {PATH}


def test_what_the_route_refuses_is_asked_for_by_completions(script: Callable[..., Script]) -> None:
    """Whatever it is: so errors are those of the other route, and `--max-logprobs` counts no candidate too many."""
    refusal = says({"error": {"message": "Requested sample logprobs of 6, which is greater than max allowed: 5"}}, 400)
    scripted = script(THERE, refusal, COMPLETION)
    with client_of(scripted) as client:
        assert client.generate(IDS, {**NO_TEXT, "logprobs": 5})[0].attempts == 2
    assert scripted.requests[-1][0] == "/v1/completions"
    assert scripted.requests[-1][1]["logprobs"] == 5


# -- fields that need it -----------------------------------------------------------------------------------------------


def test_a_field_that_only_it_takes_goes_there_with_the_text_if_wanted(home: Path) -> None:
    with server() as llm:
        text = llm.generate("Hi", {"temperature": 0, "max_tokens": 4, "skip_reading_prefix_cache": True, "logprobs": 0})
        ids = standin.continuation(standin.prompt_ids("Hi"), 4)
        first = text[0].outputs[0]
        assert (text[0].prompt, text[0].prompt_token_ids) == ("Hi", standin.prompt_ids("Hi"))
        assert (first.token_ids, first.text) == (ids, standin.text_of(ids))
        assert text[0].request_id.startswith("generate-tokens-")
        assert first.logprobs is not None
        assert [list(place) for place in first.logprobs] == [[token] for token in ids]
        without = llm.generate(IDS, {**NO_TEXT, "skip_reading_prefix_cache": True})[0]
        assert (without.outputs[0].token_ids, without.outputs[0].text) == (standin.continuation(IDS, 200), "")


BLOCKED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 0}, {}, "has no such field"),
    ({"skip_reading_prefix_cache": True, "logprobs": 2}, {}, "give logprobs=0 or detokenize=False"),
    ({"skip_reading_prefix_cache": True, "truncate_prompt_tokens": 2}, {}, "truncate_prompt_tokens= is not taken"),
    ({"skip_reading_prefix_cache": True}, {"response_format": {"type": "text"}}, "response_format= is not taken"),
]


def test_what_does_not_go_there_is_said_before_anything_is_generated(home: Path) -> None:
    with server() as llm:
        before = llm.metrics().generation_tokens
        for params, fields, why in BLOCKED:
            with pytest.raises(UnsupportedParameterError, match=why) as caught:
                llm.generate(IDS, params, **fields)
            assert caught.value.field in params
        with pytest.raises(UnsupportedParameterError, match=r"stream\(\) does not go"):
            list(llm.stream("Hi", {"skip_reading_prefix_cache": True}))
        with pytest.raises(BadRequestError, match="can't be resumed"):
            llm.generate(IDS, {**NO_TEXT, "bad_words": ["x"]}, resume=True)
        with pytest.raises(BadRequestError, match="detokenize=False"):
            llm.generate(IDS, {"max_tokens": 200, "skip_reading_prefix_cache": True}, resume=True)
        assert llm.metrics().generation_tokens == before


def test_where_the_server_lacks_it_the_error_says_how_to_get_it(home: Path) -> None:
    params = {"trace_decode_token_ids": [5]}
    with server(scale_out=False) as llm:
        with pytest.raises(UnsupportedParameterError, match="enable_scale_out=True") as caught:
            llm.generate(IDS, params)
        assert caught.value.field == "trace_decode_token_ids"
        with pytest.raises(UnsupportedParameterError, match=r"is for generate\(\)"):
            llm.chat([{"role": "user", "content": "Hi"}], params)
        with pytest.raises(UnsupportedParameterError, match="trace_decode_token_ids"):
            list(llm.stream("Hi", params))


def test_weight_versions_come_by_it_where_completions_does_not_tell_them(script: Callable[..., Script]) -> None:
    def openapi(*names: str) -> dict[str, Any]:
        told = standin_openapi(scale_out=True)
        told["components"]["schemas"]["CompletionRequest"]["properties"] = {name: {} for name in names}
        return told

    span = {"version": "v1", "start": 0, "end": 1}
    choice = {"index": 0, "token_ids": [7], "text": "x", "finish_reason": "length", "stop_reason": None}
    answers = [says({"choices": [{**choice, "weight_versions": found}]}) for found in ([span], None)]
    for answer, told in zip(answers, (True, False), strict=True):
        with client_of(script(says(openapi("prompt")), answer)) as client:
            if told:
                output = client.generate(IDS, {"max_tokens": 1}, return_weight_versions=True)[0]
                assert (output.weight_version, output.outputs[0].text) == ("v1", "x")
            else:
                with pytest.raises(UnsupportedParameterError, match="does not tell them"):
                    client.generate(IDS, {"max_tokens": 1}, return_weight_versions=True)


# -- both routes say the same ------------------------------------------------------------------------------------------

STATS = RequestStats("m", 1, 1, 0, 0.0, 0.0, None)
ranked = st.lists(st.integers(0, 10**6), min_size=30, max_size=30, unique=True)
"""The ids of a vocabulary, the likeliest first."""


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_both_routes_give_the_same_outputs(data: st.DataObject) -> None:
    """As vLLM's two routes write what its engine says: the sampled token, then the likeliest."""
    wanted = data.draw(st.sampled_from([None, 0, 1, 3, 19]), "logprobs")
    count = data.draw(st.integers(1, 3), "n")
    by_text: list[dict[str, Any]] = []
    by_ids: list[dict[str, Any]] = []
    for index in range(count):
        places = data.draw(st.lists(st.tuples(ranked, st.integers(0, 29)), min_size=1, max_size=4), "places")
        ids = [order[rank] for order, rank in places]
        shared = {"index": index, "token_ids": ids, "finish_reason": "stop", "stop_reason": 9, "routed_experts": "eA=="}
        shared["weight_versions"] = [{"version": "v", "start": 0, "end": len(ids)}]
        by_text.append({**shared, "text": "abc", "prompt_token_ids": IDS, "logprobs": _as_texts(places, wanted)})
        by_ids.append({**shared, "logprobs": _as_ids(places, wanted)})
    body = {"prompt": IDS, "n": count, "logprobs": wanted}
    usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    rows = [None, {"4": {"logprob": -1.0, "rank": 2, "decoded_token": None}}]
    by_text[0]["prompt_logprobs"] = rows
    completion = {"id": "1", "choices": by_text[::-1], "usage": usage}
    tokens = {"request_id": "1", "choices": by_ids[::-1], "usage": usage, "prompt_logprobs": rows}
    one = without_texts(RequestOutput.from_response(completion, body, STATS, chat=False))
    found = parse(json.dumps(tokens).encode(), text=False)
    other = output_of(found, body, STATS, prompt=None, wanted=wanted)
    assert _without_ranks(other.to_dict()) == _without_ranks(one.to_dict())
    for mine, theirs in zip(_ranks(other), _ranks(one), strict=True):
        assert mine is not None
        assert theirs in (mine, None)


def _as_texts(places: Sequence[tuple[list[int], int]], wanted: int | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    tops = [
        {f"token_id:{order[at]}": -float(at) - 0.5 for at in dict.fromkeys([rank, *range(wanted)])}
        for order, rank in places
    ]
    names = [f"token_id:{order[rank]}" for order, rank in places]
    return {"tokens": names, "token_logprobs": [-float(rank) - 0.5 for _, rank in places], "top_logprobs": tops}


def _as_ids(places: Sequence[tuple[list[int], int]], wanted: int | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    asked = wanted + 1 if wanted else 0
    content = []
    for order, rank in places:
        entries = [
            {"token_id": order[at], "logprob": -float(at) - 0.5, "rank": at + 1}
            for at in dict.fromkeys([rank, *range(asked)])
        ]
        content.append({**entries[0], "top_logprobs": entries[: max(asked, 1)]})
    return {"content": content}


def _ranks(output: RequestOutput) -> Iterator[int | None]:
    for one in output.outputs:
        for place in one.logprobs or ():
            yield from (logprob.rank for logprob in place.values())


def _without_ranks(found: dict[str, Any]) -> dict[str, Any]:
    for one in found["outputs"]:
        for place in one["logprobs"] or ():
            for logprob in place.values():
                del logprob["rank"]
    return found


def test_the_stand_in_answers_the_same_by_both(home: Path) -> None:
    params = {**NO_TEXT, "logprobs": 0}
    with server() as llm:
        one = llm.generate(IDS, {**params, "detokenize": True})[0]
        other = llm.generate(IDS, params)[0]
        assert (one.request_id[:5], other.request_id[:5]) == ("cmpl-", "gener")
        assert other.outputs[0].token_ids == one.outputs[0].token_ids == standin.continuation(IDS, 200)
        assert other.outputs[0].cumulative_logprob == one.outputs[0].cumulative_logprob
        assert [place[token].rank for place, token in _sampled(other)] == [1] * 200
        assert other.outputs[0].weight_versions == one.outputs[0].weight_versions
        each = llm.generate([IDS, IDS], [SamplingParams(max_tokens=20), SamplingParams(**NO_TEXT)])
        assert [one.request_id[:5] for one in each] == ["cmpl-", "gener"]
        assert [bool(one.outputs[0].text) for one in each] == [True, False]
        many = llm.generate([[*IDS, number] for number in range(20)], {**NO_TEXT, "max_tokens": 4})
        assert {one.request_id[:5] for one in many[1:]} == {"cmpl-"}  # together, which is cheaper still


def _sampled(output: RequestOutput) -> list[tuple[dict[int, Any], int]]:
    first = output.outputs[0]
    assert first.logprobs is not None
    return list(zip(first.logprobs, first.token_ids, strict=True))


# -- after a loss ------------------------------------------------------------------------------------------------------


def test_an_answer_goes_on_where_it_was_cut(home: Path, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()
    with server(faults=str(faults)) as llm:
        for number, fault in enumerate(("crash", "abort", "halfstream", "streamerror", "500")):
            (faults / f"{2 * number}-{fault}").touch()
            output = llm.generate(IDS, {**NO_TEXT, "logprobs": 0}, resume=True)[0]
            if fault in ("abort", "500"):
                (faults / f"{2 * number + 1}-{fault}").touch()
            whole = llm.generate(IDS, NO_TEXT, resume=False)[0]
            first = output.outputs[0]
            assert first.token_ids == whole.outputs[0].token_ids == standin.continuation(IDS, 200)
            assert first.logprobs is not None
            assert [place[token].logprob for place, token in _sampled(output)] == [
                pytest.approx(standin.logprob_of(token)) for token in first.token_ids
            ]
            assert first.finish_reason == "length"
            assert output.request_id.startswith("generate-tokens-")
            assert (output.resumed_tokens > 0) is (fault != "500")
            assert (output.attempts > 1, whole.attempts > 1) == (True, fault in ("abort", "500"))


def event(ids: Sequence[int], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "token_ids": list(ids), "finish_reason": finish, **more}
    if "logprobs" not in more:
        choice["logprobs"] = {"content": [{"token_id": one, "logprob": -1.0 * one, "rank": 1} for one in ids]}
    return json.dumps({"request_id": "t", "choices": [choice]}).encode()


def generation(**body: Any) -> TokenGeneration:
    made = {"prompt": IDS, "max_tokens": 20, "temperature": 0, **body}
    return TokenGeneration(made, text=False, candidates=0, stream=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_wherever_it_is_cut_the_joined_answer_is_the_uninterrupted_one(data: st.DataObject) -> None:
    said = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=20), "said")
    cuts = data.draw(st.lists(st.integers(0, 6), max_size=5), "cuts")
    asked = generation(min_tokens=3)
    while not asked.complete:
        body = asked.next().body
        assert body is not None
        done = len(body["token_ids"]) - len(IDS)
        assert body["token_ids"] == [*IDS, *said[:done]]
        assert body["sampling_params"]["max_tokens"] == 20 - done
        assert body["sampling_params"].get("min_tokens", 0) == max(0, 3 - done)
        left, place = (cuts.pop(0) if cuts else None), done
        while place < len(said) and left != 0:
            size = data.draw(st.integers(1, 4), "tokens in an event")
            part, place = said[place : place + size], place + size
            asked.feed(event(part, "stop" if place >= len(said) else None, stop_reason=4))
            left = None if left is None else left - 1
        if not asked.complete:
            asked.lost()
    first = asked.found.choices[0]
    assert first.token_ids == said
    assert first.finish_reason in ("stop", "length")
    assert first.logprobs is not None
    assert [at.logprob for at in first.logprobs.content or ()] == [-1.0 * token for token in said]
    assert asked.answer()["choices"][0]["token_ids"] == said


@pytest.mark.parametrize(
    "bad",
    [
        b"garbage",
        b"[]",
        json.dumps({"error": {"message": "EngineCore encountered an issue.", "code": 500}}).encode(),
        event([1], "abort"),
        event([1], logprobs=None),
        b'{"choices": [{"index": 0, "token_ids": ["x"]}]}',
    ],
)
def test_what_is_no_part_of_an_answer_is_a_loss(bad: bytes) -> None:
    asked = generation()
    asked.next()
    with pytest.raises(ResponseLostError):
        asked.feed(bad)
    assert not asked.complete


def test_where_the_server_refuses_to_go_on_all_is_generated_anew_and_unstreamed() -> None:
    asked = generation()
    asked.next()
    asked.feed(event([1, 2]))
    assert asked.lost()
    assert (asked.next().stream, asked.optional, asked.kept) == (True, True, 2)
    asked.take_json(None)
    step = asked.next()
    assert (step.stream, asked.optional, asked.kept) == (False, False, 0)
    assert (step.body or {})["token_ids"] == IDS


def test_all_tokens_without_a_finish_reason_are_complete_by_length() -> None:
    asked = generation(max_tokens=2)
    asked.next()
    asked.feed(event([1, 2]))
    assert asked.lost()
    assert asked.found.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("told", "spans"), [(True, [("a", 0, 2), ("b", 2, 4)]), (False, None)])
def test_weight_versions_of_the_parts_are_joined(told: bool, spans: Any) -> None:
    asked = generation()
    asked.next()
    asked.feed(event([1, 2], weight_versions=[{"version": "a", "start": 0, "end": 2}] if told else None))
    asked.lost()
    asked.next()
    asked.feed(event([3, 4], "stop", weight_versions=[{"version": "b", "start": 0, "end": 2}]))
    found = asked.found.choices[0].weight_versions
    assert (None if found is None else [(one.version, one.start, one.end) for one in found]) == spans


def test_an_answer_that_an_update_has_aborted_is_that_of_the_new_weights_alone() -> None:
    asked = generation()
    asked.next()
    asked.feed(event([1, 2], weight_versions=[{"version": "a", "start": 0, "end": 2}]))
    with pytest.raises(ResponseLostError):
        asked.feed(event([], "abort"))
    asked.lost()
    asked.next()
    with pytest.raises(ResponseLostError, match="begins anew"):
        asked.feed(event([3], weight_versions=[{"version": "b", "start": 0, "end": 1}]))
    asked.lost()
    assert (asked.next().body or {})["token_ids"] == IDS
    asked.feed(event([5], "stop", weight_versions=[{"version": "b", "start": 0, "end": 1}]))
    assert asked.found.choices[0].token_ids == [5]
