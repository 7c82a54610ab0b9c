"""What the documentation says holds: generated tables are up to date, code blocks are Python, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


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


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_in_the_documentation_parses_and_imports_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("managed_vllm"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("package", ["managed_vllm", "managed_vllm.agent", "managed_vllm.agent.actions"])
def test_every_public_name_is_in_the_api_reference(package: str) -> None:
    shown = set()
    for page in ROOT.glob("docs/api/*.md"):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"^::: (\S+)", text, re.MULTILINE):
            shown |= {path.rpartition(".")[2], *_public(path)}
        shown |= set(re.findall(r"`(\w+)`", text.partition(":::")[0]))  # another name of what is below
    public = importlib.import_module(package).__all__
    assert [name for name in public if name not in shown and not name.startswith("__")] == []


def _public(path: str) -> list[str]:
    """The names that a module defines, as the reference shows them; none for a class or a function."""
    found = importlib.util.find_spec(path) if _is_module(path) else None
    if found is None or found.origin is None:
        return []
    names = []
    for node in ast.parse(Path(found.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def _is_module(path: str) -> bool:
    return (ROOT / path.replace(".", "/")).with_suffix(".py").exists()


def test_links_out_of_the_documentation_lead_to_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    links = importlib.import_module("docs_site").with_source_links
    at = "https://host/blob/main/"
    assert links("[a](../examples/01.py)", "page.md", at) == f"[a]({at}examples/01.py)"
    assert links("[a](../../README.md#x)", "howto/page.md", at) == f"[a]({at}README.md#x)"
    assert links("[a](../page.md) [b](other.md)", "howto/page.md", at) == "[a](../page.md) [b](other.md)"
