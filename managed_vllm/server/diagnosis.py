"""Why a server is not running: turns the log of a process that ended into a `Diagnosis`.

Cause, what happened, vLLM's own line, remedy. `managed_vllm.errors.error_for` turns a `Diagnosis` into the exception
that the caller sees. What vLLM says is in `managed_vllm.server.failure_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from managed_vllm.server.failed_log import ExceptionChain, FailedLog, LoggedException, line_at, tidy
from managed_vllm.server.failure_rules import DEATHS, FIRST_REQUEST, RULES, Rule, Within
from managed_vllm.status import Cause, Diagnosis, Facts, Progress, Stage


def _facts(found: re.Match[str]) -> Facts:
    return {name: _number(text) for name, text in found.groupdict().items() if text is not None}


def _number(text: str) -> int | float | str:
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,18}\.\d{1,18}", text) else text


def _sources(rule: Rule, log: FailedLog) -> Iterator[str]:
    for root in log.roots():
        yield "\n".join([*root.frames, root.text]) if rule.within is Within.TRACEBACK else root.text
    if rule.within is Within.LOG:
        yield log.text


def _first_match(rules: Sequence[Rule], log: FailedLog) -> Diagnosis | None:
    """What the first rule that matches anything says: the rules' order decides, then that of the exceptions."""
    for rule in rules:
        for text in _sources(rule, log):
            if found := re.search(rule.pattern, text, re.MULTILINE):
                return _apply(rule, found, text)
    return None


def _apply(rule: Rule, found: re.Match[str], text: str) -> Diagnosis:
    facts = _facts(found)
    return Diagnosis(
        cause=rule.cause,
        summary=rule.summary.format_map(facts),
        root_line=tidy(line_at(text, max(found.start(), found.end() - 1))),
        remedy=rule.remedy.format_map(facts),
        permanent=rule.permanent(facts) if callable(rule.permanent) else rule.permanent,
        facts=facts,
    )


# -- the public functions ----------------------------------------------------------------------------------------------

_READ_THE_LOG = "read the log, `managed-vllm logs --failed`; enforce_eager=True rules out compilation as the cause"


def diagnose(lines: Sequence[str], *, returncode: int | None) -> Diagnosis:
    """Why the server whose log is `lines` ended. `lines` are those of this start only.

    `returncode` is as in `subprocess`: negative for a signal, None for a process that still runs. Only call this for an
    end that nobody asked for: vLLM exits with 0 when its engine has died, so 0 is a crash, too.
    """
    log = FailedLog(lines)
    if returncode == 2 and (usage := [line for line in log.lines if re.match(r"\S+: error: ", line)]):
        log.chains = [ExceptionChain(LoggedException(usage[-1]), fatal=True)]
    if found := _first_match(RULES, log):
        return found
    if returncode in (126, 127):  # the shell's and env's way to say so
        return _not_launched(tidy(log.last_line()), f"exit code {returncode}")
    if returncode is not None and returncode < 0:
        return _killed(-returncode, tidy(log.last_line()))
    roots = log.roots()
    if not roots and (found := _first_match(DEATHS, log)):
        return found
    if not roots and returncode == 0:
        return Diagnosis(
            Cause.ENGINE_DIED,
            "the server ended by itself with exit code 0, as vLLM does when its engine has died",
            tidy(log.last_line()),
            "look into the log and into `dmesg` (OOM killer, Xid)",
            facts={"returncode": 0},
        )
    if not roots and log.cut_spawn:
        return Diagnosis(
            Cause.ENGINE_DIED,
            "a process of the server was killed while it was being started",
            tidy(log.last_line()),
            "look into `dmesg` (OOM killer)",
        )
    how = "still runs, but has failed" if returncode is None else f"ended with exit code {returncode}"
    return Diagnosis(
        Cause.UNKNOWN,
        f"vLLM {how}, for a reason that managed_vllm does not know",
        root_line=roots[0].headline if roots else tidy(log.last_line()),
        remedy=_READ_THE_LOG,
        facts={} if returncode is None else {"returncode": returncode},
    )


def _killed(number: int, root_line: str) -> Diagnosis:
    import signal  # here: import time

    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGBUS:
        return Diagnosis(
            Cause.SHM_FULL,
            "the server was ended by SIGBUS, which a full /dev/shm causes",
            root_line,
            "give the container more (`--shm-size=8g` or `--ipc=host`), or remove stale /dev/shm/psm_* files",
            permanent=True,
            facts={"signal": name},
        )
    remedies = {
        signal.SIGKILL: "often the kernel's OOM killer (`dmesg` or the container's events say so): use a smaller model "
        "or KV cache, or give it more memory; else find out who sent it",
        signal.SIGTERM: "find out who sent it: a scheduler, a container being stopped, or a script that ends processes",
        signal.SIGINT: "find out who sent it: Ctrl-C reaches every process of a terminal's group",
    }
    crash = "a crash in compiled code: try enforce_eager=True, another attention backend or another version of vLLM"
    remedy = next((text for known, text in remedies.items() if known == number), crash)
    return Diagnosis(Cause.KILLED, f"the server was ended by {name}", root_line, remedy, facts={"signal": name})


