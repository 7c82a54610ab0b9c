"""`llm.engine`: the control of a server's engine, as its users have it; by the supervisor, which remembers it.

`EngineControl` waits, `AsyncEngineControl` has the same methods for asyncio. What both ask is a call on the control
channel (`managed_vllm.server.engine` is the other end), bounded in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar, get_args

from managed_vllm import paths
from managed_vllm.engine_state import PAUSE_MODES, SLEEP_LEVELS, EngineState, PauseMode
from managed_vllm.errors import (
    ConfigError,
    EngineControlError,
    EngineTimeoutError,
)
from managed_vllm.instance.attach import Attachment
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.engine_calls import CALL_S, UPDATE_S, GpuMemoryChange, Weights, call_engine
from managed_vllm.instance.weight_sync import AsyncWeightSyncClient, WeightSyncClient
from managed_vllm.policies import seconds

T = TypeVar("T")
OnUpdate = Literal["finish", "restart", "continue"]


class EngineControl:
    """Controls the engine of a handle's server, **for all its users**.

    Every method ends within `timeout` seconds, the wait for a server that is just being started included. They raise:

    EngineUnsupportedError: the server can't do that; the message says what it would have to be started with.
    EngineTimeoutError: the time was up. What had begun is undone.
    EngineLostError: the server or the supervisor ended meanwhile. After a restart the engine is as it was before.
    EngineControlError: the server refuses, in its own words.
    StartupError, ServerStoppedError: there is no server any more. ConfigError: it is an external one.
    """

    def __init__(self, attachment: Callable[[], Attachment]) -> None:
        """`attachment` is asked for each call: a handle that was closed has a new one."""
        self._attachment = attachment

    # -- pause ---------------------------------------------------------------------------------------------------------

    def pause(self, mode: PauseMode = "keep", *, timeout: float = CALL_S) -> None:
        """Pauses the engine until `resume`. New requests wait, within their own time limits.

        What is in flight goes on after `resume` ("keep"), is finished first ("wait": that is what takes time), or ends
        at once with the tokens so far and the finish_reason "abort" ("abort").
        """
        self._call("pause", timeout, mode=_checked_mode(mode))

    def resume(self, *, timeout: float = CALL_S) -> None:
        """Ends a `pause`. What others hold by `paused()` they hold on."""
        self._call("resume", timeout)

    def is_paused(self, *, timeout: float = CALL_S) -> bool:
        """Whether it is paused, by whomever."""
        return bool(self._call("is_paused", timeout)["is_paused"])

    @contextlib.contextmanager
    def paused(self, mode: PauseMode = "keep", *, timeout: float = CALL_S) -> Iterator[None]:
        """A pause for as long as the block lasts, and not longer than this process lives.

        Raises `EngineLostError` at its end if the supervisor was killed meanwhile, so that the pause did not hold.
        """
        with self._held("pause", "resume", timeout, mode=_checked_mode(mode)):
            yield

    # -- sleep ---------------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1, *, mode: PauseMode = "keep", timeout: float = CALL_S) -> GpuMemoryChange | None:
        """Puts the engine to sleep until `wake`: its GPU memory is free for others. New requests wait.

        Level 1 keeps the weights in the host's memory, 2 discards them: load others before requests go on. Both need
        `enable_sleep_mode=True`, which vLLM has on GPUs only. Level 0 only pauses. `mode` is as for `pause`; the KV
        cache is dropped, so that what is kept is computed anew. Returns what that frees; None: it can't be measured.
        """
        return GpuMemoryChange.of(self._call("sleep", timeout, level=_checked_level(level), mode=_checked_mode(mode)))

    def wake(self, tags: Sequence[str] | None = None, *, timeout: float = CALL_S) -> GpuMemoryChange | None:
        """Wakes the engine. With `tags` (`["weights"]`, `["kv_cache"]`) that part only; it serves once all is awake.

        Returns how much memory that takes; None: it can't be measured.
        """
        tags = None if tags is None else [str(tag) for tag in tags]
        return GpuMemoryChange.of(self._call("wake", timeout, tags=tags))

    def is_sleeping(self, *, timeout: float = CALL_S) -> bool:
        """Whether it sleeps, at whatever level."""
        return bool(self._call("is_sleeping", timeout)["is_sleeping"])

    @contextlib.contextmanager
    def asleep(self, level: int = 1, *, mode: PauseMode = "keep", timeout: float = CALL_S) -> Iterator[None]:
        """Sleep for as long as the block lasts, around a training step, say; see `sleep`, and `paused` for its end."""
        asked = {"level": _checked_level(level), "mode": _checked_mode(mode)}
        with self._held("sleep", "wake", timeout, **asked):
            yield

    # -- caches --------------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self, *, running: bool = False, timeout: float = CALL_S) -> bool:
        """Empties the prefix cache; whether it did. It does not while requests run, unless `running` has them computed
        anew from their tokens."""
        return bool(self._call("reset_prefix_cache", timeout, running=running)["success"])

    def reset_mm_cache(self, *, timeout: float = CALL_S) -> None:
        """Empties the cache of prepared images."""
        self._call("reset_mm_cache", timeout)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_lora(
        self, name: str, path: str | os.PathLike[str], *, replace: bool = False, timeout: float = CALL_S
    ) -> None:
        """Loads a LoRA adapter under a name, by which requests ask for it (`model=name`). It is there after restarts.

        Args:
            name: its name. The same name with the same path again does nothing.
            path: its folder, with adapter_config.json and the weights, or a Hugging Face id.
            replace: in place of the adapter of that name, also where the files at the same path have changed.
            timeout: seconds.

        The server must have been started with `enable_lora=True` (and `max_lora_rank=`, where theirs is above 16).
        """
        given: object = name
        if not isinstance(given, str) or not given:
            raise ConfigError(f"an adapter's name is text, not {name!r}", field="name")
        self._call("load_lora", timeout, name=name, path=where(path), replace=replace)

    def ensure_lora(self, name: str, path: str | os.PathLike[str], *, timeout: float = CALL_S) -> None:
        """As `load_lora`, without a question where the status has it already."""
        deadline = time.monotonic() + seconds("timeout", timeout)
        channel, folder = self._ready("load_lora", deadline, timeout), where(path)
        if channel.status is None or channel.status.engine.loras.get(name) != folder:
            call_engine(channel, "load_lora", deadline, {"name": name, "path": folder})

    def unload_lora(self, name: str, *, timeout: float = CALL_S) -> None:
        """Takes an adapter away. Requests that name it get `ModelNotFoundError` from then on."""
        self._call("unload_lora", timeout, name=str(name))

    def loras(self, *, timeout: float = CALL_S) -> dict[str, str]:
        """The adapters that are served, those of `lora_modules=` included: name to folder."""
        return {str(name): str(path) for name, path in self._call("loras", timeout)["loras"].items()}

    # -- weights -------------------------------------------------------------------------------------------------------

    def weights(self, *, timeout: float = CALL_S) -> Weights:
        """Which weights are served."""
        found = self._call("weights", timeout)
        return Weights(found["path"], found["version"], found["checksum"])

    def update_weights(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        version: str | None = None,
        expect: str | None = None,
        on_update: OnUpdate = "finish",
        rolling: bool = False,
        timeout: float = UPDATE_S,
    ) -> Weights:
        """Has the server take the weights of another checkpoint of the same model, or leaves everything as it was.

        The checkpoint is looked at before, and the weights after they are loaded; meanwhile the engine is paused. What
        fails is taken back, with another start of the server where vLLM can't: no token of broken weights gets out.

        Args:
            path_or_id: the folder with config.json and *.safetensors, as the server sees it, or a hub id
                (`org/name`, `org/name@revision`) that is in the local cache. Keep the folder as it is until another
                one is served: a server that is started again reads it again.
            version: what the weights are called from then on; None: the folder's name.
            expect: the checksum that they must have, as `weights()` gave it for this checkpoint at another time.
            on_update: what becomes of requests in flight. "finish": they are finished first, while new ones wait.
                "restart": those of our clients begin anew with the new weights; streams that have given tokens to their
                callers go on instead; other clients are told the finish_reason "abort". "continue": all go on with the
                new weights where they are. What goes on is computed anew from its tokens, and its answer says so.
            rolling: with several replicas: one after the other, so that the others answer meanwhile, with either
                version until this returns. Else all of them at once: no answer is of the new weights before all have
                them. What fails on one is taken back on all, in the same way. Of no meaning for a single server.
            timeout: seconds; what has begun is taken back then.

        Raises `CheckpointError` with all that speaks against the checkpoint, and what else calls raise.
        """
        _check_on_update(on_update)
        _check_texts(version=version, expect=expect)
        if not isinstance(rolling, bool):
            raise ConfigError(f"rolling is True or False, not {rolling!r}", field="rolling")
        path = paths.argument(os.fspath(path_or_id))
        asked = {"path": path, "version": version, "checksum": expect, "on_update": on_update, "rolling": rolling}
        found = self._call("update_weights", timeout, **asked)
        return Weights(found["path"], found["version"], found["checksum"])

    def weight_sync_client(
        self,
        *,
        version: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        on_update: OnUpdate = "finish",
        timeout: float = UPDATE_S,
    ) -> WeightSyncClient:
        """What a trainer sends its weights with: an object of vLLM's protocol `VLLMWeightSyncClient`.

        Args:
            version: what the weights are called from then on; None: "transfer-1", "transfer-2", …
            checkpoint: the folder of a checkpoint that has the same weights: a restart takes them from there. Without
                one, a server that ends with them has failed, with `WeightsLostError`.
            on_update: what becomes of requests in flight, as for `update_weights`.
            timeout: seconds for each call, and for an update from its start to its end; it is taken back then.

        The server must have been started with `for_training=True`, or with a `weight_transfer_config=`. With several
        replicas `send` sends to all of them, all or nothing; vLLM's own transfers are an `EngineUnsupportedError` then.
        """
        _check_on_update(on_update)
        _check_texts(version=version)
        folder = None if checkpoint is None else paths.argument(os.fspath(checkpoint))
        limit = seconds("timeout", timeout)
        return WeightSyncClient(self._ready, version=version, checkpoint=folder, on_update=on_update, timeout=limit)

    def state(self) -> EngineState:
        """What users have made of the engine, as the supervisor knows it; the same as `status().engine`."""
        return self._attachment().status().engine

    def last_state(self) -> EngineState | None:
        """The same as the supervisor said it last, without a question; None without a connection to it."""
        status = self._attachment().last_status()
        return None if status is None else status.engine

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, call: str, timeout: float, /, **arguments: Any) -> dict[str, Any]:
        deadline = time.monotonic() + seconds("timeout", timeout)
        return call_engine(self._ready(call, deadline, timeout), call, deadline, arguments)

    def _ready(self, name: str, deadline: float, timeout: float) -> Channel:
        attachment = self._attachment()
        try:
            channel = attachment.attach(deadline)
            if channel is None:
                raise ConfigError("the engine of an external server can't be controlled from here", field="base_url")
            attachment.wait_ready(max(0.0, deadline - time.monotonic()))
        except EngineControlError:
            raise
        except TimeoutError as error:
            raise EngineTimeoutError(f"{name}: the server was not ready within {timeout:g} s", call=name) from error
        now = attachment.attach(deadline)  # it may have become another one while we waited
        return channel if now is None else now

    @contextlib.contextmanager
    def _held(self, begin: str, end: str, timeout: float, **arguments: Any) -> Iterator[None]:
        """What ends with the block, or with this process's connection to the supervisor."""
        deadline = time.monotonic() + seconds("timeout", timeout)
        channel = self._ready(begin, deadline, timeout)
        call_engine(channel, begin, deadline, {**arguments, "held": True})
        try:
            yield
        except BaseException:
            with contextlib.suppress(EngineControlError):
                call_engine(channel, end, time.monotonic() + timeout, {"held": True})
            raise
        call_engine(channel, end, time.monotonic() + timeout, {"held": True})


