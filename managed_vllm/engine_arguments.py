"""vLLM's engine arguments: from keywords or command-line words to one canonical form, and from there to flags.

The canonical form is a dict by vLLM's own names (`tensor_parallel_size`), with JSON values, without the arguments that
are None, so that `ManagedVLLM(max_model_len=512)` and `managed-vllm up --max-model-len 512` ask for the same server.
vLLM's own parser is the reference (`FlexibleArgumentParser`, 0.32): what it reads as the same is the same here. What
arguments exist is read from the source of the vLLM that will be started, without importing it (an import costs
seconds), so that a wrong name dies here and not half a minute later.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import json
import numbers
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from managed_vllm import paths
from managed_vllm.errors import ConfigError
from managed_vllm.in_server import managed_vllm_arguments
from managed_vllm.masking import STARS, Secret, is_secret_name

SHORT_FLAGS = {
    "-ac": "attention_config",
    "-asc": "api_server_count",
    "-cc": "compilation_config",
    "-dc": "diffusion_config",
    "-dcp": "decode_context_parallel_size",
    "-dp": "data_parallel_size",
    "-dpa": "data_parallel_address",
    "-dpb": "data_parallel_backend",
    "-dpe": "data_parallel_external_lb",
    "-dph": "data_parallel_hybrid_lb",
    "-dpl": "data_parallel_size_local",
    "-dpm": "data_parallel_multi_port_external_lb",
    "-dpn": "data_parallel_rank",
    "-dpp": "data_parallel_rpc_port",
    "-dpr": "data_parallel_start_rank",
    "-ep": "enable_expert_parallel",
    "-n": "nnodes",
    "-O": "optimization_level",
    "-pcp": "prefill_context_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-q": "quantization",
    "-r": "node_rank",
    "-sc": "speculative_config",
    "-tp": "tensor_parallel_size",
}
"""vLLM 0.32's short flags, `engine/arg_utils.py` and `entrypoints/launchers/cli_args.py`."""

MANAGED = {
    "host": "host=",
    "port": "port=",
    "uds": "uds=",
    "api_key": "api_key=",
    "model": "model=",
    "middleware": "command=, or a vLLM plugin; our own middleware guards the key",
}
"""Arguments that are ours to give: they have a keyword of their own."""

DEFAULTS: Mapping[str, Any] = {
    "allow_credentials": False,
    "allowed_local_media_path": "",
    "chat_template_content_format": "auto",
    "config_format": "auto",
    "convert": "auto",
    "cpu_offload_gb": 0,
    "data_parallel_backend": "mp",
    "data_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "disable_custom_all_reduce": False,
    "disable_log_stats": False,
    "disable_sliding_window": False,
    "dtype": "auto",
    "enable_auto_tool_choice": False,
    "enable_expert_parallel": False,
    "enable_force_include_usage": False,
    "enable_log_requests": False,
    "enable_mm_embeds": False,
    "enable_prompt_embeds": False,
    "enable_sleep_mode": False,
    "enforce_eager": False,
    "generation_config": "auto",
    "kv_cache_dtype": "auto",
    "load_format": "auto",
    "logprobs_mode": "raw_logprobs",
    "lora_dtype": "auto",
    "max_logprobs": 20,
    "max_lora_rank": 16,
    "max_loras": 1,
    "mm_processor_cache_gb": 4,
    "model_impl": "auto",
    "nnodes": 1,
    "node_rank": 0,
    "pipeline_parallel_size": 1,
    "prefix_caching_hash_algo": "sha256",
    "response_role": "assistant",
    "return_tokens_as_token_ids": False,
    "runner": "auto",
    "scheduling_policy": "fcfs",
    "seed": 0,
    "skip_tokenizer_init": False,
    "tensor_parallel_size": 1,
    "tokenizer_mode": "auto",
    "trust_remote_code": False,
    "uvicorn_log_level": "info",
}
"""Arguments that say nothing when they are given with this value: defaults of vLLM 0.20, 0.24, 0.28 and 0.32 alike.

Not here: what has changed meanwhile (`gpu_memory_utilization`, 0.9 or 0.92), and what vLLM derives from the model.
"""

