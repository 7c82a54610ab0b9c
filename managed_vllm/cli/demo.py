"""`managed-vllm demo`: several processes share one server of the demo model; then it plays the embedded desktop.

The parent process starts the workers (`managed-vllm demo --worker N`). A worker reports events as JSON lines on its
standard output; where all have to act at the same moment, it waits for a line on its standard input:

1. `started` → waits → enters `ManagedVLLM("demo")` → `ready` (after how many seconds, did it start the server?)
2. waits → answers its screens → `answers` → leaves → `left`

A worker that fails reports `error`, with a message. When all have left, the parent plays rollouts (`demo_rollouts`) and
leaves, too. Then the server must be gone, with every process and its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from managed_vllm import ManagedVLLM, SamplingParams, demo
from managed_vllm.cli import running
from managed_vllm.cli.serve import terminable
from managed_vllm.errors import ConfigError, ManagedVLLMError
from managed_vllm.instance import cleanup, directory, external
from managed_vllm.instance.directory import Instance

ENOUGH_RIGHT = 0.8
"""Share of right answers, and of rollouts that succeed, below which the demo has failed. The weights were accepted at
0.97 on other screens."""

_PATIENCE_S = 3600.0
"""For any one step of the workers; their server's own time-outs come long before."""

_MAX_TOKENS = 60


class DemoError(ManagedVLLMError):
    """The demonstration failed: a worker died, answers were wrong, or something was left behind."""


def show(given: argparse.Namespace) -> int:
    """`managed-vllm demo`: the parent, or with `--worker` one of the workers."""
    os.environ.pop(external.URL_VARIABLE, None)  # the demo is about a server of ours
    if given.worker is not None:
        return work(given)
    if given.workers < 3 or given.screens < 1:
        raise ConfigError("the demo needs at least three workers and one screen")
    with terminable():
        return _Demo(given).run()


def _handle(given: argparse.Namespace, *, progress: bool) -> ManagedVLLM:
    command = shlex.split(given.command) if given.command else None
    return ManagedVLLM(model=demo.NAME, command=command, keep_alive=0, progress=progress)


# -- a worker ----------------------------------------------------------------------------------------------------------


def work(given: argparse.Namespace) -> int:
    """A worker's part."""

    def report(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)

    def wait_for_go() -> None:
        if not sys.stdin.readline():
            raise KeyboardInterrupt  # the parent is gone

    rng = random.Random(f"{given.seed} {given.worker}")
    screens = [demo.random_screen(rng) for _ in range(given.screens)]
    try:
        report("started")
        wait_for_go()
        began = time.monotonic()
        with _handle(given, progress=False) as llm:
            report("ready", seconds=time.monotonic() - began, started_it=llm.started_it, base_url=llm.base_url)
            wait_for_go()
            outputs = llm.chat(
                [screen.messages() for screen in screens], SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
            )
            answers = [
                {
                    "task": screen.task,
                    "answer": output.outputs[0].text,
                    "expected": screen.expected_action(),
                    # Another program than vLLM with our model knows no screens.
                    "right": None if given.command else screen.is_right(output.outputs[0].text),
                    "latency_s": output.latency,
                }
                for screen, output in zip(screens, outputs, strict=True)
            ]
            report("answers", answers=answers)
        report("left")
    except ManagedVLLMError as error:
        report("error", message=str(error))
        return 1
    return 0


