"""Record the logs below `data/startup_logs/` from a real vLLM. Run by hand, when a new version of vLLM comes out:

    python tests/helpers/record_startup_logs.py MODEL [--python VENV/bin/python] [--output DIR] [NAME …]

MODEL is a small model's folder (the demo model). Each failure of `startup_failures.py` is started in turn, one vLLM at
a time, and each log is written as it came out, but for paths, ports' holders and the long middle of tracebacks:

- paths of this machine become `/models/demo`, `/tmp/case`, `/venv`;
- in a traceback only its first and its last two frames stay.

Besides the failures it records two good starts (`ready`, eager; `ready_compiled`) and two deaths after ready
(`worker_killed`, `engine_killed`). `outcomes.json` beside the logs says how each run ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from startup_failures import STARTUP_FAILURES

LIMIT_S = 240.0  # torch.compile with an empty cache takes a minute on two cores


@dataclass(frozen=True)
class Outcome:
    """How a recorded run ended. `status` and `body`: the answer to the first completion, where the server came up."""

    returncode: int | None
    seconds: float
    status: int | None = None
    body: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "data" / "startup_logs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    outcomes_path = args.output / "outcomes.json"
    outcomes = json.loads(outcomes_path.read_text()) if outcomes_path.exists() else {}
    for name, prepare, kill in _cases():
        if args.names and name not in args.names:
            continue
        with tempfile.TemporaryDirectory(prefix="record-") as folder:
            kwargs = prepare(Path(folder), args.model.resolve())
            lines, outcome = _run(kwargs, python=args.python, folder=Path(folder), kill=kill)
            places = {folder: "/tmp/case", str(args.model.resolve()): "/models/demo"}
            places[str(Path(args.python).parent.parent)] = "/venv"
            places[sys.base_prefix] = "/usr/local"
        (args.output / f"{name}.log").write_text("".join(f"{line}\n" for line in _trim(lines, places)))
        for path, place in places.items():
            outcome = replace(outcome, body=outcome.body.replace(path, place))
        outcomes[name] = asdict(outcome)
        outcomes_path.write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n")
        print(f"{name:32} {outcome.seconds:6.1f} s  exit {outcome.returncode}  {outcome.status or ''}", flush=True)


Prepare = Callable[[Path, Path], dict[str, object]]


def _cases() -> list[tuple[str, Prepare, str | None]]:
    """(name, prepare, the process to kill once it is ready) of every run."""

    def eager(tmp_path: Path, model: Path) -> dict[str, object]:
        return {"model": str(model)}

    def compiled(tmp_path: Path, model: Path) -> dict[str, object]:
        return {"model": str(model), "enforce_eager": False, "env": {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}}

    cases: list[tuple[str, Prepare, str | None]] = [(f.name, f.prepare, None) for f in STARTUP_FAILURES]
    cases += [("ready", eager, None), ("ready_compiled", compiled, None)]
    cases += [("worker_killed", eager, "Worker"), ("engine_killed", eager, "EngineCore")]
    return cases


def _run(kwargs: dict[str, object], *, python: str, folder: Path, kill: str | None) -> tuple[list[str], Outcome]:
    kwargs = {"enforce_eager": True, "host": "127.0.0.1", "port": _free_port(), **kwargs}
    python = str(kwargs.pop("python", python))
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"TMPDIR": str(folder), "VLLM_API_KEY": str(kwargs.pop("api_key", "recorder"))}
    env |= cast("dict[str, str]", kwargs.pop("env", {}))
    log = folder / "server.log"
    began = time.monotonic()
    with log.open("wb") as sink:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *_flags(kwargs)]
        server = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    status, body = None, ""
    try:
        while server.poll() is None and time.monotonic() - began < LIMIT_S:
            if b"Application startup complete" in log.read_bytes():
                if kill is None:
                    status, body = _first_completion(int(str(kwargs["port"])))
                    server.terminate()
                else:
                    pids = re.findall(rf"\({kill} pid=(\d+)\)", log.read_text())
                    os.kill(int(pids[0]), signal.SIGKILL)
                server.wait(timeout=60)
            time.sleep(0.05)
        seconds = time.monotonic() - began
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # whatever it left behind in its group
    returncode = server.returncode if kill is not None or status is None else None
    return log.read_text(errors="replace").splitlines(), Outcome(returncode, round(seconds, 1), status, body)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _flags(kwargs: dict[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in kwargs.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else [flag.replace("--", "--no-", 1)]
        else:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def _first_completion(port: int) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps({"prompt": "Hello", "max_tokens": 1}).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer recorder"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def _trim(lines: list[str], places: dict[str, str]) -> list[str]:
    """`lines` without this machine's paths and, in each traceback, without the frames in the middle."""
    kept: list[str] = []
    frames: list[list[str]] = []

    def flush() -> None:
        shown = frames if len(frames) <= 3 else [frames[0], *frames[-2:]]
        kept.extend(line for frame in shown for line in frame)
        frames.clear()

    for line in _without_noise(lines):
        for path, name in places.items():
            line = line.replace(path, name)
        text = re.sub(r"^\([^)]*pid=\d+\) (?:\w+ \S+ \S+ \[[^]]*\] )?", "", line)
        if text.startswith("  File "):
            frames.append([line])
        elif frames and text.startswith("    "):
            frames[-1].append(line)
        else:
            flush()
            kept.append(line[:2000])
    flush()
    return kept


def _without_noise(lines: list[str]) -> list[str]:
    """Without argparse's list of all flags and without nanobind's complaint about leaks when a process exits."""
    kept: list[str] = []
    noise = ""
    for line in lines:
        if line.startswith(("usage:", "nanobind:")):
            noise = line.partition(":")[0]
            kept += [line] if noise == "usage" else []
        elif not noise or not line.startswith(("   ", " - ", "See https://nanobind")):
            noise = ""
            kept.append(line)
    return kept


if __name__ == "__main__":
    main()
