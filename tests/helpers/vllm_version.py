"""Which vLLM there is to compare with: the installed one, or one that PYTHONPATH puts before it (`make test-vllm`)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


def version_of_vllm() -> str:
    """As "0.33", without importing it. Skips the test where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM in this interpreter")
    found = re.search(r"version = '(\d+\.\d+)", (Path(spec.origin).parent / "_version.py").read_text())
    assert found is not None
    return found[1]
