"""The demo model's world: a screen of labelled elements as text, a task, and the one right action.

This is the only definition of the format. The trainer, the embedded desktop (`agent/environments/desktop.py`),
`managed-vllm demo`, the tests and the examples all build their screens here, because a model this small understands
exactly what it was trained on.

- `Screen`: what is seen in one turn. It knows the right answer.
- `World`: what lies behind it, over several turns: both pages, what was done, and whether that was the task.

    >>> screen = Screen((Button("Cancel", 45, 77), Button("OK", 197, 525)), goal="OK")
    >>> print(screen.prompt())
    Screen:
    Cancel(45,77)
    OK(197,525)
    Status: ready
    Task: click "OK"
    >>> screen.expected_action()
    "click(start_box='(197,525)')"
    >>> screen.after_click(197, 525).expected_action()
    "finished(content='done')"

A text field shows its content, a page that can be scrolled says where to, and there may be a second goal:

    >>> elements = (Button("OK", 197, 525), TextField("City", 120, 300, "red"))
    >>> screen = Screen(elements, Goal("City", "blue"), then=Goal("Save"), clicked="City", more="down")
    >>> print(screen.prompt())
    Screen:
    OK(197,525)
    City(120,300)=red
    More: down
    Status: clicked "City"
    Task: type "blue" into "City" then click "Save"
    >>> screen.expected_action()
    "type(content='blue')"
    >>> print(screen.after_type("blue").expected_answer())
    Thought: typed "blue", next Save is not here.
    Action: scroll(start_box='(500,500)', direction='down')

What is right follows from the status, the task and the elements that are seen, with no history: the status says what
had an effect last, and scrolling leaves it alone. If it is a part of the task, what comes after it is next; if it is
not, the task begins anew. What a field contains does not count: a click into it selects all, typing replaces that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

# fmt: off
LABELS: tuple[str, ...] = (
    "OK", "Cancel", "Save", "Open", "Close", "Next", "Back", "Submit", "Search",
    "Login", "Logout", "Help", "Edit", "Delete", "Copy", "Paste", "Undo", "Redo",
    "Print", "Send", "Reply", "Yes", "No", "Apply", "Reset", "Start", "Stop",
    "Play", "Pause", "Buy", "Cart", "Home", "Menu", "Share", "Like", "Post",
    "Add", "Remove", "Upload", "Download", "Refresh", "Sort", "Filter", "Export", "Import",
    "Accept", "Decline", "Continue", "Finish", "Settings", "Profile", "Inbox", "Archive", "Star",
    "Zoom", "Cut", "Find", "Replace", "Rename", "Move", "Sync",
)
"""Every label of a button that the model knows. On others it guesses."""

FIELDS: tuple[str, ...] = (
    "Name", "Email", "City", "Street", "Country", "Phone", "Title", "Subject", "Color", "Animal",
    "Company", "Comment", "Topic", "Tag", "User", "Team", "Room", "Food", "Plant", "Note",
)
"""Every label of a text field that it knows."""

WORDS: tuple[str, ...] = (
    "blue", "red", "green", "gold", "black", "white", "pink", "brown", "apple", "pear",
    "lemon", "plum", "bread", "rice", "tea", "milk", "cat", "dog", "horse", "bird",
    "fish", "lion", "oak", "rose", "fern", "river", "lake", "hill", "sun", "moon",
    "rain", "snow", "wind", "north", "south", "east", "west", "paris", "rome", "oslo",
)
"""Every word that it can type."""
# fmt: on

COORDINATES = range(1000)
"""Both coordinates, as in UI-TARS: thousandths of the screen's width and height."""

BUTTONS = range(2, 9)
"""How many elements a screen had in training: 2 to 8. Twelve still work nearly always."""

More = Literal["up", "down"]
"""Where a page that does not show everything can be scrolled to. There are two pages, so that it is one of them."""


# -- what a screen consists of -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Button:
    """A label and the one point (thousandths of the screen) at which it can be clicked."""

    label: str
    x: int
    y: int

    def __post_init__(self) -> None:
        _check_point("button", self.label, self.x, self.y)

    def __str__(self) -> str:
        return f"{self.label}({self.x},{self.y})"


@dataclass(frozen=True, slots=True)
class TextField:
    """A label, the point at which the field can be clicked, and what is written in it, on one line."""

    label: str
    x: int
    y: int
    content: str = ""

    def __post_init__(self) -> None:
        _check_point("text field", self.label, self.x, self.y)
        if "\n" in self.content:
            raise ValueError(f"text field {self.label!r} has more than one line: {self.content!r}")

    def __str__(self) -> str:
        return f"{self.label}({self.x},{self.y})={self.content}"


