"""What a request costs the process that asks: our client against bare aiohttp, httpx and the OpenAI SDK.

    python benchmarks/client.py                                  all of it, three rounds (about 15 minutes)
    python benchmarks/client.py --quick                          a slice, in a minute
    python benchmarks/client.py --only ours --concurrency 256    one cell, for a profiler around it (`--cell`, below)

The server is `stub_server.py`: it answers at once, and costs less than any client. Each cell (a contender with a number
of requests in flight) is a fresh process with a fresh server, so its CPU time is its own. In a cell all requests are
under way before the clock starts; then requests and CPU time (user and system) of some seconds are counted. Contenders
take turns, and the turns rotate, so that a change of the machine's load meets all of them; the ratios are made within
a round, and their medians are shown.

All ask for the same, a chat with logprobs, and all read the sampled tokens' logprobs out of the answer and compare them
with what the stub sends. All have the limits of their pools opened, no time-outs, no proxies, and no second attempts.

To profile one cell: `python benchmarks/stub_server.py`, and with the address that it prints

    py-spy record -o out.svg -- python benchmarks/client.py --cell ours --concurrency 256 --seconds 10 --address URL
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stub_server import MODEL, TOKENS, logprobs, raise_open_files, running, stats_of

CONCURRENCY = (1, 64, 256, 1024, 4096)
REFERENCE = "aiohttp"
SDK = "openai"
CPU_OVER_AIOHTTP = 1.3
OVER_SDK = {256: 8.0, 1024: 15.0}
SOCKETS_AT = 4096

_KEY = "sk-stub"
_EXPECTED = math.fsum(first for first, _ in logprobs())
_WARM_S = 1.0
_PATIENCE_S = 5.0
"""More for a contender that does not get even one answer per worker done in its time."""
_GIVE_UP_S = 25.0
"""More for a whole cell. httpx looks at all connections for each request: with 4,096 its loop hardly comes round."""

Messages = list[dict[str, Any]]
Ask = Callable[[Messages], Awaitable[float]]
"""Sends one conversation, returns the sum of the sampled tokens' logprobs."""
AskMany = Callable[[list[Messages]], Iterable[float]]
AskManyAsync = Callable[[list[Messages]], Awaitable[Iterable[float]]]


@dataclass
class Cell:
    """One contender with so many requests in flight, once.

    `cpu_us` is per request. `files` are the numbers of open file descriptors before the client was made, when it was
    warm, after the measurement, and after its end. `accepted` are all connections that the server ever had, `left_open`
    those that it still had then.
    """

    contender: str
    concurrency: int
    requests: int = 0
    seconds: float = 0.0
    cpu_us: float = 0.0
    errors: int = 0
    error: str = ""
    note: str = ""
    files: list[int] = field(default_factory=list)
    most_connections: int = 0
    accepted: int = 0
    left_open: int = 0

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


# -- what is asked -----------------------------------------------------------------------------------------------------


def conversations(number: int = 512) -> list[Messages]:
    """Short ones, all different, so that nothing can be kept from one request for the next."""
    made = []
    for n in range(number):
        system = "You are an agent that fills in forms. Answer with what you see and with the next click."
        turns = [
            ("user", f"Task {n}: order {n % 7 + 1} tickets for the {n % 28 + 1}th, row {n % 40}, and pay by invoice."),
            ("assistant", "The window shows a form with three fields, and the second one is empty. I click into it."),
            (
                "user",
                f"The field has the focus now; the page says 'step {n % 5} of 5'. What do you see, and what next?",
            ),
        ]
        made.append([{"role": "system", "content": system}, *({"role": r, "content": text} for r, text in turns)])
    return made


OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "logprobs": True, "top_logprobs": 2}
OF_VLLM: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
SAMPLING: dict[str, Any] = {"max_tokens": TOKENS, "logprobs": 1}
"""For ours; on the wire they are the same as OPTIONS and OF_VLLM."""


def _body(messages: Messages) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages, **OPTIONS, **OF_VLLM}


