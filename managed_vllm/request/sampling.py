"""Sampling parameters with vLLM's names and defaults, and the request fields that they become.

Mistakes fail where they are written, by vLLM's own rules (0.32): a wrong value raises `BadRequestError`, a name that
can't be passed on to a server `UnsupportedParameterError` with the reason, a misspelt one the same with the nearest
names. Both have the name as `field`. A `vllm.SamplingParams` or a dict is taken as well. vLLM silently ignores unknown
request fields (0.32, every endpoint); we don't.

What is left out has the default of `vllm.SamplingParams`, and is sent where the server would take something else, from
the model's generation_config. Only a request without sampling parameters has the server's own defaults, and 16
tokens, as in `vllm.LLM`.
"""

from __future__ import annotations

import copy
import functools
import json as json_module
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.arrays import without_numpy

REFUSED: Mapping[str, str] = {
    "flat_logprobs": "it is a container within vLLM's process; logprobs come as a list of dicts",
    "output_kind": "answers come back whole (FINAL_ONLY), as from vllm.LLM, which overwrites it too",
    "skip_clone": "it is internal to vLLM's process",
    "output_text_buffer_length": "vLLM computes it from stop and include_stop_str_in_output; it is no input",
    "best_of": "vLLM has it no more; ask for n answers and choose by cumulative_logprob",
    "guided_decoding": "it is called structured_outputs",
    "max_completion_tokens": "here it is called max_tokens; as a keyword of chat() it works too",
    "top_logprobs": "here it is called logprobs: the number of candidates",
    "use_beam_search": "beam search is no sampling; beam_search() does it",
}
"""Names that users of vLLM know, but that no request field has, with the reason.

In a `vllm.SamplingParams`, those that only concern vLLM's own process are ignored, and so is any that has its default.
"""

ONLY_BY_TOKENS: Mapping[str, str] = {
    "prompt_logprob_token_ids": "prompt_logprobs=-1 has every token's",
    "prompt_logprob_start": "",
    "skip_reading_prefix_cache": "a cache_salt= of its own has the same effect",
    "trace_decode_token_ids": "",
}
"""Sampling parameters that only `/inference/v1/generate` takes (`request.token_route`): what does instead in a chat."""

IN_PROCESS = frozenset({"output_kind", "skip_clone", "output_text_buffer_length"})
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "flat_logprobs": (False,),
    "skip_clone": (False,),
    "output_text_buffer_length": (0,),
    "use_beam_search": (False,),
    "best_of": (1,),
}
"""Values of refused names that ask for nothing. So does None, and any `output_kind`, which `vllm.LLM` overwrites."""
DEFAULT_MAX_TOKENS = 16
"""Of a request that says nothing of it, as in `vllm.LLM`."""
_INT64 = 2**63
_MAX_LOGPROBS = 20
"""vLLM's default of `--max-logprobs`."""
_MAX_LOGPROB_TOKEN_IDS = 128
_GREEDY_BELOW = 1e-5

