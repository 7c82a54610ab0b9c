"""`managed-vllm top`: all servers at a glance, again and again; keys show a log, restart, stop.

Looking takes no lease. Restarting does, for as long as that takes, as `managed-vllm restart` itself.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from managed_vllm.cli import running
from managed_vllm.cli.looks import Look, Looker
from managed_vllm.errors import ConfigError
from managed_vllm.instance import directory

_KEYS = "↑ ↓ choose   l log   r restart   s stop   q quit"
_KEY = re.compile(r"\x1b[\[O][A-Z]|.", re.DOTALL)
_UP, _DOWN = ("k", "\x1b[A", "\x1bOA"), ("j", "\x1b[B", "\x1bOB")


def top(given: argparse.Namespace) -> int:
    """`managed-vllm top`."""
    looker = Looker(directory.state_home())
    if given.once or given.json:
        looker.look()
        time.sleep(given.interval)
        looks = looker.look()
        if given.json:
            print(json.dumps([look.to_dict() for look in looks], indent=2))
        else:
            console = running.console()
            console.print(_table(looks, None, console.width))
        return 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("top needs a terminal; elsewhere use --once or --json")
    _Screen(looker, given.interval).run()
    return 0


class _Screen:
    """The terminal: the table, the users of the chosen server, and the keys."""

    def __init__(self, looker: Looker, interval_s: float) -> None:
        self._looker = looker
        self._keyboard = _Keyboard()
        self._interval_s = interval_s
        self._looks: list[Look] = []
        self._chosen: str | None = None
        self._to_stop: str | None = None
        self._running: tuple[str, subprocess.Popen[str]] | None = None
        self._said = ""

    def run(self) -> None:
        """Until `q` or Ctrl-C."""
        from rich.live import Live

        with contextlib.suppress(KeyboardInterrupt), _keys_unbuffered():
            while True:
                with Live(console=running.console(), screen=True, auto_refresh=False) as live:
                    key = self._until_a_log_or_the_end(live)
                if key == "q":
                    return
                self._show_log()

    def _until_a_log_or_the_end(self, live: Any) -> str:
        while True:
            self._looks = self._looker.look()
            ids = [look.row["id"] for look in self._looks]
            if self._chosen not in ids:
                self._chosen = ids[0] if ids else None
            self._collect()
            deadline = time.monotonic() + self._interval_s
            while True:
                live.update(self._view(live.console.width), refresh=True)
                key = self._keyboard.next(max(0.0, deadline - time.monotonic()))
                if key == "q" or (key == "l" and self._chosen):
                    return key
                if not key:
                    break
                self._take(key, ids)

    def _take(self, key: str, ids: Sequence[str]) -> None:
        stop, self._to_stop = self._to_stop, None
        if stop is not None:
            self._said = ""
            if key == "y":
                self._start("down", stop)
        elif self._chosen is None:
            return
        elif key in _UP or key in _DOWN:
            there = ids.index(self._chosen) + (1 if key in _DOWN else -1)
            self._chosen = ids[max(0, min(there, len(ids) - 1))]
        elif key == "r":
            self._start("restart", self._chosen)
        elif key == "s":
            self._to_stop = self._chosen
            self._said = f"stop {self._chosen}? It is left to those that use it. (y)es, any other key: no"

    def _start(self, command: str, which: str) -> None:
        """Runs `managed-vllm COMMAND WHICH` beside; one at a time."""
        if self._running is not None:
            return
        words = [sys.executable, "-m", "managed_vllm.cli", command, which]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self._running = (f"{command} {which}", process)
        self._said = f"{command} {which} …"

    def _collect(self) -> None:
        if self._running is not None and self._running[1].poll() is not None:
            what, process = self._running
            said = process.communicate()[0].strip().splitlines()
            self._said = said[-1] if said else f"{what}: exit code {process.returncode}"
            self._running = None

    def _show_log(self) -> None:
        """`managed-vllm logs -f` until Ctrl-C, which is for it alone."""
        words = [sys.executable, "-m", "managed_vllm.cli", "logs", str(self._chosen), "-f"]
        print(f"The log of {self._chosen}; back with Ctrl-C.", flush=True)
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()

    def _view(self, width: int) -> Any:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(_KEYS, style="dim", no_wrap=True, overflow="ellipsis")]
        if self._said:
            lines.insert(0, Text(self._said, style="yellow", no_wrap=True, overflow="ellipsis"))
        chosen = [look for look in self._looks if look.row["id"] == self._chosen]
        return Group(_table(self._looks, self._chosen, width), *map(_users, chosen), *lines)


def _table(looks: Sequence[Look], chosen: str | None, width: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not looks:
        return Text("No server is running. Start one: managed-vllm up --model demo")
    wide = width >= running.WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1) if wide else (0, 0, 0, 1))
    rows = [(look, cells) for look in looks for cells in (_cells(look), *map(_replica_cells, look.replicas))]
    for head, (_, always) in rows[0][1].items():
        if wide or always:
            left = head in ("id", "name", "state", "model")
            table.add_column(head, justify="left" if left else "right", overflow="ellipsis", no_wrap=True)
    for look, cells in rows:
        shown = [Text(text) for text, always in cells.values() if wide or always]
        table.add_row(*shown, style="reverse" if look.row["id"] == chosen else "")
    return table


Cells = dict[str, tuple[str, bool]]
"""The text of each column, and whether it is there on a narrow terminal, too."""


def _cells(look: Look) -> Cells:
    row = look.row
    users = f"{len(row['users'])}{'+pin' if row['pinned'] else ''}"
    own = {"id": row["id"], "name": " ".join(row["names"]), "model": row["model"] or "", "users": users}
    return _with_texts(_measured(look), own)


def _replica_cells(look: Look) -> Cells:
    """The line of a replica below that of its server."""
    own = {"id": f"  {look.row['replica']}", "model": ", ".join(look.row["devices"])}
    return _with_texts(_measured(look), own)


def _with_texts(cells: Cells, texts: Mapping[str, object]) -> Cells:
    return {head: (str(texts.get(head, text)), always) for head, (text, always) in cells.items()}


def _measured(look: Look) -> Cells:
    row, metrics, rates = look.row, look.metrics, look.rates
    busy = f"{_count(metrics.running)}+{_count(metrics.waiting)}" if metrics else ""
    return {
        "id": ("", True),
        "name": ("", False),
        "state": (running.state_text(row), True),
        "model": ("", False),
        "ep.": (str(row["epoch"]), True),
        "users": ("", True),
        "run+wait": (busy, True),
        "in tok/s": (_rate(rates.prompt_tokens_per_s) if rates else "", False),
        "tok/s": (_rate(rates.generation_tokens_per_s) if rates else "", True),
        "req/s": (_rate(rates.requests_per_s) if rates else "", False),
        "KV": (_share(metrics.kv_cache_usage) if metrics else "", True),
        "hits": (_share(metrics.prefix_cache_hit_rate) if metrics else "", False),
        "mem": (_size(look.memory_bytes) if look.memory_bytes else "", True),
        "GPU": (_size(look.gpu_memory_bytes) if look.gpu_memory_bytes is not None else "", False),
        "up": (running.duration_text(time.time() - row["ready_at"]) if row["ready_at"] else "", False),
    }


def _users(look: Look) -> Any:
    from rich.console import Group
    from rich.text import Text

    users = look.row["users"]
    head = f"{look.row['id']}: " + ", ".join([*running.details(look.row), f"users: {len(users)}"])
    router = [Text(f"  router: {running.router_text(look.row['router'])}")] if look.row["router"] else []
    lines = [Text(f"{user['pid']:>8}  {user['what']}", no_wrap=True, overflow="ellipsis") for user in users]
    return Group(Text(head, style="bold", no_wrap=True, overflow="ellipsis"), *router, *lines, Text(""))


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _rate(per_s: float | None) -> str:
    return "" if per_s is None else f"{per_s:.1f}" if per_s < 10 else f"{per_s:.0f}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} G" if size >= 2**30 else f"{size / 2**20:.0f} M"


# -- keys --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _keys_unbuffered() -> Iterator[None]:
    """Each key arrives at once, and is not shown."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class _Keyboard:
    """The keys that were pressed, one by one, also where several have come while nobody was looking."""

    def __init__(self) -> None:
        self._pressed: collections.deque[str] = collections.deque()

    def next(self, wait_s: float) -> str:
        """The next key, an arrow as its escape sequence; empty where none comes in time, "q" at the input's end."""
        if not self._pressed:
            if not select.select([sys.stdin], [], [], wait_s)[0]:
                return ""
            self._pressed += _KEY.findall(os.read(sys.stdin.fileno(), 256).decode(errors="replace")) or ["q"]
        return self._pressed.popleft()
