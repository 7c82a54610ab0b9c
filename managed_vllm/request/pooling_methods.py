"""The synchronous methods for pooling models: `embed`, `encode`, `classify`, `reward`, `score`.

Each waits for the method of the same name of `AsyncPoolingMethods`. Imports nothing heavy, as `request.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from managed_vllm.request import portal
from managed_vllm.request.arguments import PoolingParams, ProgressBar, Prompt, ScoreInput

if TYPE_CHECKING:
    from managed_vllm.request.async_pooling import AsyncPoolingMethods
    from managed_vllm.request.outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )


class PoolingMethods:
    """Requests to the server of a pooling model (`runner="pooling"`). What is documented for `embed` holds for all.

    A server whose model is for another task is a `BadRequestError` that says so.
    """

    @property
    def async_client(self) -> AsyncPoolingMethods:
        """The same methods for asyncio."""
        raise NotImplementedError

    def embed(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        use_tqdm: ProgressBar = False,
        *,
        pooling_params: PoolingParams | None = None,
        lora_request: object = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt (text or token ids), from a server of an embedding model.

        The route does not return the prompt's token ids: `prompt_token_ids` is empty.

        Args:
            prompts: one, or a list of them, as for `generate`.
            use_tqdm: as for `chat`.
            pooling_params: `use_activation` and `dimensions`, in a dict or a `vllm.PoolingParams`.
            lora_request: must be None.
            tokenization_kwargs: `add_special_tokens`, `truncate_prompt_tokens`, `truncation_side`, `padding`.
            timeout, return_exceptions, extra_body: as for `chat`.

        Raises what `chat` raises.
        """
        return portal.run(
            lambda: self.async_client.embed(
                prompts,
                use_tqdm,
                pooling_params=pooling_params,
                lora_request=lora_request,
                tokenization_kwargs=tokenization_kwargs,
                timeout=timeout,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
            )
        )

    def encode(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: ProgressBar = False,
        lora_request: object = None,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """What the model's pooler makes of each prompt: `outputs.data`, a list where `vllm.LLM` has a tensor.

        Args:
            prompts: as for `embed`, and so are the arguments that are not named here.
            pooling_task: "embed", "classify", "token_embed", "token_classify" …; None: the server's.
        """
        return portal.run(
            lambda: self.async_client.encode(
                prompts,
                pooling_params,
                use_tqdm=use_tqdm,
                lora_request=lora_request,
                pooling_task=pooling_task,
                tokenization_kwargs=tokenization_kwargs,
                timeout=timeout,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
            )
        )

    def classify(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: ProgressBar = False,
        lora_request: object = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probabilities of each prompt's classes: `outputs.probs`. The arguments are those of `embed`."""
        return portal.run(
            lambda: self.async_client.classify(
                prompts,
                pooling_params=pooling_params,
                use_tqdm=use_tqdm,
                lora_request=lora_request,
                tokenization_kwargs=tokenization_kwargs,
                timeout=timeout,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
            )
        )

    def reward(
        self,
        /,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: ProgressBar = False,
        lora_request: object = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """The rewards of each prompt's tokens, as older vLLM has it: `encode` with `pooling_task="token_classify"`."""
        return portal.run(
            lambda: self.async_client.reward(
                prompts,
                pooling_params=pooling_params,
                use_tqdm=use_tqdm,
                lora_request=lora_request,
                tokenization_kwargs=tokenization_kwargs,
                timeout=timeout,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
            )
        )

    def score(
        self,
        /,
        data_1: ScoreInput | Sequence[ScoreInput],
        data_2: ScoreInput | Sequence[ScoreInput],
        use_tqdm: ProgressBar = False,
        *,
        pooling_params: PoolingParams | None = None,
        lora_request: object = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well pairs of texts fit, from a server of a scoring model.

        Args:
            data_1: one for all of `data_2`, or one for each: a text, or `{"content": [parts of a message]}`.
            data_2: one, or a list of them.
            chat_template: must be None: it is an option of the server.
            use_tqdm: as for `embed`, and so are all other arguments.

        Raises `BadRequestError` for lists of different lengths, and what `chat` raises.
        """
        return portal.run(
            lambda: self.async_client.score(
                data_1,
                data_2,
                use_tqdm,
                pooling_params=pooling_params,
                lora_request=lora_request,
                tokenization_kwargs=tokenization_kwargs,
                chat_template=chat_template,
                timeout=timeout,
                return_exceptions=return_exceptions,
                extra_body=extra_body,
            )
        )
