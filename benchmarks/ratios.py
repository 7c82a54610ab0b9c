"""Small costs as ratios, each against the obvious way of doing it in the same run: tests don't judge by clocks.

    python benchmarks/ratios.py            half a minute; nothing but the stand-in server is started

Rounds of both sides take turns and the fastest of each counts, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import stub_server
from attach import STAND_IN, own_state_directory

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState, ServerStatus
from managed_vllm.agent.actions import parse_json_actions, parse_ui_tars
from managed_vllm.errors import ActionParseError
from managed_vllm.request.bodies import encode_body
from managed_vllm.request.responses import parse
from managed_vllm.server.diagnosis import diagnose

SCREEN = (1920, 1080)
LINEAR = 3.0
"""Twice the input may take up to this many times as long; what is quadratic takes four times."""
LOGS = Path(__file__).resolve().parent.parent / "tests" / "data" / "startup_logs"


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds of ours and of what it is compared with, and the highest ratio that is well."""

    what: str
    ours_s: float
    against: str
    baseline_s: float
    most: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.baseline_s


def compared(what: str, ours: Callable[[], Any], against: str, baseline: Callable[[], Any], most: float) -> Row:
    """The fastest of ten rounds each, by turns, in CPU time."""
    count = max(1, int(0.05 / max(1e-7, _cpu_s(ours, 1))))
    rounds = [(_cpu_s(ours, count), _cpu_s(baseline, count)) for _ in range(10)]
    return Row(what, min(one for one, _ in rounds) / count, against, min(two for _, two in rounds) / count, most)


def _cpu_s(function: Callable[[], Any], count: int) -> float:
    started = time.process_time()
    for _ in range(count):
        function()
    return time.process_time() - started


# -- requests ----------------------------------------------------------------------------------------------------------


def answer_rows() -> list[Row]:
    """30 tokens with logprobs: typed and checked, against looking at each value of `json.loads` once."""
    answers = {"completion": stub_server.completion_answer(), "chat": stub_server.chat_answer()}
    rows = []
    for name, answer in answers.items():
        data = json.dumps(answer).encode()
        rows.append(
            compared(f"decode a {name}", partial(parse, data), "json.loads, each value looked at",
                     partial(_walk, data), 1.0)
        )  # fmt: skip
    return rows


def _walk(data: bytes) -> None:
    stack = [json.loads(data)]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def body_row() -> Row:
    body = {
        "model": "m",
        "messages": [{"role": "system", "content": "You are"}, {"role": "user", "content": "Click the button " * 20}],
        **{"temperature": 0.7, "max_tokens": 64, "top_p": 0.9, "return_token_ids": True, "logprobs": True},
    }
    return compared("write a body", lambda: encode_body(body), "json.dumps", lambda: json.dumps(body).encode(), 1.0)


# -- what is read must be read in linear time --------------------------------------------------------------------------


def linear(what: str, read: Callable[[str], Any], piece: str, length: int) -> Row:
    half = piece * (length // len(piece) // 2)
    return compared(what, lambda: read(half + half), "half of it", lambda: read(half), LINEAR)


def parser_rows() -> list[Row]:
    def quietly(parse: Callable[[str, tuple[int, int]], Any]) -> Callable[[str], None]:
        def read(text: str) -> None:
            with contextlib.suppress(ActionParseError):
                parse(text, SCREEN)

        return read

    ui_tars, in_json = quietly(parse_ui_tars), quietly(parse_json_actions)
    return [
        linear("250 kB of open calls, UI-TARS", ui_tars, "click(", 250_000),
        linear("250 kB of quotes, UI-TARS", ui_tars, "type(content='", 250_000),
        linear("250 kB of open objects, JSON", in_json, '{"action":', 250_000),
    ]


def log_row() -> Row:
    lines = [line for path in sorted(LOGS.glob("*.log")) for line in path.read_text().splitlines()]
    lines += ["Loading x shards" * 5000, "x" * 100_000]
    return compared(
        f"diagnose {2 * len(lines)} lines", lambda: diagnose(lines + lines, returncode=1),
        "half of them", lambda: diagnose(lines, returncode=1), LINEAR,
    )  # fmt: skip


# -- how soon an end is known ------------------------------------------------------------------------------------------


def crash_row(rounds: int = 5) -> Row:
    """From SIGKILL of the server until a user is told, against a parent that waits for its killed child."""
    told: list[float] = []

    def on_status(status: ServerStatus) -> None:
        if status.state is ServerState.RESTARTING:
            told.append(time.monotonic())

    ours, bare = [], []
    words = [sys.executable, str(STAND_IN), "{args}"]
    policy = RestartPolicy(max_restarts=2 * rounds, backoff_initial_s=0)
    llm = ManagedVLLM("stand-in", command=words, keep_alive=0, restart=policy, on_status=on_status)
    with own_state_directory(), llm:
        for number in range(1, rounds + 1):
            bare.append(_reaped_s())
            server = llm.status().server_pid
            assert server is not None
            began = time.monotonic()
            os.kill(server, signal.SIGKILL)
            llm.wait_ready(60, after_epoch=number)
            ours.append(told[-1] - began)
    return Row("a crash is told to the user", min(ours), "a killed child is reaped", min(bare), 100.0)


def _reaped_s() -> float:
    with subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(3600)"],
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        began = time.monotonic()
        child.kill()
        child.wait()
        return time.monotonic() - began


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    print(f"python {sys.version.split()[0]}, load {os.getloadavg()[0]:.2f}")
    rows = [*answer_rows(), body_row(), *parser_rows(), log_row(), crash_row()]
    print("| what | ours, µs | against | its µs | ratio | well |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        well = f"≤ {row.most:g}: {'yes' if row.ratio <= row.most else 'NO'}"
        print(f"| {row.what} | {row.ours_s * 1e6:,.1f} | {row.against} | {row.baseline_s * 1e6:,.1f} "
              f"| {row.ratio:.2f} | {well} |")  # fmt: skip
    return int(any(row.ratio > row.most for row in rows))


if __name__ == "__main__":
    sys.exit(main())
