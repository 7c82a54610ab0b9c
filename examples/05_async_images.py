"""Many conversations at once with asyncio, and images: the screenshots of all of them go to one server.

    python examples/05_async_images.py [MODEL]

MODEL is a vision-language model, for example ByteDance-Seed/UI-TARS-1.5-7B. Without it: text only, with the demo model.
"""

import asyncio
import io
import sys

from managed_vllm import Image, ManagedVLLM


def screenshot(number: int) -> bytes:
    from PIL import Image as Picture

    file = io.BytesIO()
    Picture.new("RGB", (640, 360), (number * 20 % 256, 80, 160)).save(file, "PNG")
    return file.getvalue()


async def main() -> None:
    vision = len(sys.argv) > 1
    async with ManagedVLLM(sys.argv[1] if vision else "demo") as llm:
        conversations = []
        for number in range(8):
            content: list[object] = [{"type": "text", "text": f"What colour is screen {number}?"}]
            if vision:
                content.append({"type": "image", "image": Image.of(screenshot(number))})
            conversations.append([{"role": "user", "content": content}])
        params = {"max_tokens": 16, "temperature": 0}
        answers = await llm.async_client.chat(conversations, params, timeout=300, return_exceptions=True)
        for answer in answers:
            print(repr(answer.outputs[0].text) if hasattr(answer, "outputs") else answer)
        async for part in llm.async_client.stream(conversations[0], params):
            print(part.outputs[0].text, end="", flush=True)
        print()


asyncio.run(main())
