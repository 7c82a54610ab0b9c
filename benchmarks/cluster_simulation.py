"""A cluster of nodes whose processes play one run together, in time that is only counted; for `capacity.py`.

What a rollout asks of whom, in this order, comes from `managed_vllm.agent.run`, `rollout_queue` and `store`:

- Each node's process goes through the tasks in its order. Its one writer thread claims a rollout or looks at another
  one's claim; what others play is looked at again later, as often as `LOOKS_PER_S` allows, and their logs are read.
- A turn: CPU of the process (its interpreter runs one thread at a time), CPU of the node's API servers, the answer and
  the environment's step (exponentially distributed), the screenshot to the file system.
- At its end the writer thread puts the attempt into the store.

Everything shared serves first come, first served. What is not here: GPUs (the answer's seconds are given), failures,
retries, and the network but for the file server's.
"""

from __future__ import annotations

import contextlib
import heapq
import random
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import count

LOOK_AGAIN_S, LOOKS_PER_S, SLOW_LOOK_S, SLOW_LOOKS_S = 0.5, 100.0, 0.1, 60.0
REFRESH_S, REFRESH_SHARE = 0.5, 20.0
"""As in `managed_vllm.agent.run` and `store`."""

Process = Generator["float | Thread | Node", float, None]
"""Yields the time at which it goes on, a thread that it wants to hold, or the node of which it wants a job."""


@dataclass(frozen=True)
class Storing:
    """An access to the file system: operations that a file server sees, kB; milliseconds and CPU on a local disk."""

    operations: float
    kb: float
    local_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Demand:
    """What a rollout asks for: milliseconds of CPU, accesses. `refresh` is of one writer's log, which has grown, and
    without what is read; that is `line_kb` for each attempt."""

    turn_cpu_ms: float
    api_server_ms: float
    claim: Storing
    look: Storing
    image: Storing
    attempt: Storing
    refresh: Storing
    line_kb: float


@dataclass(frozen=True)
class Files:
    """A file server: operations and bytes a second, and a round trip to it in seconds; without rates: local disks."""

    operations_per_s: float | None = None
    mb_per_s: float = 0.0
    round_trip_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """What is given. Seconds are means. `spread`: each process begins at a place of its own in the tasks."""

    nodes: int
    at_once: int
    rollouts: int
    turns: int
    model_s: float
    environment_s: float
    files: Files
    api_servers: int = 1
    spread: bool = False
    constant_model: bool = False
    seed: int = 0


class Shared:
    """Serves one after the other, in the order of time in which it is asked."""

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed
        self._free_at = 0.0
        self.busy_s = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When it is done."""
        self.busy_s += seconds / self._speed
        self._free_at = max(now, self._free_at) + seconds / self._speed
        return self._free_at


class Thread:
    """Is held by one at a time, for as long as that takes."""

    def __init__(self) -> None:
        self.held = False
        self.waiting: deque[Process] = deque()
        self.since = 0.0
        self.busy_s = 0.0


@dataclass
class Node:
    """One node's process."""

    order: Sequence[int]
    core: Shared
    api_server: Shared
    writer: Thread = field(default_factory=Thread)
    next: int = 0
    due: deque[int] = field(default_factory=deque)
    put_off: int = 0
    over: int = 0
    learnt: int = 0
    next_refresh: float = 0.0
    idle: list[Process] = field(default_factory=list)

    def take(self) -> int | None:
        """The next rollout to look at."""
        if self.next < len(self.order):
            self.next += 1
            return self.order[self.next - 1]
        return self.due.popleft() if self.due else None


@dataclass(frozen=True)
class Simulated:
    """What came of it. `filled_s`: when 19 of 20 places were first taken at once; None: never. `loads`: shares of the
    time until the last rollout was claimed, of the busiest of each kind."""

    took_s: float
    all_claimed_s: float
    filled_s: float | None
    looks: int
    loads: dict[str, float]


def _begun_at(tasks: range, begin: float) -> list[int]:
    """As `managed_vllm.agent.tasks.begun_at`."""
    first = int(begin * len(tasks))
    return [*tasks[first:], *tasks[:first]]


