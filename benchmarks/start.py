"""How long a server takes to start, and to be back: by hand, cold, with the warm image there, after a kill.

    python benchmarks/start.py                       five rounds: ten minutes on an idle machine
    python benchmarks/start.py --rounds 1            a look
    python benchmarks/start.py --warm-starts 500     only that: how many of so many warm starts hang
    python benchmarks/start.py --model FOLDER --engine '{"load_format": "dummy", "enforce_eager": true}' --recovery 0.6
                                                     another model, on a GPU: `gpu_start.sh` does it for two

What is measured, and the targets, stand in benchmarks/README.md. Everything runs in a state directory of its own, and
every process that is started here is ended here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from attach import own_state_directory, wait_until_gone

from managed_vllm import ManagedVLLM, RestartPolicy
from managed_vllm.config import ServerSpec, installed_vllm
from managed_vllm.instance import cleanup, directory
from managed_vllm.server import gpu_memory

COLD, WARM, RECOVERY, MEMORY = 0.45, 0.10, 0.10, 0.75
"""The targets, as shares of what vLLM by hand takes."""
TOLERANCE = 1e-3
"""Of logprobs: a forked server's against a spawned one's."""

_LIMIT_S = 600.0
_IN_FLIGHT = 64
_LOOKS = 10
_ALWAYS = RestartPolicy(max_restarts=1_000_000, backoff_initial_s=0.0)
"""The kills of a benchmark are no crash loop."""

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Served:
    """Which model is started, with which of vLLM's engine arguments."""

    model: str
    engine: dict[str, Any]

    def handle(self, **more: Any) -> ManagedVLLM:
        return ManagedVLLM(self.model, keep_alive=0, progress=False, restart=_ALWAYS, **more, **self.engine)

    def spec(self) -> ServerSpec:
        return ServerSpec.of(self.model, engine_args=self.engine)


def round_of_starts(served: Served, values: Values) -> None:
    """One round of everything; each measurement is added to its row."""
    hand = by_hand(served)
    values["by hand: /health"].append(hand.health_s)
    values["by hand: first token"].append(hand.token_s)
    values["by hand: CPU"].append(hand.cpu_s)
    values["by hand: memory"].append(hand.memory_mib)
    started = time.perf_counter()
    with served.handle(warm=True) as llm:
        values["cold"].append(time.perf_counter() - started)
        values["cold: CPU"].append(sum(map(cpu_seconds, processes_of(llm))))
        wait_until_learnt(llm)
        values["warm: restart()"].append(seconds(llm.restart))
        status = llm.status()
        assert status.ready_at is not None
        values["warm: from the launch to ready"].append(status.ready_at - status.started_at)
        server = processes_of(llm)
        values["warm: CPU"].append(sum(map(cpu_seconds, server)))
        values["memory of server and image"].append(sum(map(memory_mib, [*server, *image_of(llm)])))
        values["memory of the image"].append(sum(map(memory_mib, image_of(llm))))
        assert llm.id is not None
        values["warm: managed-vllm restart"].append(seconds(lambda: restart_by_command(str(llm.id))))
        for victim in named(llm):
            values[f"kill {victim}: first new answer"].append(killed(llm, victim))
        instance = directory.Instance(directory.state_home(), llm.id)
    wait_until_gone(instance)


# -- by hand -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HandStart:
    """vLLM started by hand: seconds from its launch, seconds of CPU time, MiB (PSS) of all its processes."""

    health_s: float
    token_s: float
    cpu_s: float
    memory_mib: float


