"""Environments that misbehave when told to: a synchronous one, and one of gymnasium's shape.

What to do comes as `Custom(name, arguments)`, or as a task's data.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from managed_vllm.agent import Observation, StepResult, Task
from managed_vllm.agent.actions import Action, Click, Custom


class Unpicklable(Exception):
    """Its constructor takes what its pickle does not have."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Obedient:
    """A `SyncEnvironment`."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.steps = 0
        if arguments.get("fail") == "make":
            raise RuntimeError("it can't be made")

    def reset(self, task: Task) -> Observation:
        self.steps = 0
        if task.data:
            self.do(task.data["do"], task.data)
        facts = {
            "pid": os.getpid(),
            "tmp": os.environ.get("TMPDIR"),
            "arguments": self.arguments,
            "variable": os.environ.get("STANDIN_VARIABLE"),
            "executable": sys.executable,
        }
        return Observation(text=f"reset {task.id}", extras=facts)

    def step(self, action: Action) -> StepResult:
        self.steps += 1
        done = None
        if isinstance(action, Custom):
            done = self.do(action.name, action.arguments)
        return StepResult(
            Observation(text=f"step {self.steps}", extras={"done": done}), 0.5, info={"steps": self.steps}
        )

    def evaluate(self) -> float | None:
        return self.arguments.get("reward", 1)  # type: ignore[no-any-return]

    def close(self) -> None:
        if "closed" in self.arguments:
            Path(self.arguments["closed"]).write_text("closed")
        if self.arguments.get("fail") == "close":
            raise RuntimeError("it can't be closed")
        if self.arguments.get("fail") == "close hangs":
            hang()

    def do(self, what: str, how: Any) -> Any:
        match what:
            case "sleep":
                time.sleep(how["seconds"])
            case "hang":
                hang(how)
            case "hang in C":
                tell_of_hanging(how)
                ctypes.CDLL(None).pause()
            case "hang and ignore signals":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGUSR2, signal.SIG_IGN)
                hang(how)
            case "raise":
                raise ValueError("as it was told")
            case "raise the unpicklable":
                raise Unpicklable("this", "that")
            case "exit":
                print("famous last words", flush=True)
                sys.exit(how["code"])
            case "_exit":
                print("famous last words")
                os._exit(how["code"])
            case "signal":
                print("famous last words", file=sys.stderr)
                os.kill(os.getpid(), how["signal"])
            case "return a number":
                return 3
            case "return the unpicklable":
                return threading.Lock()
            case "write":
                line = "x" * 79 + "\n"
                for _ in range(how["bytes"] // 80):
                    sys.stderr.write(line)
            case "leave processes":
                return left_processes(Path(os.environ["TMPDIR"]))
            case "leave processes and hang":
                Path(how["pids"]).write_text(" ".join(map(str, left_processes(Path(os.environ["TMPDIR"])))))
                hang()
            case _:
                raise NotImplementedError(what)
        return None


class NoEnvironment:
    """Lacks almost everything."""

    def reset(self, task: Task) -> None:
        return None


class WrongReturns(Obedient):
    """Returns something else than the protocol says."""

    def reset(self, task: Task) -> Any:
        return ("an observation", {}) if task.id == "reset" else super().reset(task)

    def step(self, action: Action) -> Any:
        return (0, 0.0, False, False, {})

    def evaluate(self) -> Any:
        return float("nan")


def hang(how: Any = ()) -> None:
    tell_of_hanging(how)
    while True:
        time.sleep(3600)


def tell_of_hanging(how: Any) -> None:
    """Makes the file that `begun` names."""
    if "begun" in how:
        Path(how["begun"]).touch()


def left_processes(folder: Path) -> list[int]:
    """A child, and a grandchild in a session of its own whose parent has ended; both ignore what can be ignored."""
    stubborn = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; print(flush=True); "
    child = subprocess.Popen([sys.executable, "-c", stubborn + "time.sleep(3600)"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    detach = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {stubborn + 'time.sleep(3600)'!r}], "
        "start_new_session=True, stdout=subprocess.PIPE)\n"
        "process.stdout.readline()\n"
        "print(process.pid)\n"
    )
    grandchild = int(
        subprocess.run([sys.executable, "-c", detach], stdout=subprocess.PIPE, check=True, text=True).stdout
    )
    (folder / "left").mkdir()
    (folder / "left" / "file").write_text("left behind")
    return [child.pid, grandchild]


class TinyEnv:
    """Of gymnasium's shape without its package: a number line of five places, the goal on the right.

    A frame is 40 pixels high and 100 wide, the place drawn in white.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as gymnasium's

    def __init__(self, render_mode: str | None = "rgb_array", old: bool = False, limit: int = 10) -> None:
        self.render_mode = render_mode
        self.old = old
        self.limit = limit
        self.place = self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        import numpy

        if options is not None and options.get("hang"):
            hang()
        self.place = (options or {}).get("place", int(numpy.random.default_rng(seed).integers(0, 3)))
        self.count = 0
        return self._observation() if self.old else (self._observation(), {"seed": seed})

    def step(self, action: Any) -> Any:
        import numpy

        if isinstance(action, str):
            Obedient().do(action, {"code": 7, "seconds": 0.3})
            action = 0
        self.place = max(0, min(4, self.place + int(action)))
        self.count += 1
        info = {
            "count": numpy.int64(self.count),
            "vector": numpy.arange(3),
            "nested": {"x": [numpy.float32(0.5)]},
            "lock": threading.Lock(),
        }
        if self.old:
            return self._observation(), 1.0, False, info
        return self._observation(), numpy.float64(self.place == 4), self.place == 4, self.count >= self.limit, info

    def render(self) -> Any:
        import numpy

        frame = numpy.zeros((40, 100, 3), numpy.uint8)
        frame[:, self.place * 20 : self.place * 20 + 20] = 255
        return frame

    def close(self) -> None:
        pass

    def _observation(self) -> Any:
        import numpy

        return numpy.array([self.place], numpy.float32)


def toward(action: Action) -> Any:
    """`to_action` of `TinyEnv`: a click goes toward where it is; other actions are told by name."""
    match action:
        case Click(x=x):
            return 1 if x >= 50 else -1
        case Custom(name=name):
            return name
    return 0


def score(env: Any) -> float:
    """`evaluate` of `TinyEnv`."""
    return float(env.place) / 4
