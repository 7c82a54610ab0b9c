"""Stand-ins behind the front of a server with replicas, without a supervisor: `Front` runs it in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import requests
import standin
from free_ports import free_port
from processes import HANG_S, eventually
from scripted_server import Script

from managed_vllm.masking import Secret
from managed_vllm.server.router import Router
from managed_vllm.status import RouterStatus

KEY = "the-key-of-all-replicas"


class Replica:
    """A stand-in; it can be killed, and started again on the same port."""

    def __init__(self, **orders: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._orders = orders
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Returns once it listens."""
        words = [word for word in standin.command() if word != "{args}"]
        env = {**os.environ, **standin.orders(**self._orders), "VLLM_API_KEY": KEY}
        self._process = subprocess.Popen([*words, "--port", str(self.port)], env=env, stdout=subprocess.DEVNULL)
        eventually(self._is_healthy, "the stand-in listens")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def running(self) -> int:
        """How many requests it runs."""
        text = requests.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=HANG_S).text
        line = next(line for line in text.splitlines() if line.startswith("vllm:num_requests_running"))
        return int(float(line.rpartition(" ")[2]))

    def _is_healthy(self) -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/health", timeout=HANG_S).ok
        return False


class Front:
    """The front, which may have any number of replicas."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.replicas: list[Replica] = []
        self.log_path = folder / "router.log"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        given: dict[str, Any] = {
            "host": None,
            "port": None,
            "api_key": Secret(KEY),
            "marks": {},
            "on_change": lambda: None,
        }
        self.router = Router(log_path=self.log_path, **{**given, **options})
        self._run(self.router.start())

    @property
    def status(self) -> RouterStatus:
        return self.router.status

    @property
    def url(self) -> str:
        """Without `/v1`."""
        return (self.status.base_url or "").removesuffix("/v1")

    def serve(self, *replicas: Replica | Script) -> None:
        self._loop.call_soon_threadsafe(self.router.serve, dict(enumerate(replica.url for replica in replicas)))

    def wait_ready(self) -> RouterStatus:
        try:
            eventually(lambda: self.status.ready, "the front is ready")
        except AssertionError:
            raise AssertionError(f"{self.status}\n{self.log_path.read_text()[-3000:]}") from None
        return self.status

    def post(self, path: str, body: Any = None, *, key: str | None = KEY, **options: Any) -> requests.Response:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        return requests.post(f"{self.url}{path}", json=body, headers=headers, timeout=HANG_S, **options)

    def answered_by(self, session: str | None = None) -> int:
        """The pid of the replica that answered."""
        headers = {"X-Session-ID": session} if session else {}
        response = self.post("/v1/completions", {"model": "stand-in", "prompt": "hi"}, headers=headers)
        assert response.status_code == 200, response.text
        return int(response.json()["choices"][0]["text"].rpartition(" from ")[2])

    def spread(self, requests: int) -> Counter[int]:
        return Counter(self.answered_by() for _ in range(requests))

    def router_process(self) -> psutil.Process:
        """vllm-router's."""
        children: list[psutil.Process] = eventually(
            lambda: psutil.Process(self.status.pid).children(), "vllm-router runs"
        )
        assert len(children) == 1, children
        return children[0]

    def close(self) -> None:
        self._run(self.router.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)
        self._loop.close()
        for replica in self.replicas:
            replica.kill()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(HANG_S)


@contextlib.contextmanager
def fronted(
    folder: Path, *, replicas: int = 2, orders: dict[str, Any] | None = None, **options: Any
) -> Iterator[Front]:
    """A front that is ready, before stand-ins under these orders."""
    front = Front(folder, **options)
    try:
        front.replicas += [Replica(**(orders or {})) for _ in range(replicas)]
        front.serve(*front.replicas)
        front.wait_ready()
        yield front
    finally:
        front.close()
