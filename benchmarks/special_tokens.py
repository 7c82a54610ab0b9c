"""What special tokens in the history are worth: 15 turns on the real vLLM, with and without them.

    python benchmarks/special_tokens.py                      # two minutes: one server of a random vision-language model

UI-TARS writes a point as `<|box_start|>(x,y)<|box_end|>`. A server that skips special tokens in the text of its answers
gives `(x,y)`, and the next prompt, which is made from that text, differs from what was sampled: the newest answer is
prefilled again from its first box on, and the turns of a trajectory don't join to one training sample. A random model
stands for UI-TARS; its answers are held to a special token and a word, in random order. All of the small screenshots
stay in the prompt (`max_images`), as otherwise the images that leave the window would hide the effect.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from managed_vllm import ManagedVLLM
from managed_vllm.agent import AgentFormat, Limits, Observation, RunStore, StepResult, StreamingTaskScheduler, Task
from managed_vllm.agent.actions import Click, ParsedResponse
from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.export import export
from managed_vllm.agent.prompting import Chat
from managed_vllm.demo.random_vlm import make_random_vlm
from managed_vllm.errors import ExportError

SIDE = 112
SPECIAL, WORD = "<|vision_pad|>", "click"


class Pictures:
    """A new picture after each step."""

    async def reset(self, task: Task) -> Observation:
        self.seed, self.turn = int(task.id), 0
        return self.seen()

    def seen(self) -> Observation:
        file = io.BytesIO()
        color = (self.seed * 37 % 256, self.turn * 16 % 256, 90)
        Image.new("RGB", (SIDE, SIDE), color).save(file, "PNG")
        return Observation(file.getvalue())

    async def step(self, action: Any) -> StepResult:
        self.turn += 1
        return StepResult(self.seen())

    async def evaluate(self) -> float:
        return 1.0

    async def close(self) -> None:
        pass


def cache_counters(llm: ManagedVLLM) -> tuple[float, float]:
    """Tokens that were looked up in the prefix cache, and found there, since the server started."""
    url = llm.base_url.removesuffix("/v1")
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {llm.api_key}"}).text
    found = {
        name: sum(float(value) for value in re.findall(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", text, re.M))
        for name in ("queries", "hits")
    }
    return found["queries"], found["hits"]


def only(key: tuple[str, int]) -> Callable[[AttemptEntry], bool]:
    """Chooses one rollout."""
    return lambda entry: entry.key == key


def measure(
    llm: ManagedVLLM, folder: Path, *, skip: bool, tasks: int, turns: int, max_images: int, tokens: int
) -> dict[str, Any]:
    """A run with special tokens skipped in texts, or kept."""
    ids = [llm.client.tokenize(word)[-1] for word in (SPECIAL, WORD)]
    sampling = {
        **{
            "temperature": 1.0,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            "allowed_token_ids": ids,
        },
        "skip_special_tokens": skip,
    }
    agent = AgentFormat(Chat(prompt="{instruction}"), lambda answer, size: ParsedResponse("", (Click(1.0, 1.0),)))
    before = cache_counters(llm)
    with RunStore.create(folder, {"skip": skip}) as store:
        scheduler = StreamingTaskScheduler(
            llm,
            Pictures,
            max_concurrency=4,
            sampling_params=sampling,
            limits=Limits(max_steps=turns, max_images=max_images),
            agent=agent,
            store=store,
        )
        # Other pictures each time, so that the runs share nothing in the cache.
        found = scheduler.run_all([Task(str(number + 100 * skip), "Go on.") for number in range(tasks)])
        joined = samples = 0
        for trajectory in found:
            with tempfile.TemporaryDirectory() as out:
                try:
                    report = export(store, "verl", Path(out) / "x", per="trajectory", choose=only(trajectory.key))
                except ExportError:
                    samples += len(trajectory.steps)
                else:
                    samples += report.samples
                    joined += report.samples == 1
    after = cache_counters(llm)
    prompts = [len(step.prompt_token_ids) for one in found for step in one.steps]
    return {
        "special tokens": "skipped" if skip else "kept",
        "turns": len(prompts),
        "prefix-cache hit rate": round((after[1] - before[1]) / (after[0] - before[0]), 3),
        "prompt tokens per turn": round(sum(prompts) / len(prompts), 1),
        "prefilled per turn": round((after[0] - before[0] - after[1] + before[1]) / len(prompts), 1),
        "trajectories that join": f"{joined} of {len(found)}",
        "samples per trajectory": round(samples / len(found), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--max-images", type=int, default=15)
    parser.add_argument("--answer-tokens", type=int, default=12)
    parser.add_argument("--model", help="a vision-language model; without it a random one is made")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = given.model or str(make_random_vlm(folder / "model"))
        with ManagedVLLM(
            model,
            keep_alive=0,
            progress=False,
            limit_mm_per_prompt={"image": given.max_images},
            max_model_len=8192,
            enforce_eager=True,
            kv_cache_memory_bytes=2**28,
        ) as llm:
            for skip in (True, False):
                found = measure(
                    llm,
                    folder / f"run-{skip}",
                    skip=skip,
                    tasks=given.tasks,
                    turns=given.turns,
                    max_images=given.max_images,
                    tokens=given.answer_tokens,
                )
                print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
