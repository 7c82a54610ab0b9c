"""Rollouts at their own pace against lock-step batching, on the same environments and the same draw.

    python benchmarks/rollouts.py                       # 64 tasks × 4, 32 environments: a minute
    python benchmarks/rollouts.py --measure-lock-step   # the old loop, too, is run, and not computed: 7 minutes more
    python benchmarks/rollouts.py --scale 0.4           # longer steps, in which overheads weigh less

The environments wait, and do nothing else: the times of their steps are lognormal (sigma 1), and 2 % of the rollouts
are stuck: one of their steps never returns. The model is `stub_server.py` with a fixed delay. All is drawn beforehand
from a seed, so that three things have the same draw:

- **streaming**: `StreamingTaskScheduler` with that many environments; a stuck step ends by `Limits.step_timeout_s`;
- **lock-step**, as the service scripts do it: as many rollouts as there are environments in a batch; every round asks
  the model for all that are left, then executes their actions one after the other; a stuck one is given the same
  time-out (there was none in those scripts: with it they would never end). Its time is the sum of its waits, with no
  overhead at all, unless it is measured;
- **the bound**: list scheduling of the same rollouts, in the same order, on that many machines, without any overhead
  (Graham 1966). Nobody who does not know the times beforehand can promise better.

Also: whether the stuck ones cost the others anything. For every rollout that was not stuck its own time is compared to
the sum of its own waits.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stub_server

from managed_vllm import AsyncVLLMClient
from managed_vllm.agent import Limits, Observation, RetryRollouts, StepResult, StreamingTaskScheduler, Task
from managed_vllm.agent.actions import Action, ParsedResponse, Wait
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.prompting import LatestText


@dataclass(frozen=True)
class Draw:
    """One rollout: seconds of each step; `stuck`: the number of the one that never returns."""

    steps: tuple[float, ...]
    stuck: int | None

    def seconds(self, timeout_s: float) -> list[float]:
        """What each of its steps takes, up to the one with which it ends."""
        if self.stuck is None:
            return [min(step, timeout_s) for step in self.steps]
        return [*(min(step, timeout_s) for step in self.steps[: self.stuck]), timeout_s]


def draw(given: argparse.Namespace) -> list[Draw]:
    """All rollouts. The median of a step is `scale` seconds; an episode has 3 to 12 of them."""
    rng = random.Random(given.seed)
    found = []
    count = given.tasks * given.n
    stuck = set(rng.sample(range(count), round(count * given.stuck)))
    for number in range(count):
        steps = tuple(given.scale * rng.lognormvariate(0.0, 1.0) for _ in range(rng.randint(3, 12)))
        found.append(Draw(steps, rng.randrange(len(steps)) if number in stuck else None))
    return found


# -- streaming ---------------------------------------------------------------------------------------------------------


class Sleeping:
    """An environment whose steps take as long as was drawn."""

    def __init__(self, draws: Sequence[Draw], n: int, begun: dict[int, int]) -> None:
        self._draws = draws
        self._n = n
        self._begun = begun  # rollouts of a task that have begun: the draws are given out in that order
        self._left: list[float | None] = []

    async def reset(self, task: Task) -> Observation:
        number = int(task.id)
        rollout = self._begun.get(number, 0)
        self._begun[number] = rollout + 1
        drawn = self._draws[number * self._n + rollout]
        self._left = [None if index == drawn.stuck else step for index, step in enumerate(drawn.steps)]
        self._left.reverse()
        return Observation(text="go")

    async def step(self, action: Action) -> StepResult:
        wait = self._left.pop()
        if wait is None:
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(wait)
        return StepResult(Observation(text="go"), reward=0.0, terminated=not self._left)

    async def evaluate(self) -> float | None:
        return None

    async def close(self) -> None:
        pass


def parse(answer: Any, size: tuple[int, int]) -> ParsedResponse:
    return ParsedResponse("", (Wait(),))


async def streaming(given: argparse.Namespace, draws: Sequence[Draw], url: str) -> dict[str, Any]:
    begun: dict[int, int] = {}
    others: list[float] = []
    async with AsyncVLLMClient(url, None, stub_server.MODEL) as client:
        scheduler = StreamingTaskScheduler(
            client,
            lambda: Sleeping(draws, given.n, begun),
            n=given.n,
            max_concurrency=given.environments,
            sampling_params={"max_tokens": 30},
            limits=Limits(max_steps=50, step_timeout_s=given.timeout),
            agent=AgentFormat(LatestText(), parse),
            retry=RetryRollouts(max_attempts=1),
        )
        began = time.perf_counter()
        failed = 0
        async for trajectory in scheduler.run([Task(str(number)) for number in range(given.tasks)]):
            if trajectory.failure is not None:
                failed += 1
                continue
            own = sum(step.timings.environment_s + given.delay for step in trajectory.steps)
            others.append(trajectory.duration_s / own)
        took = time.perf_counter() - began
    return {"seconds": took, "failed": failed, "slowdown_of_others": statistics.median(others), "worst": max(others)}


# -- what it is measured against ---------------------------------------------------------------------------------------


def lock_step(given: argparse.Namespace, draws: Sequence[Draw]) -> float:
    """Seconds of the old loop: in each round one batched generate, then everybody's action, one after the other."""
    total = 0.0
    for begin in range(0, len(draws), given.environments):
        batch = [drawn.seconds(given.timeout) for drawn in draws[begin : begin + given.environments]]
        for turn in range(max(map(len, batch))):
            total += given.delay + sum(seconds[turn] for seconds in batch if turn < len(seconds))
    return total


