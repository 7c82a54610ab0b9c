"""The embedded desktop: a drawn window of buttons and text fields on which the demo model acts, over several steps.

It needs no virtual machine, no browser and no display, so that rollouts can be tried, tested and taught anywhere:

    environment = DesktopEnvironment()
    for task in desktop_tasks(10):
        observation = await environment.reset(task)

Its rules are those of `managed_vllm.demo.screen.World`, of which this module is the picture and the mouse:

- An observation is a PNG of the window, and the same in words, as the demo model reads it (`Observation.text`).
- A left click has an effect on a button and on a field, where it selects all. Typing replaces what is selected,
  scrolling shows the other page where there is one. All else does nothing, and `StepResult.info` says why.
- The reward is 1.0 if the goals were reached in their order and the model then said `Finished`, else 0.0.

It draws with Pillow, imported at the first `reset`. The same task and actions give the same bytes in any process with
the same Pillow. A step takes some milliseconds (640x400: 4 ms on one core), which it does not leave the event loop for.
"""

from __future__ import annotations

import functools
import io
import math
import random
from collections.abc import Sequence
from typing import Any

from managed_vllm.agent.actions import (
    Action,
    Button,
    CallUser,
    Click,
    Finished,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.agent.types import Observation, StepResult, Task
from managed_vllm.demo import screen as demo
from managed_vllm.errors import EnvironmentFailedError

KINDS = tuple(demo.KINDS)
"""Every kind of task, by name: see `managed_vllm.demo.screen.KINDS`."""

ELEMENTS = range(3, 9)
"""How many elements a page has."""

MAX_TYPED = 64
"""Characters that a text field takes; what is typed beyond that is lost, as `info` says."""

# Thousandths of the window, like all that follows: elements lie on a grid with some play, so that none overlap.
_COLUMNS = (170, 480, 790)
_ROWS = (236, 426, 616, 806)
_PLAY_X, _PLAY_Y = 32, 18
_BUTTON = (200, 96)
_FIELD = (240, 84)
_TITLE_BOTTOM, _STATUS_TOP = 100, 920

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels; right and bottom are just outside."""

Color = tuple[int, int, int]


# -- tasks -------------------------------------------------------------------------------------------------------------


def desktop_tasks(count: int, *, seed: int = 0, kinds: Sequence[str] | None = None) -> list[Task]:
    """`count` tasks, the kinds taking turns.

    A task depends on the seed, its number and its kind alone. Its `data` is all that the environment needs.

    Args:
        count: how many.
        seed: of the random numbers. It stands in the ids unless it is 0.
        kinds: some of `KINDS`; None: those that the demo model does reliably, `managed_vllm.demo.screen.LEARNT`.

    Raises:
        ValueError: no such kind, none at all, or a negative count.
    """
    names = demo.LEARNT if kinds is None else tuple(kinds)
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"no such kinds of desktop tasks: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if count < 0 or not names:
        raise ValueError(f"can't make {count} tasks of {len(names)} kinds")
    tasks = []
    for number in range(count):
        kind = names[number % len(names)]
        world = _random_world(random.Random(f"desktop {seed} {number} {kind}"), kind)
        name = f"desktop-{number:04}-{kind}" if seed == 0 else f"desktop-s{seed}-{number:04}-{kind}"
        tasks.append(Task(name, world.screen().task, seed=seed, data={"kind": kind, **_to_data(world)}))
    return tasks


def _random_world(rng: random.Random, kind: str) -> demo.World:
    points = [(x + rng.randint(-_PLAY_X, _PLAY_X), y + rng.randint(-_PLAY_Y, _PLAY_Y)) for x in _COLUMNS for y in _ROWS]
    return demo.random_world(rng, kind, elements=rng.choice(ELEMENTS), points=points)


def _to_data(world: demo.World) -> dict[str, Any]:
    """As plain JSON values: a button is `[label, x, y]`, a field `[label, x, y, content]`, a goal `[label, text]`."""
    pages = [[_element_to_data(element) for element in page] for page in world.pages]
    return {"pages": pages, "goals": [[goal.label, goal.text] for goal in world.goals]}


def _element_to_data(element: demo.Element) -> list[Any]:
    place = [element.label, element.x, element.y]
    return [*place, element.content] if isinstance(element, demo.TextField) else place


def world_of(task: Task) -> demo.World:
    """The pages and goals of a task: those in its data, or drawn by its seed where it has none.

    Raises `KeyError`, `TypeError` or `ValueError`: the task is none for a desktop.
    """
    if not task.data and task.seed is not None:
        rng = random.Random(f"desktop {task.seed}")
        return _random_world(rng, rng.choice(demo.LEARNT))
    data = task.data
    pages = tuple(tuple(_element_from_data(element) for element in page) for page in data["pages"])
    return demo.World(pages, tuple(demo.Goal(label, text) for label, text in data["goals"]))


def _element_from_data(data: Sequence[Any]) -> demo.Element:
    return demo.Button(*data) if len(data) == 3 else demo.TextField(*data)


def oracle(observation: Observation) -> str:
    """The right answer to an observation of the desktop, as UI-TARS would give it, coordinates in thousandths.

    Raises:
        ValueError: the observation's text is no screen.
    """
    return demo.read_screen(observation.text or "").expected_answer()


# -- the environment ---------------------------------------------------------------------------------------------------


class DesktopEnvironment:
    """An `Environment` (managed_vllm.agent.environment): a window that is drawn.

    Args:
        width, height: of the screenshots, in pixels; at least 320 x 200, so that words can be read.

    Raises:
        ValueError: it is smaller.
    """

    def __init__(self, *, width: int = 640, height: int = 400) -> None:
        if width < 320 or height < 200:
            raise ValueError(f"a desktop needs at least 320x200 pixels, not {width}x{height}")
        self.width = width
        self.height = height
        self._world: demo.World | None = None
        self._finished = False
        self._seen = Observation()
        self._closed = False

    @property
    def world(self) -> demo.World:
        """The state, for those who want to look behind the screen."""
        if self._world is None or self._closed:
            state = "is closed" if self._closed else "has no task yet: call reset(task) first"
            raise EnvironmentFailedError(f"this desktop {state}")
        return self._world

    async def reset(self, task: Task) -> Observation:
        """Begins a task of `desktop_tasks`; without `data`, one that is drawn with the task's seed.

        Raises:
            EnvironmentFailedError: the environment is closed, or the task is none for a desktop.
        """
        if self._closed:
            raise EnvironmentFailedError("this desktop is closed: make a new one")
        try:
            self._world = world_of(task)
        except (KeyError, TypeError, ValueError) as error:
            raise EnvironmentFailedError(
                f"task {task.id!r} is none for the desktop ({type(error).__name__}: {error}); make its tasks with "
                "desktop_tasks(), or give one a seed and no data"
            ) from error
        self._finished = False
        self._seen = self._observe()
        return self._seen

    async def step(self, action: Action) -> StepResult:
        """Carries an action out.

        `info["effect"]` says what it did; it is None where that was nothing, and `info["reason"]` says why.
        """
        effect, reason = self._act(action)
        if effect is not None:
            self._seen = self._observe()
        info = {"effect": effect, "reason": reason} if reason else {"effect": effect}
        return StepResult(self._seen, terminated=self._finished, info=info)

    async def evaluate(self) -> float:
        """1.0 or 0.0."""
        return 1.0 if self.world.achieved and self._finished else 0.0

    async def close(self) -> None:
        """There is nothing to give back; nothing else may be called afterwards."""
        self._closed = True

    # -- what actions do -----------------------------------------------------------------------------------------------

    def _act(self, action: Action) -> tuple[str | None, str]:
        """Returns the effect (None: none), and why there was none or not the whole of it."""
        world = self.world
        if self._finished:
            return None, "the episode is over"
        match action:
            case Click(x, y, Button.LEFT, 1):
                return self._click(x, y)
            case Click():
                return None, "only single clicks of the left button have an effect"
            case Type(text):
                return self._type(text)
            case Scroll(direction):
                after = world.scroll(direction)
                if after is world:
                    return None, f"the page does not scroll {direction}"
                self._world = after
                return f"scrolled {direction}", ""
            case Finished():
                self._finished = True
                return "finished", ""
            case Wait():
                return None, "nothing happens by itself here"
            case CallUser():
                return None, "there is no user"
            case _:  # hotkeys, drags, formats of the caller's own, and what is no action at all
                return None, f"{type(action).__name__} does nothing here"

    def _click(self, x: float, y: float) -> tuple[str | None, str]:
        for element in self.world.elements:
            left, top, right, bottom = self.box_of(element)
            if left <= x < right and top <= y < bottom:
                self._world = self.world.click(element.label)
                return f'clicked "{element.label}"', ""
        return None, f"there is nothing to click at ({x:g}, {y:g})"

    def _type(self, text: str) -> tuple[str | None, str]:
        kept = _one_line(text)
        if self.world.focus is None:
            return None, "no text field has the focus: click one first"
        if not kept:
            return None, "there is nothing to type"
        self._world = self.world.type(kept)
        shortened = "" if kept == text else f"a text field takes one line of {MAX_TYPED} characters"
        return f'typed "{kept}"', shortened

    # -- what is seen --------------------------------------------------------------------------------------------------

    def _observe(self) -> Observation:
        screen = self.world.screen()
        return Observation(self._draw(screen), screen.prompt(), screen.task)

    def box_of(self, element: demo.Element) -> Box:
        """What can be clicked of an element; its point is the middle."""
        width, height = _FIELD if isinstance(element, demo.TextField) else _BUTTON
        x, y = element.x * self.width / 1000, element.y * self.height / 1000
        half_width, half_height = width * self.width / 2000, height * self.height / 2000
        return round(x - half_width), round(y - half_height), round(x + half_width), round(y + half_height)

    def _draw(self, screen: demo.Screen) -> bytes:
        drawing = _Drawing(self.width, self.height)
        drawing.bars(self.world, screen.status, finished=self._finished)
        for element in self.world.elements:
            box = self.box_of(element)
            if isinstance(element, demo.TextField):
                focus = self.world.focus == element.label
                drawing.field(box, element.label, element.content, focus=focus)
            else:
                drawing.button(box, element.label, pressed=screen.clicked == element.label)
        return drawing.png()


def _one_line(text: str) -> str:
    """What a text field takes of a text: one line, without control characters, that is valid Unicode."""
    valid = text[: 4 * MAX_TYPED].encode("utf-8", "replace").decode()
    printable = "".join(character if character.isprintable() else " " for character in valid)
    return printable.strip()[:MAX_TYPED]


# -- drawing -----------------------------------------------------------------------------------------------------------

_PAPER = (255, 255, 255)
_DESKTOP = (243, 245, 249)
_TITLE = (38, 56, 92)
_TITLE_TEXT = (240, 244, 252)
_EDGE = (196, 204, 217)
_TEXT = (28, 34, 46)
_FAINT = (96, 106, 124)
_FACE, _FACE_EDGE = (222, 230, 244), (132, 151, 186)
_PRESSED, _PRESSED_EDGE = (188, 206, 238), (58, 98, 172)
_FOCUS = (24, 100, 216)
_TRACK, _THUMB = (226, 231, 239), (150, 162, 184)
_DONE = (26, 122, 66)
_LIGHTS = ((236, 106, 94), (244, 191, 79), (97, 197, 84))

_COMPRESS_LEVEL = 1
"""zlib's for PNG, as in `managed_vllm.request.images`."""


@functools.lru_cache(maxsize=32)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # Pillow carries it


@functools.lru_cache(maxsize=16)
def _background(width: int, height: int) -> Any:
    """What is the same in every picture: the bars, without words."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), _DESKTOP)
    draw = ImageDraw.Draw(image)
    title, status = height * _TITLE_BOTTOM // 1000, height * _STATUS_TOP // 1000
    draw.rectangle((0, 0, width, title - 1), fill=_TITLE)
    radius = title * 3 // 20
    for index, color in enumerate(_LIGHTS):
        x, y = width - title // 2 - index * 3 * radius, title // 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    draw.rectangle((0, status, width, height), fill=_PAPER)
    draw.line((0, status, width, status), fill=_EDGE)
    return image


class _Drawing:
    """A picture of the window, being drawn."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import ImageDraw

        self._image = _background(width, height).copy()
        self._draw = ImageDraw.Draw(self._image)
        self._width, self._height = width, height
        self._size = max(9, min(width * 14 // 640, height * 14 // 400))  # of the letters
        self._radius = self._size // 3

    def png(self) -> bytes:
        file = io.BytesIO()
        self._image.save(file, "PNG", compress_level=_COMPRESS_LEVEL)
        return file.getvalue()

    def bars(self, world: demo.World, status: str, *, finished: bool) -> None:
        """The words of the title bar and of the status line."""
        margin = self._size
        middle = self._height * _TITLE_BOTTOM // 2000
        self._text((margin, middle), "Desktop", _TITLE_TEXT, "lm", self._size + 1)
        middle = self._height * (1000 + _STATUS_TOP) // 2000
        room = self._width - 2 * margin
        if finished:
            self._text((self._width - margin, middle), "finished", _DONE, "rm")
            room -= 6 * self._size
        self._text((margin, middle), self._fitting(status, room), _FAINT, "lm")
        if world.more is not None:
            self._scroll_bar(world.page)

    def button(self, box: Box, label: str, *, pressed: bool) -> None:
        face, edge = (_PRESSED, _PRESSED_EDGE) if pressed else (_FACE, _FACE_EDGE)
        self._frame(box, face, edge, 1)
        self._text(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2), label, _TEXT, "mm")

    def field(self, box: Box, label: str, content: str, *, focus: bool) -> None:
        self._frame(box, _PAPER, _FOCUS if focus else _EDGE, 2 if focus else 1)
        self._text((box[0] + 1, box[1] - self._size // 4), label, _FOCUS if focus else _FAINT, "ls", self._size - 1)
        left, middle = box[0] + self._size // 2, (box[1] + box[3]) // 2
        shown = self._fitting(content, box[2] - left - self._size)
        self._text((left, middle), shown, _TEXT, "lm")
        if focus:  # the caret
            x = left + 2 + math.ceil(_font(self._size).getlength(shown))
            self._draw.line((x, middle - self._size * 5 // 8, x, middle + self._size * 5 // 8), fill=_FOCUS)

    def _scroll_bar(self, page: int) -> None:
        left, right = self._width * 968 // 1000, self._width * 990 // 1000
        top, bottom = self._height * (_TITLE_BOTTOM + 20) // 1000, self._height * (_STATUS_TOP - 20) // 1000
        radius = (right - left) // 2
        self._draw.rounded_rectangle((left, top, right, bottom), radius, fill=_TRACK)
        middle = (top + bottom) // 2
        thumb = (left, middle, right, bottom) if page else (left, top, right, middle)
        self._draw.rounded_rectangle(thumb, radius, fill=_THUMB)

    def _frame(self, box: Box, face: Color, edge: Color, line: int) -> None:
        left, top, right, bottom = box
        self._draw.rounded_rectangle((left, top, right - 1, bottom - 1), self._radius, face, edge, line)

    def _text(self, at: tuple[int, int], text: str, color: Color, anchor: str, size: int | None = None) -> None:
        self._draw.text(at, text, fill=color, font=_font(size or self._size), anchor=anchor)

    def _fitting(self, text: str, width: int) -> str:
        """The text, shortened to a width in pixels."""
        font = _font(self._size)
        if font.getlength(text) <= width:
            return text
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        return text + "…"
