"""Runs in the formats of trainers, viewers and benchmarks: verl, SkyRL, ATIF, dart-gui, OSWorld.

`export` writes a folder: `samples.jsonl` or one file a trajectory, `images/`, and `export.json`, which says what is in
it. `load_verl` and `load_skyrl` read it as the trainer wants it; `samples_of` is for one in the same process, which has
the trajectories. What must hold:

1. Every token id and every logprob is the server's own. Nothing is tokenized here; what is missing or does not fit
   together is an `ExportError`, which names trajectory and step.
2. What is left out is counted, with the reason. A failed attempt is never a sample, least of all one of reward 0.
3. The folder is there whole, or not at all.

Samples are JSON lines: a trainer reads them one by one, in any language, with `datasets.load_dataset("json", …)` or
pandas, and nobody needs a library to look into them. Python writes floats so that they come back to the bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

from managed_vllm.agent.attempt_log import AttemptEntry
from managed_vllm.agent.export import skyrl, verl
from managed_vllm.agent.export.atif import AtifWriter
from managed_vllm.agent.export.dart import DartWriter
from managed_vllm.agent.export.image_files import ExportedImages
from managed_vllm.agent.export.lines import ABOUT, LinesWriter
from managed_vllm.agent.export.osworld import OSWorldWriter
from managed_vllm.agent.export.samples import Per, Sample, samples_of
from managed_vllm.agent.export.skyrl import TrajectoryID, load_skyrl
from managed_vllm.agent.export.verl import load_verl
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import StopReason, Trajectory
from managed_vllm.errors import ExportError, RunStoreError

__all__ = [
    "ExportReport",
    "Format",
    "Include",
    "Per",
    "Sample",
    "TrajectoryID",
    "export",
    "load_skyrl",
    "load_verl",
    "samples_of",
]

log = logging.getLogger(__name__)

Format = Literal["verl", "skyrl", "atif", "dart", "osworld"]
_ANY = ("atif", "dart", "osworld")
"""Formats that hold attempts which no trainer may have: failed ones, and those whose ids are not exact. They say so."""

Include = Literal["rewarded", "ok", "all"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export has, and has not.

    Attributes:
        path: the folder.
        format: as asked.
        trajectories: how many are in it.
        samples: how many training samples they became; for ATIF one each.
        images: distinct image files.
        left_out: rollouts that are not in it, by reason.
        cuts: with `per="trajectory"`: how often a step did not go on where the one before ended, by reason.
    """

    path: str
    format: Format
    trajectories: int
    samples: int
    images: int
    left_out: Mapping[str, int]
    cuts: Mapping[str, int] = field(default_factory=dict)


class _Writer(Protocol):
    cuts: Counter[str]

    @property
    def images(self) -> int:
        """Distinct images so far."""
        ...

    def add(self, trajectory: Trajectory) -> int:
        """Writes it; returns the number of samples. Raises `ExportError`."""
        ...

    def close(self) -> None: ...


