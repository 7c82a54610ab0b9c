"""One client process of a run: sends requests, checks each answer, writes what it did, one JSON object a line.

`live` is the process, forked by `run` from one that has this module imported. Words that come by its pipe: `restart`,
`leave`; the pipe's end ends the process.
Every line has `t` (seconds of the monotonic clock, which all processes share). `begin` and `end` of a request carry its
number; `end` has `ok` and `attempts`, or `error` (a `ManagedVLLMError`), or `broken` (anything that must not be).
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import standin

import managed_vllm.instance.spawn  # noqa: F401  # what the first use would import, before the fork
from managed_vllm import HangPolicy, ManagedVLLM, ManagedVLLMError, RestartPolicy

_TOKENS = (2, 3, 5, 17, 17, 40, 120)  # 16 is what the stand-in takes for none
_SLACK_S = 15.0
"""By so much an answer may be late on a machine that stops a process for a while; who hangs is later."""


class Client:
    """The handle and the record of one client process."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.leaves = threading.Event()
        self._record = open(order["record"], "a", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()
        self._number = 0
        self.llm = ManagedVLLM(
            order["model"],
            command=order.get("command"),
            env=order.get("env"),
            keep_alive=order["keep_alive_s"],
            startup_silence=order["startup_silence_s"],
            restart=RestartPolicy(max_restarts=1000, backoff_initial_s=0.05, backoff_max_s=0.2),
            hang=HangPolicy(**order["hang"]),
            warm=order["warm"],
            progress=False,
        )

    def say(self, event: str, **what: Any) -> None:
        with self._lock:
            self._record.write(json.dumps({"event": event, "t": time.monotonic(), **what}) + "\n")

    def work(self, seed: int) -> None:
        """Requests one after the other, until it is told to leave."""
        rng = random.Random(seed)
        while not self.leaves.is_set():
            request = self._request(rng)
            with self._lock:
                self._number += 1
                number = self._number
            began = time.monotonic()
            self.say("begin", number=number, what=request["what"])
            try:
                outcome = self._send(request)
            except ManagedVLLMError as error:
                outcome = {"error": type(error).__name__, "message": str(error)[:500]}
            except BaseException as error:
                outcome = {"broken": f"untyped {error!r}"[:1000]}
            took = time.monotonic() - began
            if took > self.order["timeout_s"] + _SLACK_S:
                outcome = {"broken": f"{outcome} came {took:.1f} s after the request began"}
            self.say("end", number=number, took=took, **outcome)
            if "ok" not in outcome:
                time.sleep(0.05)

    def _request(self, rng: random.Random) -> dict[str, Any]:
        if "expected" in self.order:
            prompt = rng.choice(sorted(self.order["expected"]))
            return {"what": "recorded", "prompts": [prompt], "tokens": 24, "expected": self.order["expected"][prompt]}
        kind = rng.choice(["text", "text", "ids", "chat", "batch"])
        words = [f"{rng.randrange(1 << 30)} äß {kind}" for _ in range(3 if kind == "batch" else 1)]
        tokens, resume = rng.choice(_TOKENS), rng.choice([None, None, True, False])
        return {"what": f"{kind} {tokens} {resume}", "kind": kind, "prompts": words, "tokens": tokens, "resume": resume}

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        params = {"max_tokens": request["tokens"], "temperature": 0}
        options: dict[str, Any] = {"timeout": self.order["timeout_s"]}
        if request.get("resume") is not None:
            options["resume"] = request["resume"]
        if "expected" in request:
            output = self.llm.generate(request["prompts"][0], params, **options)[0]
            if list(output.outputs[0].token_ids) != request["expected"]:
                return {"broken": f"{output.outputs[0]} is not {request['expected']}"}
            return {"ok": True, "attempts": output.attempts}
        if request["kind"] == "chat":
            asked: list[Any] = [[{"role": "user", "content": prompt}] for prompt in request["prompts"]]
            outputs = self.llm.chat(asked[0], params, **options)
        else:
            asked = list(request["prompts"])
            if request["kind"] == "ids":
                asked = [standin.prompt_ids(prompt) for prompt in asked]
            outputs = self.llm.generate(asked if len(asked) > 1 else asked[0], params, **options)
        if len(outputs) != len(asked):
            return {"broken": f"{len(outputs)} outputs for {len(asked)} prompts"}
        for prompt, output in zip(asked, outputs, strict=True):
            ids = standin.prompt_ids(prompt)
            expected = standin.continuation(ids, request["tokens"])
            got = output.outputs[0]
            right = (list(got.token_ids), got.text, got.finish_reason, len(output.outputs))
            if right != (expected, standin.text_of(expected), "length", 1) or list(output.prompt_token_ids) != ids:
                return {"broken": f"wrong answer to {prompt!r}: {output!r}, expected {expected}"}
        return {"ok": True, "attempts": max(output.attempts for output in outputs)}

    def restart(self) -> None:
        try:
            self.llm.restart(timeout=self.order["timeout_s"])
            self.say("restarted", ok=True)
        except (ManagedVLLMError, TimeoutError) as error:
            self.say("restarted", error=type(error).__name__, message=str(error)[:500])
        except BaseException as error:
            self.say("restarted", broken=f"untyped {error!r} from restart()")

    def listen(self, words: Connection) -> None:
        """What the driver says."""
        try:
            while True:
                if words.recv() == "leave":
                    self.leaves.set()
                else:
                    threading.Thread(target=self.restart, daemon=True).start()
        except (EOFError, OSError):
            os._exit(1)  # the driver is gone


def live(order: dict[str, Any], words: Connection) -> None:
    """The whole life of a client process."""
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None
    errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    client = Client(order)
    threading.Thread(target=client.listen, args=[words], daemon=True).start()
    workers = [threading.Thread(target=client.work, args=[order["seed"] + n]) for n in range(order["threads"])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    try:
        client.llm.close()
        client.say("closed", ok=True)
    except BaseException as error:
        client.say("closed", broken=f"{error!r} from close()")
    os._exit(0)
