"""The files that a server reads when it starts: what they were then, and how they differ now.

A checkpoint that is overwritten in place keeps its path, and so the server's key; the weights in memory are the old
ones. So the supervisor notes size, time of change and inode of each file just before it launches vLLM, and whoever
attaches compares them with what is on disk.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from managed_vllm.config import ServerSpec

Files = dict[str, list[int]]
"""Path of each file: its size in bytes, its time of change in nanoseconds, its inode (0 where that is not stable)."""

_READ_BY_VLLM = frozenset(
    {".bin", ".gguf", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors", ".tiktoken", ".txt", ".yaml"}
)
"""Endings of files that vLLM or transformers read from a model's folder."""

_OF_THE_TRAINER = ("optimizer", "rng_state", "scaler", "scheduler", "trainer_state", "training_args", "events.out")
"""Beginnings of files that a trainer writes beside a checkpoint, and that no server reads."""

_NOT_READ_AT_START = ("download_dir", "allowed_local_media_path", "ssl_", "log_config_file", "cache_dir", "_dump_path")

_READ_FOLDERS = re.compile(r"additional_chat_templates|\d+_[A-Z]\w*")
"""Folders in a model's folder of which something is read; the second is sentence-transformers' (`1_Pooling`)."""

_MOST_FILES = 4096


def snapshot(spec: ServerSpec) -> Files:
    """Every file that a server of this spec reads at its start, as it is now.

    That is the model's folder, and whatever else its arguments name: adapters, tokenizer, chat template, draft model,
    plugins. Of a folder only what is read: not the checkpoints that a trainer goes on to put into it. At most 4,096
    files. Nothing for a model of the hub: the files of a revision don't change.
    """
    found = itertools.chain.from_iterable(_files(path) for path in dict.fromkeys(_paths_of(spec)))
    return dict(itertools.islice(found, _MOST_FILES))


def changes(served: Files, now: Files) -> dict[str, tuple[Any, Any]]:
    """Each file that is not as it was: `(now, when it was read)`, in words."""
    return {
        path: (_in_words(now.get(path)), _in_words(served.get(path)))
        for path in sorted(served.keys() | now.keys())
        if not _same(served.get(path), now.get(path))
    }


def _same(one: list[int] | None, other: list[int] | None) -> bool:
    if one is None or other is None:
        return one == other
    return one[:2] == other[:2] and (one[2] == other[2] or 0 in (one[2], other[2]))


def _in_words(file: list[int] | None) -> str:
    if file is None:
        return "not there"
    size, changed_ns, inode = file
    changed = datetime.datetime.fromtimestamp(changed_ns / 1e9)
    return f"{size} bytes of {changed.isoformat(' ', 'milliseconds')}, inode {inode}"


def _paths_of(spec: ServerSpec) -> Iterator[str]:
    yield from (path for path in [spec.model] if os.path.isabs(path))
    yield from _paths_in("", spec.engine_args)


def _paths_in(name: str, value: Any) -> Iterator[str]:
    """The absolute paths in canonical arguments; `name=path` is one of `lora_modules`."""
    if any(part in name for part in _NOT_READ_AT_START):
        return
    if isinstance(value, Mapping):
        for field, item in value.items():
            yield from _paths_in(str(field), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths_in(name, item)
    elif isinstance(value, str):
        path = value.partition("=")[2] if name == "lora_modules" else value
        if os.path.isabs(path) and "\n" not in path:
            yield path


def _files(path: str) -> Iterator[tuple[str, list[int]]]:
    """The files at a path: the one that it is, or those in the folder."""
    if (seen := _seen(path)) is not None:
        yield path, seen
    for entry in _entries(path):
        if _READ_FOLDERS.fullmatch(entry.name):
            yield from (each for inner in _entries(entry.path) for each in _in_folder(inner))
        else:
            yield from _in_folder(entry)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing for what is none, or is not ours to read: vLLM says so itself."""
    try:
        with os.scandir(folder) as found:
            return sorted(itertools.islice(found, _MOST_FILES), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return []


def _in_folder(entry: os.DirEntry[str]) -> Iterator[tuple[str, list[int]]]:
    read = Path(entry.name).suffix in _READ_BY_VLLM and not entry.name.startswith((".", *_OF_THE_TRAINER))
    if read and (seen := _seen(entry.path)) is not None:
        yield entry.path, seen


def _seen(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino if _has_stable_inodes(status.st_dev) else 0]


@functools.lru_cache(maxsize=64)
def _has_stable_inodes(device: int) -> bool:
    """False for file systems in user space (sshfs, gcsfuse, …): they give a file a new inode whenever they like."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return True
    kinds = [line.partition(" - ")[2] for line in mounts if line.split()[2:3] == [number]]
    return not any(kind.startswith("fuse") for kind in kinds)
