"""What is seen of a checkpoint before it is loaded: each way to spoil one, on copies of the embedded model's."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_checkpoints import copy_of_demo, edit_json, rewritten, tensors_of, write_safetensors

from managed_vllm import demo
from managed_vllm.errors import CheckpointError
from managed_vllm.server import checkpoints, safetensors_files

SERVED = str(demo.weights_path())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as good as the one that is served."""
    return copy_of_demo(tmp_path / "checkpoint")


def faults(folder: Path | str, **options: Any) -> str:
    """What speaks against it, as one text."""
    with pytest.raises(CheckpointError) as caught:
        checkpoints.check(str(folder), SERVED, **options)
    assert all(fault.remedy for fault in caught.value.faults)
    return "\n".join(fault.text for fault in caught.value.faults)


def sharded(folder: Path) -> list[str]:
    """The checkpoint in two files and an index."""
    tensors = tensors_of(folder / "model.safetensors")
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    weight_map = {name: files[place % 2] for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return files


# -- good ones ---------------------------------------------------------------------------------------------------------


def test_a_copy_of_what_is_served_is_good(folder: Path) -> None:
    found = checkpoints.check(str(folder), SERVED)
    assert found.folder == folder
    assert not found.has_changed()
    assert "model.embed_tokens.weight" in found.tensors


def test_a_checkpoint_in_several_files_is_good(folder: Path) -> None:
    sharded(folder)
    assert len(checkpoints.check(str(folder), SERVED).tensors) == len(checkpoints.read(SERVED).tensors)


def test_fields_without_effect_may_differ_and_new_ones_may_appear(folder: Path) -> None:
    edit_json(folder / "config.json", transformers_version="99", dtype="float32", a_field_of_tomorrow=[1])
    checkpoints.check(str(folder), SERVED)


def test_float_types_convert_into_each_other(folder: Path) -> None:
    def to_float32(name: str, dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        return "F32", shape, struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))

    rewritten(folder, to_float32)
    checkpoints.check(str(folder), SERVED)


