"""Formats of further models: Qwen-VL and its descendants, those that write pyautogui, GLM-V, AutoGLM.

What a model can do, and how it says it, is that of its card; the words are ours. The words that a model was trained
with can be given as `prompt=`: they stand in Qwen's cookbooks (computer_use.ipynb and mobile_agent.ipynb of
QwenLM/Qwen3-VL), in OSWorld's mm_agents (qwen3vl_agent.py, opencua_agent.py), in the README of zai-org/GLM-V, and in
zai-org/Open-AutoGLM's phone_agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from managed_vllm.agent.actions import (
    Coordinates,
    ParsedResponse,
    parse_autoglm,
    parse_computer_use,
    parse_glm,
    parse_python_code,
)
from managed_vllm.agent.actions.computer_use import Tool, tool_of
from managed_vllm.agent.actions.glm import autoglm_calls_in_words, glm_calls_in_words
from managed_vllm.agent.actions.python_code import calls_in_words
from managed_vllm.agent.format import AgentFormat, ParseErrorPolicy, Pictured, Size
from managed_vllm.agent.prompting import Chat
from managed_vllm.request.outputs import CompletionOutput


@dataclass(frozen=True, slots=True)
class ComputerUseParser(Pictured):
    """`parse_computer_use` with its options."""

    coordinates: Coordinates = "relative1000"
    tool: Tool = "computer_use"

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_computer_use(
            answer.text, size, tool=self.tool, tool_calls=answer.tool_calls, **self.frame(picture)
        )


@dataclass(frozen=True, slots=True)
class PythonCodeParser(Pictured):
    """`parse_python_code` with its options."""

    coordinates: Coordinates = "relative1"

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_python_code(answer.text, size, **self.frame(picture))


@dataclass(frozen=True, slots=True)
class GLMParser(Pictured):
    """`parse_glm` with its options."""

    coordinates: Coordinates = "relative1000"

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_glm(answer.text, size, **self.frame(picture))


@dataclass(frozen=True, slots=True)
class AutoGLMParser(Pictured):
    """`parse_autoglm` with its options."""

    coordinates: Coordinates = "relative1000"

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        return parse_autoglm(answer.text, size, **self.frame(picture))


_IN_WORDS: Mapping[Coordinates, str] = {
    "absolute": "in pixels of the screenshot",
    "resized": "in pixels of the picture as you see it",
    "relative1000": "0 to 1000 from left to right, and from top to bottom",
    "relative1": "0 to 1 from left to right, and from top to bottom",
}

_TOOL_PROMPT = """\
You control {what} by the tool `{tool}`. Say in one sentence what you do next, then call the tool once. When the \
task is done, or can't be done, end it by the action `terminate`.

Task: {instruction}"""

_CODE_PROMPT = """\
You control a computer. Do the task step by step. Answer each time in this form:

## Thought:
what you see, and what is to be done next
## Action:
the next action in one sentence
## Code:
```python
the calls that carry it out
```

The calls, with constants as arguments:
{calls}

Coordinates are {frame}. End the task by computer.terminate, with status "success" or "failure".

Task: {instruction}"""


_GLM_PROMPT = """\
You control a computer. Do the task, one action at a time. Answer each time in this form:

Reason: why this is the next action
Action: one call of those below

{calls}

Coordinates are {frame}; element_info names what is there.

Task: {instruction}"""

_AUTOGLM_PROMPT = """\
You control a phone. Do the task, one action at a time. Answer each time in this form:

<think>why this is the next action</think><answer>one call of those below</answer>

{calls}

Coordinates are {frame}.

Task: {instruction}"""


def qwen_vl(
    coordinates: Coordinates = "relative1000",
    *,
    tool: Tool = "computer_use",
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """Qwen3-VL, with its tool for computers or for phones; Qwen2.5-VL with `coordinates="resized"`.

    EvoCUA, Fara, GUI-Owl and MAI-UI speak the same, with actions that are understood and not offered. The tool is in
    the prompt by the model's own chat template, and its calls stay in the text (`tool_choice="none"`), so that the
    server needs no tool parser; where it has one and took the calls out, they are read as well.

    Args:
        coordinates: what the model's numbers are.
        tool: `"computer_use"`, or `"mobile_use"`.
        prompt: the first message, in which `{instruction}` is replaced; None: our own.
        show_text: whether the observations' text is sent beside the screenshots.
        on_parse_error: what an answer that is no action leads to.
    """
    what = "a computer" if tool == "computer_use" else "a phone"
    asked = _TOOL_PROMPT.replace("{what}", what).replace("{tool}", tool) if prompt is None else prompt
    return AgentFormat(
        Chat(prompt=asked, show_text=show_text, coordinates=coordinates),
        ComputerUseParser(coordinates, tool=tool),
        on_parse_error or ParseErrorPolicy(),
        {"tools": [tool_of(tool, _IN_WORDS[coordinates])], "tool_choice": "none"},
    )


def python_code(
    coordinates: Coordinates = "relative1",
    *,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """Models that answer with pyautogui's calls: Kimi K2.5 and Aguvis; OpenCUA with `coordinates="resized"`.

    Nothing of what they write is executed (`parse_python_code`).

    Args:
        coordinates: what the model's numbers are.
        prompt: the first message, in which `{instruction}` is replaced; None: our own.
        show_text: whether the observations' text is sent beside the screenshots.
        on_parse_error: what an answer that is no action leads to.
    """
    words = _CODE_PROMPT.replace("{calls}", calls_in_words()).replace("{frame}", _IN_WORDS[coordinates])
    return _written(PythonCodeParser(coordinates), words if prompt is None else prompt, show_text, on_parse_error)


def _written(
    parser: PythonCodeParser | GLMParser | AutoGLMParser,
    prompt: str,
    show_text: bool,
    on_parse_error: ParseErrorPolicy | None,
) -> AgentFormat:
    """A format in which all is said in text."""
    chat = Chat(prompt=prompt, show_text=show_text, coordinates=parser.coordinates)
    return AgentFormat(chat, parser, on_parse_error or ParseErrorPolicy())


def qwen2_5_vl(coordinates: Coordinates = "resized", **options: Any) -> AgentFormat:
    """`qwen_vl`, for Qwen2.5-VL."""
    return qwen_vl(coordinates, **options)


def qwen_vl_mobile(coordinates: Coordinates = "relative1000", **options: Any) -> AgentFormat:
    """`qwen_vl`, with its tool for phones."""
    return qwen_vl(coordinates, **{"tool": "mobile_use", **options})


def opencua(coordinates: Coordinates = "resized", **options: Any) -> AgentFormat:
    """`python_code`, for OpenCUA."""
    return python_code(coordinates, **options)


def glm_v(
    coordinates: Coordinates = "relative1000",
    *,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """GLM-4.5V and GLM-4.6V on a computer. The arguments are `python_code`'s."""
    words = _GLM_PROMPT.replace("{calls}", glm_calls_in_words()).replace("{frame}", _IN_WORDS[coordinates])
    return _written(GLMParser(coordinates), words if prompt is None else prompt, show_text, on_parse_error)


def autoglm(
    coordinates: Coordinates = "relative1000",
    *,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """AutoGLM-Phone. The arguments are `python_code`'s."""
    words = _AUTOGLM_PROMPT.replace("{calls}", autoglm_calls_in_words()).replace("{frame}", _IN_WORDS[coordinates])
    return _written(AutoGLMParser(coordinates), words if prompt is None else prompt, show_text, on_parse_error)
