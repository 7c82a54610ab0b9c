"""What an answer costs the API server and the client: each prompt in a request of its own, and together with others.

    python benchmarks/throughput.py                          the demo model (a minute or two)
    python benchmarks/throughput.py --sizes 1 4 8 16 32      how the cost depends on the size of the groups
    python benchmarks/throughput.py --routes                 token ids with long answers: text against token ids
    python benchmarks/throughput.py --in-process             besides, tokens per second of vllm.LLM in a process

The same prompts with the same parameters, in turns, so that a change of the machine's load meets all variants. CPU
times are user and system, of the process alone; the ratios are to one prompt a request, made within a round. Medians
are shown; what follows from them stands in benchmarks/README.md and at `managed_vllm.request.groups`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from attach import own_state_directory
from streaming import cpu_s

from managed_vllm import ManagedVLLM, demo
from managed_vllm.config import installed_vllm
from managed_vllm.request import groups

CASES = [(tokens, logprobs) for tokens in (8, 32, 128) for logprobs in (None, 1)]
NAMES = ("server_ms", "client_ms", "wall_s")


@dataclass
class Run:
    """One call. `server_ms` and `client_ms` are CPU time for each prompt, `wall_s` is of the whole call."""

    together: int
    tokens: int
    logprobs: int | None
    server_ms: float
    client_ms: float
    wall_s: float


def prompts(count: int, first: int) -> list[list[int]]:
    return [[first, 5 + number % 200, 5 + number // 200] for number in range(count)]


def params(tokens: int, logprobs: int | None) -> dict[str, Any]:
    given = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return given if logprobs is None else {**given, "logprobs": logprobs}


def run(llm: ManagedVLLM, count: int, together: int, tokens: int, logprobs: int | None, first: int) -> Run:
    """`first` is the first token of the prompts: so that none is in the cache."""
    groups.MOST = together
    return replace(_measured(llm, count, params(tokens, logprobs), first), together=together)


def _measured(llm: ManagedVLLM, count: int, given: dict[str, Any], first: int) -> Run:
    pid = llm.status().server_pid
    assert pid is not None
    api_server, tokens = psutil.Process(pid), given["max_tokens"]
    before = _now(api_server)
    outputs = llm.generate(prompts(count, first), given)
    wall, client, server = (b - a for a, b in zip(before, _now(api_server), strict=True))
    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
    return Run(1, tokens, given.get("logprobs"), server * 1e3 / count, client * 1e3 / count, wall)


def show_routes(llm: ManagedVLLM, count: int, rounds: int) -> None:
    """What 192 tokens cost by `/v1/completions` with and without the text taken, and by `/inference/v1/generate`.

    For the second the client is told that the server lacks the other route, and takes the texts out itself.
    """
    print(f"\n{'logprobs':>9}{'by':>24}{'API server':>14}{'client':>12}{'tokens/s':>11}")
    found: dict[tuple[int | None, str], list[Run]] = {}
    routes = llm.async_client.sender.routes
    for turn in range(rounds):
        for logprobs in (None, 0, 1):
            for by, has_tokens in (("text", None), ("text, taken out", False), ("tokens", None)):
                routes.has_tokens = has_tokens
                given = {**params(192, logprobs), "detokenize": by == "text"}
                found.setdefault((logprobs, by), []).append(_measured(llm, count, given, 400 + 10 * turn))
    for (logprobs, by), runs in found.items():
        server, client, wall = (statistics.median(getattr(one, name) for one in runs) for name in NAMES)
        print(f"{logprobs!s:>9}{by:>24}{server:11.2f} ms{client:9.2f} ms{count * 192 / wall:11.0f}", flush=True)


def _now(api_server: psutil.Process) -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), cpu_s(api_server)


def show_heads() -> None:
    print(f"\n{'':27}{'CPU of a prompt':>22}{'of 1,000 tokens':>22}{'':>10}  ratios to one a request")
    heads = ("tokens", "logprobs", "together", "API server", "client", "API server", "client", "tokens/s")
    print("".join(f"{head:>9}" if len(head) < 9 else f"{head:>13}" for head in heads), " API server, client, time")


def show(case: Sequence[Run], count: int) -> None:
    """A line for each size of the groups."""
    alone = [one for one in case if one.together == 1]
    for together in dict.fromkeys(one.together for one in case):
        mine = [one for one in case if one.together == together]
        server, client, wall = (statistics.median(getattr(one, name) for one in mine) for name in NAMES)
        tokens = mine[0].tokens
        each = f"{server:10.2f} ms{client:6.2f} ms{server * 1e3 / tokens:10.0f} ms{client * 1e3 / tokens:6.0f} ms"
        ratios = "".join(f"{ratio:7.2f}" for ratio in _ratios(mine, alone))
        print(f"{tokens:9}{mine[0].logprobs!s:>9}{together:9}{each}{count * tokens / wall:9.0f} {ratios}", flush=True)


def _ratios(mine: Sequence[Run], alone: Sequence[Run]) -> list[float]:
    pairs = list(zip(mine, alone, strict=True))
    return [statistics.median(getattr(one, name) / getattr(other, name) for one, other in pairs) for name in NAMES]


IN_PROCESS = """if True:
    import json, sys, time
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        arguments, cases = json.loads(sys.argv[1])
        llm = LLM(**arguments)
        for prompts, params in cases:
            prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
            before = time.perf_counter()
            outputs = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
            took = time.perf_counter() - before
            print("tokens/s", sum(len(one.outputs[0].token_ids) for one in outputs) / took)
"""


def show_in_process(count: int) -> None:
    """tokens/s of `vllm.LLM` for the same; its first call is not counted."""
    options = {**demo.engine_defaults(), "model": str(demo.weights_path())}
    cases = [(prompts(count, 300 + n), params(*case)) for n, case in enumerate([CASES[0], *CASES])]
    words = [sys.executable, "-c", IN_PROCESS, json.dumps([options, cases])]
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    speeds = [float(line.split()[1]) for line in said.splitlines() if line.startswith("tokens/s ")]
    for (tokens, logprobs), speed in zip(CASES, speeds[1:], strict=True):
        print(f"vllm.LLM in a process: {tokens} tokens, logprobs {logprobs}: {speed:.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[groups.MOST], help="prompts together (default: 32)")
    parser.add_argument("--prompts", type=int, default=256, help="prompts of a call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="calls per variant (default: %(default)s)")
    parser.add_argument("--routes", action="store_true", help="only: 192 tokens by each route of generate()")
    parser.add_argument("--in-process", action="store_true", help="vllm.LLM, too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    arguments = parser.parse_args()
    machine = {
        "vllm": installed_vllm(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    if arguments.routes:
        with own_state_directory(), ManagedVLLM("demo", progress=False, keep_alive=0) as llm:
            _measured(llm, 64, params(8, 1), 5)  # not counted
            return show_routes(llm, arguments.prompts, arguments.rounds)
    sizes = dict.fromkeys([1, *arguments.sizes])
    runs: list[Run] = []
    show_heads()
    with own_state_directory(), ManagedVLLM("demo", progress=False, keep_alive=0) as llm:
        run(llm, 64, groups.MOST, 8, 1, 5)  # not counted; and the client knows the server by then
        for case in CASES:
            rounds = range(arguments.rounds)
            runs += [run(llm, arguments.prompts, size, *case, 6 + turn) for turn in rounds for size in sizes]
            show(runs[-len(sizes) * arguments.rounds :], arguments.prompts)
    if arguments.in_process:
        show_in_process(arguments.prompts)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "runs": [asdict(run) for run in runs]}, indent=1))


if __name__ == "__main__":
    main()
