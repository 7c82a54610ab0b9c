"""One episode: why it ends, what is recorded, and what becomes of an answer that is no action."""

from __future__ import annotations

import asyncio
import inspect
import threading
from dataclasses import replace
from typing import Any

import pytest
from acting_server import MODEL, ActingServer, Refusal, acting, text_of
from counting_world import BUTTON, CountingWorld, Worlds, hang, picture, right, tasks, until
from moved_clock import Clock
from processes import HANG_S

from managed_vllm import AsyncVLLMClient
from managed_vllm.agent import (
    AgentFormat,
    FailureClass,
    ImageStore,
    Limits,
    Observation,
    ParseErrorPolicy,
    Step,
    StepResult,
    StopReason,
    Task,
    ThenWhat,
    Trajectory,
    json_actions,
    run_episode,
    tool_calls,
    ui_tars,
)
from managed_vllm.agent.actions import Action, Click, Finished, ParsedResponse, Wait
from managed_vllm.agent.prompting import Chat, History, Turn, newest_images
from managed_vllm.agent.types import ImageRef
from managed_vllm.errors import BadRequestError, ConfigError

PARAMS = {"max_tokens": 200, "temperature": 0}
AGENT = ui_tars("absolute", show_text=True)


async def play(server: ActingServer, world: Any, task: Task | None = None, **options: Any) -> Trajectory:
    async with server.client() as client:
        given = {"sampling_params": PARAMS, "agent": AGENT, **options}
        return await run_episode(client, world, task or tasks(1)[0], **given)


def played(answer: Any, world: Any = None, task: Task | None = None, **options: Any) -> Trajectory:
    with acting(answer) as server:
        return asyncio.run(play(server, world or CountingWorld(), task, **options))


# -- why it ends -------------------------------------------------------------------------------------------------------


def test_the_models_finished_ends_it_and_the_evaluator_decides() -> None:
    found = played(right)
    assert (found.stop_reason, found.reward, found.failure) == (StopReason.FINISHED, 1.0, None)
    assert [type(step.actions[0]) for step in found.steps] == [Click, Click, Finished]
    assert found.ok


def test_call_user_ends_it() -> None:
    found = played(lambda _: "Action: call_user()")
    assert (found.stop_reason, found.reward) == (StopReason.CALL_USER, 0.0)


def test_max_steps_ends_it_with_the_evaluators_verdict() -> None:
    found = played(right, task=tasks(1, 9)[0], limits=Limits(max_steps=4))
    assert (found.stop_reason, found.reward, len(found.steps)) == (StopReason.MAX_STEPS, 0.0, 4)


def test_max_episode_tokens_ends_it_and_bounds_each_answer() -> None:
    with acting(right) as server:
        found = asyncio.run(
            play(server, CountingWorld(), tasks(1, 9)[0], limits=Limits(max_steps=20, max_episode_tokens=150))
        )
        bounds = [body["max_tokens"] for body in server.requests if text_of(body["messages"][-1])]
    assert found.response_tokens <= 150
    assert bounds[0] == 150
    assert bounds[1] == 150 - len(found.steps[0].response_token_ids)
    assert found.stop_reason in (StopReason.MAX_TOKENS, StopReason.PARSE_ERROR)


def test_max_response_tokens_is_sent_where_it_is_less_than_the_sampling_parameters_say() -> None:
    with acting(right) as server:
        asyncio.run(play(server, CountingWorld(), limits=Limits(max_response_tokens=77)))
        assert {body["max_tokens"] for body in server.requests if text_of(body["messages"][-1])} == {77}


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_the_environments_end_comes_before_the_rest_of_the_actions(flag: str) -> None:
    class Ending(CountingWorld):
        async def step(self, action: Any) -> StepResult:
            result = await super().step(action)
            ends: dict[str, Any] = {flag: self.left == 1}
            return replace(result, reward=0.25, **ends)

        async def evaluate(self) -> None:
            return None

    several = "\n\n".join(["Action: click(start_box='(100,60)')"] * 3)
    found = played(lambda _: several, Ending())
    assert found.stop_reason == flag
    assert len(found.steps) == 1
    assert found.steps[0].executed == 1
    assert len(found.steps[0].actions) == 3
    assert found.reward == 0.25, "without a verdict the reward is the sum of the steps'"


