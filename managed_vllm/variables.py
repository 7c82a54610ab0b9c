"""The environment variables of a server: what the identity decides, and where the rest comes from.

What must hold:

1. What the identity covers (the devices, `env=`, and vLLM's variables that change its answers) the server gets exactly
   as the spec says, and a variable of that kind that the spec does not have it does not get at all.
2. Everything else is the first starter's, and stays so in every later life, whoever starts that.
3. What Kubernetes sets for a service whose name begins with `vllm` is neither: it is dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from managed_vllm import paths
from managed_vllm.errors import ConfigError
from managed_vllm.in_server import managed_vllm_arguments, managed_vllm_guard
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.masking import reveal

DEVICE_VARIABLES = frozenset(
    {
        "ASCEND_RT_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "GPU_DEVICE_ORDINAL",
        "HABANA_VISIBLE_MODULES",
        "HIP_VISIBLE_DEVICES",
        "NEURON_RT_VISIBLE_CORES",
        "ROCR_VISIBLE_DEVICES",
        "TPU_VISIBLE_CHIPS",
        "TPU_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
    }
)
"""Variables that say which devices a process sees. Part of the identity, also where they are empty or not set."""

_NEUTRAL = re.compile(
    r"VLLM_(SERVER_URL|MODEL_NAME|API_KEY|CACHE_ROOT|CONFIG_ROOT|ASSETS_CACHE|RPC_BASE_PATH|HOST_IP|PORT|NO_USAGE_STATS"
    r"|DO_NOT_TRACK|USAGE_\w+|LOGGING_\w+|CONFIGURE_LOGGING|LOG_\w+|TRACE_FUNCTION|DEBUG_\w+|PROCESS_NAME_PREFIX)"
)
"""vLLM's variables that do not change what a server answers; all its other variables are part of the key."""

_SERVER_DEFAULTS = {
    # By its default of 5 s for idle connections, a server that was too busy for some seconds to look at its sockets
    # closes those on which requests have come by then: uvloop runs timers before it reads.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
    # vLLM takes four stop strings of a request, where `vllm.LLM` takes any number (0.32: envs.py).
    "VLLM_MAX_STOP_STRINGS": "1024",
}
"""Variables of every server that we start, unless the user sets them."""

_OURS = {
    "VLLM_API_KEY": "give api_key=",
    "TMPDIR": "a server has a temporary directory of its own, whose short path its sockets need",
    "VLLM_RPC_BASE_PATH": "a server has a directory of its own for its sockets",
    "SPT_NOENV": "the supervisor finds the server's processes by their environment",
}
"""Variables that each server gets from us, and why nobody else can set them."""

_NOT_INHERITED = frozenset(
    {
        lifeline.MARKER,
        lifeline.SUPERVISOR,
        lifeline.ROOT,
        lifeline.REPLICA,
        managed_vllm_arguments.VARIABLE,
        "PYTHONHOME",
        "VLLM_API_KEY",
    }
    | {managed_vllm_guard.CONTROL_KEY, managed_vllm_guard.CONTROLLED}
)
"""Variables that belong to one process or server: a starter may itself run inside of another server."""


# -- the identity's part -----------------------------------------------------------------------------------------------


def checked(variables: Mapping[str, Any] | None) -> dict[str, str]:
    """The variables of `env=`, with absolute paths. Raises `ConfigError` for what can be none, or is not the user's.

    Numbers become text; True and None are refused: programs differ in how they read them.
    """
    given: object = variables
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError("env must be a dict of variables, e.g. {'HF_HOME': '/data/hf'}", field="env")
    return paths.environment({str(name): _checked(str(name), value) for name, value in (variables or {}).items()})


def _checked(name: str, value: Any) -> str:
    if not name or "=" in name or "\0" in name:
        raise ConfigError(f"env={{{name!r}: …}}: no variable can have this name", field="env")
    if name in _OURS or name in _NOT_INHERITED - {"PYTHONHOME"}:
        raise ConfigError(f"env={{{name!r}: …}} can't be set: {_OURS.get(name, 'it is ours')}", field="env")
    value = reveal(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | os.PathLike):
        hint = "; leave the name out to have it unset" if value is None else ""
        raise ConfigError(
            f"env={{{name!r}: …}}: the value of a variable is text, not {type(value).__name__}{hint}", field="env"
        )
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    if "\0" in text:
        raise ConfigError(f"env={{{name!r}: …}}: the value holds a NUL character", field="env")
    return text


def devices(environ: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of devices: those of `env=` go before the caller's own."""
    both = {**environ, **variables}
    return {name: _without_spaces(both[name]) for name in sorted(DEVICE_VARIABLES & both.keys())}


def _without_spaces(value: str) -> str:
    return ",".join(part.strip() for part in value.split(","))


def captured(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of vLLM in the caller's environment that change what a server answers."""
    links = service_links(environ)
    return paths.environment({n: v for n, v in environ.items() if _is_captured(n) and n not in links})


def _is_captured(name: str) -> bool:
    return name.startswith("VLLM_") and not _NEUTRAL.fullmatch(name)


def service_links(environ: Mapping[str, str]) -> frozenset[str]:
    """The variables that Kubernetes (or Docker's `--link`) sets for services whose names begin with `vllm`.

    A service `vllm` gives every pod of its namespace `VLLM_PORT=tcp://10.0.0.7:8000`, which vLLM reads as the number of
    a port (vllm#34199), and half a dozen more, which change with the service's address.
    """
    owners = {
        name.removesuffix("_PORT")
        for name, value in environ.items()
        if re.fullmatch(r"VLLM_(\w+_)?PORT", name) and re.match(r"(tcp|udp|sctp)://", value)
    }
    tails = r"_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"
    pattern = re.compile(rf"({'|'.join(sorted(map(re.escape, owners)))})({tails})") if owners else None
    return frozenset(name for name in environ if pattern is not None and pattern.fullmatch(name))


# -- the first starter's part ------------------------------------------------------------------------------------------


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What a server gets from the environment of its first starter: all that the identity does not cover.

    Raises `ConfigError` for a value with which vLLM would fail after half a minute.
    """
    dropped = _NOT_INHERITED | DEVICE_VARIABLES | service_links(environ)
    kept = {name: value for name, value in environ.items() if name not in dropped and not _is_captured(name)}
    port = kept.get("VLLM_PORT", "0")
    if not port.strip().isdecimal():
        raise ConfigError(
            f"the variable VLLM_PORT is {port!r}, but vLLM wants the number of a port; unset it", field="VLLM_PORT"
        )
    return {**_SERVER_DEFAULTS, **paths.environment(kept)}
