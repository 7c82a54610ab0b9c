"""What comes back from a request, in the shape of `vllm.RequestOutput`: exact token ids, as the server sampled them.

Names and types are vLLM's (0.32), so that code written for `vllm.LLM` goes on working. What the OpenAI-compatible
routes don't tell is None, and the docstrings say so.

The ids of logprobs' candidates are exact: they are asked for as `token_id:123` (`return_tokens_as_token_ids`). Then the
routes don't tell the candidates' texts: `decoded_token` is None, but for the sampled token in a chat. With `logprobs=0`
there is only the sampled token, whose id is known anyway, and its text is told. `prompt_logprobs` have all of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import msgspec

from managed_vllm.request.responses import Choice, Decoded, Logprobs, TokenLogprob, converted

if TYPE_CHECKING:
    from managed_vllm.request.attempts import Told

_ID = "token_id:"
_SHOWN = 60


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """One candidate at one place. `rank` is 1 for the likeliest.

    The routes don't tell ranks of generated tokens; they come from the order of the candidates. So `rank` is None for a
    sampled token that is not among the likeliest asked for, and for `logprob_token_ids`. Of equally likely ones the
    sampled one counts as first.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


_UNKNOWN = Logprob(0.0)


@dataclass(frozen=True, repr=False)
class CompletionOutput:
    """One of the `n` answers.

    Attributes:
        index: its number among them.
        text: its text.
        token_ids: its token ids, as sampled.
        cumulative_logprob: sum of the sampled tokens' logprobs; None if logprobs were not asked for.
        logprobs: one dict per token, `{token id: Logprob}`, the sampled token first, then the candidates, likeliest
            first.
        finish_reason: "stop", "length", "tool_calls", "repetition" …
        stop_reason: the stop string or token id that was hit; None for the end-of-sequence token.
        reasoning: what a reasoning parser of the server took out of the text, in a chat.
        tool_calls: what a tool parser took out of it, as dicts of OpenAI's shape.
        routed_experts: as the server has it: base64 of a `.npy` file.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    routed_experts: str | None = None

    # The routes don't tell these.
    lora_request: ClassVar[None] = None
    sampling_mask: ClassVar[None] = None
    spec_decode_metrics: ClassVar[None] = None
    weight_versions: ClassVar[None] = None

    def finished(self) -> bool:
        """As in vLLM: whether there is a finish_reason."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={_short(self.text)}, {len(self.token_ids)} tokens, "
            f"finish_reason={self.finish_reason!r})"
        )


