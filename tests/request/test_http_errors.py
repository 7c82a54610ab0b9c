"""The errors for responses that refuse a request: by type, with the numbers that vLLM's messages have."""

from __future__ import annotations

import pytest

from managed_vllm.errors import BadRequestError, ContextLengthError
from managed_vllm.masking import Secret
from managed_vllm.request.http_errors import error_for_status, message_of, retry_after_s
from managed_vllm.status import Connection

HERE = Connection(base_url="http://localhost:1/v1", api_key=Secret(""), model="m")
TOO_LONG: dict[str, tuple[str, tuple[int | None, int | None, int | None]]] = {
    # vLLM 0.32, renderers/params.py
    "_token_len_check": (
        "This model's maximum context length is 128 tokens. However, your prompt contains 200 input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
        "(parameter=input_tokens, value=200)",
        (128, 200, None),
    ),
    "_token_len_check, truncated": (
        "This model's maximum context length is 128 tokens. However, your prompt contains at least 129 input tokens, "
        "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
        "(parameter=input_tokens, value=129)",
        (128, 129, None),
    ),
    "_text_len_check": (
        "This model's maximum context length is 128 tokens. However, your prompt contains 90000 characters (more than "
        "2048 characters, which is the upper bound for 128 input tokens). Please reduce the length of the input "
        "prompt. (parameter=input_text, value=90000)",
        (128, None, None),
    ),
    "output tokens alone, completions": (
        "max_tokens=4096 cannot be greater than max_model_len=128. Please request fewer output tokens. "
        "(parameter=max_tokens, value=4096)",
        (128, None, 4096),
    ),
    "output tokens alone, chat": (
        "max_completion_tokens=4096 cannot be greater than max_model_len=128. Please request fewer output tokens. "
        "(parameter=max_completion_tokens, value=4096)",
        (128, None, 4096),
    ),
    "output tokens alone, without names": (
        "max_output_tokens=4096 cannot be greater than max_total_tokens=128. Please request fewer output tokens.",
        (128, None, 4096),
    ),
    "truncate_prompt_tokens": (
        "truncate_prompt_tokens=512 cannot be greater than max_model_len = 128. Please request a smaller truncation "
        "size. (parameter=truncate_prompt_tokens, value=512)",
        (128, None, None),
    ),
    # v1/engine/input_processor.py
    "_validate_prompt_len": (
        "The decoder prompt (length 300) is longer than the maximum model length of 128. Make sure that "
        "`max_model_len` is no smaller than the number of text tokens plus multimodal tokens. For image inputs, the "
        "number of image tokens depends on the number of images, and possibly their aspect ratios as well.",
        (128, 300, None),
    ),
    "_validate_prompt_len, just": (
        "The decoder prompt (length 128) plus the number of requested output tokens (at least 1) is longer than the "
        "maximum model length of 128. Make sure that `max_model_len` is no smaller than the number of text tokens "
        "(prompt + requested output tokens).",
        (128, 128, None),
    ),
    # entrypoints/serve/utils/api_utils.py
    "get_max_tokens": ("Input length (300) exceeds model's maximum context length (128).", (128, 300, None)),
    # entrypoints/openai/responses/serving.py
    "responses": (
        "The engine prompt length 300 exceeds the max_model_len 128. Please reduce prompt.",
        (128, 300, None),
    ),
    # older versions, and OpenAI
    "requested both": (
        "This model's maximum context length is 128 tokens. However, you requested 140 tokens (100 in the messages, "
        "40 in the completion). Please reduce the length of the messages or completion.",
        (128, 100, 40),
    ),
    "output after input": (
        "'max_tokens' or 'max_completion_tokens' is too large: 40. This model's maximum context length is 128 tokens "
        "and your request has 100 input tokens (40 > 128 - 100).",
        (128, 100, 40),
    ),
    "requested output": (
        "This model's maximum context length is 128 tokens. However, you requested 40 output tokens and your prompt "
        "contains at least 89 input tokens, for a total of at least 129 tokens. Please reduce the length of the input "
        "prompt or the number of requested output tokens.",
        (128, 89, 40),
    ),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_what_is_too_long_is_told_in_numbers(case: str) -> None:
    message, (max_model_len, prompt, max_tokens) = TOO_LONG[case]
    error = error_for_status(400, message, HERE)
    assert isinstance(error, ContextLengthError), error
    assert (error.max_model_len, error.prompt_tokens, error.max_tokens) == (max_model_len, prompt, max_tokens)
    assert error.status == 400
    assert message in str(error)


@pytest.mark.parametrize(
    "message",
    [
        "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
        "The model `m` is busy",
        "max_tokens must be at least 1, got 0",
        "maximum context length is 9" + "9" * 5000 + " tokens",
        "Requested sample logprobs of 30, which is greater than max allowed: 20",
        "",
    ],
)
def test_other_refusals_are_bad_requests(message: str) -> None:
    error = error_for_status(400, message, HERE)
    assert type(error) is BadRequestError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error": {"message": "no", "code": 400}}', "no"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b"<h1>no</h1>", "<h1>no</h1>"),
        (b"\xff", "\ufffd"),
        (b"[" * 5000, "[" * 1000),
        (b"", ""),
    ],
)
def test_the_message_is_found_in_whatever_the_server_sends(data: bytes, message: str) -> None:
    assert message_of(data) == message


def test_a_server_says_when_to_come_back_in_seconds_or_as_a_date() -> None:
    assert retry_after_s("12") == 12
    assert retry_after_s(" 1.5 ") == 1.5
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (retry_after_s("Fri, 31 Dec 2100 23:59:59 GMT") or 0) > 1e6
    for nothing in (None, "", "soon", "-3", "9" * 30, "inf", "nan"):
        assert retry_after_s(nothing) is None
