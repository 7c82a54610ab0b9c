"""The prompt of OSWorld's own UI-TARS agent, from the user's checkout: models were trained on its very words.

It is not carried here. Its module is read as syntax, and not run.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

from managed_vllm.errors import ConfigError

_MODULE = "mm_agents/uitars15_v1.py"
_PROMPT, _ACTIONS = "UITARS_USR_PROMPT_THOUGHT", "UITARS_NORMAL_ACTION_SPACE"


def read_osworld_prompt(checkout: str | os.PathLike[str]) -> str:
    """The prompt with its list of actions, `{language}` and `{instruction}` still to be put in.

    Args:
        checkout: of github.com/xlang-ai/OSWorld, whose `mm_agents/uitars15_v1.py` is read.

    Raises `ConfigError`: it is none, or the prompt is not in it any more.
    """
    path = Path(checkout).expanduser() / _MODULE
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"OSWorld's prompt can't be read from {path}: {error}", field="checkout") from error
    texts = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    missing = [name for name in (_PROMPT, _ACTIONS) if not isinstance(texts.get(name), str)]
    if missing:
        raise ConfigError(f"{path} has no {', '.join(missing)} any more; give prompt=", field="checkout")
    prompt, actions = str(texts[_PROMPT]), str(texts[_ACTIONS])
    return prompt.replace("{action_space}", actions)
