"""A program that plays by `run_on_ray`, for tests that kill it: `ray_driver.py ADDRESS RUN LOG TASKS N OPTIONS`.

OPTIONS is a JSON object: further arguments of `run_on_ray`; `go`, a file for which each reset waits once it has noted
itself; `fail`, a text with which `make_llm` fails.
LOG gets a line of each handle, "server NODE PID SERVER_PID", and one of each reset, "reset NODE PID TASK". What comes
back is written beside it, into `result.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import counting_server
from acting_server import MODEL
from counting_world import CountingWorld, tasks, until
from processes import HANG_S

from managed_vllm import ManagedVLLM
from managed_vllm.agent import Task, run_on_ray, ui_tars
from managed_vllm.errors import ConfigError


def note(log: Path, what: str, which: object) -> None:
    with log.open("a") as file:
        file.write(f"{what} {os.environ['NODE']} {os.getpid()} {which}\n")


class Noting(CountingWorld):
    """Notes each reset, and waits until it may go on."""

    log: Path
    go: Path

    async def reset(self, task: Task) -> Any:
        note(self.log, "reset", task.id)
        await until(self.go.exists, 4 * HANG_S)
        return await super().reset(task)


def main(
    address: str, run: Path, log: Path, count: int, n: int, go: str, fail: str | None = None, **options: Any
) -> None:
    import ray

    def make_llm() -> ManagedVLLM:
        if fail is not None:
            raise ConfigError(fail, field="fail")
        llm = ManagedVLLM(MODEL, command=counting_server.COMMAND, keep_alive=2).start()
        note(log, "server", llm.status().server_pid)
        return llm

    def make_environment() -> CountingWorld:
        made = Noting()
        made.log, made.go = log, Path(go)
        return made

    ray.init(address=address, log_to_driver=False)
    found = run_on_ray(
        tasks(count, lambda number: number % 6),
        make_llm,
        make_environment,
        run,
        config={"tasks": count, "n": n},
        n=n,
        max_concurrency=4,
        sampling_params={"max_tokens": 200},
        agent=ui_tars("absolute", show_text=True),
        **options,
    )
    log.with_name("result.json").write_text(json.dumps([[*one.key, one.reward] for one in found]))


if __name__ == "__main__":
    main(
        sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), **json.loads(sys.argv[6])
    )