def where(path: str | os.PathLike[str]) -> str:
    """An adapter's folder as the server is told it, which has another working directory; an id of the hub as it is."""
    return paths.canonical(path) if isinstance(path, os.PathLike) else paths.argument(path)


def _checked_mode(mode: object) -> PauseMode:
    if mode not in PAUSE_MODES:
        raise ConfigError(f"mode must be one of {', '.join(PAUSE_MODES)}, not {mode!r}", field="mode")
    return mode


def _check_on_update(on_update: object) -> None:
    if on_update not in get_args(OnUpdate):
        raise ConfigError(f"on_update is 'finish', 'restart' or 'continue', not {on_update!r}", field="on_update")


def _check_texts(**texts: object) -> None:
    for name, text in texts.items():
        if text is not None and (not isinstance(text, str) or not text):
            raise ConfigError(f"{name} is text, not {text!r}", field=name)


def _checked_level(level: object) -> int:
    if isinstance(level, bool) or level not in SLEEP_LEVELS:
        raise ConfigError(f"level must be 0, 1 or 2, not {level!r}", field="level")
    return int(level)


# -- asyncio -----------------------------------------------------------------------------------------------------------

InThread = Callable[[Callable[[], Any], str], Future[Any]]
"""Runs a function in a thread of its own, which has that name."""


