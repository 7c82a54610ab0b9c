"""Starts servers: forked from a warm image where that can be, else spawned.

In this order:

1. With `warm=False`, and for a `command=`, there is no image: servers are spawned. Where their program may be anything,
   a keeper ends them if we are killed.
2. The first start brings the image up and is forked from it, so it pays vLLM's imports once instead of three times.
   Later ones are forked at once.
3. While the server serves, the image imports what the server has imported since its fork. A module after whose import
   the image must not be forked is left out: there is a new image without it.
4. An image that dies is replaced, three times at most. One that refuses (it runs threads, vLLM is not as we know it)
   is not: from then on servers are spawned, and the reason is said once.
5. A start that went wrong, with nothing in its log that the image could not be the reason of, is made again plainly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable

from managed_vllm.config import SupervisorOrder, vllm_folder
from managed_vllm.errors import StateDirectoryError
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.server.image import ForkedServer, Image, ImageError, ImageRefusedError, preload
from managed_vllm.server.keeper import Keeper
from managed_vllm.server.launch import Launch
from managed_vllm.server.process import ForkedChild, ServerProcess
from managed_vllm.server.restarts import ENDED_FROM_OUTSIDE
from managed_vllm.status import Cause, Diagnosis, Progress, Stage

log = logging.getLogger(__name__)

_LOSSES = 3
"""As many images may die before there is no other."""

_MAYBE_THE_IMAGE = frozenset({Cause.UNKNOWN, Cause.STARTUP_SILENCE, Cause.ENGINE_TIMEOUT})
_KILLED_STARTS = 2
"""As many starts in a row may be ended from outside, or by a crash in compiled code, before one is spawned."""


_SPAWNS = 5
"""Times that the server's folder may be removed in the moment of its start."""


