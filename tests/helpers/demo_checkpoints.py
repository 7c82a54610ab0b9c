"""Checkpoints made from the embedded model's, good and bad, without torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from managed_vllm import demo

_RANK = 4

Stored = tuple[str, list[int], bytes]
"""A tensor: its dtype, shape and data."""


def tensors_of(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        first, last = one["data_offsets"]
        found[name] = (one["dtype"], one["shape"], data[begin + first : begin + last])
    return found


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    header, place = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


def rewritten(folder: Path, change: Callable[[str, str, list[int], bytes], Stored]) -> None:
    """The folder's tensors as `change` returns them, given name, dtype, shape and data."""
    path = folder / "model.safetensors"
    write_safetensors(path, {name: change(name, *stored) for name, stored in tensors_of(path).items()})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def copy_of_demo(folder: Path) -> Path:
    """A copy of the embedded model's checkpoint."""
    shutil.copytree(demo.weights_path(), folder)
    return folder


def with_rows_swapped(folder: Path, one: int, other: int) -> None:
    """Swaps two tokens' rows of the embeddings, which are the output layer, too: one is said for the other."""

    def swapped(name: str, dtype: str, shape: list[int], data: bytes) -> Stored:
        if name == "model.embed_tokens.weight":
            size = len(data) // shape[0]
            rows = [data[place : place + size] for place in range(0, len(data), size)]
            rows[one], rows[other] = rows[other], rows[one]
            data = b"".join(rows)
        return dtype, shape, data

    rewritten(folder, swapped)


def make_adapter(folder: Path, seed: int = 0) -> Path:
    """A LoRA adapter of the embedded model, in peft's format: random, and strong enough to change the answers."""
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    config = json.loads((demo.weights_path() / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    rng = numpy.random.default_rng(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = rng.normal(size=(_RANK, hidden)).astype("float32")
        weights[f"{name}.lora_B.weight"] = rng.normal(size=(heads, _RANK)).astype("float32")
    folder.mkdir()
    safetensors.save_file(weights, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**described, "target_modules": ["q_proj"]}))
    return folder
