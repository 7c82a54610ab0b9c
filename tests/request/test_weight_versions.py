"""Every answer says which weights made it, whole, streamed, or joined after a crash; or None, where nobody tells."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import standin
from demo_checkpoints import copy_of_demo
from processes import HANG_S, INSTANT, eventually
from scripted_server import ANSWER, Script, client_of, says

from managed_vllm import ManagedVLLM, RestartPolicy
from managed_vllm.errors import RequestError
from managed_vllm.request.outputs import RequestOutput

PATIENT = RestartPolicy(max_restarts=100, backoff_initial_s=0.0)
Span = tuple[str, int, int]
TOKENS = 300
"""Of an answer that an update meets."""


def server(**order: Any) -> ManagedVLLM:
    environment = standin.orders(**order)
    return ManagedVLLM("stand-in", command=standin.command(), env=environment, keep_alive=INSTANT, restart=PATIENT)


def spans(output: RequestOutput, index: int = 0) -> list[Span] | None:
    found = output.outputs[index].weight_versions
    return None if found is None else [(one.version, one.start, one.end) for one in found]


# -- what a server tells -----------------------------------------------------------------------------------------------


def test_each_answer_says_which_weights_made_it(home: Path, tmp_path: Path) -> None:
    async def chat(llm: ManagedVLLM) -> list[RequestOutput]:
        return await llm.async_client.chat([{"role": "user", "content": "Hi"}], {"max_tokens": 3})

    with server() as llm:
        assert spans(llm.generate("Hi", {"max_tokens": 2})[0]) == [("default", 0, 2)]
        llm.engine.update_weights(copy_of_demo(tmp_path / "step-1"))
        output = llm.generate("Hi", {"max_tokens": 4, "n": 2})[0]
        assert [spans(output, index) for index in range(2)] == [[("step-1", 0, 4)]] * 2
        assert output.weight_version == output.outputs[1].weight_version == "step-1"
        assert spans(llm.generate("Hi", {"max_tokens": 400}, resume=True)[0]) == [("step-1", 0, 400)]
        assert spans(asyncio.run(chat(llm))[0]) == [("step-1", 0, 3)]
        assert llm.generate("Hi", extra_body={"return_weight_versions": None})[0].weight_version is None


def test_an_answer_that_spans_an_update_says_where(home: Path, tmp_path: Path) -> None:
    checkpoint, updated = copy_of_demo(tmp_path / "v2"), tmp_path / "updated"
    with server(after_first=str(updated)) as llm:
        parts: list[RequestOutput] = []
        for part in llm.stream("Hi", {"max_tokens": TOKENS}):
            if not parts:
                llm.engine.update_weights(checkpoint, on_update="continue")
                updated.touch()
            parts.append(part)
    assert all(part.outputs[0].weight_versions is None for part in parts[:-1])  # as vLLM: with the end
    found = spans(parts[-1])
    assert found is not None
    assert found == [("default", 0, 1), ("v2", 1, TOKENS)]
    assert parts[-1].weight_version == "v2"


@pytest.mark.parametrize(("versions", "known"), [("change", True), ("end", False), ("never", False)])
def test_what_is_resumed_after_a_crash_joins_its_parts(home: Path, tmp_path: Path, versions: str, known: bool) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()
    with server(faults=str(faults), tree=True, control={"versions": versions}) as llm:
        llm.engine.update_weights(copy_of_demo(tmp_path / "v2"))
        (faults / "0-crash-engine").touch()
        output = llm.generate("Hi", {"temperature": 0, "max_tokens": 200}, resume=True)[0]
    assert output.resumed_tokens > 0
    assert spans(output) == ([("v2", 0, 200)] if known else None)


@pytest.mark.parametrize("resume", [True, False])
def test_what_an_update_restarts_is_answered_by_the_new_weights_alone(home: Path, tmp_path: Path, resume: bool) -> None:
    checkpoint, params = copy_of_demo(tmp_path / "v2"), {"temperature": 0, "max_tokens": TOKENS}
    updated, first = tmp_path / "updated", tmp_path / "updated-first"
    with server(after_first=str(updated)) as llm, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(llm.generate, "Hi", params, resume=resume)
        eventually(first.exists, "it is generated")
        llm.engine.update_weights(checkpoint, on_update="restart")
        updated.touch()
        output = asking.result(HANG_S)[0]
    assert list(output.outputs[0].token_ids) == standin.continuation(standin.prompt_ids("Hi"), TOKENS)
    assert spans(output) == [("v2", 0, TOKENS)]
    assert output.attempts > 1
    assert output.epoch == 1


def test_a_stream_that_has_given_tokens_goes_on_after_a_restart(home: Path, tmp_path: Path) -> None:
    checkpoint, updated = copy_of_demo(tmp_path / "v2"), tmp_path / "updated"
    with server(after_first=str(updated)) as llm:
        ids: list[int] = []
        for part in llm.stream("Hi", {"temperature": 0, "max_tokens": TOKENS}):
            if not ids:
                llm.engine.update_weights(checkpoint, on_update="restart")
                updated.touch()
            ids += part.outputs[0].token_ids
    assert ids == standin.continuation(standin.prompt_ids("Hi"), TOKENS)
    found = spans(part)
    assert found is not None
    assert [version for version, _, _ in found] == ["default", "v2"]
    assert found[-1][2] == TOKENS


# -- values ------------------------------------------------------------------------------------------------------------


def told(given: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": "fine", "token_ids": [7], "finish_reason": "stop", "weight_versions": given}
    return {**ANSWER, "choices": [choice]}


def test_an_output_keeps_them_as_a_dict_and_pickled(script: Callable[..., Script]) -> None:
    with client_of(script(says(told([{"version": "a", "start": 0, "end": 1}])))) as client:
        output = client.generate("x", {"max_tokens": 2})[0]
    assert spans(output) == [("a", 0, 1)]
    assert RequestOutput.from_dict(json.loads(json.dumps(output.to_dict()))) == output
    assert pickle.loads(pickle.dumps(output)) == output


def test_spans_of_another_shape_are_no_answer(script: Callable[..., Script]) -> None:
    server = script(says(told([{"version": 5}])))
    with client_of(server) as client, pytest.raises(RequestError):
        client.generate("x", {"max_tokens": 2})


def test_who_does_not_know_token_ids_is_not_asked_for_versions_either(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    with client_of(server) as client:
        client.generate("x", {"max_tokens": 2}, extra_body={"return_token_ids": None})
        client.generate("x", {"max_tokens": 2})
    assert [sorted(name for name in body if name.startswith("return")) for _, body in server.requests] == [
        [],
        ["return_token_ids", "return_weight_versions"],
    ]
