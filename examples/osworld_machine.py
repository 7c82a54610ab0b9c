"""OSWorld's own machine server on a virtual screen, and its own `DesktopEnv` around it, both from a checkout.

The machine is Xvfb, a session bus, and `desktop_env/server/main.py` run by Debian's Python; a launcher gives it a free
port, and nothing in it is changed. `desktop_env` makes the `DesktopEnv`, in the environment's own process: with a
provider that hands this machine out, and with empty modules for packages that other tasks' evaluators need.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SIZE = (1920, 1080)
PATIENCE_S = 60.0
"""Until a program must have come up, or gone."""
FORM = Path(__file__).with_name("osworld_form.py")
DEBIANS_PYTHON = "/usr/bin/python3"
PROGRAMS = {
    **{"Xvfb": "xvfb", "dbus-run-session": "dbus-daemon", "xclip": "xclip", "scrot": "scrot"},
    **{DEBIANS_PYTHON: "python3", "/usr/libexec/at-spi-bus-launcher": "at-spi2-core"},
}
MODULES = {
    **{"pyatspi": "python3-pyatspi", "tkinter": "python3-tk", "Xlib": "python3-xlib", "flask": "python3-flask"},
    **{"lxml": "python3-lxml", "requests": "python3-requests", "PIL": "python3-pil", "numpy": "python3-numpy"},
}
"""Of Debian's Python, with the packages that have them."""
LIBRARIES = {"Xfixes": "libxfixes3", "X11": "libx11-6"}
PIPS = ("pyautogui", "pymsgbox", "pytweening", "pyscreeze", "pygetwindow", "pyrect", "mouseinfo", "pyperclip")
"""Not in Debian, and pure Python: those that are installed here are shown to the machine."""
SEEN = ("bash", "cat", "dbus-daemon", "dbus-run-session", "scrot", "sh", "sleep", "which", "xclip")
"""The programs that the machine sees, beside Python. Not gnome-screenshot: without GNOME it fails now and then."""

_LAUNCHER = """
import sys; from pathlib import Path; from werkzeug.serving import make_server; from main import app
server = make_server("127.0.0.1", 0, app, threaded=True)
Path(sys.argv[1]).write_text(f"{server.port}\\n"); server.serve_forever()
"""


def missing() -> str | None:
    """What there is not, and how to get it; None: the machine can be started."""
    checkout = os.environ.get("OSWORLD_CHECKOUT")
    said = []
    if not checkout:
        said.append("OSWORLD_CHECKOUT is not set: the folder of github.com/xlang-ai/OSWorld")
    elif not Path(checkout, "desktop_env", "server", "main.py").exists():
        said.append(f"OSWORLD_CHECKOUT={checkout} has no desktop_env/server/main.py")
    packages = {package for name, package in PROGRAMS.items() if not shutil.which(name)} | _missing_modules()
    if packages:
        said.append(f"apt-get install --no-install-recommends {' '.join(sorted(packages))}")
    pips = [name for name in PIPS if not importlib.util.find_spec(name)]
    if pips:
        said.append(f"pip install {' '.join(pips)}")
    return "; ".join(said) or None


def _missing_modules() -> set[str]:
    if not shutil.which(DEBIANS_PYTHON):
        return set(MODULES.values())
    look = (
        "import ctypes.util, importlib.util, sys\n"
        f"print(*[name for name in {list(MODULES)} if not importlib.util.find_spec(name)])\n"
        f"print(*[name for name in {list(LIBRARIES)} if not ctypes.util.find_library(name)])\n"
    )
    answer = subprocess.run([DEBIANS_PYTHON, "-c", look], env={"PATH": os.defpath}, stdout=subprocess.PIPE, text=True)
    return {(MODULES | LIBRARIES)[name] for name in answer.stdout.split()}


