"""Orphans, on the real vLLM: who is killed by SIGKILL leaves nothing alive behind, though nobody comes to clean up.

Each case is a moment in the server's life and who is killed in it. Whoever could clean up and is not killed is stopped
(SIGSTOP) until the verdict: the supervisor when only the API server is killed, the users when the supervisor is killed
too. Afterwards they go on, or `managed-vllm down --all` comes, and what they find and leave is looked at as well.

A few cases that cover every victim and an early, a middle and a late moment run always; the whole table is `soak`.
"""

from __future__ import annotations

import enum
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from orphans import (
    VERDICT_S,
    Scene,
    child_of,
    children,
    find_supervisor,
    kill_at_once,
    leaked,
    survivors,
    two_users,
    user,
    watch,
)
from processes import HANG_S, assert_nothing_left, eventually, tree_below

from managed_vllm.instance import directory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

NEXT_S = 45.0 + HANG_S
"""A user whose supervisor dies before it has been reached finds out after 45 s (`instance.spawn`)."""


class Moment(enum.StrEnum):
    """When the kill falls, found by what can be seen of the server, never by a time."""

    LAUNCHED = "launched"
    """The API server's process exists; its interpreter has hardly begun."""
    IMPORTING = "importing"
    """The API server has mapped torch's library and has no child yet."""
    INSPECTING = "inspecting"
    """An interpreter of the API server's looks at the class of a model that vLLM has not met before (vLLM 0.32:
    `model_executor/models/directory.py`, `_run_in_subprocess`), which takes it some ten seconds of imports."""
    ENGINE_SPAWNED = "engine spawned"
    """EngineCore's process exists; its interpreter has hardly begun."""
    WORKER_SPAWNED = "worker spawned"
    """The Worker's process exists; its interpreter has hardly begun."""
    LOADING = "loading"
    """The log says that the model is being loaded: weights, KV cache and warm-up take about a second from here."""
    SERVING = "serving"
    """Every user was told that the server is ready."""


class Victims(enum.StrEnum):
    """Who is killed in the same instant."""

    API_SERVER = "API server"
    """The supervisor is stopped before, so that it can't clean up."""
    API_SERVER_SUPERVISED = "API server, supervisor running"
    SUPERVISOR_TOO = "supervisor and API server"
    """The users are stopped before, so that none of them starts the next server, which would clean up."""
    EVERYONE = "users, supervisor and API server"


