"""Vectors, classes and scores of several prompts in one request: as those of single requests, `usage` included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from acting_server import ActingServer, Refusal, acting, prompts_of

from managed_vllm import RetryPolicy, VLLMClient
from managed_vllm.errors import ManagedVLLMError, RequestError

pytestmark = pytest.mark.usefixtures("unhurried")
QUICK = RetryPolicy(max_lost=2, backoff_initial_s=0.001, spread_s=0)
TEXTS: list[Any] = [*("a" * number for number in range(1, 20)), "bad", *("b" * number for number in range(1, 20))]
IDS: list[Any] = [list(text.encode()) for text in TEXTS]

Ask = Callable[[VLLMClient, list[Any]], list[Any]]
METHODS: dict[str, Ask] = {
    "embed": lambda client, prompts: client.embed(prompts, return_exceptions=True),
    "classify": lambda client, prompts: client.classify(prompts, return_exceptions=True),
    "encode": lambda client, prompts: client.encode(prompts, return_exceptions=True),
    "score": lambda client, prompts: client.score("to ", prompts, return_exceptions=True),
}


def refusing(messages: list[dict[str, Any]]) -> str | Refusal:
    text: str = messages[0]["content"]
    return Refusal(400, f"no {text}") if text.endswith("bad") else text


def client_of(server: ActingServer) -> closing[VLLMClient]:
    return closing(VLLMClient(server.url, None, "acting", retry=QUICK))


def told(result: Any) -> Any:
    if isinstance(result, ManagedVLLMError):
        return type(result), str(result)
    return result.outputs, dict(result.usage), result.model


def sizes(server: ActingServer) -> set[int]:
    return {len(prompts_of(body)) for body in server.requests}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompts", [TEXTS, IDS], ids=["texts", "ids"])
def test_each_has_the_output_and_the_usage_of_a_single_request(method: str, prompts: list[Any]) -> None:
    if method == "score" and prompts is IDS:
        pytest.skip("scores are of texts")
    ask = METHODS[method]
    with acting(refusing, tells="tokens of each") as server, client_of(server) as client:
        ask(client, prompts)  # so that the server is known
        server.requests.clear()
        together = ask(client, prompts)
        assert max(sizes(server)) == 4
        alone = [result for prompt in prompts for result in ask(client, [prompt])]
        assert list(map(told, together)) == list(map(told, alone))
        assert [one.index for one in together if isinstance(one, RequestError)] == [19]


def test_texts_go_alone_where_the_server_does_not_count_the_tokens_of_each() -> None:
    with acting(refusing) as server, client_of(server) as client:
        client.embed(TEXTS, return_exceptions=True)
        assert sizes(server) == {1}
        server.requests.clear()
        client.embed(IDS, return_exceptions=True)
        assert max(sizes(server)) == 4


def test_what_may_mean_something_else_for_several_prompts_goes_alone() -> None:
    with acting(refusing, tells="tokens of each") as server, client_of(server) as client:
        client.embed(["x"] * 32, extra_body={"of_tomorrow": 1})
        client.embed([[97]] * 32, tokenization_kwargs={"truncate_prompt_tokens": 1})
        client.score("x", [{"content": [{"type": "text", "text": "y"}]}] * 32, return_exceptions=True)
        assert sizes(server) == {1}
