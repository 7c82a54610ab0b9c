"""A process that uses one server after the other, each with `devices="auto"`: `device_user.py ROUNDS SEED STANDIN_ENV`.

It prints a line for each use: the instance's number, the epoch that answered, the server's devices.
"""

from __future__ import annotations

import json
import random
import sys

import standin

from managed_vllm import ManagedVLLM, RestartPolicy

INSTANCES = 4


def main(rounds: int, seed: int, orders: str) -> None:
    order = random.Random(seed)
    for _ in range(rounds):
        print(use(order.randrange(INSTANCES), orders), flush=True)


def use(number: int, orders: str) -> str:
    """Uses one instance for a request."""
    with ManagedVLLM(
        f"model-{number}",
        command=standin.command(),
        env=standin.orders(**json.loads(orders)),
        devices="auto",
        keep_alive=0,
        progress=False,
        restart=RestartPolicy(max_restarts=50, backoff_initial_s=0),
    ) as llm:
        answer = llm.generate("hello", max_tokens=4)[0]
        return " ".join([str(number), str(answer.epoch), *llm.wait_ready().devices])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
