"""browser-use through the recorder: its requests as version 0.13 sends them, and its own Agent with Chromium.

Its agent is played where `BROWSER_USE_PYTHON` names an interpreter that has it: `make test-browser-use`.
"""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from acting_server import MODEL, acting, ids_of, logprob_of, text_of
from pictures import file_of, picture

from managed_vllm.agent import RunStore, Task, recorder
from managed_vllm.agent.prompting import images_of

PYTHON = os.environ.get("BROWSER_USE_PYTHON")
CHROMIUM = shutil.which("chromium")

AGENT = """
import asyncio
import sys

from browser_use import Agent, BrowserProfile, ChatOpenAI

task, model, chromium = sys.argv[1:]
browser = BrowserProfile(
    headless=True, executable_path=chromium, chromium_sandbox=False, enable_default_extensions=False
)
agent = Agent(task=task, llm=ChatOpenAI(model=model), browser_profile=browser, use_judge=False)
print(asyncio.run(agent.run(max_steps=6)).final_result())
"""
PAGE = """<!doctype html><title>Shop</title><label>Name <input id=name></label><p id=said>Nothing yet</p>
<button onclick="document.getElementById('said').textContent = 'Bought by ' + document.getElementById('name').value">
Buy</button>"""


def answer(action: dict[str, Any]) -> str:
    """As browser-use's schema wants it."""
    thoughts = {"evaluation_previous_goal": "Done.", "memory": "A shop.", "next_goal": "The next one."}
    return json.dumps({"thinking": None, **thoughts, "action": [action]})


def oracle(messages: list[dict[str, Any]]) -> str:
    """Reads the elements with their indices from what browser-use shows of the page."""
    shown = text_of(messages[-1])
    field, button = (re.search(rf"\[(\d+)\]<{tag}", shown) for tag in ("input", "button"))
    assert field is not None, shown
    assert button is not None, shown
    if "Bought by Ada" in shown:
        return answer({"done": {"text": "bought", "success": True}})
    if 'Typed "Ada"' in shown or "value=Ada" in shown:
        return answer({"click": {"index": int(button[1])}})
    return answer({"input": {"index": int(field[1]), "text": "Ada", "clear": True}})


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[str]:
    """A page's address."""
    (tmp_path / "index.html").write_text(PAGE)
    handler = functools.partial(_Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def request_of(name: str, system: str, texts: list[str], shots: list[bytes]) -> dict[str, Any]:
    """The body that browser-use 0.13.14 sends by `ChatOpenAI`; of its schema, 16 kB long, the outline."""
    urls = ["data:image/png;base64," + base64.b64encode(shot).decode() for shot in shots]
    images = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}} for url in urls]
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    schema = {"type": "object", "additionalProperties": False, "properties": {name: nullable}, "required": [name]}
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": [*({"type": "text", "text": text} for text in texts), *images]},
        ],
        "model": MODEL,
        "frequency_penalty": 0.3,
        "max_completion_tokens": 4096,
        "temperature": 0.2,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "agent_output", "strict": True, "schema": schema},
        },
    }


def test_requests_of_browser_use_come_through_as_they_are_and_its_judges_is_told_by_its_schema(tmp_path: Path) -> None:
    shots = [file_of(picture(seed)) for seed in range(3)]
    turns = [request_of("memory", "You browse.", ["<user_request>", "Current screenshot:"], [shot]) for shot in shots]
    judge = request_of("verdict", "You judge.", ["<task>"], shots)
    with acting(lambda messages: text_of(messages[0])) as server, RunStore.create(tmp_path / "run", {}) as store:
        with recorder(server.client(), store) as gateway, gateway.episode("shop") as episode:
            client = openai.OpenAI(base_url=episode.base_url, api_key=episode.api_key)
            for asked in (*turns, judge):
                client.chat.completions.create(**asked)
            trajectory = episode.finish(1.0)
        assert [store.images.read(ref) for step in trajectory.steps[:3] if (ref := step.screenshot)] == shots
    assert [{name: sent[name] for name in turns[0]} for sent in server.requests] == [*turns, judge]
    assert trajectory.exact
    assert [step.response for step in trajectory.steps] == ["You browse."] * 3 + ["You judge."]
    assert [len(images_of(step.messages)) for step in trajectory.steps] == [1, 1, 1, 3]
    settings = [step.info.get("request") for step in trajectory.steps]
    assert settings == [
        *({name: turns[0][name] for name in list(turns[0])[2:]}, None, None),
        {name: judge[name] for name in list(judge)[2:]},
    ]


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="BROWSER_USE_PYTHON is not set: an interpreter that has browser-use")
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_browser_uses_own_agent_buys_in_a_shop_unchanged(shop: str, tmp_path: Path) -> None:
    task = f"Open {shop}, type 'Ada' as the name, and press Buy."
    with acting(oracle) as server, RunStore.create(tmp_path / "run", {}) as store:
        with recorder(server.client(), store) as gateway, gateway.episode(Task("shop", task)) as episode:
            alone = {"ANONYMIZED_TELEMETRY": "false", "BROWSER_USE_CLOUD_SYNC": "false", "HOME": str(tmp_path)}
            played = subprocess.run(
                [str(PYTHON), "-c", AGENT, task, MODEL, str(CHROMIUM)],
                env={"PATH": os.environ["PATH"], **alone, **episode.environ()},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert played.stdout.splitlines()[-1:] == ["bought"], played.stdout + played.stderr
            trajectory = episode.finish(1.0)
        assert [type(json.loads(step.response)["action"][0]) for step in trajectory.steps] == [dict] * 3
        assert len({step.screenshot for step in trajectory.steps} - {None}) == 3
    assert [next(iter(json.loads(step.response)["action"][0])) for step in trajectory.steps] == [
        "input",
        "click",
        "done",
    ]
    assert trajectory.exact
    for step in trajectory.steps:
        ids = ids_of(step.response)
        assert list(step.response_token_ids) == ids
        assert step.response_logprobs is not None
        assert list(step.response_logprobs) == [logprob_of(one) for one in ids]
