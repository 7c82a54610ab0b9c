"""The asynchronous methods that concern the engine and the model it has: beam search, tokenizer, defaults, caches."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from managed_vllm.errors import BadRequestError, UnsupportedMethodError, UnsupportedParameterError
from managed_vllm.request.arguments import BeamParams, Prompt
from managed_vllm.request.async_requests import AsyncRequests, deadline_of, raise_if_missing
from managed_vllm.request.batches import named
from managed_vllm.request.beam_search import BeamSearchOutput, BeamSearchParams
from managed_vllm.request.http_errors import checked_shape
from managed_vllm.request.pending import TextRequest
from managed_vllm.request.pooling_params import refuse_lora
from managed_vllm.request.prompts import as_prompts, prompt_fields
from managed_vllm.request.sampling import SamplingParams

if TYPE_CHECKING:
    from managed_vllm.request.server_metrics import ServerMetrics
    from managed_vllm.status import Connection

_DEV_MODE = "ManagedVLLM(…, env={'VLLM_SERVER_DEV_MODE': '1'})"
_PROFILER = "ManagedVLLM(…, profiler_config={'profiler': 'torch', 'torch_profiler_dir': …})"


class AsyncEngineMethods(AsyncRequests):
    """Requests that concern the engine. `EngineMethods` documents each in full."""

    async def beam_search(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        params: BeamParams,
        lora_request: object = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt. See `EngineMethods.beam_search`."""
        refuse_lora(lora_request)
        fields = BeamSearchParams.of(params).to_request()
        each, single = as_prompts(prompts)
        deadline = deadline_of(timeout)

        async def one(index: int) -> BeamSearchOutput:
            asked, images = prompt_fields(each[index])
            if images is not None:
                raise UnsupportedParameterError("beam_search() takes texts and token ids", field="multi_modal_data")
            answer, _ = await self._request("/v1/completions", {**asked, **fields}, "choices", deadline)
            with checked_shape(answer):
                return BeamSearchOutput.of(answer, asked["prompt"])

        return await self._batch(one, len(each), single, return_exceptions, use_tqdm, concurrency_limit, deadline)

    async def get_tokenizer(self, /) -> Any:
        """The tokenizer of the served model. See `EngineMethods.get_tokenizer`."""
        from managed_vllm.request import served_model

        root = await self._model_root()
        tokenizer = await asyncio.to_thread(served_model.tokenizer_of, root)
        for text in served_model.PROBES:
            with named(None, self._instance):
                answer, _ = await self._request("/tokenize", {"prompt": text}, "tokens", None)
            if answer["tokens"] != tokenizer.encode(text):
                raise served_model.other_tokenizer(root)
        return tokenizer

    async def get_default_sampling_params(self, /) -> SamplingParams:
        """The sampling parameters of a request without any. See `EngineMethods.get_default_sampling_params`."""
        from managed_vllm.request import served_model

        return await asyncio.to_thread(served_model.default_sampling_params, await self._model_root())

    async def reset_prefix_cache(self, /, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empties the prefix cache. See `EngineMethods.reset_prefix_cache`."""
        flags = f"reset_running_requests={reset_running_requests}&reset_external={reset_connector}".lower()
        answer = await self._command("reset_prefix_cache", f"/reset_prefix_cache?{flags}", _DEV_MODE)
        return answer.get("success") is not False

    async def reset_mm_cache(self, /) -> None:
        """Empties the cache of prepared images. See `EngineMethods.reset_mm_cache`."""
        await self._command("reset_mm_cache", "/reset_mm_cache", _DEV_MODE)

    async def metrics(self, /, *, timeout: float | None = 30.0) -> ServerMetrics:
        """What the server does, and has done in this epoch. See `EngineMethods.metrics`."""
        from managed_vllm.request import server_metrics

        deadline = deadline_of(timeout)
        servers = await self.sender.servers(deadline)
        if len(servers) > 1 and self._ask_supervisor is None:
            raise UnsupportedMethodError(f"metrics() is of one server, not of {len(servers)}", method="metrics")
        try:
            with named(None, self._instance):
                told = [await self._metrics_of(server, deadline) for server in servers]
            single = servers[0] is None
            found = (
                server_metrics.parse(told[0][1], epoch=told[0][0]) if single else server_metrics.together(dict(told))
            )
        except (BadRequestError, ValueError) as error:
            raise UnsupportedMethodError(f"metrics(): the server has no /metrics: {error}", method="metrics") from error
        if self._ask_supervisor is None:
            return found
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        return dataclasses.replace(found, supervisor=await self._ask_supervisor(left_s))

    async def _metrics_of(self, server: Connection | None, deadline: float | None) -> tuple[int, str]:
        """Epoch and text of the metrics of one server."""
        request = TextRequest("/metrics")
        stats = await self.sender.send(request, deadline, only=server)
        return stats.epoch, request.text

    async def get_weight_version(self, /) -> str:
        """What the weights are called. See `EngineMethods.get_weight_version`."""
        return str(await self._look("get_weight_version", "/weight_info", "weight_version"))

    async def get_world_size(self, /, include_dp: bool = True) -> int:
        """How many processes compute. See `EngineMethods.get_world_size`."""
        path = f"/get_world_size?include_dp={str(bool(include_dp)).lower()}"
        return int(await self._look("get_world_size", path, "world_size"))

    async def start_profile(
        self,
        /,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
    ) -> None:
        """Starts the profiler. See `EngineMethods.start_profile`."""
        given = {
            "profile_prefix": profile_prefix,
            "delay_iterations": delay_iterations,
            "max_iterations": max_iterations,
        }
        body = {name: value for name, value in given.items() if value is not None}
        await self._command("start_profile", "/start_profile", _PROFILER, body)

    async def stop_profile(self, /) -> None:
        """Stops the profiler. See `EngineMethods.stop_profile`."""
        await self._command("stop_profile", "/stop_profile", _PROFILER)

    async def _look(self, method: str, path: str, key: str) -> Any:
        """What a route of the development mode says. Raises `UnsupportedMethodError` where it is missing."""
        try:
            with named(None, self._instance):
                answer, _ = await self._request(path, None, key, None)
            return answer[key]
        except BadRequestError as error:
            raise_if_missing(method, path, _DEV_MODE, error)
            raise

    async def _model_root(self) -> str:
        """The folder or Hugging Face id from which the server has its model."""
        with named(None, self._instance):
            answer, stats = await self._request("/v1/models", None, "data", None)
            with checked_shape(answer):
                cards = answer["data"]
                card = next((one for one in cards if one["id"] == stats.model), cards[0])
                return str(card.get("root") or card["id"])
