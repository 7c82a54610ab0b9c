"""A stand-in for OSWorld: its machine (an HTTP server in a process of its own), and a `DesktopEnv` that talks to it.

The routes are those of the server in OSWorld's machines, as `desktop-env` 1.0.2 calls them: `/screenshot`,
`/accessibility`, `/terminal`, `/execute`, `/setup/…`. A command that comes to `/execute` is run, with a `pyautogui`
that writes down what it is told. `/standin/…` is the tests' own: faults, what was done, whether the machine is in use.

`DesktopEnv` and `PythonController` have the signatures of the real ones (`SIGNATURES`), and do what those do: three
tries with a pause, then None; five tries of a set-up, then go on without; a reward of 0 for each step.
"""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "DesktopEnv.__init__": [
        ("provider_name", "vmware"),
        ("region", None),
        ("path_to_vm", None),
        ("snapshot_name", "init_state"),
        ("action_space", "pyautogui"),
        ("cache_dir", "cache"),
        ("screen_size", (1920, 1080)),
        ("headless", False),
        ("require_a11y_tree", True),
        ("require_terminal", False),
        ("os_type", "Ubuntu"),
        ("enable_proxy", False),
        ("client_password", ""),
    ],
    "DesktopEnv.reset": [("task_config", None), ("seed", None), ("options", None)],
    "DesktopEnv.step": [("action", ...), ("pause", 2)],
    "DesktopEnv.evaluate": [],
    "DesktopEnv.close": [],
    "DesktopEnv.render": [("mode", "rgb_array")],
    "PythonController.__init__": [
        ("vm_ip", ...),
        ("server_port", ...),
        ("pkgs_prefix", "import pyautogui; import time; pyautogui.FAILSAFE = False; {command}"),
    ],
    "PythonController.get_screenshot": [],
    "PythonController.get_accessibility_tree": [],
    "PythonController.get_terminal_output": [],
    "PythonController.execute_python_command": [("command", ...)],
}
"""Parameters with their defaults (`...`: none) in `desktop-env` 1.0.2, without `self`."""

RETRIES = 3
SETUPS = 5
PAUSE_S = 0.02
"""Between tries; 5 s in the real one."""

_PYAUTOGUI = """
import json, os
def _told(name):
    def call(*arguments, **options):
        with open(os.environ["STANDIN_CALLS"], "a") as file:
            file.write(json.dumps([name, arguments, options]) + "\\n")
    return call
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _told(name)
"""


# -- the machine -------------------------------------------------------------------------------------------------------


