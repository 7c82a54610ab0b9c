"""A checkpoint folder, looked at before a running server loads it: is it whole, and is it of the same model?

`check` finds what can be seen without loading, in this order, and reports all of it in one `CheckpointError`:

1. The folder is there; a hub id is looked up in the local cache, nothing is downloaded.
2. config.json can be read; what decides shapes and behaviour is as in the checkpoint that is served. A reload takes the
   weights only, so a field that differs would be ignored in silence.
3. The tokenizer, if there is one, has the vocabulary of the one that is served: a reload does not take it either.
4. Every safetensors file is there and as long as its header says; with an index, all its tensors are in their files.
5. Names and shapes of the tensors are those that are served; dtypes too, but for F64, F32, F16 and BF16, which vLLM
   converts into each other.
6. The weights have no NaN and no infinity, in the first bytes of each tensor, `scan_limit` bytes in all.

Not seen: whether finite weights are good ones, what is beyond the limit, quantized types other than 8-bit floats, and
weights in other formats than safetensors, which are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from managed_vllm.errors import CheckpointError
from managed_vllm.server import safetensors_files
from managed_vllm.server.safetensors_files import BrokenFileError, Tensor
from managed_vllm.status import CheckpointFault as Fault

SCAN_LIMIT = 256 << 20
"""Bytes of the weights that are searched for NaN and infinity; about half a second."""

_MAX_JSON = 64 << 20
_MOST_NAMES = 3
"""As many names are given in a message."""

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_CONVERTIBLE = frozenset({"F64", "F32", "F16", "BF16"})

_SAVE_AGAIN = "save the checkpoint again, into a new folder, and update when that is finished"
_SAME_MODEL = "an update takes a checkpoint of the same model; for another one start another server"

_MUST_BE_THERE = frozenset({"architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers"})
"""Fields of config.json (or of its text_config) that must not be missing if the served one has them."""

_WITHOUT_EFFECT = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
        *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "auto_map"),
        *("output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing", "_attn_implementation"),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "attn_implementation",
            "max_window_layers",
            "is_encoder_decoder",
        ),
    }
)
"""Fields of config.json in which checkpoints of one model may differ."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder as it was when it was read.

    `tensors` maps each name to its file and place; `stamps` has size, time of change and inode of each file.
    """

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, tuple[str, Tensor]] = field(repr=False)
    stamps: Mapping[str, tuple[int, int, int]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for _, tensor in self.tensors.values())

    def has_changed(self) -> bool:
        """Whether a file was written, replaced or removed since it was read."""
        return any(_stamp(self.folder / name) != stamp for name, stamp in self.stamps.items())


def check(
    path_or_id: str, served: str, environment: Mapping[str, str] | None = None, *, scan_limit: int = SCAN_LIMIT
) -> Checkpoint:
    """The checkpoint, after all of the above. Raises `CheckpointError` with everything that speaks against it.

    `served` is the path or id of the checkpoint that is served now; where that can't be read, nothing is compared with
    it. `environment` is the server's: it decides where the hub's cache is. Reads files: call it in a thread.
    """
    checkpoint = read(path_or_id, environment)
    try:
        before = read(served, environment)
    except CheckpointError:
        before = None
    faults = [*(() if before is None else _differences(checkpoint, before)), *_not_finite(checkpoint, scan_limit)]
    if faults:
        raise _error(path_or_id, faults)
    return checkpoint


def may_be_equal(
    new: Checkpoint, served: str, environment: Mapping[str, str] | None = None, *, limit: int = SCAN_LIMIT
) -> bool:
    """False if a tensor of both has the same type and other data, among the first `limit` bytes in all."""
    try:
        before = read(served, environment)
        return not any(_differ(new, before, name, limit // max(1, len(new.tensors))) for name in new.tensors)
    except (CheckpointError, OSError):
        return True


def _differ(new: Checkpoint, served: Checkpoint, name: str, limit: int) -> bool:
    (file, tensor), (other_file, other) = new.tensors[name], served.tensors.get(name, ("", None))
    if other is None or tensor.dtype != other.dtype:
        return False
    one = safetensors_files.read_data(new.folder / file, tensor, limit)
    return one != safetensors_files.read_data(served.folder / other_file, other, limit)


def read(path_or_id: str, environment: Mapping[str, str] | None = None) -> Checkpoint:
    """What a checkpoint's config and headers say. Raises `CheckpointError`."""
    folder = resolve(path_or_id, environment)
    faults: list[Fault] = []
    config = _read_config(folder, faults)
    files = _weight_files(folder, faults)
    tensors: dict[str, tuple[str, Tensor]] = {}
    for name in files:
        try:
            found = safetensors_files.read_header(folder / name)
        except BrokenFileError as error:
            faults.append(Fault(f"{name} {error}", _SAVE_AGAIN))
        else:
            tensors.update((tensor, (name, place)) for tensor, place in found.items())
    if files and not faults:
        faults += _missing_from_files(folder, tensors)
    if faults:
        raise _error(path_or_id, faults)
    names = ["config.json", *files, *(name for name in (_INDEX, "tokenizer.json") if (folder / name).exists())]
    return Checkpoint(folder, config, tensors, {name: _stamp(folder / name) for name in names})


