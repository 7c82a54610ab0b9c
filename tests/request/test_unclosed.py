"""However a client is left, nothing of it is left unclosed: no ResourceWarning is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from scripted_server import ANSWER, FIRST, Script, hangs, says, streams

LEAVING = {
    "dropped": """
        client = VLLMClient(URL, "", "m")
        client.generate(["x"] * 3)
        del client
    """,
    "at the end": """
        client = VLLMClient(URL, "", "m")
        client.generate(["x"] * 3)
    """,
    "dropped within its loop": """
        async def main():
            await AsyncVLLMClient(URL, "", "m").generate(["x"] * 3)
        asyncio.run(main())
    """,
    "kept beyond its loop": """
        client = AsyncVLLMClient(URL, "", "m")
        asyncio.run(client.generate(["x"] * 3))
        asyncio.run(client.generate(["x"] * 3))
    """,
    "closed without waiting": """
        async def main():
            client = AsyncVLLMClient(URL, "", "m")
            await client.generate(["x"] * 3)
            client.close()
        asyncio.run(main())
    """,
    "closed and waited for": """
        async def main():
            async with AsyncVLLMClient(URL, "", "m") as client:
                await client.generate(["x"] * 3)
        asyncio.run(main())
    """,
}
IN_FLIGHT = {
    "past its deadline": """
        client = VLLMClient(URL, "", "m")
        client.generate(["x"] * 3, timeout=0.3, return_exceptions=True)
    """,
    "cancelled": """
        async def main():
            client = AsyncVLLMClient(URL, "", "m")
            asking = asyncio.create_task(client.generate(["x"] * 3))
            while client.in_flight < 3:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.wait({asking})
        asyncio.run(main())
    """,
    "closed under it": """
        async def main():
            client = AsyncVLLMClient(URL, "", "m")
            asking = asyncio.create_task(client.generate(["x"] * 3, return_exceptions=True))
            while client.in_flight < 3:
                await asyncio.sleep(0.01)
            client.close()
            await asking
        asyncio.run(main())
    """,
}


def run(url: str, body: str) -> str:
    """What a program writes to standard error."""
    lines = ["import asyncio, gc", "from managed_vllm import AsyncVLLMClient, VLLMClient", f"URL = {url!r}"]
    lines += [line.removeprefix(" " * 8) for line in body.splitlines()]
    arguments = ["-W", "error::ResourceWarning", "-c", "\n".join([*lines, "gc.collect()"])]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=True).stderr


@pytest.mark.parametrize("way", LEAVING)
def test_nothing_is_left_unclosed_by_a_client(script: Callable[..., Script], way: str) -> None:
    assert run(script(says(ANSWER)).url, LEAVING[way]) == ""


@pytest.mark.parametrize("way", IN_FLIGHT)
def test_nothing_is_left_unclosed_by_a_client_with_requests_in_flight(script: Callable[..., Script], way: str) -> None:
    assert run(script(hangs).url, IN_FLIGHT[way]) == ""


def test_nothing_is_left_unclosed_by_a_stream_that_is_not_read_to_its_end(script: Callable[..., Script]) -> None:
    body = """
        async def main():
            client = AsyncVLLMClient(URL, "", "m")
            async for _ in client.stream("x", {"max_tokens": 9}):
                break
        asyncio.run(main())
        for _ in VLLMClient(URL, "", "m").stream("x", {"max_tokens": 9}):
            break
    """
    assert run(script(streams(FIRST, ends=False)).url, body) == ""
