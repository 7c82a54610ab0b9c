"""Calls that go to the engines of all replicas: all or nothing, with real servers that misbehave and die."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from demo_checkpoints import copy_of_demo, with_rows_swapped
from processes import HANG_S
from replica_lives import Replica, Replicas, generate, replicas, until

from managed_vllm.engine_state import EngineState

Scenario = Callable[[Replicas], Awaitable[None]]


def checkpoint(folder: Path, **acts: Any) -> Path:
    """A checkpoint that is good to look at; `acts` is how stand-ins behave when they load it."""
    copy_of_demo(folder)
    with_rows_swapped(folder, 1, 2 + len(folder.name))
    (folder / "standin.json").write_text(json.dumps({"name": folder.name, **acts}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What the replicas are started with."""
    return copy_of_demo(tmp_path / "model")


def loads(replica: Replica, folder: Path) -> bool:
    """Whether it has begun to load that checkpoint."""
    return str(folder) in replica.asked()


def play(model: Path, scenario: Scenario, *controls: Any) -> None:
    async def run() -> None:
        async with replicas(model, *controls) as found:
            await scenario(found)

    asyncio.run(run())


# -- all at once -------------------------------------------------------------------------------------------------------


def test_all_have_the_new_weights_when_the_call_returns(model: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "step-1")

    async def scenario(found: Replicas) -> None:
        updated = await found.call("update_weights", path=str(good))
        assert updated == await found.call("weights")
        assert updated["version"] == "step-1"
        assert await found.versions() == ["step-1", "step-1"]
        assert found.engine.state.weight_version == "step-1"
        assert found.engine.to_record()["engine"] == found.all[1].engine.lasting.to_dict()
        # A successor never found that some replica serves what the record does not know.
        assert {recorded for versions, recorded in found.seen if "step-1" in versions} == {"step-1"}

    play(model, scenario)


@pytest.mark.parametrize(
    ("acts", "said"),
    [
        ({"broken": ["model.norm.weight"]}, "replica 1: model.norm.weight is not finite"),
        ({"poisons": True}, "replica 1: vLLM can't load it"),
        ({"salted": True}, "the replicas would differ"),
    ],
)
@pytest.mark.parametrize("rolling", [False, True])
def test_weights_that_one_can_not_have_none_has(
    model: Path, tmp_path: Path, acts: dict[str, Any], said: str, rolling: bool
) -> None:
    first = checkpoint(tmp_path / "step-1")
    bad = checkpoint(tmp_path / "step-2", only="1", **acts)

    async def scenario(found: Replicas) -> None:
        before = await found.call("update_weights", path=str(first))
        reply = await found.reply("update_weights", path=str(bad), rolling=rolling)
        assert not reply["ok"]
        assert (said if not (rolling and "salted" in acts) else "differ in their checksum") in json.dumps(
            reply, ensure_ascii=False
        )
        assert await found.versions() == ["step-1", "step-1"]
        assert await found.call("weights") == before
        assert found.engine.state == found.all[0].engine.state == found.all[1].engine.state
        if not rolling:
            assert all("step-2" not in versions for versions, _ in found.seen)
        assert [one.starts for one in found.all] == [1, 2 if "poisons" in acts else 1]

    play(model, scenario)


@pytest.mark.parametrize("rolling", [False, True])
def test_a_server_that_is_killed_while_it_loads_leaves_all_with_the_weights_from_before(
    model: Path, tmp_path: Path, rolling: bool
) -> None:
    slow = checkpoint(tmp_path / "step-1", only="1", hangs=True)

    async def scenario(found: Replicas) -> None:
        updating = asyncio.create_task(found.reply("update_weights", path=str(slow), rolling=rolling))
        await until(lambda: loads(found.all[1], slow), "replica 1 loads")
        found.all[1].kill()
        reply = await updating
        assert "replica 1" in reply["error"]
        await found.all[1].engine.turn.until_serving()
        assert await found.versions() == ["default", "default"]
        assert [one.engine.state for one in found.all] == [EngineState(), EngineState()]
        assert await found.call("is_paused") == {"is_paused": False}

    play(model, scenario)


