"""Writes the generated parts of docs/parameters.md: what vLLM takes, and what becomes of it here.

    python tools/docs_parameters.py            brings the page up to date
    python tools/docs_parameters.py --check    only says whether it is: exit status 1 if not

The tables come from `managed_vllm.request.sampling`, `managed_vllm.request.fields` and the client's signatures. The
lists of vLLM's own parameters below are compared with the installed vllm by tests/project/test_docs.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path

from generated_page import main, table, with_parts

from managed_vllm.client import VLLMClient
from managed_vllm.request import fields, sampling, token_route
from managed_vllm.request.sampling import SamplingParams, StructuredOutputsParams

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parameters.md"

GENERATE = (
    *("prompts", "sampling_params", "use_tqdm", "lora_request", "priority", "tokenization_kwargs"),
    "mm_processor_kwargs",
)
"""Parameters of `vllm.LLM.generate` (0.32)."""
CHAT = (
    *("messages", "sampling_params", "use_tqdm", "lora_request", "priority", "chat_template"),
    *("chat_template_content_format", "add_generation_prompt", "continue_final_message", "tools"),
    *("chat_template_kwargs", "tokenization_kwargs", "mm_processor_kwargs"),
)
"""Parameters of `vllm.LLM.chat` (0.32)."""
SAMPLING = (
    *("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "watermarking", "top_p"),
    *("top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs"),
    *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "flat_logprobs"),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    *("output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "structured_outputs"),
    *("logit_bias", "allowed_token_ids", "extra_args", "bad_words", "skip_reading_prefix_cache"),
    *("thinking_token_budget", "repetition_detection", "routed_experts_prompt_start", "trace_decode_token_ids"),
)
"""Public fields of `vllm.SamplingParams` (0.32)."""
STRUCTURED = (
    *("json", "regex", "choice", "grammar", "json_object", "structural_tag"),
    *("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"),
)
"""Public fields of vLLM's `StructuredOutputsParams` (0.32)."""

NOTES = {
    "extra_args": "`vllm_xargs`: texts, numbers, flags, lists of them; `kv_transfer_params` and `ec_transfer_params` "
    "in it become the fields of that name",
    "logprob_token_ids": "`logprob_token_ids`, with `logprobs`, which the routes want with it",
    "logprobs": "`logprobs`; in a chat `logprobs` and `top_logprobs`, which counts the sampled token",
    "max_tokens": "`max_tokens`; None: up to the model's length, for which `generate` asks `/tokenize` first",
    "mm_processor_kwargs": "request field; the server must be started with `--trust-request-mm-kwargs`",
    "n": "`n`; 1 if greedy, as in vLLM",
    "stop": "`stop`; a server not of ours takes four at most (`VLLM_MAX_STOP_STRINGS`)",
    "detokenize": "False: no texts; see [Routes](#routes)",
    "prompt_logprob_start": "`prompt_logprob_start`",
    "prompt_logprob_token_ids": "`prompt_logprob_token_ids`, of vLLM's V2 model runner (GPUs); the output's "
    "`prompt_token_id_logprobs` is a base64 `.npy`",
    "trace_decode_token_ids": "`trace_decode_token_ids`; the server must be started with `enable_trace_replay=True`",
    "skip_reading_prefix_cache": "`skip_reading_prefix_cache`",
    "logit_bias": "`logit_bias`; beyond ±100, ±inf included, the routes take ±100",
    "stream_interval": "`stream_interval`; means something only where a generation is streamed for resuming",
    "structured_outputs": "`structured_outputs`, see below; a pydantic model class is its `json`",
    "tokenization_kwargs": "`add_special_tokens`, `truncate_prompt_tokens` and `truncation_side` of it",
    "truncate_prompt_tokens": "`truncate_prompt_tokens` (no field of vLLM's class)",
    "truncation_side": "`truncation_side` (no field of vLLM's class)",
    "priority": "request field; one for all, or a list with one each",
    "lora_request": "`model`, with the adapter's name: loaded on its first use; one for all, or a list with one each",
}


