"""A trainer and an external rollout server, as verl and SkyRL have them: rollouts there, gradients here, weights sent.

The server is any that runs with `for_training=True` (`managed-vllm up demo --for-training`), else one is started. It
goes on serving all its other users while it gets new weights, and every answer says which weights it was made with.
The trainer is policy gradients in thirty lines, on the CPU; no GPU is needed.

    pip install transformers
    python examples/09_external_rollout_server.py [STEPS]
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import transformers

from managed_vllm import ManagedVLLM, RequestOutput, demo

SCREENS, SAMPLES = 4, 4


def policy_loss(model: Any, prompt: list[int], answer: list[int], advantage: float) -> torch.Tensor:
    """REINFORCE: what was better than the other answers to the same prompt becomes likelier."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(answer)[:, None])
    return -advantage * chosen.mean()


def add_gradients(model: Any, screen: demo.Screen, output: RequestOutput) -> list[float]:
    """Those of all answers to one screen; their rewards."""
    rewards = [float(screen.is_right(one.text)) for one in output.outputs]
    mean = sum(rewards) / len(rewards)
    for answer, reward in zip(output.outputs, rewards, strict=True):
        if reward != mean:
            loss = policy_loss(model, list(output.prompt_token_ids or ()), list(answer.token_ids), reward - mean)
            loss.backward()
    return rewards


def main(steps: int) -> None:
    rng = random.Random(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.weights_path(), dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ManagedVLLM("demo", for_training=True, keep_alive=30) as llm:
        weights = llm.engine.weight_sync_client()
        for step in range(1, steps + 1):
            screens = [demo.random_screen(rng) for _ in range(SCREENS)]
            sampling = {"n": SAMPLES, "temperature": 1.0, "max_tokens": 64}
            outputs = llm.chat([screen.messages() for screen in screens], sampling)
            optimizer.zero_grad()
            rewards = [
                one
                for screen, output in zip(screens, outputs, strict=True)
                for one in add_gradients(model, screen, output)
            ]
            optimizer.step()
            sent = weights.send(model.named_parameters(), version=f"step-{step}")
            made_with = ", ".join(sorted({str(output.weight_version) for output in outputs}))
            print(f"reward {sum(rewards) / len(rewards):.2f} with the weights {made_with}; sent {sent.version}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
