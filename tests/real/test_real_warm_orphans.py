"""Orphans of a server that is forked from a warm image, on the real vLLM: as `test_real_orphans.py`, moment by moment.

Nobody comes to clean up: the supervisor is stopped (SIGSTOP) or killed, the users are stopped or killed as well.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import orphans
import psutil
import pytest
from orphans import Scene, children, find_supervisor, kill_at_once, survivors, two_users, watch
from processes import assert_nothing_left, eventually, is_live, tree_below

from managed_vllm.instance import cleanup, directory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


class Moment(enum.StrEnum):
    """When the kill falls, found by what can be seen of the processes, never by a time."""

    LAUNCHED = "image launched"
    """The image's process exists; its interpreter has hardly begun."""
    IMPORTING = "image importing"
    """The image has mapped torch's library."""
    FORKING = "forking"
    """The image has a child: the one that forks the server, and ends. One that ended unseen has left the server."""
    FORKED = "forked"
    """The supervisor has a second child: the server, which has hardly begun."""
    ENGINE_FORKED = "engine forked"
    WORKER_FORKED = "worker forked"
    LOADING = "loading"
    """The log says that the model is being loaded."""
    SERVING = "serving"
    """Every user was told that the server is ready."""


class Victims(enum.StrEnum):
    """Who is killed in the same instant."""

    SUPERVISOR = "supervisor"
    SUPERVISOR_AND_IMAGE = "supervisor and image"
    SUPERVISOR_AND_SERVER = "supervisor and API server"
    EVERYONE = "users, supervisor, image and API server"


@pytest.fixture
def scene(home: Path) -> Iterator[Scene]:
    """Two users, whose server is forked."""
    with two_users(home, "warm") as scene:
        yield scene


def is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return True


def next_child(pid: int) -> int | None:
    """The child that multiprocessing has forked."""
    found = next((child for child in children(pid) if not is_tracker(child)), None)
    if found is not None:
        time.sleep(0.005)  # until it executes its own program, the tracker looks like its parent
        return None if is_tracker(found) else found
    return None


def wait_for(moment: Moment, scene: Scene) -> None:
    """Returns as soon as the processes are where they shall be."""
    scene.supervisor = find_supervisor(scene)
    server = scene.server
    server["Image"] = watch(lambda: next(iter(children(scene.supervisor)), None), "the image appeared")
    order = list(Moment)

    def has_come(other: Moment) -> bool:
        return order.index(moment) >= order.index(other)

    if has_come(Moment.IMPORTING):
        maps = Path(f"/proc/{server['Image']}/maps")
        watch(lambda: "libtorch" in maps.read_text(), "torch was mapped")

    def forked() -> int | None:
        return next((pid for pid in children(scene.supervisor) if pid != server["Image"]), None)

    if moment is Moment.FORKING:
        watch(lambda: next(iter(children(server["Image"])), None) or forked(), "the image forks")
    if has_come(Moment.FORKED):
        server["APIServer"] = watch(forked, "the server appeared")
    if has_come(Moment.ENGINE_FORKED):
        server["EngineCore"] = watch(lambda: next_child(server["APIServer"]), "EngineCore appeared")
    if has_come(Moment.WORKER_FORKED):

        def worker() -> int | None:
            # Asked anew: on a busy machine a tracker is taken for EngineCore until it executes its own program.
            server["EngineCore"] = next_child(server["APIServer"]) or server["EngineCore"]
            return next_child(server["EngineCore"])

        server["Worker"] = watch(worker, "the Worker appeared")
    if has_come(Moment.LOADING):
        log = scene.instance.server_log
        eventually(lambda: "Starting to load model" in directory.tail(log, 1000), "loading", 240)
        scene.known |= tree_below(server["APIServer"])
    if has_come(Moment.SERVING):
        assert [user.stdout.readline() for user in scene.users if user.stdout] == ["ready\n"] * len(scene.users)