@dataclass(frozen=True, repr=False)
class RequestOutput:
    """The answer to one request.

    Attributes:
        request_id: the server's id of the request.
        prompt: the prompt, if it was text; of a chat only with `return_prompt_text=True`.
        prompt_token_ids: its token ids, as the server made them.
        prompt_logprobs: one dict per token of the prompt, None for the first; None if not asked for.
        outputs: the `n` answers.
        finished: True, but for the parts of a stream that are not the last.
        metrics: the server's own times (`time_to_first_token_ms` …), where it is started with
            `--enable-per-request-metrics`; not for streamed (resumable) generations.
        num_cached_tokens: tokens of the prompt found in the prefix cache, where the server is started with
            `--enable-prompt-tokens-details`; not for streamed generations.
        kv_transfer_params, ec_transfer_params: where the server transfers.
        model: the name that was asked.
        epoch: the life of the server that ended the answer.
        attempts: number of sendings.
        latency: seconds, waiting for the server included, but not the waiting for a place among those in flight.
        started_at: Unix time at which that began.
        time_to_first_token: seconds of it until the first token; None where the answer was not streamed.
        resumed_tokens: tokens that came from lives or connections before, and were not generated again.
        raw: the answer as it came; no part of comparisons and of `to_dict`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    metrics: dict[str, Any] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    model: str = ""
    epoch: int = 0
    attempts: int = 1
    latency: float = 0.0
    started_at: float = 0.0
    time_to_first_token: float | None = None
    resumed_tokens: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    # The routes don't tell these.
    lora_request: ClassVar[None] = None
    encoder_prompt: ClassVar[None] = None
    encoder_prompt_token_ids: ClassVar[None] = None
    num_cache_creation_tokens: ClassVar[None] = None
    prompt_token_id_logprobs: ClassVar[None] = None

    @classmethod
    def from_answer(
        cls,
        answer: Decoded | Mapping[str, Any],
        body: Mapping[str, Any],
        told: Told | None = None,
        *,
        chat: bool,
        logprobs: int | None = None,
        before: int = 0,
    ) -> RequestOutput:
        """From a route's answer to the request `body`: whole, or a part of it that is not the last (`told` is None).

        `logprobs` is the number of candidates that the caller wants (-1: all), where the body asks for more. `before`
        are attempts that `told` does not know of.
        """
        if logprobs is None:
            logprobs = (body.get("top_logprobs") or 0) if chat else body.get("logprobs")
        ranked = not body.get("logprob_token_ids")
        whole = answer if isinstance(answer, Decoded) else converted(answer)
        found = whole.answer
        choices = found.choices
        if len(choices) > 1:
            choices = sorted(choices, key=_index)
        first = choices[0]
        prompt = body.get("prompt") if not chat else found.prompt_text
        details = None if found.usage is None else found.usage.prompt_tokens_details
        return cls(
            request_id=str(found.id or uuid.uuid4()),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=found.prompt_token_ids or first.prompt_token_ids or [],
            outputs=[_completion(choice, logprobs or 0, chat=chat, ranked=ranked) for choice in choices],
            prompt_logprobs=_prompt_logprobs(found.prompt_logprobs or first.prompt_logprobs),
            metrics=found.metrics,
            num_cached_tokens=None if details is None else details.cached_tokens,
            kv_transfer_params=found.kv_transfer_params,
            ec_transfer_params=found.ec_transfer_params,
            raw=whole.raw,
            finished=told is not None or first.finish_reason is not None,
            model=found.model or "" if told is None else told.model,
            epoch=0 if told is None else told.epoch,
            attempts=1 if told is None else told.attempts + before,
            latency=0.0 if told is None else told.latency,
            started_at=0.0 if told is None else told.started_at,
            time_to_first_token=None if told is None else told.time_to_first_token,
            resumed_tokens=0 if told is None else told.resumed_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it but `raw` in dicts, lists and plain values; `json` can write it, and `from_dict` reads both.

        (JSON makes texts of the token ids that are keys of logprobs.)
        """
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "raw"}
        found["outputs"] = [_plain_completion(output) for output in self.outputs]
        found["prompt_logprobs"] = _plain_logprobs(self.prompt_logprobs)
        return found

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> RequestOutput:
        """What `to_dict` has made. Raises `ValueError` for what is something else."""
        try:
            found = dict(given)
            found["outputs"] = [
                CompletionOutput(**{**output, "logprobs": _prompt_logprobs(output.get("logprobs"))})
                for output in found["outputs"]
            ]
            found["prompt_logprobs"] = _prompt_logprobs(found.get("prompt_logprobs"))
            return cls(**found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the dict of a RequestOutput: {error}") from error

    def __repr__(self) -> str:
        prompt = "" if self.prompt is None else f"prompt={_short(self.prompt)}, "
        return (
            f"RequestOutput(request_id={self.request_id!r}, {prompt}{len(self.prompt_token_ids)} prompt tokens, "
            f"outputs={self.outputs!r})"
        )


@dataclass(frozen=True, repr=False)
class EmbeddingOutput:
    """`embedding` is the vector, a list of floats of length `hidden_size`."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Length of the vector."""
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(frozen=True)
class ScoringOutput:
    """`score` says how well two texts fit: of a cross-encoder, or the cosine of embeddings."""

    score: float


@dataclass(frozen=True)
class _PoolingRequestOutput:
    """`usage` has the number of the prompt's tokens; the rest as in `RequestOutput`."""

    request_id: str
    outputs: Any
    prompt_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int | None = None
    finished: bool = True
    model: str = ""
    epoch: int = 0
    attempts: int = 1
    latency: float = 0.0
    started_at: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Mapping[str, Any], outputs: Any, told: Told) -> Self:
        """From a route's whole answer."""
        return cls(
            request_id=str(answer.get("id") or uuid.uuid4()),
            outputs=outputs,
            model=told.model,
            epoch=told.epoch,
            attempts=told.attempts,
            latency=told.latency,
            started_at=told.started_at,
            usage=dict(answer.get("usage") or {}),
        )


@dataclass(frozen=True)
class EmbeddingRequestOutput(_PoolingRequestOutput):
    """The embedding of one prompt. The route does not tell `prompt_token_ids`."""

    outputs: EmbeddingOutput


@dataclass(frozen=True)
class ScoringRequestOutput(_PoolingRequestOutput):
    """The score of one pair. The route does not tell `prompt_token_ids`."""

    outputs: ScoringOutput


def _short(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}…"


# -- from an answer ----------------------------------------------------------------------------------------------------


def _index(choice: Choice) -> int:
    return choice.index


def _completion(choice: Choice, wanted: int, *, chat: bool, ranked: bool) -> CompletionOutput:
    token_ids = choice.token_ids or []
    told = choice.logprobs
    logprobs, cumulative = (
        _places(told, token_ids, wanted, chat=chat, ranked=ranked) if told is not None else (None, None)
    )
    message = choice.message
    text = choice.text if message is None else message.content
    return CompletionOutput(
        index=choice.index,
        text=text or "",
        token_ids=token_ids,
        cumulative_logprob=cumulative,
        logprobs=logprobs,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        reasoning=None if message is None else message.reasoning or message.reasoning_content,
        tool_calls=[] if message is None else message.tool_calls or [],
        routed_experts=choice.routed_experts,
    )


_Candidates = Iterable[tuple[str, float | None]]


