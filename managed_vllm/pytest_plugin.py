"""Pytest plugin: the session fixture `managed_vllm`, set up by ini file, command line and marker.

What must hold:

1. pytest loads it wherever the library is installed. So importing it imports nothing but pytest, and it prints nothing
   unless it is used (or, with `-v`, one line in the header).
2. Workers of pytest-xdist and other runs on the machine share a server by asking for the same one. Each session holds a
   lease of its own until it ends, so that none takes the server away from another.
3. If the server fails to start, every test that uses it fails, with a short message; the session does not try again.
4. With a cassette (`managed_vllm.cassettes`) tests talk to that: it plays what was recorded, or records.
5. Each setting is taken from the nearest place that has it: the test's marker, its class's, its module's, the command
   line, the ini file. Engine arguments and environment variables are merged name by name; None removes one.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from managed_vllm.cassettes.server import CassetteServer
    from managed_vllm.session import ManagedVLLM

NAME: Final = "managed_vllm"
"""Of the fixture and of the marker."""

DEFAULT_MODEL: Final = "demo"

_MARKER = (
    "managed_vllm(model=None, **arguments): the server that the fixture of this name gives to the test: "
    "arguments of ManagedVLLM and vLLM's engine arguments, on top of ini file and command line"
)

_HIDDEN: Any = getattr(pytest, "HIDDEN_PARAM", NAME)
"""Leaves the names of marked tests as they are. pytest < 8.4 can't: the name ends in `[managed_vllm]` there."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares the options and the ini settings."""
    group = parser.getgroup(NAME, "managed_vllm: a shared vLLM server as a fixture")
    group.addoption("--managed-vllm-model", metavar="MODEL", help="Hugging Face id, folder, or 'demo' (the default)")
    group.addoption("--managed-vllm-args", metavar="FLAGS", help="vLLM's flags in one word: '--max-model-len 512'")
    group.addoption("--managed-vllm-url", metavar="URL", help="use this server, which somebody else runs")
    group.addoption("--managed-vllm-keep-alive", metavar="SECONDS", help="how long the server outlives its last user")
    group.addoption("--managed-vllm-record", metavar="PATH", help="record what the server answers into this cassette")
    group.addoption(
        "--managed-vllm-record-mode",
        choices=("none", "once", "new_episodes", "all"),
        help="none: play the cassette; once: record one that is not there; new_episodes: record what it has not; "
        "all: record everything",
    )
    parser.addini("managed_vllm_model", "model of the managed_vllm fixture; default 'demo'")
    parser.addini("managed_vllm_args", "vLLM's flags, on one line")
    parser.addini("managed_vllm_env", "environment of the server, a NAME=VALUE a line", type="linelist")
    parser.addini("managed_vllm_command", "another command that starts an OpenAI-compatible server; see ManagedVLLM")
    parser.addini("managed_vllm_cassette", "what was recorded: played in place of a server where the file exists")
    parser.addini("managed_vllm_keep_alive", "seconds that the server outlives its last user")
    parser.addini("managed_vllm_startup_timeout", "seconds until a start has failed in any case")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known, so that `--strict-markers` takes it."""
    config.addinivalue_line("markers", _MARKER)
    config.stash[_CASSETTES] = _Cassettes()


def pytest_report_header(config: pytest.Config) -> str | None:
    """With `-v`, one line that says what the fixture would give."""
    if config.option.verbose <= 0:
        return None
    url = config.getoption("--managed-vllm-url") or os.environ.get("VLLM_SERVER_URL")
    flags = [config.getini("managed_vllm_args"), config.getoption("--managed-vllm-args")]
    words = [url or _configured_model(config) or DEFAULT_MODEL, *(line for line in flags if line and not url)]
    return f"managed_vllm: {' '.join(words)}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tells the cassettes which test asks."""
    cassettes = item.config.stash[_CASSETTES]
    cassettes.begin(item.nodeid)
    try:
        return (yield)
    finally:
        cassettes.begin("")