# -- the machine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """`pid` is that of the session bus, below which all but the screen runs; `folder` is removed in the end."""

    checkout: Path
    folder: Path
    port: int
    pid: int

    @property
    def arguments(self) -> dict[str, Any]:
        """For `desktop_env`."""
        cache = str(self.folder / "cache")
        return {"checkout": str(self.checkout), "port": self.port, "session": self.pid, "cache": cache}


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """A machine of one's own, of which no process and no file is left in the end."""
    checkout = Path(os.environ["OSWORLD_CHECKOUT"]).resolve()
    with tempfile.TemporaryDirectory(prefix="mvm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        environ = _furnished(folder, checkout)
        stack.callback(_all_gone, folder)
        environ["DISPLAY"] = stack.enter_context(_screen(folder))
        command = ["dbus-run-session", "--", "python", "launch.py", str(folder / "port")]
        session = stack.enter_context(_running(command, folder / "server.log", env=environ, cwd=folder / "server"))
        port = int(_told(folder / "port", session, folder / "server.log"))
        yield Machine(checkout, folder, port, session.pid)


def _furnished(folder: Path, checkout: Path) -> dict[str, str]:
    """Puts into the folder what the server needs, a copy of it (it writes beside itself), and returns its variables."""
    shutil.copytree(checkout / "desktop_env" / "server", folder / "server")
    (folder / "server" / "launch.py").write_text(_LAUNCHER)
    for made in ("home", "run", "tmp", "bin", "site"):
        (folder / made).mkdir(mode=0o700)
    for name in SEEN:
        program = shutil.which(name)
        assert program is not None, name
        (folder / "bin" / name).symlink_to(program)
    (folder / "bin" / "python").symlink_to(DEBIANS_PYTHON)
    for package in PIPS:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        (folder / "site" / package).symlink_to(Path(spec.origin).parent)
    return {
        "PATH": str(folder / "bin"),
        "XDG_SESSION_TYPE": "x11",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XAUTHORITY": str(folder / "authority"),
        "PYTHONPATH": str(folder / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GSETTINGS_BACKEND": "memory",
        "LANG": "C.UTF-8",
    }


@contextlib.contextmanager
def _screen(folder: Path) -> Iterator[str]:
    """A screen that only those who know its cookie can use."""
    cookie = secrets.token_bytes(16)
    authority = folder / "authority"
    authority.write_bytes(_authority(b"0", cookie))
    size = f"{SIZE[0]}x{SIZE[1]}x24"
    reading, writing = os.pipe()
    # -r: a key that is down for long, on a busy machine, is pressed once all the same.
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", size, "-nolisten", "tcp", "-noreset", "-r"]
    try:
        with _running([*command, "-auth", str(authority)], folder / "screen.log", pass_fds=(writing,)):
            os.close(writing)
            number = os.read(reading, 16).strip()
            assert number, (folder / "screen.log").read_text()
            authority.write_bytes(_authority(number, cookie))
            yield f":{number.decode()}"
    finally:
        os.close(reading)


def _authority(number: bytes, cookie: bytes) -> bytes:
    """An entry of an `.Xauthority` file, for this host."""
    fields = (socket.gethostname().encode(), number, b"MIT-MAGIC-COOKIE-1", cookie)
    return struct.pack(">H", 256) + b"".join(struct.pack(">H", len(field)) + field for field in fields)


@contextlib.contextmanager
def _running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The program; in the end it is asked to go, and whatever was below it is killed."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **options)
    try:
        yield process
    finally:
        family = _family(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        end(family)
        process.wait(PATIENCE_S)


def _told(file: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """The line that a program writes when it is ready."""

    def line() -> str | None:
        assert process.poll() is None, log.read_text()
        return file.read_text() if file.exists() and file.read_text().endswith("\n") else None

    return str(until(line, "the machine's server is ready"))


def _all_gone(folder: Path) -> None:
    """xclip left the machine's tree, to keep the clipboard, and ends with the screen."""
    mark = str(folder / "authority")
    until(lambda: not any(_environ(one).get("XAUTHORITY") == mark for one in psutil.process_iter()), "all gone")


def _environ(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ() if _lives(process) else {}
    return {}


def _family(pid: int) -> set[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return {root, *root.children(recursive=True)}
    return set()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits until the condition is true, and returns its value. Raises `TimeoutError`: that took too long."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(0.02)


def end(processes: set[psutil.Process]) -> None:
    """Kills the processes, and waits until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    until(lambda: not any(map(_lives, processes)), f"all of {processes} gone")


# -- the DesktopEnv, in the environment's process ----------------------------------------------------------------------


class EmptyModule(types.ModuleType):
    """Has every class, and none of them does anything. Its version is too old for packages that can do without it."""

    __version__ = "0"

    __path__: list[str] = []  # noqa: RUF012 - of modules, and of each its own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *arguments, **options: None})


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """In the place of packages that OSWorld's code imports and that are not installed."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class Provider:
    """Hands the machine out; a snapshot is the machine without the programs that a task has launched."""

    def __init__(self, port: int, session: int) -> None:
        self._port = port
        self._session = psutil.Process(session)

    def start_emulator(self, *arguments: Any) -> None: ...

    def get_ip_address(self, path_to_vm: str) -> str:
        return f"127.0.0.1:{self._port}:0:0:0"

    def revert_to_snapshot(self, path_to_vm: str, snapshot_name: str) -> str:
        self.stop_emulator(path_to_vm)
        return path_to_vm

    def stop_emulator(self, path_to_vm: str) -> None:
        servers = [one for one in self._session.children() if "launch.py" in one.cmdline()]
        end({launched for server in servers for launched in server.children(recursive=True)})


def desktop_env(checkout: str, port: int, session: int, cache: str) -> Any:
    """OSWorld's `DesktopEnv` with the machine."""
    sys.path.insert(0, checkout)
    sys.meta_path.append(
        EmptyModules({name for name in _imported(Path(checkout)) if not importlib.util.find_spec(name)})
    )
    module: Any = importlib.import_module("desktop_env.desktop_env")
    module.create_vm_manager_and_provider = lambda *arguments, **options: (None, Provider(port, session))
    size = {"screen_size": SIZE, "require_a11y_tree": False}
    return module.DesktopEnv(provider_name="docker", path_to_vm="machine", cache_dir=cache, **size)


def _imported(checkout: Path) -> set[str]:
    """The packages that OSWorld's code imports; only those, since others look whether an optional one is there."""
    names: set[str] = set()
    for path in checkout.glob("desktop_env/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)
