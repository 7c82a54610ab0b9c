"""What the warm image changes inside vLLM, each part only where it is what we know; and what it imports.

Written against vLLM 0.32. Two functions are replaced:

- `CpuPlatform.check_and_update_config` sets the start method of EngineCore and Workers to `spawn`, whatever was asked
  for (`platforms/cpu.py`): afterwards it is `fork` again. On other platforms vLLM follows
  `VLLM_WORKER_MULTIPROC_METHOD`, and itself falls back to `spawn` where a fork is not safe.
- `registry._run_in_subprocess` runs a new interpreter, with all of its imports, to look at the class of a model that it
  has not met before: the look is had in a forked child instead.

`apply` looks at each before it touches anything. A reason not to is a reason for the plain launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import managed_vllm_lifeline as lifeline  # type: ignore[import-not-found]

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"

_BASE = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
)
_CPU_WORKER = "vllm.v1.worker.cpu_worker"


def base_modules() -> list[str]:
    """What every server imports, beside its launcher. Called when that has been imported."""
    return [*_BASE, _CPU_WORKER] if _is_cpu() else list(_BASE)


def apply(argv: Sequence[str]) -> str | None:
    """Patches vLLM for servers that are started with these words.

    Returns None; or a reason not to fork such a server, and then nothing was changed.
    """
    reason = _why_not_fork(argv) or _why_not_look() or (_why_not_cpu() if _is_cpu() else None)
    if reason is None:
        os.environ[METHOD] = "fork"
        _patch_look()
        if _is_cpu():
            _patch_cpu()
    return reason


def do_beforehand() -> None:
    """Does what each server would do in the same way. What is done elsewhere in another version is left to the server.

    vLLM's argument parser is built once: what that computes from the sources of the configuration stays cached. On a
    CPU, the replacements of the Triton kernels are put into all modules, which takes a Worker a third of a second.
    """
    with contextlib.suppress(Exception):
        parsers = importlib.import_module("vllm.utils.argparse_utils")
        arguments = importlib.import_module(_parser_module())
        arguments.make_arg_parser(parsers.FlexibleArgumentParser())
    if _is_cpu():
        _register_kernels_once()


def _parser_module() -> str:
    """Where vLLM 0.33 has its arguments, or 0.32."""
    moved_to = "vllm.entrypoints.common.cli_args"
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(moved_to) is not None:
            return moved_to
    return "vllm.entrypoints.launchers.cli_args"


def _is_cpu() -> bool:
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


# -- the start method --------------------------------------------------------------------------------------------------


def _why_not_fork(argv: Sequence[str]) -> str | None:
    """vLLM must take the start method from its variable, and have no reason of its own against `fork`."""
    if os.environ.get(METHOD, "fork") != "fork":
        return f"{METHOD}={os.environ[METHOD]} is set"
    if re.search("libi?omp", os.environ.get("LD_PRELOAD", "")):
        return "LLVM's OpenMP is preloaded: its threads can't be given to a forked Worker"
    contexts = _function("vllm.utils.system_utils", "get_mp_context", [])
    if isinstance(contexts, str):
        return contexts
    with _environment(METHOD, "fork"), _arguments(argv):
        method = contexts().get_start_method()
    if method != "fork":
        return f"vLLM uses {method!r} here, though {METHOD}=fork"
    return "CUDA can't be used any more after a fork" if _is_cuda_lost() else None


def _is_cuda_lost() -> bool:
    """torch forbids CUDA in the children of a process that has counted its devices through CUDA, initialised or not."""
    cuda = sys.modules.get("torch.cuda")
    return cuda is not None and bool(_call_in_child(cuda._is_in_bad_fork))


def _why_not_cpu() -> str | None:
    original = getattr(_platform(), "check_and_update_config", None)
    if not inspect.ismethod(original) or original.__self__ is not _platform():
        return "CpuPlatform.check_and_update_config is not what we know"
    return _unlike(original, "vllm.platforms.", ["vllm_config"])


def _patch_cpu() -> None:
    platform = _platform()
    original = platform.check_and_update_config.__func__

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        before = os.environ.get("LD_PRELOAD")
        original(cls, vllm_config)
        if os.environ.get("LD_PRELOAD") == before:
            os.environ[METHOD] = "fork"
        else:
            print(f"managed_vllm: LD_PRELOAD is now {os.environ['LD_PRELOAD']}: EngineCore and Workers are spawned")

    platform.check_and_update_config = classmethod(check_and_update_config)


def _register_kernels_once() -> None:
    """Modules that are imported later find the replacements where they look for the kernels."""
    platform = _platform()
    register = getattr(platform, "register_triton_kernel_overrides", None)
    if inspect.ismethod(register) and not inspect.signature(register).parameters:
        register()
        platform.register_triton_kernel_overrides = classmethod(lambda cls: None)


def _platform() -> Any:
    return type(importlib.import_module("vllm.platforms").current_platform)


# -- the look at a model's class ---------------------------------------------------------------------------------------


def _why_not_look() -> str | None:
    found = _function("vllm.model_executor.models.registry", "_run_in_subprocess", ["fn"])
    return found if isinstance(found, str) else None


def _patch_look() -> None:
    registry = importlib.import_module("vllm.model_executor.models.registry")
    # On a CPU what it imports serves EngineCore and Workers as well. Elsewhere it might initialise the device.
    registry._run_in_subprocess = _call if _is_cpu() else _call_in_child  # type: ignore[attr-defined]


def _call(fn: Callable[[], Any]) -> Any:
    return fn()


def _call_in_child(fn: Callable[[], Any]) -> Any:
    """The result of `fn`, computed in a forked child. Raises `RuntimeError` with the child's words if it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lifeline.fall_with_parent()
            answer = (True, fn())
        except BaseException:
            answer = (False, traceback.format_exc())
        with open(writer, "wb") as file:
            file.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    done, result = pickle.loads(data) if data else (False, "it was killed")
    if not done:
        raise RuntimeError(f"Error raised in the child:\n{result}")
    return result


# -- what is looked at -------------------------------------------------------------------------------------------------


def _function(module: str, name: str, parameters: list[str]) -> Any:
    """The function, or a text that says how it differs from what we know."""
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return f"{module}.{name} does not exist"
    if not inspect.isfunction(found):
        return f"{module}.{name} is no function"
    return _unlike(found, module, parameters) or found


def _unlike(function: Any, module: str, parameters: list[str]) -> str | None:
    name = f"{function.__module__}.{function.__qualname__}"
    if not function.__module__.startswith(module):
        return f"{name} is not vLLM's own"
    if list(inspect.signature(function).parameters) != parameters:
        return f"{name} takes {inspect.signature(function)}"
    return None


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _arguments(argv: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, list(argv)
    try:
        yield
    finally:
        sys.argv = before
