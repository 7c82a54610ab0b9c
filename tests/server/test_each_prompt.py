"""What our servers tell of each of several prompts, where vLLM is as we know it. In vLLM itself tests/real has it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from managed_vllm.in_server import managed_vllm_each_prompt as each_prompt

NAMES = ("ServingClassification", "ServingEmbedding", "ServingPooling", "ServingScores")


class Serving:
    """As vLLM's: of completions, and of pooling."""

    enable_prompt_tokens_details = False

    def request_output_to_completion_response(self, final_res_batch: Any, request: Any) -> Any:
        return SimpleNamespace(choices=[SimpleNamespace() for one in final_res_batch for _ in one.outputs])

    def _build_response(self, ctx: Any) -> Any:
        return SimpleNamespace(headers={})

    def _extract_prompt_len(self, prompt: str) -> int:
        return len(prompt)


def make_vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules as vLLM's; their classes by name."""
    made: dict[str, Any] = {}
    paths = [f"pooling.{room}.serving" for room in ("classify", "embed", "pooling", "scoring")]
    for path, name in zip(["openai.completion.serving", *paths], ["OpenAIServingCompletion", *NAMES], strict=True):
        module = ModuleType(f"vllm.entrypoints.{path}")
        made[name] = type(name, (), dict(vars(Serving)))
        setattr(module, name, made[name])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def built(kind: Any, ctx: Any) -> Any:
    return getattr(kind(), "_build_response")(ctx)  # noqa: B009 - vLLM's name, not ours


def test_each_choice_tells_what_of_its_prompt_was_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_vllm(monkeypatch)["OpenAIServingCompletion"]()
    assert each_prompt.install() == []
    assert len(each_prompt.install()) == 5  # once is enough
    batch = [SimpleNamespace(outputs=[None, None], num_cached_tokens=number) for number in (3, 0)]
    assert not hasattr(made.request_output_to_completion_response(batch, None).choices[0], "cached_tokens")
    made.enable_prompt_tokens_details = True
    choices = made.request_output_to_completion_response(batch, None).choices
    assert [choice.cached_tokens for choice in choices] == [3, 3, 0, 0]


def test_a_pooling_response_tells_the_tokens_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_vllm(monkeypatch)
    assert each_prompt.install() == []
    results = [SimpleNamespace(prompt_token_ids=[1] * number) for number in (3, 1)]
    inputs = [{"prompts": "x" * number} for number in (4, 2, 1, 5)]
    pairs, crossed = SimpleNamespace(final_res_batch=results, engine_inputs=inputs), inputs[:2]
    for name in NAMES[:3]:
        assert built(made[name], pairs).headers == {"X-Prompt-Tokens": "3,1"}
    assert built(made["ServingScores"], pairs).headers == {"X-Prompt-Tokens": "5,7"}
    pairs.engine_inputs = crossed
    assert built(made["ServingScores"], pairs).headers == {"X-Prompt-Tokens": "4,2"}
    pairs.engine_inputs = inputs[:3]
    assert built(made["ServingScores"], pairs).headers == {}


def test_what_is_not_as_we_know_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.entrypoints.openai.completion.serving", raising=False)
    assert len(each_prompt.install()) >= 1
    completion = make_vllm(monkeypatch)["OpenAIServingCompletion"]
    completion.request_output_to_completion_response = lambda self, results: None
    assert each_prompt.install() == ["request_output_to_completion_response takes (self, results)"]
