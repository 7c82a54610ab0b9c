"""Diagnoses: on recorded logs of the real vLLM 0.32.0 (`record_startup_logs.py`), and on lines from its source."""

from __future__ import annotations

import importlib.util
import json
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import HANG_S
from startup_failures import STARTUP_FAILURES, StartupFailure
from vllm_version import version_of_vllm

from managed_vllm.errors import EngineDiedError, LaunchError, StartupError, StartupTimeoutError, error_for
from managed_vllm.server import failure_rules
from managed_vllm.server.diagnosis import (
    could_not_launch,
    crash_loop,
    devices_busy,
    diagnose,
    diagnose_first_request,
    engine_not_restored,
    no_places,
    not_forked,
    timed_out,
    too_few_devices,
    unwell,
    weights_lost,
)
from managed_vllm.server.startup_log import StartupLog
from managed_vllm.status import Cause, Diagnosis, Progress, Stage

LOGS = Path(__file__).parent.parent / "data" / "startup_logs"
OUTCOMES = json.loads((LOGS / "outcomes.json").read_text())


def recorded(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text().split("\n")


def diagnose_recorded(name: str) -> Diagnosis:
    outcome = OUTCOMES[name]
    if outcome["status"] is not None:
        return diagnose_first_request(outcome["status"], outcome["body"])
    return diagnose(recorded(name), returncode=outcome["returncode"])


# -- recorded failures -------------------------------------------------------------------------------------------------

# name: (what the root line contains, some of the facts)
ROOTS: dict[str, tuple[str, dict[str, object]]] = {
    "model_path_missing": ("HFValidationError: Repo id must be in the form", {"model": "/tmp/case/no/such/model"}),
    "hub_id_offline": ("LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder", {}),
    "no_config": ("Invalid repository ID or local directory specified: '/tmp/case/model'", {}),
    "port_in_use": ("OSError: [Errno 98] Address already in use", {}),
    "bad_host": ("OSError: [Errno 99] Cannot assign requested address", {}),
    "unknown_flag": ("error: unrecognized arguments: --no-such-argument", {"argument": "--no-such-argument"}),
    "invalid_choice": ("argument --dtype: invalid choice: 'float7'", {"argument": "--dtype"}),
    "max_model_len": (
        "Value error, User-specified max_model_len (1000000)",
        {"max_model_len": 1_000_000, "derived_max_model_len": 4096},
    ),
    "batch_smaller_than_sequences": ("Value error, max_num_batched_tokens (16) must be greater", {}),
    "out_of_range": ("gpu_memory_utilization: Input should be less than", {"argument": "gpu_memory_utilization"}),
    "not_quantized": ("Value error, Cannot find the config file for awq", {}),
    "tensor_parallel_heads": (
        "Total number of attention heads (4) must be divisible",
        {"heads": 4, "tensor_parallel_size": 3},
    ),
    "lora_not_found": ("LoRAAdapterNotFoundError: Loading lora ghost failed", {"name": "ghost"}),
    "chat_template": ("The supplied chat template string (/tmp/case/ghost.jinja) appears path-like", {}),
    "truncated_weights": ("SafetensorError: Error while deserializing header", {}),
    "garbage_weights": ("OverflowError: cannot fit 'int' into an index-sized integer", {}),
    "lfs_pointer_weights": ("MemoryError", {}),
    "wrong_shape_weights": ("RuntimeError: start (0) + length (768) exceeds dimension size (384).", {}),
    "no_weights": ("RuntimeError: Cannot find any model weights with `/tmp/case/model`", {"model": "/tmp/case/model"}),
    "unknown_architecture": ("Model architectures ['NoSuchForCausalLM'] are not supported for now", {}),
    "unknown_model_type": ("does not recognize this architecture", {"model_type": "no_such_model"}),
    "no_tokenizer_json": ("ValueError: Couldn't instantiate the backend tokenizer", {}),
    "no_tokenizer_files": ("The decoder prompt cannot be empty", {"status": 400}),
    "kv_cache_too_small": (
        "ValueError: To serve at least one request with the model's max seq len (4194304)",
        {"max_model_len": 4194304, "needed_gib": 4.0, "available_gib": 1.0, "estimated_max_model_len": 1048448},
    ),
    "host_memory": ("ValueError: Available memory on node 0", {"requested_gib": 100000.0}),
    "vllm_missing": ("ModuleNotFoundError: No module named 'vllm'", {}),
    "broken_torchvision": ("RuntimeError: operator torchvision::nms does not exist", {}),
}


@pytest.mark.parametrize("failure", STARTUP_FAILURES, ids=str)
def test_a_recorded_failure_gets_its_cause_its_root_line_and_its_error_class(failure: StartupFailure) -> None:
    found = diagnose_recorded(failure.name)
    root, facts = ROOTS[failure.name]
    assert found.cause is failure.cause
    assert type(error_for(found, instance="x", log_path=None)) is failure.error
    assert root in found.root_line
    assert facts.items() <= found.facts.items()
    assert found.permanent, "a wrong model or argument does not mend itself"


@pytest.mark.parametrize("failure", STARTUP_FAILURES, ids=str)
def test_every_provokable_failure_is_recorded_and_came_up_only_where_it_says_so(failure: StartupFailure) -> None:
    assert (OUTCOMES[failure.name]["status"] is not None) == failure.serves


@pytest.mark.parametrize("name", sorted(OUTCOMES))
def test_a_root_line_is_one_clean_line(name: str) -> None:
    line = diagnose_recorded(name).root_line
    assert line
    assert line == line.strip()
    assert len(line) <= 500
    assert not any(noise in line for noise in ("\n", "\x1b", " pid=", "[type=", "Engine core initialization failed"))


def test_numbers_from_the_log_stand_in_the_remedy() -> None:
    assert "max_model_len=1048448" in diagnose_recorded("kv_cache_too_small").remedy
    assert "max_model_len=4096" in diagnose_recorded("max_model_len").remedy
    assert "divisor of 4" in diagnose_recorded("tensor_parallel_heads").remedy


@pytest.mark.parametrize("name", sorted(f.name for f in STARTUP_FAILURES if not f.serves))
def test_colours_carriage_returns_and_the_prefixes_of_older_versions_change_nothing(name: str) -> None:
    def older(line: str) -> str:  # before 0.32 the printed lines of a process had its name in front as well
        return line if line.startswith(("(", "api_server.py:")) else f"(APIServer pid=7) {line}"

    plain = diagnose_recorded(name)
    returncode = OUTCOMES[name]["returncode"]
    coloured = [f"\x1b[0;36m{line}\x1b[0;0m\r\n" for line in recorded(name)]
    assert diagnose(coloured, returncode=returncode) == plain
    assert diagnose([older(line) for line in recorded(name)], returncode=returncode).cause == plain.cause


@pytest.mark.parametrize(
    ("name", "cause"), [("worker_killed", Cause.WORKER_DIED), ("engine_killed", Cause.ENGINE_DIED)]
)
def test_a_process_that_vanished_is_named_although_vllm_exits_with_0(name: str, cause: Cause) -> None:
    assert OUTCOMES[name]["returncode"] == 0
    found = diagnose_recorded(name)
    assert found.cause is cause
    assert not found.permanent
    assert isinstance(error_for(found, instance=None, log_path=None), EngineDiedError)


def test_a_server_that_someone_else_stopped_was_killed() -> None:
    found = diagnose(recorded("ready"), returncode=0)
    assert found.cause is Cause.KILLED
    assert "SIGTERM" in found.summary


# -- lines that need a GPU, the network or a second machine: from the source of vLLM 0.32.0 ----------------------------


VERSIONS = ("0.32", "0.33")
"""Those whose wordings are known."""


@dataclass(frozen=True)
class SourceLine:
    """An exception as vLLM words it.

    `fragment` must stand in the file that `source` names, relative to site-packages; in the `versions` of vLLM that say
    so, in 0.33 in the file `moved_to`, if there is one.
    """

    cause: Cause
    text: str
    source: str
    fragment: str
    permanent: bool
    facts: dict[str, object]
    versions: tuple[str, ...] = VERSIONS
    moved_to: str | None = None

    def __str__(self) -> str:
        return f"{self.cause}-{self.source.rpartition('/')[2]}"


FROM_SOURCE = (
    SourceLine(
        Cause.GPU_MEMORY,
        "ValueError: Free memory on device cuda:0 (3.94/79.19 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 72.85 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "vllm/v1/worker/utils.py:762",
        "is less than desired GPU memory utilization ",
        False,
        {"free_gib": 3.94, "total_gib": 79.19, "requested_gib": 72.85, "gpu_memory_utilization": 0.92},
    ),
    SourceLine(
        Cause.GPU_MEMORY,
        "AssertionError: Error in memory profiling. Initial free memory 40.1 GiB, current free memory 60.2 GiB. This "
        "happens when other processes sharing the same container release GPU memory while vLLM is profiling",
        "vllm/v1/worker/gpu_worker.py:720",
        "Error in memory profiling. ",
        False,
        {"initial_free_gib": 40.1, "current_free_gib": 60.2},
    ),
    SourceLine(
        Cause.GPU_MEMORY,
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 "
        "GiB of which 1.06 GiB is free. Process 1 has 78.12 GiB memory in use.",
        "vllm/v1/worker/gpu_model_runner.py:5138",
        "torch.cuda.OutOfMemoryError",
        False,
        {"tried": "2.00 GiB", "total_gib": 79.19, "free": "1.06 GiB"},
    ),
    SourceLine(
        Cause.KV_CACHE_TOO_SMALL,
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when",
        "vllm/v1/core/kv_cache_utils.py:1011",
        "No available memory for the cache blocks. ",
        True,
        {},
        moved_to="vllm/v1/core/kv_cache_planning.py:58",
    ),
    SourceLine(
        Cause.KV_CACHE_TOO_SMALL,
        "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token.",
        "vllm/v1/core/kv_cache_utils.py:2455",
        "Cannot auto-fit max_model_len: not enough GPU memory",
        True,
        {},
        moved_to="vllm/v1/core/kv_cache_planning.py:1382",
    ),
    SourceLine(
        Cause.HOST_MEMORY,
        "ValueError: Available memory on node 0 (8.23/9.59 GiB) on startup is less than desired CPU memory "
        "utilization (0.92, 8.82 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction",
        "vllm/v1/worker/cpu_worker.py:83",
        "is less than desired CPU memory utilization ",
        False,
        {"free_gib": 8.23, "requested_gib": 8.82},
        versions=("0.32",),
    ),
    SourceLine(
        Cause.HOST_MEMORY,
        "ValueError: The worker already uses 5.21 GiB (model weights and runtime), more than the 4.80 GiB of CPU "
        "memory reserved for it on node 0, leaving none for the KV cache. On the CPU backend, the "
        "`--gpu-memory-utilization` flag controls",
        "vllm/v1/worker/cpu_worker.py:227",
        "GiB of CPU memory ",
        True,
        {"used_gib": 5.21, "requested_gib": 4.8},
        versions=("0.33",),
    ),
    SourceLine(
        Cause.TENSOR_PARALLEL_DEVICES,
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ParallelConfig\n"
        "  Value error, World size (8) is larger than the number of available GPUs (2) in this node. If this is "
        "intentional and you are using:\n- ray, set '--distributed-executor-backend ray'.\n"
        "- multiprocessing, set '--nnodes' appropriately. [type=value_error, input_value=ArgsKwargs(()), input_type=A]",
        "vllm/config/parallel.py:1053",
        "is larger than the number of ",
        True,
        {"world_size": 8, "devices": 2},
    ),
    SourceLine(
        Cause.NO_DEVICE,
        "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG` to "
        "turn on verbose logging to help debug the issue.",
        "vllm/config/device.py:56",
        "Failed to infer device type, please set ",
        True,
        {},
    ),
    SourceLine(
        Cause.NCCL,
        "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "vllm/distributed/device_communicators/pynccl_wrapper.py:448",
        'f"NCCL error: {error_str}"',
        False,
        {},
    ),
    SourceLine(
        Cause.ENGINE_TIMEOUT,
        "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow weight "
        "loading for large models. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S). To increase",
        "vllm/v1/engine/core_client.py:743",
        "Timed out waiting for engine core processes to ",
        False,
        {"waited_s": 600},
    ),
    SourceLine(
        Cause.SHM_FULL,
        "RuntimeError: Insufficient space in /dev/shm for shared-memory allocation: 240 MiB required, 63 MiB free. "
        "Increase /dev/shm (e.g. --shm-size or --ipc=host).",
        "vllm/distributed/device_communicators/shm_broadcast.py:253",
        "Insufficient space in {shm_path} for ",
        True,
        {"required_mib": 240, "free_mib": 63},
    ),
    SourceLine(
        Cause.UNSUPPORTED_ARCHITECTURE,
        "ValueError: Model architecture OldForCausalLM is not supported in-tree anymore. Please install the plugin at",
        "vllm/model_executor/models/registry.py:1200",
        "is not supported in-tree anymore",
        True,
        {"architecture": "OldForCausalLM"},
    ),
    SourceLine(
        Cause.INVALID_ENGINE_ARGUMENT,
        "RuntimeError: Failed to load the model config. If the model is a custom model not yet available in the "
        "HuggingFace transformers library, consider setting `trust_remote_code=True` in LLM or using the",
        "vllm/transformers_utils/config.py:415",
        "`trust_remote_code=True` in LLM",
        True,
        {},
    ),
    SourceLine(
        Cause.GATED_MODEL,
        "huggingface_hub.errors.GatedRepoError: 401 Client Error.\n\nCannot access gated repo for url "
        "https://huggingface.co/api/models/acme-labs/gated.\nAccess to model acme-labs/gated is restricted.",
        "huggingface_hub/utils/_http.py:890",
        "Cannot access gated repo for url",
        True,
        {},
    ),
    SourceLine(
        Cause.MODEL_NOT_FOUND,
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error.\n\nRepository Not Found for url: "
        "https://huggingface.co/api/models/acme-labs/none.\nPlease make sure you specified the correct `repo_id`",
        "huggingface_hub/utils/_http.py:947",
        "Repository Not Found for url: ",
        True,
        {},
    ),
    SourceLine(
        Cause.MODEL_NOT_FOUND,
        "huggingface_hub.errors.RevisionNotFoundError: 404 Client Error.\n\nRevision Not Found for url: https://hf.co/x",
        "huggingface_hub/utils/_http.py:881",
        "Revision Not Found for url: ",
        True,
        {},
    ),
    SourceLine(
        Cause.HUB_OFFLINE,
        "huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the files on the Hub "
        "and we cannot find the appropriate snapshot folder for the specified revision on the local disk.",
        "huggingface_hub/_snapshot_download.py:400",
        "An error happened while trying to locate the files on the Hub",
        False,
        {},
    ),
)


def as_worker_failure(text: str) -> list[str]:
    """`text` as it looks when a Worker's start raises it: logged there, then reported by EngineCore and API server."""
    worker = "(Worker_TP0 pid=12) ERROR 11-23 10:50:07 [multiproc_executor.py:953] "
    engine = "(EngineCore pid=11) ERROR 11-23 10:50:09 [core.py:1510] "
    frame = ["Traceback (most recent call last):", '  File "/venv/vllm/x.py", line 1, in load', "    raise x"]
    reported = (
        "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace"
    )
    return [
        *(worker + line for line in ["WorkerProc failed to start.", *frame, *text.split("\n")]),
        *(engine + line for line in ["EngineCore failed to start.", *frame, reported]),
        *frame,
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    ]


@pytest.mark.parametrize("line", FROM_SOURCE, ids=str)
def test_a_line_from_the_source_gets_its_cause_wherever_it_is_raised(line: SourceLine) -> None:
    in_api_server = ["Traceback (most recent call last):", '  File "/venv/x.py", line 1', *line.text.split("\n")]
    for lines in (in_api_server, as_worker_failure(line.text)):
        found = diagnose(lines, returncode=1)
        assert found.cause is line.cause
        assert found.permanent is line.permanent
        assert line.facts.items() <= found.facts.items()
        assert found.root_line in line.text.replace("  Value error", "Value error")


@pytest.mark.real
@pytest.mark.parametrize("line", FROM_SOURCE, ids=str)
def test_the_installed_vllm_still_words_it_so(line: SourceLine) -> None:
    version = version_of_vllm()
    if version not in line.versions:
        pytest.skip(f"vLLM {version} is none of those whose words these are: {', '.join(line.versions)}")
    source = line.moved_to if version == "0.33" and line.moved_to is not None else line.source
    package, _, path = source.rpartition(":")[0].partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert line.fragment in (Path(spec.origin).parent / path).read_text()


# -- which exception is the root ---------------------------------------------------------------------------------------


def test_the_first_worker_to_fail_is_the_cause_even_where_lines_interleave() -> None:
    first, second = (
        "(Worker_TP0 pid=1) ERROR 11-23 10:00:00 [x.py:9] ",
        "(Worker_TP1 pid=2) ERROR 11-23 10:00:00 [x.py:9] ",
    )
    lines = [
        first + "WorkerProc failed to start.",
        second + "WorkerProc failed to start.",
        first + "Traceback (most recent call last):",
        second + "Traceback (most recent call last):",
        first + '  File "a.py", line 1, in f',
        second + '  File "b.py", line 1, in g',
        second + "ConnectionResetError: peer went away",
        first + "KeyError: 'lm_head.weight'",
    ]
    found = diagnose(lines, returncode=1)
    assert found.cause is Cause.UNKNOWN
    assert found.root_line == "KeyError: 'lm_head.weight'"
    assert found.facts == {"returncode": 1}


def test_the_wrapped_exception_is_found_behind_the_wrapper() -> None:
    lines = [
        "Traceback (most recent call last):",
        "  File 'a'",
        "huggingface_hub.errors.GatedRepoError: 403 Client Error.",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        "  File 'b'",
        "ValueError: Invalid repository ID or local directory specified: 'acme/gated'.",
    ]
    assert diagnose(lines, returncode=1).cause is Cause.GATED_MODEL


def test_an_exception_that_vllm_survived_is_not_the_cause() -> None:
    noise = ["(APIServer pid=1) ERROR 11-23 10:00:00 [a.py:1] " + line
             for line in ("Could not report usage", "Traceback (most recent call last):", "  File 'a'",
                          "ImportError: no usage module")]  # fmt: skip
    found = diagnose([*noise, *as_worker_failure("KeyError: 'model.layers.0'")], returncode=1)
    assert found.cause is Cause.UNKNOWN
    assert found.root_line == "KeyError: 'model.layers.0'"


def test_words_in_a_warning_are_not_an_error() -> None:
    # every start on a machine with a low limit logs this (system_utils.py:255)
    lines = ["(APIServer pid=1) WARNING 11-23 10:00:00 [system_utils.py:255] This can cause fd limit errors like "
             "`OSError: [Errno 24] Too many open files`.", "Something odd"]  # fmt: skip
    found = diagnose(lines, returncode=3)
    assert (found.cause, found.root_line) == (Cause.UNKNOWN, "Something odd")


@pytest.mark.parametrize("returncode", [1, None])
def test_an_empty_log_is_an_unknown_crash_whatever_the_exit_code(returncode: int | None) -> None:
    found = diagnose([], returncode=returncode)
    assert found.cause is Cause.UNKNOWN
    assert found.root_line == ""
    assert found.remedy


@pytest.mark.parametrize(
    ("returncode", "cause", "word"),
    [
        (-signal.SIGKILL, Cause.KILLED, "OOM"),
        (-signal.SIGTERM, Cause.KILLED, "who sent it"),
        (-signal.SIGSEGV, Cause.KILLED, "enforce_eager"),
        (-signal.SIGBUS, Cause.SHM_FULL, "shm-size"),
        (-64, Cause.KILLED, "enforce_eager"),
        (127, Cause.LAUNCHER_NOT_FOUND, "python="),
    ],
)
def test_the_way_it_ended_is_the_cause_where_the_log_has_none(returncode: int, cause: Cause, word: str) -> None:
    found = diagnose(["(APIServer pid=1) INFO 11-23 10:00:00 [a.py:1] all is well"], returncode=returncode)
    assert found.cause is cause
    assert word in found.remedy
    assert found.root_line == "all is well"


def test_a_worker_that_a_signal_ended_is_no_python_exception() -> None:
    lines = ["(EngineCore pid=2) ERROR 11-23 10:00:00 [multiproc_executor.py:316] Worker proc VllmWorker-1 died "
             "unexpectedly (exit code: -9), shutting down executor.",
             "Traceback (most recent call last):", "  File 'a'", "KeyError: 'afterwards'"]  # fmt: skip
    found = diagnose(lines, returncode=1)
    assert found.cause is Cause.WORKER_DIED
    assert found.facts == {"worker": "VllmWorker-1", "exit_code": -9}


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("/usr/bin/python3: No module named vllm", Cause.VLLM_MISSING),
        ("ModuleNotFoundError: No module named 'vllm'", Cause.VLLM_MISSING),
        ("ModuleNotFoundError: No module named 'vllm._C'", Cause.BROKEN_INSTALL),
        ("importlib.metadata.PackageNotFoundError: No package metadata was found for vllm", Cause.BROKEN_INSTALL),
        ("ImportError: libcudart.so.13: cannot open shared object file: No such file", Cause.BROKEN_INSTALL),
        ("OSError: [Errno 28] No space left on device: '/home/u/.cache/vllm'", Cause.DISK_FULL),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", Cause.SHM_FULL),
        ("MemoryError", Cause.HOST_MEMORY),
    ],
)
def test_what_keeps_the_program_from_running_is_told_apart(line: str, cause: Cause) -> None:
    assert diagnose(["Traceback (most recent call last):", "  File 'a'", line], returncode=1).cause is cause