def by_hand(served: Served) -> HandStart:
    """Starts vLLM without us: `/health` is asked every 50 ms, then a completion of one token.

    The command and the environment are those of `ManagedVLLM` without what is ours: no middleware, no extension of the
    Workers, no sitecustomize, no marker.
    """
    spec = served.spec()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = spec.argv(host="127.0.0.1", port=port, uds=None)
    for ours in ("--middleware", "--worker-extension-cls"):
        at = argv.index(ours)
        del argv[at : at + 2]
    key = secrets.token_urlsafe(32)
    environment = {**os.environ, **spec.env, "VLLM_API_KEY": key, "PYTHONUNBUFFERED": "1"}
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", trust_env=False, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )
    with tempfile.TemporaryFile() as log, client:
        started = time.perf_counter()
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        try:
            while not _is_healthy(client):
                if process.poll() is not None or time.perf_counter() - started > _LIMIT_S:
                    log.seek(0)
                    raise SystemExit(f"vLLM by hand did not come up:\n{log.read()[-4000:].decode(errors='replace')}")
                time.sleep(0.05)
            health_s = time.perf_counter() - started
            body = {"model": spec.served_model_name, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
            client.post("/v1/completions", json=body).raise_for_status()
            token_s = time.perf_counter() - started
            server = tree_of(process.pid)
            return HandStart(health_s, token_s, sum(map(cpu_seconds, server)), sum(map(memory_mib, server)))
        finally:
            end_group(process)


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, ten seconds, then SIGKILL for the whole group and every descendant; returns when all are gone."""
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    cleanup.end_processes(descendants)


# -- ours --------------------------------------------------------------------------------------------------------------


def killed(llm: ManagedVLLM, victim: str) -> float:
    """Seconds from SIGKILL for one of the processes, under 64 requests, to the first answer of the next epoch."""
    epoch = llm.status().epoch
    load = under_load(llm)
    target = named(llm)[victim]
    at = time.perf_counter()
    target.kill()
    (output,) = llm.generate(["And now?"], max_tokens=1)
    took = time.perf_counter() - at
    assert llm.status().epoch == epoch + 1, (llm.status().epoch, epoch, output)
    load.join()
    wait_until_learnt(llm)
    return took


def under_load(llm: ManagedVLLM) -> threading.Thread:
    """The thread of so many requests, all of which are being generated by now."""
    prompts = [f"Request {number}: " for number in range(_IN_FLIGHT)]
    for _ in range(_LOOKS):
        load = threading.Thread(
            target=lambda: llm.generate(prompts, max_tokens=1000, ignore_eos=True, temperature=0), daemon=True
        )
        load.start()
        if all_run(llm, load):
            return load
    raise SystemExit("the requests were never seen to run all at once")


def all_run(llm: ManagedVLLM, load: threading.Thread) -> bool:
    """Waits until all the requests are being generated. False: they are done, and we were not let in to see it."""
    connection = llm.status().connection
    assert connection is not None
    root = connection.base_url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {connection.api_key.reveal()}"}
    while load.is_alive():
        for line in httpx.get(f"{root}/metrics", headers=headers, trust_env=False, timeout=60).text.splitlines():
            if line.startswith("vllm:num_requests_running") and float(line.rsplit(" ", 1)[1]) >= _IN_FLIGHT:
                return True
        time.sleep(0.02)
    return False


def wait_until_learnt(llm: ManagedVLLM) -> None:
    """Until the image has nothing more to import for the server that is ready."""
    assert llm.id is not None
    log = directory.Instance(directory.state_home(), llm.id).supervisor_log
    deadline = time.monotonic() + 60
    while log.read_text().count("more modules") < llm.status().epoch and time.monotonic() < deadline:
        time.sleep(0.05)


def restart_by_command(instance_id: str) -> None:
    subprocess.run([sys.executable, "-m", "managed_vllm.cli", "restart", instance_id], check=True, capture_output=True)


def answers(served: Served, *, warm: bool) -> list[tuple[list[int], list[float]]]:
    """Ids and logprobs of some greedy answers, of a server that was forked, or spawned."""
    with served.handle(warm=warm) as llm:
        assert llm.status().launch == ("forked" if warm else "plain")
        prompts = [f"Count to {number}: " for number in range(16)]
        outputs = llm.generate(prompts, max_tokens=32, ignore_eos=True, temperature=0, logprobs=0)
        found = []
        for output in outputs:
            (answer,) = output.outputs
            ids = list(answer.token_ids)
            steps = zip(ids, answer.logprobs or [], strict=True)
            found.append((ids, [step[token].logprob for token, step in steps]))
        assert llm.id is not None
        instance = directory.Instance(directory.state_home(), llm.id)
    wait_until_gone(instance)
    return found


def compare_answers(served: Served) -> None:
    """A forked server's answers against a spawned one's. Exits with 1 if they differ."""
    plain, forked = answers(served, warm=False), answers(served, warm=True)
    far = max(abs(a - b) for one, two in zip(plain, forked, strict=True) for a, b in zip(one[1], two[1], strict=True))
    same = [ids for ids, _ in plain] == [ids for ids, _ in forked]
    print(f"answers of a forked server: ids {'equal' if same else 'DIFFER'}, logprobs within {far:g}", flush=True)
    if not same or far > TOLERANCE:
        raise SystemExit(1)


def warm_starts(served: Served, count: int) -> None:
    """So many restarts, each after SIGKILL of the API server; prints how long they took, and what hung."""
    took = []
    with served.handle(warm=True) as llm:
        wait_until_learnt(llm)
        for number in range(1, count + 1):
            epoch = llm.status().epoch
            named(llm)["APIServer"].kill()
            status = llm.wait_ready(_LIMIT_S, after_epoch=epoch)
            assert status.launch == "forked", status.launch
            assert status.ready_at is not None
            took.append(status.ready_at - status.started_at)
            if number % 50 == 0:
                print(f"{number} warm starts, none hung: {described(took)}", flush=True)
        for image in image_of(llm):
            print(
                f"the image: {memory_mib(image):.0f} MiB, {image.num_fds()} descriptors, {cpu_seconds(image):.1f} s CPU"
            )
        assert llm.id is not None
        instance = directory.Instance(directory.state_home(), llm.id)
    wait_until_gone(instance)


# -- processes ---------------------------------------------------------------------------------------------------------


def tree_of(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def processes_of(llm: ManagedVLLM) -> list[psutil.Process]:
    pid = llm.status().server_pid
    assert pid is not None
    return tree_of(pid)


def image_of(llm: ManagedVLLM) -> list[psutil.Process]:
    pid = llm.status().image_pid
    return [] if pid is None else [psutil.Process(pid)]


def named(llm: ManagedVLLM) -> dict[str, psutil.Process]:
    """API server, EngineCore and the first Worker, each the child of the one before; one GPU has no Worker."""
    server = processes_of(llm)[0]
    found = {"APIServer": server}
    for parent, name in (("APIServer", "EngineCore"), ("EngineCore", "Worker")):
        children = [p for p in found[parent].children() if "resource_tracker" not in " ".join(p.cmdline())]
        if children:
            found[name] = children[0]
    return found


def cpu_seconds(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def memory_mib(process: psutil.Process) -> float:
    """PSS: a page that several processes share counts in parts."""
    return float(process.memory_full_info().pss) / 2**20


def seconds(what: Callable[[], Any]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


# -- the table ---------------------------------------------------------------------------------------------------------


def described(values: list[float]) -> str:
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def show(values: Values, recovery: float) -> None:
    """Least, median and most of each row; and the medians as shares of vLLM's by hand, with the targets."""
    hand = statistics.median(values["by hand: first token"])
    hand_cpu, hand_memory = statistics.median(values["by hand: CPU"]), statistics.median(values["by hand: memory"])
    print(f"\n{'':38} {'least / median / most':>26}   of by hand")
    for name, row in values.items():
        median = statistics.median(row)
        base = hand_memory if "memory" in name else hand_cpu if "CPU" in name else hand
        aims = {"cold": COLD, "memory of server and image": MEMORY, "warm: from the launch to ready": WARM}
        aim = recovery if name.startswith("kill") else aims.get(name)
        verdict = "" if aim is None else f"   ≤ {aim:.2f} {'met' if median / base <= aim else 'NOT MET'}"
        print(f"{name:38} {described(row):>26}   {median / base:.3f}{verdict}")


def groups_by_session() -> bool:
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: %(default)s)")
    parser.add_argument("--warm-starts", type=int, metavar="N", help="only so many warm starts after a kill")
    parser.add_argument("--model", default="demo", help="what is served (default: %(default)s)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="vLLM's engine arguments for it")
    parser.add_argument("--recovery", type=float, default=RECOVERY, help="the target of recoveries (%(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    given = parser.parse_args()
    served = Served(given.model, given.engine)
    if installed_vllm() == "vllm missing":
        raise SystemExit("vLLM is missing")
    print(f"{installed_vllm()}, Python {platform.python_version()}, Linux {platform.release()}, "
          f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    if groups_by_session():
        print(
            "the scheduler groups processes by session (sched_autogroup_enabled): see benchmarks/README.md", flush=True
        )
    with own_state_directory():
        if given.warm_starts:
            return warm_starts(served, given.warm_starts)
        values: Values = defaultdict(list)
        by_hand(served)  # fills the page cache, and vLLM's own
        before = gpu_memory.used_memory(None)
        for number in range(1, given.rounds + 1):
            round_of_starts(served, values)
            print(f"round {number} of {given.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
        if before is not None:
            held = gpu_memory.wait_until_released(before, set(), None, 30.0)
            print(f"GPU memory: {held or 'all of it is back'}", flush=True)
        compare_answers(served)
    show(values, given.recovery)
    if given.json:
        given.json.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
