"""OSWorld on any Linux machine, without a VM: its machine server under Xvfb, five tasks, and its own evaluators' word.

    git clone https://github.com/xlang-ai/OSWorld ~/OSWorld
    pip install 'managed-vllm[agent]' pyautogui
    apt-get install --no-install-recommends at-spi2-core dbus-daemon python3-flask python3-lxml python3-numpy \\
        python3-pil python3-pyatspi python3-requests python3-tk python3-xlib scrot xclip xvfb
    OSWORLD_CHECKOUT=~/OSWorld python examples/12_osworld_on_a_virtual_screen.py          # an oracle plays
    OSWORLD_CHECKOUT=~/OSWorld python examples/12_osworld_on_a_virtual_screen.py MODEL [FOLDER]    # a model does

`osworld_machine.py` starts the machine, `osworld_form.py` is the app that runs there. The tasks are in OSWorld's own
form. The oracle knows the answers, in the notation of UI-TARS, and they go the same way as a model's: the parser, the
executor's pyautogui source, OSWorld's server, real clicks and keys. Exit status 1: a reward is not 1.0; 2: something is
missing that it needs, and it says what.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import osworld_machine
from osworld_machine import FORM, SIZE, Machine

from managed_vllm import ManagedVLLM
from managed_vllm.agent import Limits, OSWorldEnvironment, RunStore, StreamingTaskScheduler, Task
from managed_vllm.agent.actions import Finished, parse_ui_tars, smart_resize

FIELD, SAVE, DISCARD, CANVAS = (300, 200), (160, 640), (420, 640), (1400, 200)
"""Within what the form shows, in pixels of the screen."""
PATIENT = Limits(step_timeout_s=120.0)
QUICK: dict[str, Any] = {"pause_s": 0.3, "settle_s": 0.0, "evaluate_settle_s": 0.0, "limits": PATIENT}
"""For apps that say when they are there. `OFFICIAL` in their place waits as long as OSWorld's own runner does."""


# -- what the oracle says, in the words of UI-TARS ---------------------------------------------------------------------


def box(at: tuple[int, int]) -> str:
    """A point of the screen, in pixels of what a model of UI-TARS sees."""
    width, height = smart_resize(SIZE)
    return f"({round(at[0] / SIZE[0] * width)},{round(at[1] / SIZE[1] * height)})"


def said(function: str, at: tuple[int, int], more: str = "") -> str:
    return f"Thought: next\nAction: {function}(start_box='{box(at)}'{more})"


def typed(text: str) -> str:
    return f"Action: type(content={text!r})"


def pressed(keys: str) -> str:
    return f"Action: hotkey(key={keys!r})"


# -- the tasks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted:
    """A task, what the oracle says before `finished()`, and what is then to be in a file: all of it, or these lines."""

    instruction: str
    answers: tuple[str, ...]
    saved: str | None = None
    events: tuple[str, ...] = ()

    def evaluator(self, folder: Path) -> dict[str, Any]:
        """As OSWorld has it."""
        file = folder / ("events" if self.saved is None else "saved")
        right = {"expected": self.saved} if self.saved is not None else {"include": list(self.events)}
        return {
            "func": "check_include_exclude" if self.saved is None else "exact_match",
            "result": {"type": "vm_command_line", "command": ["cat", str(file)]},
            "expected": {"type": "rule", "rules": right},
        }

    def is_done(self, folder: Path) -> bool:
        """Whether the app has taken note of it all: it does so when it comes to it."""
        if self.saved is not None:
            return (folder / "saved").exists()
        noted = (folder / "events").read_text() if (folder / "events").exists() else ""
        return all(event in noted for event in self.events)


