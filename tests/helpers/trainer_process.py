"""A trainer in a process of its own: does what it is told by lines of standard input, and says "done" after each.

`load FOLDER` (the tensors of a checkpoint), `send VERSION [CHECKPOINT]`, `start` (and half of the weights).
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch

from managed_vllm import ManagedVLLM


def main() -> None:
    with ManagedVLLM("demo", for_training=True) as llm:
        client = llm.engine.weight_sync_client()
        tensors = {}
        for line in sys.stdin:
            match line.split():
                case ["load", folder]:
                    tensors = safetensors.torch.load_file(Path(folder) / "model.safetensors")
                case ["send", version]:
                    client.send(tensors.items(), version=version)
                case ["send", version, checkpoint]:
                    client.send(tensors.items(), version=version, checkpoint=checkpoint)
                    client.checkpoint = None
                case ["start"]:
                    client.start_weight_update()
            print("done", flush=True)


if __name__ == "__main__":
    main()