def kill(victims: Victims, scene: Scene) -> float:
    """Kills in the same instant; returns the moment."""
    users = [user.pid for user in scene.users]
    pids, bystanders = [scene.supervisor], users
    if victims in (Victims.SUPERVISOR_AND_IMAGE, Victims.EVERYONE):
        pids.append(scene.server["Image"])
    if victims in (Victims.SUPERVISOR_AND_SERVER, Victims.EVERYONE) and "APIServer" in scene.server:
        pids.append(scene.server["APIServer"])
    if victims is Victims.EVERYONE:
        pids, bystanders = users + pids, []
    return kill_at_once(pids, bystanders)


ALWAYS = {
    (Victims.SUPERVISOR, Moment.FORKING),
    (Victims.SUPERVISOR, Moment.SERVING),
    (Victims.SUPERVISOR_AND_IMAGE, Moment.FORKED),
    (Victims.EVERYONE, Moment.IMPORTING),
}
CASES = [(victims, moment) for victims in Victims for moment in Moment]


@pytest.mark.parametrize(
    ("victims", "moment"),
    [pytest.param(*case, id="-".join(case), marks=() if case in ALWAYS else pytest.mark.soak) for case in CASES],
)
def test_nothing_outlives_a_kill(victims: Victims, moment: Moment, scene: Scene) -> None:
    wait_for(moment, scene)
    took, left = survivors(scene, kill(victims, scene))
    print(f"orphans of an image | {victims} | {moment} | {len(left)} {left} | gone after {took:.2f} s")
    assert left == []
    for user in scene.users:
        user.kill()
    cleanup.remove_instance(scene.instance)


def test_after_everybody_was_killed_the_next_user_finds_no_strays_and_is_served(scene: Scene) -> None:
    wait_for(Moment.SERVING, scene)
    _, left = survivors(scene, kill(Victims.EVERYONE, scene))
    assert left == []
    old = scene.instance.read_record()
    assert old is not None
    assert Path(old["scratch"]).is_dir()
    done = subprocess.run(orphans.user("warm"), input="\n", capture_output=True, text=True)
    assert done.stdout.split() == ["ready", "2"], done.stderr
    assert_nothing_left(scene.home)
    assert not Path(old["scratch"]).exists()


def served_by(scene: Scene) -> list[int]:
    """The supervisor's children: the image, and the server."""
    return [child for child in children(scene.supervisor) if not is_tracker(child)]


def marked(scene: Scene) -> set[int]:
    return {process.pid for process in cleanup.marked_processes(scene.instance)}


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=() if moment is Moment.FORKING else pytest.mark.soak) for moment in Moment]
)
def test_the_end_of_the_image_costs_a_start_at_most(moment: Moment, scene: Scene) -> None:
    """Killed alone, at any moment: the users are served, by one server, and there is an image again."""
    wait_for(moment, scene)
    image = psutil.Process(scene.server["Image"])
    image.kill()
    if moment is not Moment.SERVING:
        assert [user.stdout.readline() for user in scene.users if user.stdout] == ["ready\n"] * len(scene.users)
    for user in scene.users:
        assert user.stdin is not None
        assert user.stdout is not None
        print(file=user.stdin, flush=True)
        assert user.stdout.readline() == "2\n"
    assert not is_live(image)
    eventually(lambda: len(served_by(scene)) == 2, "the next image, and one server")
    eventually(lambda: marked(scene) == {p.pid for pid in served_by(scene) for p in tree_below(pid)}, "nothing else")
    for user in scene.users:
        user.kill()
    assert_nothing_left(scene.home)


def test_a_server_is_killed_with_a_stopped_supervisor_and_its_image_stays(scene: Scene) -> None:
    wait_for(Moment.SERVING, scene)
    image = psutil.Process(scene.server["Image"])
    server = tree_below(scene.server["APIServer"])
    kill_at_once([scene.server["APIServer"]], [scene.supervisor])
    eventually(lambda: not any(is_live(process) for process in server), "the whole server has fallen")
    assert is_live(image)
    os.kill(scene.supervisor, signal.SIGCONT)
    for user in scene.users:
        user.kill()
    assert_nothing_left(scene.home)
