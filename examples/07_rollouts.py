"""Rollouts in an environment of your own: each at its own pace, kept in a folder, resumed when this is run again.

    python examples/07_rollouts.py [FOLDER]

An environment is a class with four methods. This one is a screen in words, as the demo model knows it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from managed_vllm import ManagedVLLM, demo
from managed_vllm.agent import Limits, Observation, RunStore, StepResult, StreamingTaskScheduler, Task, embedded
from managed_vllm.agent.actions import Action, Click


class Buttons:
    """A screen of buttons, of which one is to be clicked. Clicks are points of a 1000 x 1000 screen."""

    async def reset(self, task: Task) -> Observation:
        buttons = tuple(demo.Button(label, x, y) for label, x, y in task.data["buttons"])
        self.screen = demo.Screen(buttons, task.data["goal"])
        return Observation(text=self.screen.prompt(), instruction=self.screen.task)

    async def step(self, action: Action) -> StepResult:
        if isinstance(action, Click):
            self.screen = self.screen.after_click(round(action.x), round(action.y))
        return StepResult(Observation(text=self.screen.prompt()))

    async def evaluate(self) -> float | None:
        return float(self.screen.done)

    async def close(self) -> None:
        """Nothing to give back."""


TASKS = [
    Task("ok", data={"goal": "OK", "buttons": [["Cancel", 45, 77], ["OK", 197, 525], ["Help", 800, 600]]}),
    Task("save", data={"goal": "Save", "buttons": [["Save", 310, 40], ["Open", 20, 900]]}),
    Task("buy", data={"goal": "Buy", "buttons": [["Cart", 500, 500], ["Buy", 640, 360], ["Home", 10, 10]]}),
]


def main(folder: Path) -> None:
    with ManagedVLLM("demo") as llm, RunStore.create(folder, {"model": llm.model}) as store:
        scheduler = StreamingTaskScheduler(
            llm,
            Buttons,
            n=4,
            sampling_params={"temperature": 0.5, "max_tokens": 64},
            limits=Limits(max_steps=4),
            agent=embedded(),
            store=store,
        )
        for trajectory in scheduler.run_all(TASKS):
            said = trajectory.steps[-1].response.rpartition("Action: ")[2]
            print(
                f"{trajectory.task.id:5} #{trajectory.rollout}  {trajectory.reward}  {trajectory.stop_reason}  {said}"
            )
        print(store.summary())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary) / "run")