def test_a_command_that_does_not_exist_is_a_launch_error(tmp_path: Path) -> None:
    command = [str(tmp_path / "python")]
    with pytest.raises(FileNotFoundError) as raised:
        subprocess.run(command, check=True)
    found = could_not_launch(command, raised.value)
    assert found.cause is Cause.LAUNCHER_NOT_FOUND
    assert found.permanent
    assert command[0] in found.root_line
    assert isinstance(error_for(found, instance=None, log_path=None), LaunchError)


# -- stages ------------------------------------------------------------------------------------------------------------


def stages_of(lines: list[str]) -> list[str]:
    log, seen = StartupLog(), []
    for line in lines:
        if (progress := log.feed(line)) is not None:
            assert progress == log.progress
            seen.append(str(progress))
    return seen


def test_a_good_start_goes_through_its_stages_in_order() -> None:
    assert stages_of(recorded("ready")) == [
        "importing",
        "configuring",
        "configuring (Qwen3ForCausalLM)",
        "configuring (max model len 4096)",
        "configuring (engine 0.32.0)",
        "loading",
        "loading (0/1 shards)",
        "loading (1/1 shards)",
        "loading (took 0.01 s)",
        "profiling (1.0 GiB for KV cache)",
        "profiling (KV cache of 1,048,576 tokens)",
        "serving (engine ready in 3.57 s)",
        "serving (http://127.0.0.1:43605)",
        "warming up",
    ]


