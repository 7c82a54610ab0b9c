"""An evaluation by a third party, Inspect AI, against the server: anything that speaks OpenAI's API works like this.

Inspect AI gets the URL and the key, and knows nothing of this library. The server is there as long as the evaluation.

    pip install inspect-ai
    python examples/06_inspect_ai.py
"""

import random
import tempfile

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Target, accuracy, scorer
from inspect_ai.solver import TaskState, generate

from managed_vllm import ManagedVLLM
from managed_vllm.demo import random_screen


@scorer(metrics=[accuracy()])
def clicks_right():
    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        return Score(value=CORRECT if answer.endswith(target.text) else INCORRECT, answer=answer)

    return score


with ManagedVLLM(model="demo", keep_alive=30) as llm, tempfile.TemporaryDirectory() as folder:
    rng = random.Random(1)
    screens = [random_screen(rng) for _ in range(20)]
    task = Task(
        dataset=[Sample(input=screen.prompt(), target=screen.expected_action()) for screen in screens],
        solver=generate(),
        scorer=clicks_right(),
        config=GenerateConfig(temperature=0, max_tokens=64),
    )
    # "openai-api/<any name>/<model>" is Inspect AI's way to say: OpenAI's API at another place.
    model = get_model(f"openai-api/managed/{llm.model}", base_url=llm.base_url, api_key=llm.api_key or "none")
    (log,) = eval(task, model=model, log_dir=folder, display="plain")
    assert log.results is not None, log.error
    print(f"accuracy: {log.results.scores[0].metrics['accuracy'].value:.2f} of {len(screens)} screens")
