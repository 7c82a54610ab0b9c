"""Reward functions of the caller's own: a trajectory in, its reward out; while it is played, or afterwards.

    async def short(trajectory):
        return 1.0 if len(trajectory.steps) <= 5 else 0.0, {"steps": len(trajectory.steps)}

Such a function is called with each attempt that is `ok`, and sees in `trajectory.reward` what the environment said. It
may be a coroutine function. It returns the reward, or None where none is known; or that and details, plain JSON values
that are recorded as well.

In an episode (`reward=` of the scheduler, `run_episode` and `run_agent_loop`) what it returns is the reward. Of a run
that was recorded, `rescoring.rescore` makes a score beside the reward.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from managed_vllm.agent.types import Trajectory

Verdict = float | None | tuple[float | None, Mapping[str, Any]]
RewardFunction = Callable[[Trajectory], Verdict | Awaitable[Verdict]]

WHAT = "the reward function"
"""In messages."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward function said.

    Attributes:
        reward: a finite number; None: none is known.
        details: why; plain JSON values.
    """

    reward: float | None
    details: Mapping[str, Any] = field(default_factory=dict)


async def score_of(function: RewardFunction, trajectory: Trajectory) -> Score:
    """What the function says of the trajectory. Raises what it raises; `ValueError`, `TypeError`: it is no reward."""
    said: Any = function(trajectory)
    if inspect.isawaitable(said):
        said = await said
    details: Any = {}
    if isinstance(said, tuple):
        if len(said) != 2 or not isinstance(said[1], Mapping):
            raise TypeError(f"{WHAT} returned {said!r:.200}; a tuple is a reward and a mapping of details")
        said, details = said
    try:
        details = json.loads(json.dumps(dict(details), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the details that {WHAT} returned are not plain JSON values: {error}") from error
    return Score(_reward(said), details)


def _reward(said: Any) -> float | None:
    if said is None:
        return None
    try:
        reward = float(said)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{WHAT} returned {said!r:.200}, which is no number") from error
    if not math.isfinite(reward):
        raise ValueError(f"{WHAT} returned {reward}, which is no reward")
    return reward


def with_score(trajectory: Trajectory, name: str, score: Score) -> Trajectory:
    """The attempt with that reward; `info["score"]` says whose it is, and what it was `before`."""
    told = {"by": name, "before": trajectory.reward, **({"details": score.details} if score.details else {})}
    return replace(trajectory, reward=score.reward, info={**trajectory.info, "score": told})


def name_of(function: RewardFunction) -> str:
    """`module:function`; of an object that can be called, that of its class."""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