def may_be_missing(checkpoint: Checkpoint) -> set[str]:
    """Tensors that a checkpoint of this model may have or not: an output layer that is the embeddings."""
    text = checkpoint.config.get("text_config")
    configs = [checkpoint.config, *([text] if isinstance(text, Mapping) else [])]
    return {"lm_head.weight"} if any(config.get("tie_word_embeddings") for config in configs) else set()


def resolve(path_or_id: str, environment: Mapping[str, str] | None = None) -> Path:
    """The folder: the path itself, or the snapshot of a hub id (`org/name`, `org/name@revision`) in the local cache.

    Raises `CheckpointError`.
    """
    path = Path(path_or_id)
    with contextlib.suppress(OSError, ValueError):
        if path.is_dir():
            return path.resolve()
    identifier, _, revision = path_or_id.partition("@")
    if path.is_absolute() or re.fullmatch(r"[\w.-]+/[\w.-]+", identifier) is None or ".." in identifier:
        fault = Fault("there is no such folder", "check the path; it must be visible to the server's machine")
        raise _error(path_or_id, [fault])
    repository = _hub_cache(environment or {}) / f"models--{identifier.replace('/', '--')}"
    with contextlib.suppress(OSError, ValueError):
        commit = revision or "main"
        reference = repository / "refs" / commit
        if ".." not in commit and reference.is_file():
            commit = reference.read_text().strip()
        snapshot = repository / "snapshots" / commit
        if ".." not in commit and snapshot.is_dir():
            return snapshot.resolve()
    fault = Fault(
        "there is no such folder, and the hub's local cache has no such model",
        f"fetch it before: `hf download {identifier}{f' --revision {revision}' if revision else ''}`",
    )
    raise _error(path_or_id, [fault])


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps its cache, by the server's environment."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or Path(cache) / "huggingface").expanduser() / "hub"


def _error(path_or_id: str, faults: Sequence[Fault]) -> CheckpointError:
    return CheckpointError(path_or_id, tuple(faults))


# -- files -------------------------------------------------------------------------------------------------------------


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (-1, 0, 0)
    return (found.st_size, found.st_mtime_ns, found.st_ino)


def _read_json(path: Path) -> Any:
    """Raises `OSError`, `ValueError`."""
    if not path.is_file():
        raise FileNotFoundError(2, "is not there")
    if path.stat().st_size > _MAX_JSON:
        raise ValueError("too large")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def _read_object(path: Path, faults: list[Fault], remedy: str) -> dict[str, Any]:
    """A JSON object; an empty one, and a fault, if there is none."""
    try:
        found = _read_json(path)
    except OSError as error:
        faults.append(Fault(f"{path.name}: {error.strerror or error}", remedy))
    except ValueError as error:
        faults.append(Fault(f"{path.name} can't be read: {error}", _SAVE_AGAIN))
    else:
        if isinstance(found, dict):
            return found
        faults.append(Fault(f"{path.name} is no JSON object", _SAVE_AGAIN))
    return {}


def _read_config(folder: Path, faults: list[Fault]) -> dict[str, Any]:
    return _read_object(folder / "config.json", faults, "give the folder that holds config.json and the weights")


def _weight_files(folder: Path, faults: list[Fault]) -> list[str]:
    """The files that vLLM would load: those of the index, else all safetensors files there are."""
    if (folder / _INDEX).exists():
        named = _weight_map(folder, faults).values()
        wrong = sorted({name for name in named if not name.endswith(".safetensors") or os.path.basename(name) != name})
        if wrong:
            faults.append(Fault(f"{_INDEX} names {_listed(wrong)}, which is no file of this folder", _SAVE_AGAIN))
        return sorted(set(named) - set(wrong))
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not found:
        remedy = "save the weights as safetensors, beside config.json (`save_pretrained(safe_serialization=True)`)"
        faults.append(Fault("there are no *.safetensors files", remedy))
    for stem, count in {(m[1], int(m[3])) for m in map(_SHARD.fullmatch, found) if m}:
        wanted = {f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, min(count, 10_000) + 1)}
        if missing := sorted(wanted - set(found)):
            faults.append(Fault(f"{len(missing)} of {count} files are missing: {_listed(missing)}", _SAVE_AGAIN))
    return found