def _not_launched(root_line: str, how: str) -> Diagnosis:
    return Diagnosis(
        Cause.LAUNCHER_NOT_FOUND,
        f"the server's command can't be run ({how})",
        root_line,
        "check python= or command=: the file must exist and be executable, its interpreter line too",
        permanent=True,
    )


def could_not_launch(command: Sequence[str], error: OSError) -> Diagnosis:
    """For a command that the operating system refuses to run (`subprocess.Popen` raised)."""
    log = FailedLog([f"Traceback (most recent call last):\n{type(error).__name__}: {error}"])
    if found := _first_match(RULES, log):
        return found
    return _not_launched(tidy(f"{command[0] if command else ''}: {error.strerror or error}"), type(error).__name__)


def diagnose_first_request(status: int | None, body: str) -> Diagnosis:
    """Why a server that is up did not generate its first token. `status` is None where no answer came in time."""
    if status is None:
        return Diagnosis(
            Cause.STARTUP_SILENCE,
            "the server is up, but does not answer its first request",
            tidy(body.strip().partition("\n")[0]),
            "it may compile kernels: raise first_request_timeout; else look for what hangs (py-spy dump)",
        )
    message = _error_message(body)
    log = FailedLog([])
    log.chains = [ExceptionChain(LoggedException(*message.splitlines()), fatal=True)]
    found = _first_match((*FIRST_REQUEST, *RULES), log) or Diagnosis(
        Cause.UNKNOWN,
        f"the server is up, but answers its first request with HTTP {status}",
        tidy(message.partition("\n")[0]),
        _READ_THE_LOG,
        permanent=400 <= status < 500,
    )
    return replace(found, facts={**found.facts, "status": status})


