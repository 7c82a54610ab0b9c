"""What is below the stand-in's API server: EngineCore and Worker, joined by pipes, and the rule that makes the tokens.

Each token really passes Worker → EngineCore → API server, so that stopping or killing any of them has vLLM's effect:
EngineCore dies with its Worker and waits for it for ever if it is stopped; nobody watches the API server (vllm#55510),
which is why the library's lifeline must. The rule is deterministic, and a continuation from prompt + tokens gives the
same tokens:

    state      CRC-32 over all token ids so far, the prompt's included, four bytes each, little endian
    next id    256 + state % 9744
    text       of an id: "w<id> "; a prompt's text has one id (0-255) per UTF-8 byte
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import re
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

VOCABULARY = 10_000
_KV_CACHE_TOKENS = 100_000


# -- the rule ----------------------------------------------------------------------------------------------------------


def prompt_ids(prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], *, continued: bool = False) -> list[int]:
    """The token ids of a prompt: of text, of ids, or of a conversation ("role: content" lines).

    `continued`: the last message is the beginning of the answer, as with `continue_final_message` of vLLM.
    """
    if isinstance(prompt, str):
        return list(prompt.encode())
    if not all(isinstance(item, Mapping) for item in prompt):
        return [int(item) for item in prompt]  # type: ignore[arg-type]
    messages: list[Mapping[str, Any]] = list(prompt)  # type: ignore[arg-type]
    begun = [int(number) for number in re.findall(r"w(\d+) ", content_of(messages.pop()))] if continued else []
    return [*"".join(f"{message['role']}: {content_of(message)}\n" for message in messages).encode(), *begun]


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message; of one with parts, the parts that are text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def continuation(ids: Sequence[int], n: int) -> list[int]:
    """The `n` ids that follow."""
    state, found = _state_of(ids), []
    for _ in range(n):
        token, state = _next(state)
        found.append(token)
    return found


def text_of(ids: Sequence[int]) -> str:
    """What the server says for ids that it generated."""
    return "".join(f"w{number} " for number in ids)


def logprob_of(token: int) -> float:
    """The logprob that the server gives for an id."""
    return -(1 + token % 100) / 100


def _state_of(ids: Sequence[int]) -> int:
    return zlib.crc32(struct.pack(f"<{len(ids)}I", *ids))


def _next(state: int) -> tuple[int, int]:
    token = 256 + state % (VOCABULARY - 256)
    return token, zlib.crc32(struct.pack("<I", token), state)


# -- the API server's end ----------------------------------------------------------------------------------------------


class EngineDead(Exception):
    """EngineCore has ended: what is in flight gets HTTP 500, `/health` answers 503 from now on."""


@dataclass(frozen=True)
class Fault:
    """What the engine does instead of the `at`-th token of a request: `{crash,hang}-{engine,worker}`.

    Not before the tokens up to there are with the client (`Generation.passed_on`), however slow the API server is.
    """

    kind: str
    at: int


class Engine:
    """The API server's handle of EngineCore. `dead` is set once it has ended; `stats` is what it said last."""

    def __init__(self, *, tree: bool, max_seqs: int = 256, shm: bool | str = False) -> None:
        """`tree`: EngineCore and Worker as processes, started as vLLM does it; else as threads, for a quick start."""
        self.dead = threading.Event()
        self.stats: dict[str, int] = dict.fromkeys(("running", "waiting", "kv", "generated", "prompt", "steps"), 0)
        self._lock = threading.Lock()
        self._number = 0
        self._queues: dict[int, queue.SimpleQueue[tuple[int, int] | None]] = {}
        self._pipe, far = multiprocessing.Pipe()
        _launch(tree, run_engine_core, (far, tree, max_seqs, shm))
        threading.Thread(target=self._read, daemon=True).start()

    def generate(
        self, ids: Sequence[int], n_tokens: int, *, choices: int = 1, token_s: float = 0, fault: Fault | None = None
    ) -> Generation:
        """Begins to generate. Raises `EngineDead`."""
        inbox: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        with self._lock:
            self._number += 1
            number = self._number
            self._queues[number] = inbox
        request = _Request(number, _state_of(ids), len(ids), n_tokens, choices, token_s, fault)
        self._tell(request)
        if self.dead.is_set():
            inbox.put(None)
        return Generation(self, request, inbox)

    def fail(self, number: int) -> None:
        """The request's fault may strike."""
        self._tell(_Strike(number))

    def end(self, number: int) -> None:
        """Forgets a request; one that still runs is given up."""
        if self._queues.pop(number, None) is not None:
            with contextlib.suppress(EngineDead):
                self._tell(number)

    def forget(self, number: int) -> None:
        """Nobody reads its tokens any more: all of them are there."""
        self._queues.pop(number, None)

    def _tell(self, what: Any) -> None:
        try:
            with self._lock:
                self._pipe.send(what)
        except OSError:
            raise EngineDead from None

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tokens, stats = self._pipe.recv()
                self.stats = stats
                for number, choice, token in tokens:
                    inbox = self._queues.get(number)
                    if inbox is not None:
                        inbox.put((choice, token))
        self.dead.set()
        for inbox in list(self._queues.values()):
            inbox.put(None)


