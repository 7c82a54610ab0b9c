"""What the stand-in has printed: a log is written by its reader, which may be later than the answer to a request."""

from __future__ import annotations

import secrets

import requests
from processes import HANG_S, eventually

from managed_vllm import ManagedVLLM


def whole_log(llm: ManagedVLLM) -> str:
    """The newest 1,000 lines, with all that was printed until now: the server is asked to print one more."""
    mark = f"mark={secrets.token_hex(8)}"
    headers = {"Authorization": f"Bearer {llm.api_key}"}
    url = f"{llm.base_url.removesuffix('/v1')}/is_paused?{mark}"
    requests.get(url, headers=headers, timeout=HANG_S).raise_for_status()
    eventually(lambda: mark in llm.logs(1000), "the log has the last line")
    return "\n".join(line for line in llm.logs(1000).splitlines() if "?mark=" not in line)
