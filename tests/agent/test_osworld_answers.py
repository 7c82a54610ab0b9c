"""`ui_tars("osworld")` against OSWorld's own agent: answers, prompt, history, sampling, and how an episode ends."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from acting_server import acting, text_of
from counting_world import CountingWorld, tasks
from osworld_agent import SIZE, decided, effects

from managed_vllm.agent import (
    AgentFormat,
    Limits,
    Observation,
    ParseErrorPolicy,
    RunStore,
    StepResult,
    StopReason,
    Trajectory,
    run_episode,
    ui_tars,
)
from managed_vllm.agent.actions import (
    Action,
    ActionParseError,
    CallUser,
    Finished,
    Wait,
    parse_like_osworld,
    to_pyautogui,
)
from managed_vllm.errors import ConfigError

DATA = Path(__file__).parent.parent / "data" / "ui_tars" / "like_osworld.jsonl"
CASES: list[dict[str, Any]] = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
CHECKOUT = os.environ.get("OSWORLD_CHECKOUT")
PROMPT = "Do {instruction} in {language}."
AGENT = ui_tars("osworld", prompt=PROMPT)


def done(text: str) -> list[Any]:
    """What we do at an answer, in the notation of `effects`."""
    found: list[Any] = []
    try:
        actions = parse_like_osworld(text, SIZE).actions
    except ActionParseError:
        return ["REFUSED"]
    for action in actions:
        match action:
            case Finished():
                found.append("DONE")
            case CallUser("error_env"):
                found.append("FAIL")
            case CallUser() | Wait():
                found.append("WAIT")  # the first three times
            case _:
                found += effects(to_pyautogui(action, typing="paste", keys="as_said", decimals=3))
    return found


def written(calls: list[Any]) -> list[Any]:
    """The notation of the recorded cases."""
    return [call if isinstance(call, str) else [call[0], list(call[1]), call[2]] for call in calls]


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:70])
def test_an_answer_means_what_it_means_to_osworlds_agent(case: dict[str, Any]) -> None:
    """Recorded from that agent. Where it breaks, and the run with it, the answer is refused."""
    theirs = case["theirs"]
    if str(theirs[:1]).startswith("['CRASH"):
        theirs = ["REFUSED"]
    assert written(done(case["text"])) == theirs


def test_at_least_95_of_97_recorded_answers_are_the_same() -> None:
    same = [case for case in CASES if written(done(case["text"])) == case["theirs"]]
    assert len(CASES) == 97
    assert len(same) >= 95


@pytest.mark.skipif(CHECKOUT is None, reason="OSWORLD_CHECKOUT is not set: the folder of github.com/xlang-ai/OSWorld")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:70])
def test_the_record_is_what_osworlds_agent_does_today(case: dict[str, Any]) -> None:
    pytest.importorskip("loguru")
    theirs = decided(Path(CHECKOUT or ""), case["text"])
    assert written(theirs) == (["BREAKS"] if str(case["theirs"][:1]).startswith("['CRASH") else case["theirs"])


@pytest.mark.parametrize(
    "text",
    [
        "Action: __import__('os').system('touch /tmp/x')",
        "Action: click(start_box=__import__('os').getcwd())",
        "Action: type(content='a\\\\'); __import__('os').system('touch x') #')",
        "Action: hotkey(key='" + "(" * 10_000 + "')",
        "Action: " + "(" * 10_000,
        "Action: click(start_box='(1e999,1)')",
        "Action: type(content='\x00')",
    ],
    ids=range(7),
)
def test_model_text_is_never_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not [call for call in done(text) if call[0] not in ("COPY", "press", "hotkey", "R")]
    assert not list(tmp_path.iterdir())


# -- the prompt --------------------------------------------------------------------------------------------------------


def test_the_prompt_is_read_from_a_checkout_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    (tmp_path / "mm_agents").mkdir()
    (tmp_path / "mm_agents/uitars15_v1.py").write_text(
        "import no_such_package\nraise SystemExit\n"
        'UITARS_NORMAL_ACTION_SPACE = """\nclick(box)\n"""\n'
        'UITARS_USR_PROMPT_THOUGHT = """Space:\n{action_space}\nIn {language}: {instruction}\n"""\n'
    )
    messages = sent(ui_tars("osworld", checkout=tmp_path, language="German"))
    assert [message["role"] for message in messages] == ["system", "user", "user"]
    assert text_of(messages[1]) == "Space:\n\nclick(box)\n\nIn German: Press next until none is left.\n"


@pytest.mark.parametrize("content", [None, "x = (", "UITARS_USR_PROMPT_THOUGHT = 5"])
def test_a_folder_without_the_prompt_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "mm_agents").mkdir()
        (tmp_path / "mm_agents/uitars15_v1.py").write_text(content)
    with pytest.raises(ConfigError, match=r"uitars15_v1\.py"):
        ui_tars("osworld", checkout=tmp_path)
    with pytest.raises(ConfigError, match="is not carried here"):
        ui_tars("osworld")


def sent(agent: AgentFormat) -> list[Any]:
    """The messages of the first turn, as they arrive at the server."""
    _, _, asked = played(["Action: finished()"], agent=agent)
    messages: list[Any] = asked[0]["messages"]
    return messages


# -- episodes ----------------------------------------------------------------------------------------------------------


class Recorded(CountingWorld):
    """Keeps the actions that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Action] = []

    async def step(self, action: Action) -> StepResult:
        self.asked.append(action)
        return StepResult(Observation() if isinstance(action, CallUser | Finished) else self.seen())


