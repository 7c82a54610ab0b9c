"""The agent loop of examples/trainers/verl_agent_loop.py, made as verl makes it: verl's own, or the stand-in's."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import standin_verl
from example_modules import example

from managed_vllm import demo

RESPONSE_LENGTH = 2048


@dataclass
class Told:
    """As verl's `TokenOutput`."""

    token_ids: list[int]
    log_probs: list[float]
    extra_fields: dict[str, Any] = field(default_factory=dict)


def agent_loop(monkeypatch: pytest.MonkeyPatch, server_manager: Any) -> tuple[Any, Any]:
    """The example as a module, and a loop that asks this server manager."""
    if importlib.util.find_spec("verl") is None:
        standin_verl.install(monkeypatch.setitem)
    transformers = pytest.importorskip("transformers")
    module = example("trainers/verl_agent_loop")
    wrap = importlib.import_module("verl.experimental.agent_loop.agent_loop").DictConfigWrap
    rollout = SimpleNamespace(response_length=RESPONSE_LENGTH)
    loop = module.DesktopAgentLoop(
        trainer_config=wrap(SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))),
        server_manager=server_manager,
        tokenizer=transformers.AutoTokenizer.from_pretrained(demo.weights_path()),
        processor=None,
        dataset_cls=None,
        data_config=wrap({}),
        hf_model_type="qwen3",
    )
    return module, loop
