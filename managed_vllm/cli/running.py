"""The servers of this user as the command line sees them: finding, `status`, `down`.

None of this takes a lease, so that looking at a server neither starts it nor keeps it nor ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from managed_vllm.engine_state import EngineState
from managed_vllm.errors import ConfigError, NoServerError, SupervisorError
from managed_vllm.health import HealthChecks
from managed_vllm.instance import cleanup, directory, external
from managed_vllm.instance.admission import is_of_another_version
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.names import drop_names, named
from managed_vllm.instance.startup_view import describe
from managed_vllm.status import ServerState, ServerStatus

WIDE = 110
"""Columns of a terminal from which on all columns of a table fit."""

GONE_WITHIN_S = 60.0
"""How long a server that is being stopped may take; the supervisor itself allows 5 s before SIGKILL."""

_JUST_MADE_S = 60.0
"""A folder without a record that is younger than this is somebody's start, not a leftover."""


# -- finding -----------------------------------------------------------------------------------------------------------


def find(home: Path, which: str) -> Instance:
    """The instance of that name, id, or unique beginning of an id. Raises `NoServerError` with the candidates."""
    known = directory.instances(home)
    holder = named(home, which)
    if holder is not None and holder.folder.is_dir():
        return holder
    found = [i for i in known if i.id == which] or [i for i in known if which and i.id.startswith(which)]
    if len(found) == 1:
        return found[0]
    what = f"{which!r} fits several servers" if found else f"there is no server {which!r}"
    raise NoServerError(f"{what}; {_listed(home, found or known)}", candidates=tuple(i.id for i in found or known))


def the_only_one(home: Path) -> Instance:
    """The one server that runs. Raises `NoServerError` if there are none or several."""
    known = directory.instances(home)
    alive = [instance for instance in known if directory.is_alive(instance)]
    if len(alive) == 1:
        return alive[0]
    if alive:
        message = f"several servers are running, say which; {_listed(home, alive)}"
    elif known:
        message = f"no server is running; {_ids(known)} left something when they died: managed-vllm down --all"
    else:
        message = "no server is running"
    raise NoServerError(message, candidates=tuple(i.id for i in alive or known))


def _listed(home: Path, instances: Sequence[Instance]) -> str:
    names = names_by_id(home)
    shown = [f"{i.id} ({', '.join(names[i.id])})" if i.id in names else i.id for i in instances]
    return f"there are: {', '.join(shown)}" if shown else "none is running"


def _ids(instances: Sequence[Instance]) -> str:
    return ", ".join(instance.id for instance in instances)


def names_by_id(home: Path) -> dict[str, list[str]]:
    """The names of each instance."""
    names: dict[str, list[str]] = {}
    for path in sorted((home / "names").glob("[!.]*.json")):
        holder = named(home, path.stem)
        if holder is not None:
            names.setdefault(holder.id, []).append(path.stem)
    return names


def peek(instance: Instance) -> ServerStatus | None:
    """What the supervisor says now, None if none answers. Takes no lease."""
    try:
        channel = Channel.connect(instance.socket_path, timeout_s=2.0)
    except OSError:
        return None
    try:
        return ServerStatus.from_dict(channel.request("status", timeout_s=5.0)["status"])
    except (ConnectionError, TimeoutError):
        return None
    finally:
        channel.close()


# -- status ------------------------------------------------------------------------------------------------------------


def status(given: argparse.Namespace) -> int:
    """`managed-vllm status`."""
    home = directory.state_home()
    chosen = [find(home, given.which)] if given.which else directory.instances(home)
    names = names_by_id(home)
    rows = [to_json(i, names.get(i.id, []), peek(i), show_key=given.show_key) for i in chosen]
    if given.json:
        print(json.dumps(rows, indent=2))
        return 0
    if rows:
        _print_table(rows)
    else:
        print("No server is running. Start one: managed-vllm up --model demo")
    for row in rows:
        if given.which:
            print(", ".join(details(row)))
            if row["devices"]:
                print(f"devices: {', '.join(row['devices'])}")
            for user in row["users"]:
                print(f"user {user['pid']}: {user['what']}")
        if row.get("api_key"):
            print(f"{row['id']}: {export_line(script_url(row), row['model'], row['api_key'])}")
    for elsewhere in directory.other_homes(home):
        if found := [instance.id for instance in directory.instances(elsewhere) if directory.is_alive(instance)]:
            print(f"In {elsewhere}: {', '.join(found)}. To see them: {directory.HOME_VARIABLE}={elsewhere}")
    if any(row["state"] == "dead" for row in rows):
        print("Dead: the supervisor was killed. Remove what is left: managed-vllm down --all")
    return 0