def export(
    store: RunStore,
    to: Format,
    out: str | os.PathLike[str],
    *,
    per: Per = "step",
    logprobs: bool | None = None,
    include: Include = "rewarded",
    choose: Callable[[AttemptEntry], bool] | None = None,
) -> ExportReport:
    """Writes the counting attempts of a run (`RunStore.counting`) for a trainer or a viewer.

    Args:
        store: the run.
        to: `verl`: one `AgentLoopOutput` a line, to be read by `load_verl`; `skyrl`: the rows of a `GeneratorOutput`,
            to be read by `load_skyrl`; `atif`: one ATIF 1.7 document a trajectory, with its images beside it; `dart`:
            one folder a trajectory, as dart-gui's agent loop leaves it; `osworld`: the same as OSWorld's runner leaves
            it, for its `show_result.py`.
        out: the folder; must not be there, or be empty. Images are hard links to the run's files where that can be.
        per: `step`: each answer is a sample, with the prompt that it was given: right for every builder of messages.
            `trajectory`: as few samples as can be: answers are joined as long as each prompt begins, token for token,
            with the former prompt and answer (no image may have left the view); what the environment added has mask 0.
            Not for ATIF.
        logprobs: True: they must be there; False: they are left out; None: they must be there for a trainer, for ATIF
            they are given where they are.
        include: `rewarded`: attempts that are ok and have a reward; `ok`: also those without (verl: the trainer must
            make them; not for SkyRL); `all`: also failed ones (ATIF, dart, OSWorld).
        choose: further, by the index; False leaves a rollout out.

    Raises `ExportError`: as above, or `out` can't be written. Then there is no folder.
    """
    _check(to, per, include)
    folder = Path(out).absolute()
    with _errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ExportError(f"{folder} is there already: give a folder that is not, or an empty one")
        unfinished = folder.with_name(f".{folder.name}-{os.getpid()}-{time.time_ns()}-new")
        unfinished.mkdir(parents=True)
        try:
            with contextlib.closing(_writer(store, to, unfinished, per, logprobs)) as writer:
                trajectories, samples, left_out = _write(store, writer, to, include, choose)
                report = ExportReport(
                    str(folder), to, trajectories, samples, writer.images, left_out, dict(writer.cuts)
                )
            about = {**asdict(report), "path": str(folder), "run": str(store.path), "per": per, "include": include}
            about["score"] = store.score
            (unfinished / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    if left_out:
        log.info("%s: left out: %s", folder, ", ".join(f"{number} {why}" for why, number in left_out.items()))
    return report


def _check(to: str, per: str, include: str) -> None:
    for name, value, known in (("to", to, Format), ("per", per, Per), ("include", include, Include)):
        if value not in get_args(known):
            raise ExportError(f"{name}={value!r} is not known; it may be {', '.join(get_args(known))}")
    if include == "all" and to not in _ANY:
        raise ExportError(
            f"include='all' has failed attempts in it, which {to} would train on; only ATIF, dart and osworld take them"
        )
    if include == "ok" and to == "skyrl":
        raise ExportError("SkyRL wants a reward for each sample: include='ok' can't be exported for it")
    if per == "trajectory" and to in _ANY:
        raise ExportError(f"{to} has whole trajectories, step by step: per='trajectory' means nothing there")


def _writer(store: RunStore, to: str, folder: Path, per: Per, logprobs: bool | None) -> _Writer:
    if to == "dart":
        return DartWriter(folder, store.images)
    if to == "osworld":
        model = store.config.get("model")
        return OSWorldWriter(folder, store.images, model if isinstance(model, str) else None)
    images = ExportedImages(store.images, folder)
    if to != "atif":
        return LinesWriter(folder, images, per, logprobs is not False, (verl if to == "verl" else skyrl).line_of)
    return AtifWriter(folder, images, logprobs)


def _write(
    store: RunStore, writer: _Writer, to: str, include: Include, choose: Callable[[AttemptEntry], bool] | None
) -> tuple[int, int, dict[str, int]]:
    left_out: Counter[str] = Counter()
    trajectories = samples = 0
    for entry in store.counting():
        why = _why_not(entry, to, include)
        if why is None and choose is not None and not choose(entry):
            why = "not chosen"
        if why is None:
            _check_exact(entry, to)
            try:
                trajectory = store.load(entry)
            except RunStoreError:
                if entry in store.entries():
                    raise  # not damaged: the store is closed, say
                why = "damaged"
            else:
                samples += writer.add(trajectory)
                trajectories += 1
        if why is not None:
            left_out[why] += 1
    return trajectories, samples, dict(left_out)


def _check_exact(entry: AttemptEntry, to: str) -> None:
    if to not in _ANY and not entry.exact:
        raise ExportError(
            f"{entry.task_id}, rollout {entry.rollout}, was played with exact=False: its token ids and logprobs are "
            f"not those that were sampled, and {to} would train on them; only ATIF, dart and osworld take it"
        )


def _why_not(entry: AttemptEntry, to: str, include: Include) -> str | None:
    if include != "all":
        if entry.failure is not None:
            return f"failed: {entry.failure}"
        if entry.stop_reason is StopReason.CANCELLED:
            return "cancelled"
        if entry.reward is None and include == "rewarded":
            return "without a reward"
    if entry.steps == 0 and to not in _ANY:
        return "without a step"
    return None


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except RunStoreError as error:  # an image that is missing or damaged
        raise ExportError(error.message) from error
    except OSError as error:
        raise ExportError(f"{folder} can't be written: {error.strerror or error}") from error
