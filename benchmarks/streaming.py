"""What it costs to read a generation as a stream, so that it can be resumed, against waiting for the whole of it.

What is measured, and what follows from it, stands in benchmarks/README.md and at
`managed_vllm.request.resume.RESUME_FROM`.
Variants take turns, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from attach import STAND_IN, own_state_directory

from managed_vllm import ManagedVLLM, demo
from managed_vllm.config import installed_vllm


@dataclass
class Run:
    """One batch. CPU times in microseconds per generated token; the engine's contain the model itself."""

    variant: str
    tokens_per_s: float
    client_us: float
    api_server_us: float
    engine_us: float


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run(llm: ManagedVLLM, variant: str, interval: int | None, in_flight: int, tokens: int) -> Run:
    pid = llm.status().server_pid
    assert pid is not None
    api_server = psutil.Process(pid)
    below = api_server.children(recursive=True)
    prompts = [[5 + number, 6, 7, 8] for number in range(in_flight)]
    params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    options: dict[str, Any] = {"resume": False} if interval is None else {"resume": True, "stream_interval": interval}
    before = time.perf_counter(), time.process_time(), cpu_s(api_server), sum(map(cpu_s, below))
    outputs = llm.generate(prompts, params, **options)
    after = time.perf_counter(), time.process_time(), cpu_s(api_server), sum(map(cpu_s, below))
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert generated == in_flight * tokens
    wall, client, server, engine = (b - a for a, b in zip(before, after, strict=True))
    each = 1e6 / generated
    return Run(variant, generated / wall, client * each, server * each, engine * each)


def show(runs: list[Run]) -> None:
    print(f"\n{'':24} {'tokens/s':>10} {'least':>8} {'most':>8} {'client':>10} {'API server':>11} {'engine':>10}")
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        speeds = [run.tokens_per_s for run in mine]
        cpu = [statistics.median(getattr(run, name) for run in mine) for name in ("client_us", "api_server_us")]
        engine = statistics.median(run.engine_us for run in mine)
        print(
            f"{variant:24} {statistics.median(speeds):10.0f} {min(speeds):8.0f} {max(speeds):8.0f} "
            f"{cpu[0]:7.0f} µs {cpu[1]:8.0f} µs {engine:7.0f} µs"
        )


def main() -> None:
    real = demo.weights_path().is_dir() and installed_vllm() != "vllm missing"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = "demo" if real else "stand-in"
    parser.add_argument("--server", choices=("demo", "stand-in"), default=default, help="default here: %(default)s")
    parser.add_argument("--in-flight", type=int, default=32, help="requests at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="batches per variant (default: %(default)s)")
    parser.add_argument("--intervals", type=int, nargs="*", default=[1, 8, 32], help="tokens per event")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    arguments = parser.parse_args()

    options: dict[str, Any] = {"model": "demo"}
    if arguments.server == "stand-in":
        options = {"model": "stand-in", "command": [sys.executable, str(STAND_IN), "{args}"]}
    machine = {
        "server": arguments.server,
        "vllm": installed_vllm(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    variants: list[tuple[str, int | None]] = [("whole", None)]
    variants += [(f"streamed, {interval} per event", interval) for interval in arguments.intervals]
    runs = []
    with own_state_directory(), ManagedVLLM(**options, progress=False, keep_alive=0) as llm:
        for variant, interval in variants:  # not counted
            run(llm, variant, interval, arguments.in_flight, 16)
        for _ in range(arguments.rounds):
            runs += [run(llm, *variant, arguments.in_flight, arguments.tokens) for variant in variants]
    show(runs)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "runs": [asdict(run) for run in runs]}, indent=1))


if __name__ == "__main__":
    main()
