"""TRL's own client, as its trainers use it, against a managed server: the key is in the URL, all else is TRL's."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from processes import own_state

from managed_vllm import ManagedVLLM
from managed_vllm.instance import directory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    with own_state(), ManagedVLLM("demo", for_training=True, keep_alive=0) as server:
        yield server
        server.stop_server()  # the example asks for it to stay a while


@pytest.fixture(scope="module")
def client(llm: ManagedVLLM) -> Any:
    with warnings.catch_warnings(), unittest.mock.patch.dict(os.environ):
        warnings.simplefilter("ignore")  # it says for which versions of vLLM it was made
        # It sets VLLM_LOGGING_LEVEL=ERROR for all that this process starts afterwards; other tests read servers' logs.
        module = importlib.import_module("trl.generation.vllm_client")
    return module.VLLMClient(base_url=llm.url_with_key, connection_timeout=60)


def test_generate_gives_ids_and_the_logprobs_of_the_sampler(llm: ManagedVLLM, client: Any) -> None:
    assert client.model == llm.model
    prompts = [llm.tokenize(text) for text in ("Screen:", "Task: click")]
    found = client.generate(prompts, n=2, max_tokens=6, temperature=1.0, generation_kwargs={"ignore_eos": True})
    assert found["prompt_ids"] == prompts
    assert [len(ids) for ids in found["completion_ids"]] == [6] * 4
    assert [[len(step) for step in steps] for steps in found["logprobs"]] == [[1] * 6] * 4
    (greedy,) = client.generate([prompts[0]], max_tokens=6, temperature=0.0)["completion_ids"]
    assert greedy == list(llm.generate(["Screen:"], max_tokens=6, temperature=0)[0].outputs[0].token_ids)


def test_chat(llm: ManagedVLLM, client: Any) -> None:
    messages = [{"role": "user", "content": "Which button is it?"}]
    (ids,) = client.chat([messages], max_tokens=8, temperature=0.0)["completion_ids"]
    assert ids == list(llm.chat(messages, max_tokens=8, temperature=0)[0].outputs[0].token_ids)


def test_the_routes_of_a_trainer(client: Any) -> None:
    assert client.get_world_size() == 1
    client.reset_prefix_cache()  # raises where the server refuses


def test_nothing_of_it_without_the_key(llm: ManagedVLLM) -> None:
    bare = llm.base_url.removesuffix("/v1")
    for method, path in (
        ("GET", "/get_world_size"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/inference/v1/generate"),
    ):
        assert requests.request(method, bare + path, timeout=60).status_code == 401


def test_the_example(llm: ManagedVLLM) -> None:
    example, epoch = Path(__file__).resolve().parents[2] / "examples" / "08_trl.py", llm.status().epoch
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert run.stdout.count("tokens, the first with logprob") == 4
    assert llm.status().epoch == epoch
    assert len(directory.instances(directory.state_home())) == 1, "it was this server"
