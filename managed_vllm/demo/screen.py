"""The demo model's world: a screen of labelled buttons as text, a task, and the one right action.

This is the only definition of the format. The trainer, `managed-vllm demo`, the tests and the examples all build their
screens here, because a model this small understands exactly what it was trained on.

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
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

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
# fmt: on
"""Every label the model knows. On others it guesses."""

COORDINATES = range(1000)
"""Both coordinates, as in UI-TARS: thousandths of the screen's width and height."""

BUTTONS = range(2, 9)
"""How many buttons a screen had in training: 2 to 8. Twelve still work nearly always."""


@dataclass(frozen=True, slots=True)
class Button:
    """A label and the one point (thousandths of the screen) at which it can be clicked."""

    label: str
    x: int
    y: int

    def __post_init__(self) -> None:
        if self.x not in COORDINATES or self.y not in COORDINATES:
            raise ValueError(f"button {self.label!r} is at ({self.x},{self.y}), outside of 0 to {COORDINATES[-1]}")

    def __str__(self) -> str:
        return f"{self.label}({self.x},{self.y})"


@dataclass(frozen=True, slots=True)
class Screen:
    """What the model sees in one turn: the buttons, the `goal` to click, and what was clicked last (None: nothing).

    Raises:
        ValueError: two buttons share a label, or `goal` or `clicked` is not the label of a button.
    """

    buttons: tuple[Button, ...]
    goal: str
    clicked: str | None = None

    def __post_init__(self) -> None:
        labels = [button.label for button in self.buttons]
        if len(set(labels)) != len(labels):
            raise ValueError(f"two buttons share a label: {labels}")
        if self.goal not in labels:
            raise ValueError(f"no button {self.goal!r} to click among {labels}")
        if self.clicked is not None and self.clicked not in labels:
            raise ValueError(f"no button {self.clicked!r} that was clicked among {labels}")

    @property
    def status(self) -> str:
        """`ready`, or what was clicked last."""
        return "ready" if self.clicked is None else f'clicked "{self.clicked}"'

    @property
    def task(self) -> str:
        return f'click "{self.goal}"'

    @property
    def done(self) -> bool:
        """Whether the task is fulfilled, so that the right action is `finished`."""
        return self.clicked == self.goal

    @property
    def target(self) -> Button:
        """The button that is to be clicked."""
        return next(button for button in self.buttons if button.label == self.goal)

    def prompt(self) -> str:
        """The exact text of the user message."""
        lines = ["Screen:", *map(str, self.buttons), f"Status: {self.status}", f"Task: {self.task}"]
        return "\n".join(lines)

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation for a chat request: one user message."""
        return [{"role": "user", "content": self.prompt()}]

    def expected_action(self) -> str:
        """The right action, in UI-TARS notation."""
        if self.done:
            return "finished(content='done')"
        return f"click(start_box='({self.target.x},{self.target.y})')"

    def expected_answer(self) -> str:
        """The whole right answer, with the thought before the action."""
        thought = f'"{self.goal}" is clicked.' if self.done else str(self.target)
        return f"Thought: {thought}\nAction: {self.expected_action()}"

    def is_right(self, answer: str) -> bool:
        """Whether an answer ends in the right action. The thought before it is not judged."""
        return answer.rpartition("Action:")[2].strip() == self.expected_action()

    def after_click(self, x: int, y: int) -> Screen:
        """The next screen: the first button at exactly this point was clicked; unchanged where there is none."""
        hit = next((button.label for button in self.buttons if (button.x, button.y) == (x, y)), None)
        return self if hit is None else replace(self, clicked=hit)


def random_buttons(rng: random.Random, count: int) -> tuple[Button, ...]:
    """`count` buttons (at most `len(LABELS)`) with different labels at random places."""
    return tuple(Button(label, rng.choice(COORDINATES), rng.choice(COORDINATES)) for label in rng.sample(LABELS, count))


def random_screen(rng: random.Random, *, buttons: int | None = None, done: bool | None = None) -> Screen:
    """A random screen of the kind the model was trained on.

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