# -- the parent --------------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    reported: set[str] = field(default_factory=set)
    ready: Mapping[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()

    @property
    def title(self) -> str:
        return f"worker {self.number}"


class _Demo:
    """One run of the demonstration, in the parent."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._console = running.console()
        self._events: queue.SimpleQueue[tuple[_Worker, Mapping[str, Any]]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []

    def run(self) -> int:
        count = self._given.workers
        self._say(
            f'[bold]{count} worker processes and this one[/] ask for ManagedVLLM("{demo.NAME}") at the same moment.'
        )
        try:
            self._workers = [self._spawn(number) for number in range(1, count + 1)]
            self._await("started")
            self._release()
            began = time.monotonic()
            with _handle(self._given, progress=True) as llm:
                seconds = time.monotonic() - began
                self._await("ready")
                assert llm.id is not None
                instance = Instance(directory.state_home(), llm.id)
                status = llm.status()
                self._show_arrivals(seconds, llm.started_it)
                self._say(
                    f"[bold]One server for all of them:[/] {instance.id} at {llm.base_url}, with {status.users} users. "
                    f"Each worker now answers {self._given.screens} random screens, all at once."
                )
                began = time.monotonic()
                self._release()
                self._await("answers")
                seconds = time.monotonic() - began
                right = self._show_answers(seconds)
                self._await("left")
                played = None if self._given.command else self._play(llm)
        finally:
            self._end_workers()
        self._check_server_is_gone(instance, status.supervisor_pid)
        if right is not None and right < ENOUGH_RIGHT:
            raise DemoError(f"only {right:.0%} of the answers were right; at least {ENOUGH_RIGHT:.0%} should be")
        if played is not None and played < ENOUGH_RIGHT:
            raise DemoError(f"only {played:.0%} of the rollouts succeeded; at least {ENOUGH_RIGHT:.0%} should")
        return 0

    def _play(self, llm: ManagedVLLM) -> float:
        """Rollouts on the embedded desktop. Returns the share that succeeded."""
        from managed_vllm.cli import demo_rollouts

        given = self._given
        self._say(
            f"\n[bold]The model now plays the embedded desktop:[/] {given.tasks} tasks, {given.n} rollouts each, "
            f"{demo_rollouts.ENVIRONMENTS} at once, each at its own pace."
        )
        finished, share = demo_rollouts.play(
            llm, Path(given.out), self._console, tasks=given.tasks, n=given.n, seed=given.seed
        )
        if finished < given.tasks * given.n:
            raise DemoError(f"only {finished} of {given.tasks * given.n} rollouts were finished")
        return share

    # -- workers -------------------------------------------------------------------------------------------------------

    def _spawn(self, number: int) -> _Worker:
        given = self._given
        words = ["demo", "--worker", str(number), "--screens", str(given.screens), "--seed", str(given.seed)]
        if given.command:
            words += ["--command", given.command]
        process = subprocess.Popen(
            [sys.executable, "-m", "managed_vllm.cli", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        worker = _Worker(number, process)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            with contextlib.suppress(ValueError):
                self._events.put((worker, json.loads(line)))
        self._events.put((worker, {"event": "end"}))

    def _await(self, event: str) -> None:
        """Waits until every worker has reported `event`. Raises `DemoError` if one fails or dies."""
        deadline = time.monotonic() + _PATIENCE_S
        while missing := [worker.number for worker in self._workers if event not in worker.reported]:
            try:
                worker, report = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DemoError(f"no {event!r} from workers {missing} within {_PATIENCE_S:g} s") from None
            match report["event"]:
                case "error":
                    raise DemoError(f"{worker.title} failed: {report['message']}")
                case "ready":
                    worker.ready = report
                case "answers":
                    worker.answers = report["answers"]
                case "end" if "left" not in worker.reported:
                    raise DemoError(f"{worker.title} ended with exit code {worker.process.wait()} before {event!r}")
            worker.reported.add(report["event"])

    def _release(self) -> None:
        for worker in self._workers:
            assert worker.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it is dead: `_await` reports how
                worker.process.stdin.write("go\n")
                worker.process.stdin.flush()

    def _end_workers(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(0.0 if sys.exc_info()[0] else 10.0)
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _table(self, *heads: str) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads:
            table.add_column(head, overflow="fold")
        return table

    def _show_arrivals(self, seconds: float, started_it: bool) -> None:
        table = self._table("process", "pid", "what it did", "ready after")
        rows = [("this one", os.getpid(), started_it, seconds)]
        rows += [(w.title, w.process.pid, w.ready["started_it"], w.ready["seconds"]) for w in self._workers]
        for title, pid, started, took in rows:
            did = "[green]started the server[/]" if started else "attached to it"
            table.add_row(title, str(pid), did, f"{took:.1f} s")
        self._console.print(table)
        if not any(started for _, _, started, _ in rows):
            self._say("The server was running before: nobody had to start it.")

    def _show_answers(self, seconds: float) -> float | None:
        """Returns the share of right answers, None if they can't be judged."""
        from rich.text import Text

        table = self._table("process", "task", "answer", "", "ms")
        for worker in self._workers:
            for answer in worker.answers:
                said = " ".join(answer["answer"].rpartition("Action:")[2].split())[:80]
                verdict = {None: Text("–"), True: Text("right", "green"), False: Text("wrong", "red")}[answer["right"]]
                if answer["right"] is False:
                    said += f"   (right: {answer['expected']})"
                table.add_row(
                    worker.title, Text(answer["task"]), Text(said), verdict, f"{1000 * answer['latency_s']:.0f}"
                )
        self._console.print(table)
        verdicts = [answer["right"] for worker in self._workers for answer in worker.answers]
        if None in verdicts:
            self._say(f"[bold]{len(verdicts)} answers[/] in {seconds:.1f} s.")
            return None
        self._say(f"[bold]{sum(verdicts)} of {len(verdicts)} answers are right[/], in {seconds:.1f} s.")
        return float(sum(verdicts) / len(verdicts))

    def _check_server_is_gone(self, instance: Instance, supervisor_pid: int | None) -> None:
        seen = running.peek(instance)
        keep_alive_s = float(seen.extra.get("keep_alive_s") or 0.0) if seen else 0.0
        if seen is not None and (seen.pinned or seen.users or keep_alive_s > running.GONE_WITHIN_S):
            self._say("All have left. The server has other users, or is pinned or kept alive, and stays.")
            return
        began = time.monotonic()
        gone = running.wait_until_gone(instance, supervisor_pid, running.GONE_WITHIN_S + keep_alive_s)
        left = [process.pid for process in cleanup.marked_processes(instance)]
        if not gone or left or instance.folder.exists():
            raise DemoError(
                f"all have left, but something of {instance.id} is still there: processes {left}, {instance.folder}"
            )
        self._say(
            f"[bold]All have left, so the server was stopped[/] ({time.monotonic() - began:.1f} s): "
            "no process and no file of it is left."
        )
