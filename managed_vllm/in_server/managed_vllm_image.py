"""The warm image: an interpreter that has imported what a vLLM server imports, and from which servers are forked.

Run by the supervisor as `python -m managed_vllm_image FD -m LAUNCHER …`: `FD` is its end of a socket pair
(SOCK_SEQPACKET, one JSON message a packet), the rest is the plain launch's own command line. It knows standard library
and vLLM only, and works in any interpreter that has vLLM. What must hold:

1. While it imports, and whenever it forks, it has one thread, no child process and no device open: what is forked then
   is a fresh interpreter with the imports done. Otherwise it refuses, says why, and ends; the supervisor launches
   plainly.
2. A server is forked twice, so that it is the supervisor's own child, as a plain one is: exit code, lifeline and
   process group are the same. The image's own end means nothing to it.
3. A server gets the environment, arguments, descriptors, signal handlers and session of a plain launch, and its own
   random state. The API key comes with the request, and is in the image at no time.
4. EngineCore and Workers are forked from the server (`managed_vllm_patches`), tied to their parents
   (`managed_vllm_lifeline`), with the threads and CPUs that vLLM gave them (`managed_vllm_openmp`).

What a server imports after the fork it tells the image, by names through a pipe; on request the image imports them as
well, so that the next server has nothing left to import.

    supervisor → image   {"op": "fork", "argv": […], "set": {…}, "unset": […]} and the descriptor of the output
                         {"op": "learn", "modules": […], "skip": […]}
    image → supervisor   {"importing": n}   at most once a second, a sign of life
                         {"ready": n, "seconds": s}   once
                         {"pid": n} | {"learnt": […]} | {"refused": reason, "module": name}
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import multiprocessing.util
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import managed_vllm_arguments as arguments  # type: ignore[import-not-found]
import managed_vllm_lifeline as lifeline  # type: ignore[import-not-found]
import managed_vllm_openmp as openmp  # type: ignore[import-not-found]
import managed_vllm_patches as patches  # type: ignore[import-not-found]
import managed_vllm_segments as segments  # type: ignore[import-not-found]

MESSAGE_LIMIT = 1 << 20
"""Longest message in bytes, either way."""
_DESCRIPTORS = 253
"""As many the kernel passes in one message."""

_WHILE_IMPORTING = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's OpenBLAS starts its threads when it is loaded. OpenMP and torch start theirs when first used."""

_BEAT_S = 1.0


class Refused(Exception):
    """The image must not be forked; `module` is the one whose import is to blame, if it is known."""

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.module = module


def main() -> None:
    """Imports, then forks a server for each request. Returns in none of them: a server ends with vLLM's own exit."""
    control = socket.socket(fileno=int(sys.argv[1]))
    image = _Image(control, sys.argv[2:])
    try:
        image.bring_up()
        argv = image.serve()
    except Refused as refused:
        image.tell({"refused": refused.reason, "module": refused.module})
        sys.exit(3)
    if argv is not None:
        run(argv)


def run(argv: Sequence[str]) -> None:
    """Does what the interpreter does with the words `-m LAUNCHER …`; ends as it would, too."""
    sys.argv = ["-m", *argv[2:]]
    arguments.fill_in()
    runpy.run_module(argv[1], run_name="__main__", alter_sys=True)


