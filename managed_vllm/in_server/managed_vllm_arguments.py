"""Puts secrets into the arguments of the server's first interpreter, so that `ps` does not show them.

A command line can be read by every user of the machine, an environment by its owner only. So an argument with a secret
in it (`--kv-transfer-config '{"api_key": …}'`) is written with a placeholder, and what it stands for is in the
environment; `sitecustomize.py` calls `fill_in` before the program looks at its arguments.
"""

from __future__ import annotations

import json
import os
import sys

VARIABLE = "MANAGED_VLLM_SECRET_ARGUMENTS"
"""Environment variable: a JSON object, from each placeholder to the JSON text that stands there in truth."""


def fill_in() -> None:
    """Replaces the placeholders in `sys.argv`. The variable is gone afterwards: other processes don't need it."""
    hidden = os.environ.pop(VARIABLE, None)
    if hidden is not None:
        sys.argv[:] = [filled_in(word, json.loads(hidden)) for word in sys.argv]


def filled_in(word: str, hidden: dict[str, str]) -> str:
    """The word with what its placeholders stand for: JSON where a placeholder is a string of JSON, else plain text."""
    for placeholder, value in hidden.items():
        word = word.replace(f'"{placeholder}"', value)
        if placeholder in word:
            word = word.replace(placeholder, str(json.loads(value)))
    return word
