"""What was in flight at the server's deaths: told apart from the innocent, not sent a third time, the server kept."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import standin
from processes import INSTANT, eventually

from managed_vllm import ManagedVLLM, RestartPolicy, RetryPolicy, ServerState
from managed_vllm.errors import DeadlyRequestError
from managed_vllm.request.deaths import Deaths, body_of, content_of


def test_the_content_is_what_is_asked_for_not_how() -> None:
    body = {"prompt": "x", "max_tokens": 3, "seed": 1, "stream": True}
    assert content_of("/completions", body) == content_of("/completions", {"prompt": "x", "max_tokens": 3, "seed": 2})
    assert content_of("/completions", body) != content_of("/completions", {**body, "prompt": "y"})
    assert content_of("/completions", body) != content_of("/chat/completions", body)
    assert body_of(b'{"prompt": "x"}') == {"prompt": "x"}
    assert content_of("/x", body_of(b"\xff")) != content_of("/x", body_of(b"[]"))


def test_what_alone_was_in_flight_at_all_deaths_is_known() -> None:
    deaths = Deaths(2)
    for epoch, contents in enumerate(["ab", "ac"], start=1):
        for content in contents:
            deaths.add(content, epoch)
    assert deaths.of("a") == (1, 2)
    assert [deaths.is_known(content) for content in "abc"] == [True, False, False]
    deaths.clear("a")
    assert not deaths.is_known("a")


def test_of_two_that_were_in_flight_at_each_death_neither_is_known_until_one_is_cleared() -> None:
    deaths = Deaths(2)
    for epoch in (1, 2):
        deaths.add("guilty", epoch)
        deaths.add("innocent", epoch)
    assert not deaths.is_known("guilty")
    deaths.clear("innocent")
    assert deaths.is_known("guilty")


def test_ends_that_were_no_deaths_are_laid_to_nobody() -> None:
    deaths = Deaths(2)
    for epoch in (1, 2, 3):
        deaths.add("a", epoch)
    deaths.keep("a", [3])
    assert deaths.of("a") == (3,)


def test_what_is_kept_of_deaths_is_bounded() -> None:
    deaths = Deaths(2)
    for epoch in range(1000):
        deaths.add("a", epoch)
    assert deaths.of("a") == tuple(range(936, 1000))


def poisonable(**options: object) -> ManagedVLLM:
    """A server that ends whenever a request has POISON in it."""
    return ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(poison="POISON"),
        keep_alive=INSTANT,
        restart=RestartPolicy(max_restarts=3, backoff_initial_s=0),
        **options,  # type: ignore[arg-type]
    )


def test_a_request_that_kills_the_server_does_not_take_it_from_the_others(home: Path) -> None:
    with poisonable() as llm, poisonable() as theirs:
        for number in range(4):  # four rollouts of one task, which differ in their seeds
            with pytest.raises(DeadlyRequestError, match="died 2 times under this request") as caught:
                llm.generate("POISON", {"max_tokens": 4, "seed": number})
            assert caught.value.epochs == (1, 2)
        assert theirs.generate("good", {"max_tokens": 4})[0].epoch == 3
        for _ in range(3):  # each of them kills it twice
            with pytest.raises(DeadlyRequestError):
                llm.generate(f"another POISON {_}", {"max_tokens": 4})
        status = llm.status()
        assert (status.state, status.epoch) == (ServerState.READY, 9)
        assert theirs.generate("good", {"max_tokens": 4})[0].epoch == 9


def test_a_request_that_kills_the_server_by_way_of_the_sdk_is_not_sent_a_third_time(home: Path) -> None:
    with poisonable() as llm:
        for _ in range(2):
            with pytest.raises(Exception, match=r"died 2 times under this request|Connection error"):
                llm.openai.completions.create(model=llm.model, prompt="POISON", max_tokens=4)
        assert llm.status().epoch == 3


def test_a_restart_that_was_asked_for_is_no_death_of_the_requests_in_flight(home: Path, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    llm = ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(after_first=str(answer)),
        keep_alive=INSTANT,
        stop_grace=0,
        retry=RetryPolicy(spread_s=0),
    )
    with llm:
        answers: list[object] = []
        asking = threading.Thread(
            target=lambda: answers.append(llm.generate("x", {"max_tokens": 20}, resume=False)[0].epoch)
        )
        asking.start()
        first = tmp_path / "answer-first"
        for _ in range(3):
            eventually(first.exists, "it is in flight on this server")
            llm.restart()
            first.unlink(missing_ok=True)
        answer.touch()
        asking.join()
        assert answers == [4]