def to_json(instance: Instance, names: Sequence[str], seen: ServerStatus | None, *, show_key: bool) -> dict[str, Any]:
    """One server as a JSON object; with its key only if `show_key`."""
    record = instance.read_record() or {}
    spec = record.get("spec") if isinstance(record.get("spec"), dict) else {}
    row: dict[str, Any] = {"id": instance.id, "names": list(names)}
    if seen is None:
        state, detail = _unanswered(instance, bool(record))
        seen = ServerStatus(
            state=ServerState.GONE, epoch=int(record.get("epoch") or 0), detail=detail, supervisor_pid=record.get("pid")
        )
    else:
        state = str(seen.state)
    row |= _life(seen) | {
        "state": state,
        "model": seen.extra.get("model") or (spec or {}).get("served_model_name"),
        "users": [dict(user) for user in seen.extra.get("users", ())],
        "pinned": seen.pinned,
        "keep_alive_s": seen.extra.get("keep_alive_s"),
        "supervisor_pid": seen.supervisor_pid,
        "image_pid": seen.image_pid,
        "log_path": seen.log_path or (str(instance.server_log) if instance.server_log.exists() else None),
        "replicas": [{"replica": number, **_life(one)} for number, one in enumerate(seen.replicas)],
        "router": seen.router.to_dict() if seen.router else None,
    }
    if show_key:
        row["api_key"] = seen.connection.api_key.reveal() if seen.connection else None
    return row


def _life(seen: ServerStatus) -> dict[str, Any]:
    """What concerns one server alone, be it the only one or a replica."""
    connection = seen.connection
    return {
        "state": str(seen.state),
        "stage": seen.stage,
        "detail": seen.detail,
        "base_url": connection.base_url if connection else None,
        "uds": connection.uds if connection else None,
        "epoch": seen.epoch,
        "restarts": seen.restarts,
        "launch": seen.launch or None,
        "server_pid": seen.server_pid,
        "started_at": seen.started_at or None,
        "ready_at": seen.ready_at,
        "log_path": seen.log_path,
        "diagnosis": seen.diagnosis.to_dict() if seen.diagnosis else None,
        "engine": seen.engine.to_dict(),
        "health": asdict(seen.health),
        "devices": list(seen.devices),
    }


def _unanswered(instance: Instance, has_record: bool) -> tuple[str, str]:
    """State and detail of an instance whose supervisor does not answer."""
    if directory.is_alive(instance):
        if not has_record:
            return "starting", ""
        other = is_of_another_version(instance.read_record() or {})
        what = "it was started by another version of managed_vllm" if other else "its supervisor does not answer"
        return "unresponsive", what
    with contextlib.suppress(OSError):
        if not has_record and time.time() - instance.folder.stat().st_mtime < _JUST_MADE_S:
            return "starting", ""
    return "dead", ""


def script_url(row: Mapping[str, Any]) -> str:
    """What scripts are given as the address: of replicas without a router each, with commas between them."""
    if not row["replicas"] or (row["router"] and row["router"]["ready"]):
        return str(row["base_url"])
    return ",".join(one["base_url"] for one in row["replicas"] if one["base_url"])


def export_line(base_url: str, model: str, key: str | None = None) -> str:
    """The shell line with which scripts find the server."""
    values = {external.URL_VARIABLE: base_url, external.MODEL_VARIABLE: model, external.KEY_VARIABLE: key}
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items() if value)


