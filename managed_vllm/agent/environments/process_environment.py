"""A synchronous environment in a process of its own, which can be killed.

    env = ProcessEnvironment(make_env)                       # a function of a module, returns a SyncEnvironment
    env = ProcessEnvironment("my_package.envs:make", arguments={"level": 3})

What holds, whatever the environment does:

- The event loop is never blocked. A call that is not over within its limit ends with `EnvironmentTimeoutError`, whose
  message has the stacks of the hung process; that process and all its descendants have been killed by then.
- If the awaiting task is cancelled, they are killed, too.
- If the process dies, `EnvironmentDiedError` comes at once, with exit code and its last output.
- What the environment raises comes back as `EnvironmentRaisedError`, with its type, message and traceback. It stays
  alive until `close`, to give back what it has; it can't be used for anything else.
- If the rollout's process ends in whatever way, SIGKILL included, nothing of the environment is left (5 s, plus
  `grace_s`): neither processes, detached ones included, nor its temporary folder.

That is done by a small process between the two (`process_keeper`). Measured on two cores that were busy otherwise, with
an environment that imports nothing: 90 ms from the first `reset` to its answer, 0.8 s for 16 at once; 0.06 ms a call;
30 ms for `close`; 16 MiB for both processes (proportional set size).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil

from managed_vllm.agent.actions import Action
from managed_vllm.agent.environments import process_keeper
from managed_vllm.agent.environments.process_worker import MAX_MESSAGE, Start, framed
from managed_vllm.agent.environments.synchronous import (
    SyncEnvironment,
    check_call,
    died,
    last_lines,
    name_of,
    raised,
    type_name,
    whole_traceback,
)
from managed_vllm.agent.types import Limits, Observation, StepResult, Task
from managed_vllm.errors import EnvironmentFailedError, EnvironmentRaisedError, EnvironmentTimeoutError
from managed_vllm.socket_paths import short_temporary_folder

MARKER = "MANAGED_VLLM_ENVIRONMENT"
"""Environment variable of all processes of one environment: the path of its temporary folder, which is theirs alone."""

_EXIT_S = 2.0
"""In which a process may exit by itself after its environment was closed: exit handlers, threads."""

_LAST_S = 10.0
"""From the end of the connection to that of the process, which closes it a little before: for its own exit code."""

STACKS_S = 0.5
"""In which a hung process may write its stacks."""

KEEPER_S = 15.0
"""In which the keeper has killed everything; it gives up after 10."""

_GONE_S = 30.0
"""Beyond that, for the end to be known; a busy machine is slow about it."""

_MARKED_ROUNDS = 200
"""Of killing what a killed keeper left, one each 50 ms."""

_LOOK_MS = 1000
"""Between two looks whether a keeper that was told to end does."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What the keeper reports of the end.

    Attributes:
        reason: `told`, `stacks` (told after a time-out), `ended` (by itself), `owner`, `signal`; `killed` where the
            keeper itself was; `not started`.
        exit_code: of the worker; None: not known.
        left: pids that could not be killed.
        output: the last of standard output and error.
    """

    reason: str
    exit_code: int | None = None
    left: tuple[int, ...] = ()
    output: str = ""


class ProcessEnvironment:
    """An `Environment` around a `SyncEnvironment` that lives in its own process. Used from one event loop.

    Attributes:
        limits: seconds of each call; may be changed between two of them.
    """

    def __init__(
        self,
        make: Callable[..., SyncEnvironment] | str,
        *,
        arguments: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        environ: Mapping[str, str] | None = None,
        grace_s: float = 0.0,
        python: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        """Costs nothing yet: the process starts with the first `reset`, and the environment is made there.

        Args:
            make: called there with `arguments`; a callable that can be pickled (a function or class of a module,
                `functools.partial` of one; of the main script only if that has the guard `if __name__ ==
                "__main__"`), or where to import it, `"package.module:name"`.
            arguments: keyword arguments; they are pickled.
            limits: its `reset_timeout_s`, `step_timeout_s`, `evaluate_timeout_s` and `close_timeout_s` bound the calls.
            environ: environment variables beside those of this process. `TMPDIR` is a folder of the environment's own.
            grace_s: before an environment is killed within a call, the call is interrupted by an exception, and `close`
                has so many seconds: for what is not a process, a rented machine say. 0: it is killed at once.
            python: another interpreter than this one (3.11 or newer), for environments that need other versions of
                packages. managed_vllm must be importable there, and the module of `make`; `sys.path` is its own.
            name: for messages.

        Raises `TypeError` if `make` or `arguments` can't be pickled, `ValueError` for a path without `:`.
        """
        self.limits = limits or Limits()
        self._environ = dict(environ or {})
        if not grace_s >= 0:
            raise ValueError(f"grace_s must be 0 or more, not {grace_s}")
        self._grace_s = grace_s
        self._python = None if python is None else os.fspath(python)
        self._name = name or (make if isinstance(make, str) else name_of(make))
        self._start = _start(make, arguments or {})
        self._kept: _Kept | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calling: str | None = None
        self._unusable: str | None = None
        self._closed = False

    # -- the protocol --------------------------------------------------------------------------------------------------

    @property
    def patience_s(self) -> float:
        """See `Environment`."""
        return self._grace_s + 5.0

    def extra_s(self, call: str, action: Action | None = None) -> float:
        """See `Environment`."""
        return 0.0

    async def reset(self, task: Task) -> Observation:
        """See `Environment.reset`. The first one starts the process, within the same limit."""
        seconds = self.limits.reset_timeout_s + self.extra_s("reset")
        return cast(Observation, await self._call("reset", (task,), seconds))

    async def step(self, action: Action) -> StepResult:
        """See `Environment.step`."""
        seconds = self.limits.step_timeout_s + self.extra_s("step", action)
        return cast(StepResult, await self._call("step", (action,), seconds))

    async def evaluate(self) -> float | None:
        """See `Environment.evaluate`."""
        seconds = self.limits.evaluate_timeout_s + self.extra_s("evaluate")
        return cast("float | None", await self._call("evaluate", (), seconds))

    async def close(self) -> None:
        """Closes the environment, and ends its process and all its descendants, within `close_timeout_s`.

        Where a call goes on at the same time, or one was not over in time, they are killed. Returns when nothing is
        left; if it is cancelled, the end goes on without it. Raises what the environment's own `close` raised, after
        that. A second time it does nothing.
        """
        if self._closed:
            return
        self._closed = True
        kept = self._kept
        if kept is None:
            return
        raised: EnvironmentFailedError | None = None
        try:
            here = self._loop is asyncio.get_running_loop()
            if self._calling is None and not kept.told and here:
                raised = await self._close_politely(kept)
        finally:
            kept.tell(process_keeper.END)
            if self._writer is not None and self._loop is not None and not self._loop.is_closed():
                with contextlib.suppress(RuntimeError):
                    self._writer.close()
            await self._gone(kept)
        if raised is not None:
            raise raised

    # -- for the curious -----------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the process between, the keeper, below which everything is; None: not started, or over."""
        return None if self._kept is None else self._kept.pid

    @property
    def folder(self) -> Path | None:
        """The environment's temporary folder; None before the start."""
        return None if self._kept is None or self._kept.folder is None else Path(self._kept.folder)

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._unusable or ("not started" if self._kept is None else "running")
        return f"<{type(self).__name__} {self._name}: {state}>"

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def _call(self, method: str, arguments: tuple[Any, ...], limit_s: float) -> Any:
        check_call(
            self._name,
            method,
            closed=self._closed,
            unusable=self._unusable,
            calling=self._calling,
            begun=self._kept is not None,
        )
        self._calling = method
        try:
            async with asyncio.timeout(limit_s):
                if self._kept is None:
                    await self._begin()
                answer = await self._exchange((method, arguments))
        except TimeoutError:
            self._unusable = f"{method} was not over within {limit_s:g} s"
            ending = await self._end(process_keeper.STACKS)
            raise EnvironmentTimeoutError(
                f"{self._name}: {self._unusable}; its processes were killed{last_lines(ending.output)}"
            ) from None
        except (OSError, EOFError):  # IncompleteReadError is the latter
            if self._kept is None:
                raise
            self._unusable = f"its process ended during {method}"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_S):
                    await self._kept.wait()
            ending = await self._end(process_keeper.END)
            if self._closed:
                raise EnvironmentFailedError(f"{self._name} was closed during {method}") from None
            raise died(self._name, method, _how(ending), ending.exit_code, ending.output) from None
        except BaseException as error:
            cause = f"{method} was cancelled or failed ({type_name(error)})"
            self._unusable = "it could not be made" if isinstance(error, EnvironmentRaisedError) else cause
            if self._kept is not None:
                self._kept.tell(process_keeper.END)
            raise
        finally:
            self._calling = None
        if answer[0] == "raised":
            self._unusable = f"{answer[1]} raised {answer[2]}"
            raise self._raised(answer)
        return answer[1]

    def _raised(self, answer: tuple[str, str, str, str, str], advice: str = "") -> EnvironmentRaisedError:
        _, call, error_type, error_message, error_traceback = answer
        return raised(self._name, call, error_type, error_message, error_traceback, advice)

    async def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        self._loop = asyncio.get_running_loop()
        self._kept = _Kept(theirs, self._python, self._environ, self._grace_s, self._name)
        weakref.finalize(self, self._kept.tell, process_keeper.END)
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        paths = None if self._python else [os.fspath(entry) for entry in sys.path]
        start = json.dumps({"sys_path": paths, "argv": [str(word) for word in sys.argv]}).encode()
        self._writer.write(len(start).to_bytes(8, "big") + start)
        made = await self._exchange(self._start)
        if made[0] == "raised":
            raise self._raised(made, _advice(made[2]))

    async def _exchange(self, message: object) -> Any:
        assert self._reader is not None
        assert self._writer is not None
        try:
            data = framed(message)
        except Exception as error:
            raise EnvironmentFailedError(f"{self._name}: {message!r:.200} can't be pickled: {error}") from error
        self._writer.write(data)
        await self._writer.drain()
        size = int.from_bytes(await self._reader.readexactly(8), "big")
        if size > MAX_MESSAGE:
            raise EOFError("not a message")
        data = await self._reader.readexactly(size)
        try:
            return pickle.loads(data)
        except Exception as error:
            return "raised", "the transport of the answer", type_name(error), str(error), whole_traceback(error)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _close_politely(self, kept: _Kept) -> EnvironmentFailedError | None:
        limit_s = self.limits.close_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._exchange(("close", ()))
        except TimeoutError:
            ending = await self._end(process_keeper.STACKS)
            return EnvironmentTimeoutError(
                f"{self._name}: close was not over within {limit_s:g} s; its processes were killed"
                f"{last_lines(ending.output)}"
            )
        except (OSError, EOFError):  # it has ended: nothing to close
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_S):
                await kept.wait()
        return self._raised(answer) if answer[0] == "raised" else None

    async def _end(self, word: bytes) -> Ending:
        """Has everything killed, and waits for that."""
        assert self._kept is not None
        self._kept.tell(word)
        return await self._gone(self._kept)

    async def _gone(self, kept: _Kept) -> Ending:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s + KEEPER_S + _GONE_S):
                return await kept.wait()
        return Ending("killed", output="(something hangs in the kernel, and can't be killed)")


