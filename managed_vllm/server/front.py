"""The process in front of a server's replicas: the guard on the public port, and vllm-router as its child.

Run as a program by `managed_vllm.server.router`. Its standard input is a socket: the first line has the order, the key
included, each later one the replicas that are up. It answers with lines that say how it is, at each change and every
few seconds. It ends when the socket is closed, and by the kernel's hand when its parent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.server import router_process, signed_sockets
from managed_vllm.server.front_guard import Guard, Replicas, Way, new_session
from managed_vllm.server.supervisor_log import BoundedLog

log = logging.getLogger("managed_vllm.front")

HEARTBEAT_S = 5.0

_LOOK_S = 1.0
_ADD_S = 10.0
_UNANSWERED_S = 0.2
"""Seconds in which an unsigned connection to the router must not come about; over loopback it takes microseconds."""
_LONGEST_BACKOFF_S = 30.0
_BACKLOG = 4096


def main() -> None:
    """Entry point."""
    lifeline.fall_with_parent()
    asyncio.run(_serve())


async def _serve() -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=os.dup(0)), limit=1 << 20)
    order = json.loads(await reader.readline())
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[BoundedLog(Path(order["log_path"]))],
    )

    def tell(what: dict[str, Any]) -> None:
        writer.write(json.dumps(what).encode() + b"\n")

    replicas = Replicas()
    guard = Guard(order["api_key"], replicas)
    runner = guard.runner()
    await runner.setup()
    await web.SockSite(runner, socket.socket(fileno=order["listener"]), backlog=_BACKLOG).start()
    keeper = RouterKeeper(replicas, guard, tell)
    tasks = [asyncio.create_task(keeper.keep()), asyncio.create_task(_follow(reader, replicas))]
    tasks.append(asyncio.create_task(_beat(keeper)))
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if error := task.exception():
            log.error("the front failed", exc_info=error)
    with contextlib.suppress(OSError):
        await writer.drain()
    os._exit(0)  # all of ours ends with us; whoever has a request here sees it cut


async def _follow(reader: asyncio.StreamReader, replicas: Replicas) -> None:
    while line := await reader.readline():
        replicas.serve(json.loads(line)["urls"])


async def _beat(keeper: RouterKeeper) -> None:
    while True:
        keeper.tell()
        await asyncio.sleep(HEARTBEAT_S)


class UnsafeError(Exception):
    """Others can reach the router on this machine: it is not used here."""


class RouterKeeper:
    """Runs vllm-router, starts it again when it ends, and tells it of the replicas."""

    def __init__(self, replicas: Replicas, guard: Guard, tell: Callable[[dict[str, Any]], None]) -> None:
        self._replicas = replicas
        self._guard = guard
        self._tell = tell
        self._key = b""
        self._url = ""
        self._session = new_session(aiohttp.TCPConnector(limit=0, socket_factory=self._signed_socket))
        self._added: set[str] = set()
        self._adding: dict[str, asyncio.Task[None]] = {}
        self._restarts = 0
        self._reason = "it is coming up"
        self._has_been_ready = False

    def tell(self) -> None:
        """Says how it is."""
        ready = self._has_been_ready
        self._tell({"ready": ready, "restarts": self._restarts, "reason": "" if ready else self._reason})

    async def keep(self) -> None:
        """Until this machine turns out not to be fit for it."""
        failures = 0
        while True:
            began = asyncio.get_running_loop().time()
            try:
                self._reason = await self._one_life()
            except UnsafeError as error:
                log.error("%s", error)
                self._tell({"ready": False, "restarts": self._restarts, "reason": str(error), "final": True})
                return
            finally:
                self._guard.router = None
            log.warning("vllm-router: %s", self._reason)
            self._restarts += 1
            self.tell()
            failures = 0 if asyncio.get_running_loop().time() - began > _LONGEST_BACKOFF_S else failures + 1
            await asyncio.sleep(min(_LONGEST_BACKOFF_S, 0.1 * 2**failures))

    async def _one_life(self) -> str:
        """From its start to its end; returns why it ended."""
        self._key, port = signed_sockets.new_key(), router_process.free_port()
        self._url, self._added = f"http://127.0.0.1:{port}", set()
        ours, theirs = os.pipe()
        outcome = await _reader_of(ours)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "managed_vllm.server.router_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(theirs,),
            env={**os.environ, "NO_COLOR": "1"},
        )
        os.close(theirs)
        saying = asyncio.create_task(_log_lines(process))
        ended = asyncio.create_task(process.wait())
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"key": self._key.hex(), "port": port, "outcome": theirs}).encode() + b"\n")
            word = await asyncio.wait_for(outcome.readline(), router_process.STARTS_WITHIN_S)
            if word == router_process.MET:
                return "somebody connected before its port was closed to others"
            if word == router_process.SIGNED:
                if await _answers_the_unsigned(port):
                    raise UnsafeError("this kernel takes keys of TCP sockets (TCP_MD5SIG), and does not heed them")
                return await self._tend(ended)
            await ended
            return f"it ended while it came up: {await saying}"
        except TimeoutError:
            return "it did not come up"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await ended
            for task in (*self._adding.values(), saying):
                task.cancel()
            self._adding.clear()

    async def _tend(self, ended: asyncio.Task[int]) -> str:
        while not ended.done():
            self._replicas.changed.clear()
            try:
                if not await self._match_replicas():
                    return "it had a worker that is not ours"
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
                log.warning("vllm-router does not answer: %r", error)
            else:
                self._guard.router = Way(self._session, self._url, is_router=True)
                if not self._has_been_ready:
                    self._has_been_ready = True
                    self.tell()
            changed = asyncio.create_task(self._replicas.changed.wait())
            await asyncio.wait({ended, changed}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        return f"it ended with {ended.result()}"

    async def _match_replicas(self) -> bool:
        """Gives it the workers that it should have. False: it had one that nobody but a stranger can have given it."""
        async with asyncio.timeout(_ADD_S), self._session.get(f"{self._url}/list_workers") as response:
            has = set((await response.json())["urls"])
        if not has <= self._added:
            return False
        wanted = set(self._replicas.urls)
        for url in has - wanted:
            async with asyncio.timeout(_ADD_S), self._session.post(f"{self._url}/remove_worker", params={"url": url}):
                pass
        self._adding = {url: task for url, task in self._adding.items() if not task.done()}
        for url in wanted - has:
            if url not in self._adding:
                self._added.add(url)
                self._adding[url] = asyncio.create_task(self._add(url))
        if self._adding and self._guard.router is None:
            await asyncio.wait(set(self._adding.values()), timeout=_LOOK_S)
        return True

    async def _add(self, url: str) -> None:
        """It asks the worker for its health first, and takes in none that does not answer."""
        try:
            async with (
                asyncio.timeout(_ADD_S),
                self._session.post(f"{self._url}/add_worker", params={"url": url}) as it,
            ):
                if it.status != 200:
                    log.warning("vllm-router does not take %s: %s", url, (await it.text())[:200])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("vllm-router does not take %s: %r", url, error)

    def _signed_socket(self, address: Any) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        signed_sockets.sign(made, self._key)
        return made


async def _reader_of(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(descriptor, "rb"))
    return reader


async def _log_lines(process: asyncio.subprocess.Process) -> str:
    """Logs what it says; returns the last line."""
    last = ""
    assert process.stdout is not None
    async for line in process.stdout:
        text = line.decode(errors="replace").strip()
        if text and not text.startswith("DEBUG: "):  # of its start, whatever its level
            last = text
            log.info("vllm-router: %s", text)
    return last


async def _answers_the_unsigned(port: int) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_UNANSWERED_S):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False


if __name__ == "__main__":
    main()
