"""Our client on a server against `vllm.LLM` in one process: the same model and requests, the same answers and shape.

Two runs of one and the same `vllm.LLM` may differ already where the batches of its steps are composed otherwise: the
sums of a matrix product of another shape are rounded otherwise. So the answers to 100 requests side by side are held
against that noise (none, with this small model on a CPU), and requests one after the other must be equal.

Equal are token ids, texts, reasons and logprobs. Of candidates that are exactly equally likely, as bfloat16 makes many,
each may stand for the other: which one a top-k has first depends on k, and in a chat ours asks for one more.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import real_llm
from processes import own_state

from managed_vllm import BeamSearchParams, ManagedVLLM, SamplingParams, demo

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1500)]

EACH = 50
"""Requests for `generate`, and as many for `chat`."""
ALONE = 10
"""Of each of them, asked one after the other."""
TOLERANCE = 1e-3
"""Of a logprob."""
MARGIN = 2
"""Answers of 100 that may differ beyond the noise of `vllm.LLM` itself: the noise of its noise."""

ENGINE: dict[str, Any] = {
    **demo.engine_defaults(),
    # By default `vllm.LLM` and the server take different numbers here (vLLM 0.32: `EngineArgs`, by the usage). All
    # prompts fit into one step: vLLM 0.32 dies on a CPU of a request with a seed whose prompt is cut between two steps
    # (`gpu_model_runner._bookkeeping_sync`: "CPU Generator does not use offset").
    "max_num_batched_tokens": 32768,
    "max_num_seqs": 256,
}

PARAMETERS: Sequence[dict[str, Any]] = (
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 0, "max_tokens": 40, "logprobs": 3},
    {"temperature": 1, "max_tokens": 40, "seed": 1},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "max_tokens": 24, "seed": 2, "n": 2, "logprobs": 3},
    {"temperature": 0, "max_tokens": 8, "prompt_logprobs": 3, "logprobs": 0},
    {"temperature": 1.5, "max_tokens": 32, "seed": 3, "ignore_eos": True, "logprobs": 1, "min_p": 0.01},
    {"temperature": 0, "max_tokens": 40, "stop": [")'"], "include_stop_str_in_output": True},
    {"temperature": 1, "max_tokens": 12, "seed": 4, "prompt_logprobs": 1, "n": 2},
    {"temperature": 0, "max_tokens": 40, "repetition_penalty": 1.2, "presence_penalty": 0.5, "logprobs": 3},
    {"temperature": 0, "max_tokens": 40, "stop_token_ids": [14], "skip_special_tokens": False},
)


def requests() -> list[dict[str, Any]]:
    """Texts and some token ids for `generate`, conversations for `chat`; the n-th with the n-th parameters."""
    rng = random.Random(7)
    made = []
    for chat in (False, True):
        for number in range(EACH):
            screen = demo.random_screen(rng)
            prompt: Any = screen.messages() if chat else screen.prompt()
            if not chat and number % 5 == 0:
                prompt = [rng.randrange(3, 500) for _ in range(rng.randrange(1, 40))]
            elif chat and number % 5 == 0:
                clicked = screen.after_click(screen.target.x, screen.target.y)
                prompt = [*prompt, {"role": "assistant", "content": screen.expected_answer()}, *clicked.messages()]
            params = dict(PARAMETERS[number % len(PARAMETERS)])
            if "seed" in params:
                params["seed"] += 1000 * number
            made.append({"chat": chat, "prompt": prompt, "params": params})
    return made


def alone(each: Sequence[Any]) -> list[Any]:
    """Those that are asked one after the other."""
    return [*each[:ALONE], *each[EACH : EACH + ALONE]]


@dataclass(frozen=True)
class Answers:
    """By `vllm.LLM` (`first` and `second` in two compositions) and by the client: side by side, and one by one.

    `chat_prompt` is what our client tells of the last one's prompt where it is asked to.
    """

    first: list[dict[str, Any]]
    second: list[dict[str, Any]]
    theirs_alone: list[dict[str, Any]]
    their_calls: list[Any]
    our_calls: list[Any]
    ours: list[dict[str, Any]]
    ours_alone: list[dict[str, Any]]
    chat_prompt: str | None


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """First all of `vllm.LLM`, then all of the server: never both at once. In the same order: for both the prefix cache
    has the same in it."""
    folder = tmp_path_factory.mktemp("llm")
    asked = requests()
    runs = {
        "alone": {"requests": alone(asked), "how": "one"},
        "first": {"requests": asked, "how": "batch"},
        "second": {"requests": asked, "how": "backwards"},
    }
    engine = {"model": str(demo.weights_path()), **ENGINE}
    order, answered = folder / "order.json", folder / "answers.json"
    calls = [call for call, _ in page_calls()]
    order.write_text(json.dumps({"engine": engine, "runs": runs, "setup": page_setup(), "calls": calls}))
    words = [sys.executable, real_llm.__file__, str(order), str(answered)]
    # The engine in the script's own process: one import of vLLM less.
    environment = {**os.environ, **demo.environment_defaults(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    theirs = json.loads(answered.read_text())

    with own_state():
        with ManagedVLLM("demo", keep_alive=0, **ENGINE) as llm:
            one_by_one = [ask(llm, [one], chat=one["chat"])[0] for one in alone(asked)]
            *_, last = alone(asked)
            prompt = llm.chat(last["prompt"], {"max_tokens": 1}, return_prompt_text=True)[0].prompt
            names = {"SamplingParams": SamplingParams, "BeamSearchParams": BeamSearchParams}
            called = json.loads(json.dumps(real_llm.made(llm, page_setup(), calls, names)))
            together = ask(llm, asked[:EACH], chat=False) + ask(llm, asked[EACH:], chat=True)
    return Answers(
        theirs["first"], theirs["second"], theirs["alone"], theirs["calls"], called, together, one_by_one, prompt
    )


def ask(llm: ManagedVLLM, asked: Sequence[Mapping[str, Any]], *, chat: bool) -> list[dict[str, Any]]:
    given: list[Any] = [one["prompt"] for one in asked]
    params = [one["params"] for one in asked]
    return [real_llm.plain(output) for output in (llm.chat if chat else llm.generate)(given, params)]


# -- comparing ---------------------------------------------------------------------------------------------------------


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In what two answers to one request differ, by name. Texts and ranks of candidates may be missing in `ours`."""
    found = [name for name in ("prompt_token_ids", "finished") if theirs[name] != ours[name]]
    if len(theirs["outputs"]) != len(ours["outputs"]):
        return [*found, "number of outputs"]
    for one, other in zip(theirs["outputs"], ours["outputs"], strict=True):
        names = ("index", "token_ids", "text", "finish_reason", "stop_reason", "finished")
        found += [name for name in names if one[name] != other[name]]
        sums = one["cumulative_logprob"], other["cumulative_logprob"]
        if None in sums:
            found += ["cumulative_logprob"] if sums != (None, None) else []
        elif not math.isclose(*sums, rel_tol=0, abs_tol=TOLERANCE * len(one["token_ids"])):
            found.append("cumulative_logprob")
        found += _of_places("logprobs", one["logprobs"], other["logprobs"], told=False)
    return found + _of_places("prompt_logprobs", theirs["prompt_logprobs"], ours["prompt_logprobs"], told=True)


