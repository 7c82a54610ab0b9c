"""The file: one JSON text a line, to be read in a review.

    {"cassette": 1}                                                       the format's version
    {"server": "demo-1f0c8d2a", "model": "demo", "arguments": {…}, …}     each server that was asked
    {"test": "tests/test_it.py::test_it", "server": …, "request": {…}, "response": {…}}

What must hold:

1. Interactions stand by test, those of one in the order in which they were asked; so recording again changes the lines
   of what has changed.
2. A file is replaced as a whole, on the disk before it has its name. Whoever is killed leaves it as it was. Several
   processes that record at once add up: each puts in the interactions of its tests, in place of their former ones.
3. A response comes back as it was: JSON with the same numbers, a stream with the same events, all else to the byte.
4. What is damaged is an error that names the line; nothing of it is used.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from managed_vllm.errors import CassetteError, CassetteMismatchError

FORMAT = 1
_JSON = "application/json"
_EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Server:
    """Which model server was asked.

    Attributes:
        model: as it was asked for; None where only the server knew.
        arguments: vLLM's engine arguments that were given; None for a server by URL.
        vllm: its version, for the reader; None where it does not say. Not compared.
    """

    model: str | None
    arguments: Mapping[str, Any] | None
    vllm: str | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """Names it within a cassette."""
        known = json.dumps([self.model, self.arguments], sort_keys=True)
        name = (self.model or "server").rstrip("/").rpartition("/")[2]
        return f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"

    def differences(self, other: Server) -> list[str]:
        """In words, what this one has otherwise than the `other`; what is not known of one of them does not count."""
        found = []
        if self.model != other.model and None not in (self.model, other.model):
            found.append(f"model: {other.model!r} was recorded, now it is {self.model!r}")
        if self.arguments is not None and other.arguments is not None:
            for name in sorted({*self.arguments, *other.arguments}):
                ours, theirs = (
                    repr(each[name]) if name in each else "unset" for each in (self.arguments, other.arguments)
                )
                if ours != theirs:
                    found.append(f"{name}: {theirs} was recorded, now it is {ours}")
        return found

    @classmethod
    def asked_for(cls, arguments: Mapping[str, Any], *, not_engine: Iterable[str], by_url: bool) -> Server:
        """The server that these arguments of `ManagedVLLM` mean, of which `not_engine` are no engine arguments."""
        model = arguments.get("model")
        names = set(arguments) - {*not_engine, "model"}
        engine = None if by_url else {name: _plain(arguments[name]) for name in sorted(names)}
        return cls(None if model is None else str(model), engine)


@dataclass(frozen=True, slots=True)
class Response:
    """A recorded response.

    Attributes:
        status: HTTP's.
        content_type: as the header had it.
        body: the bytes; of a stream none.
        events: the data of each event of a stream; None for a whole response.
        cut: whether the client hung up before the stream's end.
    """

    status: int
    content_type: str
    body: bytes = b""
    events: tuple[bytes, ...] | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Interaction:
    """A request of a test, in its canonical form, and the response. `test`: its node id; empty between tests."""

    test: str
    server: str
    request: dict[str, Any]
    response: Response


@dataclass(frozen=True, slots=True)
class Cassette:
    """What is in a file."""

    servers: Mapping[str, Server] = field(default_factory=dict)
    interactions: Sequence[Interaction] = ()

    def server_for(self, asked: Server, path: Path) -> str:
        """The id of the recorded server that this is. Raises `CassetteMismatchError`: there is none."""
        nearest: list[str] | None = None
        for name, server in self.servers.items():
            differences = asked.differences(server)
            if not differences:
                return name
            if nearest is None or len(differences) < len(nearest):
                nearest = differences
        why = "no server was recorded" if nearest is None else "; ".join(nearest)
        raise CassetteMismatchError(
            f"{path} was recorded with another server: {why}. Record it again (--managed-vllm-record={path})",
            path=str(path),
            differences=tuple(nearest or ()),
        )


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Cassette:
    """The cassette in a file. Raises `CassetteError`: it can't be read, is damaged, or of a later version."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CassetteError(f"the cassette {path} can't be read: {error.strerror or error}", path=str(path)) from error
    servers: dict[str, Server] = {}
    interactions: list[Interaction] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if number == 1:
                _check_format(found["cassette"], path)
            elif "request" in found:
                interactions.append(_interaction(found))
            else:
                servers[found["server"]] = Server(found["model"], found["arguments"], found.get("vllm"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CassetteError(
                f"line {number} of the cassette {path} is damaged ({type(error).__name__}: {error}); take it from "
                "version control, or remove it and record it again",
                path=str(path),
            ) from error
    if lines == [b""]:
        raise CassetteError(f"the cassette {path} is empty; take it from version control, or remove it", path=str(path))
    return Cassette(servers, interactions)


def _check_format(version: Any, path: Path) -> None:
    if version != FORMAT:
        raise CassetteError(
            f"the cassette {path} has the format {version!r}, this version of managed_vllm knows {FORMAT}",
            path=str(path),
        )


def _interaction(found: dict[str, Any]) -> Interaction:
    return Interaction(str(found["test"]), str(found["server"]), dict(found["request"]), _response(found["response"]))


def _response(told: Mapping[str, Any]) -> Response:
    status, content_type = int(told["status"]), str(told.get("type", _JSON))
    if "events" in told:
        events = tuple(each.encode() if isinstance(each, str) else _dumped(each) for each in told["events"])
        return Response(status, content_type, events=events, cut=bool(told.get("cut")))
    if "base64" in told:
        return Response(status, content_type, base64.b64decode(told["base64"], validate=True))
    return Response(status, content_type, told["text"].encode() if "text" in told else _dumped(told["json"]))


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# -- writing -----------------------------------------------------------------------------------------------------------


def merge(
    path: Path,
    servers: Iterable[Server],
    interactions: Sequence[Interaction],
    tests: Iterable[str],
    secrets: Iterable[str],
) -> None:
    """Puts interactions into a file, in place of all that it has of these `tests`; with stars for `secrets`.

    What was asked between tests replaces the same only. Raises `CassetteError`: it is damaged, or can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            kept = read(path) if path.exists() else Cassette()
            _write(path, *_merged(kept, servers, interactions, {*tests}), [each for each in secrets if each])
    except OSError as error:
        raise CassetteError(
            f"the cassette {path} can't be written: {error.strerror or error}", path=str(path)
        ) from error


def _merged(
    kept: Cassette, servers: Iterable[Server], new: Sequence[Interaction], tests: set[str]
) -> tuple[dict[str, Server], list[Interaction]]:
    between = {(each.server, json.dumps(each.request, sort_keys=True)) for each in new if not each.test}
    old = [
        each
        for each in kept.interactions
        if each.test not in tests
        and (each.test or (each.server, json.dumps(each.request, sort_keys=True)) not in between)
    ]
    interactions = sorted([*old, *new], key=lambda each: (each.test, each.request["path"] if not each.test else ""))
    known = {**kept.servers, **{server.id: server for server in servers}}
    used = {each.server for each in interactions}
    return {name: known[name] for name in sorted(used & set(known))}, interactions


def _write(path: Path, servers: Mapping[str, Server], interactions: Sequence[Interaction], secrets: list[str]) -> None:
    lines = [json.dumps({"cassette": FORMAT})]
    for name, server in servers.items():
        said = {"server": name, "model": server.model, "arguments": server.arguments, "vllm": server.vllm}
        lines.append(json.dumps(said, ensure_ascii=False))
    for each in interactions:
        said = {"test": each.test, "server": each.server, "request": each.request, "response": _told(each.response)}
        lines.append(_starred(json.dumps(said, ensure_ascii=False), secrets))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _told(response: Response) -> dict[str, Any]:
    said: dict[str, Any] = {"status": response.status}
    if response.content_type.partition(";")[0] != _JSON or response.events is not None:
        said["type"] = response.content_type
    if response.events is not None:
        said["events"] = [_event(each) for each in response.events]
        return {**said, "cut": True} if response.cut else said
    try:
        return (
            {**said, "json": json.loads(response.body)}
            if "type" not in said
            else {**said, "text": response.body.decode()}
        )
    except (ValueError, RecursionError):  # no UTF-8 is a ValueError, too
        return {**said, "type": response.content_type, "base64": base64.b64encode(response.body).decode()}


def _event(data: bytes) -> Any:
    """An event of JSON as its value, any other one as its text."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(data), dict | list):
            return found
    return data.decode(errors="replace")


def _starred(line: str, secrets: list[str]) -> str:
    for secret in secrets:
        line = line.replace(secret, "***")
    return line


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by the one process that writes in this folder. There is no file that would be left."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """As JSON has it, so that it equals what is read back."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