class AsyncEngineControl:
    """`EngineControl` for asyncio: the same methods, to be awaited, and `async with`. Each waits in a thread.

    A call that is cancelled goes on in the supervisor, to its end; a block that is cancelled while it is entered is
    left again.
    """

    def __init__(self, control: EngineControl, in_thread: InThread) -> None:
        self._control = control
        self._in_thread = in_thread

    async def pause(self, mode: PauseMode = "keep", *, timeout: float = CALL_S) -> None:
        """See `EngineControl.pause`."""
        await self._run(lambda: self._control.pause(mode, timeout=timeout))

    async def resume(self, *, timeout: float = CALL_S) -> None:
        """See `EngineControl.resume`."""
        await self._run(lambda: self._control.resume(timeout=timeout))

    async def is_paused(self, *, timeout: float = CALL_S) -> bool:
        """See `EngineControl.is_paused`."""
        return await self._run(lambda: self._control.is_paused(timeout=timeout))

    @contextlib.asynccontextmanager
    async def paused(self, mode: PauseMode = "keep", *, timeout: float = CALL_S) -> AsyncIterator[None]:
        """See `EngineControl.paused`."""
        async with self._entered(self._control.paused(mode, timeout=timeout)):
            yield

    async def sleep(
        self, level: int = 1, *, mode: PauseMode = "keep", timeout: float = CALL_S
    ) -> GpuMemoryChange | None:
        """See `EngineControl.sleep`."""
        return await self._run(lambda: self._control.sleep(level, mode=mode, timeout=timeout))

    async def wake(self, tags: Sequence[str] | None = None, *, timeout: float = CALL_S) -> GpuMemoryChange | None:
        """See `EngineControl.wake`."""
        return await self._run(lambda: self._control.wake(tags, timeout=timeout))

    async def is_sleeping(self, *, timeout: float = CALL_S) -> bool:
        """See `EngineControl.is_sleeping`."""
        return await self._run(lambda: self._control.is_sleeping(timeout=timeout))

    @contextlib.asynccontextmanager
    async def asleep(self, level: int = 1, *, mode: PauseMode = "keep", timeout: float = CALL_S) -> AsyncIterator[None]:
        """See `EngineControl.asleep`."""
        async with self._entered(self._control.asleep(level, mode=mode, timeout=timeout)):
            yield

    async def reset_prefix_cache(self, *, running: bool = False, timeout: float = CALL_S) -> bool:
        """See `EngineControl.reset_prefix_cache`."""
        return await self._run(lambda: self._control.reset_prefix_cache(running=running, timeout=timeout))

    async def reset_mm_cache(self, *, timeout: float = CALL_S) -> None:
        """See `EngineControl.reset_mm_cache`."""
        await self._run(lambda: self._control.reset_mm_cache(timeout=timeout))

    async def load_lora(
        self, name: str, path: str | os.PathLike[str], *, replace: bool = False, timeout: float = CALL_S
    ) -> None:
        """See `EngineControl.load_lora`."""
        await self._run(lambda: self._control.load_lora(name, path, replace=replace, timeout=timeout))

    async def unload_lora(self, name: str, *, timeout: float = CALL_S) -> None:
        """See `EngineControl.unload_lora`."""
        await self._run(lambda: self._control.unload_lora(name, timeout=timeout))

    async def loras(self, *, timeout: float = CALL_S) -> dict[str, str]:
        """See `EngineControl.loras`."""
        return await self._run(lambda: self._control.loras(timeout=timeout))

    async def weights(self, *, timeout: float = CALL_S) -> Weights:
        """See `EngineControl.weights`."""
        return await self._run(lambda: self._control.weights(timeout=timeout))

    async def update_weights(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        version: str | None = None,
        expect: str | None = None,
        on_update: OnUpdate = "finish",
        rolling: bool = False,
        timeout: float = UPDATE_S,
    ) -> Weights:
        """See `EngineControl.update_weights`."""
        return await self._run(
            lambda: self._control.update_weights(
                path_or_id, version=version, expect=expect, on_update=on_update, rolling=rolling, timeout=timeout
            )
        )

    def weight_sync_client(
        self,
        *,
        version: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        on_update: OnUpdate = "finish",
        timeout: float = UPDATE_S,
    ) -> AsyncWeightSyncClient:
        """See `EngineControl.weight_sync_client`; the methods of this one are awaited."""
        client = self._control.weight_sync_client(
            version=version, checkpoint=checkpoint, on_update=on_update, timeout=timeout
        )
        return AsyncWeightSyncClient(client, self._run)

    async def state(self) -> EngineState:
        """See `EngineControl.state`."""
        return await self._run(self._control.state)

    async def _run(self, function: Callable[[], T]) -> T:
        found: T = await asyncio.wrap_future(self._in_thread(function, "managed-vllm-engine"))
        return found

    @contextlib.asynccontextmanager
    async def _entered(self, block: contextlib.AbstractContextManager[None]) -> AsyncIterator[None]:
        entering = self._in_thread(block.__enter__, "managed-vllm-engine")
        try:
            await asyncio.shield(asyncio.wrap_future(entering))
        except asyncio.CancelledError:
            # The thread can't be cancelled: what it will have begun is ended by the next one.
            entering.add_done_callback(lambda done: done.exception() or self._leave(block, done.exception()))
            raise
        try:
            yield
        except BaseException as error:
            await asyncio.shield(asyncio.wrap_future(self._leave(block, error)))
            raise
        await asyncio.shield(asyncio.wrap_future(self._leave(block)))

    def _leave(self, block: contextlib.AbstractContextManager[None], error: BaseException | None = None) -> Future[Any]:
        def leave() -> None:
            with contextlib.suppress(EngineControlError) if error is not None else contextlib.nullcontext():
                block.__exit__(None, None, None)

        return self._in_thread(leave, "managed-vllm-engine")
