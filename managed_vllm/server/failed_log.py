"""Takes the log of a server that ended apart: chains of exceptions, process by process, the likeliest cause first.

Lines of several processes interleave, so tracebacks are put together per process and source line. vLLM logs
`WorkerProc failed to start.` *followed by* the traceback that says why (v1/executor/multiproc_executor.py:953); then
`EngineCore failed to start.` with the consequence (v1/engine/core.py:1510) and at last the API server's `Engine core
initialization failed. See root cause above.` So the first traceback behind a "failed to start" is the cause, once the
exceptions that only report another one (`_GENERIC`) are taken out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from managed_vllm.server.startup_log import clean, split_prefix

_MAX_ROOT_LINE = 500

# Exceptions that only say that there was another one.
_GENERIC = (
    r"Engine core initialization failed|WorkerProc initialization failed|Frontend process failed during"
    r"|EngineCore encountered an issue|^RuntimeError: Worker failed with error|^RuntimeError: Executor failed"
    r"|RayWorkerProc initialization failed|^(?:\w+\.)*(?:CancelledError|KeyboardInterrupt|SystemExit|EngineDeadError)\b"
)
_FATAL = r"^(?:WorkerProc|EngineCore|Ray\w*Proc) (?:failed|encountered a fatal error|hit an exception)"
_CHAINED = r"^(?:The above exception was the direct cause|During handling of the above exception)"
_PRINTED = r"^(?:INFO:|WARNING:|ERROR:|Process \S+:$|\[[WIE]\d|nanobind|\S+:\d+: \w*Warning: |\s*warnings\.warn)"
_CHATTER = r"resource_tracker|^nanobind|^\s*warnings\.warn|^ - leaked|\[shutdown\]|^INFO:|Warning: "
_CUT_SPAWN = (
    r"load\(from_parent\)|in _launch\n[\s\S]*BrokenPipeError"  # multiprocessing: spawn.py, popen_spawn_posix.py
)
_MAX_MESSAGE_LINES = 20


class LoggedException:
    def __init__(self, *message: str) -> None:
        self.frames: list[str] = []
        self.message = list(message)

    @property
    def text(self) -> str:
        """The message. pydantic's "field", newline, "  what is wrong with it" is put on one line."""
        return re.sub(r"(validation errors? for \w+\n)([\w.]+)\n +", r"\1\2: ", "\n".join(self.message))

    @property
    def headline(self) -> str:
        """The line that says most: pydantic's first one is only a count."""
        head, *rest = self.text.split("\n")
        return tidy(rest[0] if rest and re.search(r"ValidationError: \d+ validation errors? for ", head) else head)


class ExceptionChain:
    """Exceptions that led to one another, in the order in which Python prints them: the last is the outermost."""

    def __init__(self, *exceptions: LoggedException, fatal: bool) -> None:
        self.exceptions = list(exceptions)
        self.fatal = fatal


class FailedLog:
    """The lines of a log, taken apart into chains of exceptions."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines: list[str] = []  # without prefixes
        self.chains: list[ExceptionChain] = []
        self._fatal: set[str] = set()
        self._open: dict[str, ExceptionChain] = {}
        self._linked: set[str] = set()
        for raw in lines:
            for part in re.split(r"[\r\n]+", raw):
                if part.strip():
                    who, text = split_prefix(clean(part))
                    self.lines.append(text)
                    self._take(who, text)
        self.cut_spawn = False
        for chain in self.chains:
            chain.exceptions = [e for e in chain.exceptions if e.message and not re.search(_GENERIC, e.text)]
            cut = [e for e in chain.exceptions if re.search(_CUT_SPAWN, "\n".join([*e.frames, e.text]))]
            if cut:  # one process was killed while it spawned the other: what the other says of it is no cause
                self.cut_spawn = True
                chain.exceptions = [e for e in chain.exceptions if e not in cut]
        self.chains = [chain for chain in self.chains if chain.exceptions]
        self.text = "\n".join(self.lines)

    def _take(self, who: str, text: str) -> None:
        if who:
            self._close_message("")  # what is printed is not split up by other processes' records
        if re.search(_FATAL, text):
            self._fatal.add(who)
            self._open.pop(who, None)
        elif re.search(_CHAINED, text):
            self._linked.add(who)
        elif text.startswith("Traceback (most recent call last)"):
            chain = self._open.get(who)
            if chain is None or who not in self._linked:
                chain = self._open[who] = ExceptionChain(fatal=who in self._fatal)
                self.chains.append(chain)
            self._linked.discard(who)
            chain.exceptions.append(LoggedException())
        elif text and (chain := self._open.get(who)) and who not in self._linked:
            current = chain.exceptions[-1]
            if not current.message and text.startswith(" "):
                current.frames.append(text)
            elif not who and current.message and re.search(_PRINTED, text):
                self._open.pop(who)
            elif len(current.message) < _MAX_MESSAGE_LINES:
                current.message.append(text)

    def _close_message(self, who: str) -> None:
        chain = self._open.get(who)
        if chain and chain.exceptions[-1].message and who not in self._linked:
            self._open.pop(who)

    def roots(self) -> list[LoggedException]:
        """The exceptions that may be the cause, the likeliest first.

        Of the chains behind a "failed to start" each one's outermost first, in the order of the log: what fails first
        makes the others fail. Without such a line: the last chain, for vLLM logs exceptions that it survives, too.
        """
        fatal = [chain for chain in self.chains if chain.fatal] or self.chains[-1:]
        return [exception for chain in fatal for exception in reversed(chain.exceptions)]

    def last_line(self) -> str:
        said = [line for line in self.lines if not re.search(_CHATTER, line)]
        return (said or self.lines or [""])[-1]


def tidy(line: str) -> str:
    line = re.sub(r" \[type=\w+, input_value=.*$", "", line).strip()
    return line if len(line) <= _MAX_ROOT_LINE else line[: _MAX_ROOT_LINE - 1] + "…"


def line_at(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    return text[start : end if end >= 0 else None]
