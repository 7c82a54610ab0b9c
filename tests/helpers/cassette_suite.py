"""A suite that uses the fixture `managed_vllm`, to be recorded and played in pytest runs of its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inner_pytest

CASSETTE = "cassette.jsonl"
SUITE = """
import asyncio, json
import pytest

def note(name, *what):
    with open("answers.txt", "a") as file:
        print(json.dumps([name, *what]), file=file)

def told(output):
    answer = output.outputs[0]
    logprobs = answer.logprobs and [place[token].logprob for token, place in zip(answer.token_ids, answer.logprobs)]
    return [output.prompt_token_ids, answer.token_ids, logprobs, answer.text]

@pytest.fixture(scope="session")
def shared(managed_vllm):
    return managed_vllm.generate("shared", {"max_tokens": 3})[0].outputs[0].text

@pytest.mark.parametrize("number", range(3))
def test_chat(managed_vllm, number, shared):
    messages = [{"role": "user", "content": f"number {number}"}]
    [output] = managed_vllm.chat(messages, {"max_tokens": 4, "logprobs": 1})
    note("chat", number, told(output), shared)

def test_batch_and_repetition(managed_vllm):
    outputs = managed_vllm.generate(["a", "b", "a"], {"max_tokens": 3, "logprobs": 0})
    note("batch", [told(output) for output in outputs])

def test_many_prompts(managed_vllm):
    outputs = managed_vllm.generate([f"many {number}" for number in range(40)], {"max_tokens": 2})
    note("many", [told(output) for output in outputs])

def test_stream(managed_vllm):
    async def parts():
        return [told(part) async for part in managed_vllm.async_client.stream("s", {"max_tokens": 5, "logprobs": 0})]
    found = asyncio.run(parts())
    note("stream", [token for part in found for token in part[1]], "".join(part[3] for part in found))

def test_openai_sdk(managed_vllm):
    create = managed_vllm.openai.chat.completions.create
    messages = [{"role": "user", "content": "sdk"}]
    whole = create(model=managed_vllm.model, messages=messages, max_tokens=4, logprobs=True)
    events = list(create(model=managed_vllm.model, messages=messages, max_tokens=4, stream=True))
    note("sdk", whole.model_dump(), [event.model_dump() for event in events])

def test_an_error_and_what_is_beside_generating(managed_vllm):
    from managed_vllm.errors import BadRequestError
    with pytest.raises(BadRequestError) as caught:
        managed_vllm.generate([[99999999]], {"max_tokens": 1})
    note("error", str(caught.value), managed_vllm.tokenize("some words"))

def test_a_stream_that_is_left(managed_vllm):
    create = managed_vllm.openai.completions.create
    with create(model=managed_vllm.model, prompt="left", max_tokens=50_000, stream=True) as stream:
        note("left", [next(stream).choices[0].text for _ in range(3)])
"""
_WITHOUT_VLLM = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nowhere())
"""


def without_vllm() -> str:
    """A conftest.py with which neither vLLM nor torch can be imported."""
    return _WITHOUT_VLLM


class Suite:
    """A folder with tests, their settings and their cassette; the tests note in a file what they were answered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "test_suite.py"
        self.starts = folder / "starts.txt"
        self.answers_file = folder / "answers.txt"

    def write(self, tests: str, *settings: str) -> None:
        self.file.write_text(tests)
        lines = ["[pytest]", f"managed_vllm_cassette = {CASSETTE}", *settings]
        (self.folder / "pytest.ini").write_text("\n".join(lines))

    def copy(self, folder: Path) -> Suite:
        """The same elsewhere; what it counts, too."""
        shutil.copytree(self.folder, folder)
        settings = folder / "pytest.ini"
        settings.write_text(settings.read_text().replace(str(self.folder), str(folder)))
        return Suite(folder)

    def run(self, *arguments: str, **outcomes: int) -> str:
        """What a run prints; it must have had these outcomes."""
        run = subprocess.run(
            [*inner_pytest.WORDS, *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        last = run.stdout.rstrip().rpartition("\n")[2]
        found = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|error)", last)}
        expected = {("error" if name == "errors" else name): count for name, count in outcomes.items()}
        assert found == expected, run.stdout
        return run.stdout

    def answers(self) -> list[Any]:
        """What the tests of the last run have noted, in no order."""
        return sorted(map(json.loads, self.answers_file.read_text().splitlines()), key=json.dumps)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Of the cassette."""
        yield from map(json.loads, (self.folder / CASSETTE).read_text().splitlines())

    def count_starts(self) -> int:
        """How often a server was started."""
        return len(self.starts.read_text().split()) if self.starts.exists() else 0