def _places(
    told: Logprobs, token_ids: list[int], wanted: int, *, chat: bool, ranked: bool
) -> tuple[list[dict[int, Logprob]] | None, float | None]:
    """The dicts of all places, and the sum of the sampled tokens' logprobs."""
    entries: Iterable[tuple[float, str | None, _Candidates]]
    last = len(token_ids)  # echo=True: the logprobs of the prompt stand before
    if chat:
        content = told.content or []
        if len(content) > last > 0:
            content = content[-last:]
        values = [entry.logprob for entry in content]
        if len(values) == last and wanted > 0 and ranked:
            quick = _chat_places(content, token_ids, wanted)
            if quick is not None:
                return quick, sum(values, 0.0)
        entries = map(_of_chat, content)
    else:
        tokens, numbers = told.tokens or [], told.token_logprobs or []
        tops: Sequence[Mapping[str, float | None] | None] = told.top_logprobs or [None] * len(tokens)
        if len(tokens) > last > 0:
            numbers, tokens, tops = numbers[-last:], tokens[-last:], tops[-last:]
        values = [0.0 if value is None else value for value in numbers]
        entries = map(_of_completion, values, tokens, tops)
    if len(values) != last:
        return None, sum(values, 0.0)
    places = [
        _place(token, value, text, candidates, wanted, chat, ranked)
        for token, (value, text, candidates) in zip(token_ids, entries, strict=True)
    ]
    return places, sum(values, 0.0)


def _of_chat(entry: TokenLogprob) -> tuple[float, str | None, _Candidates]:
    text: str | None = entry.token
    if entry.token.startswith(_ID):  # the bytes are of the text, not of what stands for it
        text = None if entry.bytes is None else bytes(entry.bytes).decode("utf-8", errors="replace")
    return entry.logprob, text, [(one.token, one.logprob) for one in entry.top_logprobs or ()]


def _of_completion(
    value: float, token: str, top: Mapping[str, float | None] | None
) -> tuple[float, str | None, _Candidates]:
    return value, None if token.startswith(_ID) else token, top.items() if top else ()


def _chat_places(content: list[TokenLogprob], token_ids: list[int], wanted: int) -> list[dict[int, Logprob]] | None:
    """As `_place` for each, written out: this is where most of a client's time goes. None: not the usual case."""
    places = []
    for token, entry in zip(token_ids, content, strict=True):
        spelt = entry.bytes
        if entry.token[:9] != _ID or entry.top_logprobs is None:
            return None
        value = entry.logprob
        found: dict[int, Logprob] = {token: _UNKNOWN}
        likelier = others = 0
        for one in entry.top_logprobs:
            number = int(one.token[9:])
            if number == token:
                continue
            others += 1
            its = one.logprob
            if its > value:
                likelier = rank = others
            else:
                rank = others + 1
            if rank <= wanted:
                found[number] = Logprob(its, rank)
        text = None if spelt is None else bytes(spelt).decode("utf-8", "replace")
        found[token] = Logprob(value, likelier + 1 if likelier < others else None, text)
        places.append(found)
    return places


def _place(
    token: int, value: float, text: str | None, candidates: _Candidates, wanted: int, chat: bool, ranked: bool
) -> dict[int, Logprob]:
    """The dict of one place, as vLLM has it: the sampled token first, then the `wanted` likeliest (-1: all).

    The candidates come in the order of their ranks, but for the sampled one, which is the first. A completion has
    `wanted` of them and the sampled one, if that is another; a chat has as many as were asked for, that one included.
    """
    if not wanted and ranked:
        return {token: Logprob(value, None, text)}
    sampled = Logprob(value, None, text)
    found = {token: sampled}
    likelier = others = 0
    for name, its in candidates:
        if name[:9] != _ID or its is None:
            return {token: sampled}  # the server names no ids
        number = int(name[9:])
        if number == token:
            continue
        others += 1
        if its > value:
            likelier = others
            rank = others
        else:
            rank = others + 1
        if not ranked:
            found[number] = Logprob(its)
        elif wanted < 0 or rank <= wanted:
            found[number] = Logprob(its, rank)
    if ranked and (wanted < 0 or (likelier < others if chat else others < wanted)):
        found[token] = Logprob(value, likelier + 1, text)
    return found


def _prompt_logprobs(told: Any) -> list[dict[int, Logprob] | None] | None:
    """From dicts of JSON, whose keys may be texts."""
    return msgspec.convert(told, list[dict[int, Logprob] | None] | None, str_keys=True)


def _plain_logprobs(logprobs: Iterable[Mapping[int, Logprob] | None] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    return [
        None
        if place is None
        else {
            token: {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in place.items()
        }
        for place in logprobs
    ]


def _plain_completion(output: CompletionOutput) -> dict[str, Any]:
    found = {one.name: getattr(output, one.name) for one in fields(output)}
    return {**found, "token_ids": list(output.token_ids), "logprobs": _plain_logprobs(output.logprobs)}