# -- the marker --------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Passes a marker's arguments to the session fixture as its parameter, by which pytest groups the tests."""
    if NAME not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers(NAME))
    if marks:
        arguments: dict[str, Any] = {}
        for mark in reversed(marks):  # the nearest last: it decides
            arguments = _merged(arguments, _marked(mark))
        metafunc.parametrize(NAME, [arguments], indirect=True, scope="session", ids=[_HIDDEN])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fails where the marker would be ignored: pytest can't parametrize the tests of a `unittest.TestCase`."""
    if item.get_closest_marker(NAME) is None or NAME not in getattr(item, "fixturenames", ()):
        return
    if NAME not in getattr(getattr(item, "callspec", None), "params", ()):
        pytest.fail("the marker managed_vllm works on plain test functions and classes only", pytrace=False)


def _marked(mark: pytest.Mark) -> dict[str, Any]:
    if len(mark.args) > 1 or (mark.args and "model" in mark.kwargs):
        pytest.fail("the marker managed_vllm takes one model, everything else by keyword", pytrace=False)
    return {**({"model": mark.args[0]} if mark.args else {}), **mark.kwargs}


# -- the fixture -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def managed_vllm(request: pytest.FixtureRequest, _managed_vllm_servers: _Servers) -> ManagedVLLM:
    """A vLLM server that is ready: an entered `ManagedVLLM`, shared with every run that asks for the same."""
    return _managed_vllm_servers.get(getattr(request, "param", {}))


@pytest.fixture(scope="session")
def _managed_vllm_servers(pytestconfig: pytest.Config) -> Iterator[_Servers]:
    with contextlib.ExitStack() as leases:
        yield _Servers(pytestconfig, leases)


class _Cassettes:
    """The cassettes that are used in this session, and the test that runs."""

    def __init__(self) -> None:
        self._test = ""
        self._servers: list[CassetteServer] = []

    def add(self, server: CassetteServer) -> None:
        server.begin(self._test)
        self._servers.append(server)

    def begin(self, test: str) -> None:
        self._test = test
        for server in self._servers:
            server.begin(test)


_CASSETTES: Final = pytest.StashKey[_Cassettes]()


class _Servers:
    """The servers used in this session, each entered once and held until the end; failures are kept as well.

    Otherwise a server could start several times in a session. All that a session uses must fit on the machine at once.
    """

    def __init__(self, config: pytest.Config, leases: contextlib.ExitStack) -> None:
        self._config = config
        self._leases = leases
        self._known: dict[str, ManagedVLLM | str] = {}

    def get(self, marked: Mapping[str, Any]) -> ManagedVLLM:
        """The entered handle for a marker's arguments; none of them: the default server."""
        key = json.dumps(marked, sort_keys=True, default=repr)
        if key not in self._known:
            self._known[key] = self._enter(marked)
        known = self._known[key]
        if isinstance(known, str):
            # Without a traceback: its frames would be ours, not the test's.
            pytest.fail(known, pytrace=False)
        return known

    def _enter(self, marked: Mapping[str, Any]) -> ManagedVLLM | str:
        from managed_vllm.errors import ManagedVLLMError
        from managed_vllm.session import ManagedVLLM

        try:
            arguments = _arguments(self._config, marked)
            cassette = _cassette(self._config)
            if cassette is not None:
                return self._on_record(arguments, *cassette)
            return self._leases.enter_context(ManagedVLLM(**arguments))
        except ManagedVLLMError as error:
            return f"{type(error).__name__}: {error}"

    def _on_record(self, arguments: dict[str, Any], path: Path, mode: Any) -> ManagedVLLM:
        """A handle of the cassette, which has the place of a server by URL, whether it plays or records."""
        from managed_vllm.cassettes.cassette import Server
        from managed_vllm.cassettes.server import CassetteServer
        from managed_vllm.session import ManagedVLLM

        def upstream() -> tuple[Any, str]:
            llm = self._leases.enter_context(ManagedVLLM(**arguments))
            return llm.async_client, llm.api_key

        by_url = _is_external(arguments)
        ours = set(inspect.signature(ManagedVLLM).parameters) - {"for_training"}
        asked = Server.asked_for(arguments, not_engine=ours, by_url=by_url)
        server = CassetteServer(path, mode, asked, upstream)
        self._config.stash[_CASSETTES].add(server)
        server.start()
        self._leases.callback(server.close)
        model = arguments.get("model") if by_url else None
        llm = ManagedVLLM(model, base_url=server.base_url, api_key=server.api_key, progress=False)
        self._leases.enter_context(llm)
        # Which prompts go together depends on what was asked before, in other tests and within how much time.
        llm.async_client.sender.one_by_one = True
        return llm