class Generation:
    """The tokens of one request as they come: pairs of choice and id. Raises `EngineDead`."""

    def __init__(self, engine: Engine, request: _Request, inbox: queue.SimpleQueue[tuple[int, int] | None]) -> None:
        self._engine = engine
        self._number = request.number
        self._left = request.n_tokens * request.choices
        self._strikes_at = None if request.fault is None else request.fault.at * request.choices
        self._inbox = inbox
        self.passed_on(0)

    def passed_on(self, count: int) -> None:
        """So many tokens, of all choices, are on their way to the client."""
        if self._strikes_at is not None and count >= self._strikes_at:
            self._strikes_at = None
            self._engine.fail(self._number)

    def tokens(self) -> Iterator[list[tuple[int, int]]]:
        """What has come since the last look: an empty list after 50 ms without any, so that the caller can look up."""
        try:
            while self._left:
                found: list[tuple[int, int]] = []
                died = False
                with contextlib.suppress(queue.Empty):
                    item = self._inbox.get(timeout=0.05)
                    while item is not None:
                        found.append(item)
                        item = self._inbox.get_nowait()
                    died = True
                self._left -= len(found)
                if found or not died:
                    yield found  # first what the engine made before it died, however late we look
                if died and self._left:
                    raise EngineDead
            self._engine.forget(self._number)
        finally:
            self._engine.end(self._number)