_COLOURS = {"ready": "green", "dead": "red", "failed": "red", "unresponsive": "red"}


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    where = console()
    wide = where.width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1) if wide else (0, 0, 0, 1))
    left = ("id", "name", "state", "model", "URL") if wide else ("id", "state", "URL")
    right = ("epoch", "restarts", "users", "pid", "up") if wide else ("users", "up")
    for head in left:
        table.add_column(head, overflow="fold", no_wrap=head == "id")
    for head in right:
        table.add_column(head, justify="right", no_wrap=True)
    for cells in itertools.chain.from_iterable(map(_cells, rows)):
        if not wide:
            cells["id"] = "\n".join([cells["id"], *cells["name"].split()])
        styles = {"state": _COLOURS.get(cells["state"].partition(",")[0], "yellow")}
        table.add_row(*(Text(cells[head], style=styles.get(head, "")) for head in (*left, *right)))
    where.print(table)


def _cells(row: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The texts of a server's line, and of its replicas' and its router's below it."""
    users = f"{len(row['users'])}{' + pin' if row['pinned'] else ''}"
    more = {"id": row["id"], "name": " ".join(row["names"]), "model": row["model"] or "", "users": users}
    if row["replicas"] and not (row["router"] and row["router"]["ready"]):
        more["URL"] = ""  # there is none of all of them
    yield {**_life_cells(row), **more}
    for replica in row["replicas"]:
        yield {**_life_cells(replica), "id": f"  {replica['replica']}", "model": ", ".join(replica["devices"])}
    if router := row["router"]:
        numbers = {"restarts": str(router["restarts"]), "pid": str(router["pid"] or "")}
        blank = dict.fromkeys(("name", "model", "epoch", "users", "up"), "")
        yield {**blank, **numbers, "id": "  router", "state": router_text(router), "URL": router["base_url"] or ""}


def router_text(router: Mapping[str, Any]) -> str:
    """The state of a row's router, or why there is none."""
    return "ready" if router["ready"] else router["reason"] or "starting"


def _life_cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": "",
        "state": state_text(row),
        "URL": row["uds"] or row["base_url"] or "",
        "epoch": str(row["epoch"]),
        "restarts": str(row["restarts"]),
        "users": "",
        "pid": str(row["server_pid"] or ""),
        "up": duration_text(time.time() - row["ready_at"]) if row["ready_at"] else "",
    }


def details(row: Mapping[str, Any]) -> list[str]:
    """What a row of `to_json` has that no table has a column for."""
    checks, engine = HealthChecks.from_dict(row["health"]), row["engine"]
    found = [f"restarts: {row['restarts']}"]
    if checks.last_s is not None:
        late = f", {checks.unanswered} checks not answered" if checks.unanswered else ""
        found.append(f"/health in {1000 * checks.last_s:.1f} ms{late}")
    if engine["weight_version"]:
        found.append(f"weights: {engine['weight_version']}")
    if engine["loras"]:
        found.append(f"adapters: {' '.join(engine['loras'])}")
    return found


def console() -> Any:
    """Rich's console for standard output: wide enough to cut nothing where that is no terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def state_text(row: Mapping[str, Any]) -> str:
    """The state of a row of `to_json`, with its stage."""
    try:
        said = describe(ServerStatus(state=ServerState(row["state"]), stage=row["stage"], detail=row["detail"]))
        engine = EngineState.from_dict(row["engine"])
        return f"{said}, asleep" if engine.sleep_level is not None else f"{said}, paused" if engine.paused else said
    except ValueError:  # "dead" and "unresponsive" are no states of a server, but of what is left of one
        return str(row["state"])


def duration_text(seconds: float) -> str:
    """A duration in the two largest units."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# -- down --------------------------------------------------------------------------------------------------------------


def down(given: argparse.Namespace) -> int:
    """`managed-vllm down`."""
    if given.all and given.which:
        raise ConfigError("--all and names exclude each other")
    home = directory.state_home()
    if given.all:
        chosen = directory.instances(home)
        if not chosen:
            print("Nothing is running.")
    else:
        chosen = [find(home, which) for which in given.which] or [the_only_one(home)]
    # One after the other: each reports its outcome, and a failure does not skip the rest.
    return max([_end(instance, force=given.force) for instance in dict.fromkeys(chosen)], default=0)


