"""Long generations go on where they were cut: without I/O at every place of a cut, then against servers that fall."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import pickle
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import standin
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import INSTANT, engine_on_one_core, tree

from managed_vllm import ManagedVLLM, RestartPolicy, RetryPolicy, ServerStatus, demo
from managed_vllm.errors import ConfigError, ServerDiedError
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.request.responses import EventDecoder
from managed_vllm.request.resume import RESUME_FROM, Generation, is_long, obstacle
from managed_vllm.request.retry import ResponseLostError

# -- a model of vLLM's answers -----------------------------------------------------------------------------------------

SPECIAL = 256
EOS = 257
ALPHABET = "ab é漢\n🎈✓"


class Model:
    """Byte-level tokens, one per UTF-8 byte, as vLLM shows them: text of a character comes with its last byte.

    `said` is what it generates after the prompt, whatever the sampling; `SPECIAL` and `EOS` have no text. `versions`
    says for each of these tokens which weights sample it; it `tells` so at each "change", at the "end", or "never".
    """

    def __init__(
        self,
        prompt: Sequence[int],
        said: Sequence[int],
        max_model_len: int = 4096,
        versions: str = "",
        tells: str = "never",
    ) -> None:
        self.prompt = list(prompt)
        self.said = list(said)
        self.max_model_len = max_model_len
        self.versions = versions.ljust(len(said), "z")
        self.tells = tells

    def spans(self, begin: int, end: int) -> list[dict[str, Any]]:
        """The spans of an answer that has the tokens `said[begin:end]`."""
        found: list[dict[str, Any]] = []
        for place, version in enumerate(self.versions[begin:end]):
            if found and found[-1]["version"] == version:
                found[-1]["end"] = place + 1
            else:
                found.append({"version": version, "start": place, "end": place + 1})
        return found

    def detokenized(self, ids: Sequence[int]) -> str:
        """What `/detokenize` says."""
        parts: list[bytes] = []
        for token in ids:
            parts.append({SPECIAL: b"<|x|>", EOS: b"<|end|>"}.get(token) or bytes([token]))
        return b"".join(parts).decode(errors="replace")

    def pieces(self, prompt: Sequence[int], limit: int) -> list[tuple[int, str, str | None]]:
        """(token, text, finish_reason) of each token after `prompt`."""
        done = len(prompt) - len(self.prompt)
        assert list(prompt) == self.prompt + self.said[:done]
        rest = self.said[done : done + limit]
        found: list[tuple[int, str, str | None]] = []
        # As DecodeStream: where the prompt ends within a character, all of it comes as text.
        held = b""
        if _text(prompt).endswith("\ufffd"):
            held = bytes(token for token in prompt if token < SPECIAL)
        for number, token in enumerate(rest, 1):
            finish = "stop" if token == EOS else "length" if number == limit else None
            held += bytes([token]) if token < SPECIAL else b""
            text = held.decode(errors="replace")
            if token >= SPECIAL or text.endswith("\ufffd"):
                text = ""
            else:
                held = b""
            found.append((token, text, finish))
            if finish:
                break
        return found

    def whole(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The unstreamed answer."""
        chat = route.startswith("/chat")
        pieces = self.pieces(self.prompt, self.limit(body, chat=chat))
        ids = [token for token, _, _ in pieces]
        choice: dict[str, Any] = {"index": 0, "finish_reason": pieces[-1][2], "stop_reason": None, "token_ids": ids}
        choice["logprobs"] = self.logprobs(ids, body, 0, chat=chat)
        if self.tells != "never":
            assert body["return_weight_versions"]
            choice["weight_versions"] = self.spans(0, len(ids))
        text = "".join(text for _, text, _ in pieces)
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": len(ids)}
        usage["total_tokens"] = sum(usage.values())
        answer = {"id": "1", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
            return {**answer, "object": "chat.completion", "prompt_token_ids": self.prompt}
        return {
            **answer,
            "object": "text_completion",
            "choices": [{**choice, "text": text, "prompt_token_ids": self.prompt}],
        }

    def limit(self, body: Mapping[str, Any], *, chat: bool) -> int:
        return int(body.get("max_tokens") or (self.max_model_len - len(self.prompt) if chat else 16))

    def logprobs(self, ids: Sequence[int], body: Mapping[str, Any], offset: int, *, chat: bool) -> Any:
        if body.get("logprobs") is None:
            return None
        top = body.get("top_logprobs", 0) if chat else body["logprobs"]
        prefix = "token_id:" if body.get("return_tokens_as_token_ids") else "t"

        def candidates(token: int) -> dict[str, float]:
            # The sampled one first, then the likeliest, of which the sampled one may be one (vLLM 0.32).
            return {f"{prefix}{token + i}": -0.5 - token / 1000 - i for i in range(4)}

        if chat:
            return {
                "content": [
                    {
                        **_candidate(f"{prefix}{token}", candidates(token)[f"{prefix}{token}"]),
                        "bytes": list(f"t{token}".encode()),
                        "top_logprobs": [_candidate(*c) for c in list(candidates(token).items())[:top]],
                    }
                    for token in ids
                ]
            }
        words = [f"{prefix}{token}" for token in ids]
        return {
            "tokens": words,
            "token_logprobs": [candidates(token)[f"{prefix}{token}"] for token in ids],
            "top_logprobs": [dict(list(candidates(token).items())[: top + 1]) for token in ids],
            "text_offset": [offset + sum(map(len, words[:i])) for i in range(len(words))],
        }

    def stream(self, route: str, body: Mapping[str, Any], sizes: Iterator[int]) -> Iterator[bytes]:
        """The stream's events, with as many tokens in each as `sizes` says."""
        assert body["stream"]
        assert body["return_token_ids"]
        chat = route == "/v1/chat/completions"
        prompt = self.prompt if chat or not isinstance(body["prompt"], list) else body["prompt"]
        pieces = self.pieces(prompt, self.limit(body, chat=chat))
        head = {"id": "1", "created": 1, "model": "m"}
        if chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield json.dumps({**head, "prompt_token_ids": prompt, "choices": [role]}).encode()
        begin = len(prompt) - len(self.prompt)
        offset = at = told = 0
        while at < len(pieces):
            part = pieces[at : at + next(sizes)]
            ids = [token for token, _, _ in part]
            choice: dict[str, Any] = {"index": 0, "finish_reason": part[-1][2], "token_ids": ids}
            choice["logprobs"] = self.logprobs(ids, body, offset, chat=chat)
            if (given := choice["logprobs"]) and not chat:
                offset += sum(map(len, given["tokens"]))
            spans = self.spans(begin, begin + at + len(part))
            if (part[-1][2] and self.tells != "never") or (len(spans) > told and self.tells == "change"):
                assert body["return_weight_versions"]
                choice["weight_versions"], told = spans, len(spans)
            text = "".join(text for _, text, _ in part)
            if chat:
                choice["delta"] = {"content": text}
            else:
                choice["text"] = text
                if at == 0:
                    choice["prompt_token_ids"] = prompt
            if part[-1][2]:
                choice["stop_reason"] = None
            at += len(part)
            yield json.dumps({**head, "choices": [choice]}).encode()
        yield json.dumps({**head, "choices": [], "usage": {"completion_tokens": 0}}).encode()
        yield b"[DONE]"


def _text(ids: Sequence[int]) -> str:
    return bytes(token for token in ids if token < SPECIAL).decode(errors="replace")


def _candidate(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def drive(
    generation: Generation, model: Model, sizes: Iterator[int], cuts: Iterator[int], *, can_detokenize: bool = True
) -> list[dict[str, Any]]:
    """Plays client and server: the n-th stream is cut after as many events as the n-th of `cuts` says.

    Returns the bodies that were sent to be generated.
    """
    sent = []
    while not generation.complete:
        step = generation.next()
        if step.path == "/detokenize":
            assert step.body is not None
            generation.take({"prompt": model.detokenized(step.body["tokens"])} if can_detokenize else None)
            continue
        if step.path == "/v1/models":
            generation.take({"data": [{"id": "m", "max_model_len": model.max_model_len}]})
            continue
        assert step.body is not None
        sent.append(step.body)
        assert len(sent) < 1000
        if not step.stream:
            generation.take(model.whole(step.path.removeprefix("/v1"), step.body))
            continue
        left = next(cuts, None)
        for event in model.stream(step.path, step.body, sizes):
            if left == 0:
                generation.lost()
                break
            left = None if left is None else left - 1
            generation.feed(event)
    return sent


def without_ids(answer: Mapping[str, Any]) -> dict[str, Any]:
    """For comparing: what differs between any two requests is left out."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def without_bytes(answer: Mapping[str, Any]) -> dict[str, Any]:
    """For comparing, where tokens come as ids: then no completion tells the bytes of those behind a cut of a chat."""
    copied = copy.deepcopy(dict(answer))
    for entry in (copied["choices"][0].get("logprobs") or {}).get("content", ()):
        if entry["token"].startswith("token_id:"):
            assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == f"t{entry['token'][9:]}"
            entry["bytes"] = None
    return copied


texts = st.text(ALPHABET, max_size=12).map(lambda text: list(text.encode()))
garbage = st.lists(st.integers(0, 255), max_size=6)
specials = st.lists(st.just(SPECIAL), max_size=7)
said = st.lists(texts | garbage | specials, min_size=1, max_size=6).map(
    lambda parts: [token for part in parts for token in part]
)
updates = st.lists(st.integers(0, 9), max_size=4).map(lambda spans: "".join("abab"[i] * n for i, n in enumerate(spans)))
bodies = st.fixed_dictionaries(
    {"logprobs": st.sampled_from([None, 0, 2]), "return_tokens_as_token_ids": st.sampled_from([None, True])},
    optional={"max_tokens": st.integers(1, 60), "min_tokens": st.just(3)},
)


@settings(max_examples=examples(120), deadline=None)
@given(st.data())
def test_wherever_a_stream_is_cut_the_joined_answer_is_the_uninterrupted_one(data: st.DataObject) -> None:
    chat = data.draw(st.booleans(), "chat")
    tells = data.draw(st.sampled_from(["change", "end", "never"]), "tells")
    prompt, answers, versions = data.draw(texts, "prompt") or [65], data.draw(said, "said"), data.draw(updates, "by")
    model = Model(prompt, [*answers, EOS], 200, versions, tells)
    drawn = data.draw(bodies, "body")
    body: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    if chat and "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    route = "/chat/completions" if chat else "/completions"
    sizes = iter(lambda: data.draw(st.integers(1, 5), "tokens in an event"), None)
    cuts = data.draw(st.lists(st.integers(0, 12), max_size=6), "cuts")
    generation = Generation(route, copy.deepcopy(body), stream=True)
    bodies_sent = drive(generation, model, sizes, iter(cuts), can_detokenize=data.draw(st.booleans(), "detokenize"))
    answer = without_bytes(generation.answer())
    whole = without_bytes(model.whole(route, {**body, "return_weight_versions": True}))
    if tells == "end" and generation.kept and "weight_versions" not in answer["choices"][0]:
        del whole["choices"][0]["weight_versions"]  # who sampled what was kept, nobody has told
    assert without_ids(answer) == without_ids(whole)
    assert generation.kept <= len(generation.answer()["choices"][0]["token_ids"])
    for later in bodies_sent[1:]:
        if "prompt" in later and isinstance(later["prompt"], list):
            kept = len(later["prompt"]) - len(model.prompt)
            assert later["max_tokens"] == model.limit(body, chat=chat) - kept
            assert later.get("min_tokens", 0) == max(0, body.get("min_tokens", 0) - kept)


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_events_are_found_however_the_bytes_come(data: st.DataObject) -> None:
    model = Model([65], [*data.draw(said), EOS])
    body = {"prompt": "x", "stream": True, "return_token_ids": True}
    events = list(model.stream("/v1/completions", body, iter(lambda: 2, None)))
    ending = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    wire = b": a comment\n" + b"".join(b"data: " + event + ending for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=20)))
    parser = EventDecoder()
    found: list[bytes] = []
    for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        found += parser.feed(wire[begin:end])
    assert found == events


def test_with_detokenize_at_most_the_last_tokens_within_a_character_are_dropped() -> None:
    text = "漢字仮名交じり文" * 4
    model = Model([65], list(text.encode()))
    generation = Generation("/completions", {"prompt": "x", "max_tokens": 90}, stream=True)
    # The first event ends after one token, each later one after eight: at byte 9, 17, 25 … of three-byte characters.
    sizes = iter([1] + [8] * 100)
    step = generation.next()
    assert step.body is not None
    for _, event in zip(range(4), model.stream(step.path, step.body, sizes), strict=False):
        generation.feed(event)
    assert generation.lost()
    while generation.next().path == "/detokenize":
        generation.take({"prompt": model.detokenized(generation.next().body["tokens"])})  # type: ignore[index]
    assert generation.kept == 24


def test_tokens_without_text_are_kept_if_the_server_says_that_they_are_no_part_of_a_character() -> None:
    model = Model([65], [66, *[SPECIAL] * 9, 67, EOS])
    generation = Generation("/completions", {"prompt": "x", "max_tokens": 90}, stream=True)
    sent = drive(generation, model, iter(lambda: 1, None), iter([8]))
    assert generation.kept == 8
    assert sent[1]["prompt"] == [65, 66, *[SPECIAL] * 7]


@pytest.mark.parametrize("said", [[128, SPECIAL, 97, EOS], [66, 228, SPECIAL, SPECIAL, 97, EOS]], ids=str)
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_half_a_character_before_a_special_token_is_no_place_to_cut(said: list[int], cut: int) -> None:
    model, body = Model([65], said), {"prompt": "x", "max_tokens": 9}
    generation = Generation("/completions", body, stream=True)
    drive(generation, model, iter(lambda: 1, None), iter([cut]))
    assert without_ids(generation.answer()) == without_ids(model.whole("/completions", body))


def test_tokens_that_are_dropped_each_time_are_no_progress() -> None:
    model = Model([65], [66, *"漢".encode(), EOS])
    generation = Generation("/completions", {"prompt": "x", "max_tokens": 90}, stream=True)
    progress = []
    for _ in range(3):
        step = generation.next()
        for _, event in zip(range(2), model.stream(step.path, step.body or {}, iter(lambda: 1, None)), strict=False):
            generation.feed(event)
        progress.append(generation.lost())
        while generation.next().path == "/detokenize":
            generation.take(None)
        assert generation.kept == 1
    assert progress == [True, True, False]


def test_finished_without_done_is_complete() -> None:
    model = Model([65], [66, 67, EOS])
    generation = Generation("/completions", {"prompt": "x"}, stream=True)
    events = list(model.stream("/v1/completions", generation.next().body or {}, iter(lambda: 1, None)))
    for event in events[:3]:
        generation.feed(event)
    assert generation.complete


def test_all_tokens_without_a_finish_reason_are_complete_by_length() -> None:
    generation = Generation("/completions", {"prompt": "x", "max_tokens": 2}, stream=True)
    generation.next()
    for token in (66, 67):
        choice = {"index": 0, "text": chr(token), "token_ids": [token], "prompt_token_ids": [65]}
        generation.feed(json.dumps({"id": "1", "choices": [choice]}).encode())
    assert generation.lost()
    assert generation.complete
    assert generation.answer()["choices"][0]["finish_reason"] == "length"
    assert generation.answer()["choices"][0]["text"] == "BC"


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": "EngineCore encountered an issue.", "code": 500}},
        {"choices": [{"index": 0, "text": "x", "token_ids": [66], "finish_reason": "abort"}]},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 0, "text": 5, "token_ids": [66]}]},
        {"choices": [{"index": 0, "text": "x", "token_ids": [66], "logprobs": {"tokens": []}}]},
        ["no object"],
        "garbage",
    ],
)
def test_what_is_no_part_of_an_answer_is_a_loss(event: Any) -> None:
    generation = Generation("/completions", {"prompt": "x", "logprobs": 1}, stream=True)
    generation.next()
    with pytest.raises(ResponseLostError):
        generation.feed(event.encode() if event == "garbage" else json.dumps(event).encode())
    assert not generation.lost() or "abort" in str(event)  # no progress, which would be tried for ever


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": "x"}, {"choices": [{"finish_reason": "abort"}]}])
def test_an_answer_without_an_answer_is_a_loss(answer: dict[str, Any]) -> None:
    generation = Generation("/completions", {"prompt": "x"}, stream=False)
    generation.next()
    with pytest.raises(ResponseLostError):
        generation.take(answer)


@pytest.mark.parametrize("delta", [{"reasoning": "hm"}, {}, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}])
def test_where_a_parser_is_at_work_the_whole_is_asked_for_again_unstreamed(delta: dict[str, Any]) -> None:
    generation = Generation("/chat/completions", {"messages": []}, stream=True)
    assert generation.next().stream
    choice = {"index": 0, "delta": delta, "token_ids": [66]}
    generation.feed(json.dumps({"id": "1", "prompt_token_ids": [65], "choices": [choice]}).encode())
    assert generation.lost()
    step = generation.next()
    assert not step.stream
    assert step.path == "/v1/chat/completions"
    assert "stream" not in (step.body or {})


def test_reasoning_and_tool_calls_are_joined_where_nothing_was_lost() -> None:
    generation = Generation("/chat/completions", {"messages": []}, stream=True)
    generation.next()
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning": "h"},
        {"reasoning": "m"},
        {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
    ]
    for number, delta in enumerate(deltas):
        last = number == len(deltas) - 1
        choice = {"index": 0, "delta": delta, "token_ids": [number], "finish_reason": "tool_calls" if last else None}
        generation.feed(json.dumps({"id": "1", "prompt_token_ids": [65], "choices": [choice]}).encode())
    message = generation.answer()["choices"][0]["message"]
    assert message["reasoning"] == "hm"
    assert message["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_server_that_refuses_to_go_on_is_asked_for_the_whole() -> None:
    model = Model([65], [66, 67, 68, EOS])
    generation = Generation("/completions", {"prompt": "x"}, stream=True)
    events = list(model.stream("/v1/completions", generation.next().body or {}, iter(lambda: 1, None)))
    generation.feed(events[0])
    generation.lost()
    assert generation.next().body["prompt"] == [65, 66]  # type: ignore[index]
    assert generation.optional
    generation.take(None)
    assert generation.next().body["prompt"] == "x"  # type: ignore[index]
    assert not generation.optional


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"prompt": "x", "n": 2}, "several answers"),
        ({"prompt": "x", "stop": ["\n"]}, "stop string"),
        ({"prompt": "x", "bad_words": ["no"]}, "bad word"),
        ({"prompt": "x", "presence_penalty": 0.5}, "counts the tokens"),
        ({"prompt": "x", "frequency_penalty": 0.5}, "counts the tokens"),
        ({"prompt": "x", "seed": 1}, "random numbers"),
        ({"prompt": "x", "seed": 1, "temperature": 0.5}, "random numbers"),
        ({"prompt": "x", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"prompt": "x", "never_heard_of": 1}, "never_heard_of"),
        ({"prompt": ["x", "y"]}, "one list of token ids"),
        ({"messages": [], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "images"),
    ],
)
def test_what_cannot_be_resumed_is_told(body: dict[str, Any], why: str) -> None:
    assert why in str(obstacle(body))


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "n": 1, "stop": [], "presence_penalty": 0.0, "echo": False, "bad_words": None},
        {"prompt": [1, 2], "seed": 1, "temperature": 0.0, "top_k": 5, "logit_bias": {"5": 1.0}, "stop_token_ids": [7]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "chat_template_kwargs": {"a": 1}},
        {"messages": [], "tool_choice": "none", "response_format": {"type": "text"}, "tools": None},
    ],
)
def test_what_means_nothing_special_does_not_hinder(body: dict[str, Any]) -> None:
    assert obstacle(body) is None


def test_what_counts_as_long() -> None:
    assert is_long({"messages": []})
    assert not is_long({"prompt": "x"})
    assert is_long({"prompt": "x", "max_tokens": RESUME_FROM})
    assert not is_long({"messages": [], "max_tokens": RESUME_FROM - 1})
    assert not is_long({"messages": [], "max_completion_tokens": RESUME_FROM - 1})


def test_the_prompts_own_fields_are_not_applied_twice() -> None:
    model = Model([65], [66, 67, EOS])
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {"a": 1},
        "max_completion_tokens": 9,
    }
    body |= {"truncate_prompt_tokens": 5, "add_special_tokens": True, "top_k": 3, "model": "other"}
    generation = Generation("/chat/completions", body, stream=True)
    # `max_completion_tokens` is the same for the model here.
    for event in list(model.stream("/v1/chat/completions", generation.next().body or {}, iter(lambda: 1, None)))[:2]:
        generation.feed(event)
    generation.lost()
    assert generation.next().body == {
        "model": "other",
        "prompt": [65, 66],
        "max_tokens": 8,
        "top_k": 3,
        "stream": True,
        "stream_interval": 8,
        "return_token_ids": True,
        "return_weight_versions": True,
    }


@pytest.mark.parametrize("wrong", [{"max_deaths": 0}, {"max_lost": 0}, {"backoff_max_s": -1}, {"spread_s": math.nan}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RetryPolicy(**wrong)


# -- the stand-in, which is killed or misbehaves while it streams ------------------------------------------------------

PATIENT = RestartPolicy(max_restarts=100, backoff_initial_s=0.0)


def order(folder: Path, *kinds: str) -> None:
    """Orders one fault for each of the next requests."""
    folder.mkdir(exist_ok=True)
    for number, kind in enumerate(kinds):
        (folder / f"{number}-{kind}").touch()


def stand_in(faults: Path, **options: Any) -> ManagedVLLM:
    env = standin.orders(faults=str(faults), tree=True)
    return ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=env,
        keep_alive=INSTANT,
        restart=PATIENT,
        **{"retry": None, **options},
    )


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize(
    "kind", ["crash", "crash-engine", "crash-worker", "halfstream", "truncated", "streamerror", "abort"]
)
def test_a_generation_goes_on_where_its_server_failed(home: Path, tmp_path: Path, kind: str, chat: bool) -> None:
    params = {"temperature": 0, "max_tokens": 200, "logprobs": 1}
    messages = [{"role": "user", "content": "go on"}]
    with stand_in(tmp_path) as llm:
        order(tmp_path, kind)
        if chat:
            output = llm.chat(messages, params, resume=True)[0]
            expected = standin.continuation(standin.prompt_ids(messages), 200)
        else:
            output = llm.generate("go on", params, resume=True)[0]
            expected = standin.continuation(standin.prompt_ids("go on"), 200)
        completion = output.outputs[0]
        assert list(completion.token_ids) == expected
        assert completion.text == standin.text_of(expected)
        assert completion.logprobs is not None
        values = [entry[token].logprob for entry, token in zip(completion.logprobs, expected, strict=True)]
        assert values == [standin.logprob_of(token) for token in expected]
        assert completion.finish_reason == "length"
        # The fault strikes after half of the tokens; under load the last event has many, and the stand-in does not tell
        # whether they end a character.
        assert 30 <= output.resumed_tokens <= 100
        assert output.attempts >= 2
        assert output.epoch == (2 if kind.startswith("crash") else 1)


def test_ten_deaths_cost_no_token_twice(home: Path, tmp_path: Path) -> None:
    with stand_in(tmp_path) as llm:
        order(tmp_path, *["crash"] * 5, "halfstream", *["crash"] * 4)
        output = llm.generate("go on", {"temperature": 0, "max_tokens": 2000}, resume=True)[0]
    expected = standin.continuation(standin.prompt_ids("go on"), 2000)
    assert list(output.outputs[0].token_ids) == expected
    assert output.outputs[0].text == standin.text_of(expected)
    assert output.epoch == 10
    assert output.attempts >= 11


def test_what_cannot_be_resumed_is_generated_again(home: Path, tmp_path: Path) -> None:
    with stand_in(tmp_path) as llm:
        order(tmp_path, "crash")
        output = llm.generate("go on", {"n": 2, "max_tokens": 2000})[0]
        expected = standin.continuation(standin.prompt_ids("go on"), 2000)
        assert list(output.outputs[0].token_ids) == expected
        assert output.resumed_tokens == 0
        assert output.attempts >= 2
        order(tmp_path, "crash")
        whole = llm.generate("go on", {"max_tokens": 2000}, resume=False)[0]
        assert list(whole.outputs[0].token_ids) == expected
        assert whole.resumed_tokens == 0


def test_a_batch_is_resumed_side_by_side_and_stays_in_order(home: Path, tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(16)]
    with stand_in(tmp_path) as llm:
        order(tmp_path, "crash", "abort", "halfstream")
        outputs = llm.generate(prompts, {"temperature": 0, "max_tokens": 300}, resume=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == standin.continuation(standin.prompt_ids(prompt), 300)


def test_the_limits_of_retrying_are_the_handles(home: Path, tmp_path: Path) -> None:
    with stand_in(tmp_path, retry=RetryPolicy(max_deaths=1)) as llm:
        order(tmp_path, "crash")
        with pytest.raises(ServerDiedError, match="the server died once under this request") as caught:
            llm.generate("x", {"max_tokens": 5}, resume=False)
        assert caught.value.instance == llm.id
        assert pickle.loads(pickle.dumps(llm)).client.retry == RetryPolicy(max_deaths=1)


# -- the real vLLM -----------------------------------------------------------------------------------------------------


class Killer:
    """Kills the API server each time one life of it has generated the next number of `tokens`; counts all tokens.

    EngineCore and the Worker are stopped before, so that the count is exact, and nothing is generated behind it. In
    each life they share one core, or the generation could be over before the API server comes to tell how far it is.
    """

    def __init__(self, llm: ManagedVLLM, tokens: Sequence[int]) -> None:
        self._llm = llm
        self._tokens = list(tokens)
        self.generated = 0
        self.kills = 0
        self._stop = threading.Event()
        self._slow = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        self._before = self._count(self._llm.status())
        self._slow.enter_context(engine_on_one_core(self._llm))  # before anything is asked
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._slow.close()
        self.generated += self._count(self._llm.wait_ready(60)) - self._before

    def _run(self) -> None:
        status = self._llm.status()
        for tokens in self._tokens:
            processes = tree(self._llm)
            while self._count(status) - self._before < tokens:
                if self._stop.is_set():
                    return
            processes["EngineCore"].suspend()
            processes["Worker"].suspend()
            self.generated += self._count(status) - self._before
            self._before = 1  # the token for which a new life is asked before it is ready
            processes["APIServer"].kill()
            self.kills += 1
            status = self._llm.wait_ready(after_epoch=status.epoch)
            self._slow.enter_context(engine_on_one_core(self._llm))

    def _count(self, status: ServerStatus) -> int:
        connection = status.connection
        assert connection is not None
        url = connection.base_url.removesuffix("/v1") + "/metrics"
        answer = requests.get(url, headers={"Authorization": f"Bearer {connection.api_key.reveal()}"}, timeout=30)
        answer.raise_for_status()
        found = re.search(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)", answer.text, re.MULTILINE)
        return int(float(found[1])) if found else 0


# So that the text does not repeat itself, as it would with the demo model.
VARIED = {"temperature": 0, "ignore_eos": True, "repetition_penalty": 1.2, "logprobs": 1}


def assert_same(resumed: RequestOutput, unbroken: RequestOutput) -> None:
    mine, other = resumed.outputs[0], unbroken.outputs[0]
    assert mine.token_ids == other.token_ids
    assert mine.text == other.text
    assert mine.finish_reason == other.finish_reason
    assert resumed.prompt_token_ids == unbroken.prompt_token_ids
    assert mine.logprobs is not None
    assert other.logprobs is not None
    for one, two, token in zip(mine.logprobs, other.logprobs, mine.token_ids, strict=True):
        # Behind a cut the tokens before are prefilled, not decoded one by one: the same sums in another order.
        assert one[token].logprob == pytest.approx(two[token].logprob, abs=0.02)
        texts_told = {one[token].decoded_token, two[token].decoded_token} - {None}  # None behind a cut
        assert len(texts_told) <= 1


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chat", [pytest.param(False, marks=pytest.mark.soak, id="completion"), True])
def test_real_a_killed_generation_is_the_unbroken_one(home: Path, chat: bool) -> None:
    params = {**VARIED, "max_tokens": 1000}  # a fast server is far ahead of who looks
    messages = [{"role": "user", "content": demo.random_screen(random.Random(3)).prompt()}]
    with ManagedVLLM("demo", keep_alive=0, restart=PATIENT) as llm:

        def ask(*, resume: bool) -> RequestOutput:
            return (
                llm.chat(messages, params, resume=resume) if chat else llm.generate("Screen:", params, resume=resume)
            )[0]

        unbroken = ask(resume=False)
        assert len(unbroken.outputs[0].token_ids) == 1000
        assert_same(ask(resume=True), unbroken)
        for _ in range(8):  # a test that is held up kills nobody before the end
            epoch = llm.status().epoch
            with Killer(llm, [150]) as killer:
                resumed = ask(resume=True)
            if killer.kills:
                break
        assert killer.kills == 1
        assert_same(resumed, unbroken)
        assert resumed.epoch == epoch + 1
        assert resumed.resumed_tokens >= 130
        assert killer.generated <= 1100


@pytest.mark.real
@pytest.mark.timeout(1800)
@pytest.mark.soak
@pytest.mark.parametrize("kills", [2, 10])
def test_real_2000_tokens_survive_kills_at_random_points(home: Path, kills: int) -> None:
    rng = random.Random(kills)
    points = sorted(rng.sample(range(20, 1200, 25), kills))  # a fast server is some tokens ahead of who looks
    params = {**VARIED, "max_tokens": 2000}
    with ManagedVLLM("demo", keep_alive=0, restart=PATIENT) as llm:
        unbroken = llm.generate("Screen:", params, resume=False)[0]
        with Killer(llm, [b - a for a, b in itertools.pairwise([0, *points])]) as killer:
            resumed = llm.generate("Screen:", params)[0]  # long enough to be resumed without being asked for
        assert killer.kills == kills
        assert_same(resumed, unbroken)
        print(f"resume | {kills} kills | generated {killer.generated} for 2000 tokens")
        assert killer.generated <= 2200