def _read_plain(answer: dict[str, Any]) -> float:
    return math.fsum(entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"])


def _read_ours(output: Any) -> float:
    one = output.outputs[0]
    return math.fsum(place[token].logprob for token, place in zip(one.token_ids, one.logprobs, strict=True))


# -- who asks ----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def raw_aiohttp(address: str, concurrency: int) -> AsyncIterator[Ask]:
    import aiohttp

    url = f"{address}/v1/chat/completions"
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {_KEY}"}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, trust_env=False) as session:

        async def ask(messages: Messages) -> float:
            async with session.post(url, json=_body(messages)) as response:
                return _read_plain(json.loads(await response.read()))

        yield ask


@contextlib.asynccontextmanager
async def raw_httpx(address: str, concurrency: int) -> AsyncIterator[Ask]:
    import httpx

    url = f"{address}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {_KEY}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False) as client:

        async def ask(messages: Messages) -> float:
            response = await client.post(url, json=_body(messages))
            return _read_plain(json.loads(response.content))

        yield ask


@contextlib.asynccontextmanager
async def openai_default(address: str, concurrency: int) -> AsyncIterator[Ask]:
    import openai

    # Since 3.0 the SDK's own backend is httpx2; it was httpx before.
    backend = getattr(openai, "DefaultAsyncHttpx2Client", openai.DefaultAsyncHttpxClient)
    limits = _sdk_transport().Limits(max_connections=None, max_keepalive_connections=None)
    async with _openai(address, backend(limits=limits, timeout=None, trust_env=False)) as ask:
        yield ask


@contextlib.asynccontextmanager
async def openai_aiohttp(address: str, concurrency: int) -> AsyncIterator[Ask]:
    import openai

    # None would be aiohttp's own limit of 100.
    limits = _sdk_transport().Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with _openai(address, openai.DefaultAioHttpClient(limits=limits, timeout=None, trust_env=False)) as ask:
        yield ask


def _sdk_transport() -> Any:
    import openai

    return import_module("httpx2" if hasattr(openai, "DefaultAsyncHttpx2Client") else "httpx")


@contextlib.asynccontextmanager
async def _openai(address: str, http_client: Any) -> AsyncIterator[Ask]:
    import openai

    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key=_KEY, http_client=http_client, max_retries=0, timeout=None
    ) as client:

        async def ask(messages: Messages) -> float:
            given: Any = messages
            answer = await client.chat.completions.create(
                model=MODEL, messages=given, extra_body=OF_VLLM, timeout=None, **OPTIONS
            )
            told = answer.choices[0].logprobs
            assert told is not None
            return math.fsum(entry.logprob for entry in told.content or ())

        yield ask


@contextlib.asynccontextmanager
async def ours(address: str, concurrency: int) -> AsyncIterator[Ask]:
    async with _ours(address) as client:

        async def ask(messages: Messages) -> float:
            return _read_ours((await client.chat(messages, SAMPLING))[0])

        yield ask


@contextlib.asynccontextmanager
async def ours_batch(address: str, concurrency: int) -> AsyncIterator[AskManyAsync]:
    async with _ours(address) as client:

        async def ask(many: list[Messages]) -> Iterable[float]:
            return map(_read_ours, await client.chat(many, SAMPLING))

        yield ask


@contextlib.asynccontextmanager
async def _ours(address: str) -> AsyncIterator[Any]:
    from managed_vllm.client import AsyncVLLMClient

    client = AsyncVLLMClient(address, _KEY, MODEL)
    try:
        yield client
    finally:
        await client.aclose()


@contextlib.contextmanager
def ours_sync(address: str, concurrency: int) -> Iterator[AskMany]:
    from managed_vllm.client import VLLMClient

    client = VLLMClient(address, _KEY, MODEL)
    try:
        yield lambda many: map(_read_ours, client.chat(many, SAMPLING))
    finally:
        client.close()


ONE_BY_ONE: dict[str, Callable[[str, int], AbstractAsyncContextManager[Ask]]] = {
    REFERENCE: raw_aiohttp,
    "httpx": raw_httpx,
    SDK: openai_default,
    "openai-aiohttp": openai_aiohttp,
    "ours": ours,
}
"""A task per request in flight, each sending one after the other."""
BATCHES: dict[str, Callable[[str, int], AbstractAsyncContextManager[AskManyAsync]]] = {"ours-batch": ours_batch}
"""One call with as many conversations as there are to be in flight, call after call."""
SYNC_BATCHES: dict[str, Callable[[str, int], AbstractContextManager[AskMany]]] = {"ours-sync": ours_sync}
CONTENDERS = [*ONE_BY_ONE, *BATCHES, *SYNC_BATCHES]
OURS = ("ours", "ours-batch", "ours-sync")


