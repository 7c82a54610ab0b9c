"""Which request fields each of vLLM's two routes knows, so that no other is sent by mistake: vLLM ignores it silently.

The names are those of the `CompletionRequest` and `ChatCompletionRequest` of vLLM 0.32 and 0.33 (`request.arguments`);
tests/request/test_sampling.py compares them with the installed vllm's. A name that is newer, or in no table and like
none there, is looked up in the server's own /openapi.json (`to_look_up`). `extra_body={…}` bypasses all of it: for
another server, a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.arguments import ChatFields, CompletionFields, GenerationFields, OfflineFields, names_of
from managed_vllm.request.arrays import without_numpy
from managed_vllm.request.sampling import DEFAULT_MAX_TOKENS, SamplingParams, chat_logprobs, count, nearest

BOTH_ROUTES = names_of(GenerationFields)
"""Fields of both routes that are passed on."""
_OFFLINE = names_of(OfflineFields) | {"chat_template_content_format"}
CHAT_ONLY = names_of(ChatFields) - BOTH_ROUTES - _OFFLINE
COMPLETIONS_ONLY = names_of(CompletionFields) - BOTH_ROUTES - _OFFLINE
TOKENIZATION = frozenset({"add_special_tokens", "truncate_prompt_tokens", "truncation_side"})
"""What the routes take of `tokenization_kwargs=`."""

NEWER: Mapping[str, str] = {"return_weight_versions": "0.33"}
"""Fields that not every vLLM from 0.32 on has, and since which version.

