"""The gateway between third-party agents and the model server: `recorder(llm)`.

    /episodes/ID/v1/chat/completions, /episodes/ID/v1/completions     passed on and recorded
    /episodes/ID/v1/models, /v1/embeddings, /tokenize, /detokenize    passed on

What must hold:

1. Whoever has an episode's URL and key can do nothing but these. The model server's own key never leaves us.
2. An agent that survives what OpenAI's API does to it survives a restart of the model server: its requests wait, or are
   sent again. Only a stream of which a part was passed on ends with an error.
3. What was passed on is recorded. An agent that hangs up ends the generation on the server; the part of a stream that
   it has got is a step whose `finish_reason` is "abort".
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import threading
import time
from collections import Counter
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from managed_vllm.agent.image_store import own_images
from managed_vllm.agent.recording.episodes import RecordedEpisode, Turns, new_key
from managed_vllm.agent.recording.turns import ROUTES, Turn, decoded
from managed_vllm.agent.rules import client_of
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.types import Attempt, Step, Task, Trajectory
from managed_vllm.errors import ConfigError, ManagedVLLMError
from managed_vllm.loopback import LoopbackServer
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.relay import (
    DONE,
    RelayedGeneration,
    RelayEndedError,
    error_body,
    fetch,
    status_of,
    words_of,
)
from managed_vllm.request.relayed_answers import RelayedAnswers

log = logging.getLogger("managed_vllm.agent")

MAX_REQUESTS = 10_000
"""Requests of one episode: an agent that goes round in circles ends there."""
_PASSED_ON = frozenset(
    {("GET", "/v1/models"), ("POST", "/v1/embeddings"), ("POST", "/tokenize"), ("POST", "/detokenize")}
)
_INSTEAD = {
    # vLLM 0.32 tells ids there if asked (`enable_response_messages`), and logprobs of text alone, not of tool calls.
    "/v1/responses": "Have the agent use chat completions; openai-agents: set_default_openai_api('chat_completions')",
}
"""What an agent that asked for another route should do."""
_FINISHED = "this episode is finished"


def recorder(
    llm: Any,
    store: RunStore | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    max_requests: int = MAX_REQUESTS,
) -> RecordingGateway:
    """A gateway that records agents of any make: `with recorder(llm, store) as gateway: gateway.episode(task)`.

    Args:
        llm: a `ManagedVLLM`, `VLLMClient` or `AsyncVLLMClient`. Its vLLM must tell token ids (0.10.2 and later).
        store: where trajectories go; None: only `finish` returns them.
        host, port: where it listens; default loopback and a free port. On another host it is seen by the network, and
            guarded by the episodes' keys alone.
        max_requests: of one episode; beyond that the agent gets HTTP 403.

    Raises `ConfigError`: no such `llm`, or, on entering, it can't listen there.
    """
    return RecordingGateway(llm, store, host=host, port=port, max_requests=max_requests)


class RecordingGateway:
    """See `recorder`. Thread-safe; any number of episodes at once."""

    def __init__(self, llm: Any, store: RunStore | None, *, host: str, port: int, max_requests: int) -> None:
        if max_requests < 1:
            raise ConfigError(f"max_requests must be 1 or more, not {max_requests}", field="max_requests")
        self._sender = client_of(llm).sender
        self._llm = llm
        self._store = store
        self._images = own_images() if store is None else store.images
        self._max_requests = max_requests
        self._server = LoopbackServer(self._handle, name="recorder", host=host, port=port)
        self._lock = threading.Lock()
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._open: dict[str, tuple[RecordedEpisode, Turns]] = {}
        self._is_open = False

    def __enter__(self) -> Self:
        if self._store is not None:
            model = getattr(self._llm, "model", None) or getattr(self._llm, "model_name", None)
            self._store.settle({"model": model, "agent": "recorded"})
            self._attempts.update(entry.key for entry in self._store.entries())
        self._server.start()
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Episodes that are not finished end as `cancelled`."""
        with self._lock:
            self._is_open = False
            left = [episode for episode, _ in self._open.values()]
        try:
            for episode in left:
                with contextlib.suppress(ConfigError):  # another thread has just finished it
                    episode.cancel()
        finally:
            self._server.close()

    def episode(self, task: Task | str, *, rollout: int | None = None) -> RecordedEpisode:
        """Begins an episode of a task (its id will do); its URL is good until `finish`.

        `rollout`: 0, 1, … within the task's group; None: the first that nobody has finished or plays. One that was
        played before gets another attempt.

        Raises `ConfigError`: the gateway is not entered, or the rollout is being played.
        """
        task = Task(task) if isinstance(task, str) else task
        with self._lock:
            if not self._is_open:
                raise ConfigError("a gateway has episodes within its `with` block only", field="gateway")
            playing = {
                episode.attempt.rollout for episode, _ in self._open.values() if episode.attempt.task.id == task.id
            }
            if rollout is None:
                rollout = self._free_rollout(task.id, playing)
            elif rollout in playing:
                raise ConfigError(f"{task.id}, rollout {rollout}, is being played already", field="rollout")
            attempt = Attempt(task, rollout, self._attempts[task.id, rollout])
            self._attempts[task.id, rollout] += 1
            key = new_key()
            name = new_key().reveal()
            episode = RecordedEpisode(self, attempt, f"{self._server.origin}/episodes/{name}/v1", key)
            self._open[name] = episode, Turns(key, self._max_requests)
        return episode

    def _free_rollout(self, task_id: str, playing: set[int]) -> int:
        finished = self._store.finished() if self._store is not None else set(self._attempts)
        rollout = 0
        while rollout in playing or (task_id, rollout) in finished:
            rollout += 1
        return rollout

    # -- the end of an episode -----------------------------------------------------------------------------------------

    def close_episode(self, episode: RecordedEpisode) -> tuple[tuple[Step, ...], bool, dict[str, Any]]:
        """See `episodes.Recorder`. Raises `ConfigError` where it was closed before."""
        with self._lock:
            found = [(name, turns) for name, (each, turns) in self._open.items() if each is episode]
            if not found:
                raise ConfigError(f"the episode of {episode.attempt.task.id} is finished already", field="episode")
            (name, turns) = found[0]
            del self._open[name]
        return self._server.run(turns.close())

    def keep(self, trajectory: Trajectory) -> None:
        """See `episodes.Recorder`."""
        if not trajectory.exact:
            log.warning(
                "%s, rollout %d: the server did not tell all token ids and logprobs; trainers can't have it",
                *trajectory.key,
            )
        if self._store is not None:
            self._store.append(trajectory)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        name, _, rest = request.match_info["path"].removeprefix("episodes/").partition("/")
        found = self._open.get(name) if request.path.startswith("/episodes/") else None
        if found is None:
            return _refusal(404, "there is no such episode, or it is finished", "episode_not_found")
        _, turns = found
        if not _has_key(request, str(turns.key.reveal())):
            return _refusal(401, "this is not the key of the episode", "invalid_api_key")
        path = f"/{rest}"
        if request.method == "POST" and path.removeprefix("/v1") in ROUTES and path.startswith("/v1/"):
            return await self._generate(request, turns, name, path)
        if (request.method, path) in _PASSED_ON or (request.method == "GET" and path.startswith("/v1/models/")):
            return await self._fetch(request, path)
        message = (
            f"the recorder has no {request.method} {path}; it records {', '.join(ROUTES)}. {_INSTEAD.get(path, '')}"
        )
        turns.refused(404, message.strip())
        return _refusal(404, message.strip(), "no_route")

    async def _fetch(self, request: web.Request, path: str) -> web.StreamResponse:
        body = await request.read()
        try:
            found = await fetch(self._sender, request.method, path, request.headers.get("Content-Type"), body or None)
        except ManagedVLLMError as error:
            return _refusal(status_of(error), words_of(error))
        return web.Response(status=found.status, body=found.body, headers={"Content-Type": found.content_type})

    async def _generate(self, request: web.Request, turns: Turns, name: str, path: str) -> web.StreamResponse:
        try:
            asked = decoded(await request.read())
        except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError, too
            return _refusal(400, f"the request can't be read: {error}")
        except web.HTTPRequestEntityTooLarge as error:
            return _refusal(413, error.text or "the request is too large")
        if not turns.admit():
            return _refusal(403, f"this episode has had its {self._max_requests} requests", "too_many_requests")
        session = f"recorded/{name[:12]}"
        try:
            turn = await asyncio.to_thread(Turn.of, path.removeprefix("/v1"), asked, session, self._images)
        except ManagedVLLMError as error:  # the disk is full, say
            return _refusal(500, f"the request can't be recorded: {error.message}")
        if turns.closed:
            return _refusal(404, _FINISHED, "episode_finished")
        return await _Passing(request, turns, turn, RelayedGeneration(path, turn.sent)).pass_on(self._sender)