def _end(instance: Instance, *, force: bool) -> int:
    channel = _reach(instance)
    if channel is None:
        return _end_without_supervisor(instance, force=force)
    try:
        seen = ServerStatus.from_dict(channel.request("unpin")["status"])
        reply: dict[str, Any] = {"ok": True}
        with contextlib.suppress(ConnectionError):  # unpinned without keep-alive, it ends by itself
            reply = channel.request("stop", unless_used=not force)
        if not reply["ok"]:
            users = ServerStatus.from_dict(reply["status"]).extra.get("users", ())
            print(f"error: {instance.id} is still used by", file=sys.stderr)
            for user in users:
                print(f"  pid {user['pid']}: {user['what']}", file=sys.stderr)
            print(
                "It is not pinned any more and ends with its last user. For all at once: "
                f"managed-vllm down {instance.id} --force",
                file=sys.stderr,
            )
            return 1
    except TimeoutError:
        return _end_without_supervisor(instance, force=force)
    except ConnectionError:
        seen = ServerStatus(state=ServerState.GONE)  # it was on its way out anyway
    finally:
        channel.close()
    if not wait_until_gone(instance, seen.supervisor_pid):
        raise SupervisorError(
            f"{instance.id} is not gone after {GONE_WITHIN_S:g} s; its supervisor has pid {seen.supervisor_pid}, "
            f"its log is {instance.supervisor_log}",
            instance=instance.id,
        )
    if instance.folder.exists() and peek(instance) is None and not directory.is_alive(instance):
        return _clear(instance)
    print(f"{instance.id} is stopped.")
    return 0


def _end_without_supervisor(instance: Instance, *, force: bool) -> int:
    """Ends an instance whose supervisor is dead; one whose supervisor hangs only with `force`."""
    if directory.is_alive(instance):
        if not force:
            raise SupervisorError(
                f"the supervisor does not answer; kill it and its server: managed-vllm down {instance.id} --force",
                instance=instance.id,
            )
        _kill_supervisor(instance)
    return _clear(instance)


def _reach(instance: Instance) -> Channel | None:
    """A channel to the supervisor, which may just be starting; None if it is dead or does not answer."""
    deadline = time.monotonic() + 10.0
    while True:
        try:
            return Channel.connect(instance.socket_path, timeout_s=5.0)
        except TimeoutError:
            return None
        except OSError:
            if time.monotonic() > deadline or not directory.is_alive(instance):
                return None
            time.sleep(0.05)


def wait_until_gone(instance: Instance, supervisor_pid: int | None, timeout_s: float = GONE_WITHIN_S) -> bool:
    """Waits until that supervisor is gone: its folder removed, its lock free, or another one in its place."""
    deadline = time.monotonic() + timeout_s
    while instance.folder.exists():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        try:
            channel = Channel.connect(instance.socket_path, timeout_s=min(2.0, left))
        except OSError:
            if not directory.is_alive(instance):
                return True
            time.sleep(0.05)
            continue
        try:
            now = ServerStatus.from_dict(channel.request("status", timeout_s=min(5.0, left))["status"])
            if supervisor_pid is not None and now.supervisor_pid != supervisor_pid:
                return True
            channel.wait_until(lambda _: False, left)
        except (ConnectionError, TimeoutError):
            continue
        finally:
            channel.close()
    return True


def _kill_supervisor(instance: Instance) -> None:
    """SIGKILL for a supervisor that hangs. The kernel takes its server down with it."""
    supervisor = cleanup.recorded_supervisor(instance)
    if supervisor is not None:
        cleanup.end_processes([supervisor])
        # Its main thread may be a zombie while another one still holds the lock.
        deadline = time.monotonic() + 5.0
        while directory.is_alive(instance) and time.monotonic() < deadline:
            time.sleep(0.05)


def _clear(instance: Instance) -> int:
    """Removes what a dead instance has left: processes, names, its folder."""
    try:
        with instance.start_lock(10.0):
            if directory.is_alive(instance):
                print(f"error: somebody has just started {instance.id} again", file=sys.stderr)
                return 1
            left = cleanup.end_processes(cleanup.marked_processes(instance))
            if left:
                pids = ", ".join(str(process.pid) for process in left)
                print(f"error: can't end {pids} of {instance.id}", file=sys.stderr)
                return 1
            drop_names(instance.home, instance.id)
            cleanup.remove_instance(instance)
    except FileNotFoundError:
        pass  # the folder went in the meantime
    except TimeoutError:
        print(f"error: somebody is just starting {instance.id}", file=sys.stderr)
        return 1
    print(f"{instance.id} was dead; what it left is removed.")
    return 0