Element = Button | TextField


def _check_point(what: str, label: str, x: int, y: int) -> None:
    if x not in COORDINATES or y not in COORDINATES:
        raise ValueError(f"{what} {label!r} is at ({x},{y}), outside of 0 to {COORDINATES[-1]}")


@dataclass(frozen=True, slots=True)
class Goal:
    """Click the element with this label; with a `text`, also type that then."""

    label: str
    text: str | None = None

    def __str__(self) -> str:
        return f'click "{self.label}"' if self.text is None else f'type "{self.text}" into "{self.label}"'

    @property
    def effects(self) -> tuple[str, ...]:
        """What the status says on the way, in this order."""
        clicked = _clicked(self.label)
        return (clicked,) if self.text is None else (clicked, _typed(self.text))


READY = "ready"
"""The status before anything had an effect."""


def _clicked(label: str) -> str:
    return f'clicked "{label}"'


def _typed(text: str) -> str:
    return f'typed "{text}"'


def _check_goals(goals: Sequence[Goal]) -> None:
    """Raises ValueError where the status could not tell how far one is."""
    labels = [goal.label for goal in goals]
    texts = [goal.text for goal in goals if goal.text is not None]
    if len(set(labels)) != len(labels) or len(set(texts)) != len(texts):
        raise ValueError(f"two goals have a label or a text in common: {_joined(goals)}")


def _joined(goals: Sequence[Goal]) -> str:
    return " then ".join(map(str, goals))


@dataclass(frozen=True, slots=True)
class Screen:
    """What the model sees in one turn.

    Attributes:
        buttons: the elements that are seen, text fields among them.
        goal: what to do; a label: click it (a `Goal` without text becomes its label).
        clicked: the element that was clicked last, if that was the last effect (None: it was not).
        then: what to do after that.
        typed: the text that was typed last, if that was the last effect.
        more: where the page can be scrolled to; None: everything is seen.

    Raises:
        ValueError: two elements share a label; a goal or `clicked` is not the label of an element though everything is
            seen; a text is to be typed into a button; two goals have something in common; both `clicked` and `typed`.
    """

    buttons: tuple[Element, ...]
    goal: str | Goal
    clicked: str | None = None
    then: Goal | None = None
    typed: str | None = None
    more: More | None = None

    def __post_init__(self) -> None:
        if isinstance(self.goal, Goal) and self.goal.text is None:
            object.__setattr__(self, "goal", self.goal.label)
        kinds = {element.label: type(element) for element in self.buttons}
        labels = [element.label for element in self.buttons]
        if len(kinds) != len(labels):
            raise ValueError(f"two buttons share a label: {labels}")
        _check_goals(self.goals)
        for goal in self.goals:
            if goal.label not in labels and self.more is None:
                raise ValueError(f"no button {goal.label!r} to click among {labels}")
            if goal.text is not None and kinds.get(goal.label) is Button:
                raise ValueError(f"{goal.label!r} is a button, nothing can be typed into it")
        if self.clicked is not None and self.clicked not in labels and self.more is None:
            raise ValueError(f"no button {self.clicked!r} that was clicked among {labels}")
        if self.clicked is not None and self.typed is not None:
            raise ValueError("either a click or typing had the last effect, not both")

    # -- what is said --------------------------------------------------------------------------------------------------

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What is to be done, in this order."""
        first = Goal(self.goal) if isinstance(self.goal, str) else self.goal
        return (first,) if self.then is None else (first, self.then)

    @property
    def status(self) -> str:
        """`ready`, or what was clicked or typed last."""
        if self.clicked is not None:
            return _clicked(self.clicked)
        return READY if self.typed is None else _typed(self.typed)

    @property
    def task(self) -> str:
        return _joined(self.goals)

    def prompt(self) -> str:
        """The exact text of the user message."""
        more = [] if self.more is None else [f"More: {self.more}"]
        return "\n".join(
            ["Screen:", *map(str, self.buttons), *more, f"Status: {self.status}", f"Task: {self.task}"],
        )

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation for a chat request: one user message."""
        return [{"role": "user", "content": self.prompt()}]

    # -- what is right -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the task is fulfilled, so that the right action is `finished`."""
        return self._next() is None

    @property
    def target(self) -> Element:
        """The element that is to be clicked next; once there is none left, the last one that was.

        Raises:
            LookupError: it is not on the part of the page that is seen.
        """
        wanted = (self._next() or self.goals[-1]).label
        found = self._find(wanted)
        if found is None:
            raise LookupError(f"{wanted!r} is not seen; scroll {self.more}")
        return found

    def expected_action(self) -> str:
        """The right action, in UI-TARS notation."""
        return self._thought_and_action()[1]

    def expected_answer(self) -> str:
        """The whole right answer, with the thought before the action."""
        thought, action = self._thought_and_action()
        return f"Thought: {thought}\nAction: {action}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer ends in the right action. The thought before it is not judged."""
        return answer.rpartition("Action:")[2].strip() == self.expected_action()

    def _thought_and_action(self) -> tuple[str, str]:
        """The thought names what is wanted first: where that is, or that it is not here, is then a look-up.

        What is wanted is one, too, once the status was said again; a single click is simple enough without.
        """
        goals = self.goals
        goal = self._next()
        simple = len(goals) == 1 and goals[0].text is None
        if goal is None:
            thought = f'"{self.clicked}" is clicked.' if simple else f"{self.status}, done."
            return thought, "finished(content='done')"
        before = "" if simple else f"{self.status}, next "
        if goal.text is not None and self.clicked == goal.label:
            return f'{before}type "{goal.text}"', f"type(content='{goal.text}')"
        element = self._find(goal.label)
        if element is None:
            return f"{before}{goal.label} is not here.", f"scroll(start_box='(500,500)', direction='{self.more}')"
        point = f"({element.x},{element.y})"
        return f"{before}{element.label}{point}", f"click(start_box='{point}')"

    def _next(self) -> Goal | None:
        """The first goal that the status does not say to be reached; None: all are."""
        goals = self.goals
        for index, goal in enumerate(goals):
            if self.status == goal.effects[-1]:
                return goals[index + 1] if index + 1 < len(goals) else None
            if self.status in goal.effects:
                return goal
        return goals[0]

    def _find(self, label: str) -> Element | None:
        return next((element for element in self.buttons if element.label == label), None)

    # -- what comes next -----------------------------------------------------------------------------------------------

    def after_click(self, x: int, y: int) -> Screen:
        """The next screen: the first element at exactly this point was clicked; unchanged where there is none."""
        hit = next((element.label for element in self.buttons if (element.x, element.y) == (x, y)), None)
        return self if hit is None else replace(self, clicked=hit, typed=None)

    def after_type(self, text: str) -> Screen:
        """The next screen: the text was typed into the field that was clicked; unchanged where none was.

        Which field has the focus after typing a screen does not say; a `World` knows.
        """
        field = None if self.clicked is None else self._find(self.clicked)
        if not isinstance(field, TextField):
            return self
        return replace(self, buttons=_written(self.buttons, field.label, text), clicked=None, typed=text)


