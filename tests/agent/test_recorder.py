"""The recorder: any agent, unchanged but for its URL, and what arrives in the record."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import standin
from acting_server import acting, ids_of, logprob_of, text_of
from osworld_agent import SETTINGS, official_module
from pictures import file_of, picture
from processes import HANG_S, eventually, own_state

from managed_vllm import ManagedVLLM
from managed_vllm.agent import RecordedEpisode, RecordingGateway, RunStore, StopReason, Task, Trajectory, recorder
from managed_vllm.agent.export import export
from managed_vllm.agent.export.verl import load_verl
from managed_vllm.agent.prompting import images_of
from managed_vllm.errors import ConfigError, RunStoreError

CHECKOUT = os.environ.get("OSWORLD_CHECKOUT")
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where faults are ordered of the stand-in."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def llm(faults: Path) -> Iterator[ManagedVLLM]:
    with (
        own_state(),
        ManagedVLLM(
            "stand-in", command=standin.command(), env=standin.orders(faults=str(faults), token_s=0.01), keep_alive=0
        ) as found,
    ):
        yield found


@pytest.fixture
def gateway(llm: ManagedVLLM) -> Iterator[RecordingGateway]:
    with recorder(llm) as found:
        yield found


def sdk(episode: RecordedEpisode, **options: Any) -> Any:
    return openai.OpenAI(**{"base_url": episode.base_url, "api_key": episode.api_key, "max_retries": 0, **options})


def post(episode: RecordedEpisode, path: str, body: Any = None, key: str | None = None, **options: Any) -> Any:
    """A plain HTTP request to an episode, with its own key or another one."""
    headers = {"Authorization": f"Bearer {episode.api_key if key is None else key}"}
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(f"{episode.base_url}{path}", data=data, headers=headers, timeout=HANG_S, **options)


def ids_in(trajectory: Trajectory) -> list[tuple[list[int], list[int], list[float]]]:
    return [
        (list(step.prompt_token_ids), list(step.response_token_ids), list(step.response_logprobs or ()))
        for step in trajectory.steps
    ]


def told_by_server(llm: ManagedVLLM, messages: list[Any], **params: Any) -> tuple[list[int], list[int], list[float]]:
    """The same request without the recorder: ids of prompt and answer, and logprobs."""
    [output] = llm.chat(messages, {"logprobs": 0, **params})
    answer = output.outputs[0]
    assert answer.logprobs is not None
    places = zip(answer.token_ids, answer.logprobs, strict=True)
    return output.prompt_token_ids, list(answer.token_ids), [place[token].logprob for token, place in places]


# -- what is recorded --------------------------------------------------------------------------------------------------

AGENT = """
import openai

client = openai.OpenAI()  # all that it knows is in its environment
messages = [{"role": "user", "content": "one"}]
for turn in range(3):
    answer = client.chat.completions.create(model="stand-in", messages=messages, max_tokens=5 + turn)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    messages.append({"role": "user", "content": f"go on, {turn}"})
