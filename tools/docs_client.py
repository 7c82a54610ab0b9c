"""Writes the generated part of docs/client.md: every public name of `vllm.LLM`, and what becomes of it here.

    python tools/docs_client.py            brings the page up to date
    python tools/docs_client.py --check    only says whether it is: exit status 1 if not

The list of vLLM's names below is compared with the installed vllm by tests/project/test_docs.py, so that a method that
vLLM adds is noticed.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from generated_page import main, table, with_parts

from managed_vllm import ManagedVLLM
from managed_vllm.request.surface import NOT_HERE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "client.md"

METHODS = (
    *("apply_model", "beam_search", "chat", "classify", "collective_rpc", "embed", "encode", "enqueue", "enqueue_chat"),
    *("finish_weight_update", "from_engine_args", "generate", "get_default_sampling_params", "get_metrics"),
    *("get_tokenizer", "get_weight_version", "get_world_size", "init_weight_transfer_engine"),
    *("release_kv_cache_memory", "reset_mm_cache", "reset_prefix_cache", "score", "shutdown_weight_transfer_engine"),
    *("sleep", "start_draft_weight_update", "start_profile", "start_weight_update", "stop_profile"),
    *("update_weight_version", "update_weights", "wait_for_completion", "wake_up"),
)
"""Public methods of `vllm.LLM` (0.32)."""
OLDER = ("reward", "set_tokenizer")
"""Those of earlier versions."""
ATTRIBUTES = (
    *(
        "chat_template",
        "chat_template_config",
        "default_sampling_params",
        "engine_class",
        "input_processor",
        "llm_engine",
        "model_config",
    ),
    *("pooling_io_processors", "pooling_task", "renderer", "request_counter", "runner_type", "supported_tasks"),
)
"""Public attributes of its instances (0.32)."""


def surface() -> str:
    """One row for each method that is here, and one for all names with the same reason why they are not."""
    rows, reasons = [], dict[str, list[str]]()
    for name in sorted((*METHODS, *OLDER)) + list(ATTRIBUTES):
        if name in NOT_HERE:
            reasons.setdefault(NOT_HERE[name], []).append(f"`{name}`")
        else:
            about = inspect.cleandoc(getattr(ManagedVLLM, name).__doc__ or "").partition("\n\n")[0]
            rows.append((f"`{name}`", "here", about.replace("\n", " ")))
    rows += [(", ".join(names), "not here", reason) for reason, names in reasons.items()]
    return table(("Name of `vllm.LLM`", "", "What it does here, or why not, and what to use"), rows)


def updated(page: str) -> str:
    """The page with its generated part made anew. Raises `ValueError` where a marker is missing."""
    return with_parts(page, {"surface": surface()})


if __name__ == "__main__":
    sys.exit(main(PAGE, Path(__file__).name, updated, __doc__))