class _Kept:
    """A started keeper. One thread starts it, reads its report, reaps it, and removes what it could not.

    The thread is the environment's own: it neither waits for a place in a pool nor takes one.
    """

    def __init__(
        self, message: socket.socket, python: str | None, environ: Mapping[str, str], grace_s: float, name: str
    ) -> None:
        self.pid: int | None = None
        self.folder: str | None = None
        self.told = False
        self._control, theirs = socket.socketpair()
        self._telling = threading.Lock()
        self._ending: Future[Ending] = Future()
        self._ending.set_running_or_notify_cancel()
        threading.Thread(
            target=self._keep,
            args=(message, theirs, python or sys.executable, {**os.environ, **environ}, grace_s),
            name=f"environment {name}",
            daemon=True,
        ).start()

    def tell(self, word: bytes) -> None:
        """Has the keeper end everything; does not wait. Any thread; a second time, too."""
        with self._telling:
            self.told = True
            with contextlib.suppress(OSError):
                self._control.send(word, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    async def wait(self) -> Ending:
        """How it ended, once it has."""
        return await asyncio.wrap_future(self._ending)

    def _report(self, pid: int, grace_s: float) -> bytes:
        """What the keeper says in the end. If it does not end though it was told, it is killed with all below it."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        report = b""
        told_at: float | None = None
        while True:
            if poll.poll(_LOOK_MS):
                try:
                    chunk = self._control.recv(65536)
                except OSError:
                    return report
                if not chunk:
                    return report
                report += chunk
            elif self.told and told_at is None:
                told_at = time.monotonic()
            elif told_at is not None and time.monotonic() - told_at > grace_s + KEEPER_S:
                _kill_tree(pid)  # it was stopped, say

    def _keep(
        self, message: socket.socket, theirs: socket.socket, python: str, environ: dict[str, str], grace_s: float
    ) -> None:
        ending = Ending("not started")
        try:
            with message, theirs:
                self.folder = tempfile.mkdtemp(prefix="mvenv-", dir=short_temporary_folder())
                process = subprocess.Popen(
                    [
                        python,
                        "-P",  # else this folder would be first in sys.path, and its gymnasium.py be gymnasium
                        process_keeper.__file__,
                        str(message.fileno()),
                        str(theirs.fileno()),
                        str(os.getpid()),
                        str(grace_s),
                        str(STACKS_S),
                        self.folder,
                    ],
                    env={**environ, "TMPDIR": self.folder, MARKER: self.folder},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(message.fileno(), theirs.fileno()),
                    start_new_session=True,
                )
            self.pid = process.pid
            report = self._report(process.pid, grace_s)
            process.wait()
            self.pid = None
            try:
                ending = Ending(**json.loads(report))
            except ValueError:
                ending = Ending("killed", process.returncode, output="(the keeper was killed)")
                _kill_marked(self.folder)
        except Exception as error:
            ending = Ending("not started", output=whole_traceback(error))
        finally:
            with self._telling:
                self._control.close()
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._ending.set_result(ending)


def _start(make: Any, arguments: Mapping[str, Any]) -> Start:
    if isinstance(make, str):
        module, colon, name = make.partition(":")
        if not (module and colon and name):
            raise ValueError(f"{make!r} names no function; write 'package.module:name'")
    elif not callable(make):
        raise TypeError(f"make must be callable, or 'package.module:name', not {type(make).__name__}")
    try:
        pickled = make if isinstance(make, str) else pickle.dumps(make)
        pickled_arguments = pickle.dumps(dict(arguments))
    except Exception as error:  # PicklingError, AttributeError, TypeError …
        raise TypeError(
            f"what makes the environment has to be pickled to reach its process: {error}. Give a function or class of "
            "a module, functools.partial of one, or 'package.module:name'; no lambda, no function within another"
        ) from error
    main = None
    if b"__main__" in pickled_arguments or (isinstance(pickled, bytes) and b"__main__" in pickled):
        from multiprocessing import spawn

        main = spawn.get_preparation_data("environment")
        main.pop("authkey", None)
    return Start(pickled, pickled_arguments, main)


def _advice(error_type: str) -> str:
    if error_type in ("ModuleNotFoundError", "ImportError"):
        return f" (interpreter: {sys.executable})"
    if error_type == "AttributeError":
        return " (what a notebook or an interactive session defines can't be found by another process: use a module)"
    return ""


def _how(ending: Ending) -> str:
    code = ending.exit_code
    if code is None:
        return ending.reason
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", by the kernel if memory ran out" if -code == signal.SIGKILL else "")


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _kill_marked(folder: str) -> None:
    """Kills what a keeper left that was killed itself: whoever has its folder as `MARKER`."""
    wanted = f"{MARKER}={folder}".encode()
    for _ in range(_MARKED_ROUNDS):
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        threading.Event().wait(0.05)