class _Passing:
    """One request on its way: its answer goes to the agent, and into the record."""

    def __init__(self, request: web.Request, turns: Turns, turn: Turn, generation: RelayedGeneration) -> None:
        self._request = request
        self._turns = turns
        self._turn = turn
        self._generation = generation
        self._answers = RelayedAnswers()
        self._started_at = time.time()
        self._response: web.StreamResponse | None = None

    async def pass_on(self, sender: Any) -> web.StreamResponse:
        """Returns the response, whose body has been written if it is a stream."""
        self._turns.begin(self._generation)
        try:
            return await self._answered(sender)
        except ManagedVLLMError as error:
            self._turns.refused(status_of(error), words_of(error))
            self._record()
            return await self._failed(status_of(error), words_of(error))
        except RelayEndedError:
            self._turns.left()
            self._record()
            return await self._failed(404, _FINISHED, "episode_finished")
        except (asyncio.CancelledError, ConnectionError):  # the agent has hung up
            self._turns.left()
            self._record()
            raise
        finally:
            self._turns.end(self._generation)

    async def _answered(self, sender: Any) -> web.StreamResponse:
        async with contextlib.aclosing(self._generation.pass_on(sender)) as events:
            async for event in events:
                await self._write(event)
        if self._generation.whole is not None:
            answer = msgspec.json.decode(self._generation.whole)
            self._answers.add(answer)
            self._record()
            return web.Response(
                body=msgspec.json.encode(self._turn.shown(answer)), headers={"Content-Type": "application/json"}
            )
        self._record()
        response = await self._stream()
        await response.write_eof()
        return response

    def _record(self) -> None:
        """Makes steps of what has come; once."""
        stats = self._generation.stats or RequestStats(
            model="",
            epoch=0,
            attempts=1,
            resumed_tokens=0,
            started_at=self._started_at,
            latency=time.time() - self._started_at,
            time_to_first_token=None,
        )
        answers, self._answers = self._answers, RelayedAnswers()
        self._turns.answered(self._turn, stats, answers)

    async def _write(self, event: bytes) -> None:
        if event != DONE:
            chunk = msgspec.json.decode(event)
            self._answers.add(chunk)
            event = msgspec.json.encode(self._turn.shown(chunk))
        await (await self._stream()).write(b"data: " + event + b"\n\n")

    async def _stream(self) -> web.StreamResponse:
        if self._response is None:
            self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await self._response.prepare(self._request)
        return self._response

    async def _failed(self, status: int, message: str, code: str | None = None) -> web.StreamResponse:
        """Says it, in mid-stream as vLLM does."""
        if self._response is None:
            return _refusal(status, message, code)
        with contextlib.suppress(ConnectionError):
            await self._response.write(b"data: " + msgspec.json.encode(error_body(status, message, code)) + b"\n\n")
            await self._response.write_eof()
        return self._response


def _has_key(request: web.Request, key: str) -> bool:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="replace")
    return hmac.compare_digest(given, key.encode())


def _refusal(status: int, message: str, code: str | None = None) -> web.Response:
    return web.json_response(error_body(status, message, code), status=status, reason=_reason(status))


def _reason(status: int) -> str | None:
    with contextlib.suppress(ValueError):
        return HTTPStatus(status).phrase
    return None
