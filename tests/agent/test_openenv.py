"""Environments of OpenEnv over a real WebSocket: a stand-in of its protocol, and its own server where there is one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from acting_server import acting, text_of
from free_ports import free_port
from processes import HANG_S, eventually
from standin_openenv import Answers, Echo, Grid, OpenEnvServer, World

from managed_vllm.agent import (
    AgentFormat,
    Environment,
    Limits,
    Observation,
    OpenEnvEnvironment,
    RunStore,
    StreamingTaskScheduler,
    Task,
)
from managed_vllm.agent.actions import Click, Custom, Finished, ParsedResponse
from managed_vllm.agent.named_environments import named_environment
from managed_vllm.agent.openenv_format import openenv_actions
from managed_vllm.agent.prompting import Chat
from managed_vllm.errors import (
    ActionParseError,
    ConfigError,
    EnvironmentFailedError,
    EnvironmentRaisedError,
    EnvironmentTimeoutError,
)
from managed_vllm.request.outputs import CompletionOutput

TASK = Task("grid", "Go to the goal.", seed=3)
TO_THE_GOAL = ["DOWN"] * 4 + ["RIGHT"] * 4


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * HANG_S))


def move(where: str) -> Custom:
    return Custom("move", {"action": where})


def answering(answer: Any) -> Custom:
    return Custom("answer", {"answer": answer})


@contextlib.asynccontextmanager
async def world(of: type[World], **options: Any) -> AsyncIterator[tuple[OpenEnvServer, OpenEnvEnvironment]]:
    """A server, and an environment on it that has begun."""
    serving = {name: options.pop(name) for name in ("capacity", "websocket", "kept") if name in options}
    async with OpenEnvServer(of, **serving).running() as server:
        env = OpenEnvEnvironment(server.url, **options)
        try:
            yield server, env
        finally:
            await env.close()


@contextlib.contextmanager
def port_without_a_server() -> Iterator[int]:
    """One on which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def left(server: OpenEnvServer) -> None:
    """Waits until the server has seen that nobody is there any more."""
    await asyncio.to_thread(eventually, lambda: not server.sessions, "the session has ended")


# -- episodes ----------------------------------------------------------------------------------------------------------


async def played_grid(url: str) -> None:
    env = OpenEnvEnvironment(url, evaluate=lambda state: float(state["step_count"]))
    assert isinstance(env, Environment)
    for _ in range(2):  # one session, two episodes
        seen = await env.reset(Task("grid"))
        assert (seen.extras["observation"]["x"], seen.screenshot) == (0, None)
        assert json.loads(seen.text or "") == dict(seen.extras["observation"])
        results = [await env.step(move(each)) for each in TO_THE_GOAL]
        assert [result.reward for result in results] == [-0.1] * 7 + [1.0]
        assert [result.terminated for result in results] == [False] * 7 + [True]
        assert (await env.state())["step_count"] == await env.evaluate() == 8
        assert (await env.step(Finished())).reward is None
        assert (await env.state())["step_count"] == 8
    await env.close()
    await env.close()


