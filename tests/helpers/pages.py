"""The code in the pages of the documentation: found, and run as a reader would who pastes it block by block.

As a program, `python pages.py PAGE stand-in|demo` runs a page's Python blocks in order, in one namespace, in the
current folder. Only the server is another one:

- `stand-in`: whatever the model, the stand-in serves it. A path that the pages call missing is refused as vLLM does.
- `demo`: the embedded model takes the place of the one model that needs a GPU.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import standin

from managed_vllm import ManagedVLLM

GPU_MODEL = "Qwen/Qwen3-0.6B"
"""The pages' example of a model of the reader's own."""

MISSING_MODEL = "/no/such/model"
"""The pages' example of a start that fails."""

_REFUSAL = Path(__file__).parent.parent / "data" / "startup_logs" / "model_path_missing.log"
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of code."""

    language: str
    code: str
    line: int

    @property
    def is_tests(self) -> bool:
        """Whether it is for pytest to run."""
        return re.search(r"^def test_", self.code, re.MULTILINE) is not None


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks in this language, in order."""
    text = page.read_text(encoding="utf-8")
    return [block for block in _blocks(text) if block.language == language]


def _blocks(text: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(text):
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        yield Block(found["language"], code, text.count("\n", 0, found.start("code")) + 1)


def shell_lines(page: Path) -> list[str]:
    """The lines of the page's shell blocks, indented ones included."""
    text = page.read_text(encoding="utf-8")
    shells = [block for block in _blocks(text) if block.language in ("console", "sh", "bash")]
    return [
        *(line for block in shells for line in block.code.splitlines()),
        *re.findall(r"^ {4,}(\S.*)$", _BLOCK.sub("", text), re.MULTILINE),
    ]


def mentions(page: Path, program: str) -> list[str]:
    """What follows the program's name where a sentence mentions a command; it may be a part of one."""
    return re.findall(rf"`{program} ([^`]+)`", _BLOCK.sub("", page.read_text(encoding="utf-8")))


# -- running -----------------------------------------------------------------------------------------------------------


def run(page: Path, server: str) -> None:
    """Runs the page's blocks, but for those that are tests. Raises what a block raises, at the line of the page."""
    if server == "stand-in":
        _serve_by_the_stand_in()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if not block.is_tests:
            code = block.code if server == "stand-in" else block.code.replace(GPU_MODEL, "demo")
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)


def _serve_by_the_stand_in() -> None:
    """From now on each `ManagedVLLM` of this process that names a model has the stand-in for a server."""
    init = ManagedVLLM.__init__

    @functools.wraps(init)
    def with_the_stand_in(self: ManagedVLLM, model: str | None = None, **arguments: Any) -> None:
        if model is not None:
            orders = {"exit": 1, "say": _REFUSAL.read_text().splitlines()} if model == MISSING_MODEL else {}
            arguments["command"] = standin.command()
            arguments["env"] = {**arguments.get("env", {}), **standin.orders(**orders)}
        init(self, model, **arguments)

    ManagedVLLM.__init__ = with_the_stand_in  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
