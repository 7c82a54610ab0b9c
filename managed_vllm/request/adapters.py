"""`lora_request=` of `generate`, `chat` and `stream`, as `vllm.LLM` has it: an adapter becomes the request's `model`.

Where a supervisor runs the server, an adapter that is not loaded yet is loaded on its first use.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from managed_vllm.errors import BadRequestError

LoadAdapter = Callable[[str, str, float | None], Awaitable[None]]
"""Sees to it that the adapter of that name and folder is loaded, within that many seconds (None: no bound)."""


@dataclass(frozen=True)
class _Adapter:
    name: str
    path: str

    @classmethod
    def of(cls, given: object) -> _Adapter | None:
        if given is None:
            return None
        name, path = (getattr(given, field, None) for field in ("lora_name", "lora_path"))
        if not isinstance(name, str) or not name or not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise BadRequestError(
                "lora_request must be an object with lora_name and lora_path, as vllm's LoRARequest, or a list with "
                f"one for each prompt, not {given!r:.200}",
                field="lora_request",
            )
        return cls(name, os.fspath(path))


async def with_adapters(
    fields: Mapping[str, Any], count: int, load: LoadAdapter | None, timeout_s: float | None
) -> dict[str, Any]:
    """The fields of a call, with the adapters' names as `model`: one for all, or a list with one each.

    Without `load` the server must have them. Raises `BadRequestError`, and what `load` raises.
    """
    given = fields.get("lora_request")
    rest = {name: value for name, value in fields.items() if name != "lora_request"}
    if given is None:
        return rest
    if rest.get("model") is not None:
        raise BadRequestError("model= and lora_request= both name a model; give one", field="lora_request")
    each = isinstance(given, list | tuple)
    asked = [_Adapter.of(one) for one in (given if each else [given])]
    if each and len(asked) != count:
        raise BadRequestError(f"{count} prompts but {len(asked)} of lora_request=", field="lora_request")
    for adapter in dict.fromkeys(asked):
        if adapter is not None and load is not None:
            await load(adapter.name, adapter.path, timeout_s)
    names = [None if adapter is None else adapter.name for adapter in asked]
    return {**rest, "model": names if len(set(names)) > 1 else names[0]}