def missing(contender: str) -> str | None:
    """Why a contender can't take part here."""
    if contender == "openai-aiohttp":
        try:
            import openai

            openai.DefaultAioHttpClient()
        except (ImportError, AttributeError, RuntimeError) as error:
            return f"the SDK's aiohttp backend is not installed: {error}"
    if contender in ("ours", "ours-batch"):
        from managed_vllm import client

        if not hasattr(client, "AsyncVLLMClient"):
            return "managed_vllm.client has no AsyncVLLMClient"
    if contender in (REFERENCE, "httpx") and find_spec(contender) is None:
        return f"{contender} is not installed"
    return None


# -- one cell, in a process of its own ---------------------------------------------------------------------------------


class _Clock:
    """Counts answers, and tells those, seconds and CPU seconds between `start` and `stop`."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self.done = 0
        self._at = self.now()

    def take(self, value: float) -> None:
        self.done += 1
        if not math.isclose(value, _EXPECTED):
            self.failed(ValueError(f"the logprobs' sum is {value}, not {_EXPECTED}"))

    def failed(self, error: Exception) -> None:
        self._cell.errors += 1
        self._cell.error = self._cell.error or f"{type(error).__name__}: {error}"[:300]

    def now(self) -> tuple[int, float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return self.done, time.perf_counter(), usage.ru_utime + usage.ru_stime

    def start(self) -> None:
        self._at = self.now()
        self._cell.note = "while it was measured"

    def stop(self) -> None:
        self._cell.note = "while it ended"
        requests, seconds, cpu_s = (b - a for a, b in zip(self._at, self.now(), strict=True))
        self._cell.requests, self._cell.seconds = int(requests), seconds
        self._cell.cpu_us = cpu_s / requests * 1e6 if requests else 0.0

    def give_up(self) -> None:
        """From another thread: tells what there is, and ends the process."""
        if not self._cell.seconds:
            self.stop()
        self._cell.note = f"gave up {self._cell.note or 'while it warmed up'}"
        print(json.dumps(asdict(self._cell)), flush=True)
        os._exit(0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def one_by_one(cell: Cell, address: str, seconds: float) -> None:
    asked = itertools.cycle(conversations())
    stopped = False
    clock = _Clock(cell)
    watch = threading.Timer(seconds + _GIVE_UP_S, clock.give_up)
    watch.start()
    cell.files.append(open_files())
    async with ONE_BY_ONE[cell.contender](address, cell.concurrency) as ask:

        async def worker() -> None:
            while not stopped and cell.errors < 1000:
                try:
                    clock.take(await ask(next(asked)))
                except Exception as error:
                    clock.failed(error)

        async def until(answers: int, seconds: float) -> None:
            started, limit = time.perf_counter(), clock.done + answers
            while (passed := time.perf_counter() - started) < seconds or clock.done < limit:
                if passed > seconds + _PATIENCE_S or all(task.done() for task in workers):
                    break
                await asyncio.sleep(0.05)

        workers = [asyncio.create_task(worker()) for _ in range(cell.concurrency)]
        await until(2 * cell.concurrency, min(seconds, _WARM_S))
        cell.files.append(open_files())
        clock.start()
        await until(cell.concurrency, seconds)
        clock.stop()
        stopped = True
        _, late = await asyncio.wait(workers, timeout=_PATIENCE_S)
        for task in late:
            task.cancel()
        cell.files.append(open_files())
    watch.cancel()
    await _settle(cell)


async def in_batches(cell: Cell, address: str, seconds: float) -> None:
    clock = _Clock(cell)
    batches = _batches(cell.concurrency)
    cell.files.append(open_files())
    async with BATCHES[cell.contender](address, cell.concurrency) as ask:
        for _ in _rounds(cell, clock, seconds):
            try:
                for value in await ask(next(batches)):
                    clock.take(value)
            except Exception as error:
                clock.failed(error)
    await _settle(cell)


async def _settle(cell: Cell) -> None:
    """Transports close their sockets a little later than their client."""
    await asyncio.sleep(0.25)
    gc.collect()
    cell.files.append(open_files())


def in_sync_batches(cell: Cell, address: str, seconds: float) -> None:
    from managed_vllm.request import portal

    clock = _Clock(cell)
    batches = _batches(cell.concurrency)
    portal.loop()  # one for the process, for ever
    cell.files.append(open_files())
    with SYNC_BATCHES[cell.contender](address, cell.concurrency) as ask:
        for _ in _rounds(cell, clock, seconds):
            try:
                for value in ask(next(batches)):
                    clock.take(value)
            except Exception as error:
                clock.failed(error)
    time.sleep(0.25)
    gc.collect()
    cell.files.append(open_files())


def _batches(size: int) -> Iterator[list[Messages]]:
    asked = itertools.cycle(conversations())
    while True:
        yield list(itertools.islice(asked, size))


def _rounds(cell: Cell, clock: _Clock, seconds: float) -> Iterator[None]:
    """For each batch to send: until all is warm, and then until the seconds have passed."""
    for limit in (min(seconds, _WARM_S), seconds):
        cell.files.append(open_files())
        clock.start()
        started = time.perf_counter()
        while time.perf_counter() - started < limit and cell.errors < 10:
            yield
        clock.stop()
    cell.files[1:] = [cell.files[2], open_files()]


def run_cell(contender: str, concurrency: int, seconds: float, address: str) -> Cell:
    cell = Cell(contender, concurrency)
    raise_open_files()
    if contender in SYNC_BATCHES:
        in_sync_batches(cell, address, seconds)
    else:
        asyncio.run((in_batches if contender in BATCHES else one_by_one)(cell, address, seconds))
    cell.note = ""
    return cell


def measured(contender: str, concurrency: int, seconds: float) -> Cell:
    """A cell in a fresh process against a fresh stub."""
    words = [sys.executable, str(Path(__file__).resolve()), "--cell", contender, "--concurrency", str(concurrency)]
    with running() as address:
        words += ["--seconds", str(seconds), "--address", address]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 120)
        except subprocess.TimeoutExpired:
            return Cell(contender, concurrency, errors=1, error="did not end")
        if done.returncode != 0:
            return Cell(contender, concurrency, errors=1, error=done.stderr.strip()[-300:])
        cell = Cell(**json.loads(done.stdout.splitlines()[-1]))
        told = stats_of(address)
        cell.most_connections, cell.accepted, cell.left_open = told.most_connections, told.accepted, told.connections
    return cell


# -- the tables --------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    what: str
    value: str
    met: bool


class Results:
    """All cells, by round; ratios are made within a round."""

    def __init__(self) -> None:
        self.rounds: list[dict[tuple[str, int], Cell]] = []

    def of(self, contender: str, concurrency: int) -> list[Cell]:
        return [cells[contender, concurrency] for cells in self.rounds if (contender, concurrency) in cells]

    def ratio(self, contender: str, to: str, concurrency: int, of: Callable[[Cell], float]) -> float | None:
        """The median over the rounds, None if one of the two was not measured."""
        found = []
        for cells in self.rounds:
            one, other = cells.get((contender, concurrency)), cells.get((to, concurrency))
            if one and other and of(one) and of(other):
                found.append(of(one) / of(other))
        return statistics.median(found) if found else None

    def show(self) -> None:
        """`busy` is the client's share of one core. Where it is small, something else bounds the throughput."""
        print(
            f"\n{'':16} {'in flight':>9} {'requests/s':>10} {'least':>7} {'most':>7} {'×aiohttp':>8} "
            f"{'CPU µs':>7} {'×aiohttp':>8} {'busy':>5} {'errors':>6} {'sockets':>7}"
        )
        for concurrency in sorted({number for cells in self.rounds for _, number in cells}):
            for contender in CONTENDERS:
                cells = self.of(contender, concurrency)
                if not cells:
                    continue
                speeds = [cell.per_s for cell in cells]
                cpu = statistics.median(cell.cpu_us for cell in cells)
                busy = statistics.median(cell.cpu_us * cell.per_s / 1e6 for cell in cells)
                print(
                    f"{contender:16} {concurrency:9} {statistics.median(speeds):10.0f} "
                    f"{min(speeds):7.0f} {max(speeds):7.0f} "
                    f"{_times(self.ratio(contender, REFERENCE, concurrency, _per_s)):>8} {cpu:7.0f} "
                    f"{_times(self.ratio(contender, REFERENCE, concurrency, _cpu_us)):>8} {busy:5.0%} "
                    f"{sum(cell.errors for cell in cells):6} {max(cell.most_connections for cell in cells):7}"
                )
        for turn in self.rounds:
            for cell in turn.values():
                if cell.error:
                    print(f"  {cell.contender} at {cell.concurrency}: {cell.errors} errors, the first: {cell.error}")
                if cell.note:
                    print(f"  {cell.contender} at {cell.concurrency}: {cell.note}")

    def targets(self) -> list[Target]:
        found = []
        for contender in OURS:
            cpu = self.ratio(contender, REFERENCE, 256, _cpu_us)
            if cpu is not None:
                what = f"{contender}: CPU per request ≤ {CPU_OVER_AIOHTTP:g} × aiohttp at 256"
                found.append(Target(what, _times(cpu), cpu <= CPU_OVER_AIOHTTP))
            for concurrency, least in OVER_SDK.items():
                times = self.ratio(contender, SDK, concurrency, _per_s)
                if times is not None:
                    what = f"{contender}: requests/s ≥ {least:g} × OpenAI SDK at {concurrency:,}"
                    found.append(Target(what, _times(times), times >= least))
            cells = self.of(contender, SOCKETS_AT)
            if cells:
                errors = sum(cell.errors for cell in cells)
                # Not against the warm client: it may have begun with fewer in flight than are allowed.
                over = max(cell.files[2] - cell.files[0] if len(cell.files) == 4 else 0 for cell in cells) - SOCKETS_AT
                left = max(cell.files[3] - cell.files[0] if len(cell.files) == 4 else 0 for cell in cells)
                at_server = max(cell.left_open for cell in cells)
                most = max(cell.most_connections for cell in cells)
                value = (
                    f"{errors} errors; files beyond one per request {max(0, over)}, after its end {left:+}; at the "
                    f"server {most} at most, {at_server} left, {max(cell.accepted for cell in cells)} ever"
                )
                met = errors == 0 and over <= 0 and left <= 0 and at_server == 0 and most <= SOCKETS_AT
                what = f"{contender}: no error, no more open sockets at {SOCKETS_AT:,}"
                found.append(Target(what, value, met))
        return found


