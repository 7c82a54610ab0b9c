"""Fifty tests, recorded once against the real vLLM, and played without it: the same ids and logprobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from cassette_suite import CASSETTE, Suite, without_vllm
from processes import own_state

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

FIFTY = """
import json
import pytest

@pytest.mark.parametrize("number", range(50))
def test_answer(managed_vllm, number):
    messages = [{"role": "user", "content": f"Screen {number}: click it."}]
    params = {"max_tokens": 8, "logprobs": 2, "temperature": 1.0, "seed": number}
    [output] = managed_vllm.chat(messages, params)
    parts = list(managed_vllm.stream("Screen:", {"max_tokens": 3, "logprobs": 0})) if number < 5 else []
    found = output.to_dict()
    answer = found["outputs"][0]
    with open("answers.txt", "a") as file:
        streamed = sum((part.outputs[0].token_ids for part in parts), [])
        kept = [found["prompt_token_ids"], answer["token_ids"], answer["logprobs"], streamed]
        print(json.dumps([number, kept]), file=file)
"""


def test_fifty_tests_are_played_without_vllm(tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    with own_state():
        suite.write(FIFTY, "managed_vllm_keep_alive = 0.2")
        suite.run(f"--managed-vllm-record={CASSETTE}", passed=50)
        recorded = suite.answers()
        suite.answers_file.unlink()
        (suite.folder / "conftest.py").write_text(without_vllm())
        suite.run(passed=50)
        assert suite.answers() == recorded
        assert len(recorded) == 50
