"""One vLLM server behind one context manager: started on first use, shared, watched, and gone with its last user.

    from managed_vllm import ManagedVLLM

    with ManagedVLLM(model="demo") as llm:
        print(llm.chat([{"role": "user", "content": "Hello"}])[0].outputs[0].text)

The public names are loaded when they are first used: `import managed_vllm` takes neither vllm, torch, transformers nor
openai, and costs a few milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "ManagedVLLM": "managed_vllm.session",
    "AsyncVLLMClient": "managed_vllm.client",
    "VLLMClient": "managed_vllm.client",
    "VLLMClientWrapper": "managed_vllm.client",
    "Image": "managed_vllm.request.images",
    "BeamSearchParams": "managed_vllm.request.beam_search",
    "SamplingParams": "managed_vllm.request.sampling",
    "StructuredOutputsParams": "managed_vllm.request.sampling",
    "RequestOutput": "managed_vllm.request.outputs",
    "CompletionOutput": "managed_vllm.request.outputs",
    "Logprob": "managed_vllm.request.outputs",
    "RestartPolicy": "managed_vllm.policies",
    "HangPolicy": "managed_vllm.policies",
    "RetryPolicy": "managed_vllm.policies",
    "ServerState": "managed_vllm.status",
    "ServerStatus": "managed_vllm.status",
    "ManagedVLLMError": "managed_vllm.errors",
}

__all__ = [*sorted(_HOME_OF), "__version__"]

if TYPE_CHECKING:
    from managed_vllm.client import AsyncVLLMClient as AsyncVLLMClient
    from managed_vllm.client import VLLMClient as VLLMClient
    from managed_vllm.client import VLLMClientWrapper as VLLMClientWrapper
    from managed_vllm.errors import ManagedVLLMError as ManagedVLLMError
    from managed_vllm.policies import HangPolicy as HangPolicy
    from managed_vllm.policies import RestartPolicy as RestartPolicy
    from managed_vllm.policies import RetryPolicy as RetryPolicy
    from managed_vllm.request.beam_search import BeamSearchParams as BeamSearchParams
    from managed_vllm.request.images import Image as Image
    from managed_vllm.request.outputs import CompletionOutput as CompletionOutput
    from managed_vllm.request.outputs import Logprob as Logprob
    from managed_vllm.request.outputs import RequestOutput as RequestOutput
    from managed_vllm.request.sampling import SamplingParams as SamplingParams
    from managed_vllm.request.sampling import StructuredOutputsParams as StructuredOutputsParams
    from managed_vllm.session import ManagedVLLM as ManagedVLLM
    from managed_vllm.status import ServerState as ServerState
    from managed_vllm.status import ServerStatus as ServerStatus


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME_OF))