_ALIASES = {"device_memory_utilization": "gpu_memory_utilization"}

SCALED_NUMBERS = frozenset(
    {
        "kv_cache_memory_bytes",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_queued_tokens",
        "max_num_scheduled_tokens",
        "safetensors_prefetch_block_size",
    }
)
"""Arguments that take `4k` (4,000) and `4K` (4,096)."""

DECIMALS = frozenset(
    {
        "cpu_offload_gb",
        "dp_supervisor_probe_interval_s",
        "dp_supervisor_probe_timeout_s",
        "gpu_memory_utilization",
        "kv_cache_metrics_sample",
        "kv_offloading_size",
        "mm_encoder_fp8_scale_save_margin",
        "mm_ipc_gpu_memory_gb",
        "mm_processor_cache_gb",
        "swap_space",
        "video_pruning_rate",
        "watermark",
    }
)
"""Arguments whose text is a decimal number: `0.90` is 0.9. That of others may be a name (`revision`)."""

JSON_LISTS = frozenset({"allowed_headers", "allowed_methods", "allowed_origins"})
"""Arguments that take a list as one word of JSON, not as several words."""

ONLY_TRUE = frozenset(
    {
        "aggregate_engine_logging",
        "data_parallel_multi_port_external_lb",
        "disable_log_stats",
        "grpc",
        "headless",
        "hf_token",
    }
)
"""Flags without a `--no-…`: not given means false."""

_TWO_WORDS = frozenset({"config"})
"""Flags that vLLM finds only where their value is a word of its own (`_pull_args_from_config`)."""

_PATHS = frozenset(
    {
        "allowed_local_media_path",
        "download_dir",
        "log_config_file",
        "mm_encoder_fp8_scale_path",
        "mm_encoder_fp8_scale_save_path",
        "reasoning_parser_plugin",
        "tool_parser_plugin",
    }
)
"""Arguments that are paths, whether something is there yet or not."""