def png(value: int) -> bytes:
    """A screenshot that tells how much was done."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (192, 108), (value % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


class _Machine(http.server.BaseHTTPRequestHandler):
    folder: Path
    faults: dict[str, Any] = {}  # noqa: RUF012 - one machine a process
    used = False
    done = 0
    setups: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        fault = self.fault()
        match self.path:
            case "/screenshot":
                self.answer(b"not a picture" if fault == "garbage" else png(_Machine.done), "image/png")
            case "/accessibility":
                self.answer({"AT": "<desktop><button name='OK'/></desktop>"})
            case "/terminal":
                self.answer({"output": "$ "})
            case "/standin/state":
                calls = self.folder / "calls"
                said = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
                copied = [arguments[0] for name, arguments, _ in said if name == "copy"]
                said = [call for call in said if call[0] != "copy"]
                self.answer({"used": _Machine.used, "calls": said, "copied": copied, "setups": _Machine.setups})
            case _:
                self.send_error(404)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.path == "/standin/faults":
            _Machine.faults = sent
            self.answer({})
            return
        if self.path in ("/standin/start", "/standin/stop"):
            _Machine.used = self.path.endswith("start")
            self.answer({})
            return
        if self.fault():
            return
        if self.path == "/execute":
            _Machine.done += 1
            environ = {**os.environ, "PYTHONPATH": str(self.folder), "STANDIN_CALLS": str(self.folder / "calls")}
            command = [sys.executable, *sent["command"][1:]]
            ran = subprocess.run(command, env=environ, capture_output=True, text=True)
            self.answer({"status": "success", "output": ran.stdout, "error": ran.stderr, "returncode": ran.returncode})
        elif self.path.startswith("/setup/"):
            _Machine.setups.append(self.path)
            self.answer({})
        else:
            self.send_error(404)

    def fault(self) -> str | None:
        """Does what is to go wrong with this route; returns it if nothing is left to be done."""
        for route, fault in _Machine.faults.items():
            if self.path.startswith(route):
                if fault == "hang":
                    threading.Event().wait()
                if fault == "error":
                    self.send_error(500)
                    raise ConnectionAbortedError
                return str(fault)
        return None

    def answer(self, what: Any, kind: str = "application/json") -> None:
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def main() -> None:
    """Serves until standard input ends."""
    with tempfile.TemporaryDirectory() as folder:
        _Machine.folder = Path(folder)
        for name in ("pyautogui", "pyperclip"):
            (_Machine.folder / f"{name}.py").write_text(_PYAUTOGUI)
        server = _Server(("127.0.0.1", 0), _Machine)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()


class Machine:
    """A machine's process, for tests."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def faults(self, **faults: Any) -> None:
        """What goes wrong from now on: `screenshot="error"`, `execute="hang"`, `screenshot="garbage"`, …"""
        _ask(self.address, "/standin/faults", {f"/{route}": fault for route, fault in faults.items()})

    def execute(self, source: str) -> None:
        """Runs something there, as if it happened by itself."""
        _ask(self.address, "/execute", {"command": ["python", "-c", source]})

    def state(self) -> dict[str, Any]:
        """`used`, `calls` of pyautogui, what was `copied` to the clipboard, `setups`."""
        return json.loads(_ask(self.address, "/standin/state"))  # type: ignore[no-any-return]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def _ask(address: str, path: str, sent: Any = None, timeout_s: float = 90) -> bytes:
    data = None if sent is None else json.dumps(sent).encode()
    request = urllib.request.Request(f"http://{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return answer.read()  # type: ignore[no-any-return]


# -- the client --------------------------------------------------------------------------------------------------------


class PythonController:
    """Asks the machine: three times, then it is None."""

    def __init__(
        self,
        vm_ip: str,
        server_port: int,
        pkgs_prefix: str = "import pyautogui; import time; pyautogui.FAILSAFE = False; {command}",
    ) -> None:
        self.address = f"{vm_ip}:{server_port}"
        self.pkgs_prefix = pkgs_prefix

    def get_screenshot(self) -> bytes | None:
        return self._tried("/screenshot", timeout_s=10)

    def get_accessibility_tree(self) -> str | None:
        answer = self._tried("/accessibility")
        return None if answer is None else json.loads(answer)["AT"]

    def get_terminal_output(self) -> str | None:
        answer = self._tried("/terminal")
        return None if answer is None else json.loads(answer)["output"]

    def execute_python_command(self, command: str) -> Any:
        source = self.pkgs_prefix.format(command=command)
        answer = self._tried("/execute", {"command": ["python", "-c", source], "shell": False})
        return None if answer is None else json.loads(answer)

    def _tried(self, path: str, sent: Any = None, timeout_s: float = 90) -> bytes | None:
        for _ in range(RETRIES):
            try:
                return _ask(self.address, path, sent, timeout_s)
            except OSError:
                time.sleep(PAUSE_S)
        return None


class DesktopEnv:
    """`path_to_vm` is the address of the machine."""

    def __init__(
        self,
        provider_name: str = "vmware",
        region: str = None,  # type: ignore[assignment]  # noqa: RUF013 - as in the real one
        path_to_vm: str = None,  # type: ignore[assignment]  # noqa: RUF013
        snapshot_name: str = "init_state",
        action_space: str = "pyautogui",
        cache_dir: str = "cache",
        screen_size: tuple[int, int] = (1920, 1080),
        headless: bool = False,
        require_a11y_tree: bool = True,
        require_terminal: bool = False,
        os_type: str = "Ubuntu",
        enable_proxy: bool = False,
        client_password: str = "",
    ) -> None:
        self.path_to_vm = path_to_vm
        self.action_space = action_space
        self.require_a11y_tree = require_a11y_tree
        self.require_terminal = require_terminal
        self.is_environment_used = provider_name in ("vmware", "virtualbox")
        self.instruction = None
        self.action_history: list[Any] = []
        self._start_emulator()

    def _start_emulator(self) -> None:
        _ask(self.path_to_vm, "/standin/start", {})
        host, port = self.path_to_vm.split(":")
        self.controller = PythonController(vm_ip=host, server_port=int(port))

    def reset(self, task_config: dict[str, Any] | None = None, seed: Any = None, options: Any = None) -> dict[str, Any]:
        self.action_history.clear()
        for _ in range(SETUPS):
            if self.is_environment_used:
                self._start_emulator()
                self.is_environment_used = False
            if task_config is None:
                break
            self.instruction = task_config["instruction"]
            self.evaluator = task_config["evaluator"]
            config = task_config.get("config", [])
            if self._set_up(config):
                self.is_environment_used = bool(config)
                break
        return self._get_obs()

    def _set_up(self, config: list[dict[str, Any]]) -> bool:
        for part in config:
            try:
                _ask(self.path_to_vm, f"/setup/{part['type']}", part["parameters"])
            except OSError:
                return False
        return True

    def _get_obs(self) -> dict[str, Any]:
        return {
            "screenshot": self.controller.get_screenshot(),
            "accessibility_tree": self.controller.get_accessibility_tree() if self.require_a11y_tree else None,
            "terminal": self.controller.get_terminal_output() if self.require_terminal else None,
            "instruction": self.instruction,
        }

    def step(self, action: Any, pause: float = 2) -> tuple[dict[str, Any], int, bool, dict[str, Any]]:
        self.action_history.append(action)
        self.is_environment_used = True
        done, info = False, {}
        if action in ("WAIT", "FAIL", "DONE"):
            if action == "WAIT":
                time.sleep(pause)
            else:
                done, info = True, {action.lower(): True}
        else:
            self.controller.execute_python_command(action)
        time.sleep(pause)
        return self._get_obs(), 0, done, info

    def evaluate(self) -> Any:
        func = self.evaluator["func"]
        failed = bool(self.action_history) and self.action_history[-1] == "FAIL"
        if func == "infeasible" or failed:
            return int(func == "infeasible" and failed)
        if func == "hang":
            threading.Event().wait()
        if func == "nothing":
            return None
        if func == "clicked":
            calls = json.loads(_ask(self.path_to_vm, "/standin/state"))["calls"]
            return 1.0 if any(name == "click" for name, _, _ in calls) else 0.0
        raise AttributeError(f"module 'metrics' has no attribute {func!r}")

    def close(self) -> None:
        _ask(self.path_to_vm, "/standin/stop", {})

    def render(self, mode: str = "rgb_array") -> Any:
        return self.controller.get_screenshot()


class WithoutEvaluate:
    """Of its shape as far as that goes: no `evaluate`, no `controller`."""

    def __init__(self) -> None:
        self.actions: list[Any] = []

    def reset(self, task_config: Any = None) -> dict[str, Any]:
        return {"screenshot": png(1)}

    def step(self, action: Any, pause: float = 2) -> Any:
        self.actions.append(action)
        return {"screenshot": png(len(self.actions))}, 0, action in ("DONE", "FAIL"), {"actions": list(self.actions)}

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main()
