"""Record and replay: what a suite has asked of a server is played without one, exactly, or it is said what differs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import inner_pytest
import pytest
import requests
import standin
from cassette_suite import CASSETTE, SUITE, Suite, without_vllm
from processes import eventually, own_state
from scripted_server import FIRST, Script, streams, token

from managed_vllm import AsyncVLLMClient
from managed_vllm.cassettes import cassette
from managed_vllm.cassettes.cassette import Server
from managed_vllm.cassettes.server import CassetteServer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """A suite that was recorded against the stand-in."""
    with own_state():
        suite = Suite(tmp_path_factory.mktemp("recorded"))
        settings = [
            f"managed_vllm_command = {shlex.join(standin.command())}",
            f"managed_vllm_env =\n    STANDIN={json.dumps({'count': str(suite.starts), 'token_s': 0.001})}",
            "managed_vllm_keep_alive = 0.2",
            "managed_vllm_model = stand-in",
        ]
        suite.write(SUITE, *settings)
        suite.run(f"--managed-vllm-record={CASSETTE}", passed=9)
        yield suite


@pytest.fixture
def suite(recorded: Suite, tmp_path: Path) -> Iterator[Suite]:
    """A copy of it, to be changed."""
    with own_state():
        yield recorded.copy(tmp_path / "suite")


# -- replay ------------------------------------------------------------------------------------------------------------


def test_what_was_recorded_is_played_without_a_server_and_without_vllm(suite: Suite) -> None:
    told = suite.answers()
    (suite.folder / "conftest.py").write_text(without_vllm())
    suite.answers_file.unlink()
    suite.run(passed=9)
    assert suite.answers() == told
    assert suite.count_starts() == 1


def test_each_prompt_of_a_call_is_recorded_by_itself(recorded: Suite) -> None:
    many = [line["request"]["body"]["prompt"] for line in recorded.lines() if "many" in line.get("test", "")]
    assert sorted(many) == sorted(f"many {number}" for number in range(40))


def test_recording_again_by_two_workers_leaves_each_test_its_own_interactions(suite: Suite) -> None:
    def asked() -> list[str]:
        """By test, without what fixtures and streams that are left make of it."""
        requests = [(line["test"], line["request"]) for line in suite.lines() if line.get("test")]
        return [
            json.dumps(each)
            for each in sorted(requests, key=json.dumps)
            if each[1]["body"].get("prompt") not in ("shared", "left")
        ]

    before = asked()
    suite.run(f"--managed-vllm-record={CASSETTE}", "-n", "2", passed=9)
    assert asked() == before
    tests = [line["test"] for line in suite.lines() if "test" in line]
    assert tests == sorted(tests)
    assert next(suite.lines()) == {"cassette": 1}


# -- misses ------------------------------------------------------------------------------------------------------------

MISSES = """
def test_typed(managed_vllm):
    from managed_vllm.errors import CassetteMissError
    with pytest.raises(CassetteMissError, match="asked once more"):
        managed_vllm.chat([[{"role": "user", "content": "number 0"}]] * 9, {"max_tokens": 4, "logprobs": 1})
    with pytest.raises(CassetteMissError, match="Nothing was recorded for this route"):
        managed_vllm.embed("x")
    with pytest.raises(Exception) as caught:
        managed_vllm.openai.completions.create(model=managed_vllm.model, prompt="b", max_tokens=7)
    assert "nearest" in str(caught.value)

def test_a_stream_that_was_left_has_no_more(managed_vllm):
    import openai
    create = managed_vllm.openai.completions.create
    with create(model=managed_vllm.model, prompt="left", max_tokens=50_000, stream=True) as stream:
        with pytest.raises(openai.APIError, match="the client left it here"):
            list(stream)
