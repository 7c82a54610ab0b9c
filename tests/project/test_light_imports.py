"""What importing the library, and attaching to a server, must not load. Each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import standin
from processes import INSTANT

from managed_vllm import ManagedVLLM, demo

HEAVY = {"vllm", "torch", "transformers", "numpy", "PIL", "openai", "aiohttp", "httpx", "requests", "rich", "tqdm"}


def loaded_by(code: str) -> set[str]:
    """The modules that are loaded after `code`."""
    words = [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "name", ["managed_vllm", "managed_vllm.session", "managed_vllm.demo", "managed_vllm.pytest_plugin"]
)
def test_importing_loads_nothing_heavy(name: str) -> None:
    loaded = loaded_by(f"import {name}")
    assert not loaded & HEAVY
    assert not loaded & {"managed_vllm.client", "managed_vllm.supervisor", "managed_vllm.demo.screen"}


def test_importing_the_package_alone_loads_none_of_its_modules() -> None:
    assert [module for module in loaded_by("import managed_vllm") if module.startswith("managed_vllm.")] == []


def test_a_supervisor_is_not_made_to_wait_for_what_it_has_no_use_for() -> None:
    loaded = loaded_by("import managed_vllm.supervisor")
    assert not loaded & {*HEAVY - {"httpx"}, "click", "pygments", "managed_vllm.client"}


def test_attaching_loads_neither_client_nor_supervisor(home: Path) -> None:
    options = {"model": "stand-in", "command": standin.command(), "env": standin.orders(), "keep_alive": INSTANT}
    with ManagedVLLM(**options):  # type: ignore[arg-type]
        code = f"""
import json
from managed_vllm import ManagedVLLM
with ManagedVLLM(**json.loads({json.dumps(options)!r})) as llm:
    assert not llm.started_it
"""
        loaded = loaded_by(code)
    assert not loaded & HEAVY
    assert not loaded & {"managed_vllm.client", "managed_vllm.supervisor", "managed_vllm.demo.screen"}


def test_the_demo_models_screens_are_loaded_when_they_are_used() -> None:
    assert "managed_vllm.demo.screen" not in loaded_by("from managed_vllm import demo; demo.weights_path()")
    assert "managed_vllm.demo.screen" in loaded_by("from managed_vllm.demo import random_screen")
    with pytest.raises(AttributeError, match="no attribute 'screens'"):
        demo.screens  # noqa: B018
