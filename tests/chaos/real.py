"""Runs against the real vLLM with the embedded model: one server for all of them, held by the driver.

The right answers are those that the server gave, greedily, before the first strike.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

from chaos import sightings
from chaos.plan import real_plan_for
from chaos.report import Outcome
from chaos.run import Run, Setting, prepare
from managed_vllm import HangPolicy, ManagedVLLM, RestartPolicy, demo

HANG = {"stall_s": 10.0, "answer_s": 20.0, "stopped_s": 2.0}
_TIMEOUT_S = 300.0
_TOKENS = 24


def run_real(runs: int, seed: int = 0, *, quiet: bool = True) -> list[Outcome]:
    """One after the other; at the end the server must be gone."""
    prepare()
    with tempfile.TemporaryDirectory(prefix="mvc-", dir="/tmp") as folder:
        home = Path(folder) / "home"
        os.environ["MANAGED_VLLM_HOME"] = str(home)
        warm = os.environ.get("MANAGED_VLLM_WARM") != "off"
        restart = RestartPolicy(max_restarts=1000, backoff_initial_s=0.05, backoff_max_s=0.2)
        llm = ManagedVLLM(
            "demo",
            keep_alive=5,
            startup_silence=120,
            restart=restart,
            hang=HangPolicy(**HANG),
            progress=False,
            warm=warm,
        )
        outcomes = []
        with llm:
            setting = Setting("demo", None, HANG, _TIMEOUT_S, startup_silence_s=120, expected=_recorded(llm), warm=warm)
            for number in range(seed, seed + runs):
                outcome = Run(real_plan_for(number), setting, home=home).happen()
                outcomes.append(outcome)
                if not quiet:
                    kinds = ", ".join(strike.kind for strike in real_plan_for(number).strikes)
                    print(f"seed {number}: {kinds}: {outcome.took_s:.0f} s, {outcome.answered} answered", flush=True)
                for line in outcome.broken:
                    print(f"  {line}", flush=True)
                llm.wait_ready(_TIMEOUT_S)
        deadline = time.monotonic() + 120
        while (left := [*sightings.look(home), *sightings.files_left(home)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left and outcomes:
            outcomes[-1].broken += [f"left at the end: {left}", f"last seed {seed + runs - 1}"]
        return outcomes


def _recorded(llm: ManagedVLLM) -> dict[str, list[int]]:
    """Prompts, and the token ids that follow them."""
    rng = random.Random(0)
    prompts = [demo.random_screen(rng).prompt() for _ in range(6)]
    found = {}
    for prompt in prompts:
        output = llm.generate(prompt, {"max_tokens": _TOKENS, "temperature": 0})[0]
        found[prompt] = list(output.outputs[0].token_ids)
    return found