def test_a_server_that_is_killed_when_it_has_them_comes_back_with_the_rest(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "managed_vllm.supervisor")
    go = tmp_path / "go"
    slow = checkpoint(tmp_path / "step-1", only="1", waits_for=str(go))

    async def scenario(found: Replicas) -> None:
        updating = asyncio.create_task(found.call("update_weights", path=str(slow)))
        await until(lambda: "weights loaded" in caplog.text, "replica 0 has them")
        found.all[0].kill()
        await until(lambda: found.all[0].starts == 2, "it is started again")
        assert found.engine.to_record()["engine"]["weights"] is None
        go.touch()
        assert (await updating)["version"] == "step-1"
        await found.all[0].engine.turn.until_serving()
        assert await found.versions() == ["step-1", "step-1"]
        assert [one.starts for one in found.all] == [2, 1]

    play(model, scenario)


def test_what_a_killed_supervisor_leaves_is_one_state(model: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    slow = checkpoint(tmp_path / "step-1", only="1", waits_for=str(go))

    async def scenario() -> None:
        async with replicas(model) as found:
            updating = asyncio.create_task(found.reply("update_weights", path=str(slow)))
            await until(lambda: "/update_weight_version" in found.all[0].asked(), "replica 0 has them, 1 does not")
            record = {"state": "ready", **found.engine.to_record()}
            go.touch()
            await updating
        async with replicas(model, record=json.loads(json.dumps(record))) as successor:
            assert await successor.versions() == ["default", "default"]

    asyncio.run(scenario())


# -- one by one --------------------------------------------------------------------------------------------------------


def test_a_rolling_update_has_one_that_answers_at_every_moment(model: Path, tmp_path: Path) -> None:
    slow = checkpoint(tmp_path / "step-1", waits_for=str(tmp_path / "go-{name}"))

    async def scenario(found: Replicas) -> None:
        found.watch_serving()
        updating = asyncio.create_task(found.call("update_weights", path=str(slow), rolling=True))
        for number, other, version in ((0, 1, "default"), (1, 0, "step-1")):
            updated = found.all[number]
            await until(functools.partial(loads, updated, slow), f"replica {number} loads")
            assert updated.engine.state.updating == "wait"
            assert found.engine.state.serves
            answer = await generate(found.all[other])
            assert answer["weight_versions"][0]["version"] == version
            (tmp_path / f"go-{number}").touch()
        await updating
        assert await found.versions() == ["step-1", "step-1"]
        assert found.least_serving == 1
        assert found.engine.to_record()["engine"]["weight_version"] == "step-1"

    play(model, scenario)


def test_a_rolling_update_waits_for_a_server_that_is_not_there(model: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "step-1")

    async def scenario(found: Replicas) -> None:
        found.all[1].kill(for_good=True)
        await found.all[1].has_failed.wait()
        found.watch_serving()
        updating = asyncio.create_task(found.call("update_weights", path=str(good), rolling=True))
        await asyncio.sleep(0)
        found.all[1].begin_again()
        await updating
        assert found.least_serving == 1
        assert await found.versions() == ["step-1", "step-1"]

    play(model, scenario)


# -- other calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "route"),
    [
        (("pause", {"mode": "keep"}), "/pause"),
        (("pause", {"mode": "keep", "held": True}), "/pause"),
        (("sleep", {"level": 1}), "/sleep"),
        (("sleep", {"level": 2}), "/sleep"),
        (("load_lora", {"name": "a"}), "/v1/load_lora_adapter"),
    ],
)
def test_what_one_refuses_is_undone_on_the_others(
    model: Path, tmp_path: Path, call: tuple[str, dict[str, Any]], route: str
) -> None:
    name, arguments = call

    async def scenario(found: Replicas) -> None:
        reply = await found.reply(name, path=str(tmp_path), **arguments)
        assert reply["error"] == f"replica 1: {route}: HTTP 500: {route} is refused"
        await found.all[0].engine.turn.until_serving()
        assert await found.versions() == ["default", "default"]
        assert found.engine.state == found.all[0].engine.state == EngineState()
        assert (await found.call("loras")) == {"loras": {}}
        assert found.all[0].starts == (2 if arguments.get("level") == 2 else 1)

    play(model, scenario, {}, {"refuses": [route]})