def _written(elements: tuple[Element, ...], label: str, text: str) -> tuple[Element, ...]:
    return tuple(
        replace(element, content=text) if element.label == label and isinstance(element, TextField) else element
        for element in elements
    )


_ELEMENT = r"[^\n]*?\(\d{1,3},\d{1,3}\)(?:=[^\n]*)?"
_GOAL = r'(?:click "[^"\n]*"|type "[^"\n]*" into "[^"\n]*")'
_PROMPT = re.compile(
    rf"Screen:\n(?P<elements>(?:{_ELEMENT}\n)*)(?:More: (?P<more>up|down)\n)?"
    r'Status: (?:ready|clicked "(?P<clicked>[^\n]*)"|typed "(?P<typed>[^\n]*)")\n'
    rf"Task: (?P<goals>{_GOAL}(?: then {_GOAL})?)"
)
_ELEMENT_PARTS = re.compile(r"([^\n]*?)\((\d{1,3}),(\d{1,3})\)(?:=([^\n]*))?\n")
_GOAL_PARTS = re.compile(r'click "([^"\n]*)"|type "([^"\n]*)" into "([^"\n]*)"')


def read_screen(prompt: str) -> Screen:
    """The screen whose `prompt()` this is.

    Raises:
        ValueError: it is no prompt.
    """
    found = _PROMPT.fullmatch(prompt)
    if found is None:
        raise ValueError(f"this is not the text of a screen: {prompt[:200]!r}")
    elements: list[Element] = []
    for label, x, y, content in (match.groups() for match in _ELEMENT_PARTS.finditer(found["elements"])):
        place = label, int(x), int(y)
        elements.append(Button(*place) if content is None else TextField(*place, content))
    goals = [
        Goal(click) if text is None else Goal(field, text)
        for click, text, field in (match.groups() for match in _GOAL_PARTS.finditer(found["goals"]))
    ]
    more: More | None = "up" if found["more"] == "up" else "down" if found["more"] else None
    then = goals[1] if len(goals) == 2 else None
    return Screen(tuple(elements), goals[0], found["clicked"], then=then, typed=found["typed"], more=more)


