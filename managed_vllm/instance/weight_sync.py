"""How a trainer sends its weights to a managed server: vLLM's `VLLMWeightSyncClient`, with our key and our transaction.

vLLM's trainers (0.32: `WeightTransferTrainerFactory.trainer_init(…, client=…)`) drive it with four methods. What these
ask is done by the supervisor (`managed_vllm.server.weight_transfers`): it pauses the engine, looks at what has come,
and takes it back where it is no good.

`send` needs no trainer of vLLM's, no vLLM and no GPU: it puts the tensors into memory that the server's Workers read.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from managed_vllm import paths
from managed_vllm.errors import ConfigError, EngineControlError, EngineLostError
from managed_vllm.instance.channel import MAX_LINE, Channel
from managed_vllm.instance.engine_calls import Weights, call_engine

T = TypeVar("T")
UpdateInfo = Mapping[str, Any] | Sequence[Mapping[str, Any]]

PART = 256 << 20
"""Bytes of the weights that `send` has in shared memory at once, if no single one is larger."""


class WeightSyncClient:
    """Sends weights to a handle's server, one update after the other. Made by `llm.engine.weight_sync_client`.

    An update is `start_weight_update`, `update_weights` any number of times, and `finish_weight_update`. From its start
    to its end the engine is paused and the server's other users' calls of it wait. It is taken back, and the weights
    from before serve on, where one of its calls fails, by `abort_weight_update`, when this process ends, when the time
    is up, and when the next one is started.

    Raises `BadWeightsError` for weights that can't be served, `WeightsLostError` where the server has ended with those
    that were sent last, and what else calls of `llm.engine` raise.

    Attributes:
        version: what the next weights are called, if `finish_weight_update` is not told; vLLM's trainers don't tell.
        checkpoint: a folder that has the same weights as the next ones, or None. Both are None again after
            `finish_weight_update`: they say nothing of the weights after the next ones.
    """

    def __init__(
        self,
        ready: Callable[[str, float, float], Channel],
        *,
        version: str | None,
        checkpoint: str | None,
        on_update: str,
        timeout: float,
    ) -> None:
        """`ready` waits for the server, given a call's name, its deadline (monotonic clock) and its time limit."""
        self.version = version
        self.checkpoint = checkpoint
        self._ready = ready
        self._on_update = on_update
        self._timeout = timeout
        self._channel: Channel | None = None

    # -- vLLM's protocol -----------------------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the server's Workers with the trainer, as vLLM's transfer engine needs it. Once for each server."""
        self._begin("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Pauses the engine; the weights may be sent. What was not finished before is taken back."""
        self._channel = self._begin("start_weight_update", on_update=self._on_update, limit_s=self._timeout)

    def update_weights(self, update_info: UpdateInfo) -> None:
        """Has the server load some of the weights."""
        self._go_on("receive_weights", update_info=_as_json(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> Weights:
        """Has the server use what has come; returns once requests are answered with it."""
        version = self.version if weight_version is None else weight_version
        checkpoint = None if self.checkpoint is None else paths.argument(os.fspath(self.checkpoint))
        self.version = self.checkpoint = None
        found = self._go_on("finish_weight_update", version=version, checkpoint=checkpoint)
        self._channel = None
        return Weights(found["path"], found["version"], found["checksum"])

    def shutdown_weight_transfer_engine(self) -> None:
        """Ends the connection of Workers and trainer; an update that is under way is taken back."""
        self._begin("shutdown_weight_transfer_engine")

    # -- ours ----------------------------------------------------------------------------------------------------------

    def abort_weight_update(self) -> None:
        """Takes back what has been started: the weights from before serve again. Nothing to be done is no error."""
        if self._channel is not None:
            self._go_on("abort_weight_update")
            self._channel = None

    def send(
        self, tensors: Iterable[tuple[str, Any]], *, version: str | None = None, checkpoint: str | None = None
    ) -> Weights:
        """One whole update, with tensors of this process: to a CPU server with `for_training=True`, on this machine.

        Args:
            tensors: name and torch tensor of all weights, as in the model's checkpoint: `model.named_parameters()`.
            version: what they are called from then on; None: as `self.version` says.
            checkpoint: a folder that has the same weights; None: as `self.checkpoint` says.
        """
        self.start_weight_update()
        try:
            for part in _parts(tensors):
                with _shared(part) as update_info:
                    self.update_weights(update_info)
            if checkpoint is not None:
                self.checkpoint = checkpoint
            return self.finish_weight_update(version)
        except BaseException:
            with contextlib.suppress(EngineControlError):
                self.abort_weight_update()
            raise

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _begin(self, name: str, **arguments: Any) -> Channel:
        deadline = time.monotonic() + self._timeout
        channel = self._ready(name, deadline, self._timeout)
        call_engine(channel, name, deadline, arguments)
        return channel

    def _go_on(self, name: str, **arguments: Any) -> dict[str, Any]:
        """A call on the very connection to which the update is tied."""
        if self._channel is None:
            raise EngineLostError(f"{name}: no weight update has been started", call=name)
        try:
            return call_engine(self._channel, name, time.monotonic() + self._timeout, arguments)
        except BaseException:
            if name != "abort_weight_update":
                self._drop()
            raise

    def _drop(self) -> None:
        """The supervisor has taken the update back with its error; one that does not know of it yet does so now."""
        channel, self._channel = self._channel, None
        if channel is not None and not channel.closed:
            with contextlib.suppress(EngineControlError):
                call_engine(channel, "abort_weight_update", time.monotonic() + self._timeout, {})


class AsyncWeightSyncClient:
    """`WeightSyncClient` for asyncio: the same methods, to be awaited. Each waits in a thread."""

    def __init__(self, client: WeightSyncClient, run: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        """`run` runs a function in a thread."""
        self._client = client
        self._run = run

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See `WeightSyncClient.init_weight_transfer_engine`."""
        await self._run(lambda: self._client.init_weight_transfer_engine(init_info))

    async def start_weight_update(self) -> None:
        """See `WeightSyncClient.start_weight_update`."""
        await self._run(self._client.start_weight_update)

    async def update_weights(self, update_info: UpdateInfo) -> None:
        """See `WeightSyncClient.update_weights`."""
        await self._run(lambda: self._client.update_weights(update_info))

    async def finish_weight_update(self, weight_version: str | None = None) -> Weights:
        """See `WeightSyncClient.finish_weight_update`."""
        found: Weights = await self._run(lambda: self._client.finish_weight_update(weight_version))
        return found

    async def shutdown_weight_transfer_engine(self) -> None:
        """See `WeightSyncClient.shutdown_weight_transfer_engine`."""
        await self._run(self._client.shutdown_weight_transfer_engine)

    async def abort_weight_update(self) -> None:
        """See `WeightSyncClient.abort_weight_update`."""
        await self._run(self._client.abort_weight_update)

    async def send(
        self, tensors: Iterable[tuple[str, Any]], *, version: str | None = None, checkpoint: str | None = None
    ) -> Weights:
        """See `WeightSyncClient.send`."""
        found: Weights = await self._run(lambda: self._client.send(tensors, version=version, checkpoint=checkpoint))
        return found


# -- what is sent ------------------------------------------------------------------------------------------------------


def _as_json(update_info: UpdateInfo) -> Any:
    """As vLLM's own HTTP client sends it (0.32: `clients.py`): the handles of CUDA's IPC are pickled.

    Raises `ConfigError` for what JSON does not have, or the control channel does not carry.
    """
    if not isinstance(update_info, Mapping):
        return [_as_json(one) for one in update_info]
    info = dict(update_info)
    if (handles := info.pop("ipc_handles", None)) is not None:
        info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
    try:
        size = len(json.dumps(info))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"update_info is not of JSON's types: {error}", field="update_info") from error
    if size > MAX_LINE - 4096:
        raise ConfigError(
            f"update_info has {size:,} bytes, {MAX_LINE - 4096:,} at most go in one call; send the weights in parts",
            field="update_info",
        )
    return info


def _parts(tensors: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tensors on the CPU, `PART` bytes at once."""
    part: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if part and size + nbytes > PART:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to("cpu").contiguous()
        size += nbytes
    if part:
        yield part


@contextlib.contextmanager
def _shared(part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Some tensors in memory that other processes of this user can read, for as long as the block lasts.

    What tells the server where they are; the names and shapes are for the supervisor as well.
    """
    import safetensors.torch

    # Each by itself: safetensors refuses tensors that share memory, as tied weights do.
    data = safetensors.torch.save({name: tensor.clone() for name, tensor in part.items()})
    with _memory_file() as (path, file):
        file.write(data)
        file.flush()
        yield {
            "path": path,
            "names": list(part),
            "dtype_names": [str(tensor.dtype).rpartition(".")[2] for tensor in part.values()],
            "shapes": [list(tensor.shape) for tensor in part.values()],
        }


@contextlib.contextmanager
def _memory_file() -> Iterator[tuple[str, Any]]:
    """A file in memory, which the kernel removes with this process; a temporary one where there are none."""
    if not hasattr(os, "memfd_create"):
        with tempfile.NamedTemporaryFile(prefix="managed-vllm-weights-") as file:
            yield file.name, file
        return
    with open(os.memfd_create("managed-vllm-weights", os.MFD_CLOEXEC), "wb") as file:
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}", file
