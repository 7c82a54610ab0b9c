"""A run served to a browser on this machine, page by page and live: `serve_run`.

    GET /?token=…              the page, the same one as the file's
    GET /api/run               totals, and what may be filtered for
    GET /api/rows?…            attempts of a filter and an order, `offset` and `limit`; 204 if `since` is the version
    GET /api/tasks?…           the same by task
    GET /api/row?…             one attempt by task, rollout, round and attempt
    GET /api/trajectory?number=N
    GET /image/SHA256.png

What must hold: it listens on loopback only; every path wants the token, in the address or as a bearer's; a Host that is
not this server's own is refused (another site's name that leads here); only attempts and images of the run are read,
by number or by hash, never by a path; nothing is written.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from managed_vllm.agent.report import SUCCESS_AT
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import ImageRef
from managed_vllm.agent.viewer.page import MIMES, served_page
from managed_vllm.agent.viewer.record import to_json
from managed_vllm.agent.viewer.table import Query, RunTable
from managed_vllm.errors import ConfigError, RunStoreError

_IMAGE = re.compile(r"/image/([0-9a-f]{64})\.(png|jpg|webp|gif|bmp)")
_MOST_CONNECTIONS = 64
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class RunServer:
    """Serves a run until it is closed; as a context manager it serves while it is entered.

    Args:
        store: the run, opened for reading; the caller's to close, after this.
        port: where, on 127.0.0.1; 0: a free one.
        title: of the page; None: the folder's name.
        success_at: the reward from which on a rollout is a success.
        token: what must be known to look; None: a random one.
        against: another run, opened for reading, with which the tasks of this one are compared.

    Raises `ConfigError`: the port is taken, or jinja2 is missing.

    Attributes:
        token: that one.
    """

    def __init__(
        self,
        store: RunStore,
        *,
        port: int = 0,
        title: str | None = None,
        success_at: float = SUCCESS_AT,
        token: str | None = None,
        against: RunStore | None = None,
    ) -> None:
        self.token = token or secrets.token_urlsafe(24)
        other = None if against is None else RunTable(against, success_at)
        self._table = RunTable(store, success_at, other)
        title = store.path.name if title is None else title
        page, policy = served_page(title, success_at, against=None if against is None else against.path.name)
        try:
            self._server = _Server(("127.0.0.1", port), _Handler)
        except OSError as error:
            self._table.close()
            raise ConfigError(
                f"port {port} of 127.0.0.1 can't be listened on: {error.strerror}", field="port"
            ) from error
        self._server.view = _View(store, self._table, self.token, page, policy, self._server.server_address[1])
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """To be opened in a browser; the token is in it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/?token={quote(self.token)}"

    def serve_forever(self) -> None:
        """Serves until `close` in another thread, or an exception from a signal (Ctrl-C)."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Ends it. A second time it does nothing."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        for table in (self._table, self._table.against):
            if table is not None:
                table.close()

    def __enter__(self) -> RunServer:
        self._thread = threading.Thread(target=self.serve_forever, name="managed-vllm-view", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _View:
    """What the handlers answer, as (status, type of content, body)."""

    def __init__(self, store: RunStore, table: RunTable, token: str, page: bytes, policy: str, port: int) -> None:
        self._store = store
        self._table = table
        self._token = token.encode()
        self.page = page
        self.policy = policy
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._calls: dict[str, Callable[[_Words], Any]] = {
            "/api/run": lambda words: table.overview(),
            "/api/rows": lambda words: table.page(words.query(), *words.part()),
            "/api/tasks": lambda words: table.tasks(words.query(), *words.part()),
            "/api/row": lambda words: {"row": table.find(words.query(), words.text("of"), *words.attempt())},
            "/api/trajectory": lambda words: table.trajectory(words.count("number")),
        }

    def knows(self, token: str) -> bool:
        """Whether this is the token. In constant time."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._token)

    def answer(self, path: str, words: _Words) -> tuple[int, str, bytes]:
        """Of a path that is asked for with the token."""
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", self.page
        if found := _IMAGE.fullmatch(path):
            return self._image(*found.groups())
        call = self._calls.get(path)
        if call is None:
            return _problem(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            if "since" in words and words.count("since") == self._table.version:
                return HTTPStatus.NO_CONTENT, "application/json", b""
            value = call(words)
        except ValueError as error:
            return _problem(HTTPStatus.BAD_REQUEST, str(error))
        except RunStoreError as error:
            return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, error.message)
        if value is None:
            return _problem(HTTPStatus.NOT_FOUND, "the run has no such attempt")
        return HTTPStatus.OK, "application/json", to_json(value).encode()

    def _image(self, sha256: str, suffix: str) -> tuple[int, str, bytes]:
        mime = MIMES[suffix]
        try:
            return HTTPStatus.OK, mime, self._store.images.read(ImageRef(sha256, mime, 0, 0))
        except RunStoreError as error:
            return _problem(HTTPStatus.NOT_FOUND, error.message)


