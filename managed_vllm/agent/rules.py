"""What the episodes of a run have in common: the model, how it is spoken to, and how far an episode may go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from managed_vllm.agent.format import AgentFormat, ui_tars
from managed_vllm.agent.gate import Gate
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.pictures import Pictures
from managed_vllm.agent.preflight import Preflight
from managed_vllm.agent.rewards import RewardFunction
from managed_vllm.agent.types import Limits, Step, Task
from managed_vllm.client import AsyncVLLMClient, VLLMClient
from managed_vllm.errors import BadRequestError, ConfigError
from managed_vllm.request.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 1024
"""Of one answer, where nothing else says how many: a model that does not end would fill its context."""

StepHook = Callable[[Task, int, Step], Awaitable[None] | None]
"""Called with task, rollout and each step as it is complete. What it raises fails the attempt."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the episodes of a run have in common.

    Attributes:
        client: of the model's server.
        model: the name that is asked for; None: not known before the first answer.
        images: where screenshots are kept.
        params: sampling parameters, with logprobs, and special tokens as text.
        limits: how far an episode may go.
        agent: how the model is spoken to and understood.
        exact: whether the server must tell token ids and logprobs.
        on_step: called with each step.
        reward: called with each attempt that is over, and says its reward.
        gate: held while the model is asked.
        weight_version: tells which weights answer now, for servers whose answers do not say so.
        pictures: the sizes in which the model sees the screenshots.
        preflight: looks once whether the server takes as many images as the limits allow.
    """

    client: AsyncVLLMClient
    model: str | None
    images: ImageStore
    params: SamplingParams
    limits: Limits
    agent: AgentFormat
    exact: bool = True
    on_step: StepHook | None = None
    reward: RewardFunction | None = None
    gate: Gate = field(default_factory=Gate)
    weight_version: Callable[[], str | None] = lambda: None
    preflight: Preflight = field(default_factory=Preflight)
    pictures: Pictures = field(default_factory=Pictures)

    @classmethod
    def of(
        cls,
        llm: Any,
        images: ImageStore,
        sampling_params: Any = None,
        limits: Limits | None = None,
        agent: AgentFormat | None = None,
        **more: Any,
    ) -> Rules:
        """From what callers give. Raises `BadRequestError` for sampling parameters that can't be."""
        exact = more.get("exact", True)
        agent = agent or ui_tars()
        params = SamplingParams.of(sampling_params)
        params = params.with_({n: value for n, value in agent.sampling.items() if n not in params.given})
        if params.n != 1:
            raise BadRequestError("an episode has one answer a turn; for n rollouts a task use the scheduler's n=")
        limits = limits or Limits()
        if params.max_tokens is None or "max_tokens" not in params.given:
            params = params.with_({"max_tokens": limits.max_response_tokens or DEFAULT_MAX_TOKENS})
        if params.logprobs is None and exact:
            params = params.with_({"logprobs": 0})  # of the sampled token alone
        if "skip_special_tokens" not in params.given and exact:
            # Else a token such as <|box_start|> is gone from the history, and the next prompt is not what was sampled.
            params = params.with_({"skip_special_tokens": False})
        return cls(client_of(llm), model_of(llm, agent), images, params, limits, agent, **more)


def client_of(llm: Any) -> AsyncVLLMClient:
    """The asynchronous client of a `ManagedVLLM`, a `VLLMClient`, or itself. `ConfigError` for anything else."""
    if isinstance(llm, AsyncVLLMClient):
        return llm
    if isinstance(llm, VLLMClient) or hasattr(llm, "async_client"):
        found = llm.async_client
        if isinstance(found, AsyncVLLMClient):
            return found
    raise ConfigError(
        f"llm must be a ManagedVLLM, a VLLMClient or an AsyncVLLMClient, not {type(llm).__name__}; "
        "for a server by URL: VLLMClient(base_url, api_key, model_name)",
        field="llm",
    )


def model_of(llm: Any, agent: AgentFormat) -> str | None:
    """The name of the model that is asked for, where it is known."""
    named = agent.request.get("model") or getattr(llm, "model", None) or getattr(llm, "model_name", None)
    return named if isinstance(named, str) else None
