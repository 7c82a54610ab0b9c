"""`managed-vllm rollout`: tasks × n rollouts of an environment by name, into a run's folder, resumed when run again."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from managed_vllm import demo
from managed_vllm.agent import Limits, ParseErrorPolicy, RetryRollouts, RunStore, StreamingTaskScheduler
from managed_vllm.agent.format import AgentFormat
from managed_vllm.agent.imports import imported
from managed_vllm.agent.named_environments import FORMATS, NamedEnvironment, named_environment, read_tasks
from managed_vllm.agent.report import summary_table
from managed_vllm.agent.tasks import begun_at
from managed_vllm.agent.types import Task
from managed_vllm.cli import Terminated, running, serve
from managed_vllm.errors import ConfigError
from managed_vllm.instance import external


def rollout(given: argparse.Namespace) -> int:
    """`managed-vllm rollout`. 0: every rollout was played; 1: some failed for good."""
    limits = Limits(
        max_steps=given.max_steps,
        max_images=given.max_images,
        max_response_tokens=given.max_tokens,
        step_timeout_s=given.step_timeout,
        episode_timeout_s=given.episode_timeout,
    )
    if given.format is not None:
        _format(given.format, given.coordinates)
    place = named_environment(given.environment, limits)
    reward = None if given.reward is None else imported(given.reward, field="reward")
    tasks = _tasks(given, place)
    model, arguments = serve.model_and_arguments(given)
    if model is None and given.environment == "desktop" and external.URL_VARIABLE not in os.environ:
        model = demo.NAME
    params: dict[str, Any] = {"temperature": given.temperature, **_sampling(given.sampling)}
    out = Path(given.out)
    scheduler: StreamingTaskScheduler | None = None
    with serve.terminable(), serve.handle(given, model, arguments, progress=not given.json) as llm:
        if given.format is None and place.agent is not None:
            name, agent = given.environment.partition(":")[0], place.agent
        else:
            name = given.format or place.format or ("embedded" if llm.model == demo.NAME else "ui-tars")
            agent = _format(name, given.coordinates)
        if given.retries:
            agent = replace(agent, on_parse_error=ParseErrorPolicy(retries=given.retries))
        config = {"environment": place.name or given.environment, "format": name}
        notes = {"n": given.n, "seed": given.seed, "tasks": len(tasks), "limits": asdict(limits)}
        enter = RunStore.join if given.join else RunStore.create
        with enter(out, config, notes=notes, force=given.force) as store:
            scheduler = StreamingTaskScheduler(
                llm,
                place.make,
                n=given.n,
                max_concurrency=given.max_concurrency,
                sampling_params=params,
                limits=limits,
                agent=agent,
                retry=RetryRollouts(max_attempts=given.max_attempts),
                exact=given.exact,
                reward=reward,
                store=store,
                progress=False if given.json else (None if sys.stderr.isatty() else True),
            )
            stopped: BaseException | None = None
            with _stopping(scheduler) as terminated:
                try:
                    # What is finished is in the store; nothing of it is kept here.
                    scheduler.run_all(begun_at(tasks, random.random()) if given.join else tasks, keep=False)
                except KeyboardInterrupt as error:
                    stopped = error
            if terminated:
                stopped = Terminated()
            stats = scheduler.stats
            if given.json:
                print(json.dumps(_as_json(store, stats, out), indent=2))
            else:
                running.console().print(summary_table(store))
                asked = max(stats.expected, len(tasks) * given.n)
                earlier = "others or from before" if given.join else "before"
                print(f"{stats.done} of {asked} rollouts ({stats.stored} of them from {earlier}) in {out}")
                print(f"  look:  managed-vllm view {out}")
            if stopped is not None:
                if not given.json:
                    print("Stopped. The same command goes on from here.", file=sys.stderr)
                raise stopped
    return 1 if scheduler.stats.failed else 0


@contextlib.contextmanager
def _stopping(scheduler: StreamingTaskScheduler) -> Iterator[list[int]]:
    """SIGTERM stops the run within the block, and is in the list then.

    An exception from the handler, as elsewhere, could end up in any of asyncio's tasks, and be lost there.
    """
    received: list[int] = []

    def on_sigterm(number: int, frame: Any) -> None:
        received.append(number)
        scheduler.stop()

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tasks(given: argparse.Namespace, place: NamedEnvironment) -> list[Task]:
    if given.tasks.isdigit():
        if place.tasks is None:
            raise ConfigError(f"{given.environment} needs --tasks FILE: which tasks it has is not known", field="tasks")
        return list(place.tasks(int(given.tasks), given.seed))
    return read_tasks(Path(given.tasks))


def _sampling(word: str | None) -> dict[str, Any]:
    if word is None:
        return {}
    try:
        found = json.loads(word)
    except ValueError as error:
        raise ConfigError(f"--sampling is no JSON: {error}", field="sampling") from error
    if not isinstance(found, dict):
        raise ConfigError("--sampling must be a JSON object, such as '{\"top_p\": 0.9}'", field="sampling")
    return found


def _as_json(store: RunStore, stats: Any, out: Path) -> dict[str, Any]:
    return {
        "run": str(out),
        "rollouts": stats.expected,
        "done": stats.done,
        "stored_before": stats.stored,
        "failed": stats.failed,
        "seconds": round(stats.elapsed_s, 3),
        **asdict(store.summary()),
    }


def _format(name: str, coordinates: str | None) -> AgentFormat:
    """Raises `ConfigError`: there is none of that name, or its numbers are not for the caller to say."""
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r:.80}; there are {', '.join(FORMATS)}", field="format")
    if coordinates is None:
        return FORMATS[name]()
    if name == "embedded":
        raise ConfigError("the embedded model's numbers are its own: leave --coordinates out", field="coordinates")
    return FORMATS[name](coordinates=coordinates)