async def measured_lock_step(given: argparse.Namespace, draws: Sequence[Draw], url: str) -> float:
    """The same, run."""
    began = time.perf_counter()
    async with AsyncVLLMClient(url, None, stub_server.MODEL) as client:
        for begin in range(0, len(draws), given.environments):
            active = [drawn.seconds(given.timeout) for drawn in draws[begin : begin + given.environments]]
            turn = 0
            while active:
                conversations = [[{"role": "user", "content": "go"}]] * len(active)
                await client.chat(conversations, {"max_tokens": 30, "logprobs": 0})
                for seconds in active:
                    await asyncio.sleep(seconds[turn])
                turn += 1
                active = [seconds for seconds in active if turn < len(seconds)]
    return time.perf_counter() - began


def lock_step_parallel(given: argparse.Namespace, draws: Sequence[Draw]) -> float:
    """A kinder one: the actions of a round all at once. The slowest of each round still holds up all."""
    total = 0.0
    for begin in range(0, len(draws), given.environments):
        batch = [drawn.seconds(given.timeout) for drawn in draws[begin : begin + given.environments]]
        for turn in range(max(map(len, batch))):
            total += given.delay + max(seconds[turn] for seconds in batch if turn < len(seconds))
    return total


def list_scheduling(given: argparse.Namespace, draws: Sequence[Draw]) -> float:
    """Seconds until the last of the machines is done, each taking the next rollout as soon as it is free."""
    free = [0.0] * given.environments
    for drawn in draws:
        seconds = drawn.seconds(given.timeout)
        begin = heapq.heappop(free)
        heapq.heappush(free, begin + sum(seconds) + given.delay * len(seconds))
    return max(free)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--n", type=int, default=4, help="rollouts a task")
    parser.add_argument("--environments", type=int, default=32)
    parser.add_argument("--scale", type=float, default=0.1, metavar="S", help="median seconds of a step")
    parser.add_argument("--timeout", type=float, metavar="S", help="of a step (default: 25 × scale)")
    parser.add_argument("--delay", type=float, metavar="S", help="of the model (default: scale / 2)")
    parser.add_argument(
        "--stuck", type=float, default=0.02, help="share of the rollouts with a step that never returns"
    )
    parser.add_argument("--measure-lock-step", action="store_true", help="run the old loop, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    given = parser.parse_args()
    given.timeout = given.timeout or 25 * given.scale
    given.delay = given.scale / 2 if given.delay is None else given.delay
    draws = draw(given)
    bound = list_scheduling(given, draws)
    print(f"{len(draws)} rollouts in {given.environments} environments; about {bound:.0f} s", file=sys.stderr)
    with stub_server.running(delay_s=given.delay) as address:
        ours = asyncio.run(streaming(given, draws, address))
        measured = None
        if given.measure_lock_step:
            print(f"the old loop: about {lock_step(given, draws):.0f} s", file=sys.stderr)
            measured = asyncio.run(measured_lock_step(given, draws, address))
    stuck = sum(drawn.stuck is not None for drawn in draws)
    found = {
        "rollouts": len(draws),
        "stuck": stuck,
        "streaming_s": ours["seconds"],
        "bound_s": bound,
        "lock_step_s": lock_step(given, draws) if measured is None else measured,
        "lock_step_measured": measured is not None,
        "lock_step_parallel_s": lock_step_parallel(given, draws),
        **{name: ours[name] for name in ("failed", "slowdown_of_others", "worst")},
    }
    rows = [
        ("list scheduling (bound)", bound),
        ("streaming", ours["seconds"]),
        ("lock-step, actions at once", found["lock_step_parallel_s"]),
        (f"lock-step, as the old loop ({'computed' if measured is None else 'measured'})", found["lock_step_s"]),
    ]
    print(f"| {len(draws)} rollouts, {stuck} of them stuck | seconds | × streaming | × bound |")
    print("| --- | --- | --- | --- |")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.1f} | {seconds / ours['seconds']:.2f} | {seconds / bound:.2f} |")
    print(
        f"others than the stuck ones took {ours['slowdown_of_others']:.3f} × (median) and {ours['worst']:.3f} × "
        "(worst) the time of their own waits"
    )
    targets = [
        ("at least 3 × faster than lock-step", found["lock_step_s"] >= 3 * ours["seconds"]),
        ("within 10 % of the bound", ours["seconds"] <= 1.1 * bound),
        ("only the stuck ones failed", ours["failed"] == stuck),
        ("the stuck ones cost no others anything (median within 5 %)", ours["slowdown_of_others"] <= 1.05),
    ]
    for target, met in targets:
        print(f"{'met    ' if met else 'NOT MET'} {target}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(met for _, met in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