def _per_s(cell: Cell) -> float:
    return cell.per_s


def _cpu_us(cell: Cell) -> float:
    return cell.cpu_us


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


# -- all of it ---------------------------------------------------------------------------------------------------------

QUICK = [
    *((name, 256) for name in (REFERENCE, SDK, "ours", "ours-batch", "ours-sync")),
    *((name, 1024) for name in (SDK, "ours")),
    ("ours", 4096),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a slice in one round")
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="this contender; may be given again")
    parser.add_argument("--concurrency", type=int, action="append", metavar="N", help="requests in flight; likewise")
    parser.add_argument("--rounds", type=int, help="default: 3; 1 with --quick")
    parser.add_argument("--seconds", type=float, help="of each measurement, default: 3; 1.5 with --quick")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    parser.add_argument("--cell", choices=CONTENDERS, help="one cell in this process, against --address")
    parser.add_argument("--address", help="of a stub server, for --cell")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (1.5 if arguments.quick else 3.0)
    if arguments.cell:
        if not arguments.address or len(arguments.concurrency or ()) != 1:
            parser.error("--cell needs --address and one --concurrency")
        print(json.dumps(asdict(run_cell(arguments.cell, arguments.concurrency[0], seconds, arguments.address))))
        return

    machine = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        **{name: _version(name) for name in ("aiohttp", "httpx", "httpx2", "openai", "msgspec")},
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    cells = QUICK if arguments.quick else [(name, number) for number in CONCURRENCY for name in CONTENDERS]
    if arguments.concurrency:
        cells = [(name, number) for number in arguments.concurrency for name in dict(cells)]
    if arguments.only:
        cells = [(name, number) for name, number in cells if name in arguments.only]
    reasons = {name: missing(name) for name in dict(cells)}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}", flush=True)
    cells = [(name, number) for name, number in cells if not reasons[name]]

    results = Results()
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    for turn in range(rounds):
        results.rounds.append({})
        for number in sorted({number for _, number in cells}):
            names = [name for name, its in cells if its == number]
            shift = turn * len(names) // rounds
            for name in names[shift:] + names[:shift]:
                cell = results.rounds[-1][name, number] = measured(name, number, seconds)
                said = f"{cell.per_s:7.0f} requests/s {cell.cpu_us:7.0f} µs CPU each"
                print(
                    f"round {turn + 1}/{rounds}, {number:4} in flight, {name:16} {said} {cell.note or cell.error[-80:]}"
                )
                sys.stdout.flush()
    results.show()
    targets = results.targets()
    if targets:
        print("\ntargets")
    for target in targets:
        print(f"  {target.what:62} {'met' if target.met else 'NOT met':8} {target.value}")
    if arguments.json:
        turns = [[asdict(cell) for cell in cells.values()] for cells in results.rounds]
        told = [asdict(target) for target in targets]
        arguments.json.write_text(json.dumps({"machine": machine, "rounds": turns, "targets": told}, indent=1))


if __name__ == "__main__":
    main()
