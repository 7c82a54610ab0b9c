"""Every way of failing to start that can be provoked without a GPU, as data.

Each `StartupFailure` builds what it needs below `tmp_path` and returns keyword arguments for `ManagedVLLM`, named as
vLLM's own engine arguments (`max_model_len=…`), plus `env=`, `host=`, `port=`, `api_key=` and `python=`. The same
values serve two users: `record_startup_logs.py` starts the bare vLLM with them, and the tests of the real server pass
them to `ManagedVLLM` and expect the typed error.

Rows that need a GPU, a second machine or the network are tested on lines from vLLM's source in `test_diagnosis.py`.
"""

from __future__ import annotations

import json
import shutil
import socket
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from managed_vllm.errors import (
    AddressError,
    BrokenModelError,
    EngineArgumentError,
    LaunchError,
    ModelUnavailableError,
    OutOfMemoryError,
    StartupError,
)
from managed_vllm.status import Cause


@dataclass(frozen=True)
class StartupFailure:
    """One way to fail. `prepare(tmp_path, demo_model_path)` returns the keyword arguments for `ManagedVLLM`.

    `serves` is true where the bare vLLM comes up all the same and only the first real request shows the failure.
    `always`: tried with the real vLLM in every `make test`, so that each class of error and each kind of path to it is;
    the others in `make soak`.
    """

    name: str
    cause: Cause
    error: type[StartupError]
    prepare: Callable[[Path, Path], dict[str, object]]
    serves: bool = False
    always: bool = False

    def __str__(self) -> str:
        return self.name


# -- models ------------------------------------------------------------------------------------------------------------


def _copy_of(model: Path, tmp_path: Path, *, without: tuple[str, ...] = (), **config: object) -> Path:
    """A copy of `model` in a folder of its own, without the files named and with `config` merged into config.json."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns(*without))
    if config:
        path = copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def _missing_path(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(tmp_path / "no" / "such" / "model")}


def _hub_id_offline(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": "acme-labs/never-downloaded", "env": {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}}


def _no_config(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(_copy_of(model, tmp_path, without=("config.json",)))}


def _truncated_weights(tmp_path: Path, model: Path) -> dict[str, object]:
    copy = _copy_of(model, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return {"model": str(copy)}


def _garbage_weights(tmp_path: Path, model: Path) -> dict[str, object]:
    copy = _copy_of(model, tmp_path)
    (copy / "model.safetensors").write_bytes(b"\xff" * 4096)
    return {"model": str(copy)}


def _lfs_pointer_weights(tmp_path: Path, model: Path) -> dict[str, object]:
    copy = _copy_of(model, tmp_path)
    (copy / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 981472\n"
    )
    return {"model": str(copy)}


def _wrong_shape_weights(tmp_path: Path, model: Path) -> dict[str, object]:
    # Wider than the weights. Narrower ones are cut to size by vLLM 0.32 on CPU and served without a word.
    width = json.loads((model / "config.json").read_text())["intermediate_size"]
    return {"model": str(_copy_of(model, tmp_path, intermediate_size=2 * width))}


def _no_weights(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(_copy_of(model, tmp_path, without=("*.safetensors",)))}


def _unknown_architecture(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(_copy_of(model, tmp_path, architectures=["NoSuchForCausalLM"]))}


def _unknown_model_type(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(_copy_of(model, tmp_path, model_type="no_such_model"))}


def _no_tokenizer_json(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(_copy_of(model, tmp_path, without=("tokenizer.json",)))}


def _no_tokenizer_files(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(_copy_of(model, tmp_path, without=("tokenizer*", "chat_template*")))}


# -- arguments ---------------------------------------------------------------------------------------------------------


def _unknown_flag(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "no_such_argument": 1}


def _invalid_choice(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "dtype": "float7"}


def _max_model_len(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "max_model_len": 1_000_000}


def _batch_smaller_than_sequences(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "max_num_batched_tokens": 16, "max_num_seqs": 64}


def _out_of_range(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "gpu_memory_utilization": 1.5}


def _not_quantized(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "quantization": "awq"}


def _tensor_parallel_heads(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "tensor_parallel_size": 3}


def _lora_not_found(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "enable_lora": True, "lora_modules": [f"ghost={tmp_path / 'ghost'}"]}


def _chat_template(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "chat_template": str(tmp_path / "ghost.jinja")}


# -- memory ------------------------------------------------------------------------------------------------------------


def _kv_cache_too_small(tmp_path: Path, model: Path) -> dict[str, object]:
    length = 4 * 1024**2  # 4 GiB of KV cache or more for the demo model; the server gets 1
    copy = _copy_of(model, tmp_path, max_position_embeddings=length)
    return {"model": str(copy), "max_model_len": length, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}


def _more_memory_than_the_machine_has(tmp_path: Path, model: Path) -> dict[str, object]:
    return {"model": str(model), "env": {"VLLM_CPU_KVCACHE_SPACE": "100000"}}


# -- address -----------------------------------------------------------------------------------------------------------

_listeners: dict[Path, socket.socket] = {}  # a port stays taken only as long as someone holds its socket


def _port_in_use(tmp_path: Path, model: Path) -> dict[str, object]:
    listener = socket.create_server(("127.0.0.1", 0))
    _listeners[tmp_path] = listener
    return {"model": str(model), "port": listener.getsockname()[1]}


def _bad_host(tmp_path: Path, model: Path) -> dict[str, object]:
    # RFC 5737: reserved for documentation, so no machine has it. A host beyond loopback needs an explicit key.
    return {"model": str(model), "host": "192.0.2.1", "api_key": "not-secret"}


# -- installation ------------------------------------------------------------------------------------------------------


def _vllm_missing(tmp_path: Path, model: Path) -> dict[str, object]:
    venv.create(tmp_path / "bare", with_pip=False)
    return {"model": str(model), "python": str(tmp_path / "bare" / "bin" / "python")}


def _broken_torchvision(tmp_path: Path, model: Path) -> dict[str, object]:
    """What `import torchvision` does where its build does not fit torch's (VLLM.md, "Installing it without a GPU")."""
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    return {"model": str(model), "env": {"PYTHONPATH": str(package.parent)}}


