"""How a model is spoken to and understood: a message builder, a parser, and what a wrong answer costs.

`ui_tars()` is UI-TARS 1.5 and the default, `json_actions()` and `tool_calls()` are for models that are not of that
family, `embedded()` is for the demo model, which reads the screen as text.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from managed_vllm.agent.actions import (
    UI_TARS_PROMPT,
    Coordinates,
    ParsedResponse,
    action_tools,
    parse_json_actions,
    parse_tool_calls,
    parse_ui_tars,
)
from managed_vllm.agent.actions.table import actions_in_words
from managed_vllm.agent.prompting import Chat, LatestText, MessageBuilder
from managed_vllm.errors import ConfigError
from managed_vllm.request.outputs import CompletionOutput

Size = tuple[int, int]
"""Width and height in pixels."""

Parser = Callable[[CompletionOutput, Size], ParsedResponse]
"""What an answer means, given the size of the screenshot that it is about; coordinates in its pixels.

Raises `ActionParseError` for what is no action. Anything else that it raises is a failure of the caller's code.
"""


class ThenWhat(enum.StrEnum):
    """What becomes of an episode whose model has answered with what is no action, once too often."""

    EVALUATE = "evaluate"
    """It ends here and counts: the reward is what the evaluator says."""

    PENALISE = "penalise"
    """It ends here and counts: the reward is `ParseErrorPolicy.penalty`."""

    FAIL = "fail"
    """The attempt fails, without a reward; the scheduler may try again."""


@dataclass(frozen=True, slots=True)
class ParseErrorPolicy:
    """What an answer that is no action leads to.

    Attributes:
        retries: how often in an episode the model is told so and asked again; each is a turn of its own.
        correction: what it is told; `{error}` is replaced.
        then: what becomes of the episode after that.
        penalty: the reward with `ThenWhat.PENALISE`.
    """

    retries: int = 0
    correction: str = "Your last answer is not a valid action: {error}\nAnswer again, in the format described."
    then: ThenWhat = ThenWhat.EVALUATE
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError(f"retries must be 0 or more, not {self.retries}")


@dataclass(frozen=True, slots=True)
class UITarsParser:
    """`parse_ui_tars` with its options; `coordinates` says what the model's numbers are, and is never guessed."""

    coordinates: Coordinates = "resized"
    min_pixels: int = 100 * 28**2
    max_pixels: int = 16384 * 28**2

    def __call__(self, answer: CompletionOutput, size: Size) -> ParsedResponse:
        return parse_ui_tars(
            answer.text,
            size,
            coordinates=self.coordinates,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, slots=True)
class JSONParser:
    """`parse_json_actions` with its option."""

    coordinates: Coordinates = "absolute"

    def __call__(self, answer: CompletionOutput, size: Size) -> ParsedResponse:
        return parse_json_actions(answer.text, size, coordinates=self.coordinates)


@dataclass(frozen=True, slots=True)
class ToolCallParser:
    """`parse_tool_calls` with its option; the answer's text is the thought."""

    coordinates: Coordinates = "absolute"

    def __call__(self, answer: CompletionOutput, size: Size) -> ParsedResponse:
        return parse_tool_calls(answer.tool_calls, size, thought=answer.text, coordinates=self.coordinates)


@dataclass(frozen=True, slots=True)
class AgentFormat:
    """A message builder, a parser, and what a wrong answer costs.

    Attributes:
        build_messages: the messages of a request, from the task and the turns so far.
        parse: the actions that an answer means.
        on_parse_error: what an answer that is no action leads to.
        request: further fields of each chat request (`tools=…`, `chat_template_kwargs=…`, `mm_processor_kwargs=…`).
    """

    build_messages: MessageBuilder
    parse: Parser
    on_parse_error: ParseErrorPolicy = ParseErrorPolicy()
    request: Mapping[str, Any] = field(default_factory=dict)


def ui_tars(
    coordinates: Coordinates = "resized",
    *,
    prompt: str = UI_TARS_PROMPT,
    language: str = "English",
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """UI-TARS 1.5: its prompt, screenshots and answers in turn, and coordinates in the resized image.

    In the prompt `{instruction}` and `{language}`, that of the thoughts, are replaced.
    """
    prompt = prompt.replace("{language}", language)
    return AgentFormat(
        Chat(system="You are a helpful assistant.", prompt=prompt, show_text=show_text),
        UITarsParser(coordinates),
        on_parse_error or ParseErrorPolicy(),
    )


def embedded(*, on_parse_error: ParseErrorPolicy | None = None) -> AgentFormat:
    """The demo model: one turn's text, UI-TARS notation, and coordinates in thousandths of the screen."""
    return AgentFormat(LatestText(), UITarsParser("relative1000"), on_parse_error or ParseErrorPolicy())


_JSON_PROMPT = f"""\
You control a computer. Do the task, one action at a time. Answer with one JSON object, such as
{{"thought": "The dialog is open.", "action": "click", "x": 100, "y": 200}}

The actions and their fields; those with a ? may be left out:
{actions_in_words()}

Coordinates are {{frame}}.

Task: {{instruction}}"""

_TOOLS_PROMPT = """\
You control a computer by its tools. Do the task, one action at a time.

Coordinates are {frame}.

Task: {instruction}"""


def json_actions(
    coordinates: Coordinates = "absolute",
    *,
    prompt: str = _JSON_PROMPT,
    show_text: bool = True,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """One JSON object an answer. `ACTION_JSON_SCHEMA` makes the server hold the model to it.

    In the prompt `{instruction}` is replaced, and `{frame}` by what the numbers of a point are.
    """
    return AgentFormat(
        Chat(prompt=prompt, show_text=show_text, coordinates=coordinates),
        JSONParser(coordinates),
        on_parse_error or ParseErrorPolicy(),
    )


def tool_calls(
    coordinates: Coordinates = "absolute",
    *,
    prompt: str = _TOOLS_PROMPT,
    show_text: bool = True,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """The actions as tools; the server must parse the model's tool calls (`tool_call_parser=…`).

    In the prompt `{instruction}` is replaced, and `{frame}` by what the numbers of a point are.
    """
    return AgentFormat(
        Chat(prompt=prompt, show_text=show_text, coordinates=coordinates),
        ToolCallParser(coordinates),
        on_parse_error or ParseErrorPolicy(),
        {"tools": action_tools(coordinates)},
    )
