"""A process that plays rollouts into a run's folder, for tests that kill it: `rollout_process.py URL RUN LOG TASKS N`.

Each reset is noted in LOG, one line with one write. It goes on with what RUN has; with `join` after these, together
with others.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from acting_server import MODEL
from counting_world import CountingWorld, Worlds, tasks

from managed_vllm import AsyncVLLMClient
from managed_vllm.agent import RunStore, StreamingTaskScheduler, Task, ui_tars


def main(url: str, run: Path, log: Path, count: int, n: int, *join: str) -> None:
    noted = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    worlds = Worlds()

    class Noting(CountingWorld):
        async def reset(self, task: Task) -> Any:
            os.write(noted, f"{os.getpid()} {task.id}\n".encode())
            return await super().reset(task)

        async def step(self, action: Any) -> Any:
            await asyncio.sleep(0.002 * (self.left % 3))
            return await super().step(action)

    with (RunStore.join if join else RunStore.create)(run, {"tasks": count, "n": n}) as store:
        scheduler = StreamingTaskScheduler(
            AsyncVLLMClient(url, None, MODEL),
            lambda: Noting(None, worlds),
            n=n,
            max_concurrency=8,
            sampling_params={"max_tokens": 200},
            agent=ui_tars("absolute", show_text=True),
            store=store,
        )
        scheduler.run_all(tasks(count, lambda number: number % 6), keep=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:])