STARTUP_FAILURES: tuple[StartupFailure, ...] = (
    StartupFailure("model_path_missing", Cause.MODEL_NOT_FOUND, ModelUnavailableError, _missing_path, always=True),
    StartupFailure("hub_id_offline", Cause.HUB_OFFLINE, ModelUnavailableError, _hub_id_offline),
    StartupFailure("no_config", Cause.NO_CONFIG, ModelUnavailableError, _no_config),
    StartupFailure("port_in_use", Cause.PORT_IN_USE, AddressError, _port_in_use, always=True),
    StartupFailure("bad_host", Cause.BAD_HOST, AddressError, _bad_host),
    StartupFailure("unknown_flag", Cause.INVALID_FLAG, EngineArgumentError, _unknown_flag, always=True),
    StartupFailure("invalid_choice", Cause.INVALID_FLAG, EngineArgumentError, _invalid_choice, always=True),
    StartupFailure("max_model_len", Cause.MAX_MODEL_LEN, EngineArgumentError, _max_model_len),
    StartupFailure(
        "batch_smaller_than_sequences",
        Cause.INVALID_ENGINE_ARGUMENT,
        EngineArgumentError,
        _batch_smaller_than_sequences,
    ),
    StartupFailure("out_of_range", Cause.INVALID_ENGINE_ARGUMENT, EngineArgumentError, _out_of_range),
    StartupFailure("not_quantized", Cause.INVALID_ENGINE_ARGUMENT, EngineArgumentError, _not_quantized),
    StartupFailure("tensor_parallel_heads", Cause.TENSOR_PARALLEL_HEADS, EngineArgumentError, _tensor_parallel_heads),
    StartupFailure("lora_not_found", Cause.LORA_NOT_FOUND, EngineArgumentError, _lora_not_found),
    StartupFailure("chat_template", Cause.CHAT_TEMPLATE, EngineArgumentError, _chat_template),
    StartupFailure("truncated_weights", Cause.CORRUPT_WEIGHTS, BrokenModelError, _truncated_weights, always=True),
    StartupFailure("garbage_weights", Cause.CORRUPT_WEIGHTS, BrokenModelError, _garbage_weights),
    StartupFailure("lfs_pointer_weights", Cause.CORRUPT_WEIGHTS, BrokenModelError, _lfs_pointer_weights),
    StartupFailure("wrong_shape_weights", Cause.CORRUPT_WEIGHTS, BrokenModelError, _wrong_shape_weights),
    StartupFailure("no_weights", Cause.NO_WEIGHTS, BrokenModelError, _no_weights),
    StartupFailure("unknown_architecture", Cause.UNSUPPORTED_ARCHITECTURE, BrokenModelError, _unknown_architecture),
    StartupFailure("unknown_model_type", Cause.UNSUPPORTED_ARCHITECTURE, BrokenModelError, _unknown_model_type),
    StartupFailure("no_tokenizer_json", Cause.NO_TOKENIZER, BrokenModelError, _no_tokenizer_json),
    StartupFailure(
        "no_tokenizer_files", Cause.NO_TOKENIZER, BrokenModelError, _no_tokenizer_files, serves=True, always=True
    ),
    StartupFailure("kv_cache_too_small", Cause.KV_CACHE_TOO_SMALL, OutOfMemoryError, _kv_cache_too_small, always=True),
    StartupFailure("host_memory", Cause.HOST_MEMORY, OutOfMemoryError, _more_memory_than_the_machine_has),
    StartupFailure("vllm_missing", Cause.VLLM_MISSING, LaunchError, _vllm_missing, always=True),
    StartupFailure("broken_torchvision", Cause.BROKEN_INSTALL, LaunchError, _broken_torchvision),
)