class _Image:
    """The image's state: its socket, what it was when it started, and what its servers have imported since."""

    def __init__(self, control: socket.socket, argv: Sequence[str]) -> None:
        self._control = control
        self._argv = list(argv)
        self._launcher = self._argv[1]
        self._environment = {name: os.environ.get(name) for name in _WHILE_IMPORTING}
        self._signals = _signals()
        self._imports: int | None = None
        self._names: dict[str, None] = {}

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message. The supervisor may be gone: then the kernel ends us."""
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode())

    # -- imports -------------------------------------------------------------------------------------------------------

    def bring_up(self) -> None:
        """Imports what every server imports. Raises `Refused`."""
        began = time.monotonic()
        _set_title(f"managed-vllm image {os.path.basename(os.environ.get(lifeline.MARKER, ''))}")
        os.environ.update(_WHILE_IMPORTING)
        with self._importing():
            importlib.import_module(self._launcher)
            for module in patches.base_modules():
                importlib.import_module(module)
            patches.do_beforehand()
        del sys.modules[self._launcher]  # a server runs it anew, as `__main__`
        if reason := patches.apply(self._argv) or _unfit():
            raise Refused(reason)
        openmp.prepare()
        gc.freeze()  # a server waits: collecting first would take it half a second
        multiprocessing.util.register_after_fork(self, _in_forked_child)
        self.tell({"ready": len(sys.modules), "seconds": round(time.monotonic() - began, 3)})

    def _learn(self, modules: Sequence[str], skip: Sequence[str]) -> list[str]:
        """Imports `modules`, and what servers have imported so far; returns the names. Raises `Refused`."""
        self._names.update(dict.fromkeys(modules))
        self._read_imports()
        learnt = []
        with self._importing():
            for name in self._names:
                if name in skip or name in sys.modules or name == self._launcher:
                    continue
                with contextlib.suppress(Exception):  # one that is not there: the server went on without it, too
                    importlib.import_module(name)
                    learnt.append(name)
                if reason := _unfit():
                    raise Refused(f"{reason} since {name} was imported", name)
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # no collection in a server touches what it shares with the image
        return learnt

    @contextlib.contextmanager
    def _importing(self) -> Iterator[None]:
        """Signs of life meanwhile, and no collections: nearly everything that an import makes, stays."""
        beat = _Beat(self)
        sys.meta_path.insert(0, beat)
        gc.disable()
        try:
            yield
        finally:
            sys.meta_path.remove(beat)
            gc.enable()

    def _read_imports(self) -> None:
        """Takes in what the last server has imported, and listens to it no more."""
        if self._imports is not None:
            with contextlib.suppress(BlockingIOError):
                while names := os.read(self._imports, 1 << 16):
                    self._names.update(dict.fromkeys(names.decode().split()))
            os.close(self._imports)
            self._imports = None

    # -- servers -------------------------------------------------------------------------------------------------------

    def serve(self) -> list[str] | None:
        """Answers requests until the supervisor closes the socket: None. In a forked server: its command line."""
        while True:
            packet, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_LIMIT, _DESCRIPTORS)
            if not packet:
                return None
            request = json.loads(packet)
            if request["op"] == "learn":
                self.tell({"learnt": self._learn(request.get("modules", ()), request.get("skip", ()))})
            elif self._fork(request, *descriptors):
                return list(request["argv"])

    def _fork(self, request: dict[str, Any], output: int, *inherited: int) -> bool:
        """Forks a server. True in the server, once it is what a plain launch would be; False in the image.

        The server, and what it forks, keeps the `inherited` open; programs that it runs don't get them.
        """
        for descriptor in inherited:
            os.set_inheritable(descriptor, False)
        if reason := _unfit():
            raise Refused(reason)
        self._read_imports()
        report, gate, imports = os.pipe(), os.pipe(), os.pipe()
        middle = _fork_twice(report[1])
        if middle is None:
            _close(*report, gate[1], imports[0], self._control.detach())
            _wait_at(gate[0])
            self._become_server(request, output, imports[1])
            return True
        _close(report[1], gate[0], imports[1], output, *inherited)
        os.set_blocking(imports[0], False)
        self._imports = imports[0]
        pid = os.read(report[0], 32)
        os.waitpid(middle, 0)  # the server is the supervisor's child from now on
        if pid:
            self.tell({"pid": int(pid)})
            os.write(gate[1], b"1")
        _close(report[0], gate[1])
        if not pid:
            raise Refused("the image could not be forked a second time")
        return False

    def _become_server(self, request: dict[str, Any], output: int, imports: int) -> None:
        """What the launch of a new interpreter would have done for the server."""
        os.environ[lifeline.ROOT] = str(os.getpid())
        if (replica := request["set"].get(lifeline.REPLICA)) is not None:
            _show_in_environment(lifeline.REPLICA, replica)
        lifeline.fall_with_parent()
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        _close(null, output)
        # Where EngineCore is spawned it is started here, too. By EngineCore it would be, and would be killed with it.
        resource_tracker.ensure_running()  # before the key is in the environment, which it inherits
        for name, value in {**self._environment, **dict.fromkeys(request["unset"]), **request["set"]}.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        segments.name_after_server(os.environ.get(lifeline.MARKER), os.environ.get(lifeline.REPLICA))
        _restore_signals(self._signals)
        _renew_random_state()
        sys.meta_path.insert(0, _Recorder(imports))
        _set_title(" ".join([sys.executable, *request["argv"]]))


class _Beat:
    """In front of the finders while modules are imported: tells the supervisor once a second that they still are."""

    def __init__(self, image: _Image) -> None:
        self._image = image
        self._last = time.monotonic()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if time.monotonic() - self._last > _BEAT_S:
            self._last = time.monotonic()
            self._image.tell({"importing": len(sys.modules)})


class _Recorder:
    """In front of the finders of a server: tells the image the name of each module that is looked for."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        os.set_blocking(pipe, False)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        try:
            os.write(self._pipe, f"{name}\n".encode())
        except BlockingIOError:
            pass  # full: the rest is imported by the next server as well
        except OSError:  # the image has heard enough, or is gone
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)


