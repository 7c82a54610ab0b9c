"""Engine arguments: one canonical form for everything that vLLM reads as the same."""

from __future__ import annotations

import enum
import json
import numbers
import os
from pathlib import Path
from typing import Any

import pytest
from argument_spellings import SAME, Arguments

from managed_vllm.engine_arguments import canonical, from_flags, to_flags, without_defaults, without_secrets
from managed_vllm.errors import ConfigError
from managed_vllm.in_server.managed_vllm_arguments import VARIABLE, filled_in
from managed_vllm.masking import protect


def form(given: list[str] | Arguments) -> Arguments:
    return without_defaults(from_flags(given) if isinstance(given, list) else canonical(given))


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: str(spellings[0])[:50])
def test_spellings_of_one_thing_are_one_form(spellings: tuple[list[str] | Arguments, ...]) -> None:
    forms = [form(spelling) for spelling in spellings]
    assert forms == [forms[0]] * len(forms)


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"revision": "1.10"}, ["--revision=1.10"]),
        ({"revision": "007"}, ["--revision=007"]),
        ({"revision": "1e5"}, ["--revision=1e5"]),
        (["--revision", "1e5"], ["--revision=1e5"]),
        ({"chat_template": "{{ x }}"}, ["--chat-template={{ x }}"]),
        ({"max_model_len": 2048, "enforce_eager": False}, ["--no-enforce-eager", "--max-model-len=2048"]),
        ({"disable_log_stats": False, "headless": False}, []),
        ({"disable_log_stats": True}, ["--disable-log-stats"]),
        ({"allowed_methods": "GET"}, ["--allowed-methods", '["GET"]']),
        ({"served_model_name": ["a", "b"]}, ["--served-model-name", "a", "b"]),
        ({"config": "/x.yaml"}, ["--config", "/x.yaml"]),
        ({"hf_token": False}, []),
    ],
)
def test_flags_say_what_was_given(given: list[str] | Arguments, flags: list[str]) -> None:
    arguments = from_flags(given) if isinstance(given, list) else canonical(given)
    assert to_flags(arguments) == flags


def test_what_is_not_the_same_stays_apart() -> None:
    different: list[Arguments] = [
        {"revision": "1.0"},
        {"revision": "1.00"},
        {"revision": "main"},
        {"max_model_len": 512},
        {"max_model_len": 513},
        {"gpu_memory_utilization": 0.92},
        {"gpu_memory_utilization": 0.9},
        {"hf_overrides": {"a": "1"}},
        {"hf_overrides": {"a": 1}},
        {},
    ]
    forms = [form(given) for given in different]
    assert [forms.index(given) for given in forms] == list(range(len(forms)))


class Kind(enum.Enum):
    LAZY = "lazy"


class Index:
    """As numpy's integers: registered as a number, no subclass of int."""

    def __int__(self) -> int:
        return 7


