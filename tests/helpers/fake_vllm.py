"""A package named `vllm` for tests of the warm image: what the image looks at, with the stand-in as its server.

`write` makes it in a folder; on `PYTHONPATH` it hides the real one. Its server is `standin.py`, started by vLLM's own
command line, with EngineCore and Worker started by the method that `get_mp_context` gives.
"""

from __future__ import annotations

import os
from pathlib import Path

FILES = {
    "__init__.py": "__version__ = '0.32.0'\n",
    "platforms/__init__.py": "from vllm.platforms.cpu import CpuPlatform\ncurrent_platform = CpuPlatform()\n",
    "platforms/cpu.py": """
import os

class CpuPlatform:
    def is_cpu(self):
        return True

    @classmethod
    def check_and_update_config(cls, vllm_config):
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
""",
    "utils/__init__.py": "",
    "utils/system_utils.py": """
import multiprocessing
import os

def get_mp_context():
    return multiprocessing.get_context(os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn"))
""",
    "model_executor/__init__.py": "",
    "model_executor/models/__init__.py": "",
    "model_executor/models/registry.py": """
def _run_in_subprocess(fn):
    print("a new interpreter looks at the model's class", flush=True)
    return fn()
""",
    "v1/__init__.py": "",
    "v1/engine/__init__.py": "",
    "v1/engine/async_llm.py": "",
    "v1/engine/core.py": "",
    "v1/executor/__init__.py": "",
    "v1/executor/multiproc_executor.py": "",
    "v1/executor/uniproc_executor.py": "",
    "v1/worker/__init__.py": "",
    "v1/worker/cpu_worker.py": "",
    "entrypoints/__init__.py": "",
    "entrypoints/openai/__init__.py": "",
    "entrypoints/openai/api_server.py": """
import standin

if __name__ == "__main__":
    import vllm.found_out_later
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    current_platform.check_and_update_config(None)
    registry._run_in_subprocess(lambda: None)
    standin.main()
""",
    "found_out_later.py": "",
}
"""The files below `vllm/`. The launcher uses what the image patches, as vLLM does."""


def write(folder: Path, changes: dict[str, str] | None = None) -> dict[str, str]:
    """Makes the package below `folder`, some files with other contents; returns the environment that finds it."""
    for name, text in {**FILES, **(changes or {})}.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parent}"}
