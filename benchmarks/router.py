"""What the router in front of replicas costs per request: against going straight to a server, in the same run.

    python benchmarks/router.py                      half a minute; servers that answer at once (stub_server.py)

The ways: straight; vllm-router alone; our guard with vllm-router behind it, as `replicas=` has it; the guard alone, as
for what vllm-router would change and for large bodies. Rounds of them take turns, and the median counts: a request at a
time, and 32 at once, of a small body, one of 0.2 MB and one of 0.8 MB. Needs `pip install managed-vllm[router]`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import several_servers
import stub_server

from managed_vllm.masking import Secret
from managed_vllm.server.router import Router

ROUNDS = 5
REQUESTS = 80
AT_ONCE = 32
KEY = "benchmark"
IMAGES = {"0.2 MB": 200_000, "0.8 MB": 800_000}


@dataclass(frozen=True)
class Way:
    """A way to the servers: its address, and headers that it is chosen by."""

    name: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def fronted(addresses: list[str]) -> AsyncIterator[str]:
    """The address of our front before these servers."""
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "router.log"
        changed = asyncio.Event()
        router = Router(host=None, port=None, api_key=Secret(KEY), log_path=log_path, marks={}, on_change=changed.set)
        await router.start()
        router.serve(dict(enumerate(addresses)))
        async with asyncio.timeout(60):
            while not router.status.ready:
                changed.clear()
                await changed.wait()
        assert router.status.base_url is not None
        yield router.status.base_url.removesuffix("/v1")
        await router.close()


def bodies() -> dict[str, bytes]:
    """A small request, and some with a screenshot."""
    asked: dict[str, Any] = {"small": "hi"}
    for name, size in IMAGES.items():
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
        asked[name] = [image, {"type": "text", "text": "Click on OK"}]
    fields = {"model": stub_server.MODEL, "max_tokens": 30}
    return {
        name: json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()
        for name, content in asked.items()
    }


async def _round(session: aiohttp.ClientSession, way: Way, body: bytes, requests: int, at_once: int) -> float:
    """Milliseconds per request."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **way.headers}
        async with (
            places,
            session.post(
                f"{way.url}/v1/chat/completions", data=body, headers={**headers, "X-Session-ID": str(number % 64)}
            ) as response,
        ):
            await response.read()
            assert response.status == 200, await response.text()

    began = time.perf_counter()
    await asyncio.gather(*map(one, range(requests)))
    return (time.perf_counter() - began) * 1000 / requests


async def measured(addresses: list[str]) -> None:
    """Prints the table."""
    async with fronted(addresses) as front, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        with several_servers.routed(addresses) as router:
            ways = [
                Way("straight", addresses[0]),
                Way("vllm-router alone", router),
                Way("guard and vllm-router", front),
                Way("guard alone", front, {"Origin": "null"}),
            ]
            for name, body in bodies().items():
                for at_once in (1, AT_ONCE):
                    requests = (REQUESTS if name == "small" else REQUESTS // 2) * (1 if at_once == 1 else 2)
                    found: dict[str, list[float]] = {way.name: [] for way in ways}
                    for number in range(ROUNDS + 1):  # the first one opens connections
                        for way in ways:
                            took = await _round(session, way, body, requests, at_once)
                            if number:
                                found[way.name].append(took)
                    base = statistics.median(found["straight"])
                    print(f"\n{name}, {at_once} at once: ms per request")
                    for way in ways:
                        middle = statistics.median(found[way.name])
                        print(f"  {way.name:24}{middle:8.2f}{middle - base:+8.2f}{middle / base:8.2f} x")


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if importlib.util.find_spec("vllm_router") is None:
        print("vllm-router is not installed: pip install managed-vllm[router]")
        return 1
    with contextlib.ExitStack() as stack:
        asyncio.run(measured([stack.enter_context(stub_server.running()) for _ in range(2)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
