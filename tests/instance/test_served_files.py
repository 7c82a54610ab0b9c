"""The files of a model: what counts as changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from managed_vllm.config import ServerSpec
from managed_vllm.served_files import changes, snapshot


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("old")
        os.utime(folder / name, (1e9, 1e9))  # long ago: the clock of a file system may tick only every few milliseconds
    return folder


def spec(model: Path, **engine_args: object) -> ServerSpec:
    return ServerSpec.of(str(model), engine_args=engine_args, command=["x", "{port}"])


def test_what_is_overwritten_replaced_added_or_removed_is_seen(model: Path) -> None:
    before = snapshot(spec(model))
    assert len(before) == 3
    assert changes(before, snapshot(spec(model))) == {}
    weights, config = model / "model.safetensors", model / "config.json"
    weights.write_text("new")
    os.utime(config, ns=(0, 0))
    (model / "tokenizer.json").unlink()
    (model / "added.safetensors").touch()
    found = changes(before, snapshot(spec(model)))
    names = ["added.safetensors", "config.json", "model.safetensors", "tokenizer.json"]
    assert list(found) == [str(model / name) for name in names]
    assert found[str(model / "added.safetensors")][1] == "not there"


def test_a_file_moved_into_its_place_with_its_old_time_and_size_is_seen(model: Path) -> None:
    before, weights = snapshot(spec(model)), model / "model.safetensors"
    other = model.parent / "other"
    other.write_text("new")
    times = weights.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(weights)
    assert list(changes(before, snapshot(spec(model)))) == [str(weights)]


def test_what_a_trainer_writes_beside_is_not_the_model(model: Path) -> None:
    before = snapshot(spec(model))
    for name in ("trainer_state.json", "optimizer.pt", "rng_state_0.pth", "README.md", "events.out.1"):
        (model / name).write_text("x")
    (model / "checkpoint-200").mkdir()
    (model / "checkpoint-200" / "model.safetensors").touch()
    assert changes(before, snapshot(spec(model))) == {}
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").touch()
    assert list(changes(before, snapshot(spec(model)))) == [str(model / "1_Pooling" / "config.json")]


def test_the_target_of_a_link_counts_not_the_link(model: Path) -> None:
    blob = model.parent / "blob"
    blob.write_text("old")
    link = model / "model.safetensors"
    link.unlink()
    link.symlink_to(blob)
    before = snapshot(spec(model))
    blob.write_text("newer")
    assert list(changes(before, snapshot(spec(model)))) == [str(link)]


def test_everything_that_an_argument_names_is_watched(model: Path, tmp_path: Path) -> None:
    adapter, draft = tmp_path / "adapter", tmp_path / "draft"
    for folder in (adapter, draft):
        folder.mkdir()
        (folder / "adapter_model.safetensors").touch()
    template = tmp_path / "t.jinja"
    template.touch()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.json").touch()
    one = spec(
        model,
        lora_modules=[f"a={adapter}"],
        speculative_config={"model": str(draft)},
        chat_template=str(template),
        download_dir=str(tmp_path / "cache"),
    )
    watched = {Path(path).parent.name for path in snapshot(one)} | {Path(path).name for path in snapshot(one)}
    assert {"adapter", "draft", "t.jinja", "config.json"} <= watched
    assert "x.json" not in watched


def test_a_name_of_the_hub_and_what_is_not_there_have_no_files(tmp_path: Path) -> None:
    hub = ServerSpec.of("org/model", engine_args={"tokenizer": "org/t"}, command=["x", "{port}"])
    assert snapshot(hub) == {}
    assert snapshot(spec(tmp_path / "nowhere")) == {}


def test_inodes_of_a_file_system_in_user_space_are_not_compared() -> None:
    assert changes({"a": [1, 2, 0]}, {"a": [1, 2, 7]}) == {}
    assert changes({"a": [1, 2, 3]}, {"a": [1, 2, 7]}) != {}
