"""One episode that a third-party agent plays: from its URL and key to its trajectory.

`RecordedEpisode` is what the caller has: he hands its URL on, and says how it ended. `Turns` is what the gateway has of
it: the requests in flight and the steps so far, in the gateway's event loop only.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

from managed_vllm.agent.recording.turns import Turn
from managed_vllm.agent.types import Attempt, Failure, FailureClass, Step, StopReason, Trajectory
from managed_vllm.errors import ConfigError
from managed_vllm.masking import Secret
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.relay import RelayedGeneration
from managed_vllm.request.relayed_answers import RelayedAnswers

_MOST_ERRORS = 20
_ERROR_CHARS = 500
_TRACEBACK_CHARS = 4000


class Turns:
    """The requests and steps of one episode.

    Attributes:
        key: what the agent must know.
        closed: whether it is over; no request is answered any more.
    """

    def __init__(self, key: Secret, most: int) -> None:
        self.key = key
        self.closed = False
        self._most = most
        self._count = 0
        self._settings: dict[str, Any] | None = None
        self._steps: list[Step] = []
        self._exact = True
        self._errors: list[dict[str, Any]] = []
        self._left = 0
        self._in_flight: set[RelayedGeneration] = set()
        self._none_in_flight = asyncio.Event()
        self._none_in_flight.set()

    def admit(self) -> bool:
        """Counts one request more. Returns whether it is within what an episode may have."""
        self._count += 1
        return self._count <= self._most

    def begin(self, generation: RelayedGeneration) -> None:
        """A request is sent."""
        self._in_flight.add(generation)
        self._none_in_flight.clear()

    def answered(self, turn: Turn, stats: RequestStats, answers: RelayedAnswers) -> None:
        """An answer was passed on, whole or as far as it came."""
        found = answers.found()
        self._exact = self._exact and all(answer.exact for answer in found)
        settings = turn.settings
        steps = turn.steps(found, stats, len(self._steps))
        if steps and settings != self._settings:
            self._settings = settings
            steps[0] = replace(steps[0], info={**steps[0].info, "request": settings})
        self._steps += steps

    def refused(self, status: int, message: str) -> None:
        """The agent got an error in place of an answer: the server's, of the way to it, or of the gateway itself."""
        if len(self._errors) < _MOST_ERRORS:
            said = {"status": status, "message": message[:_ERROR_CHARS]}
            self._errors.append({"before_step": len(self._steps), **said})

    def left(self) -> None:
        """The agent hung up, or the episode was ended, before the answer was complete."""
        self._left += 1

    def end(self, generation: RelayedGeneration) -> None:
        """A request is over, however."""
        self._in_flight.discard(generation)
        if not self._in_flight:
            self._none_in_flight.set()

    async def close(self) -> tuple[tuple[Step, ...], bool, dict[str, Any]]:
        """Ends what is in flight; the steps, whether all of them are exact, and what else there is to say."""
        self.closed = True
        for generation in list(self._in_flight):
            generation.end()
        await self._none_in_flight.wait()
        said: dict[str, Any] = {"errors": self._errors} if self._errors else {}
        if self._left:
            said["requests_left"] = self._left
        return tuple(self._steps), self._exact, said


class Recorder(Protocol):
    """What an episode needs of its gateway."""

    def close_episode(self, episode: RecordedEpisode) -> tuple[tuple[Step, ...], bool, dict[str, Any]]:
        """Answers no request of it any more; see `Turns.close`."""

    def keep(self, trajectory: Trajectory) -> None:
        """Puts it into the store."""


class RecordedEpisode:
    """An episode on record, made by `RecordingGateway.episode`. A context manager: what it raises is its failure.

    Attributes:
        attempt: at which rollout of which task.
        base_url: for the agent, in the place of the OpenAI API's; ends in `/v1`.
        trajectory: once it is finished.
    """

    def __init__(self, recorder: Recorder, attempt: Attempt, base_url: str, key: Secret) -> None:
        self.attempt = attempt
        self.base_url = base_url
        self.trajectory: Trajectory | None = None
        self._recorder = recorder
        self._key = key
        self._began, self._started_at = time.monotonic(), time.time()

    @property
    def api_key(self) -> str:
        """The key that the agent must send; of this episode only."""
        return str(self._key.reveal())

    def environ(self) -> dict[str, str]:
        """Environment variables by which programs on the OpenAI SDK find it."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_BASE": self.base_url, "OPENAI_API_KEY": self.api_key}

    def finish(
        self,
        reward: float | None = None,
        *,
        stop_reason: StopReason | str = StopReason.FINISHED,
        failure: Failure | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """Ends the episode and puts its trajectory into the store. Blocks until that is on the disk.

        What is in flight is ended on the server; later requests of the agent get HTTP 404.

        Args:
            reward: what the agent's play was worth; None: nobody said.
            stop_reason: why it ended.
            failure: what went wrong; then there is no reward.
            info: plain JSON values, to be recorded.

        Raises `ConfigError`: it is finished already, a reward beside a failure, or no such stop reason; and
        `RunStoreError`.
        """
        if failure is not None and reward is not None:
            raise ConfigError("an episode that failed has no reward", field="reward")
        try:
            reason = StopReason(stop_reason)
        except ValueError:
            raise ConfigError(f"{stop_reason!r} is no StopReason", field="stop_reason") from None
        if self.trajectory is not None:
            raise ConfigError(f"the episode of {self.attempt.task.id} is finished already", field="episode")
        steps, exact, said = self._recorder.close_episode(self)
        self.trajectory = Trajectory(
            task=self.attempt.task,
            rollout=self.attempt.rollout,
            attempt=self.attempt.number,
            steps=steps,
            stop_reason=reason,
            reward=None if reward is None else float(reward),
            failure=failure,
            instruction=self.attempt.task.instruction,
            final_screenshot=next((step.screenshot for step in reversed(steps) if step.screenshot), None),
            started_at=self._started_at,
            duration_s=time.monotonic() - self._began,
            info={**said, **(info or {})},
            exact=exact,
        )
        self._recorder.keep(self.trajectory)
        return self.trajectory

    def cancel(self) -> Trajectory:
        """Ends it as one that is no longer wanted."""
        return self.finish(stop_reason=StopReason.CANCELLED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.trajectory is not None:
            return
        if error is None:
            self.finish()
        elif isinstance(error, Exception):
            self.finish(stop_reason=StopReason.USER_FAILURE, failure=self._failure(error))
        else:
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: Any) -> None:
        await asyncio.to_thread(self.__exit__, *details)

    def __repr__(self) -> str:
        state = "finished" if self.trajectory is not None else self.base_url
        return f"<RecordedEpisode {self.attempt.task.id}, rollout {self.attempt.rollout}: {state}>"

    @staticmethod
    def _failure(error: Exception) -> Failure:
        trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]
        return Failure(FailureClass.USER_CODE, "agent", type(error).__name__, str(error), details=trace)


def new_key() -> Secret:
    """A random one."""
    return Secret(secrets.token_urlsafe(24))
