"""Arguments of `embed`, `encode`, `classify` and `score`, and of `beam_search`, that become request fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from managed_vllm.errors import BadRequestError, UnsupportedParameterError
from managed_vllm.request.fields import OF_VLLM_LLM, TOKENIZATION, tokenization_fields

_POOLING = frozenset({"use_activation", "dimensions", "task"})
"""Fields of `vllm.PoolingParams` that the routes take; `task` is encode()'s `pooling_task=`."""


def pooling_fields(
    pooling_params: Any, lora_request: object, tokenization_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The request fields of these three arguments.

    Args:
        pooling_params: None, a `vllm.PoolingParams`, or a dict with `use_activation` and `dimensions`.
        lora_request: must be None.
        tokenization_kwargs: of it the routes take `request.fields.TOKENIZATION`, and `padding`.

    Raises `UnsupportedParameterError` for what can't be passed on, `BadRequestError` for another type.
    """
    refuse_lora(lora_request)
    found = tokenization_fields(tokenization_kwargs, TOKENIZATION | {"padding"})
    for name, value in _named(pooling_params).items():
        if name not in _POOLING:
            raise UnsupportedParameterError(f"no route takes {name} of pooling_params", field=name)
        found[name] = value
    return found


def refuse_lora(lora_request: object) -> None:
    """Raises `UnsupportedParameterError` for a `lora_request=` that is one."""
    if lora_request is not None:
        raise UnsupportedParameterError(
            f"lora_request= can't be passed on: {OF_VLLM_LLM['lora_request']}", field="lora_request"
        )


def _named(params: Any) -> dict[str, Any]:
    """What is set in pooling parameters, by name."""
    if params is None or isinstance(params, Mapping):
        given = dict(params or {})
    elif hasattr(params, "__struct_fields__"):
        default = type(params)()
        fields = params.__struct_fields__
        given = {name: getattr(params, name) for name in fields if getattr(params, name) != getattr(default, name)}
    else:
        kind = type(params).__name__
        raise BadRequestError(f"pooling_params must be a PoolingParams or a dict, not {kind}", field="pooling_params")
    return {name: value for name, value in given.items() if value is not None}