async def played_echo(url: str) -> None:
    env = OpenEnvEnvironment(url)
    await env.reset(Task("echo"))
    call = {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": "Straße"}}
    result = await env.step(Custom("call", call))
    assert result.observation.extras["observation"]["result"]["data"] == "Straße"
    assert "Straße" in (result.observation.text or "")
    assert await env.evaluate() is None
    await env.close()


@pytest.mark.parametrize(("of", "played"), [(Grid, played_grid), (Echo, played_echo)], ids=["grid", "echo"])
def test_episodes_over_a_websocket_end_their_session_at_close(of: type[World], played: Any) -> None:
    async def test() -> None:
        async with OpenEnvServer(of, capacity=1).running() as server:
            for number in (1, 2):  # the next one has room at once
                await played(server.url)
                assert (server.sessions, server.opened) == (0, number)

    run(test)


def test_rollouts_of_a_model_each_have_a_session_of_their_own() -> None:
    def parsed(answer: Any, size: tuple[int, int]) -> ParsedResponse:
        found = re.search(r"UP|DOWN|LEFT|RIGHT", answer.text)
        if found is None:
            raise ActionParseError("no move", text=answer.text, span=(0, len(answer.text)))
        return ParsedResponse("", (move(found[0]),))

    def answer(messages: list[dict[str, Any]]) -> str:
        turn: int = sum(message["role"] == "assistant" for message in messages)
        return TO_THE_GOAL[min(7, turn)]

    async def test() -> None:
        async with OpenEnvServer(Grid, capacity=2).running() as server:
            with acting(answer) as model:
                scheduler = StreamingTaskScheduler(
                    model.client(),
                    lambda: OpenEnvEnvironment(server.url),
                    n=2,
                    max_concurrency=2,
                    agent=AgentFormat(Chat(prompt="Play: {instruction}"), parsed),
                    limits=Limits(max_steps=10, max_images=0),
                )
                rewards = [played.reward async for played in scheduler.run([TASK, Task("other", "Go.")])]
            assert rewards == [pytest.approx(0.3)] * 4
            assert (server.sessions, server.opened) == (0, 2)

    run(test)


def test_reset_is_told_the_seed_and_what_the_task_says() -> None:
    async def test() -> None:
        async with world(World) as (_, env):
            await env.reset(Task("t", seed=5, data={"reset": {"level": 2}, "other": 1}))
            assert (await env.state())["told"] == {"seed": 5, "level": 2}
            await env.reset(Task("t"))
            assert (await env.state())["told"] == {}
            with pytest.raises(ConfigError, match="must be a mapping"):
                await env.reset(Task("t", data={"reset": [1]}))

    run(test)


def test_headers_are_sent() -> None:
    async def test() -> None:
        async with world(World, headers={"Authorization": "Bearer t"}) as (server, env):
            await env.reset(TASK)
            assert server.headers["Authorization"] == "Bearer t"

    run(test)


# -- values ------------------------------------------------------------------------------------------------------------


def test_actions_and_observations_can_be_mapped() -> None:
    def to_action(action: Any) -> Mapping[str, Any]:
        return {"action": "RIGHT" if isinstance(action, Click) and action.x > 10 else "DOWN"}

    def to_observation(seen: Mapping[str, Any]) -> Observation:
        return Observation(text=f"at {seen['x']}, {seen['y']}")

    async def test() -> None:
        async with world(Grid, to_action=to_action, to_observation=to_observation) as (_, env):
            assert (await env.reset(TASK)).text == "at 0, 0"
            assert (await env.step(Click(20, 1))).observation.text == "at 0, 1"
            assert (await env.step(Finished())).observation.text == "at 0, 1"
        async with world(Grid, to_observation=lambda seen: "x") as (_, env):
            with pytest.raises(TypeError, match="must return an Observation"):
                await env.reset(TASK)
        async with world(Grid) as (_, env):
            await env.reset(TASK)
            with pytest.raises(EnvironmentFailedError, match="no Click that is known here: give to_action="):
                await env.step(Click(1, 1))

    run(test)


def test_a_screenshot_is_one_however_it_is_sent() -> None:
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("numpy")
    file = io.BytesIO()
    pillow.new("RGB", (3, 2), (9, 8, 7)).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()

    async def test() -> None:
        async with world(Answers) as (_, env):
            await env.reset(TASK)
            for given in (text, f"data:image/png;base64,{text}", [[[9, 8, 7]] * 3] * 2):
                seen = (await env.step(answering(({"screenshot": given, "url": "u"}, None, False)))).observation
                image = pillow.open(io.BytesIO(seen.screenshot or b""))
                assert (image.size, image.getpixel((2, 1)), seen.text) == ((3, 2), (9, 8, 7), '{"url": "u"}')
            with pytest.raises(ValueError, match="no base64"):
                await env.step(answering(({"screenshot": "~"}, None, False)))

    run(test)


def test_an_answer_of_megabytes_arrives_whole() -> None:
    async def test() -> None:
        async with world(Answers) as (_, env):
            await env.reset(TASK)
            seen = (await env.step(answering("long"))).observation
            assert seen.extras["observation"]["page"] == "word " * 1_000_000

    run(test)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_invalid", ["fail", "tell"])
def test_an_invalid_action_fails_or_is_told(on_invalid: Any) -> None:
    async def test() -> None:
        async with world(Grid, on_invalid=on_invalid) as (_, env):
            await env.reset(TASK)
            if on_invalid == "fail":
                with pytest.raises(EnvironmentRaisedError, match=r"VALIDATION_ERROR: .* action: Input should be 'UP'"):
                    await env.step(move("NORTH"))
            else:
                result = await env.step(move("NORTH"))
                assert result.reward is None
                assert "Input should be 'UP'" in result.info["invalid"]
                assert (result.observation.text or "").endswith(result.info["invalid"])
            assert (await env.step(move("DOWN"))).reward == -0.1

    run(test)


def test_what_its_environment_raises_is_the_servers_word_and_the_end() -> None:
    async def test() -> None:
        async with world(Answers) as (server, env):
            await env.reset(TASK)
            with pytest.raises(
                EnvironmentRaisedError, match="step: the server says EXECUTION_ERROR: 'answer'"
            ) as caught:
                await env.step(Custom("x"))
            assert (caught.value.call, caught.value.error_type) == ("step", "EXECUTION_ERROR")
            with pytest.raises(EnvironmentFailedError, match="can't be used any more"):
                await env.reset(TASK)
            assert server.opened == 1

    run(test)


def test_a_lost_connection_is_a_failure_and_no_other_one_is_made() -> None:
    async def test() -> None:
        async with world(Answers) as (server, env):
            await env.reset(TASK)
            with pytest.raises(EnvironmentFailedError, match=r"connection failed during step: .*its session is lost"):
                await env.step(answering("cut"))
            for call in (env.step(answering("cut")), env.reset(TASK)):
                with pytest.raises(EnvironmentFailedError, match="can't be used any more"):
                    await call
            assert server.opened == 1

    run(test)


def test_a_server_that_hangs_is_left_after_the_limit() -> None:
    async def test() -> None:
        async with world(Answers, limits=Limits(step_timeout_s=0.2)) as (server, env):
            await env.reset(TASK)
            with pytest.raises(EnvironmentTimeoutError, match=r"step was not over within 0\.2 s"):
                await env.step(answering("hang"))
            await left(server)

    run(test)


def test_a_cancelled_call_disconnects() -> None:
    async def test() -> None:
        async with world(Answers) as (server, env):
            await env.reset(TASK)
            stepping = asyncio.create_task(env.step(answering("hang")))
            await asyncio.sleep(0)
            with pytest.raises(EnvironmentFailedError, match="one call at a time"):
                await env.state()
            stepping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stepping
            await left(server)
            with pytest.raises(EnvironmentFailedError, match="cancelled"):
                await env.step(answering("hang"))

    run(test)


def test_pings_are_answered_while_nobody_asks() -> None:
    """A model may think for longer than a server waits for a pong (uvicorn: 20 s)."""

    async def test() -> None:
        async with world(Answers) as (server, env):
            await env.reset(TASK)
            await env.step(answering("ping"))
            await asyncio.wait_for(server.pongs.wait(), HANG_S)

    run(test)


def test_a_full_server_says_what_to_do() -> None:
    async def test() -> None:
        async with world(Grid, capacity=1) as (server, env):
            await env.reset(TASK)
            other = OpenEnvEnvironment(server.url)
            with pytest.raises(EnvironmentRaisedError, match=r"CAPACITY_REACHED: .*1/1 .*max_concurrency"):
                await other.reset(TASK)
            await other.close()
            assert (await env.step(move("UP"))).reward == -0.1

    run(test)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("no json", "no message of OpenEnv's: no json"),
        ("[1]", "no message of OpenEnv's"),
        ({"type": "state", "data": {}}, "step was answered by 'state'"),
        ({"type": "observation", "data": {"reward": 1}}, "an answer without an observation"),
        (({}, "much", False), "a reward that is no number: 'much'"),
    ],
    ids=["text", "list", "state", "nothing", "reward"],
)
def test_another_protocol_is_a_failure(answer: Any, said: str) -> None:
    async def test() -> None:
        async with world(Answers) as (_, env):
            await env.reset(TASK)
            with pytest.raises(EnvironmentFailedError, match=said):
                await env.step(answering(answer))
            with pytest.raises(EnvironmentFailedError, match="can't be used any more"):
                await env.step(answering(answer))

    run(test)


