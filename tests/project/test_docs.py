"""What the documentation says holds: its tables are those of the code, its code runs, its links lead somewhere.

Every fenced Python block of every page is run, see `pages`: none is left out. Blocks that define tests are run by
pytest with the stand-in only: they show the fixture, which tests/project/test_pytest_plugin.py tries further.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import inner_pytest
import pages
import pytest
import standin
from processes import own_state

from managed_vllm import ManagedVLLM
from managed_vllm.cli import main as command_line
from managed_vllm.cli.arguments import build_parser

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])

REPOSITORY = r"https://(?:github\.com|raw\.githubusercontent\.com)/managed-vllm/managed_vllm/(?:(?:blob|tree)/)?main/"


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("tool", ["arrows.py", "docs_client.py", "docs_errors.py", "docs_parameters.py"])
def test_the_generated_tables_are_those_of_the_code(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.real
def test_real_every_public_name_of_vllm_llm_is_in_the_table_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derived from the class: a method or attribute that vLLM adds is noticed here."""
    vllm = pytest.importorskip("vllm", reason="vllm is not installed")
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("docs_client")
    assert {name for name in dir(vllm.LLM) if not name.startswith("_")} == set(tool.METHODS)
    source = "".join(inspect.getsource(kind.__init__) for kind in vllm.LLM.__mro__[:-1] if "__init__" in vars(kind))
    assert set(re.findall(r"self\.([a-z]\w*)(?:: [^=\n]+)? = ", source)) == set(tool.ATTRIBUTES)


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


# -- code --------------------------------------------------------------------------------------------------------------


SHOWS = {"docs/howto/troubleshooting.md": "model_not_found", "docs/howto/restarts.md": r"\d+ → \d+"}
"""A pattern of what a page's blocks print, where what they show is more than that they run."""


def _of_python(*, tests: bool) -> list[Path]:
    return [page for page in PAGES if any(block.is_tests is tests for block in pages.blocks(page, "python"))]


@pytest.mark.parametrize("page", _of_python(tests=False), ids=_name)
def test_the_python_of_a_page_runs(page: Path, home: Path, tmp_path: Path) -> None:
    _run_page(page, "stand-in", tmp_path)
    command_line(["down", "--all", "--force"])  # a page may leave a server to others for a while


@pytest.fixture(scope="module")
def demo_server() -> Iterator[None]:
    """One server of the demo model, which all pages share."""
    with own_state(), ManagedVLLM("demo", keep_alive=0) as llm:
        yield
        llm.stop_server()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("demo_server")
@pytest.mark.parametrize("page", _of_python(tests=False), ids=_name)
def test_real_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    _run_page(page, "demo", tmp_path)


def _run_page(page: Path, server: str, folder: Path) -> None:
    command = [sys.executable, pages.__file__, str(page), server]
    run = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert re.search(SHOWS.get(_name(page), ""), run.stdout)


