"""The example for verl, played by an oracle: what verl gets is what was said, token for token."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from typing import Any

import pytest
import standin_verl
from verl_loops import RESPONSE_LENGTH, Told, agent_loop

from managed_vllm.demo import read_screen


class Oracle:
    """verl's server manager, whose model is always right, and as sure of each token as of its place in the answer."""

    def __init__(self) -> None:
        self.tokenizer: Any = None
        self.asked: list[tuple[str, list[int], list[int]]] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Told:
        assert sampling_params == {"temperature": 1.0, "logprobs": True, "max_tokens": 64}
        shown = self.tokenizer.decode(prompt_ids).rpartition("<|im_start|>user\n")[2]
        said = read_screen(shown.partition("<|im_end|>")[0]).expected_answer() + self.tokenizer.eos_token
        ids = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        self.asked.append((request_id, prompt_ids, ids))
        return Told(ids, [-0.5 * place for place in range(len(ids))])


def test_an_episode_is_one_output_of_verls_agent_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle()
    module, loop = agent_loop(monkeypatch, oracle)
    oracle.tokenizer = loop.tokenizer
    (row,) = module.rows(1, seed=3)
    output = asyncio.run(loop.run({"temperature": 1.0}, **row))

    assert output.reward_score == 1.0
    assert output.extra_fields["uid"] == row["extra_info"]["task"]["id"]
    assert len({request_id for request_id, _, _ in oracle.asked}) == 1, "all turns go to one server"
    _, prompt, last = oracle.asked[-1]
    assert output.prompt_ids == oracle.asked[0][1]
    assert output.prompt_ids + output.response_ids == prompt + last
    said = [token for token, mask in zip(output.response_ids, output.response_mask, strict=True) if mask]
    assert said == [token for _, _, ids in oracle.asked for token in ids]
    scores = [score for score, mask in zip(output.response_logprobs, output.response_mask, strict=True) if mask]
    assert scores == [-0.5 * place for _, _, ids in oracle.asked for place in range(len(ids))]
    assert output.num_turns == 2 * len(oracle.asked)
    assert len(output.response_ids) <= RESPONSE_LENGTH


def test_a_server_of_verl_that_fails_is_an_error_and_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        async def generate(self, **_: Any) -> Told:
            raise OSError("no such actor")

    module, loop = agent_loop(monkeypatch, Broken())
    (row,) = module.rows(1)
    with pytest.raises(RuntimeError, match="no such actor"):
        asyncio.run(loop.run({}, **row))


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_the_stand_in_for_verl_has_its_fields() -> None:
    verl = importlib.import_module("verl.experimental.agent_loop.agent_loop")
    for name in ("AgentLoopOutput", "AgentLoopMetrics"):
        assert getattr(standin_verl, name).model_fields.keys() == getattr(verl, name).model_fields.keys()
