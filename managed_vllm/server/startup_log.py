"""Reads the log of a start: which stage it has reached.

What vLLM says is kept in a table (`_SIGNS`): a new version means new rows, not new code. Every row names its source in
vLLM 0.32.0, relative to the `vllm` package; "T" marks those recorded in tests/data/startup_logs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from managed_vllm.status import Progress, Stage

MAX_LINE = 4000  # characters looked at; vLLM prints whole configurations in one line

_ANSI = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
# "(EngineCore pid=123) ERROR 11-23 10:50:09 [core.py:1510] text": logger.py:29. The level's part is missing on lines
# that were printed, and before vLLM 0.32 printed lines too had the process's part. VLLM_LOGGING_PREFIX may precede.
_PROCESS = r"\((?P<process>[\w .:\-]{1,80}?) pid=\d+\) ?"
_RECORD = r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[(?P<place>[^\]]{1,200})\] ?"


def clean(line: str) -> str:
    """`line` without ANSI codes, line end and what is beyond the length that we look at."""
    return re.sub(_ANSI, "", line[: 2 * MAX_LINE])[:MAX_LINE].rstrip("\r\n")


def split_prefix(line: str) -> tuple[str, str]:
    """(who wrote it, text) of a clean line. Who: process and source line, or "" for what was printed without either."""
    process = re.match(_PROCESS, line)
    start = process.end() if process else 0
    record = re.match(_RECORD, line[start:])
    who = (process.group() if process else "") + (record["place"] if record else "")
    return who, line[start + (record.end() if record else 0) :]


def message_of(line: str) -> str:
    """What a line says, without the logger's time, process and place."""
    return split_prefix(clean(line))[1]


# -- progress ----------------------------------------------------------------------------------------------------------

_STAGE_ORDER = {stage: place for place, stage in enumerate(Stage)}


@dataclass(frozen=True)
class _Sign:
    """A line that says that `stage` has been reached. `detail` is filled with the pattern's named groups."""

    pattern: str
    stage: Stage
    detail: str = ""


_BAR = r":\s+(?P<percent>\d+)%"  # a tqdm bar's beginning: "description:  45%|####"

