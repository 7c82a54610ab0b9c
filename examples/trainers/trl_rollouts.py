"""TRL's GRPOTrainer learns on the embedded desktop: rollouts by `managed_vllm.agent`, weights back after each step.

`rollout_func` is TRL's way to leave the rollouts to somebody else: it gets the prompts of a batch, and returns token
ids, logprobs and what else the reward needs. A prompt is a task's id here, and one episode is one completion: answers,
and between them, with `env_mask` 0, what the desktop showed. No GPU is needed: the weights go to the server through
shared memory (`weight_sync_client`), not by NCCL, so that `use_vllm` stays off.

`DesktopTools` is the other way, `environment_factory=DesktopTools`: TRL asks the model itself, and the desktop is
tools. The model must be one that calls tools, which the demo model is not.

    pip install trl
    python examples/trainers/trl_rollouts.py [STEPS]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from managed_vllm import ManagedVLLM, demo
from managed_vllm.agent import AgentFormat, Limits, StreamingTaskScheduler, Task
from managed_vllm.agent.actions import Action, Click, Finished, Scroll, Type
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
from managed_vllm.agent.export import samples_of
from managed_vllm.agent.format import UITarsParser
from managed_vllm.agent.prompting import Chat

CONVERSATION = AgentFormat(Chat(prompt="", show_screenshot=False), UITarsParser("relative1000"))
"""As the demo model understands it, with all former turns, so that each prompt goes on where the last answer ended."""


def rollouts(llm: ManagedVLLM, tasks: Iterable[Task]) -> Callable[[list[str], Any], dict[str, list[Any]]]:
    """A `rollout_func` that plays the tasks whose ids are the prompts."""
    known = {task.id: task for task in tasks}

    def play(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        wanted = list(dict.fromkeys(prompts))
        scheduler = StreamingTaskScheduler(
            llm,
            DesktopEnvironment,
            n=len(prompts) // len(wanted),  # TRL repeats each prompt `num_generations` times
            sampling_params={"temperature": trainer.temperature, "max_tokens": 64},
            limits=Limits(max_steps=8),
            agent=CONVERSATION,
        )
        played = defaultdict(list)
        for trajectory in scheduler.run_all([known[one] for one in wanted]):
            if trajectory.failure is not None:
                raise RuntimeError(str(trajectory.failure))  # TRL takes a completion for each prompt, or none
            played[trajectory.task.id].append(trajectory)
        found: dict[str, list[Any]] = defaultdict(list)
        for prompt in prompts:
            trajectory = played[prompt].pop()
            *_, sample = samples_of(trajectory, "trajectory")
            found["prompt_ids"].append(sample.prompt_ids)
            found["completion_ids"].append(sample.response_ids)
            found["logprobs"].append(sample.logprobs)
            found["env_mask"].append(sample.mask)
            found["success"].append(trajectory.reward)
            found["weight_version"].append(sample.last.weight_version)
        return dict(found)

    return play


def success(success: list[float], **_: Any) -> list[float]:
    """TRL's reward function; what `rollouts` returned beside the ids comes by name."""
    return success


class SendWeights(transformers.TrainerCallback):
    """After each step of the optimizer the server has its weights."""

    def __init__(self, llm: ManagedVLLM) -> None:
        self._client = llm.engine.weight_sync_client()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._client.send(model.named_parameters(), version=f"step-{state.global_step}")


class DesktopTools:
    """For `environment_factory=`: its public methods are the tools. Each row of the dataset has a `task`, a number."""

    def __init__(self) -> None:
        self._desktop = DesktopEnvironment()

    def reset(self, task: int, **_: Any) -> str | None:
        """TRL adds it to the prompt."""
        (one,) = desktop_tasks(task + 1)[task:]
        return asyncio.run(self._desktop.reset(one)).text

    def click(self, x: int, y: int) -> str:
        """Clicks a point.

        Args:
            x: thousandths of the screen's width.
            y: thousandths of its height.

        Returns:
            The screen after it.
        """
        return self._act(Click(x * self._desktop.width / 1000, y * self._desktop.height / 1000))

    def type(self, text: str) -> str:
        """Types into the field that was clicked last.

        Args:
            text: what to type.

        Returns:
            The screen after it.
        """
        return self._act(Type(text))

    def scroll(self, direction: str) -> str:
        """Scrolls the page.

        Args:
            direction: "up" or "down".

        Returns:
            The screen after it.
        """
        return self._act(Scroll("up" if direction == "up" else "down"))

    def finished(self) -> str:
        """Says that the task is done.

        Returns:
            The screen after it.
        """
        return self._act(Finished())

    def get_reward(self) -> float:
        """TRL asks once, at the end."""
        return asyncio.run(self._desktop.evaluate())

    def _act(self, action: Action) -> str:
        return asyncio.run(self._desktop.step(action)).observation.text or ""


def main(steps: int) -> None:
    tasks = desktop_tasks(64)
    small: dict[str, Any] = {"dtype": "float32", "for_training": True}
    with ManagedVLLM("demo", keep_alive=0, **small) as llm, tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            num_generations=4,
            learning_rate=1e-5,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            str(demo.weights_path()),
            reward_funcs=success,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": task.id} for task in tasks]),
            rollout_func=rollouts(llm, tasks),
            callbacks=[SendWeights(llm)],
        )
        trainer.train()
        print(f"the server has {llm.engine.weights().version}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
