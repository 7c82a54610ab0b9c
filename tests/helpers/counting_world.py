"""A small world for tests of rollouts: press "next" so many times, then say finished; and it misbehaves on command.

The screen shows how many are left, as text and as a drawn picture. `right` is the model that plays it: it answers what
is right, from the words alone.
"""

from __future__ import annotations

import asyncio
import functools
import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from acting_server import text_of
from processes import HANG_S

from managed_vllm.agent import Observation, StepResult, Task
from managed_vllm.agent.actions import Action, Click, Finished

SIZE = (320, 200)
BUTTON = (100.0, 60.0)


@functools.cache
def picture(left: int, mark: str = "") -> bytes:
    """A screenshot, another one for each number and mark."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, (230, 230, 240))
    pen = ImageDraw.Draw(image)
    pen.rectangle((BUTTON[0] - 30, BUTTON[1] - 15, BUTTON[0] + 30, BUTTON[1] + 15), fill=(90, 140, 220))
    pen.text((10, 150), f"{left} left {mark}", fill=(0, 0, 0))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def right(messages: list[dict[str, Any]]) -> str:
    """The right answer, in UI-TARS notation with absolute coordinates."""
    left = int(re.findall(r"(\d+) left", text_of(messages[-1]))[-1])
    if left == 0:
        return "Thought: All done.\nAction: finished(content='done')"
    return f"Thought: {left} left.\nAction: click(start_box='({BUTTON[0]:g},{BUTTON[1]:g})')"


Fault = Callable[["CountingWorld", str], Any]
"""Called before each call with its name; may raise, or return a coroutine that is awaited (and may hang)."""


class CountingWorld:
    """`task.data["presses"]` presses are needed. `log` has all calls of all worlds of a `Worlds`."""

    def __init__(self, fault: Fault | None = None, worlds: Worlds | None = None) -> None:
        self.fault = fault
        self.worlds = worlds or Worlds()
        self.number = len(self.worlds.made)
        self.task: Task | None = None
        self.left = 0
        self.said_finished = False
        self.closed = False
        self.steps = 0
        self.worlds.made.append(self)

    async def _may(self, call: str) -> None:
        self.worlds.calls[call] += 1
        self.worlds.log.append((self.number, call))
        if self.fault is not None:
            wait = self.fault(self, call)
            if wait is not None:
                await wait

    def seen(self) -> Observation:
        mark = "" if self.task is None else self.task.id
        return Observation(picture(self.left, mark), f"{self.left} left", extras={"world": self.number})

    async def reset(self, task: Task) -> Observation:
        self.task, self.said_finished, self.steps = task, False, 0
        self.left = int(task.data.get("presses", 2))
        await self._may("reset")
        return self.seen()

    async def step(self, action: Action) -> StepResult:
        self.steps += 1
        await self._may("step")
        if isinstance(action, Finished):
            self.said_finished = True
            return StepResult(Observation(), terminated=True)
        if isinstance(action, Click) and abs(action.x - BUTTON[0]) < 30 and abs(action.y - BUTTON[1]) < 15:
            self.left = max(0, self.left - 1)
        return StepResult(self.seen(), info={"left": self.left})

    async def evaluate(self) -> float | None:
        await self._may("evaluate")
        return float(self.left == 0 and self.said_finished)

    async def close(self) -> None:
        await self._may("close")
        self.closed = True


class Worlds:
    """Makes worlds, and remembers them."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.made: list[CountingWorld] = []
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[int, str]] = []
        self.fault = fault

    def __call__(self) -> CountingWorld:
        return CountingWorld(self.fault, self)


def tasks(count: int, presses: int | Callable[[int], int] = 2) -> list[Task]:
    of = presses if callable(presses) else lambda _: presses
    return [Task(f"task-{number:03}", "Press next until none is left.", data={"presses": of(number)})
            for number in range(count)]  # fmt: skip


def hang() -> Any:
    """Something that is never over."""
    return asyncio.Event().wait()


async def until(condition: Callable[[], Any], timeout_s: float = HANG_S) -> None:
    """Waits, on the event loop, until the condition holds; fails after the time-out."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it may be about anything
            await asyncio.sleep(0.005)