def test_before_reset_after_close_and_without_a_server() -> None:
    async def test() -> None:
        with port_without_a_server() as port:
            env = OpenEnvEnvironment(f"http://me:secret@127.0.0.1:{port}")
            with pytest.raises(EnvironmentFailedError, match="step before reset"):
                await env.step(move("UP"))
            with pytest.raises(EnvironmentFailedError, match="connection failed during reset") as caught:
                await env.reset(TASK)
        assert "secret" not in f"{caught.value} {env!r}"
        await env.close()
        with pytest.raises(EnvironmentFailedError, match="closed"):
            await env.reset(TASK)

    run(test)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        OpenEnvEnvironment(url)


def test_options_that_are_none_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="websocket, http"):
        OpenEnvEnvironment("http://h", transport="carrier")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fail, tell"):
        OpenEnvEnvironment("http://h", on_invalid="ask")  # type: ignore[arg-type]


# -- from the command line --------------------------------------------------------------------------------------------


def walks(messages: list[dict[str, Any]]) -> str:
    """Down, then right, as the last observation says; not before the schema of the actions was told."""
    assert '"enum": ["UP", "DOWN", "LEFT", "RIGHT"]' in text_of(messages[0])
    if len(messages) == 2:
        return 'I try something else.\n{"action": "NORTH"}'
    seen = json.loads(text_of(messages[-1]).splitlines()[0])
    return f"""Next.\n```json\n{{"action": "{"DOWN" if seen["x"] < 4 else "RIGHT"}"}}\n```"""


