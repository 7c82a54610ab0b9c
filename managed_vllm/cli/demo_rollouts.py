"""The demo's second half: the demo model plays the embedded desktop, and a page for the browser shows each step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from managed_vllm import ManagedVLLM, SamplingParams
from managed_vllm.agent import Limits, RunStore, StreamingTaskScheduler, embedded
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
from managed_vllm.agent.report import summary_table
from managed_vllm.agent.viewer import write_html
from managed_vllm.errors import ConfigError, RunStoreError

PAGE = "view.html"
ENVIRONMENTS = 16
_MADE_BY = "managed-vllm demo"


def play(llm: ManagedVLLM, out: Path, console: Any, *, tasks: int, n: int, seed: int) -> tuple[int, float]:
    """Plays `tasks` × `n` rollouts into the folder `out`; the run of an earlier demo there is replaced.

    Prints a table and where the page is. Returns how many rollouts were finished, and the share of them that succeeded.

    Raises `ConfigError` if `out` exists and was not made by a demo.
    """
    with RunStore.create(_fresh(out), {"made_by": _MADE_BY, "tasks": tasks, "n": n, "seed": seed}) as store:
        scheduler = StreamingTaskScheduler(
            llm,
            DesktopEnvironment,
            n=n,
            max_concurrency=ENVIRONMENTS,
            # Some randomness, so that the rollouts of a task differ.
            sampling_params=SamplingParams(temperature=0.0 if n == 1 else 0.7, max_tokens=64),
            limits=Limits(max_steps=10),
            agent=embedded(),
            store=store,
            progress=None,
        )
        scheduler.run_all(desktop_tasks(tasks, seed=seed), keep=False)
        stats = scheduler.stats
        console.print(summary_table(store, title=f"{tasks} tasks × {n} on the embedded desktop"))
        page = write_html(store, out / PAGE, title="managed_vllm demo")
    finished = stats.done - stats.failed
    console.print(
        f"[bold]{finished} rollouts[/] in {stats.elapsed_s:.1f} s: {stats.steps / stats.elapsed_s:.0f} steps/s. "
        f"Each step with its screenshot, and the click where it went: {Path(page).absolute()}",
        soft_wrap=True,
    )
    return finished, stats.mean_reward or 0.0


def _fresh(out: Path) -> Path:
    """The folder, without what an earlier demo left there."""
    if out.exists():
        try:
            with RunStore.open(out) as store:
                ours = store.config.get("made_by") == _MADE_BY
        except RunStoreError:
            ours = out.is_dir() and not any(out.iterdir())
        if not ours:
            raise ConfigError(f"{out} exists and was not made by a demo; give another folder with --out", field="out")
        shutil.rmtree(out)
    return out
