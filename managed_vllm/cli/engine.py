"""`managed-vllm engine`: the control of a server's engine. It takes no lease: what is asked for stays."""

from __future__ import annotations

import argparse
import time
from typing import Any

from managed_vllm.cli.running import find, the_only_one
from managed_vllm.engine_state import EngineState
from managed_vllm.errors import SupervisorError
from managed_vllm.instance import directory
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.engine_calls import CALL_S, UPDATE_S, call_engine
from managed_vllm.instance.engine_control import where
from managed_vllm.status import ServerStatus

_ARGUMENTS = ("mode", "level", "tags", "name", "path", "replace", "version", "checksum", "on_update", "rolling")


def show(given: argparse.Namespace) -> int:
    """Without a call: what users have made of the engine."""
    channel = _channel(given)
    try:
        state = ServerStatus.from_dict(channel.request("status")["status"]).engine
    finally:
        channel.close()
    print("\n".join(_lines(state)) or "The engine is as it was started.")
    return 0


def call(given: argparse.Namespace) -> int:
    """One call of the engine."""
    arguments = {name: getattr(given, name) for name in _ARGUMENTS if getattr(given, name, None) is not None}
    if "path" in arguments:
        arguments["path"] = where(arguments["path"])
    timeout = given.timeout or (UPDATE_S if given.call == "update_weights" else CALL_S)
    channel = _channel(given)
    try:
        found = call_engine(channel, given.call, time.monotonic() + timeout, arguments)
    finally:
        channel.close()
    print(_said(given.call, found))
    return 0


def _channel(given: argparse.Namespace) -> Channel:
    home = directory.state_home()
    instance = find(home, given.server) if given.server else the_only_one(home)
    try:
        return Channel.connect(instance.socket_path)
    except OSError as error:
        raise SupervisorError("the supervisor does not answer: managed-vllm status", instance=instance.id) from error


def _said(call: str, found: dict[str, Any]) -> str:
    if call == "loras":
        return "\n".join(f"{name}  {path}" for name, path in sorted(found["loras"].items())) or "No adapter is loaded."
    if call in ("weights", "update_weights"):
        return "\n".join(f"{name:8}  {found[name] or '-'}" for name in ("version", "path", "checksum"))
    if call == "resume" and found.get("paused"):
        return "Somebody else holds it paused."
    return "Done."


def _lines(state: EngineState) -> list[str]:
    lines = [f"lora      {name}  {path}" for name, path in sorted(state.loras.items())]
    if state.weights is not None or state.weight_version:
        source = "from a trainer, in no checkpoint" if state.weights_unsaved else state.weights or "-"
        lines.append(f"weights   {state.weight_version or '-'}  {source}")
    if state.paused is not None:
        lines.append(f"paused    {state.paused}")
    if state.sleep_level is not None:
        lines.append(f"asleep    level {state.sleep_level}")
    return lines