def test_the_output_layer_may_be_saved_though_it_is_tied_to_the_embeddings(folder: Path) -> None:
    tensors = tensors_of(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    checkpoints.check(str(folder), SERVED)


def test_where_what_is_served_cant_be_read_the_checkpoint_is_looked_at_by_itself(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=1)
    assert checkpoints.check(str(folder), "nobody/nothing").folder == folder


def test_a_change_after_the_check_is_seen(folder: Path) -> None:
    found = checkpoints.check(str(folder), SERVED)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert found.has_changed()


# -- bad ones ----------------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in faults(tmp_path / "none")
    assert "no such folder" in faults("nobody/nothing", environment={"HF_HOME": str(tmp_path)})
    assert "no such folder" in faults("../../no-such-folder")
    assert "no such folder" in faults("a\0b")


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: cut(folder / "model.safetensors", 500_000), "has 500,000 bytes, by its header it should have"),
        (lambda folder: cut(folder / "model.safetensors", 1000), "cut off within its header"),
        (lambda folder: cut(folder / "model.safetensors", 3), "is cut off: 3 bytes"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"there are no *.safetensors files"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: is not there"),
        (lambda folder: cut(folder / "config.json", 100), "config.json can't be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is no JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "too deeply nested"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json can't be read"),
        (
            lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "pointer of git-lfs",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4000), "no safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(bytes([9]) + bytes(30)),
            "header that can't be read",
        ),
    ],
)
def test_damaged_files(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    assert said in faults(folder)


def test_a_named_pipe_in_place_of_the_weights_blocks_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "is not a regular file" in faults(folder)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_file_of_several(folder: Path, with_index: bool) -> None:
    files = sharded(folder)
    (folder / files[1]).unlink()
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    assert files[1] in faults(folder)


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    index = {"weight_map": {"a": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no file of this folder" in faults(folder)


def test_an_index_that_has_more_than_its_files(folder: Path) -> None:
    files = sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.weight"] = files[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 tensors of model.safetensors.index.json are not in their files: model.layers.9.weight" in faults(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, 'architectures is ["LlamaForCausalLM"]'),
        ({"vocab_size": 1000}, "vocab_size is 1000, served is 717"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta is 5.0, served is 10000.0"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_another_model(folder: Path, changed: dict[str, Any], said: str) -> None:
    edit_json(folder / "config.json", **changed)
    assert said in faults(folder)


def test_another_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 9999, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "1 tokens differ, <new>" in faults(folder)


def test_the_same_vocabulary_written_otherwise(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    checkpoints.check(str(folder), SERVED)


def test_other_shapes_names_and_types(folder: Path) -> None:
    def other(name: str, dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
        if name == "model.norm.weight":
            return "I16", shape, data
        return dtype, shape, data

    rewritten(folder, other)
    assert "model.norm.weight is I16, served is BF16" in faults(folder)
    tensors = tensors_of(folder / "model.safetensors")
    dtype, shape, data = tensors.pop("model.norm.weight")
    write_safetensors(folder / "model.safetensors", {**tensors, "model.other.weight": (dtype, shape, data)})
    assert "1 tensors are missing: model.norm.weight" in faults(folder)
    assert "1 tensors are not served: model.other.weight" in faults(folder)
    write_safetensors(folder / "model.safetensors", {**tensors, "model.norm.weight": ("BF16", [2, 64], data)})
    assert "model.norm.weight has the shape [2, 64], served is [128]" in faults(folder)


# -- NaN and infinity --------------------------------------------------------------------------------------------------


def test_nan_in_one_number_of_the_weights(folder: Path) -> None:
    def spoilt(name: str, dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
        return dtype, shape, data[:-2] + b"\xc0\x7f" if name == "model.norm.weight" else data

    rewritten(folder, spoilt)
    assert faults(folder) == "1 tensors have NaN or infinity: model.norm.weight"
    checkpoints.check(str(folder), SERVED, scan_limit=1000)  # it is beyond what is looked at


@pytest.mark.parametrize(
    ("dtype", "code", "bits"),
    [("F64", "d", 64), ("F32", "f", 32), ("F16", "e", 16)],
)
def test_every_float_type_is_searched(tmp_path: Path, dtype: str, code: str, bits: int) -> None:
    path = tmp_path / "model.safetensors"
    for value, is_finite in ((1.5, True), (-0.0, True), (65504.0, True), (float("nan"), False), (float("-inf"), False)):
        data = struct.pack(f"<5{code}", 0.0, -1.0, value, 3.0, 1e-7)
        write_safetensors(path, {"x": (dtype, [5], data)})
        found = list(safetensors_files.not_finite(path, safetensors_files.read_header(path), 1 << 20))
        assert found == ([] if is_finite else ["x"]), value


def test_types_of_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    numbers = {"F8_E4M3": (b"\x7e\x00\xfe", b"\x00\xff"), "F8_E5M2": (b"\x7b\xfb", b"\x00\xfc"), "U8": (b"\xff", None)}
    for dtype, (good, bad) in numbers.items():
        for data, expected in ((good, []), (bad, ["x"])):
            if data is not None:
                write_safetensors(path, {"x": (dtype, [len(data)], data)})
                header = safetensors_files.read_header(path)
                assert list(safetensors_files.not_finite(path, header, 1 << 20)) == expected


# -- hub ids -----------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_found_in_the_servers_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(SERVED, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    for environment in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        for identifier in ("org/name", "org/name@main", "org/name@abc"):
            found = checkpoints.check(identifier, SERVED, environment)
            assert found.folder == repository / "snapshots" / "abc"
    assert "no such model" in faults("org/name@other", environment={"HF_HOME": str(tmp_path)})


def test_the_error_pickles(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.check(str(folder), SERVED)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.faults, str(copy)) == (str(folder), caught.value.faults, str(caught.value))
    assert "remedy: give the folder" in str(copy)