def test_without_any_reward_there_is_none() -> None:
    class Silent(CountingWorld):
        async def evaluate(self) -> None:
            return None

    found = played(right, Silent())
    assert found.reward is None
    assert found.ok


def test_a_prompt_beyond_the_context_ends_it_and_it_counts() -> None:
    def answer(messages: list[dict[str, Any]]) -> Any:
        if len(messages) > 4:
            return Refusal(400, "This model's maximum context length is 100 tokens. However, you requested 132 tokens")
        return right(messages)

    found = played(answer, task=tasks(1, 9)[0])
    assert (found.stop_reason, found.reward, found.failure) == (StopReason.CONTEXT_OVERFLOW, 0.0, None)
    assert len(found.steps) == 1


def test_the_episodes_time_bounds_the_answer_and_not_the_evaluation(clock: Clock) -> None:
    asked = threading.Event()

    async def never(messages: list[dict[str, Any]]) -> str:
        asked.set()
        await asyncio.Event().wait()
        return right(messages)

    class SlowVerdict(CountingWorld):
        async def step(self, action: Action) -> StepResult:
            self.passing = asyncio.create_task(self.an_hour_passes())
            return await super().step(action)

        async def an_hour_passes(self) -> None:
            await until(asked.is_set)
            clock.forward(3600)

        async def evaluate(self) -> float:
            clock.forward(3600)
            await asyncio.sleep(0)
            return 0.5

    found = played(lambda m: never(m) if "1 left" in text_of(m[-1]) else right(m), SlowVerdict(),
                   limits=Limits(episode_timeout_s=1000, evaluate_timeout_s=10_000))  # fmt: skip
    assert (found.stop_reason, found.reward, found.failure) == (StopReason.EPISODE_TIMEOUT, 0.5, None)
    assert len(found.steps) == 1


def test_an_answer_that_takes_too_long_is_a_failure_of_the_server() -> None:
    async def never(_: Any) -> str:
        await asyncio.sleep(30)
        return ""

    found = played(never, limits=Limits(generate_timeout_s=0.2))
    assert found.stop_reason is StopReason.LLM_FAILURE
    assert found.failure is not None
    assert found.failure.kind is FailureClass.MODEL_SERVER
    assert found.failure.error_type == "RequestTimeoutError"


# -- answers that are no action ----------------------------------------------------------------------------------------

NONSENSE = "I would rather not."


@pytest.mark.parametrize(
    ("policy", "reward", "kind"),
    [
        (ParseErrorPolicy(), 0.0, None),
        (ParseErrorPolicy(then=ThenWhat.PENALISE, penalty=-0.5), -0.5, None),
        (ParseErrorPolicy(then=ThenWhat.FAIL), None, FailureClass.PARSER),
    ],
)
def test_an_answer_that_is_no_action_ends_it_as_the_policy_says(
    policy: ParseErrorPolicy, reward: float | None, kind: FailureClass | None
) -> None:
    found = played(lambda _: NONSENSE, agent=replace(AGENT, on_parse_error=policy))
    assert found.stop_reason is StopReason.PARSE_ERROR
    assert found.reward == reward
    assert (found.failure and found.failure.kind) == kind
    assert found.steps[0].response == NONSENSE
    assert found.steps[0].parse_error
    assert found.steps[0].actions == ()


def test_the_model_is_told_what_is_wrong_and_asked_again() -> None:
    said = iter([NONSENSE])
    with acting(lambda messages: next(said, None) or right(found_left(messages))) as server:
        agent = replace(AGENT, on_parse_error=ParseErrorPolicy(retries=1))
        found = asyncio.run(play(server, CountingWorld(), agent=agent))
        asked = [body for body in server.requests if text_of(body["messages"][-1])][1]["messages"]
    assert found.reward == 1.0
    assert [bool(step.parse_error) for step in found.steps] == [True, False, False, False]
    assert [message["role"] for message in asked][-3:] == ["user", "assistant", "user"]
    assert text_of(asked[-2]) == NONSENSE
    assert "not a valid action" in text_of(asked[-1])
    assert str(found.steps[0].parse_error) in text_of(asked[-1])
    assert found.steps[1].screenshot is None, "nothing new was seen"
    assert found.steps[1].actions == (Click(100, 60),), "in pixels of the screenshot before"


