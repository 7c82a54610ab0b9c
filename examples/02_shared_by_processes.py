"""One server for many processes: a handle pickles, and attaches where it is unpickled with a lease of its own.

The same holds for joblib, Ray and every other library that sends Python objects to processes. Processes that are not
related at all share the server, too, if they ask for the same model with the same arguments.

    python examples/02_shared_by_processes.py
"""

import multiprocessing
import os

from managed_vllm import ManagedVLLM


def work(llm: ManagedVLLM, number: int) -> str:
    with llm:  # this process's own lease: it would keep the server alive without the parent
        answer = llm.chat([{"role": "user", "content": f"Hello from worker {number}"}], {"max_tokens": 16})[0]
        return f"worker {number} (pid {os.getpid()}) asked {llm.base_url} and got {answer.outputs[0].text!r}"


if __name__ == "__main__":
    with (
        ManagedVLLM(model="demo") as llm,
        multiprocessing.get_context("spawn").Pool(2) as pool,
    ):
        for line in pool.starmap(work, [(llm, number) for number in range(4)]):
            print(line)
