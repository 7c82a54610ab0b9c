"""What choosing among servers costs per request: our client over two servers, and over the replicas of one that it has
a lease on, and vllm-router, against one server.

    python benchmarks/several_servers.py             half a minute; servers that answer at once (stub_server.py)

Rounds of them take turns, and the median counts. A request at a time: its latency, and the client's CPU time; and
64 at once: the time for each. The router needs `pip install managed-vllm[router]`; without it its lines are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import stub_server

from managed_vllm import AsyncVLLMClient
from managed_vllm.masking import Secret
from managed_vllm.request import leased_replicas
from managed_vllm.status import Connection, ServerState, ServerStatus

ROUNDS = 9
REQUESTS = 300
AT_ONCE = 64
TARGET_MS = 0.1
ROUTER = Path(sys.executable).with_name("vllm-router")


@contextlib.contextmanager
def routed(addresses: list[str]) -> Iterator[str]:
    """The address of a vllm-router in front of these."""
    words = [str(ROUTER), "--host", "127.0.0.1", "--port", str(_free_port()), "--prometheus-port", str(_free_port())]
    words += ["--policy", "sticky_least_loaded", "--log-level", "error", "--worker-urls", *addresses]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{words[4]}"
        for _ in range(300):
            with contextlib.suppress(URLError), urlopen(f"{url}/liveness", timeout=5):
                break
            time.sleep(0.05)
        try:
            yield url
        finally:
            process.terminate()


def replicated(addresses: Sequence[str]) -> AsyncVLLMClient:
    """A client with a lease on a server whose replicas these are; all is well there."""
    connections = [Connection(base_url=f"{one}/v1", api_key=Secret(""), model=stub_server.MODEL) for one in addresses]
    ready = functools.partial(ServerStatus, ServerState.READY)
    each = tuple(ready(epoch=epoch, connection=connection) for epoch, connection in enumerate(connections, 1))
    lease = Lease(ready(epoch=len(each), connection=connections[0], replicas=each))
    return AsyncVLLMClient(
        connection=lambda *_: (connections[0], 1),
        ready=lambda: (connections[0], 1),
        placement=functools.partial(leased_replicas.placed, lease),
    )


class Lease:
    """What a client asks of its lease."""

    def __init__(self, status: ServerStatus) -> None:
        self._status = status
        self.replicas: int | None = len(status.replicas)

    def last_status(self) -> ServerStatus:
        return self._status

    def wait_for_news(self, known: ServerStatus | None, timeout_s: float) -> None:
        raise AssertionError("there are none")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _one_by_one(client: AsyncVLLMClient) -> tuple[float, float]:
    """Milliseconds per request, and of CPU time; each of a session of its own, as the turns of 300 episodes come."""
    began, cpu_began = time.perf_counter(), time.process_time()
    for number in range(REQUESTS):
        await client.generate("hi", {"max_tokens": 30, "logprobs": 0}, session_id=str(number))
    ended, cpu_ended = time.perf_counter(), time.process_time()
    return (ended - began) * 1000 / REQUESTS, (cpu_ended - cpu_began) * 1000 / REQUESTS


async def _at_once(client: AsyncVLLMClient) -> float:
    began = time.perf_counter()
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await client.generate("hi", {"max_tokens": 30, "logprobs": 0}, session_id=str(number))

    await asyncio.gather(*(one(number) for number in range(4 * REQUESTS)))
    return (time.perf_counter() - began) * 1000 / (4 * REQUESTS)


async def measured(clients: dict[str, AsyncVLLMClient]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each client and round: milliseconds per request one by one, of CPU time, and at once."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in clients}
    for client in clients.values():
        await _one_by_one(client)  # connections, caches
    for _ in range(ROUNDS):
        for name, client in clients.items():
            found[name].append((*await _one_by_one(client), await _at_once(client)))
    for client in clients.values():
        await client.aclose()
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(stub_server.running()) for _ in range(2)]
        clients = {
            "one server": AsyncVLLMClient(addresses[0], None, stub_server.MODEL),
            "two servers, our choice": AsyncVLLMClient(addresses, None, stub_server.MODEL),
            "two replicas, our choice": replicated(addresses),
        }
        if ROUTER.exists():
            clients["two behind vllm-router"] = AsyncVLLMClient(
                stack.enter_context(routed(addresses)), None, stub_server.MODEL
            )
        found = asyncio.run(measured(clients))
    medians = {
        name: [statistics.median(values) for values in zip(*rounds, strict=True)] for name, rounds in found.items()
    }
    base = medians["one server"]
    columns = ("one by one", "CPU", f"{AT_ONCE} at once")
    print(f"{'ms per request':26}" + "".join(f"{column:>14}{'added':>9}" for column in columns))
    for name, values in medians.items():
        pairs = (f"{value:14.3f}{value - one:9.3f}" for value, one in zip(values, base, strict=True))
        print(f"{name:26}{''.join(pairs)}")
    added = {name: medians[name][0] - base[0] for name in ("two servers, our choice", "two replicas, our choice")}
    for name, added_ms in added.items():
        met = "met" if added_ms <= TARGET_MS else "NOT met"
        print(f"{name}: adds {added_ms:.3f} ms to a request; target ≤ {TARGET_MS:g}: {met}")
    return 0 if max(added.values()) <= TARGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())