def test_an_adapter_that_one_does_not_unload_stays_on_all(model: Path, tmp_path: Path) -> None:
    async def scenario(found: Replicas) -> None:
        await found.call("load_lora", name="a", path=str(tmp_path))
        assert not (await found.reply("unload_lora", name="a"))["ok"]
        assert await found.call("loras") == {"loras": {"a": str(tmp_path)}}
        assert dict(found.engine.state.loras) == {"a": str(tmp_path)}

    play(model, scenario, {}, {"refuses": ["/v1/unload_lora_adapter"]})


def test_a_pause_is_of_all_and_its_end_too(model: Path) -> None:
    async def scenario(found: Replicas) -> None:
        await found.call("pause", mode="keep")
        assert [one.engine.state.paused for one in found.all] == ["keep", "keep"]
        assert found.engine.to_record()["engine"]["paused"] == "keep"
        found.all[1].kill()
        await until(lambda: found.all[1].starts == 2, "it is started again")
        assert await found.call("is_paused") == {"is_paused": True}  # waits for it
        await found.call("resume")
        assert await found.versions() == ["default", "default"]
        assert found.engine.to_record()["engine"]["paused"] is None

    play(model, scenario)


def test_a_hold_ends_with_its_user_on_every_replica(model: Path) -> None:
    async def scenario(found: Replicas) -> None:
        await found.call("pause", user="one", mode="keep", held=True)
        await found.call("pause", user="other", mode="keep", held=True)
        assert found.engine.state.paused == "keep"
        assert found.engine.to_record()["engine"]["paused"] is None  # holds are of this supervisor only
        found.engine.user_gone("one")
        assert await found.call("is_paused") == {"is_paused": True}
        found.engine.user_gone("other")
        await until(lambda: found.engine.state.serves, "both go on")
        assert await found.versions() == ["default", "default"]

    play(model, scenario)


def test_two_users_at_once_get_one_after_the_other(model: Path, tmp_path: Path) -> None:
    ones = [checkpoint(tmp_path / f"step-{number}") for number in (1, 22, 333)]

    async def scenario(found: Replicas) -> None:
        calls = [found.call("update_weights", user=one.name, path=str(one)) for one in ones]
        replies = await asyncio.gather(*calls, *[found.call("pause", user=f"p{n}", held=True) for n in range(3)])
        assert [one["version"] for one in replies[:3]] == [one.name for one in ones]
        assert len(set(found.seen[-1][0])) == 1
        for n in range(3):
            found.engine.user_gone(f"p{n}")
        versions = await found.versions()
        assert versions[0] == versions[1] == found.engine.state.weight_version

    play(model, scenario)


def test_a_call_that_waits_for_a_replica_in_vain_has_done_nothing(model: Path) -> None:
    async def scenario(found: Replicas) -> None:
        found.all[1].kill(for_good=True)  # and nobody says that it has failed
        await found.all[1].has_failed.wait()
        reply = await found.reply("pause", mode="keep", budget_s=0.5)
        assert (reply["kind"], found.all[0].engine.state.paused) == ("EngineTimeoutError", None)
        assert "/pause" not in found.all[0].asked()

    play(model, scenario)


