"""How a model is spoken to and understood: a message builder, a parser, and what a wrong answer costs.

`ui_tars()` is UI-TARS 1.5 and the default, `json_actions()` and `tool_calls()` are for models that are not of that
family, `embedded()` is for the demo model, which reads the screen as text.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from managed_vllm.agent.actions import (
    UI_TARS_PROMPT,
    Coordinates,
    ParsedResponse,
    action_tools,
    parse_json_actions,
    parse_like_osworld,
    parse_tool_calls,
    parse_ui_tars,
)
from managed_vllm.agent.actions.osworld_answers import with_box_tokens
from managed_vllm.agent.actions.table import actions_in_words
from managed_vllm.agent.osworld_prompt import read_osworld_prompt
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
        resample: how often in a turn the same prompt is answered once more, before anything else. The answers that
            were refused are in the record (`Step.rejected`), and not in the history.
        resample_temperature: of those answers.
        retries: how often in an episode the model is told so and asked again; each is a turn of its own.
        correction: what it is told; `{error}` is replaced.
        then: what becomes of the episode after that.
        penalty: the reward with `ThenWhat.PENALISE`.
    """

    resample: int = 0
    resample_temperature: float = 1.0
    retries: int = 0
    correction: str = "Your last answer is not a valid action: {error}\nAnswer again, in the format described."
    then: ThenWhat = ThenWhat.EVALUATE
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.resample < 0:
            raise ConfigError(f"retries and resample must be 0 or more, not {self.retries} and {self.resample}")


@runtime_checkable
class PictureParser(Protocol):
    """A parser whose points may be pixels of the picture that the model sees.

    `min_pixels` and `max_pixels` are the limits that the caller gives; None: those of the server, which its prompts
    show (`pictures`).
    """

    @property
    def min_pixels(self) -> int | None: ...

    @property
    def max_pixels(self) -> int | None: ...

    @property
    def reads_pictures(self) -> bool:
        """Whether points are pixels of the picture, and not of the screenshot or thousandths."""
        ...

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        """What an answer means; `picture`: the size of what the model sees of a screenshot of `size`, if known."""
        ...


@dataclass(frozen=True, slots=True)
class Pictured:
    """The options of parsers of ours; `coordinates` says what the model's numbers are, and is never guessed."""

    coordinates: Coordinates = "resized"
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def reads_pictures(self) -> bool:
        return self.coordinates == "resized"

    def frame(self, picture: Size | None) -> dict[str, Any]:
        """Arguments of the parsing functions."""
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        given = {name: value for name, value in limits.items() if value is not None}
        return {"coordinates": self.coordinates, "picture": picture, **given}


@dataclass(frozen=True, slots=True)
class UITarsParser(Pictured):
    """`parse_ui_tars` with its options."""

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_ui_tars(answer.text, size, **self.frame(picture))


@dataclass(frozen=True, slots=True)
class OSWorldParser(Pictured):
    """`parse_like_osworld` with its options."""

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        frame = self.frame(picture)
        del frame["coordinates"]
        return parse_like_osworld(answer.text, size, **frame)


@dataclass(frozen=True, slots=True)
class JSONParser(Pictured):
    """`parse_json_actions` with its options."""

    coordinates: Coordinates = "absolute"

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_json_actions(answer.text, size, **self.frame(picture))


@dataclass(frozen=True, slots=True)
class ToolCallParser(Pictured):
    """`parse_tool_calls` with its options; the answer's text is the thought."""

    coordinates: Coordinates = "absolute"

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_tool_calls(answer.tool_calls, size, thought=answer.text, **self.frame(picture))


@dataclass(frozen=True, slots=True)
class AgentFormat:
    """A message builder, a parser, and what a wrong answer costs.

    Attributes:
        build_messages: the messages of a request, from the task and the turns so far.
        parse: the actions that an answer means.
        on_parse_error: what an answer that is no action leads to.
        request: further fields of each chat request (`tools=…`, `chat_template_kwargs=…`, `mm_processor_kwargs=…`).
        sampling: sampling parameters for what the caller leaves open.
        call_user_waits: how often in an episode `call_user()` is a `Wait`, before it ends the episode.
        give_up_at_last_step: whether the last turn that `Limits.max_steps` allows ends as with `call_user()`, if what
            it says is not the end, and no waiting.
    """

    build_messages: MessageBuilder
    parse: Parser
    on_parse_error: ParseErrorPolicy = ParseErrorPolicy()
    request: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    call_user_waits: int = 0
    give_up_at_last_step: bool = False


def ui_tars(
    coordinates: Coordinates | Literal["osworld"] = "resized",
    *,
    prompt: str | None = None,
    checkout: str | os.PathLike[str] | None = None,
    language: str = "English",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """UI-TARS 1.5: its prompt, screenshots and answers in turn, and coordinates in the resized image.

    Args:
        coordinates: what the model's numbers are. `"osworld"`: they are of the resized image, and all else is as with
            OSWorld's own agent, so that scores can be compared with its (docs/agent.md lists what that changes).
        prompt: `{instruction}` and `{language}` are replaced; None: our own, or that of `checkout`.
        checkout: for `"osworld"`: the folder of OSWorld, to read its prompt from (`read_osworld_prompt`).
        language: of the thoughts.
        min_pixels, max_pixels: of the model's image processor; None: the server's, which its prompts show. What can't
            be right ends the run with a `ConfigError` at the first turn.
        show_text: whether the observations' text is sent beside the screenshots.
        on_parse_error: what an answer that is no action leads to.

    Raises `ConfigError`: `"osworld"` without a prompt.
    """
    if coordinates == "osworld":
        return _osworld(prompt, checkout, language, show_text, on_parse_error)
    prompt = (UI_TARS_PROMPT if prompt is None else prompt).replace("{language}", language)
    return AgentFormat(
        Chat(system="You are a helpful assistant.", prompt=prompt, show_text=show_text),
        UITarsParser(coordinates, min_pixels, max_pixels),
        on_parse_error or ParseErrorPolicy(),
    )


def _osworld(
    prompt: str | None,
    checkout: str | os.PathLike[str] | None,
    language: str,
    show_text: bool,
    on_parse_error: ParseErrorPolicy | None,
) -> AgentFormat:
    if prompt is None:
        if checkout is None:
            raise ConfigError(
                "OSWorld's prompt is not carried here: give the folder of OSWorld as checkout=, or its text as prompt=",
                field="prompt",
            )
        prompt = read_osworld_prompt(checkout)
    return AgentFormat(
        Chat(
            system="You are a helpful assistant.",
            prompt=prompt.replace("{language}", language),
            show_text=show_text,
            answer_in_history=with_box_tokens,
        ),
        OSWorldParser(),
        on_parse_error or ParseErrorPolicy(resample=2),
        sampling={"temperature": 0.0, "top_p": 0.9, "frequency_penalty": 1.0, "max_tokens": 1000},
        call_user_waits=3,
        give_up_at_last_step=True,
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