@pytest.fixture
def scene(home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Two users, whose server is spawned."""
    if "moment" in request.fixturenames and request.getfixturevalue("moment") is Moment.INSPECTING:
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(home.parent / "cache"))  # else vLLM has met the model before
    with two_users(home, "plain") as scene:
        yield scene


# -- moments -----------------------------------------------------------------------------------------------------------


def wait_for(moment: Moment, scene: Scene) -> None:
    """Returns as soon as the server is where it shall be."""

    scene.supervisor = find_supervisor(scene)
    server = scene.server
    server["APIServer"] = watch(lambda: next(iter(children(scene.supervisor)), None), "the API server appeared")
    match moment:
        case Moment.LAUNCHED:
            pass
        case Moment.IMPORTING:
            maps = Path(f"/proc/{server['APIServer']}/maps")
            watch(lambda: "libtorch" in maps.read_text(), "torch was mapped")
        case Moment.INSPECTING:
            watch(
                lambda: child_of(server["APIServer"], b"vllm.model_executor.models.registry"), "the model is looked at"
            )
        case Moment.ENGINE_SPAWNED | Moment.WORKER_SPAWNED:
            server["EngineCore"] = watch(lambda: child_of(server["APIServer"]), "EngineCore appeared")
            if moment is Moment.WORKER_SPAWNED:
                server["Worker"] = watch(lambda: child_of(server["EngineCore"]), "the Worker appeared")
        case Moment.LOADING:
            log = scene.instance.server_log
            eventually(lambda: "Starting to load model" in directory.tail(log, 1000), "loading", 240)
            scene.known |= tree_below(server["APIServer"])
        case Moment.SERVING:
            assert [user.stdout.readline() for user in scene.users if user.stdout] == ["ready\n"] * len(scene.users)
            scene.known |= tree_below(server["APIServer"])


# -- killing, and the verdict ------------------------------------------------------------------------------------------


def kill(victims: Victims, scene: Scene) -> float:
    """Kills in the same instant; returns the moment."""
    pids = [scene.server["APIServer"]]
    bystanders = []
    if victims is Victims.API_SERVER:
        bystanders = [scene.supervisor]
    elif victims in (Victims.SUPERVISOR_TOO, Victims.EVERYONE):
        pids.insert(0, scene.supervisor)
        users = [user.pid for user in scene.users]
        if victims is Victims.EVERYONE:
            pids = users + pids
        else:
            bystanders = users
    return kill_at_once(pids, bystanders)


def put_to_the_test(moment: Moment, victims: Victims, scene: Scene, delay_s: float = 0.0) -> tuple[float, list[str]]:
    """Waits for the moment, kills, and reports who was left and for how long; see `survivors`."""
    before = set(os.listdir("/dev/shm"))
    wait_for(moment, scene)
    if delay_s:
        time.sleep(delay_s)
    took, left = survivors(scene, kill(victims, scene))
    print(
        f"orphans | {victims} | {moment} | {delay_s * 1000:.0f} ms | alive at {VERDICT_S:g} s: {len(left)} {left} | "
        f"gone after {took:.2f} s | /dev/shm: {leaked(before)}"
    )
    return took, left


# -- what comes after --------------------------------------------------------------------------------------------------


def go_on(victims: Victims, moment: Moment, scene: Scene) -> None:
    """Lets the next one come: the supervisor, the users, or `managed-vllm down --all`; nothing may be left by it."""
    record = scene.instance.read_record() if directory.instances(scene.home) else None
    match victims:
        case Victims.API_SERVER:
            os.kill(scene.supervisor, signal.SIGCONT)
        case Victims.SUPERVISOR_TOO:
            for user in scene.users:
                user.send_signal(signal.SIGCONT)
                if moment is Moment.SERVING and user.stdin:
                    print(file=user.stdin, flush=True)  # a handle that is used finds out, and elects
            old = scene.supervisor
            scene.server.clear()
            eventually(
                lambda: (scene.instance.read_record() or {}).get("pid") not in (None, old), "a next supervisor", NEXT_S
            )
            wait_for(Moment.LAUNCHED, scene)
            assert "left by a predecessor" not in scene.instance.supervisor_log.read_text()
        case Victims.EVERYONE:
            done = subprocess.run([sys.executable, "-m", "managed_vllm.cli", "down", "--all"], capture_output=True)
            assert done.returncode == 0, done.stderr
            assert_nothing_left(scene.home, 0)
    for user in scene.users:
        user.kill()
    assert_nothing_left(scene.home)
    assert not (record and record["scratch"] and Path(record["scratch"]).exists())


ALWAYS = {
    (Victims.API_SERVER, Moment.ENGINE_SPAWNED),
    (Victims.SUPERVISOR_TOO, Moment.IMPORTING),
    (Victims.SUPERVISOR_TOO, Moment.WORKER_SPAWNED),
    (Victims.EVERYONE, Moment.LAUNCHED),
}
CASES = [
    *((victims, moment) for victims in Victims if victims is not Victims.API_SERVER_SUPERVISED for moment in Moment),
    (Victims.API_SERVER_SUPERVISED, Moment.ENGINE_SPAWNED),
]


@pytest.mark.parametrize(
    ("victims", "moment"),
    [pytest.param(*case, id="-".join(case), marks=() if case in ALWAYS else pytest.mark.soak) for case in CASES],
)
def test_nothing_outlives_a_kill(victims: Victims, moment: Moment, scene: Scene) -> None:
    _, left = put_to_the_test(moment, victims, scene)
    try:
        assert left == []
    finally:
        go_on(victims, moment, scene)


@pytest.mark.soak
def test_after_everybody_was_killed_the_next_user_finds_no_strays_and_is_served(scene: Scene) -> None:
    _, left = put_to_the_test(Moment.SERVING, Victims.EVERYONE, scene)
    assert left == []
    old = scene.instance.read_record()
    assert old is not None
    assert Path(old["scratch"]).is_dir()
    done = subprocess.run(user("plain"), input="\n", capture_output=True, text=True)
    assert done.stdout.split() == ["ready", "2"], done.stderr
    assert_nothing_left(scene.home)
    assert not Path(old["scratch"]).exists()


GAP_S = 0.1
"""A spawned interpreter has asked for its signal by then, on a machine that is busy with the rest of the start."""
KILLS = 12


@pytest.mark.soak
@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("moment", [Moment.ENGINE_SPAWNED, Moment.WORKER_SPAWNED], ids=str)
def test_nothing_outlives_a_kill_before_a_child_has_asked_for_its_signal(
    moment: Moment, number: int, scene: Scene
) -> None:
    """Kills spread over the time between the spawn of a child and its request to die with its parent."""
    _, left = put_to_the_test(moment, Victims.API_SERVER, scene, delay_s=GAP_S * number / KILLS)
    try:
        assert left == []
    finally:
        go_on(Victims.API_SERVER, moment, scene)
