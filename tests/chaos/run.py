"""The chaos driver: lets the plans of many seeds happen, checks the invariants, reports.

`python tests/chaos/run.py --runs 500 --seed 0 --jobs 2`, or `--real --runs 20`; `--runs 1 --seed N` replays a run.
The exit code is 1 if an invariant was broken. What must hold, in every run:

1. At most one server and one supervisor at a time (a killed chain has `_FALL_LOOKS` looks of ours to fall).
2. Every request of a client that was not killed is answered exactly once, with what its prompt requires, or fails with
   a typed error, before its deadline. No client hangs.
3. `instance.json` is readable or absent at any moment.
4. When all clients are gone, no process, socket, lock, folder or shared memory of theirs is left within `_END_S`. If a
   supervisor was killed and nobody came after it, its files may stay until `managed_vllm.cli down`, its processes not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TESTS), str(_TESTS / "helpers")]

import fake_vllm
import standin

from chaos import client, sightings
from chaos.plan import DISRUPTIVE, FAULTS, HANGS, Member, Plan, Strike, plan_for, real_plan_for, warm_plan_for
from chaos.report import Outcome, Recovery, summary

_FALL_LOOKS = 20
"""Three seconds, and more where the machine is so busy that the looks are late as well."""
_END_S = 60.0
_LOOK_S = 0.15
_TIMEOUT_S = 25.0
_forks = multiprocessing.get_context("forkserver")
"""Clients are forked from a process that has their modules imported: half a second of CPU each is saved."""

_forking = threading.Lock()
_REDIRECTING = ("VLLM_SERVER_URL", "VLLM_MODEL_NAME", "VLLM_API_KEY", "MANAGED_VLLM_ATTACH", "MANAGED_VLLM_KEEP_ALIVE")


@dataclass(frozen=True)
class Setting:
    """What distinguishes runs against the stand-in from those against vLLM."""

    model: str
    command: list[str] | None
    hang: dict[str, float]
    timeout_s: float
    startup_silence_s: float
    expected: dict[str, list[int]] | None = None
    env: dict[str, str] = field(default_factory=dict)
    warm: bool = False


STANDIN = Setting(
    "stand-in", standin.command(), {"stall_s": 1.0, "answer_s": 1.0, "stopped_s": 0.5}, _TIMEOUT_S, startup_silence_s=6
)


@dataclass
class _Member:
    """A client process of a run."""

    process: Any
    words: Connection
    record: Path
    errors: Path
    killed: bool = False

    def say(self, word: str) -> None:
        with contextlib.suppress(OSError):
            self.words.send(word)


@dataclass
class Run:
    """One run in a folder of its own, `mvc-…` in the temporary directory; kept if an invariant was broken.

    `home`: a state directory that outlives the run, in which a server is held by somebody else.
    """

    plan: Plan
    setting: Setting
    home: Path | None = None
    keep: bool = False
    broken: list[str] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = self.home is not None
        self.folder = Path(tempfile.mkdtemp(prefix="mvc-", dir="/tmp"))
        self.home = self.home or self.folder / "home"
        for name in ("faults", "logs", "t"):
            (self.folder / name).mkdir()
        self._members: list[_Member] = []
        self._of: dict[Member, _Member] = {}
        self._struck: list[tuple[float, str]] = []
        self._missed: list[str] = []
        self._killed_supervisors: set[int] = set()
        self._faults = 0
        self._folders_removed = 0
        self._over = threading.Event()
        self.began = 0.0

    def happen(self) -> Outcome:
        """The whole run."""
        started = time.monotonic()
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        self.began = time.monotonic()
        for member in self.plan.members:
            if member.arrives_s == 0:
                self._arrive(member)
        if not self.plan.from_start:
            self._wait_for_an_answer()
            self.began = time.monotonic()
        steps: list[tuple[float, Callable[[], None]]] = []
        steps += [(m.arrives_s, partial(self._arrive, m)) for m in self.plan.members if m.arrives_s > 0]
        steps += [(s.at_s, partial(self._strike, s)) for s in self.plan.strikes]
        steps += [(m.leaves_s, partial(self._leave, m)) for m in self.plan.members]
        for at_s, step in sorted(steps, key=lambda pair: pair[0]):
            time.sleep(max(0.0, self.began + at_s - time.monotonic()))
            step()
        self._wait_for_clients()
        if not self.shared:
            self._check_the_end()
        self._over.set()
        watcher.join()
        outcome = self._read_records()
        outcome.took_s = time.monotonic() - started
        if self.broken or self.keep:
            again = replay(self.plan.seed, self.shared, self.setting.warm)
            where = f"kept in {self.folder}\nagain: {again}\n{self.plan}"
            outcome.broken = [*self.broken, where] if self.broken else []
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        return outcome

    # -- clients -------------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _REDIRECTING}
        where = {"MANAGED_VLLM_HOME": str(self.home)}
        return {**kept, **where, **({} if self.shared else {"TMPDIR": str(self.folder / "t")})}

    def _arrive(self, member: Member) -> None:
        name = f"client-{len(self._members)}"
        record, errors = self.folder / f"{name}.jsonl", self.folder / f"{name}.stderr"
        orders = json.loads(json.dumps(self.plan.orders).replace("@/", f"{self.folder}/"))
        order: dict[str, Any] = {
            "environment": self.environment(),
            "model": self.setting.model,
            "command": self.setting.command,
            "env": {**self.setting.env, **(standin.orders(**orders) if orders else {})} or None,
            "warm": self.setting.warm,
            "keep_alive_s": self.plan.keep_alive_s,
            "hang": self.setting.hang,
            "timeout_s": self.setting.timeout_s,
            "startup_silence_s": self.setting.startup_silence_s,
            "threads": member.threads,
            "seed": member.seed,
            "record": str(record),
            "errors": str(errors),
        }
        if self.setting.expected is not None:
            order["expected"] = self.setting.expected
        words, far = multiprocessing.Pipe()
        with _forking:
            process = _forks.Process(target=client.live, args=(order, far), daemon=True)
            process.start()
        far.close()
        self._of[member] = _Member(process, words, record, errors)
        self._members.append(self._of[member])

    def _wait_for_an_answer(self) -> None:
        deadline = time.monotonic() + self.setting.timeout_s
        while time.monotonic() < deadline:
            if any(m.record.exists() and '"ok"' in m.record.read_text() for m in self._members):
                return
            time.sleep(0.02)

    def _wait_for_clients(self) -> None:
        deadline = self.began + self.plan.lasts_s + self.setting.timeout_s + _END_S
        for member in self._members:
            member.process.join(max(0.1, deadline - time.monotonic()))
            if member.process.is_alive():
                sightings.send([member.process.pid], signal.SIGUSR1)
                time.sleep(0.5)
                self.broken.append(f"the client pid {member.process.pid} does not end; its stacks: {member.errors}")
                member.killed = True
                member.process.kill()
                member.process.join()
            if member.process.exitcode != 0 and not member.killed:
                self.broken.append(f"a client ended with {member.process.exitcode}: {member.errors}")
            member.words.close()

    def _leave(self, member: Member) -> None:
        self._of[member].say("leave")

    # -- strikes -------------------------------------------------------------------------------------------------------

    def _strike(self, strike: Strike) -> None:
        assert self.home is not None
        kind = strike.kind
        if kind == "new-client":
            pass  # it is one of the plan's members
        elif kind in FAULTS or kind in HANGS:
            self._faults += 1
            (self.folder / "faults" / f"{self._faults}-{kind}").touch()
            return  # when a request meets it is seen by its new name
        elif kind in ("kill-client", "client-leaves", "restart"):
            alive = [m for m in self._members if not m.killed and m.process.is_alive()]
            if not alive:
                self._missed.append(kind)
                return
            member = alive[strike.victim % len(alive)]
            if kind == "kill-client":
                member.killed = True
                member.process.kill()
            else:
                member.say("leave" if kind == "client-leaves" else "restart")
        elif kind == "remove-folder":
            removed = sightings.remove_folders(self.home)
            self._folders_removed += removed
            if not removed:
                self._missed.append(kind)
                return
        elif kind == "batch-signals":
            sightings.send_all(self.home, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGCONT))
        else:
            pids = self._find(kind)
            if not pids:
                self._missed.append(kind)
                return
            if "supervisor" in kind:
                self._killed_supervisors.add(pids[0])
            sightings.send(pids, signal.SIGSTOP if kind.startswith("stop") else signal.SIGKILL)
        self._struck.append((time.monotonic(), kind))

    def _find(self, kind: str) -> list[int]:
        """The processes to strike; they may be about to start."""
        assert self.home is not None
        deadline = time.monotonic() + (120.0 if self.shared else 1.0)
        while True:
            pids = sightings.victims(self.home, kind)
            if pids or time.monotonic() > deadline:
                return pids
            time.sleep(0.05)

    # -- invariants ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """One server, one supervisor, a readable record: at every look."""
        assert self.home is not None
        too_many: dict[str, int] = {}
        while not self._over.wait(_LOOK_S):
            sightings.keep_logs(self.home, self.folder / "logs")
            processes = sightings.look(self.home)
            now = time.monotonic()
            for role in ("supervisor", "api"):
                alive = [p for p in processes if p.role == role]
                too_many[role] = too_many.get(role, 0) + 1 if len(alive) > 1 else 0
                if too_many[role] == _FALL_LOOKS:
                    self.broken.append(f"two at once ({role}) at {now - self.began:.2f} s: {alive}")
            self.broken += [
                f"torn record at {now - self.began:.2f} s: {torn}" for torn in sightings.torn_records(self.home)
            ]

    def _check_the_end(self) -> None:
        """Nothing is left, or what a killed supervisor leaves and the next `down` removes."""
        assert self.home is not None
        deadline = time.monotonic() + _END_S
        quiet_since: float | None = None
        while time.monotonic() < deadline:
            processes = [p for p in sightings.look(self.home) if p.role != "orphan"]
            if not processes and not self._left(orphans=True):
                return
            # Files alone, with nobody to remove them: no need to wait any longer.
            quiet_since = None if processes else quiet_since or time.monotonic()
            if quiet_since and time.monotonic() - quiet_since > 1.5:
                break
            time.sleep(0.05)
        processes = [p for p in sightings.look(self.home) if p.role != "orphan"]
        if processes:
            self.broken.append(f"processes left {_END_S:g} s after the last client: {processes}")
        elif not self._killed_supervisors & self._recorded_pids():
            self.broken.append(f"left behind, though the last supervisor was not killed: {self._left(orphans=True)}")
        done = subprocess.run(
            [sys.executable, "-m", "managed_vllm.cli", "down", "--all", "--force"],
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        left = self._left(orphans=True)
        if done.returncode != 0 or left:
            self.broken.append(f"left after down (exit {done.returncode}, {done.stdout}{done.stderr}): {left}")
            sightings.send([p.pid for p in sightings.look(self.home)], signal.SIGKILL)

    def _recorded_pids(self) -> set[int]:
        assert self.home is not None
        pids = set()
        for path in self.home.glob("*/instance.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                pids.add(json.loads(path.read_text())["pid"])
        # Killed before its first record, or with its folder half removed: nobody is named.
        return pids or self._killed_supervisors

    def _left(self, *, orphans: bool) -> list[str]:
        assert self.home is not None
        left = [
            f"{p.role} {p.pid} {p.command[:80]}" for p in sightings.look(self.home) if orphans or p.role != "orphan"
        ]
        left += sightings.files_left(self.home)
        if not (self._folders_removed and self._killed_supervisors):  # the record, which names it, went with the folder
            left += [str(path) for path in (self.folder / "t").glob("mvllm-*")]
        segments = self.folder / "segments"
        if segments.exists():
            left += [path for path in segments.read_text().split() if Path(path).exists()]
        return left

    # -- what the clients wrote ----------------------------------------------------------------------------------------

    def _read_records(self) -> Outcome:
        outcome = Outcome(missed=self._missed)
        struck = [*self._struck, *self._claimed()]
        answered: list[tuple[float, float, int]] = []
        for member in self._members:
            begun: dict[int, dict[str, Any]] = {}
            for line in member.record.read_text().splitlines() if member.record.exists() else ():
                try:
                    event = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                if "broken" in event:
                    self.broken.append(f"{member.record.name}: {event['broken']}")
                if event["event"] == "begin":
                    begun[event["number"]] = event
                    outcome.requests += 1
                elif event["event"] == "end":
                    begin = begun.pop(event["number"], None)
                    if begin is None:
                        self.broken.append(f"{member.record.name}: request {event['number']} ended twice")
                        continue
                    if event.get("ok"):
                        outcome.answered += 1
                        outcome.retries += event["attempts"] - 1
                        answered.append((begin["t"], event["t"], event["attempts"]))
                    elif "error" in event:
                        outcome.fail(
                            event["error"],
                            f"seed {self.plan.seed} at {event['t'] - self.began:.2f} s of "
                            f"{begin['what']} after {event['took']:.1f} s: {event['message']}",
                        )
                elif event["event"] == "restarted" and "error" in event:
                    outcome.fail(f"restart(): {event['error']}", event["message"])
            if begun and not member.killed:
                self.broken.append(f"{member.record.name}: never ended: {sorted(begun)}")
        for at, kind in struck:
            outcome.struck[kind] += 1
            after = [end for begin, end, attempts in answered if begin >= at or (attempts > 1 and end > at)]
            if kind in DISRUPTIVE and after:
                outcome.recoveries.append(Recovery(kind, min(after) - at, self.plan.seed))
        return outcome

    def _claimed(self) -> list[tuple[float, str]]:
        """The ordered faults that a request met, and when (a rename changes the file's ctime)."""
        offset = time.time() - time.monotonic()
        return [
            (path.stat().st_ctime - offset, path.name.removesuffix(".claimed").partition("-")[2])
            for path in (self.folder / "faults").glob("*.claimed")
        ]


def prepare() -> None:
    """Starts the process from which clients are forked, and waits until it has imported what they need."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS), str(_TESTS / "helpers"), *([before] if before else [])])
    try:
        _forks.set_forkserver_preload(["chaos.client"])
        first = _forks.Process(target=_nothing)
        first.start()
        first.join()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _nothing() -> None:
    pass


def replay(seed: int, real: bool = False, warm: bool = False) -> str:
    """The command that does a run again."""
    return f"python tests/chaos/run.py {'--real ' * real}{'--warm ' * warm}--runs 1 --seed {seed}"


def warm_setting(folder: Path) -> Setting:
    """The stand-in as the server of a fake `vllm`, which is made in `folder`: forked from an image of it."""
    return dataclasses.replace(STANDIN, command=None, env=fake_vllm.write(folder), warm=True)


def run_many(
    runs: int, seed: int = 0, jobs: int = 2, *, warm: bool = False, quiet: bool = True, keep: bool = False
) -> list[Outcome]:
    """Runs against the stand-in, of the seeds from `seed` on; `warm`: it is forked from a warm image."""
    with tempfile.TemporaryDirectory(prefix="mvc-", dir="/tmp") as folder:
        setting = warm_setting(Path(folder)) if warm else STANDIN
        return _run_all(range(seed, seed + runs), setting, jobs, quiet=quiet, keep=keep)


def _run_all(seeds: Sequence[int], setting: Setting, jobs: int, *, quiet: bool, keep: bool) -> list[Outcome]:
    prepare()

    def one(number: int) -> Outcome:
        run = Run((warm_plan_for if setting.warm else plan_for)(number), setting, keep=keep)
        outcome = run.happen()
        if not quiet:
            mark = "BROKEN" if outcome.broken else "ok"
            print(f"seed {number}: {mark}, {outcome.took_s:.1f} s, {outcome.answered} answered", flush=True)
        if keep:
            print(f"  kept in {run.folder}", flush=True)
        for line in outcome.broken:
            print(f"  {line}", flush=True)
        return outcome

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next has the next")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; one with --real")
    parser.add_argument("--real", action="store_true", help="the real vLLM with the embedded model")
    parser.add_argument("--warm", action="store_true", help="servers forked from a warm image, which is killed as well")
    parser.add_argument("--quiet", action="store_true", help="only what broke, and the report")
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs in which nothing broke, too")
    parser.add_argument("--plan", action="store_true", help="show the plans, do nothing")
    arguments = parser.parse_args()
    if arguments.plan:
        make = real_plan_for if arguments.real else warm_plan_for if arguments.warm else plan_for
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            print(make(seed))
        return
    began = time.monotonic()
    if arguments.real:
        from chaos.real import run_real

        outcomes = run_real(arguments.runs, arguments.seed, quiet=arguments.quiet)
    else:
        outcomes = run_many(
            arguments.runs,
            arguments.seed,
            arguments.jobs,
            warm=arguments.warm,
            quiet=arguments.quiet,
            keep=arguments.keep,
        )
    print(summary(outcomes, time.monotonic() - began))
    sys.exit(any(outcome.broken for outcome in outcomes))


if __name__ == "__main__":
    main()