def _error_message(body: str) -> str:
    """The message in an OpenAI error body (vLLM 0.32: `{"error": {"message": …}}`), or the body itself."""
    import json  # here: import time

    try:
        data = json.loads(body)
        message = data["error"]["message"] if "error" in data else data["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return body.strip()
    return str(message)


def timed_out(stage: Progress, *, limit_s: float, silent: bool) -> Diagnosis:
    """For a start that was given up: not ready within `limit_s` seconds, or (`silent`) nothing new for so long."""
    facts: Facts = {"stage": stage.stage.value, "detail": stage.detail, "limit_s": limit_s}
    if silent:
        return Diagnosis(
            Cause.STARTUP_SILENCE,
            f"the server said nothing for {limit_s:g} s; it had come as far as {stage}",
            remedy=f"{_SLOW[stage.stage]}; if that is normal here, raise startup_silence above {limit_s:g}",
            facts=facts,
        )
    return Diagnosis(
        Cause.STARTUP_TIMEOUT,
        f"the server was not ready after {limit_s:g} s; it had come as far as {stage}",
        remedy=f"raise startup_timeout above {limit_s:g}; {_SLOW[stage.stage]}",
        permanent=True,  # another start would take as long
        facts=facts,
    )


_SLOW: dict[Stage, str] = {
    Stage.WAITING: "others hold the devices: managed-vllm status",
    Stage.LAUNCHING: "the interpreter may be on a slow or hanging file system",
    Stage.IMPORTING: "imports are slow where the environment is on a network file system",
    Stage.CONFIGURING: "the hub may be unreachable (set HF_HUB_OFFLINE=1 for a cached model), or the devices may hang",
    Stage.DOWNLOADING: "fetch the model before (`hf download`)",
    Stage.LOADING: "the weights may be on a slow disk: copy them to a local one",
    Stage.PROFILING: "with several GPUs NCCL may hang (NCCL_DEBUG=INFO)",
    Stage.COMPILING: "keep VLLM_CACHE_ROOT between starts, or set enforce_eager=True",
    Stage.CAPTURING: "lower max_num_seqs or cudagraph_capture_sizes, or set enforce_eager=True",
    Stage.SERVING: "a chat template or plugin may hang",
    Stage.WARMING_UP: "the first request may compile kernels",
}


_UNWELL: dict[Cause, tuple[str, str]] = {
    Cause.ENGINE_HUNG: (
        "the engine hung: {detail}",
        "the stacks of its processes were kept (facts['stacks']); if it was only slow, raise HangPolicy's limits",
    ),
    Cause.API_SERVER_HUNG: (
        "the API server hung: {detail}",
        "the stacks of its processes were kept (facts['stacks']); if it was only slow, raise HangPolicy's limits",
    ),
    Cause.PROCESS_STOPPED: (
        "a process of the server was stopped: {detail}",
        "find out who sent SIGSTOP; to stop a server for debugging, start it with hang=HangPolicy.never()",
    ),
    Cause.ENGINE_BROKEN: (
        "the server answers with errors only: {detail}",
        "look into the log for the first exception; a failed weight update leaves the model broken",
    ),
}


def unwell(cause: Cause, detail: str) -> Diagnosis:
    """For a server that runs but does not work; `detail` is what was seen. `cause` is one of `_UNWELL`."""
    summary, remedy = _UNWELL[cause]
    return Diagnosis(cause, summary.format(detail=detail), remedy=remedy)


def engine_process_ended(name: str, lines: Sequence[str]) -> Diagnosis:
    """For the end of EngineCore or of a Worker, by whose `name` it is known; `lines` are the log so far.

    The log knows best, but one that was killed has left no word in it.
    """
    log = FailedLog(lines)
    found = diagnose(lines, returncode=None)
    if found.cause is not Cause.UNKNOWN or log.roots():
        return found
    worker = "Worker" in name
    return Diagnosis(
        Cause.WORKER_DIED if worker else Cause.ENGINE_DIED,
        f"{'a Worker' if worker else 'EngineCore'} has ended without a word",
        tidy(log.last_line()),
        "look into `dmesg` (OOM killer, Xid)",
    )


def not_forked(why_not: str) -> Diagnosis:
    """For a start that had to be forked from a warm image (`warm=True`), and could not."""
    return Diagnosis(
        Cause.NO_IMAGE,
        "the server can't be forked from a warm image",
        why_not,
        'remove what stands against it, or let warm="auto" launch it plainly',
        permanent=True,
    )


def engine_not_restored(why: str, *, permanent: bool) -> Diagnosis:
    """For a server that was started again, and whose engine can't be made what it was before."""
    return Diagnosis(
        Cause.ENGINE_STATE,
        "the server was started again, but its engine can't be put back into the state it was in",
        why,
        "see to it that the folders of its adapters and weights are there; the next start begins without these, with "
        "the model as it was given",
        permanent=permanent,
    )


def devices_busy(missing: int, holders: Sequence[str], *, wanted: str, waited_s: float) -> Diagnosis:
    """For a server that waited for free devices in vain; `wanted` is as in "2 GPUs"."""
    text = "; ".join(holders)
    return Diagnosis(
        Cause.DEVICES_BUSY,
        f"the server needs {wanted}, and {missing or 'none'} could not be had within {waited_s:.0f} s: {text}",
        remedy="raise wait_for_devices=, or end what holds them: managed-vllm status, as that user",
        permanent=True,
        facts={"missing": missing, "waited_s": waited_s, "holders": text},
    )


def too_few_devices(wanted: str, there: Sequence[str]) -> Diagnosis:
    """For a server that needs more devices than it may ever have; `wanted` is as in "2 GPUs"."""
    return Diagnosis(
        Cause.TENSOR_PARALLEL_DEVICES if there else Cause.NO_DEVICE,
        f"the server needs {wanted}, and may use {', '.join(there) or 'none'}",
        remedy="lower tensor_parallel_size or cores=, or let it see more: CUDA_VISIBLE_DEVICES, the limits of the job "
        "or container; GPUs other than NVIDIA's are not counted",
        permanent=True,
    )


def no_places(why: str) -> Diagnosis:
    """For a directory of places that can't be used."""
    return Diagnosis(
        Cause.DEVICES_DIRECTORY,
        f"which devices are free can't be found out: {why}",
        remedy="set MANAGED_VLLM_DEVICES_DIR to a directory that all who share the devices may write to (chmod 1777)",
        permanent=True,
    )


def weights_lost(version: str) -> Diagnosis:
    """For a server whose weights came from a trainer, and were nowhere but in it."""
    return Diagnosis(
        Cause.WEIGHTS_LOST,
        "the server ended, and with it the weights that a trainer had sent",
        f"version {version}",
        "use it again, which starts it with the model as it was given, and have the trainer send its weights; with "
        "checkpoint= beside them, a restart takes them from there",
        permanent=True,
    )


def supervisor_failed(error: BaseException) -> Diagnosis:
    """For a fault of our own: the supervisor could not go on."""
    return Diagnosis(
        Cause.UNKNOWN,
        "the supervisor failed, and with it the server",
        f"{type(error).__name__}: {error}",
        "please report it, with the supervisor's log",
        permanent=True,
    )


def crash_loop(last: Diagnosis, *, restarts: int, window_s: float) -> Diagnosis:
    """For a server that is given up after `restarts` restarts in `window_s` seconds. `last` is its last crash."""
    return Diagnosis(
        Cause.CRASH_LOOP,
        f"the server failed again and again ({restarts} restarts within {window_s:g} s), lastly because {last.summary}",
        last.root_line,
        last.remedy or _READ_THE_LOG,
        permanent=True,
        facts={**last.facts, "last_cause": last.cause.value, "restarts": restarts, "window_s": window_s},
    )
