"""What the tests themselves must keep to, found in their source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}


def everywhere(look: Callable[[ast.Module], Iterator[tuple[int, str]]]) -> list[str]:
    """What is found in any of the tests, with its place."""
    return [f"{path.relative_to(ROOT)}:{line}: {text}" for path, tree in SOURCES.items() for line, text in look(tree)]


# -- private attributes ------------------------------------------------------------------------------------------------

PRIVATE_REACHES = 1
"""How often the tests reach into what is private. Only ever lower it: test what can be seen instead."""
PUBLIC_IN_SPITE_OF_THE_NAME = {"_exit", "_replace"}
"""`os._exit`, and a method of named tuples."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_IN_SPITE_OF_THE_NAME


def private_reaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each reach: `x._y`, an import of `_y`, `setattr(x, "_y", …)`, `"managed_vllm.x._y"`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, ast.unparse(node)
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("managed_vllm"):
                yield from ((node.lineno, f"{module}.{one.name}") for one in names if is_private(one.name))
            case ast.Call(func=ast.Attribute(attr="setattr" | "delattr"), args=[_, ast.Constant(value=str(name)), *_]):
                if is_private(name.rpartition(".")[2]):
                    yield node.lineno, ast.unparse(node)
            case ast.Constant(value=str(text)) if text.startswith("managed_vllm.") and " " not in text:
                if is_private(text.rpartition(".")[2]):
                    yield node.lineno, text


def test_no_new_reach_into_what_is_private() -> None:
    found = everywhere(private_reaches)
    assert len(found) <= PRIVATE_REACHES, "\n".join(found)


# -- clocks ------------------------------------------------------------------------------------------------------------

HANGS_S = 20.0
"""A bound below this fails on a busy machine; one above it is for what hangs."""
CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}


def reads_a_clock(node: ast.expr) -> bool:
    calls = (one.func for one in ast.walk(node) if isinstance(one, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr in CLOCKS for call in calls)


def tight_bounds(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each assertion that what a clock says is less than a few seconds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and reads_a_clock(node.test):
            for comparison in (one for one in ast.walk(node.test) if isinstance(one, ast.Compare)):
                bounds = zip(comparison.ops, comparison.comparators, strict=True)
                if any(
                    isinstance(operator, ast.Lt | ast.LtE)
                    and isinstance(bound, ast.Constant)
                    and isinstance(bound.value, int | float)
                    and bound.value < HANGS_S
                    for operator, bound in bounds
                ):
                    yield node.lineno, ast.unparse(node)


def test_no_assertion_bounds_the_time_by_less_than_what_hangs() -> None:
    """What must be quick is shown by the order of events, or measured by a benchmark."""
    assert everywhere(tight_bounds) == []


# -- order -------------------------------------------------------------------------------------------------------------


def has_no_order(node: ast.expr) -> bool:
    """Whether it is a set, as far as can be seen: in each process its elements come in another order."""
    match node:
        case ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.BinOp(op=ast.Sub() | ast.BitAnd() | ast.BitOr() | ast.BitXor()):
            return True
    return False


def parameters_without_order(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each set from which `parametrize` makes tests."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize":
            iterated = [part.iter for part in ast.walk(call) if isinstance(part, ast.comprehension)]
            unpacked = [part.value for part in ast.walk(call) if isinstance(part, ast.Starred)]
            for part in (*call.args[1:2], *iterated, *unpacked):
                if has_no_order(part):
                    yield part.lineno, ast.unparse(part)


def test_each_process_finds_the_same_tests_in_the_same_order() -> None:
    """Else pytest-xdist runs none of them."""
    assert everywhere(parameters_without_order) == []
