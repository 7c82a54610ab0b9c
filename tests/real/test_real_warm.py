"""The warm image and the real vLLM: a forked server is what a spawned one is, and says what a spawned one says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import eventually, is_live, own_state, tree

from managed_vllm import ManagedVLLM, RestartPolicy, in_server
from managed_vllm.demo.random_vlm import make_random_vlm
from managed_vllm.instance import directory

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PROMPTS = [f'Screen:\nCancel({n},77)\nOK({3 * n},525)\nStatus: ready\nTask: click "OK"' for n in range(40, 140, 10)]
AT_ONCE = RestartPolicy(max_restarts=100, backoff_initial_s=0.0)


@dataclass
class Facts:
    """What one server says and is."""

    launch: str
    greedy: list[Any] = field(default_factory=list)
    seeded: list[Any] = field(default_factory=list)
    of_itself: list[str] = field(default_factory=list)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: int = 0


def facts_of(llm: ManagedVLLM) -> Facts:
    facts = Facts(llm.status().launch)
    facts.greedy = answers(llm, temperature=0, logprobs=5)
    facts.seeded = answers(llm, temperature=1.0, seed=7, logprobs=0)
    facts.of_itself = [said(llm, pattern) for pattern in (r"non-default args: .*", r"Initializing a V1 LLM engine .*")]
    processes = tree(llm)
    facts.processes = {name: facts_of_process(process) for name, process in processes.items()}
    facts.memory = sum(process.memory_full_info().pss for process in processes.values())
    return facts


def answers(llm: ManagedVLLM, **sampling: Any) -> list[Any]:
    found = []
    for output in llm.generate(PROMPTS, max_tokens=24, ignore_eos=True, **sampling):
        completion = output.outputs[0]
        logprobs = [[(token, entry.logprob) for token, entry in step.items()] for step in completion.logprobs or []]
        found.append((list(completion.token_ids), logprobs))
    return found


def said(llm: ManagedVLLM, pattern: str) -> str:
    """What the server has said of its configuration; the port and the folders of each server are its own."""
    found = re.search(pattern, llm.logs(2000))
    assert found is not None, pattern
    return re.sub(r"'port': \d+|mvllm-\w+", "…", found[0])


def facts_of_process(process: psutil.Process) -> dict[str, Any]:
    """What the kernel knows of a process, as far as it says how it was started."""
    status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE))
    threads = [tuple(sorted(cpus)) for cpus in cpus_of_threads(process)]
    libraries = Path(f"/proc/{process.pid}/maps").read_text()
    return {
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "umask": status["Umask"],
        "nice": process.nice(),
        "cpus of its threads": sorted(set(threads)),
        "OpenMP": sorted(set(re.findall(r"libgomp\S*", libraries))),
        "input": os.readlink(f"/proc/{process.pid}/fd/0"),
    }


def cpus_of_threads(process: psutil.Process) -> Iterator[set[int]]:
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            yield os.sched_getaffinity(thread.id)


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Facts, Facts]]:
    """A spawned server, and one that was forked from an image that has learnt."""
    with own_state(), ManagedVLLM("demo", keep_alive=0, warm=False) as llm:
        plain = facts_of(llm)
    with own_state() as home, ManagedVLLM("demo", keep_alive=0, warm=True, restart=AT_ONCE) as llm:
        (instance,) = directory.instances(home)
        eventually(lambda: "more modules" in instance.supervisor_log.read_text(), "learnt")
        llm.restart()
        yield plain, facts_of(llm)


def test_ids_and_logprobs_are_the_same_to_the_last_bit(both: tuple[Facts, Facts]) -> None:
    plain, forked = both
    assert (plain.launch, forked.launch) == ("plain", "forked")
    assert forked.greedy == plain.greedy
    assert forked.seeded == plain.seeded


def test_the_server_says_the_same_of_its_configuration(both: tuple[Facts, Facts]) -> None:
    plain, forked = both
    assert forked.of_itself == plain.of_itself


def test_each_process_is_as_a_spawned_one(both: tuple[Facts, Facts]) -> None:
    plain, forked = both
    assert forked.processes == plain.processes


def test_the_processes_share_what_was_imported(both: tuple[Facts, Facts]) -> None:
    plain, forked = both
    assert forked.memory < plain.memory


@pytest.mark.parametrize(
    "victim", ["EngineCore", *(pytest.param(name, marks=pytest.mark.soak) for name in ("APIServer", "Worker"))]
)
def test_the_end_of_any_process_is_the_end_of_all_and_the_next_is_forked(home: Path, victim: str) -> None:
    with ManagedVLLM("demo", keep_alive=0, warm=True, restart=AT_ONCE) as llm:
        before = answers(llm, temperature=0)
        processes, epoch = tree(llm), llm.status().epoch
        image = llm.status().image_pid
        processes[victim].kill()
        assert llm.wait_ready(300, after_epoch=epoch).launch == "forked"
        assert not any(is_live(process) for process in processes.values())
        assert llm.status().image_pid == image
        assert answers(llm, temperature=0) == before


def test_an_interpreter_that_has_no_managed_vllm_serves_as_an_image(home: Path, tmp_path: Path) -> None:
    """As `python=` of another environment: its packages are those of ours, without ours."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    (site,) = tmp_path.glob("lib/python3*/site-packages")
    ours = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for package in ours.iterdir():
        # The shim of `make setup` is part of that vLLM: without it a torchvision for GPUs can't be imported there.
        if "managed_vllm" not in package.name or "torchvision_shim" in package.name:
            (site / package.name).symlink_to(package)
    with ManagedVLLM("demo", keep_alive=0, warm=True, python=python) as llm:
        assert llm.status().launch == "forked"
        assert answers(llm, temperature=0)