def test_a_compiled_start_passes_through_compiling() -> None:
    stages = [text.split(" (")[0] for text in stages_of(recorded("ready_compiled"))]
    assert list(dict.fromkeys(stages)) == ["importing", "configuring", "loading", "compiling", "serving", "warming up"]


def test_a_gpu_start_from_the_hub_passes_through_every_stage() -> None:
    worker = "(Worker_TP0 pid=3) INFO 11-23 10:00:00 [x.py:1] "
    told = stages_of(
        [
            "INFO 11-23 10:00:00 [__init__.py:1] Automatically detected platform cuda.",
            "(APIServer pid=1) INFO 11-23 10:00:00 [api_utils.py:286] non-default args: {'model': 'acme/m'}",
            f"{worker}Starting to load model acme/model-7B...",
            f"{worker}Time spent downloading weights for acme/model-7B: 12.500000 seconds",
            "\rLoading safetensors checkpoint shards:  25% Completed | 3/12 [00:01<00:03,  3.0it/s]\n",
            "\rMulti-thread loading shards:  50%|█████     | 6/12 [00:02<00:02]"
            "\rMulti-thread loading shards: 100%|███| 12/12 [",
            f"{worker}Loading weights took 4.10 seconds",
            f"{worker}Model loading took 14.3 GiB memory and 5.123456 seconds",
            f"{worker}[backbone] Starting torch.compile",
            f"{worker}[backbone] Dynamo bytecode transform time: 6.10 s",
            f"{worker}[backbone] Compiling a graph for compile range (1, 8192) takes 20.53 s",
            f"{worker}torch.compile and initial profiling/warmup run together took 31.20 s in total",
            f"{worker}Available KV cache memory: 50.1 GiB",
            "\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE):   0%|          | 0/67 [00:00<?, ?it/s]"
            "\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE):  45%|████▍     | 30/67 [00:01<00:01]",
            f"{worker}Graph capturing finished in 4 secs, took 0.55 GiB",
            "(EngineCore pid=2) INFO 11-23 10:00:00 [core.py:386] init engine (profile, create kv cache, warmup "
            "model) took 42.10 s (compilation: 31.20 s)",
            "(APIServer pid=1) INFO 11-23 10:00:00 [entry.py:140] Starting vLLM server on http://127.0.0.1:8000",
            "INFO:     Application startup complete.",
        ]
    )
    assert told == [
        "importing",
        "configuring",
        "downloading (acme/model-7B)",
        "downloading (took 12.500000 s)",
        "loading (3/12 shards)",
        "loading (12/12 shards)",
        "loading (took 4.10 s)",
        "profiling (model takes 14.3 GiB)",
        "compiling",
        "compiling (traced in 6.10 s)",
        "compiling (graph for (1, 8192) tokens took 20.53 s)",
        "compiling (took 31.20 s)",
        "capturing (45%)",
        "capturing (took 4 s)",
        "serving (engine ready in 42.10 s)",
        "serving (http://127.0.0.1:8000)",
        "warming up",
    ]