Whether the server has one is looked up where a caller gives it, and so relies on it. `return_weight_versions` is sent
in any case (`resume`): a server that does not know it ignores it.
"""

REFUSED: Mapping[str, str] = {
    "stream": "chat() and generate() return whole answers; stream() streams",
    "stream_options": "chat() and generate() return whole answers; stream() streams",
    "echo": "outputs have the prompt, its token ids and, with prompt_logprobs=, its logprobs",
    "messages": "it is the first argument of chat()",
    "prompt": "it is the first argument of generate()",
    "prompt_embeds": "prompts are texts or token ids",
    "use_beam_search": "beam_search() does it",
    "length_penalty": "it only concerns beam search: BeamSearchParams have it",
    "return_token_offsets": "it only concerns the /render routes",
    "mm_payload": "it only concerns the /render routes",
    "return_mm_kwargs": "it only concerns the /render routes",
}
"""Fields that a route knows but this client does not pass on, with the reason."""

OF_VLLM_LLM: Mapping[str, str] = {
    "lora_request": "load it by llm.engine.load_lora() (or --lora-modules), and name it by model=",
    "chat_template_content_format": "it is an option of the server (--chat-template-content-format)",
    "mm_processor_kwargs": "/v1/completions does not take it; chat() does",
    "prompt_adapter_request": "vLLM has prompt adapters no more",
    "guided_options_request": "it is called structured_outputs, in the sampling parameters",
}
"""Arguments of `vllm.LLM.generate` and `chat` that are not request fields, with the reason."""

_OTHER_NAMES: Mapping[str, str] = {
    "guided_json": "structured_outputs={'json': …}",
    "guided_regex": "structured_outputs={'regex': …}",
    "guided_choice": "structured_outputs={'choice': […]}",
    "guided_grammar": "structured_outputs={'grammar': …}",
    "guided_decoding_backend": "nothing: the server chooses",
    "guided_whitespace_pattern": "structured_outputs={'regex': …} or {'grammar': …}",
    "extra_args": "vllm_xargs",
}
"""Fields that vLLM has removed or renamed; it would ignore them in silence."""
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "return_token_offsets": (False,),
    "chat_template_content_format": ("auto",),
}
"""Values of refused fields that ask for nothing. For each, so does None."""


def known(*, chat: bool) -> frozenset[str]:
    """The fields that `/v1/chat/completions` (`chat`) or `/v1/completions` knows, and that are passed on."""
    return BOTH_ROUTES | (CHAT_ONLY if chat else COMPLETIONS_ONLY)


def to_look_up(fields: Mapping[str, Any], *, chat: bool) -> frozenset[str]:
    """The names that only the server can tell about: newer ones, and those that are like no name in the tables."""
    names = known(chat=chat)
    refused = REFUSED.keys() | OF_VLLM_LLM.keys() | _OTHER_NAMES.keys() | known(chat=not chat) | _OFFLINE
    return frozenset(
        name
        for name, value in fields.items()
        if value is not None and (name in NEWER if name in names else name not in refused and not nearest(name, names))
    )


def fields_in(openapi: Mapping[str, Any], *, chat: bool) -> frozenset[str]:
    """The names of a route's request fields in a server's /openapi.json; none where that does not tell them."""
    route = openapi["paths"]["/v1/chat/completions" if chat else "/v1/completions"]
    schema = route["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rpartition("/")[2]
    return frozenset(openapi["components"]["schemas"][name]["properties"])


def checked(
    fields: Mapping[str, Any], *, chat: bool, looked_up: Mapping[str, bool] = MappingProxyType({})
) -> dict[str, Any]:
    """The keyword arguments of `chat` or `generate` that go into the request body.

    `looked_up` says for names of `to_look_up` whether the server has them.

    Raises `UnsupportedParameterError` for a name that the route does not know, or that this client does not pass on.
    """
    names = known(chat=chat)
    fields = dict(fields)
    found = tokenization_fields(fields.pop("tokenization_kwargs", None))
    for name in found.keys() & fields.keys():
        if fields[name] is not None and fields[name] != found[name]:
            raise BadRequestError(f"{name} is given twice: as a keyword and in tokenization_kwargs", field=name)
    for name, value in fields.items():
        if name == "return_token_ids" and value is False:
            raise UnsupportedParameterError("return_token_ids can't be switched off: outputs have them", field=name)
        if looked_up.get(name, name in names):
            if value is not None:
                found[name] = without_numpy(value)
            continue
        if name in names:
            since = f"vLLM {NEWER[name]} and later have it, the server does not"
            raise UnsupportedParameterError(f"{name}= can't be passed on: {since}", field=name)
        if (name in REFUSED or name in OF_VLLM_LLM) and (value is None or value in _HARMLESS.get(name, ())):
            continue
        raise UnsupportedParameterError(f"{name}= can't be passed on: {_why(name, chat=chat)}", field=name)
    return found


def tokenization_fields(kwargs: Mapping[str, Any] | None, taken: frozenset[str] = TOKENIZATION) -> dict[str, Any]:
    """The request fields of `tokenization_kwargs=`. Raises `UnsupportedParameterError` for what no field takes."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise BadRequestError(
            f"tokenization_kwargs must be a dict, not {type(kwargs).__name__}", field="tokenization_kwargs"
        )
    for name in (kwargs or {}).keys() - taken:
        raise UnsupportedParameterError(
            f"tokenization_kwargs={{{name!r}: …}} can't be passed on: the routes take "
            f"{', '.join(f'{one}=' for one in sorted(taken))} of it",
            field="tokenization_kwargs",
        )
    return {name: value for name, value in (kwargs or {}).items() if value is not None}


