"""The asynchronous methods for pooling models: `embed`, `encode`, `classify`, `reward`, `score`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from managed_vllm.errors import BadRequestError, ModelNotFoundError, UnsupportedParameterError
from managed_vllm.request.arguments import PoolingParams, ProgressBar, Prompt, ScoreInput
from managed_vllm.request.arrays import as_array
from managed_vllm.request.async_requests import AsyncRequests, deadline_of
from managed_vllm.request.attempts import Loss
from managed_vllm.request.groups import Groups, size_for
from managed_vllm.request.http_errors import checked_shape
from managed_vllm.request.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from managed_vllm.request.pending import JSONRequest, RequestStats
from managed_vllm.request.pooling_groups import Pooled, Pooling, pooled
from managed_vllm.request.pooling_params import pooling_fields
from managed_vllm.request.prompts import as_prompts, as_score_inputs, prompt_fields, score_input

T = TypeVar("T")
Read = Callable[[Mapping[str, Any], RequestStats], T]


class AsyncPoolingMethods(AsyncRequests):
    """Requests to the server of a pooling model. `PoolingMethods` documents each in full."""

    async def embed(
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
        """The embedding of each prompt. See `PoolingMethods.embed`."""
        fields = pooling_fields(pooling_params, lora_request, tokenization_kwargs)
        fields.pop("task", None)

        def read(answer: Mapping[str, Any], stats: RequestStats) -> EmbeddingRequestOutput:
            vector = [float(value) for value in answer["data"][0]["embedding"]]
            return EmbeddingRequestOutput.of(answer, EmbeddingOutput(vector), stats)

        body = {"encoding_format": "float", **fields, **(extra_body or {})}
        return await self._pooled("embed", "/v1/embeddings", prompts, body, read, timeout, return_exceptions, use_tqdm)

    async def encode(
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
        """What the model's pooler makes of each prompt. See `PoolingMethods.encode`."""
        fields = pooling_fields(pooling_params, lora_request, tokenization_kwargs)
        if pooling_task is not None:
            fields["task"] = pooling_task

        def read(answer: Mapping[str, Any], stats: RequestStats) -> PoolingRequestOutput:
            return PoolingRequestOutput.of(answer, PoolingOutput(as_array(answer["data"][0]["data"])), stats)

        body = {"encoding_format": "float", **fields, **(extra_body or {})}
        return await self._pooled("encode", "/pooling", prompts, body, read, timeout, return_exceptions, use_tqdm)

    async def classify(
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
        """The probabilities of each prompt's classes. See `PoolingMethods.classify`."""
        fields = pooling_fields(pooling_params, lora_request, tokenization_kwargs)
        fields.pop("task", None)

        def read(answer: Mapping[str, Any], stats: RequestStats) -> ClassificationRequestOutput:
            found = answer["data"][0]
            probs = [float(value) for value in found["probs"]]
            return ClassificationRequestOutput.of(answer, ClassificationOutput(probs, found.get("label")), stats)

        body = {**fields, **(extra_body or {})}
        return await self._pooled("classify", "/classify", prompts, body, read, timeout, return_exceptions, use_tqdm)

    async def reward(
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
        """The rewards of each prompt's tokens. See `PoolingMethods.reward`."""
        return await self.encode(
            prompts,
            pooling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            pooling_task="token_classify",
            tokenization_kwargs=tokenization_kwargs,
            timeout=timeout,
            return_exceptions=return_exceptions,
            extra_body=extra_body,
        )

    async def score(
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
        """How well pairs of texts fit. See `PoolingMethods.score`."""
        if chat_template is not None:
            raise UnsupportedParameterError(
                "the score route takes no chat_template=; give it to the server", field="chat_template"
            )
        fields = pooling_fields(pooling_params, lora_request, tokenization_kwargs)
        fields.pop("task", None)
        first, one_first = as_score_inputs(data_1, "data_1")
        second, one_second = as_score_inputs(data_2, "data_2")
        if len(first) == 1:
            first = [*first] * len(second)
        if len(first) != len(second):
            raise BadRequestError(f"{len(first)} texts can't be paired with {len(second)}", field="data_1")
        deadline = deadline_of(timeout)
        groups = self._grouped("/score", len(second), first[:1], deadline)

        async def one(index: int) -> ScoringRequestOutput:
            pair = {
                "text_1": await score_input(first[index], "data_1"),
                "text_2": await score_input(second[index], "data_2"),
            }
            answer, stats = await self._asked("score", "/score", {**pair, **fields, **(extra_body or {})}, groups)
            with checked_shape(answer):
                return ScoringRequestOutput.of(answer, ScoringOutput(float(answer["data"][0]["score"])), stats)

        return await self._batch(
            one, len(second), one_first and one_second, return_exceptions, use_tqdm, deadline=deadline
        )

    async def _pooled(
        self,
        method: str,
        path: str,
        prompts: Prompt | Iterable[Prompt],
        fields: dict[str, Any],
        read: Read[T],
        timeout_s: float | None,
        return_exceptions: bool,
        use_tqdm: ProgressBar,
    ) -> list[T]:
        """One request for each prompt, whose response `read` makes into the output."""
        each, single = as_prompts(prompts)
        deadline = deadline_of(timeout_s)
        groups = self._grouped(path, len(each), each[:1], deadline)

        async def one(index: int) -> T:
            asked, images = prompt_fields(each[index])
            if images is not None:
                raise UnsupportedParameterError(f"{method}() takes texts and token ids", field="multi_modal_data")
            answer, stats = await self._asked(method, path, {"input": asked["prompt"], **fields}, groups)
            with checked_shape(answer):
                return read(answer, stats)

        return await self._batch(one, len(each), single, return_exceptions, use_tqdm, deadline=deadline)

    def _grouped(self, path: str, count: int, first: Sequence[Any], deadline: float | None) -> Groups:
        """The groups of a call, which has so many prompts of the kind of the `first`."""
        size = size_for(count, self.sender.max_in_flight)
        texts = bool(first) and isinstance(first[0], str)
        return Groups(self.sender, Pooling(path, texts=texts), size, deadline, None)

    async def _asked(
        self, method: str, path: str, body: dict[str, Any], groups: Groups
    ) -> tuple[Mapping[str, Any], RequestStats]:
        """The answer to one request; a server without the route has a model for another task."""

        async def alone(lost: Loss | None, on_loss: Callable[[], None] | None) -> tuple[Pooled, RequestStats]:
            request = JSONRequest(path, body, "data")
            stats = await self.sender.send(request, groups.deadline, lost=lost, on_loss=on_loss)
            return pooled(request), stats

        try:
            response, stats = await groups.answer(body, alone)
            return response.answer, stats
        except ModelNotFoundError:
            raise
        except BadRequestError as error:
            if error.status != 404:
                raise
            message = (
                f'the server has no {path}: {method}() needs one started for it (runner="pooling"); {error.message}'
            )
            raise BadRequestError(message, status=404) from error