# -- over several turns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """What lies behind the screens of an episode. An action gives a new world, or the same one if it had no effect.

    Attributes:
        pages: one or two, of which one is seen at a time; every label occurs once.
        goals: one or two.
        page: the index of the one that is seen.
        focus: the label of the field into which is typed; None: no field.
        effects: everything that had an effect, in order: a click as its goal would be, typing as the goal to type this
            text into the field that had the focus. Scrolling is not among them.

    Raises:
        ValueError: a goal can't be reached, or the status could not tell which ones are.
    """

    pages: tuple[tuple[Element, ...], ...]
    goals: tuple[Goal, ...]
    page: int = 0
    focus: str | None = None
    effects: tuple[Goal, ...] = ()

    def __post_init__(self) -> None:
        if len(self.pages) not in (1, 2) or len(self.goals) not in (1, 2) or self.page not in range(len(self.pages)):
            raise ValueError(
                f"a world has one or two pages, of which it shows one, and one or two goals; not page {self.page} of "
                f"{len(self.pages)} and {len(self.goals)} goals"
            )
        # As if all of it were seen: refuses what can't be reached.
        Screen(tuple(element for page in self.pages for element in page), self.goals[0], then=self._then)

    @property
    def _then(self) -> Goal | None:
        return self.goals[1] if len(self.goals) == 2 else None

    @property
    def elements(self) -> tuple[Element, ...]:
        """What is seen now."""
        return self.pages[self.page]

    @property
    def more(self) -> More | None:
        """Where the other page lies."""
        if len(self.pages) == 1:
            return None
        return "up" if self.page else "down"

    def screen(self) -> Screen:
        """What the model sees now."""
        last = self.effects[-1] if self.effects else None
        return Screen(
            self.elements,
            self.goals[0],
            clicked=last.label if last is not None and last.text is None else None,
            then=self._then,
            typed=None if last is None else last.text,
            more=self.more,
        )

    def click(self, label: str) -> World:
        """The element was clicked; nothing if it is not seen. A field gets the focus, a button takes it away."""
        hit = next((element for element in self.elements if element.label == label), None)
        if hit is None:
            return self
        return replace(self, focus=label if isinstance(hit, TextField) else None, effects=(*self.effects, Goal(label)))

    def type(self, text: str) -> World:
        """The text was typed, in place of what was in the field that has the focus; nothing if none has it."""
        if self.focus is None:
            return self
        pages = tuple(_written(page, self.focus, text) for page in self.pages)
        return replace(self, pages=pages, effects=(*self.effects, Goal(self.focus, text)))

    def scroll(self, direction: str) -> World:
        """The other page is seen, if it lies in this direction. The focus stays."""
        return replace(self, page=1 - self.page) if direction == self.more else self

    def act_right(self) -> World:
        """What the right action leads to; the same world once that is `finished`."""
        screen = self.screen()
        name, _, arguments = screen.expected_action().partition("(")
        if name == "click":
            return self.click(screen.target.label)
        if name == "type":
            return self.type(arguments.split("'")[1])
        return self.scroll(str(self.more)) if name == "scroll" else self

    @property
    def achieved(self) -> bool:
        """Whether the goals were reached one after the other, whatever else was done, and what was typed stands there.

        Stricter than what the status says, which can't tell into which field something was typed.
        """
        effects = iter(self.effects)
        in_order = all(goal in effects for goal in self.goals)  # each `in` goes on where the last one stopped
        contents = {e.label: e.content for page in self.pages for e in page if isinstance(e, TextField)}
        return in_order and all(goal.text is None or contents[goal.label] == goal.text for goal in self.goals)


# -- at random ---------------------------------------------------------------------------------------------------------


def random_buttons(rng: random.Random, count: int) -> tuple[Button, ...]:
    """`count` buttons (at most `len(LABELS)`) with different labels at random places."""
    return tuple(Button(label, rng.choice(COORDINATES), rng.choice(COORDINATES)) for label in rng.sample(LABELS, count))


def random_screen(rng: random.Random, *, buttons: int | None = None, done: bool | None = None) -> Screen:
    """A random screen with one button to click. `random_world` makes all the others.

    Args:
        buttons: How many, at least 2; a random number out of `BUTTONS` if None.
        done: Whether the goal was clicked already; if None, it was in a third of the screens. In half of the others a
            wrong button was clicked last.
    """
    shown = random_buttons(rng, rng.choice(BUTTONS) if buttons is None else buttons)
    goal, *others = rng.sample([button.label for button in shown], len(shown))
    if done is None:
        done = rng.random() < 1 / 3
    if done:
        return Screen(shown, goal, clicked=goal)
    return Screen(shown, goal, clicked=others[0] if rng.random() < 1 / 2 else None)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task: what its goals are (`click` or `type`), and whether the page is to be scrolled for them."""

    goals: tuple[Literal["click", "type"], ...]
    scroll: bool = False