def test_nothing_new_is_none() -> None:
    log = StartupLog()
    assert log.progress == Progress(Stage.LAUNCHING)
    assert log.feed("\n") is None
    assert log.feed("hello") == Progress(Stage.IMPORTING)
    assert log.feed("hello again") is None
    assert log.feed("INFO:     Application startup complete.") == Progress(Stage.WARMING_UP)
    assert log.feed("(Worker pid=1) INFO 11-23 10:00:00 [a.py:1] Starting to load model /m...") is None


PIECES = st.sampled_from(
    [
        "non-default args: ",
        "Using max model len 99999999999999999999",
        "Starting to load model {}...",
        "Loading safetensors checkpoint shards: 100% Completed | {}/{} [",
        "Capturing CUDA graphs:  7%",
        "Application startup complete",
        "Traceback (most recent call last):",
        "During handling of the above exception",
        "EngineCore failed to start.",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for X",
        "  Value error, {x}",
        "api_server.py: error: {0} %s",
        "(EngineCore pid=123) ",
        "ERROR 11-23 10:50:09 [core.py:1510] ",
        "\x1b[0;36m",
        "\r",
        "    raise x",
        "KeyError: 'x'",
    ]
)
LINES = st.lists(st.lists(st.one_of(PIECES, st.text(max_size=30)), max_size=5).map("".join), max_size=30)


