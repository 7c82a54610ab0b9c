"""verl plays the embedded desktop: an agent loop of verl's whose episodes are played by `managed_vllm.agent`.

verl makes one `DesktopAgentLoop` a rollout and awaits its `run`. The model is asked by verl's own `server_manager`, so
that verl goes on placing requests and changing weights; environment, history, parser, limits and reward are ours. One
episode is one `AgentLoopOutput`: answers, and between them, with mask 0, what the desktop showed.

    actor_rollout_ref.rollout.agent.default_agent_loop=managed_vllm_desktop
    actor_rollout_ref.rollout.agent.agent_loop_config_path=agent.yaml, a file with

    - name: managed_vllm_desktop
      _target_: verl_agent_loop.DesktopAgentLoop

The dataset has a prompt, which is not used, and the task in `extra_info`: `rows()` makes it. Another environment is
another class in `run`.

    pip install verl
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from verl.experimental.agent_loop import AgentLoopBase, AgentLoopOutput

from managed_vllm import AsyncVLLMClient, CompletionOutput, Logprob, RequestOutput
from managed_vllm.agent import AgentFormat, Limits, Task, run_episode
from managed_vllm.agent.environments.desktop import DesktopEnvironment, desktop_tasks
from managed_vllm.agent.export import samples_of
from managed_vllm.agent.export.verl import fields_of
from managed_vllm.agent.format import UITarsParser
from managed_vllm.agent.prompting import Chat

CONVERSATION = AgentFormat(Chat(prompt="", show_screenshot=False), UITarsParser("relative1000"))
"""As the demo model understands it, with all former turns, so that each prompt goes on where the last answer ended."""


class DesktopAgentLoop(AgentLoopBase):
    """Plays one episode."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """The row of the dataset says which task. A failed episode raises: it is no sample, least of all one of 0."""
        environment = DesktopEnvironment()
        try:
            trajectory = await run_episode(
                ServersOfVerl(self, sampling_params),
                environment,
                Task(**row["extra_info"]["task"]),
                sampling_params={"max_tokens": 64},  # an answer; verl's response_length is for all of them together
                limits=Limits(max_steps=10, max_episode_tokens=self.rollout_config.response_length),
                agent=CONVERSATION,
            )
        finally:
            await environment.close()
        if trajectory.failure is not None:
            raise RuntimeError(str(trajectory.failure))
        *_, sample = samples_of(trajectory, "trajectory")
        fields = fields_of(sample)
        for name in ("response_ids", "response_mask", "response_logprobs"):
            fields[name] = fields[name][: self.rollout_config.response_length]
        fields["extra_fields"] |= {"turn_scores": [], "tool_rewards": []}  # verl wants the same ones of every loop
        return AgentLoopOutput(**fields)


class ServersOfVerl(AsyncVLLMClient):
    """Takes what an episode asks to the servers that verl runs: token ids to them, token ids and logprobs back."""

    def __init__(self, loop: AgentLoopBase, sampling_params: dict[str, Any]) -> None:
        super().__init__("http://verl.invalid/v1", model_name="verl")  # nothing is ever sent there
        self._loop = loop
        self._sampling = {**sampling_params, "logprobs": True}

    async def chat(self, messages: Any, sampling_params: Any = None, **fields: Any) -> list[RequestOutput]:
        began = time.time()
        tokenizer = self._loop.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        told = await self._loop.server_manager.generate(
            request_id=fields["session_id"],  # of the episode: the same server, with its cache, for all of its turns
            prompt_ids=prompt_ids,
            sampling_params={**self._sampling, "max_tokens": sampling_params.max_tokens},
        )
        ended = told.token_ids[-1:] == [tokenizer.eos_token_id]
        answer = CompletionOutput(
            index=0,
            text=tokenizer.decode(told.token_ids[:-1] if ended else told.token_ids),
            token_ids=list(told.token_ids),
            logprobs=[{token: Logprob(value)} for token, value in zip(told.token_ids, told.log_probs, strict=True)],
            finish_reason="stop" if ended else "length",
        )
        return [RequestOutput(fields["session_id"], None, prompt_ids, [answer], latency=time.time() - began)]


def rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of a dataset for verl: `datasets.Dataset.from_list(list(rows(1000))).to_parquet("desktop.parquet")`."""
    for task in desktop_tasks(count, seed=seed):
        yield {
            "prompt": [{"role": "user", "content": task.instruction}],
            "extra_info": {"task": {"id": task.id, "instruction": task.instruction, "data": dict(task.data)}},
            "reward_model": {"ground_truth": ""},
            "data_source": "desktop",
        }