# -- settings ----------------------------------------------------------------------------------------------------------


def _arguments(config: pytest.Config, marked: Mapping[str, Any]) -> dict[str, Any]:
    """`ManagedVLLM`'s arguments. Raises `ConfigError` where a setting can't be read."""
    command = config.getini("managed_vllm_command")
    ini = {
        **_flags(config.getini("managed_vllm_args"), "managed_vllm_args"),
        "env": dict(_variable(line) for line in config.getini("managed_vllm_env")),
        "command": shlex.split(command) if command else None,
        "keep_alive": _seconds(config.getini("managed_vllm_keep_alive"), "managed_vllm_keep_alive"),
        "startup_timeout": _seconds(config.getini("managed_vllm_startup_timeout"), "managed_vllm_startup_timeout"),
    }
    line = {
        **_flags(config.getoption("--managed-vllm-args"), "--managed-vllm-args"),
        "base_url": config.getoption("--managed-vllm-url"),
        "keep_alive": _seconds(config.getoption("--managed-vllm-keep-alive"), "--managed-vllm-keep-alive"),
    }
    if _is_external({**line, **marked}):
        # The file says how the tests' own server is started; this run was told to use another one.
        ini = {name: ini[name] for name in ("keep_alive", "startup_timeout")}
    arguments: dict[str, Any] = {"progress": False, "model": _configured_model(config)}
    for layer in (ini, line):
        arguments = _merged(arguments, {name: value for name, value in layer.items() if value is not None})
    arguments = {name: value for name, value in _merged(arguments, marked).items() if value is not None}
    if "model" not in arguments and not _is_external(arguments):
        arguments["model"] = DEFAULT_MODEL  # an external server need not serve the demo
    return arguments


def _cassette(config: pytest.Config) -> tuple[Path, str] | None:
    """Which cassette is used, and how; None: a server is. Raises `ConfigError`."""
    from managed_vllm.errors import ConfigError

    record, mode = config.getoption("--managed-vllm-record"), config.getoption("--managed-vllm-record-mode")
    if record:
        return config.invocation_params.dir / record, mode or "all"
    known = config.getini("managed_vllm_cassette")
    if known:
        path = config.rootpath / known
        return (path, mode or "none") if mode or path.exists() else None
    if mode:
        raise ConfigError(
            "--managed-vllm-record-mode needs a cassette: the setting managed_vllm_cassette, or --managed-vllm-record",
            field="--managed-vllm-record-mode",
        )
    return None


def _configured_model(config: pytest.Config) -> str | None:
    return config.getoption("--managed-vllm-model") or config.getini("managed_vllm_model") or None


def _is_external(arguments: Mapping[str, Any]) -> bool:
    if arguments.get("base_url") or arguments.get("base_urls"):
        return True
    return arguments.get("name") is None and bool(os.environ.get("VLLM_SERVER_URL"))


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**lower, **upper}
    if lower.get("env") and upper.get("env"):
        merged["env"] = {**lower["env"], **upper["env"]}
    return merged


def _flags(line: str | None, setting: str) -> dict[str, Any]:
    from managed_vllm import engine_arguments
    from managed_vllm.errors import ConfigError

    try:
        return engine_arguments.from_flags(shlex.split(line or ""))
    except ValueError as error:  # ConfigError is one, too
        raise ConfigError(f"{setting}: {error}", field=setting) from error


def _variable(line: str) -> tuple[str, str]:
    from managed_vllm.errors import ConfigError

    name, equals, value = line.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"managed_vllm_env: {line!r} is not NAME=VALUE", field="managed_vllm_env")
    return name.strip(), value.strip()


def _seconds(text: str | None, setting: str) -> float | None:
    from managed_vllm.errors import ConfigError

    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{setting}: {text!r} is no number of seconds", field=setting) from None
