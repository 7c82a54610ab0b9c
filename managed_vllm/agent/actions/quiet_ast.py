"""Python's parser on what a model wrote, without its warnings."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Python warns of a model's backslashes as if they were in our own source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parsed_expression(source: str) -> ast.expr:
    """One expression; nothing is executed.

    Raises `SyntaxError`, `ValueError`, `RecursionError` or `MemoryError`: it is none.
    """
    with no_warnings():
        return ast.parse(source, mode="eval").body


def parsed_statements(source: str) -> list[ast.stmt]:
    """The statements of a piece of code. As `parsed_expression` otherwise."""
    with no_warnings():
        return ast.parse(source).body
