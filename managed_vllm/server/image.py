"""The supervisor's end of a warm image: one process with the imports done, from which servers are forked.

The process itself is `managed_vllm.in_server.managed_vllm_image`, where the messages are described. It is our child and
dies with us, has the environment of the server but for the key, carries the instance's marker, and is in a session of
its own. Must be used from the supervisor's main thread, as `managed_vllm.server.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from managed_vllm.in_server import managed_vllm_arguments, managed_vllm_guard
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance.directory import tail
from managed_vllm.server.pidfd import pidfd_open

_MESSAGE_LIMIT = 1 << 20

_SILENCE_S = 120.0
"""Seconds without a sign of life after which an image that imports is given up. One library may take long to load."""

_FORK_S = 30.0
"""Seconds in which an image that has nothing else to do must have forked."""

_OF_THE_SERVER = frozenset({"VLLM_API_KEY", managed_vllm_guard.CONTROL_KEY, managed_vllm_arguments.VARIABLE})
"""Secrets that the image does not need: the keys, and those in the server's arguments."""


class ImageError(Exception):
    """No server can be forked from this image any more: it has ended, or says nothing."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ImageRefusedError(ImageError):
    """It must not be forked, by its own word. `module`: whose import is to blame, if that is known, else empty."""

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(reason)
        self.module = module


@dataclass(frozen=True)
class ForkedServer:
    """A server that was just forked: its pid, and the descriptor from which its output is read."""

    pid: int
    output: int


_INHERITED = 250
"""Descriptors that a server inherits, at most: the kernel passes 253 in one message."""


class Image:
    """One image process; see the module's docstring. After an `ImageError` it is of no more use: `end` it.

    `ended` is set once the process has ended, by whatever hand.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        preload: str | None,
        cwd: Path,
        log_path: Path,
        on_imports: Callable[[int], None],
    ) -> None:
        """Starts it: `argv` and `environment` are those of the plain launch, `preload` its `LD_PRELOAD` if it has one.

        `on_imports` is called about once a second with the number of modules that are imported. Raises `OSError`.
        """
        self._on_imports = on_imports
        self._log_path = log_path
        self._environment = {name: value for name, value in environment.items() if name not in _OF_THE_SERVER}
        if lifeline.REPLICA in self._environment:
            self._environment[lifeline.REPLICA] = lifeline.NO_REPLICA
        self._turn = asyncio.Lock()
        self._is_ready = False
        self.ended = asyncio.Event()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        preloaded = {} if preload is None else {"LD_PRELOAD": preload}
        log_descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._popen = subprocess.Popen(
                [argv[0], "-m", "managed_vllm_image", str(theirs.fileno()), *argv[1:]],
                env={**self._environment, **preloaded},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log_descriptor,
                stderr=log_descriptor,
                start_new_session=True,
                umask=0o077,
                pass_fds=[theirs.fileno()],
            )
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
            os.close(log_descriptor)
        self._loop = asyncio.get_running_loop()
        try:
            self._pidfd = pidfd_open(self.pid)
        except OSError:
            self._popen.kill()
            self._popen.wait()
            self._control.close()
            raise
        self._loop.add_reader(self._pidfd, self._has_ended)

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def ready(self) -> None:
        """Waits until what every server imports is imported. Raises `ImageError`."""
        async with self._turn:
            await self._until_ready()

    async def fork(
        self, argv: Sequence[str], environment: Mapping[str, str], *, inherited: Sequence[int] = ()
    ) -> ForkedServer:
        """Forks a server that is what the plain launch with this command and environment would be.

        It and what is forked from it have the descriptors `inherited`. Raises `ImageError`.
        """
        request = {
            "op": "fork",
            "argv": list(argv[1:]),
            "set": {name: value for name, value in environment.items() if self._environment.get(name) != value},
            "unset": [name for name in self._environment if name not in environment],
        }
        async with self._turn:
            await self._until_ready()
            output, theirs = os.pipe()
            try:
                self._send(request, theirs, *inherited[:_INHERITED])
                answer = await self._answer("pid", _FORK_S)
            except BaseException:
                os.close(output)
                raise
            finally:
                os.close(theirs)
        return ForkedServer(pid=int(answer["pid"]), output=output)

    async def learn(self, modules: Sequence[str], skip: Sequence[str]) -> list[str]:
        """Lets the image import what its last server has imported, and `modules`, but none of `skip`.

        Returns the names. Raises `ImageError`.
        """
        async with self._turn:
            await self._until_ready()
            self._send({"op": "learn", "modules": list(modules), "skip": list(skip)})
            return [str(name) for name in (await self._answer("learnt", _SILENCE_S))["learnt"]]

    def end(self) -> None:
        """Kills the process; its servers stay."""
        if not self.ended.is_set():
            self._has_ended()
        self._control.close()
        self._popen.kill()
        self._popen.wait()

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.ended.set()

    async def _until_ready(self) -> None:
        if not self._is_ready:
            await self._answer("ready", _SILENCE_S)
            self._is_ready = True

    def _send(self, request: dict[str, Any], *descriptors: int) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise ImageError(self._ended(f"it can't be reached: {error}")) from error

    async def _answer(self, key: str, silence_s: float) -> dict[str, Any]:
        """The first message that has `key`. Raises `ImageError` if none comes."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet = await asyncio.wait_for(loop.sock_recv(self._control, _MESSAGE_LIMIT), silence_s)
            except TimeoutError:
                raise ImageError(f"no word from the image for {silence_s:g} s") from None
            except OSError as error:
                raise ImageError(self._ended(str(error))) from error
            if not packet:
                raise ImageError(self._ended("it closed its socket"))
            message: dict[str, Any] = json.loads(packet)
            if "refused" in message:
                raise ImageRefusedError(str(message["refused"]), str(message.get("module", "")))
            if "importing" in message:
                self._on_imports(int(message["importing"]))
            if key in message:
                return message

    def _ended(self, how: str) -> str:
        words = [line for line in tail(self._log_path, 20).splitlines() if line.strip()]
        return f"the image has ended: {words[-1][:300] if words else how}"


def preload(vllm_folder: Path | None, environment: Mapping[str, str]) -> str | None:
    """`LD_PRELOAD` as vLLM's CPU platform sets it for EngineCore and Workers, which it expects to be spawned.

    In forked ones it would come too late, so the image has it from its start. vLLM 0.32, `platforms/cpu.py`: torch's
    OpenMP, so that there are no two of them (vllm#27369), and tcmalloc where the wheel brings it.
    """
    if vllm_folder is None or not sys.platform.startswith("linux"):
        return None
    already = environment.get("LD_PRELOAD", "")
    packages = vllm_folder.parent
    libraries = [already] if already else []
    if not any(name in already for name in ("libomp", "libgomp", "libiomp")):
        libraries += _first(packages, "torch.libs/libgomp*.so*", "torch/lib/libgomp*.so*")
    if "libtcmalloc" not in already:
        libraries[:0] = _first(vllm_folder, "libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")
    return ":".join(libraries) or None


def _first(folder: Path, *patterns: str) -> list[str]:
    for pattern in patterns:
        with contextlib.suppress(StopIteration):
            return [str(next(folder.glob(pattern)))]
    return []