def test_one_that_has_failed_for_good_is_left_out_also_by_who_waits_for_it(model: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "step-1")

    async def scenario(found: Replicas) -> None:
        found.all[1].kill(for_good=True)
        await found.all[1].has_failed.wait()
        waiting = [
            asyncio.create_task(found.call("pause", mode="keep")),
            asyncio.create_task(found.call("update_weights", path=str(good), on_update="continue", rolling=True)),
        ]
        await asyncio.sleep(0)
        found.engine.leave_out(1)
        assert (await waiting[1])["version"] == "step-1"
        assert found.engine.state == EngineState(
            paused="keep", **{**found.all[0].engine.state.weight_fields, "weight_version": "step-1"}
        )
        found.engine.leave_out(0)
        assert "no replica is left" in (await found.reply("resume"))["error"]

    play(model, scenario)


def test_one_that_comes_back_has_what_was_agreed_meanwhile_and_is_held(model: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "step-1")

    async def scenario(found: Replicas) -> None:
        found.all[1].kill(for_good=True)
        await found.all[1].has_failed.wait()
        found.engine.leave_out(1)
        await found.call("update_weights", path=str(good))
        await found.call("pause", mode="keep", held=True)
        found.engine.take_in(1)
        found.all[1].begin_again()
        assert await found.call("is_paused") == {"is_paused": True}
        assert found.all[1].engine.state == found.all[0].engine.state
        found.engine.user_gone("user")
        assert await found.versions() == ["step-1", "step-1"]
        assert found.all[1].starts == 2

    play(model, scenario)


# -- a trainer's -------------------------------------------------------------------------------------------------------


def test_weights_of_a_trainer_go_to_all(model: Path) -> None:
    async def scenario(found: Replicas) -> None:
        await found.call("start_weight_update", user="trainer")
        other = asyncio.create_task(found.call("weights"))
        await found.call("receive_weights", user="trainer", update_info={"path": "/dev/null"})
        assert not other.done()  # the engines are the trainer's
        done = await found.call("finish_weight_update", user="trainer", version="v7")
        assert await other == done
        assert await found.versions() == ["v7", "v7"]
        reply = await found.reply("update_weights", path=str(model), rolling=True)
        assert reply["kind"] == "EngineUnsupportedError"
        reply = await found.reply("init_weight_transfer_engine", user="trainer", init_info={})
        assert (reply["kind"], "replicas=1" in reply["error"]) == ("EngineUnsupportedError", True)

    play(model, scenario)


@pytest.mark.parametrize("ends", ["gone", "killed"])
def test_a_trainer_that_does_not_finish_leaves_all_as_they_were(model: Path, ends: str) -> None:
    async def scenario(found: Replicas) -> None:
        await found.call("start_weight_update", user="trainer")
        if ends == "gone":
            await found.call("receive_weights", user="trainer", update_info={"path": "/dev/null"})
            found.engine.user_gone("trainer")
        else:
            found.all[1].kill()
            await until(lambda: found.all[1].starts == 2, "it is started again")
            reply = await found.reply("receive_weights", user="trainer", update_info={"path": "/dev/null"})
            assert "replica 1" in reply["error"]
        assert (await found.call("weights"))["path"] is None
        assert await found.versions() == ["default", "default"]

    play(model, scenario)


def test_the_answers_of_all_are_one(model: Path) -> None:
    async def scenario(found: Replicas) -> None:
        assert await found.call("reset_prefix_cache") == {"success": True}
        assert await found.call("reset_mm_cache") == {}
        assert await found.call("is_sleeping") == {"is_sleeping": False}
        unknown = await found.reply("fly", budget_s=HANG_S)
        assert unknown["error"] == "this supervisor knows no call 'fly'"  # by no number: it is the same for all
        generate_on_one = await found.all[0].engine.answer("user", {"call": "sleep", "budget_s": HANG_S})
        assert generate_on_one["ok"]
        assert await found.call("is_sleeping") == {"is_sleeping": False}  # not all of them
        assert found.engine.state.sleep_level is None

    play(model, scenario)