"""


def test_what_was_not_recorded_fails_with_the_nearest_request_as_a_diff(suite: Suite) -> None:
    suite.file.write_text(SUITE.replace('f"number {number}"', 'f"the number {number}"') + MISSES)
    said = suite.run("-k", "chat or typed or no_more", passed=2, failed=3)
    assert "CassetteMissError: POST /v1/chat/completions of test_suite.py::test_chat[0] was not recorded in" in said
    assert "--- recorded" in said
    assert '-    "content": "number 0",' in said
    assert '+    "content": "the number 0",' in said
    assert suite.count_starts() == 1


def test_another_argument_is_an_error_that_says_what_differs(suite: Suite) -> None:
    said = suite.run("-k", "batch", "--managed-vllm-args=--max-model-len 64", errors=1)
    assert "CassetteMismatchError" in said
    assert "max_model_len: unset was recorded, now it is 64" in said
    assert suite.count_starts() == 1


# -- recording ---------------------------------------------------------------------------------------------------------


def test_new_episodes_are_recorded_beside_those_that_are_there(suite: Suite) -> None:
    before = list(suite.lines())
    suite.file.write_text(SUITE + '\ndef test_new(managed_vllm): managed_vllm.generate("new", {"max_tokens": 2})\n')
    suite.run("-k", "batch or new", "--managed-vllm-record-mode=new_episodes", passed=2)
    after = list(suite.lines())
    assert [line for line in after if line in before] == before
    assert [line["test"] for line in after if line not in before] == ["test_suite.py::test_new"]
    assert suite.count_starts() == 2


def test_a_stream_is_recorded_whole_though_the_client_hangs_up_with_its_last_event(
    tmp_path: Path, script: Callable[..., Script]
) -> None:
    """As the OpenAI SDK does, while the recorder may still wait for the end of the connection to the model server."""
    model_server = script(streams(FIRST, token(2, "stop"), b"[DONE]", ends=False))
    path = tmp_path / CASSETTE
    with contextlib.closing(AsyncVLLMClient(model_server.url, "key", "m")) as client:
        recorder = CassetteServer(path, "all", Server("m", None), lambda: (client, "key"))
        recorder.start()
        recorder.begin("test")
        headers = {"Authorization": f"Bearer {recorder.api_key}"}
        asked = {"model": "m", "prompt": "x", "stream": True}
        with requests.post(f"{recorder.base_url}/completions", json=asked, headers=headers, stream=True) as response:
            next(line for line in response.iter_lines() if line == b"data: [DONE]")
        eventually(lambda: model_server.hung_up, "the recorder has let go of the request")
        recorder.close()
    (found,) = cassette.read(path).interactions
    assert found.response.events is not None
    assert (len(found.response.events), found.response.cut) == (3, False)


SECRETS = """
import base64

def test_it(managed_vllm):
    image = base64.b64encode(b"\\x89PNG" + bytes(3_000_000)).decode()
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": managed_vllm.api_key}]
    answer = managed_vllm.openai.chat.completions.create(model=managed_vllm.model, messages=messages)
    assert managed_vllm.api_key in answer.choices[0].message.content
"""


def test_no_key_is_in_a_cassette_and_images_are_by_their_hash(suite: Suite) -> None:
    suite.file.write_text(SECRETS)
    (suite.folder / CASSETTE).unlink()
    suite.run("--managed-vllm-record-mode=once", passed=1)
    text = (suite.folder / CASSETTE).read_text()
    assert len(text) < 20_000
    assert "data:image/png;base64,sha256=" in text
    assert '"content": "***"' in text


def test_a_recorder_that_is_killed_leaves_the_cassette_as_it_was(suite: Suite) -> None:
    before = (suite.folder / CASSETTE).read_bytes()
    suite.file.write_text("""
import pathlib, signal

def test_it(managed_vllm):
    managed_vllm.generate("killed", {"max_tokens": 2})
    pathlib.Path("asked").touch()
    signal.pause()
""")
    words = [*inner_pytest.WORDS, f"--managed-vllm-record={CASSETTE}"]
    with subprocess.Popen(words, cwd=suite.folder, env=dict(os.environ), stdout=subprocess.DEVNULL) as run:
        eventually((suite.folder / "asked").exists, "the test has asked", 120)
        run.send_signal(signal.SIGKILL)
    assert (suite.folder / CASSETTE).read_bytes() == before
    assert [path.name for path in suite.folder.glob(f".{CASSETTE}*")] == []


def test_without_a_cassette_none_is_an_error_and_no_server_is_started(suite: Suite) -> None:
    (suite.folder / CASSETTE).unlink()
    said = suite.run("-k", "batch", "--managed-vllm-record-mode=none", errors=1)
    assert "CassetteError: there is no cassette" in said
    assert suite.count_starts() == 1
