"""The processes of a state directory as somebody outside sees them, in `/proc`; nothing of the library is used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One live process. `role` is supervisor, image, api, child (EngineCore or Worker), orphan or other."""

    pid: int
    parent: int
    name: str
    state: str
    role: str
    command: str


def look(home: Path) -> list[Process]:
    """Every live process that belongs to the instances below `home`, without its clients."""
    marker = f"MANAGED_VLLM_INSTANCE={home}/".encode()
    of_home = f"MANAGED_VLLM_HOME={home}\0".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            environ = Path(entry.path, "environ").read_bytes() + b"\0"
            if of_home not in environ:
                continue
            command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            name, _, rest = Path(entry.path, "stat").read_text().partition("(")[2].rpartition(")")
            if _is_killed(Path(entry.path, "status").read_text()):
                continue
        except OSError:
            continue
        state, parent = rest.split()[:2]
        role = _role(command, marked=marker in environ)
        if role is not None and state not in "ZX":
            found.append(Process(int(entry.name), int(parent), name, state, role, command.strip()))
    return _with_forked(found)


def _is_killed(status: str) -> bool:
    """Whether SIGKILL was sent: it does nothing any more, however late the machine lets it end."""
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(signals & 1 << signal.SIGKILL - 1 for signals in pending)


def _with_forked(found: list[Process]) -> list[Process]:
    """A forked child has its parent's command line until it takes another one: its parent says what it is."""
    role_of = {process.pid: process.role for process in found}
    below = {"api": {"api": "child"}, "child": {"api": "child"}, "image": {"image": "other", "api": "other"}}
    return [dataclasses.replace(p, role=below.get(role_of.get(p.parent, ""), {}).get(p.role, p.role)) for p in found]


def _role(command: str, *, marked: bool) -> str | None:
    if "managed_vllm.supervisor" in command:
        return "supervisor"
    if not marked:
        return None
    if "spawn_main" in command:
        return "child"
    if "managed_vllm_image" in command or command.startswith("managed-vllm image"):
        return "image"
    if "standin.py" in command or "api_server" in command or "vllm.entrypoints" in command:
        return "api"
    return "orphan" if "sleep" in command else "other"


def victims(home: Path, kind: str) -> list[int]:
    """The pids that a strike like `kill-engine` or `kill-supervisor+api` meets; empty if one of them is not there."""
    processes = look(home)
    pids: dict[str, int] = {}
    for process in processes:
        if process.role in ("supervisor", "image", "api"):
            pids[process.role] = process.pid
    for parent, name in (("api", "engine"), ("engine", "worker")):
        for process in processes:
            if process.role == "child" and process.parent == pids.get(parent):
                pids[name] = process.pid
    wanted = kind.partition("-")[2].split("+")
    return [pids[name] for name in wanted] if all(name in pids for name in wanted) else []


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def send_all(home: Path, numbers: Iterable[signal.Signals]) -> None:
    """To each process but the clients and what a client would find as its own orphan."""
    for number in numbers:
        send([process.pid for process in look(home) if process.role != "orphan"], number)


def remove_folders(home: Path) -> int:
    """As a cleaner of temporary folders does, while they are in use; returns how many there were."""
    folders = [path.parent for path in home.glob("*/supervisor.lock")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return len(folders)


def torn_records(home: Path) -> list[str]:
    """Records that are there and can't be read."""
    torn = []
    for path in home.glob("*/instance.json"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            try:
                json.loads(text)
            except ValueError:
                torn.append(f"{path.name}: {text[:200]!r}")
    return torn


def files_left(home: Path) -> list[str]:
    """What is below the state directory, but for the kept logs of failed servers and its own token."""
    if not home.exists():
        return []
    return [str(path.relative_to(home)) for path in home.iterdir() if path.name not in ("failed", ".token")]


def keep_logs(home: Path, kept: Path) -> None:
    """Links the logs of the instances to where they survive their folders."""
    for name in ("supervisor.log", "events.jsonl", "server.log"):
        for path in home.glob(f"*/{name}"):
            with contextlib.suppress(OSError):
                os.link(path, kept / f"{path.parent.name}-{path.stat().st_ino}-{name}")
