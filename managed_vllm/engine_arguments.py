"""vLLM's engine arguments: from keywords or command-line words to one canonical form, and from there to flags.

The canonical form is a dict by vLLM's own names (`tensor_parallel_size`), with JSON values, without the arguments that
are None, so that `ManagedVLLM(max_model_len=512)` and `managed-vllm up --max-model-len 512` ask for the same server.
What arguments exist is read from the source of the vLLM that will be started, without importing it (an import costs
seconds), so that a wrong name dies here and not half a minute later.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from managed_vllm.errors import ConfigError

SHORT_FLAGS = {
    "-tp": "tensor_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-dp": "data_parallel_size",
    "-q": "quantization",
    "-n": "nnodes",
    "-r": "node_rank",
    "-O": "optimization_level",
}
"""vLLM 0.32's one-letter flags, `engine/arg_utils.py`."""

MANAGED = {
    "host": "host=",
    "port": "port=",
    "uds": "uds=",
    "api_key": "api_key=",
    "model": "model=",
    "middleware": "command=, or a vLLM plugin; our own middleware guards the key",
}
"""Arguments that are ours to give: they have a keyword of their own."""

_PATH_ARGUMENTS = ("tokenizer", "chat_template", "hf_config_path", "generation_config", "download_dir", "config")
"""Arguments that may name a file: made absolute, because the server runs in another folder."""

_SOURCES = (
    "engine/arg_utils.py",
    "entrypoints/launchers/cli_args.py",
    "entrypoints/openai/cli_args.py",
    "entrypoints/cli/serve.py",
)


def canonical(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments by canonical name with JSON values.

    Raises `ConfigError` for an argument with a keyword of its own and for a value that can't be written as a flag.
    """
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        key = name.replace("-", "_")
        if key in MANAGED:
            raise ConfigError(f"{name!r} is not an engine argument here; use {MANAGED[key]}", field=name)
        if value is None:
            continue
        plain = _plain(key, value)
        if key in _PATH_ARGUMENTS and isinstance(plain, str) and Path(plain).expanduser().exists():
            plain = str(Path(plain).expanduser().resolve())
        result[key] = plain
    return dict(sorted(result.items()))


def to_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The command-line words for canonical arguments: `--max-model-len 512 --enforce-eager --no-enable-prefix-caching`.

    Dicts become JSON; a list becomes several words behind one flag, as vLLM's `nargs="+"` wants it.
    """
    words: list[str] = []
    for name, value in arguments.items():
        head, dot, tail = name.partition(".")
        flag = "--" + head.replace("_", "-") + dot + tail
        if value is True:
            words.append(flag)
        elif value is False:
            words.append("--no-" + flag[2:])
        elif isinstance(value, list):
            words += [flag, *(item if isinstance(item, str) else json.dumps(item) for item in value)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        else:
            # "=": a value that starts with a dash must not be taken for a flag.
            words.append(f"{flag}={value}")
    return words


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
        name = SHORT_FLAGS.get(flag) or flag.lstrip("-").replace("-", "_")
        if match := re.fullmatch(r"-O(\d)", flag):
            arguments["optimization_level"] = int(match[1])
        elif equals:
            arguments[name] = _parsed(value)
        else:
            values = []
            while rest and not _is_flag(rest[0]):
                values.append(_parsed(rest.pop(0)))
            if values:
                arguments[name] = values[0] if len(values) == 1 else values
            elif name.startswith("no_"):
                arguments[name[3:]] = False
            else:
                arguments[name] = True
    return canonical(arguments)


def check_known(arguments: Mapping[str, Any], vllm_folder: Path | None) -> None:
    """Raises `ConfigError` with the nearest names if an argument is none of that vLLM's. No vLLM found: no check."""
    known = known_arguments(vllm_folder) if vllm_folder is not None else frozenset()
    if not known:
        return
    for name in arguments:
        head = name.partition(".")[0]
        if head not in known:
            near = difflib.get_close_matches(head, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"vLLM has no engine argument {head!r}{hint}", field=head)


def known_arguments(vllm_folder: Path) -> frozenset[str]:
    """All argument names in the source of the vLLM at `vllm_folder`; empty if the source is not as we know it."""
    names: set[str] = set()
    for source in _SOURCES:
        try:
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


def _parsed(word: str) -> Any:
    try:
        value = json.loads(word)
    except ValueError:
        return word
    # A JSON string keeps its quotes' meaning; "true" is a word to vLLM, not a boolean.
    return word if isinstance(value, bool) or value is None else value


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(name, item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if hasattr(value, "value") and type(value).__module__ != "builtins":  # an enum member
        return _plain(name, value.value)
    raise ConfigError(
        f"engine argument {name}={value!r} of type {type(value).__name__} can't be passed to a server process; "
        "give numbers, strings, lists or dicts",
        field=name,
    )