_LINKED_PATHS = frozenset({"config", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
"""Arguments that are paths whose symbolic links matter: a renewed certificate is another file behind the same link."""

_NAMES_OR_PATHS = frozenset(
    {"chat_template", "generation_config", "hf_config_path", "spec_model", "tokenizer", "model", "path"}
)
"""Arguments, and fields of dict arguments, that name something on the hub or a file."""

_SOURCES = (
    "engine/arg_utils.py",
    "entrypoints/common/cli_args.py",  # 0.33
    "entrypoints/launchers/cli_args.py",
    "entrypoints/openai/cli_args.py",
    "entrypoints/cli/serve.py",
)


# -- to the canonical form ---------------------------------------------------------------------------------------------


def canonical(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments by canonical name with JSON values; paths are absolute.

    `no_x=True` is `x=False`, `{"x.y": 1}` is `{"x": {"y": 1}}`, "512" is 512, and a list of one is its item. All the
    fields of a `vllm.EngineArgs` (`vars(parser.parse_args())` in vLLM's examples) are those that differ from its
    defaults. Raises `ConfigError` for an argument with a keyword of its own, and for a value that is no flag's.
    """
    try:
        return _canonical(without_vllms_own(arguments))
    except RecursionError:
        raise ConfigError("an engine argument holds itself, or is nested too deep") from None


def _canonical(arguments: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        head, dot, rest = name.partition(".")
        key = _canonical_name(head)
        if key in MANAGED:
            raise ConfigError(f"{head!r} is not an engine argument here; use {MANAGED[key]}", field=head)
        if value is None:
            continue
        plain = _plain(key, value)
        if dot:
            _put_nested(result, key, rest, plain, given=arguments)
        elif key.startswith("no_") and isinstance(plain, bool):
            result[key[3:]] = not plain
        else:
            result[key] = _scalar_or_list(key, plain)
    return {key: _with_paths(key, value) for key, value in sorted(result.items())}


def without_vllms_own(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same without objects of vLLM's classes: of those that are no defaults of its own the fields are taken."""
    engine_args = getattr(sys.modules.get("vllm"), "EngineArgs", None)
    if engine_args is None or not any(_is_vllms(value) for value in arguments.values()):
        return arguments
    return {
        name: _fields_of(value) if _is_vllms(value) else value
        for name, value in differing(arguments, vllms_defaults(engine_args)).items()
    }


def vllms_defaults(engine_args: Any) -> Any:
    """The defaults of vLLM's `EngineArgs`, but for `model`, which is a folder that is there.

    vLLM's default model is looked for under `HF_HUB_OFFLINE=1` (0.32), and may be nowhere.
    """
    return engine_args(model=os.curdir)


def differing(values: Mapping[str, Any], defaults: object) -> dict[str, Any]:
    """Those of the values that are not what `defaults` has under their names."""
    return {
        name: value
        for name, value in values.items()
        if not hasattr(defaults, name) or not _is_same(value, getattr(defaults, name))
    }


def _is_same(value: Any, default: Any) -> bool:
    """Whether it is the default; the empty text for None is, and a dict of all fields (`dataclasses.asdict`)."""
    if isinstance(value, Mapping) and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return bool(value == dataclasses.asdict(default))
    return bool((None if value == "" else value) == (None if default == "" else default))


def _is_vllms(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "vllm"


def _fields_of(value: Any) -> Any:
    """Of one of vLLM's config objects the fields that differ from its class's defaults; of an enum its value."""
    if isinstance(value, enum.Enum):
        return value.value
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    default = type(value)()
    return {
        field.name: _fields_of(its) if _is_vllms(its) else its
        for field in dataclasses.fields(value)
        if field.init and (its := getattr(value, field.name)) != getattr(default, field.name)
    }


def _canonical_name(name: str) -> str:
    key = name.replace("-", "_")
    return _ALIASES.get(key, key)


def _put_nested(result: dict[str, Any], key: str, rest: str, value: Any, *, given: Mapping[str, Any]) -> None:
    """`--x.y.z 1`, `--x.y+ a,b`. vLLM drops `--x '{…}'` where the same argument is given by its fields as well."""
    if any(_canonical_name(name) == key for name in given):
        raise ConfigError(f"{key} is given both as a whole and by its fields ({key}.{rest}); give one", field=key)
    *outer, last = rest.removesuffix("+").split(".")
    target = result.setdefault(key, {})
    for field in outer:
        target = target.setdefault(field, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{key}.{rest}: {field!r} has a value and fields", field=key)
    if rest.endswith("+"):
        items = value.split(",") if isinstance(value, str) else value
        target[last] = [*target.get(last, []), *(items if isinstance(items, list) else [items])]
    elif isinstance(value, str):
        target[last] = _nested_text(value)
    else:
        target[last] = value


def _nested_text(text: str) -> Any:
    """The value of a field given as text: JSON, a number such as `80g`, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        scaled = _scaled(text)
        return text if scaled is None else scaled


def _scalar_or_list(key: str, value: Any) -> Any:
    if key in JSON_LISTS:
        return _json_list(value)
    if isinstance(value, list):
        items = [_number(key, item) for item in value]
        return items[0] if len(items) == 1 and not isinstance(items[0], dict) else items
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return _json_object(value)
    return _number(key, value)


def _json_list(value: Any) -> Any:
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    try:
        return json.loads(value)
    except ValueError:
        return [value]


def _json_object(text: str) -> Any:
    """The dict that a text is, or the text: a chat template may begin with a brace, too."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return _sorted_keys(value) if isinstance(value, dict) else text


def _number(key: str, value: Any) -> Any:
    """A number for a text that vLLM reads as one: `512`, `4k` where it is allowed; and an integer for 512.0."""
    if key == "max_model_len" and value in ("auto", "AUTO", "-1"):
        return -1
    if isinstance(value, str):
        value = _from_text(key, value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _from_text(key: str, text: str) -> Any:
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
        return int(text)
    if key in SCALED_NUMBERS and (scaled := _scaled(text)) is not None:
        return scaled
    if key in DECIMALS and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text):
        return float(text)
    return text


def _scaled(text: str) -> int | None:
    """vLLM's `human_readable_int`: small letters are powers of 1,000 and take decimals, capitals are those of 1,024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT])", text.strip())
    if match is None:
        return None
    number, suffix = match.groups()
    power = "kmgt".index(suffix.lower()) + 1
    if suffix.islower():
        return int(float(number) * 1000**power)
    return None if "." in number else int(number) * 1024**power


def _plain(name: str, value: Any) -> Any:
    """A value of JSON's types. Raises `ConfigError`."""
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"engine argument {name} holds a NUL character", field=name)
    if isinstance(value, bool | int | float | str | Secret):
        return value
    if isinstance(value, os.PathLike):
        return _plain(name, os.fspath(value))
    if isinstance(value, Mapping):
        return _sorted_keys({str(key): _plain(name, item) for key, item in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(name, item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if hasattr(value, "value") and type(value).__module__ != "builtins":  # an enum member
        return _plain(name, value.value)
    shown = STARS if is_secret_name(name) else repr(value)
    raise ConfigError(
        f"engine argument {name}={shown} of type {type(value).__name__} can't be passed to a server process; "
        "give numbers, strings, lists or dicts",
        field=name,
    )


def _sorted_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _sorted_keys(item) if isinstance(item, dict) else item for key, item in sorted(value.items())}


# -- paths -------------------------------------------------------------------------------------------------------------


def _with_paths(key: str, value: Any) -> Any:
    """The value with the paths in it absolute, by `managed_vllm.paths`."""
    if key == "lora_modules":
        return [_adapter(item) for item in value] if isinstance(value, list) else _adapter(value)
    if isinstance(value, dict):
        names_paths = key == "default_mm_loras"
        return {field: _with_paths("path" if names_paths else field, item) for field, item in value.items()}
    if isinstance(value, list):
        return [_with_paths(key, item) for item in value]
    return _path(key, value) if isinstance(value, str) and value else value


def _path(key: str, text: str) -> str:
    if key in _LINKED_PATHS:
        return paths.absolute(text)
    if key in _PATHS or key.endswith(("_dir", "_folder")):
        return paths.canonical(text)
    if key in _NAMES_OR_PATHS or key.endswith(("_path", "_file")):
        return paths.argument(text)
    return paths.canonical(text) if text.startswith(("./", "../", "~/")) else text


def _adapter(value: Any) -> Any:
    """One of `lora_modules`: `name=path`, or a dict with `path`."""
    if isinstance(value, str) and "=" in value and not value.lstrip().startswith("{"):
        name, _, path = value.partition("=")
        return f"{name}={paths.argument(path)}"
    value = _json_object(value) if isinstance(value, str) else value
    return _with_paths("adapter", value) if isinstance(value, dict) else value


# -- what two specs are compared by ------------------------------------------------------------------------------------


def without_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical arguments without those that are given with vLLM's default."""
    return {
        name: value
        for name, value in arguments.items()
        if value not in ({}, []) and not (name in DEFAULTS and value == DEFAULTS[name])
    }


def without_secrets(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Canonical arguments as they may stand in a command line, and the variables that say what is missing there.

    `hf_token` goes by `HF_TOKEN`. Any other `Secret` becomes a placeholder, which the server's first interpreter
    fills in (`managed_vllm.in_server.managed_vllm_arguments`).
    """
    shown = dict(arguments)
    variables: dict[str, str] = {}
    token = shown.get("hf_token")
    if isinstance(token, Secret):
        shown["hf_token"] = True  # "the stored one": what is in the environment goes first
        variables["HF_TOKEN"] = str(token.reveal())
    elif token is False:
        variables["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    hidden: dict[str, str] = {}
    shown = {name: _with_placeholders(value, hidden) for name, value in shown.items()}
    if hidden:
        variables[managed_vllm_arguments.VARIABLE] = json.dumps(hidden)
    return shown, variables


def _with_placeholders(value: Any, hidden: dict[str, str]) -> Any:
    if isinstance(value, Secret):
        placeholder = f"managed-vllm-secret-{len(hidden)}-"
        hidden[placeholder] = json.dumps(value.reveal())
        return placeholder
    if isinstance(value, dict):
        return {field: _with_placeholders(item, hidden) for field, item in value.items()}
    return [_with_placeholders(item, hidden) for item in value] if isinstance(value, list) else value


# -- to and from flags -------------------------------------------------------------------------------------------------


def to_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The command-line words for canonical arguments: `--max-model-len=512 --enforce-eager --no-enable-prefix-caching`.

    Dicts become JSON; a list becomes several words behind one flag, as vLLM's `nargs="+"` wants it.
    """
    words: list[str] = []
    for name, value in arguments.items():
        words += _flag(name, value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else [] if name in ONLY_TRUE else ["--no-" + flag[2:]]
    if isinstance(value, dict) or name in JSON_LISTS:
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *(item if isinstance(item, str) else json.dumps(item) for item in value)] if value else []
    # "=": a value that starts with a dash must not be taken for a flag.
    return [flag, str(value)] if name in _TWO_WORDS else [f"{flag}={value}"]


def from_flags(words: Sequence[str]) -> dict[str, Any]:
    """Canonical arguments from command-line words, the way `vllm serve` takes them.

    Raises `ConfigError` for a word that belongs to no flag.
    """
    arguments: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            raise ConfigError(f"{word!r} belongs to no flag; flags look like --max-model-len 4096", field=word)
        flag, equals, value = word.partition("=")
        name = _flag_name(flag)
        if match := re.fullmatch(r"-O(\d)", flag):
            arguments["optimization_level"] = int(match[1])
        elif equals:
            arguments[name] = value
        else:
            values = []
            while rest and not _is_flag(rest[0]):
                values.append(rest.pop(0))
            if values:
                arguments[name] = values[0] if len(values) == 1 else values
            elif name.startswith("no_"):
                arguments[name[3:]] = False
            else:
                arguments[name] = True
    return canonical(arguments)


def _flag_name(flag: str) -> str:
    head, dot, fields = flag.partition(".")
    return (SHORT_FLAGS.get(head) or head.lstrip("-").replace("-", "_")) + dot + fields


# -- what vLLM knows ---------------------------------------------------------------------------------------------------


def check_known(arguments: Mapping[str, Any], vllm_folder: Path | None) -> None:
    """Raises `ConfigError` with the nearest names if an argument is none of that vLLM's. No vLLM found: no check."""
    known = known_arguments(vllm_folder)
    if not known:
        return
    for name in arguments:
        head = name.partition(".")[0]
        if head not in known:
            near = difflib.get_close_matches(head, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"vLLM has no engine argument {head!r}{hint}", field=head)


@functools.lru_cache(maxsize=8)
def known_arguments(vllm_folder: Path | None) -> frozenset[str]:
    """All argument names in the source of the vLLM at `vllm_folder`; empty if there is none, or none that we know."""
    names: set[str] = set()
    for source in _SOURCES if vllm_folder is not None else ():
        try:
            assert vllm_folder is not None
            text = (vllm_folder / source).read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError):
            continue
        names.update(_field_names(tree))
        names.update(flag.replace("-", "_") for flag in re.findall(r"[\"']--([a-z][a-z0-9-]+)[\"']", text))
    return frozenset(names) if "max_model_len" in names else frozenset()


def _field_names(tree: ast.Module) -> Iterable[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.target.id


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None
