"""Paths as callers write them, made absolute against the caller's working directory: a server runs in another.

What must hold: the same file is the same text however it was written (`/m/`, `./m`, `~/m`, a symbolic link), and what
is no path is left as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from managed_vllm.errors import ConfigError

_SEARCH_PATHS = frozenset({"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH"})
"""Variables that are lists of folders, in which an empty entry is the working directory."""

_PATH_VARIABLES = frozenset(
    {
        "CUDA_HOME",
        "CURL_CA_BUNDLE",
        "HF_ASSETS_CACHE",
        "HF_DATASETS_CACHE",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_MODULES_CACHE",
        "HF_TOKEN_PATH",
        "HOME",
        "HUGGINGFACE_HUB_CACHE",
        "NUMBA_CACHE_DIR",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "TIKTOKEN_ENCODINGS_BASE",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_EXTENSIONS_DIR",
        "TORCH_HOME",
        "TRANSFORMERS_CACHE",
        "TRITON_CACHE_DIR",
        "VLLM_ASSETS_CACHE",
        "VLLM_CACHE_ROOT",
        "VLLM_CONFIG_ROOT",
        "VLLM_LOGGING_CONFIG_PATH",
        "VLLM_LORA_RESOLVER_CACHE_DIR",
        "VLLM_TORCH_PROFILER_DIR",
        "VLLM_TUNED_CONFIG_FOLDER",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
    }
)
"""Variables whose value is one path, which need not exist yet."""


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute path, `~` expanded, symbolic links kept: for programs, which look around where they were called."""
    with _caller_has_a_directory(path):
        return os.path.abspath(os.path.expanduser(os.fspath(path)))


def canonical(path: str | os.PathLike[str]) -> str:
    """The absolute path without symbolic links: one text for one file, whether it exists yet or not."""
    with _caller_has_a_directory(path):
        return os.path.realpath(os.path.expanduser(os.fspath(path)))


def existing(text: str) -> str | None:
    """The canonical path if something is there, else None: the text may be a path, or a name such as `org/model`."""
    try:
        path = canonical(text)
        return path if text and os.path.exists(path) else None
    except (OSError, ValueError):  # too long, with a NUL, or relative without a working directory
        return None


def looks_like_path(text: str) -> bool:
    """True if the text can't be meant as a name: it begins with `/`, `./`, `../` or `~`, or is `.` or `..`."""
    return text in (".", "..") or text.startswith(("/", "./", "../", "~"))


def argument(text: str) -> str:
    """The canonical path if the text looks like one, or something of that name is there; else the text."""
    return canonical(text) if looks_like_path(text) and "\0" not in text else existing(text) or text


def command_word(word: str) -> str:
    """A word of a command, absolute if it is a relative path: begins with `./`, `../` or `~/`, or names a regular file.

    The name of a folder is left alone: `serve` is a subcommand, whatever lies in the working directory. Of
    `--flag=value` the value is meant.
    """
    flag, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    if not value or os.path.isabs(value) or "\0" in value:
        return word
    is_path = value.startswith(("./", "../", "~/"))
    return f"{flag}{equals}{absolute(value)}" if is_path or _is_file(value) else word


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with the paths in them made absolute: known ones, and values beginning with `./` or `../`.

    In a working directory that was removed they are left as they are.
    """
    return {name: _variable(name, value) for name, value in variables.items()}


def _variable(name: str, value: str) -> str:
    try:
        return _absolute_variable(name, value)
    except ConfigError:
        return value


def _absolute_variable(name: str, value: str) -> str:
    if name in _SEARCH_PATHS:
        return os.pathsep.join(absolute(entry) for entry in value.split(os.pathsep)) if value else value
    if value and (name in _PATH_VARIABLES or value.startswith(("./", "../"))):
        return absolute(value)
    return value


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _caller_has_a_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:  # what os.getcwd says
        raise ConfigError(
            f"{os.fspath(path)!r} is relative, and the working directory was removed; give an absolute path"
        ) from error
