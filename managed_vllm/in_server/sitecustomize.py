"""Runs at the start of every Python process of a supervised server; then hands on to the sitecustomize it shadows."""

import importlib.machinery
import importlib.util
import os
import sys


def _run_shadowed() -> None:
    """A distribution, a virtual environment or the user may have a sitecustomize of its own: it still runs."""
    here = os.path.realpath(os.path.dirname(__file__))
    path = [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


try:
    # beside this file, on the server's PYTHONPATH
    import managed_vllm_arguments  # type: ignore[import-not-found]
    import managed_vllm_lifeline as lifeline  # type: ignore[import-not-found]
    import managed_vllm_segments  # type: ignore[import-not-found]

    lifeline.at_interpreter_start()
    managed_vllm_arguments.fill_in()
    managed_vllm_segments.name_after_server(os.environ.get(lifeline.MARKER), os.environ.get(lifeline.REPLICA))
finally:
    _run_shadowed()
