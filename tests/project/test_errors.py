"""The exceptions are one tree, which the module's docstring draws; each is named as one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import managed_vllm
from managed_vllm import errors
from managed_vllm.errors import AuthenticationError, ExternalServerError, ManagedVLLMError, RequestError

EXCEPTIONS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]


def drawn(parent: type[Exception], depth: int = 2) -> Iterator[str]:
    """The lines for what derives from `parent`."""
    for kind in EXCEPTIONS:
        if kind.__bases__[0] is parent:
            others = ", ".join(base.__name__ for base in kind.__bases__[1:])
            yield f"{'  ' * depth}{kind.__name__}{f' ({others})' if others else ''}"
            yield from drawn(kind, depth + 1)


def modules() -> Iterator[ModuleType]:
    """Those of the package that can be imported here."""
    for found in pkgutil.walk_packages(managed_vllm.__path__, "managed_vllm."):
        if not found.name.startswith(("managed_vllm.in_server", "managed_vllm.cli.__main__")):
            try:
                yield importlib.import_module(found.name)
            except ImportError:  # an extra is not installed
                continue


def test_the_docstring_draws_the_tree() -> None:
    lines = list(drawn(Exception))
    assert len(lines) == len(EXCEPTIONS)
    assert "\n".join(lines) in (errors.__doc__ or "")


def test_every_exception_is_below_the_root_and_ends_in_error() -> None:
    assert [kind for kind in EXCEPTIONS if not issubclass(kind, ManagedVLLMError)] == []
    found = {kind for module in modules() for kind in vars(module).values() if inspect.isclass(kind)}
    ours = [
        kind
        for kind in found
        if issubclass(kind, Exception) and kind.__name__[0] != "_" and kind.__module__.startswith("managed_vllm")
    ]
    assert [kind.__qualname__ for kind in ours if not kind.__name__.endswith("Error")] == []


def test_a_refused_key_is_an_error_of_the_request_not_of_the_url() -> None:
    assert issubclass(AuthenticationError, RequestError)
    assert not issubclass(AuthenticationError, ExternalServerError)
    assert AuthenticationError("no", base_url="http://x/v1", status=401).base_url == "http://x/v1"
