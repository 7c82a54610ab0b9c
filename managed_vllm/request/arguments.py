"""The types of the methods' arguments: prompts, conversations, sampling parameters, and the fields of each route.

The fields are those of vLLM 0.32 and 0.33: `chat(…, **fields: Unpack[ChatFields])`. A type checker knows each name, an
editor offers it, and `names_fields` makes `help()` show it. `request.fields` takes its tables of names from here, so
there is one list of them. For each, None means: not sent, so the server's default counts.

Imports nothing but the standard library: `ManagedVLLM` needs it, and has to be imported within milliseconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, TypeVar

if TYPE_CHECKING:
    from managed_vllm.request.beam_search import BeamSearchParams
    from managed_vllm.request.sampling import SamplingParams

Method = TypeVar("Method", bound=Callable[..., Any])


class VLLMSamplingParams(Protocol):
    """A `vllm.SamplingParams`, without importing vllm."""

    @property
    def n(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def max_tokens(self) -> int | None: ...


Message: TypeAlias = Mapping[str, Any]
"""`{"role": …, "content": …}`, as for the OpenAI API; `request.messages` says what a content may be."""
Conversation: TypeAlias = Sequence[Message]
Prompt: TypeAlias = "str | Iterable[int] | Mapping[str, Any]"
"""A text, token ids, or a dict with `prompt` or `prompt_token_ids` and perhaps `multi_modal_data`."""
Params: TypeAlias = "SamplingParams | VLLMSamplingParams | Mapping[str, Any]"
ProgressBar: TypeAlias = bool | Callable[..., Any]
PoolingParams: TypeAlias = "VLLMPoolingParams | Mapping[str, Any]"
ScoreInput: TypeAlias = "str | Mapping[str, Any]"
"""A text, or a dict with `content`, a list of parts as in a message."""

BeamParams: TypeAlias = "BeamSearchParams | VLLMBeamSearchParams | Mapping[str, Any]"

CHAT_POSITIONAL = (
    *("lora_request", "priority", "chat_template", "chat_template_content_format", "add_generation_prompt"),
    *("continue_final_message", "tools", "chat_template_kwargs", "tokenization_kwargs", "mm_processor_kwargs"),
)
"""What `vllm.LLM.chat` (0.32) takes by position after `use_tqdm`."""
GENERATE_POSITIONAL = ("lora_request", "prompt_adapter_request", "guided_options_request", "priority")
"""What `vllm.LLM.generate` took by position after `use_tqdm`, before all of that became keywords (0.10)."""


class VLLMPoolingParams(Protocol):
    """A `vllm.PoolingParams`, without importing vllm."""

    @property
    def use_activation(self) -> bool | None: ...
    @property
    def dimensions(self) -> int | None: ...


class VLLMBeamSearchParams(Protocol):
    """A `vllm.sampling_params.BeamSearchParams`, without importing vllm."""

    @property
    def beam_width(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


class OfflineFields(TypedDict, total=False):
    """Arguments of `vllm.LLM.generate` and `chat` that are no request fields: taken where they ask for nothing more."""

    lora_request: object
    """An object with `lora_name` and `lora_path`, as vLLM's `LoRARequest`, or a list with one for each prompt: a server
    of ours loads it on its first use, another one must have it. The same as `model=` with its name."""
    tokenization_kwargs: Mapping[str, Any] | None
    """`add_special_tokens`, `truncate_prompt_tokens` and `truncation_side`."""
    prompt_adapter_request: None
    guided_options_request: None
    """These two are older vLLM's."""


class GenerationFields(TypedDict, total=False):
    """Fields of `/v1/completions` and of `/v1/chat/completions`."""

    model: str | None
    """Another name that the server has, such as that of a LoRA adapter."""
    user: str | None
    priority: int | Sequence[int] | None
    """Lower is sooner, where the server schedules by priority; one for all, or one for each request of the call."""
    request_id: str | None
    session_id: str | None
    cache_salt: str | None
    """Only requests with the same salt share a prefix cache."""
    add_special_tokens: bool | None
    response_format: Mapping[str, Any] | None
    return_token_ids: bool | None
    """Always on: outputs have the token ids."""
    return_tokens_as_token_ids: bool | None
    kv_transfer_params: Mapping[str, Any] | None
    ec_transfer_params: Mapping[str, Any] | None
    vllm_xargs: Mapping[str, Any] | None
    """For plugins of the server; `SamplingParams.extra_args` becomes this."""
    # Sampling parameters; `SamplingParams` says what they mean, and checks their values.
    n: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    watermarking: bool | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    ignore_eos: bool | None
    max_tokens: int | None
    min_tokens: int | None
    logprobs: int | bool | None
    """Candidates per token, beside the sampled one. For `chat` also whether there are any, beside `top_logprobs`."""
    prompt_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    truncate_prompt_tokens: int | None
    truncation_side: str | None
    logit_bias: Mapping[str, float] | None
    allowed_token_ids: Sequence[int] | None
    structured_outputs: Mapping[str, Any] | None
    thinking_token_budget: int | None
    repetition_detection: Mapping[str, int] | None
    stream_interval: int | None
    routed_experts_prompt_start: int | None
    return_weight_versions: bool | None
    """vLLM 0.33 and later."""


class CompletionFields(GenerationFields, OfflineFields, total=False):
    """Fields of `/v1/completions`: the keywords of `generate`."""

    suffix: str | None


class ChatFields(GenerationFields, OfflineFields, total=False):
    """Fields of `/v1/chat/completions`: the keywords of `chat`."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: str | None
    include_reasoning: bool | None
    chat_template: str | None
    """A Jinja template in place of the model's; the server must be started with `--trust-request-chat-template`."""
    chat_template_content_format: str | None
    """"auto": it is an option of the server."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the template, such as `{"enable_thinking": False}`."""
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    documents: Sequence[Mapping[str, str]] | None
    media_io_kwargs: Mapping[str, Mapping[str, Any]] | None
    mm_processor_kwargs: Mapping[str, Any] | None
    """The server must be started with `--trust-request-mm-kwargs`."""
    return_prompt_text: bool | None
    max_completion_tokens: int | None
    top_logprobs: int | None


class StreamFields(ChatFields, total=False):
    """The keywords of `stream`, which takes a prompt or a conversation."""

    suffix: str | None


class TokenizeFields(TypedDict, total=False):
    """Fields of `/tokenize`: the keywords of `tokenize`. All but the first are for conversations only."""

    add_special_tokens: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    mm_processor_kwargs: Mapping[str, Any] | None


def names_of(fields: Any) -> frozenset[str]:
    """The names in one of these classes."""
    return frozenset(fields.__annotations__)


def names_fields(fields: Any, positional: Sequence[str] = ()) -> Callable[[Method], Method]:
    """Makes `inspect.signature` and `help()` show each name of `fields` in the place of the method's `**fields`.

    `positional`: the names of what the method takes by position as `*further`, in this order.
    """

    def parameter(name: str, kind: Any) -> inspect.Parameter:
        annotation = fields.__annotations__[name]
        text = getattr(annotation, "__forward_arg__", annotation)
        return inspect.Parameter(name, kind, default=None, annotation=text)

    def decorate(method: Method) -> Method:
        signature = inspect.signature(method)
        own = [each for each in signature.parameters.values() if each.kind not in _VARIABLE]
        ahead = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        ahead += [parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in positional]
        behind = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        behind += [
            parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in fields.__annotations__ if name not in positional
        ]
        method.__signature__ = signature.replace(parameters=ahead + behind)  # type: ignore[attr-defined]
        return method

    return decorate


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