def played(
    answers: list[str], *, agent: AgentFormat = AGENT, store: RunStore | None = None, **options: Any
) -> tuple[Trajectory, Recorded, list[dict[str, Any]]]:
    left = iter(answers)
    world = Recorded()

    async def play() -> Trajectory:
        async with server.client() as client:
            images = None if store is None else store.images
            return await run_episode(client, world, tasks(1)[0], agent=agent, images=images, **options)

    with acting(lambda _: next(left)) as server:
        found = asyncio.run(play())
    return found, world, [body for body in server.requests if any(map(text_of, body["messages"]))]


def test_an_answer_that_is_no_action_is_sampled_again_at_temperature_1_and_leaves_no_trace_in_the_history(
    tmp_path: Path,
) -> None:
    answers = ["What?", "Action: tap(", "Action: click(start_box='(28,28)')", "Action: finished()"]
    with RunStore.create(tmp_path / "run") as store:
        found, world, asked = played(answers, store=store)
        store.append(found)
        assert store.load(store.entries()[0]) == found
    assert [body["temperature"] for body in asked] == [0.0, 1.0, 1.0, 0.0]
    assert asked[0]["messages"] == asked[1]["messages"] == asked[2]["messages"]
    assert len(found.steps) == 2
    assert [one.response for one in found.steps[0].rejected] == answers[:2]
    assert all(one.response_token_ids and one.response_logprobs and one.parse_error for one in found.steps[0].rejected)
    assert found.steps[0].parse_error is None
    assert len(world.asked) == 2
    assert not any(answer in json.dumps(asked[3]) for answer in answers[:2])


def test_after_three_answers_that_are_none_the_episode_is_evaluated() -> None:
    found, world, asked = played(["a", "b", "c"])
    assert len(asked) == 3
    assert (found.stop_reason, found.failure, found.reward) == (StopReason.PARSE_ERROR, None, 0.0)
    assert [one.response for one in found.steps[0].rejected] == ["a", "b"]
    assert found.steps[0].response == "c"
    assert world.asked == []


def test_sampling_again_ends_with_the_tokens_of_an_episode() -> None:
    agent = ui_tars(on_parse_error=ParseErrorPolicy(resample=9))
    found, _, asked = played(["x" * 10] * 9, agent=agent, limits=Limits(max_episode_tokens=25))
    assert len(asked) == 3
    assert [body["max_tokens"] for body in asked] == [25, 15, 5]
    assert found.stop_reason is StopReason.PARSE_ERROR


def test_call_user_is_waiting_three_times_and_then_the_end() -> None:
    found, world, _ = played(["Action: call_user()"] * 4)
    assert world.asked == [Wait(), Wait(), Wait(), CallUser()]
    assert found.stop_reason is StopReason.CALL_USER
    assert all(step.actions == (CallUser(),) for step in found.steps)


@pytest.mark.parametrize(
    ("last", "asked", "reason"),
    [
        ("click(start_box='(28,28)')", CallUser(), StopReason.MAX_STEPS),
        ("wait()", Wait(), StopReason.MAX_STEPS),
        ("finished()", Finished(), StopReason.FINISHED),
    ],
)
def test_the_last_turn_gives_up_unless_it_is_the_end_or_waits(last: str, asked: Action, reason: StopReason) -> None:
    found, world, _ = played(["Action: wait()", f"Action: {last}"], limits=Limits(max_steps=2))
    assert world.asked == [Wait(), asked]
    assert found.stop_reason is reason
    assert found.steps[1].executed == (0 if isinstance(asked, CallUser) else 1)


def test_points_in_the_history_have_box_tokens() -> None:
    _, _, asked = played(["Thought: a\nAction: click(start_box='(28,28)') ", "Action: finished()"])
    former = next(message for message in asked[1]["messages"] if message["role"] == "assistant")
    assert text_of(former) == "Thought: a\nAction: click(start_box='<|box_start|>(28,28)<|box_end|>')"


def test_what_the_caller_leaves_open_is_sampled_as_there() -> None:
    _, _, asked = played(["Action: finished()"])
    names = ("temperature", "top_p", "frequency_penalty", "max_tokens")
    assert [asked[0][name] for name in names] == [0.0, 0.9, 1.0, 1000]
    _, _, asked = played(["Action: finished()"], sampling_params={"temperature": 0.7, "max_tokens": 50})
    assert [asked[0][name] for name in names] == [0.7, 0.9, 1.0, 50]