class NotForkedError(Exception):
    """`warm=True`, and the server can't be forked."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ServerStarter:
    """Starts the servers of one instance, whose replicas share one image; see the module's docstring.

    `how` says how the last one was started: "forked", "plain", or "plain: " and why it could not be forked.
    """

    def __init__(self, order: SupervisorOrder, instance: Instance, *, on_progress: Callable[[Progress], None]) -> None:
        """`on_progress` is called, while somebody waits for the image, with the number of modules imported so far."""
        self._order = order
        self._instance = instance
        self._on_progress = on_progress
        self._image: Image | None = None
        self._launch: Launch | None = None
        self._keeper: Keeper | None = None
        self._learnt: list[str] = []
        self._left_out: set[str] = set()
        self._losses = 0
        self._killed_starts = 0
        self._why_not = _why_never(order)
        self._tending: asyncio.Task[None] | None = None
        self._server_is_ready = asyncio.Event()
        self.how = ""

    @property
    def image_pid(self) -> int | None:
        """The image's pid, if it runs."""
        return None if self._image is None else self._image.pid

    async def start(self, launch: Launch, instance: Instance, on_line: Callable[[str], None]) -> ServerProcess:
        """Starts a server of the instance, whose output goes to `on_line` by lines, from a thread of its own.

        Raises `OSError` if its program can't be run, `NotForkedError`.
        """
        self._launch = launch
        shared_memory = cleanup.NewSharedMemory()
        forked = await self._fork(launch, instance)
        if forked is None and self._order.policy.warm is True:
            raise NotForkedError(self._why_not)
        self.how = "forked" if forked else f"plain: {self._why_not}" if self._why_not else "plain"
        log.info("the server is started: %s", self.how)
        if forked is None:
            return self._spawn_kept(launch, instance, on_line)
        return ServerProcess(
            ForkedChild(forked.pid),
            os.fdopen(forked.output, "rb", buffering=0),
            instance=instance,
            shared_memory=shared_memory,
            on_line=on_line,
            spared=lambda: self.image_pid,
            secrets=self._order.secrets() | {launch.control_key.reveal()},
        )

    def server_is_ready(self) -> None:
        """Nothing waits for the image: it may learn."""
        self._killed_starts = 0
        if self._forks:
            self._server_is_ready.set()
            if self._tending is None:
                self._tending = asyncio.create_task(self._tend())

    def start_failed(self, ended: Diagnosis) -> bool:
        """Called with the end of a server that never became ready; True if another is to be spawned at once."""
        if not self._forks:
            return False
        self._killed_starts += ended.cause in ENDED_FROM_OUTSIDE
        suspect = ended.cause in _MAYBE_THE_IMAGE or self._killed_starts >= _KILLED_STARTS
        if suspect:
            self._give_up(f"a server that was forked from it did not become ready: {ended.summary}")
        return suspect

    async def end(self) -> None:
        """Ends the image, and what was just being forked from it. The server, if there is one, must have ended."""
        if self._keeper is not None:
            self._keeper.close()
        tending, self._tending = self._tending, None
        if tending is not None:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)
        if self._image is not None:
            self._end_image()
            await asyncio.to_thread(_end_marked, self._instance)

    def _spawn_kept(self, launch: Launch, instance: Instance, on_line: Callable[[str], None]) -> ServerProcess:
        """Spawns a server, whose program may be anything; then a keeper ends it if we are killed."""
        spec = self._order.spec
        if spec.command is None and spec.python is None:
            return self._spawn(launch, instance, on_line)
        if self._keeper is None:
            self._keeper = Keeper({name: launch.environment[name] for name in (lifeline.MARKER, lifeline.SUPERVISOR)})
        self._keeper.begin()
        process = self._spawn(launch, instance, on_line)
        self._keeper.watch(process.pid)
        return process

    def _spawn(self, launch: Launch, instance: Instance, on_line: Callable[[str], None]) -> ServerProcess:
        program, path = launch.argv[0], launch.environment.get("PATH")
        for more_tries in reversed(range(_SPAWNS)):
            try:
                return ServerProcess.spawn(
                    launch.argv,
                    env=launch.environment,
                    cwd=self._instance.folder,
                    instance=instance,
                    on_line=on_line,
                    secrets=self._order.secrets() | {launch.control_key.reveal()},
                    inherited=launch.places,
                )
            except FileNotFoundError:
                if not more_tries or shutil.which(program, path=path) is None:
                    raise
                # Not the program: somebody has just removed the folder in which it is to run.
                with contextlib.suppress(StateDirectoryError):
                    self._instance.create()
        raise AssertionError

    # -- the image -----------------------------------------------------------------------------------------------------

    @property
    def _forks(self) -> bool:
        """Whether the next server is to be forked."""
        return self._order.policy.warm is not False and self._order.spec.command is None and not self._why_not

    async def _fork(self, launch: Launch, instance: Instance) -> ForkedServer | None:
        """A server forked from the image, which comes up first if need be; None: it is to be spawned."""
        while self._forks:
            image = self._image
            try:
                image = image or self._bring_up(launch)
                return await image.fork(launch.argv, launch.environment, inherited=launch.places)
            except ImageError as error:
                self._lose(image, error)
                # The fork may have been under way. No server is running, so whatever is marked is a part of it. (Of one
                # of several replicas only what is marked as that one: it has not told us of itself, and ends by that.)
                await asyncio.to_thread(_end_marked, instance)
        return None

    def _bring_up(self, launch: Launch) -> Image:
        """Starts an image. Raises `ImageError`."""
        folder = vllm_folder(self._order.python) if "cpu" in self._order.spec.vllm else None
        try:
            self._image = Image(
                launch.argv,
                environment=launch.environment,
                preload=preload(folder, launch.environment),
                cwd=self._instance.folder,
                log_path=self._instance.image_log,
                on_imports=lambda modules: self._on_progress(Progress(Stage.IMPORTING, f"{modules} modules")),
            )
        except OSError as error:
            raise ImageRefusedError(f"the image could not be started: {error}") from error
        log.info("image: pid %d", self._image.pid)
        return self._image

    async def _tend(self) -> None:
        """Lets the image learn whenever a server has become ready, and replaces it when it dies."""
        assert self._launch is not None
        while self._forks:
            image = self._image
            try:
                image = image or self._bring_up(self._launch)
                self._server_is_ready.clear()
                learnt = await image.learn(self._learnt, sorted(self._left_out))
                self._learnt = list(dict.fromkeys([*self._learnt, *learnt]))
                log.info("the image has imported %d more modules", len(learnt))
                await _first(image.ended, self._server_is_ready)
                if image.ended.is_set():
                    raise ImageError("the image has ended")
            except ImageError as error:
                self._lose(image, error)

    def _lose(self, image: Image | None, error: ImageError) -> None:
        """That image is of no more use, if that was not found out before."""
        if image is not self._image:
            return
        self._end_image()
        module = error.module if isinstance(error, ImageRefusedError) else ""
        if module and module not in self._left_out:
            self._left_out.add(module)
            log.info("%s: a new image goes without it", error.reason)
        elif isinstance(error, ImageRefusedError) or self._losses >= _LOSSES:
            self._give_up(error.reason)
        else:
            self._losses += 1
            log.warning("the image is lost: %s", error.reason)

    def _give_up(self, reason: str) -> None:
        """From now on servers are spawned."""
        self._why_not = reason
        log.warning("no warm image from now on, servers are launched plainly: %s", reason)
        self._end_image()

    def _end_image(self) -> None:
        image, self._image = self._image, None
        if image is not None:
            image.end()


def _why_never(order: SupervisorOrder) -> str:
    """Why servers of this kind are never forked; empty if they may be."""
    if order.spec.engine_args.get("enable_elastic_ep"):
        return "with enable_elastic_ep, vLLM starts Workers from an EngineCore that has threads and a GPU by then"
    return ""


async def _first(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _end_marked(instance: Instance) -> None:
    cleanup.end_processes(cleanup.marked_processes(instance))