def _of_places(name: str, theirs: Any, ours: Any, *, told: bool) -> list[str]:
    """`told`: the texts and ranks of all candidates must be there."""
    if theirs is None or ours is None:
        return [] if theirs is ours else [name]
    if len(theirs) != len(ours):
        return [f"length of {name}"]
    return [what for one, other in zip(theirs, ours, strict=True) for what in _of_place(name, one, other, told=told)]


def _close(one: float, other: float) -> bool:
    """Logits are bfloat16: of a candidate that hardly counts (e^-10) one step, 1/16, may be the engine's own noise."""
    return abs(one - other) <= (TOLERANCE if max(one, other) > -10 else 1 / 16)


def _of_place(name: str, theirs: Any, ours: Any, *, told: bool) -> list[str]:
    if theirs is None or ours is None:
        return [] if theirs is ours else [name]
    if theirs[0][0] != ours[0][0]:
        return [f"first id of {name}"]
    if len(theirs) != len(ours):
        # One exactly as likely as the sampled one: vLLM may give it the better rank, and then has one more.
        told_by_us = {entry[0] for entry in ours}
        more = [entry for entry in theirs if entry[0] not in told_by_us]
        if len(theirs) == len(ours) + 1 and [entry[1] for entry in more] == [theirs[0][1]]:
            return []
        return [f"number of candidates in {name}"]
    if not all(_close(one[1], other[1]) for one, other in zip(theirs, ours, strict=True)):
        return [name]
    found = []
    values = Counter(entry[1] for entry in theirs) + Counter(entry[1] for entry in ours)
    mine = {token: (value, rank, text) for token, value, rank, text in ours}
    last = theirs[-1][1]
    for token, value, rank, text in theirs:
        tied = values[value] > 2  # it stands once in each otherwise
        if token not in mine:
            # Behind the last one there may be more of the same.
            found += [] if (tied or value == last) and values[value] > 1 else [f"ids of {name}"]
            continue
        its, its_rank, its_text = mine[token]
        if not _close(value, its):
            found.append(name)
        if rank != its_rank and not tied and (told or its_rank is not None):
            found.append(f"rank of {name}")
        if text != its_text and (told or its_text is not None):
            found.append(f"decoded_token of {name}")
    return found


