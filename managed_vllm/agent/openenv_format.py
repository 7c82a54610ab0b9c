"""How a model is spoken to in a world of OpenEnv: the server's own schema of its actions, and JSON in return.

    {"action": "RIGHT"}

An object in the answer is a `Custom` whose arguments it is; `OpenEnvEnvironment` sends these to the server as they are,
which is also who says that one is invalid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx

from managed_vllm.agent.actions import Custom, ParsedResponse
from managed_vllm.agent.actions.json_actions import values_in
from managed_vllm.agent.environments.openenv import server_url
from managed_vllm.agent.format import AgentFormat, ParseErrorPolicy, Size
from managed_vllm.agent.prompting import Chat
from managed_vllm.errors import ActionParseError, ConfigError
from managed_vllm.request.outputs import CompletionOutput

_TIMEOUT_S = 10.0
_MOST_CHARACTERS = 50_000
_BEGIN = re.compile(r"\{")
_EXAMPLE = '{"action": …}'
_PROMPT = """\
You act in an environment, one action at a time. What you see of it is JSON. Answer with one JSON object, your next \
action, and nothing after it.

{schema}Task: {instruction}"""


def openenv_actions(
    schema: Mapping[str, Any] | None = None,
    *,
    prompt: str = _PROMPT,
    show_text: bool = True,
    on_parse_error: ParseErrorPolicy | None = None,
) -> AgentFormat:
    """One JSON object an answer, as the server's action class has it.

    Args:
        schema: JSON schema of an action (`action_schema`); None: the prompt says nothing of it.
        prompt: `{schema}` and `{instruction}` are replaced.
        show_text: whether the observations' JSON is sent where there is a screenshot, too.
        on_parse_error: what an answer without an object leads to.
    """
    told = "" if schema is None else f"The JSON schema of an action:\n{json.dumps(schema, ensure_ascii=False)}\n\n"
    return AgentFormat(
        Chat(prompt=prompt.replace("{schema}", told), show_text=show_text),
        parse_object,
        on_parse_error or ParseErrorPolicy(),
    )


def parse_object(answer: CompletionOutput, size: Size) -> ParsedResponse:
    """The JSON object of an answer, and the words before it. Raises `ActionParseError`: there is none, or several."""
    thought, values = values_in(answer.text, _BEGIN, _EXAMPLE)
    value, start, _ = values[0]
    if len(values) > 1 or not isinstance(value, dict):
        raise ActionParseError("the answer is not one JSON object", text=answer.text, span=(start, values[-1][2]))
    return ParsedResponse(thought, (Custom("action", value),))


def action_schema(url: str) -> dict[str, Any] | None:
    """The JSON schema of an OpenEnv server's actions; None: it tells none (before 0.2).

    Raises `ConfigError`: nobody answers there.
    """
    base = server_url(url)
    try:
        answer = httpx.get(str(base / "schema"), timeout=_TIMEOUT_S, trust_env=False)
        found = answer.json() if answer.status_code == 200 and len(answer.text) <= _MOST_CHARACTERS else None
    except httpx.HTTPError as error:
        raise ConfigError(
            f"no OpenEnv server answers at {base.with_user(None)}: {type(error).__name__}: {error}", field="env"
        ) from error
    except ValueError:  # no JSON
        found = None
    schema = found.get("action") if isinstance(found, dict) else None
    return schema if isinstance(schema, dict) else None
