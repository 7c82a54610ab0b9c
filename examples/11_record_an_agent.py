"""An agent that somebody else wrote, on record: it gets a URL, and its turns become training samples with exact ids.

The agent is a program on the OpenAI SDK, in a process of its own, which knows nothing of this library. Any other one
that can be given a URL will do: OSWorld's own, browser-use, openai-agents, …

    python examples/11_record_an_agent.py [FOLDER]
"""

import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from managed_vllm import ManagedVLLM
from managed_vllm.agent import RecordingGateway, RunStore, Task, Trajectory, recorder
from managed_vllm.agent.export import export
from managed_vllm.demo import random_screen

AGENT = """
import sys
from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY
messages = [{"role": "user", "content": sys.argv[2]}]
answer = client.chat.completions.create(model=sys.argv[1], messages=messages, temperature=0.7, max_tokens=64)
print(answer.choices[0].message.content)
"""


def play(gateway: RecordingGateway, model: str, number: int) -> Trajectory:
    screen = random_screen(random.Random(number))
    with gateway.episode(Task(f"screen-{number}", screen.prompt())) as episode:
        words = [sys.executable, "-c", AGENT, model, screen.prompt()]
        agent = subprocess.run(words, env=episode.environ(), stdout=subprocess.PIPE, text=True, check=True)
        return episode.finish(reward=float(agent.stdout.strip().endswith(screen.expected_action())))


def main(folder: Path) -> None:
    with (
        ManagedVLLM("demo", keep_alive=30) as llm,
        RunStore.create(folder / "run", {"model": llm.model}) as store,
        recorder(llm, store) as gateway,
        ThreadPoolExecutor(2) as threads,
    ):
        for trajectory in threads.map(lambda number: play(gateway, llm.model, number), range(4)):
            [step] = trajectory.steps
            print(trajectory.task.id, trajectory.reward, f"{len(step.response_token_ids)} tokens", step.response[-40:])
    with RunStore.open(folder / "run") as store:
        export(store, "verl", folder / "verl")
    print(f"training samples: {folder / 'verl'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
