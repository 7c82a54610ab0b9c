"""The OpenAI SDK, streaming: `llm.openai` and `llm.async_openai` are the SDK's own clients, already set up.

python examples/03_openai_sdk.py
"""

import asyncio
import random

from managed_vllm import ManagedVLLM
from managed_vllm.demo import random_screen

rng = random.Random(3)


def stream(llm: ManagedVLLM) -> None:
    chunks = llm.openai.chat.completions.create(
        model=llm.model, messages=random_screen(rng).messages(), max_tokens=64, temperature=0, stream=True
    )
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


async def several_at_once() -> None:
    async with ManagedVLLM(model="demo") as llm:  # the same server
        client = llm.async_openai
        questions = [random_screen(rng).messages() for _ in range(8)]
        answers = await asyncio.gather(
            *(client.chat.completions.create(model=llm.model, messages=q, max_tokens=64) for q in questions)
        )
        for answer in answers:
            print(answer.choices[0].message.content.splitlines()[-1])


with ManagedVLLM(model="demo") as llm:
    stream(llm)
    asyncio.run(several_at_once())
