"""Ask a model: the shortest use there is.

The server is started if it does not run yet, and stopped some seconds after its last user has gone. Run this twice in a
row: the second time it attaches to what the first one has started.

    python examples/01_chat.py
"""

import random

from managed_vllm import ManagedVLLM, SamplingParams
from managed_vllm.demo import random_screen

with ManagedVLLM(model="demo", keep_alive=30) as llm:
    rng = random.Random(1)
    screens = [random_screen(rng, buttons=3, done=False) for _ in range(4)]
    outputs = llm.chat([screen.messages() for screen in screens], SamplingParams(temperature=0, max_tokens=64))
    for screen, output in zip(screens, outputs, strict=True):
        print(f"{screen.task} → {output.outputs[0].text!r}  ({output.latency:.2f} s)")