def test_values_of_other_types() -> None:
    numbers.Integral.register(Index)
    given = {"a": Kind.LAZY, "b": Path("/x"), "c": (1, 2), "d": {3, 1}, "e": Index(), "f": {"g": Index()}}
    assert canonical(given) == {"a": "lazy", "b": "/x", "c": [1, 2], "d": [1, 3], "e": 7, "f": {"g": 7}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 1}, "use port="),
        ({"api-key": "x"}, "use api_key="),
        ({"x": object()}, "can't be passed"),
        ({"x": "a\0b"}, "NUL"),
        ({"x": {"y": "a\0b"}}, "NUL"),
        ({"x": {"y": 1}, "x.z": 2}, "as a whole and by its fields"),
        (["word"], "belongs to no flag"),
    ],
)
def test_what_can_be_no_argument_is_refused(given: list[str] | Arguments, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_flags(given) if isinstance(given, list) else canonical(given)


def test_an_argument_that_holds_itself_is_refused() -> None:
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(ConfigError, match="holds itself"):
        canonical({"x": itself})


def test_an_error_does_not_show_a_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        canonical({"hf_token": b"hf_S3CRET"})
    assert "S3CRET" not in str(caught.value)


def test_relative_paths_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there", "template.jinja", "plugin.py"):
        (tmp_path / name).mkdir() if name == "there" else (tmp_path / name).touch()
    here, there = str(tmp_path), str(tmp_path / "there")
    assert canonical({"download_dir": "new"}) == {"download_dir": f"{here}/new"}
    assert canonical({"allowed_local_media_path": "."}) == {"allowed_local_media_path": here}
    assert canonical({"tool_parser_plugin": "plugin.py"}) == {"tool_parser_plugin": f"{here}/plugin.py"}
    assert canonical({"reasoning_parser_plugin": "./x.py"}) == {"reasoning_parser_plugin": f"{here}/x.py"}
    assert canonical({"chat_template": "template.jinja"}) == {"chat_template": f"{here}/template.jinja"}
    assert canonical({"tokenizer": "there"}) == {"tokenizer": there}
    assert canonical({"tokenizer": "org/tokenizer"}) == {"tokenizer": "org/tokenizer"}
    assert canonical({"lora_modules": ["a=there", "b=org/adapter"]}) == {
        "lora_modules": [f"a={there}", "b=org/adapter"]
    }
    dicts = [{"name": "a", "path": "there"}, '{"name": "b", "path": "./c"}']
    adapters = canonical({"lora_modules": dicts})["lora_modules"]
    assert [adapter["path"] for adapter in adapters] == [there, f"{here}/c"]
    assert canonical({"default_mm_loras": {"image": "there"}})["default_mm_loras"] == {"image": there}
    speculative = canonical({"speculative_config": {"model": "there", "num_speculative_tokens": 2}})
    assert speculative["speculative_config"]["model"] == there
    assert canonical({"compilation_config.cache_dir": "cache"})["compilation_config"] == {"cache_dir": f"{here}/cache"}
    (tmp_path / "cert.pem").symlink_to("renewed.pem")
    assert canonical({"ssl_certfile": "cert.pem"}) == {"ssl_certfile": f"{here}/cert.pem"}
    assert canonical({"some_plugin_argument": "./x"}) == {"some_plugin_argument": f"{here}/x"}


def test_no_secret_is_in_a_flag_and_the_first_interpreter_gets_them_back() -> None:
    given = {
        "hf_token": "hf_S3CRET",
        "kv_transfer_config": {"extra": {"api_key": "S3CRET"}, "list": [{"password": 'S3"CRET'}]},
        "watermark_config": {"key": 53123},
        "plugin_token": "S3CRET=x",
        "max_num_batched_tokens": 4096,
    }
    shown, variables = without_secrets(protect(canonical(given)))
    words = to_flags(shown)
    assert not any("S3" in word or "53123" in word for word in words)
    assert variables["HF_TOKEN"] == "hf_S3CRET"
    hidden = json.loads(variables[VARIABLE])
    told = from_flags([filled_in(word, hidden) for word in words])
    assert told == canonical({**given, "hf_token": True})


def test_no_token_at_all() -> None:
    assert without_secrets({"hf_token": False})[1] == {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    assert without_secrets({"hf_token": True}) == ({"hf_token": True}, {})


def test_many_secrets_are_not_mixed_up() -> None:
    many = protect(canonical({"x": {f"k{number}": {"api_key": f"value-{number}"} for number in range(30)}}))
    shown, variables = without_secrets(many)
    word = filled_in(to_flags(shown)[1], json.loads(variables[VARIABLE]))
    assert json.loads(word) == {f"k{number}": {"api_key": f"value-{number}"} for number in range(30)}


def test_pathlike_is_a_path(tmp_path: Path) -> None:
    class Where(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path)

    assert canonical({"tokenizer": Where()}) == {"tokenizer": str(tmp_path)}
