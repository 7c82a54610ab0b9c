"""`replicas=2` against vLLM's own `data_parallel_size=2`, and against one server: the demo model, the same load.

    python benchmarks/data_parallel.py              two minutes; on a CPU, or two GPUs
    python benchmarks/data_parallel.py --rounds 1   the same in short

Of each: how long a cold start takes, what memory the supervisor has and all that it has started (PSS), generated
tokens a second with 32 sessions at once, whose prompts grow from turn to turn, and the share of the prompts'
tokens that the prefix cache had. Then one engine is killed under the same load: requests that failed, that were sent
again, the longest time in which nobody got an answer, and when all engines were back.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil
from attach import own_state_directory

from managed_vllm import ManagedVLLM, RequestOutput, RestartPolicy, RetryPolicy, ServerState

SESSIONS, TURNS, GROWTH, ANSWER = 32, 8, 160, 32
VOCABULARY = range(100, 400)
WAYS: dict[str, dict[str, Any]] = {
    "one server": {},
    "`replicas=2`": {"replicas": 2},
    "`data_parallel_size=2`": {"data_parallel_size": 2},
}


@dataclass(frozen=True)
class Load:
    """What came of a round: when each request ended (monotonic), what failed, what was sent again."""

    seconds: float
    tokens: int
    ends: tuple[float, ...]
    failed: tuple[str, ...]
    again: int


def load(llm: ManagedVLLM, seed: int, ended: threading.Semaphore | None = None) -> Load:
    """Sessions at once, each turn's prompt the last one, its answer and more; a session ends with its first error."""
    ends, failed = list[float](), list[str]()
    again = 0

    def session(number: int) -> int:
        nonlocal again
        chance = random.Random(seed * SESSIONS + number)
        prompt: list[int] = []
        tokens = 0
        for _ in range(TURNS):
            prompt += chance.choices(VOCABULARY, k=GROWTH)
            try:
                output = _ask(llm, prompt, f"{seed}-{number}")
            except Exception as error:
                failed.append(f"{type(error).__name__}: {str(error)[:200]}")
                break
            ends.append(time.monotonic())
            again += output.attempts > 1
            tokens += len(output.outputs[0].token_ids)
            prompt += output.outputs[0].token_ids
            if ended is not None:
                ended.release()
        return tokens

    began = time.monotonic()
    with ThreadPoolExecutor(SESSIONS) as threads:
        tokens = sum(threads.map(session, range(SESSIONS)))
    return Load(time.monotonic() - began, tokens, tuple(sorted(ends)), tuple(failed), again)


def _ask(llm: ManagedVLLM, prompt: list[int], session: str) -> RequestOutput:
    params = {"max_tokens": ANSWER, "ignore_eos": True, "temperature": 0}
    return llm.generate({"prompt_token_ids": list(prompt)}, params, session_id=session)[0]


def processes_of(llm: ManagedVLLM) -> list[psutil.Process]:
    """The supervisor, and what it has started."""
    supervisor = psutil.Process(llm.status().supervisor_pid or 0)
    return [supervisor, *supervisor.children(recursive=True)]


def engines_of(llm: ManagedVLLM) -> list[psutil.Process]:
    """Each EngineCore."""
    return [one for one in processes_of(llm) if any("EngineCore" in word for word in one.cmdline()[:1])]


def hits(llm: ManagedVLLM) -> tuple[int, int]:
    """Prompt tokens that were looked up in the prefix cache so far, and found."""
    found = llm.metrics()
    return found.prefix_cache_queries or 0, found.prefix_cache_hits or 0


@dataclass(frozen=True)
class Killed:
    """What the kill of one engine did."""

    failed: tuple[str, ...]
    again: int
    gap_s: float
    back_s: float


def kill(llm: ManagedVLLM, seed: int) -> Killed:
    """Kills an engine after a third of the requests."""
    ended = threading.Semaphore(0)
    made: list[Load] = []
    engines = len(engines_of(llm))
    loading = threading.Thread(target=lambda: made.append(load(llm, seed, ended)))
    loading.start()
    for _ in range(SESSIONS * TURNS // 3):
        ended.acquire()
    epoch, at = llm.status().epoch, time.monotonic()
    os.kill(engines_of(llm)[0].pid, signal.SIGKILL)
    while not _all_back(llm, epoch, engines):
        if time.monotonic() - at > 180:
            raise TimeoutError("the engines did not come back")
        time.sleep(0.02)
    back = time.monotonic() - at
    loading.join()
    times = [at, *(end for end in made[0].ends if end > at)]
    return Killed(made[0].failed, made[0].again, max(after - before for before, after in pairwise(times)), back)


def _all_back(llm: ManagedVLLM, epoch: int, engines: int) -> bool:
    status = llm.status()
    ready = all(one.state is ServerState.READY for one in status.replicas or (status,))
    return ready and status.epoch > epoch and len(engines_of(llm)) == engines


def measured(options: dict[str, Any], rounds: int) -> list[str]:
    """A row of the table."""
    lasting = RestartPolicy(max_restarts=99, backoff_initial_s=0.01)
    began = time.monotonic()
    with ManagedVLLM("demo", keep_alive=0, restart=lasting, retry=RetryPolicy(max_deaths=9), **options) as llm:
        start = time.monotonic() - began
        load(llm, 0)  # what is done once
        before = hits(llm)
        rates = [made.tokens / made.seconds for made in (load(llm, 1 + number) for number in range(rounds))]
        after = hits(llm)
        memory = sum(one.memory_full_info().pss for one in processes_of(llm)) / 2**20
        count = len(engines_of(llm))
        killed = kill(llm, 1 + rounds)
    share = (after[1] - before[1]) / max(1, after[0] - before[0])
    for line in killed.failed[:3]:
        print(f"  failed: {line}", file=sys.stderr)
    return [
        str(count),
        f"{start:.1f} s",
        f"{memory:.0f} MiB",
        f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})",
        f"{100 * share:.0f} %",
        f"{len(killed.failed)}, {killed.again}",
        f"{killed.gap_s:.1f} s",
        f"{killed.back_s:.1f} s",
    ]


HEAD = (
    "engines",
    "start",
    "memory",
    "tokens/s",
    "prefix-cache hits",
    "failed, sent again",
    "no answer for",
    "all back",
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the load without faults (%(default)s)")
    rounds = parser.parse_args(words).rounds
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(" | ".join(("", *HEAD)))
    with own_state_directory():
        with ManagedVLLM("demo", keep_alive=0):
            pass  # what the first start reads is in the page cache for all
        for name, options in WAYS.items():
            print(" | ".join((name, *measured(options, rounds))), flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
