"""The synchronous methods that concern the engine and the model it has: beam search, tokenizer, defaults, caches.

Each waits for the method of the same name of `AsyncEngineMethods`. Imports nothing heavy, as `request.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from managed_vllm.request import portal
from managed_vllm.request.arguments import BeamParams, Prompt
from managed_vllm.request.surface import WithoutTheRest

if TYPE_CHECKING:
    from managed_vllm.request.async_engine import AsyncEngineMethods
    from managed_vllm.request.beam_search import BeamSearchOutput
    from managed_vllm.request.sampling import SamplingParams
    from managed_vllm.request.server_metrics import ServerMetrics


class EngineMethods(WithoutTheRest):
    """Requests that concern the engine, or the model that it has."""

    @property
    def async_client(self) -> AsyncEngineMethods:
        """The same methods for asyncio."""
        raise NotImplementedError

    def beam_search(
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
        """The likeliest answers to each prompt: its `sequences`, best first, with the prompt's tokens ahead.

        Args:
            prompts: one, or a list of them, without images.
            params: `BeamSearchParams`, vLLM's, or a dict with `beam_width` and `max_tokens`.
            lora_request: must be None.
            use_tqdm: whether to show a progress bar, of prompts.
            concurrency_limit: how many prompts are searched at once, at most.
            timeout, return_exceptions: as for `chat`.

        A sequence has no `logprobs`: the route does not return them. Raises what `chat` raises.
        """
        return portal.run(
            lambda: self.async_client.beam_search(
                prompts,
                params,
                lora_request,
                use_tqdm,
                concurrency_limit,
                timeout=timeout,
                return_exceptions=return_exceptions,
            )
        )

    def get_tokenizer(self, /) -> Any:
        """The tokenizer of the served model, made here by transformers from the model's folder or Hugging Face id.

        It is compared with the server's. Raises `UnsupportedMethodError` without transformers, where the files can't be
        read here, or where the server has another one (`tokenizer=`): `tokenize` and `detokenize` ask the server.
        """
        return portal.run(lambda: self.async_client.get_tokenizer())

    def get_default_sampling_params(self, /) -> SamplingParams:
        """vLLM's defaults, and above them those of the model's generation_config.json; each call makes a new one.

        Raises `UnsupportedMethodError` where that file can't be read here.
        """
        return portal.run(lambda: self.async_client.get_default_sampling_params())

    def reset_prefix_cache(self, /, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empties the prefix cache, for all users of the server; whether it did.

        Raises `UnsupportedMethodError` for a server without `VLLM_SERVER_DEV_MODE=1`.
        """
        return portal.run(lambda: self.async_client.reset_prefix_cache(reset_running_requests, reset_connector))

    def reset_mm_cache(self, /) -> None:
        """Empties the cache of prepared images, for all users of the server. Raises as `reset_prefix_cache`."""
        portal.run(lambda: self.async_client.reset_mm_cache())

    def metrics(self, /, *, timeout: float | None = 30.0) -> ServerMetrics:
        """What the server does, and has done in this epoch: requests, caches, tokens, latencies; of all its users.

        `after.since(before)` of two of them has the rates between them. `timeout` is in seconds, for a server that is
        just being restarted, too (`RequestTimeoutError`). Raises `UnsupportedMethodError` for a server
        that has no `/metrics`.
        """
        return portal.run(lambda: self.async_client.metrics(timeout=timeout))

    def get_weight_version(self, /) -> str:
        """What the weights that are served are called; "default" where nobody has named them.

        Raises `UnsupportedMethodError` for a server without `VLLM_SERVER_DEV_MODE=1`, which those that we start have.
        """
        return portal.run(lambda: self.async_client.get_weight_version())

    def get_world_size(self, /, include_dp: bool = True) -> int:
        """How many processes compute: tensor times pipeline times data parallel, the last only with `include_dp`.

        Raises as `get_weight_version`.
        """
        return portal.run(lambda: self.async_client.get_world_size(include_dp))

    def start_profile(
        self,
        /,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
    ) -> None:
        """Starts the server's profiler. Raises `UnsupportedMethodError` for a server without `profiler_config=`."""
        portal.run(
            lambda: self.async_client.start_profile(
                profile_prefix, delay_iterations=delay_iterations, max_iterations=max_iterations
            )
        )

    def stop_profile(self, /) -> None:
        """Stops the server's profiler. Raises as `start_profile`."""
        portal.run(lambda: self.async_client.stop_profile())