@given(LINES)
def test_no_line_makes_feed_raise_or_go_backwards(lines: list[str]) -> None:
    log, order = StartupLog(), list(Stage)
    for line in lines:
        before = log.progress
        told = log.feed(line)
        assert order.index(log.progress.stage) >= order.index(before.stage)
        assert told == (log.progress if log.progress != before else None)


@given(LINES, st.none() | st.integers(-70, 255))
def test_no_log_makes_diagnose_raise(lines: list[str], returncode: int | None) -> None:
    found = diagnose(lines, returncode=returncode)
    assert found.summary
    assert found.remedy
    assert "\n" not in found.root_line
    assert Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@given(st.none() | st.integers(100, 599), st.text() | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
def test_no_answer_makes_diagnose_first_request_raise(status: int | None, body: str) -> None:
    assert diagnose_first_request(status, body).summary


def test_a_long_log_with_long_lines_is_read_in_linear_time() -> None:
    lines = [line for name in OUTCOMES if name != "vllm_missing" for line in recorded(name)]
    found = subprocess.run(
        [sys.executable, "-c", "import sys, time\nfrom managed_vllm.server.diagnosis import diagnose\n"
         "lines = sys.stdin.read().split('\\n') + ['Loading x shards' * 5000, 'x' * 100000]\n"
         "began = time.process_time(); diagnose(lines, returncode=1); print(time.process_time() - began)"],
        input="\n".join(lines), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(found.stdout) < HANG_S  # measured: 0.02 s; benchmarks/ratios.py


# -- the first request -------------------------------------------------------------------------------------------------


def test_no_answer_to_the_first_request_is_a_timeout() -> None:
    found = diagnose_first_request(None, "")
    assert isinstance(error_for(found, instance=None, log_path=None), StartupTimeoutError)


def test_a_dead_engine_under_the_first_request_is_not_the_models_fault() -> None:
    body = '{"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause."}}'
    found = diagnose_first_request(500, body)
    assert (found.cause, found.permanent) == (Cause.ENGINE_DIED, False)


def test_an_answer_that_is_no_json_is_kept_as_the_root_line() -> None:
    found = diagnose_first_request(502, "Bad Gateway\n<html>")
    assert (found.cause, found.root_line, found.facts) == (Cause.UNKNOWN, "Bad Gateway", {"status": 502})


# -- values ------------------------------------------------------------------------------------------------------------


UNWELL = (Cause.ENGINE_HUNG, Cause.API_SERVER_HUNG, Cause.PROCESS_STOPPED, Cause.ENGINE_BROKEN)


def every_diagnosis() -> list[Diagnosis]:
    last = diagnose_recorded("worker_killed")
    return [
        *(diagnose_recorded(name) for name in OUTCOMES),
        *(diagnose(as_worker_failure(line.text), returncode=1) for line in FROM_SOURCE),
        *(timed_out(Progress(stage, "x"), limit_s=600, silent=silent) for stage in Stage for silent in (True, False)),
        crash_loop(last, restarts=5, window_s=300),
        *(unwell(cause, "x") for cause in UNWELL),
        not_forked("x"),
        engine_not_restored("x", permanent=True),
        devices_busy(1, ["pid 7"], wanted="2 GPUs", waited_s=60),
        too_few_devices("2 GPUs", ["GPU 0"]),
        no_places("x"),
        weights_lost("step-7"),
        diagnose([], returncode=-9),
        diagnose([], returncode=127),
        diagnose(["OSError: [Errno 28] No space left on device"], returncode=1),
    ]


def test_every_cause_is_reached_and_has_an_error_class_and_a_remedy() -> None:
    seen = every_diagnosis()
    assert {found.cause for found in seen} == set(Cause)
    for found in seen:
        assert found.summary
        assert found.remedy
        error = error_for(found, instance="demo-1", log_path="/logs/server.log")
        assert type(error) is not StartupError
        assert "managed-vllm doctor" in str(error)
        assert found.remedy in str(error)
        assert "/logs/server.log" in str(error)
        assert error.diagnosis is found


def test_every_rule_fills_its_texts_from_its_own_groups() -> None:
    import re
    import string

    rules = (*failure_rules.RULES, *failure_rules.DEATHS, *failure_rules.FIRST_REQUEST)
    for rule in rules:
        assert rule.summary
        assert rule.remedy
        groups = set(re.compile(rule.pattern, re.MULTILINE).groupindex)
        for text in (rule.summary, rule.remedy):
            assert {name for _, name, _, _ in string.Formatter().parse(text) if name} <= groups


def test_a_diagnosis_survives_json_pickle_and_comparison() -> None:
    for found in every_diagnosis():
        assert Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        assert pickle.loads(pickle.dumps(found)) == found
        assert hash(found) == hash(pickle.loads(pickle.dumps(found)))
        error = pickle.loads(pickle.dumps(error_for(found, instance="i", log_path="l")))
        assert error.diagnosis == found


@pytest.mark.parametrize("data", [{}, {"cause": "from_the_future", "facts": None}, {"cause": [], "facts": {"x": {}}}])
def test_a_record_of_another_version_is_read_as_unknown(data: dict[str, object]) -> None:
    assert Diagnosis.from_dict(data) == Diagnosis(Cause.UNKNOWN, "")


def test_a_crash_loop_keeps_what_the_last_crash_said() -> None:
    last = diagnose_recorded("worker_killed")
    loop = crash_loop(last, restarts=5, window_s=300)
    assert (loop.cause, loop.permanent, loop.root_line) == (Cause.CRASH_LOOP, True, last.root_line)
    assert {"restarts": 5, "window_s": 300, "last_cause": "worker_died"}.items() <= loop.facts.items()


def test_a_timeout_says_how_far_the_start_had_come() -> None:
    at = Progress(Stage.LOADING, "3/12 shards")
    total, silent = (timed_out(at, limit_s=600, silent=silent) for silent in (False, True))
    assert (total.cause, silent.cause) == (Cause.STARTUP_TIMEOUT, Cause.STARTUP_SILENCE)
    for found in (total, silent):
        assert "loading (3/12 shards)" in found.summary
        assert "600" in found.summary
        assert isinstance(error_for(found, instance=None, log_path=None), StartupTimeoutError)


def test_importing_it_takes_the_standard_library_only() -> None:
    def loaded(first: str) -> set[str]:
        code = f"import sys; {first}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return {name for name in run.stdout.split() if name not in sys.stdlib_module_names and not name.startswith("_")}

    bare = loaded("pass")  # what .pth files of other packages load in any case
    assert loaded("import managed_vllm.server.diagnosis") - bare == {"managed_vllm"}


def test_exit_code_0_without_a_word_is_a_dead_engine() -> None:
    found = diagnose(["INFO:     Application startup complete."], returncode=0)
    assert found.cause is Cause.ENGINE_DIED
    assert not found.permanent


@pytest.mark.parametrize(
    "lines",
    [
        [
            "Traceback (most recent call last):",
            '  File "<string>", line 1, in <module>',
            '  File "/usr/lib/python3.11/multiprocessing/spawn.py", line 122, in spawn_main',
            "    exitcode = _main(fd, parent_sentinel)",
            '  File "/usr/lib/python3.11/multiprocessing/spawn.py", line 132, in _main',
            "    self = reduction.pickle.load(from_parent)",
            "EOFError: Ran out of input",
        ],
        [
            "Traceback (most recent call last):",
            '  File "/usr/lib/python3.11/multiprocessing/popen_spawn_posix.py", line 62, in _launch',
            "    f.write(fp.getbuffer())",
            "BrokenPipeError: [Errno 32] Broken pipe",
        ],
    ],
    ids=["parent", "child"],
)
def test_a_process_killed_while_it_spawns_another_is_no_damaged_weight_file(lines: list[str]) -> None:
    assert diagnose(lines, returncode=-9).cause is Cause.KILLED
    found = diagnose(lines, returncode=1)
    assert found.cause is Cause.ENGINE_DIED
    assert not found.permanent
