"""What verl's agent loops are made of, as of verl 0.9.1, where verl itself is not installed.

verl can't be had beside the newest transformers (it wants one before 5.11). This has the fields of its
`AgentLoopOutput` and the constructor of its `AgentLoopBase` (`verl/experimental/agent_loop/agent_loop.py`), and nothing
of what they do. `tests/agent/test_trainer_examples.py` compares the fields with verl's own where it can be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict


class AgentLoopMetrics(BaseModel):
    generate_sequences: float = 0.0
    tool_calls: float = 0.0
    compute_score: float = 0.0
    num_preempted: int = -1


class AgentLoopOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    response_logprobs: list[float] | None = None
    routed_experts: Any = None
    multi_modal_data: dict[str, Any] | None = None
    reward_score: float | None = None
    num_turns: int = 0
    metrics: AgentLoopMetrics
    extra_fields: dict[str, Any] = {}
    mm_processor_kwargs: dict[str, Any] | None = None
    mm_processor_output: list[dict[str, Any]] | None = None


class DictConfigWrap:
    def __init__(self, config: Any) -> None:
        self.config = config


class AgentLoopBase:
    def __init__(
        self,
        trainer_config: DictConfigWrap,
        server_manager: Any,
        tokenizer: Any,
        processor: Any,
        dataset_cls: Any,
        data_config: DictConfigWrap,
        hf_model_type: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.config = trainer_config.config
        self.rollout_config = self.config.actor_rollout_ref.rollout
        self.server_manager = server_manager
        self.tokenizer = tokenizer


def install(setitem: Callable[[Any, str, Any], None]) -> None:
    """Makes it importable as verl; `setitem` is monkeypatch's, which takes it away again."""
    inner = ModuleType("verl.experimental.agent_loop.agent_loop")
    for each in (AgentLoopMetrics, AgentLoopOutput, AgentLoopBase, DictConfigWrap):
        setattr(inner, each.__name__, each)
    packages = {name: ModuleType(name) for name in ("verl", "verl.experimental", "verl.experimental.agent_loop")}
    packages["verl.experimental.agent_loop"].__dict__.update(vars(inner))
    for name, module in {**packages, inner.__name__: inner}.items():
        setitem(sys.modules, name, module)
