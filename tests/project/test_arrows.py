"""The house: which room may import which, no circles, and nothing that is too large to be seen at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import arrows

# -- arrows ------------------------------------------------------------------------------------------------------------

VALUES = {"masking", "status", "errors", "policies", "forks", "urls", "paths", "socket_paths"}
VALUES |= {"standard_error", "green_threads", "engine_state", "health", "tracing"}
"""What every room may use: values, exceptions, and small functions without any state but the fork hooks."""
ALLOWED: dict[str, set[str]] = {
    "masking": set(),
    "engine_state": set(),
    "health": set(),
    "tracing": set(),
    "status": {"engine_state", "health", "masking"},
    "errors": {"status"},
    "policies": {"errors", "status"},
    "forks": set(),
    "urls": {"errors", "masking", "status"},
    "paths": {"errors"},
    "socket_paths": set(),
    "standard_error": set(),
    "green_threads": {"errors"},
    "in_server": set(),
    "demo": {"errors"},
    "engine_arguments": VALUES | {"in_server"},
    "variables": VALUES | {"in_server"},
    "config": VALUES | {"engine_arguments", "variables", "demo"},
    "served_files": VALUES | {"config"},
    "instance": VALUES | {"config", "served_files", "in_server"},
    "server": VALUES | {"config", "variables", "served_files", "instance", "in_server", "exposition"},
    "loopback": VALUES,
    "exposition": set(),
    "request": VALUES,
    "client": VALUES | {"request"},
    "training": VALUES | {"engine_arguments", "in_server"},
    "session": VALUES | {"instance", "client", "request", "config", "training"},
    "supervisor": VALUES | {"server", "instance", "config", "in_server"},
    "doctor": VALUES | {"config", "variables", "instance", "server", "in_server"},
    "agent": VALUES | {"client", "request", "loopback", "demo"},
    "cli": VALUES
    | {
        "session",
        "agent",
        "instance",
        "client",
        "request",
        "config",
        "engine_arguments",
        "demo",
        "in_server",
        "doctor",
        "exposition",
    },
    "cassettes": VALUES | {"client", "request", "loopback"},
    "pytest_plugin": VALUES | {"cassettes", "session", "instance", "config", "engine_arguments"},
}
UPWARD: set[tuple[str, str]] = set()
"""Arrows that lead up all the same: at most two, each with its reason."""
DOORS = {
    ("server", "instance"): {"instance.directory", "instance.cleanup"},
    ("agent", "request"): {
        *("request.images", "request.outputs", "request.sampling"),
        *("request.pending", "request.relay", "request.relayed_answers"),
    },
    ("agent", "demo"): {"demo.screen"},
    ("cli", "request"): {"request.images", "request.outputs", "request.sampling", "request.server_metrics"},
    ("engine_arguments", "in_server"): {"in_server.managed_vllm_arguments"},
    ("variables", "in_server"): {
        "in_server.managed_vllm_arguments",
        "in_server.managed_vllm_guard",
        "in_server.managed_vllm_lifeline",
    },
    ("instance", "in_server"): {"in_server.managed_vllm_lifeline", "in_server.managed_vllm_segments"},
    ("supervisor", "in_server"): {"in_server.managed_vllm_lifeline"},
    ("server", "in_server"): {
        "in_server.managed_vllm_arguments",
        "in_server.managed_vllm_guard",
        "in_server.managed_vllm_lifeline",
    },
    ("doctor", "in_server"): {"in_server.managed_vllm_lifeline"},
    ("doctor", "server"): {"server.diagnosis", "server.gpu_memory"},
    ("cli", "in_server"): {"in_server.managed_vllm_lifeline"},
}
"""Where an arrow leads to these modules only: values, and facts about processes."""


def lines(arrow: tuple[str, str]) -> str:
    return ", ".join(f"{one.importer}:{one.line} imports {one.imported}" for one in arrows.arrows()[arrow])


def test_no_room_imports_one_that_it_may_not() -> None:
    forbidden = [one for one in arrows.arrows() if one[1] not in ALLOWED[one[0]] and one not in UPWARD]
    assert forbidden == [], "\n".join(map(lines, forbidden))


def test_what_may_go_up_is_little_and_still_there() -> None:
    assert len(UPWARD) <= 2
    assert set(arrows.arrows()) >= UPWARD, "an arrow upwards is gone: take it off the list"


def test_some_rooms_are_entered_by_their_door_only() -> None:
    wrong = [
        f"{one.importer}:{one.line} imports {one.imported}"
        for arrow, doors in DOORS.items()
        for one in arrows.arrows().get(arrow, [])
        if one.imported.removeprefix(f"{arrows.PACKAGE}.") not in doors
    ]
    assert wrong == []


def test_there_is_no_circle() -> None:
    """Neither between rooms nor between modules; imports within functions and for type checkers count."""
    rooms: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    for one in arrows.imports():
        if one.arrow not in UPWARD:
            modules.setdefault(one.importer, set()).add(one.imported)
            if one.arrow[0] != one.arrow[1]:
                rooms.setdefault(one.arrow[0], set()).add(one.arrow[1])
    assert arrows.circles(rooms) == []
    assert arrows.circles(modules) == []


def test_what_lends_names_imports_them_only_when_they_are_used() -> None:
    """Such a package (`managed_vllm`, `managed_vllm.agent`) is left out above: it must not load its rooms."""
    for package in (module for module in arrows.modules() if arrows.lent_by(module)):
        at_once = [node for node in arrows.source_of(package).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert [ast.unparse(node) for node in at_once if arrows.PACKAGE in ast.unparse(node)] == []
        assert set(arrows.lent_by(package).values()) <= set(arrows.modules())


# -- sizes -------------------------------------------------------------------------------------------------------------

CLASS_LINES, CLASS_ATTRIBUTES, FILE_LINES = 400, 15, 700
DATA = {"server.failure_rules"}
"""Tables, which may be as long as they have to be."""


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module in arrows.modules():
        for node in ast.walk(arrows.source_of(module)):
            if isinstance(node, ast.ClassDef):
                yield f"{module.removeprefix(f'{arrows.PACKAGE}.')}.{node.name}", node


def attributes(of: ast.ClassDef) -> set[str]:
    """What its methods assign to `self`. Fields of a dataclass don't count."""
    return {
        node.attr
        for node in ast.walk(of)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def found_too_large() -> dict[str, int]:
    found = {}
    for name, node in classes():
        if (length := (node.end_lineno or 0) - node.lineno + 1) > CLASS_LINES:
            found[f"{name}, lines"] = length
        if (count := len(attributes(node))) > CLASS_ATTRIBUTES:
            found[f"{name}, attributes"] = count
    for module, path in arrows.modules().items():
        name = module.removeprefix(f"{arrows.PACKAGE}.")
        if (length := len(path.read_text().splitlines())) > FILE_LINES and name not in DATA:
            found[name] = length
    return found


def test_no_class_and_no_module_is_larger_than_one_can_see_at_once() -> None:
    assert found_too_large() == {}
