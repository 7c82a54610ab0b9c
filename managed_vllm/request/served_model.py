"""The files of the model that a server has: its tokenizer, and the sampling defaults of its generation config."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

from managed_vllm.errors import UnsupportedMethodError
from managed_vllm.request.sampling import SamplingParams

PROBES = ("Hello, world! 1234", "  <|im_start|>user\nÄ 好 🙂")
"""Texts by which a tokenizer is compared with the server's."""
_OF_GENERATION_CONFIG = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p"),
    "max_new_tokens",
)
"""What vLLM takes of a model's generation_config.json (0.32: `ModelConfig.get_diff_sampling_param`)."""


@functools.lru_cache(maxsize=8)
def tokenizer_of(root: str) -> Any:
    """The tokenizer in a folder or of a Hugging Face id. Raises `UnsupportedMethodError` where it can't be had."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise _no_tokenizer("it needs transformers, which is not installed: pip install transformers") from error
    try:
        return transformers.AutoTokenizer.from_pretrained(root)
    except Exception as error:  # a hub's, a file's, a tokenizer's: it names no set
        raise _no_tokenizer(f"the server's model is {root}, which can't be read here: {error}") from error


def other_tokenizer(root: str) -> UnsupportedMethodError:
    """The error where the server's tokenizer is not that of its model."""
    return _no_tokenizer(f"the server's is another than that of {root} (tokenizer=): load it with transformers")


def _no_tokenizer(why: str) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"get_tokenizer(): {why}. tokenize() and detokenize() ask the server", method="get_tokenizer"
    )


def default_sampling_params(root: str) -> SamplingParams:
    """vLLM's defaults, and above them those of the model's generation_config.json, if it has one."""
    config = _generation_config(root)
    found = {name: config[name] for name in _OF_GENERATION_CONFIG if config.get(name) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return SamplingParams(**found)


def _generation_config(root: str) -> dict[str, Any]:
    path: str | None = str(Path(root, "generation_config.json"))
    if not Path(root).is_dir():
        try:
            hub = importlib.import_module("huggingface_hub")
            path = hub.hf_hub_download(root, "generation_config.json")
        except Exception as error:
            if type(error).__name__ in ("RemoteEntryNotFoundError", "EntryNotFoundError"):
                return {}
            raise UnsupportedMethodError(
                f"get_default_sampling_params(): the server's model is {root}, whose generation_config.json can't be "
                f"read here: {error}. Without sampling parameters a request has those defaults anyway",
                method="get_default_sampling_params",
            ) from error
    try:
        found = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}
