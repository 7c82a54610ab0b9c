"""What is sent for a turn: message builders, and the newest images among all that was seen.

A builder makes the messages of a request from the episode's `History`. The same turns always become the same messages,
byte for byte, so that the server's prefix cache holds, and so that what is recorded is what was sent. Images stand in
messages as `ImageRef`s, in parts `{"type": "image", "image": ref}`; they become files only while they are sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from managed_vllm.agent.actions.coordinates import Coordinates, frame_in_words
from managed_vllm.agent.types import ImageRef, Message, Task

NO_SCREENSHOT = (1000, 1000)
"""The size that prompts and parsers are told where there is no screenshot."""

IMAGE_PARTS = frozenset({"image", "image_url", "image_pil"})
"""Types of parts that count as an image."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as a message builder sees it.

    Attributes:
        screenshot: what was seen, if there was anything to be seen.
        text: the observation's text, or the words with which an answer was sent back (`ParseErrorPolicy.correction`).
        response: what the model answered; None for the turn that is to be answered now.
        tool_calls: the answer's tool calls, as the server gave them.
        extras: of the observation; only for the newest turn.
    """

    screenshot: ImageRef | None = None
    text: str | None = None
    response: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class History:
    """All that a message is made from: the task, what the model is told to do, and the turns, the newest last."""

    task: Task
    instruction: str
    turns: Sequence[Turn]
    max_images: int

    def first_size(self) -> tuple[int, int]:
        """Width and height of the first screenshot, so that a prompt stays the same; of none: `NO_SCREENSHOT`."""
        shots = (turn.screenshot for turn in self.turns if turn.screenshot is not None)
        return next(((shot.width, shot.height) for shot in shots), NO_SCREENSHOT)


MessageBuilder = Callable[[History], Sequence[Message]]
"""Makes the messages of a request. What it raises ends the attempt as a failure of the caller's code."""


@dataclass(frozen=True, slots=True)
class Chat:
    """The usual builder: system message, then the instruction, then every turn with what was seen and answered.

    Attributes:
        system: text of the system message; None: none.
        prompt: the first user message. `{instruction}` is replaced, `{frame}` by what coordinates are (`coordinates`
            says it), and no other brace means anything.
        history: turns before the newest that stay; None: all. Their images are limited by `Limits.max_images` anyway.
        show_text: whether the observation's text is sent beside its screenshot. Text without one always is: what an
            answer that was no action is told, too.
        show_screenshot: whether its screenshot is.
        coordinates: the frame of the model's points, for `{frame}`.
        answer_in_history: what becomes of former answers; None: they stay as they were.
    """

    system: str | None = None
    prompt: str = "{instruction}"
    history: int | None = None
    show_text: bool = True
    show_screenshot: bool = True
    coordinates: Coordinates = "absolute"
    answer_in_history: Callable[[str], str] | None = None

    def __call__(self, history: History) -> list[Message]:
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        if self.prompt:
            frame = frame_in_words(self.coordinates, history.first_size())
            # The instruction comes last: what it says in braces stays as it is.
            text = self.prompt.replace("{frame}", frame).replace("{instruction}", history.instruction)
            messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        turns = history.turns
        if self.history is not None:
            turns = turns[max(0, len(turns) - 1 - self.history) :]
        for turn in turns:
            parts = _seen(turn, self.show_screenshot, self.show_text)
            if parts:
                messages.append({"role": "user", "content": parts})
            if turn.response is not None:
                messages.extend(_answered(turn, self.answer_in_history))
        return newest_images(messages, history.max_images)


def _seen(turn: Turn, show_screenshot: bool, show_text: bool) -> list[Any]:
    """What was seen at a turn, as parts of a message."""
    parts: list[Any] = []
    if show_screenshot and turn.screenshot is not None:
        parts.append({"type": "image", "image": turn.screenshot})
    if turn.text is not None and (show_text or turn.screenshot is None):
        parts.append(_text(turn.text))
    return parts


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def _answered(turn: Turn, rewrite: Callable[[str], str] | None) -> list[Message]:
    """The answer; one with tool calls also has their results, since servers want one for each: what was seen then."""
    text = turn.response or ""
    said: dict[str, Any] = {"role": "assistant", "content": text if rewrite is None else rewrite(text)}
    if not turn.tool_calls:
        return [said]
    results = [{"role": "tool", "tool_call_id": call.get("id"), "content": "done"} for call in turn.tool_calls]
    return [{**said, "tool_calls": list(turn.tool_calls)}, *results]


