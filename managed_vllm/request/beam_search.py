"""Beam search: its parameters, the request for one prompt, and the beams of the response, in the shape of vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.responses import parse_dict


@dataclass(frozen=True)
class BeamSearchParams:
    """As `vllm.sampling_params.BeamSearchParams`.

    Args:
        beam_width: beams per prompt, at least 1.
        max_tokens: the most tokens of a beam.
        ignore_eos: continue after the end-of-sequence token.
        temperature: of the logprobs by which beams are compared.
        length_penalty: the exponent of the length by which a beam's logprob is divided when beams are ranked.
        include_stop_str_in_output: whether the text has the end-of-sequence token.
        skip_special_tokens: whether the text is without special tokens.
        watermarking: whether the engine's watermark is applied, if it has one.

    Raises `BadRequestError` for a width or length below 1.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    watermarking: bool | None = None

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadRequestError(f"{name} must be an integer of at least 1, not {value!r:.80}", field=name)

    @classmethod
    def of(cls, params: Any) -> BeamSearchParams:
        """From ours, a dict, or vLLM's. Raises `UnsupportedParameterError` for what can't be passed on."""
        if isinstance(params, cls):
            return params
        if hasattr(params, "__struct_fields__"):
            params = {name: getattr(params, name) for name in params.__struct_fields__}
        if not isinstance(params, Mapping):
            kind = type(params).__name__
            raise BadRequestError(f"params must be a BeamSearchParams or a dict, not {kind}", field="params")
        given = {name: value for name, value in params.items() if value is not None}
        known = {one.name for one in fields(cls)}
        for name in given.keys() - known:
            raise UnsupportedParameterError(
                f"{name} can't be passed on: the route's beam search has no such", field=name
            )
        for name in {"beam_width", "max_tokens"} - given.keys():
            raise BadRequestError(f"beam_search() needs {name}", field=name)
        return cls(**given)

    def to_request(self) -> dict[str, Any]:
        """The fields of `/v1/completions`. With logprobs: their sum is the beam's."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}
        return {
            **found,
            "n": found.pop("beam_width"),
            "use_beam_search": True,
            # Else the last token of a beam that has ended is missing.
            "include_stop_str_in_output": True,
            "logprobs": 1,
            "return_token_ids": True,
        }


@dataclass(frozen=True)
class BeamSearchSequence:
    """One beam.

    Attributes:
        tokens: the prompt's token ids and those of the answer, with that which ended it.
        cum_logprob: the sum of the answer's logprobs.
        text: the prompt's text and the answer's; the answer's alone for a prompt of token ids.
        finish_reason, stop_reason: as of a `CompletionOutput`.
    """

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    # The route does not return these.
    logprobs: ClassVar[None] = None
    lora_request: ClassVar[None] = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]

    @classmethod
    def of(cls, response: Mapping[str, Any], prompt: str | Sequence[int]) -> BeamSearchOutput:
        """From the route's response. Raises what `responses.MALFORMED` lists."""
        choices = sorted(parse_dict(response).response.choices, key=lambda choice: choice.index)
        ids = choices[0].prompt_token_ids or []
        before = prompt if isinstance(prompt, str) else ""
        return cls(
            [
                BeamSearchSequence(
                    tokens=[*ids, *(choice.token_ids or ())],
                    cum_logprob=sum(one or 0.0 for one in (choice.logprobs and choice.logprobs.token_logprobs) or ()),
                    text=before + (choice.text or ""),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for choice in choices
            ]
        )