def by_name(method: str, names: Sequence[str], values: Sequence[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call, with what was given by position after `use_tqdm` (`names`, `values`).

    Raises `BadRequestError` for too many, for one that is given twice, and for an older vLLM's order.
    """
    if len(values) > len(names):
        raise BadRequestError(f"{method}() takes {3 + len(names)} arguments by position, not {3 + len(values)}")
    found = dict(zip(names, values, strict=False))
    if method == "chat" and isinstance(found.get("priority"), str):
        raise BadRequestError(
            "the fifth argument of chat() is priority, as in vLLM 0.32, and was chat_template before: name it",
            field="chat_template",
        )
    for name in found.keys() & fields.keys():
        raise BadRequestError(f"{name} is given twice: by position and as a keyword", field=name)
    return {**found, **fields}


def _why(name: str, *, chat: bool) -> str:
    if name in REFUSED:
        return REFUSED[name]
    if name in known(chat=not chat):
        return f"only {'generate' if chat else 'chat'}() takes it"
    if name in OF_VLLM_LLM:
        return OF_VLLM_LLM[name]
    if name in _OTHER_NAMES:
        return f"vLLM ignores it; use {_OTHER_NAMES[name]}"
    hint = nearest(name, known(chat=chat)) or " in vLLM 0.32 and 0.33, nor has the server"
    return f"the route has no such field{hint}; extra_body={{{name!r}: …}} sends it unchecked"


_ONE_EACH = ("priority", "model")
"""Fields that may differ among the requests of a call; `model` where `lora_request=` does."""


class CallFields:
    """The fields that the requests of one call share: the caller's keywords (`fields`), and `extra_body`, unchecked.

    Raises `UnsupportedParameterError` for a field that can't be passed on, `BadRequestError` for one that is wrong.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        extra_body: Mapping[str, Any] | None,
        count: int,
        *,
        chat: bool,
        looked_up: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        self._chat = chat
        self._fields = checked(fields, chat=chat, looked_up=looked_up)
        self.candidates = self._take_candidates() if chat else None
        self._extra = dict(extra_body or {})
        self._each: dict[str, Sequence[Any]] = {}
        for name in _ONE_EACH:  # as in vllm.LLM one for all, or one each
            given = self._fields.get(name)
            if isinstance(given, list | tuple):
                if len(given) != count:
                    raise BadRequestError(f"{count} prompts but {len(given)} of {name}=", field=name)
                self._each[name] = self._fields.pop(name)

    def _take_candidates(self) -> int | None:
        """The number of candidates that `chat(logprobs=5)` asks for; the route's own field is a boolean (vLLM 0.32)."""
        asked = self._fields.get("logprobs")
        if asked is None or isinstance(asked, bool):
            return None
        if "top_logprobs" in self._fields:
            raise BadRequestError(
                "logprobs= as a number and top_logprobs= both say how many candidates; give one", field="top_logprobs"
            )
        candidates = count("logprobs", asked)
        self._fields.update(chat_logprobs(candidates))
        return candidates

    def with_params(self, params: SamplingParams | None) -> dict[str, Any]:
        """All fields of a request but its prompt: keywords go before the defaults of sampling parameters.

        Raises `BadRequestError` for a keyword that is also given in them.
        """
        chat = self._chat
        given = {} if params is None else params.to_request(chat=chat, only_given=True)
        for name in sorted(self._fields.keys() & given.keys()):
            if self._fields[name] != given[name]:
                raise BadRequestError(f"{name} is given twice: as a keyword and in the sampling parameters", field=name)
        defaults = {"max_tokens": DEFAULT_MAX_TOKENS} if params is None else params.to_request(chat=chat)
        if self._fields.get("max_completion_tokens") is not None and "max_tokens" not in given:
            defaults.pop("max_tokens", None)
        request = {**defaults, **self._fields, **given}
        taken_out = {name for name, value in self._extra.items() if value is None and name in request}
        request = {name: value for name, value in {**request, **self._extra}.items() if name not in taken_out}
        return with_candidates_as_ids(request, chat=chat)

    def body(self, asked: Mapping[str, Any], rest: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The body of one request: its prompt (`asked`), and the `rest` from `with_params`."""
        mine = {name: values[index] for name, values in self._each.items() if values[index] is not None}
        return {**asked, **mine, **rest}


def with_candidates_as_ids(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """The body with a request for candidates as token ids, if any are requested beside the sampled token.

    Different candidates can have the same text (vLLM 0.32: `return_tokens_as_token_ids`).
    """
    candidates = body.get("top_logprobs" if chat else "logprobs") or body.get("logprob_token_ids")
    logprobs = body.get("logprobs")
    if logprobs is not None and logprobs is not False and candidates and body.get("return_tokens_as_token_ids") is None:
        return {**body, "return_tokens_as_token_ids": True}
    return body