@dataclass(frozen=True, slots=True)
class TaggedObservations:
    """As `Chat`, with tags around the task and around each observation, and few screenshots.

    Attributes:
        system: text of the system message.
        most_images: how many screenshots stay at most, where `Limits.max_images` allows more.
        left_out: the text in the place of a screenshot that does not stay.
        show_text: as for `Chat`.
    """

    system: str
    most_images: int
    left_out: str = "[an earlier screenshot]"
    show_text: bool = False

    def __call__(self, history: History) -> list[Message]:
        messages: list[Message] = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": f"<task>\n{history.instruction}\n</task>"},
        ]
        for turn in history.turns:
            seen = _seen(turn, True, self.show_text)
            if seen:
                around = _text("<observation>\n"), _text("\n</observation>")
                messages.append({"role": "user", "content": [around[0], *seen, around[1]]})
            if turn.response is not None:
                messages.extend(_answered(turn, None))
        return newest_images(messages, min(self.most_images, history.max_images), self.left_out)


@dataclass(frozen=True, slots=True)
class StepList:
    """One question a turn: the newest screenshot, and the task with a line for each step so far.

    For models that were trained without the former screenshots and answers.

    Attributes:
        system: text of the system message; None: none.
        prompt: the text beside the screenshot. `{instruction}`, `{steps}` and `{frame}` (as for `Chat`) are replaced.
        step: what is said of a step, from its answer.
        none: what is said where there was no step yet.
        show_text: whether the observation's text is sent beside its screenshot; without one it always is.
        coordinates: the frame of the model's points.
    """

    system: str | None = None
    prompt: str = "{instruction}\n\n{steps}"
    step: Callable[[str], str] = str.strip
    none: str = "None"
    show_text: bool = False
    coordinates: Coordinates = "absolute"

    def __call__(self, history: History) -> list[Message]:
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [self.step(turn.response) for turn in history.turns if turn.response is not None]
        steps = "\n".join(f"Step {number}: {line}" for number, line in enumerate(said, 1)) or self.none
        # What a model said stays as it is, whatever it has in braces: each place is filled once.
        frame = frame_in_words(self.coordinates, history.first_size())
        places = {"{instruction}": history.instruction, "{steps}": steps, "{frame}": frame}
        asked = _PLACES.sub(lambda place: places[place[0]], self.prompt)
        messages.append({"role": "user", "content": [*self._observed(history.turns), _text(asked)]})
        return newest_images(messages, history.max_images)

    def _observed(self, turns: Sequence[Turn]) -> list[Any]:
        """The newest screenshot, and what the newest turn says."""
        shown = next((turn for turn in reversed(turns) if turn.screenshot is not None), None)
        newest = turns[-1]
        before = [] if shown is None or shown is newest else _seen(shown, True, False)
        return before + _seen(newest, True, self.show_text)


_PLACES = re.compile(r"\{(?:instruction|steps|frame)\}")


@dataclass(frozen=True, slots=True)
class LatestText:
    """The newest observation's text alone, as one user message: for models that need no history (the demo model)."""

    def __call__(self, history: History) -> list[Message]:
        turn = history.turns[-1]
        return [{"role": "user", "content": turn.text if turn.text is not None else history.instruction}]


@dataclass(frozen=True, slots=True)
class Continued:
    """A conversation that the caller has begun, then every turn: for `run_agent_loop`.

    Attributes:
        messages: the caller's own, by `Task.data["messages"]` where this is empty. Images in them are the caller's
            own, too, and are sent before those of the turns; all of them count for `max_images`.
        show_text: whether the observations' text is sent beside the screenshots.
    """

    messages: Sequence[Message] = ()
    show_text: bool = False

    def __call__(self, history: History) -> list[Message]:
        begun = self.messages or history.task.data.get("messages") or ()
        return newest_images([*begun, *Chat(prompt="", show_text=self.show_text)(history)], history.max_images)


def newest_images(messages: Sequence[Message], most: int, left_out: str | None = None) -> list[Message]:
    """The same messages with the newest `most` images, and all of the text.

    `left_out`: the text in the place of each other image; None: nothing, and a message of which nothing is left is left
    out. The messages given are not changed.
    """
    left = most
    found: list[Message] = []
    for message in reversed(messages):
        content = message.get("content")
        if not isinstance(content, list | tuple) or not any(map(_is_image, content)):
            found.append(message)
            continue
        kept, gone = [], False
        for part in reversed(content):
            if _is_image(part):
                if left <= 0:
                    gone = True
                    kept += [] if left_out is None else [_text(left_out)]
                    continue
                left -= 1
            kept.append(part)
        if not gone:
            found.append(message)
        elif kept:
            found.append({**message, "content": kept[::-1]})
    return found[::-1]


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The image parts of messages, in their order."""
    return [
        part
        for message in messages
        if isinstance(content := message.get("content"), list | tuple)
        for part in content
        if _is_image(part)
    ]


def _is_image(part: Any) -> bool:
    if isinstance(part, Mapping):
        return part.get("type") in IMAGE_PARTS or (part.get("type") is None and "image_url" in part)
    return not isinstance(part, str)
