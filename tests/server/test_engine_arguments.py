"""Keywords and command-line words ask for the same server; wrong ones are refused before anything is started."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest

from managed_vllm import engine_arguments
from managed_vllm.errors import ConfigError


class Level(enum.Enum):
    HIGH = 3


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"max_model_len": 512}, ["--max-model-len", "512"]),
        ({"max_model_len": 512}, ["--max-model-len=512"]),
        ({"gpu_memory_utilization": 0.5}, ["--gpu-memory-utilization", "0.5"]),
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"tensor_parallel_size": 2}, ["-tp", "2"]),
        ({"optimization_level": 3}, ["-O3"]),
        ({"speculative_config": {"method": "ngram"}}, ["--speculative-config", '{"method": "ngram"}']),
        ({"allowed_origins": ["a", "b"]}, ["--allowed-origins", "a", "b"]),
        ({"kv_cache_dtype": "true"}, ["--kv-cache-dtype", "true"]),  # a word to vLLM, not a boolean
        ({"optimization_level": Level.HIGH}, ["-O3"]),
        ({"lora_modules": ["z=/z", "a=/a"]}, ["--lora-modules", "z=/z", "a=/a"]),
    ],
)
def test_keywords_and_command_line_words_mean_the_same(keywords: dict[str, Any], words: list[str]) -> None:
    assert engine_arguments.canonical(keywords) == engine_arguments.from_flags(words)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"lora_modules": ["a=/a", "b=/b"]},
        {"chat_template": "-starts with a dash"},
        {"compilation_config.mode": 3},
    ],
)
def test_flags_and_back_is_a_round_trip(arguments: dict[str, Any]) -> None:
    canonical = engine_arguments.canonical(arguments)
    assert engine_arguments.from_flags(engine_arguments.to_flags(canonical)) == canonical


def test_the_flags_are_those_of_vllm() -> None:
    arguments = {"max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False, "a": ["x", 1], "b": {}}
    assert engine_arguments.to_flags(arguments) == [
        "--max-model-len=512",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--a", "x", "1"),
        *("--b", "{}"),
    ]


def test_order_and_none_change_nothing() -> None:
    assert engine_arguments.canonical({"b": {"y": 1, "x": {3, 1}}, "a": None}) == {"b": {"x": [1, 3], "y": 1}}


def test_a_path_that_exists_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").touch()
    found = engine_arguments.canonical({"chat_template": "template.jinja", "tokenizer": "some/hub-id"})
    assert found == {"chat_template": str(tmp_path / "template.jinja"), "tokenizer": "some/hub-id"}


@pytest.mark.parametrize("name", ["port", "api-key", "model", "middleware"])
def test_what_has_a_keyword_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not an engine argument here") as caught:
        engine_arguments.canonical({name: "x"})
    assert caught.value.field == name


def test_a_value_that_is_no_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="can't be passed to a server process") as caught:
        engine_arguments.canonical({"logits_processors": [print]})
    assert caught.value.field == "logits_processors"


def test_a_word_without_a_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match="'512' belongs to no flag"):
        engine_arguments.from_flags(["512", "--max-model-len"])


@pytest.fixture
def vllm_source(tmp_path: Path) -> Path:
    """As much of vLLM's source as the names of the arguments are read from."""
    sources = {
        "engine/arg_utils.py": "class EngineArgs:\n    max_model_len: int = 0\n    enforce_eager: bool = False\n"
        "parser.add_argument('--quantization', '-q')\n",
        "entrypoints/openai/cli_args.py": "class FrontendArgs:\n    chat_template: str = ''\n",
        "entrypoints/cli/serve.py": "this is no Python",
    }
    for path, text in sources.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_the_known_arguments_are_read_from_the_source(vllm_source: Path) -> None:
    known = engine_arguments.known_arguments(vllm_source)
    assert known == {"max_model_len", "enforce_eager", "chat_template", "quantization"}


def test_an_unknown_argument_is_refused_with_the_nearest_names(vllm_source: Path) -> None:
    engine_arguments.check_known({"max_model_len": 1, "chat_template.x": 1}, vllm_source)
    with pytest.raises(ConfigError, match="did you mean max_model_len") as caught:
        engine_arguments.check_known({"max_modl_len": 1}, vllm_source)
    assert caught.value.field == "max_modl_len"


def test_without_a_source_that_we_understand_nothing_is_refused(tmp_path: Path) -> None:
    engine_arguments.check_known({"anything": 1}, None)
    engine_arguments.check_known({"anything": 1}, tmp_path)