KINDS: dict[str, Kind] = {
    "click": Kind(("click",)),
    "type": Kind(("type",)),
    "two_clicks": Kind(("click", "click")),
    "type_then_click": Kind(("type", "click")),
    "click_then_type": Kind(("click", "type")),
    "two_types": Kind(("type", "type")),
    "scroll": Kind(("click",), scroll=True),
    "scroll_type": Kind(("type",), scroll=True),
    "scroll_two_clicks": Kind(("click", "click"), scroll=True),
    "scroll_type_then_click": Kind(("type", "click"), scroll=True),
}
"""Every kind of task, by name: first those on one page, then those with two."""

LEARNT: tuple[str, ...] = tuple(kind for kind in KINDS if kind != "two_types")
"""The kinds that the carried model does reliably: in these, training must reach its target."""


def random_world(
    rng: random.Random, kind: str, *, elements: int | None = None, points: Sequence[tuple[int, int]] | None = None
) -> World:
    """A random world at the beginning of a task.

    Args:
        kind: one of `KINDS`.
        elements: how many a page has, at least 2; a random number out of `BUTTONS` for each page if None.
        points: where on a page elements may be (thousandths), each for one; anywhere if None.

    Raises:
        KeyError: no such kind.
    """
    form = KINDS[kind]
    counts = [rng.choice(BUTTONS) if elements is None else elements for _ in range(2 if form.scroll else 1)]
    total = sum(counts)
    typed = form.goals.count("type")
    fields = min(len(FIELDS), max(typed, _some_fields(rng, total)))
    fields = max(typed, min(fields, total - form.goals.count("click")))
    labels = [*rng.sample(FIELDS, fields), *rng.sample(LABELS, total - fields)]
    words = rng.sample(WORDS, typed + fields)

    # Goals first, so that their places can be chosen: where there is scrolling, one of them is on the second page.
    fields_left, buttons_left = labels[:fields], labels[fields:]
    goals = tuple(
        Goal(fields_left.pop(), words.pop()) if goal == "type" else Goal(buttons_left.pop()) for goal in form.goals
    )
    wanted = [goal.label for goal in goals]
    if form.scroll:
        beyond = rng.choice([wanted[:1], wanted[1:], wanted] if len(wanted) == 2 else [wanted])
        here = [label for label in wanted if label not in beyond]
    else:
        beyond, here = [], wanted
    others = [*fields_left, *buttons_left]
    rng.shuffle(others)
    split = counts[0] - len(here)
    pages = [[*here, *others[:split]], [*beyond, *others[split:]]][: len(counts)]

    def element(label: str, point: tuple[int, int]) -> Element:
        if label not in FIELDS:
            return Button(label, *point)
        return TextField(label, *point, content=words.pop() if rng.random() < 1 / 3 else "")

    placed = []
    for page in pages:
        rng.shuffle(page)
        where = _anywhere(rng, len(page)) if points is None else rng.sample(points, len(page))
        placed.append(tuple(element(label, point) for label, point in zip(page, where, strict=True)))
    return World(tuple(placed), goals)


def random_state(rng: random.Random, kind: str, *, elements: int | None = None) -> World:
    """A random world in the middle of a task: any number of its goals are reached, and either page is seen.

    In a quarter of them something was clicked that was not to be.
    """
    world = random_world(rng, kind, elements=elements)
    effects = sum(len(goal.effects) for goal in world.goals)
    reached = rng.randint(0, effects)
    while len(world.effects) < reached:
        world = world.act_right()
    if rng.random() < 1 / 2 and world.more is not None:
        world = world.scroll(world.more)
    if rng.random() < 1 / 4:
        world = world.click(rng.choice(world.elements).label)
    return world


def _some_fields(rng: random.Random, total: int) -> int:
    return rng.randint(0, max(1, total // 3))


def _anywhere(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return [(rng.choice(COORDINATES), rng.choice(COORDINATES)) for _ in range(count)]
