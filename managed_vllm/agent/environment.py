"""The environment protocol: what `run_episode` and the scheduler need of a world in which an agent acts.

An environment serves one episode at a time, and any number one after the other: `reset`, `step` …, `evaluate`, then
`reset` again, and `close` at the end. It is used from one event loop. It never blocks that loop: what is synchronous
comes in through an adapter of `managed_vllm.agent.environments`, in a thread or a process of its own.

Whoever calls puts a time-out around each call (`Limits`), and cancels it. After a call that raised, was cancelled or
timed out an environment is not used again, only closed: a retry gets a new one.

Two more attributes count, where an environment has them. `patience_s`: it has time-outs of its own, which end a call
more gently or tell more about it; the caller's come so many seconds later. `extra_s(call, action)`: a call that
naturally takes long, a text of 3,000 characters to be typed say, has so many seconds on top of its limit; `call` is
`reset`, `step` (with its action) or `evaluate`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from managed_vllm.agent.actions import Action
from managed_vllm.agent.types import Observation, StepResult, Task


@runtime_checkable
class Environment(Protocol):
    """A world in which an agent acts. All methods may raise whatever they like: the attempt then fails."""

    async def reset(self, task: Task) -> Observation:
        """Begins an episode of the task, from a fresh state, and says what is seen."""
        ...

    async def step(self, action: Action) -> StepResult:
        """Carries one action out. `Finished` and `CallUser` come here too, as the last ones of an episode."""
        ...

    async def evaluate(self) -> float | None:
        """The reward of the episode as a whole; None: the sum of the steps' rewards is."""
        ...

    async def close(self) -> None:
        """Gives everything back, processes included. Also after a failure; a second time it does nothing."""
        ...