_OF_THE_SERVER = (
    "vLLM does not read it in a request (0.32): start the server with "
    "structured_outputs_config={{'backend': {!r}, {!r}: True}}"
)
REFUSED_IN_STRUCTURED_OUTPUTS: Mapping[str, str] = {
    "disable_any_whitespace": _OF_THE_SERVER.format("xgrammar", "disable_any_whitespace"),
    "disable_additional_properties": _OF_THE_SERVER.format("guidance", "disable_additional_properties"),
    "whitespace_pattern": "vLLM does not read it (0.32): a regex or a grammar can say it",
}
"""Fields of vLLM's `StructuredOutputsParams` that have no effect there, with the reason."""

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an answer must have: exactly one of these. As `vllm.sampling_params.StructuredOutputsParams`.

    Args:
        json: a JSON schema: a dict, a text, or a pydantic model class.
        regex: a regular expression that the whole text matches.
        choice: texts, one of which is the answer.
        grammar: a context-free grammar in EBNF.
        json_object: True: any JSON object.
        structural_tag: a dict, or the same as JSON text.

    The other fields of vLLM's class are refused: the server decides them (`REFUSED_IN_STRUCTURED_OUTPUTS`).
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None

    def __new__(cls, **given: Any) -> StructuredOutputsParams:
        """Refuses misspelt names with the nearest ones."""
        known = [field.name for field in fields(cls)]
        _check_names(given, known, REFUSED_IN_STRUCTURED_OUTPUTS, "structured_outputs has no")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise _bad("structured_outputs", f"takes exactly one of {', '.join(_CONSTRAINTS)}; given: {found}")
        set_ = object.__setattr__
        set_(self, "json", _json_schema(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise _bad("structured_outputs", f"{name} must be a text that is not empty, not {value!r:.80}")
        if self.choice is not None:
            choice = _texts("structured_outputs", self.choice)
            set_(self, "choice", choice)
            if not choice:
                raise _bad("structured_outputs", "choice has no texts to choose from")
        if self.json_object not in (None, True):
            raise _bad("structured_outputs", "json_object is True, or left out")
        tag: Any = self.structural_tag
        if tag is not None:
            if isinstance(tag, Mapping):
                set_(self, "structural_tag", json_module.dumps(tag))
            elif not isinstance(tag, str) or not tag:
                raise _bad("structured_outputs", f"structural_tag must be a dict or JSON text, not {tag!r:.80}")

    @classmethod
    def of(cls, value: Any) -> StructuredOutputsParams:
        """From ours, a dict, a pydantic model class, or vLLM's `StructuredOutputsParams`."""
        if isinstance(value, cls):
            return value
        if isinstance(value, type) and hasattr(value, "model_json_schema"):
            return cls(json=value)
        if type(value).__name__ == "StructuredOutputsParams" and hasattr(value, "__dataclass_fields__"):
            value = {name: getattr(value, name) for name in value.__dataclass_fields__ if not name.startswith("_")}
        if not isinstance(value, Mapping):
            raise _bad(
                "structured_outputs",
                f"must be a dict such as {{'regex': …}}, a pydantic model class or a StructuredOutputsParams, not "
                f"{type(value).__name__}",
            )
        harmless = {name for name in REFUSED_IN_STRUCTURED_OUTPUTS if value.get(name) in (None, False)}
        return cls(**{name: one for name, one in value.items() if name not in harmless})

    def to_request(self) -> dict[str, Any]:
        """The request field's value."""
        request = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in request.items() if value is not None}


@dataclass(kw_only=True)
class SamplingParams:
    """How to sample. What is left out has the default of `vllm.SamplingParams`, not that of the model.

    The fields are those of `vllm.SamplingParams` (0.32) that a server can be asked for, and two for truncating the
    prompt; docs/parameters.md lists them, and says why others are refused. Values are kept in plain types: sequences
    become tuples, numpy's numbers become Python's. Fields may be assigned to, and are checked then, too; a call reads
    them when it begins.

    Args:
        n: answers per prompt; 1 if greedy.
        temperature: 0 (greedy) to 2.
        top_p: in (0, 1]. top_k: 0 or -1 for all. min_p: in [0, 1].
        presence_penalty, frequency_penalty: in [-2, 2]. repetition_penalty: above 0; 1 is none.
        watermarking: whether the engine's watermark is applied, if it has one.
        seed: 64 bits, signed.
        stop: a text, or texts, that end the answer (a server not of ours takes four, `VLLM_MAX_STOP_STRINGS`).
        stop_token_ids: token ids that end it. bad_words: texts that must not be generated.
        ignore_eos: continue after the end-of-sequence token.
        max_tokens: the most tokens; None: up to the model's length. min_tokens: the fewest.
        logprobs: the number of likeliest candidates per token, beside the sampled one; 0: none; -1: all.
        prompt_logprobs: the same for the prompt's tokens.
        logprob_token_ids: exactly these candidates (at most 128), in place of the likeliest.
        detokenize: False: outputs have no text.
        skip_special_tokens, spaces_between_special_tokens, include_stop_str_in_output: how tokens become text.
        truncate_prompt_tokens: how many tokens of the prompt are kept; -1: as many as the model takes.
        truncation_side: "left" keeps the last ones, "right" the first ones.
        prompt_logprob_token_ids: for each token of the prompt but the last, candidates for the one that follows: rows
            of token ids, all of the same length, filled up with -1. Their logprobs are the output's
            `prompt_token_id_logprobs`.
        prompt_logprob_start: the token of the prompt that the first row of these is for; 0.
        skip_reading_prefix_cache: True: the prompt is computed anew.
        trace_decode_token_ids: generates exactly these, with their logprobs. These four are for `generate`, and for a
            server that has vLLM's `/inference/v1/generate`.
        logit_bias: {token id: a number that is added to its logit}; the routes take it for ±100 where it is more.
        allowed_token_ids: the only ones that can be sampled.
        structured_outputs: `StructuredOutputsParams`, a dict such as `{"regex": …}`, or a pydantic model class.
        thinking_token_budget: tokens for reasoning; -1: no limit.
        repetition_detection: a dict with `max_pattern_size`, `min_pattern_size`, `min_count`; ends repetitive answers.
        extra_args: for plugins of the server: texts, numbers, True or False, or lists of them (the request field
            `vllm_xargs`); `kv_transfer_params` and `ec_transfer_params` in it become the request fields of that name.
        stream_interval: tokens per event, if a generation is streamed for resuming.
        routed_experts_prompt_start: tokens of the prompt without routing data, if the server returns such data.

    Raises `BadRequestError` for a wrong value, `UnsupportedParameterError` for a wrong name.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    watermarking: bool | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_token_ids: Sequence[Sequence[int]] | None = None
    prompt_logprob_start: int | None = None
    skip_reading_prefix_cache: bool | None = None
    trace_decode_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | type | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Mapping[str, int] | None = None
    extra_args: Mapping[str, Any] | None = None
    stream_interval: int | None = None
    routed_experts_prompt_start: int = 0

    def __new__(cls, **given: Any) -> SamplingParams:
        """Refuses names that are misspelt, or can't be passed on."""
        if not given.keys() <= _NAMES:
            asked = [name for name, value in given.items() if not _is_harmless(name, value)]
            _check_names(asked, sorted(_NAMES), REFUSED, "there is no sampling parameter")
        named = (name for name, value in given.items() if name in _NAMES)
        made = super().__new__(cls)
        made.__dict__["_given"] = frozenset(n for n in named if given[n] is not None or n == "max_tokens")
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _NAMES:
            _check_names((name,), sorted(_NAMES), REFUSED, "there is no sampling parameter")
        default, before = _DEFAULTS[name], self.__dict__.get(name)
        if value is None and name != "max_tokens":
            value = default
        self.__dict__[name] = value if value is default or value is None else _CHECKS[name](name, value)
        if "_complete" in self.__dict__:
            try:
                self._check_together()
            except BadRequestError:
                self.__dict__[name] = before
                raise
            self.__dict__["_given"] |= {name}

    def __post_init__(self) -> None:
        self._check_together()
        self.__dict__["_complete"] = True

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", f"must be at most max_tokens={self.max_tokens}, not {self.min_tokens}")
        if self.temperature < _GREEDY_BELOW and self.n > 1:
            raise _bad("n", f"must be 1 with temperature=0, where all answers are the same, not {self.n}")
        if self.prompt_logprob_start is not None and self.prompt_logprob_token_ids is None:
            raise _bad("prompt_logprob_start", "is for prompt_logprob_token_ids, which is missing")
        if self.trace_decode_token_ids is not None and self.n > 1:
            raise _bad("trace_decode_token_ids", "is for n=1")
        if self.stop and not self.detokenize:
            raise _bad("stop", "can't be with detokenize=False: stop strings are looked for in the text")

    @property
    def given(self) -> frozenset[str]:
        """The names that were given, or assigned to; the others have their defaults."""
        found: frozenset[str] = self.__dict__["_given"]
        return found

    def with_(self, changes: Mapping[str, Any]) -> SamplingParams:
        """A copy with these fields changed. (For `dataclasses.replace` all fields are given ones.)"""
        return type(self)(**{**{name: self.__dict__[name] for name in self.given}, **changes})

    def clone(self) -> SamplingParams:
        """A copy, as `vllm.SamplingParams.clone` makes it."""
        return copy.deepcopy(self)

    @classmethod
    def of(cls, value: Any) -> SamplingParams:
        """From None, a `SamplingParams`, a dict or a `vllm.SamplingParams`; a copy.

        Raises `UnsupportedParameterError` for what can't be passed on.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return copy.copy(value)
        if isinstance(value, Mapping):
            return cls(**value)
        if type(value).__name__ == "SamplingParams" and hasattr(value, "__struct_fields__"):
            return cls(**_set_in_vllm(value))
        raise UnsupportedParameterError(
            f"sampling parameters must be a SamplingParams or a dict, not {type(value).__name__}"
        )

    def to_request(self, *, chat: bool, only_given: bool = False) -> dict[str, Any]:
        """The request fields for `/v1/chat/completions` (`chat`) or `/v1/completions`.

        What the server would take from the model's generation_config is always there, unless `only_given`. Those of
        `ONLY_BY_TOKENS` are among them; for a chat they raise an `UnsupportedParameterError`.
        """
        if chat:
            _check_for_chat(self.given)
        names = self.given if only_given else self.given.union(_OF_GENERATION_CONFIG)
        request = {
            name: value
            for name in _DEFAULTS
            if name in names and name != "detokenize" and (value := self.__dict__[name]) is not None
        }
        if "logprob_token_ids" in request:
            request.setdefault("logprobs", 0)  # the routes want it there, and ignore its value then
        if chat and "logprobs" in request:
            request.update(chat_logprobs(request["logprobs"]))
        if "logit_bias" in request:  # which the routes cut to that themselves; JSON has no infinity
            request["logit_bias"] = {str(token): min(100, max(-100, b)) for token, b in request["logit_bias"].items()}
        if "structured_outputs" in request:
            request["structured_outputs"] = request["structured_outputs"].to_request()
        if "extra_args" in request:
            extra = dict(request.pop("extra_args"))
            for name in _TRANSFER:
                if name in extra:
                    request[name] = extra.pop(name)
            if extra:
                request["vllm_xargs"] = extra
        return request


def _check_for_chat(given: frozenset[str]) -> None:
    for name in sorted(ONLY_BY_TOKENS.keys() & given):
        instead = ONLY_BY_TOKENS[name] and f"; {ONLY_BY_TOKENS[name]}"
        raise UnsupportedParameterError(
            f"{name} is for generate(): the chat route does not take it{instead}", field=name
        )


def chat_logprobs(candidates: int) -> dict[str, Any]:
    """The fields of `/v1/chat/completions` for so many candidates per token beside the sampled one.

    Its `top_logprobs` counts the sampled token as one of them (vLLM 0.32), so one more is requested, up to the 20 that
    a server allows by default.
    """
    more = 1 if 0 < candidates < _MAX_LOGPROBS else 0
    return {"logprobs": True, "top_logprobs": candidates + more}


def nearest(name: str, known: Iterable[str]) -> str:
    """For error messages: " (did you mean 'a' or 'b'?)", or nothing."""
    found = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(SamplingParams)}
_NAMES = frozenset(_DEFAULTS)


def _without_the_harmless(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: SamplingParams, **given: Any) -> None:
        init(self, **{name: value for name, value in given.items() if name in _NAMES})  # `__new__` has looked

    return __init__


SamplingParams.__init__ = _without_the_harmless(SamplingParams.__init__)  # type: ignore[method-assign]


def _is_harmless(name: str, value: Any) -> bool:
    """Whether a refused parameter asks for nothing with this value."""
    if name not in REFUSED:
        return False
    off = _HARMLESS.get(name, ())
    return value is None or name == "output_kind" or any(type(value) is type(one) and value == one for one in off)


def _check_names(given: Iterable[str], known: Sequence[str], refused: Mapping[str, str], what: str) -> None:
    for name in given:
        if name in refused:
            raise UnsupportedParameterError(f"{name} can't be passed on to a server: {refused[name]}", field=name)
        if name not in known:
            hint = nearest(name, known) or f"; known are: {', '.join(sorted(known))}"
            raise UnsupportedParameterError(f"{what} {name!r}{hint}", field=name)


def _bad(name: str, what: str) -> BadRequestError:
    return BadRequestError(f"{name} {what}", field=name)


# -- checks of values ---------------------------------------------------------------------------------------------


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise _bad(name, f"must be an integer, not {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise _bad(name, f"must be an integer, not {value!r:.80}") from None


def _integer(least: int, most: int = _INT64 - 1) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        number = _whole(name, value)
        if not least <= number <= most:
            bounds = f"at least {least}" if most == _INT64 - 1 else f"in [{least}, {most}]"
            raise _bad(name, f"must be {bounds}, not {number}")
        return number

    return check


def count(name: str, value: Any) -> int:
    """A number of candidates; vLLM takes True for 1, and False for 0."""
    return int(value) if isinstance(value, bool) else _integer(-1)(name, value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise _bad(name, f"must be a number, not {value!r:.80}")
    try:
        number = value if type(value) is int else float(value)
        finite = math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        raise _bad(name, f"must be a number, not {value!r:.80}") from None
    if not finite:
        raise _bad(name, f"must be a finite number, not {value}")
    return number


def _number(least: float, most: float, *, above: bool = False) -> Callable[[str, Any], float]:
    """Within [least, most]; `above`: within (least, most]."""

    def check(name: str, value: Any) -> float:
        number = _real(name, value)
        if not least <= number <= most or (above and number == least):
            if most == math.inf:
                raise _bad(name, f"must be {'above' if above else 'at least'} {least:g}, not {number}")
            raise _bad(name, f"must be in {'(' if above else '['}{least:g}, {most:g}], not {number}")
        return number

    return check


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_") or (type(value) is int and value in (0, 1)):  # numpy's, and as in vLLM
        return bool(value)
    raise _bad(name, f"must be True or False, not {value!r:.80}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise _bad(name, f"must be a list of texts, not {value!r:.80}")
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str):
            raise _bad(name, f"must have nothing but texts, not {text!r:.80}")
        if not text:
            raise _bad(name, "can't have an empty text")
    return tuple(dict.fromkeys(texts))


def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise _bad(name, f"must be a list of texts; for a single one: [{value!r:.80}]")
    return _texts(name, value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(name, f"must be a list of token ids, not {value!r:.80}")
    return tuple(dict.fromkeys(_integer(0)(name, token) for token in value))


def _some_token_ids(name: str, value: Any) -> tuple[int, ...]:
    tokens = _token_ids(name, value)
    if not tokens:
        raise _bad(name, "can't be empty; leave it out to allow every token")
    return tokens


def _tokens_in_order(name: str, value: Any, least: int = 0) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(name, f"must be a list of token ids, not {value!r:.80}")
    tokens = tuple(_integer(least)(name, token) for token in value)
    if not tokens:
        raise _bad(name, "can't be empty")
    return tokens


def _rows_of_token_ids(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    value = without_numpy(value)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(name, f"must be a list of lists of token ids, not {value!r:.80}")
    rows = tuple(_tokens_in_order(name, row, least=-1) for row in value)
    if len({len(row) for row in rows}) != 1:
        raise _bad(name, "must have rows, all of the same length: fill them up with -1")
    return rows


def _few_token_ids(name: str, value: Any) -> tuple[int, ...]:
    tokens = _some_token_ids(name, value)
    if len(tokens) > _MAX_LOGPROB_TOKEN_IDS:
        raise _bad(name, f"can have {_MAX_LOGPROB_TOKEN_IDS} token ids at most, not {len(tokens)}")
    return tokens


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _bad(name, f"must be a dict of token ids and numbers, not {value!r:.80}")
    found = {}
    for token, bias in value.items():
        try:
            number = int(token) if isinstance(token, str) else operator.index(token)
        except (ValueError, TypeError):
            raise _bad(name, f"has the key {token!r:.80}, which is no token id") from None
        if isinstance(token, bool) or number < 0:
            raise _bad(name, f"has the key {token!r:.80}, which is no token id")
        found[number] = bias if type(bias) is float and math.isinf(bias) else _real(name, bias)
    return found


def _side(name: str, value: Any) -> str:
    if value not in ("left", "right"):
        raise _bad(name, f"must be 'left' or 'right', not {value!r:.80}")
    return str(value)


def _structured(name: str, value: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams.of(value)


def _repetition(name: str, value: Any) -> dict[str, int]:
    known = ("max_pattern_size", "min_pattern_size", "min_count")
    if hasattr(value, "__dataclass_fields__"):
        value = {each: getattr(value, each) for each in value.__dataclass_fields__}
    if not isinstance(value, Mapping):
        raise _bad(name, f"must be a dict with {', '.join(known)}, not {value!r:.80}")
    _check_names(value, known, {}, f"{name} has no")
    found = {each: _integer(0)(name, number) for each, number in value.items()}
    longest = found.get("max_pattern_size", 0)
    if found.get("min_pattern_size", 0) > longest:
        raise _bad(name, "must have min_pattern_size <= max_pattern_size")
    if longest and found.get("min_count", 0) < 2:
        raise _bad(name, "must have a min_count of at least 2")
    return found


_TRANSFER = ("kv_transfer_params", "ec_transfer_params")


def _extra_args(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(name, f"must be a dict, not {value!r:.80}")
    found = dict(value)
    for key, one in found.items():
        if key in _TRANSFER and isinstance(one, Mapping):
            continue
        for part in one if isinstance(one, list | tuple) else (one,):
            if not isinstance(key, str) or not isinstance(part, str | int | float):
                raise _bad(name, f"{key!r:.80} must be a text, a number or a list of these: nothing else is taken")
            if isinstance(part, int) and not -_INT64 <= part < 2 * _INT64:
                raise _bad(name, f"{key!r:.80} has an integer of more than 64 bits")
    return found


def _json_schema(value: Any) -> Any:
    """As a dict or text."""
    name = "structured_outputs"
    if value is None:
        return None
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    if isinstance(value, str):
        try:
            schema = json_module.loads(value)
        except ValueError as error:
            raise _bad(name, f"json is no JSON: {error}") from None
        if not isinstance(schema, dict):
            raise _bad(name, f"json must be a JSON schema, which is an object, not {value!r:.80}")
        return value
    if isinstance(value, Mapping):
        return dict(value)
    raise _bad(name, f"json must be a JSON schema (dict or text) or a pydantic model class, not {value!r:.80}")


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "n": _integer(1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(-1),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, math.inf, above=True),
    "watermarking": _flag,
    "seed": _integer(-_INT64),
    "stop": _texts,
    "stop_token_ids": _token_ids,
    "bad_words": _bad_words,
    "ignore_eos": _flag,
    "max_tokens": _integer(1),
    "min_tokens": _integer(0),
    "logprobs": count,
    "prompt_logprobs": count,
    "logprob_token_ids": _few_token_ids,
    "prompt_logprob_token_ids": _rows_of_token_ids,
    "prompt_logprob_start": _integer(0),
    "skip_reading_prefix_cache": _flag,
    "trace_decode_token_ids": _tokens_in_order,
    "detokenize": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "include_stop_str_in_output": _flag,
    "truncate_prompt_tokens": _integer(-1),
    "truncation_side": _side,
    "logit_bias": _logit_bias,
    "allowed_token_ids": _some_token_ids,
    "structured_outputs": _structured,
    "thinking_token_budget": _integer(-1),
    "repetition_detection": _repetition,
    "extra_args": _extra_args,
    "stream_interval": _integer(1),
    "routed_experts_prompt_start": _integer(0),
}


# -- vLLM's own --------------------------------------------------------------------------------------------------------

_OF_GENERATION_CONFIG = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "max_tokens",
)
"""What a server takes from the model's generation_config, or another default, if a request leaves it out."""


def _set_in_vllm(params: Any) -> dict[str, Any]:
    """The fields of a `vllm.SamplingParams` that differ from vLLM's defaults, or for which a server has its own."""
    defaults = type(params)()
    given = {}
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if name.startswith("_") or name in IN_PROCESS:
            continue
        if name == "skip_reading_prefix_cache" and bool(value) == _reads_no_cache(params):
            continue  # vLLM sets it by itself
        if name in _OF_GENERATION_CONFIG or not _equal(value, getattr(defaults, name)):
            given[name] = value
    return given


def _reads_no_cache(params: Any) -> bool:
    asked = (params.prompt_logprobs, getattr(params, "prompt_logprob_token_ids", None))
    return any(one is not None for one in asked)


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