WRITING = said("click", FIELD)
SAVING = said("click", SAVE)
FIVE = {
    "write-two-lines": Scripted(
        'Write "Meeting at 10" and below it "Room 4" into the text field, and save.',
        (WRITING, typed("Meeting at 10\nRoom 4"), SAVING),
        "Meeting at 10\nRoom 4",
    ),
    "correct-a-word": Scripted(
        'Write "finals" into the text field, take back the last letter, and save.',
        (WRITING, typed("finals"), pressed("backspace"), SAVING),
        "final",
    ),
    "move-a-word": Scripted(
        'Write "ab" into the text field, cut it out, write "c", paste what you have cut out, and save.',
        (WRITING, typed("ab"), pressed("shift home"), pressed("ctrl x"), typed("c"), pressed("ctrl v"), SAVING),
        "cab",
    ),
    "draw-a-line": Scripted(
        "Draw a line on the white canvas, from the upper left to the lower right.",
        (said("drag", (1360, 130), f", end_box='{box((1600, 460))}'"),),
        events=('["press", 1, ', '["release", 1, '),
    ),
    "scroll-and-open": Scripted(
        "Scroll down on the white canvas, then double-click it.",
        (said("scroll", CANVAS, ", direction='down'"), said("left_double", CANVAS)),
        events=('["press", 5, ', '["double", 1, '),
    ),
}


def config(folder: Path, evaluator: dict[str, Any], *, after_s: int = 0) -> dict[str, Any]:
    """What OSWorld's file of a task has: the form is started, `after_s` seconds later, and writes into that folder."""
    start = f"sleep {after_s}; exec python {FORM} {folder}"
    return {
        "config": [{"type": "launch", "parameters": {"command": ["bash", "-c", start]}}],
        "evaluator": evaluator,
    }


Given = Mapping[str, tuple[Task, Path]]
"""Tasks by their names, each with its folder on the machine."""


def tasks(home: Path) -> Given:
    """The five, each with a folder of its own on the machine."""
    made = {}
    for name, script in FIVE.items():
        folder = Path(tempfile.mkdtemp(dir=home))
        data = {**config(folder, script.evaluator(folder)), "id": name, "instruction": script.instruction}
        made[name] = Task(name, script.instruction, data=data), folder
    return made


# -- playing them ------------------------------------------------------------------------------------------------------


async def oracle(machine: Machine, given: Given) -> dict[str, float | None]:
    """The rewards of the five."""
    rewards = {}
    env = OSWorldEnvironment(osworld_machine.desktop_env, arguments=machine.arguments, **QUICK)
    try:
        for name, (task, folder) in given.items():
            await env.reset(task)
            await asyncio.to_thread(osworld_machine.until, (folder / "shown").exists, "the form is on the screen")
            for answer in FIVE[name].answers:
                for action in parse_ui_tars(answer, SIZE).actions:
                    await env.step(action)
            await asyncio.to_thread(osworld_machine.until, partial(FIVE[name].is_done, folder), "the app has noted it")
            await env.step(Finished())
            rewards[name] = await env.evaluate()
            print(f"{name:16} {rewards[name]}", flush=True)
    finally:
        await env.close()
    return rewards


def model(llm: Any, machine: Machine, given: Given, out: Path) -> dict[str, float | None]:
    """The rewards of a model that speaks UI-TARS; its run is in the folder `out`."""
    with RunStore.create(out, resume=False) as store:
        scheduler = StreamingTaskScheduler(
            llm,
            lambda: OSWorldEnvironment(
                osworld_machine.desktop_env, arguments=machine.arguments, **{**QUICK, "settle_s": 5.0}
            ),
            max_concurrency=1,  # there is one screen
            sampling_params={"temperature": 0.0},
            limits=Limits(max_steps=15, step_timeout_s=120.0),
            store=store,
        )
        rewards = {}
        for trajectory in scheduler.run_all([task for task, _ in given.values()]):
            rewards[trajectory.task.id] = trajectory.reward
            print(f"{trajectory.task.id:16} {trajectory.reward} {trajectory.failure or ''}", flush=True)
    print(f"look:  managed-vllm view {out}")
    return rewards


def main(words: Sequence[str]) -> int:
    missing = osworld_machine.missing()
    if missing is not None:
        print(f"OSWorld's machine can't be started here; what is missing: {missing}", file=sys.stderr)
        return 2
    with osworld_machine.machine() as machine:
        given = tasks(machine.folder)
        if not words:
            rewards = asyncio.run(oracle(machine, given))
        else:
            out = Path(words[1]) if len(words) > 1 else Path("osworld-run")
            with ManagedVLLM(words[0]) as llm:
                rewards = model(llm, machine, given, out)
    return 0 if set(rewards.values()) == {1.0} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
