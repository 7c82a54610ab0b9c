"""A server that plays a script, one act for each request, raw bytes if need be; and a client that retries soon."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from managed_vllm import RetryPolicy, VLLMClient

Act = Callable[[socket.socket], None]
QUICK = RetryPolicy(max_lost=4, backoff_initial_s=0.01)

ANSWER = {"id": "1", "choices": [{"index": 0, "text": "fine", "token_ids": [7], "finish_reason": "stop"}]}


def http(
    body: bytes, status: int = 200, kind: str = "application/json", *, length: int | None = None, headers: str = ""
) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}"
    return f"{head}\r\n{headers}\r\n".encode() + body


def says(answer: Any, status: int = 200) -> Act:
    """Answers with JSON."""
    return lambda client: client.sendall(http(json.dumps(answer).encode(), status))


def redirects(location: str) -> Act:
    """Says that what was asked for is elsewhere."""
    return lambda client: client.sendall(http(b"", 307, headers=f"Location: {location}\r\n"))


def sends(data: bytes, *, then_closes: bool = True) -> Act:
    """Sends these bytes."""

    def act(client: socket.socket) -> None:
        client.sendall(data)
        if then_closes:
            client.shutdown(socket.SHUT_RDWR)

    return act


def drips(head: bytes, drop: bytes = b" ") -> Act:
    """Sends the first bytes, then a little every 20 ms, for ever."""

    def act(client: socket.socket) -> None:
        client.sendall(head)
        while True:
            time.sleep(0.02)
            client.sendall(drop)

    return act


def hangs(client: socket.socket) -> None:
    """Never answers; returns when the client has hung up."""
    while client.recv(1024):
        pass


def streams(*events: Any, ends: bool = True) -> Act:
    """A stream of events, chunked as vLLM does it; `ends`: with its end."""

    def act(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for event in events:
            data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
            client.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        if ends:
            client.sendall(b"0\r\n\r\n")
        else:
            hangs(client)

    return act


def token(number: int, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": f"t{number} ", "token_ids": [number], "finish_reason": finish, **more}
    return {"id": "1", "choices": [choice]}


FIRST = token(1, prompt_token_ids=[50, 51])


def stop_listening(listening: socket.socket) -> None:
    """Closes it, and ends the thread that waits for connections: `close` alone would leave both as they are."""
    with contextlib.suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)
    listening.close()


class Script:
    """A server that does one act of its script for each request; the last one again and again."""

    def __init__(self, *acts: Act) -> None:
        self._acts = list(acts)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.hung_up = 0
        self._lock = threading.Lock()
        self._now = threading.local()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def asked(self) -> tuple[str, dict[str, Any]]:
        """Within an act: the request that it is for. The last of `requests` may be another one."""
        found: tuple[str, dict[str, Any]] = self._now.request
        return found

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as file:
            while line := file.readline():
                headers = {}
                while (header := file.readline()) not in (b"\r\n", b""):
                    name, _, value = header.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                raw = file.read(int(headers.get("content-length", 0)))
                body = {} if raw.startswith(b"--") else json.loads(raw or b"null")  # a form, or JSON
                self._now.request = line.split()[1].decode(), body
                with self._lock:
                    self.requests.append(self._now.request)
                    self.headers.append(headers)
                    act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
                act(client)
        with self._lock:
            self.hung_up += 1

    def close(self) -> None:
        stop_listening(self._socket)


@contextlib.contextmanager
def client_of(server: Script, retry: RetryPolicy = QUICK, **options: Any) -> Iterator[VLLMClient]:
    client = VLLMClient(server.url, "key", "m", retry=retry, **options)
    try:
        yield client
    finally:
        client.close()
