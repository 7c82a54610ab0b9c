"""The random vision-language model: made the same every time, at once or not at all, and read by transformers."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from managed_vllm.demo.random_vlm import MARK, main, make_random_vlm

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_vlm(tmp_path_factory.mktemp("vlm") / "model")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_seed_makes_the_same_files(model: Path, tmp_path: Path) -> None:
    assert digests(make_random_vlm(tmp_path / "again")) == digests(model)


def test_another_seed_makes_other_weights(model: Path, tmp_path: Path) -> None:
    other = digests(make_random_vlm(tmp_path / "other", seed=1))
    assert {name for name, digest in digests(model).items() if other[name] != digest} == {MARK, "model.safetensors"}


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_random_vlm(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_an_existing_folder_of_the_same_seed_is_reused(model: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert make_random_vlm(model) == model
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_an_existing_folder_of_another_seed_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileExistsError, match="another random model"):
        make_random_vlm(model, seed=1)
    assert main([str(model), "--seed", "1"]) == 1
    assert "another random model" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not made by"):
        make_random_vlm(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        make_random_vlm(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_at_once_make_one_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "managed_vllm.demo.random_vlm", str(tmp_path / "model")]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [maker.communicate(timeout=240)[0].strip() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert answers == [str(tmp_path / "model")] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_it_is_a_small_qwen2_5_vl_in_bf16(model: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(model)
    assert config.model_type == "qwen2_5_vl"
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum(path.stat().st_size for path in model.iterdir()) < 3_000_000


def test_its_processor_makes_one_token_of_each_28_by_28_pixels(model: Path) -> None:
    pytest.importorskip("torchvision", exc_type=ImportError)
    image_module = pytest.importorskip("PIL.Image")
    try:
        processor = transformers.AutoProcessor.from_pretrained(model)
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for CUDA
        pytest.skip(f"the processor does not load here: {error}")
    noise = random.Random(0).randbytes(640 * 360 * 3)
    picture = image_module.frombytes("RGB", (640, 360), noise)
    content = [{"type": "image"}, {"type": "text", "text": "What is there?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(text=[text], images=[picture], return_tensors="pt")["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 299
