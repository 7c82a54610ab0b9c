"""One client process of a soak: `python visitor.py SEED SECONDS`. It uses the server of its environment, and leaves.

The last line that it prints is a JSON object: how many answers it got, how many typed errors by their class, and what
must not be. One in three ends without giving its lease back.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(_TESTS), str(_TESTS / "helpers")) if path not in sys.path]

import standin

from managed_vllm import ManagedVLLM, ManagedVLLMError

_PAUSE_S = 0.2
_TIMEOUT_S = 60.0


def visit(seed: int, seconds: float) -> None:
    """The whole life of a client process."""
    rng, until = random.Random(seed), time.monotonic() + seconds
    answered, broken, errors = 0, list[str](), collections.Counter[str]()
    llm = ManagedVLLM(progress=False)
    while time.monotonic() < until:
        try:
            wrong = _wrong_answer(llm, rng)
        except ManagedVLLMError as error:
            errors[type(error).__name__] += 1
        else:
            answered += 1
            broken += [wrong] if wrong else []
        time.sleep(_PAUSE_S)
    print(json.dumps({"answered": answered, "errors": errors, "broken": broken}), flush=True)
    if seed % 3 == 0:
        os._exit(0)
    with contextlib.suppress(ManagedVLLMError):
        llm.close()


def _wrong_answer(llm: ManagedVLLM, rng: random.Random) -> str:
    """Asks once; empty if the answer is as it must be."""
    prompt, tokens = f"{rng.randrange(1 << 30)} äß", rng.choice((3, 17, 40))
    params: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    output = llm.generate(prompt, params, timeout=_TIMEOUT_S)[0]
    got = list(output.outputs[0].token_ids)
    right = len(got) == tokens
    if llm.model != "demo":
        right = got == standin.continuation(standin.prompt_ids(prompt), tokens)
    return "" if right else f"{tokens} tokens for {prompt!r}: {output!r}"[:500]


if __name__ == "__main__":
    visit(int(sys.argv[1]), float(sys.argv[2]))
