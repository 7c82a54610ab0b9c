"""What a large stored run costs: opening it, resuming it, looking at its summary.

    python benchmarks/stored_runs.py                         # two minutes, 2.5 GB: 100,000 trajectories of 15 turns

The run is made up: one trajectory of 15 turns with five screenshots of 1080p in view (token ids, logprobs and messages
as long as UI-TARS 1.5's), written 100,000 times under other names. Each measurement is a process of its own; its memory
is the most that the kernel has seen of it. "Resumed" is a scheduler that finds everything finished: 12,500 tasks of 8
rollouts; no server is needed. "Scanned" is opening without the index, as after a copy that has lost the files' times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from managed_vllm.agent import Observation, RunStore, Step, StreamingTaskScheduler, Task, Trajectory, log_index
from managed_vllm.agent.actions import Click
from managed_vllm.agent.types import ImageRef, StepTimings, StopReason
from managed_vllm.client import VLLMClient

N = 8
TURNS = 15
TARGET_S, TARGET_MB = 5.0, 500.0


def trajectory(task: int = 0, refs: Sequence[ImageRef] | None = None) -> Trajectory:
    """As UI-TARS 1.5 on a desktop of 1920 x 1080; `refs` are its screenshots, one a turn."""
    if refs is None:
        refs = [ImageRef(f"{turn:064x}", "image/png", 1920, 1080) for turn in range(TURNS)]
    thought = "Thought: The dialog is open, so I click the button that saves it.\nAction: click(start_box='(197,525)')"
    steps: list[Step] = []
    messages: list[dict[str, Any]] = [{"role": "user", "content": "You are a GUI agent. " * 40}]
    for turn, ref in enumerate(refs):
        messages = [*messages, {"role": "user", "content": [{"type": "image", "image": ref}]}]
        steps.append(
            Step(
                index=turn,
                screenshot=ref,
                messages=tuple(messages),
                prompt_token_ids=(*range(300), *[151655] * 2691 * min(5, turn + 1), *range(60 * turn)),
                response=thought,
                response_token_ids=tuple(range(60)),
                response_logprobs=tuple(-1 / (1 + number) for number in range(60)),
                finish_reason="stop",
                thought=thought,
                actions=(Click(197.0, 525.0),),
                executed=1,
                timings=StepTimings(1.0, 0.1, 2.0, 3.0, 5.1),
                model="m",
            )
        )
        messages = [*messages, {"role": "assistant", "content": thought}]
    return Trajectory(task_of(task), 0, steps=tuple(steps), stop_reason=StopReason.MAX_STEPS, reward=1.0)


def task_of(number: int) -> Task:
    return Task(f"t-{number}", "Save the file.")


def make(folder: Path, count: int) -> None:
    """Through the log of attempts itself: what the disk takes for so many fsyncs is not measured here."""
    from managed_vllm.agent import attempt_log, run_folder, trajectory_codec

    os.fdatasync = lambda descriptor: None  # type: ignore[assignment]
    one = trajectory()
    text, numbers, images = trajectory_codec.encode(one)
    with RunStore.create(folder):
        pass
    log = attempt_log.AttemptLog(folder, writable=True)
    for number in range(count):
        named = replace(one, task=task_of(number // N), rollout=number % N)
        renamed = text.replace(b'"t-0"', json.dumps(named.task.id).encode(), 1)
        renamed = renamed.replace(b'"rollout":0', b'"rollout":%d' % named.rollout, 1)
        if number in (0, count - 1):
            assert trajectory_codec.decode(renamed, numbers) == named
        log.append(attempt_log.head_of(named), trajectory_codec.Record(renamed, numbers, images))
    log.close()
    with RunStore.create(folder):
        pass  # whose closing writes the index
    lines, arrays = ((folder / name).stat().st_size / 1e6 for name in (run_folder.LINES, run_folder.ARRAYS))
    print(f"{count:,} trajectories of {TURNS} turns: {lines:.0f} MB of text, {arrays:.0f} MB of ids and logprobs")


class Nothing:
    """An environment that is never needed."""

    async def reset(self, task: Task) -> Observation:
        raise AssertionError(f"{task.id} is finished")

    step = evaluate = close = reset


def opened(folder: Path) -> int:
    with RunStore.open(folder) as store:
        return store.summary().finished


def scanned(folder: Path) -> int:
    index = folder / log_index.NAME
    index.rename(aside := index.with_name("aside"))
    try:
        return opened(folder)
    finally:
        aside.rename(index)


def resumed(folder: Path) -> int:
    with RunStore.create(folder) as store, VLLMClient("http://127.0.0.1:9", None, "m") as client:
        scheduler = StreamingTaskScheduler(client, Nothing, n=N, store=store)  # type: ignore[arg-type]
        found = scheduler.run_all([task_of(number) for number in range(len(store) // N)])
        assert len(found[0].steps) == TURNS
        return len(found)


def measured(what: str, folder: Path) -> dict[str, Any]:
    """In a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--only", what, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        began = time.monotonic()
        rollouts = {"opened": opened, "scanned": scanned, "resumed": resumed}[given.only[0]](Path(given.only[1]))
        seconds = time.monotonic() - began
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cpu = round(time.process_time(), 2)
        print(json.dumps({"rollouts": rollouts, "seconds": round(seconds, 2), "cpu_s": cpu, "MB": round(megabytes)}))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        make(folder, given.count)
        met = True
        for what in ("scanned", "opened", "resumed"):
            found = measured(what, folder)
            ok = found["seconds"] < TARGET_S and found["MB"] < TARGET_MB
            met &= ok
            verdict = "met" if ok else "not met"
            print(
                f"{what}: {found['rollouts']:,} rollouts, {found['seconds']} s ({found['cpu_s']} s of CPU, imports "
                f"included), {found['MB']} MB: {verdict}"
            )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
