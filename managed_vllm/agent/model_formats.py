"""Formats of further models, from Qwen-VL to Holo: each with its prompt, its tools, its parser and its history.

What a model can do, and how it says it, is that of its card; the words are ours. The words that a model was trained
with can be given as `prompt=`: they stand in Qwen's cookbooks (computer_use.ipynb and mobile_agent.ipynb of
QwenLM/Qwen3-VL), in OSWorld's mm_agents (qwen3vl_agent.py, opencua_agent.py, seed_agent.py), in the README of
zai-org/GLM-V, in zai-org/Open-AutoGLM's phone_agent, in OpenGVLab/ScaleCUA's playground/config/prompt_template, in
hcompai/hai-cookbook (utils/navigation.py) and hub.hcompany.ai/agent-loop, and in google-research/android_world's
agents/m3a.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from managed_vllm.agent.actions import (
    Coordinates,
    ParsedResponse,
    holo_json_schema,
    parse_android_world,
    parse_autoglm,
    parse_computer_use,
    parse_glm,
    parse_holo,
    parse_hosted,
    parse_python_code,
    parse_scalecua,
    parse_seed,
)
from managed_vllm.agent.actions.android_world import android_world_actions_in_words
from managed_vllm.agent.actions.computer_use import Tool, tool_of
from managed_vllm.agent.actions.glm import autoglm_calls_in_words, glm_calls_in_words
from managed_vllm.agent.actions.holo import Holo, holo_tools
from managed_vllm.agent.actions.hosted_tools import Shape, hosted_tools
from managed_vllm.agent.actions.python_code import calls_in_words
from managed_vllm.agent.actions.scalecua import Platform, operation_of, scalecua_calls_in_words
from managed_vllm.agent.actions.seed import seed_functions_in_words, seed_tools
from managed_vllm.agent.format import AgentFormat, ParseErrorPolicy, Pictured, Size
from managed_vllm.agent.prompting import Chat, StepList, TaggedObservations
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionParser(Pictured):
    """A parsing function of `actions`, with its options.

    Attributes:
        read: the function.
        calls: whether it reads the answer's tool calls as well.
        more: its further arguments.
    """

    coordinates: Coordinates = "relative1000"
    read: Callable[..., ParsedResponse]
    calls: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, answer: CompletionOutput, size: Size, picture: Size | None = None) -> ParsedResponse:
        calls = {"tool_calls": answer.tool_calls} if self.calls else {}
        return self.read(answer.text, size, **calls, **self.more, **self.frame(picture))


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

_SEED_PROMPT = """\
You control a computer or a phone by functions. You get a task, and after each of your answers a screenshot. Say in a \
sentence what you do next and why, then call one function, or several that need no look at the screen in between. If \
what you do changes nothing, do something else. End the task by `finished`, or by `infeasible` if it can't be done."""

_SEED_CALLS = """

The functions:
{functions}

A call looks like this:
<seed:tool_call>
<function=click>
<parameter=point><point>512 340</point></parameter>
</function>
</seed:tool_call>"""

_SCALECUA_PROMPT = """\
You control {what}. Each time you get a screenshot, the task, and what was done so far. Say what is to be done next, \
and carry it out. Answer in this form:

<think>
why this is the next step
</think>
<operation>
the next step in one sentence
</operation>
<action>
the calls that carry it out, one a line
</action>

The calls:
{calls}

Coordinates are {frame}."""

_SCALECUA_TURN = """\
Say what is to be done next.

Task:
{instruction}

Previous operations:
{steps}"""

_HOLO_PROMPT = """\
You control {what}. You get the task, and a screenshot after each of your answers. Answer with one JSON object, and \
nothing else: in `note` what is on the screen that you need later, since earlier screenshots are taken away; in \
`thought` what is to be done next; in `{where}` one action. End the task by the action `answer`.

<output_format>
{schema}
</output_format>"""

_HOLO_TOOLS_PROMPT = """\
You control a computer by tools. You get the task, and a screenshot after each of your answers. Say in a sentence what \
you do next, and what you need later of what is on the screen, since earlier screenshots are taken away; then call one \
tool. End the task by `answer`."""

_HOSTED_PROMPT = """\
You control a computer by tools. You get the task, and a screenshot after each of your calls. When the task is done, \
or can't be done, say so without a call.

Task: {instruction}"""

