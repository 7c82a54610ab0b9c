"""The environment's own process: answers the rollout's calls, one after the other, until its connection ends.

A message is eight bytes of length and a pickle. The first is the `Start`; then calls `(method, argument)`, and for each
of them one answer: `("returned", value)` or `("raised", call, type, message, traceback)`.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from managed_vllm.agent.environments.synchronous import SyncEnvironment, checked, type_name, whole_traceback

MAX_MESSAGE = 1 << 30
"""Bytes of one message."""


@dataclass(frozen=True, slots=True)
class Start:
    """How the environment is made.

    Attributes:
        make: the pickled callable, or `module:name`.
        arguments: pickled keyword arguments.
        main: what `multiprocessing` hands on so that the caller's `__main__` can be imported; None: not needed.
    """

    make: bytes | str
    arguments: bytes
    main: Mapping[str, Any] | None


class _Released(BaseException):
    """The keeper wants the environment to be closed: no `except Exception` of the environment's stops it."""


def serve(connection: socket.socket) -> None:
    """Makes the environment, and does what is asked for. Returns when the other side is gone, or after `close`."""
    environment: SyncEnvironment | None = None
    signal.signal(signal.SIGTERM, _release)
    try:
        start = _receive(connection)
        if start is None:
            return
        try:
            environment = _made(start)
        except Exception as error:
            _send(connection, _raised("make", error))
            return
        _send(connection, ("returned", None))
        while (message := _receive(connection)) is not None:
            method, arguments = message
            try:
                answer: tuple[Any, ...] = ("returned", checked(method, getattr(environment, method)(*arguments)))
            except Exception as error:
                answer = _raised(method, error)
            if method == "close":
                environment = None
            try:
                _send(connection, answer)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:  # the value can't be pickled
                _send(connection, _raised(method, error))
            if method == "close":
                return
    except _Released:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if environment is not None:
            with contextlib.suppress(Exception):
                environment.close()


def _release(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Released


def _made(start: Start) -> SyncEnvironment:
    if start.main is not None:
        from multiprocessing import spawn

        spawn.prepare(dict(start.main))
    make: Callable[..., Any] = named(start.make) if isinstance(start.make, str) else pickle.loads(start.make)
    environment = make(**pickle.loads(start.arguments))
    missing = [
        name for name in ("reset", "step", "evaluate", "close") if not callable(getattr(environment, name, None))
    ]
    if missing:
        raise TypeError(f"{type(environment).__name__} has no {', '.join(missing)}: it is no SyncEnvironment")
    return environment  # type: ignore[no-any-return]


def named(path: str) -> Callable[..., Any]:
    """What `module:name` means; `name` may have dots. Raises `ImportError` or `AttributeError`."""
    from importlib import import_module

    module, _, name = path.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _raised(call: str, error: Exception) -> tuple[Any, ...]:
    print(f"{call}: {type_name(error)}: {error}", file=sys.stderr)
    return "raised", call, type_name(error), str(error), whole_traceback(error)


def _send(connection: socket.socket, message: object) -> None:
    connection.sendall(framed(message))


def framed(message: object) -> bytes:
    """A message as it is sent. Raises whatever pickling raises, and `ValueError` if it is too long."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(data):,} bytes is too long")
    return len(data).to_bytes(8, "big") + data


def _receive(connection: socket.socket) -> Any:
    head = _exactly(connection, 8)
    return None if head is None else pickle.loads(_exactly(connection, int.from_bytes(head, "big")) or b"")


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            chunk = connection.recv(min(size - len(data), 1 << 20))
        except ConnectionResetError:
            return None
        if not chunk:
            return None
        data += chunk
    return bytes(data)
