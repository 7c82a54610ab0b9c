"""A slice of the chaos runs: whatever is killed, stopped or broken, each request is answered rightly or fails by name.

All of it: `python tests/chaos/run.py --runs 500`.
"""

from __future__ import annotations

import pytest

from chaos.plan import plan_for, real_plan_for
from chaos.run import run_many

SEEDS = (1000, 1002, 1009)


def test_a_plan_follows_from_its_seed_alone() -> None:
    assert [plan_for(seed) for seed in range(50)] == [plan_for(seed) for seed in range(50)]
    assert real_plan_for(3) == real_plan_for(3)
    assert len({str(plan_for(seed)) for seed in range(50)}) == 50


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("warm", [False, True])
def test_whatever_is_struck_every_request_is_answered_rightly_or_fails_by_name(warm: bool) -> None:
    outcomes = [outcome for seed in SEEDS for outcome in run_many(1, seed=seed, jobs=1, warm=warm)]
    assert [line for outcome in outcomes for line in outcome.broken] == []
    assert sum(outcome.answered for outcome in outcomes) > 0


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_real_server_comes_back_and_answers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_SERVER_URL", raising=False)
    monkeypatch.setenv("MANAGED_VLLM_HOME", "")
    from chaos.real import run_real

    outcomes = run_real(1)
    assert [line for outcome in outcomes for line in outcome.broken] == []
    assert all(outcome.answered for outcome in outcomes)
