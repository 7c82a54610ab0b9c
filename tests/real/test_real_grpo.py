"""Two steps of GRPO with the real vLLM, by the example: its weights go into the server while rollouts go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_modules import example
from processes import own_state

from managed_vllm.agent import RunStore

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

TASKS, ROLLOUTS, UNSEEN = 4, 6, 4


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """The folder, and what came out."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    grpo, folder = example("10_grpo_on_the_desktop"), tmp_path_factory.mktemp("grpo") / "seed-0"
    recipe = grpo.Recipe(steps=2, tasks=TASKS, rollouts=ROLLOUTS, spoiling_steps=6, unseen_tasks=UNSEEN)
    with own_state():
        yield folder, grpo.run(0, folder, recipe)


def versions(run: Path) -> set[str | None]:
    with RunStore.open(run) as store:
        return {step.weight_version for trajectory in store.trajectories() for step in trajectory.steps}


def test_each_answer_says_which_weights_made_it(ran: tuple[Path, Any]) -> None:
    folder, result = ran
    assert [step.version for step in result.steps] == ["step-1", "step-2"]
    assert versions(folder / "before") == {"default"}
    assert versions(folder / "after") == {"step-2"}
    assert {"default"} <= versions(folder / "training") <= {"default", "step-1", "step-2"}
    assert set(result.steps[0].answers) == {"default"}
    assert set(result.steps[1].answers) <= {"default", "step-1"}, "none of weights that were made from it"


def test_no_rollout_is_lost_or_played_again(ran: tuple[Path, Any]) -> None:
    with RunStore.open(ran[0] / "training") as store:
        told = store.summary()
    assert told.attempts == told.finished == told.rewarded == 2 * TASKS * ROLLOUTS
    assert not told.failures


def test_the_trainer_computes_the_logprobs_that_the_server_recorded(ran: tuple[Path, Any]) -> None:
    assert ran[1].steps[0].apart < 0.01


def test_the_weights_change_where_rewards_differ(ran: tuple[Path, Any]) -> None:
    load = pytest.importorskip("safetensors.torch").load_file
    folder, result = ran
    before, after = (load(folder / name / "model.safetensors") for name in ("weak", "step-2"))
    changed = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert (changed > 0) is any(step.mixed for step in result.steps)
    assert not (folder / "step-1").exists(), "what nobody serves any more is removed"


def test_a_run_that_is_over_is_read_and_drawn(ran: tuple[Path, Any]) -> None:
    grpo, (folder, result) = example("10_grpo_on_the_desktop"), ran
    found = grpo.result_of(folder)
    assert str(found) == str(result)
    assert [step.success for step in found.steps] == [step.success for step in result.steps]
    assert grpo.curve([found]).count("<circle") == 2