def differing(theirs: Sequence[Any], ours: Sequence[Any]) -> dict[int, list[str]]:
    compared = {index: differences(*pair) for index, pair in enumerate(zip(theirs, ours, strict=True))}
    return {index: sorted(set(found)) for index, found in compared.items() if found}


# -- tests -------------------------------------------------------------------------------------------------------------


def test_one_after_the_other_all_is_equal(answers: Answers) -> None:
    assert len(answers.ours_alone) == 2 * ALONE
    assert differing(answers.theirs_alone, answers.ours_alone) == {}


def test_side_by_side_no_more_differ_than_between_two_runs_of_vllm_llm(answers: Answers) -> None:
    noise, ours = differing(answers.first, answers.second), differing(answers.first, answers.ours)
    print(f"of {2 * EACH}: vllm.LLM and itself differ in {len(noise)}, vllm.LLM and ours in {len(ours)}")
    assert len(ours) <= len(noise) + MARGIN, (noise, ours)
    for found in ours.values():  # what no batch can change
        assert not {"prompt_token_ids", "number of outputs"} & set(found), ours


def test_the_answers_are_worth_comparing(answers: Answers) -> None:
    """Else the other tests would show little: many different ones, of all kinds."""
    completions = [one for output in answers.ours for one in output["outputs"]]
    assert len({one["text"] for one in completions}) > EACH
    assert {one["finish_reason"] for one in completions} == {"stop", "length"}
    assert {type(one["stop_reason"]) for one in completions} == {type(None), str, int}
    assert sum(len(one["logprobs"] or ()) for one in completions) > 1000
    assert sum(len(output["prompt_logprobs"] or ()) for output in answers.ours) > 1000
    changed = json.loads(json.dumps(answers.ours))
    for output in changed:
        output["outputs"][-1]["token_ids"][-1] += 1
    assert len(differing(answers.ours, changed)) == 2 * EACH


# -- the table of docs/client.md ---------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent.parent / "docs" / "client.md"


def page_section() -> str:
    return PAGE.read_text("utf-8").partition("### The same call, both sides")[2].partition("\n## ")[0]


def page_setup() -> str:
    return page_section().partition("```python\n")[2].partition("```")[0]


def page_calls() -> list[tuple[str, str]]:
    """Each call of the table, and what stands beside it."""
    return re.findall(r"^\| `(.+?)` \| (.+) \|$", page_section(), re.MULTILINE)


def test_the_table_has_calls() -> None:
    assert len(page_calls()) > 20


@pytest.mark.parametrize(("index", "call", "here"), [(i, *row) for i, row in enumerate(page_calls())])
def test_the_same_call_on_both_sides(answers: Answers, index: int, call: str, here: str) -> None:
    theirs, ours = answers.their_calls[index], answers.our_calls[index]
    if match := re.match(r"`(\w+Error)`", here):
        assert match[1] in ours["raises"]
        return
    if isinstance(theirs, dict) and "raises" in theirs:
        assert isinstance(ours, dict), ours
        assert "ManagedVLLMError" in ours.get("raises", ()), (theirs, ours)
        return
    assert not (isinstance(ours, dict) and "raises" in ours), ours
    if not (isinstance(theirs, list) and theirs and isinstance(theirs[0], dict)):
        assert ours == theirs
        return
    for one, other in zip(theirs, ours, strict=True):
        assert differences(one, other) == []
        ranks = [place[2] for output in other["outputs"] for each in output["logprobs"] or () for place in each]
        assert (None in ranks) == here.startswith("`rank` is None")


NOT_TOLD = {
    "num_cached_tokens",  # only with --enable-prompt-tokens-details
    "num_cache_creation_tokens",
    "outputs[0].logprobs[-1] values.rank",  # not of each, see `Logprob`
    "outputs[0].logprobs[-1] values.decoded_token",
}
"""What the routes don't tell: None in ours."""


def test_what_code_reads_of_an_output_is_there_and_of_the_same_type(answers: Answers) -> None:
    pairs = [
        *zip(answers.first, answers.ours, strict=True),
        *zip(answers.theirs_alone, answers.ours_alone, strict=True),
    ]
    for (theirs, ours), asked in zip(pairs, [*requests(), *alone(requests())], strict=True):
        assert theirs["types"].keys() == ours["types"].keys()
        differ = {name for name, one in theirs["types"].items() if one != ours["types"][name]}
        missing = NOT_TOLD | ({"prompt"} if asked["chat"] else set())  # only with return_prompt_text=True
        assert differ <= missing, differ
        assert {ours["types"][name] for name in differ} <= {"NoneType"}
        if not asked["chat"]:
            assert (
                ours["prompt"] == (None if isinstance(asked["prompt"], list) else asked["prompt"]) == theirs["prompt"]
            )
    assert answers.chat_prompt == answers.theirs_alone[-1]["prompt"]