def found_left(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages up to the last that says how many are left."""
    last = max(index for index, message in enumerate(messages) if " left" in text_of(message)
               and message["role"] == "user")  # fmt: skip
    return messages[: last + 1]


def test_it_is_told_so_only_as_often_as_the_policy_says() -> None:
    agent = replace(AGENT, on_parse_error=ParseErrorPolicy(retries=2))
    found = played(lambda _: NONSENSE, agent=agent, limits=Limits(max_steps=9))
    assert found.stop_reason is StopReason.PARSE_ERROR
    assert len(found.steps) == 3


def test_a_cut_answer_is_no_action() -> None:
    found = played(lambda _: "Thought: " + "so " * 200, limits=Limits(max_response_tokens=50))
    assert found.stop_reason is StopReason.PARSE_ERROR
    assert found.steps[0].finish_reason == "length"


# -- the caller's own code ---------------------------------------------------------------------------------------------


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("messages", {"agent": AgentFormat(broken, AGENT.parse)}),
        ("parse", {"agent": AgentFormat(AGENT.build_messages, broken)}),
        ("hook", {"on_step": broken}),
    ],
)
def test_what_the_callers_code_raises_is_classed_as_its_own(stage: str, options: dict[str, Any]) -> None:
    found = played(right, **options)
    assert found.stop_reason is StopReason.USER_FAILURE
    failure = found.failure
    assert failure is not None
    assert (failure.kind, failure.stage, failure.error_type) == (FailureClass.USER_CODE, stage, "ZeroDivisionError")
    assert failure.step == (1 if stage == "hook" else 0)
    assert "oops" in failure.details
    assert found.reward is None


def test_a_request_that_is_wrong_before_it_is_sent_is_the_callers_doing() -> None:
    agent = AgentFormat(
        lambda _: [{"role": "user", "content": [{"type": "image", "image": "/no/such.png"}]}], AGENT.parse
    )
    found = played(right, agent=agent)
    assert found.failure is not None
    assert found.failure.kind is FailureClass.USER_CODE


def test_hooks_may_be_coroutines_and_see_each_step() -> None:
    seen: list[tuple[str, int, int]] = []

    async def hook(task: Task, rollout: int, step: Step) -> None:
        await asyncio.sleep(0)
        seen.append((task.id, rollout, step.index))

    played(right, on_step=hook, rollout=5)
    assert seen == [("task-000", 5, 0), ("task-000", 5, 1), ("task-000", 5, 2)]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sampling_params": {"n": 2}}, BadRequestError, "scheduler's n="),
        ({"sampling_params": {"temprature": 1}}, BadRequestError, "temperature"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_played(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    world = CountingWorld()
    with pytest.raises(error, match=words):
        played(right, world, **options)
    assert world.worlds.log == []


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(ConfigError, match="VLLMClient"):
        asyncio.run(run_episode(object(), CountingWorld(), tasks(1)[0]))


def test_each_episode_stays_with_one_of_several_servers() -> None:
    async def play_all(client: AsyncVLLMClient) -> list[Trajectory]:
        async with client, asyncio.timeout(HANG_S):
            given: dict[str, Any] = {"sampling_params": PARAMS, "agent": AGENT}
            return await asyncio.gather(*(run_episode(client, CountingWorld(), tasks(1)[0], **given) for _ in range(6)))

    with acting(right) as first, acting(right) as second:
        done = asyncio.run(play_all(AsyncVLLMClient([first.url, second.url], None, MODEL)))
        assert [one.reward for one in done] == [1.0] * 6
        turns = [[body["session_id"] for body in one.requests if "session_id" in body] for one in (first, second)]
    assert sum(map(len, turns)) == sum(len(one.steps) for one in done)
    assert sum(len(set(sessions)) for sessions in turns) == 6
    assert all(turns)
    assert set(turns[0]).isdisjoint(turns[1])


# -- environments that do not keep to the protocol ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("reset", {"screenshot": b""}, "must give an Observation, not dict"),
        ("step", (None, 0, True, {}), "must give a StepResult, not tuple"),
        ("evaluate", "fine", "could not convert"),
        ("evaluate", float("nan"), "no reward"),
        ("reset", Observation(b"no image"), "not a PNG"),
    ],
)
def test_what_is_of_the_wrong_kind_is_a_failure_of_the_environment(method: str, value: Any, words: str) -> None:
    class Wrong(CountingWorld):
        pass

    async def wrong(self: Any, *_: Any) -> Any:
        return value

    setattr(Wrong, method, wrong)
    found = played(right, Wrong())
    assert found.failure is not None
    assert found.failure.kind is FailureClass.ENVIRONMENT
    assert words in found.failure.message
    assert found.reward is None


def test_numbers_of_numpy_are_rewards_and_info_becomes_plain() -> None:
    numpy = pytest.importorskip("numpy")

    class Numeric(CountingWorld):
        async def step(self, action: Any) -> StepResult:
            result = await super().step(action)
            return replace(result, reward=numpy.float32(0.5), info={"a": numpy.arange(3), "b": object(), "c": {1: 2}})

        async def evaluate(self) -> Any:
            return numpy.float64(0.75)

    found = played(right, Numeric())
    assert type(found.reward) is float
    assert found.reward == 0.75
    assert type(found.steps[0].reward) is float
    info = found.steps[0].info
    assert info["a"] == [0, 1, 2]
    assert info["b"].startswith("<object object")
    assert info["c"] == {"1": 2}


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "asked"), [(None, False), (False, False), (True, True)])
def test_special_tokens_stay_in_the_record_and_in_the_history(given: bool | None, asked: bool) -> None:
    boxed = f"Thought: Next.\nAction: click(start_box='<|box_start|>({BUTTON[0]:g},{BUTTON[1]:g})<|box_end|>')"
    answers = iter([boxed, "Action: finished()"])
    with acting(lambda _: next(answers)) as server:
        params = {**PARAMS, "skip_special_tokens": given}
        found = asyncio.run(play(server, Worlds()(), tasks(1, 1)[0], sampling_params=params))
    asked_for = [body for body in server.requests if any(map(text_of, body["messages"]))]
    assert [body["skip_special_tokens"] for body in asked_for] == [asked, asked]
    assert found.steps[0].response == boxed
    assert boxed in [text_of(message) for message in asked_for[1]["messages"]]
    assert found.steps[0].actions == (Click(*BUTTON),)


def test_a_step_says_what_was_seen_sent_answered_and_done() -> None:
    with ImageStore.temporary() as images:
        found = played(right, task=tasks(1, 1)[0], images=images)
        first, last = found.steps
        assert images.read(first.screenshot or pytest.fail("none")) == picture(1, "task-000")
        assert images.read(found.final_screenshot or pytest.fail("none")) == picture(0, "task-000")
        assert first.text == "1 left"
        assert first.thought == "1 left."
        assert first.actions == (Click(100, 60),)
        assert first.info == {"left": 0}
        assert first.finish_reason == "stop"
        assert first.model == "acting"
        assert first.attempts == 1
        assert last.terminated
        assert [message["role"] for message in last.messages] == ["system", "user", "user", "assistant", "user"]
        assert last.messages[2]["content"][0]["image"] == first.screenshot
        for step in found.steps:
            assert step.timings.total_s >= step.timings.model_s + step.timings.environment_s - 1e-6 > 0
        assert found.duration_s >= sum(step.timings.total_s for step in found.steps)
        assert found.instruction == "Press next until none is left."


def test_the_environments_instruction_comes_before_the_tasks() -> None:
    class Telling(CountingWorld):
        async def reset(self, task: Task) -> Observation:
            return replace(await super().reset(task), instruction="Do as the screen says.")

    found = played(right, Telling())
    assert found.instruction == "Do as the screen says."
    assert "Do as the screen says." in text_of(found.steps[0].messages[1])


def test_a_turn_cut_by_a_failure_is_recorded_with_what_was_answered() -> None:
    def fault(world: CountingWorld, call: str) -> None:
        if call == "step" and world.steps == 2:
            raise OSError("cable pulled")

    found = played(right, CountingWorld(fault), tasks(1, 5)[0])
    assert found.failure is not None
    assert found.failure.step == 1
    assert [step.executed for step in found.steps] == [1, 0]
    assert found.steps[1].response_token_ids


def test_cancelling_it_cancels_what_runs_in_the_environment() -> None:
    cancelled: list[bool] = []

    async def slow() -> None:
        try:
            await hang()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        worlds = Worlds(lambda world, call: slow() if call == "step" else None)
        with acting(right) as server:
            playing = asyncio.create_task(play(server, worlds()))
            async with asyncio.timeout(HANG_S):
                while not worlds.calls["step"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            playing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await playing

    asyncio.run(main())
    assert cancelled == [True]


# -- other formats -----------------------------------------------------------------------------------------------------


def test_models_that_answer_in_json() -> None:
    def answer(messages: list[dict[str, Any]]) -> str:
        said = right(messages)
        if "finished" in said:
            return '{"thought": "done", "action": "finished", "content": "ok"}'
        return '```json\n{"thought": "on", "action": "click", "x": 100, "y": 60}\n```'

    found = played(answer, agent=json_actions())
    assert found.reward == 1.0
    assert found.steps[0].actions == (Click(100, 60),)
    assert found.steps[0].thought == "on"


def test_models_that_call_tools() -> None:
    def answer(messages: list[dict[str, Any]]) -> Any:
        done = "finished" in right(messages)
        name, arguments = ("finished", "{}") if done else ("click", '{"x": 100, "y": 60}')
        call = {"id": f"call-{len(messages)}", "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"content": "so", "tool_calls": [call]}

    with acting(answer) as server:
        found = asyncio.run(play(server, CountingWorld(), agent=tool_calls()))
        bodies = [body for body in server.requests if text_of(body["messages"][-1])]
    assert found.reward == 1.0, found.failure
    assert all(body["tools"] for body in bodies)
    roles = [message["role"] for message in bodies[1]["messages"]]
    assert roles == ["user", "user", "assistant", "tool", "user"]
    assert bodies[1]["messages"][3]["tool_call_id"] == bodies[1]["messages"][2]["tool_calls"][0]["id"]


def test_an_environment_without_pictures_needs_none() -> None:
    class Words(CountingWorld):
        def seen(self) -> Observation:
            return replace(super().seen(), screenshot=None)

    found = played(right, Words())
    assert found.reward == 1.0
    assert found.final_screenshot is None


# -- messages ----------------------------------------------------------------------------------------------------------


def ref(number: int) -> ImageRef:
    return ImageRef(f"{number:064}", "image/png", 10, 10)


@pytest.fixture
def turns() -> list[Turn]:
    return [Turn(ref(number), f"seen {number}", f"answer {number}") for number in range(5)] + [Turn(ref(5), "seen 5")]


def test_messages_of_a_turn_begin_with_all_of_the_last_ones_as_long_as_no_image_leaves(turns: list[Turn]) -> None:
    chat = Chat(system="You are.", prompt="Do: {instruction} {}")
    task = Task("t", "it")
    before: list[Any] = []
    for count in range(1, 7):
        now = [*turns[: count - 1], replace(turns[count - 1], response=None)]
        built = chat(History(task, "it", now, 99))
        assert built[: len(before)] == before
        before = built
    assert text_of(before[1]) == "Do: it {}"


def test_newest_images_drops_the_oldest_and_no_word(turns: list[Turn]) -> None:
    built = Chat()(History(Task("t", "it"), "it", turns, 2))
    images = [part["image"] for message in built for part in message["content"] if isinstance(part, dict)
              and part["type"] == "image"]  # fmt: skip
    assert images == [ref(4), ref(5)]
    assert [text_of(message) for message in built] == ["it", *(word for number in range(5)
            for word in (f"seen {number}", f"answer {number}")), "seen 5"]  # fmt: skip
    alone = newest_images([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], 0)
    assert alone == []


def test_a_shorter_history_keeps_the_newest_turns(turns: list[Turn]) -> None:
    built = Chat(prompt="", history=1)(History(Task("t", "it"), "it", turns, 9))
    assert [text_of(message) for message in built] == ["seen 4", "answer 4", "seen 5"]


def test_a_parser_of_ones_own_needs_only_to_be_a_function() -> None:
    found = played(right, agent=AgentFormat(AGENT.build_messages, lambda answer, size: ParsedResponse("", (Wait(),))),
                   limits=Limits(max_steps=2))  # fmt: skip
    assert found.stop_reason is StopReason.MAX_STEPS
    assert inspect.isfunction(AgentFormat(AGENT.build_messages, lambda a, s: ParsedResponse("", ())).parse)
