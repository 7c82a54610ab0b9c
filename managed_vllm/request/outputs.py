"""What a request returns, in the shape of `vllm.RequestOutput`: exact token ids, as the server sampled them.

Names and types are vLLM's (0.32), so that code written for `vllm.LLM` keeps working. What the OpenAI-compatible routes
don't return is None, and the docstrings say so.

The ids of logprobs' candidates are exact: they are requested as `token_id:123` (`return_tokens_as_token_ids`). The
routes then don't return the candidates' texts: `decoded_token` is None, but for the sampled token in a chat. With
`logprobs=0` there is only the sampled token, whose id is known anyway, and its text is returned. `prompt_logprobs` are
complete.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import msgspec

from managed_vllm.request.arrays import without_numpy
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.responses import (
    Choice,
    GenerationResponse,
    Logprobs,
    ParsedResponse,
    TokenLogprob,
    WeightVersionSpan,
    is_cut,
    parse_dict,
)

_ID = "token_id:"
_SHOWN = 60


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """One candidate at one position. `rank` is 1 for the likeliest.

    The routes don't return the ranks of generated tokens; they follow from the order of the candidates. So `rank` is
    None for a sampled token that is not among the likeliest requested, and for `logprob_token_ids`. Of equally likely
    candidates, the sampled one counts as the first.
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
        cumulative_logprob: the sum of the sampled tokens' logprobs; None if logprobs were not requested.
        logprobs: one dict per token, `{token id: Logprob}`: the sampled token, then the candidates, likeliest first.
        finish_reason: "stop", "length", "tool_calls", "repetition" … "length" also where tool calls were parsed from an
            answer that has all the tokens it was allowed: the server says "tool_calls" then (`raw` has that).
        stop_reason: the stop string or token id that was hit; None for the end-of-sequence token.
        reasoning: what the server's reasoning parser took out of the text, in a chat.
        tool_calls: what the server's tool parser took out of it, as dicts of OpenAI's shape.
        routed_experts: as the server returns it: base64 of a `.npy` file.
        weight_versions: which weights sampled which of the tokens: spans without a gap. A stream has them with its last
            part, over all tokens. None where the server does not tell of each token.
        sampling_mask: for each token, the ids that could have been sampled, from a server that returns that and by
            `/inference/v1/generate` only.
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
    weight_versions: list[WeightVersionSpan] | None = None
    sampling_mask: list[list[int]] | None = None

    # The routes don't return these.
    lora_request: ClassVar[None] = None
    spec_decode_metrics: ClassVar[None] = None

    @property
    def weight_version(self) -> str | None:
        """Of the weights that sampled the last token: the only one, but for an answer that spans an update."""
        return self.weight_versions[-1].version if self.weight_versions else None

    def finished(self) -> bool:
        """Whether there is a finish_reason, as in vLLM."""
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
        prompt_logprobs: one dict per token of the prompt, None for the first; None if not requested.
        outputs: the `n` answers.
        finished: True, but for the parts of a stream before the last.
        metrics: the server's own times (`time_to_first_token_ms` …), if it was started with
            `--enable-per-request-metrics`; not for streamed (resumable) generations.
        num_cached_tokens: tokens of the prompt that were in the prefix cache, if the server was started with
            `--enable-prompt-tokens-details`; not for streamed generations.
        kv_transfer_params, ec_transfer_params: from a server that transfers caches.
        model: the name under which the server has the model.
        epoch: the server's epoch in which the answer ended.
        attempts: how often the request was sent.
        latency: seconds from `started_at`, waiting for the server included.
        started_at: Unix time at which the request was admitted to those in flight (`max_in_flight`).
        time_to_first_token: seconds of `latency` until the first token; None if the answer was not streamed.
        resumed_tokens: tokens that came before a loss, and were not generated again.
        prompt_token_id_logprobs: those of `prompt_logprob_token_ids`, as the server returns them: base64 of `.npy`.
        raw: the response as it came; ignored by comparisons and `to_dict`.
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
    prompt_token_id_logprobs: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    # The routes don't return these.
    lora_request: ClassVar[None] = None
    encoder_prompt: ClassVar[None] = None
    encoder_prompt_token_ids: ClassVar[None] = None
    num_cache_creation_tokens: ClassVar[None] = None

    @property
    def weight_version(self) -> str | None:
        """That of the first answer; each one's own are its `weight_versions`."""
        return self.outputs[0].weight_version if self.outputs else None

    def __hash__(self) -> int:
        """By the id: vLLM's can be members of sets and keys of dicts, too."""
        return hash(self.request_id)

    @classmethod
    def from_response(
        cls,
        response: ParsedResponse | Mapping[str, Any],
        body: Mapping[str, Any],
        stats: RequestStats | None = None,
        *,
        chat: bool,
        logprobs: int | None = None,
        before: int = 0,
    ) -> RequestOutput:
        """From the response to a request.

        Args:
            response: whole, or a part of a stream.
            body: of the request.
            stats: how it was served; None for a part of a stream before the last.
            chat: which route it is of.
            logprobs: how many candidates the caller wants (-1: all), if the body requests more.
            before: attempts that `stats` does not count.
        """
        if logprobs is None:
            logprobs = (body.get("top_logprobs") or 0) if chat else body.get("logprobs")
        ranked = not body.get("logprob_token_ids")
        parsed = response if isinstance(response, ParsedResponse) else parse_dict(response)
        found = parsed.response
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
            outputs=[
                _completion(_told_if_cut(choice, found, body), logprobs or 0, chat=chat, ranked=ranked)
                for choice in choices
            ],
            prompt_logprobs=prompt_logprobs_of(found.prompt_logprobs or first.prompt_logprobs),
            metrics=found.metrics,
            num_cached_tokens=None if details is None else details.cached_tokens,
            kv_transfer_params=found.kv_transfer_params,
            ec_transfer_params=found.ec_transfer_params,
            raw=parsed.raw,
            finished=stats is not None or first.finish_reason is not None,
            **(served(stats, before) if stats is not None else {"model": found.model or ""}),
        )

    def to_dict(self) -> dict[str, Any]:
        """All but `raw`, as dicts, lists and plain values. `json` can write it, and `from_dict` reads both forms.

        (In JSON the token ids that are keys of logprobs become texts.)
        """
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "raw"}
        found["outputs"] = [_plain_completion(output) for output in self.outputs]
        found["prompt_logprobs"] = _plain_logprobs(self.prompt_logprobs)
        return found

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> RequestOutput:
        """The inverse of `to_dict`. Raises `ValueError` for anything else."""
        try:
            found = dict(given)
            found["outputs"] = [
                CompletionOutput(
                    **{
                        **output,
                        "logprobs": prompt_logprobs_of(output.get("logprobs")),
                        "weight_versions": _spans(output.get("weight_versions")),
                    }
                )
                for output in found["outputs"]
            ]
            found["prompt_logprobs"] = prompt_logprobs_of(found.get("prompt_logprobs"))
            return cls(**found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the dict of a RequestOutput: {error}") from error

    def __repr__(self) -> str:
        prompt = "" if self.prompt is None else f"prompt={_short(self.prompt)}, "
        return (
            f"RequestOutput(request_id={self.request_id!r}, {prompt}{len(self.prompt_token_ids)} prompt tokens, "
            f"outputs={self.outputs!r})"
        )


def served(stats: RequestStats, before: int) -> dict[str, Any]:
    """What an output has of how it was served; `before` are attempts that `stats` does not count."""
    return {
        "model": stats.model,
        "epoch": stats.epoch,
        "attempts": stats.attempts + before,
        "latency": stats.latency,
        "started_at": stats.started_at,
        "time_to_first_token": stats.time_to_first_token,
        "resumed_tokens": stats.resumed_tokens,
    }


def without_texts(output: RequestOutput) -> RequestOutput:
    """As with `detokenize=False`: no text of the answers, nor of candidates."""
    return replace(
        output,
        prompt_logprobs=output.prompt_logprobs
        and [place and _without_texts(place) for place in output.prompt_logprobs],
        outputs=[
            replace(
                one,
                text="",
                logprobs=one.logprobs and [_without_texts(place) for place in one.logprobs],
            )
            for one in output.outputs
        ],
    )


def _without_texts(place: Mapping[int, Logprob]) -> dict[int, Logprob]:
    return {token: Logprob(one.logprob, one.rank) for token, one in place.items()}


@dataclass(frozen=True, repr=False)
class EmbeddingOutput:
    """`embedding` is the vector, a list of floats of length `hidden_size`."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """The length of the vector."""
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(frozen=True, repr=False)
class ClassificationOutput:
    """`probs` has the probability of each class, `label` the name of the likeliest, if the model names them."""

    probs: list[float]
    label: str | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


@dataclass(frozen=True, repr=False, eq=False)
class PoolingOutput:
    """`data` is what the pooler made: floats, or a row of them for each token.

    A tensor, as with `vllm.LLM`, where the program has imported torch; else an array of numpy's; without numpy a list.
    """

    data: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PoolingOutput) and bool(without_numpy(self.data) == without_numpy(other.data))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PoolingOutput({len(self.data)} rows or values)"


@dataclass(frozen=True)
class ScoringOutput:
    """`score` says how well two texts fit: a cross-encoder's score, or the cosine of embeddings."""

    score: float


@dataclass(frozen=True)
class _PoolingRequestOutput:
    """`usage` has the number of the prompt's tokens; the rest is as in `RequestOutput`."""

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

    # The routes don't return it.
    weight_version: ClassVar[None] = None

    def __hash__(self) -> int:
        return hash(self.request_id)

    @classmethod
    def of(cls, response: Mapping[str, Any], outputs: Any, stats: RequestStats) -> Self:
        """From a route's response."""
        return cls(
            request_id=str(response.get("id") or uuid.uuid4()),
            outputs=outputs,
            model=stats.model,
            epoch=stats.epoch,
            attempts=stats.attempts,
            latency=stats.latency,
            started_at=stats.started_at,
            usage=dict(response.get("usage") or {}),
        )


@dataclass(frozen=True, eq=False)  # those of the base class: it is hashable
class PoolingRequestOutput(_PoolingRequestOutput):
    """What `encode` makes of one prompt. The route does not return `prompt_token_ids`."""

    outputs: PoolingOutput


@dataclass(frozen=True, eq=False)  # those of the base class: it is hashable
class ClassificationRequestOutput(_PoolingRequestOutput):
    """The classes of one prompt. The route does not return `prompt_token_ids`."""

    outputs: ClassificationOutput


@dataclass(frozen=True, eq=False)  # those of the base class: it is hashable
class EmbeddingRequestOutput(_PoolingRequestOutput):
    """The embedding of one prompt. The route does not return `prompt_token_ids`."""

    outputs: EmbeddingOutput


@dataclass(frozen=True, eq=False)  # those of the base class: it is hashable
class ScoringRequestOutput(_PoolingRequestOutput):
    """The score of one pair. The route does not return `prompt_token_ids`."""

    outputs: ScoringOutput


def _short(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}…"


# -- from a response --------------------------------------------------------------------------------------------------


def _index(choice: Choice) -> int:
    return choice.index


def _told_if_cut(choice: Choice, response: GenerationResponse, body: Mapping[str, Any]) -> Choice:
    count = None if choice.token_ids is None else len(choice.token_ids)
    if count is None and len(response.choices) == 1 and response.usage is not None:
        count = response.usage.completion_tokens
    if not is_cut(choice.finish_reason, choice.stop_reason, count, body):
        return choice
    return msgspec.structs.replace(choice, finish_reason="length")


def _completion(choice: Choice, wanted: int, *, chat: bool, ranked: bool) -> CompletionOutput:
    token_ids = choice.token_ids or []
    given = choice.logprobs
    logprobs, cumulative = (
        _positions(given, token_ids, wanted, chat=chat, ranked=ranked) if given is not None else (None, None)
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
        weight_versions=choice.weight_versions,
    )


_Candidates = Iterable[tuple[str, float | None]]


def _positions(
    given: Logprobs, token_ids: list[int], wanted: int, *, chat: bool, ranked: bool
) -> tuple[list[dict[int, Logprob]] | None, float | None]:
    """The dicts of all positions, and the sum of the sampled tokens' logprobs."""
    entries: Iterable[tuple[float, str | None, _Candidates]]
    last = len(token_ids)  # with echo=True the logprobs of the prompt come first
    if chat:
        content = given.content or []
        if len(content) > last > 0:
            content = content[-last:]
        values = [entry.logprob for entry in content]
        if len(values) == last and wanted > 0 and ranked:
            quick = _chat_positions(content, token_ids, wanted)
            if quick is not None:
                return quick, sum(values, 0.0)
        entries = map(_of_chat, content)
    else:
        tokens, numbers = given.tokens or [], given.token_logprobs or []
        tops: Sequence[Mapping[str, float | None] | None] = given.top_logprobs or [None] * len(tokens)
        if len(tokens) > last > 0:
            numbers, tokens, tops = numbers[-last:], tokens[-last:], tops[-last:]
        values = [0.0 if value is None else value for value in numbers]
        entries = map(_of_completion, values, tokens, tops)
    if len(values) != last:
        return None, sum(values, 0.0)
    positions = [
        _position(token, value, text, candidates, wanted, chat, ranked)
        for token, (value, text, candidates) in zip(token_ids, entries, strict=True)
    ]
    return positions, sum(values, 0.0)


def _of_chat(entry: TokenLogprob) -> tuple[float, str | None, _Candidates]:
    text: str | None = entry.token
    if entry.token.startswith(_ID):  # the bytes are of the text, not of the id
        text = None if entry.bytes is None else bytes(entry.bytes).decode("utf-8", errors="replace")
    return entry.logprob, text, [(one.token, one.logprob) for one in entry.top_logprobs or ()]


def _of_completion(
    value: float, token: str, top: Mapping[str, float | None] | None
) -> tuple[float, str | None, _Candidates]:
    return value, None if token.startswith(_ID) else token, top.items() if top else ()


def _chat_positions(content: list[TokenLogprob], token_ids: list[int], wanted: int) -> list[dict[int, Logprob]] | None:
    """As `_position` for each, inlined: most of a client's time is spent here. None: not the usual case."""
    positions = []
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
        positions.append(found)
    return positions


def _position(
    token: int, value: float, text: str | None, candidates: _Candidates, wanted: int, chat: bool, ranked: bool
) -> dict[int, Logprob]:
    """The dict of one position, as vLLM has it: the sampled token first, then the `wanted` likeliest (-1: all).

    The candidates come in the order of their ranks, but for the sampled one, which is the first. A completion has
    `wanted` of them, and the sampled one if that is another; a chat has as many as were requested, that one included.
    """
    if not wanted and ranked:
        return {token: Logprob(value, None, text)}
    sampled = Logprob(value, None, text)
    found = {token: sampled}
    likelier = others = 0
    for name, its in candidates:
        if name[:9] != _ID or its is None:
            return {token: sampled}  # the server returns no ids
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


def prompt_logprobs_of(given: Any) -> list[dict[int, Logprob] | None] | None:
    """From JSON's dicts, whose keys may be texts."""
    return msgspec.convert(given, list[dict[int, Logprob] | None] | None, str_keys=True)


def _spans(given: Any) -> list[WeightVersionSpan] | None:
    return msgspec.convert(given, list[WeightVersionSpan] | None)


def _plain_logprobs(logprobs: Iterable[Mapping[int, Logprob] | None] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    return [
        None
        if position is None
        else {
            token: {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in position.items()
        }
        for position in logprobs
    ]


def _plain_completion(output: CompletionOutput) -> dict[str, Any]:
    found = {one.name: getattr(output, one.name) for one in fields(output)}
    found["weight_versions"] = msgspec.to_builtins(output.weight_versions)
    return {**found, "token_ids": list(output.token_ids), "logprobs": _plain_logprobs(output.logprobs)}