print(len(messages))
"""


def test_a_program_on_the_openai_sdk_plays_unchanged_and_each_turn_has_the_servers_ids(
    llm: ManagedVLLM, tmp_path: Path
) -> None:
    with RunStore.create(tmp_path / "run", {}) as store, recorder(llm, store) as gateway:
        with gateway.episode(Task("count", "Count.")) as episode:
            environment = {"PATH": "/usr/bin", **episode.environ()}
            found = subprocess.run([sys.executable, "-c", AGENT], env=environment, capture_output=True, text=True)
            assert found.stdout == "7\n", found.stderr
            played = episode.finish(0.5, info={"score": 3})
    with RunStore.open(tmp_path / "run") as store:
        [stored] = store.trajectories()
    assert stored == played
    assert (stored.reward, stored.stop_reason, stored.info) == (0.5, StopReason.FINISHED, {"score": 3})
    assert stored.exact
    expected = [told_by_server(llm, list(step.messages), max_tokens=5 + n) for n, step in enumerate(stored.steps)]
    assert ids_in(stored) == [(prompt, ids, logprobs) for prompt, ids, logprobs in expected]
    assert [len(step.messages) for step in stored.steps] == [1, 3, 5]
    assert [step.info.get("request") for step in stored.steps] == [
        {"max_tokens": 5},
        {"max_tokens": 6},
        {"max_tokens": 7},
    ]


def test_a_recorded_run_is_exported_for_a_trainer(llm: ManagedVLLM, tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", {}) as store, recorder(llm, store) as gateway:
        for rollout in range(2):
            with gateway.episode("task") as episode:
                client = sdk(episode)
                for turn in range(2):
                    client.chat.completions.create(
                        model=llm.model, messages=[{"role": "user", "content": f"turn {turn}"}], max_tokens=4
                    )
                episode.finish(float(rollout))
    with RunStore.open(tmp_path / "run") as store:
        trajectories = list(store.trajectories())
        export(store, "verl", tmp_path / "out")
    samples = list(load_verl(tmp_path / "out"))
    assert [(one["prompt_ids"], one["response_ids"], one["response_logprobs"]) for one in samples] == [
        each for trajectory in trajectories for each in ids_in(trajectory)
    ]
    assert [one["reward_score"] for one in samples] == [0.0, 0.0, 1.0, 1.0]


def test_streams_several_answers_and_completions_are_recorded_as_the_server_told_them(
    llm: ManagedVLLM, gateway: RecordingGateway
) -> None:
    with gateway.episode("several") as episode:
        client = sdk(episode)
        parts = list(client.chat.completions.create(model=llm.model, messages=HELLO, max_tokens=6, stream=True, n=2))
        completion = client.completions.create(model=llm.model, prompt="a b", max_tokens=3, n=2)
        trajectory = episode.finish()
    chat = told_by_server(llm, HELLO, max_tokens=6)
    assert ids_in(trajectory)[:2] == [chat, chat]
    assert [step.info["choice"] for step in trajectory.steps] == [0, 1, 0, 1]
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices and part.choices[0].index)
    assert streamed == trajectory.steps[0].response == trajectory.steps[1].response
    [direct] = llm.generate(["a b"], {"max_tokens": 3, "logprobs": 0})
    ids = direct.prompt_token_ids, direct.outputs[0].token_ids
    assert [(prompt, answer) for prompt, answer, _ in ids_in(trajectory)[2:]] == [ids, ids]
    assert [choice.text for choice in completion.choices] == [step.response for step in trajectory.steps[2:]]
    assert trajectory.exact


def test_the_agent_sees_no_field_that_it_did_not_ask_for(llm: ManagedVLLM, gateway: RecordingGateway) -> None:
    direct = requests.Session()
    direct.headers["Authorization"] = f"Bearer {llm.api_key}"

    def without_names(text: str) -> Any:
        answer = json.loads(text)
        return {name: value for name, value in answer.items() if name not in ("id", "created")}

    with gateway.episode("same") as episode:
        for path, body in (
            ("/chat/completions", {"messages": HELLO}),
            ("/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
            ("/chat/completions", {"messages": HELLO, "return_token_ids": True}),
            ("/completions", {"prompt": "Hello"}),
            ("/completions", {"prompt": "Hello", "logprobs": 0, "return_token_ids": True}),
        ):
            asked = {"model": llm.model, "max_tokens": 3, **body}
            theirs = direct.post(f"{llm.base_url}{path}", json=asked, timeout=HANG_S)
            ours = post(episode, path, asked)
            assert without_names(ours.text) == without_names(theirs.text)
            asked["stream"] = True
            theirs = direct.post(f"{llm.base_url}{path}", json=asked, timeout=HANG_S)
            ours = post(episode, path, asked)
            assert _fields(ours.text) == _fields(theirs.text)
            assert ours.text.endswith("data: [DONE]\n\n")
        trajectory = episode.finish()
    assert len(trajectory.steps) == 10
    assert trajectory.exact


def _fields(stream: str) -> set[str]:
    """The fields in the events of a stream that have a value; how many tokens are in one is a matter of time."""
    found: set[str] = set()

    def look(value: Any, path: str) -> None:
        for name, each in value.items() if isinstance(value, dict) else ():
            look(each, f"{path}.{name}")
        for each in value if isinstance(value, list) else ():
            look(each, f"{path}[]")
        if value is not None and not isinstance(value, dict | list):
            found.add(path)

    for line in stream.splitlines():
        if line.startswith("data: {"):
            look(json.loads(line[6:]), "")
    return {path for path in found if "top_logprobs" not in path}


def test_images_stand_in_the_record_by_content_and_the_server_gets_them_as_they_were(tmp_path: Path) -> None:
    shown = file_of(picture())
    url = "data:image/png;base64," + base64.b64encode(shown).decode()
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "x"}]
    with acting(lambda _: "seen") as server, RunStore.create(tmp_path / "run", {}) as store:
        with recorder(server.client(), store) as gateway, gateway.episode("look") as episode:
            for each in (content, broken):
                sdk(episode).chat.completions.create(model="acting", messages=[{"role": "user", "content": each}])
            trajectory = episode.finish()
        first, second = trajectory.steps
        assert first.screenshot is not None
        assert store.images.read(first.screenshot) == shown
        assert first.messages[0]["content"][1] == {"type": "image", "image": first.screenshot}
        assert list(second.messages) == [{"role": "user", "content": broken}]
        assert [request["messages"][0]["content"] for request in server.requests] == [content, broken]
        assert (list(first.response_token_ids), first.response_logprobs) == (
            ids_of("seen"),
            [logprob_of(one) for one in ids_of("seen")],
        )


def test_without_ids_of_the_server_the_record_says_so_and_the_agent_goes_on() -> None:
    with acting(lambda _: "blind", token_ids=False) as server, recorder(server.client()) as gateway:
        with gateway.episode("blind") as episode:
            answer = sdk(episode).chat.completions.create(model="acting", messages=HELLO)
            assert answer.choices[0].message.content == "blind"
            trajectory = episode.finish()
    assert not trajectory.exact
    assert trajectory.steps[0].response == "blind"


# -- a third-party agent -----------------------------------------------------------------------------------------------


def test_openai_agents_with_tools_and_a_sub_agent_play_unchanged() -> None:
    agents = pytest.importorskip("agents")

    @agents.function_tool  # type: ignore[untyped-decorator]
    def double(number: int) -> int:
        """Doubles a number."""
        return 2 * number

    def said(messages: list[dict[str, Any]]) -> Any:
        if messages[-1]["role"] == "tool":
            return f"it is {messages[-1]['content']}"
        if "Summarize" in text_of(messages[0]):
            return "a short answer"
        call = {"id": "call_1", "type": "function", "function": {"name": "double", "arguments": '{"number": 21}'}}
        return {"content": None, "tool_calls": [call]}

    with acting(said) as server, recorder(server.client()) as gateway, gateway.episode("tools") as episode:
        client = openai.AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key)
        model = agents.OpenAIChatCompletionsModel("acting", client)
        summarizer = agents.Agent(name="summarizer", instructions="Summarize.", model=model)
        tools = [double, summarizer.as_tool("summarize", "Summarizes a text.")]
        agent = agents.Agent(name="clerk", instructions="Use your tools.", model=model, tools=tools)
        agents.set_tracing_disabled(True)
        result = agents.Runner.run_sync(agent, "What is twice 21?")
        assert result.final_output == "it is 42"
        agents.Runner.run_sync(summarizer, result.final_output)
        trajectory = episode.finish(1.0)
    assert [step.response for step in trajectory.steps] == ["", "it is 42", "a short answer"]
    assert trajectory.steps[0].info["tool_calls"][0]["function"]["name"] == "double"
    assert [tool["function"]["name"] for tool in trajectory.steps[0].info["request"]["tools"]] == [
        "double",
        "summarize",
    ]
    assert [message["role"] for message in trajectory.steps[1].messages] == ["system", "user", "assistant", "tool"]
    assert [message["role"] for message in trajectory.steps[2].messages] == ["system", "user"]


def test_openai_agents_on_its_default_api_is_told_what_to_set_and_the_record_says_so() -> None:
    agents = pytest.importorskip("agents")
    with acting(lambda _: "never") as server, recorder(server.client()) as gateway, gateway.episode("api") as episode:
        model = agents.OpenAIResponsesModel(
            "acting", openai.AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key)
        )
        agents.set_tracing_disabled(True)
        with pytest.raises(openai.NotFoundError, match=r"set_default_openai_api\('chat_completions'\)"):
            agents.Runner.run_sync(agents.Agent(name="clerk", model=model), "Hello")
        trajectory = episode.finish()
    assert trajectory.steps == ()
    assert trajectory.info["errors"][0]["status"] == 404
    assert server.requests == []


@pytest.mark.skipif(CHECKOUT is None, reason="OSWORLD_CHECKOUT is not set: the folder of github.com/xlang-ai/OSWorld")
def test_osworlds_own_agent_plays_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert CHECKOUT is not None
    shots = [file_of(picture(seed, (280, 280))) for seed in range(7)]
    said = "Thought: I see it.\nAction: click(start_box='(14,28)')"
    with acting(lambda _: said) as server, RunStore.create(tmp_path / "run", {}) as store:
        with recorder(server.client(), store) as gateway, gateway.episode("osworld") as episode:
            monkeypatch.setenv("DOUBAO_API_URL", episode.base_url)
            monkeypatch.setenv("DOUBAO_API_KEY", episode.api_key)
            agent = official_module(Path(CHECKOUT)).UITARSAgent(model="acting", runtime_conf=SETTINGS)
            scripts = [agent.predict("click it", {"screenshot": shot})[1] for shot in shots]
            trajectory = episode.finish(1.0)
        assert all("pyautogui.click" in script for [script] in scripts)
        assert [store.images.read(ref) for step in trajectory.steps if (ref := step.screenshot)] == shots
    assert [len(images_of(step.messages)) for step in trajectory.steps] == [1, 2, 3, 4, 5, 5, 5]
    assert [list(step.response_token_ids) for step in trajectory.steps] == [ids_of(said)] * 7
    assert trajectory.exact


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_strangers_and_latecomers_are_refused_in_openais_shape(llm: ManagedVLLM, gateway: RecordingGateway) -> None:
    chat = {"model": llm.model, "messages": HELLO, "max_tokens": 2}
    with gateway.episode("mine") as episode, gateway.episode("other") as other:
        for key in ("", "wrong", other.api_key, llm.api_key, "schlüssel"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            found = requests.post(f"{episode.base_url}/chat/completions", json=chat, headers=headers, timeout=HANG_S)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            sdk(episode, api_key="wrong").models.list()
        with pytest.raises(openai.NotFoundError, match="no such episode"):
            sdk(episode, base_url=episode.base_url.replace("/episodes/", "/episodes/x")).models.list()
        assert [model.id for model in sdk(episode).models.list()] == [llm.model]
        for path in ("/load_lora_adapter", "/responses", "/../../v1/chat/completions"):
            assert post(episode, path, chat).status_code == 404
        for body in (b"", b"[]", b"\xff\xfe", b"{" * 5000, b'"x"'):
            found = post(episode, "/chat/completions", body)
            assert (found.status_code, found.json()["error"]["type"]) == (400, "BadRequestError")
        assert episode.finish().steps == ()
        late = post(episode, "/chat/completions", chat)
        assert (late.status_code, late.json()["error"]["code"]) == (404, "episode_not_found")
        with pytest.raises(ConfigError, match="finished already"):
            episode.finish()
    assert "Secret" not in repr(episode)
    assert episode.api_key not in repr(episode)


def test_the_servers_own_errors_come_through_with_their_status(llm: ManagedVLLM, gateway: RecordingGateway) -> None:
    with gateway.episode("wrong") as episode:
        with pytest.raises(openai.NotFoundError) as caught:
            sdk(episode).chat.completions.create(model="nobody", messages=HELLO)
        with pytest.raises(openai.NotFoundError) as direct:
            llm.openai.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hello"}])
        assert caught.value.message == direct.value.message
        for body in ({"messages": 5}, {"messages": [5, {"content": [None]}]}, {"prompt": {"a": 1}}):
            assert post(episode, "/chat/completions", {"model": llm.model, **body}).status_code >= 400
        trajectory = episode.finish()
    assert trajectory.steps == ()
    assert trajectory.info["errors"][0]["status"] == 404


def test_an_episode_has_only_so_many_requests(llm: ManagedVLLM) -> None:
    with recorder(llm, max_requests=2) as gateway, gateway.episode("circles") as episode:
        asked = {"model": llm.model, "messages": HELLO, "max_tokens": 1}
        assert [post(episode, "/chat/completions", asked).status_code for _ in range(4)] == [200, 200, 403, 403]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_an_agent_survives_that_the_server_dies_under_its_request(
    llm: ManagedVLLM, gateway: RecordingGateway, faults: Path
) -> None:
    with gateway.episode("crash") as episode:
        (faults / "1-crash").touch()
        answer = sdk(episode).chat.completions.create(model=llm.model, messages=HELLO, max_tokens=20)
        (faults / "2-abort").touch()
        sdk(episode).chat.completions.create(model=llm.model, messages=HELLO, max_tokens=20)
        trajectory = episode.finish()
    assert answer.choices[0].message.content == trajectory.steps[0].response
    assert all(step.attempts > 1 for step in trajectory.steps)
    assert ids_in(trajectory)[0] == ids_in(trajectory)[1] == told_by_server(llm, HELLO, max_tokens=20)


def test_a_stream_that_breaks_ends_with_an_error_and_what_came_is_kept(
    llm: ManagedVLLM, gateway: RecordingGateway, faults: Path
) -> None:
    with gateway.episode("broken") as episode:
        (faults / "3-streamerror").touch()
        stream = sdk(episode).chat.completions.create(model=llm.model, messages=HELLO, max_tokens=40, stream=True)
        with pytest.raises(openai.APIError):
            list(stream)
        trajectory = episode.finish()
    [step] = trajectory.steps
    _, whole, _ = told_by_server(llm, HELLO, max_tokens=40)
    assert 0 < len(step.response_token_ids) < 40
    assert list(step.response_token_ids) == whole[: len(step.response_token_ids)]
    assert step.finish_reason == "abort"
    assert trajectory.info["errors"]


def test_an_agent_that_hangs_up_in_mid_stream_ends_the_generation_and_its_part_is_kept(
    llm: ManagedVLLM, gateway: RecordingGateway
) -> None:
    with gateway.episode("hangs-up") as episode:
        asked = {"model": llm.model, "messages": HELLO, "max_tokens": 50_000, "stream": True}
        with post(episode, "/chat/completions", asked, stream=True) as response:
            lines = response.iter_lines()
            for _ in range(20):
                next(lines)
        eventually(lambda: llm.metrics().running == 0, "the generation has ended")
        trajectory = episode.finish()
    [step] = trajectory.steps
    assert 0 < len(step.response_token_ids) < 50_000
    assert (step.finish_reason, trajectory.info["requests_left"]) == ("abort", 1)
    assert step.response_logprobs is not None
    assert len(step.response_logprobs) == len(step.response_token_ids)


def test_finish_ends_what_is_in_flight(llm: ManagedVLLM, gateway: RecordingGateway) -> None:
    with gateway.episode("ends") as episode, ThreadPoolExecutor(1) as threads:
        asked = {"model": llm.model, "messages": HELLO, "max_tokens": 50_000}
        answer = threads.submit(post, episode, "/chat/completions", asked)
        eventually(lambda: llm.metrics().running == 1, "the generation runs")
        trajectory = episode.finish(1.0)
        assert answer.result(HANG_S).status_code == 404
    assert trajectory.steps == ()
    assert trajectory.info == {"requests_left": 1}


def test_what_the_block_raises_is_the_episodes_failure_and_the_rest_ends_with_the_gateway(
    llm: ManagedVLLM, tmp_path: Path
) -> None:
    with RunStore.create(tmp_path / "run", {}) as store:
        with recorder(llm, store) as gateway:
            with pytest.raises(ZeroDivisionError), gateway.episode("raises"):
                print(1 / 0)
            left = gateway.episode("left")
            with pytest.raises(ConfigError, match="being played"):
                gateway.episode("left", rollout=0)
            again = gateway.episode("raises")
            again.finish(1.0)
        with pytest.raises(ConfigError, match="within its"):
            gateway.episode("late")
        found = {(one.task.id, one.attempt): one for one in store.attempts()}
    failed = found["raises", 0]
    assert (failed.stop_reason, failed.reward) == (StopReason.USER_FAILURE, None)
    assert failed.failure is not None
    assert failed.failure.error_type == "ZeroDivisionError"
    assert found["raises", 1].reward == 1.0
    assert left.trajectory == found["left", 0]
    assert found["left", 0].stop_reason == StopReason.CANCELLED


def test_another_model_is_another_run(tmp_path: Path) -> None:
    with acting(lambda _: "x") as server, RunStore.create(tmp_path / "run", {}) as store:
        with recorder(server.client(), store):
            pass
    with acting(lambda _: "x", model="else") as server, RunStore.create(tmp_path / "run", {}) as store:
        other = server.client()
        other.model_name = "else"
        with pytest.raises(RunStoreError, match="else"), recorder(other, store):
            pass


def test_many_episodes_at_once_do_not_mix(llm: ManagedVLLM, gateway: RecordingGateway) -> None:
    everybody = threading.Barrier(8)

    def play(number: int) -> Trajectory:
        with gateway.episode("same-task", rollout=number) as episode:
            client = sdk(episode)
            everybody.wait(HANG_S)
            for turn in range(3):
                content = f"{number}, {turn}"
                client.chat.completions.create(
                    model=llm.model, messages=[{"role": "user", "content": content}], max_tokens=5
                )
            return episode.finish(float(number))

    with ThreadPoolExecutor(8) as threads:
        trajectories = list(threads.map(play, range(8)))
    for number, trajectory in enumerate(trajectories):
        assert trajectory.key == ("same-task", number)
        contents = [step.messages[0]["content"] for step in trajectory.steps]
        assert contents == [f"{number}, {turn}" for turn in range(3)]
        messages = [[{"role": "user", "content": content}] for content in contents]
        assert ids_in(trajectory) == [told_by_server(llm, each, max_tokens=5) for each in messages]
