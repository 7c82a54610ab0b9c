"""API keys on the command line: as a word, which `ps` shows to every user of the machine, or from a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from managed_vllm.errors import ConfigError
from managed_vllm.urls import checked_api_key


def given_key(given: argparse.Namespace) -> str | None:
    """The key of `--api-key` or `--api-key-file`; None without either. Raises `ConfigError`."""
    if given.api_key_file is None:
        return given.api_key or None
    if given.api_key is not None:
        raise ConfigError("--api-key and --api-key-file exclude each other", field="api_key")
    try:
        text = sys.stdin.read() if given.api_key_file == "-" else Path(given.api_key_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--api-key-file {given.api_key_file}: {reason}", field="api_key") from None
    return str(checked_api_key(text.strip()).reveal())
