"""Prints which room of managed_vllm imports which, and writes the tables of rooms and modules in docs/architecture.md.

    python tools/arrows.py             prints the arrows and brings the page up to date
    python tools/arrows.py --check     only says whether the page is: exit status 1 if not

A room is a folder or a module of the package's first level. Every import counts, within functions and for type checkers
only, too. The package itself and `managed_vllm.agent` lend names of their modules: who imports such a name imports the
module that it comes from. Which arrows may be, tests/project/test_arrows.py says.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from generated_page import main, table, with_parts

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "managed_vllm"
PAGE = ROOT / "docs" / "architecture.md"
LENT = "_HOME_OF"
"""The variable in which a package says from which modules the names that it lends come."""


@dataclass(frozen=True, order=True)
class Import:
    """One module of ours imports another one."""

    importer: str
    imported: str
    line: int

    @property
    def arrow(self) -> tuple[str, str]:
        return room_of(self.importer), room_of(self.imported)


@cache
def modules() -> Mapping[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def source_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    """The room of a module; of the package itself, the package."""
    return module.split(".")[1] if "." in module else module


@cache
def lent_by(package: str) -> Mapping[str, str]:
    """The names that a package lends, and the modules that they come from."""
    for node in source_of(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == LENT:
            homes: dict[str, str] = ast.literal_eval(node.value)
            return homes
    return {}


@cache
def imports() -> tuple[Import, ...]:
    """All imports between modules of ours, but for what packages that lend names say of these."""
    return tuple(sorted(set(_imports())))


def _imports() -> Iterator[Import]:
    for module in modules():
        if not lent_by(module):
            for node in ast.walk(source_of(module)):
                for imported in _imported(node):
                    if imported != module and not lent_by(imported):
                        yield Import(module, imported, node.lineno)  # type: ignore[attr-defined]  # a statement has one


def _imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (one.name for one in names if one.name in modules())
        case ast.ImportFrom(module=str(origin), names=names) if origin in modules():
            for one in names:
                inner = f"{origin}.{one.name}"
                yield inner if inner in modules() else lent_by(origin).get(one.name, origin)


def arrows() -> Mapping[tuple[str, str], list[Import]]:
    """From room to room, with the imports that it consists of."""
    found: dict[tuple[str, str], list[Import]] = {}
    for one in imports():
        if one.arrow[0] != one.arrow[1]:
            found.setdefault(one.arrow, []).append(one)
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other."""
    reached = {node: _reached(graph, node) for node in graph}
    sets = {frozenset({node, *(other for other in reached[node] if node in reached.get(other, ()))}) for node in graph}
    return sorted(sorted(one) for one in sets if len(one) > 1)


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = graph.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


# -- the page ----------------------------------------------------------------------------------------------------------


def purpose(module: str) -> str:
    """The first sentence of a module's docstring. Raises `ValueError` if it has none."""
    text = ast.get_docstring(source_of(module))
    if not text:
        raise ValueError(f"{modules()[module].relative_to(ROOT)} has no docstring: say in a sentence what lives there")
    sentence, stop, _ = text.partition("\n\n")[0].replace("\n", " ").partition(". ")
    return sentence.removesuffix(".") if not stop else sentence


def rooms_table() -> str:
    rooms: dict[str, set[str]] = {room_of(module): set() for module in modules() if module != PACKAGE}
    for importer, imported in arrows():
        rooms[importer].add(imported)
    rows = []
    for room in _from_below(rooms):
        name = f"`{room}/`" if modules()[f"{PACKAGE}.{room}"].name == "__init__.py" else f"`{room}`"
        rows.append((name, purpose(f"{PACKAGE}.{room}"), ", ".join(f"`{one}`" for one in sorted(rooms[room])) or "–"))
    return table(("Room", "What lives there", "Imports"), rows)


def _from_below(rooms: Mapping[str, set[str]]) -> list[str]:
    """The rooms, each after those that it imports, as far as there is no circle."""
    done: list[str] = []
    left = sorted(rooms)
    while left:
        ready = [room for room in left if rooms[room] <= {*done, room}] or left
        done += ready
        left = [room for room in left if room not in done]
    return done


def modules_table() -> str:
    """The modules in folders, by folder."""
    rows = []
    for module in modules():
        parts = module.split(".")
        if len(parts) > 2 and not parts[-1].startswith("__"):
            rows.append((f"`{'.'.join(parts[1:])}`", purpose(module)))
    return table(("Module", "What lives there"), rows)


def updated(page: str) -> str:
    """The page with its generated parts made anew. Raises `ValueError` where a marker or a docstring is missing."""
    return with_parts(page, {"rooms": rooms_table(), "modules": modules_table()})


if __name__ == "__main__":
    if "--check" not in sys.argv:
        for (importer, imported), found in sorted(arrows().items()):
            print(f"{importer} -> {imported} ({len(found)})")
    sys.exit(main(PAGE, "arrows.py", updated, __doc__))
