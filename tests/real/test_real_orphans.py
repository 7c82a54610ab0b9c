"""Orphans, on the real vLLM: who is killed by SIGKILL leaves nothing alive behind, though nobody comes to clean up.

Each case is a moment in the server's life and who is killed in it. Whoever could clean up and is not killed is stopped
(SIGSTOP) until the verdict: the supervisor when only the API server is killed, the users when the supervisor is killed
too. Afterwards they go on, or `managed-vllm down --all` comes, and what they find and leave is looked at as well.

A few cases that cover every victim and an early, a middle and a late moment run always; the whole table is `soak`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from processes import HANG_S, assert_nothing_left, eventually, is_live, tree_below

from managed_vllm.instance import cleanup, directory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

VERDICT_S = HANG_S
"""After this long nothing may be alive."""

NEXT_S = 40.0
"""A user whose supervisor dies before it has been reached finds out after 45 s (`instance.spawn`)."""

USER = """
import sys
from managed_vllm import ManagedVLLM, RestartPolicy
with ManagedVLLM("demo", keep_alive=0, restart=RestartPolicy(max_restarts=0)) as llm:
    print("ready", flush=True)
    for _ in sys.stdin:
        print(len(llm.generate("Screen:", {"max_tokens": 2, "ignore_eos": True})[0].outputs[0].token_ids), flush=True)
"""


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


@dataclass
class Scene:
    """Two users and the server that they start."""

    home: Path
    users: list[subprocess.Popen[str]]
    supervisor: int = 0
    server: dict[str, int] = field(default_factory=dict)
    """Pids of the API server, EngineCore and Worker as far as they were seen."""
    known: set[psutil.Process] = field(default_factory=set)

    @property
    def instance(self) -> directory.Instance:
        (instance,) = directory.instances(self.home)
        return instance


@pytest.fixture
def scene(home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Starts the users; at the end of the test everything of them is ended."""
    if "moment" in request.fixturenames and request.getfixturevalue("moment") is Moment.INSPECTING:
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(home.parent / "cache"))  # else vLLM has met the model before
    command = [sys.executable, "-c", USER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    users: list[subprocess.Popen[str]] = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    scene = Scene(home, users)
    try:
        yield scene
    finally:
        for user in users:
            user.kill()
            user.communicate()
        with contextlib.suppress(ProcessLookupError):
            if scene.supervisor:
                os.kill(scene.supervisor, signal.SIGCONT)


# -- moments -----------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Children of a process's main thread; one small file, so that it can be watched closely."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def child_of(pid: int, word: bytes = b"--multiprocessing-fork") -> int | None:
    """The child with this in its command line; by default the one that multiprocessing has spawned."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


def watch(condition: Callable[[], int | bool | None], what: str, *, timeout_s: float = 240.0) -> int:
    """As `eventually`, but looks every half millisecond: a child needs some 30 ms until it has asked for its signal."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.0005)
    return int(value)


def wait_for(moment: Moment, scene: Scene) -> None:
    """Returns as soon as the server is where it shall be."""

    def supervisor() -> int | None:
        records = [instance.read_record() for instance in directory.instances(scene.home)]
        return next((record["pid"] for record in records if record), None)

    scene.supervisor = watch(supervisor, "the supervisor wrote its record")
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
    """Kills in the same instant; returns the moment.

    First SIGSTOP for each, then SIGKILL for each, with nothing in between: a stopped process dies of SIGKILL at once,
    and none of them can run an instruction, say as a reaction, after another one's death. Without the stop the one who
    is killed first is dead some microseconds before its watcher is.
    """
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
    for pid in (*bystanders, *pids):
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def alive(scene: Scene) -> set[psutil.Process]:
    """Everything of the server that lives: by our marker in its environment, or because it was seen before the kill."""
    found = {process for process in scene.known if is_live(process)}
    for instance in directory.instances(scene.home):
        found.update(process for process in cleanup.marked_processes(instance) if is_live(process))
    return found


def survivors(scene: Scene, killed_at: float) -> tuple[float, list[str]]:
    """Waits until nothing is alive, for at most `VERDICT_S`; returns the seconds that it took, and who still is."""
    while True:
        # What was marked right after the kill stays known, should it lose its marker.
        scene.known |= (now := alive(scene))
        passed = time.monotonic() - killed_at
        if not now or passed > VERDICT_S:
            return passed, [f"{process.pid} {' '.join(process.cmdline())[-80:]}" for process in now if is_live(process)]
        time.sleep(0.01)


def leaked(before: set[str]) -> str:
    """Shared memory that is there and was not: said, not judged."""
    return " ".join(sorted(set(os.listdir("/dev/shm")) - before)) or "-"


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
    (Victims.EVERYONE, Moment.LOADING),
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


def test_after_everybody_was_killed_the_next_user_finds_no_strays_and_is_served(scene: Scene) -> None:
    _, left = put_to_the_test(Moment.SERVING, Victims.EVERYONE, scene)
    assert left == []
    old = scene.instance.read_record()
    assert old is not None
    assert Path(old["scratch"]).is_dir()
    done = subprocess.run([sys.executable, "-c", USER], input="\n", capture_output=True, text=True)
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