class _Words:
    """The words after the `?`. What is none of the kind that is wanted is a `ValueError`."""

    def __init__(self, query: str) -> None:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=40)
        self._words = {name: values[-1] for name, values in found.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._words

    def text(self, name: str) -> str:
        return self._words.get(name, "")

    def count(self, name: str, default: int = 0) -> int:
        number = int(self._words.get(name, default))
        if number < 0:
            raise ValueError(f"{name} must be 0 or more, not {number}")
        return number

    def number(self, name: str) -> float | None:
        return float(self._words[name]) if self._words.get(name) else None

    def part(self) -> tuple[int, int]:
        return self.count("offset"), self.count("limit", 100)

    def attempt(self) -> tuple[int, int, int]:
        return self.count("rollout"), self.count("round"), self.count("attempt")

    def query(self) -> Query:
        return Query(
            text=self.text("text"),
            stop=self.text("stop"),
            failure=self.text("failure"),
            reward=self.text("reward"),
            low=self.number("from"),
            high=self.number("to"),
            stands=self.text("stands") == "true",
            sort=self.text("sort"),
            down=self.text("down") == "true",
        )


def _problem(status: HTTPStatus, why: str) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps({"error": why}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    view: _View

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.Semaphore(_MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, as long as there are not too many: any user of the machine may connect."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)
            self._free.release()

    def server_close(self) -> None:
        """Ends the connections that are kept, too."""
        super().server_close()
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60.0
    server_version, sys_version = "managed-vllm", ""

    def do_GET(self) -> None:
        view = self.server.view
        if self.headers.get("Host", "").lower() not in view.hosts:
            self._send(*_problem(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to its own address only"))
            return
        try:
            address = urlsplit(self.path)
            words = _Words(address.query)
        except ValueError as error:
            self._send(*_problem(HTTPStatus.BAD_REQUEST, str(error)))
            return
        kind, _, bearers = self.headers.get("Authorization", "").partition(" ")
        if not view.knows(bearers.strip() if kind.lower() == "bearer" else words.text("token")):
            self._send(
                *_problem(HTTPStatus.UNAUTHORIZED, "open the address that `managed-vllm view --serve` has printed")
            )
            return
        self._send(*view.answer(address.path, words))

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.close_connection = True  # a body may follow, which nobody reads
        self._send(*_problem(HTTPStatus.METHOD_NOT_ALLOWED, "a run is looked at, and not changed"))

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _send(self, status: int, mime: str, body: bytes) -> None:
        self.send_response(status)
        kept = "private, max-age=31536000, immutable" if mime.startswith("image/") else "no-store"
        headers = {**_HEADERS, "Cache-Control": kept, "Content-Type": mime, "Content-Length": str(len(body))}
        if mime.startswith("text/html"):
            headers["Content-Security-Policy"] = f"{self.server.view.policy}; frame-ancestors 'none'"
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Looking is no news."""
