"""`managed-vllm serve` and `managed-vllm up`: a server in the foreground, and one in the background."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from managed_vllm import ManagedVLLM, engine_arguments
from managed_vllm.cli import Terminated, running
from managed_vllm.cli.keys import given_key
from managed_vllm.cli.logs import ServerLogs, write
from managed_vllm.errors import ConfigError
from managed_vllm.instance import directory, external
from managed_vllm.instance.attach import ATTACH_VARIABLE
from managed_vllm.instance.directory import Instance
from managed_vllm.session import spec_of
from managed_vllm.status import ServerState, ServerStatus


def serve(given: argparse.Namespace) -> int:
    """`managed-vllm serve`: returns only by an exception, Ctrl-C and SIGTERM included."""
    llm, instance = _prepare(given, progress=True)
    with terminable():
        try:
            with llm:
                _print_use(instance, llm.status(), started=llm.started_it, stop="Ctrl-C")
                _follow(llm, instance)
        except (KeyboardInterrupt, Terminated):
            _report_leaving(instance)
            raise
    return 0


def up(given: argparse.Namespace) -> int:
    """`managed-vllm up`."""
    llm, instance = _prepare(given, progress=not given.json, wait=not given.no_wait)
    with llm:
        llm.pin()
        seen = llm.status()
    if given.json:
        names = running.names_by_id(instance.home).get(instance.id, [])
        # Our own lease is given back: it is no user any more.
        row = running.to_json(instance, names, seen, show_key=False)
        row["users"] = [user for user in row["users"] if user["pid"] != os.getpid()]
        print(json.dumps(row, indent=2))
    else:
        _print_use(instance, seen, started=llm.started_it, stop=f"managed-vllm down {given.name or instance.id}")
    return 0


def restart(given: argparse.Namespace) -> int:
    """`managed-vllm restart`."""
    home = directory.state_home()
    instance = running.find(home, given.which) if given.which else running.the_only_one(home)
    os.environ[ATTACH_VARIABLE] = instance.id
    os.environ.pop(external.URL_VARIABLE, None)
    with ManagedVLLM(keep_alive=0, wait=False) as llm:
        seen = llm.restart()
    print(f"{instance.id} serves again, epoch {seen.epoch}.")
    return 0


def _prepare(given: argparse.Namespace, *, progress: bool, wait: bool = True) -> tuple[ManagedVLLM, Instance]:
    """The handle for what the command line asks for, not entered, and the instance to which it will attach."""
    model, arguments = model_and_arguments(given)
    if not model:
        raise ConfigError("which model? Give --model NAME, a folder, or --model demo", field="model")
    # `serve` means a server here, even in a shell whose scripts use one elsewhere.
    os.environ.pop(external.URL_VARIABLE, None)
    llm = handle(given, model, arguments, progress=progress, wait=wait, on_status=_RestartReporter())
    spec = spec_of(
        model,
        arguments,
        for_training=given.for_training,
        idle_sleep=given.idle_sleep,
        env=_environment(given),
        python=given.python,
        command=_command(given),
        devices=given.devices,
        cores=given.cores,
        replicas=given.replicas,
    )
    return llm, Instance(directory.state_home(), spec.key)


def model_and_arguments(given: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The model, if one is named, and vLLM's engine arguments."""
    rest = list(given.rest)
    model = given.model
    if rest and not rest[0].startswith("-") and model is None:
        model = rest.pop(0)  # as `vllm serve MODEL` has it
    arguments = engine_arguments.from_flags(rest)
    for name in ("tensor_parallel_size", "gpu_memory_utilization"):
        if getattr(given, name) is not None:
            arguments[name] = getattr(given, name)
    return model, arguments


def handle(given: argparse.Namespace, model: str | None, arguments: dict[str, Any], **more: Any) -> ManagedVLLM:
    """A handle, not entered, with the options that `serve`, `up` and `rollout` share."""
    return ManagedVLLM(
        model,
        name=given.name,
        api_key=given_key(given),
        host=given.host,
        port=given.port,
        uds=given.uds,
        keep_alive=given.keep_alive,
        startup_timeout=given.startup_timeout,
        startup_silence=given.startup_silence,
        first_request_timeout=given.first_request_timeout,
        stop_grace=given.stop_grace,
        gpu_release_timeout=given.gpu_release_timeout,
        idle_sleep=given.idle_sleep,
        env=_environment(given),
        python=given.python,
        command=_command(given),
        devices=given.devices,
        cores=given.cores,
        replicas=given.replicas,
        wait_for_devices=given.wait_for_devices,
        share=given.share,
        warm=_WARM[given.warm],
        for_training=given.for_training,
        **more,
        **arguments,
    )