def call(parameters: Iterable[str], *, chat: bool) -> str:
    """One row per parameter of `vllm.LLM.chat` (`chat`) or `generate`."""
    ours = inspect.signature(VLLMClient.chat if chat else VLLMClient.generate).parameters
    rows = []
    for name in parameters:
        if name in fields.known(chat=chat) or name == "lora_request":
            rows.append((f"`{name}`", "supported", NOTES.get(name, "request field")))
        elif name in fields.OF_VLLM_LLM:
            rows.append((f"`{name}`", "refused", fields.OF_VLLM_LLM[name]))
        elif name in ours:
            rows.append((f"`{name}`", "supported", NOTES.get(name, "argument")))
        else:
            raise ValueError(f"what becomes of {name}= of vllm.LLM.{'chat' if chat else 'generate'}?")
    return table(("Parameter of `vllm.LLM`", "Here", "As, or why not"), rows)


def parameters() -> str:
    """One row per sampling parameter, vLLM's and others that are known."""
    taken = [field.name for field in dataclasses.fields(SamplingParams)]
    rows = [(f"`{name}`", "supported", _routes(name), NOTES.get(name, f"`{name}`")) for name in taken]
    for name, reason in sampling.REFUSED.items():
        here = "refused"
        if name in sampling.IN_PROCESS:
            here = (
                "without effect" if name == "output_kind" else "without effect in a `vllm.SamplingParams`, else refused"
            )
        rows.append((f"`{name}`", here, "", reason))
    if missing := set(SAMPLING) - set(taken) - set(sampling.REFUSED):
        raise ValueError(f"what becomes of {sorted(missing)} of vllm.SamplingParams?")
    return table(("Sampling parameter", "Here", "Routes", "Request field, or why not"), rows)


def _routes(name: str) -> str:
    """Of completions, chats, and token ids, those that take the parameter."""
    if name in sampling.ONLY_BY_TOKENS:
        return "tokens"
    by_tokens = name in token_route.SAMPLING or name in ("detokenize", "extra_args")
    return "all" if by_tokens else "text, chat"


def structured() -> str:
    """One row per field of `structured_outputs`."""
    notes = {"json": "a dict, a text or a pydantic model class", "structural_tag": "a dict or a text"}
    taken = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    rows = [(f"`{name}`", "supported", notes.get(name, "")) for name in taken]
    rows += [(f"`{name}`", "refused", why) for name, why in sampling.REFUSED_IN_STRUCTURED_OUTPUTS.items()]
    if missing := set(STRUCTURED) - set(taken) - set(sampling.REFUSED_IN_STRUCTURED_OUTPUTS):
        raise ValueError(f"what becomes of {sorted(missing)} of vLLM's StructuredOutputsParams?")
    return table(("Field", "Here", "As, or why not"), rows)


def known_fields() -> str:
    """The request fields by route, and those that are not passed on."""
    own = {field.name for field in dataclasses.fields(SamplingParams)}
    rows = [
        ("`generate` and `chat`", _names(fields.BOTH_ROUTES - own)),
        ("only `chat`", _names(fields.CHAT_ONLY)),
        ("only `generate`", _names(fields.COMPLETIONS_ONLY)),
    ]
    refused = [(f"`{name}`", reason) for name, reason in fields.REFUSED.items()]
    return (
        table(("Taken by", "Fields, beside the sampling parameters"), rows)
        + "\n\n"
        + table(("Refused field", "Why"), refused)
    )


def updated(page: str) -> str:
    """The page with its generated parts made anew. Raises `ValueError` where a marker is missing."""
    parts = {
        "generate": call(GENERATE, chat=False),
        "chat": call(CHAT, chat=True),
        "sampling": parameters(),
        "structured": structured(),
        "fields": known_fields(),
    }
    return with_parts(page, parts)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


if __name__ == "__main__":
    sys.exit(main(PAGE, Path(__file__).name, updated, __doc__))
