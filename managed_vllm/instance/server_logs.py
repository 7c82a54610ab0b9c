"""The logs of a server: one, or one of each replica, whose lines then say whose they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from managed_vllm.errors import ConfigError
from managed_vllm.instance.directory import Instance, tail
from managed_vllm.status import ServerStatus


def log_paths(status: ServerStatus) -> Mapping[int | None, Path]:
    """The logs by the replica's number; that of a single server with None. Empty for one that somebody else runs."""
    if status.replicas:
        return {number: Path(one.log_path) for number, one in enumerate(status.replicas) if one.log_path}
    return {None: Path(status.log_path)} if status.log_path else {}


def logs_in(instance: Instance) -> Mapping[int | None, Path]:
    """As `log_paths`, from what is in the instance's folder; that of a single server may not be there yet."""
    numbers = {path: re.fullmatch(r"server-(\d+)\.log", path.name) for path in instance.folder.glob("server-*.log")}
    found = {int(match[1]): path for path, match in numbers.items() if match}
    return {number: found[number] for number in sorted(found)} or {None: instance.server_log}


def newest_lines(status: ServerStatus, lines: int) -> str:
    """The last lines of each log. Raises `ConfigError` for a server that somebody else runs: its log is not ours."""
    paths = log_paths(status)
    if not paths:
        raise ConfigError("an external server's log is not here", field="base_url")
    return "\n".join(filter(None, (headed(tail(path, lines), replica) for replica, path in paths.items())))


def headed(text: str, replica: int | None) -> str:
    """The text with the replica's number before each line; as it is, for a single server."""
    if replica is None:
        return text
    return "".join(f"[{replica}] {line}" for line in text.splitlines(keepends=True))