# -- models of other kinds --------------------------------------------------------------------------------------------


def lora(folder: Path) -> Path:
    """An adapter with random weights, strong enough to change every answer."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "task_type": "CAUSAL_LM"}))
    random = torch.Generator().manual_seed(0)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight": torch.randn(
            shape, generator=random, dtype=torch.bfloat16
        )
        for layer in range(2)
        for name in ("q_proj", "v_proj")
        for part, shape in (("A", (8, 128)), ("B", (128, 8)))
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def of_lora(tmp_path: Path, warm: bool) -> list[Any]:
    adapters: dict[str, Any] = {"lora_modules": {"name": "mine", "path": str(tmp_path / "lora")}, "enable_lora": True}
    with ManagedVLLM("demo", keep_alive=0, warm=warm, **adapters) as llm:
        base, adapted = answers(llm, temperature=0), answers(llm, temperature=0, model="mine")
        assert base != adapted
        return [base, adapted]


def of_images(tmp_path: Path, warm: bool) -> list[Any]:
    small: dict[str, Any] = {"enforce_eager": True, "max_model_len": 4096, "kv_cache_memory_bytes": 2**28}
    picture = pytest.importorskip("PIL.Image").linear_gradient("L").convert("RGB")
    asked = [{"role": "user", "content": [picture, {"type": "text", "text": "What is there?"}]}]
    with ManagedVLLM(str(tmp_path / "vlm"), keep_alive=0, warm=warm, gpu_memory_utilization=0.1, **small) as llm:
        output = llm.chat(asked, {"temperature": 0, "max_tokens": 16, "logprobs": 5})[0].outputs[0]
        steps = output.logprobs or []
        return [output.token_ids, [sorted((number, one.logprob) for number, one in step.items()) for step in steps]]


def of_embeddings(tmp_path: Path, warm: bool) -> list[Any]:
    with ManagedVLLM("demo", keep_alive=0, warm=warm, runner="pooling", convert="embed") as llm:
        return [output.outputs.embedding for output in llm.client.embed(PROMPTS)]


def of_structure(tmp_path: Path, warm: bool) -> list[Any]:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    with ManagedVLLM("demo", keep_alive=0, warm=warm) as llm:
        outputs = llm.generate(PROMPTS, temperature=0, max_tokens=40, structured_outputs={"json": schema})
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.soak
@pytest.mark.parametrize("of", [of_lora, of_images, of_embeddings, of_structure], ids=lambda of: of.__name__)
def test_a_forked_server_answers_as_a_spawned_one(home: Path, tmp_path: Path, of: Callable[[Path, bool], Any]) -> None:
    if of is of_lora:
        lora(tmp_path / "lora")
    if of is of_images:
        make_random_vlm(tmp_path / "vlm")
    assert of(tmp_path, True) == of(tmp_path, False)


# -- OpenMP in forked processes ----------------------------------------------------------------------------------------


def run(script: str, **variables: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(in_server.__file__).parent), **variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


TEAM = """
import os, torch, managed_vllm_openmp as openmp
openmp.prepare()
numbers = torch.ones(1 << 22)
torch.set_num_threads(2)
numbers.add_(1)                    # a parallel region: from now on there is a team
child = os.fork()
if child == 0:
    numbers.add_(1)                # would wait for ever for the parent's team
    os._exit(7)
numbers.add_(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

FOLLOWS = """
import os, torch, managed_vllm_openmp as openmp
openmp.prepare()
os.environ.update({variables})     # as vLLM does around the start of a Worker
child = os.fork()
if child == 0:
    openmp.follow_environment()
    torch.ones(1 << 22).add_(1)
    threads = sorted((int(name) for name in os.listdir("/proc/self/task")))
    cpus = [",".join(map(str, sorted(os.sched_getaffinity(thread)))) for thread in threads]
    print(torch.get_num_threads(), *sorted(cpus), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_team_of_threads_does_not_hinder_a_forked_child() -> None:
    assert run(TEAM) == ["7"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_forked_worker_has_the_threads_and_cpus_that_vllm_gave_it() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    quiet = {"OPENBLAS_NUM_THREADS": "1"}
    asked = {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": f"{first} {second}"}
    threads, *cpus = run(FOLLOWS.replace("{variables}", repr(asked)), **quiet)
    assert threads == "2"
    assert {str(first), str(second)} <= set(cpus)
    asked = {"OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": f"{second}"}
    assert run(FOLLOWS.replace("{variables}", repr(asked)), **quiet) == ["1", str(second)]
    assert run(FOLLOWS.replace("{variables}", "{}"), **quiet)[0] == str(len(os.sched_getaffinity(0)))