class Simulation:
    """One run of a cluster."""

    def __init__(self, given: Cluster, demand: Demand) -> None:
        self._given = given
        self._demand = demand
        self._files = Shared()
        draw = random.Random(given.seed)
        tasks = range(given.rollouts)
        self._nodes = [
            Node(
                _begun_at(tasks, draw.random() if given.spread else 0.0),
                Shared(),
                Shared(given.api_servers),
            )
            for _ in range(given.nodes)
        ]
        self._events: list[tuple[float, int, Process]] = []
        self._order = count()
        self._claimed: set[int] = set()
        self._finished: dict[int, int] = {}
        self._playing = self._looks = 0
        self._filled_s: float | None = None
        self._all_claimed_s = self._took_s = 0.0
        self._loads: dict[str, float] = {}

    def run(self) -> Simulated:
        """Until each process knows that all is over."""
        for _ in range(self._given.at_once):
            for node in self._nodes:
                self._start(0.0, self._worker(node))
        while self._events:
            now, _, process = heapq.heappop(self._events)
            self._go_on(now, process)
        return Simulated(self._took_s, self._all_claimed_s, self._filled_s, self._looks, self._loads)

    # -- time ----------------------------------------------------------------------------------------------------------

    def _start(self, now: float, process: Process) -> None:
        self._resume_at(next(process), process, now)

    def _go_on(self, now: float, process: Process) -> None:
        with contextlib.suppress(StopIteration):
            self._resume_at(process.send(now), process, now)

    def _resume_at(self, wish: float | Thread | Node, process: Process, now: float) -> None:
        if isinstance(wish, Thread):
            if wish.held:
                wish.waiting.append(process)
                return
            wish.held, wish.since, wish = True, now, now
        if isinstance(wish, Node):
            wish.idle.append(process)
        else:
            self._wake_at(wish, process)

    def _wake_at(self, when: float, process: Process) -> None:
        heapq.heappush(self._events, (when, next(self._order), process))

    def _release(self, now: float, thread: Thread) -> None:
        thread.busy_s += now - thread.since
        thread.held = bool(thread.waiting)
        if thread.held:
            thread.since = now
            self._wake_at(now, thread.waiting.popleft())

    # -- what processes do ---------------------------------------------------------------------------------------------

    def _worker(self, node: Node) -> Process:
        """Plays one rollout after the other, until its process knows that all have ended."""
        now = yield 0.0
        while node.over < self._given.rollouts:
            rollout = node.take()
            if rollout is None:
                now = yield node
                continue
            if self._is_known(node, rollout):
                self._known_over(node, now)
                continue
            asked = now
            now = yield node.writer
            ours = rollout not in self._claimed
            storing = self._demand.claim if ours else self._demand.look
            self._looks += not ours
            if ours:
                self._claim(rollout, now)
            now = yield node.core.serve(now, storing.cpu_ms / 1000)
            now = yield self._stored(now, storing)
            if not ours and now > node.next_refresh:
                began, learnt = now, len(self._finished)
                now = yield self._stored(now, self._refresh(learnt - node.learnt))
                node.learnt, node.next_refresh = learnt, now + max(REFRESH_S, REFRESH_SHARE * (now - began))
            self._release(now, node.writer)
            if not ours:
                self._again_later(node, rollout, now, min(now - asked, SLOW_LOOK_S))
                continue
            now = yield from self._play(node, rollout, now)
            self._known_over(node, now)

    def _play(self, node: Node, rollout: int, now: float) -> Generator[float | Thread | Node, float, float]:
        given, demand = self._given, self._demand
        draw = random.Random(given.seed << 32 | rollout)
        self._playing += 1
        if self._filled_s is None and self._playing >= 0.95 * given.at_once * given.nodes:
            self._filled_s = now
        for _ in range(given.turns):
            asked = node.core.serve(now, demand.turn_cpu_ms / 1000)
            asked = node.api_server.serve(asked, demand.api_server_ms / 1000)
            model = given.model_s if given.constant_model else draw.expovariate(1 / given.model_s)
            now = yield asked + model + draw.expovariate(1 / given.environment_s)
            now = yield self._stored(now, demand.image)
        now = yield node.writer
        now = yield node.core.serve(now, demand.attempt.cpu_ms / 1000)
        now = yield self._stored(now, demand.attempt)
        self._release(now, node.writer)
        self._playing -= 1
        self._finished[rollout] = len(self._finished)
        return now

    def _refresh(self, attempts: int) -> Storing:
        """Of all other writers' logs, which have so many attempts more."""
        one, others = self._demand.refresh, self._given.nodes - 1
        kb = self._demand.line_kb * attempts
        return Storing(others * one.operations, kb, others * one.local_ms, others * one.cpu_ms)

    def _stored(self, now: float, storing: Storing) -> float:
        """When it is done. Only to be asked at the very time: the file server serves all nodes in that order."""
        files = self._given.files
        if files.operations_per_s is None:
            return now + max(0.0, storing.local_ms - storing.cpu_ms) / 1000
        busy = storing.operations / files.operations_per_s + storing.kb / 1000 / files.mb_per_s
        return self._files.serve(now, busy) + storing.operations * files.round_trip_s

    def _claim(self, rollout: int, now: float) -> None:
        self._claimed.add(rollout)
        if len(self._claimed) == self._given.rollouts:
            self._all_claimed_s = now
            busy = {
                "process": max(node.core.busy_s for node in self._nodes),
                "writer thread": max(node.writer.busy_s for node in self._nodes),
                "API servers": max(node.api_server.busy_s for node in self._nodes),
                "file server": self._files.busy_s,
            }
            self._loads = {what: seconds / max(now, 1e-9) for what, seconds in busy.items()}

    def _is_known(self, node: Node, rollout: int) -> bool:
        return self._finished.get(rollout, self._given.rollouts) < node.learnt

    def _known_over(self, node: Node, now: float) -> None:
        node.over += 1
        if node.over == self._given.rollouts:
            self._took_s = max(self._took_s, now)

    def _again_later(self, node: Node, rollout: int, now: float, look_s: float) -> None:
        if self._is_known(node, rollout):
            self._known_over(node, now)
            return
        node.put_off += 1
        slow_s = min(2 * look_s * node.put_off, SLOW_LOOKS_S)
        self._start(now, self._put_due(node, rollout, now + max(LOOK_AGAIN_S, node.put_off / LOOKS_PER_S, slow_s)))

    def _put_due(self, node: Node, rollout: int, at: float) -> Process:
        now = yield at
        node.put_off -= 1
        node.due.append(rollout)
        if node.idle:
            self._wake_at(now, node.idle.pop())
