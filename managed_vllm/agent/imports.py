"""Functions by name, `package.module:function`, for the command line; also those of the current folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from managed_vllm.errors import ConfigError


def imported(name: str, *, field: str) -> Callable[..., Any]:
    """The function, or class, of that name. Raises `ConfigError` about `field`: there is none, or it is no function."""
    module, _, attributes = name.partition(":")
    if not module or not attributes:
        raise ConfigError(f"{name!r:.80} names no function: write package.module:function", field=field)
    folder = str(Path.cwd())
    if folder not in sys.path:  # the command's own folder is in it, not the user's
        sys.path.insert(0, folder)
    try:
        found: Any = import_module(module)
        for part in attributes.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's own module raises
        raise ConfigError(f"{name} can't be imported: {type(error).__name__}: {error}", field=field) from error
    if not callable(found):
        raise ConfigError(f"{name} is no function", field=field)
    function: Callable[..., Any] = found
    return function