def _fork_twice(report: int) -> int | None:
    """Forks; the child forks, reports the pid of the grandchild and ends.

    Returns the child's pid, and None in the grandchild. Raises `Refused`.
    """
    try:
        child = os.fork()
    except OSError as error:
        raise Refused(f"the image can't be forked: {error}") from error
    if child:
        return child
    try:
        grandchild = os.fork()
    except OSError:
        os._exit(1)
    if grandchild == 0:
        return None
    with contextlib.suppress(OSError):  # the image is gone, and the grandchild will find that out
        os.write(report, str(grandchild).encode())
    os._exit(0)


def _wait_at(gate: int) -> None:
    """Waits until the supervisor has been told of this server; ends with the image if that never happens."""
    if os.read(gate, 1) != b"1":
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(gate)


def _in_forked_child(_image: _Image) -> None:
    """In EngineCore, in Workers, in whatever else multiprocessing forks: first of all."""
    lifeline.fall_with_parent()
    openmp.follow_environment()


# -- what is looked at, and put right ----------------------------------------------------------------------------------


def _unfit() -> str | None:
    """Why this process must not be forked; None if nothing speaks against it."""
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        return f"{len(threads)} threads run in the image"
    for device in ("cuda", "xpu"):
        module = sys.modules.get(f"torch.{device}")
        if module is not None and module.is_initialized():
            return f"{device.upper()} is initialised in the image"
    if opened := _open_device():
        return f"{opened} is open in the image"
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return "the image has a child process"
    return None


def _open_device() -> str | None:
    """What a driver opens for computing. NVML, for looking at the devices, opens others of NVIDIA's files."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith(("/dev/nvidia-uvm", "/dev/kfd", "/dev/dri/")):
                return path
    return None


def _signals() -> tuple[dict[signal.Signals, Any], set[signal.Signals]]:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ())  # type: ignore[return-value]


def _restore_signals(before: tuple[dict[signal.Signals, Any], set[signal.Signals]]) -> None:
    """Imports may have installed handlers of their own."""
    handlers, mask = before
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _renew_random_state() -> None:
    """What was seeded from the system during the imports must differ between servers. `random` sees to itself."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    multiprocessing.current_process().authkey = os.urandom(32)


def _show_in_environment(name: str, text: str) -> None:
    """Sets a variable of the image's own, whose value is as long, so that `/proc/PID/environ` shows it as well.

    That is the memory with which the image was started: we, and what is forked from us, have a copy.
    """
    os.environ[name] = text
    value, entry = text.encode(), f"\0{name}=".encode()
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/environ", "rb") as environ, open("/proc/self/stat", "rb") as stat:
            shown, fields = b"\0" + environ.read(), stat.read().rpartition(b")")[2].split()
        at, start = shown.index(entry) + len(entry) - 1, int(fields[_ENV_START])
        if start and shown[at + 1 :].find(b"\0") == len(value):
            ctypes.memmove(start + at, value, len(value))


_ENV_START = 47
"""The address of the environment among the fields of `/proc/PID/stat` that follow the name (proc(5): field 50)."""


def _set_title(title: str) -> None:
    """What `ps` shows. Needs a package that vLLM brings along."""
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(title)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    main()
