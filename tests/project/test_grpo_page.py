"""The page of torch in examples/10_grpo_on_the_desktop.py computes what it says, on a model of four tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from example_modules import example

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

VOCABULARY = 4


@pytest.fixture(scope="module")
def grpo() -> Any:
    return example("10_grpo_on_the_desktop")


class Bigrams:
    """The logits of a token depend on the one before it."""

    def __init__(self) -> None:
        self.table = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)

    def __call__(self, ids: Any) -> Any:
        return SimpleNamespace(logits=self.table[ids])


EVEN = math.log(1 / VOCABULARY)
"""The logprob of any token, before anything was learnt."""


def gradient(grpo: Any, *answers: Any) -> tuple[float, Any]:
    model, rows = Bigrams(), grpo.Rows.of(answers)
    loss = grpo.grpo_loss(grpo.logprobs_of(model, rows.ids), rows)
    loss.backward()
    return loss.item(), model.table.grad


def test_at_the_start_the_ratio_is_1_and_the_gradient_that_of_the_logprob(grpo: Any) -> None:
    loss, grad = gradient(grpo, grpo.Answer([0], [1, 2], [1, 1], [EVEN, EVEN], 0.5))
    assert loss == pytest.approx(-0.5 * 2)
    # d logprob / d logit: 1 - 1/4 for what was said, -1/4 for the rest. Descent goes against the gradient.
    said, rest = -0.5 * 0.75, 0.5 * 0.25
    assert grad[0].tolist() == pytest.approx([rest, said, rest, rest])
    assert grad[1].tolist() == pytest.approx([rest, rest, said, rest])
    assert grad[2:].abs().max() == 0


def test_what_was_worse_than_its_group_becomes_less_likely(grpo: Any) -> None:
    _, grad = gradient(grpo, grpo.Answer([0], [1], [1], [EVEN], -1.0))
    assert grad[0, 1] > 0


def test_only_what_the_model_said_counts_whatever_stands_around_it(grpo: Any) -> None:
    alone = gradient(grpo, grpo.Answer([0], [1], [1], [EVEN], 1.0))
    between = grpo.Answer([3, 2, 0], [1, 3, 3], [1, 0, 0], [EVEN, 0.0, 0.0], 1.0)  # the environment said 3, 3
    for answers in ([between], [between, grpo.Answer([3] * 9, [3], [0], [0.0], 7.0)]):  # and one makes padding
        loss, grad = gradient(grpo, *answers)
        assert loss == pytest.approx(alone[0])
        assert torch.allclose(grad, alone[1])


def test_the_ratio_weighs_and_beyond_the_clip_a_token_says_no_more(grpo: Any) -> None:
    def pull(old: float, advantage: float) -> float:
        _, grad = gradient(grpo, grpo.Answer([0], [1], [1], [EVEN - math.log(old)], advantage))
        return float(grad[0, 1]) / -0.75

    assert pull(1.1, 1.0) == pytest.approx(1.1)
    assert pull(0.5, 1.0) == pytest.approx(0.5), "it may still rise"
    assert pull(1.5, 1.0) == 0, "it has risen enough"
    assert pull(1.5, -1.0) == pytest.approx(-1.5), "it may still fall"
    assert pull(0.5, -1.0) == 0, "it has fallen enough"


def test_advantages_are_of_the_group(grpo: Any) -> None:
    assert grpo.advantages_of([1.0, 0.0, 0.0, 1.0]) == pytest.approx([1, -1, -1, 1])
    assert grpo.advantages_of([1.0, 1.0]) == [0.0, 0.0]
    assert grpo.advantages_of([]) == []


def test_a_part_of_the_answers_at_a_time_makes_the_same_step(grpo: Any) -> None:
    answers = [grpo.Answer([0], [1 + n % 3] * (n + 1), [1] * (n + 1), [EVEN] * (n + 1), 1.0 - n % 2) for n in range(6)]
    parts = list(grpo.in_parts(answers, size=4))
    assert [len(part) for part in parts] == [4, 2]
    whole = gradient(grpo, *answers)
    halves = [gradient(grpo, *part) for part in parts]
    assert sum(loss for loss, _ in halves) == pytest.approx(whole[0])
    assert torch.allclose(sum(grad for _, grad in halves), whole[1], atol=1e-6)
