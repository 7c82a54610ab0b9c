"""OSWorld's own UI-TARS agent from a checkout, fed with answers; and what scripts do, as calls of pyautogui.

`decided` is the reference for `parse_like_osworld`: the effective calls for an answer; `WAIT`, `DONE` or `FAIL` where
an episode ends or waits; `REFUSED` where it sampled in vain; `BREAKS` where its code raised, and the run with it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SIZE = (1920, 1080)
SETTINGS = {
    **{"infer_mode": "qwen25vl_normal", "prompt_style": "qwen25vl_normal", "input_swap": True, "language": "English"},
    **{"history_n": 5, "max_pixels": 16384 * 28**2, "min_pixels": 100 * 28**2, "callusr_tolerance": 3},
    **{"temperature": 0.0, "top_k": -1, "top_p": 0.9, "max_tokens": 1000},
}
"""Of OSWorld's `run_multienv_uitars15_v1.py`."""


class Answers:
    """In the place of the OpenAI client: the last answer again and again; without special tokens, as of a server."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [re.sub(r"<\|\w+\|>", "", text) for text in texts]
        self.asked: list[dict[str, Any]] = []
        self.chat = types.SimpleNamespace(completions=self)

    def create(self, **request: Any) -> Any:
        text = self.texts[min(len(self.asked), len(self.texts) - 1)]
        self.asked.append(request)
        return types.SimpleNamespace(choices=[types.SimpleNamespace(message=types.SimpleNamespace(content=text))])


@functools.cache
def official_module(checkout: Path) -> Any:
    """`mm_agents.uitars15_v1` of the checkout; its accessibility tree is not needed, and not loaded."""
    from importlib import import_module

    unused: Any = types.ModuleType("mm_agents.accessibility_tree_wrap.heuristic_retrieve")
    unused.filter_nodes = None
    sys.modules[unused.__name__] = unused
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return import_module("mm_agents.uitars15_v1")
    finally:
        sys.path.remove(str(checkout))


def decided(checkout: Path, text: str) -> list[Any]:
    """What OSWorld's agent does at an answer."""
    from PIL import Image

    screenshot = io.BytesIO()
    Image.new("RGB", SIZE).save(screenshot, "PNG")
    agent = official_module(checkout).UITARSAgent(model="m", runtime_conf=SETTINGS)
    agent.vlm = Answers([text])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            said, scripts = agent.predict("do it", {"screenshot": screenshot.getvalue()})
        except Exception:
            return ["BREAKS"]
    return ["REFUSED"] if said == "client error" else [call for script in scripts for call in effects(script)]


def effects(script: str) -> list[Any]:
    """The calls of pyautogui and pyperclip in a script, in one notation; none of a script that is no Python.

    A double click is two clicks, a hotkey of one key is a press, and a drag says its button.
    """
    if script in ("DONE", "FAIL", "WAIT"):
        return [script]
    try:
        tree = ast.parse(script)
    except SyntaxError:
        return []
    return list(_calls(tree))


def _calls(tree: ast.Module) -> Iterator[list[Any]]:
    for node in tree.body:
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            continue
        name = ast.unparse(node.value.func)
        arguments = [ast.literal_eval(each) for each in node.value.args]
        options = {str(each.arg): ast.literal_eval(each.value) for each in node.value.keywords}
        if name in ("pyperclip.copy", "to_clipboard"):
            yield ["COPY", arguments, options]
        elif name.startswith("pyautogui."):
            name = name.removeprefix("pyautogui.")
            if name == "doubleClick":
                name, options = "click", {**options, "clicks": 2}
            if name == "hotkey" and len(arguments) == 1:
                name = "press"
            if name == "dragTo":
                options.setdefault("button", "left")
            yield [name, arguments, dict(sorted(options.items()))]
