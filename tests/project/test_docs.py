"""What the documentation says holds: generated tables are up to date, code blocks are Python, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("tool", ["docs_errors.py", "docs_parameters.py"])
def test_the_generated_tables_are_those_of_the_code(tool: str) -> None:
    command = [sys.executable, ROOT / "tools" / tool, "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.real
def test_real_every_public_parameter_of_vllm_is_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm", reason="vllm is not installed")
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("docs_parameters")
    for method, listed in ((vllm.LLM.generate, tool.GENERATE), (vllm.LLM.chat, tool.CHAT)):
        assert {name for name in inspect.signature(method).parameters if name != "self"} == set(listed)
    public = {name for name in vllm.SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert public == set(tool.SAMPLING)
    structured = {name for name in vllm.sampling_params.StructuredOutputsParams.__dataclass_fields__ if name[0] != "_"}
    assert structured == set(tool.STRUCTURED)
    page = tool.PAGE.read_text(encoding="utf-8")
    sections = {
        "generate": tool.GENERATE,
        "chat": tool.CHAT,
        "sampling": tool.SAMPLING,
        "structured": tool.STRUCTURED,
    }
    for section, names in sections.items():
        table = page.partition(f"<!-- generated: {section} -->")[2].partition("<!-- end:")[0]
        assert [name for name in names if f"| `{name}` |" not in table] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_parses_and_imports_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("managed_vllm"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
