"""Weight updates under load: how long streams stand still for each, and whether every answer names its weights rightly.

A number of streams go on all the time, while the weights change between two checkpoints that answer differently; one
update in five is of a checkpoint that can't be served. Each answer is compared with what its weights are known to say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attach import STAND_IN, own_state_directory

from managed_vllm import ManagedVLLM, demo
from managed_vllm.config import installed_vllm
from managed_vllm.errors import CheckpointError
from managed_vllm.request.outputs import CompletionOutput

sys.path.insert(0, str(STAND_IN.parent))
FIRST, UNUSED = 299, 700
"""Tokens of the demo model: with which every answer begins, and one that occurs nowhere; the checkpoints swap them."""


@dataclass
class Run:
    """What is served and seen so far. Times are in seconds."""

    prompts: list[list[dict[str, Any]]]
    params: dict[str, Any]
    known: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    checkpoint_of: dict[str, str] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    gaps: dict[int, float] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def check(self, index: int, ids: list[int], answer: CompletionOutput) -> None:
        """Notes an answer, and what is wrong with it."""
        spans = answer.weight_versions or []
        starts = [span.start for span in spans]
        if not spans or starts != [0, *(span.end for span in spans[:-1])] or spans[-1].end != len(ids):
            self.wrong.append(f"{len(ids)} tokens by {spans}")
            return
        self.answers["one version" if len(spans) == 1 else "more versions"] += 1
        first = self.checkpoint_of[spans[0].version]
        expected = self.known[first][index % len(self.prompts)]
        if ids[: spans[0].end] != expected[: spans[0].end]:
            self.wrong.append(f"the first {spans[0].end} tokens are not those of {first}")


async def stream(llm: ManagedVLLM, run: Run, index: int) -> None:
    prompt = run.prompts[index % len(run.prompts)]
    while not run.over:
        ids: list[int] = []
        run.last[index] = time.perf_counter()
        async for part in llm.async_client.stream(prompt, run.params):
            now = time.perf_counter()
            run.gaps[index] = max(run.gaps.get(index, 0.0), now - run.last[index])
            run.last[index] = now
            run.news.set()
            ids += part.outputs[0].token_ids
        run.check(index, ids, part.outputs[0])


async def worst_gap(run: Run, streams: int) -> float:
    """The longest time that any stream stood still since the last call, once each has gone on."""
    began = time.perf_counter()
    while any(run.last.get(index, 0.0) < began for index in range(streams)):
        run.news.clear()
        await run.news.wait()
    worst = max(run.gaps.values(), default=0.0)
    run.gaps.clear()
    return worst


async def measure(llm: ManagedVLLM, run: Run, good: dict[str, Path], bad: list[Path], asked: Any) -> None:
    streams = [asyncio.create_task(stream(llm, run, index)) for index in range(asked.streams)]
    updates, refused, stood_still, undisturbed = list[float](), list[float](), list[float](), list[float]()
    bads, began = itertools.cycle(bad), time.perf_counter()
    number = 0
    while number < asked.updates and time.perf_counter() - began < asked.seconds:
        await worst_gap(run, asked.streams)
        undisturbed.append(await worst_gap(run, asked.streams))
        at = time.perf_counter()
        if number % 5 == 4:
            with contextlib.suppress(CheckpointError):
                await llm.async_engine.update_weights(next(bads), version="bad", on_update=asked.on_update)
                run.wrong.append("a bad checkpoint was taken")
            refused.append(time.perf_counter() - at)
        else:
            name = run.checkpoint_of[f"v{number}"] = "ab"[number % 2]
            await llm.async_engine.update_weights(good[name], version=f"v{number}", on_update=asked.on_update)
            updates.append(time.perf_counter() - at)
        stood_still.append(await worst_gap(run, asked.streams))
        number += 1
    run.over = True
    failed = [one for one in await asyncio.gather(*streams, return_exceptions=True) if one is not None]
    print(f"{number} updates in {time.perf_counter() - began:.0f} s, of which {len(refused)} were of bad checkpoints")
    print(f"answers: {dict(run.answers)}, wrong: {len(run.wrong)}, failed: {len(failed)}")
    for text in [*run.wrong[:5], *map(repr, failed[:5])]:
        print("  ", text)
    show("update_weights", updates)
    show("refused", refused)
    show("worst gap in any stream, with an update", stood_still)
    show("the same without one", undisturbed)


def show(what: str, seconds: list[float]) -> None:
    if seconds:
        ordered = sorted(1000 * one for one in seconds)
        print(f"{what:40} p50 {statistics.median(ordered):6.0f} ms   worst {ordered[-1]:6.0f} ms")


def checkpoints(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Two that differ in how answers begin, and two that can't be served: cut off, and computing infinity."""
    from demo_checkpoints import copy_of_demo, rewritten, with_rows_swapped

    good = {name: copy_of_demo(folder / name) for name in "ab"}
    with_rows_swapped(good["b"], FIRST, UNUSED)
    cut, overflows = copy_of_demo(folder / "cut"), copy_of_demo(folder / "overflows")
    os.truncate(cut / "model.safetensors", 500_000)
    rewritten(
        overflows,
        lambda name, dtype, shape, old: (dtype, shape, b"\x7f\x7f" * (len(old) // 2) if "norm" in name else old),
    )
    return good, [cut, overflows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=540, help="ends earlier after so many (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer (default: %(default)s)")
    parser.add_argument("--on-update", default="continue", help="default: %(default)s")
    asked = parser.parse_args()
    print(f"vLLM {installed_vllm()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}, {asked}")
    prompts = [[{"role": "user", "content": demo.random_screen(random.Random(n)).prompt()}] for n in range(8)]
    run = Run(prompts, {"temperature": 0, "max_tokens": asked.tokens, "ignore_eos": True})
    with tempfile.TemporaryDirectory() as folder, own_state_directory():
        good, bad = checkpoints(Path(folder))
        with ManagedVLLM("demo", keep_alive=0, progress=False) as llm:
            for name, path in good.items():
                llm.engine.update_weights(path, version=f"first {name}")
                run.checkpoint_of[f"first {name}"] = name
                outputs = llm.chat(prompts, run.params)
                run.known[name] = {index: list(one.outputs[0].token_ids) for index, one in enumerate(outputs)}
            asyncio.run(measure(llm, run, good, bad, asked))


if __name__ == "__main__":
    main()