@pytest.mark.parametrize("page", _of_python(tests=True), ids=_name)
def test_the_tests_of_a_page_pass(page: Path, home: Path, tmp_path: Path) -> None:
    tests = [block for block in pages.blocks(page, "python") if block.is_tests]
    for number, block in enumerate(tests):
        (tmp_path / f"test_block_{number}.py").write_text(block.code, encoding="utf-8")
    ini = ["[pytest]", f"managed_vllm_command = {shlex.join(standin.command())}", "managed_vllm_keep_alive = 0"]
    (tmp_path / "pytest.ini").write_text("\n".join(ini))
    command = [*inner_pytest.WORDS, "-q", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert f"{sum(block.code.count('def test_') for block in tests)} passed" in run.stdout


def _environment() -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _commands(program: str) -> list[tuple[str, str]]:
    """(page, words after the program's name) of each line in a page's shell blocks that runs it."""
    found = []
    for page in PAGES:
        for line in pages.shell_lines(page):
            if match := re.match(rf"(?:[A-Z_]+=\S+ )*{program} (.*)", line):
                found.append((_name(page), match[1]))
    return found


def _mentions(program: str) -> list[tuple[str, str]]:
    return [(_name(page), words) for page in PAGES for words in pages.mentions(page, program)]


@pytest.mark.parametrize(("page", "words"), _commands("managed-vllm"))
def test_the_command_line_takes_what_the_pages_write(page: str, words: str) -> None:
    given = [word.strip("[]") for word in shlex.split(words.partition(" | ")[0], comments=True)]
    parsed, rest = build_parser().parse_known_args(given)
    assert parsed.passes_flags or rest == []


@pytest.mark.parametrize(("page", "words"), _mentions("managed-vllm"))
def test_the_command_line_has_the_commands_and_flags_that_the_pages_mention(page: str, words: str) -> None:
    command = words.split()[0]
    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
        build_parser().parse_args(["--help"] if command in ("COMMAND", "--help") else [command, "--help"])
    assert [flag for flag in re.findall(r"--[a-z-]+", words) if flag not in help_text.getvalue()] == []


@pytest.mark.parametrize(("page", "words"), [*_commands("make"), *_mentions("make")])
def test_make_has_the_targets_that_the_pages_name(page: str, words: str) -> None:
    target = re.match(r"[\w-]+", words)
    assert target is not None
    assert re.search(rf"^{target[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("page", "words"), [*_commands("python"), *_mentions("python")])
def test_programs_and_tests_that_the_pages_run_are_there(page: str, words: str) -> None:
    for path in re.findall(r"(?<=[ ^])(?:tests|tools|examples|benchmarks)/[\w/.]+", f" {words}"):
        assert (ROOT / path).exists(), f"{page} runs {path}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_the_pages_name_are_there(page: Path) -> None:
    for path in re.findall(r"`((?:managed_vllm|tests|tools|examples|benchmarks)/[\w/.]+)`", page.read_text("utf-8")):
        assert (ROOT / path).exists() or "NAME" in path, f"{_name(page)} names {path}"


def test_names_that_contributors_are_told_to_look_for_are_there() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    files = [path for folder in ("managed_vllm", "tests", "tools") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name in re.findall(r"`(\w+(?:\.py)?)`", text):
        if name.endswith(".py"):
            assert any(path.name == name for path in files), name
        elif not name.isdigit():
            assert re.search(rf"\b{name}\b", code), name


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_settings_of_the_fixture_are_written_as_the_plugin_knows_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plugin = (ROOT / "managed_vllm" / "pytest_plugin.py").read_text(encoding="utf-8")
    for option in re.findall(r"--managed-vllm-[a-z-]+", text):
        assert f'"{option}"' in plugin
    for block in pages.blocks(page, "toml"):
        for setting in tomllib.loads(block.code)["tool"]["pytest"]["ini_options"]:
            assert f'addini("{setting}"' in plugin


# -- links and the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _links(page):
        path = re.sub(rf"^{REPOSITORY}", f"{ROOT}/", target)
        if "://" not in path:
            assert (page.parent / path).exists(), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_errors_and_policies_that_the_pages_name_exist(page: Path) -> None:
    homes = [importlib.import_module(name) for name in ("builtins", "managed_vllm", "managed_vllm.errors")]
    homes += [importlib.import_module(name) for name in ("managed_vllm.policies", "managed_vllm.agent")]
    for name in re.findall(r"`(\w+(?:Error|Policy))\b", page.read_text(encoding="utf-8")):
        assert any(hasattr(home, name) for home in homes), f"{_name(page)} names {name}"


def test_links_of_the_package_page_are_absolute() -> None:
    assert [target for target in _links(ROOT / "README.md") if "://" not in target] == []


def _links(page: Path) -> list[str]:
    """The targets of the page's links and images, without those within the page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"(?:\]\(|^\[[\w-]+\]: )([^)#\s]+)", text, flags=re.MULTILINE)


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
