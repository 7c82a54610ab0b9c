"""The recorder in front of the real vLLM: what it records is what is sampled, and the agent sees no difference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from processes import HANG_S, own_state

from managed_vllm import ManagedVLLM
from managed_vllm.agent import recorder

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

HELLO = [{"role": "user", "content": "Screen: a button. Click it."}]
TOOL = {"type": "function", "function": {"name": "click", "parameters": {"type": "object", "properties": {}}}}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/chat/completions", {"messages": HELLO}),
    ("/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("/chat/completions", {"messages": HELLO, "n": 2, "temperature": 1, "tools": [TOOL], "tool_choice": "none"}),
    ("/completions", {"prompt": ["Screen:", "Click"], "n": 2, "temperature": 1}),
    ("/completions", {"prompt": "Screen:", "echo": True, "logprobs": 1}),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[ManagedVLLM]:
    with own_state(), ManagedVLLM("demo", keep_alive=0) as llm:
        yield llm


def post(url: str, key: str, body: dict[str, Any]) -> requests.Response:
    found = requests.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=HANG_S)
    assert found.status_code == 200, found.text
    return found


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def told(chunks: list[dict[str, Any]]) -> list[tuple[list[int], list[int], list[float]]]:
    """Of each answer in a response, or in the events of a stream: ids of prompt and answer, and logprobs."""
    found: dict[int, tuple[list[int], list[int], list[float]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            prompt, ids, logprobs = found.setdefault(choice["index"], ([], [], []))
            prompt += choice.get("prompt_token_ids") or ()
            ids += choice.get("token_ids") or ()
            scores = choice.get("logprobs") or {}
            logprobs += scores.get("token_logprobs") or [place["logprob"] for place in scores.get("content") or ()]
    shared: list[int] = next((chunk["prompt_token_ids"] for chunk in chunks if chunk.get("prompt_token_ids")), [])
    return [(prompt or shared, ids, logprobs[-len(ids) :]) for _, (prompt, ids, logprobs) in sorted(found.items())]


def names(value: Any) -> Any:
    """A response without its values: which fields it has, and which of them are null. Of a list, its first item's."""
    if isinstance(value, dict):
        return {name: names(each) for name, each in value.items() if name != "top_logprobs"}
    return [names(each) for each in value[:1]] if isinstance(value, list) else value is None


def test_the_record_has_the_ids_that_were_sampled_and_the_agent_sees_the_servers_fields(demo: ManagedVLLM) -> None:
    expected = []
    with recorder(demo) as gateway, gateway.episode("compare") as episode:
        for path, asked in ASKED:
            body = {"model": demo.model, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **asked}
            everything = {**body, "return_token_ids": True}
            everything["logprobs"] = True if "messages" in asked else asked.get("logprobs", 0)
            for stream in [False] if asked.get("echo") else [False, True]:
                said = post(f"{episode.base_url}{path}", episode.api_key, {**everything, "stream": stream})
                expected += told(events(said.text) if stream else [said.json()])
        told_all = episode.finish(1.0)
    assert told_all.exact
    assert [
        (list(step.prompt_token_ids), list(step.response_token_ids), list(step.response_logprobs or ()))
        for step in told_all.steps
    ] == expected
    with recorder(demo) as gateway, gateway.episode("compare") as episode:
        for path, asked in ASKED:
            body = {"model": demo.model, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **asked}
            for stream in [False] if asked.get("echo") else [False, True]:
                theirs = post(f"{demo.base_url}{path}", demo.api_key, {**body, "stream": stream})
                ours = post(f"{episode.base_url}{path}", episode.api_key, {**body, "stream": stream})
                if stream:
                    assert list(map(names, _joined(ours.text))) == list(map(names, _joined(theirs.text)))
                else:
                    assert names(ours.json()) == names(theirs.json())
        told_nothing = episode.finish(1.0)
    assert [step.prompt_token_ids for step in told_nothing.steps if step.info.get("choice", 0) == 0][:2] == [
        told_all.steps[0].prompt_token_ids
    ] * 2
    assert told_nothing.exact


def _joined(text: str) -> list[dict[str, Any]]:
    """Events of a stream, joined by choice: how many tokens are in one is a matter of time."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in events(text):
        for choice in chunk["choices"]:
            joined.setdefault(choice["index"], {}).update(_without_nulls(choice))
    return [joined[index] for index in sorted(joined)]


def _without_nulls(value: Any) -> Any:
    return {name: each for name, each in value.items() if each is not None}