def test_the_command_plays_on_a_server_by_its_address(tmp_path: Path) -> None:
    words = ["rollout", "--tasks", "2", "--seed", "5", "--max-images", "0", "--json", "--out", str(tmp_path / "run")]

    async def played() -> tuple[int | None, bytes, bytes, str]:
        with acting(walks) as model:
            async with OpenEnvServer(Grid).running() as server:
                place = server.url.replace("http://", "openenv:http://me:secret@")
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "managed_vllm.cli", *words, "--env", place),
                    env={**os.environ, "VLLM_SERVER_URL": model.url, "VLLM_MODEL_NAME": "acting"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                out, errors = await process.communicate()
                await left(server)
                return process.returncode, out, errors, server.url

    code, out, errors, url = asyncio.run(asyncio.wait_for(played(), 4 * HANG_S))
    assert code == 0, errors
    found = json.loads(out)
    assert (found["done"], found["failed"], found["steps"]) == (2, 0, 2 * 9)
    assert found["mean_reward"] == pytest.approx(1.0 - 7 * 0.1)
    with RunStore.open(tmp_path / "run") as store:
        assert store.config == {"environment": f"openenv:{url}", "format": "openenv"}
        assert [(one.task.id, one.task.seed) for one in store.trajectories()] == [("seed-5", 5), ("seed-6", 6)]
        first = next(store.trajectories())
        assert "Input should be 'UP'" in str(first.steps[0].info["invalid"])
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "run").glob("*.json*"))


def test_the_command_says_that_nobody_answers_at_the_address() -> None:
    with (
        port_without_a_server() as port,
        pytest.raises(ConfigError, match=f"no OpenEnv server answers at http://127.0.0.1:{port}") as caught,
    ):
        named_environment(f"openenv:http://me:secret@127.0.0.1:{port}", Limits())
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="url must be"):
        named_environment("openenv:127.0.0.1:8000", Limits())


@pytest.mark.parametrize("text", ["", "RIGHT", "[1]", '{"action": 1', '{"a": 1} {"a": 2}', "[{}]"])
def test_an_answer_without_one_object_is_no_action(text: str) -> None:
    answer = CompletionOutput(0, text, [])
    with pytest.raises(ActionParseError):
        openenv_actions().parse(answer, (1, 1))


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_a_server_without_a_websocket_is_named_and_played_over_http() -> None:
    async def test() -> None:
        async with world(Grid, websocket=False) as (_, env):
            with pytest.raises(EnvironmentFailedError, match=r"no WebSocket at /ws .*transport='http'"):
                await env.reset(TASK)
        async with world(Grid, websocket=False, transport="http", on_invalid="tell") as (_, env):
            await env.reset(TASK)
            assert "Input should be 'UP'" in (await env.step(move("NORTH"))).info["invalid"]
            assert [(await env.step(move(each))).reward for each in TO_THE_GOAL][-1] == 1.0
            assert (await env.state())["step_count"] == 9

    run(test)


def test_http_is_refused_where_each_request_has_an_environment_of_its_own() -> None:
    async def test() -> None:
        async with world(Grid, kept=False, transport="http") as (_, env):
            with pytest.raises(EnvironmentFailedError, match="an environment for each request"):
                await env.reset(TASK)

    run(test)


# -- OpenEnv's own server ----------------------------------------------------------------------------------------------

PYTHON, CHECKOUT = os.environ.get("OPENENV_PYTHON"), os.environ.get("OPENENV_CHECKOUT")
ITS_OWN = "OPENENV_PYTHON (with openenv-core) and OPENENV_CHECKOUT (github.com/meta-pytorch/OpenEnv) are not set"


@pytest.fixture
def its_own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a server of OpenEnv's, with the environment of that name."""
    assert PYTHON is not None
    assert CHECKOUT is not None
    port = free_port()
    command = [PYTHON, "-m", "uvicorn", f"{request.param}.server.app:app", "--port", str(port)]
    envs = Path(CHECKOUT) / "envs"
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=envs, env={**os.environ, "PYTHONPATH": str(envs)}, stdout=file, stderr=file
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "running on" in log.read_text()

        eventually(ready, "OpenEnv's server is ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(HANG_S)


@pytest.mark.slow
@pytest.mark.skipif(not (PYTHON and CHECKOUT), reason=ITS_OWN)
@pytest.mark.parametrize(
    ("its_own", "played"),
    [("grid_world_env", played_grid), ("echo_env", played_echo)],
    indirect=["its_own"],
    ids=["grid", "echo"],
)
def test_the_same_episodes_on_openenvs_own_server(its_own: str, played: Any) -> None:
    async def test() -> None:
        await played(its_own)
        await played(its_own)

    run(test)
