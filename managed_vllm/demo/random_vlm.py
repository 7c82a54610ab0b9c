"""Makes a random vision-language model of the Qwen2.5-VL architecture: `python -m managed_vllm.demo.random_vlm OUT`.

UI-TARS 1.5 is of this architecture. The model knows nothing, but vLLM really serves it: pictures are resized, cut into
patches, encoded and placed into the prompt as with the large one. It is made on the spot in seconds, without a
download, and the same seed makes the same files. vLLM needs a torchvision that imports to serve it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARK = "random_vlm.json"
"""The file that says which seed, and which version of this program, a folder was made with."""

_VERSION = 1  # to be raised whenever the same seed makes other files
_CONTEXT = 8192
_PATCH = 14
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- elif message['content'] is iterable -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] in ('video', 'video_url') -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_TOKENIZER_CORPUS = (
    "You are a GUI agent. You are given a task and your action history, with screenshots. Output Format",
    "Thought: I will click the button. Action: click(start_box='(197,525)') left_double right_single drag end_box",
    "hotkey(key='') type(content='') scroll(direction='down') wait() finished(content='done') User Instruction",
)


def make_random_vlm(out: Path, *, seed: int = 0) -> Path:
    """Makes the model in the folder `out`, or reuses the one that is there, and returns `out`.

    The folder appears at once and complete: it is made beside `out` and then renamed. Several processes may call this
    at the same time.

    Raises:
        FileExistsError: `out` exists and is something else, or was made with another seed.
    """
    if _is_made(out, seed):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_all(draft, seed)
        try:
            os.rename(draft, out)
        except OSError:
            if not _is_made(out, seed):  # another process was first, with the same model
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _is_made(out: Path, seed: int) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made = json.loads((out / MARK).read_text())
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{out} exists and was not made by managed_vllm.demo.random_vlm") from error
    if made != _mark(seed):
        raise FileExistsError(f"{out} holds another random model ({made}); remove it or choose another folder")
    return True


def _mark(seed: int) -> dict[str, object]:
    return {"architecture": "qwen2_5_vl", "seed": seed, "version": _VERSION}


def _write_all(folder: Path, seed: int) -> None:
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    _model(tokenizer, seed).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private, as mkdtemp makes the folder
    folder.chmod(0o755)
    _write_json(folder / "preprocessor_config.json", _image_processor())
    _write_json(folder / MARK, _mark(seed))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in _SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_CONTEXT,
    )


def _model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    hidden = 128
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,  # of 32: smaller heads kill vLLM's CPU engine at the first request
            "num_key_value_heads": 2,
            "max_position_embeddings": _CONTEXT,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            # Time, height and width of the multimodal RoPE: together half a head.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": _PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "in_channels": 3,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # leaves the caller's random numbers alone
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # From a standard deviation of 0.02 to 0.1: otherwise the answer hardly depends on the picture, and
                # mixed-up pictures would show in no test.
                parameter.mul_(5)
    return model.to(torch.bfloat16)


def _image_processor() -> dict[str, object]:
    """As in Qwen2.5-VL: every side a multiple of two patches, and from 4 to 1280 tokens a picture."""
    token_pixels = (2 * _PATCH) ** 2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 4 * token_pixels, "longest_edge": 1280 * token_pixels},
        "patch_size": _PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m managed_vllm.demo.random_vlm", description="Makes a random vision-language model."
    )
    parser.add_argument("out", type=Path, help="folder to make; reused if this program made it with the same seed")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    given = parser.parse_args(arguments)
    try:
        print(make_random_vlm(given.out, seed=given.seed))
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
