"""Two replicas of the demo model under 2,000 requests, while they are killed four times, and their router once.

    python benchmarks/replicas.py                   two minutes; on a CPU, or two GPUs
    python benchmarks/replicas.py --requests 200    the same in short

Half of the requests are our client's, by sessions of ten; the other half go through the router, by the OpenAI SDK as
anybody else has it, with five retries. All are screens of the demo model. First, without faults, each is asked for
once: how many requests of a session stay on one replica, and what the model answers. Then the same under load and
kills: right is the screen's right answer, or the one before, where the model errs; and how soon a killed one is back.
Without `pip install managed-vllm[router]` the second half goes by `llm.openai`, which is said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from managed_vllm import ManagedVLLM, RequestOutput, RestartPolicy, RetryPolicy, ServerState, demo
from managed_vllm.errors import ConfigError

THREADS = 8
PER_SESSION = 10
SCREENS = 400
BACK_S = 3.0
SHARE = 0.95


class Tally:
    """What came of the requests; counts wake those that wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.right = 0
        self.wrong: list[str] = []
        self.errors: list[str] = []

    def run(self, one: Callable[[], bool], what: str) -> None:
        """Makes one request and counts it."""
        try:
            is_right = one()
        except Exception as error:
            with self._changed:
                self.errors.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
                self._changed.notify_all()
            return
        with self._changed:
            self.right += is_right
            if not is_right:
                self.wrong.append(what)
            self._changed.notify_all()

    @property
    def count(self) -> int:
        """Requests that are over."""
        return self.right + len(self.wrong) + len(self.errors)

    def wait_for(self, count: int) -> None:
        """Until so many are over."""
        with self._changed:
            self._changed.wait_for(lambda: self.count >= count)


def pid_of(llm: ManagedVLLM, replica: int) -> int:
    """The replica's API server."""
    return llm.status().replicas[replica].server_pid or 0


def until(condition: Callable[[], Any], bound_s: float = 120.0) -> None:
    """Waits; raises `TimeoutError`."""
    deadline = time.monotonic() + bound_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def all_serve(llm: ManagedVLLM) -> bool:
    """Whether each replica is ready."""
    return all(one.state is ServerState.READY for one in llm.status().replicas)


def ask_once(llm: ManagedVLLM) -> tuple[float, list[str]]:
    """Each of the screens, in sessions of ten: the share of a session on one replica, and the answers."""

    def session(first: int) -> list[RequestOutput]:
        asked = [screen(number).messages() for number in range(first, first + PER_SESSION)]
        return [llm.chat(one, temperature=0, max_tokens=48, session_id=f"s{first}")[0] for one in asked]

    with ThreadPoolExecutor(4) as threads:
        sessions = list(threads.map(session, range(0, SCREENS, PER_SESSION)))
    shares = [max(Counter(one.epoch for one in outputs).values()) / PER_SESSION for outputs in sessions]
    return statistics.mean(shares), [one.outputs[0].text for outputs in sessions for one in outputs]


def screen(number: int) -> demo.Screen:
    """The screen that a request is about."""
    return demo.random_screen(random.Random(number % SCREENS))


@contextlib.contextmanager
def others(llm: ManagedVLLM) -> Iterator[tuple[Any, bool]]:
    """The SDK's client as anybody else has it, and whether it goes through the router."""
    import openai

    try:
        url = llm.base_url
    except ConfigError as error:
        print(f"no router, so llm.openai in its place: {error}", file=sys.stderr)
        yield llm.openai, False
    else:
        with openai.OpenAI(base_url=url, api_key=llm.api_key, max_retries=5) as client:
            yield client, True


def ask_all(llm: ManagedVLLM, sdk: Any, answers: list[str], tally: Tally, count: int) -> None:
    """Half of them by our client, half by the SDK."""

    def is_right(number: int, text: str) -> bool:
        return text == answers[number % SCREENS] or screen(number).is_right(text)

    def ours(number: int) -> bool:
        session = f"load {number // PER_SESSION}"
        output = llm.chat(screen(number).messages(), temperature=0, max_tokens=48, session_id=session)[0]
        return is_right(number, output.outputs[0].text)

    def theirs(number: int) -> bool:
        asked: Any = screen(number).messages()
        made = sdk.chat.completions.create(model=llm.model, messages=asked, temperature=0, max_tokens=48)
        return is_right(number, made.choices[0].message.content)

    def one(number: int) -> None:
        way = theirs if number % 2 else ours
        tally.run(lambda: way(number), f"{way.__name__} {number}")

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(one, range(count)))


def kill_all(llm: ManagedVLLM, tally: Tally, count: int, routed: bool) -> list[tuple[str, float]]:
    """Kills a replica after each sixth of the requests, in the middle the router: what, and in how many seconds it
    was back."""
    found = []
    for number, victim in enumerate((0, 1, None, 0, 1), 1):
        tally.wait_for(number * count // 6)
        until(lambda: all_serve(llm))
        if victim is not None:
            found.append((f"replica {victim}", kill_replica(llm, victim)))
        elif routed:
            found.append(("router", kill_router(llm)))
    return found


def kill_replica(llm: ManagedVLLM, victim: int) -> float:
    """Seconds until it is ready again."""
    before, killed_at = llm.status().epoch, time.time()
    os.kill(pid_of(llm, victim), signal.SIGKILL)
    until(lambda: llm.status().epoch > before and all_serve(llm))
    return (llm.status().replicas[victim].ready_at or 0.0) - killed_at


def kill_router(llm: ManagedVLLM) -> float:
    """Seconds until it answers again."""
    router = llm.status().router
    assert router is not None
    assert router.pid is not None
    began = time.monotonic()
    os.kill(router.pid, signal.SIGKILL)

    def is_back() -> bool:
        now = llm.status().router
        return now is not None and now.ready and now.restarts > router.restarts

    until(is_back)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    count = parser.parse_args().requests
    lasting = RestartPolicy(max_restarts=99, backoff_initial_s=0.01)
    with (
        ManagedVLLM("demo", replicas=2, keep_alive=0, restart=lasting, retry=RetryPolicy(max_deaths=9)) as llm,
        others(llm) as (sdk, routed),
    ):
        share, answers = ask_once(llm)
        tally, kills = Tally(), list[tuple[str, float]]()
        killer = threading.Thread(target=lambda: kills.extend(kill_all(llm, tally, count, routed)), daemon=True)
        began = time.monotonic()
        killer.start()
        ask_all(llm, sdk, answers, tally, count)
        seconds = time.monotonic() - began
        killer.join(180)
        serving = {one.epoch for one in llm.generate(["Screen:"] * 8, max_tokens=1)}
        both = all_serve(llm) and len(serving) == 2
    came = f"{tally.right} right, {len(tally.wrong)} wrong, {len(tally.errors)} errors"
    print(f"{count} requests in {seconds:.1f} s: {came}")
    for line in [*tally.errors, *tally.wrong][:10]:
        print(f"  {line}")
    print(f"of a session's requests on one replica, without faults: {100 * share:.1f} %; target ≥ {100 * SHARE:.0f} %")
    for what, back_s in kills:
        print(f"{what:10} killed, and back after {back_s:.2f} s; target ≤ {BACK_S:g} s")
    print(f"both serve at the end: {'yes' if both else 'NO'}")
    enough = len(kills) == 4 + routed and all(back_s <= BACK_S for what, back_s in kills if what != "router")
    met = tally.right == count and share >= SHARE and both and enough
    print("met" if met else "NOT met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