_ANDROID_WORLD_PROMPT = """\
You control an Android phone. Each time you get a screenshot, the task, and what was done so far. Choose one of these \
actions:
{actions}

Points are {frame}. A question is answered by `answer`; any other task ends by `status`.

Task: {instruction}

Steps so far:
{steps}

Answer in this form:
Reason: why this is the next action
Action: the action, as JSON"""


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
    return _written(
        _read(parse_python_code, coordinates), words if prompt is None else prompt, show_text, on_parse_error
    )


def _read(
    read: Callable[..., ParsedResponse], coordinates: Coordinates, calls: bool = False, **more: Any
) -> FunctionParser:
    return FunctionParser(coordinates=coordinates, read=read, calls=calls, more=more)


def _written(
    parser: FunctionParser,
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
    return _written(_read(parse_glm, coordinates), words if prompt is None else prompt, show_text, on_parse_error)


def autoglm(
    coordinates: Coordinates = "relative1000",
    *,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """AutoGLM-Phone. The arguments are `python_code`'s."""
    words = _AUTOGLM_PROMPT.replace("{calls}", autoglm_calls_in_words()).replace("{frame}", _IN_WORDS[coordinates])
    return _written(_read(parse_autoglm, coordinates), words if prompt is None else prompt, show_text, on_parse_error)


def seed(
    coordinates: Coordinates = "relative1000",
    *,
    native: bool = False,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """UI-TARS-2, and the Seed models that control a GUI, by functions in XML.

    Former answers stay as they were, with what the model thought, as ByteDance's agent sends them.

    Args:
        coordinates: what the model's numbers are.
        native: whether the functions are `tools` of the request, and the server takes the calls out of the text (vLLM:
            `tool_call_parser="seed_oss"`). Else they stand in the prompt, and the calls in the text.
        prompt: the system message, after which the task is the first user message; or, with `{instruction}` in it, the
            first user message. None: our own.
        show_text: whether the observations' text is sent beside the screenshots.
        on_parse_error: what an answer that is no action leads to.
    """
    frame = _IN_WORDS[coordinates]
    words = _SEED_PROMPT + ("" if native else _SEED_CALLS.replace("{functions}", seed_functions_in_words(frame)))
    return AgentFormat(
        _chat(words if prompt is None else prompt, show_text, coordinates),
        _read(parse_seed, coordinates, calls=True),
        on_parse_error or ParseErrorPolicy(),
        {"tools": seed_tools(frame)} if native else {},
    )


def scalecua(
    coordinates: Coordinates = "resized",
    *,
    platform: Platform = "computer",
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """ScaleCUA, on computers (and in browsers) or on phones.

    Each turn is one question, with the newest screenshot and a line for each operation so far: former screenshots and
    thoughts are not sent, as its own agents do it.

    Args:
        coordinates: what the model's numbers are.
        platform: `"computer"` or `"phone"`.
        prompt: the system message; None: our own.
        show_text: whether the observation's text is sent beside the screenshot.
        on_parse_error: what an answer that is no action leads to.
    """
    words = _SCALECUA_PROMPT.replace("{what}", f"a {platform}").replace("{calls}", scalecua_calls_in_words(platform))
    system = words.replace("{frame}", _IN_WORDS[coordinates]) if prompt is None else prompt
    return AgentFormat(
        StepList(system, _SCALECUA_TURN, operation_of, show_text=show_text, coordinates=coordinates),
        _read(parse_scalecua, coordinates),
        on_parse_error or ParseErrorPolicy(),
    )


def scalecua_mobile(coordinates: Coordinates = "resized", **options: Any) -> AgentFormat:
    """`scalecua`, for phones."""
    return scalecua(coordinates, **{"platform": "phone", **options})


_HOLO_IMAGES = 3
"""The most screenshots that Holo is to be shown (hub.hcompany.ai/agent-loop)."""


def holo(
    coordinates: Coordinates = "relative1000",
    *,
    version: Holo = "holo3",
    native: bool = False,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """Holo3 and Holo3.1, by JSON or (3.1) by tool calls; Holo1 and Holo1.5 with `"resized"` and `version="holo1.5"`.

    The prompt has the newest three screenshots, and a word in the place of each earlier one, as H says; what the model
    is to remember is in its notes, which stay. Where the server has a reasoning parser, `holo_json_schema` makes it
    hold the model to the form.

    Args:
        coordinates: what the model's numbers are.
        version: `"holo3"`, or `"holo1.5"`.
        native: whether the actions are `tools` of the request, which the server's tool parser takes out of the text.
        prompt: the system message; None: our own.
        show_text: whether the observations' text is sent beside the screenshots.
        on_parse_error: what an answer that is no action leads to.
    """
    frame = _IN_WORDS[coordinates]
    what, where = ("a computer", "tool_call") if version == "holo3" else ("a web browser", "action")
    schema = json.dumps(holo_json_schema(version, frame))
    words = _HOLO_PROMPT.replace("{what}", what).replace("{where}", where).replace("{schema}", schema)
    system = (_HOLO_TOOLS_PROMPT if native else words) if prompt is None else prompt
    return AgentFormat(
        TaggedObservations(system, _HOLO_IMAGES, show_text=show_text),
        _read(parse_holo, coordinates, calls=True, version=version),
        on_parse_error or ParseErrorPolicy(),
        {"tools": holo_tools(frame)} if native else {},
    )


def holo1_5(coordinates: Coordinates = "resized", **options: Any) -> AgentFormat:
    """`holo`, for Holo1 and Holo1.5."""
    return holo(coordinates, **{"version": "holo1.5", **options})


def holo3_1(coordinates: Coordinates = "relative1000", **options: Any) -> AgentFormat:
    """`holo`, for Holo3.1 by tool calls."""
    return holo(coordinates, **{"native": True, **options})


def android_world(
    coordinates: Coordinates = "absolute",
    *,
    prompt: str | None = None,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """Models that answer in AndroidWorld's JSON, by points.

    Each turn is one question, with the newest screenshot and a line for each step so far. There stands what the model
    answered; AndroidWorld's own agents put in its place what a second question made of it.

    Args:
        coordinates: what the model's numbers are.
        prompt: the whole question, in which `{instruction}`, `{steps}` and `{frame}` (what coordinates are) are
            replaced; None: our own.
        show_text: whether the observation's text is sent beside the screenshot.
        on_parse_error: what an answer that is no action leads to.
    """
    words = _ANDROID_WORLD_PROMPT.replace("{actions}", android_world_actions_in_words())
    return AgentFormat(
        StepList(None, words if prompt is None else prompt, _in_one_line, show_text=show_text, coordinates=coordinates),
        _read(parse_android_world, coordinates),
        on_parse_error or ParseErrorPolicy(),
    )


def hosted(
    coordinates: Coordinates | None = None,
    *,
    shape: Shape,
    prompt: str = _HOSTED_PROMPT,
    show_text: bool = False,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """Models that call tools in the shape of Gemini's, OpenAI's or Anthropic's computer use.

    The server must parse the model's tool calls (`tool_call_parser=…`); JSON in the text is read as well. An answer
    without a call ends the episode, as with those models.

    Args:
        coordinates: what the model's numbers are; None: thousandths with Gemini's, else pixels of the screenshot.
        shape: `"gemini"`, `"openai"` or `"anthropic"`.
        prompt: the first message, in which `{instruction}` is replaced.
        show_text: whether the observations' text is sent beside the screenshots.
        on_parse_error: what an answer that is no action leads to.
    """
    own: Coordinates = coordinates or ("relative1000" if shape == "gemini" else "absolute")
    return AgentFormat(
        _chat(prompt, show_text, own),
        _read(parse_hosted, own, calls=True, shape=shape, ends=True),
        on_parse_error or ParseErrorPolicy(),
        {"tools": hosted_tools(shape, _IN_WORDS[own])},
    )


def gemini(coordinates: Coordinates | None = None, **options: Any) -> AgentFormat:
    """`hosted`, in Gemini's shape."""
    return hosted(coordinates, **{"shape": "gemini", **options})


def openai_computer(coordinates: Coordinates | None = None, **options: Any) -> AgentFormat:
    """`hosted`, in the shape of OpenAI's tool."""
    return hosted(coordinates, **{"shape": "openai", **options})


def claude(coordinates: Coordinates | None = None, **options: Any) -> AgentFormat:
    """`hosted`, in the shape of Anthropic's tool."""
    return hosted(coordinates, **{"shape": "anthropic", **options})


def _in_one_line(answer: str) -> str:
    return " ".join(answer.split())


def _chat(prompt: str, show_text: bool, coordinates: Coordinates) -> Chat:
    """A prompt without a place for the task is the system message."""
    if "{instruction}" in prompt:
        return Chat(prompt=prompt, show_text=show_text, coordinates=coordinates)
    return Chat(system=prompt, show_text=show_text, coordinates=coordinates)