_SIGNS: tuple[_Sign, ...] = (
    # entrypoints/serve/utils/api_utils.py:286 (T)
    _Sign(r"^non-default args: ", Stage.CONFIGURING),
    # config/model.py:733 and 2152 (T)
    _Sign(r"^Resolved architecture: (?P<name>\S+)", Stage.CONFIGURING, "{name}"),
    _Sign(r"^Using max model len (?P<tokens>\d+)", Stage.CONFIGURING, "max model len {tokens}"),
    # v1/engine/core.py:134 (T)
    _Sign(r"^Initializing a V1 LLM engine \(v(?P<version>[^)\s]+)\)", Stage.CONFIGURING, "engine {version}"),
    # v1/worker/gpu_model_runner.py:5040, cpu_model_runner.py:68 (T). The download of a hub id comes next and is silent
    # (weight_utils.py:515 passes DisabledTqdm); a folder is read at once.
    _Sign(r"^Starting to load model (?=[/.~]|\w:\\)(?P<model>\S+?)(?:\.\.\.)?$", Stage.LOADING),
    _Sign(r"^Starting to load model (?P<model>[\w.\-]+/[\w.\-]+?)(?:\.\.\.)?$", Stage.DOWNLOADING, "{model}"),
    _Sign(r"^Starting to load model ", Stage.LOADING),
    # model_loader/weight_utils.py:533
    _Sign(r"^Time spent downloading weights for .*?: (?P<seconds>[\d.]+) s", Stage.DOWNLOADING, "took {seconds} s"),
    # huggingface_hub/_snapshot_download.py:425, and its bars for single files
    _Sign(rf"^Fetching (?P<total>\d+) files{_BAR}", Stage.DOWNLOADING, "{percent}% of {total} files"),
    _Sign(rf"^(?P<file>\S+\.(?:safetensors|bin|pt|pth|gguf)){_BAR}\|", Stage.DOWNLOADING, "{file} {percent}%"),
    # model_loader/weight_utils.py:1108 (T): after the download, before the first shard
    _Sign(r"^Filesystem type for checkpoints: ", Stage.LOADING),
    # model_loader/weight_utils.py:869, 1094 (T), 1234, 1273, 1409, 1434, 1465; bar format: :837
    _Sign(
        rf"^(?:Multi-thread loading|Loading)\b[^:|]{{0,80}}(?:shards|Streamer|loader)[^:|]{{0,80}}{_BAR}"
        r"(?: Completed ?)?(?:\|[^|]*)?\| (?P<done>\d+)/(?P<total>\d+) \[",
        Stage.LOADING,
        "{done}/{total} shards",
    ),
    # model_loader/default_loader.py:501 (T)
    _Sign(r"^Loading weights took (?P<seconds>[\d.]+) s", Stage.LOADING, "took {seconds} s"),
    # v1/worker/gpu_model_runner.py:5150, v1/worker/gpu/model_runner.py:425: the profile run comes next
    _Sign(r"^Model loading took (?P<gib>[\d.]+) GiB", Stage.PROFILING, "model takes {gib} GiB"),
    # v1/worker/gpu_worker.py:760; cpu_worker.py:229, 251 (T)
    _Sign(r"^Available KV cache memory: (?P<gib>[\d.]+) GiB", Stage.PROFILING, "{gib} GiB for KV cache"),
    _Sign(r"^(?:Explicitly|Auto) set \((?P<gib>[\d.]+)/[\d.]+\)+ GiB for KV cache", Stage.PROFILING,
          "{gib} GiB for KV cache"),
    # v1/core/kv_cache_utils.py:2328 (T)
    _Sign(r"^[\w +]+ KV cache size: (?P<tokens>[\d,]+) tokens", Stage.PROFILING, "KV cache of {tokens} tokens"),
    # v1/worker/gpu_model_runner.py:6369
    _Sign(r"^Profiling CUDA graph memory", Stage.PROFILING),
    # v1/worker/cpu_model_runner.py:87 (T)
    _Sign(r"^Warming up model for the compilation", Stage.COMPILING),
    # compilation/monitor.py:48 and 20, backends.py:1167 and 399, decorators.py:320 and 707. "[backbone] " may precede.
    _Sign(r"^(?:\[\w+\] )?Starting torch\.compile", Stage.COMPILING),
    _Sign(r"^(?:\[\w+\] )?Dynamo bytecode transform time: (?P<seconds>[\d.]+) s", Stage.COMPILING,
          "traced in {seconds} s"),
    _Sign(r"^(?:\[\w+\] )?Compiling a graph for compile range (?P<range>\([^)]*\)) takes (?P<seconds>[\d.]+) s",
          Stage.COMPILING, "graph for {range} tokens took {seconds} s"),
    _Sign(r"^(?:\[\w+\] )?Directly load AOT compilation from path", Stage.COMPILING, "from cache"),
    _Sign(r"^(?:\[\w+\] )?torch\.compile (?:and .* together )?took (?P<seconds>[\d.]+) s", Stage.COMPILING,
          "took {seconds} s"),
    # v1/worker/gpu_model_runner.py:6657 and 6582, v1/worker/gpu/cudagraph_utils.py:422
    _Sign(rf"^Capturing CUDA graphs?\b[^:|]*{_BAR}", Stage.CAPTURING, "{percent}%"),
    _Sign(r"^Graph capturing finished in (?P<seconds>\d+) secs", Stage.CAPTURING, "took {seconds} s"),
    # v1/engine/core.py:386 (T)
    _Sign(r"^init engine \(profile.*?\) took (?P<seconds>[\d.]+) s", Stage.SERVING, "engine ready in {seconds} s"),
    # launchers/api_server/entry.py:140 (T); older: "Starting vLLM API server 0 on http://…"
    _Sign(r"^Starting vLLM (?:API )?server(?: \d+)? on (?P<address>\S+)", Stage.SERVING, "{address}"),
    # uvicorn (T)
    _Sign(r"^(?:INFO:\s+)?Application startup complete", Stage.WARMING_UP),
)  # fmt: skip


class StartupLog:
    """Reads the log of one start, line by line, and knows how far it is. A restart needs a new one.

    Stages never go backwards: EngineCore repeats lines of the API server, and each Worker those of the others.
    """

    def __init__(self) -> None:
        self.progress = Progress(Stage.LAUNCHING)

    def feed(self, line: str) -> Progress | None:
        """Take in one line (or several, or a tqdm bar whose states are separated by carriage returns).

        Returns the new progress where the stage or the detail changed, else None. Never raises.
        """
        before = self.progress
        for part in re.split(r"[\r\n]+", line):
            if part.strip():
                self._feed_one(part)
        return self.progress if self.progress != before else None

    def _feed_one(self, line: str) -> None:
        if self.progress.stage is Stage.LAUNCHING:
            self.progress = Progress(Stage.IMPORTING)
        text = split_prefix(clean(line))[1]
        for sign in _SIGNS:
            if _STAGE_ORDER[sign.stage] < _STAGE_ORDER[self.progress.stage]:
                continue
            if found := re.search(sign.pattern, text):
                self.progress = Progress(sign.stage, sign.detail.format_map(found.groupdict()))
                return
