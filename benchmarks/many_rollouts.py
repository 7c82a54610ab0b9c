"""A thousand episodes at once in one process: errors, how long the event loop is held up, and memory.

    python benchmarks/many_rollouts.py                # 1,000 episodes of 6 turns, five 1080p screenshots in view
    python benchmarks/many_rollouts.py --episodes 200 --in-full

Against `stub_server.py`, whose answers come after `--delay` seconds, so that all episodes wait for the model at once.
The environment hands out screenshots of 1920 × 1080 as PNG, no two the same bytes (231 KiB each in the mean). They are
kept in files by content, and sent as ids where the server has them already, as with a server of ours (`--in-full`: each
time with all of their bytes).

- *lag*: a task sleeps for 10 ms, again and again; what it sleeps longer is the time for which the loop did something
  else. All other tasks wait as long for their turn.
- *memory*: the peak resident size of the process, above what it had before; beside it what the screenshots in view of
  all episodes would take as files in memory, and decoded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import stub_server
from client_memory import distinct, memory_mib, screenshot

from managed_vllm import AsyncVLLMClient
from managed_vllm.agent import (
    AgentFormat,
    ImageStore,
    Limits,
    Observation,
    RetryRollouts,
    StepResult,
    StopReason,
    StreamingTaskScheduler,
    Task,
)
from managed_vllm.agent.actions import Action, ParsedResponse, Wait
from managed_vllm.agent.prompting import Chat

_MIB = 2**20
_WIDTH, _HEIGHT = 1920, 1080


class Showing:
    """Shows another screenshot after each step; `turns` steps, then it ends."""

    def __init__(self, drawn: list[bytes], turns: int, sizes: list[int]) -> None:
        self._drawn = drawn
        self._turns = turns
        self._sizes = sizes
        self._episode = self._left = 0

    def _seen(self) -> Observation:
        number = self._episode * (self._turns + 1) + self._left
        data = distinct(self._drawn[number % len(self._drawn)], number)
        self._sizes.append(len(data))
        return Observation(data, text=f"{self._left} left")

    async def reset(self, task: Task) -> Observation:
        self._episode, self._left = int(task.id), self._turns
        return self._seen()

    async def step(self, action: Action) -> StepResult:
        self._left -= 1
        return StepResult(self._seen(), reward=1.0, terminated=self._left == 0)

    async def evaluate(self) -> float | None:
        return None

    async def close(self) -> None:
        pass


async def watch(lags: list[float]) -> None:
    """How much longer than 10 ms a sleep of 10 ms takes, in seconds."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.01)
        lags.append(time.perf_counter() - began - 0.01)


async def play(given: argparse.Namespace, address: str, drawn: list[bytes], images: ImageStore) -> dict[str, Any]:
    sizes: list[int] = []
    lags: list[float] = []
    before = memory_mib("VmRSS")
    async with AsyncVLLMClient(address, None, stub_server.MODEL, media_ids=not given.in_full) as client:
        scheduler = StreamingTaskScheduler(
            client,
            lambda: Showing(drawn, given.turns, sizes),
            max_concurrency=given.episodes,
            sampling_params={"max_tokens": 30},
            limits=Limits(max_steps=given.turns + 1, max_images=5),
            agent=AgentFormat(Chat(), lambda answer, size: ParsedResponse("", (Wait(),))),
            retry=RetryRollouts(max_attempts=1),
            images=images,
        )
        watching = asyncio.create_task(watch(lags))
        began = time.perf_counter()
        ended = failed = steps = 0
        async for trajectory in scheduler.run([Task(str(number)) for number in range(given.episodes)]):
            ended += 1
            failed += trajectory.stop_reason is not StopReason.TERMINATED
            steps += len(trajectory.steps)
        took = time.perf_counter() - began
        watching.cancel()
    lags.sort()
    in_view = given.episodes * min(5, given.turns)
    return {
        "episodes": ended,
        "failed": failed,
        "steps": steps,
        "seconds": took,
        "steps_per_s": steps / took,
        "lag_p50_ms": 1000 * lags[len(lags) // 2],
        "lag_p99_ms": 1000 * lags[int(len(lags) * 0.99)],
        "lag_worst_ms": 1000 * lags[-1],
        "memory_mib": memory_mib("VmHWM") - before,
        "screenshots": len(sizes),
        "in_view_as_files_mib": in_view * sum(sizes) / len(sizes) / _MIB,
        "in_view_decoded_mib": in_view * 3 * _WIDTH * _HEIGHT / _MIB,
        "sent_mib": client.bytes_sent / _MIB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--episodes", type=int, default=1000, help="at once")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--delay", type=float, default=20.0, metavar="S", help="of the model")
    parser.add_argument("--in-full", action="store_true", help="send every image with all of its bytes each time")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    given = parser.parse_args()
    stub_server.raise_open_files()
    drawn = [screenshot(seed) for seed in range(8)]
    with tempfile.TemporaryDirectory() as folder, stub_server.running(delay_s=given.delay) as address:
        found = asyncio.run(play(given, address, drawn, ImageStore(Path(folder) / "images")))
        most = stub_server.stats_of(address).most_in_flight
    print(f"{found['episodes']} episodes at once, {found['failed']} failed; at most {most} requests in flight")
    print(f"{found['steps']} turns in {found['seconds']:.1f} s; {found['sent_mib']:,.0f} MiB sent")
    print(
        f"lag: median {found['lag_p50_ms']:.1f} ms, p99 {found['lag_p99_ms']:.1f} ms, "
        f"worst {found['lag_worst_ms']:.0f} ms"
    )
    print(
        f"memory: {found['memory_mib']:.0f} MiB more than before; {found['screenshots']:,} screenshots went through, "
        f"those in view at once are {found['in_view_as_files_mib']:,.0f} MiB as files, "
        f"{found['in_view_decoded_mib']:,.0f} MiB decoded"
    )
    targets = [
        ("no error", found["failed"] == 0 and found["episodes"] == given.episodes),
        ("lag p99 under 100 ms", found["lag_p99_ms"] < 100),
        ("less memory than the screenshots in view have as files", found["memory_mib"] < found["in_view_as_files_mib"]),
    ]
    for target, met in targets:
        print(f"{'met    ' if met else 'NOT MET'} {target}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(met for _, met in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