def _weight_map(folder: Path, faults: list[Fault]) -> dict[str, str]:
    found = _read_object(folder / _INDEX, faults, _SAVE_AGAIN).get("weight_map")
    if isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values()):
        return found
    faults.append(Fault(f"{_INDEX} has no weight_map", _SAVE_AGAIN))
    return {}


def _missing_from_files(folder: Path, tensors: Mapping[str, tuple[str, Tensor]]) -> Iterator[Fault]:
    """Tensors that the index has, and the files have not."""
    if (folder / _INDEX).exists():
        wanted = _weight_map(folder, [])
        missing = [name for name in wanted if name not in tensors or wanted[name] != tensors[name][0]]
        if missing:
            yield Fault(f"{len(missing)} tensors of {_INDEX} are not in their files: {_listed(missing)}", _SAVE_AGAIN)
    if not tensors:
        yield Fault("the weight files have no tensors", _SAVE_AGAIN)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


# -- compared with what is served --------------------------------------------------------------------------------------


def _differences(new: Checkpoint, served: Checkpoint) -> Iterator[Fault]:
    yield from _config_differences(new.config, served.config)
    yield from _tokenizer_differences(new.folder, served.folder)
    yield from _tensor_differences(new, served)


def _config_differences(new: Mapping[str, Any], served: Mapping[str, Any], where: str = "") -> Iterator[Fault]:
    """Fields that both have and that differ; of those that decide most, also the ones that are missing."""
    for name, value in served.items():
        if name in _WITHOUT_EFFECT or (name not in new and name not in _MUST_BE_THERE):
            continue
        given = new.get(name)
        if isinstance(value, Mapping) and isinstance(given, Mapping):
            yield from _config_differences(given, value, f"{where}{name}.")
        elif given != value:
            said = f"config.json: {where}{name} is {_short(given)}, served is {_short(value)}"
            yield Fault(said, _SAME_MODEL)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _tokenizer_differences(new: Path, served: Path) -> Iterator[Fault]:
    paths = (new / "tokenizer.json", served / "tokenizer.json")
    try:
        if not all(path.is_file() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
            return
        given, known = map(_vocabulary, paths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Fault(f"tokenizer.json can't be read: {error}", _SAVE_AGAIN)
        return
    changed = sorted(token for token in given.keys() | known.keys() if given.get(token) != known.get(token))
    if changed:
        said = f"tokenizer.json has another vocabulary: {len(changed)} tokens differ, {_listed(changed)}"
        yield Fault(said, f"an update keeps the server's tokenizer; {_SAME_MODEL}")


def _vocabulary(path: Path) -> dict[str, Any]:
    """Each token with its id (or, for a unigram model, its place and score)."""
    found = _read_json(path)
    vocabulary = found["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: [place, score] for place, (token, score) in enumerate(vocabulary)}
    return {**vocabulary, **{one["content"]: one["id"] for one in found.get("added_tokens", ())}}


def _tensor_differences(new: Checkpoint, served: Checkpoint) -> Iterator[Fault]:
    given, known = new.tensors, served.tensors
    may_differ = may_be_missing(served)
    for said, names in (("missing", known.keys() - given.keys()), ("not served", given.keys() - known.keys())):
        if wrong := sorted(names - may_differ):
            yield Fault(f"{len(wrong)} tensors are {said}: {_listed(wrong)}", _SAME_MODEL)
    for name in sorted(given.keys() & known.keys()):
        one, other = given[name][1], known[name][1]
        if one.shape != other.shape:
            said = f"{name} has the shape {list(one.shape)}, served is {list(other.shape)}"
        elif one.dtype != other.dtype and not {one.dtype, other.dtype} <= _CONVERTIBLE:
            said = f"{name} is {one.dtype}, served is {other.dtype}"
        else:
            continue
        yield Fault(said, _SAME_MODEL)
        return  # the first tells enough: mostly all the others differ as well


def _not_finite(checkpoint: Checkpoint, limit: int) -> Iterator[Fault]:
    share = limit if checkpoint.nbytes <= limit else limit // max(1, len(checkpoint.tensors))
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, (file, tensor) in checkpoint.tensors.items():
        by_file.setdefault(file, {})[name] = tensor
    found: list[str] = []
    try:
        for file, tensors in by_file.items():
            found += safetensors_files.not_finite(checkpoint.folder / file, tensors, share)
    except OSError as error:
        yield Fault(f"the weights can't be read: {error}", "check the file system")
    if found:
        said = f"{len(found)} tensors have NaN or infinity: {_listed(found)}"
        yield Fault(said, "the training has diverged, or the file is damaged: go back to an earlier checkpoint")