_WARM: dict[str | None, bool | Literal["auto"] | None] = {None: None, "auto": "auto", "on": True, "off": False}


def _environment(given: argparse.Namespace) -> dict[str, str]:
    return dict(_variable(word) for word in given.env)


def _command(given: argparse.Namespace) -> list[str] | None:
    return shlex.split(given.command) if given.command else None


class _RestartReporter:
    """Reports each restart on standard error: why it is restarted, and when it serves again."""

    def __init__(self) -> None:
        self._epochs: dict[int | None, int] = {}
        self._down: set[int | None] = set()

    def __call__(self, status: ServerStatus) -> None:
        servers: dict[int | None, ServerStatus] = dict(enumerate(status.replicas)) or {None: status}
        for which, one in servers.items():
            self._report("managed-vllm:" if which is None else f"managed-vllm: replica {which}:", which, one)

    def _report(self, head: str, which: int | None, status: ServerStatus) -> None:
        before = self._epochs.get(which, 0)
        if status.state is ServerState.RESTARTING and status.epoch != before:
            if status.diagnosis is not None and before:
                print(f"{head} {status.diagnosis.summary}; it is started again", file=sys.stderr, flush=True)
            self._down.add(which)
            self._epochs[which] = status.epoch
        elif status.state is ServerState.READY:
            if before and (which in self._down or before != status.epoch):
                print(f"{head} serving again, epoch {status.epoch}", file=sys.stderr, flush=True)
            self._down.discard(which)
            self._epochs[which] = status.epoch


def _variable(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise ConfigError(f"--env {word!r} must be NAME=VALUE", field="env")
    return name, value


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block, so that leases are given back and children ended as after Ctrl-C."""

    def on_sigterm(number: int, frame: Any) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_use(instance: Instance, seen: ServerStatus, *, started: bool, stop: str) -> None:
    row = running.to_json(instance, [], seen, show_key=False)
    if seen.connection is None:
        print(f"{instance.id} is {seen.state}; look: managed-vllm status")
    else:
        how = "serves" if started else "was running already and serves"
        where = seen.connection.uds or running.script_url(row)
        print(f"{instance.id} {how} {row['model']} at {where}")
        if seen.connection.uds is None:
            print(f"  scripts:  {running.export_line(where, str(row['model']))}")
        if row["router"] and not row["router"]["ready"]:
            print(f"  router:   {running.router_text(row['router'])}")
    print(f"  its key:  managed-vllm status {instance.id} --show-key")
    print(f"  log:      managed-vllm logs {instance.id} -f")
    print(f"  stop:     {stop}", flush=True)


def _follow(llm: ManagedVLLM, instance: Instance) -> None:
    """The server's log on standard output, until the server fails or is stopped by somebody: raises that error."""
    ended: list[BaseException] = []

    def watch() -> None:
        try:
            while True:
                # Returns only where another supervisor has taken over. From here on the log shows the progress.
                llm.wait_ready(after_epoch=sys.maxsize, progress=False)
        except BaseException as error:
            ended.append(error)

    threading.Thread(target=watch, name="managed-vllm-watch", daemon=True).start()
    with ServerLogs(instance) as reader:
        # Of a server that was running already the start is old news.
        write(reader.backlog(None if llm.started_it else 0))
        while True:
            over = bool(ended)
            text = reader.news()
            write(text)
            if over:
                raise ended[0]
            if not text:
                time.sleep(0.1)


def _report_leaving(instance: Instance) -> None:
    """After our lease was given back: says what becomes of the server, and waits for its end if that is near."""
    seen = running.peek(instance)
    if seen is None:
        running.wait_until_gone(instance, None)
    elif seen.pinned or seen.users:
        print(f"{instance.id} has other users and stays: managed-vllm status", file=sys.stderr)
    elif seen.state is ServerState.STOPPING or not seen.extra.get("keep_alive_s"):
        print("Stopping the server.", file=sys.stderr)
        running.wait_until_gone(instance, seen.supervisor_pid)
    else:
        print(f"{instance.id} stays for another {seen.extra['keep_alive_s']:g} s.", file=sys.stderr)