def _launch(tree: bool, target: Any, arguments: tuple[Any, ...]) -> None:
    """Runs `target` in a process, started as vLLM would, or in a thread; it owns the first argument, its pipe."""
    if not tree:
        threading.Thread(target=target, args=arguments, daemon=True).start()
        return
    context: Any = multiprocessing.get_context(os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn"))
    context.Process(target=target, args=arguments).start()
    arguments[0].close()  # ours: so that the end of the child is the end of the pipe


def _is_process() -> bool:
    return multiprocessing.parent_process() is not None


def _end() -> None:
    if _is_process():
        os._exit(1)
    raise SystemExit(1)


def _call_it(name: str) -> None:
    import signal

    if _is_process():
        # As vLLM's: a process that waits for its group's SIGINT or SIGTERM waits for ever.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open("/proc/self/comm", "w") as comm:
            comm.write(name[:15])


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


# -- EngineCore --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    number: int
    state: int
    prompt_tokens: int
    n_tokens: int
    choices: int
    token_s: float
    fault: Fault | None


@dataclass(frozen=True)
class _Strike:
    """The fault of the request with this number may strike."""

    number: int


@dataclass
class _Sequence:
    """One choice of a request while it is generated."""

    request: _Request
    choice: int
    state: int
    done: int
    due: float
    may_fail: bool = False

    @property
    def is_held(self) -> bool:
        """Whether it waits for its fault."""
        fault = self.request.fault
        return fault is not None and fault.at == self.done and not self.may_fail


def run_engine_core(api: Connection, tree: bool, max_seqs: int, shm: bool | str) -> None:
    """EngineCore: schedules the sequences, asks the Worker for each step, passes the tokens on."""
    _call_it("VLLM::EngineCore")
    worker, far = multiprocessing.Pipe()
    _launch(tree, run_worker, (far, shm))
    with api, worker:
        _EngineCore(api, worker, max_seqs).run()


class _EngineCore:
    def __init__(self, api: Connection, worker: Connection, max_seqs: int) -> None:
        self._api = api
        self._worker = worker
        self._max_seqs = max_seqs
        self._sequences: list[_Sequence] = []
        self._stats = {"generated": 0, "prompt": 0, "steps": 0}

    def run(self) -> None:
        while True:
            now = time.monotonic()
            running = self._sequences[: self._max_seqs]
            due = [s.due for s in running if not s.is_held]
            timeout = max(0.0, min(due) - now) if due else None
            pipes: list[Any] = wait([self._api, self._worker], timeout)
            for pipe in pipes:
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    if pipe is self._api:
                        _sleep_for_ever()  # vLLM's EngineCore watches nobody (vllm#55510)
                    print("Worker proc VLLM::Worker died unexpectedly, shutting down executor.", flush=True)
                    _end()
                self._take(message)
            self._step()

    def _take(self, message: _Request | _Strike | int) -> None:
        if isinstance(message, _Strike):
            for sequence in self._sequences:
                sequence.may_fail = sequence.may_fail or sequence.request.number == message.number
            return
        if isinstance(message, int):
            self._sequences = [s for s in self._sequences if s.request.number != message]
            self._say([])
            return
        due = time.monotonic() + message.token_s
        self._sequences += [_Sequence(message, choice, message.state, 0, due) for choice in range(message.choices)]
        self._stats["prompt"] += message.prompt_tokens
        self._say([])

    def _step(self) -> None:
        now = time.monotonic()
        batch = [s for s in self._sequences[: self._max_seqs] if s.due <= now and not s.is_held]
        if not batch:
            return
        for sequence in batch:
            self._misbehave(sequence)
        try:
            self._worker.send([s.state for s in batch])
            answers = self._worker.recv()
        except (EOFError, OSError):
            print("EngineCore encountered a fatal error: the worker is gone", flush=True)
            _end()
        self._stats["steps"] += 1
        self._stats["generated"] += len(batch)
        for sequence, (_, state) in zip(batch, answers, strict=True):
            sequence.state, sequence.done, sequence.due = state, sequence.done + 1, now + sequence.request.token_s
        self._sequences = [s for s in self._sequences if s.done < s.request.n_tokens]
        self._say([(s.request.number, s.choice, token) for s, (token, _) in zip(batch, answers, strict=True)])

    def _misbehave(self, sequence: _Sequence) -> None:
        fault = sequence.request.fault
        if fault is None or sequence.done != fault.at:
            return
        if fault.kind == "crash-engine":
            _end()
        if fault.kind == "hang-engine":
            _sleep_for_ever()
        self._worker.send(fault.kind)

    def _say(self, tokens: list[tuple[int, int, int]]) -> None:
        running = self._sequences[: self._max_seqs]
        held = sum(s.request.prompt_tokens + s.done for s in running)
        waiting = len(self._sequences) - len(running)
        stats = {**self._stats, "running": len(running), "waiting": waiting, "kv": held}
        try:
            self._api.send((tokens, stats))
        except OSError:
            _sleep_for_ever()


def kv_cache_usage(stats: Mapping[str, int]) -> float:
    """Between 0 and 1."""
    return min(1.0, stats["kv"] / _KV_CACHE_TOKENS)


# -- Worker ------------------------------------------------------------------------------------------------------------


def run_worker(engine: Connection, shm: bool | str) -> None:
    """Worker: one token for each state of a step. `shm`: with a segment of shared memory; its path goes to a file."""
    _call_it("VLLM::Worker")
    segment = _shared_memory(shm) if shm else None
    with engine:
        while True:
            try:
                message = engine.recv()
            except (EOFError, OSError):
                _end()
            if message == "crash-worker":
                _end()
            if message == "hang-worker":
                _sleep_for_ever()
            engine.send([_next(state) for state in message])
            assert segment is None or segment.size


def _shared_memory(noted_in: bool | str) -> Any:
    """A mapped segment; Python's resource tracker removes it, if that is not killed as well."""
    from multiprocessing import shared_memory

    segment = shared_memory.SharedMemory(create=True, size=4096)
    if isinstance(noted_in, str):
        with open(noted_in, "a") as notes:
            notes.write(f"/dev/shm/{segment.name}\n")
    return segment


assert sys.platform.startswith("linux"), "the stand-in reads /proc"
